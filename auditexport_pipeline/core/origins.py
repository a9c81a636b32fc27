"""Which pending rows repeat an event that was exported before, and under which `inserted_at`.

A pk proves nothing: it begins again after a TRUNCATE, a restore, or a new table under the old name. A row repeats an
event only if ClickHouse holds the event's key under the `inserted_at` of a batch that had the pk, or if the block that
had it reads again from the outbox to its sealed digest. Everything else is new: a duplicate can be seen, a loss cannot.
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

# Look-ups for earlier exports of a batch's rows: pending rows lie together, but for a few that came back.
ORIGIN_SPANS = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class Origins:
    """By pk the `inserted_at` that a repeated row keeps. All other rows are new; of those, `renewed` may be what
    ClickHouse has lost of an earlier block.
    """

    times: Mapping[int, int]
    renewed: PkSet


def prove(outbox: Outbox, log: AuditLog, batch: Batch, keys: Mapping[int, Key]) -> Origins:
    """Finds the origin of each row of a claimed requeue; `keys` are the rows' event keys by pk.

    Source: the ledger by `last_pk_idx`; `audit_logs_raw_v1` by key and `inserted_at`; the outbox by pk, only for blocks
    whose entries ClickHouse does not hold. No transaction is open meanwhile. Changes nothing.
    """
    pks = PkSet.of(sorted(keys))
    blocks = _blocks_that_had(outbox, batch, pks)
    candidates: defaultdict[int, list[int]] = defaultdict(list)
    for _, block, rows in blocks:
        for pk in rows:
            candidates[pk].append(block.inserted_at_ms)
    asked = [key for pk, key in keys.items() if pk in candidates]
    held = log.keys_held(asked, sorted({block.inserted_at_ms for _, block, _ in blocks})) if asked else set()
    times: dict[int, int] = {}
    for pk, at in candidates.items():
        found = next((at_ms for at_ms in at if (keys[pk], at_ms) in held), None)
        if found is not None:
            times[pk] = found
    lacking: set[int] = set()
    for origin, block, rows in blocks:
        unproven = {pk for pk in rows if pk not in times}
        if not unproven:
            continue
        there = _keys_as_sealed(outbox, origin, block, {keys[pk] for pk in unproven})
        times.update({pk: block.inserted_at_ms for pk in unproven if keys[pk] in there})
        lacking.add(block.inserted_at_ms)
    maybe_lost = lacking - _whole(log, blocks, lacking)
    renewed = [pk for pk, at in candidates.items() if pk not in times and not maybe_lost.isdisjoint(at)]
    return Origins(times=times, renewed=PkSet.of(sorted(renewed)))


def _blocks_that_had(outbox: Outbox, batch: Batch, pks: PkSet) -> list[tuple[Batch, Block, PkSet]]:
    """The blocks of closed batches that sent these pks, the latest first, and which of them each sent.

    Then those that a row may have been folded into: any of its batch's.
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
    """Those of the wanted keys that the block has, if its rows still read to its digest; else none."""
    decode = VERSIONS[origin.version].decode
    digest = BlockDigest(origin.version, block.inserted_at_ms, block.pks)
    found: set[Key] = set()
    left = block.rows
    for row in outbox.read(block.pks, row_bytes=block.row_bytes):
        event = decode(row)
        if not isinstance(event, Event):
            return set()
        if event.key in wanted:
            found.add(event.key)
        left -= 1
        digest.add([normal_form(row.payload) if row.pk in block.normalised else row.payload])
    return found if not left and str(digest) == block.digest else set()


def _whole(log: AuditLog, blocks: list[tuple[Batch, Block, PkSet]], times: set[int]) -> set[int]:
    """The `inserted_at`s, of these, that still hold as many different entries as their first export had."""
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
