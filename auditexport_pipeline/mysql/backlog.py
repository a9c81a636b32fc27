"""The probe of the backlog, in statements whose cost does not grow with the table. `core.backlog` decides on the numbers."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy import Connection

from auditexport_pipeline.core.backlog import Backlog, Lease
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.mysql.statements import SQL

# At most this many pending versions are read.
MOST_VERSIONS = 50
# Rows that the collation takes for one version, and that are searched for other spellings: some ten milliseconds.
SEARCHED_ROWS = 10_000
# The oldest pending rows of a version whose created_at is read: each is one look-up by primary key.
OLDEST_ROWS = 100


def probe(connection: Connection, versions: Sequence[str], count_to: int) -> Backlog:
    """The backlog; pending rows are counted up to `count_to`, without those that dead letters keep out of batches.

    Source: `drainer_pending_idx`, the ledger's `state_idx`. No lock.
    """
    dead = list(connection.execute(SQL["count_dead"]))
    dead_rows = sum(row.n for row in dead if row.state == "open")
    held_rows = sum(row.n for row in dead if row.state == "held")
    # The row of a letter may be gone: so rows without a letter are counted, and letters are not subtracted.
    count = SQL["count_beside_letters" if dead else "count_pending"]
    rows = odd_rows = 0
    lags_ms: list[int] = []
    odd_pk: int | None = None
    for version in versions:
        rows += connection.execute(count, {"version": version, "row_limit": count_to}).scalar_one()
        oldest = connection.execute(SQL["oldest_pending"], {"version": version, "row_limit": OLDEST_ROWS}).one_or_none()
        if oldest is None:
            continue
        if oldest.odd_rows:
            odd_rows += int(oldest.odd_rows)
            odd_pk = oldest.odd_pk if odd_pk is None else min(odd_pk, oldest.odd_pk)
        # Without a sound created_at, a row has waited since the last claim at most.
        lag_ms = oldest.lag_ms if oldest.lag_ms is not None else connection.execute(SQL["last_claim_ago"]).scalar_one()
        lags_ms.append(int(lag_ms))
    unknown = _unknown(connection, versions, count_to)
    open_batches = list(connection.execute(SQL["open_batches"]))
    # A stopped batch only waits for the end of its lease.
    worked_on = [row for row in open_batches if row.state != State.STOPPED.value]
    return Backlog(
        rows=rows,
        rows_at_least=rows >= count_to,
        lag_s=max(0, *lags_ms, 0) / 1000,
        odd_created_rows=odd_rows,
        odd_created_pk=odd_pk,
        unknown_rows=sum(unknown.values()),
        unknown_versions=tuple(unknown),
        dead_rows=dead_rows,
        held_rows=held_rows,
        open_batches=len(open_batches),
        waiting_batches=sum(1 for row in open_batches if row.state == State.STOPPED.value and not row.lease_expired),
        leasing_owners=tuple(sorted({row.owner for row in worked_on if not row.lease_expired})),
        leases=tuple(Lease(owner=row.owner, process=row.at_work, left_s=row.lease_left_ms / 1000) for row in worked_on),
        unknown_by_version=unknown,
    )


def _unknown(connection: Connection, versions: Sequence[str], count_to: int) -> dict[str, int]:
    unknown: dict[str, int] = {}
    # The empty text is a version too. If a collation pads with spaces, control characters sort below it.
    found = connection.execute(SQL["pending_version_to_empty"]).scalar()
    if found is None:
        found = connection.execute(SQL["next_pending_version"], {"version": ""}).scalar()
    for _ in range(MOST_VERSIONS):
        if found is None:
            break
        values = {"version": found, "row_limit": SEARCHED_ROWS if found in versions else count_to}
        for row in connection.execute(SQL["versions_like"], values):
            version = bytes(row.exact).decode()
            if version not in versions:
                unknown[version] = unknown.get(version, 0) + row.n
        found = connection.execute(SQL["next_pending_version"], {"version": found}).scalar()
    return unknown
