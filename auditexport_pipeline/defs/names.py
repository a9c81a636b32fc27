"""What the definitions of one outbox are called, so that several outboxes fit into one code location.

What belongs here: names and keys. What does not: any definition. Without a name they are those of the contract; with
one, every name begins with it and the assets stand under it: `eu_audit_log_export`, `eu/audit_logs_raw_v1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg

from auditexport_pipeline.defs.resources import ClickHouseResource, HeartbeatResource, MySQLResource
from auditexport_pipeline.outboxes import check_name, check_queue

if TYPE_CHECKING:
    from auditexport_pipeline.core.pipeline import Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Connected:
    """What an op of one outbox may ask for: the resources under this outbox's keys."""

    mysql: MySQLResource
    clickhouse: ClickHouseResource
    heartbeat: HeartbeatResource
    pipeline: Pipeline


@dataclass(frozen=True, slots=True, kw_only=True)
class Names:
    """The names of one outbox's definitions. Raises `InvalidConfig` for one that Dagster or Celery would not take."""

    name: str = ""
    celery_queue: str = ""

    def __post_init__(self) -> None:
        check_name(self.name)
        check_queue(self.celery_queue)

    def of(self, what: str) -> str:
        """The name of the contract, as this outbox has it."""
        return f"{self.name}_{what}" if self.name else what

    def key(self, asset: str) -> dg.AssetKey:
        return dg.AssetKey([self.name, asset] if self.name else asset)

    @property
    def asset(self) -> dg.AssetKey:
        return self.key("audit_logs_raw_v1")

    @property
    def outbox(self) -> dg.AssetKey:
        return self.key("clickhouse_outbox")

    @property
    def node(self) -> str:
        """The asset in a run's configuration and in the keys of its steps."""
        return "__".join(self.asset.path)

    @property
    def job(self) -> str:
        return self.of("audit_log_export")

    @property
    def pool(self) -> str:
        """One drain of this outbox at a time, however it is launched: the queue admits one run holding this pool."""
        return self.of("audit_log_export")

    @property
    def drain_tags(self) -> dict[str, str]:
        """By which the queue can tell drains from everything else, and one outbox's runs from another's."""
        return {"auditexport/kind": "drain", "auditexport/outbox": self.name or "default"}

    @property
    def mysql(self) -> str:
        return self.of("mysql")

    @property
    def clickhouse(self) -> str:
        return self.of("clickhouse")

    @property
    def heartbeat(self) -> str:
        return self.of("heartbeat")

    @property
    def alerts(self) -> str:
        return self.of("alerts")

    @property
    def pipeline(self) -> str:
        return self.of("pipeline")

    @property
    def databases(self) -> set[str]:
        """Keys of what upkeep needs."""
        return {self.mysql, self.clickhouse}

    @property
    def everything(self) -> set[str]:
        """Keys of what a drain's steps need."""
        return {self.mysql, self.clickhouse, self.heartbeat, self.pipeline}

    def mysql_of(self, context: Any) -> MySQLResource:
        """The MySQL of this outbox, of any context that requires it."""
        resource: MySQLResource = getattr(context.resources, self.mysql)
        return resource

    def clickhouse_of(self, context: Any) -> ClickHouseResource:
        resource: ClickHouseResource = getattr(context.resources, self.clickhouse)
        return resource

    def connected(self, context: Any) -> Connected:
        """All of them, of a context that requires `everything`."""
        return Connected(
            mysql=self.mysql_of(context),
            clickhouse=self.clickhouse_of(context),
            heartbeat=getattr(context.resources, self.heartbeat),
            pipeline=getattr(context.resources, self.pipeline),
        )
