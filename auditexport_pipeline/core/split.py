"""Splits a sealed block of which ClickHouse refuses rows, or which is too large.

What belongs here: comparing rows with their seal, the new blocks, and the rows that leave the batch: dead letters, held
rows, released rows. What does not: sending (`core.export`), and which rows to probe next (`core.poison`). The ledger
has a new cut before any of its blocks is sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from auditexport_pipeline.core.batch import (
    Batch,
    Block,
    BlockDigest,
    Bodies,
    State,
    batch_digest,
    pks_of,
    sealed_block,
)
from auditexport_pipeline.core.errors import BatchAltered, InsertRefused, TableRefuses
from auditexport_pipeline.core.event import Event, Key, OutboxRow, Undecodable, explain, id_hash, normal_form
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.poison import Group, ProbeBudget, next_to_halve, search
from auditexport_pipeline.core.ports import (
    LIMITS_OF_A_BLOCK,
    AuditLog,
    Cut,
    DeadLetter,
    Outbox,
    Refusal,
    StoredRow,
)
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS

# A block that is too large is split into twice as many parts each time, and at most into this many.
MOST_PARTS = 16
# A row within every limit; each payload version takes the fields that it knows.
SMALL_ROW = (
    b'{"event_id":"evt_small","time":1700000000000,"workspace_id":"ws_small","bucket":"b","source":"platform","event":"a.b",'
    b'"description":"a small row","actor":{"type":"user","id":"u","name":"n","meta":{"k":1}},"meta":{"k":[1,"a"]},'
    b'"targets":[{"type":"key","id":"k","name":"n","meta":{"k":1}}]}'
)
# Rows that are sent alone, to find out whether the table refuses all rows; of a smaller batch, all rows. Each attempt
# chooses other rows, so that a batch with one good row is not stuck.
SAMPLE = 32
# Fewer refused rows than this do not show that the table refuses all rows.
FEW_ROWS = 3
# Rows checked between lease renewals: half a second at 25 µs a row.
ROWS_PER_RENEWAL = 20_000
NO_ROWS = PkSet()


# ── a sealed block, read again ───────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedRows:
    """The rows of a sealed block and their payloads as they are sent, both by pk."""

    version: str
    rows: dict[int, StoredRow]
    payloads: dict[int, bytes]

    @classmethod
    def read(cls, outbox: Outbox, batch: Batch, block: Block) -> SealedRows:
        """Reads the rows from the outbox. Raises `BatchAltered` when they do not have the sealed digest."""
        rows = {row.pk: row for row in outbox.read(block.pks, row_bytes=block.row_bytes)}
        payloads = {pk: normal_form(row.payload) if pk in block.normalised else row.payload for pk, row in rows.items()}
        digest = BlockDigest(batch.version, block.inserted_at_ms, PkSet.of(rows))
        digest.add(list(payloads.values()))
        if str(digest) != block.digest:
            gone = block.rows - len(rows)
            raise BatchAltered(
                f"batch {batch.batch_id}, block {block.number}: of {block.rows} sealed rows {gone} are gone from the outbox"
                f"{'' if gone else ' but some were changed'} before ClickHouse had them; nothing of the block was written. "
                "Find out who deletes or changes outbox rows; once the lease has ended, the next run gives the remaining "
                "rows back to the backlog and exports them in a new batch"
            )
        return cls(version=batch.version, rows=rows, payloads=payloads)

    def group(self, pks: Iterable[int]) -> Group:
        return Group.of({pk: self.rows[pk].workspace_id for pk in pks})

    def block_of(self, pks: Sequence[int], block: Block, bodies: Bodies) -> Block:
        """The block with these rows only, sealed; `bodies` gets its payloads."""
        decode = VERSIONS[self.version].decode
        some = PkSet.of(pks)
        block = replace(block, normalised=block.normalised & some, renewed=block.renewed & some)
        payloads = [self.payloads[pk] for pk in pks]
        fingerprint = sum(_fingerprint(decode(self.rows[pk])) for pk in pks) % 2**64
        ids = sum(id_hash(self.rows[pk].event_id) for pk in pks)
        sealed = sealed_block(self.version, block, some, payloads, fingerprint, ids=ids)
        bodies[sealed.digest] = payloads
        return sealed


def read_payloads(outbox: Outbox, batch: Batch, block: Block) -> list[bytes]:
    """The payloads of a sealed block, read again. Raises `BatchAltered` when they do not have the sealed digest."""
    return list(SealedRows.read(outbox, batch, block).payloads.values())


def _fingerprint(event: Event | Undecodable) -> int:
    if isinstance(event, Undecodable):
        raise InsertRefused(
            f"a sealed row no longer decodes ({event.reason} at {event.json_path}): was the program changed?"
        )
    return event.fingerprint


# ── a new cut ────────────────────────────────────────────────────────────────────────────────────


def new_cut(
    outbox: Outbox,
    batch: Batch,
    blocks: tuple[Block, ...],
    *,
    dead: Sequence[DeadLetter] = (),
    released: PkSet = NO_ROWS,
    is_lost: Callable[[Key | None], bool] = lambda _: False,
    note: str | None = None,
) -> Batch:
    """Records these blocks instead of the batch's own, and returns the batch as the ledger has it now.

    Durable effect, in one transaction: the cut, the dead letters, the note for the operator. `dead` and `released` rows
    leave the batch; `released` rows are pending again.

    A folded row is sent as the row into which it was folded. If that row leaves the batch (`is_lost` tells by the
    event's key), the folded row is released too: otherwise it would be marked although its event is nowhere.
    """
    orphans = NO_ROWS
    if (dead or released) and (folded := _folded(batch)):
        rows = outbox.read(folded, row_bytes=-(-batch.bytes // max(1, batch.entries)))
        orphans = PkSet.of(row.pk for row in rows if (key := _key(batch, row)) is None or is_lost(key))
    held = sum(letter.held for letter in dead)
    counts = replace(
        batch.counts,
        dead=batch.counts.dead + len(dead) - held,
        released=batch.counts.released + len(released) + len(orphans) + held,
        folded=batch.counts.folded - len(orphans),
    )
    pks = batch.pks - PkSet.of(sorted(letter.pk for letter in dead)) - released - orphans
    cut = Cut(
        blocks=blocks,
        pks=pks,
        counts=counts,
        digest=batch_digest(blocks, pks - pks_of(blocks)),
        given_back=batch.given_back,
        dead_letters=tuple(dead),
        note=note,
    )
    outbox.replace_cut(batch.claim, cut, instead_of=batch.digest)
    return replace(
        batch,
        state=State.SEALED,
        blocks=blocks,
        pks=pks,
        counts=counts,
        digest=cut.digest,
        bytes=sum(block.bytes for block in blocks),
    )


def give_back(outbox: Outbox, batch: Batch, altered: list[Block]) -> Batch:
    """Releases the rows of blocks whose rows were altered, and counts them.

    Call it only when no INSERT of these blocks can be at work any more, and ClickHouse was asked after that and has
    none of them. Blocks of a requeue may be there nevertheless: they stay in the ledger as given back, so that their
    copies are not called duplicates. The batch is sealed again, and its new owner sends the other blocks.
    """
    requeued = tuple(block for block in altered if batch.is_requeue(block))
    if requeued:
        batch = replace(batch, given_back=(*batch.given_back, *requeued))
    others = tuple(block for block in batch.blocks if block not in altered)
    # The altered rows may have other keys now. So every key that no other block has is lost.
    still_there = _keys(batch, _rows_of(outbox, others))
    return new_cut(outbox, batch, others, released=pks_of(altered), is_lost=lambda key: key not in still_there)


def new_number(outbox: Outbox, batch: Batch, block: Block) -> tuple[Batch, Block]:
    """Gives a requeued block another number, and so another token. The copy under the old token may be there too."""
    renewed = replace(block, number=_next_number(batch))
    batch = replace(batch, given_back=(*batch.given_back, block))
    return new_cut(outbox, batch, _with_parts(batch, block, [renewed])), renewed


def _folded(batch: Batch) -> PkSet:
    return batch.pks - pks_of(batch.blocks)


def _key(batch: Batch, row: OutboxRow) -> Key | None:
    event = VERSIONS[batch.version].decode(row)
    return event.key if isinstance(event, Event) else None


def _keys(batch: Batch, rows: Iterable[OutboxRow]) -> set[Key | None]:
    """The keys of these rows. They are needed only for folded rows: without any, nothing is read."""
    return {_key(batch, row) for row in rows} if _folded(batch) else set()


def _rows_of(outbox: Outbox, blocks: Iterable[Block]) -> Iterable[StoredRow]:
    return (row for block in blocks for row in outbox.read(block.pks, row_bytes=block.row_bytes))


def _with_parts(batch: Batch, block: Block, parts: Sequence[Block]) -> tuple[Block, ...]:
    """The batch's blocks, with these parts instead of that block."""
    position = batch.blocks.index(block)
    return (*batch.blocks[:position], *parts, *batch.blocks[position + 1 :])


def _next_number(batch: Batch) -> int:
    """A number that no block of this batch has or had: tokens contain it."""
    return max(block.number for block in (*batch.blocks, *batch.given_back)) + 1


# ── one attempt's splits ─────────────────────────────────────────────────────────────────────────


class Splitter:
    """Splits blocks of one batch, for one attempt to write it, within the attempt's budget of probes.

    A refused block was not written, so its rows may leave the batch. Rows that are unresolved when the budget is spent
    are released; the next drain begins without the dead letters of this one and resolves more.
    """

    def __init__(self, outbox: Outbox, log: AuditLog, limits: Limits) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._budget = ProbeBudget()
        # By block number. The parser takes these rows and the table does not, for example because of a constraint. So
        # parsing cannot find the refused rows: each half becomes a block, and its INSERT is the probe.
        self._groups: dict[int, Group] = {}
        self._waiting: list[tuple[Group, Block]] = []  # refused, to be halved
        # Single rows that the table refuses, with its answer: they are held once another row was taken.
        self._refused_alone: list[tuple[Block, Refusal]] = []
        self._sampled = False
        self.taken = False  # whether ClickHouse has any row of the batch

    def split_refused(
        self, batch: Batch, refused: list[tuple[Block, Refusal]], bodies: Bodies
    ) -> tuple[Batch, list[Block]]:
        """Finds the rows for which ClickHouse refused these blocks, and cuts the blocks again without them.

        The poison rows become dead letters, unless ClickHouse takes their normal form (a repeated key). Durable
        effect: each new cut with its dead letters, in one transaction. Returns the blocks to send; `bodies` gets
        their payloads.
        """
        to_send: list[Block] = []
        # Single rows first: if the table refuses several of them, larger blocks are not sampled again.
        for block, refusal in sorted(refused, key=lambda one: one[0].rows):
            batch, parts = self._split_one(batch, block, refusal, bodies)
            to_send += parts
        if self._refused_alone:
            batch = self._hold(batch, to_send)
        while self._waiting and not to_send:
            if self._budget.left < 2:
                return self._release_waiting(batch), []
            group, block = self._waiting.pop(next_to_halve([group for group, _ in self._waiting], self._budget))
            self._budget.left -= 2
            sealed = SealedRows.read(self._outbox, batch, block)
            batch, to_send = self._divide(batch, block, sealed, group.halves(), bodies)
        return batch, to_send

    def _split_one(self, batch: Batch, block: Block, refusal: Refusal, bodies: Bodies) -> tuple[Batch, list[Block]]:
        group = self._groups.get(block.number)
        if group is not None and len(group) > 1:
            self._waiting.append((group, block))
            return batch, []
        sealed = SealedRows.read(self._outbox, batch, block)
        rows = sealed.rows
        dead: dict[int, DeadLetter] = {}
        normalised: set[int] = set()
        unresolved: set[int] = set()
        if group is None:
            problems = self._explain(batch, sealed.payloads)
            dead = {pk: DeadLetter.of(rows[pk], problem) for pk, problem in problems.items() if problem is not None}
            normalised = {pk for pk, problem in problems.items() if problem is None}
            if len(dead) < len(rows):
                found = search(
                    sealed.group(pk for pk in rows if pk not in dead),
                    lambda pks: self._probe(batch, [sealed.payloads[pk] for pk in pks]),
                    self._budget,
                )
                unresolved = set(found.unresolved)
                for pk, answer in found.refused.items():
                    problem = explain(rows[pk].payload) if pk in normalised else None
                    dead[pk] = DeadLetter.of(rows[pk], problem or _refused(answer))
        if not dead and not normalised and not unresolved:
            return self._split_later(batch, block, refusal, sealed, bodies)
        good = [pk for pk in rows if pk not in dead and pk not in unresolved]
        as_sent = replace(block, normalised=block.normalised | PkSet.of(sorted(normalised)))
        parts = [sealed.block_of(good, as_sent, bodies)] if good else []
        batch = new_cut(
            self._outbox,
            batch,
            _with_parts(batch, block, parts),
            dead=tuple(dead.values()),
            released=PkSet.of(sorted(unresolved)),
            is_lost=_keys(batch, (rows[pk] for pk in (*dead, *unresolved))).__contains__,
        )
        return batch, parts

    def _split_later(
        self, batch: Batch, block: Block, refusal: Refusal, sealed: SealedRows, bodies: Bodies
    ) -> tuple[Batch, list[Block]]:
        """Handles a block whose rows all parse: only INSERTs can find the rows that the table refuses."""
        group = sealed.group(sealed.rows)
        if len(group) == 1:
            self._refused_alone.append((block, refusal))
            return batch, []
        may_be_all = not self.taken and not self._sampled and not self._refused_alone
        if may_be_all and len(group) > SAMPLE and self._budget.left > 2 * SAMPLE:
            self._sampled = True
            self._budget.left -= SAMPLE + 1
            chosen = set(random.Random(f"{batch.batch_id} {batch.epoch}").sample(range(len(group)), SAMPLE))
            rest = Group([row for index, row in enumerate(group.rows) if index not in chosen])
            alone = [Group([group.rows[index]]) for index in sorted(chosen)]
            return self._divide(batch, block, sealed, [rest, *alone], bodies)
        self._groups[block.number] = group
        self._waiting.append((group, block))
        return batch, []

    def _hold(self, batch: Batch, to_send: list[Block]) -> Batch:
        """Holds the single rows that the table refuses. Raises `TableRefuses` if the table has refused every row that
        was sent, and has taken no row of another batch since its definition changed.
        """
        none_taken = not self.taken and not to_send
        if none_taken and self._waiting and batch.entries <= SAMPLE and self._budget.left >= 2:
            return batch  # the table may take one of the rows that wait
        refused, self._refused_alone = self._refused_alone, []
        if none_taken and len(refused) >= FEW_ROWS:
            # If all rows are of one workspace, its data can be the reason: they are searched and held.
            workspaces = {row.workspace_id for row in _rows_of(self._outbox, (block for block, _ in refused))}
            if len(workspaces) > 1 and not self._table_takes_other_batches(batch):
                self._waiting = []
                raise TableRefuses(
                    f"{VERSIONS[batch.version].table} refuses all {len(refused):,} rows of batch {batch.batch_id} that were each "
                    f"sent alone (of {batch.entries:,}), and all of them parse: {_refused_by(refused[0][1])}. The table's "
                    "definition is wrong, not the rows: look at SHOW CREATE TABLE for a column, constraint or index that "
                    "somebody added, and drop or fix it. Nothing was set aside, and the next run sends the rows"
                )
        for block, refusal in refused:
            problem = Undecodable(reason="refused_by_table", json_path=refusal.definition, detail=_refused_by(refusal))
            batch = self._set_aside(batch, block, SealedRows.read(self._outbox, batch, block), problem, held=True)
        return batch

    def _table_takes_other_batches(self, batch: Batch) -> bool:
        return self._outbox.written_within(batch.version, self._log.definition_age_s(batch.version))

    def _explain(self, batch: Batch, payloads: dict[int, bytes]) -> dict[int, Undecodable | None]:
        """The problem of each row that has one, by pk; None for a repeated key, which is put in normal form."""
        problems: dict[int, Undecodable | None] = {}
        for number, (pk, payload) in enumerate(payloads.items()):
            if number % ROWS_PER_RENEWAL == 0:
                self._outbox.renew(batch.claim, self._limits.lease_s)
            problem = explain(payload)
            if problem is None:
                continue
            if problem.reason == "duplicate_key" and explain(text := normal_form(payload)) is None:
                payloads[pk] = text
                problem = None
            problems[pk] = problem
        return problems

    def _probe(self, batch: Batch, payloads: list[bytes]) -> Refusal | None:
        self._outbox.renew(batch.claim, self._limits.lease_s)
        return self._log.probe(batch.version, payloads, timeout_s=self._limits.insert_timeout_s)

    def is_too_large_alone(self, batch: Batch, block: Block) -> bool:
        """Whether the block's only row exceeds a limit of the parser, and a small row does not."""
        (row,) = read_payloads(self._outbox, batch, block)
        if self._probe(batch, [SMALL_ROW]) is not None:
            return False
        refusal = self._probe(batch, [row])
        return refusal is not None and refusal.kind in LIMITS_OF_A_BLOCK

    def split_too_large(self, batch: Batch, block: Block, bodies: Bodies) -> tuple[Batch, list[Block]]:
        """Splits a block that is too large. A single row becomes a dead letter, or is sent once more if `fits` is
        false.

        The caller has made sure that ClickHouse lacks the block and that no INSERT of it can be at work. Each part of a
        first export gets an `inserted_at` of its own. The parts of a requeue keep theirs, and the block stays in the
        ledger as given back, because an earlier attempt may have sent it.
        """
        sealed = SealedRows.read(self._outbox, batch, block)
        if block.rows == 1 and block.fits:
            problem = Undecodable(reason="too_large_for_clickhouse", detail=block.limit)
            return self._set_aside(batch, block, sealed, problem), []
        if block.rows == 1:
            again = replace(block, limit="")
            bodies[block.digest] = list(sealed.payloads.values())
            return new_cut(self._outbox, batch, _with_parts(batch, block, [again])), [again]
        if batch.is_requeue(block):
            batch = replace(batch, given_back=(*batch.given_back, block))
        pks = list(sealed.rows)
        count = min(block.rows, MOST_PARTS, 2 ** max(1, block.strikes - 1))
        parts = [pks[len(pks) * n // count : len(pks) * (n + 1) // count] for n in range(count)]
        return self._replace(batch, block, sealed, parts, self._new_blocks(batch, block, count), bodies)

    def _divide(
        self, batch: Batch, block: Block, sealed: SealedRows, groups: Sequence[Group], bodies: Bodies
    ) -> tuple[Batch, list[Block]]:
        """Divides a refused block into a block for each group; the first keeps number and `inserted_at`."""
        shells = [block, *self._new_blocks(batch, block, len(groups) - 1)]
        self._groups |= {shell.number: group for shell, group in zip(shells, groups, strict=True)}
        return self._replace(batch, block, sealed, [group.pks for group in groups], shells, bodies)

    def _new_blocks(self, batch: Batch, block: Block, count: int) -> list[Block]:
        """Copies of the block, each with a new number and, unless it is a requeue, a new `inserted_at`."""
        number = _next_number(batch)
        at_ms = [block.inserted_at_ms] * count if batch.is_requeue(block) else self._outbox.reserve_inserted_at(count)
        return [replace(block, number=number + n, inserted_at_ms=at_ms[n], limit="", fits=False) for n in range(count)]

    def _replace(
        self,
        batch: Batch,
        block: Block,
        sealed: SealedRows,
        parts: Sequence[Sequence[int]],
        shells: Sequence[Block],
        bodies: Bodies,
    ) -> tuple[Batch, list[Block]]:
        """Replaces the block by `shells`, each with the rows of its part."""
        blocks = [sealed.block_of(pks, shell, bodies) for pks, shell in zip(parts, shells, strict=True)]
        return new_cut(self._outbox, batch, _with_parts(batch, block, blocks)), blocks

    def _set_aside(
        self, batch: Batch, block: Block, sealed: SealedRows, problem: Undecodable, *, held: bool = False
    ) -> Batch:
        """Removes a block from the batch: each of its rows becomes a dead letter, or is held."""
        return new_cut(
            self._outbox,
            batch,
            _with_parts(batch, block, []),
            dead=[replace(DeadLetter.of(row, problem), held=held) for row in sealed.rows.values()],
            is_lost=_keys(batch, sealed.rows.values()).__contains__,
        )

    def _release_waiting(self, batch: Batch) -> Batch:
        """Releases the rows of the blocks that still wait; none of these blocks was written."""
        blocks = [block for _, block in self._waiting]
        self._waiting = []
        others = tuple(block for block in batch.blocks if block not in blocks)
        lost = _keys(batch, _rows_of(self._outbox, blocks))
        return new_cut(self._outbox, batch, others, released=pks_of(blocks), is_lost=lost.__contains__)


def _refused(refusal: Refusal) -> Undecodable:
    return Undecodable(reason="refused_by_clickhouse", detail=f"code {refusal.code} ({refusal.name})")


def _refused_by(refusal: Refusal) -> str:
    """The part of the table that refuses a row, as far as ClickHouse names it."""
    part = f"column {refusal.column}" if refusal.column else "a column or an index of the table"
    return f"{f'constraint {refusal.constraint}' if refusal.constraint else part} ({refusal})"
