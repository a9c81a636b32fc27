"""The view `audit_logs`: what readers see, whatever their profile says."""

from __future__ import annotations

import json

from auditexport_pipeline import preflight
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.roles import Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

# What a profile may set for speed: FINAL then works within one partition only.
BY_PARTITION = {"do_not_merge_across_partitions_select_final": 1}
COLUMNS = (
    "event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name, "
    "actor_meta, remote_ip, user_agent, meta, `targets.type`, `targets.id`, `targets.name`, `targets.meta`, correlation_id"
)


def in_two_months(stack: Stack) -> None:
    """Exports three events, and stores the first one once more under a month in the past."""
    ids = [f"evt_{n}" for n in range(3)]
    event = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "event": "a.b"}
    stack.put(*(("ws_1", event_id, json.dumps({**event, "event_id": event_id})) for event_id in ids))
    drain(stack.outbox, stack.log, Limits(), owner="one")
    earlier = COLUMNS.replace("inserted_at", "inserted_at - 40 * 86400000")
    stack.log.client().command(
        f"INSERT INTO audit_logs_raw_v1 ({COLUMNS}) SELECT {earlier} FROM audit_logs_raw_v1 WHERE event_id = 'evt_0'"
    )
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert stack.counts() == (4, 3)


def seen(stack: Stack, settings: dict[str, int]) -> list[str]:
    found = stack.log.client().query("SELECT event_id FROM audit_logs ORDER BY event_id", settings=settings)
    return [str(row[0]) for row in found.result_rows]


def test_the_view_shows_an_event_of_two_months_once_under_any_profile(stack: Stack) -> None:
    """Copies in two partitions never merge, so only FINAL across partitions keeps readers from counting one twice."""
    in_two_months(stack)
    assert seen(stack, {}) == ["evt_0", "evt_1", "evt_2"]
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_1", "evt_2"]


def test_the_view_still_reads_by_the_primary_key(stack: Stack) -> None:
    """A view that reads the whole table for one workspace would be no view for readers."""
    in_two_months(stack)
    plan = stack.clickhouse("EXPLAIN indexes = 1 SELECT * FROM audit_logs WHERE workspace_id = 'ws_none'")
    text = "\n".join(str(line[0]) for line in plan)
    assert "workspace_id in ['ws_none', 'ws_none']" in text or "Granules: 0/" in text, text


def test_doctor_prints_the_statement_for_a_view_from_before(stack: Stack) -> None:
    """`init` creates what is missing and alters nothing, so an older view stays as it was until somebody changes it."""
    in_two_months(stack)
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    client.command("CREATE VIEW audit_logs AS SELECT *, meta_text, targets_meta_text FROM audit_logs_raw_v1 FINAL")
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_0", "evt_1", "evt_2"]
    found = preflight.check(stack.outbox, stack.log, role=Role.READER)
    assert [finding.fatal for finding in found] == [False]
    client.command(found[0].fix)
    assert seen(stack, BY_PARTITION) == ["evt_0", "evt_1", "evt_2"]
    assert preflight.check(stack.outbox, stack.log, role=Role.READER) == []
