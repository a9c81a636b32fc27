"""Scattered pks: every statement with a list of them looks them up one by one, whatever the limits are."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import claim, run, small_event

pytestmark = pytest.mark.mysql_sensitive

ROWS = 2_400
# What 36,000 pks are to the servers' own limits, these are to a tenth of them.
LESS_ROOM = {
    True: "SET SESSION optimizer_max_sel_args = 1600",
    False: "SET SESSION range_optimizer_max_mem_size = 524288",
}


def put_every_second(stack: Stack, rows: int) -> PkSet:
    """Pending rows, each followed by one of an unknown version, and many of those behind; the pks of the first."""
    first = 1_000_001
    columns = "version, workspace_id, event_id, payload, created_at"
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            f"INSERT INTO clickhouse_outbox (pk, {columns}) VALUES (%s, %s, %s, %s, %s, 1)",
            [(first + n, f"audit_log.v{1 - n % 2}", *small_event(f"evt_{n}")) for n in range(2 * rows)],
        )
        for _ in range(3):
            connection.exec_driver_sql(
                f"INSERT INTO clickhouse_outbox ({columns}) "
                "SELECT 'audit_log.v0', workspace_id, event_id, '{}', created_at FROM clickhouse_outbox"
            )
    with stack.outbox.engine.connect() as connection:
        list(connection.exec_driver_sql("ANALYZE TABLE clickhouse_outbox"))
        less_room = LESS_ROOM[bool(getattr(connection.dialect, "is_mariadb", False))]
    stack.outbox.disconnect()

    def begin(connection: object, _record: object) -> None:
        with connection.cursor() as cursor:  # type: ignore[attr-defined]
            cursor.execute(less_room)

    for engine in (stack.outbox.engine, stack.outbox.marking_engine):
        sa.event.listen(engine, "connect", begin)
    return PkSet.of(range(first, first + 2 * rows, 2))


@contextmanager
def statements_on_the_outbox(form: str = r"IN \(") -> Iterator[list[tuple[str, object]]]:
    """Every statement that names pks in this form and is sent meanwhile, as the driver gets it."""
    sent: list[tuple[str, object]] = []

    def note(_connection: object, _cursor: object, statement: str, parameters: object, *_: object) -> None:
        if re.search(rf"\bclickhouse_outbox\b.*\bpk {form}", statement, re.DOTALL):
            sent.append((statement, parameters))

    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        yield sent
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)


def not_by_primary_key(stack: Stack, sent: list[tuple[str, object]]) -> set[tuple[str, str, str]]:
    """Of these statements, those whose plan is not a range of the primary key: first words, access and key."""
    wrong = set()
    for statement, parameters in sent:
        plain = re.sub(r"^SET STATEMENT .*? FOR (?=UPDATE|SELECT)", "", statement)
        with stack.outbox.engine.connect() as connection:
            plan = connection.exec_driver_sql(f"EXPLAIN FORMAT=TRADITIONAL {plain}", parameters).mappings()
            steps = [(plain.split(" WHERE")[0][:60], str(row["type"]), str(row["key"])) for row in plan]
        # A letter's row is looked up by its pk, one for one.
        if sorted(access for _, access, _ in steps) not in (["range"], ["eq_ref", "range"]) or {
            key for _, _, key in steps
        } != {"PRIMARY"}:
            wrong.update(steps)
    return wrong


def test_marks_of_scattered_pks_never_read_the_whole_outbox(stack: Stack) -> None:
    """At mark_rows of 36,000 each UPDATE read the whole outbox and locked what it read; so did the sweep."""
    pks = put_every_second(stack, ROWS)
    with statements_on_the_outbox() as sent:
        run(stack, limits=Limits(mark_rows=ROWS, mark_connections=1))
        action_id = stack.upkeep.record_action("requeue", Actor(who="ada", why="a test"), {})
        stack.upkeep.by_workspace(pks)
        stack.upkeep.count_due(pks, 2**62)
        stack.upkeep.dead_among(pks)
        stack.upkeep.unmark(pks, action_id)
        stack.upkeep.delete(1, pks, 2**62, action_id)
    assert len(sent) >= 7, "each of the seven names its rows by a list"
    assert not_by_primary_key(stack, sent) == set()


def test_a_claim_merges_the_pks_of_open_batches_at_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Batch by batch, 64 of 50,000 scattered pks took 52 s, and every other planner waited for the ledger's lock."""
    put_every_second(stack, 320)
    assert len(claim(stack, "run_1", batch_rows=20, max_batches=16)) == 16
    merged = 0
    merge = PkSet.__or__

    def counting(one: PkSet, other: PkSet) -> PkSet:
        nonlocal merged
        merged += len(one.runs) + len(other.runs)
        return merge(one, other)

    monkeypatch.setattr(PkSet, "__or__", counting)
    claim(stack, "run_2", batch_rows=20, max_batches=16)
    assert merged <= 2 * 320, "each of the 320 runs is merged once or twice, not once for each batch before it"
