"""Rows that come under the pks of a batch between its seal and its mark: other events, which nobody has exported yet."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.export.test_exactly_once import fill, run
from auditexport_tests.support.builders import merge
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

pytestmark = pytest.mark.mysql_sensitive

ROWS = 20
LIMITS = Limits(batch_rows=ROWS, mark_rows=5, mark_connections=1)
BEGINS_AGAIN = {
    "truncated": ["TRUNCATE TABLE clickhouse_outbox"],
    "renamed": [
        "CREATE TABLE fresh LIKE clickhouse_outbox",
        "RENAME TABLE clickhouse_outbox TO gone, fresh TO clickhouse_outbox",
    ],
    "counted again": ["DELETE FROM clickhouse_outbox", "ALTER TABLE clickhouse_outbox AUTO_INCREMENT = 1"],
}


@pytest.mark.parametrize(
    "point", ["before insert 1", "after insert 1", "before mark 1", "after mark 2", "before finish_mark 1"]
)
@pytest.mark.parametrize("how", BEGINS_AGAIN)
def test_an_event_that_takes_a_sealed_rows_pk_is_exported(stack: Stack, how: str, point: str) -> None:
    """A mark by pk alone would call it exported, and it would be nowhere."""
    first = fill(stack, ROWS, seed=1)

    def begin_again() -> None:
        for statement in BEGINS_AGAIN[how]:
            stack.sql(statement)
        assert fill(stack, ROWS, seed=2) == first

    crash_at = CrashPoint(point, then=begin_again)
    drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first")
    assert crash_at.reached
    run(stack, limits=LIMITS)

    assert stack.counts() == (2 * ROWS, 2 * ROWS)
    assert stack.pending() == 0


@pytest.mark.parametrize("recovery", ["one", "two"])
@pytest.mark.parametrize("how", BEGINS_AGAIN)
def test_who_recovers_a_batch_marks_no_event_that_is_not_there(stack: Stack, how: str, recovery: str) -> None:
    """Not even for a moment: a table that is swapped away in that moment takes events with it that bear a mark."""
    fill(stack, ROWS, seed=1)
    dies = CrashPoint("before mark 1")
    with pytest.raises(Crash):
        drain(CrashingOutbox(stack.outbox, dies), CrashingAuditLog(stack.log, dies), LIMITS, owner="one")
    for statement in BEGINS_AGAIN[how]:
        stack.sql(statement)
    fill(stack, ROWS, seed=2)

    def nothing_is_marked_that_is_not_there() -> None:
        marked = {str(row.event_id) for row in stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at > 0")}
        assert marked <= {str(event_id) for (event_id,) in stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1")}

    watched = CrashPoint("after mark 1", then=nothing_is_marked_that_is_not_there)
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0")
    drain(CrashingOutbox(stack.outbox, watched), CrashingAuditLog(stack.log, watched), LIMITS, owner=recovery)
    run(stack, limits=LIMITS)
    assert (stack.counts(), stack.pending()) == ((2 * ROWS, 2 * ROWS), 0)


def test_rows_that_others_delete_before_the_mark_cost_the_rest_nothing(stack: Stack) -> None:
    """The sum of a batch differs then, too; those that are left were exported and stay marked."""
    pks = fill(stack, ROWS)
    crash_at = CrashPoint("before mark 1", then=lambda: stack.sql(f"DELETE FROM clickhouse_outbox WHERE pk = {pks[3]}"))

    drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first")

    assert stack.pending() == 0
    run(stack, limits=LIMITS)
    merge(stack)
    assert stack.counts() == (ROWS, ROWS)
