"""Small batches (`core.small`): what shares a commit, and every crash, lost answer and refusal around it.

Each test drains a small batch first, which tells ClickHouse's time, so that the next one takes two commits and two
requests. What does not belong here: the verbs one by one (`integration.export.test_exactly_once`).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest

from auditexport_pipeline.core import drain as draining
from auditexport_pipeline.core import export, small, threads
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.drain import Drain, Listener
from auditexport_pipeline.core.errors import AuditLogUnavailable, InsertOutcomeUnknown, LeaseLost, OutboxUnavailable
from auditexport_pipeline.core.ports import Discrepancy
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.session import MARK_LOCK_WAIT_S
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import (
    NEVER,
    clear_marks,
    crash,
    dead_letters,
    end_leases,
    events,
    everything_once,
    insert,
    ledger,
    lose,
    open_transaction,
    run,
    small_event,
    states,
    stop_merges,
)
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

ROWS = 50
LIMITS = Limits(linger_poll_ms=20)
# In the order of a small batch. The verification is recorded on leaving, so the last commit is the third one.
PLACES = tuple(
    f"{side} {effect}"
    for effect in (
        *("claim 1", "seal 1", "begin_write 1", "commit 1", "insert 1", "look 1", "record_written 1"),
        *("finish_mark 1", "commit 2", "record_verified 1", "commit 3"),
    )
    for side in ("before", "after")
)


class Recorder(Listener):
    """What a drain tells, in its order."""

    def __init__(self) -> None:
        self.events: list[str] = []
        self.troubles: list[str] = []

    def claimed(self, claims: Sequence[Any]) -> None:
        if claims:
            self.events.append(f"claimed {len(claims)}")

    def exported(self, batch: Any) -> None:
        self.events.append(f"exported {batch.batch_id}: {batch.rows}")

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        self.events.append(f"verified {[*outcome]}: {any(outcome.values())}")

    def trouble(self, what: str) -> None:
        self.troubles.append(what)


class Staying:
    """A run that stays. `drain()` is one plan of it; its first one has drained one event and read ClickHouse's time."""

    def __init__(
        self, stack: Stack, crash_at: CrashPoint | None = None, *, limits: Limits = LIMITS, owner: str = "first"
    ) -> None:
        self.stack = stack
        self.crash_at = CrashPoint(NEVER)
        self.listener = Recorder()
        self.outbox = CrashingOutbox(stack.outbox, self.crash_at)
        self.log = CrashingAuditLog(stack.log, self.crash_at)
        self._stopped = False
        self._drain = Drain(
            self.outbox, self.log, owner=owner, limits=limits, listener=self.listener, stopping=lambda: self._stopped
        )
        stack.put(*events(1, "earlier"))
        self._drain.stay(iter([True, False]).__next__)
        if crash_at is not None:  # from now on
            self.crash_at.place, self.crash_at.left, self.crash_at.then = crash_at.place, crash_at.left, crash_at.then
        self.listener.events.clear()

    def drain(self, count: int = ROWS, before_leaving: Callable[[], object] = lambda: None) -> None:
        """One plan, with so many new events before it; then it leaves."""
        self.stack.put(*events(count))
        self.stays(1, before_leaving)

    def stays(self, plans: int, before_leaving: Callable[[], object] = lambda: None) -> None:
        """So many plans; then it leaves."""
        turns = iter(range(plans))

        def staying() -> bool:
            if next(turns, None) is not None:
                return True
            before_leaving()
            return False

        self._drain.stay(staying)

    def stop(self) -> None:
        """As Ctrl-C."""
        self._stopped = True


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    stop_merges(stack)


def exported(stack: Stack, count: int = ROWS, *, pending: int = 0) -> None:
    """Everything is there once, the earlier event too, and verified; another run finds nothing to do."""
    everything_once(stack, count + 1, pending=pending)
    assert set(states(stack)) == {"verified"}
    assert run(stack, "last") == 0


@contextmanager
def counted(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], tuple[int, int]]]:
    """A function that returns the COMMITs and the requests to ClickHouse since its last call."""
    requests = 0
    connection = stack.log.connection
    send = connection._send

    def counting(*arguments: Any, **named: Any) -> Any:
        nonlocal requests
        requests += 1
        return send(*arguments, **named)

    monkeypatch.setattr(connection, "_send", counting)
    with stack.outbox.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:
        before = (0, 0)

        def so_far() -> tuple[int, int]:
            nonlocal before
            commits = int(watching.exec_driver_sql("SHOW GLOBAL STATUS LIKE 'Com_commit'").one()[1])
            since = (commits - before[0], requests - before[1])
            before = (commits, requests)
            return since

        yield so_far


# ── what it costs ────────────────────────────────────────────────────────────────────────────────


def test_a_small_drain_takes_three_commits_and_two_requests(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A small batch waits for the disk at each commit, and for ClickHouse at each request: that is most of its time."""
    staying = Staying(stack)
    stack.put(*events(ROWS))
    with counted(stack, monkeypatch) as since:
        turns = iter([True, True, False])
        costs = []

        def stays() -> bool:
            costs.append(since())
            return next(turns)

        staying._drain.stay(stays)
        costs.append(since())
    assert costs[1:] == [(2, 2), (1, 0), (1, 0)], "the batch; a plan without rows, with its verification; leaving"
    assert staying.listener.events == ["claimed 1", f"exported 2: {ROWS}", "verified [2]: False"]
    assert [(batch.state, batch.attempts) for batch in ledger(stack)] == [(State.VERIFIED, 1)] * 2
    exported(stack)


def test_a_drain_that_leaves_at_once_records_the_verification(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A batch that stays unverified would be reported as a problem a quarter of an hour later."""
    staying = Staying(stack)
    with counted(stack, monkeypatch) as since:
        stack.put(*events(ROWS))
        since()
        staying.drain(0)
        assert since() == (3 + 1, 2), "one commit is that of the test, of no rows"
    exported(stack)


def test_a_first_drain_asks_for_the_time_once_it_has_rows(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that polls an empty outbox must not ask ClickHouse each time."""
    drain = Drain(stack.outbox, stack.log, owner="first", limits=LIMITS, listener=Recorder())
    with counted(stack, monkeypatch) as since:
        stack.log.connection.listed()
        since()
        drain.stay(iter([True, False]).__next__)
        assert since() == (1, 0)
        stack.put(*events(ROWS))
        since()
        drain.stay(iter([True, False]).__next__)
        assert since() == (4, 3), "the claim with the seal; the attempt; the mark; the verification"
    everything_once(stack, ROWS)


def test_the_ledger_knows_everything_before_anything_is_sent(stack: Stack) -> None:
    """A later run could otherwise split or release a block while its INSERT is at work."""
    seen: list[Any] = []
    staying = Staying(stack, CrashPoint("before insert 1", then=lambda: seen.append(ledger(stack)[-1])))
    asked_ms = stack.log.deadline_ms(0)
    staying.drain()
    (batch,) = seen
    assert (batch.state, batch.attempts, batch.entries) == (State.SEALED, 1, ROWS)
    assert batch.inserts_until_ms - asked_ms > 1000 * LIMITS.inserts_s - 1000 * small.CLOCK_AGE_S
    exported(stack)


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────


def plan(stack: Stack, owner: str) -> None:
    Drain(stack.outbox, stack.log, owner=owner, limits=LIMITS, listener=Recorder()).one_plan()


RECOVERIES: dict[str, Callable[[Stack], object]] = {
    "same owner again": lambda stack: run(stack, "first"),
    "new owner, old one dead": lambda stack: run(stack, "second", dead_owners=["first"]),
    "new owner, lease ended": lambda stack: (end_leases(stack), run(stack, "second")),
    "another small drain": lambda stack: plan(stack, "first"),
}


@pytest.mark.parametrize(
    ("place", "recovery"),
    [
        pytest.param(place, recovery, marks=[] if n % 2 == 0 and n // 2 % 4 == m else [pytest.mark.slow])
        for n, place in enumerate(PLACES)
        for m, recovery in enumerate(RECOVERIES)
    ],
)
def test_a_crash_in_a_small_drain_loses_and_duplicates_nothing(stack: Stack, place: str, recovery: str) -> None:
    """Fewer commits leave fewer states, and each of them must be one that the next run knows.

    A crash after an effect leaves the databases as one before the next effect does: those are slow tests.
    """
    staying = Staying(stack, CrashPoint(place))
    with pytest.raises(Crash):
        staying.drain()
    assert staying.crash_at.left <= 0, f"the drain never came to {place}"
    left = ledger(stack)[1:]
    sealed = [(batch.state, batch.attempts) for batch in left]
    assert sealed in ([], [(State.SEALED, 1)], [(State.EXPORTED, 1)], [(State.VERIFIED, 1)]), "no other state"
    RECOVERIES[recovery](stack)
    exported(stack)


@pytest.mark.parametrize("place", ["before insert 1", "after insert 1"])
def test_a_small_drain_that_wakes_after_another_took_over_changes_nothing(stack: Stack, place: str) -> None:
    """Its rows are in memory and its deadline is valid: only the fences stop it."""
    after: list[Any] = []

    def durable() -> list[Any]:
        return [
            stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox ORDER BY pk"),
            stack.sql("SELECT batch_id, epoch, state, owner, attempts, exported_at_ms FROM clickhouse_outbox_batch"),
            stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1 ORDER BY ALL"),
        ]

    def others_take_over() -> None:
        end_leases(stack)
        run(stack, "second")
        after.append(durable())

    with pytest.raises(LeaseLost, match="is held by plan"):
        Staying(stack, CrashPoint(place, then=others_take_over)).drain()
    assert [durable()] == after
    exported(stack)


# ── answers that are lost ────────────────────────────────────────────────────────────────────────


class Commits:
    """The n-th shared commit raises: before it is done, or after, as when its answer is lost."""

    def __init__(self, real: Any, number: int, *, done: bool) -> None:
        self.real = real
        self.left = number
        self.done = done

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)

    @contextmanager
    def one_transaction(self) -> Iterator[None]:
        self.left -= 1
        lost = self.left == 0
        with self.real.one_transaction():
            yield
            if lost and not self.done:
                raise OutboxUnavailable("MySQL ended the connection (test)")
        if lost:
            raise OutboxUnavailable("no answer to COMMIT (test)")


@pytest.mark.parametrize("done", [False, True], ids=["rolled back", "done"])
@pytest.mark.parametrize(("number", "attempts"), [(1, (1, 2)), (2, (2, 2)), (3, (1, 1))])
def test_a_commit_without_an_answer_is_followed_by_the_separate_steps(
    stack: Stack, number: int, attempts: tuple[int, int], done: bool
) -> None:
    """Whether it was done shows only the ledger; a run that stays goes on without an error."""
    staying = Staying(stack)
    staying.outbox.real = Commits(stack.outbox, number, done=done)
    staying.drain()
    assert ledger(stack)[-1].attempts == attempts[done]
    assert f"exported 2: {ROWS}" in staying.listener.events
    assert staying.listener.troubles == []
    exported(stack)


def test_an_insert_without_an_answer_is_looked_for(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The seal recorded the first attempt, so the next one asks before it sends."""
    staying = Staying(stack)
    insert = stack.log.insert

    def unanswered(*arguments: Any, **named: Any) -> Any:
        monkeypatch.undo()
        insert(*arguments, **named)
        raise InsertOutcomeUnknown("no answer (test)")

    monkeypatch.setattr(staying.log.real, "insert", unanswered)
    staying.drain()
    assert [batch.attempts for batch in ledger(stack)] == [1, 1], "the attempt itself looks after the error"
    exported(stack)


def test_a_look_up_without_an_answer_leaves_the_verification_for_later(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are in ClickHouse and marked: that must not fail."""
    staying = Staying(stack)

    def unanswered(_batch: object) -> Any:
        raise AuditLogUnavailable("no answer (test)")

    monkeypatch.setattr(stack.log, "holdings_now", unanswered)
    staying.drain()
    assert staying.listener.events == ["claimed 1", f"exported 2: {ROWS}", "verified [2]: False"]
    exported(stack)


def test_a_deadline_that_the_clock_has_passed_is_replaced(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """ClickHouse's clock can be set forward after it was read; the run still holds its batch."""
    staying = Staying(stack)
    monkeypatch.setattr(small, "START_WITHIN_S", -60)
    staying.drain()
    assert [batch.attempts for batch in ledger(stack)] == [1, 2]
    exported(stack)


def test_an_old_reading_of_the_clock_is_not_used(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """By it, an INSERT would have less and less time to start."""
    staying = Staying(stack)
    monkeypatch.setattr(small, "CLOCK_AGE_S", -1.0)
    asked: list[float] = []
    deadline_ms = stack.log.deadline_ms
    monkeypatch.setattr(stack.log, "deadline_ms", lambda within_s: (asked.append(within_s), deadline_ms(within_s))[1])
    staying.drain()
    assert asked == [small.START_WITHIN_S]
    exported(stack)


# ── what falls back to the separate steps ────────────────────────────────────────────────────────


def test_a_locked_row_leaves_a_small_batch_written(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other rows are marked, and the next run marks that one."""
    monkeypatch.setattr(export, "LOCKED_PATIENCE_S", 0.0)
    staying = Staying(stack)
    stack.put(*events(ROWS))
    with open_transaction(stack, "SELECT * FROM clickhouse_outbox WHERE event_id = 'evt_7' FOR UPDATE"):
        staying.drain(0)
        assert (states(stack)[-1], stack.pending()) == ("written", 1)
    assert any("not marked" in line for line in staying.listener.troubles)
    run(stack, "first")
    exported(stack)


def test_a_plan_waits_for_the_ledger_for_longer_than_a_shared_commit(stack: Stack) -> None:
    """Another plan with a large backlog has the ledger's lock for seconds: that must not end a run that stays."""
    staying = Staying(stack)
    began = threading.Event()

    def plan_for_a_while() -> None:
        with open_transaction(stack, "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE"):
            began.set()
            time.sleep(MARK_LOCK_WAIT_S + 1)

    with ThreadPoolExecutor(1) as other:
        other.submit(plan_for_a_while)
        assert began.wait(10)
        staying.drain()
    assert staying.listener.troubles == []
    exported(stack)


def test_a_verification_whose_row_is_locked_is_made_again(stack: Stack) -> None:
    """The record of the last batch must not keep the next one waiting for good."""
    staying = Staying(stack)
    stack.put(*events(ROWS))
    turns = iter([True, True, False])
    with stack.outbox.engine.connect() as operator:

        def stays() -> bool:
            if len(ledger(stack)) == 2 and not operator.in_transaction():
                operator.exec_driver_sql("SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 2 FOR UPDATE")
                stack.put(*events(3, "later"))
            return next(turns)

        with pytest.raises(OutboxUnavailable):  # of the verification of both, on leaving
            staying._drain.stay(stays)
        assert (states(stack), stack.pending()) == (["verified", "exported", "exported"], 0)
        operator.rollback()
    run(stack, "second")
    exported(stack, ROWS + 3)


def test_a_refused_row_is_set_aside_and_the_others_go_on(stack: Stack) -> None:
    """ClickHouse refuses the block of a small batch as any other: it is split around the row."""
    staying = Staying(stack)
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    stack.put(small_event("evt_refused", description="x"))
    staying.drain()
    assert dead_letters(stack, "event_id") == ["evt_refused"]
    exported(stack, pending=1)


def test_malformed_rows_become_dead_letters_in_the_first_commit(stack: Stack) -> None:
    """Also where nothing else is in the batch, and nothing is sent."""
    staying = Staying(stack)
    stack.put(("ws_1", "evt_bad", "{}"))
    staying.drain()
    stack.put(("ws_1", "evt_worse", "[]"))
    staying.drain(0)
    assert dead_letters(stack, "event_id") == ["evt_bad", "evt_worse"]
    exported(stack, pending=2)


def test_a_view_that_fails_leaves_its_note_on_a_small_batch(stack: Stack) -> None:
    """The block is stored before the view fails; sent again it would be there twice."""
    staying = Staying(stack)
    stack.clickhouse("CREATE TABLE numbers (n Int64) ENGINE = MergeTree ORDER BY n")
    stack.clickhouse(
        "CREATE MATERIALIZED VIEW failing_view TO numbers AS SELECT toInt64(description) AS n FROM audit_logs_raw_v1"
    )
    staying.drain()
    assert "failing_view" in ledger(stack)[-1].view_note
    exported(stack)


def test_a_trigger_that_undoes_marks_leaves_a_small_batch_written(stack: Stack) -> None:
    """The rows are in ClickHouse and not sent again."""
    staying = Staying(stack)
    stack.sql("CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW SET NEW.deleted_at = NULL")
    staying.drain()
    assert (states(stack)[-1], stack.pending()) == ("written", ROWS)
    stack.sql("DROP TRIGGER frozen")
    run(stack, "first")
    exported(stack)


def test_rows_that_vanish_before_their_mark_are_counted(stack: Stack) -> None:
    """Which rows are left shows a comparison, for which a shared commit has no time."""
    staying = Staying(
        stack,
        CrashPoint("after insert 1", then=lambda: stack.sql("DELETE FROM clickhouse_outbox WHERE event_id = 'evt_7'")),
    )
    staying.drain()
    assert ledger(stack)[-1].counts.vanished == 1
    exported(stack)


def test_entries_that_clickhouse_lost_at_once_are_found(stack: Stack) -> None:
    """The look-up beside the second commit is the verification: it must see what is not there."""
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    staying = Staying(stack, CrashPoint("after insert 1", then=lambda: lose(stack, "evt_7")))
    staying.drain()
    assert staying.listener.events[-1] == "verified [2]: True"
    assert ledger(stack)[-1].last_error == "in ClickHouse: 1 missing"


def test_a_requeue_goes_out_under_its_first_time(stack: Stack) -> None:
    """ClickHouse is asked before its seal, so it shares no commit."""
    staying = Staying(stack)
    staying.drain()
    clear_marks(stack)
    run(stack, "second")
    assert {batch.generation for batch in ledger(stack)} == {0, 1}
    assert stack.clickhouse("SELECT count(), uniqExact(inserted_at) FROM audit_logs_raw_v1") == [(2 * (ROWS + 1), 2)]


@pytest.mark.parametrize(
    "limits",
    [
        *(Limits(mark_rows=5), Limits(batch_rows=10), Limits(max_rows_per_second=100_000), Limits(mark_pause_ms=1)),
        *(Limits(batch_bytes=2_000), Limits(blocks_per_batch=4)),
    ],
    ids=str,
)
def test_what_is_not_small_is_exported_by_the_separate_steps(stack: Stack, limits: Limits) -> None:
    """Several batches, chunks or pauses would hold locks for as long as all of them take."""
    staying = Staying(stack, limits=limits.with_values({"linger_poll_ms": 20}))
    staying.drain()
    exported(stack)


def test_batches_of_dead_runs_are_verified_by_a_run_that_stays(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Small batches verify only themselves."""
    stack.put(*events(2, "dead"))
    crash(stack, "before record_verified 1", "dead")
    staying = Staying(stack)
    assert states(stack) == ["verified", "verified"], "on leaving"
    stack.put(*events(2, "dead again"))
    crash(stack, "before record_verified 1", "dead")
    seen: list[list[str]] = []
    staying.drain(1, before_leaving=lambda: seen.append(states(stack)))
    assert seen == [["verified", "verified", "exported", "exported"]], "not with each batch"
    monkeypatch.setattr(draining, "LEFTOVERS_AFTER_S", 0.0)
    stack.put(*events(2, "dead once more"))
    crash(stack, "before record_verified 1", "dead")
    stack.put(*events(1, "later"))
    staying.stays(3, before_leaving=lambda: seen.append(states(stack)))
    assert seen[-1] == ["verified"] * 6, "but soon, also when no more rows arrive"


def test_a_verification_that_is_not_recorded_is_made_up_for(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The commit that would have recorded it failed, and no row arrives any more."""
    monkeypatch.setattr(draining, "LEFTOVERS_AFTER_S", 0.0)
    staying = Staying(stack)
    stack.put(*events(ROWS))
    staying.outbox.real = Commits(stack.outbox, 3, done=False)
    seen: list[list[str]] = []
    staying.stays(3, before_leaving=lambda: seen.append(states(stack)))
    assert seen == [["verified", "verified"]]


def test_a_verification_of_another_run_is_not_told_as_our_own(stack: Stack) -> None:
    """ClickHouse loses an entry after our look-up, and the other run finds it."""
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    staying = Staying(stack)

    def lose_and_verify() -> None:
        lose(stack, "evt_7")
        run(stack, "second")

    staying.drain(before_leaving=lose_and_verify)
    assert states(stack) == ["verified", "discrepant"]
    assert not any(event.startswith("verified [2]") for event in staying.listener.events)


# ── two runs, and time ───────────────────────────────────────────────────────────────────────────


def test_a_run_that_was_paused_before_its_insert_asks_the_ledger(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its lease is over, another run has exported the batch, and no window of ClickHouse would drop the copy."""
    staying = Staying(stack, limits=Limits(linger_poll_ms=20, lease_s=10))
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = 0")
    paused_s = 0.0
    real = time.monotonic
    monkeypatch.setattr(threads.Threads, "monotonic", lambda self: real() + paused_s)

    def pause(claims: Sequence[Any]) -> None:
        nonlocal paused_s
        if claims and not paused_s:
            paused_s = 20.0
            end_leases(stack)
            assert run(stack, "second") == 1

    monkeypatch.setattr(staying.listener, "claimed", pause)
    with pytest.raises(LeaseLost):
        staying.drain()
    exported(stack)


def test_a_run_that_is_stopped_while_it_claims_finishes_the_batch(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is sealed and counted as an attempt would otherwise wait for minutes, if a row of it is deleted."""
    staying = Staying(stack)
    monkeypatch.setattr(staying.listener, "claimed", lambda claims: staying.stop())
    staying.drain()
    exported(stack)


@pytest.mark.slow
def test_the_lease_is_renewed_while_clickhouse_tells_the_time(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """It can take longer than the lease."""
    drain = Drain(stack.outbox, stack.log, owner="first", limits=Limits(lease_s=10), listener=Recorder())
    stack.put(*events(ROWS))
    real, claimed = stack.log.deadline_ms, []

    def slow(within_s: float) -> int:
        if not claimed:
            time.sleep(11.0)
            claimed.append(run(stack, "second"))
        return real(within_s)

    monkeypatch.setattr(stack.log, "deadline_ms", slow)
    drain.one_plan()
    assert claimed == [0]
    everything_once(stack, ROWS)


@pytest.mark.slow
def test_a_commit_that_failed_does_not_wait_for_the_look_up(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing renews the lease meanwhile, and another run would take the batch."""
    staying = Staying(stack, limits=Limits(linger_poll_ms=20, lease_s=10))
    staying.outbox.real = Commits(stack.outbox, 2, done=False)
    real, answered, claimed = stack.log.holdings_now, threading.Event(), []

    def slow(batch: Any) -> Any:
        time.sleep(11.0)
        claimed.append(run(stack, "second"))
        answered.set()
        return real(batch)

    monkeypatch.setattr(stack.log, "holdings_now", slow)
    staying.drain()
    exported(stack)
    assert answered.wait(30)
    assert claimed == [0]


def test_a_small_batch_has_few_bytes_also_where_a_sample_missed_them(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is read under the ledger's lock, for which other plans wait."""
    staying = Staying(stack)
    large = range(40, 2_900, 700)
    rows = [small_event(f"evt_{n}", description="x" * (5_000_000 if n in large else 10)) for n in range(2_900)]
    for first in range(0, len(rows), 100):
        insert(stack, rows[first : first + 100])
    sizes: list[int] = []
    real = small.SmallBatches._begin

    def begin(self: small.SmallBatches, claims: Any) -> Any:
        begun = real(self, claims)
        if begun is not None:
            sizes.append(sum(len(payload) for payloads in begun.bodies.values() for payload in payloads))
        return begun

    monkeypatch.setattr(small.SmallBatches, "_begin", begin)
    staying.stays(12)
    assert sizes
    assert max(sizes) <= small.MOST_BYTES + 5_000_100
    everything_once(stack, len(rows) + 1)
