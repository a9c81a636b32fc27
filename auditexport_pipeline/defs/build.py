"""One outbox's definitions, put together: what any code location merges into its own.

What belongs here: `build_audit_export_defs`. What does not: any definition, and the executor, of which a code location
has one (`definitions`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Thresholds
from auditexport_pipeline.defs import alerts, asset_checks, catalog, jobs, schedules, sensors
from auditexport_pipeline.defs.assets import export_asset
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.resources import (
    AlertsResource,
    ClickHouseResource,
    HeartbeatResource,
    MySQLResource,
    bound,
    pipeline,
)
from auditexport_pipeline.outboxes import OutboxSettings

Url = str | dg.EnvVar


def build_audit_export_defs(
    name: str = "",
    *,
    mysql_url: Url | None = None,
    clickhouse_url: Url | None = None,
    heartbeat_url: Url | None = None,
    alert_webhook_url: Url | None = None,
    drain: Mapping[str, Any] | None = None,
    sensor_thresholds: Thresholds | None = None,
    targets: Mapping[str, float] | None = None,
    celery_queue: str = "",
    group_name: str = catalog.GROUP,
    owners: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    executor: dg.ExecutorDefinition | None = None,
    **resources: Any,
) -> dg.Definitions:
    """Everything that exports one outbox: assets, checks, jobs, sensor, schedules and resources.

    Merge the result into your own `Definitions`, once for each outbox or shard. `name` begins every name but the
    first one's and is the assets' prefix (`defs.names`); it raises `InvalidConfig` when Dagster would not take it.

    The URLs are read when a run starts, from AUDITEXPORT_MYSQL_URL, AUDITEXPORT_CLICKHOUSE_URL, AUDITEXPORT_HEARTBEAT_URL
    and AUDITEXPORT_ALERT_WEBHOOK_URL unless they are given; give `dg.EnvVar("…")` rather than a password. `drain` are the settings
    of drains that nobody launches by hand (AUDITEXPORT_DRAIN otherwise), `sensor_thresholds` what makes one worth starting
    (AUDITEXPORT_SENSOR_ROWS and _LAG_S otherwise), `targets` what an operator is called for (fields of `core.settings.Targets`;
    AUDITEXPORT_TARGET_… for the others). `celery_queue` is where workers of Celery's find the drain's steps, if not where they find
    everybody's. `owners`, `links` (text to URL), `tags` and `group_name` are the assets'.
    `executor` is for whoever has no other: Definitions with two do not merge. `resources` replaces any of `mysql`,
    `clickhouse`, `heartbeat`, `alerts`, `pipeline`, under those names. A launch cannot configure any of
    them: connections are those of the definitions.
    """
    names = Names(name=name, celery_queue=celery_queue)
    given: dict[str, Any] = {
        "mysql": MySQLResource(url=mysql_url or dg.EnvVar("AUDITEXPORT_MYSQL_URL")),
        "clickhouse": ClickHouseResource(url=clickhouse_url or dg.EnvVar("AUDITEXPORT_CLICKHOUSE_URL")),
        "heartbeat": HeartbeatResource(url=heartbeat_url) if heartbeat_url else HeartbeatResource(),
        "alerts": AlertsResource(url=alert_webhook_url) if alert_webhook_url else AlertsResource(),
        "pipeline": pipeline,
    }
    if unknown := sorted(set(resources) - set(given)):
        raise InvalidConfig(f"{', '.join(unknown)}: no such argument or resource; resources are {', '.join(given)}")
    about: dict[str, Any] = {"group": group_name, "owners": owners, "links": links or {}, "tags": tags or {}}
    export_job, checks_job = jobs.export_job(names), jobs.checks_job(names)
    sweep_job, reconcile_job = jobs.sweep_job(names), jobs.reconcile_job(names, targets)
    upkeep = [jobs.requeue_job(names), sweep_job, reconcile_job, jobs.retry_job(names)]
    purge_job = jobs.purge_job(names, [names.job, checks_job.name, *(job.name for job in upkeep)])
    return dg.Definitions(
        assets=[
            catalog.outbox_spec(names, **about),
            export_asset(names, catalog.FRESHNESS, **catalog.log_attributes(names, **about)),
        ],
        asset_checks=asset_checks.asset_checks(names, targets),
        jobs=[export_job, checks_job, *upkeep, purge_job],
        sensors=[
            sensors.backlog_sensor(names, export_job, drain, sensor_thresholds),
            *alerts.alert_sensors(
                names, [checks_job.name, *(job.name for job in upkeep), purge_job.name], targets=targets
            ),
        ],
        schedules=[
            schedules.export_schedule(names, export_job, drain),
            schedules.checks_schedule(names, checks_job),
            *schedules.upkeep_schedules(names, sweep_job, reconcile_job),
            schedules.purge_schedule(names, purge_job),
        ],
        resources={names.of(key): bound(resource) for key, resource in {**given, **resources}.items()},
        executor=executor,
    )


def defs_of(outbox: OutboxSettings) -> dg.Definitions:
    """`build_audit_export_defs` for one entry of a file of outboxes, or one component."""
    return build_audit_export_defs(
        outbox.name,
        mysql_url=dg.EnvVar(outbox.mysql_url_env),
        clickhouse_url=dg.EnvVar(outbox.clickhouse_url_env),
        heartbeat_url=dg.EnvVar(outbox.heartbeat_url_env) if outbox.heartbeat_url_env else None,
        alert_webhook_url=dg.EnvVar(outbox.alert_webhook_url_env) if outbox.alert_webhook_url_env else None,
        drain=outbox.drain,
        sensor_thresholds=Thresholds(rows=outbox.sensor_rows, lag_s=outbox.sensor_lag_s),
        targets=outbox.targets,
        celery_queue=outbox.celery_queue,
        group_name=outbox.group_name,
        owners=outbox.owners,
        links=outbox.links,
        tags=outbox.tags,
    )
