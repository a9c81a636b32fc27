"""One attempt to write a batch: finds the stored blocks, and handles each block that was not acknowledged.

An error from ClickHouse does not mean that nothing was written: a materialized view fails after the block is in the
table. So after every error, the attempt asks ClickHouse by `inserted_at` before it splits a block or sends it again.
What does not belong here: sending (`core.export`), and finding the rows that are refused (`core.split`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.batch import NO_ENTRIES, VIEW_BARS, VIEW_NOTE, Block, Holding
from auditexport_pipeline.core.cuts import Writing
from auditexport_pipeline.core.errors import (
    AuditExportError,
    AuditLogUnavailable,
    BatchAltered,
    BatchWaits,
    LeaseLost,
    SetupIncomplete,
)
from auditexport_pipeline.core.format import counted
from auditexport_pipeline.core.ports import LIMITS_OF_A_BLOCK, AuditLog, Refusal, RefusalKind
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.split import SMALL_ROW, Splitter
from auditexport_pipeline.core.versions import VERSIONS

# If a view fails on a requeue, the block is sent this often, under a new token each time, until its copy can be
# counted.
COPIES_OF_A_REQUEUE = 3
# On a busy server a block can exceed a limit of memory or time by chance: it is split after the second refusal. Its
# size is the same each time.
STRIKES = {RefusalKind.MEMORY: 2, RefusalKind.TIME: 2, RefusalKind.SIZE: 1}
# A row that is not much larger than the usual one exceeds memory or time because the server is busy. It is set aside only
# after so many refusals; until then its batch waits, and others go on.
STRIKES_OF_A_USUAL_ROW = 8
MUCH_LARGER = 10
# A run waits at most this long until no INSERT of a block can be at work; otherwise it continues with other batches.
WAIT_IN_RUN_S = 5.0
# `inserted_at`s that a note names; the ledger has all of them.
NAMED_TIMES = 8
# `inserted_at`s of one query: ClickHouse takes 128 KB in one parameter.
TIMES_PER_QUERY = 2_000
WHAT_TO_RAISE = {
    RefusalKind.MEMORY: "raise max_memory_usage for this user, or give the server more memory",
    RefusalKind.SIZE: "raise the size that ClickHouse, or the proxy in front of it, takes (nginx: client_max_body_size)",
    RefusalKind.TIME: "raise insert_timeout_s, and the time-outs of a proxy in front of ClickHouse",
}
Outcome = Refusal | BaseException | None
Answers = Sequence[tuple[Block, Outcome]]


@dataclass(slots=True)
class _FailedView:
    """A view that failed after blocks were stored."""

    refusal: Refusal
    entries: int = 0
    inserted_at_ms: list[int] = field(default_factory=list)


class Attempt:
    """The state of one attempt to write a batch. `core.export.send` calls the methods in the order of this class."""

    def __init__(self, writing: Writing, log: AuditLog, limits: Limits) -> None:
        self._writing = writing
        self._log = log
        self._limits = limits
        self._splitter = Splitter(writing, log, limits)
        self._earlier_note = writing.batch.view_note
        self._failed_views: dict[str, _FailedView] = {}
        self._before: dict[int, Holding] = {}
        self._taken: list[Block] = []
        self._too_large: set[int] = set()  # numbers of the blocks to split
        self._alone: set[int] = set()  # single rows that were sent once more
        self._copies: dict[int, int] = {}  # by block number: how often a requeued block went out
        # By ClickHouse's clock: an INSERT of the batch can be at work until then.
        self.until_ms = writing.batch.inserts_until_ms

    # ── before sending ───────────────────────────────────────────────────────────────────────────

    def hold_back(self, blocks: Sequence[Block]) -> list[Block]:
        """Returns the blocks that may be sent as they are. The others exceeded a limit before and are split later."""
        self._too_large |= {block.number for block in blocks if block.limit}
        return [block for block in blocks if not block.limit]

    def note_stored(self, blocks: Sequence[Block]) -> None:
        """Notes blocks that an earlier attempt has written."""
        self._splitter.taken = self._splitter.taken or bool(blocks)

    def count_before(self, blocks: Sequence[Block]) -> None:
        """Counts the entries under the `inserted_at` of each requeued block: an increase shows that it was written."""
        times = sorted({block.inserted_at_ms for block in blocks if self._writing.batch.is_requeue(block)})
        if times:
            held = self._holdings(times)
            self._before = {at_ms: held.get(at_ms, NO_ENTRIES) for at_ms in times}

    def _holdings(self, times: Sequence[int]) -> dict[int, Holding]:
        held: dict[int, Holding] = {}
        for start in range(0, len(times), TIMES_PER_QUERY):
            held |= self._log.holdings(times[start : start + TIMES_PER_QUERY])
        return held

    # ── after sending ────────────────────────────────────────────────────────────────────────────

    def settle(self, answers: Answers) -> list[Block]:
        """Handles the answers to some INSERTs. Returns the blocks to send next.

        Durable effects: a note on a failed view, a flag on a block that is too large, and new cuts. Raises the error of
        an INSERT, unless its block is stored.
        """
        for _, outcome in answers:
            if isinstance(outcome, LeaseLost) or (
                isinstance(outcome, BaseException) and not isinstance(outcome, AuditExportError)
            ):
                raise outcome
        failed = [(block, outcome) for block, outcome in answers if outcome is not None]
        stored = self._stored(answers) if failed else set()
        missing = [(block, outcome) for block, outcome in failed if block.number not in stored]
        self._taken += [block for block, outcome in answers if outcome is None or block.number in stored]
        self._note_failed_views([(block, outcome) for block, outcome in failed if block.number in stored])
        error = self._note_limits(missing)
        if error is not None:
            raise error
        again = self._after_views(missing)
        refusals = [(block, outcome) for block, outcome in missing if isinstance(outcome, Refusal)]
        self._splitter.taken = self._splitter.taken or bool(self._taken)
        return again + self._splitter.split_refused([one for one in refusals if one[1].kind is RefusalKind.ROWS])

    def _stored(self, answers: Answers) -> set[int]:
        """The numbers of the blocks that ClickHouse has although their INSERTs got an error, or no answer.

        Of a first export, any entry under its `inserted_at` proves the block: it was written whole. (If entries were
        removed since, verification reports it.) Of a requeue, the count must have increased by exactly its rows. Merges
        can hide that; then the block counts as not written.
        """
        is_requeue = self._writing.batch.is_requeue
        failed = [(block, outcome) for block, outcome in answers if outcome is not None]
        try:
            held = self._holdings(sorted({block.inserted_at_ms for block, _ in failed}))
        except AuditExportError:
            errors = [outcome for _, outcome in failed if isinstance(outcome, BaseException)]
            if errors:
                raise errors[0] from None
            raise
        stored = {block.number for block, _ in failed if not is_requeue(block) and block.inserted_at_ms in held}
        for at_ms, before in self._before.items():
            here = [block for block, _ in failed if is_requeue(block) and block.inserted_at_ms == at_ms]
            if not here:
                continue
            acknowledged = [block for block, outcome in answers if outcome is None and block.inserted_at_ms == at_ms]
            after = held.get(at_ms, NO_ENTRIES)
            more = (after.rows - before.rows, (after.fingerprint - before.fingerprint) % 2**64)
            for written in (here, *([block] for block in here)):
                came = [*acknowledged, *written]
                if more == (sum(one.rows for one in came), sum(one.fingerprint for one in came) % 2**64):
                    stored |= {block.number for block in written}
                    break
        return stored

    def _note_failed_views(self, stored: Answers) -> None:
        refused = [(block, outcome) for block, outcome in stored if isinstance(outcome, Refusal)]
        for block, refusal in refused:
            failed = self._failed_views.setdefault(refusal.view, _FailedView(refusal))
            failed.entries += block.rows
            failed.inserted_at_ms.append(block.inserted_at_ms)
        if refused:
            self._writing.cut(self._writing.batch.blocks, note=self.note())

    def note(self) -> str:
        """For the operator: the views that failed, in this attempt or an earlier one; "" when none did."""
        table = VERSIONS[self._writing.batch.version].table
        notes = [self._earlier_note] if self._earlier_note else []
        for view, failed in self._failed_views.items():
            times = ", ".join(map(str, failed.inserted_at_ms[:NAMED_TIMES]))
            more = ", …" if len(failed.inserted_at_ms) > NAMED_TIMES else ""
            notes.append(
                f"{VIEW_NOTE}{view or f'of {table} (ClickHouse does not say which)'} failed ({failed.refusal}) after "
                f"{failed.entries:,} entries were stored: they are in {table}, and not all of them in the view's target. "
                f"Fix the view, then fill its target from {table} WHERE inserted_at IN ({times}{more})"
            )
        return "; ".join(notes)

    def _note_limits(self, missing: Answers) -> BaseException | None:
        """Flags the blocks that are too large. Returns the error that ends this attempt, if there is one."""
        batch = self._writing.batch
        error = next((outcome for _, outcome in missing if isinstance(outcome, BaseException)), None)
        struck = {
            block: outcome
            for block, outcome in missing
            if isinstance(outcome, Refusal) and outcome.kind in LIMITS_OF_A_BLOCK
        }
        if not struck:
            return error
        flagged: dict[int, Block] = {}
        for block, refusal in struck.items():
            strikes = block.strikes + 1
            split = strikes >= self._strikes_to_split(block, refusal.kind)
            fits = split and block.rows == 1 and self._another_fits(block)
            flagged[block.number] = replace(
                block, strikes=strikes, limit=f"{refusal.kind}: {refusal}" if split else "", fits=fits
            )
            if split:
                self._too_large.add(block.number)
            elif error is None:
                error = self._sent_again(block, refusal, strikes)
        self._writing.cut([flagged.get(block.number, block) for block in batch.blocks])
        return error

    def _strikes_to_split(self, block: Block, kind: RefusalKind) -> int:
        """Refusals after which a block is split, or a single row is set aside."""
        usual_row = block.rows == 1 and block.bytes < MUCH_LARGER * (self._usual_row_bytes(block) or len(SMALL_ROW))
        return STRIKES_OF_A_USUAL_ROW if usual_row and kind is not RefusalKind.SIZE else STRIKES[kind]

    def _sent_again(self, block: Block, refusal: Refusal, strikes: int) -> AuditExportError:
        """The error for a block that exceeded a limit, perhaps by chance."""
        cure = WHAT_TO_RAISE[refusal.kind]
        message = (
            f"ClickHouse did not take batch {self._writing.batch.batch_id}, block {block.number} "
            f"({counted(block.rows, 'row')}, {block.bytes:,} bytes): {refusal}. Nothing of the block is stored; it is sent again"
            f"{', and split if that happens again' if block.rows > 1 else ''}. {cure[0].upper()}{cure[1:]}"
        )
        if strikes >= STRIKES[refusal.kind]:
            return BatchWaits(message, WAIT_IN_RUN_S)
        return AuditLogUnavailable(message)

    def _usual_row_bytes(self, block: Block) -> float:
        """The average row of the batch's other blocks, in bytes; 0 when there are none."""
        others = [other for other in self._writing.batch.blocks if other.number != block.number]
        return sum(other.bytes for other in others) / max(1, sum(other.rows for other in others))

    def _another_fits(self, block: Block) -> bool:
        """Whether only this row is too large: ClickHouse took another row of usual size in this attempt.

        If no other row was sent, the parser must accept a small made-up row and refuse this one.
        """
        usual = self._usual_row_bytes(block)
        if any(taken.row_bytes * 2 >= usual for taken in self._taken):
            return True
        return self._splitter.is_too_large_alone(block)

    def _after_views(self, missing: Answers) -> list[Block]:
        """Handles blocks that are not stored, or not provably, because a view fails. A requeue is sent again."""
        again: list[Block] = []
        batch = self._writing.batch
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
                if not self.note():
                    self._writing.cut(self._writing.batch.blocks, note=str(error))
                raise error
            # The copy may have merged with the first export, or ClickHouse may know the token from an earlier attempt.
            self._writing.load(block)
            renewed = self._writing.new_number(block)
            self._copies[renewed.number] = copies + 1
            again.append(renewed)
        return again

    # ── blocks that are too large ────────────────────────────────────────────────────────────────

    def split_what_is_due(self) -> list[Block]:
        """As `split_too_large`, before anything is sent, and only if no INSERT of the batch can be at work.

        The blocks of a requeue are sent by each attempt, and each INSERT puts the split off again.
        """
        return self._split_blocks() if self._too_large and self._left_ms() < 0 else []

    def split_too_large(self) -> list[Block]:
        """Splits the blocks that exceeded a limit, once ClickHouse lacks them and no INSERT of them can be at work.

        Durable effect: the new cut. A single row that is too large becomes a dead letter if ClickHouse took other rows.
        Blocks whose rows were altered since the seal leave the batch, and their rows are pending again. Returns the
        blocks to send. Raises `BatchWaits` when it is too early, or when a single row exceeds the limit.
        """
        batch = self._writing.batch
        blocks = self._blocks_to_split()
        if not blocks:
            return []
        for block in blocks:
            if block.rows == 1 and not block.fits and block.number in self._alone:
                self._too_large.clear()
                raise BatchWaits(
                    f"ClickHouse did not take one row of {block.bytes:,} bytes alone (batch {batch.batch_id}, block "
                    f"{block.number}): {block.limit}. No row of ordinary size was taken either, so the limit is "
                    f"wrong, and nothing was set aside: {WHAT_TO_RAISE[_kind(block)]}"
                )
        left_ms = self._left_ms()
        if left_ms >= 0:
            wait_s = (left_ms + 1) / 1000
            if wait_s > WAIT_IN_RUN_S:
                raise BatchWaits(
                    f"batch {batch.batch_id}, block {blocks[0].number} ({counted(blocks[0].rows, 'row')}, "
                    f"{blocks[0].bytes:,} bytes) is too large ({blocks[0].limit}). An INSERT of it can be at work for "
                    f"another {wait_s:.0f} s; a run after that splits it. To have it taken whole, "
                    f"{WHAT_TO_RAISE[_kind(blocks[0])]}",
                    wait_s,
                )
            threads.sleep(wait_s)
            return self.split_too_large()
        return self._split_blocks()

    def _blocks_to_split(self) -> list[Block]:
        return [block for block in self._writing.batch.blocks if block.number in self._too_large]

    def _left_ms(self) -> int:
        """How long an INSERT of the batch can still be at work, by ClickHouse's clock; less than 0 when none can."""
        return self.until_ms - self._log.deadline_ms(0)

    def _split_blocks(self) -> list[Block]:
        batch, blocks = self._writing.batch, self._blocks_to_split()
        self._writing.outbox.renew(batch.claim, self._limits.lease_s)
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
                again += self._splitter.split_too_large(block)
            except BatchAltered:  # ClickHouse lacks the block and nothing sends it any more, so its rows are free
                self._writing.give_back([block])
        return again


def _kind(block: Block) -> RefusalKind:
    return RefusalKind(block.limit.partition(":")[0])
