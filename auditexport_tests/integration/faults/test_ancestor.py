"""Moving here from the exporter before us: its marks and entries, both at work side by side, and what is found afterwards."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Event

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
from auditexport_tests.support.builders import events, everything_once, merge, run, stop_merges
from auditexport_tests.support.crashes import CrashPoint

BY = Actor(who="auditor", why="a test")


def marked_by_the_ancestor(stack: Stack, count: int, days_ago: int, *, apart_ms: int = 0) -> None:
    """Rows that the ancestor marked some days ago and that ClickHouse does not have; and one that we exported."""
    stack.put(*events(count, time=1_700_000_000_000))
    at_ms = ago(stack, days_ago)
    stack.sql(f"UPDATE clickhouse_outbox SET created_at = {at_ms} - 1000, deleted_at = {at_ms} + {apart_ms} * pk")
    stack.put(*events(1, "ours"))
    run(stack)


def ago(stack: Stack, days: int) -> int:
    return stack.upkeep.now_ms() - days * DAY_MS


def reconciled(stack: Stack, *, days: int = 10_000, repair: Actor | None = None) -> Report:
    from_ms = max(0, ago(stack, days))
    return reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=from_ms, to_ms=stack.upkeep.now_ms(), repair=repair)


def drain_as_before(stack: Stack) -> int:
    """One drain by the ancestor."""
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


def test_marks_past_the_ttl_or_outside_the_window_are_not_reported(stack: Stack) -> None:
    """ClickHouse has dropped their entries rightly, and a repair would start their retention over."""
    marked_by_the_ancestor(stack, 30, days_ago=100)
    assert str(reconciled(stack, days=7).found) == "none"
    report = reconciled(stack, repair=BY)
    assert str(report.found) == "none"
    assert report.explained["past the TTL"] == 30
    assert (report.repaired, stack.pending()) == (None, 0)


def test_an_erased_row_of_the_ancestor_is_not_repaired(stack: Stack) -> None:
    """A subject asked to be forgotten: the outbox must not bring the events back."""
    marked_by_the_ancestor(stack, 30, days_ago=10)
    stack.upkeep.add_erasures(BY, [Erasure(workspace_id="ws_1", event_id=f"evt_{n}") for n in range(10)])
    report = reconciled(stack, repair=BY)
    assert str(report.found) == "20 missing"
    assert report.explained["erased on record"] == 10
    assert stack.pending() == 20
    run(stack)
    assert str(reconciled(stack).found) == "none"
    assert stack.counts() == (21, 21)


def test_an_erasure_older_than_the_mark_explains_no_row_of_the_ancestor(stack: Stack) -> None:
    """It was recorded before there was anything to erase."""
    marked_by_the_ancestor(stack, 30, days_ago=10)
    stack.upkeep.add_erasures(BY, [Erasure(workspace_id="ws_1")])
    stack.sql("UPDATE clickhouse_outbox_action SET at_ms = :at WHERE verb = 'erasure'", at=ago(stack, 200))
    assert str(reconciled(stack).found) == "30 missing"


def test_a_mark_that_is_no_time_counts_as_of_when_the_row_was_created(stack: Stack) -> None:
    """A mark set by hand to 1 is of no day; the row itself is of today."""
    (lost,) = stack.put(*events(1))
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1")
    stack.put(*events(1, "ours"))
    run(stack)
    report = reconciled(stack, days=1)
    assert (str(report.found), list(report.missing_pks)) == ("1 missing", [lost])


def test_many_distinct_marks_are_read_together(stack: Stack) -> None:
    """The ancestor stamps each of its batches by itself: a thousand of them took 24 s a reconciliation."""
    marks = 300
    marked_by_the_ancestor(stack, marks, days_ago=3, apart_ms=1000)
    statements: list[str] = []

    def note(*call: object) -> None:
        statements.append(str(call[2]))

    sa.event.listen(stack.outbox.engine, "before_cursor_execute", note)
    report = reconciled(stack, days=7)
    sa.event.remove(stack.outbox.engine, "before_cursor_execute", note)
    assert str(report.found) == f"{marks} missing"
    assert len(statements) < marks, f"{len(statements)} statements for {marks} marks"


# ── side by side, and the cut-over ───────────────────────────────────────────────────────────────


def test_one_after_the_other_leaves_each_event_once(stack: Stack) -> None:
    """Stop the ancestor, then begin: nothing is sent twice, and what it exported is known as others' work."""
    stack.put(*events(20))
    assert drain_as_before(stack) == 20
    stack.put(*events(20, "ours"))
    run(stack)
    everything_once(stack, 40)
    report = reconciled(stack)
    assert report.clean
    assert report.marked_by_others == 20


def test_an_ancestor_that_works_on_after_us_is_known_as_another_exporter(stack: Stack) -> None:
    """Its entries lie under times that no batch of ours had, and its rows say whose they are."""
    stack.put(*events(1, "ours"))
    run(stack)
    stack.put(*events(20))
    assert drain_as_before(stack) == 20
    report = reconciled(stack)
    assert report.clean
    assert report.explained == {"written by others": 20}


def test_a_row_that_both_exported_is_a_duplicate_until_it_merges(stack: Stack) -> None:
    """The one fault of two exporters at once: reconciliation names it, readers see one event, a merge removes the copy."""
    stop_merges(stack)
    stack.put(*events(20))
    taken: list[int] = []
    run(stack, crash_at=CrashPoint("before finish_mark 1", then=lambda: taken.append(drain_as_before(stack))))
    assert taken == [20]
    assert stack.counts() == (40, 20)
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(20,)]
    report = reconciled(stack)
    assert str(report.found) == "20 duplicated"
    assert report.missing_pks.runs == ()
    merge(stack)
    everything_once(stack, 20)
    assert str(reconciled(stack).found) == "none"


def test_both_at_work_lose_nothing_and_every_duplicate_is_counted(stack: Stack) -> None:
    """A cut-over by hand is never clean: for some minutes both are on, and the application does not stop for it."""
    stop_merges(stack)
    rows = events(400)
    written = Event()

    def until_it_works(work: Callable[[], object]) -> None:
        for _ in range(50):
            try:
                work()
            except (sa.exc.OperationalError, TransientError):  # a deadlock with the other exporter's locks
                continue
            return

    def write() -> None:
        try:
            for first in range(0, len(rows), 20):
                until_it_works(lambda first=first: stack.put(*rows[first : first + 20]))  # type: ignore[misc]
        finally:
            written.set()

    def repeat(work: Callable[[], object]) -> None:
        while not written.is_set():
            until_it_works(work)

    with ThreadPoolExecutor(3) as pool:
        as_before = pool.submit(repeat, lambda: drain_as_before(stack))
        ours = pool.submit(repeat, lambda: run(stack, limits=Limits(batch_rows=50)))
        for done in (as_before, ours, pool.submit(write)):
            done.result()
    run(stack)
    entries, distinct = stack.counts()
    assert (distinct, stack.pending()) == (400, 0)
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(400,)]
    found = reconciled(stack).found
    assert (found.missing, found.unexpected, found.altered) == (0, 0, 0)
    assert found.duplicated == entries - distinct


# ── entries that no batch had ────────────────────────────────────────────────────────────────────


def test_of_many_foreign_entries_only_those_that_are_named_are_read(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A back-fill under one time is counted by ClickHouse: to read all of it took the memory of a whole batch."""
    stack.put(*events(1))
    run(stack)
    ((at_ms,),) = stack.clickhouse("SELECT inserted_at + 1 FROM audit_logs_raw_v1 LIMIT 1")
    stack.clickhouse(
        "INSERT INTO audit_logs_raw_v1 (event_id, time, inserted_at, workspace_id) "
        f"SELECT 'evt_x' || toString(number), number, {at_ms}, 'ws_' || toString(number % 2) FROM numbers(30000)"
    )
    read = 0
    log = type(stack.log)
    entries = log.entries_at

    def counted(self: object, *arguments: object, **named: object) -> object:
        nonlocal read
        found = entries(self, *arguments, **named)  # type: ignore[arg-type]
        read += len(found)
        return found

    monkeypatch.setattr(log, "entries_at", counted)
    report = reconciled(stack)
    assert report.found.unexpected == 30_000
    assert read < 30_000, f"{read:,} entries were read"
    assert {place[0]: numbers.unexpected for place, numbers in report.places.items() if numbers.wrong} == {
        "ws_0": 15_000,
        "ws_1": 15_000,
    }
