"""How long a run may run, as Dagster's monitoring has it: `max_runtime_seconds`, or the run's own tag.

What belongs here: asking Dagster. What does not: what a run makes of it (`core.runtime`).
"""

import time
from collections.abc import Callable
from contextlib import suppress

import dagster as dg

from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.runtime import WORKING_SHARE, fits
from auditexport_pipeline.core.settings import Limits

# The second name is the one of the instance's setting, which Dagster takes as well.
_TAGS = ("dagster/max_runtime", "dagster/max_runtime_seconds")


def max_runtime_s(context: dg.OpExecutionContext) -> float | None:
    """After how long the run is ended; None when nobody does."""
    if not context.instance.run_monitoring_enabled:
        return None
    given = [context.run.tags[tag] for tag in _TAGS if tag in context.run.tags]
    longest_s = float(context.instance.run_monitoring_max_runtime_seconds or 0)
    with suppress(ValueError):  # Dagster ignores a tag that is no number, and then ends nothing
        longest_s = float(given[0]) if given else longest_s
    return longest_s or None


def left_s(context: dg.OpExecutionContext, share: float) -> float | None:
    """Seconds until this share of the run's time is over; None when there is no end."""
    longest_s = max_runtime_s(context)
    if longest_s is None:
        return None
    record = context.instance.get_run_record_by_id(context.run_id)
    started_s = record.start_time if record is not None else None
    return longest_s * share - (time.time() - started_s if started_s else 0.0)


def time_for(context: dg.OpExecutionContext, limits: Limits) -> Callable[[Claim], bool]:
    """Whether this run has the time for a batch, at the moment of the question; for any thread of the step's process."""
    left = left_s(context, WORKING_SHARE)
    if left is None:
        return lambda _: True
    until = time.monotonic() + left
    # An adopted batch may be larger than one run can do: what is marked of it stays marked.
    return lambda claim: fits(limits, 0 if claim.adopted else claim.rows, until - time.monotonic())
