"""Everything of Dagster that is used here without being in its public API, each with the reason. Checked with Dagster 1.13.27.

A test asks that no other module uses any. What of dagster-celery is not public is in `defs.celery_steps`, which needs that extra.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import dagster as dg
from dagster._core.execution.plan.objects import StepFailureData
from dagster._utils.error import serializable_error_info_from_exc_info

# A forkserver imports this once for all steps of a run, and not in the process of each step. Dagster imports it by the name in an
# instance's configuration, so importing our definitions does not.
PRELOADED = ("dagster._core.storage.sqlite_storage",)


def failure_of_step(step_context: Any) -> dg.DagsterEvent:
    """The event of a step that failed with the exception at hand, outside of Dagster's own handling of steps.

    An executor of one's own has to report such a step, and the public API has no way to make the event.
    """
    error = serializable_error_info_from_exc_info(sys.exc_info())
    return dg.DagsterEvent.step_failure_event(step_context, StepFailureData(error=error, user_failure_data=None))


def delete_events_file(instance: dg.DagsterInstance, run_id: str) -> None:
    """Deletes the SQLite file that holds the events of one run; does nothing where another storage has them.

    `DagsterInstance.delete_run` leaves the file, and there is one for each run that ever was.
    """
    path_for_shard = getattr(instance.event_log_storage, "path_for_shard", None)
    if path_for_shard is None:
        return
    for suffix in ("", "-wal", "-shm"):
        with contextlib.suppress(FileNotFoundError):
            Path(f"{path_for_shard(run_id)}{suffix}").unlink()
