"""Counting for a page: what both databases hold over a window, by hour, by batch and by day.

What belongs here: the statements of `source.sql` in bounded steps, and their answers as values of `core.series`. What
does not: what a difference means (`core.reconcile`), and how anything looks (`report`).
"""

from __future__ import annotations

from collections import Counter
from string import Template
from typing import Any

from sqlalchemy import TextClause, bindparam, text

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.connection import LOOK_UP_TIMEOUT_S
from auditexport_pipeline.core.batch import OPEN, State, blocks_from_text
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.reconcile import SLOTS_APART_MS
from auditexport_pipeline.core.series import DAY_MS, BatchLine, Compared, Grid, LagBin, LetterCount, Servers
from auditexport_pipeline.core.versions import VERSIONS, PayloadVersion
from auditexport_pipeline.mysql.checks import server_version
from auditexport_pipeline.mysql.maintenance import SCAN_PKS
from auditexport_pipeline.mysql.marking import by_shape
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.sql import load

_LISTS = {"hours_in": "pks"}
_PIECES = {
    name.removeprefix("clickhouse."): statement
    for name, statement in load("report/source.sql").items()
    if name.startswith("clickhouse.")
}
SQL: dict[str, TextClause] = {
    name: text(statement).bindparams(bindparam(_LISTS[name], expanding=True)) if name in _LISTS else text(statement)
    for name, statement in (
        (full_name.removeprefix("mysql."), statement)
        for full_name, statement in load("report/source.sql").items()
        if full_name.startswith("mysql.")
    )
}

# Rows whose hour is read from the outbox: some ten seconds of reading by primary key, and what reconciliation reads of
# them anyway. Of a busier window, the page counts the newest exports and says since when.
ROWS_COUNTED = 1_000_000
# Pending rows whose hour is read, oldest first.
PENDING_COUNTED = 200_000
# Batches whose blocks are read, and how many at a time: their pks can take a megabyte each.
BATCHES_COUNTED = 20_000
BATCHES_AT_ONCE = 200
# `inserted_at`s that ClickHouse is told to leave out: the list travels in one field of a form, of 128 KB at most.
MOST_EXCLUDED = 7_000
LETTERS_COUNTED = 200_000
DISCREPANT_SHOWN = 100
# What an application calls the beginning of a row is believed up to here: a lag beyond five years is a wrong clock.
LONGEST_LAG_MS = 5 * 365 * DAY_MS
AHEAD_MS = DAY_MS


def servers(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> Servers:
    """Families and versions of both servers, and the names of the databases."""
    with outbox.transaction("asking for the version") as connection:
        mysql = connection.execute(SQL["server"]).one()
    ((clickhouse, database),) = log.rows("asking for the version", _PIECES["server"]).result_rows
    family, _ = server_version(mysql.version)
    return Servers(
        mysql=f"{family} {mysql.version.removeprefix('5.5.5-').split('-')[0]}",
        mysql_database=mysql.database_name,
        clickhouse=f"ClickHouse {clickhouse}",
        clickhouse_database=str(database),
    )


# ── both sides, by the hour of the event ─────────────────────────────────────────────────────────


def compared(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> Compared:
    """The first exports of [from, to) that both sides can be counted for, newest first until a limit is reached.

    Source: the ledger, by `inserted_idx`, a few hundred batches a statement. No lock.
    """
    runs: list[tuple[int, int]] = []
    excluded: list[int] = []
    batches = rows = swept_entries = open_batches = 0
    before_ms, since_ms, cut_short = to_ms + SLOTS_APART_MS, from_ms, False
    while not cut_short:
        values = {"from_ms": from_ms, "before_ms": before_ms, "row_limit": BATCHES_AT_ONCE}
        with outbox.transaction("reading the ledger") as connection:
            page = list(connection.execute(SQL["blocks"], values))
        for row in page:
            blocks = [block for block in blocks_from_text(row.manifest)[0] if from_ms <= block.inserted_at_ms < to_ms]
            if batches >= BATCHES_COUNTED or rows >= ROWS_COUNTED or len(excluded) >= MOST_EXCLUDED:
                # The slots of the batches looked at all lie above those of this one, but for a few cut again.
                cut_short, since_ms = True, row.inserted_at_ms + 1
                break
            batches += 1
            gone = row.swept_at_ms is not None or row.swept_rows > 0 or row.state == State.COMPACTED.value
            if gone or row.state in {state.value for state in OPEN}:
                excluded.extend(block.inserted_at_ms for block in blocks)
                swept_entries += row.entry_count if gone else 0
                open_batches += 0 if gone else 1
                continue
            for block in blocks:
                runs.extend(block.pks.runs)
                rows += block.rows
        if len(page) < BATCHES_AT_ONCE:
            break
        before_ms = page[-1].inserted_at_ms
    return Compared(
        from_ms=since_ms,
        to_ms=to_ms,
        pks=PkSet() | PkSet(tuple(runs)),
        excluded=tuple(excluded),
        batches=batches,
        swept_entries=swept_entries,
        open_batches=open_batches,
        cut_short=cut_short,
    )


def rows_by_hour(outbox: MySQLOutbox, pks: PkSet, grid: Grid) -> Counter[int]:
    """How many of these rows the outbox holds in each bin of the grid, by the time of the event.

    Source: the outbox by primary key, some thousand rows a statement. No lock.
    """
    counts: Counter[int] = Counter()
    where = {"low_ms": grid.low_ms, "high_ms": grid.high_ms, "step_ms": grid.step_ms}
    for chunk in pks.chunks(SCAN_PKS):
        with outbox.transaction("counting rows by hour") as connection:
            for statement, values in by_shape("hours", chunk):
                for row in connection.execute(SQL[statement], {**values, **where}):
                    if row.bin is not None:
                        counts[int(row.bin)] += row.n
    return counts


def pending(outbox: MySQLOutbox) -> PkSet:
    """The oldest pending rows of known versions that no dead letter holds, at most `PENDING_COUNTED` of each version."""
    pks = PkSet()
    for version in VERSIONS:
        with outbox.transaction("reading pending rows") as connection:
            rows = connection.execute(SQL["pending"], {"version": version, "row_limit": PENDING_COUNTED})
            pks |= PkSet.of(row.pk for row in rows)
    return pks


def entries_by_hour(log: ClickHouseAuditLog, these: Compared, grid: Grid) -> Counter[int]:
    """How many events ClickHouse holds of these exports in each bin of the grid; copies count once, as in `audit_logs`."""
    counts: Counter[int] = Counter()
    for version in VERSIONS.values():
        found = log.rows(
            "counting entries by hour",
            _by_hour(version),
            {
                "low_ms": grid.low_ms,
                "high_ms": grid.high_ms,
                "step_ms": grid.step_ms,
                "from_ms": these.from_ms,
                "to_ms": these.to_ms,
                "excluded": list(these.excluded) or [-1],  # no inserted_at is negative; an empty list is no list to it
            },
            {"max_execution_time": LOOK_UP_TIMEOUT_S},
        )
        counts.update({int(number): int(entries) for number, entries in found.result_rows})
    return counts


def _by_hour(version: PayloadVersion) -> str:
    return Template(_PIECES["entries_by_hour"]).substitute(table=version.table)


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────


def lag(outbox: MySQLOutbox, from_ms: int, to_ms: int, bins: int) -> list[LagBin]:
    """Lags of the first exports stamped in [from, to), in at most `bins` equal parts; parts without a batch are left out."""
    step_ms = max(1, -(-(to_ms - from_ms) // bins))
    values = {
        "from_ms": from_ms,
        "to_ms": to_ms,
        "step_ms": step_ms,
        "longest_ms": LONGEST_LAG_MS,
        "ahead_ms": AHEAD_MS,
    }
    with outbox.transaction("reading the ledger") as connection:
        rows = sorted(connection.execute(SQL["lag"], values), key=lambda row: int(row.bin))
    return [
        LagBin(
            at_ms=from_ms + int(row.bin) * step_ms,
            batches=int(row.batches),
            rows=int(row.row_count),
            worst_s=_seconds(row.worst_ms),
            mean_s=_seconds(row.mean_ms),
            undated=int(row.undated),
        )
        for row in rows
    ]


def batches(outbox: MySQLOutbox, from_ms: int, to_ms: int, most: int) -> list[BatchLine]:
    """The newest `most` batches whose latest `inserted_at` is in [from, to), oldest first."""
    values = {"from_ms": from_ms, "to_ms": to_ms, "row_limit": most}
    with outbox.transaction("reading the ledger") as connection:
        rows = list(connection.execute(SQL["batches"], values))
    return [
        BatchLine(
            batch_id=row.batch_id,
            generation=row.generation,
            state=row.state,
            rows=row.row_count,
            entries=row.entry_count,
            bytes=row.bytes,
            attempts=row.attempts,
            claimed_at_ms=row.claimed_at_ms,
            fetch_s=_between(row.claimed_at_ms, row.sealed_at_ms),
            write_s=_between(row.sealed_at_ms, row.written_at_ms),
            mark_s=_between(row.written_at_ms, row.verified_at_ms),
        )
        for row in sorted(rows, key=lambda row: (row.claimed_at_ms, row.batch_id))
    ]


def discrepant(outbox: MySQLOutbox) -> dict[int, str]:
    """Batches that the ledger calls discrepant, newest first, with the counts that were found."""
    with outbox.transaction("reading the ledger") as connection:
        rows = connection.execute(SQL["discrepant"], {"row_limit": DISCREPANT_SHOWN})
        return {row.batch_id: row.last_error.removeprefix("in ClickHouse: ") for row in rows}


def letters(outbox: MySQLOutbox) -> list[LetterCount]:
    """Dead letters by day, state and reason, of the newest `LETTERS_COUNTED` rows that were set aside."""
    with outbox.transaction("counting dead letters") as connection:
        rows = connection.execute(SQL["letters"], {"row_limit": LETTERS_COUNTED})
        return [
            LetterCount(day_ms=int(row.day_number) * DAY_MS, state=row.state, reason=row.reason, letters=row.n)
            for row in sorted(rows, key=lambda row: (row.day_number, row.reason, row.state))
        ]


def _seconds(ms: Any) -> float | None:
    return None if ms is None else float(ms) / 1000


def _between(from_ms: int | None, to_ms: int | None) -> float | None:
    """Seconds between two stamps of the database's clock, which may have been set back."""
    return None if from_ms is None or to_ms is None else max(0, to_ms - from_ms) / 1000
