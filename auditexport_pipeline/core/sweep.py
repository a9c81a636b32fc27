"""Sweeping: deleting exported rows past retention, after a last check that ClickHouse holds them.

A batch is due when it is verified and was exported longer ago than the retention. It is checked once more right before its
rows are deleted, because the outbox has the last copy of what ClickHouse lost: each entry must be there, or be past the
table's TTL as ClickHouse evaluates it, or be erased on record. Where the TTL is unknown, an entry that is gone may be lost:
its rows stay until an operator has declared how long the table keeps an entry. A row is deleted with the batch that
exported it last: a requeued row stays until its newer batch is due.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import NO_ENTRIES, Batch, Holding
from auditexport_pipeline.core.compare import as_sealed, compare_block
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.excuses import Excuses, declare_ttl
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Maintenance, Outbox
from auditexport_pipeline.core.settings import Retention
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

BATCHES_AT_ONCE = 50
# The ledger has counts by workspace for a swept insert group of at most so many: some hundred bytes.
MOST_WORKSPACES = 32


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

    @property
    def counts(self) -> dict[str, int]:
        """Its numbers, under the names of `--json` and of the job's metadata."""
        return {
            "rows": self.rows,
            "batches": self.batches,
            "held_back_batches": self.held_back,
            "discrepant_batches": len(self.discrepant),
            "ttl_unknown_batches": len(self.ttl_unknown),
            "dead_letters_closed": self.letters_closed,
            "compacted_batches": self.compacted,
        }


def sweep(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    retention: Retention,
    by: Actor,
    *,
    ttl_days: float | None = None,
    dry_run: bool = False,
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
    if kept_ms is not None and retention.ledger_days * DAY_MS < kept_ms:
        raise InvalidConfig(
            f"ledger_days is {retention.ledger_days} and ClickHouse keeps entries for {kept_ms // DAY_MS} days: the record "
            "of a batch must stay longer than its entries; raise ledger_days"
        )
    before_ms = excuses.now_ms - int(retention.outbox_days * DAY_MS)
    done = Sweep(held_back=upkeep.held_back(before_ms), standing=upkeep.discrepant_due(before_ms))
    work = _Sweeping(outbox, upkeep, log, excuses, retention, by, before_ms, dry_run, done)
    after_id = 0
    while due := upkeep.sweepable(before_ms, after_id, BATCHES_AT_ONCE):
        for batch in due:
            work.sweep_batch(batch)
            if done.stopped_early:
                return done
        after_id = due[-1].batch_id
    if not dry_run:
        done.letters_closed = upkeep.close_letters()
        if kept_ms is not None:  # else ClickHouse may still hold their entries
            ledger_before_ms = excuses.now_ms - int(retention.ledger_days * DAY_MS)
            while compacted := upkeep.compact(ledger_before_ms, BATCHES_AT_ONCE, by):
                done.compacted += compacted
    return done


@dataclass(slots=True)
class _Sweeping:
    """One sweep at work: what it does with each batch that is due."""

    outbox: Outbox
    upkeep: Maintenance
    log: AuditLog
    excuses: Excuses
    retention: Retention
    by: Actor
    before_ms: int
    dry_run: bool
    done: Sweep
    action_id: int | None = None

    def sweep_batch(self, batch: Batch) -> None:
        if batch.version not in VERSIONS:
            self.done.held_back += 1
            return
        found, ttl_unknown, observed = self._last_check(batch)
        if found:
            (self.done.ttl_unknown if ttl_unknown else self.done.discrepant)[batch.batch_id] = found
            if not ttl_unknown and not self.dry_run:
                self.upkeep.record_reconciled(batch, found, batch.observed)
            return
        pks = self._last_exported_by(batch)
        if self.dry_run:
            rows = self.upkeep.count_due(pks, self.before_ms)
        else:
            # Rows that are deleted now cannot explain anything later.
            counted = self._with_workspaces(batch, pks, observed)
            if counted or observed != batch.observed:
                self.upkeep.record_reconciled(batch, found, observed | counted)
            rows = self._delete(batch, pks)
        self.done.rows += rows
        self.done.by_batch[batch.batch_id] = rows
        self.done.batches += not self.done.stopped_early

    def _delete(self, batch: Batch, pks: PkSet) -> int:
        rows = 0
        for chunk in pks.chunks(self.retention.chunk_rows):
            if self.done.rows + rows >= self.retention.max_rows:
                self.done.stopped_early = True
                return rows
            if self.action_id is None:
                selection = {"before_ms": self.before_ms, "outbox_days": self.retention.outbox_days}
                self.action_id = self.upkeep.record_action("sweep", self.by, selection)
            rows += self.upkeep.delete(batch.batch_id, chunk, self.before_ms, self.action_id)
            if self.retention.pause_s:
                threads.sleep(self.retention.pause_s)
        self.upkeep.record_swept(batch.batch_id)
        return rows

    def _last_check(self, batch: Batch) -> tuple[Discrepancy, bool, dict[int, Holding]]:
        """What ClickHouse no longer holds of a batch, right before its rows are deleted; whether an unknown TTL may explain all
        of that; and the holdings with which later comparisons begin.
        """
        holdings = self.log.holdings([block.inserted_at_ms for block in batch.blocks])
        found = Discrepancy()
        ttl_unknown = 0
        observed = dict(batch.observed)
        for block in batch.blocks:
            at_ms = block.inserted_at_ms
            holding = holdings.get(at_ms, NO_ENTRIES)
            if not as_sealed(batch, block, holding) and self.excuses.past(batch.version, [at_ms])[at_ms]:
                continue
            compared = compare_block(self.outbox, self.log, batch, block, holding, excuses=self.excuses)
            if compared.settled and not batch.is_requeue(block):
                before = batch.observed.get(at_ms)
                observed[at_ms] = replace(holding, workspaces=before.workspaces if before else {})
            found += compared.discrepancy
            ttl_unknown += compared.ttl_unknown
        return found, bool(ttl_unknown) and found.total == ttl_unknown, observed

    def _with_workspaces(self, batch: Batch, own: PkSet, observed: dict[int, Holding]) -> dict[int, Holding]:
        """The holdings of insert groups whose rows are all still there, with counts by workspace where these are few."""
        counted = {}
        for block in batch.first_blocks:
            holding = observed.get(block.inserted_at_ms)
            if holding is None or holding.workspaces or block.pks - own:
                continue
            counts = self.upkeep.by_workspace(block.pks)
            if len(counts) <= MOST_WORKSPACES and sum(counts.values()) == block.rows:
                counted[block.inserted_at_ms] = replace(holding, workspaces=counts)
        return counted

    def _last_exported_by(self, batch: Batch) -> PkSet:
        """The rows of this batch that no later batch has exported again, or is about to export.

        If the batch marked all of its rows, rows with another mark are not its own: their pks began again.
        """
        pks = batch.pks
        if not batch.counts.unmarked and batch.exported_at_ms is not None:
            pks &= self.upkeep.stamped(batch.exported_at_ms, (batch.version,))
        later = [
            common for batch_id, common in self.upkeep.pks_by_batch(batch.pks).items() if batch_id > batch.batch_id
        ]
        return pks - PkSet.union(later)
