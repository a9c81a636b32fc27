"""A batch while it is written: reads its sealed rows again, and records new cuts.

The ledger has a new cut before any of its blocks is sent. What does not belong here: the reasons for a new cut
(`core.attempt`, `core.split`), and sending (`core.export`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from auditexport_pipeline.core.batch import Batch, Block, BlockDigest, Bodies, State, batch_digest, pks_of, sealed_block
from auditexport_pipeline.core.errors import BatchAltered, InsertRefused
from auditexport_pipeline.core.event import Event, Key, OutboxRow, Undecodable, id_hash, normal_form
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Cut, DeadLetter, Outbox, StoredRow
from auditexport_pipeline.core.versions import VERSIONS

NO_ROWS = PkSet()


@dataclass(frozen=True, slots=True, kw_only=True)
class SealedRows:
    """The rows of a sealed block and their payloads as they are sent, both by pk."""

    version: str
    rows: dict[int, StoredRow]
    payloads: dict[int, bytes]

    def block_of(self, pks: Sequence[int], block: Block) -> Block:
        """The block with these rows only, sealed."""
        decode = VERSIONS[self.version].decode
        some = PkSet.of(pks)
        block = replace(block, normalised=block.normalised & some, renewed=block.renewed & some)
        fingerprint = sum(_fingerprint(decode(self.rows[pk])) for pk in pks) % 2**64
        ids = sum(id_hash(self.rows[pk].event_id) for pk in pks)
        return sealed_block(self.version, block, some, [self.payloads[pk] for pk in pks], fingerprint, ids=ids)


def read_sealed(outbox: Outbox, batch: Batch, block: Block) -> SealedRows:
    """Reads the rows of a block from the outbox. Raises `BatchAltered` when they do not have the sealed digest."""
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
    return SealedRows(version=batch.version, rows=rows, payloads=payloads)


def _fingerprint(event: Event | Undecodable) -> int:
    if isinstance(event, Undecodable):
        raise InsertRefused(
            f"a sealed row no longer decodes ({event.reason} at {event.json_path}): was the program changed?"
        )
    return event.fingerprint


class Writing:
    """A batch while one attempt writes it: `batch` as the ledger has it now, and `bodies`, the payloads in memory."""

    def __init__(self, outbox: Outbox, batch: Batch, bodies: Bodies) -> None:
        self.outbox = outbox
        self.batch = batch
        self.bodies = bodies

    # ── rows ─────────────────────────────────────────────────────────────────────────────────────

    def read(self, block: Block) -> SealedRows:
        """As `read_sealed`."""
        return read_sealed(self.outbox, self.batch, block)

    def load(self, block: Block) -> None:
        """Reads the payloads of a block into memory. Raises `BatchAltered`."""
        self.bodies[block.digest] = list(self.read(block).payloads.values())

    def rows_of(self, blocks: Iterable[Block]) -> Iterable[StoredRow]:
        """The rows of these blocks as they are in the outbox now."""
        return (row for block in blocks for row in self.outbox.read(block.pks, row_bytes=block.row_bytes))

    def _key(self, row: OutboxRow) -> Key | None:
        event = VERSIONS[self.batch.version].decode(row)
        return event.key if isinstance(event, Event) else None

    @property
    def _folded(self) -> PkSet:
        return self.batch.pks - pks_of(self.batch.blocks)

    def _keys(self, rows: Iterable[OutboxRow]) -> set[Key | None]:
        """The keys of these rows. They are needed only for folded rows: without any, nothing is read."""
        return {self._key(row) for row in rows} if self._folded else set()

    # ── new cuts ─────────────────────────────────────────────────────────────────────────────────

    def cut(
        self,
        blocks: Sequence[Block],
        *,
        dead: Sequence[DeadLetter] = (),
        released: PkSet = NO_ROWS,
        is_lost: Callable[[Key | None], bool] = lambda _: False,
        note: str | None = None,
    ) -> None:
        """Records these blocks instead of the batch's own.

        Durable effect, in one transaction: the cut, the dead letters, the note for the operator. `dead` and `released`
        rows leave the batch; `released` rows are pending again.

        A folded row is sent as the row into which it was folded. If that row leaves the batch (`is_lost` tells by the
        event's key), the folded row is released too: otherwise it would be marked although its event is nowhere.
        """
        batch, blocks = self.batch, tuple(blocks)
        orphans = NO_ROWS
        if (dead or released) and self._folded:
            rows = self.outbox.read(self._folded, row_bytes=-(-batch.bytes // max(1, batch.entries)))
            orphans = PkSet.of(row.pk for row in rows if (key := self._key(row)) is None or is_lost(key))
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
        self.outbox.replace_cut(batch.claim, cut, instead_of=batch.digest)
        size = sum(block.bytes for block in blocks)
        self.batch = replace(
            batch, state=State.SEALED, blocks=blocks, pks=pks, counts=counts, digest=cut.digest, bytes=size
        )

    def replace(
        self,
        block: Block,
        parts: Sequence[Block],
        *,
        dead: Sequence[DeadLetter] = (),
        released: PkSet = NO_ROWS,
        lost: Iterable[OutboxRow] = (),
    ) -> list[Block]:
        """As `cut`, with these parts in the place of a block; `lost` rows are sent no more. Returns the parts."""
        at = self.batch.blocks.index(block)
        blocks = [*self.batch.blocks[:at], *parts, *self.batch.blocks[at + 1 :]]
        self.cut(blocks, dead=dead, released=released, is_lost=self._keys(lost).__contains__)
        return list(parts)

    def release(self, blocks: Sequence[Block]) -> None:
        """Releases the rows of blocks that were not written."""
        others = [block for block in self.batch.blocks if block not in blocks]
        lost = self._keys(self.rows_of(blocks))
        self.cut(others, released=pks_of(blocks), is_lost=lost.__contains__)

    def give_back(self, altered: Sequence[Block]) -> None:
        """Releases the rows of blocks whose rows were altered, and counts them.

        Call it only when no INSERT of these blocks can be at work any more, and ClickHouse was asked after that and has
        none of them. Blocks of a requeue may be there nevertheless: they stay in the ledger as given back, so that
        their copies are not called duplicates. The batch is sealed again, and its new owner sends the other blocks.
        """
        self.may_be_sent(*(block for block in altered if self.batch.is_requeue(block)))
        others = [block for block in self.batch.blocks if block not in altered]
        # The altered rows may have other keys now. So every key that no other block has is lost.
        still_there = self._keys(self.rows_of(others))
        self.cut(others, released=pks_of(altered), is_lost=lambda key: key not in still_there)

    def new_number(self, block: Block) -> Block:
        """Gives a requeued block another number, and so another token. The copy under the old token may be there too."""
        renewed = replace(block, number=self.next_number())
        self.may_be_sent(block)
        self.replace(block, [renewed])
        return renewed

    def may_be_sent(self, *blocks: Block) -> None:
        """Notes, for the next cut, blocks of a requeue that leave the batch although they may have been sent."""
        self.batch = replace(self.batch, given_back=(*self.batch.given_back, *blocks))

    def next_number(self) -> int:
        """A number that no block of this batch has or had: tokens contain it."""
        return max(block.number for block in (*self.batch.blocks, *self.batch.given_back)) + 1
