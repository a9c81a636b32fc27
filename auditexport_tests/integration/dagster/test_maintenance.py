"""Requeue, sweep and reconcile as jobs, on a real instance."""

from __future__ import annotations

from pathlib import Path

import dagster as dg
import pytest

from auditexport_pipeline.definitions import defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events


def launch(exporter: Exporter, job: str, op: str, **config: object) -> dg.ExecuteInProcessResult:
    return defs.resolve_job_def(job).execute_in_process(
        instance=exporter.instance, run_config={"ops": {op: {"config": config}}}, raise_on_error=False
    )


def numbers(result: dg.ExecuteInProcessResult, op: str) -> dict[str, object]:
    (output,) = [event for event in result.get_step_success_events() if event.step_key == op] and [
        event.step_output_data for event in result.all_events if event.is_successful_output and event.step_key == op
    ]
    return {name: value.value for name, value in output.metadata.items()}


@pytest.mark.slow
def test_a_loss_is_found_repaired_and_gone_by_jobs_alone(exporter: Exporter, stack: Stack) -> None:
    """An operator repairs a loss in the Dagster UI, without SQL."""
    stack.put(*events(20))
    assert exporter.drain().success
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2}
    )

    found = launch(exporter, "reconcile_audit_logs", "reconcile_window")
    assert not found.success
    (line,) = exporter.failures(found.run_id)
    assert "1 missing, events evt_3" in line
    assert not launch(exporter, "reconcile_audit_logs", "reconcile_window", repair=True, why="lost").success
    assert stack.pending() == 1
    assert exporter.drain().success
    clean = launch(exporter, "reconcile_audit_logs", "reconcile_window")
    assert clean.success
    assert numbers(clean, "reconcile_window")["missing"] == 0
    observation = exporter.instance.fetch_observations(dg.AssetKey("audit_logs_raw_v1"), limit=1).records[0]
    assert observation.asset_observation is not None
    assert observation.asset_observation.metadata["entries_stored"].value == 20
    actions = stack.upkeep.actions(10)
    assert [action.verb for action in actions] == ["reconcile", "reconcile", "repair", "reconcile"]
    assert (actions[2].by.why, actions[2].rows) == ("lost", 1)


@pytest.mark.slow
def test_a_reconciliation_writes_its_report_also_when_it_fails(
    exporter: Exporter, stack: Stack, tmp_path: Path
) -> None:
    """The report is read because the run failed, and the run's metadata has its path."""
    stack.put(*events(20))
    exporter.drain()
    path = tmp_path / "page.html"
    config = {"report_path": str(path)}
    assert numbers(launch(exporter, "reconcile_audit_logs", "reconcile_window", **config), "reconcile_window")[
        "page"
    ] == str(path)
    assert "Reconciled clean: outbox and ClickHouse agree on all 20 entries." in path.read_text()
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2}
    )
    failed = launch(exporter, "reconcile_audit_logs", "reconcile_window", **config)
    assert not failed.success
    html = path.read_text()
    assert "differ: 1 missing" in html
    assert f"Dagster run {failed.run_id[:8]} of reconcile_audit_logs" in html
    observation = exporter.instance.fetch_observations(dg.AssetKey("audit_logs_raw_v1"), limit=1).records[0]
    assert observation.asset_observation is not None
    assert observation.asset_observation.metadata["page"].value == str(path)

    with pytest.raises(dg.DagsterInvalidConfigError, match="cannot be written"):
        launch(exporter, "reconcile_audit_logs", "reconcile_window", report_path=str(tmp_path / "none" / "page.html"))
    assert len(stack.upkeep.actions(10)) == 2


@pytest.mark.slow
def test_requeue_and_sweep_count_their_rows(exporter: Exporter, stack: Stack) -> None:
    """A dry run counts first; the sweep runs every night, and takes only what is past retention."""
    stack.put(*events(20))
    exporter.drain()
    two = {"event_ids": ["evt_1", "evt_2"], "why": "wanted"}
    dry = launch(exporter, "requeue_events", "requeue_rows", dry_run=True, **two)
    assert (numbers(dry, "requeue_rows")["rows"], stack.pending()) == (2, 0)
    done = launch(exporter, "requeue_events", "requeue_rows", who="me", **two)
    assert (numbers(done, "requeue_rows")["rows"], stack.pending()) == (2, 2)
    assert numbers(launch(exporter, "sweep_exported_rows", "sweep_rows"), "sweep_rows")["rows"] == 0
    swept = launch(exporter, "sweep_exported_rows", "sweep_rows", outbox_days=0.0)
    assert numbers(swept, "sweep_rows")["rows"] == 18
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 2


@pytest.mark.parametrize(
    ("job", "op", "config", "message"),
    [
        ("requeue_events", "requeue_rows", {"why": "everything"}, "a requeue names its rows"),
        ("requeue_events", "requeue_rows", {"why": " ", "workspace_id": "ws_1"}, "why is empty"),
        ("requeue_events", "requeue_rows", {"why": "x", "from_pk": 9, "to_pk": 1}, "from_pk is 9 and to_pk is 1"),
        ("sweep_exported_rows", "sweep_rows", {"chunk_rows": 0}, "chunk_rows is 0"),
        ("sweep_exported_rows", "sweep_rows", {"ledger_days": 2.0}, "ledger_days is 2.0 and outbox_days is 30"),
        ("reconcile_audit_logs", "reconcile_window", {"days": 0.0}, "days is 0"),
        ("reconcile_audit_logs", "reconcile_window", {"from_ms": 9, "to_ms": 9}, "the window is empty"),
        (
            "retry_dead_letters",
            "retry_letters",
            {"why": "x", "workspace_id": "w", "older_than_s": -1},
            "older_than_s is -1",
        ),
    ],
)
def test_a_wrong_value_is_refused_by_its_field(job: str, op: str, config: dict[str, object], message: str) -> None:
    """The launchpad shows the mistake, and no run starts."""
    with pytest.raises(dg.DagsterInvalidConfigError, match=message):
        dg.validate_run_config(defs.resolve_job_def(job), {"ops": {op: {"config": config}}})
