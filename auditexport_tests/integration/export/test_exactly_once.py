"""Exactly once, whatever happens: crashes at every point, zombies, replays, requeues, other people's hands.

What belongs here: what both databases hold in the end, counted without FINAL. What does not: which rows a
claim takes (`integration.export.test_claiming`), how a payload is read (`core.event`), and Dagster.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from random import Random
from threading import Event as Signal
from typing import Any
from uuid import uuid4

import pytest
from sqlalchemy.exc import DBAPIError

from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import Batch, Block, Receipt, State
from auditexport_pipeline.core.errors import BatchAltered, InsertOutcomeUnknown, LeaseLost
from auditexport_pipeline.core.export import Bodies
from auditexport_pipeline.core.ports import Cut, Discrepancy, Holding, Marked, Refusal
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import Generator, seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import insert, ledger, merge, runner, small_event, stop_merges
from auditexport_tests.support.crashes import (
    CRASH_POINTS,
    EFFECTS,
    Crash,
    CrashingAuditLog,
    CrashingOutbox,
    CrashPoint,
    drain,
)
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.clickhouse_sensitive

ROOT = Path(__file__).resolve().parents[3]
# Two batches of 20 rows: two blocks of 10 each, marked in chunks of 5, the last by `finish_mark`.
ROWS = 40
LIMITS = Limits(batch_rows=20, blocks_per_batch=2, mark_rows=5, mark_connections=1)
NEVER = "before nothing 1"
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
def generated(rows: int, seed: int) -> tuple[tuple[str, str, str], ...]:
    return tuple((row.workspace_id, row.event_id, row.payload) for row in Generator(seed).events(rows))


def end_leases(stack: Stack) -> None:
    """As if their time had passed, on both servers' clocks."""
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0, inserts_until_ms = 0")


def both(stack: Stack) -> tuple[list[Any], list[Any], list[Any]]:
    """Everything that an effect of a run could change, but for leases."""
    return (
        stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox ORDER BY pk"),
        stack.sql(
            "SELECT batch_id, epoch, state, owner, attempts, pks, manifest, counts, digest, exported_at_ms, last_error "
            "FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id"
        ),
        stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1 ORDER BY ALL"),
    )


def assert_everything_once(stack: Stack, events: int = ROWS, *, dead: int = 0) -> None:
    """Each event once without FINAL, under the ledger's `inserted_at`; every row marked by its batch; all verified."""
    batches = ledger(stack)
    assert stack.counts() == (events, events)
    assert stack.pending() == dead
    assert {batch.state for batch in batches} == {State.VERIFIED}
    assert sum(batch.entries for batch in batches) == events
    in_ledger = {block.inserted_at_ms: block.rows for batch in batches for block in batch.blocks}
    assert dict(stack.clickhouse("SELECT inserted_at, count() FROM audit_logs_raw_v1 GROUP BY ALL")) == in_ledger
    marks = {row.pk: row.deleted_at for row in stack.sql("SELECT pk, deleted_at FROM clickhouse_outbox")}
    for batch in batches:
        assert {marks[pk] for pk in batch.pks} == {batch.exported_at_ms}


# ── the whole path ───────────────────────────────────────────────────────────────────────────────


def test_every_event_of_several_writers_arrives_once(stack: Stack) -> None:
    """Late commits, rollbacks, broken and unknown rows are an outbox's daily life, and none may cost an event."""
    seeded = seed_outbox(stack.mysql_url, seed=7, events=3_000, malformed=38, unknown=20, writers=4)
    limits = Limits(batch_rows=500, mark_rows=200)

    run(stack, limits=limits)

    assert stack.counts() == (seeded.events, seeded.events)
    assert stack.pending() == 38 + 20
    assert sum(stack.outbox.dead_by_reason().values()) == 38
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}
    assert run(stack, limits=limits) == 0


def test_columns_hold_what_the_payload_says(stack: Stack) -> None:
    """A count proves nothing about content: what an auditor reads is what the application wrote."""
    fill(stack, 40)
    run(stack)

    stored = {
        str(row[0]): row[1:]
        for row in stack.clickhouse(
            "SELECT event_id, time, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name, "
            "remote_ip, user_agent, correlation_id, targets.type, targets.id, targets.name, meta_text FROM audit_logs_raw_v1"
        )
    }
    for row in Generator(1).events(40):
        event = json.loads(row.payload)
        actor, targets = event["actor"], event.get("targets") or []
        assert list(stored[row.event_id][:-1]) == [
            event["time"],
            event["workspace_id"],
            event["bucket"],
            event["source"] or "platform",
            event["event"],
            event["description"],
            actor["type"],
            actor["id"],
            actor.get("name") or "",
            event.get("remote_ip") or "",
            event.get("user_agent") or "",
            event.get("correlation_id") or "",
            [target["type"] for target in targets],
            [target["id"] for target in targets],
            [target.get("name") or "" for target in targets],
        ]
        # ClickHouse's JSON drops nulls and the keys of empty objects; what is left is equal as JSON.
        assert _without_nothing(json.loads(str(stored[row.event_id][-1]))) == _without_nothing(event.get("meta") or {})


def _without_nothing(value: object) -> object:
    if isinstance(value, dict):
        kept = {key: _without_nothing(child) for key, child in value.items()}
        return {key: child for key, child in kept.items() if child not in (None, {})}
    return [_without_nothing(child) for child in value] if isinstance(value, list) else value


def test_one_insert_is_one_part(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A block is atomic only as one part: two parts could be there by half, and look-first would be a guess."""
    monkeypatch.undo()
    seed_outbox(stack.mysql_url, seed=3, events=claiming.FIRST_BATCH_ROWS, writers=2)
    limits = Limits()
    (claim,) = claiming.claim(stack.outbox, owner="one", dead_owners=(), limits=limits)
    fetched = export.fetch(stack.outbox, stack.log, claim, limits)
    export.write(stack.outbox, stack.log, claim, fetched.bodies, limits)

    # Parts that a merge has replaced are listed for minutes as inactive ones: one row means one part ever.
    parts = "SELECT active, rows FROM system.parts WHERE database = currentDatabase() AND table = 'audit_logs_raw_v1'"
    assert stack.clickhouse(parts) == [(1, claiming.FIRST_BATCH_ROWS)]


# ── the matrix ───────────────────────────────────────────────────────────────────────────────────


def _refuse_one(stack: Stack) -> None:
    """Two rows, one of which the parser takes and the table refuses: their block is halved, and the half dropped."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    stack.put(small_event("evt_refused", description="x"), small_event("evt_beside_it"))


def _same_step(stack: Stack, crash_at: CrashPoint) -> None:
    """The step that crashed is run again with the same claim, and the run goes on."""

    def step(verb: Callable[[], Any]) -> Any:
        try:
            return verb()
        except Crash:
            crash_at.revive()
            return verb()

    drain(
        CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first", step=step
    )


def _crash(stack: Stack, crash_at: CrashPoint) -> None:
    with pytest.raises(Crash):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first")


def _same_owner(stack: Stack, crash_at: CrashPoint) -> None:
    """The whole run is retried: the same owner plans again."""
    _crash(stack, crash_at)
    run(stack, "first")


def _told_dead(stack: Stack, crash_at: CrashPoint) -> None:
    """Another run is told that the first has ended, long before its leases do."""
    _crash(stack, crash_at)
    run(stack, "second", dead_owners={"first"})


def _lease_ended(stack: Stack, crash_at: CrashPoint) -> None:
    """Nobody knows what became of the first: its leases end."""
    _crash(stack, crash_at)
    assert {batch.owner for batch in ledger(stack) if batch.state in (State.CLAIMED, State.SEALED)} <= {"first"}
    end_leases(stack)
    run(stack, "second")


RECOVERIES = {
    "same step again": _same_step,
    "same owner again": _same_owner,
    "new owner, old one dead": _told_dead,
    "new owner, lease ended": _lease_ended,
}


def prepare(stack: Stack, crash_point: str) -> tuple[int, int]:
    """Forty events, and a refused one where the crash needs a split; returns the events to arrive and the dead."""
    fill(stack)
    if crash_point.split()[1] not in ("replace_cut", "reserve"):
        return ROWS, 0
    _refuse_one(stack)
    return ROWS + 1, 1


def test_no_row_is_marked_without_the_receipt_of_its_batch(stack: Stack) -> None:
    """Invariant 1: before ClickHouse acknowledged the batch as it is cut now, a mark would be a loss."""
    fill(stack, 10)
    (claim,) = claiming.claim(stack.outbox, owner="one", dead_owners=(), limits=LIMITS)
    fetched = export.fetch(stack.outbox, stack.log, claim, LIMITS)
    (sealed,) = ledger(stack)
    forged = Receipt(claim=claim, digest=sealed.digest, entries=10, blocks=1, bytes=sealed.bytes, found=0, seconds=0.0)
    with pytest.raises(LeaseLost, match="not written"):
        export.mark(stack.outbox, stack.log, forged, LIMITS)
    receipt = export.write(stack.outbox, stack.log, claim, fetched.bodies, LIMITS)
    with pytest.raises(LeaseLost, match="split again after this receipt"):
        export.mark(stack.outbox, stack.log, replace(receipt, digest="of another cut"), LIMITS)
    assert stack.pending() == 10
    export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert stack.pending() == 0


@pytest.mark.parametrize("recovery", RECOVERIES)
@pytest.mark.parametrize("crash_point", CRASH_POINTS)
def test_a_crash_anywhere_costs_and_doubles_nothing(stack: Stack, crash_point: str, recovery: str) -> None:
    """The promise itself: at no point between two durable effects is there a wrong moment to die."""
    events, dead = prepare(stack, crash_point)
    crash_at = CrashPoint(crash_point)

    RECOVERIES[recovery](stack, crash_at)

    assert crash_at.left <= 0, f"the drain never came to {crash_point}"
    assert_everything_once(stack, events, dead=dead)


@pytest.mark.parametrize("seed", range(4))
def test_run_after_run_dying_at_random_ends_with_everything_once(stack: Stack, seed: int) -> None:
    """A machine that is dying crashes the recovery too, and the recovery of the recovery."""
    random = Random(seed)
    fill(stack)
    _refuse_one(stack)
    for attempt in range(12):
        effect = random.choice([*EFFECTS])
        crash_at = CrashPoint(f"{random.choice(['before', 'after'])} {effect} {random.randrange(1, 5)}")
        if random.random() < 0.5:
            end_leases(stack)
        try:
            drain(
                CrashingOutbox(stack.outbox, crash_at),
                CrashingAuditLog(stack.log, crash_at),
                LIMITS,
                owner=f"owner {attempt}",
                dead_owners={f"owner {attempt - 1}"} if random.random() < 0.5 else (),
                hand_over=random.random() < 0.5,
            )
        except Crash:
            continue
    end_leases(stack)
    run(stack, "last")
    assert_everything_once(stack, ROWS + 1, dead=1)


def test_of_two_blocks_one_is_there_and_only_the_other_is_sent_again(stack: Stack) -> None:
    """Several blocks are in flight at once, so a crash leaves a batch in ClickHouse by half."""
    fill(stack)
    first_is_there = Signal()

    class OneBlockOnly(CrashingAuditLog):
        def insert(
            self, batch: Batch, block: Block, payloads: Sequence[bytes], *, deadline_ms: int, timeout_s: int
        ) -> Refusal | None:
            if block.number == 1:
                assert first_is_there.wait(30)
                raise Crash
            answer = self.real.insert(batch, block, payloads, deadline_ms=deadline_ms, timeout_s=timeout_s)
            first_is_there.set()
            return answer

    with pytest.raises(Crash):
        drain(stack.outbox, OneBlockOnly(stack.log, CrashPoint(NEVER)), LIMITS, owner="first")
    assert stack.counts() == (10, 10)

    claims = claiming.claim(stack.outbox, owner="second", dead_owners={"first"}, limits=LIMITS)
    receipt = export.write(
        stack.outbox, stack.log, claims[0], export.fetch(stack.outbox, stack.log, claims[0], LIMITS).bodies, LIMITS
    )
    assert (receipt.blocks, receipt.found) == (2, 1)
    assert stack.counts() == (20, 20)
    run(stack, "second")
    assert_everything_once(stack)


def test_a_replay_keeps_the_inserted_at_of_the_ledger(stack: Stack) -> None:
    """With a clock's time on the replay the two copies would differ, and neither token nor merge could make them one."""
    fill(stack)
    _crash(stack, CrashPoint("after insert 3"))
    planned = {block.inserted_at_ms for batch in ledger(stack) for block in batch.blocks}
    run(stack, "second", dead_owners={"first"})

    assert {row[0] for row in stack.clickhouse("SELECT DISTINCT inserted_at FROM audit_logs_raw_v1")} == planned
    assert len(planned) == 4


# ── negative controls ────────────────────────────────────────────────────────────────────────────


class Blind(CrashingAuditLog):
    """Sees nothing in ClickHouse: a write that does not look first."""

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        return {}


def drop_the_token(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each INSERT is told to be a new one, and ClickHouse not to compare its content either."""
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
    _crash(stack, CrashPoint("before record_written 1"))
    log = stack.log if look_first else Blind(stack.log, CrashPoint(NEVER))
    for claim in claiming.claim(stack.outbox, owner="first", dead_owners=(), limits=LIMITS):
        bodies = export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies
        export.mark(stack.outbox, stack.log, export.write(stack.outbox, log, claim, bodies, LIMITS), LIMITS)

    assert stack.counts() == (ROWS + copies, ROWS)
    found = verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10))
    assert sum(discrepancy.duplicated for discrepancy in found.values()) == copies


def sealed(stack: Stack, limits: Limits = LIMITS) -> tuple[Batch, Bodies]:
    claim = claiming.claim(stack.outbox, owner="first", dead_owners=(), limits=limits)[0]
    fetched = export.fetch(stack.outbox, stack.log, claim, limits)
    (batch,) = stack.outbox.batches([claim.batch_id])
    return batch, fetched.bodies


@pytest.mark.parametrize(("with_token", "copies"), [(True, 1), (False, 4)])
def test_one_block_sent_again_and_at_once_stays_once_under_its_token(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, with_token: bool, copies: int
) -> None:
    """The token covers the one race that looking first cannot: the earlier INSERT is still running."""
    fill(stack, 10)
    if not with_token:
        drop_the_token(monkeypatch)
    batch, bodies = sealed(stack)
    deadline_ms = stack.log.deadline_ms(30)

    def send(_: int) -> Refusal | None:
        return stack.log.insert(
            batch, batch.blocks[0], [*bodies[batch.blocks[0].digest]], deadline_ms=deadline_ms, timeout_s=20
        )

    with ThreadPoolExecutor(3) as pool:
        assert [*pool.map(send, range(3)), send(4)] == [None] * 4
    assert stack.counts() == (10 * copies, 10)


# ── zombies ──────────────────────────────────────────────────────────────────────────────────────


# A pause after one effect is a pause before the next; before the claim a planner waits for the ledger's lock.
PAUSES = [point for point in CRASH_POINTS if point.startswith("before") and point != "before claim 1"]


@pytest.mark.parametrize("crash_point", PAUSES)
def test_a_run_that_wakes_after_another_took_over_changes_nothing(stack: Stack, crash_point: str) -> None:
    """A paused process is not a dead one: it wakes with bodies in memory and goes on where it was."""
    events, dead = prepare(stack, crash_point)
    after: list[object] = []

    def others_take_over() -> None:
        end_leases(stack)
        run(stack, "second")
        after.append(both(stack))

    crash_at = CrashPoint(crash_point, then=others_take_over)
    outbox, log = CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at)
    if "record_verified" in crash_point:
        drain(outbox, log, LIMITS, owner="first")  # only verifying is left, which may be done twice
    else:
        with pytest.raises(LeaseLost):
            drain(outbox, log, LIMITS, owner="first")

    assert [both(stack)] == after
    assert_everything_once(stack, events, dead=dead)


@pytest.mark.parametrize("crash_point", ["before deadline 1", "after deadline 1"])
def test_a_deadline_that_was_asked_for_too_late_allows_no_insert(stack: Stack, crash_point: str) -> None:
    """Paused beside its question, a run has an answer that is valid long after its batch was given back to the backlog."""
    pks = fill(stack, 20)

    def others_give_back() -> None:
        stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
        with pytest.raises(BatchAltered):
            run(stack, "second", dead_owners={"first"})
        for owner in ("third", "fourth"):
            end_leases(stack)
            run(stack, owner)

    crash_at = CrashPoint(crash_point, then=others_give_back)
    with pytest.raises(LeaseLost):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first")
    assert stack.counts() == (19, 19)
    assert stack.pending() == 0
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}


def test_rows_are_not_given_back_while_an_insert_of_them_can_be_at_work(stack: Stack) -> None:
    """By ClickHouse's clock, which decides about the INSERT: MySQL's may have been set forward, or leases cut short."""
    pks = fill(stack, 20)

    def lease_ends_early() -> None:
        stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
        with pytest.raises(BatchAltered):
            run(stack, "second", dead_owners={"first"})
        stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0")
        with pytest.raises(InsertOutcomeUnknown, match=r"at work for another (179|180) s; nothing was changed"):
            run(stack, "third")
        assert [(batch.state, batch.entries) for batch in ledger(stack)] == [(State.STOPPED, 20)]

    crash_at = CrashPoint("before insert 1", then=lease_ends_early)
    with pytest.raises(LeaseLost):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner="first")
    assert stack.counts() == (20, 20)  # both blocks came late, and not too late
    end_leases(stack)
    run(stack, "fourth")
    (batch,) = ledger(stack)
    assert (batch.state, batch.counts.released, batch.counts.vanished) == (State.VERIFIED, 0, 1)
    assert stack.counts() == (20, 20)
    assert stack.pending() == 0


def test_every_effect_under_an_adopted_claim_is_refused(stack: Stack) -> None:
    """The fence stands in each statement's transaction, not in the caller's good manners."""
    fill(stack, 20)
    batch, _ = sealed(stack)
    old = batch.claim
    claiming.claim(stack.outbox, owner="second", dead_owners={"first"}, limits=LIMITS)
    before = both(stack)
    cut = Cut(blocks=batch.blocks, pks=batch.pks, counts=batch.counts, digest="other")
    effects: list[Callable[[], object]] = [
        lambda: stack.outbox.renew(old, 60),
        lambda: stack.outbox.allow_inserts(old, batch.digest, 60, 1),
        lambda: stack.outbox.seal(old, cut),
        lambda: stack.outbox.begin_write(old, 60),
        lambda: stack.outbox.replace_cut(old, cut, instead_of=batch.digest),
        lambda: stack.outbox.stop(old, "no", wait_ms=0),
        lambda: stack.outbox.record_written(old, batch.digest),
        lambda: stack.outbox.mark(old, batch.pks, 1),
        lambda: stack.outbox.finish_mark(old, batch.pks, 1, Marked(), ids=0),
    ]
    for effect in effects:
        with pytest.raises(LeaseLost):
            effect()
    assert both(stack) == before


def test_the_verbs_of_a_run_that_was_replaced_are_refused(stack: Stack) -> None:
    """One old claim at each state of its batch: fetching, writing and marking all come to nothing."""
    fill(stack)
    fill(stack, 20, seed=2)
    claims = claiming.claim(stack.outbox, owner="first", dead_owners=(), limits=LIMITS)
    bodies = [export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies for claim in claims[:2]]
    receipt = export.write(stack.outbox, stack.log, claims[0], bodies[0], LIMITS)
    claiming.claim(stack.outbox, owner="second", dead_owners={"first"}, limits=LIMITS)
    before = both(stack)

    with pytest.raises(LeaseLost):
        export.fetch(stack.outbox, stack.log, claims[2], LIMITS)
    with pytest.raises(LeaseLost):
        export.write(stack.outbox, stack.log, claims[1], bodies[1], LIMITS)
    with pytest.raises(LeaseLost):
        export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert both(stack) == before
    run(stack, "second")
    assert_everything_once(stack, ROWS + 20)


def test_clickhouse_itself_refuses_an_insert_after_its_deadline(stack: Stack) -> None:
    """A process frozen between its last look at the lease and its INSERT is beyond the reach of MySQL's fence."""
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


CHILD = """
import pathlib, sys, threading
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.support.crashes import CrashingAuditLog, CrashingOutbox, CrashPoint, drain

mysql_url, clickhouse_url, point, marker = sys.argv[1:]

def stay():
    pathlib.Path(marker).touch()
    threading.Event().wait()

claiming.SMALLEST_BLOCK_ROWS = 10
at = CrashPoint(point, then=stay)
drain(CrashingOutbox(MySQLOutbox(mysql_url), at), CrashingAuditLog(ClickHouseAuditLog(clickhouse_url), at),
      Limits(batch_rows=20, blocks_per_batch=2, mark_rows=5), owner="first")
"""


@pytest.mark.parametrize("crash_point", ["before claim 1", "before insert 3", "after insert 2", "after mark 2"])
def test_a_process_killed_with_sigkill_is_picked_up(stack: Stack, tmp_path: Path, crash_point: str) -> None:
    """No handler, no rollback, no goodbye: sockets close and threads end wherever they were."""
    fill(stack)
    marker = tmp_path / "reached"
    arguments = [stack.mysql_url, stack.clickhouse_url, crash_point, str(marker)]
    child = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=ROOT)
    try:
        wait_until(lambda: marker.exists() or child.poll() is not None, what="the crash point", every_s=0.01)
        assert child.poll() is None, "the child ended before it came to the crash point"
    finally:
        os.kill(child.pid, signal.SIGKILL)
        child.wait()

    run(stack, "second", dead_owners={"first"})
    assert_everything_once(stack)


# ── other people's hands in the outbox ───────────────────────────────────────────────────────────


def test_rows_deleted_or_marked_before_the_fetch_are_counted(stack: Stack) -> None:
    """Somebody cleans up while we claim: those rows are explained in the ledger and the others go on."""
    pks = fill(stack, 20)

    def meddle() -> None:
        stack.sql("DELETE FROM clickhouse_outbox WHERE pk IN :pks".replace(":pks", str(tuple(pks[:3]))))
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=pks[4])

    drain(CrashingOutbox(stack.outbox, CrashPoint("after claim 1", then=meddle)), stack.log, LIMITS, owner="first")

    (batch,) = ledger(stack)
    assert (batch.state, batch.entries, batch.counts.vanished, batch.counts.elsewhere) == (State.VERIFIED, 16, 3, 1)
    assert stack.counts() == (16, 16)
    assert run(stack) == 0


def test_a_batch_of_which_nothing_is_left_ends(stack: Stack) -> None:
    """An empty batch that could not be closed would be adopted for ever."""
    fill(stack, 20)
    drain(
        CrashingOutbox(
            stack.outbox, CrashPoint("after claim 1", then=lambda: stack.sql("DELETE FROM clickhouse_outbox") and None)
        ),
        stack.log,
        LIMITS,
        owner="first",
    )
    (batch,) = ledger(stack)
    assert (batch.state, batch.entries, batch.counts.vanished) == (State.VERIFIED, 0, 20)
    assert run(stack) == 0


def test_rows_deleted_after_the_seal_are_exported_from_memory_and_counted(stack: Stack) -> None:
    """The sealed bytes are at hand, so the event is not lost with its row."""
    pks = fill(stack, 20)
    batch, bodies = sealed(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=pks[1])
    receipt = export.write(stack.outbox, stack.log, batch.claim, bodies, LIMITS)
    counts = export.mark(stack.outbox, stack.log, receipt, LIMITS).counts

    assert (counts.vanished, counts.elsewhere) == (1, 1)
    assert stack.counts() == (20, 20)
    assert not any(verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10)).values())
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
    _crash(stack, CrashPoint("before insert 1"))
    stack.sql(meddling, pk=pks[0])
    (claim, *others) = claiming.claim(stack.outbox, owner="second", dead_owners={"first"}, limits=LIMITS)
    with pytest.raises(BatchAltered, match=f"batch {claim.batch_id}, block 0"):
        export.write(
            stack.outbox, stack.log, claim, export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies, LIMITS
        )
    assert [batch.state for batch in ledger(stack)] == [State.STOPPED, State.CLAIMED]

    # The lease still runs: neither the same claim, nor the same owner, nor a new one may touch it yet.
    with pytest.raises(LeaseLost):
        export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    assert run(stack, "second") == len(others)
    assert run(stack, "third", dead_owners={"second"}) == 0
    assert stack.counts() == (20, 20)
    assert stack.pending() == 20 - lost

    end_leases(stack)
    run(stack, "fourth")
    stopped = ledger(stack)[0]
    assert (stopped.state, stopped.entries, stopped.counts.released) == (State.VERIFIED, 10, 10)
    run(stack, "fifth")
    assert stack.counts() == (ROWS - lost, ROWS - lost)
    assert stack.pending() == 0
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}
    assert run(stack, "sixth") == 0


def test_a_crash_while_a_stopped_batch_is_resolved_is_survived(stack: Stack) -> None:
    """Giving rows back is an effect like any other, and whoever does it may die of it."""
    pks = fill(stack, 20)
    _crash(stack, CrashPoint("before insert 1"))
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[0])
    with pytest.raises(BatchAltered):
        run(stack, "second", dead_owners={"first"})
    for point in (
        "before stop 1",
        "before replace_cut 1",
        "after replace_cut 1",
        "after insert 1",
        "before record_written 1",
    ):
        end_leases(stack)
        crash_at = CrashPoint(point)
        with suppress(Crash):
            drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), LIMITS, owner=point)
    end_leases(stack)
    run(stack, "last")
    run(stack, "last")
    assert stack.counts() == (19, 19)
    assert stack.pending() == 0


def test_rows_marked_by_others_after_the_seal_are_still_the_sealed_ones(stack: Stack) -> None:
    """A foreign mark does not change the event: the block is reproduced, and the mark is left and counted."""
    pks = fill(stack, 20)
    _crash(stack, CrashPoint("before insert 1"))
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=pks[3])
    run(stack, "second", dead_owners={"first"})

    (batch,) = ledger(stack)
    assert (batch.state, batch.counts.elsewhere) == (State.VERIFIED, 1)
    assert stack.counts() == (20, 20)
    assert stack.sql("SELECT deleted_at FROM clickhouse_outbox WHERE pk = :pk", pk=pks[3])[0].deleted_at == 5


def test_rows_deleted_or_marked_between_write_and_mark_are_counted(stack: Stack) -> None:
    """Whoever purges the outbox by age meets rows that are just being marked: explained, never retried for ever."""
    pks = fill(stack)

    def meddle() -> None:
        stack.sql("DELETE FROM clickhouse_outbox WHERE pk IN (:one, :two)", one=pks[0], two=pks[19])
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE pk = :pk", pk=pks[2])

    point = CrashPoint("after record_written 1", then=meddle)
    drain(CrashingOutbox(stack.outbox, point), stack.log, LIMITS, owner="first")

    first = ledger(stack)[0]
    assert (first.state, first.counts.vanished, first.counts.elsewhere) == (State.VERIFIED, 2, 1)
    assert stack.counts() == (ROWS, ROWS)
    assert run(stack) == 0


# ── the same event again ─────────────────────────────────────────────────────────────────────────


def test_a_mark_cleared_by_hand_exports_again_under_the_first_inserted_at(stack: Stack) -> None:
    """Operators re-export by SQL: the copies must be able to collapse, and retention must not begin anew."""
    pks = fill(stack)
    run(stack, "first")
    before = dict(stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1"))
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk BETWEEN :a AND :b", a=pks[15], b=pks[34])
    fresh = fill(stack, 5, seed=2)

    run(stack, "second")

    again = [batch for batch in ledger(stack) if batch.generation == 1]
    assert sum(batch.entries for batch in again) == 20
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}
    assert stack.counts() == (ROWS + len(fresh) + 20, ROWS + len(fresh))
    assert stack.pending() == 0
    after = stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs")
    assert len(after) == ROWS + len(fresh)
    assert before.items() <= dict(after).items()
    merge(stack)
    assert stack.counts() == (ROWS + len(fresh), ROWS + len(fresh))
    assert run(stack, "third") == 0


def test_a_requeue_that_crashes_is_once_in_the_view(stack: Stack) -> None:
    """A requeued block shares its inserted_at with the first export, so looking first cannot tell: the token does."""
    fill(stack, 20)
    run(stack, "first")
    for generation in (1, 2):
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
        _crash(stack, CrashPoint("after insert 1"))
        run(stack, "second", dead_owners={"first"})
        assert stack.counts() == (20 * (generation + 1), 20)
        assert ledger(stack)[-1].generation == generation
    assert len(stack.clickhouse("SELECT event_id FROM audit_logs")) == 20
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}


def test_copies_of_a_requeue_that_was_given_back_are_no_duplicates(stack: Stack) -> None:
    """Its answer was lost and a row of it deleted: whether its copies are in ClickHouse, nobody can see."""
    pks = fill(stack, 20)
    run(stack, "first")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN :pks", pks=pks[4:7])
    _crash(stack, CrashPoint("after insert 1"))
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[4])
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
        f"INSERT INTO audit_logs_raw_v1 SELECT held.* FROM {one} AS held CROSS JOIN numbers(9) AS times SETTINGS optimize_on_insert = 0"
    )
    assert verify.verify(stack.outbox, stack.log, [first])[first.batch_id].duplicated == 6


@pytest.mark.parametrize("between", [1, 13], ids=["in_one_block", "in_two_blocks"])
def test_one_event_twice_in_a_batch_is_sent_once_and_all_rows_are_marked(stack: Stack, between: int) -> None:
    """A writer that retried its commit has written the event twice; the auditor asked for it once."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    others = [small_event(f"evt_other_{number}") for number in range(between)]
    same = [small_event("evt_1", description=text) for text in ("older", "old", "new")]
    pks = stack.put(*same[:2], *others, same[2])
    run(stack)

    (batch,) = ledger(stack)
    rows = between + 3
    assert (batch.state, batch.entries, batch.rows, batch.counts.folded) == (State.VERIFIED, rows - 2, rows, 2)
    assert len(batch.blocks) == (2 if between > 10 else 1)
    assert stack.counts() == (rows - 2, rows - 2)
    assert stack.pending() == 0
    assert stack.clickhouse("SELECT description FROM audit_logs_raw_v1 WHERE event_id = 'evt_1'") == [("new",)]
    assert pks[0] in batch.pks


def test_one_event_in_two_batches_collapses_and_neither_is_called_missing(stack: Stack) -> None:
    """The merge takes the earlier copy away, and verification of its batch may come after the merge."""
    stack.put(*(small_event(f"evt_{number}") for number in range(20)))
    stack.put(small_event("evt_3", description="again"))
    claims = claiming.claim(stack.outbox, owner="first", dead_owners=(), limits=LIMITS)
    for claim in claims:
        bodies = export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies
        export.mark(stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, bodies, LIMITS), LIMITS)
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
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN :pks", pks=pks)
        run(stack, "third")
    _, _, folded, alone = ledger(stack)

    assert (folded.counts.folded, folded.blocks[0].inserted_at_ms) == (1, second.blocks[0].inserted_at_ms)
    assert alone.blocks[0].inserted_at_ms == first.blocks[0].inserted_at_ms
    assert not any(verify.verify(stack.outbox, stack.log, [first, second]).values())


def test_what_clickhouse_lost_is_found(stack: Stack) -> None:
    """Verification that cannot fail verifies nothing: a row taken out of ClickHouse is missing, by its id."""
    fill(stack, 20)
    claim = claiming.claim(stack.outbox, owner="first", dead_owners=(), limits=LIMITS)[0]
    bodies = export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies
    export.mark(stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, bodies, LIMITS), LIMITS)
    ((event_id,),) = stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 LIMIT 1")
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")  # a DELETE is one, as they go
    stack.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = {id:String}", id=event_id)

    (found,) = verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10)).values()
    assert (found.missing, found.event_ids) == (1, (event_id,))
    assert ledger(stack)[0].state is State.DISCREPANT


# ── rows that ClickHouse refuses ─────────────────────────────────────────────────────────────────


# What msgspec takes and ClickHouse does not. MySQL's JSON type keeps these out; MariaDB's is text.
REFUSED = (
    ("number_out_of_range", '{"n": 1e400}'),
    ("duplicate_key", '{"k": 1, "k": -1e400}'),  # nor is its normal form acceptable
    ("number_out_of_range", '{"deep": [{"list": [1, 1E+999]}]}'),
)
INVALID_JSON = 3140


def _put_refused(stack: Stack) -> dict[int, str]:
    """Refused rows among 200 good ones, with their reasons: those of them that this server's JSON type lets in."""
    events = list(Generator(5).events(200))
    refused = {}
    for position, (reason, meta) in enumerate(REFUSED):
        portion = events[position * 50 : position * 50 + 50]
        stack.put(*((row.workspace_id, row.event_id, row.payload) for row in portion))
        *ids, payload = small_event(f"evt_{position}", meta=0)
        payload = payload.replace('"meta": 0', f'"meta": {meta}')
        try:
            refused[stack.put((*ids, payload))[0]] = reason
        except DBAPIError as error:
            if error.orig is None or error.orig.args[0] != INVALID_JSON:
                raise
    stack.put(*((row.workspace_id, row.event_id, row.payload) for row in events[150:]))
    return refused


def family(stack: Stack) -> str:
    return "mariadb" if "MariaDB" in str(stack.sql("SELECT VERSION() AS v")[0].v) else "mysql"


@pytest.mark.parametrize("crash_point", [NEVER, "before replace_cut 1", "after replace_cut 1", "after replace_cut 2"])
def test_refused_rows_become_dead_letters_and_their_neighbours_arrive(stack: Stack, crash_point: str) -> None:
    """One bad row stopped the ancestor for good; here it costs itself."""
    refused = _put_refused(stack)
    assert len(refused) == (len(REFUSED) if family(stack) == "mariadb" else 0)
    limits = Limits(batch_rows=250, blocks_per_batch=2)
    crash_at = CrashPoint(crash_point)
    try:
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), limits, owner="first")
    except Crash:
        run(stack, "second", limits, dead_owners={"first"})

    letters = {row.pk: row.reason for row in stack.sql("SELECT pk, reason FROM clickhouse_outbox_dead_letter")}
    assert letters == refused
    assert_everything_once(stack, 200, dead=len(refused))
    assert sum(batch.counts.dead for batch in ledger(stack)) == len(refused)
    assert run(stack, "third", limits) == 0


def test_a_key_given_twice_is_exported_in_normal_form(stack: Stack) -> None:
    """MySQL keeps the last of two; MariaDB keeps both, ClickHouse refuses both, and the event is sound."""
    fill(stack, 30)
    *ids, payload = small_event("evt_twice", meta=0)
    stack.put((*ids, payload.replace('"meta": 0', '"meta": {"k": 1, "k": 2, "o": {"z": 1, "z": 3}}')))
    crash_at = CrashPoint("after replace_cut 1")
    try:
        drain(
            CrashingOutbox(stack.outbox, crash_at),
            CrashingAuditLog(stack.log, crash_at),
            Limits(batch_rows=50),
            owner="first",
        )
    except Crash:
        run(stack, "second", Limits(batch_rows=50), dead_owners={"first"})
    assert crash_at.reached == (family(stack) == "mariadb")

    assert_everything_once(stack, 31)
    ((meta,),) = stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1 WHERE event_id = 'evt_twice'")
    assert json.loads(str(meta)) == {"k": 2, "o": {"z": 3}}
    assert stack.outbox.dead_by_reason() == {}


def test_rows_against_a_constraint_of_the_table_are_held(stack: Stack) -> None:
    """The parser takes them and the table does not, so parsing alone finds no culprit: the block is halved."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK description != 'x'")
    pks = stack.put(*(small_event(f"evt_{n}", description="x" if n in (0, 7, 8, 39) else "y") for n in range(40)))
    run(stack)

    letters = stack.sql("SELECT pk, state, reason, detail FROM clickhouse_outbox_dead_letter ORDER BY pk")
    assert [letter.pk for letter in letters] == [pks[n] for n in (0, 7, 8, 39)]
    assert {(letter.state, letter.reason, str(letter.detail)) for letter in letters} == {
        ("held", "refused_by_table", "constraint no_x (code 469, VIOLATED_CONSTRAINT)")
    }
    assert_everything_once(stack, 36, dead=4)
