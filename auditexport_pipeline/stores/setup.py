"""Tables: creating what is ours.

What belongs here: `auditexport init`. What does not: exporting; checking what is there (`stores.preflight`); and
altering a table that exists, which is never done.
"""

from __future__ import annotations

from string import Template

from sqlalchemy import text

from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.stores.audit_log import READ_SETTINGS, ClickHouseAuditLog
from auditexport_pipeline.stores.audit_log import translated as clickhouse_errors
from auditexport_pipeline.stores.outbox import MySQLOutbox
from auditexport_pipeline.stores.statements import load

_SQL = load("setup.sql")
# Blocks whose tokens ClickHouse remembers. At the largest of 64 × 16 blocks a run this covers ten runs, and
# it only has to cover an INSERT that is still running when its replay begins.
DEDUPLICATION_WINDOW = 10_000
_OUR_TABLES = {
    "clickhouse_outbox_batch": "ledger",
    "clickhouse_outbox_dead_letter": "dead_letters",
    "clickhouse_outbox_action": "actions",
    "clickhouse_outbox_erasure": "erasures",
}


def create(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, *, with_outbox: bool = False, replicated: bool = False
) -> list[str]:
    """Creates what does not exist yet and returns the names created; changes nothing that exists.

    Durable effect: our four tables in MySQL (`clickhouse_outbox_batch`, `_dead_letter`, `_action`, `_erasure`),
    with `with_outbox` also the application's `clickhouse_outbox`; in ClickHouse the table of each payload version, such as
    `audit_logs_raw_v1`, and the view `audit_logs`, on ReplicatedReplacingMergeTree when `replicated`.
    """
    created = []
    with outbox.transaction("looking for tables") as connection:
        mariadb = "mariadb" in str(connection.execute(text("SELECT VERSION()")).scalar()).lower()
        existing = {row.table_name for row in connection.exec_driver_sql(_SQL["mysql_tables"])}
        collation = "utf8mb4_bin" if mariadb else "utf8mb4_0900_as_cs"
    wanted = {"clickhouse_outbox": "outbox", **_OUR_TABLES} if with_outbox else _OUR_TABLES
    for table, statement in wanted.items():
        if table not in existing:
            with outbox.transaction(f"creating {table}") as connection:
                connection.exec_driver_sql(Template(_SQL[statement]).substitute(collation=collation).replace("%", "%%"))
            created.append(table)
    with outbox.transaction("preparing the ledger") as connection:
        connection.exec_driver_sql(_SQL["ledger_head"])

    with clickhouse_errors("creating tables"):
        client = log.client()
        there = {row[0] for row in client.query(_SQL["clickhouse_tables"]).result_rows}
        statements = {version.table: version.pieces["ddl"] for version in VERSIONS.values()}
        for table, declared in {**statements, "audit_logs": _SQL["audit_logs"]}.items():
            if table not in there:
                statement = Template(declared).substitute(
                    engine="ReplicatedReplacingMergeTree" if replicated else "ReplacingMergeTree",
                    table_settings=f"replicated_deduplication_window = {DEDUPLICATION_WINDOW}"
                    if replicated
                    else f"non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}",
                )
                client.command(statement, settings=READ_SETTINGS)
                created.append(table)
    return created
