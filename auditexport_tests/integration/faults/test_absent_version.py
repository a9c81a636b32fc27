"""A payload version whose package is gone while the ledger has batches of it: those are named and left alone."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import Exporter
from auditexport_tests.integration.setup.test_versions import NAME, invoices, stored
from auditexport_tests.support.builders import count, crash, end_leases, events, states
from auditexport_tests.support.producers import billing
from auditexport_tests.support.prompts import Prompt

AFTER = {"claimed": "claim", "sealed": "seal", "written": "record_written"}


@pytest.fixture
def stack(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Two fresh databases, with the table of a second version, which a test can uninstall."""
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


def leave_open(stack: Stack, state: str) -> None:
    """A batch of three invoices in this state, of an owner whose lease has ended."""
    stack.put(*invoices(3), version=NAME)
    crash(stack, f"after {AFTER[state]} 1")
    end_leases(stack)
    assert states(stack) == [state]


@pytest.mark.parametrize("state", AFTER)
def test_an_open_batch_of_an_uninstalled_version_stops_nobody(stack: Stack, auditexport: Prompt, state: str) -> None:
    """It was a raw KeyError, and all of audit_log.v1 stood still until the package was installed again."""
    leave_open(stack, state)
    uninstall()
    stack.put(*events(3))
    done = auditexport("drain")
    assert stack.counts() == (3, 3)
    assert f"batch 1 is open ({state}, 3 rows) and of {NAME}" in done.output
    assert states(stack) == [state, "verified"]
    billing.register()
    preflight.forget()
    auditexport("drain")
    assert (stored(stack), stack.pending()) == ((3, 3), 0)


def test_a_run_goes_on_beside_a_batch_of_an_uninstalled_version(stack: Stack, exporter: Exporter) -> None:
    """Otherwise every run fails, also one with other rows to export."""
    leave_open(stack, "sealed")
    uninstall()
    stack.put(*events(3))
    assert exporter.drain(raise_on_error=False).success
    assert stack.counts() == (3, 3)


def test_exported_batches_of_an_uninstalled_version_are_left_alone(stack: Stack, auditexport: Prompt) -> None:
    """Verification, reconciliation, sweep and requeue ended in the same KeyError."""
    leave_open(stack, "written")
    auditexport("drain")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 1")
    uninstall()
    stack.put(*events(3))
    auditexport("drain")
    assert states(stack) == ["exported", "verified"]
    assert f"not compared: 1 batch of {NAME}" in auditexport("reconcile").output

    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'verified', exported_at_ms = 1 WHERE batch_id = 1")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE version = :version", version=NAME)
    auditexport("sweep")
    assert count(stack) == 6
    again = auditexport("requeue", "--batch", "1", "--missing-only", "--why", "test")
    assert "3 left alone, of a version that no" in again.output
    for words in (["status"], ["batches", "list"], ["batches", "show", "1"], ["dead-letters", "list"]):
        auditexport(*words, status=None)


def test_a_batch_in_a_state_of_a_later_release_keeps_its_rows(stack: Stack, auditexport: Prompt) -> None:
    """Its rows are pending and in no batch that this release knows: claimed, they would be exported twice."""
    leave_open(stack, "sealed")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'archiving' WHERE batch_id = 1")
    stack.put(*events(3))
    done = auditexport("drain", status=None)
    assert (stack.counts(), stored(stack), stack.pending()) == ((3, 3), (0, 0), 3)
    assert "batch 1 is archiving" in done.output
    assert "archiving" in auditexport("batches", "list").output
