"""Verifying: what ClickHouse holds of a batch, counted and fingerprinted against the ledger.

What belongs here: the comparison of one exported batch, and why a difference is or is not a
discrepancy. What does not: comparing both stores over a window of time (`core.reconcile`).

The fingerprint of an entry is the xxHash64 of its event_id, time, workspace_id, bucket, source, event,
description, actor type, id and name, remote_ip, user_agent, correlation_id, and its targets' types, ids
and names: every column whose stored bytes follow from the payload alone. The metas are left out because
ClickHouse's JSON type keeps their meaning and not their bytes (key order, 1.0 and 1, null and absent).
A block's fingerprint is the sum over its entries modulo 2^64, so neither order nor merges of parts
matter. Python computes it from the outbox, ClickHouse from its columns; neither sees the other's sum.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence

from auditexport_pipeline.core.batch import Batch, Block
from auditexport_pipeline.core.event import VERSIONS, Undecodable
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox, StoredEntry

# Event ids named in a discrepancy: enough to look, few enough for one line.
NAMED_EVENTS = 10


def verify(outbox: Outbox, log: AuditLog, batches: Sequence[Batch]) -> dict[int, Discrepancy]:
    """Compares exported batches with ClickHouse and records the outcome; returns it by batch id.

    Source: one grouped look-up by `inserted_at` in `audit_logs_raw_v1` for all blocks. Only where count or
    fingerprint differ, and for requeued batches, are rows read again. Durable effect: the ledger's
    `verified` or `discrepant`.
    """
    holdings = log.holdings([block.inserted_at_ms for batch in batches for block in batch.blocks])
    outcome: dict[int, Discrepancy] = {}
    for batch in batches:
        found = Discrepancy()
        for block in batch.blocks:
            holding = holdings.get(block.inserted_at_ms)
            as_sealed = holding is not None and (holding.rows, holding.fingerprint) == (block.rows, block.fingerprint)
            if not as_sealed:
                found = _add(found, _compare(outbox, log, batch, block))
        outbox.record_verified(batch, found)
        outcome[batch.batch_id] = found
    return outcome


def _compare(outbox: Outbox, log: AuditLog, batch: Batch, block: Block) -> Discrepancy:
    """Entry by entry: what is missing, there more than once, there without having been sent, or altered.

    A requeued batch shares its `inserted_at` with its first export, and two copies of an entry there are
    one event until they merge, so only what is missing or altered counts. An entry that is not where this
    batch put it but elsewhere was collapsed into a later copy of the same event.
    """
    decode = VERSIONS[batch.version].decode
    expected: dict[tuple[str, str, int, str], int] = {}
    unreadable = 0
    for row in outbox.read(block.pks, row_bytes=block.row_bytes):
        event = decode(row)
        if isinstance(event, Undecodable):
            unreadable += 1
        else:
            expected[event.key] = event.fingerprint
    stored: defaultdict[tuple[str, str, int, str], list[int]] = defaultdict(list)
    for entry in log.entries_at(block.inserted_at_ms):
        stored[entry.key].append(entry.fingerprint)

    absent = [key for key in expected if key not in stored]
    superseded = {entry.key for entry in _in_portions(log, absent)}
    missing = [key for key in absent if key not in superseded]
    altered = [key for key, fingerprint in expected.items() if key in stored and fingerprint not in stored[key]]
    twice: list[tuple[str, str, int, str]] = []
    unexpected = 0
    # Rows gone from the outbox since the seal leave no expectation to hold ClickHouse against.
    unknown = block.rows - len(expected) - unreadable
    if batch.generation == 0:
        twice = [key for key, copies in stored.items() if len(copies) > 1]
        unexpected = max(0, sum(1 for key in stored if key not in expected) - max(0, unknown))
    return Discrepancy(
        missing=len(missing),
        duplicated=sum(len(stored[key]) - 1 for key in twice),
        unexpected=unexpected,
        altered=len(altered),
        event_ids=tuple(key[3] for key in (missing + altered + twice)[:NAMED_EVENTS]),
    )


def _in_portions(log: AuditLog, keys: list[tuple[str, str, int, str]], size: int = 1_000) -> list[StoredEntry]:
    return [entry for start in range(0, len(keys), size) for entry in log.entries_of(keys[start : start + size])]


def _add(one: Discrepancy, other: Discrepancy) -> Discrepancy:
    total = Counter(
        missing=one.missing + other.missing,
        duplicated=one.duplicated + other.duplicated,
        unexpected=one.unexpected + other.unexpected,
        altered=one.altered + other.altered,
    )
    return Discrepancy(**total, event_ids=(one.event_ids + other.event_ids)[:NAMED_EVENTS])
