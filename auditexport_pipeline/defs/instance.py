"""Upkeep of Dagster's own storage: old runs of this outbox, with their event logs, go after a while.

What belongs here: which runs are old, and deleting them. What does not: ticks, which `dagster.yaml` bounds
(`retention`), and the outbox's own retention (`defs.maintenance`). What a run did stays in the ledger.
"""

import contextlib
import time
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.defs.config import checked
from auditexport_pipeline.defs.drains import IMPLICIT_JOB
from auditexport_pipeline.defs.names import Names

RUN_DAYS = 30.0
# A run a minute for more than a day: one purge a day keeps up with the busiest sensor.
MAX_RUNS = 2_000
PURGE = {
    "run_days": dg.Field(
        float, default_value=RUN_DAYS, description="Finished runs stay this many days. From 1 to 3,650."
    ),
    "max_runs": dg.Field(
        int, default_value=MAX_RUNS, description="Runs of one purge at most, oldest first. From 1 to 100,000."
    ),
    "dry_run": dg.Field(bool, default_value=False, description="Say how many, and delete nothing."),
}
_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_PAGE_RUNS = 200


def _check(settings: Mapping[str, Any]) -> None:
    for name, low, high in (("run_days", 1, 3_650), ("max_runs", 1, 100_000)):
        if not low <= settings[name] <= high:
            raise InvalidConfig(f"{name} is {settings[name]:g}; it must be from {low:,} to {high:,}")


def purge_job(names: Names, jobs: list[str]) -> dg.JobDefinition:
    """`purge_old_runs`, of runs of these jobs and of those from the page that name the asset."""

    @dg.op(
        config_schema=PURGE,
        out=dg.Out(dg.Nothing),
        description="Deletes old finished runs and their event logs from Dagster's storage. The asset's latest "
        "materialization stays, and so does every run of somebody else's.",
    )
    def purge_runs(context: dg.OpExecutionContext) -> None:
        settings = context.op_config
        instance = context.instance
        before_s = time.time() - settings["run_days"] * 86_400
        latest = instance.get_latest_materialization_event(names.asset)
        kept = {context.run_id, *([latest.run_id] if latest is not None else [])}
        old = _old_runs(instance, names, [*jobs, names.of("purge_old_runs")], before_s, kept, settings["max_runs"] + 1)
        if len(old) > settings["max_runs"]:
            context.log.info("max_runs was reached; the rest waits for the next purge")
        purged = old[: settings["max_runs"]]
        for run_id in purged if not settings["dry_run"] else ():
            _delete(instance, run_id)
        context.log.info(
            f"{'would purge' if settings['dry_run'] else 'purged'} {len(purged):,} runs that were created more than "
            f"{settings['run_days']:g} days ago"
        )
        context.add_output_metadata({"runs": len(purged), "dry_run": settings["dry_run"]})

    form = checked(purge_runs, names.of("purge_runs"), PURGE, _check).alias("purge_runs")

    @dg.job(
        name=names.of("purge_old_runs"),
        description="Keeps Dagster's storage small: a run a minute leaves thirty million events a year.",
    )
    def purge_old_runs() -> None:
        form()

    return purge_old_runs


def purge_schedule(names: Names, job: Any) -> dg.ScheduleDefinition:
    """Once a day, in the small hours; off until somebody turns it on."""
    return dg.ScheduleDefinition(
        name=names.of("purge_schedule"), job=job, cron_schedule="30 5 * * *", description="Old runs, once a day."
    )


def _old_runs(
    instance: dg.DagsterInstance, names: Names, jobs: list[str], before_s: float, kept: set[str], most: int
) -> list[str]:
    """Ids of finished runs of ours that were created before, oldest first within a job; at most so many."""
    before = datetime.fromtimestamp(before_s, tz=timezone.utc)
    old: list[str] = []
    for job in (*jobs, IMPLICIT_JOB):
        page: Sequence[dg.RunRecord] = ()
        while len(old) < most:
            page = instance.get_run_records(
                dg.RunsFilter(job_name=job, statuses=_FINISHED, created_before=before),
                limit=_PAGE_RUNS,
                ascending=True,
                cursor=page[-1].dagster_run.run_id if page else None,
            )
            runs = [record.dagster_run for record in page]
            ours = [run for run in runs if job != IMPLICIT_JOB or names.asset in (run.asset_selection or ())]
            old += [run.run_id for run in ours if run.run_id not in kept]
            if len(page) < _PAGE_RUNS:
                break
    return old[:most]


def _delete(instance: dg.DagsterInstance, run_id: str) -> None:
    """The run, its events, and its output as it was captured. On SQLite also the file that its events were in."""
    instance.delete_run(run_id)
    with contextlib.suppress(NotImplementedError):  # a place for output that cannot delete keeps it by its own rules
        instance.compute_log_manager.delete_logs(prefix=[run_id, "compute_logs"])
    shard_path = getattr(instance.event_log_storage, "path_for_shard", None)
    if shard_path is not None:
        for suffix in ("", "-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                Path(f"{shard_path(run_id)}{suffix}").unlink()
