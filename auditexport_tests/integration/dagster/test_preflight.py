"""A run that finds its setup wrong ends before its first claim, and changes nothing in either database."""

from __future__ import annotations

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, everything_once
from auditexport_tests.support.faults import content

# The server, the fault and its repair, which the line names.
FAULTS = [
    (
        "MySQL",
        "ALTER TABLE clickhouse_outbox_batch DROP COLUMN previous_digest",
        "ALTER TABLE clickhouse_outbox_batch ADD COLUMN previous_digest VARCHAR(64) NULL",
    ),
    (
        "ClickHouse",
        "ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = 0",
        "ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = 10000",
    ),
]


@pytest.mark.slow
def test_a_run_with_a_fatal_finding_claims_nothing(exporter: Exporter, stack: Stack) -> None:
    """With each of these faults a whole drain could succeed; only the preflight stops it."""
    stack.put(*events(20))
    for server, fault, repair in FAULTS:
        execute = stack.sql if server == "MySQL" else stack.log.client().command
        execute(fault)
        before = content(stack)
        run = exporter.drain(raise_on_error=False)
        assert not run.success
        (line,) = exporter.failures(run.run_id)
        assert "nothing was claimed" in line
        assert repair in line
        assert (content(stack), stack.counts()) == (before, (0, 0))
        execute(repair)
    assert exporter.drain().success
    everything_once(stack, 20)
