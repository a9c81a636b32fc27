"""The schedules: a drain every quarter of an hour, checks between two drains, and the daily jobs.

Each function makes definitions for the outbox of these `Names`. What a schedule starts is in `defs.jobs`.
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from auditexport_pipeline.defs.asset_checks import LIGHT
from auditexport_pipeline.defs.config import drain_settings
from auditexport_pipeline.defs.drains import end_dead
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names

# What a check of a day's entries costs grows with the day: the schedule of reconciliation looks at them as well.
CHECK_EVERY_MINUTES = 15
READ_ENTRIES_EVERY_HOURS = 6


def export_schedule(names: Names, job: Any, drain: Mapping[str, Any] | None) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=names.of("audit_log_export_schedule"),
        job=job,
        cron_schedule="*/15 * * * *",
        description="Runs whether or not there is a backlog, so that an idle exporter still proves that it is alive.",
    )
    def audit_log_export_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        end_dead(context.instance, names)  # or the run would wait in the queue behind one that never ends
        with in_one_line():
            return dg.RunRequest(run_config=drain_settings(names, drain))

    return audit_log_export_schedule


def checks_schedule(names: Names, job: Any) -> dg.ScheduleDefinition:
    """Between two runs of the export's schedule; off by default."""

    @dg.schedule(
        name=names.of("checks_schedule"),
        job=job,
        cron_schedule="8-59/15 * * * *",
        description="The asset checks: every quarter of an hour those that ask MySQL alone, and four times a day those "
        "that read a day's entries in ClickHouse.",
    )
    def checks_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        at = context.scheduled_execution_time
        if at.hour % READ_ENTRIES_EVERY_HOURS == 0 and at.minute < CHECK_EVERY_MINUTES:
            return dg.RunRequest()
        return dg.RunRequest(asset_check_keys=[dg.AssetCheckKey(names.asset, name) for name in LIGHT])

    return checks_schedule


def upkeep_schedules(names: Names, sweep: Any, reconcile: Any) -> list[dg.ScheduleDefinition]:
    """Once a day each, at night; off by default."""
    return [
        dg.ScheduleDefinition(
            name=names.of("sweep_schedule"), job=sweep, cron_schedule="30 3 * * *", description="Retention, once a day."
        ),
        dg.ScheduleDefinition(
            name=names.of("reconcile_schedule"),
            job=reconcile,
            cron_schedule="30 4 * * *",
            description="The last seven days against ClickHouse, once a day.",
        ),
    ]


def purge_schedule(names: Names, job: Any) -> dg.ScheduleDefinition:
    """Once a day, at night; off by default."""
    return dg.ScheduleDefinition(
        name=names.of("purge_schedule"), job=job, cron_schedule="30 5 * * *", description="Old runs, once a day."
    )
