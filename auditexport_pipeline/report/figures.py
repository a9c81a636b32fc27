"""The numbers of a report: what both databases hold over a window of exports, and the status now.

Reads with plain SELECTs in bounded steps, without locks. `core.reconcile` decides what a discrepancy is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

import pandas as pd
from sqlalchemy import Row

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.connection import LOOK_UP_TIMEOUT_S
from auditexport_pipeline.core.advice import Advice, Severity, advice
from auditexport_pipeline.core.batch import OPEN, State, blocks_from_text
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.reconcile import SLOTS_APART_MS
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import Status
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql.maintenance import SCAN_PKS, MySQLMaintenance
from auditexport_pipeline.mysql.marking import by_shape
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import SQL as STORE_SQL
from auditexport_pipeline.mysql.statements import statements
from auditexport_pipeline.mysql.status import read_status
from auditexport_pipeline.sql import load

SQL = statements("report/outbox.sql")
_PIECES = load("report/audit_log.sql")

# A longer window is counted by day: a column needs three pixels.
MOST_STEPS = 14 * 24
# An event is often older than its export: hours this long before the window are shown too.
HOURS_BEFORE_MS = DAY_MS
# Rows whose hour is read from the outbox: some ten seconds of reading by primary key, as long as a reconciliation of them.
# Of a busier window only the newest exports are counted, and the page says since when.
ROWS_COUNTED = 1_000_000
PENDING_COUNTED = 200_000
# Batches whose blocks are read, and how many per statement: the pks of a batch can take a megabyte.
BATCHES_COUNTED = 20_000
BATCHES_AT_ONCE = 200
# `inserted_at`s that ClickHouse leaves out: the list is sent in one form field, of 128 KB at most.
MOST_EXCLUDED = 7_000
LETTERS_COUNTED = 200_000
# Points of the line of lags, and batches whose stages are listed.
LAG_POINTS = 240
BATCHES_LISTED = 1_000
# A lag outside these bounds comes from a wrong clock of the application.
LONGEST_LAG_MS = 5 * 365 * DAY_MS
AHEAD_MS = DAY_MS


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Consecutive hours (or days) of UTC. Event times before the grid are counted in bin 0, later ones in the last bin."""

    starts_ms: int
    step_ms: int
    steps: int

    @classmethod
    def over(cls, from_ms: int, to_ms: int) -> Grid:
        """The hours that overlap [from, to); days, or several days, where there would be too many hours."""
        to_ms = max(to_ms, from_ms + 1)
        step_ms = HOUR_MS if to_ms - from_ms <= MOST_STEPS * HOUR_MS else DAY_MS
        while (to_ms - from_ms) // step_ms > MOST_STEPS:
            step_ms *= 2
        starts_ms = from_ms // step_ms * step_ms
        return cls(starts_ms=starts_ms, step_ms=step_ms, steps=-(-(to_ms - starts_ms) // step_ms))

    @property
    def bounds(self) -> dict[str, int]:
        """Parameters of the statements that count by bin: times are clamped to [low_ms, high_ms]."""
        low_ms, *_, high_ms = self.starts
        return {"low_ms": low_ms, "high_ms": high_ms, "step_ms": self.step_ms}

    @property
    def starts(self) -> list[int]:
        """The start of each bin, and of one more at either end."""
        return [self.starts_ms + (number - 1) * self.step_ms for number in range(self.steps + 2)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Window:
    """The first exports that are counted on both sides: rows of the outbox by pk, entries by `inserted_at`.

    `excluded` are the `inserted_at`s of open batches and of swept batches, whose rows are gone.
    """

    from_ms: int  # later than that of the figures, if there are more batches or rows than are counted
    to_ms: int
    pks: PkSet
    excluded: Sequence[int]
    swept_entries: int
    open_batches: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The numbers of a window of exports, [from_ms, to_ms), and of now."""

    outbox: str  # its name; empty for the only one
    from_ms: int
    to_ms: int
    servers: Mapping[str, str]  # family, version and database of each; no host, no user
    status: Status
    advice: Sequence[Advice]  # errors and warnings
    window: Window
    grid: Grid
    bins: pd.DataFrame  # rows, entries, pending, difference by bin of the grid; the index is the bin's start in ms
    pending_cut_short: bool  # more rows are pending than were counted by hour
    lag: pd.DataFrame  # at_ms, batches, row_count, worst_s, mean_s, undated by part of the window
    # Of the ledger, oldest claim first; fetch_s, write_s and mark_s are NaN while a stage is not over.
    batches: pd.DataFrame
    letters: pd.DataFrame  # day_number, state, reason, letters

    @property
    def hours(self) -> pd.DataFrame:
        """The bins of the grid without the two at its ends."""
        inner: pd.DataFrame = self.bins.iloc[1:-1]
        return inner

    def total(self, column: str) -> int:
        return int(self.bins[column].sum())

    @property
    def cut_short(self) -> bool:
        return self.window.from_ms > self.from_ms


def gather(
    outbox: MySQLOutbox,
    log: ClickHouseAuditLog,
    from_ms: int,
    to_ms: int,
    targets: Targets | None = None,
    name: str = "",
) -> Figures:
    """The numbers of the exports in [from_ms, to_ms), and of now. SELECT is the only grant that they need.

    The window is cut: it begins with the first export, or where the table's TTL ends, and ends now. The advice compares with
    `targets`, the defaults unless given, and has the commands of the outbox `name`. Raises as the stores do.
    """
    status = read_status(outbox)
    found = advice(status, targets or Targets(), name)
    ttl_ms, first_ms = log.kept_ms(), MySQLMaintenance(outbox).first_inserted_ms()
    to_ms = min(to_ms, status.at_ms)
    starts_ms = (from_ms, to_ms if first_ms is None else first_ms, 0 if ttl_ms is None else status.at_ms - ttl_ms)
    from_ms = min(to_ms, max(starts_ms))
    window = read_window(outbox, from_ms, to_ms)
    grid = Grid.over(window.from_ms - HOURS_BEFORE_MS, to_ms)
    pending = pending_pks(outbox) - window.pks
    counts = {
        "rows": rows_by_hour(outbox, window.pks, grid),
        "entries": entries_by_hour(log, window, grid),
        "pending": rows_by_hour(outbox, pending, grid),
    }
    bins = pd.DataFrame(
        {side: [counted[number] for number in range(grid.steps + 2)] for side, counted in counts.items()},
        index=grid.starts,
    )
    return Figures(
        outbox=name,
        from_ms=from_ms,
        to_ms=to_ms,
        servers=_servers(outbox, log),
        status=status,
        advice=[one for one in found if one.severity is not Severity.NOTE],
        window=window,
        grid=grid,
        bins=bins.assign(difference=bins["rows"] - bins["entries"]),
        pending_cut_short=len(pending) >= PENDING_COUNTED,
        lag=_lag(outbox, from_ms, to_ms),
        batches=_batches(outbox, from_ms, to_ms),
        letters=_read(outbox, "letters", row_limit=LETTERS_COUNTED),
    )


def _read(outbox: MySQLOutbox, statement: str, **values: int) -> pd.DataFrame:
    """The rows of one of our statements; decimals as floats."""
    with outbox.transaction("reading for a report") as connection:
        found = connection.execute(SQL[statement], values)
        frame: pd.DataFrame = pd.DataFrame.from_records(list(found), columns=list(found.keys()), coerce_float=True)
    return frame


def _servers(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> dict[str, str]:
    with outbox.transaction("asking for the version") as connection:
        version, database = connection.execute(SQL["server"]).one()
    family = "MariaDB" if "mariadb" in version.lower() else "MySQL"
    number = version.removeprefix("5.5.5-").split("-")[0]  # MariaDB calls itself 5.5.5 to old clients
    ((clickhouse, clickhouse_database),) = log.rows("asking for the version", _PIECES["server"])
    return {
        "Outbox": f"{family} {number}, database {database}",
        "Audit log": f"ClickHouse {clickhouse}, database {clickhouse_database}",
    }


# ── both sides, by the hour of the event ─────────────────────────────────────────────────────────


def read_window(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> Window:
    """The first exports in [from_ms, to_ms) that can be counted on both sides, the newest up to a limit.

    Source: the ledger, by `inserted_idx`, a few hundred batches a statement. No lock.
    """
    runs: list[tuple[int, int]] = []
    excluded: list[int] = []
    rows = swept_entries = open_batches = 0
    since_ms = from_ms
    for batches, row in enumerate(_first_exports(outbox, from_ms, to_ms)):
        if batches >= BATCHES_COUNTED or rows >= ROWS_COUNTED or len(excluded) >= MOST_EXCLUDED:
            # All blocks read so far are later than those of this batch, except a few that were split.
            since_ms = row.inserted_at_ms + 1
            break
        blocks = [block for block in blocks_from_text(row.manifest)[0] if from_ms <= block.inserted_at_ms < to_ms]
        gone = row.swept_at_ms is not None or row.swept_rows > 0 or row.state == State.COMPACTED
        if gone or row.state in OPEN:
            excluded += [block.inserted_at_ms for block in blocks]
            swept_entries += row.entry_count if gone else 0
            open_batches += not gone
        else:
            runs += [run for block in blocks for run in block.pks.runs]
            rows += sum(block.rows for block in blocks)
    return Window(
        from_ms=since_ms,
        to_ms=to_ms,
        pks=PkSet() | PkSet(tuple(runs)),
        excluded=excluded,
        swept_entries=swept_entries,
        open_batches=open_batches,
    )


def _first_exports(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> Iterator[Row[Any]]:
    before_ms = to_ms + SLOTS_APART_MS
    while True:
        values = {"from_ms": from_ms, "before_ms": before_ms, "row_limit": BATCHES_AT_ONCE}
        with outbox.transaction("reading the ledger") as connection:
            page = list(connection.execute(SQL["blocks"], values))
        yield from page
        if len(page) < BATCHES_AT_ONCE:
            return
        before_ms = page[-1].inserted_at_ms


def rows_by_hour(outbox: MySQLOutbox, pks: PkSet, grid: Grid) -> Counter[int]:
    """How many of these rows the outbox has in each bin of the grid, by the time of the event.

    Source: the outbox by primary key, some thousand rows a statement. No lock.
    """
    counts: Counter[int] = Counter()
    for chunk in pks.chunks(SCAN_PKS):
        with outbox.transaction("counting rows by hour") as connection:
            for statement, values in by_shape("hours", chunk):
                for row in connection.execute(SQL[statement], {**values, **grid.bounds}):
                    if row.bin is not None:
                        counts[int(row.bin)] += row.n
    return counts


def pending_pks(outbox: MySQLOutbox) -> PkSet:
    """The oldest pending rows of known versions, without those that dead letters keep; PENDING_COUNTED of each version."""
    pks = PkSet()
    for version in VERSIONS:
        values = {"version": version, "from_pk": 0, "row_limit": PENDING_COUNTED}
        with outbox.transaction("reading pending rows") as connection:
            found = connection.execute(STORE_SQL["candidates_beside_letters"], values)
            pks |= PkSet(tuple((row.first_pk, row.last_pk) for row in found))
    return pks


def entries_by_hour(log: ClickHouseAuditLog, window: Window, grid: Grid) -> Counter[int]:
    """How many events of these exports ClickHouse has in each bin; copies count once, as in `audit_logs`."""
    counts: Counter[int] = Counter()
    parameters = {
        **grid.bounds,
        "from_ms": window.from_ms,
        "to_ms": window.to_ms,
        "excluded": list(window.excluded) or [-1],  # an empty list has no type; no inserted_at is negative
    }
    for version in VERSIONS.values():
        statement = Template(_PIECES["entries_by_hour"]).substitute(table=version.table)
        limit = {"max_execution_time": LOOK_UP_TIMEOUT_S}
        found = log.rows("counting entries by hour", statement, parameters, limit)
        counts.update({int(number): int(entries) for number, entries in found})
    return counts


# ── the ledger ───────────────────────────────────────────────────────────────────────────────────


def _lag(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> pd.DataFrame:
    """Lags of the first exports. If all batches are in a small part of the window, only that part, in finer steps."""
    points: pd.DataFrame = pd.DataFrame()
    for _ in range(4):
        step_ms = max(1, -(-(to_ms - from_ms) // LAG_POINTS))
        values = {"step_ms": step_ms, "longest_ms": LONGEST_LAG_MS, "ahead_ms": AHEAD_MS}
        points = _read(outbox, "lag", from_ms=from_ms, to_ms=to_ms, **values).astype(float).sort_values("at_ms")
        if points.empty or step_ms < 1_000:
            break
        first_ms, last_ms = int(points["at_ms"].iloc[0]), int(points["at_ms"].iloc[-1]) + step_ms
        if last_ms - first_ms > (to_ms - from_ms) // 4:
            break
        from_ms, to_ms = first_ms, min(to_ms, last_ms)
    return points


def _batches(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> pd.DataFrame:
    """The newest batches whose latest `inserted_at` is in [from, to), requeues too, with the seconds of each stage."""
    frame = _read(outbox, "batches", from_ms=from_ms, to_ms=to_ms, row_limit=BATCHES_LISTED)
    frame = frame.sort_values(["claimed_at_ms", "batch_id"], ignore_index=True)
    stamps = frame[["claimed_at_ms", "sealed_at_ms", "written_at_ms", "verified_at_ms"]].astype(float)
    # The database's clock may have been set back between two stamps.
    stages = (stamps.diff(axis="columns").iloc[:, 1:] / 1000).clip(lower=0)
    batches: pd.DataFrame = frame.join(stages.set_axis(["fetch_s", "write_s", "mark_s"], axis="columns"))
    return batches
