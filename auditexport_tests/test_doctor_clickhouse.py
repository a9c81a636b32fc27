"""What doctor finds in ClickHouse: as `test_doctor_mysql`, for the table, its view and the server."""

from __future__ import annotations

import pytest

from auditexport_pipeline.stores import preflight
from auditexport_pipeline.stores.roles import Role
from auditexport_tests.conftest import Stack
from auditexport_tests.faults import findings


@pytest.mark.parametrize(
    ("fault", "what", "fatal"),
    [
        ("MODIFY SETTING non_replicated_deduplication_window = 0", "no deduplication window", True),
        ("MODIFY SETTING non_replicated_deduplication_window = 5", "a deduplication window of 5 blocks", False),
        ("MODIFY COLUMN description Nullable(String)", "description is Nullable(String)", True),
        ("MODIFY COLUMN remote_ip String MATERIALIZED ''", "remote_ip is materialized", True),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 30 DAY", "is 30 days", False),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 1 HOUR", "the TTL", True),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(time)) + INTERVAL 90 DAY", "counts from time", True),
    ],
)
def test_a_fault_in_the_clickhouse_table_is_found_and_its_fix_mends_it(
    stack: Stack, fault: str, what: str, fatal: bool
) -> None:
    """An INSERT into such a table succeeds; what is wrong shows only later, as lost or doubled entries."""
    assert findings(stack) == []
    stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 {fault}")
    (found,) = findings(stack)
    assert what in found.what
    assert found.fatal is fatal
    stack.log.client().command(found.fix)
    assert findings(stack) == []


def test_a_short_ttl_is_fatal_to_whoever_requeues(stack: Stack) -> None:
    """A requeued entry keeps its inserted_at and would be dropped on arrival, with everything looking green."""
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 4 WEEK"
    )
    (found,) = findings(stack, Role.OPERATOR)
    assert found.fatal
    assert preflight.check(stack.outbox, stack.log, role=Role.OPERATOR, retention_days=20) == []


def test_a_view_without_final_is_found_for_readers(stack: Stack) -> None:
    """Readers trust the view to show each event once."""
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    assert "does not exist" in findings(stack, Role.READER)[0].what
    client.command("CREATE VIEW audit_logs AS SELECT * FROM audit_logs_raw_v1")
    (found,) = findings(stack, Role.READER)
    assert "without FINAL" in found.what
    assert not found.fatal
