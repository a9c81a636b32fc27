"""Several effects in one commit (`Outbox.one_transaction`): all of them or none, by the same verbs as one by one.

What belongs here: what shares a commit, what a failure inside leaves, and what must not run in an open transaction.
What does not: the verbs themselves (`integration.export.test_exactly_once`).
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from typing import Any

import pytest

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.errors import LeaseLost, MarkRefused, OutboxUnavailable, RowsLocked, TransientError
from auditexport_pipeline.core.export import Sent
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once, ledger, run, stop_merges
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint

pytestmark = pytest.mark.mysql_sensitive

ROWS = 6
LIMITS = Limits(batch_rows=3, mark_connections=1)


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    stop_merges(stack)


def claim_and_fetch(outbox: Any, log: Any, owner: str, dead_owners: Collection[str] = ()) -> list[tuple[Any, Any, Any]]:
    """The effects before the INSERTs: of each claim its batch and its payloads."""
    found = []
    for claim in claiming.claim(outbox, owner=owner, dead_owners=dead_owners, limits=LIMITS):
        fetched = export.fetch(outbox, log, claim, LIMITS)
        found.append((claim, outbox.begin_write(claim, LIMITS.lease_s), fetched.bodies))
    return found


def record_and_mark(outbox: Any, log: Any, sent: Sent) -> None:
    """The effects after the INSERTs."""
    export.mark(outbox, log, export.record_written(outbox, sent), LIMITS)


def together(stack: Stack, *effects: Callable[[], object]) -> None:
    with stack.outbox.one_transaction():
        for effect in effects:
            effect()


def drain(stack: Stack, crash_at: CrashPoint, owner: str = "first") -> None:
    """A run with a commit before and one after its INSERTs; where the second fails, its effects are repeated one by one."""
    outbox, log = CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at)
    with outbox.one_transaction():
        batches = claim_and_fetch(outbox, log, owner)
    for claim, batch, bodies in batches:
        sent = export.send(outbox, log, claim, batch, bodies, LIMITS)
        try:
            with outbox.one_transaction():
                record_and_mark(outbox, log, sent)
        except TransientError:
            record_and_mark(outbox, log, sent)
    verify.verify(outbox, log, outbox.unverified(100))


def content(stack: Stack) -> list[Any]:
    """Everything in MySQL that an effect changes, with the ledger's lock row."""
    return [
        stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox ORDER BY pk"),
        stack.sql("SELECT * FROM clickhouse_outbox_batch ORDER BY batch_id"),
        stack.sql("SELECT * FROM clickhouse_outbox_dead_letter ORDER BY pk"),
    ]


def commits(stack: Stack, effects: Callable[[], object]) -> int:
    """How many COMMITs the server gets while these effects are made."""
    with stack.outbox.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:

        def so_far() -> int:
            return int(connection.exec_driver_sql("SHOW GLOBAL STATUS LIKE 'Com_commit'").one()[1])

        before = so_far()
        effects()
        return so_far() - before


def test_the_effects_before_and_after_an_insert_take_one_commit_each(stack: Stack) -> None:
    """A small batch waits for the disk at each commit: that is most of its way from the outbox to ClickHouse."""
    stack.put(*events(3))
    batches: list[tuple[Any, Any, Any]] = []

    def before() -> None:
        batches.extend(claim_and_fetch(stack.outbox, stack.log, "first"))

    assert commits(stack, lambda: together(stack, before)) == 1
    claim, batch, bodies = batches[0]
    assert (batch.state, batch.attempts, batch.entries) == (State.SEALED, 1, 3)
    sent = export.send(stack.outbox, stack.log, claim, batch, bodies, LIMITS)
    assert commits(stack, lambda: together(stack, lambda: record_and_mark(stack.outbox, stack.log, sent))) == 1
    assert [batch.state for batch in ledger(stack)] == [State.EXPORTED]
    everything_once(stack, 3)

    stack.put(*events(3, "one_by_one"))
    assert commits(stack, lambda: run(stack)) > 6, "the same verbs outside commit one by one"


@pytest.mark.parametrize(
    "crash_point",
    [
        "before claim 1",
        "after claim 1",
        "after seal 2",
        "after begin_write 2",
        "before insert 1",
        "after insert 1",
        "after insert 2",
        "before record_written 1",
        "after record_written 2",
        "after finish_mark 1",
        "after finish_mark 2",
        "after record_verified 1",
    ],
)
def test_a_crash_in_a_shared_transaction_costs_and_doubles_nothing(stack: Stack, crash_point: str) -> None:
    """Fewer commits mean fewer states to recover from, and each of them must be one that the next run knows."""
    stack.put(*events(ROWS))
    crash_at = CrashPoint(crash_point)
    with pytest.raises(Crash):
        drain(stack, crash_at)
    run(stack, "second", LIMITS, dead_owners={"first"})
    everything_once(stack, ROWS)
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}
    assert run(stack, "third") == 0


def raising(error: BaseException) -> Callable[[], object]:
    def effect() -> object:
        raise error

    return effect


@pytest.mark.parametrize("error", [Crash("killed"), LeaseLost("adopted"), KeyboardInterrupt()], ids=repr)
def test_an_error_before_the_insert_leaves_nothing_at_all(stack: Stack, error: BaseException) -> None:
    """Not even the plan's number: as if nobody had claimed."""
    stack.put(*events(ROWS), ("ws_1", "evt_bad", "{}"))
    before = content(stack)
    seen: list[Any] = []
    with pytest.raises(type(error)):
        together(
            stack,
            lambda: claim_and_fetch(stack.outbox, stack.log, "first"),
            lambda: seen.append(content(stack)),
            raising(error),
        )
    assert seen == [before], "nobody else sees anything of it before the commit"
    assert content(stack) == before
    assert not stack.outbox.in_transaction


def sent_by_first(stack: Stack) -> Sent:
    """Three rows that ClickHouse has, of which nothing is recorded."""
    stack.put(*events(3))
    with stack.outbox.one_transaction():
        ((claim, batch, bodies),) = claim_and_fetch(stack.outbox, stack.log, "first")
    return export.send(stack.outbox, stack.log, claim, batch, bodies, LIMITS)


def test_a_claim_that_was_adopted_after_its_insert_records_nothing(stack: Stack) -> None:
    """The fence holds in a shared transaction too, and nothing of it is kept."""
    sent = sent_by_first(stack)
    claiming.claim(stack.outbox, owner="second", dead_owners={"first"}, limits=LIMITS)
    before = content(stack)
    with pytest.raises(LeaseLost):
        together(stack, lambda: record_and_mark(stack.outbox, stack.log, sent))
    assert content(stack) == before
    run(stack, "second", LIMITS)
    everything_once(stack, 3)


def test_a_failure_that_the_caller_catches_still_undoes_everything(stack: Stack) -> None:
    """MySQL itself rolls a transaction back at a deadlock: what came before is gone, and must not count as done."""
    sent = sent_by_first(stack)
    before = content(stack)

    def refused() -> None:
        with suppress(LeaseLost):
            stack.outbox.record_written(sent.claim, "another cut")

    def later() -> None:
        with pytest.raises(LeaseLost, match="already"):
            stack.outbox.renew(sent.claim, 60)

    with pytest.raises(LeaseLost, match="already"):
        together(stack, lambda: export.record_written(stack.outbox, sent), refused, later)
    assert content(stack) == before
    record_and_mark(stack.outbox, stack.log, sent)
    everything_once(stack, 3)


def test_a_locked_row_ends_the_shared_transaction_at_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Waiting, it would hold the other rows locked. One by one, the batch is recorded and marked as far as possible."""
    monkeypatch.setattr(export, "LOCKED_PATIENCE_S", 0.0)
    sent = sent_by_first(stack)
    before = content(stack)
    with stack.outbox.engine.begin() as application:
        application.exec_driver_sql("SELECT * FROM clickhouse_outbox WHERE event_id = 'evt_1' FOR UPDATE")
        with pytest.raises(RowsLocked):
            together(stack, lambda: record_and_mark(stack.outbox, stack.log, sent))
        assert content(stack) == before
        record_and_mark(stack.outbox, stack.log, sent)
        assert ([batch.state for batch in ledger(stack)], stack.pending()) == ([State.WRITTEN], 1)
    run(stack, "first", LIMITS)
    everything_once(stack, 3)


def test_a_mark_that_a_trigger_undoes_is_refused_in_a_shared_transaction(stack: Stack) -> None:
    """Rows that keep no mark would be exported again and again."""
    sent = sent_by_first(stack)
    stack.sql("CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW SET NEW.deleted_at = 7")
    before = content(stack)
    with pytest.raises(MarkRefused, match="frozen"):
        together(stack, lambda: record_and_mark(stack.outbox, stack.log, sent))
    assert content(stack) == before


def test_a_lock_in_a_shared_transaction_is_named_once(stack: Stack) -> None:
    """The error passes two levels of transactions, and each could name the holder."""
    with stack.outbox.engine.begin() as operator:
        operator.exec_driver_sql("SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE")
        with pytest.raises(OutboxUnavailable) as refused:
            together(stack, lambda: claim_and_fetch(stack.outbox, stack.log, "first"))
    assert str(refused.value).count("process ") == 1


def test_clickhouse_is_never_asked_while_a_transaction_is_open(stack: Stack) -> None:
    """If the seal were rolled back after its rows were sent, they would go out again under another `inserted_at`."""
    stack.put(*events(3))

    def export_all() -> None:
        ((claim, batch, bodies),) = claim_and_fetch(stack.outbox, stack.log, "first")
        export.send(stack.outbox, stack.log, claim, batch, bodies, LIMITS)

    with pytest.raises(RuntimeError, match="commit it first"):
        together(stack, export_all)
    assert stack.counts() == (0, 0)
    run(stack)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    with pytest.raises(
        RuntimeError, match="commit it first"
    ):  # only ClickHouse can tell which rows of a requeue it has
        together(stack, lambda: claim_and_fetch(stack.outbox, stack.log, "first"))


@pytest.mark.parametrize("limits", [Limits(mark_rows=2), Limits(max_rows_per_second=10), Limits(mark_pause_ms=1)])
def test_what_marks_in_chunks_or_pauses_shares_no_transaction(stack: Stack, limits: Limits) -> None:
    """It would hold rows of the application locked for as long as all chunks and pauses take."""
    sent = sent_by_first(stack)
    receipt = export.record_written(stack.outbox, sent)
    with pytest.raises(RuntimeError, match="cannot be marked in one transaction"):
        together(stack, lambda: export.mark(stack.outbox, stack.log, receipt, limits))
    assert stack.pending() == 3


def test_another_thread_does_not_join_the_transaction(stack: Stack) -> None:
    """A lease is renewed by a thread of its own: what it did is not undone with our effects."""
    sent = sent_by_first(stack)

    def lease_left_s() -> float:
        (row,) = stack.sql("SELECT MAX(lease_until_ms) / 1000 - UNIX_TIMESTAMP() AS s FROM clickhouse_outbox_batch")
        return float(str(row.s))

    def renew_elsewhere() -> None:
        with ThreadPoolExecutor(1) as thread:
            thread.submit(stack.outbox.renew, sent.claim, 600).result()

    with pytest.raises(Crash):
        together(stack, renew_elsewhere, lambda: stack.outbox.renew(sent.claim, 3_600), raising(Crash()))
    assert 500 < lease_left_s() < 700
    with pytest.raises(RuntimeError, match="open in this thread"):
        together(stack, lambda: together(stack))
