"""The asset checks on a real instance: each passes on a sound outbox, and fails for its own trouble."""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, event, events, text_of

CHECKS = {
    "lag_within_target",
    "no_unknown_versions",
    "no_batch_open_too_long",
    "recent_batches_verified",
    "retention_keeping_up",
    "reconciled_recently",
    "no_duplicates_recently",
    "recent_exports_reconcile",
    "no_dead_letters_standing",
}


def evaluate(exporter: Exporter, definitions: dg.Definitions = defs) -> dict[str, dg.AssetCheckEvaluation]:
    """Executes every check; by name."""
    result = definitions.resolve_job_def("audit_log_checks").execute_in_process(instance=exporter.instance)
    return {each.check_name: each for each in result.get_asset_check_evaluations()}


def failed(found: dict[str, dg.AssetCheckEvaluation]) -> dict[str, str]:
    """Failed checks, each with its severity."""
    return {name: each.severity.value for name, each in found.items() if not each.passed}


@pytest.mark.slow
def test_each_check_fails_for_its_own_trouble(exporter: Exporter, stack: Stack) -> None:
    """All succeed after a drain, the control. Then those fail whose trouble no run can report, and no others."""
    stack.put(*events(5))
    exporter.drain()
    found = evaluate(exporter)
    assert set(found) == CHECKS
    assert failed(found) == {}
    assert all(each.metadata for each in found.values())
    assert text_of(found["lag_within_target"].metadata)["backlog_rows"] == 0

    exported_long_ago = "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - :ms WHERE batch_id = 1"
    stack.sql(exported_long_ago, ms=40 * DAY_MS)
    stack.put(*events(3, "late"))
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 400000 WHERE deleted_at IS NULL")
    claiming.claim(stack.outbox, owner="gone", dead_owners=(), limits=Limits(batch_rows=1, max_batches=1))
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - 3600000, lease_until_ms = 1 WHERE batch_id = 2"
    )
    stack.put(event("evt_unknown"), version="audit_log.v9")
    found = evaluate(exporter)
    troubles = {
        "lag_within_target": "ERROR",
        "no_unknown_versions": "WARN",
        "no_batch_open_too_long": "ERROR",
        "retention_keeping_up": "WARN",
    }
    assert failed(found) == troubles
    lag = found["lag_within_target"]
    assert "rows are pending" in str(lag.description)
    assert "To do: auditexport drain" in str(lag.description)
    assert float(str(text_of(lag.metadata)["lag_s"])) >= 400
    # The outbox's own target.
    del troubles["lag_within_target"]
    assert failed(evaluate(exporter, build_audit_export_defs(targets={"lag_s": 100_000}))) == troubles


@pytest.mark.slow
def test_open_dead_letters_are_counted_by_reason_and_workspace(exporter: Exporter, stack: Stack) -> None:
    """A run succeeds although it set rows aside. One that was discarded or whose row is gone does not count."""
    pks = stack.put(*(event(f"evt_{n}", workspace, time="canary") for n, workspace in enumerate(["a", "a", "b|x"])))
    result = exporter.drain()
    (materialization,) = result.asset_materializations_for_node("audit_logs_raw_v1")
    assert "| wrong_type | 3 |" in str(text_of(materialization.metadata)["dead_letters_by_reason"])
    found = evaluate(exporter)
    assert failed(found) == {"no_dead_letters_standing": "WARN"}
    shown = text_of(found["no_dead_letters_standing"].metadata)
    assert shown["dead_letters_standing"] == 3
    assert str(shown["by_reason"]).splitlines()[2:] == ["| wrong_type | 3 |"]
    assert str(shown["by_workspace"]).splitlines()[2:] == ["| a | 2 |", "| b?x | 1 |"]
    assert "canary" not in str(shown)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
    stack.sql("UPDATE clickhouse_outbox_dead_letter SET state = 'discarded' WHERE pk <> :pk", pk=pks[0])
    found = evaluate(exporter)
    assert failed(found) == {}
    shown = text_of(found["no_dead_letters_standing"].metadata)
    assert (shown["dead_letters_standing"], shown["dead_letters_gone"]) == (0, 1)


@pytest.mark.slow
def test_a_copy_and_a_loss_in_clickhouse_fail_their_checks(exporter: Exporter, stack: Stack) -> None:
    """An acknowledgement is not proof, and neither is yesterday's proof. Copies count without FINAL."""
    stack.put(*events(5))
    exporter.drain()
    client = stack.log.client()
    client.command("SYSTEM STOP MERGES audit_logs_raw_v1")
    client.command(
        "INSERT INTO audit_logs_raw_v1 SELECT * FROM audit_logs_raw_v1 WHERE event_id = 'evt_3'",
        settings={"insert_deduplicate": 0},
    )
    found = evaluate(exporter)
    assert failed(found)["no_duplicates_recently"] == "WARN"
    shown = text_of(found["no_duplicates_recently"].metadata)
    assert (shown["entries"], shown["duplicated"], shown["duplicated_same_inserted_at"]) == (6, 1, 1)

    client.command("SYSTEM START MERGES audit_logs_raw_v1")
    client.command("ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2})
    assert failed(evaluate(exporter))["recent_exports_reconcile"] == "ERROR"
    # The finding is in the ledger and among the actions now, where the other checks see it.
    assert failed(evaluate(exporter)) == {
        "recent_exports_reconcile": "ERROR",
        "recent_batches_verified": "ERROR",
        "reconciled_recently": "ERROR",
    }


def test_a_check_without_mysql_does_not_pass(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """It fails with one line."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", "mysql+pymysql://nobody@127.0.0.1:1/none")
    with pytest.raises(dg.Failure, match="MySQL failed while"):
        evaluate(exporter)
