"""Dead letters for operators: found, shown, retried, discarded, and recorded with who, when and why.

Which payloads become dead letters is in `integration.export.test_payloads`, floods of them in `integration.export.test_floods`.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.dead_letters import KEEPS_ROW_OUT, DeadLetterFilter, LetterState, RowState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import actions, dead_letters
from auditexport_pipeline.mysql.statements import prepared
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.builders import Row, run, small_event

OPERATOR = Actor(who="ada", why="the writer is fixed")
# A text in the payloads. It must be found nowhere else.
CANARY = "canary-5d1c"


def bad(event_id: str, workspace_id: str = "ws_1", *, time: object = CANARY) -> Row:
    """A row that does not decode, with a canary in its payload."""
    return small_event(event_id, workspace_id, time=time, event=CANARY)


def mend(stack: Stack, *pks: int) -> None:
    """The application repairs its rows: the time becomes a number."""
    for pk in pks:
        stack.sql(
            "UPDATE clickhouse_outbox SET payload = JSON_SET(REPLACE(payload, :bad, '1'), '$.event', 'key.create') "
            "WHERE pk = :pk",
            bad=f'"{CANARY}"',
            pk=pk,
        )


def states(stack: Stack) -> dict[int, str]:
    return {
        int(str(row.pk)): str(row.state)
        for row in stack.sql("SELECT pk, state FROM clickhouse_outbox_dead_letter ORDER BY pk")
    }


def recorded(stack: Stack) -> list[tuple[str, str, str, int]]:
    return [(action.verb, action.by.who, action.by.why, action.rows) for action in stack.upkeep.actions(100)]


# ── states ───────────────────────────────────────────────────────────────────────────────────────


def test_a_fixed_row_is_exported_after_a_retry_and_its_letter_is_closed(stack: Stack) -> None:
    """An operator who fixed the cause needs one command, and no letter stays open for ever."""
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
    """A letter must not disappear because of a retry that was too early."""
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
    assert again.action is not None  # the retry


def test_a_discarded_row_stays_in_the_outbox_and_is_never_claimed(stack: Stack) -> None:
    """Giving an event up is a decision about its export; the application's row is not ours to mark or delete."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    assert dead_letters.discard(stack.outbox, DeadLetterFilter(pks=PkSet.of([pk])), OPERATOR).changed == 1
    mend(stack, pk)

    assert run(stack, "two") == 0
    assert stack.pending() == 1
    backlog = stack.outbox.backlog(tuple(VERSIONS), count_to=100)
    assert (backlog.rows, backlog.lag_s, backlog.dead_rows) == (0, 0.0, 0)
    # A second discard changes nothing; a retry is still possible.
    assert dead_letters.discard(stack.outbox, DeadLetterFilter(), OPERATOR).changed == 0
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(state=LetterState.DISCARDED), OPERATOR).changed == 1
    run(stack, "three")
    assert stack.counts() == (1, 1)
    assert [verb for verb, *_ in recorded(stack)] == ["retry", "discard"]


@pytest.mark.parametrize("verb", ["retry", "discard", "close_gone"])
def test_a_letter_whose_row_was_deleted_or_marked_is_gone(stack: Stack, verb: str) -> None:
    """It would be in every count for ever. If its row is pending again later, no letter holds the row back."""
    deleted, marked, pending = stack.put(bad("evt_1"), bad("evt_2"), bad("evt_3"))
    run(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=deleted)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE pk = :pk", pk=marked)

    if verb == "close_gone":
        assert dead_letters.close_gone(stack.outbox) == 2
        assert dead_letters.close_gone(stack.outbox) == 0
        assert recorded(stack) == []
    else:
        acted = getattr(dead_letters, verb)(stack.outbox, DeadLetterFilter(), OPERATOR)
        assert (acted.changed, acted.gone) == (1, 2)
        assert recorded(stack) == [(verb, "ada", "the writer is fixed", 1)]
    left = {"retry": "retried", "discard": "discarded", "close_gone": "open"}[verb]
    assert states(stack) == {deleted: "gone", marked: "gone", pending: left}

    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk = :pk", pk=marked)
    run(stack, "two")
    assert states(stack)[marked] == "open"


# ── filters ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def various(stack: Stack) -> tuple[Stack, dict[str, int]]:
    """Letters of two workspaces, two reasons and two ages; good rows between them."""
    pks = stack.put(
        bad("a_type", "ws_a"),
        ("ws_a", "a_field", '{"event_id": "a_field"}'),
        bad("b_type", "ws_b"),
        bad("b_old", "ws_b"),
        small_event("good", "ws_a"),
    )
    run(stack)
    stack.sql(
        "UPDATE clickhouse_outbox_dead_letter SET created_at_ms = created_at_ms - 7200000 WHERE event_id = 'b_old'"
    )
    return stack, dict(zip(("a_type", "a_field", "b_type", "b_old"), pks, strict=False))


def test_a_filter_means_the_same_for_each_verb(various: tuple[Stack, dict[str, int]]) -> None:
    """An operator lists letters and then retries by the same filter: what was listed must be what is retried."""
    stack, pks = various
    cases = {
        DeadLetterFilter(): ["a_type", "a_field", "b_type", "b_old"],
        DeadLetterFilter(workspace_id="ws_a"): ["a_type", "a_field"],
        DeadLetterFilter(reason="wrong_type"): ["a_type", "b_type", "b_old"],
        DeadLetterFilter(reason="wrong_type", workspace_id="ws_b"): ["b_type", "b_old"],
        DeadLetterFilter(version="audit_log.v1", older_than_s=3_600): ["b_old"],
        DeadLetterFilter(version="audit_log.v2"): [],
        DeadLetterFilter(state=None, workspace_id="ws_b"): ["b_type", "b_old"],
        DeadLetterFilter(state=None, older_than_s=3_600): ["b_old"],
        DeadLetterFilter(state=LetterState.DISCARDED): [],
        DeadLetterFilter(pks=PkSet.of([pks["a_field"], pks["b_old"]])): ["a_field", "b_old"],
    }
    for which, events in cases.items():
        expected = [pks[event] for event in events]
        assert [letter.pk for letter in dead_letters.page(stack.outbox, which)] == expected, which
        assert dead_letters.count(stack.outbox, which).letters == len(expected), which
        assert dead_letters.retry(stack.outbox, which, OPERATOR).changed == len(expected), which
        assert [pk for pk, state in states(stack).items() if state == "retried"] == expected, which
        stack.sql("UPDATE clickhouse_outbox_dead_letter SET state = 'open'")
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR, at_most=2).changed == 2
    assert [pk for pk, state in states(stack).items() if state == "retried"] == [pks["a_type"], pks["a_field"]]


def test_pages_follow_one_another_in_both_directions(stack: Stack) -> None:
    """A page that skips or repeats a letter would hide one."""
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


def test_counts_name_reasons_versions_and_the_workspaces_with_the_most(various: tuple[Stack, dict[str, int]]) -> None:
    """The first questions of an incident: whose rows, and why."""
    stack, _ = various
    stack.put(*(bad(f"evt_x{number}", f"ws_{number:02}") for number in range(12)))
    run(stack, "two")
    counts = dead_letters.count(stack.outbox, DeadLetterFilter())
    assert (counts.letters, counts.by_version) == (16, {"audit_log.v1": 16})
    assert counts.by_reason == {"wrong_type": 15, "missing_field": 1}
    assert len(counts.by_workspace) == dead_letters.TOP_WORKSPACES
    assert list(counts.by_workspace.items())[:2] == [("ws_a", 2), ("ws_b", 2)]


def test_a_filter_refuses_empty_values_and_knows_if_it_selects_all() -> None:
    """An empty variable in a script must not select every letter; the CLI asks for `--all` before it acts on all."""
    for nonsense in ({"older_than_s": -1}, {"reason": ""}, {"workspace_id": ""}):
        with pytest.raises(InvalidConfig):
            DeadLetterFilter(**nonsense)  # type: ignore[arg-type]
    assert DeadLetterFilter().everything
    assert DeadLetterFilter(state=LetterState.DISCARDED).everything
    assert not DeadLetterFilter(older_than_s=0).everything
    assert not DeadLetterFilter(pks=PkSet.of([1])).everything


# ── records ──────────────────────────────────────────────────────────────────────────────────────


def test_each_chunk_and_its_record_are_one_transaction(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without its record nobody would know who gave an event up; a record without its effect would be wrong."""
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

    assert dead_letters.discard(stack.outbox, DeadLetterFilter(), OPERATOR).changed == 2
    assert [rows for *_, rows in recorded(stack)] == [2, 3, 3]
    selections = [json.loads(action.selection)["pks"] for action in reversed(stack.upkeep.actions(3))]
    assert selections == [f"{pks[0]}-{pks[2]}", f"{pks[3]}-{pks[5]}", f"{pks[6]}-{pks[7]}"]
    ids = stack.sql("SELECT COUNT(DISTINCT action_id) AS n FROM clickhouse_outbox_dead_letter")
    assert ids[0].n == 3


def test_two_operators_at_once_share_the_letters_and_each_record_is_true(stack: Stack) -> None:
    """Two people answer the same alarm: no letter is changed twice, and the records add up."""
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


def test_a_payload_is_shown_only_on_request_and_stored_nowhere(stack: Stack) -> None:
    """Audit payloads say what people did; a list of letters goes into tickets and chats."""
    (pk,) = stack.put(bad("evt_1"))
    run(stack)
    dead_letters.retry(stack.outbox, DeadLetterFilter(), OPERATOR)
    run(stack, "two")
    shown = (
        dead_letters.page(stack.outbox, DeadLetterFilter()),
        dead_letters.count(stack.outbox, DeadLetterFilter()),
        dead_letters.show(stack.outbox, pk),
        stack.sql("SELECT * FROM clickhouse_outbox_dead_letter"),
        stack.sql("SELECT * FROM clickhouse_outbox_action"),
    )
    assert CANARY not in repr(shown)
    on_request = dead_letters.show(stack.outbox, pk, with_payload=True)
    assert on_request is not None
    assert CANARY.encode() in (on_request.payload or b"")
    stack.sql("DELETE FROM clickhouse_outbox")
    after = dead_letters.show(stack.outbox, pk, with_payload=True)
    assert after is not None
    assert (after.row, after.payload) == (RowState.DELETED, None)
    assert dead_letters.show(stack.outbox, pk + 1) is None


# ── query plans ──────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def many(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """4,096 letters, most of them retried long ago; of the open ones a few are of one reason, or of one workspace."""
    table = "clickhouse_outbox_dead_letter"
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        stack.sql(
            f"INSERT INTO {table} VALUES (1, 'retried', 'audit_log.v1', 'ws', 'evt', 'wrong_type', '$', '', 1, 1, 1, NULL)"
        )
        for power in range(12):
            stack.sql(
                f"INSERT INTO {table} SELECT pk + {2**power}, state, version, workspace_id, event_id, reason, json_path, "
                f"detail, batch_id, created_at_ms, updated_at_ms, action_id FROM {table}"
            )
        for change, remainder, divisor in (
            ("state = 'open'", 0, 8),
            ("reason = 'rare'", 0, 512),
            ("workspace_id = 'rare'", 8, 512),
            ("version = 'v0'", 16, 512),
        ):
            stack.sql(f"UPDATE {table} SET {change} WHERE MOD(pk, {divisor}) = {remainder}")
        stack.sql(f"ANALYZE TABLE {table}")
        yield stack


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
def test_a_page_of_letters_reads_its_index_in_order(many: Stack, which: DeadLetterFilter, key: str, rows: int) -> None:
    """Operators list letters in the middle of a flood, when sorting all letters takes longest."""
    edges: list[tuple[str, dict[str, int]]] = [("ASC", {}), ("ASC", {"first_pk": 2_000}), ("DESC", {"last_pk": 1_999})]
    for name, (direction, edge) in itertools.product(("page", "page_pks"), edges):
        values = {**dead_letters._values(which), "row_limit": 50, **edge}
        statement = dead_letters._statement(name, which, direction=direction).text
        step = plan(many, statement, values)
        with many.outbox.engine.connect() as connection:
            before = _rows_read(connection)
            assert list(connection.execute(prepared(statement), values))
            read = _rows_read(connection) - before
        seen = f"{name} {edge} read {read}: {step}"
        assert step["key"] == key, seen
        assert "filesort" not in str(step["Extra"]), seen
        assert read <= min(rows, 50) + 4, seen


def plan(stack: Stack, statement: str, values: dict[str, object]) -> dict[str, object]:
    """The one step of a statement's plan."""
    with stack.outbox.engine.connect() as connection:
        (step,) = connection.execute(prepared(f"EXPLAIN FORMAT=TRADITIONAL {statement}"), values).mappings()
        return dict(step)


def _rows_read(connection: sa.Connection) -> int:
    """Rows that this connection has read so far from any table or index."""
    return sum(int(row[1]) for row in connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Handler_read%%'"))


def test_counting_open_letters_reads_an_index_only(many: Stack) -> None:
    """The check and every list count; by the letters themselves each count would read a million of them."""
    for column in ("reason", "workspace_id", "version"):
        statement = dead_letters._statement("count", DeadLetterFilter(), column=column).text
        step = plan(many, statement, {"state": "open", "row_limit": 10})
        assert step["key"] == f"letter_{column.removesuffix('_id')}_idx", step
        assert "Using index" in str(step["Extra"]), step
        assert int(str(step["rows"])) <= 2 * 512, step


def test_letters_are_changed_by_their_primary_key(many: Stack) -> None:
    """By an index that has the state, two operators who change states would deadlock."""
    pks = list(range(8, 400, 8))
    values = {"pks": pks, "states": [str(state) for state in KEEPS_ROW_OUT], "state": "retried", "action_id": 1}
    for name in ("lock", "change", "gone"):
        step = plan(many, dead_letters.SQL[name].text, values)
        assert (step["key"], step["type"]) == ("PRIMARY", "range"), f"{name}: {step}"


def test_a_payload_that_mysql_may_not_send_becomes_a_dead_letter(stack: Stack) -> None:
    """For a payload above max_allowed_packet a server sends an empty text or NULL, and a warning that nobody reads."""
    stack.put(small_event("evt_big", meta={"text": "x" * 3_000_000}), small_event("evt_1"))
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
