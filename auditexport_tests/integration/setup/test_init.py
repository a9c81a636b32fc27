"""`auditexport init` creates what is missing, once, and alters nothing."""

from __future__ import annotations

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_tests.conftest import Stack


def test_creating_twice_creates_nothing_the_second_time(stack: Stack) -> None:
    """`init` is for every deployment, so running it again must be nothing at all."""
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == []
    assert preflight.check(stack.outbox, stack.log) == []


def test_the_outbox_is_only_created_when_asked_for(stack: Stack) -> None:
    """The table is the application's: creating it by accident would hide a wrong database."""
    stack.sql("DROP TABLE clickhouse_outbox")
    assert setup.create(stack.outbox, stack.log) == []
    assert "clickhouse_outbox does not exist" in str(preflight.check(stack.outbox, stack.log)[0])
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == ["clickhouse_outbox"]


def test_a_second_init_keeps_the_ledgers_counters(stack: Stack) -> None:
    """Row 0 carries the last inserted_at and the epoch; starting them over would undo every fence."""
    stack.sql("UPDATE clickhouse_outbox_batch SET epoch = 7, inserted_at_ms = 99 WHERE batch_id = 0")
    setup.create(stack.outbox, stack.log)
    (head,) = stack.sql("SELECT epoch, inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0")
    assert (head.epoch, head.inserted_at_ms) == (7, 99)
