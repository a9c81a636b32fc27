"""Sweeping: deleting exported rows past retention, once ClickHouse is seen to hold them.

What belongs here: which batches are due, the last check of ClickHouse before their rows are deleted, and the order in
which things are recorded. What does not: the DELETE itself (`mysql.maintenance`), and schedules.

A batch is due when it is verified and was exported longer ago than the retention. It is checked once more right before its
rows are deleted, because the outbox has the last copy of what ClickHouse lost: each entry must be there, or be past the
table's TTL as ClickHouse evaluates it, or be erased on record. Where the TTL is unknown, an entry that is gone may be lost:
its rows stay until an operator has declared how long the table keeps an entry. A row is deleted with the batch that
exported it last: a requeued row stays until its newer batch is due.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import NO_ENTRIES, Batch, Holding
from auditexport_pipeline.core.compare import compare, compare_at_rest, insert_group_at
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.excuses import Excuses, declare_ttl
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Maintenance, Outbox
from auditexport_pipeline.core.settings import Retention
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

BATCHES_AT_ONCE = 50
# Workspaces whose counts the ledger keeps for a swept insert group, at most: some hundred bytes.
WORKSPACES_KEPT = 32


@dataclass(slots=True, kw_only=True)
class Sweep:
    """The result of a sweep; with `dry_run`, what it would do."""

    rows: int = 0
    batches: int = 0  # of which no row is left
    by_batch: dict[int, int] = field(default_factory=dict)
    discrepant: dict[int, Discrepancy] = field(default_factory=dict)  # not swept: ClickHouse no longer holds them
    standing: dict[int, str] = field(default_factory=dict)  # not checked: discrepant before this sweep began
    # Not swept: entries that ClickHouse lacks may be past a TTL that cannot be evaluated.
    ttl_unknown: dict[int, Discrepancy] = field(default_factory=dict)
    # Batches due by age that were never verified, are discrepant, or have a version that is not installed.
    held_back: int = 0
    letters_closed: int = 0
    compacted: int = 0
    stopped_early: bool = False  # max_rows was reached


def sweep(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    retention: Retention,
    by: Actor,
    *,
    ttl_days: float | None = None,
    dry_run: bool = False,
    progress: Callable[[int], None] = lambda rows: None,
) -> Sweep:
    """Deletes the rows of due batches, chunk by chunk, oldest batch first; then compacts the ledger.

    `ttl_days` declares how long the tables keep an entry, for a TTL that cannot be evaluated; it is
    recorded, and is valid until the TTL clause changes.

    Durable effects: one action; per chunk its deleted rows, counted in the batch and the action; `swept_at_ms` of
    each finished batch; a batch that ClickHouse no longer holds becomes `discrepant`. A sweep may be stopped at any
    moment and run again: deleted rows are counted, the others are still due.
    Raises `InvalidConfig` when the ledger would forget batches whose entries ClickHouse still keeps.
    """
    if ttl_days is not None and not dry_run:
        declare_ttl(upkeep, log, by, ttl_days)
    excuses = Excuses(upkeep, log, ttl_days=ttl_days if dry_run else None)
    kept_ms = excuses.kept_ms()
    now_ms = excuses.now_ms
    if kept_ms is not None and retention.ledger_days * DAY_MS < kept_ms:
        raise InvalidConfig(
            f"ledger_days is {retention.ledger_days} and ClickHouse keeps entries for {kept_ms // DAY_MS} days: the record "
            "of a batch must stay longer than its entries; raise ledger_days"
        )
    before_ms = now_ms - int(retention.outbox_days * DAY_MS)
    done = Sweep(held_back=upkeep.held_back(before_ms), standing=upkeep.discrepant_due(before_ms))
    selection = {"before_ms": before_ms, "outbox_days": retention.outbox_days}
    action_id: int | None = None
    after_id = 0
    while due := upkeep.sweepable(before_ms, after_id, BATCHES_AT_ONCE):
        for batch in due:
            after_id = batch.batch_id
            if batch.version not in VERSIONS:
                done.held_back += 1
                continue
            found, ttl_unknown, observed = _last_check(outbox, log, batch, excuses)
            pks = _last_exported_by(upkeep, batch)
            if not found and not dry_run:
                # Rows that are deleted now cannot explain anything later.
                named = _with_workspaces(upkeep, batch, pks, observed)
                if named or observed != batch.observed:
                    upkeep.record_reconciled(batch, found, observed | named)
            if found:
                if ttl_unknown:
                    done.ttl_unknown[batch.batch_id] = found
                    continue
                done.discrepant[batch.batch_id] = found
                if not dry_run:
                    upkeep.record_reconciled(batch, found, batch.observed)
                continue
            if dry_run:
                rows = upkeep.count_due(pks, before_ms)
            else:
                rows = 0
                for chunk in pks.chunks(retention.chunk_rows):
                    if done.rows + rows >= retention.max_rows:
                        done.stopped_early = True
                        break
                    if action_id is None:
                        action_id = upkeep.record_action("sweep", by, selection)
                    rows += upkeep.delete(batch.batch_id, chunk, before_ms, action_id)
                    progress(done.rows + rows)
                    if retention.pause_s:
                        time.sleep(retention.pause_s)
                else:
                    upkeep.record_swept(batch.batch_id)
            done.rows += rows
            done.by_batch[batch.batch_id] = rows
            if done.stopped_early:
                return done
            done.batches += 1
    if not dry_run:
        done.letters_closed = upkeep.close_letters()
        done.compacted = _compact(upkeep, by, now_ms, kept_ms, retention)
    return done


def _last_check(
    outbox: Outbox, log: AuditLog, batch: Batch, excuses: Excuses
) -> tuple[Discrepancy, bool, dict[int, Holding]]:
    """What ClickHouse no longer holds of a batch, right before its rows are deleted; whether an unknown TTL may explain all of
    that; and the holdings with which later comparisons begin.
    """
    holdings = log.holdings([block.inserted_at_ms for block in batch.blocks])
    found = Discrepancy()
    ttl_unknown = 0
    observed = dict(batch.observed)
    for block in batch.blocks:
        holding = holdings.get(block.inserted_at_ms, NO_ENTRIES)
        as_sealed = (holding.rows, holding.fingerprint) == (block.rows, block.fingerprint)
        baseline = batch.observed.get(block.inserted_at_ms)  # which a requeue does not have
        if as_sealed and (baseline is None or baseline.content == holding.content):
            continue
        if excuses.past(batch.version, [block.inserted_at_ms])[block.inserted_at_ms]:
            continue
        if batch.is_requeue(block):
            compared = compare(outbox, log, insert_group_at(outbox, batch, block), excuses=excuses)
        else:
            compared = compare_at_rest(outbox, log, batch, block, excuses=excuses)
            if not compared.discrepancy and not compared.unprovable:
                observed[block.inserted_at_ms] = replace(holding, workspaces=baseline.workspaces if baseline else {})
        found += compared.discrepancy
        ttl_unknown += compared.ttl_unknown
    return found, bool(ttl_unknown) and found.total == ttl_unknown, observed


def _with_workspaces(upkeep: Maintenance, batch: Batch, own: PkSet, observed: dict[int, Holding]) -> dict[int, Holding]:
    """The holdings of insert groups whose rows are all still there, with counts by workspace where these are few."""
    named = {}
    for block in batch.blocks:
        holding = observed.get(block.inserted_at_ms)
        if holding is None or holding.workspaces or batch.is_requeue(block) or block.pks - own:
            continue
        counts = upkeep.by_workspace(block.pks)
        if len(counts) <= WORKSPACES_KEPT and sum(counts.values()) == block.rows:
            named[block.inserted_at_ms] = replace(holding, workspaces=counts)
    return named


def _last_exported_by(upkeep: Maintenance, batch: Batch) -> PkSet:
    """The rows of this batch that no later batch has exported again, or is about to export.

    If the batch marked all of its rows, rows with another mark are not its own: their pks began again.
    """
    pks = batch.pks
    if not batch.counts.unmarked and batch.exported_at_ms is not None:
        pks &= upkeep.stamped(batch.exported_at_ms, (batch.version,))
    for other_id, common in upkeep.held(batch.pks).items():
        if other_id > batch.batch_id:
            pks -= common
    return pks


def _compact(upkeep: Maintenance, by: Actor, now_ms: int, kept_ms: int | None, retention: Retention) -> int:
    """Compacts swept batches past the ledger's window, if ClickHouse's TTL has deleted their entries by then."""
    if kept_ms is None:
        return 0
    before_ms = now_ms - int(retention.ledger_days * DAY_MS)
    compacted = 0
    while some := upkeep.compact(before_ms, BATCHES_AT_ONCE, by):
        compacted += some
    return compacted
