"""Dead letters as Dagster shows them: the check, the numbers of a run, and the retry from the launchpad.

What belongs here: definitions run on a real instance. What does not: what a letter is (`integration.maintenance.test_dead_letters` of the
suite's root).
"""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.definitions import defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, event, text_of

CHECK = dg.AssetCheckKey(ASSET, "no_dead_letters_standing")
CANARY = "canary-9b0e"


def check(exporter: Exporter) -> tuple[bool, dg.AssetCheckSeverity, dict[str, object]]:
    """Runs the check by itself, as the page's "Execute" does."""
    job = dg.Definitions(
        assets=defs.assets,
        asset_checks=defs.asset_checks,
        resources=defs.resources,
        jobs=[dg.define_asset_job("only_the_check", selection=dg.AssetSelection.checks(CHECK))],
        executor=dg.in_process_executor,
    ).resolve_job_def("only_the_check")
    (evaluation,) = job.execute_in_process(instance=exporter.instance).get_asset_check_evaluations()
    return evaluation.passed, evaluation.severity, text_of(evaluation.metadata)


def bad(event_id: str, workspace_id: str) -> tuple[str, str, str]:
    return event(event_id, workspace_id, time=CANARY)


def test_the_check_warns_while_letters_stand_and_says_whose_and_why(exporter: Exporter, stack: Stack) -> None:
    """A green run with a thousand rows set aside is the failure that nobody looks at."""
    stack.put(event("evt_1"))
    exporter.drain()
    assert check(exporter)[:2] == (True, dg.AssetCheckSeverity.WARN)

    pks = stack.put(bad("evt_2", "ws_a"), bad("evt_3", "ws_a"), bad("evt_4", "ws_b|x"))
    result = exporter.drain()
    (materialization,) = result.asset_materializations_for_node("audit_logs_raw_v1")
    assert "| wrong_type | 3 |" in str(text_of(materialization.metadata)["dead_letters_by_reason"])

    passed, severity, told = check(exporter)
    assert (passed, severity) == (False, dg.AssetCheckSeverity.WARN)
    assert told["dead_letters_standing"] == 3
    assert str(told["by_reason"]).splitlines()[2:] == ["| wrong_type | 3 |"]
    assert str(told["by_workspace"]).splitlines()[2:] == ["| ws_a | 2 |", "| ws_b?x | 1 |"]
    assert CANARY not in str(told)

    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
    stack.sql("UPDATE clickhouse_outbox_dead_letter SET state = 'discarded' WHERE pk <> :pk", pk=pks[0])
    passed, _, told = check(exporter)
    assert (passed, told["dead_letters_standing"], told["dead_letters_gone"]) == (True, 0, 1)


def test_a_drain_waits_for_no_check(exporter: Exporter, stack: Stack) -> None:
    """What the job runs beside the export holds the next drain up."""
    stack.put(event("evt_1"))
    result = exporter.drain()
    assert result.get_asset_check_evaluations() == []
    assert not any("no_dead_letters" in node.name for node in defs.resolve_job_def("audit_log_export").all_node_defs)


def test_letters_are_retried_from_the_launchpad_and_the_record_names_the_run(exporter: Exporter, stack: Stack) -> None:
    """Whoever is on call may have the page and no shell."""
    stack.put(bad("evt_1", "ws_a"), bad("evt_2", "ws_b"))
    exporter.drain()

    def retry(**config: object) -> dg.ExecuteInProcessResult:
        return defs.resolve_job_def("retry_dead_letters").execute_in_process(
            instance=exporter.instance,
            run_config={"ops": {"retry_letters": {"config": {"why": "the writer is fixed", **config}}}},
        )

    with pytest.raises(dg.DagsterInvalidConfigError, match="no filter is given"):
        retry(dry_run=False)
    retry(workspace_id="ws_a")
    assert stack.sql("SELECT action_id FROM clickhouse_outbox_action") == []
    done = retry(workspace_id="ws_a", dry_run=False)
    (action,) = stack.sql("SELECT verb, who, why, row_count FROM clickhouse_outbox_action")
    assert tuple(action) == ("retry", f"Dagster run {done.run_id}", "the writer is fixed", 1)
    states = stack.sql("SELECT workspace_id, state FROM clickhouse_outbox_dead_letter ORDER BY workspace_id")
    assert [tuple(row) for row in states] == [("ws_a", "retried"), ("ws_b", "open")]
