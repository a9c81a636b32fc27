"""The loop over plans: claims, exports and verifies one plan, or plans until the backlog is empty, or while the run
stays.

The CLI's drain and the staying Dagster run use this loop. Dagster's graph runs one plan as steps (`defs.assets`). The
verbs of a batch are in `core.export`, and `core.pipeline` runs them in threads; `core.small` merges those of a plan that is
one small batch.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Protocol, TypeVar

from auditexport_pipeline.core import claiming, retries, threads
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
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Holder, Maintenance, Moment, Outbox
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.small import SmallBatches
from auditexport_pipeline.core.verify import LEFTOVERS, verify

# A block that is too large is split into more parts each time: after so many waits, into single rows.
WAITS_WITHOUT_PROGRESS = 12
CHECK_STOP_S = 0.2
# Two statements: one to MySQL, and, while rows are held, one for the definition of ClickHouse's table.
RELEASE_EVERY_S = 5.0
# Small batches are verified by a look-up of their own. Batches that a dead run left unverified wait this long.
LEFTOVERS_AFTER_S = 60.0

Result = TypeVar("Result")


@dataclass(slots=True, kw_only=True)
class Drained:
    """The result of a drain. Names and units are those of a run's metadata in the Dagster UI."""

    rounds: int = 0
    batches: int = 0
    adopted: int = 0  # of those, adopted from other owners
    rows: int = 0
    entries: int = 0
    bytes: int = 0
    dead_letters: int = 0
    folded_rows: int = 0
    deleted_by_others_rows: int = 0
    marked_by_others_rows: int = 0
    verified: dict[int, Discrepancy] = field(default_factory=dict)
    # By batch id:
    altered: dict[int, str] = field(default_factory=dict)  # stopped, and why
    unmarked: dict[int, str] = field(default_factory=dict)  # ClickHouse has it, and why its rows are not marked
    waiting: dict[int, BatchWaits | BatchLocked | TableRefuses] = field(default_factory=dict)  # left open, and why
    views: dict[int, str] = field(default_factory=dict)  # stored although a view failed: the note on the view
    wrong: dict[int, str] = field(default_factory=dict)  # discrepant, as the ledger has it
    claimed: set[int] = field(default_factory=set)
    taken_over: set[int] = field(default_factory=set)  # adopted from other owners, exported or not
    since: Moment | None = None
    lost: list[int] = field(default_factory=list)  # left to another run, which has adopted them or can do so
    released: list[int] = field(default_factory=list)  # claimed and given back, because the drain was interrupted
    leased_by_others: list[Holder] = field(default_factory=list)  # the other owners of open batches
    interrupted: bool = False

    @property
    def discrepant(self) -> dict[int, str]:
        return {**{batch_id: str(found) for batch_id, found in self.verified.items() if found}, **self.wrong}

    @property
    def settled_rows(self) -> int:
        """Rows that are not pending any more: exported, or set aside."""
        return self.rows + self.dead_letters

    def leave(self, batch_id: int, error: AuditExportError) -> None:
        """Notes why a batch was left open."""
        if isinstance(error, LeaseLost):
            self.lose(batch_id)
        elif isinstance(error, BatchAltered):
            self.altered[batch_id] = str(error)
        else:
            assert isinstance(error, BatchWaits | BatchLocked | TableRefuses)
            self.waiting[batch_id] = error

    def lose(self, batch_id: int) -> None:
        """Notes a batch that is left to another run."""
        if batch_id not in self.lost:
            self.lost.append(batch_id)

    def settle(self, outbox: Outbox, owner: str) -> None:
        """Reads the result from the ledger, because a round that failed has exported and verified batches too."""
        assert self.since is not None
        outcome = outcome_of(outbox, owner, self.claimed, self.since, self.verified)
        self.verified = dict(outcome.verified)
        self.wrong = dict(outcome.wrong)
        self.batches = self.rows = self.entries = self.bytes = self.dead_letters = self.folded_rows = 0
        self.adopted = self.deleted_by_others_rows = self.marked_by_others_rows = 0
        for batch in outcome.batches:
            self.add(batch)
        self.leased_by_others = claiming.leased_by_others(outbox, owner)

    def add(self, batch: Batch) -> None:
        self.batches += 1
        self.adopted += batch.batch_id in self.taken_over
        # Whatever an earlier attempt of this drain met.
        self.waiting.pop(batch.batch_id, None)
        self.unmarked.pop(batch.batch_id, None)
        if batch.batch_id in self.lost:
            self.lost.remove(batch.batch_id)
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
    """Gets each event of a drain at once. A listener that derives from this one ignores what it does not define."""

    def claimed(self, claims: Sequence[Claim]) -> None:
        return

    def exported(self, batch: Batch) -> None:
        return

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        return

    def trouble(self, what: str) -> None:
        return


class Drain:
    """Exports plan after plan for one owner. Each call continues after the one before; `done` is the result of all
    calls.

    No row is exported twice. Rows whose marks are cleared during the drain wait for the next drain; the listener gets a
    line. A new plan follows a transient error, unless `retried` is false because the caller retries. A batch that
    another run adopted, that was altered, that has to wait or whose rows cannot be marked does not stop the others.
    When `stopping()`, the current batch is finished and the others are given back: their leases end at once.

    `dead_owners` gets the owners of open batches and returns those that are known to be dead; `exported` are batches
    that this owner has exported before; `upkeep` explains entries that are gone (`core.verify`). Durable effects: those
    of the verbs. Raises what the verbs raise.
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
        upkeep: Maintenance | None = None,
        dead_owners: Callable[[list[str]], Collection[str]] = lambda _: (),
        stopping: Callable[[], bool] = lambda: False,
        exported: Iterable[int] = (),
        retried: bool = True,
    ) -> None:
        self._outbox = outbox
        self._log = log
        self._owner = owner
        self._process = process
        self._upkeep = upkeep
        self._limits = limits
        self._listener = listener
        self._dead_owners = dead_owners
        self._stopping = stopping
        self._retries = retries.RETRIES if retried else 0
        self._pipeline = Pipeline()
        self._small = SmallBatches(outbox, log, limits, self._note_verified)
        self._skipped_s: float | None = None  # since when no batches of earlier runs were verified
        self._reported: set[str] = set()
        self._failures = 0
        self.done = Drained(since=outbox.moment(), claimed=set(exported))

    def one_plan(self) -> Drained:
        """Exports at most `max_batches` batches."""
        self._plan()
        return self._leave()

    def until_empty(self, backlog: Callable[[], Backlog]) -> Drained:
        """Exports until all rows that were pending at the start are exported. Rows that arrive later do not prolong it.

        Ends early after a batch whose mark was refused, because the next one would be refused as well, and after a plan
        that could not change any of its batches.
        """
        self._empty(backlog)
        return self._leave()

    def _empty(self, backlog: Callable[[], Backlog]) -> None:
        started = threads.monotonic()
        waits = 0
        while True:
            exported_before = self.done.batches
            settled_before = self.done.settled_rows
            plan = self._plan()
            if self.done.interrupted or len(plan.unmarked) == len(plan.claims) or Left.REFUSED in plan.unmarked:
                return
            if self.done.waiting:
                waits = 0 if self.done.batches > exported_before else waits + 1
                wait_s = max(error.wait_s for error in self.done.waiting.values())
                if not wait_s or waits > WAITS_WITHOUT_PROGRESS:
                    return
                self._sleep(wait_s)
            elif len(plan.claims) < self._limits.max_batches:  # the plan claimed all pending rows
                pending = backlog()
                given_back = plan.given_back and self.done.settled_rows > settled_before
                late = not given_back and pending.lag_s <= threads.monotonic() - started
                if plan.cleared or not pending.rows or late:
                    return

    def stay(
        self,
        staying: Callable[[], bool],
        *,
        max_rows: Callable[[], int | None] = lambda: None,
        release: Callable[[], object] = lambda: None,
    ) -> Drained:
        """Exports rows that arrive while `staying()`: one plan every `linger_poll_ms`, of at most `max_rows()` rows.

        A new run takes seconds to start; a staying run exports an event within one poll. `release` is called every
        `RELEASE_EVERY_S`: rows that the table refused are pending again once its definition has changed. Ends early
        after a batch that could not be marked or that ClickHouse does not have as sealed. Raises the error of the first
        batch that was left for another reason.
        """
        released = threads.monotonic()
        while staying() and not self.done.interrupted:
            started = threads.monotonic()
            if started - released >= RELEASE_EVERY_S:
                released = started
                release()
            plan = self._plan(max_rows(), adopt=False)
            if plan.left:
                raise plan.left[0]
            if plan.unmarked or plan.wrong:
                return self._leave()
            self._sleep(started + self._limits.linger_poll_ms / 1000 - threads.monotonic())
        self.done.interrupted = self.done.interrupted or self._stopping()
        return self._leave()

    def _leave(self) -> Drained:
        """Records and verifies what the plans have left for later."""
        if self._skipped_s is not None:
            self._retried(lambda: self._verify(_Plan()))
        return self.done

    # ── one plan ─────────────────────────────────────────────────────────────────────────────────

    def _plan(self, max_rows: int | None = None, *, adopt: bool = True) -> _Plan:
        """Claims, exports and verifies one plan, and after a transient error another one."""

        def once() -> _Plan:
            plan = self._claim(max_rows, adopt=adopt)
            self._export(plan)
            if self._is_to_verify(bool(plan.claims) or adopt):
                self._verify(plan)
            return plan

        return self._retried(once)

    def _is_to_verify(self, usually: bool) -> bool:
        """Not after a small batch, which has its own look-up; batches of earlier runs wait for a minute then."""
        if self._small.has_verified and self._skipped_s is None:
            self._skipped_s = threads.monotonic()
        if self._skipped_s is not None and threads.monotonic() - self._skipped_s > LEFTOVERS_AFTER_S:
            return True
        return usually and not self._small.has_verified

    def _retried(self, work: Callable[[], Result]) -> Result:
        while True:
            exported_before = self.done.batches
            try:
                result = work()
                self._failures = 0
                return result
            except TransientError as error:
                self._failures = 0 if self.done.batches > exported_before else self._failures + 1
                if self._failures > self._retries or self._stopping():
                    raise
                wait_s = retries.wait_s(max(0, self._failures - 1))
                self._listener.trouble(f"{error} — trying again in {wait_s:.1f} s")
                threads.sleep(wait_s)

    def _claim(self, max_rows: int | None, *, adopt: bool) -> _Plan:
        plan = _Plan()
        dead_owners = self._dead_owners(claiming.open_owners(self._outbox)) if adopt else ()
        plan.claims = self._small.claim(
            lambda: claiming.claim(
                self._outbox,
                owner=self._owner,
                dead_owners=dead_owners,
                limits=self._limits,
                process=self._process,
                max_rows=max_rows,
                left_alone=self._report_once,
                exported=self.done.claimed,
                cleared=plan.add_cleared,
                taken_over=self.done.taken_over.add,
            )
        )
        if plan.cleared:
            self._report_once(claiming.cleared_line(plan.cleared), "cleared")
        self._listener.claimed(plan.claims)
        self.done.claimed |= {claim.batch_id for claim in plan.claims}
        self.done.rounds += bool(plan.claims) or adopt
        return plan

    def _export(self, plan: _Plan) -> None:
        done = self.done
        self._pipeline.plan(plan.claims)
        rest = list(plan.claims)
        try:
            for claim in plan.claims:
                if self._stopping() and not self._small.has_begun(claim):
                    break
                rest.remove(claim)
                try:
                    batch = self._small.export(claim) if self._small.has_begun(claim) else self._export_batch(claim)
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
                done.add(batch)
                plan.given_back |= batch.counts.released > 0
                self._listener.exported(batch)
        finally:
            self._pipeline.close()
        done.interrupted = done.interrupted or self._stopping()
        if rest:
            self._give_back(rest)

    def _export_batch(self, claim: Claim) -> Batch:
        outbox, log, limits = self._outbox, self._log, self._limits
        self._pipeline.fetch(outbox, log, claim, limits)
        receipt = self._pipeline.write(outbox, log, claim, limits)
        return self._pipeline.mark(outbox, log, receipt, limits)

    def _give_back(self, rest: Sequence[Claim]) -> None:
        """Ends the leases of the batches that are open, so that the next drain need not wait for them. It continues
        from their states in the ledger.
        """
        by_id = {claim.batch_id: claim for claim in rest}
        for batch in self._outbox.batches(by_id):
            if not batch.held_by(by_id[batch.batch_id]):
                self.done.lose(batch.batch_id)
            elif batch.state in OPEN:
                self.done.released.append(batch.batch_id)
            else:
                self.done.add(batch)
                self._listener.exported(batch)
        if self.done.released:
            with suppress(LeaseLost):  # the lease ends for all open batches of the plan
                self._outbox.renew(by_id[self.done.released[0]], 0)

    def _verify(self, plan: _Plan) -> None:
        """Verifies the batches of this plan, also after an interruption, and batches of earlier runs."""
        batches = self._small.unverified(len(plan.claims) + LEFTOVERS)
        outcome = verify(self._outbox, self._log, batches, upkeep=self._upkeep)
        self._skipped_s = None
        plan.wrong = any(outcome.values())
        self._note_verified(outcome)

    def _note_verified(self, outcome: dict[int, Discrepancy]) -> None:
        self.done.verified |= outcome
        if outcome:
            self._listener.verified(outcome)

    def _report_once(self, line: str, key: str = "") -> None:
        if (key or line) not in self._reported:
            self._reported.add(key or line)
            self._listener.trouble(line)

    def _sleep(self, seconds: float) -> None:
        until = threads.monotonic() + seconds
        while not self._stopping() and (left_s := until - threads.monotonic()) > 0:
            threads.sleep(min(left_s, CHECK_STOP_S))


@dataclass(slots=True, kw_only=True)
class _Plan:
    """One plan and its result."""

    claims: Sequence[Claim] = ()
    cleared: PkSet = field(default_factory=PkSet)  # rows that this owner exported and that are pending again
    unmarked: list[Left] = field(default_factory=list)  # why batches are not marked
    left: list[AuditExportError] = field(default_factory=list)  # why batches are open
    wrong: bool = False  # ClickHouse does not have a batch as sealed
    given_back: bool = False  # rows of its batches are pending again: too many bytes, or too many that were refused

    def add_cleared(self, pks: PkSet) -> None:
        self.cleared |= pks
