"""The definitions of one outbox, put together, for any code location to merge into its own.

The executor does not belong here: a code location has one (`definitions`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg

from auditexport_pipeline.core.alerts import Policy
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Targets, Thresholds, refuse_moved_variables
from auditexport_pipeline.defs import alerts, asset_checks, catalog, jobs, schedules, sensors
from auditexport_pipeline.defs.assets import export_asset
from auditexport_pipeline.defs.executors import limits_here
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.resources import (
    AlertsResource,
    ClickHouseResource,
    HeartbeatResource,
    MySQLResource,
    bound,
    pipeline,
)
from auditexport_pipeline.outboxes import URL_KEYS, OutboxSettings

Url = str | dg.EnvVar
# Settings of an outbox that are arguments of another name here.
_RENAMED = {*URL_KEYS, "sensor_rows", "sensor_lag_s"}


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
    alert_policy: Mapping[str, float] | None = None,
    page_url: str = "",
    celery_queue: str = "",
    group_name: str = catalog.GROUP,
    owners: Sequence[str] = (),
    links: Mapping[str, str] | None = None,
    tags: Mapping[str, str] | None = None,
    executor: dg.ExecutorDefinition | None = None,
    **resources: Any,
) -> dg.Definitions:
    """Everything that exports one outbox: assets, checks, jobs, sensors, schedules and resources.

    Merge the result into your own `Definitions`, once for each outbox or shard. `name` begins every name and is the assets'
    prefix (`defs.names`); without it, the names are the contract's.

    * URLs are read when a run starts. Those that are not given are in AUDITEXPORT_MYSQL_URL, AUDITEXPORT_CLICKHOUSE_URL,
      AUDITEXPORT_HEARTBEAT_URL and AUDITEXPORT_ALERT_WEBHOOK_URL. Give `dg.EnvVar("…")` rather than a password.
    * `drain` are the settings of drains that sensor and schedule launch, as in the launchpad; `sensor_thresholds` say when the
      sensor launches one.
    * `targets` say what is wrong (`core.settings.Targets`), `alert_policy` when alerts are sent (`core.alerts.Policy`), and
      `page_url` is the Dagster UI's address, for links in alerts.
    * `celery_queue` is a Celery queue for this outbox's steps.
    * `owners`, `links` (text to URL), `tags` and `group_name` are the assets'.
    * `executor` is for code locations that have no other: Definitions with two do not merge.
    * `resources` replaces `mysql`, `clickhouse`, `heartbeat`, `alerts` or `pipeline`. A launch cannot configure them.

    Raises `InvalidConfig`, naming what is wrong.
    """
    refuse_moved_variables(os.environ)
    names = Names(name=name, celery_queue=celery_queue)
    given: dict[str, Any] = {
        "mysql": MySQLResource(url=mysql_url or dg.EnvVar("AUDITEXPORT_MYSQL_URL")),
        "clickhouse": ClickHouseResource(url=clickhouse_url or dg.EnvVar("AUDITEXPORT_CLICKHOUSE_URL")),
        "heartbeat": HeartbeatResource(url=heartbeat_url or ""),
        "alerts": AlertsResource(url=alert_webhook_url or "", page_url=page_url),
        "pipeline": pipeline,
    }
    if unknown := sorted(set(resources) - set(given)):
        raise InvalidConfig(f"{', '.join(unknown)}: no such argument or resource; resources are {', '.join(given)}")
    limits = limits_here(drain or {})
    run_config = {"ops": {names.node: {"config": dict(drain)}}} if drain else {}
    thresholds = sensor_thresholds or Thresholds()
    target, policy = Targets().with_values(targets or {}), Policy().with_values(alert_policy or {})
    about: dict[str, Any] = {"group_name": group_name, "owners": list(owners), "tags": dict(tags or {})}
    export_job, checks_job = jobs.export_job(names), jobs.checks_job(names)
    sweep_job, reconcile_job = jobs.sweep_job(names), jobs.reconcile_job(names, target)
    other_jobs = [checks_job, jobs.requeue_job(names), sweep_job, reconcile_job, jobs.retry_job(names)]
    purge_job = jobs.purge_job(names, [names.job, *(job.name for job in other_jobs)])
    other_jobs.append(purge_job)
    return dg.Definitions(
        assets=[
            catalog.outbox_spec(names, links or {}, **about),
            export_asset(names, catalog.FRESHNESS, **catalog.attributes(names, links or {}), **about),
        ],
        asset_checks=asset_checks.asset_checks(names, target),
        jobs=[export_job, *other_jobs],
        sensors=[
            sensors.backlog_sensor(names, export_job, run_config, limits.versions, thresholds),
            *alerts.alert_sensors(names, [job.name for job in other_jobs], target, policy),
        ],
        schedules=[
            schedules.export_schedule(names, export_job, run_config),
            schedules.checks_schedule(names, checks_job),
            *schedules.daily_schedules(names, {"sweep": sweep_job, "reconcile": reconcile_job, "purge": purge_job}),
        ],
        resources={names.of(key): bound(resource) for key, resource in {**given, **resources}.items()},
        executor=executor,
    )


def defs_of(outbox: OutboxSettings) -> dg.Definitions:
    """`build_audit_export_defs` for one entry of a file of outboxes, or one component."""
    urls: dict[str, Any] = {key.removesuffix("_env"): dg.EnvVar(variable) for key, variable in outbox.variables.items()}
    thresholds = Thresholds(rows=outbox.sensor_rows, lag_s=outbox.sensor_lag_s)
    settings = {name: getattr(outbox, name) for name in OutboxSettings.model_fields if name not in _RENAMED}
    return build_audit_export_defs(**urls, sensor_thresholds=thresholds, **settings)
