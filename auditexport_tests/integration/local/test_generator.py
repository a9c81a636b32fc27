"""The event generator: the same rows from the same seed, and writers that behave as applications do."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
import time
from collections import Counter
from pathlib import Path

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import event as core_event
from auditexport_pipeline.local.generator import (
    MALFORMED_KINDS,
    PLATFORM_BUCKET,
    SPAN_MS,
    WORKSPACES,
    Generator,
    OutboxRow,
    seed_outbox,
    trickle,
)
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.slow


def decode(row: OutboxRow) -> core_event.Event | core_event.Undecodable:
    payload = row.payload.encode()
    return core_event.decode_audit_log_v1(
        core_event.OutboxRow(pk=1, workspace_id=row.workspace_id, event_id=row.event_id, payload=payload)
    )


def test_a_seed_gives_the_same_rows_and_each_stream_other_events() -> None:
    """A failure that a generated event caused has to come back; writers share workspaces, never an event."""
    first = list(Generator(7).events(2_000))
    piecewise = Generator(7)
    assert first == [row for size in (1, 199, 1_800) for row in piecewise.events(size)]
    for other, same_workspaces in ((Generator(8), False), (Generator(7, stream=1), True)):
        rows = list(other.events(2_000))
        assert not {row.event_id for row in first} & {row.event_id for row in rows}
        assert ({row.workspace_id for row in first} == {row.workspace_id for row in rows}) is same_workspaces


def test_events_are_varied_skewed_and_within_the_columns() -> None:
    """Even, complete, ASCII events would hide what breaks in production."""
    rows = list(Generator(7).events(10_000))
    events = [json.loads(row.payload) for row in rows]
    assert len({row.event_id for row in rows}) == len(rows)
    assert all(len(row.event_id) <= 48 and len(row.workspace_id) <= 48 for row in rows)
    assert all(isinstance(decode(row), core_event.Event) for row in rows[:1_000])
    assert all(event["time"] <= row.created_at_ms for row, event in zip(rows, events, strict=True))
    assert 550 <= statistics.mean(len(row.payload.encode()) for row in rows) <= 680

    workspaces = Counter(row.workspace_id for row in rows).most_common()
    assert len(workspaces) == WORKSPACES
    assert workspaces[0][1] > 10 * workspaces[-1][1]
    assert {event["actor"]["type"] for event in events} == {"user", "key", "system"}
    assert {event["source"] for event in events} == {"platform", "customer", ""}
    assert {len(event.get("targets") or ()) for event in events} == set(range(6))
    assert {"key.create", "api.create", "ratelimit.set_override", "user.login"} <= {event["event"] for event in events}
    buckets = Counter(event["bucket"] for event in events)
    assert buckets.most_common(1)[0][0] == PLATFORM_BUCKET
    assert len(buckets) > 3
    for field in ("remote_ip", "user_agent", "meta", "correlation_id"):
        states = {"absent" if field not in event else event[field] is None for event in events}
        assert states == {"absent", True, False}, f"{field} is not present, null and absent in turn"
    assert any(":" in (event.get("remote_ip") or "") for event in events)
    text = "".join(row.payload for row in rows[:2_000])
    assert all(sample in text for sample in ("山", "م", "Ольга", "🚀", "\\n", "\\\\", "'"))


def test_payloads_are_padded_to_the_size_given() -> None:
    """Batches are cut by bytes too, which needs large events."""
    rows = list(Generator(7, payload_bytes=20_000).events(100))
    assert {len(row.payload.encode()) for row in rows} == {20_000}
    assert all(isinstance(decode(row), core_event.Event) for row in rows)


def test_seeding_writes_what_it_says(module_stack: Stack) -> None:
    """Every exactly-once test compares what was exported with these counts."""
    stack, progress = module_stack, list[int]()
    start_ms = time.time_ns() // 1_000_000 - SPAN_MS
    seeded = seed_outbox(
        stack.mysql_url, seed=7, events=3_000, malformed=40, unknown=30, writers=3, progress=progress.append
    )
    rows = stack.sql("SELECT * FROM clickhouse_outbox ORDER BY pk")
    ids = {row.event_id for row in rows}
    assert seeded.rows == len(rows) == len(ids) == 3_070
    assert (seeded.events, sum(seeded.malformed.values()), seeded.unknown) == (3_000, 40, 30)
    assert set(seeded.malformed) == set(MALFORMED_KINDS)
    assert sum(row.version == "audit_log.v99" for row in rows) == 30
    assert seeded.workspace_ids == {row.workspace_id for row in rows}
    assert all(start_ms <= row.created_at < start_ms + SPAN_MS + 60_000 for row in rows)
    assert {row.deleted_at for row in rows} == {None}
    assert progress == sorted(progress)
    assert progress[-1] == 3_070
    # A gap between pks is no missing row: an exporter that waits for it would wait forever.
    assert seeded.rolled_back_event_ids
    assert not ids & seeded.rolled_back_event_ids
    assert rows[-1].pk - rows[0].pk + 1 > len(rows)
    # Threads decide pks and the order of commits, never which events there are.
    stack.sql("TRUNCATE clickhouse_outbox")
    seed_outbox(stack.mysql_url, seed=7, events=3_000, malformed=40, unknown=30, writers=3)
    assert {row.event_id for row in stack.sql("SELECT event_id FROM clickhouse_outbox")} == ids


def test_mysql_takes_every_row_and_keeps_every_character(module_stack: Stack) -> None:
    """The writers quote payloads themselves, for speed, and a malformed row has to be valid JSON."""
    stack = module_stack
    stack.sql("TRUNCATE clickhouse_outbox")
    seed_outbox(stack.mysql_url, seed=7, events=1_000, writers=1)
    written = {row.event_id: json.loads(row.payload) for row in Generator(7).events(3_000)}
    for row in stack.sql("SELECT event_id, payload FROM clickhouse_outbox"):
        event = json.loads(row.payload)
        assert event == {**written[row.event_id], "time": event["time"]}
    stack.sql("TRUNCATE clickhouse_outbox")
    assert seed_outbox(stack.mysql_url, seed=7, events=1, writers=2).rows == 1, "a writer may have nothing to write"
    stack.sql("TRUNCATE clickhouse_outbox")
    malformed = list(Generator(7).malformed(MALFORMED_KINDS))
    stack.put(*((row.workspace_id, row.event_id, row.payload) for row in malformed))
    payloads = stack.sql("SELECT payload FROM clickhouse_outbox ORDER BY pk")
    for row, (payload,) in zip(malformed, payloads, strict=True):
        assert json.loads(str(payload)) == json.loads(row.payload)
        assert isinstance(decode(row), core_event.Undecodable)


def test_lower_pks_become_visible_after_higher_ones(module_stack: Stack) -> None:
    """The race that breaks each exporter with a watermark: without it in the data no test would see that."""
    module_stack.sql("TRUNCATE clickhouse_outbox")
    seen: list[set[object]] = [set()]

    def read(_: int) -> None:
        seen.append({pk for (pk,) in module_stack.sql("SELECT pk FROM clickhouse_outbox")})

    seeded = seed_outbox(module_stack.mysql_url, seed=7, events=2_000, writers=1, progress=read)
    late = sum(bool(before) and min(after - before) < max(before) for before, after in itertools.pairwise(seen))
    assert late == seeded.late_transactions > 0


def test_a_failing_writer_is_reported_and_the_others_stop(stack: Stack) -> None:
    """A half-filled outbox that passes for a full one would make each count after it wrong."""
    stack.sql("DROP TABLE clickhouse_outbox")
    with pytest.raises(sa.exc.ProgrammingError):
        seed_outbox(stack.mysql_url, seed=7, events=1_000)


def test_a_trickle_commits_until_stopped_and_survives_a_crash(tmp_path: Path, clickhouse_server: str) -> None:
    """`make dev` shows a live backlog, also when somebody kills the database to see what happens."""
    stop, committed = threading.Event(), list[int]()
    with LocalMySQL(tmp_path) as server, fresh_stack(server.url, clickhouse_server) as stack:
        thread = threading.Thread(
            target=lambda: committed.append(trickle(stack.mysql_url, seed=7, events_per_s=300, stop=stop))
        )
        thread.start()
        try:
            wait_until(lambda: stack.pending() >= 20, what="20 rows")
            server.kill()
            server.start()
            stack.outbox.engine.dispose()
            before = stack.pending()
            assert before >= 20, "a commit that was answered survives"
            wait_until(lambda: stack.pending() >= before + 20, what="20 rows after the crash")
        finally:
            stop.set()
            thread.join()
        assert stack.pending() >= committed[0] >= before + 20
