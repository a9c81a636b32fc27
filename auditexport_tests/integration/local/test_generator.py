"""The event generator: the same rows from the same seed, and writers that behave as applications do."""

from __future__ import annotations

import itertools
import json
import statistics
import threading
from collections import Counter
from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from auditexport_pipeline.local.generator import MALFORMED_KINDS, PLATFORM_BUCKET, Generator, seed_outbox, trickle
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.waiting import wait_until

END_MS = 1_800_000_000_000
SPAN_MS = 3_600_000


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMySQL]:
    """A server of its own, because a test kills it."""
    with LocalMySQL(tmp_path_factory.mktemp("generator-mysql")) as running:
        yield running


@pytest.fixture
def outbox(server: LocalMySQL, clickhouse_server: str) -> Iterator[Stack]:
    with fresh_stack(server.url, clickhouse_server) as stack:
        yield stack


def test_a_seed_gives_the_same_rows_however_they_are_asked_for() -> None:
    """A failure that a generated event caused has to come back, also with other sizes of transactions."""
    first = list(Generator(7).events(500))
    piecewise = Generator(7)
    assert first == [row for size in (1, 199, 300) for row in piecewise.events(size)]
    assert not {row.event_id for row in first} & {row.event_id for row in Generator(8).events(500)}


def test_streams_of_one_seed_share_workspaces_but_no_event() -> None:
    """Several writers of one application write about the same tenants, never the same event."""
    one, two = (list(Generator(7, stream=stream).events(2_000)) for stream in (0, 1))
    assert not {row.event_id for row in one} & {row.event_id for row in two}
    assert {row.workspace_id for row in one} == {row.workspace_id for row in two}


def test_events_are_varied_skewed_and_within_the_columns() -> None:
    """An even, ASCII, always complete world would hide what breaks in the real one."""
    rows = list(Generator(7).events(20_000))
    events = [json.loads(row.payload) for row in rows]
    assert len({row.event_id for row in rows}) == len(rows)
    assert all(len(row.event_id) <= 48 and len(row.workspace_id) <= 48 for row in rows)
    assert all(row.event_id.startswith("evt_") and row.workspace_id.startswith("ws_") for row in rows)
    for row, event in zip(rows, events, strict=True):
        assert (event["event_id"], event["workspace_id"]) == (row.event_id, row.workspace_id)
        assert isinstance(event["time"], int)
        assert event["time"] <= row.created_at_ms

    workspaces = Counter(row.workspace_id for row in rows).most_common()
    assert len(workspaces) == 40
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
    for sample in ("山", "م", "Ольга", "🚀", "\\n", "\\\\", "'"):
        assert sample in text


def test_payloads_are_compact_and_about_600_bytes() -> None:
    """Throughput is quoted in events a second: the size of an event has to be a realistic one."""
    rows = list(Generator(7).events(5_000))
    assert 550 <= statistics.mean(len(row.payload.encode()) for row in rows) <= 680
    sample = rows[0].payload
    assert sample == json.dumps(json.loads(sample), ensure_ascii=False, separators=(",", ":"))


@pytest.mark.parametrize(("asked", "low", "high"), [(100, 200, 420), (2_000, 1_960, 2_000), (20_000, 19_960, 20_000)])
def test_payloads_approach_the_size_asked_for(asked: int, low: int, high: int) -> None:
    """Batches are cut by bytes too, which needs small and large events to try."""
    rows = list(Generator(7, payload_bytes=asked).events(300))
    sizes = [len(row.payload.encode()) for row in rows]
    assert low <= min(sizes)
    assert max(sizes) <= high
    assert {"event_id", "time", "workspace_id", "event", "actor"} <= set(json.loads(rows[0].payload))


def test_each_malformed_kind_differs_from_a_sound_event_in_its_own_way() -> None:
    """A dead letter's reason can only be tested if the fault is the one its name says."""
    broken = dict(zip(MALFORMED_KINDS, Generator(7).malformed(MALFORMED_KINDS), strict=True))
    payload = {kind: json.loads(row.payload) for kind, row in broken.items()}
    assert isinstance(payload["array_not_object"], list)
    assert isinstance(payload["string_not_object"], str)
    assert payload["null_not_object"] is None
    assert payload["empty_object"] == {}
    for field in ("event_id", "time", "workspace_id", "event"):
        assert field not in payload[f"no_{field}"]
    assert payload["event_is_null"]["event"] is None
    assert isinstance(payload["time_is_string"]["time"], str)
    assert payload["time_has_fraction"]["time"] % 1 == 0.5
    assert payload["time_beyond_int64"]["time"] > 2**63
    assert isinstance(payload["meta_is_list"]["meta"], list)
    assert payload["other_workspace_id"]["workspace_id"] != broken["other_workspace_id"].workspace_id
    assert payload["other_event_id"]["event_id"] != broken["other_event_id"].event_id
    assert {row.version for row in broken.values()} == {"audit_log.v1"}


def test_the_json_column_takes_every_row_and_keeps_its_value(outbox: Stack) -> None:
    """MySQL refuses invalid JSON: a broken row has to be broken for us alone. It also rewrites the text."""
    generator = Generator(7)
    rows = [*generator.events(300), *generator.malformed(MALFORMED_KINDS), *generator.unknown_version(5)]
    outbox.put(*((row.workspace_id, row.event_id, row.payload) for row in rows))
    for row, (payload,) in zip(rows, outbox.sql("SELECT payload FROM clickhouse_outbox ORDER BY pk"), strict=True):
        assert json.loads(str(payload)) == json.loads(row.payload)


def test_seeding_writes_what_it_says(outbox: Stack) -> None:
    """Every exactly-once test compares what was exported with these counts."""
    progress: list[int] = []
    seeded = seed_outbox(
        outbox.mysql_url,
        seed=7,
        events=3_000,
        malformed=40,
        unknown=30,
        writers=3,
        end_ms=END_MS,
        progress=progress.append,
    )
    rows = outbox.sql("SELECT event_id, version, workspace_id, created_at, deleted_at FROM clickhouse_outbox")
    assert seeded.rows == len(rows) == 3_070
    assert (seeded.events, seeded.unknown) == (3_000, 30)
    assert sum(seeded.malformed.values()) == 40
    assert set(seeded.malformed) == set(MALFORMED_KINDS)
    assert sum(row.version == "audit_log.v99" for row in rows) == 30
    assert len({row.event_id for row in rows}) == len(rows)
    assert seeded.workspaces == len({row.workspace_id for row in rows})
    assert all(END_MS - SPAN_MS <= row.created_at < END_MS + 60 for row in rows)
    assert {row.deleted_at for row in rows} == {None}
    assert progress == sorted(progress)
    assert progress[-1] == 3_070
    assert len(progress) == seeded.transactions


def test_seeding_keeps_every_character(outbox: Stack) -> None:
    """The writers quote payloads themselves, for speed: a backslash too few would be our own corruption."""
    seed_outbox(outbox.mysql_url, seed=7, events=2_000, writers=1, end_ms=END_MS)
    other = Generator(7, start_ms=END_MS - SPAN_MS, step_ms=SPAN_MS / 2_000, end_ms=END_MS)
    written = {row.event_id: json.loads(row.payload) for row in other.events(20_000)}
    rows = outbox.sql("SELECT event_id, payload FROM clickhouse_outbox")
    assert len(rows) == 2_000
    for event_id, payload in rows:
        assert json.loads(str(payload)) == written[str(event_id)]


def test_rolled_back_rows_never_appear_and_leave_gaps_in_the_pks(outbox: Stack) -> None:
    """A gap is no missing row: an exporter that waits for it waits for ever."""
    seeded = seed_outbox(outbox.mysql_url, seed=7, events=5_000)
    rows = outbox.sql("SELECT pk, event_id FROM clickhouse_outbox")
    assert seeded.rolled_back_event_ids
    assert not {row.event_id for row in rows} & seeded.rolled_back_event_ids
    assert max(row.pk for row in rows) - min(row.pk for row in rows) + 1 > len(rows)


def test_lower_pks_become_visible_after_higher_ones(outbox: Stack) -> None:
    """The race that breaks every exporter with a watermark: without it in the data nobody notices."""
    seen: list[set[object]] = [set()]

    def look(_: int) -> None:
        seen.append({pk for (pk,) in outbox.sql("SELECT pk FROM clickhouse_outbox")})

    seeded = seed_outbox(outbox.mysql_url, seed=7, events=2_000, writers=1, progress=look)
    late = sum(bool(before) and min(after - before) < max(before) for before, after in itertools.pairwise(seen))
    assert late == seeded.late_transactions
    assert late > 0


def test_the_committed_events_are_the_same_for_the_same_seed(outbox: Stack) -> None:
    """Threads decide pks and the order of commits, never which events there are."""
    ids = []
    for _ in range(2):
        seed_outbox(outbox.mysql_url, seed=7, events=1_000, malformed=7, writers=4)
        ids.append({event_id for (event_id,) in outbox.sql("SELECT event_id FROM clickhouse_outbox")})
        outbox.sql("TRUNCATE clickhouse_outbox")
    assert ids[0] == ids[1]


def test_a_failing_writer_is_reported_and_the_others_stop(outbox: Stack) -> None:
    """A half-filled outbox that passes for a full one would make every count after it wrong."""
    outbox.sql("DROP TABLE clickhouse_outbox")
    with pytest.raises(sa.exc.ProgrammingError):
        seed_outbox(outbox.mysql_url, seed=7, events=1_000)


def test_a_trickle_commits_until_told_to_stop_and_outlives_a_crash(outbox: Stack, server: LocalMySQL) -> None:
    """`make dev` shows a live backlog, also when the database is killed to see what happens."""
    stop, committed = threading.Event(), list[int]()
    thread = threading.Thread(
        target=lambda: committed.append(trickle(outbox.mysql_url, seed=7, events_per_s=300, stop=stop))
    )
    thread.start()
    try:
        wait_until(lambda: outbox.pending() >= 20, what="20 rows")
        server.kill()
        server.start()
        outbox.outbox.engine.dispose()
        before = outbox.pending()
        assert before >= 20, "a commit that was answered survives"
        wait_until(lambda: outbox.pending() >= before + 20, what="20 rows after the crash")
    finally:
        stop.set()
        thread.join()
    assert outbox.pending() >= committed[0] >= before + 20
