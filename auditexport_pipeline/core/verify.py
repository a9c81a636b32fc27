"""Verifying: what ClickHouse holds of a batch, counted and fingerprinted, compared with the ledger right after an export.

The comparison entry by entry is `core.compare`; that of both stores over a window of time is `core.reconcile`.

The fingerprint of an entry is the xxHash64 of its event_id, time, workspace_id, bucket, source, event,
description, actor type, id and name, remote_ip, user_agent, correlation_id, and its targets' types, ids
and names: every column whose stored bytes follow from the payload alone. The metas are left out because
ClickHouse's JSON type keeps their meaning and not their bytes (key order, 1.0 and 1, null and absent).
A block's fingerprint is the sum over its entries modulo 2^64, so neither order nor merges of parts
matter. Python computes it from the outbox, ClickHouse from its columns; neither sees the other's sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from auditexport_pipeline.core.batch import NO_ENTRIES, Batch
from auditexport_pipeline.core.compare import compare_block
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.excuses import Excuses
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Maintenance, Outbox
from auditexport_pipeline.core.versions import VERSIONS

# A run also verifies batches of runs that died before they verified: at most this many; the next plan takes the rest.
LEFTOVERS = 200


def verify_recent(
    outbox: Outbox, log: AuditLog, batches: int, *, upkeep: Maintenance | None = None
) -> dict[int, Discrepancy]:
    """`verify` for exported batches that are not verified: this many of this run, and `LEFTOVERS` of earlier runs."""
    return verify(outbox, log, outbox.unverified(batches + LEFTOVERS), upkeep=upkeep)


def verify(
    outbox: Outbox, log: AuditLog, batches: Sequence[Batch], *, upkeep: Maintenance | None = None
) -> dict[int, Discrepancy]:
    """Compares exported batches with ClickHouse and records the outcome; returns it by batch id.

    A batch of a run that died can be compared long after its export. So entries that are gone may be past the TTL or
    erased on record: `upkeep` reads the erasures, if this user has the grant.

    Source: one grouped look-up by `inserted_at` in `audit_logs_raw_v1` for all blocks. Only where count or
    fingerprint differ, and for requeued batches, are rows read again. Durable effect: the ledger's
    `verified` or `discrepant`, and what ClickHouse held, with which reconciliation compares later. Batches of a
    version that is not installed stay as they are: their rows cannot be decoded.
    """
    batches = [batch for batch in batches if batch.version in VERSIONS]
    holdings = log.holdings([block.inserted_at_ms for batch in batches for block in batch.blocks])
    outcome: dict[int, Discrepancy] = {}
    excuses: Excuses | None = None
    for batch in batches:
        found = Discrepancy()
        observed = {}
        for block in batch.blocks:
            holding = holdings.get(block.inserted_at_ms, NO_ENTRIES)
            compared = compare_block(outbox, log, batch, block, holding, excuses=excuses)
            if compared.discrepancy and excuses is None and upkeep is not None:
                excuses, upkeep = _excuses(upkeep, log), None  # read once, also in vain
                compared = compare_block(outbox, log, batch, block, holding, excuses=excuses)
            # A requeue compares its own rows only, not the whole group.
            if compared.settled and not batch.is_requeue(block):
                observed[block.inserted_at_ms] = holding
            found += compared.discrepancy
        outbox.record_verified(batch, found, observed)
        outcome[batch.batch_id] = found
    return outcome


def _excuses(upkeep: Maintenance, log: AuditLog) -> Excuses | None:
    """None for a user who may not read the erasures: then a reconciliation finds them."""
    try:
        return Excuses(upkeep, log)
    except SetupIncomplete:
        return None
