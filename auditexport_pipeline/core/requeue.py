"""Requeueing: exporting rows again on purpose, by clearing their marks.

What belongs here: finding the rows that an operator names, leaving out rows that must stay, and clearing the
marks chunk by chunk. What does not: the second export. The next drain does it: it finds pending rows whose pks a
closed batch had, and sends the rows that are proven to be its events under their first `inserted_at` (`core.origins`).

Clearing a mark by hand in SQL has the same effect, without the record of who and why. A requeue during a drain
is safe: rows of an open batch are left alone, and a batch never takes a marked row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass, field

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.batch import OPEN, Batch
from auditexport_pipeline.core.compare import ROW_BYTES, compare, insert_groups_of, pks_still_of
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.excuses import Excuses
from auditexport_pipeline.core.foreign import is_time, look_for, successors
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Maintenance, Outbox
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

# Rows of one UPDATE: like a chunk of marks, a few megabytes of binary log.
CHUNK_ROWS = 5_000
# A requeued entry keeps its `inserted_at`: with less than this left of the table's TTL, ClickHouse would soon drop it.
LEAST_LEFT_MS = DAY_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Requeue:
    """The result of a requeue, in rows. `by_batch` counts the requeued rows by the batch that exported them last."""

    rows: int = 0
    by_batch: dict[int, int] = field(default_factory=dict)
    no_batch: int = 0  # requeued, and never exported by us
    open_rows: int = 0  # left alone: a batch that is not closed yet has them
    expired_rows: int = 0  # left alone: ClickHouse's TTL would drop them at once
    present_rows: int = 0  # left alone with `missing_only`: ClickHouse has them
    unknown_rows: int = 0  # left alone: their version is not installed, and no drain would export them
    action_id: int | None = None  # None in a dry run, and when there was nothing to do


def requeue(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    wanted: RowFilter,
    by: Actor,
    *,
    missing_only: bool = False,
    dry_run: bool = False,
) -> Requeue:
    """Clears the marks of the exported rows that `wanted` names, so that the next drain exports them again.

    With `missing_only`, only of those that ClickHouse does not hold (nor has merged, expired or erased).
    Durable effect: one action, and per chunk of rows their cleared marks, counted in the action. Raises
    `InvalidConfig` when no condition is given.
    """
    wanted.refuse_everything()
    within: PkSet | None = None
    if wanted.batch_ids:
        known = {batch.batch_id: batch for batch in outbox.batches(wanted.batch_ids)}
        unknown = sorted(set(wanted.batch_ids) - set(known))
        if unknown:
            raise InvalidConfig(f"batch_ids names {', '.join(map(str, unknown))}, which the ledger does not have")
        within = PkSet.union(pks_still_of(outbox, batch) for batch in known.values())
    found = PkSet.union(upkeep.marked(wanted, within))
    return clear(
        outbox,
        upkeep,
        log,
        found,
        by,
        verb="requeue",
        selection=wanted.given | ({"missing_only": True} if missing_only else {}),
        missing_only=missing_only,
        dry_run=dry_run,
    )


def clear(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    pks: PkSet,
    by: Actor,
    *,
    verb: str,
    selection: dict[str, object],
    missing_only: bool,
    dry_run: bool,
) -> Requeue:
    """Clears the marks of these rows, without rows that must stay; see `requeue`."""
    held = upkeep.held(pks)
    batches = {batch.batch_id: batch for batch in outbox.batches(sorted(held))}
    open_pks = PkSet.union(held[batch_id] for batch_id, batch in batches.items() if batch.state in OPEN)
    open_rows = len(open_pks)
    pks -= open_pks
    batches = {batch_id: batch for batch_id, batch in batches.items() if batch.state not in OPEN}
    unknown = PkSet.union(batch.pks for batch in batches.values() if batch.version not in VERSIONS) & pks
    pks -= unknown
    batches = {batch_id: batch for batch_id, batch in batches.items() if batch.version in VERSIONS}
    excuses = Excuses(upkeep, log)
    new = successors(upkeep, batches.values(), pks)
    expired = (_expired(excuses, batches.values()) & pks) - new
    pks -= expired
    present = PkSet()
    if missing_only:
        present = pks - _missing(outbox, log, excuses, pks, new, batches.values())
        pks -= present
    by_batch: dict[int, int] = {}
    new &= pks
    left = pks - new
    for batch_id in sorted(batches, reverse=True):  # a row counts for the batch that exported it last
        rows = len(left & batches[batch_id].pks)
        if rows:
            by_batch[batch_id] = rows
            left -= batches[batch_id].pks
    action_id = None
    if pks and not dry_run:
        action_id = upkeep.record_action(verb, by, selection)
        for chunk in pks.chunks(CHUNK_ROWS):
            upkeep.unmark(chunk, action_id)
    return Requeue(
        rows=len(pks),
        by_batch=dict(sorted(by_batch.items())),
        no_batch=len(left) + len(new),
        open_rows=open_rows,
        expired_rows=len(expired),
        present_rows=len(present),
        unknown_rows=len(unknown),
        action_id=action_id,
    )


def _expired(excuses: Excuses, batches: Collection[Batch]) -> PkSet:
    """The rows whose entries the TTL would soon delete. Where that is unknown, rows are exported again."""
    groups: defaultdict[str, set[int]] = defaultdict(set)
    for batch in batches:
        groups[batch.version].update(block.inserted_at_ms for block in batch.blocks)
    past = {version: excuses.past_soon(version, sorted(of), LEAST_LEFT_MS) for version, of in groups.items()}
    # A pk's event in an earlier batch is not its event in the last one.
    old = []
    later = PkSet()
    for batch in sorted(batches, key=lambda batch: batch.batch_id, reverse=True):
        if any(past[batch.version][block.inserted_at_ms] for block in batch.blocks):
            own = batch.pks - later
            old += [block.pks & own for block in batch.blocks if past[batch.version][block.inserted_at_ms]]
        later |= batch.pks
    return PkSet.union(old)


def _missing(
    outbox: Outbox, log: AuditLog, excuses: Excuses, pks: PkSet, new: PkSet, batches: Collection[Batch]
) -> PkSet:
    """The rows whose entries ClickHouse lacks, found by comparing their insert groups; the `new` rows are in no group."""
    missing: set[int] = set()
    groups = insert_groups_of([batch for batch in batches if batch.state not in OPEN])
    for group in groups:
        wanted = (group.pks & pks) - new
        if wanted:
            for found in compare(outbox, log, group, excuses=excuses).missing.values():
                missing.update(pk for pk in found if pk in wanted)
    # The pks of batches too: a folded row went out as another row.
    known = PkSet.union([*(group.pks for group in groups), *(batch.pks for batch in batches)])
    # Rows that no batch had: a mark that is no time excuses nothing.
    others = {
        row.pk: at_ms if (at_ms := row.exported_at_ms or 0) and is_time(at_ms, excuses.now_ms) else excuses.now_ms
        for chunk in ((pks - known) | (new & pks)).chunks(CHUNK_ROWS)
        for row in outbox.read(chunk, row_bytes=ROW_BYTES)
    }
    missing.update(look_for(outbox, log, excuses, others).missing)
    return PkSet.of(sorted(missing))
