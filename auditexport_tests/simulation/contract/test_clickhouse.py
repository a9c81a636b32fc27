"""What a ClickHouse does with INSERTs and what it says of them: each test runs on the simulation and on a real server."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from auditexport_pipeline.core.ports import Refusal, RefusalKind
from auditexport_tests.simulation.clickhouse_server import TOKENS_TAKE_TWO_PLACES, VIEWS_MAY_FAIL_FIRST
from auditexport_tests.simulation.contract.clickhouse import (
    BAD,
    DAY_MS,
    VERSION,
    Known,
    ServerUnderTest,
    facts,
    outcome,
    payload,
    put,
    real_server,
    rows,
    simulated_server,
)
from auditexport_tests.simulation.payloads import NAMES as PARSERS_ERRORS
from auditexport_tests.support import engines

NOW_MS = int(time.time() * 1000)
ONE, TWO, THREE = (payload(f"evt_{number}", time=number) for number in (1, 2, 3))
UNKNOWN = ("InsertOutcomeUnknown", None)
UNAVAILABLE = ("AuditLogUnavailable", None)
MEMORY = Refusal(code=241, name="MEMORY_LIMIT_EXCEEDED", kind=RefusalKind.MEMORY)
TIME = Refusal(code=159, name="TIMEOUT_EXCEEDED", kind=RefusalKind.TIME)
VIEW = Refusal(code=395, name="FUNCTION_THROW_IF_VALUE_IS_NON_ZERO", kind=RefusalKind.VIEW, view="failing_view")
SMALL = Refusal(code=469, name="VIOLATED_CONSTRAINT", constraint="small", definition="known")


@pytest.fixture(
    params=["simulated", pytest.param("real", marks=pytest.mark.clickhouse_sensitive)],
)
def server(request: pytest.FixtureRequest) -> Iterator[ServerUnderTest]:
    if request.param == "simulated":
        with simulated_server(engines.chosen(), NOW_MS) as simulated:
            yield simulated
    else:
        with real_server(request.getfixturevalue("clickhouse_server")) as real:
            yield real


# ── blocks and their tokens ──────────────────────────────────────────────────────────────────────


def test_a_block_is_there_whole_and_each_question_sees_it(server: ServerUnderTest) -> None:
    """The exporter compares what it sent with what each of these questions answers."""
    assert put(server, 1, NOW_MS, [ONE, TWO]) is None
    answers = Known([NOW_MS - 40 * DAY_MS, NOW_MS], [ONE, TWO, THREE]).answers(server)
    assert [name for _, _, _, name in answers["entries_at"][NOW_MS]] == [  # type: ignore[index]
        f"payload {number} at {NOW_MS}" for number in (0, 1)
    ]
    assert answers["holdings"].keys() == {NOW_MS}  # type: ignore[attr-defined]
    assert rows(server, NOW_MS) == (2, 0)
    assert answers["keys_held"] == [(("ws_1", "", 2, "evt_2"), NOW_MS)]  # the first key was not asked for
    assert answers["ids_held"] == [("ws_1", "evt_1"), ("ws_1", "evt_2")]
    assert answers["count_by_inserted_at"] == [(NOW_MS, 2)]
    assert answers["count_by_workspace"] == {("ws_1", NOW_MS // DAY_MS * DAY_MS): 2}
    assert answers["named_by"] == [2, 0, 1]
    assert answers["probe"] is None


def test_questions_about_nothing_have_empty_answers(server: ServerUnderTest) -> None:
    """A run without blocks asks for none."""
    log = server.log
    assert (log.holdings([]), log.entries_of([]), log.keys_held([], []), log.ids_held([])) == ({}, [], set(), set())
    assert (log.past_ttl(VERSION, []), log.past_ttl_of(VERSION, NOW_MS, [])) == ({}, {})
    assert log.contents(VERSION, [], NOW_MS) == []
    assert log.probe(VERSION, [], timeout_s=5) is None


def test_a_block_under_a_known_token_is_acknowledged_and_adds_nothing(server: ServerUnderTest) -> None:
    """The second INSERT of a replay; the token decides, not the rows."""
    assert [put(server, 1, NOW_MS, [ONE, TWO]) for _ in range(2)] == [None, None]
    assert put(server, 1, NOW_MS, [THREE]) is None
    assert rows(server, NOW_MS) == (2, 0)


def test_a_block_under_another_token_is_stored_again_beside_the_first(server: ServerUnderTest) -> None:
    """Two copies are what a second sealing or a requeue would make."""
    put(server, 1, NOW_MS, [ONE, TWO])
    put(server, 1, NOW_MS, [ONE, TWO], generation=1)
    assert rows(server, NOW_MS) == (4, 2)
    assert len(server.log.entries_at(NOW_MS)) == len(server.log.entries_of([("ws_1", "", 1, "evt_1")])) * 2 == 4


@pytest.mark.parametrize("window", [0, 1, 2, 3, 5])
def test_the_first_tokens_leave_a_full_window(server: ServerUnderTest, window: int) -> None:
    """A replay after that is a second copy. Engine 26.3 remembers half as many blocks as the window says."""
    server.remember(window)
    remembered = -(-window // 2) if server.engine in TOKENS_TAKE_TWO_PLACES else window
    for number in range(1, 7):
        put(server, number, NOW_MS + number, [ONE])
    for number in range(6, 6 - remembered, -1):  # the last first: a token that is added lets another one go
        put(server, number, NOW_MS + number, [ONE])
    put(server, 6 - remembered, NOW_MS + 6 - remembered, [ONE])
    counts = [rows(server, NOW_MS + number)[0] for number in range(1, 7)]
    assert counts == [1] * (5 - remembered) + [2] + [1] * remembered


def test_a_replay_does_not_keep_its_token_longer(server: ServerUnderTest) -> None:
    """The window goes by the first INSERT, not by the last use."""
    server.remember(2 if server.engine not in TOKENS_TAKE_TWO_PLACES else 4)
    for number in (1, 2, 1, 3, 1):
        put(server, number, NOW_MS + number, [ONE])
    assert [rows(server, NOW_MS + number)[0] for number in (1, 2, 3)] == [2, 1, 1]


def test_a_smaller_window_forgets_and_a_larger_one_brings_nothing_back(server: ServerUnderTest) -> None:
    """An administrator can end the protection of blocks that are on their way."""
    put(server, 1, NOW_MS, [ONE])
    server.remember(0)
    server.remember(100)
    put(server, 1, NOW_MS, [ONE])
    assert rows(server, NOW_MS) == (2, 1)


@pytest.mark.parametrize("what", ["merged", "deleted", "expired"])
def test_a_token_outlives_its_entries(server: ServerUnderTest, what: str) -> None:
    """A replay cannot bring back what was lost: a repair needs another token."""
    at_ms = NOW_MS - 91 * DAY_MS if what == "expired" else NOW_MS
    put(server, 1, at_ms, [ONE])
    if what == "merged":
        put(server, 2, at_ms + 1, [ONE])
        server.merge()
    elif what == "deleted":
        server.delete("evt_1")
    else:
        server.expire()
    assert put(server, 1, at_ms, [ONE]) is None
    assert rows(server, at_ms) == (0, 0)
    put(server, 3, at_ms, [ONE])
    assert rows(server, at_ms) == (1, 0)


def test_a_dropped_partition_forgets_its_own_tokens(server: ServerUnderTest) -> None:
    """A replay stores the dropped block again, and only that."""
    earlier_ms = NOW_MS - 40 * DAY_MS
    put(server, 1, NOW_MS, [ONE])
    put(server, 2, earlier_ms, [TWO])
    server.drop_partition(NOW_MS)
    assert (rows(server, NOW_MS), rows(server, earlier_ms)) == ((0, 0), (1, 0))
    put(server, 1, NOW_MS, [ONE])
    put(server, 2, earlier_ms, [TWO])
    assert (rows(server, NOW_MS), rows(server, earlier_ms)) == ((1, 0), (1, 0))


# ── merges, mutations and the TTL ────────────────────────────────────────────────────────────────


def test_a_merge_keeps_the_entry_of_a_key_that_came_last(server: ServerUnderTest) -> None:
    """Of a requeue's copies under one inserted_at one stays; of two exports of an event the second one."""
    second = payload("evt_1", time=1, description="second")
    put(server, 1, NOW_MS, [ONE, TWO])
    put(server, 1, NOW_MS, [ONE, TWO], generation=1)
    put(server, 2, NOW_MS + 1, [second])
    assert (rows(server, NOW_MS), rows(server, NOW_MS + 1)) == ((4, 2), (1, 0))
    server.merge()
    assert (rows(server, NOW_MS), rows(server, NOW_MS + 1)) == ((1, 0), (1, 0))
    (entry,) = server.log.entries_of([("ws_1", "", 1, "evt_1")])
    assert [entry.content] == server.log.contents(VERSION, [second], NOW_MS + 1)


def test_equal_keys_in_one_block_stay_until_a_merge(server: ServerUnderTest) -> None:
    """A block with an event twice is stored as it is; a merge of this part alone keeps the last of them."""
    last = payload("evt_1", time=1, description="last")
    put(server, 1, NOW_MS, [ONE, ONE, last])
    assert rows(server, NOW_MS) == (3, 1)
    server.delete("evt_2")
    assert rows(server, NOW_MS) == (3, 1)
    server.merge()
    assert rows(server, NOW_MS) == (1, 0)
    assert [server.log.entries_at(NOW_MS)[0].content] == server.log.contents(VERSION, [last], NOW_MS)


def test_entries_of_two_months_never_merge(server: ServerUnderTest) -> None:
    """A partition is a calendar month of inserted_at in UTC: an event exported at midnight can stay twice for ever."""
    last_ms, first_ms = 1_790_812_799_999, 1_790_812_800_000  # 30 September and 1 October 2026
    server.keep(None)
    put(server, 1, last_ms, [ONE])
    put(server, 2, first_ms, [ONE])
    put(server, 3, first_ms + 30 * DAY_MS, [ONE])  # 31 October
    server.merge()
    assert (rows(server, last_ms), rows(server, first_ms), rows(server, first_ms + 30 * DAY_MS)) == (
        (1, 0),
        (0, 0),
        (1, 0),
    )


def test_a_changed_entry_has_another_fingerprint_and_content(server: ServerUnderTest) -> None:
    """An UPDATE by hand is what reconciliation calls altered."""
    after = payload("evt_1", time=1, description="changed")
    put(server, 1, NOW_MS, [ONE, TWO])
    server.alter(ONE, after)
    found = {entry.content for entry in server.log.entries_at(NOW_MS)}
    assert found == set(server.log.contents(VERSION, [after, TWO], NOW_MS))


def test_the_ttl_takes_old_entries_and_leaves_copies(server: ServerUnderTest) -> None:
    """Deleting by TTL is no merge by keys."""
    old_ms = NOW_MS - 91 * DAY_MS
    put(server, 1, old_ms, [ONE, TWO])
    put(server, 2, NOW_MS, [ONE, ONE])
    assert (rows(server, old_ms), rows(server, NOW_MS)) == ((2, 0), (2, 1))
    server.expire()
    assert (rows(server, old_ms), rows(server, NOW_MS)) == ((0, 0), (2, 1))


def test_a_merge_keeps_the_last_entry_and_then_asks_for_its_age(server: ServerUnderTest) -> None:
    """An event whose last entry is past the TTL is gone, although an earlier entry of it is not."""
    days = next(days for days in range(50, 90) if time.gmtime(NOW_MS // 1000 - days * 86_400).tm_mday == 15)
    server.keep(days)
    young_ms, old_ms = (NOW_MS - days * DAY_MS + hours * 3_600_000 for hours in (1, -1))  # of one partition
    put(server, 1, young_ms, [ONE, TWO])
    put(server, 2, old_ms, [ONE])
    assert (rows(server, young_ms), rows(server, old_ms)) == ((2, 0), (1, 0))
    server.merge()
    assert (rows(server, young_ms), rows(server, old_ms)) == ((1, 0), (0, 0))


def test_the_ttl_goes_by_whole_seconds(server: ServerUnderTest) -> None:
    """An entry is past its TTL up to a second before the time since its inserted_at is over."""
    now_ms = server.log.deadline_ms(0) // 1000 * 1000
    times = [now_ms + second * 1000 + 999 - 90 * DAY_MS for second in (-1, 0, 60)]
    assert list(server.log.past_ttl(VERSION, times).values()) == [True, True, False]
    assert list(server.log.past_ttl(VERSION, times, ahead_s=60).values()) == [True, True, True]
    assert server.log.kept_ms() == 90 * DAY_MS
    key = ("ws_1", "", NOW_MS, "evt_1")
    assert [server.log.past_ttl_of(VERSION, at_ms, [key])[key] for at_ms in times] == [True, True, False]


@pytest.mark.parametrize(
    ("days", "by", "workspace_id", "stamps", "keys"),
    [
        (30, "time", "", [None, None], [False, True, False, True]),
        (30, "inserted_at", "ws_2", [False, None], [False, False, False, False, False, False, True, True]),
        (None, "inserted_at", "", [False, False], [False] * 4),
    ],
    ids=["of the event's time", "with a WHERE", "none"],
)
def test_another_ttl_is_known_as_far_as_its_columns_are(
    server: ServerUnderTest, days: int | None, by: str, workspace_id: str, stamps: list[object], keys: list[object]
) -> None:
    """What may have been deleted is no loss; what cannot be known must not be guessed."""
    old_ms = NOW_MS - 31 * DAY_MS
    server.keep(days, by=by, workspace_id=workspace_id)
    log = server.log
    assert list(log.past_ttl(VERSION, [NOW_MS, old_ms]).values()) == stamps
    asked = [
        (one, "", at_ms, "evt_1")
        for one in (("ws_1", "ws_2") if workspace_id else ("ws_1",))
        for at_ms in (NOW_MS, old_ms)
    ]
    found = [past for at_ms in (NOW_MS, old_ms) for past in log.past_ttl_of(VERSION, at_ms, asked).values()]
    assert found == (keys if not workspace_id else [False] * 6 + [True] * 2)
    assert (log.kept_ms(), bool(log.ttl(VERSION))) == (None, days is not None)
    put(server, 1, old_ms, [payload("evt_1", time=NOW_MS), payload("evt_2", time=old_ms, workspace_id="ws_2")])
    server.expire()
    left = {entry.key[3] for entry in log.entries_at(old_ms)}
    assert left == ({"evt_1"} if days is not None else {"evt_1", "evt_2"})


def test_a_changed_table_is_young_again_and_has_another_definition(server: ServerUnderTest) -> None:
    """A dead letter of a table's refusal may be tried again when the definition is another one."""
    server.constrain(10)
    server.pass_time(2)
    before = server.log.definition_age_s(VERSION)
    first = put(server, 1, NOW_MS, [payload("evt_1", time=20)])
    again = put(server, 1, NOW_MS, [payload("evt_1", time=20)])
    server.constrain(None)
    server.constrain(15)
    changed = put(server, 1, NOW_MS, [payload("evt_1", time=20)])
    assert 1 <= before < 60
    assert server.log.definition_age_s(VERSION) < before
    assert first is not None
    assert changed is not None
    assert first == again
    assert first.definition.startswith("definition ")
    assert changed.definition != first.definition


# ── what ends an INSERT before its block is stored ───────────────────────────────────────────────


def test_an_insert_after_its_deadline_is_refused(server: ServerUnderTest) -> None:
    """By ClickHouse's clock, before its rows are read: its sender may be paused, or dead."""
    server.view("target")
    late = [outcome(put, server, 1, NOW_MS, some, within_s=-1) for some in ([ONE], [b"{x"])]
    assert late == [("LeaseLost", None)] * 2
    server.view("")
    assert rows(server, NOW_MS) == (0, 0)
    assert put(server, 1, NOW_MS, [ONE]) is None
    assert rows(server, NOW_MS) == (1, 0)


UNPARSABLE = {
    "half a row": (b'{"event_id": "evt_2", "time": 2', 33),
    "no JSON": (b"no", 27),
    "an array": (b"[]", 27),
    "words after it": (TWO + b"x", 27),
    "a quote too few": (b'{"event_id": 2, "x', 26),
    **{
        f"{field} {value!r}": (payload("evt_2", **{field: value}), code)
        for field, value, code in (
            *(("time", value, 27) for value in ("x", 1.5, 1000.0, True, [])),
            *((field, 5, 26) for field in ("event", "bucket", "description", "remote_ip")),
            *((field, None, 26) for field in ("event", "workspace_id", "event_id")),
            ("source", True, 26),
            *((field, value, 117) for field in ("meta", "actor") for value in ([1], "x", 5)),
            *(("targets", value, 117) for value in ("x", {"a": 1}, [1], [None], [{"meta": 5}])),
            *(("actor", value, 117) for value in ({"type": 5}, {"meta": "x"})),
        )
    },
    "a key twice in a meta": (TWO[:-1] + b', "meta": {"a": 1, "a": 2}}', 117),
}

FIRST_OF_ITS_CODE = {code: name for name, (_, code) in [*UNPARSABLE.items()][::-1]}.values()


def test_one_row_that_cannot_be_parsed_keeps_the_block_out(server: ServerUnderTest) -> None:
    """A block goes in whole or not at all, its token is not used up, and a probe finds the row."""
    for name, (bad, code) in UNPARSABLE.items():
        if bad != b"[]":  # alone, an array of no rows is no error
            probed = server.log.probe(VERSION, [bad], timeout_s=5)
            assert probed is not None, name
            assert (probed.code, probed.kind, probed.definition) == (code, RefusalKind.ROWS, ""), name
        if name in FIRST_OF_ITS_CODE:
            refusal = outcome(put, server, 1, NOW_MS, [ONE, bad])
            assert refusal == Refusal(code=code, name=PARSERS_ERRORS[code], definition="known"), name
    assert outcome(server.log.contents, VERSION, [ONE, b"no"], NOW_MS) == UNAVAILABLE
    assert rows(server, NOW_MS) == (0, 0)
    assert put(server, 1, NOW_MS, [ONE, TWO]) is None
    assert rows(server, NOW_MS) == (2, 0)


TAKEN = {
    **{f"time {value!r}": (payload("evt_2", time=value), at_ms) for value, at_ms in ((None, 0), ("7", 7), ("", 0))},
    "time 2**63": (payload("evt_2", time=2**63), -(2**63)),
    "no time": (b'{"event_id": "evt_2", "workspace_id": "ws_1", "event": "k"}', 0),
}


def test_clickhouse_takes_times_that_the_core_does_not(server: ServerUnderTest) -> None:
    """The core sets these rows aside; whoever sends them all the same gets other entries, and no error."""
    for number, (name, (taken, at_ms)) in enumerate(TAKEN.items()):
        assert put(server, number, NOW_MS + number, [taken, b""]) is None, name
        assert [entry.key for entry in server.log.entries_at(NOW_MS + number)] == [("ws_1", "", at_ms, "evt_2")], name


def test_a_constraint_refuses_the_block_also_under_a_known_token(server: ServerUnderTest) -> None:
    """It is checked before the token; a probe does not see it."""
    put(server, 1, NOW_MS, [ONE])
    server.constrain(10)
    beyond = payload("evt_9", time=20)
    assert [outcome(put, server, number, NOW_MS, [ONE, beyond]) for number in (1, 2)] == [SMALL, SMALL]
    assert server.log.probe(VERSION, [beyond], timeout_s=5) is None
    assert rows(server, NOW_MS) == (1, 0)
    assert put(server, 2, NOW_MS + 1, [ONE]) is None
    assert rows(server, NOW_MS + 1) == (1, 0)


def test_without_memory_no_insert_and_no_probe_begins(server: ServerUnderTest) -> None:
    """Neither the deadline nor the rows are looked at; afterwards the same token is good."""
    server.starve(True)
    found = [
        *(outcome(put, server, 1, NOW_MS, some) for some in ([ONE], [b"{x"])),
        outcome(put, server, 1, NOW_MS, [ONE], within_s=-1),
        outcome(server.log.probe, VERSION, [ONE], timeout_s=5),
    ]
    assert found == [MEMORY] * 4
    assert rows(server, NOW_MS) == (0, 0)
    server.starve(False)
    assert put(server, 1, NOW_MS, [ONE]) is None
    assert rows(server, NOW_MS) == (1, 0)


def test_too_many_parts_in_a_partition_refuse_every_block(server: ServerUnderTest) -> None:
    """Also one for another partition, and one whose token is known; only a later run helps."""
    put(server, 1, NOW_MS, [ONE])
    server.limit_parts(1)
    found = [outcome(put, server, n, NOW_MS, some) for n, some in ((1, [ONE]), (2, [TWO]), (3, [b"{"]))]
    assert found == [UNAVAILABLE] * 3
    assert server.log.probe(VERSION, [TWO], timeout_s=5) is None
    assert outcome(put, server, 4, NOW_MS - 40 * DAY_MS, [TWO]) == UNAVAILABLE
    server.limit_parts(3000)
    assert put(server, 2, NOW_MS, [TWO]) is None
    assert rows(server, NOW_MS) == (2, 0)


@pytest.mark.slow
def test_an_insert_that_takes_too_long_stores_nothing(server: ServerUnderTest) -> None:
    """ClickHouse ends it by the limit that was sent with it."""
    server.be_slow(True)
    assert outcome(put, server, 1, NOW_MS, [ONE, TWO], timeout_s=1) == TIME
    assert rows(server, NOW_MS) == (0, 0)
    server.be_slow(False)
    assert put(server, 1, NOW_MS, [ONE, TWO]) is None
    assert rows(server, NOW_MS) == (2, 0)


# ── views ────────────────────────────────────────────────────────────────────────────────────────


def until_stored(server: ServerUnderTest, batch_id: int, at_ms: int) -> list[object]:
    """Outcomes of INSERTs that a view fails, until the block is there. On newer engines it is there at once."""
    found = []
    for _ in range(100 if server.engine in VIEWS_MAY_FAIL_FIRST else 1):
        found.append(outcome(put, server, batch_id, at_ms, [BAD[0], TWO]))
        if rows(server, at_ms) != (0, 0):
            break
    return found


def test_a_view_fails_after_its_block_is_stored(server: ServerUnderTest) -> None:
    """An error does not say that nothing was written, and a replay gets it again while nothing is added."""
    server.view("fails")
    assert set(until_stored(server, 1, NOW_MS)) == {VIEW}
    assert rows(server, NOW_MS) == (2, 0)
    assert outcome(put, server, 1, NOW_MS, [BAD[0], TWO]) == VIEW
    server.view("")
    assert put(server, 1, NOW_MS, [BAD[0], TWO]) is None
    assert rows(server, NOW_MS) == (2, 0)


def test_a_view_gets_a_replayed_block_too(server: ServerUnderTest) -> None:
    """A view that is made later, and fails, makes the replay of a stored block an error."""
    put(server, 1, NOW_MS, [BAD[0], TWO])
    server.view("fails")
    assert outcome(put, server, 1, NOW_MS, [BAD[0], TWO]) == VIEW
    assert put(server, 2, NOW_MS + 1, [TWO]) is None
    assert (rows(server, NOW_MS), rows(server, NOW_MS + 1)) == ((2, 0), (1, 0))


def test_an_older_engine_may_end_the_insert_first(server: ServerUnderTest) -> None:
    """Engines 25.8 and 26.3 race: the same block can be absent after the error, and a replay stores it once."""
    server.view("fails")
    if server.simulated:
        failing = iter([True, True, False])
        server.server.conditions.view_fails_first = lambda: next(failing, False)  # type: ignore[attr-defined]
    outcomes = until_stored(server, 1, NOW_MS)
    assert set(outcomes) == {VIEW}
    assert len(outcomes) == 1 or server.engine in VIEWS_MAY_FAIL_FIRST
    assert not server.simulated or len(outcomes) == (3 if server.engine in VIEWS_MAY_FAIL_FIRST else 1)
    assert rows(server, NOW_MS) == (2, 0)


def test_a_view_without_its_target_lets_no_block_in(server: ServerUnderTest) -> None:
    """ClickHouse finds it before anything is read or written, and no rerun helps."""
    put(server, 1, NOW_MS, [ONE])
    server.view("target")
    found = [outcome(put, server, n, NOW_MS, some) for n, some in ((1, [ONE]), (2, [TWO]), (3, [b"{"]))]
    gone = "with the target numbers, which does not exist"
    assert found == [Refusal(code=60, name="UNKNOWN_TABLE", kind=RefusalKind.VIEW, view=gone, permanent=True)] * 3
    assert server.log.probe(VERSION, [TWO], timeout_s=5) is None
    assert rows(server, NOW_MS) == (1, 0)
    server.view("")
    assert put(server, 2, NOW_MS, [TWO]) is None
    assert rows(server, NOW_MS) == (2, 0)


@pytest.mark.slow
def test_a_slow_view_is_a_time_out_after_the_block_is_stored(server: ServerUnderTest) -> None:
    """The same answer as for a slow INSERT, which stores nothing: only a look-up tells them apart."""
    server.view("slow")
    assert outcome(put, server, 1, NOW_MS, [ONE, TWO], timeout_s=1) == TIME
    assert rows(server, NOW_MS) == (2, 0)


# ── between the sender and the server ────────────────────────────────────────────────────────────


STATUSES = {
    413: Refusal(code=413, name="HTTP 413", kind=RefusalKind.SIZE, meaning="known"),
    504: Refusal(code=504, name="HTTP 504", kind=RefusalKind.TIME, meaning="known"),
    502: ("ForeignAnswer", 502),
    404: ("WrongAddress", 404),
    200: ("ForeignAnswer", 200),
}


@pytest.mark.parametrize("passes_on", [False, True])
def test_a_proxys_answer_does_not_say_what_is_stored(server: ServerUnderTest, passes_on: bool) -> None:
    """A proxy can answer by itself before or after it has passed an INSERT on."""
    for status, expected in STATUSES.items():
        at_ms = NOW_MS + status
        server.answer_instead(status, passes_on=passes_on)
        deadline_ms = NOW_MS + DAY_MS
        assert outcome(put, server, status, at_ms, [ONE], deadline_ms=deadline_ms) == expected, status
        assert outcome(server.log.probe, VERSION, [ONE], timeout_s=5) == expected, status
        kind = "WrongAddress" if status == 404 else "ForeignAnswer"
        assert outcome(server.log.holdings, [at_ms]) == (kind, status)
        assert outcome(server.log.contents, VERSION, [ONE], at_ms) == (kind, status)
        server.recover()
        assert rows(server, at_ms) == ((1, 0) if passes_on else (0, 0)), status


@pytest.mark.parametrize("passes_on", [False, True])
def test_a_connection_that_closes_leaves_the_outcome_unknown(server: ServerUnderTest, passes_on: bool) -> None:
    """The sender cannot tell an INSERT that never arrived from one whose answer was lost."""
    deadline_ms = server.log.deadline_ms(60)
    server.lose_answers(passes_on=passes_on)
    assert outcome(put, server, 1, NOW_MS, [ONE], deadline_ms=deadline_ms) == UNKNOWN
    if not passes_on:
        assert outcome(server.log.holdings, [NOW_MS]) == UNAVAILABLE
        assert outcome(server.log.probe, VERSION, [ONE], timeout_s=5) == UNAVAILABLE
    server.recover()
    assert rows(server, NOW_MS) == ((1, 0) if passes_on else (0, 0))
    put(server, 1, NOW_MS, [ONE])
    assert rows(server, NOW_MS) == (1, 0)


def test_an_insert_can_arrive_after_its_sender_looked(server: ServerUnderTest) -> None:
    """The sender is gone and the block is absent; then it is there. Until the deadline this can happen."""
    deadline_ms = server.log.deadline_ms(5000)
    server.hold_back()
    assert outcome(put, server, 1, NOW_MS, [ONE, TWO], deadline_ms=deadline_ms) == UNKNOWN
    assert rows(server, NOW_MS) == (0, 0)
    server.let_go()
    assert rows(server, NOW_MS) == (2, 0)


def test_an_insert_that_arrives_after_its_deadline_stores_nothing(server: ServerUnderTest) -> None:
    """The sender's successor may then send the rows in other blocks."""
    deadline_ms = server.log.deadline_ms(1)
    server.hold_back()
    assert outcome(put, server, 1, NOW_MS, [ONE], deadline_ms=deadline_ms) == UNKNOWN
    server.pass_time(2)
    server.let_go()
    assert rows(server, NOW_MS) == (0, 0)


def test_an_insert_and_its_replay_that_arrive_together_store_one_block(server: ServerUnderTest) -> None:
    """Both are at work at once, as when an answer is late and a lease is adopted."""
    deadline_ms = server.log.deadline_ms(5000)
    server.hold_back()
    for _ in range(4):
        assert outcome(put, server, 1, NOW_MS, [ONE, TWO], deadline_ms=deadline_ms) == UNKNOWN
    server.let_go()
    assert rows(server, NOW_MS) == (2, 0)


def test_a_server_that_is_down_got_nothing(server: ServerUnderTest) -> None:
    """A refused connection is no unknown outcome: another try is safe."""
    deadline_ms = server.log.deadline_ms(60)
    server.be_down(True)
    assert outcome(put, server, 1, NOW_MS, [ONE], deadline_ms=deadline_ms) == UNAVAILABLE
    assert outcome(server.log.holdings, [NOW_MS]) == UNAVAILABLE
    assert outcome(server.log.deadline_ms, 1) == UNAVAILABLE
    assert outcome(server.log.definition_age_s, VERSION) == UNAVAILABLE
    server.be_down(False)
    assert rows(server, NOW_MS) == (0, 0)


# ── a crash ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(params=["simulated", pytest.param("real", marks=pytest.mark.clickhouse_sensitive)])
def crashing(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[ServerUnderTest, Callable[[], None]]]:
    """A server of the test's own, and what kills and starts it."""
    if request.param == "simulated":
        with simulated_server(engines.chosen(), NOW_MS) as simulated:
            yield simulated, simulated.server.crash
        return
    with engines.local_clickhouse(tmp_path) as clickhouse, real_server(clickhouse.url.removesuffix("default")) as real:

        def crash() -> None:
            clickhouse.kill()
            clickhouse.start()

        yield real, crash


@pytest.mark.slow
def test_a_stored_block_and_its_token_survive_a_crash(
    crashing: tuple[ServerUnderTest, Callable[[], None]],
) -> None:
    """Also of an INSERT that was still at work, and whose sender got no answer."""
    server, crash = crashing
    put(server, 1, NOW_MS, [ONE, TWO])
    server.view("slow")
    found: list[object] = []
    server.start(lambda: found.append(outcome(put, server, 2, NOW_MS + 1, [ONE, TWO])))
    for _ in range(100):
        server.pass_time(0.1)
        if rows(server, NOW_MS + 1) != (0, 0):
            break
    crash()
    for _ in range(1000):
        server.pass_time(0.1)
        if found:
            break
    assert found == [UNKNOWN]
    server.view("")
    assert [put(server, number, NOW_MS + number - 1, [ONE, TWO]) for number in (1, 2)] == [None, None]
    assert (rows(server, NOW_MS), rows(server, NOW_MS + 1)) == ((2, 0), (2, 0))


# ── what is the same content ─────────────────────────────────────────────────────────────────────

METAS: list[object] = [
    *(
        None,
        {},
        {"a": None},
        {"a": {}},
        {"a": {"b": None}},
        {"a": []},
        {"a": [None]},
        {"a": [{}]},
        {"a": [{"b": None}]},
    ),
    *({"a": value} for value in (1, 1.0, "1", True, [1], [1.0], [1, "a"], ["1", "a"], -0.0, 0, 1e3, 1000, 0.5)),
    *({"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a.b": 1}, {"a": {"b": 1}}),
]
SAME_EVENT: list[bytes] = [
    *(payload("evt_1", **fields) for fields in ({}, {"unknown": 1}, {"bucket": None}, {"bucket": ""}, {"source": ""})),
    *(payload("evt_1", **fields) for fields in ({"source": "platform"}, {"source": "api"}, {"bucket": "b"})),
    *(payload("evt_1", actor=actor) for actor in (None, {}, {"type": None, "x": 1}, {"meta": {}}, {"id": "a"})),
    *(payload("evt_1", targets=targets) for targets in (None, [], [{}], [{"type": "", "x": 1}], [{"meta": None}])),
    *(payload("evt_1", targets=[{"id": id_} for id_ in ids]) for ids in ("ab", "ba", "a")),
    payload("evt_1", remote_ip="a"),
    payload("evt_1", user_agent="a"),
    json.dumps({**json.loads(payload("evt_1")), "bucket": "b"}, indent=None, separators=(",", ":")).encode(),
    *(payload("evt_1", meta=meta) for meta in METAS),
    *(payload("evt_1", actor={"meta": meta}) for meta in METAS[:9]),
    *(payload("evt_1", targets=[{"meta": meta}]) for meta in METAS[:9]),
]


def test_two_payloads_are_the_same_content_on_both_or_on_neither(server: ServerUnderTest) -> None:
    """Content tells an altered entry; payloads that ClickHouse stores alike must not look altered."""
    hashes = server.log.contents(VERSION, SAME_EVENT, NOW_MS)
    put(server, 1, NOW_MS, SAME_EVENT)
    assert sorted(entry.content for entry in server.log.entries_at(NOW_MS)) == sorted(hashes)
    first = [hashes.index(one) for one in hashes]
    assert {hashes.index(one) for one in server.log.contents(VERSION, SAME_EVENT[:1], NOW_MS)} == {0}
    with simulated_server(server.engine, NOW_MS) as other:
        simulated = other.log.contents(VERSION, SAME_EVENT, NOW_MS)
        put(other, 1, NOW_MS, SAME_EVENT)
        fingerprints = sorted(entry.fingerprint for entry in other.log.entries_at(NOW_MS))
    assert [simulated.index(one) for one in simulated] == first
    assert sorted(entry.fingerprint for entry in server.log.entries_at(NOW_MS)) == fingerprints


def test_facts_of_a_refusal_leave_the_database_out() -> None:
    """The control of what the other tests compare."""
    qualified = Refusal(code=6, name="N", kind=RefusalKind.VIEW, view="some_database.failing_view", definition="d")
    assert facts(qualified) == Refusal(code=6, name="N", kind=RefusalKind.VIEW, view="failing_view", definition="known")
