"""A run's outcome is what the ledger says, not what the last attempt of a step remembers."""

from __future__ import annotations

from typing import Any

import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.core.errors import OutboxUnavailable
from auditexport_pipeline.defs import assets
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter
from auditexport_tests.integration.dagster.test_maintenance import launch
from auditexport_tests.integration.faults.test_takeover import metadata_of
from auditexport_tests.support.builders import events, everything_once, lose, states
from auditexport_tests.support.prompts import Prompt


def fails_once(monkeypatch: pytest.MonkeyPatch, verb: str, store: type = MySQLOutbox) -> None:
    """MySQL goes away the first time that this is asked for."""
    real = getattr(store, verb)
    calls: list[int] = []

    def once(*arguments: Any, **named: Any) -> Any:
        calls.append(1)
        if len(calls) == 1:
            raise OutboxUnavailable("MySQL failed while testing; run again")
        return real(*arguments, **named)

    monkeypatch.setattr(store, verb, once)


@pytest.fixture
def lossy(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """ClickHouse loses one entry of each batch right after it was marked."""
    real = export.mark

    def mark(*arguments: Any, **named: Any) -> Any:
        batch = real(*arguments, **named)
        lose(stack, "evt_0")
        return batch

    monkeypatch.setattr(export, "mark", mark)
    return stack


@pytest.mark.slow
def test_a_discrepancy_fails_the_run_whichever_attempt_found_it(
    exporter: Exporter, lossy: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt recorded it and died of another error; the second has nothing left to verify."""
    lossy.put(*events(3))
    fails_once(monkeypatch, "dead_by_reason")
    result = exporter.drain(raise_on_error=False)
    assert states(lossy) == ["discrepant"]
    assert not result.success, "a run that lost an event ended green"
    (line,) = exporter.failures(result.run_id)
    assert "batch 1: 1 missing" in line


def test_a_discrepancy_is_a_drains_status_whichever_round_found_it(
    auditexport: Prompt, lossy: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same for the command: a round that failed after its verification had found a loss."""
    real = MySQLOutbox.record_verified

    def record(*arguments: Any) -> Any:
        real(*arguments)
        monkeypatch.setattr(MySQLOutbox, "record_verified", real)
        raise OutboxUnavailable("MySQL failed while testing; run again")

    monkeypatch.setattr(MySQLOutbox, "record_verified", record)
    lossy.put(*events(3))
    done = auditexport("drain", status=1)
    assert states(lossy) == ["discrepant"]
    assert "exported 3 rows" in done.output


@pytest.mark.slow
def test_a_run_that_stays_counts_what_every_attempt_exported(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It reported 50 rows of 140: those of its plan, and not those that a step exported before it was tried again."""
    real = export.mark
    calls: list[int] = []

    def mark(*arguments: Any, **named: Any) -> Any:
        batch = real(*arguments, **named)
        calls.append(1)
        if len(calls) == 1:
            stack.put(*events(90, "later"))
        return batch

    monkeypatch.setattr(export, "mark", mark)
    monkeypatch.setattr(assets, "LOOK_FOR_OTHERS_EVERY_S", 0.0)
    monkeypatch.setattr(assets, "drain_in", lambda *_: None if stack.pending() else "another run")
    fails_once(monkeypatch, "dead_by_reason")
    stack.put(*events(50))
    metadata = metadata_of(exporter.drain(linger_s=60, linger_poll_ms=20))
    assert (metadata["rows"], metadata["batches"], metadata["verified_batches"]) == (140, 2, 2)


@pytest.mark.slow
def test_a_sweep_fails_whichever_attempt_found_the_loss(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt called the batch discrepant and died; for the second it was not due any more, and the run was green."""
    stack.put(*events(3))
    assert exporter.drain().success
    lose(stack, "evt_0")
    fails_once(monkeypatch, "close_letters", MySQLMaintenance)
    result = launch(exporter, "sweep_exported_rows", "sweep_rows", outbox_days=0)
    assert states(stack) == ["discrepant"]
    assert not result.success, "a sweep that found a loss ended green"
    (line,) = exporter.failures(result.run_id)
    assert "batch 1: 1 missing" in line


@pytest.mark.slow
def test_a_reconciliation_fails_whichever_attempt_found_the_loss(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first attempt requeued what was lost and died; the second found rows that are pending, and nothing wrong."""
    stack.put(*events(3))
    assert exporter.drain().success
    lose(stack, "evt_0")
    real = MySQLMaintenance.record_action
    calls: list[int] = []

    def dies_after_the_repair(self: MySQLMaintenance, *arguments: Any, **named: Any) -> Any:
        if stack.pending() and not calls:
            calls.append(1)
            raise OutboxUnavailable("MySQL failed while testing; run again")
        return real(self, *arguments, **named)

    monkeypatch.setattr(MySQLMaintenance, "record_action", dies_after_the_repair)
    result = launch(exporter, "reconcile_audit_logs", "reconcile_window", repair=True)
    assert stack.pending() == 1, "what was lost is requeued"
    assert not result.success, "a reconciliation that found a loss ended green"
    assert exporter.drain().success
    everything_once(stack, 3)
