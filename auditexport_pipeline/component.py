"""`type: auditexport_pipeline.AuditExport` in a `defs.yaml`: one outbox as a Dagster component.

What belongs here: the component's attributes, each described, and handing them to `build_audit_export_defs`. What does
not: any definition. URLs are named by the environment variable that holds them, because what stands in a YAML file or
is resolved from one ends up in the definitions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any

import dagster as dg
from pydantic import Field

from auditexport_pipeline.core.backlog import Thresholds
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.defs.automation import DEFAULT_THRESHOLDS
from auditexport_pipeline.defs.build import build_audit_export_defs
from auditexport_pipeline.defs.catalog import GROUP


class AuditExport(dg.Component, dg.Model, dg.Resolvable):
    """Every audit event of one MySQL outbox in ClickHouse, exactly once: assets, checks, jobs, sensors, schedules."""

    name: Annotated[
        str,
        Field(description="Begins every name but the contract's, such as eu_audit_log_export; empty for one outbox."),
    ] = ""
    mysql_url_env: Annotated[str, Field(description="Environment variable with the outbox's SQLAlchemy URL.")] = (
        "AUDITEXPORT_MYSQL_URL"
    )
    clickhouse_url_env: Annotated[str, Field(description="Environment variable with ClickHouse's URL.")] = (
        "AUDITEXPORT_CLICKHOUSE_URL"
    )
    heartbeat_url_env: Annotated[
        str,
        Field(
            description="Environment variable with the heartbeat's URL; empty: AUDITEXPORT_HEARTBEAT_URL, if it is set."
        ),
    ] = ""
    alert_webhook_url_env: Annotated[
        str,
        Field(
            description="Environment variable with the webhook for alerts; empty: AUDITEXPORT_ALERT_WEBHOOK_URL, if it is set."
        ),
    ] = ""
    drain: Annotated[
        Mapping[str, Any],
        Field(description="Settings of drains that the sensor and the schedule start, as in the launchpad."),
    ] = {}
    sensor_rows: Annotated[int, Field(ge=1, description="The sensor starts a drain at this many pending rows.")] = (
        DEFAULT_THRESHOLDS.rows
    )
    sensor_lag_s: Annotated[
        float, Field(gt=0, description="The sensor starts a drain when the oldest pending row is this old, in seconds.")
    ] = DEFAULT_THRESHOLDS.lag_s
    group_name: Annotated[str, Field(description="Group of both assets.")] = GROUP
    owners: Annotated[Sequence[str], Field(description="Owners of both assets: e-mail addresses or team:…")] = ()
    links: Annotated[
        Mapping[str, str], Field(description="Text to URL, shown with both assets: a runbook, a dashboard.")
    ] = {}
    tags: Annotated[Mapping[str, str], Field(description="Tags of both assets.")] = {}

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        """Raises `InvalidConfig`, naming the attribute, for a name or a setting of a drain that does not exist."""
        try:
            Limits.of(self.drain)
        except InvalidConfig as error:
            raise InvalidConfig(f"drain: {error}") from None
        return build_audit_export_defs(
            self.name,
            mysql_url=dg.EnvVar(self.mysql_url_env),
            clickhouse_url=dg.EnvVar(self.clickhouse_url_env),
            heartbeat_url=dg.EnvVar(self.heartbeat_url_env) if self.heartbeat_url_env else None,
            alert_webhook_url=dg.EnvVar(self.alert_webhook_url_env) if self.alert_webhook_url_env else None,
            drain=self.drain,
            sensor_thresholds=Thresholds(rows=self.sensor_rows, lag_s=self.sensor_lag_s),
            group_name=self.group_name,
            owners=self.owners,
            links=self.links,
            tags=self.tags,
        )
