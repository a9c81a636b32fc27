"""Exporting, as five verbs: claim, fetch, write, mark, verify.

What belongs here: the order of durable effects, and what each verb does with what an earlier attempt
left. What does not: SQL (`stores`), Dagster (`defs`), and the clock: databases tell the time.

Every verb may be run again after any crash, by the same run or by another, and picks up where the
ledger says it stands. The crash that each line survives is named beside it.
"""

from __future__ import annotations

import time
from array import array
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import islice

from auditexport_pipeline.core.batch import (
    Batch,
    Block,
    Claim,
    Counts,
    Receipt,
    State,
    batch_digest,
    block_digest,
)
from auditexport_pipeline.core.errors import BatchAltered, InsertRefused, LeaseLost
from auditexport_pipeline.core.event import VERSIONS, Event, OutboxRow, Undecodable, explain, normal_form
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import (
    AuditLog,
    Cut,
    DeadLetter,
    Marked,
    Outbox,
    PlannedBlock,
    Planning,
    Refusal,
    StoredRow,
)

# Below this a second INSERT costs more than it saves: a part of its own, a round trip, a merge later.
SMALLEST_BLOCK_ROWS = 5_000
# A plan's first batch; each further one may be twice as large, up to `batch_rows`. With 100,000 rows at once
# ClickHouse waited four seconds for the first block, and MySQL as long for the first rows to mark.
FIRST_BATCH_ROWS = 25_000
# Rows measured of each page of candidates: few enough to cost nothing, enough to see where large ones begin.
SAMPLED_ROWS = 64
# A batch may turn out this much larger than its estimate before it gives the rest of its rows back.
BYTES_TOLERANCE = 1.5
# Look-ups for earlier exports of a batch's rows: pending rows lie together, but for a few that came back.
ORIGIN_SPANS = 8


# ── claim ────────────────────────────────────────────────────────────────────────────────────────


def claim(outbox: Outbox, *, owner: str, dead_owners: Collection[str], limits: Limits) -> list[Claim]:
    """Adopts what dead owners left open, then cuts new batches from pending rows, oldest pk first.

    Source: the ledger, and `drainer_pending_idx` of the outbox. Durable effect: the returned batches are
    in the ledger under a new epoch. Loads pks only for what it claims. Idempotent: run again by the same
    owner it adopts what it claimed before.
    """
    with outbox.planning(owner, limits.lease_s) as ledger:
        claims: list[Claim] = []
        held = PkSet()
        for open_batch in ledger.open_batches():
            batch = open_batch.batch
            held |= batch.pks
            abandoned = open_batch.lease_expired
            if batch.state is not State.STOPPED:  # a stopped one waits until no INSERT of it can be running
                abandoned = abandoned or batch.owner == owner or batch.owner in dead_owners
            if abandoned and len(claims) < limits.max_batches:
                claims.append(ledger.adopt(batch))
        for position, version in enumerate(limits.versions):
            room = -(-(limits.max_batches - len(claims)) // (len(limits.versions) - position))
            claims.extend(_cut_new(ledger, version, held, room, limits))
        return claims


def _cut_new(ledger: Planning, version: str, held: PkSet, room: int, limits: Limits) -> Iterator[Claim]:
    """New batches of one version, at most `room`: each from one page of candidates, as far as its bytes allow.

    The first ones are small and grow, so that every stage of the pipeline soon has work.
    """
    after_pk = 0
    batches = 0
    batch_rows = min(FIRST_BATCH_ROWS, limits.batch_rows)
    while batches < room:
        while (run := held.run_of(after_pk + 1)) is not None:
            after_pk = run[1]
        page = ledger.candidates(version, after_pk, batch_rows)
        if not page:
            return
        after_pk = page.last
        free = page - held
        if not free:
            continue
        pks, size = _within_bytes(ledger, free, limits.batch_bytes)
        if len(pks) < len(free):
            after_pk = pks.last
        for new in islice(_add(ledger, version, pks, size, limits), room - batches):
            batches += 1
            yield new
        # Where bytes and not rows cut batches, longer pages would be read for nothing.
        taken = batch_rows if len(pks) == len(free) else len(pks)
        batch_rows = min(limits.batch_rows, max(FIRST_BATCH_ROWS, 2 * taken))


def _within_bytes(ledger: Planning, pks: PkSet, most_bytes: int) -> tuple[PkSet, int]:
    """The first of these pks whose payloads come to `most_bytes`, at least one, and their estimated bytes.

    Each measured row stands for the stretch of rows that it begins, because measuring every row would read
    every row a second time; `fetch` sees the real sizes and keeps the bound.
    """
    stretches = list(pks.chunks(-(-len(pks) // SAMPLED_ROWS)))
    measured = ledger.payload_bytes([stretch.first for stretch in stretches])
    usual = sum(measured.values()) // len(measured) if measured else 0
    rows = size = 0
    for stretch in stretches:
        row_bytes = measured.get(stretch.first, usual)
        # At least one: a row larger than the limit goes alone.
        fitting = max(int(rows == 0), min(len(stretch), (most_bytes - size) // max(1, row_bytes)))
        rows += fitting
        size += fitting * row_bytes
        if fitting < len(stretch):
            break
    return next(pks.chunks(rows)), size


def _add(ledger: Planning, version: str, pks: PkSet, size: int, limits: Limits) -> Iterator[Claim]:
    """One batch of rows never exported, and one of rows that are pending again, with their old `inserted_at`."""
    row_bytes = size // len(pks)
    again: dict[int, int] = {}
    generation = 0
    # By spans: one old row among new ones must not ask for every batch between them.
    found = {origin.batch_id: origin for span in pks.spans(ORIGIN_SPANS) for origin in ledger.exported_over(*span)}
    for _, origin in sorted(found.items()):
        overlap = pks & origin.pks
        if overlap and origin.version == version:
            generation = max(generation, origin.generation + 1)
            at = {pk: block.inserted_at_ms for block in origin.blocks for pk in overlap & block.pks}
            # A folded row went out as another row's entry: any of the batch's blocks names its month.
            again.update({pk: at.get(pk, origin.blocks[-1].inserted_at_ms) for pk in overlap if origin.blocks})
    fresh = pks - PkSet.of(sorted(again))
    if fresh:
        block_rows = max(SMALLEST_BLOCK_ROWS, -(-len(fresh) // limits.blocks_per_batch))
        blocks = [PlannedBlock(pks=chunk, bytes=row_bytes * len(chunk)) for chunk in fresh.chunks(block_rows)]
        yield ledger.add(version, 0, blocks)
    if again:
        by_time: dict[int, list[int]] = {}
        for pk, at_ms in again.items():
            by_time.setdefault(at_ms, []).append(pk)
        blocks = [
            PlannedBlock(pks=PkSet.of(sorted(group)), bytes=row_bytes * len(group), inserted_at_ms=at_ms)
            for at_ms, group in sorted(by_time.items())
        ]
        yield ledger.add(version, generation, blocks)


# ── fetch and seal ───────────────────────────────────────────────────────────────────────────────


# A sealed batch's payloads in the order of its pks, by block number.
Bodies = dict[int, list[bytes]]


@dataclass(slots=True, kw_only=True)
class FetchedBatch:
    """A sealed batch on its way to ClickHouse: `bodies` are its blocks' payloads by number, if this attempt read them."""

    claim: Claim
    bodies: Bodies = field(default_factory=dict)
    rows: int = 0
    dead: int = 0
    seconds: float = 0.0


def fetch(outbox: Outbox, claim: Claim, limits: Limits) -> FetchedBatch:
    """Reads a claimed batch's rows by pk, decodes each, and seals what can be exported.

    Durable effect: the seal (pks, blocks, digest) and the dead letters, in one transaction. A batch that
    is sealed already is left as it is; its rows are read again only if somebody has to send them.
    Raises `LeaseLost`, `OutboxUnavailable`.
    """
    started = time.perf_counter()
    batch = outbox.renew(claim, limits.lease_s)
    if batch.state is not State.CLAIMED:
        return FetchedBatch(claim=claim, rows=batch.entries, seconds=time.perf_counter() - started)

    decode = VERSIONS[batch.version].decode
    dead: list[DeadLetter] = []
    parts = [_Part(block) for block in batch.blocks]
    last_with_key: dict[int, tuple[_Part, int]] = {}  # by the key's hash: the place of its last row
    folded: set[int] = set()
    found = elsewhere = given_back = sealed_bytes = 0
    oldest_ms: int | None = None
    newest_ms: int | None = None
    for part in parts:
        if given_back:
            given_back += part.block.rows
            continue
        for row in outbox.read(part.block.pks, row_bytes=part.block.row_bytes):
            sealed_bytes += len(row.payload)
            if found and sealed_bytes > limits.batch_bytes * BYTES_TOLERANCE:
                given_back = sum(1 for pk in part.block.pks if pk >= row.pk)
                break
            found += 1
            if row.exported_at_ms is not None:
                elsewhere += 1
                continue
            event = decode(row)
            if isinstance(event, Undecodable):
                dead.append(_dead_letter(row, event))
                continue
            # One event twice in a batch: the later row stands, as it would after a merge in ClickHouse.
            place = hash(event.key)
            earlier = last_with_key.get(place)
            if earlier is not None and _same_event(decode, earlier, row, event):
                folded.add(earlier[0].pks[earlier[1]])
            last_with_key[place] = (part, len(part.pks))
            part.add(row, event.fingerprint)
            at_ms = event.key[2]
            oldest_ms = at_ms if oldest_ms is None or at_ms < oldest_ms else oldest_ms
            newest_ms = at_ms if newest_ms is None or at_ms > newest_ms else newest_ms
    last_with_key.clear()

    folded_pks = PkSet.of(sorted(folded))
    bodies: Bodies = {}
    blocks: list[Block] = []
    for part in parts:
        pks, payloads, fingerprint = part.without(folded)
        if pks:
            bodies[part.block.number] = payloads
            blocks.append(_sealed(batch.version, part.block, pks, payloads, fingerprint))
    cut = Cut(
        blocks=tuple(blocks),
        pks=_pks_of(blocks) | folded_pks,
        counts=Counts(
            dead=len(dead),
            folded=len(folded),
            vanished=batch.rows - given_back - found,
            elsewhere=elsewhere,
            released=given_back,
        ),
        digest=batch_digest(blocks, folded_pks),
        dead_letters=tuple(dead),
        oldest_ms=oldest_ms,
        newest_ms=newest_ms,
    )
    outbox.seal(claim, cut)
    return FetchedBatch(
        claim=claim,
        bodies=bodies,
        rows=sum(block.rows for block in blocks),
        dead=len(dead),
        seconds=time.perf_counter() - started,
    )


class _Part:
    """A block while its rows are read: payloads, and beside them only what a row costs in numbers."""

    def __init__(self, block: Block) -> None:
        self.block = block
        self.pks = array("Q")
        self.fingerprints = array("Q")
        self.payloads: list[bytes] = []

    def add(self, row: StoredRow, fingerprint: int) -> None:
        self.pks.append(row.pk)
        self.fingerprints.append(fingerprint)
        self.payloads.append(row.payload)

    def without(self, folded: set[int]) -> tuple[PkSet, list[bytes], int]:
        """The pks, payloads and fingerprint of the rows that are not folded."""
        if folded.isdisjoint(self.pks):
            pks, payloads, fingerprint = PkSet.of(self.pks), self.payloads, sum(self.fingerprints)
        else:
            keep = [index for index, pk in enumerate(self.pks) if pk not in folded]
            pks = PkSet.of(self.pks[index] for index in keep)
            payloads = [self.payloads[index] for index in keep]
            fingerprint = sum(self.fingerprints[index] for index in keep)
        return pks, payloads, fingerprint % 2**64


def _same_event(
    decode: Callable[[OutboxRow], Event | Undecodable], earlier: tuple[_Part, int], row: StoredRow, event: Event
) -> bool:
    """Whether the row at an earlier place, whose key has the same hash, has the same key."""
    part, index = earlier
    other = decode(
        OutboxRow(
            pk=part.pks[index], event_id=row.event_id, workspace_id=row.workspace_id, payload=part.payloads[index]
        )
    )
    return isinstance(other, Event) and other.key == event.key


def _sealed(version: str, block: Block, pks: PkSet, payloads: list[bytes], fingerprint: int) -> Block:
    return replace(
        block,
        pks=pks,
        digest=block_digest(version, block.inserted_at_ms, pks, payloads),
        fingerprint=fingerprint,
        bytes=sum(map(len, payloads)),
    )


def _pks_of(blocks: Collection[Block]) -> PkSet:
    pks = PkSet()
    for block in blocks:
        pks |= block.pks
    return pks


def _dead_letter(row: StoredRow, problem: Undecodable) -> DeadLetter:
    return DeadLetter(pk=row.pk, event_id=row.event_id, workspace_id=row.workspace_id, problem=problem)


# ── write ────────────────────────────────────────────────────────────────────────────────────────


def write(outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt:
    """Puts every block of a sealed batch into ClickHouse once, and returns the proof.

    `bodies` are the blocks' payloads by number, as `fetch` left them; one that is not there is read again
    from the outbox and held against the seal. The mapping is emptied on the way.

    Durable effects, in this order: one more attempt in the ledger; each block, by one INSERT under its
    token; the ledger's `written`. A first attempt writes at once. Any later one looks first: a block is
    atomic, so ClickHouse has all of it (done), none of it (the same block goes out under the same token)
    or something in between, which means that somebody removed rows: it counts as written here and
    verification reports it.
    Raises `InsertOutcomeUnknown` and `AuditLogUnavailable` (run again), `LeaseLost`, `BatchAltered`.
    """
    started = time.perf_counter()
    batch = outbox.begin_write(claim, limits.lease_s)
    found = 0
    if batch.state in (State.SEALED, State.STOPPED):
        to_send = list(batch.blocks)
        if batch.attempts > 1:
            holdings = log.holdings([block.inserted_at_ms for block in batch.blocks])
            # A requeued block shares its inserted_at with the first export: what is there proves nothing.
            there = [block for block in to_send if batch.generation == 0 and block.inserted_at_ms in holdings]
            found = len(there)
            to_send = [block for block in to_send if block not in there]
        batch = _send_all(outbox, log, batch, to_send, bodies, limits)
        batch = outbox.record_written(claim)
    return Receipt(
        claim=claim,
        digest=batch.digest,
        entries=batch.entries,
        blocks=len(batch.blocks),
        bytes=batch.bytes,
        found=found,
        seconds=time.perf_counter() - started,
    )


def _send_all(
    outbox: Outbox, log: AuditLog, batch: Batch, to_send: list[Block], bodies: Bodies, limits: Limits
) -> Batch:
    """Sends blocks, several at once, until ClickHouse has them all or refuses nothing any more.

    A refused block was not written. It is cut again around the offending rows, the ledger holds the new
    cut before any of it is sent, and the loop goes on with the new blocks.
    """
    with ThreadPoolExecutor(limits.blocks_per_batch, thread_name_prefix="write") as pool:
        while to_send:
            # The fence that ClickHouse itself keeps: a paused process that wakes after its lease and then
            # sends is refused, because every INSERT must start before this instant of ClickHouse's clock.
            outbox.renew(batch.claim, limits.lease_s)
            deadline_ms = log.deadline_ms(limits.lease_s - limits.insert_timeout_s)
            altered: list[Block] = []
            for block in to_send:
                if block.number not in bodies:
                    try:
                        bodies[block.number] = _read_payloads(outbox, batch, block)
                    except BatchAltered as error:
                        if batch.state is not State.STOPPED:
                            outbox.stop(batch.claim, str(error))
                            raise
                        altered.append(block)
            if batch.state is State.STOPPED:
                batch = _release(outbox, batch, altered)
            sending = [block for block in to_send if block not in altered]
            answers = [
                pool.submit(
                    log.insert,
                    batch,
                    block,
                    bodies.pop(block.number),
                    deadline_ms=deadline_ms,
                    timeout_s=limits.insert_timeout_s,
                )
                for block in sending
            ]
            refused: list[tuple[Block, Refusal]] = []
            failure: BaseException | None = None
            for block, answer in zip(sending, answers, strict=True):
                if answer.exception() is not None:
                    failure = failure or answer.exception()
                else:
                    refusal = answer.result()
                    if refusal is not None:
                        refused.append((block, refusal))
            if failure is not None:
                raise failure
            to_send = []
            for block, refusal in refused:
                batch, again = _cut_around_refused(outbox, log, batch, block, refusal, limits)
                to_send.extend(again)
    return batch


def _read_payloads(outbox: Outbox, batch: Batch, block: Block) -> list[bytes]:
    """A sealed block's payloads, read again; raises `BatchAltered` when they are not what was sealed."""
    payloads = []
    pks = []
    for row in outbox.read(block.pks, row_bytes=block.row_bytes):
        pks.append(row.pk)
        payloads.append(normal_form(row.payload) if row.pk in block.normalised else row.payload)
    if block_digest(batch.version, block.inserted_at_ms, PkSet.of(pks), payloads) != block.digest:
        gone = block.rows - len(pks)
        raise BatchAltered(
            f"batch {batch.batch_id}, block {block.number}: of {block.rows} sealed rows {gone} are gone from the outbox"
            f"{'' if gone else ' but some were changed'} before ClickHouse had them; nothing of the block was written. "
            "Find out who deletes or changes outbox rows; once the lease has ended, the next run gives the remaining "
            "rows back to the backlog and exports them in a new batch"
        )
    return payloads


def _release(outbox: Outbox, batch: Batch, altered: list[Block]) -> Batch:
    """Gives the rows of blocks that cannot be reproduced back to pending, and keeps the count.

    Safe only here: ClickHouse was just looked at and has nothing of these blocks, and the lease under
    which they could have been sent has ended (the planner adopts a stopped batch only then). From here
    on the batch is sealed again, because its new owner is about to send the blocks it kept.
    """
    kept = tuple(block for block in batch.blocks if block not in altered)
    released = _pks_of(altered)
    return _recut(
        outbox,
        batch,
        kept,
        batch.pks - released,
        replace(batch.counts, released=batch.counts.released + len(released)),
        (),
    )


def _recut(
    outbox: Outbox,
    batch: Batch,
    blocks: tuple[Block, ...],
    pks: PkSet,
    counts: Counts,
    dead: tuple[DeadLetter, ...],
) -> Batch:
    digest = batch_digest(blocks, pks - _pks_of(blocks))
    outbox.recut(batch.claim, Cut(blocks=blocks, pks=pks, counts=counts, digest=digest, dead_letters=dead))
    return replace(
        batch,
        state=State.SEALED,
        blocks=blocks,
        pks=pks,
        counts=counts,
        digest=digest,
        bytes=sum(block.bytes for block in blocks),
    )


def _cut_around_refused(
    outbox: Outbox, log: AuditLog, batch: Batch, block: Block, refusal: Refusal, limits: Limits
) -> tuple[Batch, list[Block]]:
    """Finds the rows that made ClickHouse refuse a block and cuts the block again without them.

    The offending rows become dead letters, unless their normal form is acceptable (a repeated key).
    Durable effect: the new cut and the dead letters, in one transaction. Returns the blocks to send.
    """
    _read_payloads(outbox, batch, block)  # raises when the rows are not the sealed ones: then nothing may be cut
    rows = {row.pk: row for row in outbox.read(block.pks, row_bytes=block.row_bytes)}
    payloads = {pk: normal_form(row.payload) if pk in block.normalised else row.payload for pk, row in rows.items()}

    def offenders(pks: list[int]) -> Iterator[tuple[int, Refusal]]:
        outbox.renew(batch.claim, limits.lease_s)
        answer = log.probe(batch.version, [payloads[pk] for pk in pks], timeout_s=limits.insert_timeout_s)
        if answer is not None and len(pks) == 1:
            yield pks[0], answer
        elif answer is not None:
            yield from offenders(pks[: len(pks) // 2])
            yield from offenders(pks[len(pks) // 2 :])

    decode = VERSIONS[batch.version].decode
    dead: dict[int, DeadLetter] = {}
    normalised: list[int] = []
    for pk, answer in offenders(list(rows)):
        problem = explain(payloads[pk])
        if problem is not None and problem.reason == "duplicate_key":
            text = normal_form(payloads[pk])
            if explain(text) is None and log.probe(batch.version, [text], timeout_s=limits.insert_timeout_s) is None:
                normalised.append(pk)
                payloads[pk] = text
                continue
        dead[pk] = _dead_letter(rows[pk], problem or _refused(answer))
    if not dead and not normalised:
        # What the parser takes and the table refuses, such as a constraint that somebody added.
        if block.rows == 1:
            dead[block.pks.first] = _dead_letter(rows[block.pks.first], _refused(refusal))
        else:
            return _halve(outbox, batch, block, payloads, rows)

    kept = [pk for pk in rows if pk not in dead]
    again: list[Block] = []
    if kept:
        fingerprint = sum(_fingerprint(decode(rows[pk])) for pk in kept) % 2**64
        all_normalised = block.normalised | PkSet.of(sorted(normalised))
        again = [
            replace(
                _sealed(batch.version, block, PkSet.of(kept), [payloads[pk] for pk in kept], fingerprint),
                normalised=all_normalised - PkSet.of(sorted(dead)),
            )
        ]
    return _replace_block(outbox, batch, block, again, tuple(dead.values())), again


def _halve(
    outbox: Outbox, batch: Batch, block: Block, payloads: dict[int, bytes], rows: dict[int, StoredRow]
) -> tuple[Batch, list[Block]]:
    """Cuts a block in two, the second half under an `inserted_at` of its own."""
    decode = VERSIONS[batch.version].decode
    halves = list(block.pks.chunks(-(-block.rows // 2)))
    number = max(other.number for other in batch.blocks)
    (second_at_ms,) = outbox.reserve_inserted_at(1) if batch.generation == 0 else (block.inserted_at_ms,)
    again = []
    for pks, part in zip(halves, (block, replace(block, number=number + 1, inserted_at_ms=second_at_ms)), strict=True):
        fingerprint = sum(_fingerprint(decode(rows[pk])) for pk in pks) % 2**64
        again.append(
            replace(
                _sealed(batch.version, part, pks, [payloads[pk] for pk in pks], fingerprint),
                normalised=block.normalised & pks,
            )
        )
    return _replace_block(outbox, batch, block, again, ()), again


def _replace_block(
    outbox: Outbox, batch: Batch, block: Block, again: list[Block], dead: tuple[DeadLetter, ...]
) -> Batch:
    position = batch.blocks.index(block)
    blocks = (*batch.blocks[:position], *again, *batch.blocks[position + 1 :])
    pks = batch.pks - PkSet.of(sorted(letter.pk for letter in dead))
    return _recut(outbox, batch, blocks, pks, replace(batch.counts, dead=batch.counts.dead + len(dead)), dead)


def _refused(refusal: Refusal) -> Undecodable:
    return Undecodable(reason="refused_by_clickhouse", detail=f"code {refusal.code} ({refusal.name})")


def _fingerprint(event: Event | Undecodable) -> int:
    if isinstance(event, Undecodable):
        raise InsertRefused(
            f"a sealed row no longer decodes ({event.reason} at {event.json_path}): was the program changed?"
        )
    return event.fingerprint


# ── mark ─────────────────────────────────────────────────────────────────────────────────────────


def mark(outbox: Outbox, receipt: Receipt, limits: Limits) -> Batch:
    """Stamps the batch's rows exported, chunk by chunk, and records the batch as exported with the last one.

    Durable effects: `deleted_at` of the rows, one transaction a chunk, several at once; then the last chunk
    and the ledger's `exported` in one. Every chunk is fenced. Rows that somebody else deleted or marked
    since the seal are counted and kept in the ledger. Raises `LeaseLost`, `OutboxUnavailable`.
    """
    claim = receipt.claim
    batch = outbox.renew(claim, limits.lease_s)
    if batch.state is not State.WRITTEN:
        if batch.state in (State.EXPORTED, State.VERIFIED, State.DISCREPANT):
            return batch
        raise LeaseLost(f"batch {batch.batch_id} is {batch.state}, not written: its receipt is of another attempt")
    stamp_ms = batch.exported_at_ms
    if stamp_ms is None or receipt.digest != batch.digest:
        raise LeaseLost(f"batch {batch.batch_id} was cut again after this receipt was made; run again")
    *chunks, last = [*batch.pks.chunks(limits.mark_rows)] or [PkSet()]
    total = Marked()
    with ThreadPoolExecutor(limits.mark_connections, thread_name_prefix="mark") as pool:
        for marked in pool.map(lambda pks: outbox.mark(claim, pks, stamp_ms), chunks):
            total += marked
    return outbox.finish_mark(claim, last, stamp_ms, total)
