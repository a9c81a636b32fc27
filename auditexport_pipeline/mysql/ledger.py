"""MySQL: the ledger for operators.

What belongs here: pages of batches and everything about one batch. What does not: the life of a batch (`mysql.outbox`), and
the numbers of a moment (`mysql.status`).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Row

from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.ledger import BatchDetails, BatchFilter, LedgerBatch
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import statements
from auditexport_pipeline.mysql.status import unmarked

SQL = statements("mysql/ledger.sql")
# Rows of one statement: a few milliseconds.
PAGE_ROWS = 500
# Claims are in the order of their ids, unless the clock was set back: a listing by time stops a day beyond its start.
CLOCK_STEP_MS = DAY_MS
_BEYOND_ALL = 2**63 - 1


def list_batches(outbox: MySQLOutbox, which: BatchFilter, limit: int) -> list[LedgerBatch]:
    """The newest `limit` of these batches, newest first, by pages of the ledger."""
    found = [line for state in which.states or (None,) for line in _newest(outbox, which, state, limit)]
    return sorted(found, key=lambda line: -line.batch_id)[:limit]


def _newest(outbox: MySQLOutbox, which: BatchFilter, state: State | None, limit: int) -> list[LedgerBatch]:
    found: list[LedgerBatch] = []
    for line in _all(outbox, which.before_id or _BEYOND_ALL, state):
        if which.since_ms is not None and line.claimed_at_ms < which.since_ms:
            if line.claimed_at_ms < which.since_ms - CLOCK_STEP_MS:
                break
            continue
        if line.owner.startswith(which.owner):
            found.append(line)
            if len(found) == limit:
                break
    return found


def _all(outbox: MySQLOutbox, before_id: int, state: State | None) -> Iterator[LedgerBatch]:
    while True:
        with outbox.transaction("listing batches") as connection:
            if state is None:
                rows = connection.execute(SQL["page"], {"before_id": before_id, "row_limit": PAGE_ROWS})
            else:
                values = {"state": str(state), "before_id": before_id, "row_limit": PAGE_ROWS}
                rows = connection.execute(SQL["page_in_state"], values)
            lines = [_line(row) for row in rows]
        yield from lines
        if len(lines) < PAGE_ROWS:
            return
        before_id = lines[-1].batch_id


def show(outbox: MySQLOutbox, batch_id: int) -> BatchDetails | None:
    """Everything that the ledger holds about one batch; None when there is no such batch."""
    with outbox.transaction("reading a batch") as connection:
        row = connection.execute(SQL["one"], {"batch_id": batch_id}).one_or_none()
    found = outbox.batches([batch_id]) if row is not None else []
    return BatchDetails(line=_line(row), batch=found[0]) if row is not None and found else None


def _line(row: Row[Any]) -> LedgerBatch:
    return LedgerBatch(
        batch_id=row.batch_id,
        epoch=row.epoch,
        generation=row.generation,
        version=row.version,
        state=State(row.state),
        owner=row.owner,
        claimed_rows=row.claimed_rows,
        rows=row.row_count,
        unmarked_rows=unmarked(row),
        entries=row.entry_count,
        bytes=row.bytes,
        attempts=row.attempts,
        digest=row.digest,
        first_pk=row.first_pk,
        last_pk=row.last_pk,
        claimed_at_ms=row.claimed_at_ms,
        sealed_at_ms=row.sealed_at_ms,
        written_at_ms=row.written_at_ms,
        exported_at_ms=row.exported_at_ms,
        verified_at_ms=row.verified_at_ms,
        swept_at_ms=row.swept_at_ms,
        swept_rows=row.swept_rows,
        lease_left_s=row.lease_left_ms / 1000,
        last_error=row.last_error,
    )
