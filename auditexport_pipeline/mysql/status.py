"""MySQL: the status, in statements whose cost does not grow with the tables.

`core.status` has the meaning of the numbers. `mysql.backlog` counts the backlog, for the sensor too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.backlog import COUNT_TO
from auditexport_pipeline.core.batch import OPEN, State
from auditexport_pipeline.core.claiming import CLEARED_OFTEN
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.open_findings import RECORDS_READ, open_findings
from auditexport_pipeline.core.status import (
    RATE_WINDOW_S,
    VIEWS_WINDOW_S,
    BatchTimes,
    ClearedOften,
    LastReconcile,
    LastSweep,
    OpenBatchStatus,
    Status,
    rate_of,
    runs_of,
)
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import actions, dead_letters
from auditexport_pipeline.mysql.backlog import probe
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import statements

SQL = statements("mysql/status.sql")
# Batches that are read for the last runs and the rate: more than one run of the default limits, some milliseconds.
LAST_BATCHES = 1_000
# Open, unverified or discrepant batches that are read; `auditexport batches list` pages through all of them.
LISTED_BATCHES = 200
# Batches of a day that are searched for a note on a view: twenty milliseconds.
SEARCHED_BATCHES = 20_000
LAST_RUNS = 5
_STAMPS = ("claimed_at_ms", "sealed_at_ms", "written_at_ms", "exported_at_ms", "verified_at_ms")


def read_status(outbox: MySQLOutbox, versions: Sequence[str] | None = None, *, count_to: int = COUNT_TO) -> Status:
    """The status by MySQL's clock. SELECT is the only grant that it needs; ClickHouse is not asked.

    Source: `drainer_pending_idx` of the outbox, the ledger by its indexes, dead letters by reason, the last actions.
    `versions` are those whose pending rows count, all known ones unless given. No lock. Raises `OutboxUnavailable` and
    `SetupIncomplete`.
    """
    with outbox.transaction("reading the status") as connection:
        now_ms = int(connection.execute(SQL["now_ms"]).scalar_one())
        day = {"from_ms": now_ms - VIEWS_WINDOW_S * 1000, "searched": SEARCHED_BATCHES}
        recent = {"from_ms": now_ms - RATE_WINDOW_S * 1000, "row_limit": LAST_BATCHES}
        listed = {"row_limit": LISTED_BATCHES}
        backlog = probe(connection, tuple(VERSIONS) if versions is None else versions, count_to)
        open_batches = tuple(_open_batch(row, now_ms) for row in connection.execute(SQL["open_batches"], listed))
        last = _times(connection, "last_batches", {"row_limit": LAST_BATCHES}, now_ms)
        exported = _times(connection, "exported_since", recent, now_ms)
        unverified = _not_swept(connection, State.EXPORTED, LISTED_BATCHES)
        unswept = _not_swept(connection, State.VERIFIED, 1)
        discrepant = _errors(connection, "discrepant", listed)
        failures = _errors(connection, "view_failures", {**day, **listed})
        often = connection.execute(SQL["cleared_often"], {**day, "often": CLEARED_OFTEN}).one_or_none()
        held = dead_letters.held_by_detail(connection) if backlog.held_rows else {}
        last_exported_at_ms = connection.execute(SQL["last_exported"]).scalar()
        first_claimed_at_ms = connection.execute(SQL["first_claimed"]).scalar()
    swept: list[Action] = []
    reconciled: list[Action] = []
    requeues, actions_read = 0, True
    try:
        with outbox.transaction("reading actions") as connection:
            swept = actions.last_of_verb(connection, "sweep", 1)
            reconciled = actions.last_of_verb(connection, "reconcile", RECORDS_READ)
            if often is not None:
                requeues = connection.execute(SQL["cleared_by_us"], {"from_ms": day["from_ms"]}).scalar_one()
    except SetupIncomplete:  # the exporter may not read them
        actions_read = False
    recent_rows, rows_per_s = rate_of(
        [batch for batch in exported if batch.state not in OPEN],
        [batch for batch in last if batch.state in OPEN and batch.leased],
        now_ms=now_ms,
    )
    return Status(
        at_ms=now_ms,
        backlog=backlog,
        recent_rows=recent_rows,
        rows_per_s=rows_per_s,
        open_batches=open_batches,
        runs=runs_of(last, now_ms=now_ms, complete=len(last) < LAST_BATCHES)[:LAST_RUNS],
        dead_by_reason=outbox.dead_by_reason(),
        unverified_batches=len(unverified),
        unverified_age_s=_age_s(unverified, now_ms),
        discrepant=discrepant,
        last_exported_at_ms=last_exported_at_ms,
        first_claimed_at_ms=first_claimed_at_ms,
        oldest_unswept_age_s=_age_s(unswept, now_ms),
        last_sweep=LastSweep.of(swept[0]) if swept else None,
        last_reconcile=LastReconcile.of(reconciled[0]) if reconciled else None,
        # Without those of the last reconciliation, which are in `last_reconcile`.
        open_findings=tuple(one for one in open_findings(reconciled) if one.at_ms != reconciled[0].at_ms),
        actions_read=actions_read,
        view_failures=failures,
        held_by_detail=held,
        cleared_often=_cleared_often(often, requeues),
    )


def _cleared_often(often: Row[Any] | None, requeues: int) -> ClearedOften | None:
    """Rows that were exported again within the last day, more often than requeues explain."""
    if often is None or (times := int(often.again) - requeues) <= CLEARED_OFTEN:
        return None
    return ClearedOften(batch_id=often.batch_id, rows=often.row_count, times=times)


def _errors(connection: Connection, statement: str, values: Mapping[str, int]) -> dict[int, str]:
    return {row.batch_id: row.last_error for row in connection.execute(SQL[statement], values)}


def _open_batch(row: Row[Any], now_ms: int) -> OpenBatchStatus:
    return OpenBatchStatus(
        batch_id=row.batch_id,
        state=State(row.state),
        version=row.version,
        rows=row.row_count,
        owner=row.owner,
        age_s=max(0.0, (now_ms - row.claimed_at_ms) / 1000),
        lease_left_s=(row.lease_until_ms - now_ms) / 1000,
        attempts=row.attempts,
        last_error=row.last_error,
    )


def _times(connection: Connection, statement: str, values: Mapping[str, int], now_ms: int) -> list[BatchTimes]:
    return [
        BatchTimes(
            batch_id=row.batch_id,
            epoch=row.epoch,
            owner=row.owner,
            state=State(row.state),
            rows=row.row_count - unmarked(row),
            claimed_at_ms=row.claimed_at_ms,
            last_at_ms=max(at_ms for name in _STAMPS if (at_ms := getattr(row, name)) is not None),
            leased=row.lease_until_ms > now_ms,
        )
        for row in connection.execute(SQL[statement], values)
    ]


def unmarked(row: Row[Any]) -> int:
    """Rows that a batch sent and could not mark, because others had deleted or marked them."""
    return msgspec.json.decode(row.counts, type=dict[str, int]).get("unmarked", 0) if row.counts else 0


def _not_swept(connection: Connection, state: State, row_limit: int) -> list[int]:
    """When batches in this state, whose rows are still in the outbox, were exported; oldest first."""
    rows = connection.execute(SQL["not_swept"], {"state": str(state), "row_limit": row_limit})
    return [row.exported_at_ms for row in rows]


def _age_s(exported_at_ms: list[int], now_ms: int) -> float:
    return max(0.0, (now_ms - exported_at_ms[0]) / 1000) if exported_at_ms else 0.0
