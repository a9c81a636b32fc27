"""MySQL: reads the ledger for operators, as pages of batches or one batch with all its values.

What does not belong here: the life of a batch (`mysql.outbox`), and the status (`mysql.status`).
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
# Claim times ascend with ids, unless the clock was set back. So a listing by time reads one more day.
CLOCK_STEP_MS = DAY_MS
_ABOVE_ALL_IDS = 2**63 - 1


def list_batches(outbox: MySQLOutbox, which: BatchFilter, limit: int) -> list[LedgerBatch]:
    """The newest `limit` of these batches, newest first, by pages of the ledger."""
    found = [line for state in which.states or (None,) for line in _newest(outbox, which, state, limit)]
    return sorted(found, key=lambda line: -line.batch_id)[:limit]


def _newest(outbox: MySQLOutbox, which: BatchFilter, state: State | None, limit: int) -> list[LedgerBatch]:
    found: list[LedgerBatch] = []
    for line in _all(outbox, which.before_id or _ABOVE_ALL_IDS, state):
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
        values = {"state": str(state), "before_id": before_id, "row_limit": PAGE_ROWS}
        lines = [
            _line(row) for row in outbox.rows("listing batches", SQL["page_in_state" if state else "page"], values)
        ]
        yield from lines
        if len(lines) < PAGE_ROWS:
            return
        before_id = lines[-1].batch_id


def show(outbox: MySQLOutbox, batch_id: int) -> BatchDetails | None:
    """All that the ledger has about one batch; None when there is no such batch."""
    rows = outbox.rows("reading a batch", SQL["one"], {"batch_id": batch_id})
    batches = outbox.batches([batch_id]) if rows else []
    return BatchDetails(line=_line(rows[0]), batch=batches[0]) if batches else None


def _line(row: Row[Any]) -> LedgerBatch:
    values = dict(row._mapping)
    del values["counts"]
    values["lease_left_s"] = values.pop("lease_left_ms") / 1000
    return LedgerBatch(**{**values, "state": State(row.state), "unmarked_rows": unmarked(row)})
