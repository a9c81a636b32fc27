"""Cutting again: a sealed block that cannot go out as it is, read once more and cut around what is wrong with it.

What belongs here: holding rows against their seal, finding the rows that ClickHouse refuses, and giving rows
back that cannot be reproduced. What does not: sending (`core.export`). The ledger holds a new cut before any
of it is sent.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from auditexport_pipeline.core.batch import (
    Batch,
    Block,
    Counts,
    State,
    batch_digest,
    block_digest,
    pks_of,
    sealed_block,
)
from auditexport_pipeline.core.errors import BatchAltered, InsertRefused
from auditexport_pipeline.core.event import VERSIONS, Event, Undecodable, explain, normal_form
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Cut, DeadLetter, Outbox, Refusal, StoredRow


def read_payloads(outbox: Outbox, batch: Batch, block: Block) -> list[bytes]:
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


def give_back(outbox: Outbox, batch: Batch, altered: list[Block]) -> Batch:
    """Gives the rows of blocks that cannot be reproduced back to pending, and keeps the count.

    Safe only here: ClickHouse was just looked at and has nothing of these blocks, and the lease under
    which they could have been sent has ended (the planner adopts a stopped batch only then). From here
    on the batch is sealed again, because its new owner is about to send the blocks it kept.
    """
    kept = tuple(block for block in batch.blocks if block not in altered)
    released = pks_of(altered)
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
    digest = batch_digest(blocks, pks - pks_of(blocks))
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


def cut_around_refused(
    outbox: Outbox, log: AuditLog, batch: Batch, block: Block, refusal: Refusal, limits: Limits
) -> tuple[Batch, list[Block]]:
    """Finds the rows that made ClickHouse refuse a block and cuts the block again without them.

    The offending rows become dead letters, unless their normal form is acceptable (a repeated key).
    Durable effect: the new cut and the dead letters, in one transaction. Returns the blocks to send.
    """
    read_payloads(outbox, batch, block)  # raises when the rows are not the sealed ones: then nothing may be cut
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
        dead[pk] = DeadLetter.of(rows[pk], problem or _refused(answer))
    if not dead and not normalised:
        # What the parser takes and the table refuses, such as a constraint that somebody added.
        if block.rows == 1:
            dead[block.pks.first] = DeadLetter.of(rows[block.pks.first], _refused(refusal))
        else:
            return _halve(outbox, batch, block, payloads, rows)

    kept = [pk for pk in rows if pk not in dead]
    again: list[Block] = []
    if kept:
        fingerprint = sum(_fingerprint(decode(rows[pk])) for pk in kept) % 2**64
        all_normalised = block.normalised | PkSet.of(sorted(normalised))
        again = [
            replace(
                sealed_block(batch.version, block, PkSet.of(kept), [payloads[pk] for pk in kept], fingerprint),
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
                sealed_block(batch.version, part, pks, [payloads[pk] for pk in pks], fingerprint),
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
