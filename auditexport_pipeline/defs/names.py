"""The names of one outbox's definitions, so that several outboxes fit into one code location.

Without a name they are those of the contract. With one, every name begins with it and the assets stand under it:
`eu_audit_log_export`, `eu/audit_logs_raw_v1`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import dagster as dg

from auditexport_pipeline.outboxes import check_name, check_queue

if TYPE_CHECKING:
    from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
    from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
    from auditexport_pipeline.mysql.outbox import MySQLOutbox


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
    def outbox_asset(self) -> dg.AssetKey:
        return self.key("clickhouse_outbox")

    @property
    def node(self) -> str:
        """The asset in a run's configuration and in the keys of its steps."""
        return "__".join(self.asset.path)

    @property
    def job(self) -> str:
        """The job that drains, and its pool: the queue admits one run that holds it, however the run is launched."""
        return self.of("audit_log_export")

    @property
    def drain_tags(self) -> dict[str, str]:
        """For limits of the queue: drains apart from other runs, and each outbox apart."""
        return {"auditexport/kind": "drain", "auditexport/outbox": self.name or "default"}

    # ── resources ────────────────────────────────────────────────────────────────────────────────

    def keys(self, *resources: str) -> set[str]:
        """Keys of these resources, for `required_resource_keys`."""
        return {self.of(resource) for resource in resources}

    def resource(self, context: Any, resource: str) -> Any:
        """The resource of this outbox, from a context that requires it."""
        return getattr(context.resources, self.of(resource))

    def outbox(self, context: Any) -> MySQLOutbox:
        outbox: MySQLOutbox = self.resource(context, "mysql").outbox()
        return outbox

    def maintenance(self, context: Any) -> MySQLMaintenance:
        maintenance: MySQLMaintenance = self.resource(context, "mysql").maintenance()
        return maintenance

    def audit_log(self, context: Any) -> ClickHouseAuditLog:
        audit_log: ClickHouseAuditLog = self.resource(context, "clickhouse").audit_log()
        return audit_log
