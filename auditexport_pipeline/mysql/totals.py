"""MySQL: what all batches of the ledger have exported together, as a number that never goes back.

What belongs here: adding the ledger up, in bounded pages, and only what is new when the caller remembers the rest. What
does not: how the export stands (`mysql.status`), and who asks (`cli.metrics`).
"""

from __future__ import annotations

from sqlalchemy import TextClause, text

from auditexport_pipeline.core.metrics import Totals
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.sql import load

SQL: dict[str, TextClause] = {name: text(statement) for name, statement in load("mysql/totals.sql").items()}
# Batches added up by one statement, each in a transaction of its own: no long snapshot holds the server's purge up.
PAGE_BATCHES = 10_000
_NO_END = 2**63 - 1
# Batches among whose verifications the last one is looked for: more than a run has.
LOOK_BACK_BATCHES = 1_000


def read_totals(outbox: MySQLOutbox, known: Totals | None = None) -> tuple[Totals, Totals]:
    """(what is closed for good, what is closed): hand the first back as `known`, and only what came after is read.

    Source: the ledger by its primary key. The ledger keeps every batch, swept and compacted ones too, so the sum only
    grows; an open batch counts once it is closed. Without `known` the whole ledger is read, 10,000 batches at a time.
    Raises `OutboxUnavailable` and `SetupIncomplete`.
    """
    with outbox.transaction("reading the totals") as connection:
        first_open = connection.execute(SQL["first_open"]).scalar()
    closed = _added(outbox, known or Totals(), _NO_END if first_open is None else first_open - 1)
    if first_open is None:
        return closed, closed
    return closed, closed + _added(outbox, Totals(batch_id=closed.batch_id), _NO_END)


def _added(outbox: MySQLOutbox, known: Totals, to_id: int) -> Totals:
    total = known
    while True:
        with outbox.transaction("reading the totals") as connection:
            page = connection.execute(
                SQL["totals"], {"after_id": total.batch_id, "to_id": to_id, "row_limit": PAGE_BATCHES}
            ).one()
        if page.seen:
            total += Totals(
                batch_id=int(page.last_id),
                batches=int(page.batches),
                rows=int(page.sent_rows) - int(page.unmarked_rows),
                entries=int(page.entries),
                bytes=int(page.payload_bytes),
            )
        if page.seen < PAGE_BATCHES:
            return total


def last_verified_at_ms(outbox: MySQLOutbox) -> int | None:
    """When a batch was verified last, among the latest exports; None when none was."""
    with outbox.transaction("reading the last verification") as connection:
        at_ms = connection.execute(SQL["last_verified"], {"row_limit": LOOK_BACK_BATCHES}).scalar()
    return None if at_ms is None else int(at_ms)
