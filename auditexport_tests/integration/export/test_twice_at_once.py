"""One step twice at the same time under one claim, as a queue gives it to a second worker while the first one is slow.

What belongs here: the verbs of `core.export` against themselves. What does not: two owners of one batch, of which the ledger
lets one through (`integration.export.test_claiming`, `integration.export.test_exactly_once`).
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from threading import Barrier

import pytest

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import (
    crashing,
    dead_letters,
    event,
    events,
    everything_once,
    ledger,
    runner,
    states,
)
from auditexport_tests.support.crashes import Crash, CrashPoint

BATCHES = 6
LIMITS = Limits(batch_rows=50)
run = runner(LIMITS)


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


def test_a_step_done_twice_at_once_duplicates_and_loses_nothing(stack: Stack) -> None:
    """Redis gives a task to another worker when its time is over, whether the first one is dead or slow."""
    stack.put(*events(BATCHES * LIMITS.batch_rows))
    claims = claiming.claim(stack.outbox, owner="run_1", dead_owners=(), limits=LIMITS)
    assert len(claims) == BATCHES
    raised = [error for claim in claims for error in _each_verb_twice(stack, claim)]
    assert {type(error) for error in raised} <= {LeaseLost}, raised
    assert max(batch.attempts for batch in ledger(stack)) == 2, "no two workers ever wrote one batch at once"
    run(stack, "run_1")  # finishes what the loser left open
    everything_once(stack, BATCHES * LIMITS.batch_rows)
    assert set(states(stack)) == {"verified"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "dies", ["after replace_cut 1", "after insert 2", "after replace_cut 2", "before record_written 1", "never 1"]
)
@pytest.mark.parametrize(
    "waits",
    [
        "before insert 1",
        *(f"{place} {n}" for n in (1, 2) for place in ("before replace_cut", "after replace_cut")),
        "before insert 2",
    ],
)
def test_a_block_that_two_attempts_cut_at_once_is_there_once(stack: Stack, waits: str, dies: str) -> None:
    """ClickHouse refuses a row for what no probe tells, so both halve the block, each under an `inserted_at` of its own."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    stack.put(*events(5), event("evt_refused", description="x"), *events(5, "later"))
    (claim,) = claiming.claim(stack.outbox, owner="run_1", dead_owners=(), limits=LIMITS)
    fetched = export.fetch(stack.outbox, stack.log, claim, LIMITS)

    def write(crash_at: CrashPoint) -> None:
        outbox, log = crashing(stack, crash_at)
        with suppress(Crash, LeaseLost):  # the next run finishes it
            export.mark(outbox, log, export.write(outbox, log, claim, {}, LIMITS), LIMITS)

    paused = CrashPoint(waits, then=lambda: write(CrashPoint(dies)))
    write(paused)

    assert fetched.rows == 11
    assert paused.reached
    run(stack, "run_1")
    everything_once(stack, 10, pending=1)
    assert dead_letters(stack, "event_id") == ["evt_refused"]
    assert set(states(stack)) == {"verified"}
