"""Exporting a claimed batch, as three verbs: fetch, write, mark.

What belongs here: the order of durable effects, and how each verb continues after an earlier attempt. What does not:
choosing rows (`core.claiming`), decoding them (`core.reading`), splitting a refused block (`core.split`), SQL, Dagster,
and the time, which the databases tell.

Every verb may be run again after any crash, by the same run or by another one. It continues from the batch's state in
the ledger.

Effects of a small batch share two commits (`core.small`). In an open transaction nothing here asks ClickHouse: `send`
refuses to, and so does `fetch` of a batch whose rows were exported before.
"""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.attempt import Attempt
from auditexport_pipeline.core.batch import Batch, Block, Claim, Left, Receipt, State
from auditexport_pipeline.core.batch import Bodies as Bodies
from auditexport_pipeline.core.compare import rows_held
from auditexport_pipeline.core.cuts import Writing, read_sealed
from auditexport_pipeline.core.errors import (
    BatchAltered,
    InsertOutcomeUnknown,
    LeaseLost,
    MarkRefused,
    OutboxLocked,
    RowsLocked,
    RowsSwapped,
    SettingsOutdated,
)
from auditexport_pipeline.core.event import id_hash
from auditexport_pipeline.core.lease import leases_renewed, progress
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Marked, Outbox
from auditexport_pipeline.core.reading import ClaimedRows
from auditexport_pipeline.core.settings import START_WITHIN_S, Limits

# Blocks that are sent under one deadline and one renewed lease. A requeue of rows that a lingering run exported has one
# block for each of its small drains.
BLOCKS_AT_ONCE = 64
# A throttled run marks rows in small chunks: the application's COMMIT waits for the binary and redo log of a large one
# (benchmarks/latency.py: its p99 at 4,000 rows/s was 4.6 ms beside ten chunks a second, and 2.9 ms beside a hundred).
CHUNKS_PER_SECOND = 100
# A transaction of the application ends within milliseconds. A mark does not wait for a longer one.
LOCKED_PATIENCE_S = 2.0

# States in which blocks of a batch may have to be sent.
UNWRITTEN = (State.SEALED, State.STOPPED)
# Rows can vanish between the comparison and the mark, so both are repeated, but not for ever: a writer may delete rows
# all the time.
PROOFS = 3


# ── fetch and seal ───────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, kw_only=True)
class FetchedBatch:
    """A sealed batch. `bodies` are the payloads of its blocks, if this attempt has read them."""

    claim: Claim
    bodies: Bodies = field(default_factory=dict)
    rows: int = 0
    dead: int = 0
    seconds: float = 0.0


def fetch(outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits, *, batch: Batch | None = None) -> FetchedBatch:
    """Reads a claimed batch's rows by pk, decodes them, and seals those that can be exported.

    Rows whose pks were exported before keep their `inserted_at` only if they are proven to be the same events
    (`core.origins`, which asks ClickHouse); the others go out as new. For a batch without such rows ClickHouse is not
    asked.

    Durable effect: the seal (pks, blocks, digest) and the dead letters, in one transaction. A batch that
    is sealed already does not change; `write` reads its rows again if it has to send them. `batch` is the batch as this
    transaction has just claimed it. Otherwise its lease is renewed and it is read.
    Raises `LeaseLost`, `OutboxUnavailable`, `AuditLogUnavailable`.
    """
    started = threads.monotonic()
    with leases_renewed(outbox, claim, limits):
        batch = batch or outbox.renew(claim, limits.lease_s)
        if batch.state is not State.CLAIMED:
            return FetchedBatch(claim=claim, rows=batch.entries, seconds=threads.monotonic() - started)
        rows = ClaimedRows(batch)
        rows.read(outbox, limits.batch_bytes)
        if rows.keys:
            _refuse_in_transaction(outbox)
            rows.regroup(outbox, log, limits.blocks_per_batch)
        cut, bodies = rows.seal()
        outbox.seal(claim, cut)
    return FetchedBatch(
        claim=claim,
        bodies=bodies,
        rows=sum(block.rows for block in cut.blocks),
        dead=len(rows.dead),
        seconds=threads.monotonic() - started,
    )


# ── write ────────────────────────────────────────────────────────────────────────────────────────


def write(outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt:
    """Puts every block of a sealed batch into ClickHouse once, and returns the receipt.

    Durable effects, in this order: one more attempt in the ledger; each block, by one INSERT under its
    token; `written` in the ledger. Raises what `send` raises.
    """
    batch = outbox.begin_write(claim, limits.lease_s)
    return record_written(outbox, send(outbox, log, claim, batch, bodies, limits))


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """A batch of which ClickHouse has acknowledged every block, before the ledger has it as written."""

    claim: Claim
    batch: Batch
    found: int
    note: str
    seconds: float

    def receipt(self) -> Receipt:
        """Valid once the ledger has the batch as written."""
        return Receipt(
            claim=self.claim,
            digest=self.batch.digest,
            entries=self.batch.entries,
            blocks=len(self.batch.blocks),
            bytes=self.batch.bytes,
            found=self.found,
            seconds=self.seconds,
            note=self.note,
        )


def send(
    outbox: Outbox,
    log: AuditLog,
    claim: Claim,
    batch: Batch,
    bodies: Bodies,
    limits: Limits,
    *,
    deadline_ms: int | None = None,
) -> Sent:
    """Sends the blocks of a batch that `Outbox.begin_write` returned, until ClickHouse has all of them.

    `bodies` are the blocks' payloads by digest, as `fetch` returned them. The payloads of other blocks are read
    from the outbox and compared with the digest. `bodies` is emptied. `deadline_ms` is that of the first INSERTs, if
    `begin_write` has recorded until when they can be at work. Otherwise the clock is asked and the ledger told here.

    A first attempt sends at once. Any later attempt first asks what ClickHouse has. A block is
    atomic, so ClickHouse has all of it, or none of it and the same block is sent under the same token.
    If ClickHouse has a part of it, entries were removed: the block counts as written, and
    verification reports it. After an INSERT that got an error, the attempt asks in the same way (`core.attempt`).
    Raises `InsertOutcomeUnknown` and `AuditLogUnavailable` (run again), `BatchWaits` (run again later; other batches
    can go on), `LeaseLost`, `BatchAltered`, `SetupIncomplete`.
    """
    _refuse_in_transaction(outbox)
    started = threads.monotonic()
    found = 0
    note = ""
    with leases_renewed(outbox, claim, limits):
        if batch.state in UNWRITTEN:
            to_send = list(batch.blocks)
            if batch.state is State.STOPPED and (left_ms := batch.inserts_until_ms - log.deadline_ms(0)) >= 0:
                raise InsertOutcomeUnknown(
                    f"an INSERT of batch {batch.batch_id} that an earlier run sent can be at work for another "
                    f"{left_ms / 1000:.0f} s; nothing was changed, a run after that resolves the batch"
                )
            if batch.attempts > 1:
                holdings = log.holdings([block.inserted_at_ms for block in batch.blocks])
                # A requeued block has the inserted_at of its first export, so entries under it prove nothing.
                to_send = [
                    block for block in to_send if batch.is_requeue(block) or block.inserted_at_ms not in holdings
                ]
                found = len(batch.blocks) - len(to_send)
            writing = Writing(outbox, batch, bodies)
            attempt = Attempt(writing, log, limits)
            attempt.note_stored([block for block in batch.blocks if block not in to_send])
            _Sending(writing, log, limits, attempt, deadline_ms).all(to_send)
            batch, note = writing.batch, attempt.note()
    return Sent(claim=claim, batch=batch, found=found, note=note, seconds=threads.monotonic() - started)


def record_written(outbox: Outbox, sent: Sent) -> Receipt:
    """Records the batch as written, unless it is already. Raises `LeaseLost`, `OutboxUnavailable`."""
    if sent.batch.state in UNWRITTEN:
        sent = replace(sent, batch=outbox.record_written(sent.claim, sent.batch.digest))
    return sent.receipt()


def _refuse_in_transaction(outbox: Outbox) -> None:
    if outbox.in_transaction:
        raise RuntimeError("ClickHouse must not be asked while a transaction in MySQL is open: commit it first")


class _Sending:
    """Sends blocks of one batch, several at once, until ClickHouse has all of them.

    A refused block is split around the poison rows: the ledger records the new cut, then the new blocks are sent. This
    goes on while the probe budget of `core.poison` lasts, so a flood of poison rows costs one drain no more than that.
    Blocks that are too large are split first or last, because no INSERT of the batch may be at work then.
    """

    def __init__(
        self, writing: Writing, log: AuditLog, limits: Limits, attempt: Attempt, deadline_ms: int | None
    ) -> None:
        self._writing = writing
        self._log = log
        self._limits = limits
        self._attempt = attempt
        self._deadline_ms = deadline_ms  # of the next INSERTs, if the ledger knows it already
        # Answers that the server's list of settings is outdated: a load balancer can choose servers of other versions.
        self._rereads = 2

    def all(self, to_send: list[Block]) -> None:
        to_send = self._attempt.hold_back(to_send)
        to_send += self._attempt.split_what_is_due()
        with threads.pool(self._limits.blocks_per_batch, "write") as pool:
            while to_send := to_send or self._attempt.split_too_large():
                progress()
                # Of a stopped batch, all blocks are read before any is sent: then it is known which ones are released.
                is_stopped = self._writing.batch.state is State.STOPPED
                at_once = len(to_send) if is_stopped else BLOCKS_AT_ONCE
                to_send = [*self._send(to_send[:at_once], pool), *to_send[at_once:]]

    def _send(self, blocks: list[Block], pool: Executor) -> list[Block]:
        """Sends these blocks; returns the blocks to send next."""
        writing, limits, attempt = self._writing, self._limits, self._attempt
        deadline_ms = self._allowed_until()
        altered = self._load(blocks)
        if writing.batch.state is State.STOPPED:
            writing.give_back(altered)
        blocks = [block for block in blocks if block not in altered]
        attempt.count_before(blocks)
        answers = [
            pool.submit(
                self._log.insert,
                writing.batch,
                block,
                writing.bodies.pop(block.digest),
                deadline_ms=deadline_ms,
                timeout_s=limits.insert_timeout_s,
            )
            for block in blocks
        ]
        outcomes = [(block, one.exception() or one.result()) for block, one in zip(blocks, answers, strict=True)]
        # The server refused these before it read any row. The store has read the settings again by now.
        outdated = [block for block, outcome in outcomes if self._rereads and isinstance(outcome, SettingsOutdated)]
        self._rereads -= bool(outdated)
        again = attempt.settle([(block, outcome) for block, outcome in outcomes if block not in outdated])
        return [*again, *(block for block in writing.batch.blocks if block in outdated)]

    def _allowed_until(self) -> int:
        """The deadline of the next INSERTs, which the ledger knows.

        The fence in ClickHouse: every INSERT must start before this moment of ClickHouse's clock, so a process that was
        paused for long is refused. The deadline is read before the ledger: a run that is paused in between learns from
        the ledger whether it still holds the batch.
        """
        writing, limits = self._writing, self._limits
        deadline_ms, self._deadline_ms = self._deadline_ms, None
        if deadline_ms is None:
            deadline_ms = self._log.deadline_ms(START_WITHIN_S)
            until_ms = deadline_ms + limits.insert_timeout_s * 1000
            self._attempt.until_ms = max(self._attempt.until_ms, until_ms)
            writing.outbox.allow_inserts(writing.batch.claim, writing.batch.digest, limits.lease_s, until_ms)
        return deadline_ms

    def _load(self, blocks: list[Block]) -> list[Block]:
        """Reads the payloads that are not in memory. Returns the altered blocks of a stopped batch; stops any other
        batch and raises `BatchAltered`.
        """
        batch, altered = self._writing.batch, []
        for block in blocks:
            try:
                if block.digest not in self._writing.bodies:
                    self._writing.load(block)
            except BatchAltered as error:
                if batch.state is not State.STOPPED:
                    wait_ms = self._attempt.until_ms - self._log.deadline_ms(0)
                    self._writing.outbox.stop(batch.claim, str(error), wait_ms=wait_ms)
                    raise
                altered.append(block)
        return altered


# ── mark ─────────────────────────────────────────────────────────────────────────────────────────


def mark(outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits, *, batch: Batch | None = None) -> Batch:
    """Marks the batch's rows, chunk by chunk, and records the batch as exported with the last chunk.

    Durable effects: `deleted_at` of the rows, one transaction for each chunk, several at once; then the last chunk and
    `exported` in the ledger, in one transaction. Every chunk is fenced. The ledger counts the rows that were deleted or
    marked by others since the seal.

    Where rows stay locked for longer than `LOCKED_PATIENCE_S`, or a trigger undoes or refuses the mark, the other rows
    are marked and the batch stays `written`. The returned batch has the reason in `left` and `last_error`. The rows are
    still in this batch, so they are not sent again, and the next run marks them. Raises `LeaseLost`,
    `OutboxUnavailable`; in an open transaction also `MarkRefused`, and `RowsLocked` without waiting. `batch` is the batch
    as this transaction has just recorded it. Otherwise its lease is renewed and it is read.
    """
    with leases_renewed(outbox, receipt.claim, limits):
        return _mark(outbox, log, receipt, limits, batch or outbox.renew(receipt.claim, limits.lease_s))


def _mark(outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits, batch: Batch) -> Batch:
    claim = receipt.claim
    if batch.state is not State.WRITTEN:
        if batch.state in (State.EXPORTED, State.VERIFIED, State.DISCREPANT):
            return batch
        raise LeaseLost(f"batch {batch.batch_id} is {batch.state}, not written: its receipt is of another attempt")
    if batch.exported_at_ms is None or receipt.digest != batch.digest:
        raise LeaseLost(f"batch {batch.batch_id} was split again after this receipt was made; run again")
    marking = _Marking(outbox, log, claim, batch, batch.exported_at_ms, limits)
    if outbox.in_transaction:
        return marking.in_open_transaction()
    try:
        return marking.mark_batch()
    except OutboxLocked as error:
        why = f"{error}. End that, and the next run marks the rows"
        left = Left.LOCKED
    except RowsLocked:
        rows = len(marking.locked)
        why = (
            f"{rows:,} of {batch.rows:,} rows are locked, the first is pk {marking.locked.first}. "
            f"{outbox.holders(marking.locked)}. End that transaction, and the next run marks the rows"
        )
        left = Left.LOCKED
    except MarkRefused as error:
        why = f"{error}. The rows are in ClickHouse and are not sent again; after that change, the next run marks them"
        left = Left.REFUSED
    return replace(outbox.leave_written(claim, why), left=left)


class _Marking:
    """One attempt to mark a batch, in chunks on several connections. `locked` are the rows that were found locked."""

    def __init__(
        self, outbox: Outbox, log: AuditLog, claim: Claim, batch: Batch, stamp_ms: int, limits: Limits
    ) -> None:
        self._outbox = outbox
        self._log = log
        self._claim = claim
        self._batch = batch
        self._stamp_ms = stamp_ms
        self._limits = limits
        self._total = Marked()
        rate = limits.max_rows_per_second
        # A throttled run commits up to CHUNKS_PER_SECOND small chunks on each connection, with a short pause after
        # each.
        self._chunk_rows = min(limits.mark_rows, max(1, rate // CHUNKS_PER_SECOND)) if rate else limits.mark_rows
        self.locked = PkSet()

    def mark_batch(self) -> Batch:
        """Marks all rows. Raises `RowsLocked` when rows stay locked for longer than `LOCKED_PATIENCE_S`, `MarkRefused`,
        and `RowsSwapped` when rows change again and again.
        """
        if self._batch.ids is not None and self._may_be_as_sealed():
            with suppress(RowsSwapped):
                return self._mark_rows(self._batch.pks, self._batch.ids)
        for _ in range(PROOFS - 1):
            with suppress(RowsSwapped):
                return self._mark_rows(*self._proven())
        return self._mark_rows(*self._proven())

    def in_open_transaction(self) -> Batch:
        """Marks one chunk of rows in the caller's transaction: without threads, pauses and questions to ClickHouse."""
        batch, limits = self._batch, self._limits
        if batch.rows > self._chunk_rows or limits.max_rows_per_second or limits.mark_pause_ms:
            raise RuntimeError(f"the {batch.rows:,} rows of batch {batch.batch_id} cannot be marked in one transaction")
        if batch.ids is None or not self._may_be_as_sealed():
            raise RowsSwapped(
                f"rows under the pks of batch {batch.batch_id} have to be compared with ClickHouse; run again"
            )
        return self._outbox.finish_mark(batch.claim, batch.pks, self._stamp_ms, self._total, ids=batch.ids)

    def _may_be_as_sealed(self) -> bool:
        """Whether the rows under the batch's pks can be marked without asking ClickHouse. The last chunk compares their
        ids. For a batch of another run, or of a second attempt, they are compared before the first chunk too: much time
        has passed.
        """
        recovered = self._batch.attempts > 1 or self._claim.adopted
        return not recovered or self._outbox.own_ids(self._batch.pks, self._stamp_ms) == self._batch.ids

    def _proven(self) -> tuple[PkSet, int]:
        """The rows of the batch, and the sum of their ids. Our marks on other rows are cleared.

        When pks begin again between the seal and the mark, other events have our pks. They must stay pending. The rows of
        a block that are all as sealed are ours, even if their entries were erased meanwhile. Of the others, those are ours
        whose events ClickHouse has.
        """
        ids = 0
        others: list[int] = []
        as_sealed = PkSet.union(block.pks for block in self._batch.blocks if self._is_as_sealed(block))
        for row, _, is_held in rows_held(self._outbox, self._log, self._batch.pks):
            progress()
            if not is_held and row.pk not in as_sealed:
                others.append(row.pk)
            elif row.exported_at_ms in (None, self._stamp_ms):  # not rows with another mark
                ids += id_hash(row.event_id)
        swapped = PkSet.of(others)
        for chunk in swapped.chunks(self._chunk_rows):
            self._outbox.take_back(self._batch.claim, chunk, self._stamp_ms)
        self._total = Marked(vanished=len(swapped))
        return self._batch.pks - swapped, ids

    def _is_as_sealed(self, block: Block) -> bool:
        progress()
        try:
            read_sealed(self._outbox, self._batch, block)
        except BatchAltered:
            return False
        return True

    def _mark_rows(self, pks: PkSet, ids: int) -> Batch:
        *chunks, last = [*pks.chunks(self._chunk_rows)] or [PkSet()]
        self._mark(chunks)
        until = threads.monotonic() + LOCKED_PATIENCE_S
        while True:
            if not self.locked and (batch := self._finish(last, ids)) is not None:
                return batch
            if threads.monotonic() > until and not last:
                raise RowsLocked(f"{len(self.locked):,} rows of batch {self._batch.batch_id} are locked; run again")
            self._mark([*(self.locked | last).chunks(self._chunk_rows)])
            last = PkSet()

    def _finish(self, pks: PkSet, ids: int) -> Batch | None:
        started = threads.monotonic()
        try:
            batch = self._outbox.finish_mark(self._batch.claim, pks, self._stamp_ms, self._total, ids=ids)
        except RowsLocked as error:
            if isinstance(error, OutboxLocked):
                raise
            return None
        self._rest(started, len(pks), 1)
        return batch

    def _mark(self, chunks: Sequence[PkSet]) -> None:
        """Marks the rows that are not locked; `locked` has the others."""
        self.locked = PkSet()
        with threads.pool(self._limits.mark_connections, "mark") as pool:
            for marked in pool.map(self._mark_chunk, chunks):
                self._total += marked
                self.locked |= marked.locked
                progress()

    def _mark_chunk(self, pks: PkSet) -> Marked:
        started = threads.monotonic()
        marked = self._outbox.mark(self._batch.claim, pks, self._stamp_ms)
        self._rest(started, len(pks), self._limits.mark_connections)
        return marked

    def _rest(self, started: float, rows: int, connections: int) -> None:
        rate = self._limits.max_rows_per_second
        due = started + rows * connections / rate if rate else 0.0
        threads.sleep(max(0.0, due - threads.monotonic()) + self._limits.mark_pause_ms / 1000)
