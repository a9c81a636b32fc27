"""One test's two databases: creating them, asking them, dropping them."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache

import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox

_numbers = itertools.count(1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Stack:
    """One test's two databases, tables created, and the stores over them."""

    mysql_url: str
    clickhouse_url: str
    outbox: MySQLOutbox
    log: ClickHouseAuditLog

    @property
    def upkeep(self) -> MySQLMaintenance:
        return MySQLMaintenance(self.outbox)

    def sql(self, statement: str, **values: object) -> list[sa.Row[tuple[object, ...]]]:
        """Runs a statement in MySQL as the application would, without a transaction around it."""
        with self.outbox.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            result = connection.execute(sa.text(statement), values)
            return list(result) if result.returns_rows else []

    def put(self, *rows: tuple[str, str, str], version: str = "audit_log.v1") -> list[int]:
        """Inserts (workspace_id, event_id, payload) rows as one application transaction; returns their pks."""
        pks = []
        with self.outbox.engine.begin() as connection:
            for workspace_id, event_id, payload in rows:
                result = connection.execute(
                    sa.text(
                        "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                        "VALUES (:version, :workspace_id, :event_id, :payload, UNIX_TIMESTAMP(NOW(3)) * 1000)"
                    ),
                    {"version": version, "workspace_id": workspace_id, "event_id": event_id, "payload": payload},
                )
                pks.append(int(result.lastrowid))
        return pks

    def clickhouse(self, query: str, **parameters: object) -> list[tuple[object, ...]]:
        """Rows of a ClickHouse query, JSON keys with dots shown as they are."""
        result = self.log.client().query(
            query, parameters=parameters or None, settings={"json_type_escape_dots_in_keys": 1}
        )
        return [tuple(row) for row in result.result_rows]

    def counts(self) -> tuple[int, int]:
        """(entries, distinct events) in ClickHouse, without FINAL: equal means no duplicate."""
        ((entries, events),) = self.clickhouse(
            "SELECT count(), uniqExact(workspace_id, event_id) FROM audit_logs_raw_v1"
        )
        return int(str(entries)), int(str(events))

    def pending(self) -> int:
        """Rows of the outbox that are not marked."""
        return int(str(self.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox WHERE deleted_at IS NULL")[0].n))


@lru_cache
def _admins(mysql_server: str, clickhouse_server: str) -> tuple[sa.Engine, ClickHouseAuditLog]:
    """Who creates and drops the databases: one of each for all tests, because connecting costs more than either statement."""
    engine = sa.create_engine(mysql_server, isolation_level="AUTOCOMMIT", pool_pre_ping=True)
    return engine, ClickHouseAuditLog(clickhouse_server + "default")


@contextmanager
def fresh_stack(mysql_server: str, clickhouse_server: str, *, create: bool = True) -> Iterator[Stack]:
    """Two fresh databases, with all tables unless not `create`, dropped afterwards."""
    name = f"auditexport_test_{os.getpid()}_{next(_numbers)}"
    admin, admin_log = _admins(mysql_server, clickhouse_server)
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {name}")
    admin_log.client().command(f"CREATE DATABASE {name}")
    outbox = MySQLOutbox(mysql_server + name)
    log = ClickHouseAuditLog(clickhouse_server + name)
    # Settings belong to a server and a user, not to a database; old servers take a third of a second to list them.
    log.connection._listed = admin_log.connection.listed()
    if create:
        setup.create(outbox, log, with_outbox=True)
    try:
        yield Stack(mysql_url=outbox.url, clickhouse_url=log.url, outbox=outbox, log=log)
    finally:
        outbox.disconnect()
        log.connection.pool.clear()
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")
        admin_log.client().command(f"DROP DATABASE {name}")
