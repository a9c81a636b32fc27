"""Moving here from the exporter before us: its marks and entries, both at work side by side, and what is found afterwards."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable

import clickhouse_connect
import pytest
import sqlalchemy as sa

from auditexport_pipeline.clickhouse.audit_log import connection_arguments
from auditexport_pipeline.core.actions import Actor, Erasure
from auditexport_pipeline.core.errors import TransientError
from auditexport_pipeline.core.reconcile import Report, reconcile
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_tests.benchmarks import ancestor
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import CrashingOutbox, CrashPoint, drain

BY = Actor(who="auditor", why="a test")
ROWS = 30
MARKS = 300


def put(stack: Stack, count: int, first: int = 0) -> list[int]:
    event = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "event": "a.b"}
    rows = [("ws_1", f"evt_{n}", json.dumps({**event, "event_id": f"evt_{n}"})) for n in range(first, first + count)]
    return stack.put(*rows)


def marked(stack: Stack, days_ago: int, *, each: int = 0) -> list[int]:
    """Thirty rows that the ancestor marked some days ago, `each` milliseconds apart, and that ClickHouse does not have."""
    pks = put(stack, ROWS)
    stack.sql(
        "UPDATE clickhouse_outbox SET created_at = :at - 1000, deleted_at = :at + :each * pk",
        at=ago(stack, days_ago),
        each=each,
    )
    put(stack, 1, first=1_000)
    drain(stack.outbox, stack.log, Limits(), owner="ours")
    return pks


def ago(stack: Stack, days: int) -> int:
    return stack.upkeep.now_ms() - days * DAY_MS


def look(stack: Stack, *, days: float = 10_000, repair: Actor | None = None) -> Report:
    now_ms = stack.upkeep.now_ms()
    return reconcile(
        stack.outbox, stack.upkeep, stack.log, from_ms=max(0, now_ms - int(days * DAY_MS)), to_ms=now_ms, repair=repair
    )


def drain_as_before(stack: Stack) -> int:
    """One drain of the ancestor's."""
    arguments = connection_arguments(stack.clickhouse_url)
    arguments.pop("verify")
    client = clickhouse_connect.get_client(**arguments, autogenerate_session_id=False)
    engine = sa.create_engine(stack.mysql_url)
    try:
        return ancestor.drain(engine, client)
    finally:
        engine.dispose()
        client.close()


# ── its marks ────────────────────────────────────────────────────────────────────────────────────


def test_marks_outside_the_window_are_not_looked_at(stack: Stack) -> None:
    """Who asks for a week gets a week; the ancestor's rows of last quarter are no news every day."""
    marked(stack, 100)
    assert str(look(stack, days=7).found) == "none"


def test_marks_past_the_ttl_are_past_the_ttl(stack: Stack) -> None:
    """ClickHouse has dropped them rightly, and a repair would start their retention over."""
    marked(stack, 100)
    report = look(stack, repair=BY)
    assert str(report.found) == "none"
    assert report.explained["past the TTL"] == ROWS
    assert (report.repaired, stack.pending()) == (None, 0)


def test_an_erased_row_of_the_ancestors_is_not_repaired_back(stack: Stack) -> None:
    """Somebody asked to be forgotten: the outbox must not bring them back."""
    marked(stack, 10)
    stack.upkeep.add_erasures(BY, [Erasure(workspace_id="ws_1", event_id=f"evt_{n}") for n in range(10)])
    report = look(stack, repair=BY)
    assert str(report.found) == "20 missing"
    assert report.explained["erased on record"] == 10
    assert stack.pending() == 20
    drain(stack.outbox, stack.log, Limits(), owner="repair")
    assert str(look(stack).found) == "none"
    assert stack.counts() == (21, 21)


def test_an_erasure_older_than_the_mark_excuses_none_of_the_ancestors_rows(stack: Stack) -> None:
    """It was recorded before there was anything to erase."""
    marked(stack, 10)
    stack.upkeep.add_erasures(BY, [Erasure(workspace_id="ws_1")])
    stack.sql("UPDATE clickhouse_outbox_action SET at_ms = :at WHERE verb = 'erasure'", at=ago(stack, 200))
    assert str(look(stack).found) == f"{ROWS} missing"


def test_a_mark_that_is_no_time_is_looked_at_by_when_the_row_was_created(stack: Stack) -> None:
    """A mark set by hand to 1 is of no day; the row in front of it is of today."""
    (lost,) = put(stack, 1)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1")
    put(stack, 1, first=1_000)
    drain(stack.outbox, stack.log, Limits(), owner="ours")
    report = look(stack, days=1)
    assert (str(report.found), list(report.missing_pks)) == ("1 missing", [lost])


def test_many_distinct_marks_are_looked_at_together(stack: Stack) -> None:
    """The ancestor stamps each of its batches by itself: a thousand of them took 24 s a reconciliation."""
    put(stack, MARKS)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = :at + 1000 * pk", at=ago(stack, 3))
    drain_ours_once(stack)
    statements: list[str] = []

    def count(*call: object) -> None:
        statements.append(str(call[2]))

    sa.event.listen(stack.outbox.engine, "before_cursor_execute", count)
    report = look(stack, days=7)
    sa.event.remove(stack.outbox.engine, "before_cursor_execute", count)
    assert str(report.found) == f"{MARKS} missing"
    assert len(statements) < MARKS, f"{len(statements)} statements for {MARKS} marks"


def drain_ours_once(stack: Stack) -> None:
    put(stack, 1, first=1_000)
    drain(stack.outbox, stack.log, Limits(), owner="ours")


# ── side by side, and the cut-over ───────────────────────────────────────────────────────────────


def test_one_after_the_other_leaves_each_event_once(stack: Stack) -> None:
    """Stop the ancestor, then begin: nothing is sent twice, and what it exported is known as others' work."""
    put(stack, 20)
    assert drain_as_before(stack) == 20
    put(stack, 20, first=20)
    drain(stack.outbox, stack.log, Limits(), owner="ours")
    assert stack.counts() == (40, 40)
    report = look(stack)
    assert report.clean
    assert (report.marked_by_others, stack.pending()) == (20, 0)


def test_an_ancestor_that_works_on_after_us_is_known_as_another_exporter(stack: Stack) -> None:
    """Its entries lie under times that no batch of ours had, and its rows say whose they are."""
    drain_ours_once(stack)
    put(stack, 20)
    assert drain_as_before(stack) == 20
    report = look(stack)
    assert report.clean
    assert report.explained == {"written by others": 20}


def test_a_row_that_both_had_in_hand_is_found_as_a_duplicate_until_it_merges(stack: Stack) -> None:
    """The one thing that two at once can do wrong: named by reconciliation, seen once by readers, gone after a merge."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    put(stack, 20)
    taken: list[int] = []
    written = CrashPoint("before finish_mark 1", then=lambda: taken.append(drain_as_before(stack)))
    drain(CrashingOutbox(stack.outbox, written), stack.log, Limits(), owner="ours")
    assert taken == [20]
    assert stack.counts() == (40, 20)
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(20,)]
    report = look(stack)
    assert str(report.found) == "20 duplicated"
    assert report.missing_pks.runs == ()
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert stack.counts() == (20, 20)
    assert str(look(stack).found) == "none"


def test_both_at_work_with_writers_lose_nothing_and_every_double_is_counted(stack: Stack) -> None:
    """A cut-over by hand is never clean: for some minutes both are on, and the application does not stop for it."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    written = threading.Event()

    def write() -> None:
        try:
            for first in range(0, 400, 20):
                until_it_works(lambda first=first: put(stack, 20, first))  # type: ignore[misc]
        finally:
            written.set()

    def repeat(work: Callable[[], object]) -> None:
        while not written.is_set():
            until_it_works(work)

    def until_it_works(work: Callable[[], object]) -> None:
        for _ in range(50):
            try:
                work()
            except (sa.exc.OperationalError, TransientError):  # a deadlock with the other one's locks
                continue
            return

    as_before = threading.Thread(target=repeat, args=(lambda: drain_as_before(stack),))
    ours = threading.Thread(
        target=repeat, args=(lambda: drain(stack.outbox, stack.log, Limits(batch_rows=50), owner="ours"),)
    )
    writer = threading.Thread(target=write)
    for thread in (as_before, ours, writer):
        thread.start()
    for thread in (as_before, ours, writer):
        thread.join()
    drain(stack.outbox, stack.log, Limits(), owner="ours")
    entries, events = stack.counts()
    assert (events, stack.pending()) == (400, 0)
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(400,)]
    report = look(stack)
    assert (report.found.missing, report.found.unexpected, report.found.altered) == (0, 0, 0)
    assert report.found.duplicated == entries - events


# ── entries that no batch had ────────────────────────────────────────────────────────────────────


def test_of_a_large_foreign_slot_no_more_is_read_than_is_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Somebody's back-fill under one time is counted where it lies: reading all of it took the memory of a whole batch."""
    drain_ours_once(stack)
    ((at_ms,),) = stack.clickhouse("SELECT inserted_at + 1 FROM audit_logs_raw_v1 LIMIT 1")
    stack.clickhouse(
        "INSERT INTO audit_logs_raw_v1 (event_id, time, inserted_at, workspace_id) "
        f"SELECT 'evt_x' || toString(number), number, {at_ms}, 'ws_' || toString(number % 2) FROM numbers(30000)"
    )
    read = 0
    log = type(stack.log)
    entries = log._entries

    def counted(self: object, *arguments: object, **named: object) -> object:
        nonlocal read
        found = entries(self, *arguments, **named)  # type: ignore[arg-type]
        read += len(found)
        return found

    monkeypatch.setattr(log, "_entries", counted)
    report = look(stack)
    assert report.found.unexpected == 30_000
    assert read < 30_000, f"{read:,} entries were read"
    assert {place[0]: numbers.unexpected for place, numbers in report.places.items() if numbers.wrong} == {
        "ws_0": 15_000,
        "ws_1": 15_000,
    }
