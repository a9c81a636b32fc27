"""The stores of a command: which outbox it is about, its URLs, and the stores over both databases.

The outbox is the only one, of the environment, or one of the file AUDITEXPORT_OUTBOXES, which `outboxes` reads.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import TYPE_CHECKING

import click

from auditexport_pipeline.core.errors import InvalidConfig

if TYPE_CHECKING:
    from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
    from auditexport_pipeline.core.settings import Targets
    from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
    from auditexport_pipeline.mysql.outbox import MySQLOutbox
    from auditexport_pipeline.outboxes import Outboxes, OutboxSettings


# The form of each variable, for the message that it is not set.
FORMS = {
    "AUDITEXPORT_MYSQL_URL": "mysql+pymysql://user:password@host:port/database",
    "AUDITEXPORT_CLICKHOUSE_URL": "http[s]://user:password@host:port/database",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One outbox: an entry of the file, or the one of the environment."""

    outboxes: Outboxes | None = None
    entry: OutboxSettings | None = None

    @property
    def name(self) -> str:
        """Empty for the outbox of the environment."""
        return self.entry.name if self.entry is not None else ""

    def outbox(self) -> MySQLOutbox:
        """Raises `InvalidConfig` for a variable that is not set, and for a URL of another kind."""
        from auditexport_pipeline.mysql.outbox import MySQLOutbox

        return MySQLOutbox(self._url("mysql_url_env", "AUDITEXPORT_MYSQL_URL"))

    def audit_log(self) -> ClickHouseAuditLog:
        """Raises as `outbox` does."""
        from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog

        return ClickHouseAuditLog(self._url("clickhouse_url_env", "AUDITEXPORT_CLICKHOUSE_URL"))

    def targets(self) -> Targets:
        """Its own targets, over the defaults."""
        from auditexport_pipeline.core.settings import Targets

        return Targets().with_values(self.entry.targets if self.entry is not None else {})

    def _url(self, key: str, variable: str) -> str:
        if self.outboxes is not None and self.entry is not None:
            return self.outboxes.url(self.entry, key)
        if url := os.environ.get(variable):
            return url
        raise InvalidConfig(f"{variable} is not set; write {FORMS[variable]}")


def every() -> list[Chosen]:
    """All outboxes of the file, in its order, or the one of the environment."""
    from auditexport_pipeline.outboxes import read_outboxes

    outboxes = read_outboxes()
    if outboxes is None:
        return [Chosen()]
    return [Chosen(outboxes=outboxes, entry=entry) for entry in outboxes.entries]


def chosen() -> Chosen:
    """The outbox that --outbox or AUDITEXPORT_OUTBOX names, or the only one. Raises `InvalidConfig`, with the names."""
    from auditexport_pipeline.outboxes import OUTBOXES_VARIABLE

    found, name = every(), _given_name()
    outboxes = found[0].outboxes
    if outboxes is None:
        if name:
            raise InvalidConfig(f"--outbox {name}: there is no list of outboxes; {OUTBOXES_VARIABLE} names its file")
        return found[0]
    if name:
        return Chosen(outboxes=outboxes, entry=outboxes.named(name))
    if len(found) > 1:
        raise InvalidConfig(
            f"{outboxes.path} has several outboxes; say which with --outbox: {', '.join(outboxes.names)}"
        )
    return found[0]


def outbox_name() -> str:
    """The name of the chosen outbox; empty without one, or when it cannot be known."""
    try:
        return chosen().name
    except InvalidConfig:
        return ""


def _given_name() -> str:
    context = click.get_current_context(silent=True)
    return (context.find_root().params.get("outbox_name") or "") if context is not None else ""


def outbox() -> MySQLOutbox:
    """The store over the chosen outbox's MySQL."""
    return chosen().outbox()


def maintenance() -> MySQLMaintenance:
    """The store for requeues, sweeps and reconciliations, over the same database."""
    from auditexport_pipeline.mysql.maintenance import MySQLMaintenance

    return MySQLMaintenance(outbox())


def audit_log() -> ClickHouseAuditLog:
    """The store over the chosen outbox's ClickHouse."""
    return chosen().audit_log()
