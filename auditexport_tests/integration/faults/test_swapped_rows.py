"""The pks of a batch begin again between its seal and its mark: other events, not exported yet, have them then."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.export.test_exactly_once import fill
from auditexport_tests.support.builders import crash, delete_rows, end_leases, everything_once, merge, runner
from auditexport_tests.support.crashes import CrashPoint

pytestmark = pytest.mark.mysql_sensitive

ROWS = 20
LIMITS = Limits(batch_rows=ROWS, mark_rows=5, mark_connections=1)
run = runner(LIMITS, "second")
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
    run(stack, "first", crash_at=crash_at)
    assert crash_at.reached
    run(stack)
    everything_once(stack, 2 * ROWS)


@pytest.mark.parametrize("recovery", ["one", "two"])
@pytest.mark.parametrize("how", BEGINS_AGAIN)
def test_a_recovered_batch_marks_no_event_that_was_not_exported(stack: Stack, how: str, recovery: str) -> None:
    """Not even for a moment: a table that is renamed in that moment would hold events with a wrong mark."""
    fill(stack, ROWS, seed=1)
    crash(stack, "before mark 1", "one", LIMITS)
    for statement in BEGINS_AGAIN[how]:
        stack.sql(statement)
    fill(stack, ROWS, seed=2)

    def nothing_is_marked_that_is_not_there() -> None:
        marked = {str(row.event_id) for row in stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at > 0")}
        assert marked <= {str(event_id) for (event_id,) in stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1")}

    end_leases(stack)
    run(stack, recovery, crash_at=CrashPoint("after mark 1", then=nothing_is_marked_that_is_not_there))
    run(stack)
    everything_once(stack, 2 * ROWS)


def test_rows_that_others_delete_before_the_mark_cost_the_rest_nothing(stack: Stack) -> None:
    """The sum of a batch differs then, too; those that are left were exported and stay marked."""
    pks = fill(stack, ROWS)
    run(stack, crash_at=CrashPoint("before mark 1", then=lambda: delete_rows(stack, pks[3])))
    assert stack.pending() == 0
    run(stack)
    merge(stack)
    assert stack.counts() == (ROWS, ROWS)


def test_an_event_that_was_erased_before_its_mark_is_not_exported_again(stack: Stack) -> None:
    """Its row is the sealed one, though ClickHouse has its event no more (simulation, seed 40538)."""
    first, second, *_ = fill(stack, ROWS)
    (erased,) = stack.sql("SELECT event_id FROM clickhouse_outbox WHERE pk = :pk", pk=first)

    def erase() -> None:
        by_id = f"event_id = '{erased.event_id}' SETTINGS mutations_sync = 2"
        stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {by_id}")
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=second)

    run(stack, crash_at=CrashPoint("before mark 1", then=erase))
    run(stack)
    assert stack.pending() == 0
    assert stack.counts() == (ROWS - 1, ROWS - 1)
