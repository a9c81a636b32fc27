"""Small batches: two commits in MySQL and two requests to ClickHouse, where the verbs one by one take eleven and three.

    COMMIT      the claim, the seal, the first attempt and until when its INSERTs can be at work;
                also the verification of the batch before
    INSERT
    COMMIT      written, marked and exported
    look-up     at the same time: what ClickHouse has of the batch, for its verification, and ClickHouse's time, for the
                next batch's deadline

Nothing else is merged. The first COMMIT must be over before the INSERT: rows whose seal is rolled back go out again under
another `inserted_at`. The second one must come after ClickHouse's acknowledgement: rows that are marked before it would
be lost by a crash. And a deadline must be in the ledger before anything is sent: otherwise a later run could split or
release the block while the INSERT is at work.

What fails once takes the verbs of `core.export` one by one, which continue from the ledger: a commit that failed has
changed nothing, or all of it and its answer was lost. So do requeues, which ask ClickHouse before their seal, and adopted
batches, which are not at their first attempt. What does not belong here: the verbs, and the loop over plans (`core.drain`).

A failover that loses the first commit forgets that the rows went out, and they go out again as new. The verbs one by one
commit the claim several commits before the INSERT.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from auditexport_pipeline.core import export, threads
from auditexport_pipeline.core.batch import NO_ENTRIES, Batch, Bodies, Claim, Holding, State
from auditexport_pipeline.core.compare import as_sealed
from auditexport_pipeline.core.errors import AuditExportError, LeaseLost, MarkRefused, OutboxUnavailable
from auditexport_pipeline.core.export import Sent
from auditexport_pipeline.core.lease import RENEWALS_PER_LEASE
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox
from auditexport_pipeline.core.settings import START_WITHIN_S, Limits

# The first commit holds the ledger's lock, for which other plans wait, while these rows are read: a tenth of a second, or half of
# one if all of them become dead letters. Rows beyond these bytes are released.
MOST_ROWS = 3_000
MOST_BYTES = 4 * 1024**2
# An INSERT must start within START_WITHIN_S of this reading of ClickHouse's clock, so the upload has the rest of that.
CLOCK_AGE_S = 30.0

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Begun:
    """A small batch that is sealed, and at its first attempt. Without a deadline, ClickHouse is asked for its time first."""

    claim: Claim
    batch: Batch
    bodies: Bodies
    deadline_ms: int | None
    at_s: float  # when its lease began, by `threads.monotonic`


@dataclass(frozen=True, slots=True, kw_only=True)
class _Looked:
    """What ClickHouse had of a batch: exactly what was sealed. The ledger does not know it yet."""

    batch: Batch
    observed: Mapping[int, Holding]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Reading:
    """ClickHouse's time, and when it was asked, by `threads.monotonic`."""

    now_ms: int
    asked_s: float


class SmallBatches:
    """The small batches of one drain, one after the other. `verified` gets each verification that is in the ledger."""

    def __init__(
        self, outbox: Outbox, log: AuditLog, limits: Limits, verified: Callable[[dict[int, Discrepancy]], None]
    ) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._verified = verified
        self._begun: _Begun | None = None
        self._looked: _Looked | None = None
        self._reading: _Reading | None = None

    # ── the first commit ─────────────────────────────────────────────────────────────────────────

    def claim(self, claim: Callable[[], list[Claim]]) -> list[Claim]:
        """The result of `claim`. If that is one small batch, the same commit seals it and begins to write it."""
        self._begun = None

        def claim_and_begin() -> tuple[list[Claim], _Begun | None]:
            claims = claim()
            return claims, self._begin(claims)

        claims, self._begun = self._with_verification(claim_and_begin, lambda: (claim(), None))
        return claims

    def _begin(self, claims: Sequence[Claim]) -> _Begun | None:
        if len(claims) != 1 or not self._is_small(claims[0]):
            return None
        (claim,), outbox, limits = claims, self._outbox, self._limits
        (batch,) = outbox.batches([claim.batch_id])
        if batch.bytes > MOST_BYTES:
            return None
        few = limits.with_values({"batch_bytes": min(limits.batch_bytes, MOST_BYTES)})
        bodies = export.fetch(outbox, self._log, claim, few, batch=batch).bodies
        deadline_ms = self._deadline_ms()
        until_ms = deadline_ms + limits.insert_timeout_s * 1000 if deadline_ms is not None else 0
        batch = outbox.begin_write(claim, limits.lease_s, until_ms)
        return _Begun(claim=claim, batch=batch, bodies=bodies, deadline_ms=deadline_ms, at_s=threads.monotonic())

    def _is_small(self, claim: Claim) -> bool:
        limits = self._limits
        is_throttled = limits.max_rows_per_second or limits.mark_pause_ms
        is_first = not claim.adopted and not claim.generation
        return is_first and not is_throttled and claim.rows <= min(MOST_ROWS, limits.mark_rows)

    def _deadline_ms(self) -> int | None:
        """The deadline of an INSERT, by a reading of ClickHouse's clock that is not too old."""
        reading = self._reading
        if reading is None or threads.monotonic() - reading.asked_s > CLOCK_AGE_S:
            return None
        return reading.now_ms + START_WITHIN_S * 1000

    # ── the INSERT, the second commit and the look-up ────────────────────────────────────────────

    def has_begun(self, claim: Claim) -> bool:
        """Whether `claim` has sealed this batch, and `export` has to follow."""
        return self._begun is not None and self._begun.claim == claim

    def export(self, claim: Claim) -> Batch:
        """Writes, marks and verifies the batch that was begun. Returns and raises what `core.export.mark` does.

        Also after a failed commit, and after ClickHouse's clock has jumped over the deadline, the verbs find out from
        the ledger whether this run still holds the batch.
        """
        outbox, log, limits = self._outbox, self._log, self._limits
        begun, self._begun = self._begun, None
        assert begun is not None
        # After a pause, `send` first tells the ledger until when its INSERTs can be at work: MySQL refuses a run without the lease.
        fresh = threads.monotonic() - begun.at_s < limits.lease_s / RENEWALS_PER_LEASE
        deadline_ms = begun.deadline_ms if fresh else None
        try:
            sent = export.send(outbox, log, claim, begun.batch, begun.bodies, limits, deadline_ms=deadline_ms)
            return self._record_and_look(sent)
        except (OutboxUnavailable, LeaseLost, MarkRefused):
            return export.mark(outbox, log, export.write(outbox, log, claim, {}, limits), limits)

    def _record_and_look(self, sent: Sent) -> Batch:
        beside = threads.pool(1, "verify")
        looking = beside.submit(self._look, sent.batch)
        beside.shutdown(wait=False)  # a commit that fails does not wait for the answer
        with self._outbox.one_transaction():
            batch = self._outbox.record_written(sent.claim, sent.batch.digest)
            receipt = replace(sent, batch=batch).receipt()
            batch = export.mark(self._outbox, self._log, receipt, self._limits, batch=batch)
        observed = looking.result()
        if observed is not None and batch.state is State.EXPORTED:
            self._looked = _Looked(batch=batch, observed=observed)
        return batch

    def _look(self, batch: Batch) -> Mapping[int, Holding] | None:
        """What ClickHouse has of the batch; None unless that is exactly what was sealed. `core.verify` finds out why not."""
        asked_s = threads.monotonic()
        try:
            held, now_ms = self._log.holdings_now(batch)
        except AuditExportError:
            return None
        if now_ms is not None:
            self._reading = _Reading(now_ms=now_ms, asked_s=asked_s)
        complete = all(as_sealed(batch, block, held.get(block.inserted_at_ms, NO_ENTRIES)) for block in batch.blocks)
        return held if complete else None

    # ── the verification ─────────────────────────────────────────────────────────────────────────

    @property
    def has_verified(self) -> bool:
        """Whether the last batch is verified and the ledger does not know it yet."""
        return self._looked is not None

    def unverified(self, batches: int) -> list[Batch]:
        """As `Outbox.unverified`, after the last batch's verification is recorded, in the same commit."""

        def others() -> list[Batch]:
            return self._outbox.unverified(batches)

        return self._with_verification(others, others) if self._looked is not None else others()

    def _with_verification(self, together: Callable[[], Result], apart: Callable[[], Result]) -> Result:
        """Does `together` in one commit with the record of the last verification. If that fails, does `apart`, and the
        batch is one of those that `core.verify` compares later.
        """
        looked, self._looked = self._looked, None
        try:
            with self._outbox.one_transaction():
                recorded = looked is not None and self._outbox.record_verified(
                    looked.batch, Discrepancy(), looked.observed
                )
                result = together()
        except AuditExportError:
            return apart()
        if looked is not None and recorded:  # and no other run had verified it before
            self._verified({looked.batch.batch_id: Discrepancy()})
        return result
