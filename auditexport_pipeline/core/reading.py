"""The rows of a claimed batch: reads and decodes them, and groups them into the blocks of the seal.

What does not belong here: the seal's durable effect (`core.export`), and which rows repeat an event (`core.origins`).
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable
from dataclasses import replace

from auditexport_pipeline.core.batch import (
    SMALLEST_BLOCK_ROWS,
    Batch,
    Block,
    Bodies,
    Counts,
    batch_digest,
    pks_of,
    sealed_block,
)
from auditexport_pipeline.core.event import Event, Key, OutboxRow, Undecodable, id_hash
from auditexport_pipeline.core.origins import prove
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Cut, DeadLetter, Outbox, StoredRow
from auditexport_pipeline.core.versions import VERSIONS

# A batch may be this much larger than its estimate; the rows beyond are released.
BYTES_TOLERANCE = 1.5


class _Part:
    """A block while its rows are read: their payloads, and a few numbers per row."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.pks = array("Q")
        self.fingerprints = array("Q")
        self.payloads: list[bytes] = []
        self.ids = 0

    def add(self, pk: int, payload: bytes, fingerprint: int) -> None:
        self.pks.append(pk)
        self.payloads.append(payload)
        self.fingerprints.append(fingerprint)

    def without(self, folded: set[int]) -> tuple[PkSet, list[bytes], int]:
        """The pks, payloads and fingerprint of the rows that are not folded."""
        if folded.isdisjoint(self.pks):
            return PkSet.of(self.pks), self.payloads, sum(self.fingerprints) % 2**64
        left = [index for index, pk in enumerate(self.pks) if pk not in folded]
        fingerprint = sum(self.fingerprints[index] for index in left) % 2**64
        return PkSet.of(self.pks[index] for index in left), [self.payloads[index] for index in left], fingerprint


class ClaimedRows:
    """The rows of a claimed batch. Call `read`, for a requeue `regroup`, and then `seal`."""

    def __init__(self, batch: Batch) -> None:
        self.dead: list[DeadLetter] = []
        self.keys: dict[int, Key] = {}  # of a requeue: by pk, of the rows to send
        self._batch = batch
        self._decode: Callable[[OutboxRow], Event | Undecodable] = VERSIONS[batch.version].decode
        self._parts = [_Part(block) for block in batch.blocks]
        self._folded: set[int] = set()
        self._found = self._elsewhere = self._released = 0
        self._oldest_ms: int | None = None
        self._newest_ms: int | None = None

    def read(self, outbox: Outbox, batch_bytes: int) -> None:
        """Reads the rows by pk and decodes them. Rows far beyond `batch_bytes` are released."""
        batch = self._batch
        last_with_key: dict[int, int] = {}  # by the hash of the key: the position of the last such row in the batch
        position = total_bytes = 0
        for part in self._parts:
            if self._released:
                self._released += part.block.rows
                continue
            for row in outbox.read(part.block.pks, row_bytes=part.block.row_bytes, version=batch.version):
                total_bytes += len(row.payload)
                if self._found and total_bytes > batch_bytes * BYTES_TOLERANCE:
                    self._released = sum(1 for pk in part.block.pks if pk >= row.pk)
                    break
                self._found += 1
                if row.exported_at_ms is not None:
                    self._elsewhere += 1
                    continue
                event = self._decode(row)
                if isinstance(event, Undecodable):
                    self.dead.append(DeadLetter.of(row, event))
                    continue
                place = hash(event.key)
                if (earlier := last_with_key.get(place)) is not None:
                    self._fold(earlier, row, event)
                last_with_key[place] = position
                position += 1
                part.add(row.pk, row.payload, event.fingerprint)
                part.ids += id_hash(row.event_id)
                if batch.generation:
                    self.keys[row.pk] = event.key
                at_ms = event.key[2]
                if self._oldest_ms is None or at_ms < self._oldest_ms:
                    self._oldest_ms = at_ms
                if self._newest_ms is None or at_ms > self._newest_ms:
                    self._newest_ms = at_ms
        for pk in self._folded & self.keys.keys():
            del self.keys[pk]

    def _fold(self, earlier: int, row: StoredRow, event: Event) -> None:
        """Folds the earlier row into this one, if it has the same key and not only the same hash. The later row is
        sent, as a merge in ClickHouse keeps the later entry.
        """
        for part in self._parts:
            if earlier < len(part.pks):
                break
            earlier -= len(part.pks)
        pk, payload = part.pks[earlier], part.payloads[earlier]
        ids = {"event_id": row.event_id, "workspace_id": row.workspace_id}
        other = self._decode(OutboxRow(pk=pk, payload=payload, **ids))
        if isinstance(other, Event) and other.key == event.key:
            self._folded.add(pk)

    def regroup(self, outbox: Outbox, log: AuditLog, blocks: int) -> None:
        """Groups the rows of a requeue anew: a part for each `inserted_at` that rows are proven to have had, and at
        most so many parts of new rows, unless those are small. Asks ClickHouse; reserves `inserted_at`s for the new
        rows.
        """
        origins = prove(outbox, log, self._batch, self.keys)
        rows = sorted(self._rows())
        new = sum(1 for pk, _, _ in rows if pk not in origins.times)
        block_rows = max(SMALLEST_BLOCK_ROWS, -(-new // blocks))
        reserved = iter(outbox.reserve_inserted_at(-(-new // block_rows)) if new else ())
        by_time: dict[int, _Part] = {}
        new_parts: list[_Part] = []
        for pk, payload, fingerprint in rows:
            at_ms = origins.times.get(pk)
            if at_ms is not None:
                if at_ms not in by_time:
                    by_time[at_ms] = _Part(Block(number=0, inserted_at_ms=at_ms, pks=PkSet()))
                part = by_time[at_ms]
            else:
                if not new_parts or len(new_parts[-1].pks) == block_rows:
                    new_parts.append(_Part(Block(number=0, inserted_at_ms=next(reserved), pks=PkSet(), first=True)))
                part = new_parts[-1]
            part.add(pk, payload, fingerprint)
        parts = [*(part for _, part in sorted(by_time.items())), *new_parts]
        parts[0].ids = sum(part.ids for part in self._parts)
        for number, part in enumerate(parts):
            renewed = origins.renewed & PkSet.of(part.pks) if part.block.first else PkSet()
            part.block = replace(part.block, number=number, renewed=renewed)
        self._parts = parts

    def _rows(self) -> Iterable[tuple[int, bytes, int]]:
        for part in self._parts:
            for pk, payload, fingerprint in zip(part.pks, part.payloads, part.fingerprints, strict=True):
                if pk not in self._folded:
                    yield pk, payload, fingerprint

    def seal(self) -> tuple[Cut, Bodies]:
        """The cut that fixes these rows, and the payloads of its blocks."""
        batch = self._batch
        bodies: Bodies = {}
        blocks: list[Block] = []
        ids = 0  # goes to the next block when all rows of a block are folded
        for part in self._parts:
            pks, payloads, fingerprint = part.without(self._folded)
            ids += part.ids
            if pks:
                block = sealed_block(batch.version, part.block, pks, payloads, fingerprint, ids=ids)
                ids = 0
                bodies[block.digest] = payloads
                blocks.append(block)
        folded = PkSet.of(sorted(self._folded))
        cut = Cut(
            blocks=tuple(blocks),
            pks=pks_of(blocks) | folded,
            counts=Counts(
                dead=len(self.dead),
                folded=len(folded),
                vanished=batch.rows - self._released - self._found,
                elsewhere=self._elsewhere,
                released=self._released,
            ),
            digest=batch_digest(blocks, folded),
            dead_letters=tuple(self.dead),
            oldest_ms=self._oldest_ms,
            newest_ms=self._newest_ms,
            generation=batch.generation if any(batch.is_requeue(block) for block in blocks) else 0,
        )
        return cut, bodies
