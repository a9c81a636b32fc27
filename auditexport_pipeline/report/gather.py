"""Gathering the numbers of a page: a few dozen bounded questions to both databases, none of which locks anything.

What belongs here: the order of the questions, and how far back each looks. What does not: the questions
(`report.source`).
"""

from __future__ import annotations

from collections import Counter

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.advice import Severity, advice, verdict
from auditexport_pipeline.core.series import DAY_MS, Grid, Hour, LagBin
from auditexport_pipeline.core.targets import Targets
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import read_status, targets
from auditexport_pipeline.report import source as counting
from auditexport_pipeline.report.figures import Figures

# Points of the lag's line, and batches whose stages are listed and averaged.
LAG_BINS = 240
BATCHES = 1_000
# An event is often older than its export: hours before the window that keep a column of their own.
HOURS_BEFORE_MS = DAY_MS


def gather(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, from_ms: int, to_ms: int, held_against: Targets | None = None
) -> Figures:
    """The numbers of the exports in [from_ms, to_ms), and of now. Reads only; a user that may only read can ask.

    The window is cut to what there can be: from the first export, or the table's TTL, up to now. The advice is held
    against the targets of the environment unless others are given. Raises as the stores do.
    """
    upkeep = MySQLMaintenance(outbox)
    now_ms = upkeep.now_ms()
    to_ms = min(to_ms, now_ms)
    kept_ms = log.kept_ms()
    first_ms = upkeep.first_inserted_ms()
    from_ms = max(from_ms, first_ms if first_ms is not None else to_ms, 0 if kept_ms is None else now_ms - kept_ms)
    from_ms = min(from_ms, to_ms)
    status = read_status(outbox)
    found = advice(status, held_against or targets())
    compared = counting.compared(outbox, from_ms, to_ms)
    grid = Grid.over(compared.from_ms - HOURS_BEFORE_MS, to_ms)
    rows = counting.rows_by_hour(outbox, compared.pks, grid)
    entries = counting.entries_by_hour(log, compared, grid)
    pending_pks = counting.pending(outbox) - compared.pks
    pending = counting.rows_by_hour(outbox, pending_pks, grid)
    before, *hours, after = _hours(grid, rows, entries, pending)
    return Figures(
        at_ms=now_ms,
        from_ms=from_ms,
        to_ms=to_ms,
        servers=counting.servers(outbox, log),
        backlog=status.backlog,
        said=verdict(status, found),
        advice=tuple(one for one in found if one.severity is not Severity.NOTE),
        compared=compared,
        grid=grid,
        hours=hours,
        before=before,
        after=after,
        pending_cut_short=len(pending_pks) >= counting.PENDING_COUNTED,
        lag=_lag(outbox, from_ms, to_ms),
        batches=counting.batches(outbox, from_ms, to_ms, BATCHES),
        letters=counting.letters(outbox),
        discrepant=counting.discrepant(outbox),
    )


def _hours(grid: Grid, rows: Counter[int], entries: Counter[int], pending: Counter[int]) -> list[Hour]:
    return [
        Hour(at_ms=grid.at_ms(number), rows=rows[number], entries=entries[number], pending=pending[number])
        for number in range(grid.steps + 2)
    ]


def _lag(outbox: MySQLOutbox, from_ms: int, to_ms: int) -> list[LagBin]:
    """The line's points; where the batches of the window lie close together, only that part of it, drawn finer."""
    bins = counting.lag(outbox, from_ms, to_ms, LAG_BINS)
    for _ in range(3):
        step_ms = max(1, -(-(to_ms - from_ms) // LAG_BINS))
        if not bins or step_ms < 1_000 or bins[-1].at_ms + step_ms - bins[0].at_ms > (to_ms - from_ms) // 4:
            break
        from_ms, to_ms = bins[0].at_ms, min(to_ms, bins[-1].at_ms + step_ms)
        bins = counting.lag(outbox, from_ms, to_ms, LAG_BINS)
    return bins
