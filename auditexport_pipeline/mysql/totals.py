"""MySQL: what all closed batches of the ledger have exported together. The totals never fall.

A caller that keeps what it has read makes the next reading short.
"""

from __future__ import annotations

from auditexport_pipeline.core.metrics import Totals
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import statements

SQL = statements("mysql/totals.sql")
# Batches that one statement adds up, in a transaction of its own: a long snapshot would hold up the server's purge.
PAGE_BATCHES = 10_000
_NO_END = 2**63 - 1
# The last verification is searched among this many of the latest exports: more than a run has.
LOOK_BACK_BATCHES = 1_000


def read_totals(outbox: MySQLOutbox, known: Totals | None = None) -> tuple[Totals, Totals]:
    """(totals below the first open batch, totals of all closed batches).

    The first cannot change any more: pass it as `known`, and only later batches are read. Without `known` the whole
    ledger is read. Source: the ledger by its primary key. Raises `OutboxUnavailable` and `SetupIncomplete`.
    """
    with outbox.transaction("reading the totals") as connection:
        first_open = connection.execute(SQL["first_open"]).scalar()
    final = _add(outbox, known or Totals(), _NO_END if first_open is None else first_open - 1)
    return final, final if first_open is None else _add(outbox, final, _NO_END)


def _add(outbox: MySQLOutbox, total: Totals, to_id: int) -> Totals:
    while True:
        values = {"after_id": total.batch_id, "to_id": to_id, "row_limit": PAGE_BATCHES}
        with outbox.transaction("reading the totals") as connection:
            page = connection.execute(SQL["totals"], values).one()
        if page.seen:
            total = Totals(
                batch_id=int(page.last_id),
                batches=total.batches + int(page.batches),
                rows=total.rows + int(page.sent_rows) - int(page.unmarked_rows),
                entries=total.entries + int(page.entries),
                bytes=total.bytes + int(page.payload_bytes),
            )
        if page.seen < PAGE_BATCHES:
            return total


def last_verified_at_ms(outbox: MySQLOutbox) -> int | None:
    """When the last verification of a batch was, among the latest exports; None when there is none."""
    with outbox.transaction("reading the last verification") as connection:
        at_ms = connection.execute(SQL["last_verified"], {"row_limit": LOOK_BACK_BATCHES}).scalar()
    return None if at_ms is None else int(at_ms)
