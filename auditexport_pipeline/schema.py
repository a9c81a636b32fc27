"""Creates missing tables, for `auditexport init`. An existing table is never altered: `preflight` checks it."""

from __future__ import annotations

from collections.abc import Mapping
from string import Template

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.engines import TABLE, Engine, Layout, family_of
from auditexport_pipeline.clickhouse.settings import DDL_SETTINGS
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql.catalogue import DDL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import OUTBOX
from auditexport_pipeline.sql import load

_MYSQL = load("mysql/schema.sql")
_CLICKHOUSE = load("clickhouse/schema.sql")
_OURS = {table: statement for table, statement in DDL.items() if table != OUTBOX}


def create(
    outbox: MySQLOutbox,
    log: ClickHouseAuditLog,
    *,
    with_outbox: bool = False,
    layout: Layout | None = None,
    cluster: str = "",
) -> list[str]:
    """Creates what does not exist yet and returns the names created; changes nothing that exists.

    Durable effect: our four tables in MySQL (`clickhouse_outbox_batch`, `_dead_letter`, `_action`, `_erasure`),
    with `with_outbox` also the application's `clickhouse_outbox`; in ClickHouse the table of each payload version, such
    as `audit_logs_raw_v1`, and the view `audit_logs`; where `layout` is distributed, tables named `…_local` under them,
    on every server of its cluster. Without a layout, on one server (`cluster`: on each of its servers), or in the Cloud
    if `audit_logs_raw_v1` is there already: raises `InvalidConfig` when a table has to be created beside one on
    replicas or shards, whose layout is not known here.
    """
    created = []
    with outbox.transaction("looking for tables") as connection:
        mariadb = "mariadb" in str(connection.exec_driver_sql("SELECT VERSION()").scalar()).lower()
        existing = {row.table_name for row in connection.exec_driver_sql(_MYSQL["tables"])}
    collation = "utf8mb4_bin" if mariadb else "utf8mb4_0900_as_cs"
    for table, statement in ({OUTBOX: DDL[OUTBOX], **_OURS} if with_outbox else _OURS).items():
        if table not in existing:
            with outbox.transaction(f"creating {table}") as connection:
                connection.exec_driver_sql(Template(statement).substitute(collation=collation).replace("%", "%%"))
            created.append(table)
    with outbox.transaction("preparing the ledger") as connection:
        connection.exec_driver_sql(_MYSQL["ledger_head"])

    with log.connection.translated("creating tables"):
        engines = {str(name): str(engine) for name, engine in log.connection.query(_CLICKHOUSE["tables"])}
        statements = (layout or _beside(engines, cluster)).statements(log.connection.database)
        for table, statement in statements.items():
            if table not in engines:
                log.connection.command(statement, settings=DDL_SETTINGS)
                created.append(table)
    return created


def _beside(engines: Mapping[str, str], cluster: str) -> Layout:
    """The layout of tables beside `audit_logs_raw_v1`, from the engines that are there by name."""
    family = family_of(engines.get(TABLE, ""))
    if family in (Engine.MERGE_TREE, Engine.SHARED):
        return Layout(engine=family, cluster=cluster)
    missing = [version.table for version in VERSIONS.values() if version.table not in engines]
    if missing:
        on = "[--cluster NAME]" if family is Engine.REPLICATED else "--cluster NAME"
        raise InvalidConfig(
            f"{TABLE} is {family.value}, and {', '.join(missing)} would be created on one server: name the engine, as for {TABLE}: "
            f"auditexport init --engine {family.value} {on}"
        )
    return Layout(cluster=cluster)  # for the view


def printed(layout: Layout, database: str) -> dict[str, list[str]]:
    """The statements of `create` for empty databases, without the application's outbox."""
    return {"mysql": [*_OURS.values(), _MYSQL["ledger_head"]], "clickhouse": [*layout.statements(database).values()]}
