"""The schedules: a drain every quarter of an hour, checks between two drains, and the daily jobs."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from auditexport_pipeline.defs.asset_checks import LIGHT
from auditexport_pipeline.defs.drains import living_drains
from auditexport_pipeline.defs.names import Names

# The cost of checking a day's entries grows with the day, and the schedule of reconciliation reads them too.
CHECK_EVERY_MINUTES = 15
READ_ENTRIES_EVERY_HOURS = 6


def export_schedule(names: Names, job: Any, run_config: dict[str, Any]) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=names.of("audit_log_export_schedule"),
        job=job,
        cron_schedule="*/15 * * * *",
        description="Runs whether or not there is a backlog, so that an idle exporter still proves that it is alive.",
    )
    def audit_log_export_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        living_drains(context.instance, names)  # or the run would wait in the queue behind one that never ends
        return dg.RunRequest(run_config=run_config)

    return audit_log_export_schedule


def checks_schedule(names: Names, job: Any) -> dg.ScheduleDefinition:
    """Between two runs of the export's schedule; off by default."""

    @dg.schedule(
        name=names.of("checks_schedule"),
        job=job,
        cron_schedule="8-59/15 * * * *",
        description="The asset checks: every quarter of an hour those that read MySQL only, and four times a day those "
        "that read a day's entries in ClickHouse.",
    )
    def checks_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        at = context.scheduled_execution_time
        if at.hour % READ_ENTRIES_EVERY_HOURS == 0 and at.minute < CHECK_EVERY_MINUTES:
            return dg.RunRequest()
        return dg.RunRequest(asset_check_keys=[dg.AssetCheckKey(names.asset, name) for name in LIGHT])

    return checks_schedule


def daily_schedules(names: Names, jobs: Mapping[str, Any]) -> list[dg.ScheduleDefinition]:
    """Of the jobs of these names: retention, reconciliation and old runs, once a day, at night. Off by default."""
    daily = {
        "sweep": ("30 3 * * *", "Retention, once a day."),
        "reconcile": ("30 4 * * *", "The last seven days against ClickHouse, once a day."),
        "purge": ("30 5 * * *", "Old runs, once a day."),
    }
    return [
        dg.ScheduleDefinition(name=names.of(f"{name}_schedule"), job=jobs[name], cron_schedule=cron, description=what)
        for name, (cron, what) in daily.items()
    ]
