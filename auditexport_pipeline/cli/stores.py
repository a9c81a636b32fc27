"""The two stores of a command: of the one outbox of the environment, or of one that AUDITEXPORT_OUTBOXES lists.

What belongs here: which outbox a command is about, reading the URLs and constructing the stores, once for all commands.
What does not: the file's form (`outboxes`), and what a command does with the stores.
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


# What each of them looks like, for whoever has not set it.
FORMS = {
    "AUDITEXPORT_MYSQL_URL": "mysql+pymysql://user:password@host:port/database",
    "AUDITEXPORT_CLICKHOUSE_URL": "http[s]://user:password@host:port/database",
}


def required(name: str) -> str:
    """The value of an environment variable; raises `InvalidConfig` when it is not set."""
    value = os.environ.get(name)
    if not value:
        raise InvalidConfig(f"{name} is not set; write {FORMS.get(name, 'a URL')}")
    return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Chosen:
    """One outbox as the prompt sees it: an entry of the file, or without one that of the environment."""

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
        return required(variable)


def every() -> list[Chosen]:
    """Every outbox there is: those of the file, in its order, or the one of the environment."""
    from auditexport_pipeline.outboxes import read_outboxes

    outboxes = read_outboxes()
    if outboxes is None:
        return [Chosen()]
    return [Chosen(outboxes=outboxes, entry=entry) for entry in outboxes.entries]


def chosen() -> Chosen:
    """The outbox that --outbox or AUDITEXPORT_OUTBOX names; where there is one only, that one.

    Raises `InvalidConfig`, with the names that there are.
    """
    from auditexport_pipeline.outboxes import OUTBOXES_VARIABLE, read_outboxes

    context = click.get_current_context(silent=True)
    name = context.find_root().params.get("outbox_name") if context is not None else None
    outboxes = read_outboxes()
    if outboxes is None:
        if name:
            raise InvalidConfig(f"--outbox {name}: there is no list of outboxes; {OUTBOXES_VARIABLE} names its file")
        return Chosen()
    if not name and len(outboxes.entries) > 1:
        raise InvalidConfig(
            f"{outboxes.path} has several outboxes; say which with --outbox: {', '.join(outboxes.names)}"
        )
    return Chosen(outboxes=outboxes, entry=outboxes.named(name) if name else outboxes.entries[0])


def outbox() -> MySQLOutbox:
    """The store over the chosen outbox's MySQL."""
    return chosen().outbox()


def upkeep() -> MySQLMaintenance:
    """The same database, looked back at."""
    from auditexport_pipeline.mysql.maintenance import MySQLMaintenance

    return MySQLMaintenance(outbox())


def audit_log() -> ClickHouseAuditLog:
    """The store over the chosen outbox's ClickHouse."""
    return chosen().audit_log()
