"""MySQL: how the export stands, in statements whose cost does not grow with the tables.

What belongs here: reading a `core.status.Status`. What does not: what the numbers mean (`core.status`), and the backlog's
probe, which the sensor uses too (`mysql.backlog`).
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from auditexport_pipeline.core.actions import Action
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
# Counting stops here: beyond, nobody wants to know how many, and the count takes a quarter of a second.
COUNT_BACKLOG_TO = 1_000_000
# Batches looked back at for the last runs and the rate: more than one run of the default limits, some milliseconds.
LAST_BATCHES = 1_000
# Open, unverified or discrepant batches that are looked at; `auditexport batches list` pages through all of them.
STANDING_BATCHES = 200
# Batches of a day that are looked at for a note on a view: twenty milliseconds.
VIEWS_LOOKED_AT = 20_000
# Runs that are told of.
LAST_RUNS = 5


def read_status(
    outbox: MySQLOutbox, versions: Sequence[str] | None = None, *, count_to: int = COUNT_BACKLOG_TO
) -> Status:
    """How the export stands, by MySQL's clock. A user that may only read can ask; ClickHouse is not asked.

    Source: `drainer_pending_idx` of the outbox, the ledger by its indexes, dead letters by reason, the last actions.
    `versions` are those whose pending rows count, all known ones unless given. No lock. Raises `OutboxUnavailable` and `SetupIncomplete`.
    """
    with outbox.transaction("reading the status") as connection:
        now_ms = int(connection.execute(SQL["now_ms"]).scalar_one())
        backlog = probe(connection, tuple(VERSIONS) if versions is None else versions, count_to)
        open_batches = read_open_batches(connection, now_ms)
        last = _times(connection, "last_batches", {"row_limit": LAST_BATCHES}, now_ms)
        exported = _times(
            connection,
            "exported_since",
            {"from_ms": now_ms - RATE_WINDOW_S * 1000, "row_limit": LAST_BATCHES},
            now_ms,
        )
        unverified = _not_swept(connection, State.EXPORTED, STANDING_BATCHES)
        discrepant = {
            row.batch_id: row.last_error
            for row in connection.execute(SQL["discrepant"], {"row_limit": STANDING_BATCHES})
        }
        failures = view_failures(connection, now_ms)
        held = dead_letters.held_by_detail(connection) if backlog.held_rows else {}
        unswept = _not_swept(connection, State.VERIFIED, 1)
        last_exported_at_ms = connection.execute(SQL["last_exported"]).scalar()
        first_claimed_at_ms = connection.execute(SQL["first_claimed"]).scalar()
    swept, looks, actions_read = _last_actions(outbox)
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
        last_sweep=LastSweep.of(swept) if swept is not None else None,
        last_reconcile=LastReconcile.of(looks[0]) if looks else None,
        # The last one's own findings are told of as its.
        open_findings=tuple(finding for finding in open_findings(looks) if finding.at_ms != looks[0].at_ms)
        if looks
        else (),
        actions_read=actions_read,
        view_failures=failures,
        held_by_detail=held,
        cleared_often=cleared_often(outbox, now_ms),
    )


def view_failures(connection: Connection, now_ms: int) -> dict[int, str]:
    """Batches of the last day that are stored while a materialized view failed on them, newest first, and the view."""
    values = {
        "from_ms": now_ms - VIEWS_WINDOW_S * 1000,
        "looked_at": VIEWS_LOOKED_AT,
        "row_limit": STANDING_BATCHES,
    }
    return {row.batch_id: row.last_error for row in connection.execute(SQL["view_failures"], values)}


def cleared_often(outbox: MySQLOutbox, now_ms: int) -> ClearedOften | None:
    """Rows that were exported again and again within the last day, more often than actions of ours explain."""
    values = {"from_ms": now_ms - VIEWS_WINDOW_S * 1000}
    with outbox.transaction("looking for marks that are cleared") as connection:
        look = {**values, "looked_at": VIEWS_LOOKED_AT, "often": CLEARED_OFTEN}
        found = connection.execute(SQL["cleared_often"], look).one_or_none()
    if found is None:
        return None
    ours = 0
    with suppress(SetupIncomplete):  # the exporter need not read actions
        with outbox.transaction("counting requeues") as connection:
            ours = connection.execute(SQL["cleared_by_us"], values).scalar_one()
    times = int(found.again) - ours
    return ClearedOften(batch_id=found.batch_id, rows=found.row_count, times=times) if times > CLEARED_OFTEN else None


def read_open_batches(connection: Connection, now_ms: int) -> tuple[OpenBatchStatus, ...]:
    """The oldest batches that are not closed. Source: the ledger's `state_idx`."""
    return tuple(
        OpenBatchStatus(
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
        for row in connection.execute(SQL["open_batches"], {"row_limit": STANDING_BATCHES})
    )


def _times(connection: Connection, statement: str, values: dict[str, int], now_ms: int) -> list[BatchTimes]:
    return [
        BatchTimes(
            batch_id=row.batch_id,
            epoch=row.epoch,
            owner=row.owner,
            state=State(row.state),
            rows=row.row_count - unmarked(row),
            claimed_at_ms=row.claimed_at_ms,
            last_at_ms=max(
                at_ms
                for at_ms in (
                    row.claimed_at_ms,
                    row.sealed_at_ms,
                    row.written_at_ms,
                    row.exported_at_ms,
                    row.verified_at_ms,
                )
                if at_ms is not None
            ),
            leased=row.lease_until_ms > now_ms,
        )
        for row in connection.execute(SQL[statement], values)
    ]


def unmarked(row: Row[Any]) -> int:
    """Rows that a batch sent and could not mark, because somebody else had deleted or marked them."""
    return msgspec.json.decode(row.counts, type=dict[str, int]).get("unmarked", 0) if row.counts else 0


def _not_swept(connection: Connection, state: State, row_limit: int) -> list[int]:
    """When batches in this state, whose rows are still there, were exported; oldest first."""
    rows = connection.execute(SQL["not_swept"], {"state": str(state), "row_limit": row_limit})
    return [row.exported_at_ms for row in rows]


def _age_s(exported_at_ms: list[int], now_ms: int) -> float:
    return max(0.0, (now_ms - exported_at_ms[0]) / 1000) if exported_at_ms else 0.0


def _last_actions(outbox: MySQLOutbox) -> tuple[Action | None, list[Action], bool]:
    """The last sweep, the last reconciliations, newest first, and whether this user may read them: the exporter's need not."""
    try:
        with outbox.transaction("reading what was done") as connection:
            swept = actions.last_of_verb(connection, "sweep", 1)
            return swept[0] if swept else None, actions.last_of_verb(connection, "reconcile", RECORDS_READ), True
    except SetupIncomplete:
        return None, [], False
