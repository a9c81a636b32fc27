"""Draining in the foreground: whole plans, one after the other, until what was pending is exported.

What belongs here: rounds of claim, fetch, write, mark and verify, when they end, and what an interruption leaves. What
does not: the verbs (`core.claiming`, `core.export`, `core.verify`), a run that stays (`core.linger`), and Dagster's graph
of the same verbs (`defs.assets`).
"""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import OPEN, Batch, Claim, Left, Receipt
from auditexport_pipeline.core.errors import (
    BatchAltered,
    BatchLocked,
    BatchWaits,
    LeaseLost,
    TableRefuses,
    TransientError,
)
from auditexport_pipeline.core.export import Bodies, FetchedBatch
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.outcome import outcome_of
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Holder, Moment, Outbox
from auditexport_pipeline.core.verify import verify

# As often as a step of Dagster's graph is tried again; after that the error is the operator's to see.
RETRIES = 4
FIRST_WAIT_S = 1.0
# A block is split in ever more parts: by then it is down to single rows.
WAITS_WITHOUT_PROGRESS = 12
LOOK_FOR_STOP_S = 0.2
# Batches of earlier runs that died before they verified; the rest waits for the next round.
VERIFY_LEFTOVERS = 200


class MarkedBatch(Protocol):
    """What a stage of marking gives back."""

    @property
    def batch(self) -> Batch: ...


class Stages(Protocol):
    """The verbs of a batch, by this thread or ahead of it (`defs.ahead.Ahead`)."""

    def plan(self, claims: Sequence[Claim]) -> None: ...

    def fetch(self, outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits) -> FetchedBatch: ...

    def write(self, outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt: ...

    def mark(self, outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits) -> MarkedBatch: ...

    def close(self) -> None: ...


@dataclass(slots=True, kw_only=True)
class Drained:
    """What a drain did. Names and units are those of a run's metadata on Dagster's page."""

    rounds: int = 0
    batches: int = 0
    adopted: int = 0  # of those, taken over from owners that are dead
    rows: int = 0
    entries: int = 0
    bytes: int = 0
    dead_letters: int = 0
    folded_rows: int = 0
    deleted_by_others_rows: int = 0
    marked_by_others_rows: int = 0
    verified: dict[int, Discrepancy] = field(default_factory=dict)
    altered: dict[int, str] = field(default_factory=dict)  # stopped batches, and why
    unmarked: dict[int, str] = field(
        default_factory=dict
    )  # batches that ClickHouse has, and why their rows are not marked
    waiting: dict[int, BatchWaits | BatchLocked | TableRefuses] = field(
        default_factory=dict
    )  # batches that have to be split later, and why
    views: dict[int, str] = field(default_factory=dict)  # batches that are stored while a view failed, and which
    wrong: dict[int, str] = field(default_factory=dict)  # discrepant batches, as the ledger has them
    claimed: set[int] = field(default_factory=set)
    since: Moment | None = None
    lost: list[int] = field(default_factory=list)  # batches that another run took over
    held: list[Holder] = field(default_factory=list)  # who else holds rows that are pending
    released: list[int] = field(default_factory=list)  # claimed and given back, because somebody interrupted
    interrupted: bool = False

    @property
    def discrepant(self) -> dict[int, str]:
        return {**{batch_id: str(found) for batch_id, found in self.verified.items() if found}, **self.wrong}

    def settle(self, outbox: Outbox, owner: str) -> None:
        """Takes what was done from the ledger: a round that failed in the middle had done, and found, things too."""
        assert self.since is not None
        outcome = outcome_of(outbox, owner, self.claimed, self.since, self.verified)
        self.verified = dict(outcome.verified)
        self.wrong = dict(outcome.wrong)
        self.batches = self.rows = self.entries = self.bytes = self.dead_letters = self.folded_rows = 0
        self.deleted_by_others_rows = self.marked_by_others_rows = 0
        for batch in outcome.batches:
            self.add(batch)
        self.held = claiming.held_by_others(outbox, owner)

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.waiting.pop(batch.batch_id, None)
        self.rows += batch.marked_rows
        self.entries += batch.entries
        self.bytes += batch.bytes
        self.dead_letters += batch.counts.dead
        self.folded_rows += batch.counts.folded
        self.deleted_by_others_rows += batch.counts.vanished
        self.marked_by_others_rows += batch.counts.elsewhere
        if batch.view_note:
            self.views[batch.batch_id] = batch.view_note


class Listener(Protocol):
    """Who is told what happens, as it happens."""

    def claimed(self, claims: Sequence[Claim]) -> None: ...

    def exported(self, batch: Batch) -> None: ...

    def verified(self, outcome: dict[int, Discrepancy]) -> None: ...

    def trouble(self, what: str) -> None: ...


def drain(
    outbox: Outbox,
    log: AuditLog,
    stages: Stages,
    *,
    owner: str,
    process: str = "",
    dead_owners: Callable[[list[str]], Collection[str]],
    backlog: Callable[[], Backlog],
    limits: Limits,
    once: bool,
    stopping: Callable[[], bool],
    listener: Listener,
) -> Drained:
    """Drains plan after plan until what was pending at the beginning is exported; with `once` a single plan. No row goes out
    twice: those whose marks somebody clears meanwhile are left to the next drain, and the listener hears of them.

    A plan that is not full has claimed everything there was, so rows that keep arriving do not keep it here. When
    `stopping()`, the batch at hand is finished and the rest of the plan given back: its leases end at once. Transient errors are
    tried again by a new plan, and so are batches that have to wait, once the others are done. It adopts what this owner had
    claimed; `dead_owners` says which of the owners of open batches are known to be dead. Durable effects: those of the verbs.
    Raises what they raise, but for a batch that another run took over, whose rows were altered, which has to wait, or whose
    rows could not be marked: the others go on, and the result tells of it. A plan with a batch whose mark was refused is the
    last one, for the next batches would be refused as well.
    """
    done = Drained(since=outbox.moment())
    began = time.monotonic()
    failures = waits = 0
    said: set[str] = set()

    def left_alone(line: str) -> None:
        if line not in said:
            said.add(line)
            listener.trouble(line)

    while True:
        exported_before = done.batches
        cleared = PkSet()

        def again(pks: PkSet) -> None:
            nonlocal cleared
            cleared |= pks

        try:
            dead = dead_owners(outbox.open_owners())
            claims = claiming.claim(
                outbox,
                owner=owner,
                dead_owners=dead,
                limits=limits,
                process=process,
                left_alone=left_alone,
                exported=done.claimed,
                cleared=again,
            )
            if cleared:
                left_alone(claiming.cleared_line(cleared))
            listener.claimed(claims)
            done.claimed |= {claim.batch_id for claim in claims}
            done.rounds += 1
            left = _round(outbox, log, stages, claims, limits, stopping, done, listener)
            # Those of earlier runs too; and what was exported before an interruption is verified all the same.
            outcome = verify(outbox, log, outbox.unverified(len(claims) + VERIFY_LEFTOVERS))
        except TransientError as error:
            failures = 0 if done.batches > exported_before else failures + 1
            if failures > RETRIES or stopping():
                raise
            wait_s = FIRST_WAIT_S * 2 ** max(0, failures - 1) * random.uniform(0.5, 1.5)
            listener.trouble(f"{error} — trying again in {wait_s:.1f} s")
            time.sleep(wait_s)
            continue
        failures = 0
        done.verified |= outcome
        listener.verified(outcome)
        # A plan of nothing but batches that stay as they are would be made again and again.
        if done.interrupted or once or len(left) == len(claims) or Left.REFUSED in left:
            return done
        if done.waiting:
            waits = 0 if done.batches > exported_before else waits + 1
            wait_s = max(error.wait_s for error in done.waiting.values())
            if not wait_s or waits > WAITS_WITHOUT_PROGRESS:
                return done
            _sleep(wait_s, stopping)
            continue
        if len(claims) < limits.max_batches:
            pending = backlog()
            if cleared or not pending.rows or pending.lag_s <= time.monotonic() - began:
                return done


def _sleep(seconds: float, stopping: Callable[[], bool]) -> None:
    until = time.monotonic() + seconds
    while not stopping() and (left_s := until - time.monotonic()) > 0:
        time.sleep(min(left_s, LOOK_FOR_STOP_S))


def _round(
    outbox: Outbox,
    log: AuditLog,
    stages: Stages,
    claims: Sequence[Claim],
    limits: Limits,
    stopping: Callable[[], bool],
    done: Drained,
    listener: Listener,
) -> list[Left]:
    """One plan; returns why batches of it are not marked."""
    stages.plan(claims)
    unmarked = []
    left = list(claims)
    try:
        for claim in claims:
            if stopping():
                done.interrupted = True
                break
            left.remove(claim)
            try:
                fetched = stages.fetch(outbox, log, claim, limits)
                receipt = stages.write(outbox, log, claim, fetched.bodies, limits)
                batch = stages.mark(outbox, log, receipt, limits).batch
            except LeaseLost as error:
                done.lost.append(claim.batch_id)
                listener.trouble(str(error))
            except (BatchWaits, BatchLocked, TableRefuses) as error:
                done.waiting[claim.batch_id] = error
                listener.trouble(str(error))
            except BatchAltered as error:
                done.altered[claim.batch_id] = str(error)
                listener.trouble(str(error))
            else:
                if batch.left is not None:
                    unmarked.append(batch.left)
                    done.unmarked[claim.batch_id] = batch.last_error
                    listener.trouble(f"batch {claim.batch_id} is in ClickHouse and not marked: {batch.last_error}")
                    continue
                done.unmarked.pop(claim.batch_id, None)
                done.adopted += claim.adopted
                done.add(batch)
                listener.exported(batch)
    finally:
        stages.close()
    done.interrupted = done.interrupted or stopping()
    if left:
        _give_up(outbox, left, done, listener)
    return unmarked


def _give_up(outbox: Outbox, left: Sequence[Claim], done: Drained, listener: Listener) -> None:
    """Ends the leases of a plan's batches that are open still, so that the next drain need not wait for them.

    What a stage ahead has done for one of them stands in the ledger, and is gone on from there; nothing of it is lost.
    """
    by_id = {claim.batch_id: claim for claim in left}
    for batch in outbox.batches(by_id):
        if not batch.held_by(by_id[batch.batch_id]):
            done.lost.append(batch.batch_id)
        elif batch.state in OPEN:
            done.released.append(batch.batch_id)
        else:
            done.add(batch)
            listener.exported(batch)
    if done.released:
        with suppress(LeaseLost):
            outbox.renew(by_id[done.released[0]], 0)  # one plan, one lease: of all that are open
