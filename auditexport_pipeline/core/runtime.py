"""The number of rows that fit into a run's time, with time left to verify them (`defs.drains` knows when a run ends)."""

from __future__ import annotations

from auditexport_pipeline.core.settings import Limits

# A run may claim rows in this part of its time; in the rest it finishes its batches and verifies them.
CLAIMING_SHARE = 0.8
# A run may begin with a claimed batch in this part of its time.
WORKING_SHARE = 0.9


def most_rows(limits: Limits, left_s: float) -> int | None:
    """The most rows that a run can export in this time; None when nothing throttles it."""
    if left_s <= 0:
        return 0
    rates = [float(limits.max_rows_per_second)] if limits.max_rows_per_second else []
    if limits.mark_pause_ms:
        rates.append(limits.mark_rows * limits.mark_connections * 1000 / limits.mark_pause_ms)
    return int(min(rates) * left_s) if rates else None


def fits(limits: Limits, rows: int, left_s: float) -> bool:
    """Whether a batch of that many rows can be exported in this time."""
    most = most_rows(limits, left_s)
    return most is None or rows <= most
