"""The view `audit_logs`: what readers see, whatever their profile says."""

from __future__ import annotations

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.roles import Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import run, small_event
from auditexport_tests.support.maintenance import store_again

# What a profile may set for speed: FINAL then works within one partition only.
BY_PARTITION = {"do_not_merge_across_partitions_select_final": 1}


@pytest.fixture(autouse=True)
def in_two_months(stack: Stack) -> None:
    """Exports three events, and stores the first one once more under a month in the past."""
    stack.put(*(small_event(f"evt_{n}", time=1_700_000_000_000) for n in range(3)))
    run(stack)
    store_again(stack, "event_id = 'evt_0'", inserted_at="inserted_at - 40 * 86400000")
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert stack.counts() == (4, 3)


def seen(stack: Stack, settings: dict[str, int]) -> list[str]:
    found = stack.log.client().query("SELECT event_id FROM audit_logs ORDER BY event_id", settings=settings)
    return [str(row[0]) for row in found.result_rows]


def test_the_view_shows_an_event_of_two_months_once_under_any_profile(stack: Stack) -> None:
    """Copies in two partitions never merge; only FINAL across partitions keeps readers from counting an event twice."""
    assert seen(stack, {}) == ["evt_0", "evt_1", "evt_2"]
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_1", "evt_2"]


def test_the_view_still_reads_by_the_primary_key(stack: Stack) -> None:
    """A query of one workspace must not read the whole table."""
    plan = stack.clickhouse("EXPLAIN indexes = 1 SELECT * FROM audit_logs WHERE workspace_id = 'ws_none'")
    text = "\n".join(str(line[0]) for line in plan)
    assert "workspace_id in ['ws_none', 'ws_none']" in text or "Granules: 0/" in text, text


def test_doctor_prints_the_statement_for_an_older_view(stack: Stack) -> None:
    """`init` creates what is missing and alters nothing, so an older view stays until somebody changes it."""
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    client.command("CREATE VIEW audit_logs AS SELECT *, meta_text, targets_meta_text FROM audit_logs_raw_v1 FINAL")
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_0", "evt_1", "evt_2"]
    found = preflight.check(stack.outbox, stack.log, role=Role.READER)
    assert [finding.fatal for finding in found] == [False]
    client.command(found[0].fix)
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_1", "evt_2"]
    assert preflight.check(stack.outbox, stack.log, role=Role.READER) == []
