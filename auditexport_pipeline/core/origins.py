"""Finds the pending rows that repeat an exported event, and the `inserted_at` of that export.

A pk proves nothing: pks begin again after a TRUNCATE, a restore, or in a new table with the old name. A row repeats an
event only if ClickHouse has the event's key under the `inserted_at` of a batch that had the pk, or if the rows of a
block that had the pk still have its sealed digest. Any other row is new: a duplicate can be found later, a lost event
cannot.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass

from auditexport_pipeline.core.batch import OPEN, Batch, Block, BlockDigest, pks_of
from auditexport_pipeline.core.event import Event, Key, normal_form
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Outbox
from auditexport_pipeline.core.versions import VERSIONS

# Look-ups for earlier exports of a batch's rows. Most pending rows have neighbouring pks; a few are pending again.
ORIGIN_SPANS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """The `inserted_at` of each row that repeats an event, by pk. The other rows are new. Of those, `renewed` may be
    rows whose first entries ClickHouse has lost.
    """

    times: Mapping[int, int]
    renewed: PkSet


def prove(outbox: Outbox, log: AuditLog, batch: Batch, keys: Mapping[int, Key]) -> Origins:
    """Finds the origin of each row of a claimed requeue; `keys` are the event keys of the rows by pk.

    Source: the ledger by `last_pk_idx`; `audit_logs_raw_v1` by key and `inserted_at`; the outbox by pk, only for blocks
    of which ClickHouse lacks entries. Changes nothing.
    """
    blocks = _blocks_that_had(outbox, batch, PkSet.of(sorted(keys)))
    candidates: defaultdict[int, list[int]] = defaultdict(list)  # by pk: the times of the blocks that had it
    for _, block, rows in blocks:
        for pk in rows:
            candidates[pk].append(block.inserted_at_ms)
    held: set[tuple[Key, int]] = set()
    if candidates:
        candidate_keys = [key for pk, key in keys.items() if pk in candidates]
        held = log.keys_held(candidate_keys, sorted({block.inserted_at_ms for _, block, _ in blocks}))
    times: dict[int, int] = {}
    for pk, candidate_times in candidates.items():
        at_ms = next((at_ms for at_ms in candidate_times if (keys[pk], at_ms) in held), None)
        if at_ms is not None:
            times[pk] = at_ms
    lacking: set[int] = set()
    for origin, block, rows in blocks:
        unproven = {pk for pk in rows if pk not in times}
        if unproven:
            sealed_keys = _keys_as_sealed(outbox, origin, block, {keys[pk] for pk in unproven})
            times.update({pk: block.inserted_at_ms for pk in unproven if keys[pk] in sealed_keys})
            lacking.add(block.inserted_at_ms)
    maybe_lost = lacking - _whole(log, blocks, lacking)
    renewed = [pk for pk, at in candidates.items() if pk not in times and not maybe_lost.isdisjoint(at)]
    return Origins(times=times, renewed=PkSet.of(sorted(renewed)))


def _blocks_that_had(outbox: Outbox, batch: Batch, pks: PkSet) -> list[tuple[Batch, Block, PkSet]]:
    """The blocks of closed batches that sent rows with these pks, latest first, each with those pks.

    After them, the blocks into which a row may have been folded: all blocks of its batch.
    """
    sent = {other.batch_id: other for span in pks.spans(ORIGIN_SPANS) for other in outbox.sent_over(*span)}
    found, folded_into = [], []
    for _, origin in sorted(sent.items(), reverse=True):
        if origin.batch_id == batch.batch_id or origin.state in OPEN or origin.version != batch.version:
            continue
        overlap = pks & origin.pks
        folded = overlap - pks_of(origin.blocks)
        for block in origin.blocks:
            rows = overlap & block.pks
            if rows:
                found.append((origin, block, rows))
            if folded:
                folded_into.append((origin, block, folded))
    return found + folded_into


def _keys_as_sealed(outbox: Outbox, origin: Batch, block: Block, wanted: set[Key]) -> set[Key]:
    """The wanted keys that are in the block, if its rows still have its digest; otherwise none."""
    decode = VERSIONS[origin.version].decode
    digest = BlockDigest(origin.version, block.inserted_at_ms, block.pks)
    found: set[Key] = set()
    rows = 0
    for row in outbox.read(block.pks, row_bytes=block.row_bytes):
        event = decode(row)
        if not isinstance(event, Event):
            return set()
        if event.key in wanted:
            found.add(event.key)
        rows += 1
        digest.add([normal_form(row.payload) if row.pk in block.normalised else row.payload])
    return found if rows == block.rows and str(digest) == block.digest else set()


def _whole(log: AuditLog, blocks: list[tuple[Batch, Block, PkSet]], times: set[int]) -> set[int]:
    """Those of these `inserted_at`s that still have as many different entries as their first export had."""
    first = {
        block.inserted_at_ms: block.rows
        for batch, block, _ in blocks
        if block.inserted_at_ms in times and not batch.is_requeue(block)
    }
    holdings = log.holdings(sorted(first))
    return {
        at_ms
        for at_ms, rows in first.items()
        if (holding := holdings.get(at_ms)) is not None and holding.rows - holding.copies >= rows
    }
