"""Dead letters for operators: found, shown, retried, discarded, and recorded with who, when and why.

What belongs here: the letters' states, what each means for their rows, and the plans of their statements. What
does not: which payloads become letters (`integration.export.test_payloads`), and floods of them (`integration.export.test_floods`).
"""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.dead_letters import HELD, DeadLetterFilter, LetterState, RowState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import actions, dead_letters
from auditexport_pipeline.mysql.statements import prepared
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import Row, run, small_event

OPERATOR = Actor(who="ada", why="the writer is fixed")
# Planted in payloads: found anywhere else, it has leaked.
CANARY = "canary-5d1c"


def bad(event_id: str, workspace_id: str = "ws_1", *, time: object = CANARY) -> Row:
    """A row that no event can be made of, with a canary in its payload."""
    return small_event(event_id, workspace_id, time=time, event=CANARY)


def mend(stack: Stack, *pks: int) -> None:
    """The application repairs its rows: the time becomes a number."""
    for pk in pks:
        stack.sql(
            "UPDATE clickhouse_outbox SET payload = REPLACE(payload, :bad, '1') WHERE pk = :pk",
            bad=f'"{CANARY}"',
            pk=pk,
        )
        stack.sql(
            "UPDATE clickhouse_outbox SET payload = JSON_SET(payload, '$.event', 'key.create') WHERE pk = :pk", pk=pk
        )


def states(stack: Stack) -> dict[int, str]:
    return {
        int(str(row.pk)): str(row.state)
        for row in stack.sql("SELECT pk, state FROM clickhouse_outbox_dead_letter ORDER BY pk")
    }


def recorded(stack: Stack) -> list[tuple[str, str, str, int]]:
    with stack.outbox.transaction("reading actions") as connection:
        return [(one.verb, one.by.who, one.by.why, one.rows) for one in actions.last(connection, 100)]


# ── states ───────────────────────────────────────────────────────────────────────────────────────


def test_a_fixed_row_goes_out_after_a_retry_and_its_letter_is_closed(stack: Stack) -> None:
    """The way back: an operator who fixed the cause needs one command, and no letter that stays red for ever."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    mend(stack, pk)
    assert run(stack, "two") == 0

    acted = dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR)
    run(stack, "three")

    assert (acted.changed, acted.gone, len(acted.action_ids)) == (1, 0, 1)
    assert stack.counts() == (1, 1)
    assert stack.pending() == 0
    assert dead_letters.count(stack.outbox, DeadLetterFilter()).letters == 0
    details = dead_letters.show(stack.outbox, pk)
    assert details is not None
    assert (details.letter.state, details.row) == (LetterState.RETRIED, RowState.EXPORTED)
    assert details.exported_at_ms is not None
    assert details.action is not None
    assert (details.action.verb, details.action.by) == ("retry", OPERATOR)


def test_a_row_that_fails_its_retry_opens_its_letter_again(stack: Stack) -> None:
    """A retry that was too early must not make a letter disappear."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    first = dead_letters.show(stack.outbox, pk)
    dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR)
    assert states(stack) == {pk: "retried"}
    assert run(stack, "two") == 1

    again = dead_letters.show(stack.outbox, pk)
    assert first is not None
    assert again is not None
    assert again.letter.state is LetterState.OPEN
    assert again.letter.created_at_ms == first.letter.created_at_ms
    assert again.letter.batch_id > first.letter.batch_id
    assert again.action is not None  # what was tried last is still told


def test_a_discarded_row_stays_where_it_is_and_is_never_claimed_again(stack: Stack) -> None:
    """Giving an event up is a decision about its export; the application's row is not ours to mark or delete."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    acted = dead_letters.discard(
        stack.outbox, DeadLetterFilter(pks=PkSet.of([pk])), Actor(who="ada", why="a test account")
    )
    assert acted.changed == 1
    mend(stack, pk)

    assert run(stack, "two") == 0
    assert stack.pending() == 1
    backlog = stack.outbox.backlog(tuple(VERSIONS), count_to=100)
    assert (backlog.rows, backlog.lag_s, backlog.dead_rows) == (0, 0.0, 0)
    # Discarding again changes nothing; thinking again is possible, and is a retry.
    assert dead_letters.discard(stack.outbox, DeadLetterFilter(), OPERATOR).changed == 0
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(state=LetterState.DISCARDED), OPERATOR).changed == 1
    run(stack, "three")
    assert stack.counts() == (1, 1)
    assert [verb for verb, *_ in recorded(stack)] == ["retry", "discard"]


@pytest.mark.parametrize("verb", ["retry", "discard", "upkeep"])
def test_a_letter_whose_row_was_deleted_or_marked_is_gone(stack: Stack, verb: str) -> None:
    """It would stand in every count for ever, and hold the backlog's number down."""
    deleted, marked, kept = stack.put(bad("evt_1"), bad("evt_2"), bad("evt_3"))
    run(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=deleted)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE pk = :pk", pk=marked)

    if verb == "upkeep":
        assert dead_letters.close_gone(stack.outbox) == 2
        assert dead_letters.close_gone(stack.outbox) == 0
        assert recorded(stack) == []
    else:
        acted = (dead_letters.retry if verb == "retry" else dead_letters.discard)(
            stack.outbox, DeadLetterFilter(), OPERATOR
        )
        assert (acted.changed, acted.gone) == (1, 2)
        assert recorded(stack) == [(verb, "ada", "the writer is fixed", 1)]
    left = {"retry": "retried", "discard": "discarded", "upkeep": "open"}[verb]
    assert states(stack) == {deleted: "gone", marked: "gone", kept: left}


def test_a_gone_letters_row_that_is_pending_again_gets_another_chance(stack: Stack) -> None:
    """Somebody who clears a mark by hand wants the row exported; an old letter must not hold it silently."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1")
    dead_letters.close_gone(stack.outbox)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    assert run(stack, "two") == 1
    assert states(stack) == {pk: "open"}


# ── which letters ────────────────────────────────────────────────────────────────────────────────


def _various(stack: Stack) -> dict[str, int]:
    """Letters of two workspaces, two reasons and two ages; good rows between them."""
    names = ["a_type", "a_field", "b_type", "b_type_old"]
    pks = stack.put(
        bad("evt_1", "ws_a"),
        ("ws_a", "evt_2", '{"event_id": "evt_2"}'),
        bad("evt_3", "ws_b"),
        bad("evt_4", "ws_b"),
        small_event("evt_5", "ws_a"),
    )
    run(stack)
    stack.sql(
        "UPDATE clickhouse_outbox_dead_letter SET created_at_ms = created_at_ms - 7200000 WHERE pk = :pk", pk=pks[3]
    )
    return dict(zip(names, pks, strict=False))


@pytest.mark.parametrize(
    ("which", "found"),
    [
        (DeadLetterFilter(), ["a_type", "a_field", "b_type", "b_type_old"]),
        (DeadLetterFilter(workspace_id="ws_a"), ["a_type", "a_field"]),
        (DeadLetterFilter(reason="wrong_type"), ["a_type", "b_type", "b_type_old"]),
        (DeadLetterFilter(reason="wrong_type", workspace_id="ws_b"), ["b_type", "b_type_old"]),
        (DeadLetterFilter(version="audit_log.v1", older_than_s=3_600), ["b_type_old"]),
        (DeadLetterFilter(version="audit_log.v2"), []),
        (DeadLetterFilter(state=None, workspace_id="ws_b"), ["b_type", "b_type_old"]),
        (DeadLetterFilter(state=LetterState.DISCARDED), []),
    ],
    ids=lambda value: str(value) if isinstance(value, list) else "",
)
def test_filters_mean_the_same_to_every_verb(stack: Stack, which: DeadLetterFilter, found: list[str]) -> None:
    """Who has looked at a list and then retries by the same filter must act on what was listed."""
    pks = _various(stack)
    expected = [pks[name] for name in found]
    assert [letter.pk for letter in dead_letters.page(stack.outbox, which)] == expected
    assert dead_letters.count(stack.outbox, which).letters == len(expected)
    assert dead_letters.retry(stack.outbox, which, OPERATOR).changed == len(expected)
    assert [pk for pk, state in states(stack).items() if state == "retried"] == expected


def test_pks_and_a_number_limit_what_is_retried(stack: Stack) -> None:
    """The careful way: a few first, and by name."""
    pks = stack.put(*(bad(f"evt_{number}") for number in range(6)))
    run(stack)
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR, at_most=2).changed == 2
    named = DeadLetterFilter(pks=PkSet.of([pks[0], pks[3], pks[5]]))
    assert dead_letters.retry(stack.outbox, named, OPERATOR).changed == 2
    assert [pk for pk, state in states(stack).items() if state == "retried"] == [pks[0], pks[1], pks[3], pks[5]]


def test_pages_follow_one_another_in_both_directions(stack: Stack) -> None:
    """A flood is read page by page; a page that skips or repeats a letter hides one."""
    pks = stack.put(*(bad(f"evt_{number}") for number in range(7)))
    run(stack)
    for newest_first in (False, True):
        seen: list[int] = []
        beyond_pk = None
        while found := dead_letters.page(
            stack.outbox, DeadLetterFilter(), letters=3, newest_first=newest_first, beyond_pk=beyond_pk
        ):
            seen += [letter.pk for letter in found]
            beyond_pk = seen[-1]
        assert seen == (pks[::-1] if newest_first else pks)


def test_counts_name_reasons_versions_and_the_workspaces_with_the_most(stack: Stack) -> None:
    """The first question of an incident: whose, and why."""
    _various(stack)
    stack.put(*(bad(f"evt_x{number}", f"ws_{number:02}") for number in range(12)))
    run(stack, "two")
    counts = dead_letters.count(stack.outbox, DeadLetterFilter())
    assert (counts.letters, counts.by_version) == (16, {"audit_log.v1": 16})
    assert counts.by_reason == {"wrong_type": 15, "missing_field": 1}
    assert len(counts.by_workspace) == dead_letters.TOP_WORKSPACES
    assert list(counts.by_workspace.items())[:2] == [("ws_a", 2), ("ws_b", 2)]


@pytest.mark.parametrize("nonsense", [{"older_than_s": -1}, {"reason": ""}, {"workspace_id": ""}])
def test_a_filter_that_means_nothing_is_refused(nonsense: dict[str, object]) -> None:
    """An empty variable in somebody's script must not become every letter there is."""
    with pytest.raises(InvalidConfig):
        DeadLetterFilter(**nonsense)  # type: ignore[arg-type]


def test_only_the_state_narrows_nothing() -> None:
    """What the prompt refuses to act on without being told `--all`."""
    assert DeadLetterFilter().everything
    assert DeadLetterFilter(state=LetterState.DISCARDED).everything
    assert not DeadLetterFilter(older_than_s=0).everything
    assert not DeadLetterFilter(pks=PkSet.of([1])).everything


# ── records ──────────────────────────────────────────────────────────────────────────────────────


def test_each_chunk_and_its_record_are_one_transaction(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """An action without its record is an event that nobody gave up; a record without its action is a lie."""
    monkeypatch.setattr(dead_letters, "CHUNK_LETTERS", 3)
    pks = stack.put(*(bad(f"evt_{number}") for number in range(8)))
    run(stack)
    record = actions.record

    def fails_at_the_third(*arguments: object, **named: object) -> int:
        if len(recorded(stack)) == 2:
            raise RuntimeError("the operator's machine is gone")
        return record(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patched:
        patched.setattr(actions, "record", fails_at_the_third)
        with pytest.raises(RuntimeError):
            dead_letters.discard(stack.outbox, DeadLetterFilter(), OPERATOR)
    assert list(states(stack).values()) == ["discarded"] * 6 + ["open"] * 2

    acted = dead_letters.discard(stack.outbox, DeadLetterFilter(), OPERATOR)
    assert acted.changed == 2
    assert [rows for *_, rows in recorded(stack)] == [2, 3, 3]
    with stack.outbox.transaction("reading actions") as connection:
        selections = [json.loads(action.selection) for action in reversed(actions.last(connection, 3))]
    assert [selection["pks"] for selection in selections] == [
        f"{pks[0]}-{pks[2]}",
        f"{pks[3]}-{pks[5]}",
        f"{pks[6]}-{pks[7]}",
    ]
    named = stack.sql("SELECT COUNT(DISTINCT action_id) AS n FROM clickhouse_outbox_dead_letter")
    assert named[0].n == 3


def test_two_operators_at_once_share_the_letters_and_each_record_is_true(stack: Stack) -> None:
    """Two people answer the same alarm: no letter is acted on twice, and the records add up."""
    stack.put(*(bad(f"evt_{number}") for number in range(300)))
    run(stack)
    with ThreadPoolExecutor(2) as pool:
        retried = pool.submit(dead_letters.retry, stack.outbox, DeadLetterFilter(), Actor(who="ada", why="fixed"))
        discarded = pool.submit(dead_letters.discard, stack.outbox, DeadLetterFilter(), Actor(who="bob", why="noise"))
        changed = (retried.result().changed, discarded.result().changed)
    assert sum(changed) == 300
    assert sum(rows for *_, rows in recorded(stack)) == 300
    found = list(states(stack).values())
    assert (found.count("retried"), found.count("discarded")) == changed


def test_a_payload_is_shown_only_on_request_and_kept_nowhere(stack: Stack) -> None:
    """Audit payloads hold what people did; a letter's list goes into tickets and chats."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR)
    run(stack, "two")
    told = repr(
        (
            dead_letters.page(stack.outbox, DeadLetterFilter()),
            dead_letters.count(stack.outbox, DeadLetterFilter()),
            dead_letters.show(stack.outbox, pk),
            stack.sql("SELECT * FROM clickhouse_outbox_dead_letter"),
            stack.sql("SELECT * FROM clickhouse_outbox_action"),
        )
    )
    assert CANARY not in told
    asked = dead_letters.show(stack.outbox, pk, with_payload=True)
    assert asked is not None
    assert CANARY.encode() in (asked.payload or b"")
    stack.sql("DELETE FROM clickhouse_outbox")
    after = dead_letters.show(stack.outbox, pk, with_payload=True)
    assert after is not None
    assert (after.row, after.payload) == (RowState.DELETED, None)
    assert dead_letters.show(stack.outbox, pk + 1) is None


# ── query plans ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def many(stack: Stack) -> Stack:
    """4,096 letters, most of them retried long ago; of the open ones a few are of one reason, or of one workspace."""
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox_dead_letter VALUES "
            "(1, 'retried', 'audit_log.v1', 'ws', 'evt', 'wrong_type', '$', '', 1, 1, 1, NULL)"
        )
        for power in range(12):
            connection.exec_driver_sql(
                f"INSERT INTO clickhouse_outbox_dead_letter SELECT pk + {2**power}, state, version, workspace_id, event_id, "
                "reason, json_path, detail, batch_id, created_at_ms, updated_at_ms, action_id FROM clickhouse_outbox_dead_letter"
            )
        connection.exec_driver_sql("UPDATE clickhouse_outbox_dead_letter SET state = 'open' WHERE MOD(pk, 8) = 0")
        connection.exec_driver_sql("UPDATE clickhouse_outbox_dead_letter SET reason = 'rare' WHERE MOD(pk, 512) = 0")
        connection.exec_driver_sql(
            "UPDATE clickhouse_outbox_dead_letter SET workspace_id = 'rare' WHERE MOD(pk, 512) = 8"
        )
        connection.exec_driver_sql("UPDATE clickhouse_outbox_dead_letter SET version = 'v0' WHERE MOD(pk, 512) = 16")
    with stack.outbox.engine.connect() as connection:
        list(connection.exec_driver_sql("ANALYZE TABLE clickhouse_outbox_dead_letter"))
    return stack


@pytest.mark.parametrize(
    ("which", "key", "rows"),
    [
        (DeadLetterFilter(), "letter_pk_idx", 512),
        (DeadLetterFilter(reason="rare"), "letter_reason_idx", 8),
        (DeadLetterFilter(workspace_id="rare"), "letter_workspace_idx", 8),
        (DeadLetterFilter(version="v0"), "letter_version_idx", 8),
        (DeadLetterFilter(older_than_s=5), "letter_pk_idx", 512),
        (DeadLetterFilter(pks=PkSet.of([8, 16, 4_000, 4_008])), "PRIMARY", 4),
    ],
    ids=["open", "reason", "workspace", "version", "age", "pks"],
)
@pytest.mark.parametrize("edge", [None, "from", "below"])
def test_a_page_of_letters_reads_its_index_in_order(
    many: Stack, which: DeadLetterFilter, key: str, rows: int, edge: str | None
) -> None:
    """The list is asked for in the middle of a flood, when sorting all letters takes longest."""
    direction = "DESC" if edge == "below" else "ASC"
    values = {**dead_letters._values(which), "edge_pk": 2_000, "row_limit": 50}
    for name in ("page", "page_pks"):
        statement = dead_letters._about(name, which, edge, direction=direction).text
        with many.outbox.engine.connect() as connection:
            explain = prepared(f"EXPLAIN FORMAT=TRADITIONAL {statement}")
            (step,) = connection.execute(explain, values).mappings()
            before = _rows_read(connection)
            found = list(connection.execute(prepared(statement), values))
            read = _rows_read(connection) - before
        told = f"{name} read {read}: {dict(step)}"
        assert found, told
        assert step["key"] == key, told
        assert "filesort" not in (step["Extra"] or ""), told
        assert read <= min(rows, 50) + 4, told


def _rows_read(connection: sa.Connection) -> int:
    """Rows that this connection has read so far from any table or index."""
    return sum(int(row[1]) for row in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'"))


@pytest.mark.parametrize("column", ["reason", "workspace_id", "version"])
def test_counting_open_letters_reads_an_index_only(many: Stack, column: str) -> None:
    """The check and every list count; over the letters themselves each count would read a million of them."""
    statement = dead_letters._about("count", DeadLetterFilter(), column=column).text
    with many.outbox.engine.connect() as connection:
        (step,) = connection.execute(
            sa.text(f"EXPLAIN FORMAT=TRADITIONAL {statement}"), {"state": "open", "row_limit": 10}
        ).mappings()
    assert step["key"] == f"letter_{column.removesuffix('_id')}_idx", dict(step)
    assert "Using index" in step["Extra"], dict(step)
    assert int(step["rows"]) <= 2 * 512, dict(step)


def test_letters_are_changed_by_their_primary_key(many: Stack) -> None:
    """By an index that holds the state, two operators who change states would deadlock."""
    pks = {"pks": list(range(8, 400, 8)), "states": [str(state) for state in HELD], "state": "retried", "action_id": 1}
    for name in ("lock", "change", "gone"):
        explain = prepared(f"EXPLAIN FORMAT=TRADITIONAL {dead_letters._PIECES[name]}")
        with many.outbox.engine.connect() as connection:
            (step,) = connection.execute(explain, pks).mappings()
        assert (step["key"], step["type"]) == ("PRIMARY", "range"), f"{name}: {dict(step)}"


def test_a_payload_that_mysql_may_not_send_is_set_aside(stack: Stack) -> None:
    """Above max_allowed_packet a server gives an empty text or NULL, and a warning that nobody reads."""
    event = '{{"event_id":"{0}","time":1,"workspace_id":"ws","event":"e","meta":{{"text":"{1}"}}}}'
    stack.put(("ws", "evt_big", event.format("evt_big", "x" * 3_000_000)), ("ws", "evt_1", event.format("evt_1", "x")))
    before = stack.sql("SELECT @@GLOBAL.max_allowed_packet AS bytes")[0].bytes
    stack.sql("SET GLOBAL max_allowed_packet = 1048576")
    stack.outbox.disconnect()
    try:
        run(stack, "one")
        assert stack.outbox.dead_by_reason() == {"payload_unreadable": 1}
        assert stack.counts() == (1, 1)
    finally:
        stack.sql(f"SET GLOBAL max_allowed_packet = {before}")
        stack.outbox.disconnect()
