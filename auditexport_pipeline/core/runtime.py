"""How many rows fit into a run's time, so that it can verify what it exported before it is ended.

What does not belong here: who ends a run (`defs.drains`), and the clock.
"""

from __future__ import annotations

from auditexport_pipeline.core.settings import Limits

# The part of a run's time in which it may claim rows; the rest is for finishing its batches and for verifying.
CLAIMING_SHARE = 0.8
# The part in which it may begin with a claimed batch.
WORKING_SHARE = 0.9


def most_rows(limits: Limits, left_s: float) -> int | None:
    """Rows that the limits let a run export in this time; None when nothing throttles it and there is time."""
    if left_s <= 0:
        return 0
    rates = [float(limits.max_rows_per_second)] if limits.max_rows_per_second else []
    if limits.mark_pause_ms:
        rates.append(limits.mark_rows * limits.mark_connections * 1000 / limits.mark_pause_ms)
    return int(min(rates) * left_s) if rates else None


def fits(limits: Limits, rows: int, left_s: float) -> bool:
    """Whether a batch of so many rows can be done in this time."""
    most = most_rows(limits, left_s)
    return most is None or rows <= most
