"""One step twice at the same time under one claim, as a queue gives it to a second worker while the first one is slow.

What belongs here: the verbs of `core.export` against themselves. What does not: two owners of one batch, of which the ledger
lets one through (`integration.export.test_claiming`, `integration.export.test_exactly_once`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import Claim, State
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import event, events, everything_once, ledger
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

BATCHES = 12
LIMITS = Limits(batch_rows=50)


def _twice(step: Callable[[], object]) -> list[BaseException]:
    """Runs it in two threads that begin together; returns what they raised."""
    both = Barrier(2)

    def begin() -> None:
        both.wait()
        step()

    with ThreadPoolExecutor(2) as pool:
        answers = [pool.submit(begin) for _ in range(2)]
        return [error for answer in answers if (error := answer.exception()) is not None]


def _each_verb_twice(stack: Stack, claim: Claim) -> list[BaseException]:
    def stores() -> tuple[MySQLOutbox, ClickHouseAuditLog]:
        return MySQLOutbox(stack.mysql_url), ClickHouseAuditLog(stack.clickhouse_url)

    raised = _twice(lambda: export.fetch(*stores(), claim, LIMITS))
    receipts = []
    raised += _twice(lambda: receipts.append(export.write(*stores(), claim, {}, LIMITS)))
    if receipts:
        raised += _twice(lambda: export.mark(*stores(), receipts[0], LIMITS))
    return raised


def test_a_step_done_twice_at_once_doubles_nothing_and_loses_nothing(stack: Stack) -> None:
    """Redis gives a task to another worker when its time is over, whether the first one is dead or slow."""
    stack.put(*events(BATCHES * LIMITS.batch_rows))
    claims = claiming.claim(stack.outbox, owner="run_1", dead_owners=(), limits=LIMITS)
    assert len(claims) == BATCHES
    raised = [error for claim in claims for error in _each_verb_twice(stack, claim)]
    assert {type(error) for error in raised} <= {LeaseLost}, raised
    assert max(batch.attempts for batch in ledger(stack)) == 2, "no two workers ever wrote one batch at once"
    # What a loser's run left open, the next one finishes.
    drain(stack.outbox, stack.log, LIMITS, owner="run_1")
    everything_once(stack, BATCHES * LIMITS.batch_rows)
    verify.verify(stack.outbox, stack.log, stack.outbox.unverified(BATCHES))
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dies", ["after replace_cut 1", "after insert 2", "after replace_cut 2", "before record_written 1", "never 1"]
)
@pytest.mark.parametrize(
    "waits",
    [
        "before insert 1",
        "before replace_cut 1",
        "after replace_cut 1",
        "before insert 2",
        "before replace_cut 2",
        "after replace_cut 2",
    ],
)
def test_a_block_that_two_attempts_cut_at_once_is_there_once(stack: Stack, waits: str, dies: str) -> None:
    """ClickHouse refuses a row for what no probe tells, so both halve the block, each under an `inserted_at` of its own."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    stack.put(*events(5), event("evt_refused", description="x"), *events(5, "later"))
    (claim,) = claiming.claim(stack.outbox, owner="run_1", dead_owners=(), limits=LIMITS)
    fetched = export.fetch(stack.outbox, stack.log, claim, LIMITS)

    def write(crash_at: CrashPoint) -> None:
        outbox, log = CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at)
        try:
            receipt = export.write(outbox, log, claim, {}, LIMITS)
            export.mark(outbox, log, receipt, LIMITS)
        except (Crash, LeaseLost):
            pass  # the next run's

    paused = CrashPoint(waits, then=lambda: write(CrashPoint(dies)))
    write(paused)

    assert fetched.rows == 11
    assert paused.reached
    drain(stack.outbox, stack.log, LIMITS, owner="run_1")
    assert stack.counts() == (10, 10)
    assert stack.pending() == 1  # the dead letter's
    assert [letter.event_id for letter in stack.sql("SELECT event_id FROM clickhouse_outbox_dead_letter")] == [
        "evt_refused"
    ]
    verify.verify(stack.outbox, stack.log, stack.outbox.unverified(BATCHES))
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}
