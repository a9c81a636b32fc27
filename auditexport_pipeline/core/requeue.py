"""Requeueing: exporting rows again on purpose, by clearing their marks.

What belongs here: finding the rows that an operator names, leaving out rows that must stay, and clearing the
marks chunk by chunk. What does not: the second export. The next drain does it: it finds pending rows whose pks a
closed batch had, and sends the rows that are proven to be its events under their first `inserted_at` (`core.origins`).

Clearing a mark by hand in SQL has the same effect, without the record of who and why. A requeue during a drain
is safe: rows of an open batch are left alone, and a batch never takes a marked row.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.batch import OPEN, Batch
from auditexport_pipeline.core.compare import compare, insert_groups_of, pks_still_of
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.excuses import Excuses
from auditexport_pipeline.core.foreign import is_time, look_up, successors
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

    @property
    def counts(self) -> dict[str, int]:
        """The rows by what happened to them, under the names of `--json` and of the job's metadata."""
        return {
            "rows": self.rows,
            "no_batch_rows": self.no_batch,
            "open_rows": self.open_rows,
            "expired_rows": self.expired_rows,
            "present_rows": self.present_rows,
            "unknown_rows": self.unknown_rows,
        }


def requeue(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    which: RowFilter,
    by: Actor,
    *,
    missing_only: bool = False,
    dry_run: bool = False,
) -> Requeue:
    """Clears the marks of the exported rows that the filter names, so that the next drain exports them again.

    With `missing_only`, only of those that ClickHouse does not hold (nor has merged, expired or erased).
    Durable effect: one action, and per chunk of rows their cleared marks, counted in the action. Raises
    `InvalidConfig` when no condition is given.
    """
    which.require_a_condition()
    within: PkSet | None = None
    if which.batch_ids:
        batches = outbox.batches(which.batch_ids)
        if unknown := sorted(set(which.batch_ids) - {batch.batch_id for batch in batches}):
            raise InvalidConfig(f"batch_ids names {', '.join(map(str, unknown))}, which the ledger does not have")
        within = PkSet.union(pks_still_of(outbox, batch) for batch in batches)
    pks = PkSet.union(upkeep.marked(which, within))
    selection = which.given | ({"missing_only": True} if missing_only else {})
    return clear(
        outbox, upkeep, log, pks, by, verb="requeue", selection=selection, missing_only=missing_only, dry_run=dry_run
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
    missing_only: bool = False,
    dry_run: bool = False,
) -> Requeue:
    """Clears the marks of these rows, without rows that must stay; see `requeue`."""
    excuses = Excuses(upkeep, log)
    by_batch = upkeep.pks_by_batch(pks)
    holders = outbox.batches(sorted(by_batch))
    batches = [batch for batch in holders if batch.state not in OPEN and batch.version in VERSIONS]
    in_open = PkSet.union(by_batch[batch.batch_id] for batch in holders if batch.state in OPEN)
    pks -= in_open
    unknown = pks & PkSet.union(
        batch.pks for batch in holders if batch.state not in OPEN and batch.version not in VERSIONS
    )
    pks -= unknown
    new = successors(upkeep, batches, pks)
    expired = (pks & _expired(excuses, batches)) - new
    pks -= expired
    present = PkSet()
    if missing_only:
        present = pks - _missing(outbox, upkeep, log, excuses, pks, new, batches)
        pks -= present
    left = pks - new
    rows_by_batch: dict[int, int] = {}
    for batch in sorted(batches, key=lambda batch: -batch.batch_id):  # a row counts for the batch that exported it last
        if rows := len(left & batch.pks):
            rows_by_batch[batch.batch_id] = rows
            left -= batch.pks
    action_id = None
    if pks and not dry_run:
        action_id = upkeep.record_action(verb, by, selection)
        for chunk in pks.chunks(CHUNK_ROWS):
            upkeep.unmark(chunk, action_id)
    return Requeue(
        rows=len(pks),
        by_batch=dict(sorted(rows_by_batch.items())),
        no_batch=len(pks) - sum(rows_by_batch.values()),
        open_rows=len(in_open),
        expired_rows=len(expired),
        present_rows=len(present),
        unknown_rows=len(unknown),
        action_id=action_id,
    )


def _expired(excuses: Excuses, batches: Sequence[Batch]) -> PkSet:
    """The rows whose entries the TTL would soon delete. Where that is unknown, rows are exported again."""
    times: defaultdict[str, set[int]] = defaultdict(set)
    for batch in batches:
        times[batch.version].update(block.inserted_at_ms for block in batch.blocks)
    past = {version: excuses.past(version, sorted(of), ahead_ms=LEAST_LEFT_MS) for version, of in times.items()}
    # A pk's event in an earlier batch is not its event in the last one.
    expired = []
    later = PkSet()
    for batch in sorted(batches, key=lambda batch: -batch.batch_id):
        old = [block.pks for block in batch.blocks if past[batch.version][block.inserted_at_ms]]
        if old:
            expired.append(PkSet.union(old) & batch.pks - later)
        later |= batch.pks
    return PkSet.union(expired)


def _missing(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    excuses: Excuses,
    pks: PkSet,
    new: PkSet,
    batches: Sequence[Batch],
) -> PkSet:
    """The rows whose entries ClickHouse lacks, found by comparing their insert groups; the `new` rows are in no group."""
    missing: set[int] = set()
    groups = insert_groups_of(batches)
    for group in groups:
        if rows := (group.pks & pks) - new:
            missing.update(pk for pk in compare(outbox, log, group, excuses=excuses).missing_pks if pk in rows)
    # The pks of batches too: a folded row went out as another row.
    known = PkSet.union([*(group.pks for group in groups), *(batch.pks for batch in batches)])
    # The other rows were in no batch. Their mark is the time of their export, except a mark that is no time.
    times = upkeep.times((pks - known) | (new & pks))
    now_ms = excuses.now_ms
    marked_at = {pk: at_ms if at_ms and is_time(at_ms, now_ms) else now_ms for pk, (_, at_ms) in times.items()}
    missing.update(look_up(outbox, log, excuses, marked_at).missing)
    return PkSet.of(sorted(missing))
