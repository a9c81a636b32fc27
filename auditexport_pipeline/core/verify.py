"""Verifying: what ClickHouse holds of a batch, counted and fingerprinted against the ledger.

What belongs here: the check right after an export, and what it records. What does not: the comparison entry by
entry (`core.compare`), and comparing both stores over a window of time (`core.reconcile`).

The fingerprint of an entry is the xxHash64 of its event_id, time, workspace_id, bucket, source, event,
description, actor type, id and name, remote_ip, user_agent, correlation_id, and its targets' types, ids
and names: every column whose stored bytes follow from the payload alone. The metas are left out because
ClickHouse's JSON type keeps their meaning and not their bytes (key order, 1.0 and 1, null and absent).
A block's fingerprint is the sum over its entries modulo 2^64, so neither order nor merges of parts
matter. Python computes it from the outbox, ClickHouse from its columns; neither sees the other's sum.
"""

from __future__ import annotations

from collections.abc import Sequence

from auditexport_pipeline.core.batch import NO_ENTRIES, Batch, Block, Holding
from auditexport_pipeline.core.compare import InsertGroup, compare, compare_at_rest
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox
from auditexport_pipeline.core.versions import VERSIONS

# A run also verifies batches of runs that died before they verified: at most this many; the next plan takes the rest.
LEFTOVERS = 200


def verify_recent(outbox: Outbox, log: AuditLog, batches: int) -> dict[int, Discrepancy]:
    """`verify` for exported batches that are not verified: this many of this run, and `LEFTOVERS` of earlier runs."""
    return verify(outbox, log, outbox.unverified(batches + LEFTOVERS))


def verify(outbox: Outbox, log: AuditLog, batches: Sequence[Batch]) -> dict[int, Discrepancy]:
    """Compares exported batches with ClickHouse and records the outcome; returns it by batch id.

    Source: one grouped look-up by `inserted_at` in `audit_logs_raw_v1` for all blocks. Only where count or
    fingerprint differ, and for requeued batches, are rows read again. Durable effect: the ledger's
    `verified` or `discrepant`, and what ClickHouse held, with which reconciliation compares later. Batches of a
    version that is not installed stay as they are: nobody can say what their entries should be.
    """
    batches = [batch for batch in batches if batch.version in VERSIONS]
    holdings = log.holdings([block.inserted_at_ms for batch in batches for block in batch.blocks])
    outcome: dict[int, Discrepancy] = {}
    for batch in batches:
        found = Discrepancy()
        observed = {}
        for block in batch.blocks:
            holding = holdings.get(block.inserted_at_ms, NO_ENTRIES)
            if not as_sealed(batch, block, holding):
                if batch.is_requeue(block):
                    group = InsertGroup(inserted_at_ms=block.inserted_at_ms, blocks=((batch, block),))
                    wrong = compare(outbox, log, group).discrepancy
                else:  # together with requeues that came before this verification
                    wrong = compare_at_rest(outbox, log, batch, block).discrepancy
                found += wrong
                if wrong:
                    continue
            if not batch.is_requeue(block):  # a requeue looks at its own rows only, not at the whole group
                observed[block.inserted_at_ms] = holding
        outbox.record_verified(batch, found, observed)
        outcome[batch.batch_id] = found
    return outcome


def as_sealed(batch: Batch, block: Block, holding: Holding) -> bool:
    """Whether ClickHouse holds exactly a block's entries under its `inserted_at`.

    A requeue of a whole block is there as often as it was sent: every entry has that many equal copies.
    """
    times = holding.rows // block.rows if batch.is_requeue(block) else 1
    return (holding.rows, holding.fingerprint, holding.copies) == (
        block.rows * times,
        block.fingerprint * times % 2**64,
        block.rows * (times - 1),
    ) and times > 0
