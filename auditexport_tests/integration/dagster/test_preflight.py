"""A run that finds its setup wrong: it ends before its first claim, and both databases are as they were."""

from __future__ import annotations

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, everything_once
from auditexport_tests.support.faults import content


@pytest.mark.parametrize(
    ("server", "fault", "mend"),
    [
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
    ],
)
def test_a_run_with_a_fatal_finding_claims_nothing(
    exporter: Exporter, stack: Stack, server: str, fault: str, mend: str
) -> None:
    """Both faults would let a whole drain end green: only the look before it stands between."""

    def told(statement: str) -> None:
        if server == "MySQL":
            stack.sql(statement)
        else:
            stack.log.client().command(statement)

    stack.put(*events(20))
    told(fault)
    before = content(stack)
    run = exporter.drain(raise_on_error=False)
    assert not run.success
    (line,) = exporter.failures(run.run_id)
    assert "nothing was claimed" in line
    assert mend in line
    assert content(stack) == before
    assert stack.counts() == (0, 0)
    told(mend)
    assert exporter.drain().success
    everything_once(stack, 20)
