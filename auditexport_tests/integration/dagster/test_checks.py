"""The asset checks on a real instance: each green on a sound outbox, red for its own trouble, and for no other one's."""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, event, events, text_of

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
    """Executes every check, as the page's button does; by name."""
    job = dg.define_asset_job("only_the_checks", selection=dg.AssetSelection.checks_for_assets(ASSET))
    everything = dg.Definitions.merge(definitions, dg.Definitions(jobs=[job]))
    result = everything.resolve_job_def("only_the_checks").execute_in_process(instance=exporter.instance)
    return {each.check_name: each for each in result.get_asset_check_evaluations()}


def failed(found: dict[str, dg.AssetCheckEvaluation]) -> dict[str, str]:
    """Failed checks, each with its severity."""
    return {name: each.severity.value for name, each in found.items() if not each.passed}


def test_every_check_is_green_after_a_drain_and_carries_its_numbers(exporter: Exporter, stack: Stack) -> None:
    """The negative control of all that follows; and a light without a number sends people to SQL."""
    stack.put(*events(3))
    exporter.drain()
    found = evaluate(exporter)
    assert set(found) == CHECKS
    assert failed(found) == {}
    assert all(each.metadata for each in found.values())
    assert text_of(found["lag_within_target"].metadata)["backlog_rows"] == 0
    assert found["lag_within_target"].description == "as it should be"


def test_lag_is_an_error_when_nobody_drains(exporter: Exporter, stack: Stack) -> None:
    """An outbox that nobody empties is the trouble that no run can report."""
    stack.put(*events(3))
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 400000")
    found = evaluate(exporter)
    assert failed(found) == {"lag_within_target": "ERROR"}
    told = found["lag_within_target"]
    assert "3 rows are pending" in str(told.description)
    assert "To do: auditexport drain" in str(told.description)
    assert float(str(text_of(told.metadata)["lag_s"])) >= 400
    assert failed(evaluate(exporter, build_audit_export_defs(targets={"lag_s": 100_000}))) == {}


def test_unknown_versions_and_dead_letters_are_warnings_of_their_own(exporter: Exporter, stack: Stack) -> None:
    """Both wait for a person, and neither is the other."""
    stack.put(event("evt_1"), version="audit_log.v9")
    assert failed(evaluate(exporter)) == {"no_unknown_versions": "WARN"}
    stack.put(("ws_1", "evt_dead", "[]"))
    exporter.drain()
    assert failed(evaluate(exporter)) == {"no_unknown_versions": "WARN", "no_dead_letters_standing": "WARN"}


def test_a_batch_that_stays_open_is_seen(exporter: Exporter, stack: Stack) -> None:
    """Its rows are pending for everybody else and exported for nobody."""
    stack.put(*events(2))
    claiming.claim(stack.outbox, owner="a host that is gone", dead_owners=(), limits=Limits())
    assert failed(evaluate(exporter)) == {}
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - 3600000, lease_until_ms = 1 WHERE batch_id > 0"
    )
    assert failed(evaluate(exporter)) == {"no_batch_open_too_long": "ERROR"}


def test_a_loss_in_clickhouse_turns_the_reconciling_checks_red(exporter: Exporter, stack: Stack) -> None:
    """An acknowledgement is not proof, and neither is yesterday's proof."""
    stack.put(*events(5))
    exporter.drain()
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2}
    )
    assert failed(evaluate(exporter))["recent_exports_reconcile"] == "ERROR"
    # Its finding is in the ledger and among the actions: the others know of it from there.
    assert failed(evaluate(exporter)) == {
        "recent_exports_reconcile": "ERROR",
        "recent_batches_verified": "ERROR",
        "reconciled_recently": "ERROR",
    }


def test_a_second_copy_of_an_entry_is_seen_without_final(exporter: Exporter, stack: Stack) -> None:
    """Readers do not use FINAL; merges hide a copy sooner or later, which is no excuse."""
    stack.put(*events(5))
    exporter.drain()
    stack.log.client().command("SYSTEM STOP MERGES audit_logs_raw_v1")
    stack.log.client().command(
        "INSERT INTO audit_logs_raw_v1 SELECT * FROM audit_logs_raw_v1 WHERE event_id = 'evt_3'",
        settings={"insert_deduplicate": 0},
    )
    found = evaluate(exporter)
    assert failed(found)["no_duplicates_recently"] == "WARN"
    told = text_of(found["no_duplicates_recently"].metadata)
    assert (told["entries"], told["duplicated"], told["duplicated_same_inserted_at"]) == (6, 1, 1)


def test_a_sweep_that_is_overdue_is_seen(exporter: Exporter, stack: Stack) -> None:
    """The outbox is the application's table: its disk fills, not ours."""
    stack.put(*events(2))
    exporter.drain()
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - :ms WHERE batch_id > 0", ms=40 * DAY_MS
    )
    assert failed(evaluate(exporter)) == {"retention_keeping_up": "WARN"}


def test_nobody_having_reconciled_for_days_is_seen(exporter: Exporter, stack: Stack) -> None:
    """The schedule is off on a new instance, and stays so until somebody turns it on."""
    stack.put(*events(2))
    exporter.drain()
    evaluate(exporter)
    stack.sql("UPDATE clickhouse_outbox_action SET at_ms = at_ms - :ms", ms=3 * DAY_MS)
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - :ms WHERE batch_id > 0", ms=3 * DAY_MS
    )
    job = dg.define_asset_job(
        "one_check", selection=dg.AssetSelection.checks(dg.AssetCheckKey(ASSET, "reconciled_recently"))
    )
    everything = dg.Definitions.merge(defs, dg.Definitions(jobs=[job]))
    (each,) = (
        everything.resolve_job_def("one_check")
        .execute_in_process(instance=exporter.instance)
        .get_asset_check_evaluations()
    )
    assert not each.passed


def test_mysql_that_is_down_is_one_line_and_no_green_light(exporter: Exporter, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that could not look must not look passed."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", "mysql+pymysql://nobody@127.0.0.1:1/none")
    with pytest.raises(dg.Failure, match="MySQL failed while"):
        evaluate(exporter)
