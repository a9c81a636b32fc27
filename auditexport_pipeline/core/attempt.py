"""One attempt to write a batch: what is stored, and what becomes of each block that was not acknowledged.

An error of ClickHouse's does not say that nothing was written: a materialized view fails after the block is in the table.
So every error is followed by a look, by `inserted_at`, before anything is split or sent again. What does not belong here:
sending (`core.export`), and searching a block for the rows that are refused (`core.split`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.batch import NO_ENTRIES, VIEW_BARS, VIEW_NOTE, Batch, Block, Bodies, Holding
from auditexport_pipeline.core.errors import (
    AuditExportError,
    AuditLogUnavailable,
    BatchAltered,
    BatchWaits,
    LeaseLost,
    SetupIncomplete,
)
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import LIMITS_OF_A_BLOCK, AuditLog, Outbox, Refusal, RefusalKind
from auditexport_pipeline.core.split import Splitter, give_back, new_cut, new_number, read_payloads
from auditexport_pipeline.core.versions import VERSIONS

# A view that fails on a requeue: the block goes out this often under a new token until its copy can be counted.
COPIES_OF_A_REQUEUE = 3
# A limit of memory or time may be met by chance, on a busy server: a block is split at the second time. A size is not.
STRIKES = {RefusalKind.MEMORY: 2, RefusalKind.TIME: 2, RefusalKind.SIZE: 1}
# A run waits this long by itself for the end of an INSERT that can be at work; beyond, the other batches go on.
WAIT_IN_RUN_S = 5.0
# `inserted_at`s named in a note; the ledger has all of them.
NAMED_SLOTS = 8
# `inserted_at`s asked about in one statement, whose parameter takes 128 KB.
SLOTS_AT_ONCE = 2_000
WHAT_TO_RAISE = {
    RefusalKind.MEMORY: "raise max_memory_usage for this user, or give the server more memory",
    RefusalKind.SIZE: "raise the size that ClickHouse, or the proxy in front of it, takes (nginx: client_max_body_size)",
    RefusalKind.TIME: "raise insert_timeout_s, and the time-outs of a proxy in front of ClickHouse",
}
Outcome = Refusal | BaseException | None


@dataclass(slots=True)
class _Trouble:
    """A view that failed although its block is stored."""

    refusal: Refusal
    entries: int = 0
    slots: list[int] = field(default_factory=list)


class Attempt:
    """What one attempt to write a batch has learnt; its methods are called in turn by `core.export.write`."""

    def __init__(self, outbox: Outbox, log: AuditLog, limits: Limits, batch: Batch) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._splitter = Splitter(outbox, log, limits)
        self._earlier_note = batch.view_note
        self._troubles: dict[str, _Trouble] = {}
        self._before: dict[int, Holding] = {}
        self._taken: list[Block] = []
        self._too_large: dict[int, Refusal | None] = {}  # by block number: blocks to split, with this attempt's answer
        self._alone: set[int] = set()  # single rows that were sent once more
        self._copies: dict[int, int] = {}  # by block number: how often a requeued block went out
        self.until_ms = (
            batch.inserts_until_ms
        )  # by ClickHouse's clock: an INSERT of the batch can be at work until then

    # ── before sending ───────────────────────────────────────────────────────────────────────────

    def hold_back(self, blocks: Sequence[Block]) -> list[Block]:
        """Those of these blocks that may be sent as they are; the others met a limit before, and wait to be split."""
        self._too_large |= {block.number: None for block in blocks if block.limit}
        return [block for block in blocks if not block.limit]

    def found(self, blocks: Sequence[Block]) -> None:
        """Notes blocks that an earlier attempt has written."""
        self._splitter.taken = self._splitter.taken or bool(blocks)

    def count_before(self, batch: Batch, blocks: Sequence[Block]) -> None:
        """Notes what is there under the `inserted_at` of a requeue: only more than this shows that it was written."""
        slots = sorted({block.inserted_at_ms for block in blocks if batch.is_requeue(block)})
        if slots:
            held = self._holdings(slots)
            self._before = {slot: held.get(slot, NO_ENTRIES) for slot in slots}

    def _holdings(self, slots: Sequence[int]) -> dict[int, Holding]:
        held: dict[int, Holding] = {}
        for start in range(0, len(slots), SLOTS_AT_ONCE):
            held |= self._log.holdings(slots[start : start + SLOTS_AT_ONCE])
        return held

    # ── after sending ────────────────────────────────────────────────────────────────────────────

    def settle(self, batch: Batch, sent: Sequence[tuple[Block, Outcome]], bodies: Bodies) -> tuple[Batch, list[Block]]:
        """What the answers to some INSERTs mean; returns the batch as it is cut now, and the blocks to send next.

        Durable effects: a note on a view that failed, the mark on a block that is too large, and new cuts. Raises what
        an INSERT raised, unless its block is stored.
        """
        for _, outcome in sent:
            if isinstance(outcome, LeaseLost) or (
                isinstance(outcome, BaseException) and not isinstance(outcome, AuditExportError)
            ):
                raise outcome
        self._taken += [block for block, outcome in sent if outcome is None]
        failed = [(block, outcome) for block, outcome in sent if outcome is not None]
        stored = self._stored(batch, sent) if failed else set()
        batch = self._note_troubles(batch, [(block, outcome) for block, outcome in failed if block.number in stored])
        missing = [(block, outcome) for block, outcome in failed if block.number not in stored]
        batch, error = self._note_limits(batch, missing)
        if error is not None:
            raise error
        batch, again = self._after_views(batch, missing, bodies)
        refused = [
            (block, outcome)
            for block, outcome in missing
            if isinstance(outcome, Refusal) and outcome.kind is RefusalKind.ROWS
        ]
        self._splitter.taken = self._splitter.taken or bool(self._taken)
        batch, parts = self._splitter.split_refused(batch, refused, bodies)
        return batch, again + parts

    def _stored(self, batch: Batch, sent: Sequence[tuple[Block, Outcome]]) -> set[int]:
        """The numbers of the blocks that ClickHouse holds although their INSERTs were answered by an error, or not at all.

        Of a first export, whatever is there under its `inserted_at` is the block: it was written whole, or somebody has
        removed rows since, which verification reports. Of a requeue, exactly its rows must have come on top of what was
        counted before; merges can hide that, and then the block counts as not written.
        """
        failed = [(block, outcome) for block, outcome in sent if outcome is not None]
        try:
            held = self._holdings(sorted({block.inserted_at_ms for block, _ in failed}))
        except AuditExportError:
            errors = [outcome for _, outcome in failed if isinstance(outcome, BaseException)]
            if errors:
                raise errors[0] from None
            raise
        stored = {block.number for block, _ in failed if not batch.is_requeue(block) and block.inserted_at_ms in held}
        for slot, before in self._before.items():
            here = [block for block, _ in failed if batch.is_requeue(block) and block.inserted_at_ms == slot]
            if not here:
                continue
            acknowledged = [block for block, outcome in sent if outcome is None and block.inserted_at_ms == slot]
            after = held.get(slot, NO_ENTRIES)
            more = (after.rows - before.rows, (after.fingerprint - before.fingerprint) % 2**64)
            for written in (here, *([block] for block in here)):
                came = [*acknowledged, *written]
                if more == (sum(one.rows for one in came), sum(one.fingerprint for one in came) % 2**64):
                    stored |= {block.number for block in written}
                    break
        return stored

    def _note_troubles(self, batch: Batch, stored: Sequence[tuple[Block, Outcome]]) -> Batch:
        self._taken += [block for block, _ in stored]
        news = [(block, outcome) for block, outcome in stored if isinstance(outcome, Refusal)]
        for block, refusal in news:
            trouble = self._troubles.setdefault(refusal.view, _Trouble(refusal))
            trouble.entries += block.rows
            trouble.slots.append(block.inserted_at_ms)
        if not news:
            return batch
        return new_cut(self._outbox, batch, batch.blocks, note=self.note(batch))

    def note(self, batch: Batch) -> str:
        """What the operator should know of views that failed, at this attempt or an earlier one; "" when none did."""
        table = VERSIONS[batch.version].table
        told = [self._earlier_note] if self._earlier_note else []
        for view, trouble in self._troubles.items():
            slots = ", ".join(map(str, trouble.slots[:NAMED_SLOTS]))
            more = ", …" if len(trouble.slots) > NAMED_SLOTS else ""
            told.append(
                f"{VIEW_NOTE}{view or f'of {table} (ClickHouse does not say which)'} failed ({trouble.refusal}) after "
                f"{trouble.entries:,} entries were stored: they are in {table}, and not all of them in the view's target. "
                f"Fix the view, then fill its target from {table} WHERE inserted_at IN ({slots}{more})"
            )
        return "; ".join(told)

    def _note_limits(
        self, batch: Batch, missing: Sequence[tuple[Block, Outcome]]
    ) -> tuple[Batch, BaseException | None]:
        """Marks the blocks that are too large; also returns the error that ends this attempt, if there is one."""
        error = next((outcome for _, outcome in missing if isinstance(outcome, BaseException)), None)
        struck = {
            block: outcome
            for block, outcome in missing
            if isinstance(outcome, Refusal) and outcome.kind in LIMITS_OF_A_BLOCK
        }
        if not struck:
            return batch, error
        marked: dict[int, Block] = {}
        for block, refusal in struck.items():
            strikes = block.strikes + 1
            split = strikes >= STRIKES[refusal.kind]
            fits = split and block.rows == 1 and self._another_fits(batch, block)
            marked[block.number] = replace(
                block, strikes=strikes, limit=f"{refusal.kind}: {refusal}" if split else "", fits=fits
            )
            if split:
                self._too_large[block.number] = refusal
            elif error is None:
                error = AuditLogUnavailable(
                    f"ClickHouse did not take batch {batch.batch_id}, block {block.number} ({block.rows:,} rows, "
                    f"{block.bytes:,} bytes): {refusal}. Nothing of the block is stored; it is sent again, and split "
                    f"if that happens again. {WHAT_TO_RAISE[refusal.kind].capitalize()}"
                )
        blocks = tuple(marked.get(block.number, block) for block in batch.blocks)
        return new_cut(self._outbox, batch, blocks), error

    def _another_fits(self, batch: Batch, block: Block) -> bool:
        """Whether the row alone is at fault: another one of ordinary size was taken in this attempt.

        Where no other one was sent, a small made-up row must pass the parser and this one must not.
        """
        others = [other for other in batch.blocks if other.number != block.number]
        usual = sum(other.bytes for other in others) / max(1, sum(other.rows for other in others))
        if any(taken.row_bytes * 2 >= usual for taken in self._taken):
            return True
        return self._splitter.is_too_large_alone(batch, block)

    def _after_views(
        self, batch: Batch, missing: Sequence[tuple[Block, Outcome]], bodies: Bodies
    ) -> tuple[Batch, list[Block]]:
        """Blocks that are not stored, or not to be seen, because a view fails."""
        again: list[Block] = []
        for block, refusal in missing:
            if not isinstance(refusal, Refusal) or refusal.kind is not RefusalKind.VIEW:
                continue
            copies = self._copies.pop(block.number, 1)
            if not batch.is_requeue(block) or copies >= COPIES_OF_A_REQUEUE:
                kind = SetupIncomplete if refusal.permanent else AuditLogUnavailable
                error = kind(
                    f"{VIEW_BARS}of {VERSIONS[batch.version].table} fails, view {refusal.view} ({refusal}), and "
                    f"batch {batch.batch_id}, block {block.number} ({block.rows:,} rows) "
                    + ("cannot be shown to be" if batch.is_requeue(block) else "is not")
                    + " stored. Fix or drop that view; the rows stay pending, and the next run sends them"
                )
                if not self.note(batch):
                    new_cut(self._outbox, batch, batch.blocks, note=str(error))
                raise error
            # The copy can have merged with the first export, or the token be known from an earlier attempt.
            body = read_payloads(self._outbox, batch, block)
            batch, renewed = new_number(self._outbox, batch, block)
            bodies[renewed.digest] = body
            self._copies[renewed.number] = copies + 1
            again.append(renewed)
        return batch, again

    # ── blocks that are too large ────────────────────────────────────────────────────────────────

    def split_too_large(self, batch: Batch, bodies: Bodies) -> tuple[Batch, list[Block]]:
        """Splits the blocks that met a limit, once ClickHouse lacks them and no INSERT of them can be at work.

        Durable effect: the new cut, with a dead letter for a single row that is too large where others were taken, and without
        blocks whose rows were altered since the seal: these go back to pending.
        Returns the blocks to send. Raises `BatchWaits` when that is not yet, or when a limit lets not even one row
        pass.
        """
        blocks = [block for block in batch.blocks if block.number in self._too_large]
        if not blocks:
            return batch, []
        for block in blocks:
            if block.rows == 1 and not block.fits and block.number in self._alone:
                self._too_large.clear()
                raise BatchWaits(
                    f"ClickHouse did not take one row of {block.bytes:,} bytes alone (batch {batch.batch_id}, block "
                    f"{block.number}): {block.limit}. No row of ordinary size was taken beside it, so the limit is what "
                    f"is wrong, and nothing was set aside: {WHAT_TO_RAISE[_kind(block)]}"
                )
        left_ms = self.until_ms - self._log.deadline_ms(0)
        if left_ms >= 0:
            wait_s = (left_ms + 1) / 1000
            if wait_s > WAIT_IN_RUN_S:
                raise BatchWaits(
                    f"batch {batch.batch_id}, block {blocks[0].number} ({blocks[0].rows:,} rows, {blocks[0].bytes:,} bytes) "
                    f"is too large ({blocks[0].limit}). An INSERT of it can be at work for another {wait_s:.0f} s; a run "
                    f"after that splits it. To have it taken whole, {WHAT_TO_RAISE[_kind(blocks[0])]}",
                    wait_s,
                )
            time.sleep(wait_s)
            return self.split_too_large(batch, bodies)
        self._outbox.renew(batch.claim, self._limits.lease_s)
        self._too_large.clear()
        held = self._holdings([block.inserted_at_ms for block in blocks])
        again: list[Block] = []
        for block in blocks:
            if not batch.is_requeue(block) and block.inserted_at_ms in held:
                self._taken.append(block)
                continue
            if block.rows == 1 and not block.fits:
                self._alone.add(block.number)
            try:
                batch, parts = self._splitter.split_too_large(batch, block, bodies)
            except BatchAltered:  # ClickHouse lacks the block and will not get it any more, so its rows are free
                batch, parts = give_back(self._outbox, batch, [block]), []
            again += parts
        return batch, again


def _kind(block: Block) -> RefusalKind:
    return RefusalKind(block.limit.partition(":")[0])
