"""A payload version whose package is gone while the ledger has batches of it: named, left alone, and nobody stands still."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, ledger
from auditexport_tests.integration.setup.test_versions import NAME, invoices, stored
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain
from auditexport_tests.support.producers import billing
from auditexport_tests.support.prompts import urls

AFTER = {"claimed": "claim", "sealed": "seal", "written": "record_written"}


@pytest.fixture
def stack(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Two fresh databases, with the table of a second version, which a test may take away."""
    known = dict(VERSIONS)
    billing.register()
    try:
        with fresh_stack(mysql_server, clickhouse_server) as fresh:
            yield fresh
    finally:
        VERSIONS._known = known
        audit_log._sql.cache_clear()
        preflight.forget()


def uninstall() -> None:
    VERSIONS._known = {name: version for name, version in VERSIONS.items() if name != NAME}
    audit_log._sql.cache_clear()
    preflight.forget()


def command(stack: Stack, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    return CliRunner().invoke(main, list(words))


def leave_open(stack: Stack, state: str) -> None:
    """A batch of three invoices in this state, of an owner whose lease has ended."""
    stack.put(*invoices(3), version=NAME)
    crash_at = CrashPoint(f"after {AFTER[state]} 1")
    crashing = CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at)
    with pytest.raises(Crash):
        drain(*crashing, Limits(), owner="run_1")
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0 WHERE batch_id > 0")
    assert [str(batch.state) for batch in ledger(stack)] == [state]


@pytest.mark.parametrize("state", ["claimed", "sealed", "written"])
def test_an_open_batch_of_a_version_that_is_gone_stops_nobody(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, state: str
) -> None:
    """It was a raw KeyError, and all of audit_log.v1 stood still until somebody installed the package again."""
    leave_open(stack, state)
    uninstall()
    stack.put(*events(3))
    done = command(stack, monkeypatch, "drain")
    assert (stack.counts(), done.exit_code) == ((3, 3), 0), done.output
    assert f"batch 1 is open ({state}, 3 rows) and of {NAME}" in done.output
    assert [str(batch.state) for batch in ledger(stack)] == [state, "verified"]
    billing.register()
    preflight.forget()
    assert command(stack, monkeypatch, "drain").exit_code == 0
    assert (stored(stack), stack.pending()) == ((3, 3), 0)


def test_a_run_goes_on_beside_a_batch_of_a_version_that_is_gone(stack: Stack, exporter: Exporter) -> None:
    """Every run failed, whatever else was pending."""
    leave_open(stack, "sealed")
    uninstall()
    stack.put(*events(3))
    run = exporter.drain(raise_on_error=False)
    assert (run.success, stack.counts()) == (True, (3, 3))


def test_what_was_exported_of_a_version_that_is_gone_is_left_alone(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Verification, reconciliation, sweep and requeue ended in the same KeyError."""
    leave_open(stack, "written")
    assert command(stack, monkeypatch, "drain").exit_code == 0
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 1")
    uninstall()
    stack.put(*events(3))
    done = command(stack, monkeypatch, "drain")
    assert ([str(batch.state) for batch in ledger(stack)], done.exit_code) == (["exported", "verified"], 0), done.output
    compared = command(stack, monkeypatch, "reconcile")
    assert (compared.exit_code, f"not compared: 1 batches of {NAME}" in compared.output) == (0, True), compared.output

    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'verified', exported_at_ms = 1 WHERE batch_id = 1")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE version = :version", version=NAME)
    swept = command(stack, monkeypatch, "sweep")
    assert (swept.exit_code, stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n) == (0, 6), swept.output
    again = command(stack, monkeypatch, "requeue", "--batch", "1", "--missing-only", "--why", "test")
    assert (again.exit_code, "3 left alone, of a version that no" in again.output) == (0, True), again.output
    for words in (["status"], ["batches", "list"], ["batches", "show", "1"], ["dead-letters", "list"]):
        shown = command(stack, monkeypatch, *words)
        assert shown.exception is None or isinstance(shown.exception, SystemExit), words


def test_a_batch_in_a_state_of_a_later_release_keeps_its_rows(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its rows are pending and in no batch that this release knows: claimed, they would be exported twice."""
    leave_open(stack, "sealed")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'archiving' WHERE batch_id = 1")
    stack.put(*events(3))
    done = command(stack, monkeypatch, "drain")
    assert (stack.counts(), stored(stack), stack.pending()) == ((3, 3), (0, 0), 3)
    assert "batch 1 is archiving" in done.output
    listed = command(stack, monkeypatch, "batches", "list")
    assert (listed.exit_code, "archiving" in listed.output) == (0, True), listed.output
