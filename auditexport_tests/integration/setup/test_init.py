"""`auditexport init` creates what is missing, once, and alters nothing."""

from __future__ import annotations

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_tests.conftest import Stack


def test_init_creates_what_is_missing_and_keeps_the_ledgers_counters(stack: Stack) -> None:
    """It runs at every deployment. The outbox is the application's: created by accident, it would hide a wrong
    database.
    """
    stack.sql("UPDATE clickhouse_outbox_batch SET epoch = 7, inserted_at_ms = 99 WHERE batch_id = 0")
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == []
    (head,) = stack.sql("SELECT epoch, inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0")
    assert (head.epoch, head.inserted_at_ms) == (7, 99)
    assert preflight.check(stack.outbox, stack.log) == []
    stack.sql("DROP TABLE clickhouse_outbox")
    assert setup.create(stack.outbox, stack.log) == []
    assert "clickhouse_outbox does not exist" in str(preflight.check(stack.outbox, stack.log)[0])
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == ["clickhouse_outbox"]
