"""The two stores of a command, from the environment.

What belongs here: reading the URLs and constructing the stores, once for all commands. What does not: what a
command does with them.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from auditexport_pipeline.core.errors import InvalidConfig

if TYPE_CHECKING:
    from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
    from auditexport_pipeline.stores.outbox import MySQLOutbox
    from auditexport_pipeline.stores.upkeep import MySQLUpkeep


def required(name: str) -> str:
    """The value of an environment variable; raises `InvalidConfig` when it is not set."""
    value = os.environ.get(name)
    if not value:
        raise InvalidConfig(f"{name} is not set; the README says what it looks like")
    return value


def outbox() -> MySQLOutbox:
    """The store over AUDITEXPORT_MYSQL_URL."""
    from auditexport_pipeline.stores.outbox import MySQLOutbox

    return MySQLOutbox(required("AUDITEXPORT_MYSQL_URL"))


def upkeep() -> MySQLUpkeep:
    """The same database, looked back at."""
    from auditexport_pipeline.stores.upkeep import MySQLUpkeep

    return MySQLUpkeep(outbox())


def audit_log() -> ClickHouseAuditLog:
    """The store over AUDITEXPORT_CLICKHOUSE_URL."""
    from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog

    return ClickHouseAuditLog(required("AUDITEXPORT_CLICKHOUSE_URL"))
