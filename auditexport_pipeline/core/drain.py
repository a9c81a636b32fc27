"""The loop over plans: claim, export and verify one plan, plans until the backlog is empty, or what arrives while the run stays.

The CLI's drain and the staying Dagster run use this loop; Dagster's graph runs one plan as steps (`defs.assets`). The verbs of a
batch are in `core.export`, and `core.pipeline` runs them in threads.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol

from auditexport_pipeline.core import claiming, retries
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import OPEN, Batch, Claim, Left
from auditexport_pipeline.core.errors import (
    AuditExportError,
    BatchAltered,
    BatchLocked,
    BatchWaits,
    LeaseLost,
    TableRefuses,
    TransientError,
)
from auditexport_pipeline.core.outcome import outcome_of
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Holder, Moment, Outbox
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.verify import verify_recent

# A block is split in ever more parts: by then it is down to single rows.
WAITS_WITHOUT_PROGRESS = 12
LOOK_FOR_STOP_S = 0.2
# Two statements: one to MySQL, and, while rows are held, one for the definition of ClickHouse's table.
RELEASE_EVERY_S = 5.0


@dataclass(slots=True, kw_only=True)
class Drained:
    """What a drain did. Names and units are those of a run's metadata in the Dagster UI."""

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

    def leave(self, batch_id: int, error: AuditExportError) -> None:
        """Notes why a batch was left."""
        if isinstance(error, LeaseLost):
            self.lost.append(batch_id)
        elif isinstance(error, BatchAltered):
            self.altered[batch_id] = str(error)
        else:
            assert isinstance(error, BatchWaits | BatchLocked | TableRefuses)
            self.waiting[batch_id] = error

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


class Drain:
    """Exports plan after plan for one owner. Each call goes on where the one before it ended; `done` counts all of them.

    No row is exported twice. Rows whose marks are cleared during the drain wait for the next drain; the listener gets a line.
    Transient errors are retried by a new plan, unless not `retried`, because the caller does that. A batch that another run took over, that was altered, that
    has to wait or whose rows cannot be marked stops only itself. When `stopping()`, the current batch is finished and the
    others are given back: their leases end at once.

    `dead_owners` gets the owners of open batches and returns those known to be dead; `exported` are batches that this owner has
    exported before. Durable effects: those of the verbs. Raises what the verbs raise.
    """

    def __init__(
        self,
        outbox: Outbox,
        log: AuditLog,
        *,
        owner: str,
        limits: Limits,
        listener: Listener,
        process: str = "",
        dead_owners: Callable[[list[str]], Collection[str]] = lambda _: (),
        stopping: Callable[[], bool] = lambda: False,
        exported: Iterable[int] = (),
        retried: bool = True,
    ) -> None:
        self._outbox = outbox
        self._log = log
        self._owner = owner
        self._process = process
        self._limits = limits
        self._listener = listener
        self._dead_owners = dead_owners
        self._stopping = stopping
        self._retries = retries.RETRIES if retried else 0
        self._pipeline = Pipeline()
        self._said: set[str] = set()
        self._failures = 0
        self.done = Drained(since=outbox.moment(), claimed=set(exported))

    def one_plan(self) -> Drained:
        """Exports at most `max_batches` batches; what is left waits."""
        self._plan()
        return self.done

    def until_empty(self, backlog: Callable[[], Backlog]) -> Drained:
        """Exports until everything that was pending at the start is exported. Rows that arrive meanwhile do not keep it.

        Ends early after a batch whose mark was refused, because the next one would be refused as well, and after a plan of
        nothing but batches that stay as they are.
        """
        began = time.monotonic()
        waits = 0
        while True:
            exported_before = self.done.batches
            plan = self._plan()
            if self.done.interrupted or len(plan.unmarked) == len(plan.claims) or Left.REFUSED in plan.unmarked:
                return self.done
            if self.done.waiting:
                waits = 0 if self.done.batches > exported_before else waits + 1
                wait_s = max(error.wait_s for error in self.done.waiting.values())
                if not wait_s or waits > WAITS_WITHOUT_PROGRESS:
                    return self.done
                self._sleep(wait_s)
            elif len(plan.claims) < self._limits.max_batches:  # the plan took everything there was
                pending = backlog()
                if plan.cleared or not pending.rows or pending.lag_s <= time.monotonic() - began:
                    return self.done

    def stay(
        self,
        staying: Callable[[], bool],
        *,
        max_rows: Callable[[], int | None] = lambda: None,
        release: Callable[[], object] = lambda: None,
    ) -> Drained:
        """Exports what arrives while `staying()`: one plan every `linger_poll_ms`, of at most `max_rows()` rows.

        A new run takes seconds to start; an event that finds a run staying is in ClickHouse within one poll. `release` is called
        every `RELEASE_EVERY_S`: rows that the table refused are taken again once its definition has changed. Ends early
        after a batch that could not be marked or that ClickHouse does not hold as sealed. Raises the error of the first batch
        that was left for another reason.
        """
        released = time.monotonic()
        while staying() and not self.done.interrupted:
            started = time.monotonic()
            if started - released >= RELEASE_EVERY_S:
                released = started
                release()
            plan = self._plan(max_rows(), adopt=False)
            if plan.left:
                raise plan.left[0]
            if plan.unmarked or plan.wrong:
                return self.done
            self._sleep(started + self._limits.linger_poll_ms / 1000 - time.monotonic())
        self.done.interrupted = self.done.interrupted or self._stopping()
        return self.done

    # ── one plan ─────────────────────────────────────────────────────────────────────────────────

    def _plan(self, max_rows: int | None = None, *, adopt: bool = True) -> _Plan:
        """Claims, exports and verifies one plan; after a transient error another one."""
        while True:
            exported_before = self.done.batches
            try:
                plan = self._claim(max_rows, adopt=adopt)
                self._export(plan)
                if plan.claims or adopt:
                    self._verify(plan)
                self._failures = 0
                return plan
            except TransientError as error:
                self._failures = 0 if self.done.batches > exported_before else self._failures + 1
                if self._failures > self._retries or self._stopping():
                    raise
                wait_s = retries.wait_s(max(0, self._failures - 1))
                self._listener.trouble(f"{error} — trying again in {wait_s:.1f} s")
                time.sleep(wait_s)

    def _claim(self, max_rows: int | None, *, adopt: bool) -> _Plan:
        plan = _Plan()
        plan.claims = claiming.claim(
            self._outbox,
            owner=self._owner,
            dead_owners=self._dead_owners(claiming.open_owners(self._outbox)) if adopt else (),
            limits=self._limits,
            process=self._process,
            max_rows=max_rows,
            left_alone=self._say,
            exported=self.done.claimed,
            cleared=plan.add_cleared,
        )
        if plan.cleared:
            self._say(claiming.cleared_line(plan.cleared), "cleared")
        self._listener.claimed(plan.claims)
        self.done.claimed |= {claim.batch_id for claim in plan.claims}
        self.done.rounds += bool(plan.claims) or adopt
        return plan

    def _export(self, plan: _Plan) -> None:
        outbox, log, limits, done = self._outbox, self._log, self._limits, self.done
        self._pipeline.plan(plan.claims)
        rest = list(plan.claims)
        try:
            for claim in plan.claims:
                if self._stopping():
                    break
                rest.remove(claim)
                try:
                    self._pipeline.fetch(outbox, log, claim, limits)
                    receipt = self._pipeline.write(outbox, log, claim, limits)
                    batch = self._pipeline.mark(outbox, log, receipt, limits)
                except (LeaseLost, BatchWaits, BatchLocked, TableRefuses, BatchAltered) as error:
                    done.leave(claim.batch_id, error)
                    plan.left.append(error)
                    self._listener.trouble(str(error))
                    continue
                if batch.left is not None:
                    plan.unmarked.append(batch.left)
                    done.unmarked[claim.batch_id] = batch.last_error
                    self._listener.trouble(
                        f"batch {claim.batch_id} is in ClickHouse and not marked: {batch.last_error}"
                    )
                    continue
                done.unmarked.pop(claim.batch_id, None)
                done.adopted += claim.adopted
                done.add(batch)
                self._listener.exported(batch)
        finally:
            self._pipeline.close()
        done.interrupted = done.interrupted or self._stopping()
        if rest:
            self._give_back(rest)

    def _give_back(self, rest: Sequence[Claim]) -> None:
        """Ends the leases of the batches that are open, so that the next drain need not wait for them. What a thread has done
        for one of them is in the ledger, and the next drain goes on from there.
        """
        by_id = {claim.batch_id: claim for claim in rest}
        for batch in self._outbox.batches(by_id):
            if not batch.held_by(by_id[batch.batch_id]):
                self.done.lost.append(batch.batch_id)
            elif batch.state in OPEN:
                self.done.released.append(batch.batch_id)
            else:
                self.done.add(batch)
                self._listener.exported(batch)
        if self.done.released:
            with suppress(LeaseLost):
                self._outbox.renew(
                    by_id[self.done.released[0]], 0
                )  # one plan, one lease: it ends for all that are open

    def _verify(self, plan: _Plan) -> None:
        """Also what was exported before an interruption, and batches of earlier runs."""
        outcome = verify_recent(self._outbox, self._log, len(plan.claims))
        plan.wrong = any(outcome.values())
        self.done.verified |= outcome
        self._listener.verified(outcome)

    # ── little things ────────────────────────────────────────────────────────────────────────────

    def _say(self, line: str, key: str = "") -> None:
        """Tells the listener something once."""
        if (key or line) not in self._said:
            self._said.add(key or line)
            self._listener.trouble(line)

    def _sleep(self, seconds: float) -> None:
        until = time.monotonic() + seconds
        while not self._stopping() and (left_s := until - time.monotonic()) > 0:
            time.sleep(min(left_s, LOOK_FOR_STOP_S))


@dataclass(slots=True, kw_only=True)
class _Plan:
    """One plan, and how it ended."""

    claims: Sequence[Claim] = ()
    cleared: PkSet = field(default_factory=PkSet)  # rows this owner exported whose marks were cleared since
    unmarked: list[Left] = field(default_factory=list)  # why batches are not marked
    left: list[AuditExportError] = field(default_factory=list)  # why batches are open
    wrong: bool = False  # ClickHouse does not hold a batch as sealed

    def add_cleared(self, pks: PkSet) -> None:
        self.cleared |= pks
