"""Requeue, sweep and reconcile as jobs, and the asset check, on a real instance."""

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


def test_the_jobs_and_schedules_of_the_contract_are_there() -> None:
    """Other people's configuration holds these names."""
    for job in ("requeue_events", "sweep_exported_rows", "reconcile_audit_logs"):
        assert defs.resolve_job_def(job).name == job
    assert defs.resolve_schedule_def("sweep_schedule").job_name == "sweep_exported_rows"
    assert defs.resolve_schedule_def("reconcile_schedule").job_name == "reconcile_audit_logs"


def test_a_loss_is_found_repaired_and_gone_by_jobs_alone(exporter: Exporter, stack: Stack) -> None:
    """An operator mends a loss from the page, without SQL."""
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


def test_a_reconciliation_writes_its_page_also_when_it_fails(exporter: Exporter, stack: Stack, tmp_path: Path) -> None:
    """Somebody looks at the page because the run is red, and finds it by the run's metadata."""
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


def test_a_requeue_says_how_many_before_it_does_it(exporter: Exporter, stack: Stack) -> None:
    """A dry run is how one finds out what a condition means."""
    stack.put(*events(20))
    exporter.drain()
    told = launch(exporter, "requeue_events", "requeue_rows", event_ids=["evt_1", "evt_2"], dry_run=True, why="look")
    assert (numbers(told, "requeue_rows")["rows"], stack.pending()) == (2, 0)
    done = launch(exporter, "requeue_events", "requeue_rows", event_ids=["evt_1", "evt_2"], why="wanted", who="me")
    assert (numbers(done, "requeue_rows")["rows"], stack.pending()) == (2, 2)


@pytest.mark.parametrize(
    ("job", "op", "config", "told"),
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
def test_a_wrong_value_is_refused_at_the_launch_by_the_name_of_its_field(
    exporter: Exporter, job: str, op: str, config: dict[str, object], told: str
) -> None:
    """Whoever types into the launchpad is told there, and not by a red run."""
    with pytest.raises(dg.DagsterInvalidConfigError, match=told):
        launch(exporter, job, op, **config)
    assert exporter.instance.get_runs() == []


def test_a_sweep_deletes_what_is_past_retention(exporter: Exporter, stack: Stack) -> None:
    """The schedule runs this every night, unseen."""
    stack.put(*events(20))
    exporter.drain()
    assert numbers(launch(exporter, "sweep_exported_rows", "sweep_rows"), "sweep_rows")["rows"] == 0
    swept = launch(exporter, "sweep_exported_rows", "sweep_rows", outbox_days=0.0)
    assert numbers(swept, "sweep_rows")["rows"] == 20
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 0


def test_the_asset_check_passes_on_a_clean_day_and_fails_on_a_loss(exporter: Exporter, stack: Stack) -> None:
    """It is the light on the page that turns red."""
    stack.put(*events(5))
    exporter.drain()

    def check() -> dg.AssetCheckEvaluation:
        selection = dg.AssetSelection.checks(
            dg.AssetCheckKey(dg.AssetKey("audit_logs_raw_v1"), "recent_exports_reconcile")
        )
        job = dg.define_asset_job("only_the_check", selection=selection)
        everything = dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
        result = everything.resolve_job_def("only_the_check").execute_in_process(instance=exporter.instance)
        (evaluation,) = result.get_asset_check_evaluations()
        return evaluation

    assert check().passed
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2}
    )
    assert not check().passed
