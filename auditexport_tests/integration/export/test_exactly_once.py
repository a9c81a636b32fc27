"""Exactly once: crashes at every point, paused runs, replays, requeues, rows that others change.

What belongs here: what both databases hold in the end, counted without FINAL. What does not: which rows a
claim takes (`integration.export.test_claiming`), how a payload is read (`core.event`), and Dagster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any
from uuid import uuid4

import pytest

from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import Batch, Bodies, Receipt, State
from auditexport_pipeline.core.errors import BatchAltered, InsertOutcomeUnknown, LeaseLost
from auditexport_pipeline.core.ports import Cut, Discrepancy, Holding, Marked, Refusal
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import Generator, seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import (
    NEVER,
    Row,
    clear_marks,
    crash,
    dead_letters,
    delete_rows,
    end_leases,
    events,
    everything_once,
    insert,
    ledger,
    lose,
    merge,
    put_with_meta,
    runner,
    small_event,
    states,
    stop_merges,
    write_and_mark,
)
from auditexport_tests.support.crashes import CRASH_POINTS, EFFECTS, Crash, CrashingAuditLog, CrashPoint
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.clickhouse_sensitive

ROOT = Path(__file__).resolve().parents[3]
# Two batches of 20 rows: two blocks of 10 each, marked in chunks of 5, the last by `finish_mark`.
ROWS = 40
LIMITS = Limits(batch_rows=20, blocks_per_batch=2, mark_rows=5, mark_connections=1)
run = runner(LIMITS, "second")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows, so that small batches have two."""
    monkeypatch.setattr(claiming, "SMALLEST_BLOCK_ROWS", 10)


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    """A duplicate must still be there when it is counted."""
    stop_merges(stack)


def fill(stack: Stack, rows: int = ROWS, *, seed: int = 1) -> list[int]:
    return insert(stack, generated(rows, seed))


@lru_cache
def generated(rows: int, seed: int) -> tuple[Row, ...]:
    return tuple((row.workspace_id, row.event_id, row.payload) for row in Generator(seed).events(rows))


def claimed(stack: Stack, owner: str = "first", dead_owners: Sequence[str] = ()) -> list[claiming.Claim]:
    return claiming.claim(stack.outbox, owner=owner, dead_owners=dead_owners, limits=LIMITS)


def sealed(stack: Stack) -> tuple[Batch, Bodies]:
    """The first batch, fetched and not yet written, with its payloads."""
    claim = claimed(stack)[0]
    bodies = export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies
    (batch,) = stack.outbox.batches([claim.batch_id])
    return batch, bodies


def mark_by_hand(stack: Stack, pk: int) -> None:
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=pk)


def durable(stack: Stack) -> tuple[list[Any], ...]:
    """Everything that an effect of a run could change, except leases."""
    return (
        stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox ORDER BY pk"),
        stack.sql(
            "SELECT batch_id, epoch, state, owner, attempts, pks, manifest, counts, digest, exported_at_ms, last_error "
            "FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id"
        ),
        stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1 ORDER BY ALL"),
    )


def assert_everything_once(stack: Stack, count: int = ROWS, *, dead: int = 0) -> None:
    """Each event once without FINAL, under the ledger's `inserted_at`; every row marked by its batch; all verified."""
    batches = ledger(stack)
    everything_once(stack, count, pending=dead)
    assert {batch.state for batch in batches} == {State.VERIFIED}
    assert sum(batch.entries for batch in batches) == count
    in_ledger = {block.inserted_at_ms: block.rows for batch in batches for block in batch.blocks}
    assert dict(stack.clickhouse("SELECT inserted_at, count() FROM audit_logs_raw_v1 GROUP BY ALL")) == in_ledger
    marks = {row.pk: row.deleted_at for row in stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox")}
    for batch in batches:
        assert {marks[pk] for pk in batch.pks} == {batch.exported_at_ms}


# ── the whole path ───────────────────────────────────────────────────────────────────────────────


def test_every_event_of_several_writers_arrives_once(stack: Stack) -> None:
    """Late commits, rollbacks, broken and unknown rows are an outbox's daily life, and none may cost an event."""
    seeded = seed_outbox(stack.mysql_url, seed=7, events=1_500, malformed=38, unknown=20, writers=4)
    limits = Limits(batch_rows=500, mark_rows=200)
    run(stack, limits=limits)
    everything_once(stack, seeded.events, pending=38 + 20)
    assert sum(stack.outbox.dead_by_reason().values()) == 38
    assert set(states(stack)) == {"verified"}
    assert run(stack, limits=limits) == 0


def test_one_insert_is_one_part(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is atomic only as one part: of two parts, one could be there without the other."""
    monkeypatch.undo()
    rows = 6_000
    insert(stack, events(rows, description="x" * 2_000))  # 14 MB: ClickHouse parses 10 MB at a time
    run(stack, limits=Limits())
    # Parts that a merge has replaced are listed for minutes as inactive ones: one row means one part ever.
    parts = "SELECT active, rows FROM system.parts WHERE database = currentDatabase() AND table = 'audit_logs_raw_v1'"
    assert stack.clickhouse(parts) == [(1, rows)]


def test_no_row_is_marked_without_the_receipt_of_its_batch(stack: Stack) -> None:
    """Invariant 1: before ClickHouse acknowledged the batch as it is cut now, a mark would be a loss."""
    fill(stack, 10)
    batch, bodies = sealed(stack)
    forged = Receipt(
        claim=batch.claim, digest=batch.digest, entries=10, blocks=1, bytes=batch.bytes, found=0, seconds=0.0
    )
    with pytest.raises(LeaseLost, match="not written"):
        export.mark(stack.outbox, stack.log, forged, LIMITS)
    receipt = export.write(stack.outbox, stack.log, batch.claim, bodies, LIMITS)
    with pytest.raises(LeaseLost, match="split again after this receipt"):
        export.mark(stack.outbox, stack.log, replace(receipt, digest="of another cut"), LIMITS)
    assert stack.pending() == 10
    export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert stack.pending() == 0


# ── crashes ──────────────────────────────────────────────────────────────────────────────────────


def _refuse_one(stack: Stack) -> None:
    """Two rows, one of which the parser takes and the table refuses: their block is halved, and the half dropped."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    stack.put(small_event("evt_refused", description="x"), small_event("evt_beside_it"))


def prepare(stack: Stack, place: str) -> tuple[int, int]:
    """Forty events, and a refused one where the crash needs a split; returns the events to arrive and the dead."""
    fill(stack)
    if place.split()[1] not in ("replace_cut", "reserve"):
        return ROWS, 0
    _refuse_one(stack)
    return ROWS + 1, 1


def _same_step(stack: Stack, crash_at: CrashPoint) -> None:
    """The step that crashed is run again with the same claim, and the run goes on."""

    def step(verb: Callable[[], Any]) -> Any:
        try:
            return verb()
        except Crash:
            crash_at.revive()
            return verb()

    run(stack, "first", crash_at=crash_at, step=step)


def _next_run(owner: str, *, dead_owners: Sequence[str] = (), lease_ends: bool = False) -> Callable[..., None]:
    def recover(stack: Stack, crash_at: CrashPoint) -> None:
        with pytest.raises(Crash):
            run(stack, "first", crash_at=crash_at)
        if lease_ends:
            end_leases(stack)
        run(stack, owner, dead_owners=dead_owners)

    return recover


RECOVERIES = {
    "same step again": _same_step,
    "same owner again": _next_run("first"),
    "new owner, old one dead": _next_run("second", dead_owners=["first"]),
    "new owner, lease ended": _next_run("second", lease_ends=True),
}


def _crashes() -> Iterator[Any]:
    """Each crash point with each recovery; those that others cover are slow tests.

    A crash after an effect leaves the databases as one before the next effect does: only a step that is run again can
    tell them apart. And a plan treats all batches that it adopts alike: one recovery a crash point is enough.
    """
    for number, place in enumerate(CRASH_POINTS):
        for recovery in RECOVERIES:
            if recovery == "same step again":
                fast = place.endswith(" 1")
            else:
                fast = place.startswith("before") and recovery == [*RECOVERIES][1 + number // 2 % 3]
            yield pytest.param(place, recovery, marks=[] if fast else [pytest.mark.slow])


@pytest.mark.parametrize(("place", "recovery"), [*_crashes()])
def test_a_crash_anywhere_loses_and_duplicates_nothing(stack: Stack, place: str, recovery: str) -> None:
    """The promise itself: at no point between two durable effects is there a wrong moment to die."""
    arriving, dead = prepare(stack, place)
    crash_at = CrashPoint(place)
    RECOVERIES[recovery](stack, crash_at)
    assert crash_at.left <= 0, f"the drain never came to {place}"
    assert_everything_once(stack, arriving, dead=dead)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(1, 6))])
def test_run_after_run_dying_at_random_ends_with_everything_once(stack: Stack, seed: int) -> None:
    """A machine that is dying crashes the recovery too, and the recovery of the recovery."""
    random = Random(seed)
    fill(stack)
    _refuse_one(stack)
    for attempt in range(12):
        place = f"{random.choice(['before', 'after'])} {random.choice([*EFFECTS])} {random.randrange(1, 5)}"
        dead_owners = [f"owner {attempt - 1}"] if random.random() < 0.5 else []
        if random.random() < 0.5:
            end_leases(stack)
        with suppress(Crash):
            run(
                stack,
                f"owner {attempt}",
                crash_at=CrashPoint(place),
                dead_owners=dead_owners,
                hand_over=random.random() < 0.5,
            )
    end_leases(stack)
    run(stack, "last")
    assert_everything_once(stack, ROWS + 1, dead=1)


def test_of_two_blocks_only_the_missing_one_is_sent_again(stack: Stack) -> None:
    """Several blocks are in flight at once, so a crash leaves half of a batch in ClickHouse."""
    fill(stack)
    crash(stack, "before insert 2", limits=LIMITS)
    assert stack.counts() == (10, 10)
    claim = claimed(stack, "second", ["first"])[0]
    receipt = export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    assert (receipt.blocks, receipt.found) == (2, 1)
    assert stack.counts() == (20, 20)
    run(stack, "second")
    assert_everything_once(stack)


CHILD = """
import pathlib, sys, threading
from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.support.crashes import CrashingAuditLog, CrashingOutbox, CrashPoint, drain

mysql_url, clickhouse_url, place, marker = sys.argv[1:]

def stay():
    pathlib.Path(marker).touch()
    threading.Event().wait()

claiming.SMALLEST_BLOCK_ROWS = 10
at = CrashPoint(place, then=stay)
drain(CrashingOutbox(MySQLOutbox(mysql_url), at), CrashingAuditLog(ClickHouseAuditLog(clickhouse_url), at),
      Limits(batch_rows=20, blocks_per_batch=2, mark_rows=5), owner="first")
"""


@pytest.mark.parametrize(
    "place",
    [
        *("before claim 1", "before insert 3"),
        *(pytest.param(place, marks=pytest.mark.slow) for place in ("after insert 2", "after mark 2")),
    ],
)
def test_a_process_killed_with_sigkill_is_picked_up(stack: Stack, tmp_path: Path, place: str) -> None:
    """No handler, no rollback, no goodbye: sockets close and threads end wherever they were."""
    fill(stack)
    marker = tmp_path / "reached"
    arguments = [stack.mysql_url, stack.clickhouse_url, place, str(marker)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT)
    try:
        wait_until(lambda: marker.exists() or child.poll() is not None, what="the crash point", every_s=0.01)
        assert child.poll() is None, "the child ended before it came to the crash point"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()
    run(stack, "second", dead_owners={"first"})
    assert_everything_once(stack)


# ── negative controls ────────────────────────────────────────────────────────────────────────────


class Blind(CrashingAuditLog):
    """Sees nothing in ClickHouse: a write that does not check first."""

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        return {}


def drop_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each INSERT has a token of its own, and ClickHouse does not compare its content either."""
    monkeypatch.setattr(Batch, "token", lambda batch, block: uuid4().hex)
    monkeypatch.setitem(audit_log.INSERT_SETTINGS, "insert_deduplicate", 0)


@pytest.mark.parametrize(
    ("look_first", "with_token", "copies"), [(False, False, 20), (True, False, 0), (False, True, 0)]
)
def test_without_token_and_look_first_a_lost_answer_doubles(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, look_first: bool, with_token: bool, copies: int
) -> None:
    """The negative control: these tests can see a duplicate, and each of the two guards holds alone."""
    fill(stack)
    if not with_token:
        drop_the_token(monkeypatch)
    crash(stack, "before record_written 1", limits=LIMITS)
    run(stack, "first", log=None if look_first else Blind(stack.log, CrashPoint(NEVER)))
    assert stack.counts() == (ROWS + copies, ROWS)
    assert states(stack)[0] == ("discrepant" if copies else "verified")


@pytest.mark.parametrize(("with_token", "copies"), [(True, 1), (False, 4)])
def test_one_block_sent_again_and_at_once_stays_once_under_its_token(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, with_token: bool, copies: int
) -> None:
    """The token covers the one race that looking first cannot: the earlier INSERT is still running."""
    fill(stack, 10)
    if not with_token:
        drop_the_token(monkeypatch)
    batch, bodies = sealed(stack)
    (block,) = batch.blocks
    deadline_ms = stack.log.deadline_ms(30)

    def send(_: int) -> Refusal | None:
        return stack.log.insert(batch, block, [*bodies[block.digest]], deadline_ms=deadline_ms, timeout_s=20)

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(send, range(3)), send(4)] == [None] * 4
    assert stack.counts() == (10 * copies, 10)


# ── paused runs ──────────────────────────────────────────────────────────────────────────────────


# A pause after one effect is a pause before the next; before the claim a planner waits for the ledger's lock.
PAUSES = [
    pytest.param(place, marks=[] if place.endswith(" 1") else [pytest.mark.slow])
    for place in CRASH_POINTS
    if place.startswith("before") and place != "before claim 1"
]


@pytest.mark.parametrize("place", PAUSES)
def test_a_run_that_wakes_after_another_took_over_changes_nothing(stack: Stack, place: str) -> None:
    """A paused process is not a dead one: it wakes with bodies in memory and goes on where it was."""
    arriving, dead = prepare(stack, place)
    after: list[object] = []

    def others_take_over() -> None:
        end_leases(stack)
        run(stack, "second")
        after.append(durable(stack))

    crash_at = CrashPoint(place, then=others_take_over)
    if "record_verified" in place:
        run(stack, "first", crash_at=crash_at)  # only verifying is left, which may be done twice
    else:
        with pytest.raises(LeaseLost):
            run(stack, "first", crash_at=crash_at)
    assert [durable(stack)] == after
    assert_everything_once(stack, arriving, dead=dead)


@pytest.mark.parametrize("place", ["before deadline 1", "after deadline 1"])
def test_a_deadline_from_before_a_pause_allows_no_insert(stack: Stack, place: str) -> None:
    """It is still valid long after the rows of the paused run's batch were given back and exported by others."""
    pks = fill(stack, 20)

    def others_give_back() -> None:
        delete_rows(stack, pks[0])
        with pytest.raises(BatchAltered):
            run(stack, "second", dead_owners={"first"})
        for owner in ("third", "fourth"):
            end_leases(stack)
            run(stack, owner)

    with pytest.raises(LeaseLost):
        run(stack, "first", crash_at=CrashPoint(place, then=others_give_back))
    everything_once(stack, 19)
    assert set(states(stack)) == {"verified"}


def test_rows_are_not_given_back_while_an_insert_of_them_can_be_at_work(stack: Stack) -> None:
    """By ClickHouse's clock, which decides about the INSERT: MySQL's may have been set forward, or leases cut short."""
    pks = fill(stack, 20)

    def lease_ends_early() -> None:
        delete_rows(stack, pks[0])
        with pytest.raises(BatchAltered):
            run(stack, "second", dead_owners={"first"})
        stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0")
        with pytest.raises(InsertOutcomeUnknown, match=r"at work for another (179|180) s; nothing was changed"):
            run(stack, "third")
        assert [(batch.state, batch.entries) for batch in ledger(stack)] == [(State.STOPPED, 20)]

    with pytest.raises(LeaseLost):
        run(stack, "first", crash_at=CrashPoint("before insert 1", then=lease_ends_early))
    assert stack.counts() == (20, 20)  # both blocks came late, and not too late
    end_leases(stack)
    run(stack, "fourth")
    (batch,) = ledger(stack)
    assert (batch.state, batch.counts.released, batch.counts.vanished) == (State.VERIFIED, 0, 1)
    everything_once(stack, 20)


def test_every_effect_under_an_adopted_claim_is_refused(stack: Stack) -> None:
    """Each statement's transaction checks the claim: no caller has to remember to."""
    fill(stack, 20)
    batch, _ = sealed(stack)
    old = batch.claim
    claimed(stack, "second", ["first"])
    before = durable(stack)
    cut = Cut(blocks=batch.blocks, pks=batch.pks, counts=batch.counts, digest="other")
    outbox = stack.outbox
    effects: list[Callable[[], object]] = [
        lambda: outbox.renew(old, 60),
        lambda: outbox.allow_inserts(old, batch.digest, 60, 1),
        lambda: outbox.seal(old, cut),
        lambda: outbox.begin_write(old, 60),
        lambda: outbox.replace_cut(old, cut, instead_of=batch.digest),
        lambda: outbox.stop(old, "no", wait_ms=0),
        lambda: outbox.record_written(old, batch.digest),
        lambda: outbox.mark(old, batch.pks, 1),
        lambda: outbox.finish_mark(old, batch.pks, 1, Marked(), ids=0),
    ]
    for effect in effects:
        with pytest.raises(LeaseLost):
            effect()
    assert durable(stack) == before


def test_clickhouse_itself_refuses_an_insert_after_its_deadline(stack: Stack) -> None:
    """MySQL cannot fence a process that is frozen between its last check of the lease and its INSERT."""
    fill(stack, 20)
    batch, bodies = sealed(stack)

    class Late(CrashingAuditLog):
        def deadline_ms(self, within_s: float) -> int:
            return self.real.deadline_ms(-0.001)

    with pytest.raises(LeaseLost):
        export.write(stack.outbox, Late(stack.log, CrashPoint(NEVER)), batch.claim, bodies, LIMITS)
    assert stack.counts() == (0, 0)
    run(stack, "first")
    assert_everything_once(stack, 20)


# ── rows that others change ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("place", "entries"), [("after claim 1", 17), ("before insert 1", 20), ("after record_written 1", 20)]
)
def test_rows_that_others_delete_or_mark_are_counted(stack: Stack, place: str, entries: int) -> None:
    """Before the fetch they are not exported; after the seal their payloads are in memory, and the event is not lost."""
    pks = fill(stack, 20)

    def meddle() -> None:
        delete_rows(stack, pks[0], pks[19])
        mark_by_hand(stack, pks[2])

    run(stack, "first", crash_at=CrashPoint(place, then=meddle))
    (batch,) = ledger(stack)
    assert (batch.state, batch.entries) == (State.VERIFIED, entries)
    assert (batch.counts.vanished, batch.counts.elsewhere) == (2, 1)
    everything_once(stack, entries)
    assert run(stack) == 0


def test_a_batch_of_which_nothing_is_left_ends(stack: Stack) -> None:
    """An empty batch that could not be closed would be adopted again and again."""
    pks = fill(stack, 20)
    run(stack, "first", crash_at=CrashPoint("after claim 1", then=lambda: delete_rows(stack, *pks)))
    (batch,) = ledger(stack)
    assert (batch.state, batch.entries, batch.counts.vanished) == (State.VERIFIED, 0, 20)
    assert run(stack) == 0


@pytest.mark.parametrize(
    ("meddling", "lost"),
    [
        ("DELETE FROM clickhouse_outbox WHERE pk = :pk", 1),
        ("UPDATE clickhouse_outbox SET payload = JSON_SET(payload, '$.description', 'other') WHERE pk = :pk", 0),
    ],
)
def test_a_sealed_batch_that_changed_stops_and_later_gives_rows_back(stack: Stack, meddling: str, lost: int) -> None:
    """Sent under the old token it would be a lie, under a new one a risk: it waits until no INSERT of it can run."""
    pks = fill(stack)
    crash(stack, "before insert 1", limits=LIMITS)
    stack.sql(meddling, pk=pks[0])
    claim, *others = claimed(stack, "second", ["first"])
    with pytest.raises(BatchAltered, match=f"batch {claim.batch_id}, block 0"):
        export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    assert states(stack) == ["stopped", "claimed"]

    # The lease still runs: neither the same claim, nor the same owner, nor a new one may touch it yet.
    with pytest.raises(LeaseLost):
        export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    assert run(stack, "second") == len(others)
    assert run(stack, "third", dead_owners={"second"}) == 0
    everything_once(stack, 20, pending=20 - lost)

    end_leases(stack)
    run(stack, "fourth")
    stopped = ledger(stack)[0]
    assert (stopped.state, stopped.entries, stopped.counts.released) == (State.VERIFIED, 10, 10)
    run(stack, "fifth")
    everything_once(stack, ROWS - lost)
    assert set(states(stack)) == {"verified"}
    assert run(stack, "sixth") == 0


def test_a_crash_while_a_stopped_batch_is_resolved_is_survived(stack: Stack) -> None:
    """Giving rows back is an effect like any other, and a run can die of it."""
    pks = fill(stack, 20)
    crash(stack, "before insert 1", limits=LIMITS)
    delete_rows(stack, pks[0])
    with pytest.raises(BatchAltered):
        run(stack, "second", dead_owners={"first"})
    places = ("before stop", "before replace_cut", "after replace_cut", "after insert", "before record_written")
    for place in places:
        end_leases(stack)
        with suppress(Crash):
            run(stack, place, crash_at=CrashPoint(f"{place} 1"))
    end_leases(stack)
    run(stack, "last")
    run(stack, "last")
    everything_once(stack, 19)


def test_rows_marked_by_others_after_the_seal_are_replayed(stack: Stack) -> None:
    """A foreign mark does not change the event: the block is reproduced, and the mark is left and counted."""
    pks = fill(stack, 20)
    crash(stack, "before insert 1", limits=LIMITS)
    mark_by_hand(stack, pks[3])
    run(stack, "second", dead_owners={"first"})
    (batch,) = ledger(stack)
    assert (batch.state, batch.counts.elsewhere) == (State.VERIFIED, 1)
    assert stack.counts() == (20, 20)
    assert stack.sql("SELECT deleted_at FROM clickhouse_outbox WHERE pk = :pk", pk=pks[3])[0].deleted_at == 5


# ── the same event again ─────────────────────────────────────────────────────────────────────────


def test_a_mark_cleared_by_hand_exports_again_under_the_first_inserted_at(stack: Stack) -> None:
    """Operators re-export by SQL: the copies must be able to collapse, and retention must not begin anew."""
    pks = fill(stack)
    run(stack, "first")
    before = dict(stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1"))
    clear_marks(stack, pks[15:35])
    fill(stack, 5, seed=2)
    run(stack, "second")

    assert sum(batch.entries for batch in ledger(stack) if batch.generation == 1) == 20
    assert set(states(stack)) == {"verified"}
    assert stack.counts() == (ROWS + 5 + 20, ROWS + 5)
    after = stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs")
    assert len(after) == ROWS + 5
    assert before.items() <= dict(after).items()
    merge(stack)
    everything_once(stack, ROWS + 5)
    assert run(stack, "third") == 0


def test_a_requeue_that_crashes_is_once_in_the_view(stack: Stack) -> None:
    """A requeued block shares its inserted_at with the first export, so looking first cannot tell: the token does."""
    fill(stack, 20)
    run(stack, "first")
    for generation in (1, 2):
        clear_marks(stack)
        crash(stack, "after insert 1", limits=LIMITS)
        run(stack, "second", dead_owners={"first"})
        assert stack.counts() == (20 * (generation + 1), 20)
        assert ledger(stack)[-1].generation == generation
    assert len(stack.clickhouse("SELECT event_id FROM audit_logs")) == 20
    assert set(states(stack)) == {"verified"}


def test_copies_of_a_requeue_that_was_given_back_are_no_duplicates(stack: Stack) -> None:
    """Its answer was lost and one of its rows deleted: no look-up can tell whether its copies are in ClickHouse."""
    pks = fill(stack, 20)
    run(stack, "first")
    clear_marks(stack, pks[4:7])
    crash(stack, "after insert 1", limits=LIMITS)
    delete_rows(stack, pks[4])
    with pytest.raises(BatchAltered):
        run(stack, "second", dead_owners={"first"})
    end_leases(stack)
    run(stack, "third")
    run(stack, "fourth")

    assert stack.counts() == (20 + 3 + 2, 20)
    assert stack.pending() == 0
    first, given_back, again = ledger(stack)
    assert (given_back.rows, given_back.counts.released, again.rows) == (0, 3, 2)
    assert verify.verify(stack.outbox, stack.log, [first]) == {first.batch_id: Discrepancy()}
    # That explains three copies, one for each attempt, and not nine.
    (event,) = stack.sql("SELECT event_id FROM clickhouse_outbox WHERE pk = :pk", pk=pks[9])
    one = f"(SELECT * FROM audit_logs_raw_v1 WHERE event_id = '{event.event_id}' LIMIT 1)"
    stack.clickhouse(
        f"INSERT INTO audit_logs_raw_v1 SELECT held.* FROM {one} AS held CROSS JOIN numbers(9) AS times "
        "SETTINGS optimize_on_insert = 0"
    )
    assert verify.verify(stack.outbox, stack.log, [first])[first.batch_id].duplicated == 6


@pytest.mark.parametrize("between", [1, 13], ids=["in_one_block", "in_two_blocks"])
def test_one_event_twice_in_a_batch_is_sent_once_and_all_rows_are_marked(stack: Stack, between: int) -> None:
    """A writer that retried its commit has written the event twice; the auditor asked for it once."""
    others = [small_event(f"evt_other_{number}") for number in range(between)]
    same = [small_event("evt_1", description=text) for text in ("older", "old", "new")]
    pks = stack.put(*same[:2], *others, same[2])
    run(stack)

    (batch,) = ledger(stack)
    rows = between + 3
    assert (batch.state, batch.entries, batch.rows, batch.counts.folded) == (State.VERIFIED, rows - 2, rows, 2)
    assert len(batch.blocks) == (2 if between > 10 else 1)
    everything_once(stack, rows - 2)
    assert stack.clickhouse("SELECT description FROM audit_logs_raw_v1 WHERE event_id = 'evt_1'") == [("new",)]
    assert pks[0] in batch.pks


def test_one_event_in_two_batches_collapses_and_neither_is_called_missing(stack: Stack) -> None:
    """The merge takes the earlier copy away, and verification of its batch may come after the merge."""
    stack.put(*(small_event(f"evt_{number}") for number in range(20)), small_event("evt_3", description="again"))
    claims = claimed(stack)
    for claim in claims:
        write_and_mark(stack, claim, LIMITS, export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies)
    assert len(claims) == 2
    assert stack.counts() == (21, 20)
    merge(stack)
    assert stack.counts() == (20, 20)
    found = verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10))
    assert [str(discrepancy) for discrepancy in found.values()] == ["none", "none"]


def test_a_row_that_a_requeue_folded_keeps_the_time_of_its_first_export(stack: Stack) -> None:
    """Requeued together, two rows of one event go out as one; requeued alone, the first one goes where it was."""
    earlier, *_ = stack.put(*(small_event(event_id) for event_id in ("twice", "a", "b")))
    run(stack, "first")
    later, *_ = stack.put(*(small_event(event_id) for event_id in ("twice", "c", "d")))
    run(stack, "second")
    first, second = ledger(stack)
    for pks in ((earlier, later), (earlier,)):
        clear_marks(stack, pks)
        run(stack, "third")
    _, _, folded, alone = ledger(stack)

    assert (folded.counts.folded, folded.blocks[0].inserted_at_ms) == (1, second.blocks[0].inserted_at_ms)
    assert alone.blocks[0].inserted_at_ms == first.blocks[0].inserted_at_ms
    assert not any(verify.verify(stack.outbox, stack.log, [first, second]).values())


def test_what_clickhouse_lost_is_found(stack: Stack) -> None:
    """A verification that cannot fail verifies nothing: a row taken out of ClickHouse is missing, by its id."""
    fill(stack, 20)
    batch, bodies = sealed(stack)
    write_and_mark(stack, batch.claim, LIMITS, bodies)
    ((event_id,),) = stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 LIMIT 1")
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")  # a DELETE waits for them
    lose(stack, str(event_id))
    (found,) = verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10)).values()
    assert (found.missing, found.event_ids) == (1, (event_id,))
    assert states(stack) == ["discrepant"]


# ── rows that ClickHouse refuses ─────────────────────────────────────────────────────────────────


# What msgspec takes and ClickHouse does not. MySQL's JSON type keeps these out; MariaDB's is text.
REFUSED = {
    '{"n": 1e400}': "number_out_of_range",
    '{"k": 1, "k": -1e400}': "duplicate_key",  # nor is its normal form acceptable
    '{"deep": [{"list": [1, 1E+999]}]}': "number_out_of_range",
}
# MySQL stores the last of two; MariaDB stores both, ClickHouse refuses both, and the event goes out in normal form.
KEYS_TWICE = '{"k": 1, "k": 2, "o": {"z": 1, "z": 3}}'


@pytest.mark.parametrize("place", [NEVER, "before replace_cut 1", "after replace_cut 1", "after replace_cut 2"])
def test_refused_rows_become_dead_letters_and_their_neighbours_arrive(stack: Stack, place: str) -> None:
    """One bad row stopped the ancestor for good; here it costs itself."""
    refused = {}
    for number, (meta, reason) in enumerate(REFUSED.items()):
        fill(stack, 15, seed=10 + number)
        if pk := put_with_meta(stack, f"evt_{number}", meta):
            refused[pk] = reason
    put_with_meta(stack, "evt_twice", KEYS_TWICE)
    is_mariadb = "MariaDB" in str(stack.sql("SELECT VERSION() AS v")[0].v)
    assert len(refused) == (len(REFUSED) if is_mariadb else 0)
    limits = Limits(batch_rows=100, blocks_per_batch=2)
    crash_at = CrashPoint(place)
    try:
        run(stack, "first", limits, crash_at=crash_at)
    except Crash:
        run(stack, "second", limits, dead_owners={"first"})

    assert crash_at.reached == (is_mariadb and place != NEVER)
    assert dict(dead_letters(stack, "pk", "reason")) == refused
    assert_everything_once(stack, 46, dead=len(refused))
    assert sum(batch.counts.dead for batch in ledger(stack)) == len(refused)
    ((meta_text,),) = stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1 WHERE event_id = 'evt_twice'")
    assert json.loads(str(meta_text)) == {"k": 2, "o": {"z": 3}}
    assert run(stack, "third", limits) == 0
