"""Tables: creating what is ours, and checking what is there before anything is claimed.

What belongs here: `auditexport init` and the preflight of a run. What does not: exporting; and altering
a table that exists, which is never done: a difference is reported with the statement that mends it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass
from string import Template

from sqlalchemy import text

from auditexport_pipeline.core.errors import SetupIncomplete
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
# What a drain reads and writes; the others are for operators.
_DRAIN_TABLES = ("clickhouse_outbox", "clickhouse_outbox_batch", "clickhouse_outbox_dead_letter")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is missing or wrong: what breaks because of it, and how to mend it."""

    what: str
    breaks: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.breaks}. Fix: {self.fix}"


def create(
    outbox: MySQLOutbox, log: ClickHouseAuditLog, *, with_outbox: bool = False, replicated: bool = False
) -> list[str]:
    """Creates what does not exist yet and returns the names created; changes nothing that exists.

    Durable effect: our four tables in MySQL (`clickhouse_outbox_batch`, `_dead_letter`, `_action`, `_erasure`),
    with `with_outbox` also the application's `clickhouse_outbox`; `audit_logs_raw_v1` and `audit_logs` in
    ClickHouse, on ReplicatedReplacingMergeTree when `replicated`.
    """
    created = []
    with outbox.transaction("looking for tables") as connection:
        mariadb = "mariadb" in str(connection.execute(text("SELECT VERSION()")).scalar()).lower()
        existing = set(_mysql_columns(outbox))
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
        there = {row[0] for row in client.query(_SQL["clickhouse_columns"]).result_rows}
        for table in ("audit_logs_raw_v1", "audit_logs"):
            if table not in there:
                statement = Template(_SQL[table]).substitute(
                    engine="ReplicatedReplacingMergeTree" if replicated else "ReplacingMergeTree",
                    table_settings=f"replicated_deduplication_window = {DEDUPLICATION_WINDOW}"
                    if replicated
                    else f"non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}",
                )
                client.command(statement, settings=READ_SETTINGS)
                created.append(table)
    return created


def check(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> list[Finding]:
    """What stands between this setup and exactly-once; empty when nothing does. Reads catalogues only."""
    return [*_check_mysql(outbox), *_check_clickhouse(log)]


def refuse_unless_ready(outbox: MySQLOutbox, log: ClickHouseAuditLog) -> None:
    """Raises `SetupIncomplete` with every fatal finding; called before anything is claimed."""
    fatal = [finding for finding in check(outbox, log) if finding.fatal]
    if fatal:
        raise SetupIncomplete("nothing was claimed. " + " — ".join(map(str, fatal)))


def _mysql_columns(outbox: MySQLOutbox) -> dict[str, dict[str, set[str]]]:
    """By table and column, what the connected user may do: select, insert, update, …"""
    columns: defaultdict[str, dict[str, set[str]]] = defaultdict(dict)
    with outbox.transaction("reading the catalogue") as connection:
        for row in connection.exec_driver_sql(_SQL["mysql_columns"]):
            columns[row.table_name][row.column_name] = set(str(row.granted).split(","))
    return dict(columns)


def _expected_columns(statement: str) -> list[str]:
    """The column names of one of our CREATE TABLE statements, read from the statement itself."""
    return [
        found.group(1)
        for line in _SQL[statement].splitlines()
        if (found := re.match(r"  `?([a-z_.]+)`? ", line)) and found.group(1) == found.group(1).lower()
    ]


def _check_mysql(outbox: MySQLOutbox) -> list[Finding]:
    findings = []
    columns = _mysql_columns(outbox)
    for table in _DRAIN_TABLES:
        statement = _OUR_TABLES.get(table, "outbox")
        ours = table in _OUR_TABLES
        if table not in columns:
            findings.append(
                Finding(
                    what=f"MySQL table {table} does not exist or is not readable",
                    breaks="nothing can be exported",
                    fix="run `auditexport init`"
                    if ours
                    else "the application creates it (for a trial: `auditexport init --with-outbox`)",
                )
            )
            continue
        lacking = [name for name in _expected_columns(statement) if name not in columns[table]]
        if lacking:
            findings.append(
                Finding(
                    what=f"MySQL table {table} lacks {', '.join(lacking)}",
                    breaks="its statements fail",
                    fix=f"ALTER TABLE {table} ADD COLUMN …, as in stores/setup.sql",
                )
            )
        needed = {"select", "insert", "update"} if ours else {"update"}
        column = "state" if ours else "deleted_at"
        denied = needed - columns[table].get(column, needed)
        if denied:
            grant = ", ".join(sorted(denied)).upper() if ours else "UPDATE (deleted_at)"
            findings.append(
                Finding(
                    what=f"the user of AUDITEXPORT_MYSQL_URL may not {' or '.join(sorted(denied))} {table}.{column}",
                    breaks="a run would write to ClickHouse and then be unable to mark"
                    if not ours
                    else "nothing can be claimed",
                    fix=f"GRANT {grant} ON {table} TO that user",
                )
            )
    if "clickhouse_outbox" in columns:
        with outbox.transaction("reading the catalogue") as connection:
            indexes = {row.index_name: str(row.columns) for row in connection.exec_driver_sql(_SQL["mysql_indexes"])}
        if indexes.get("drainer_pending_idx") != "deleted_at,version,pk":
            findings.append(
                Finding(
                    what="clickhouse_outbox has no index drainer_pending_idx (deleted_at, version, pk)",
                    breaks="every claim and every probe would read the whole table",
                    fix="ALTER TABLE clickhouse_outbox ADD INDEX drainer_pending_idx (deleted_at, version, pk)",
                )
            )
    if "clickhouse_outbox_batch" in columns:
        with outbox.transaction("reading the ledger's head") as connection:
            if (
                connection.execute(text("SELECT COUNT(*) FROM clickhouse_outbox_batch WHERE batch_id = 0")).scalar()
                != 1
            ):
                findings.append(
                    Finding(
                        what="clickhouse_outbox_batch lacks its row 0, the ledger's lock",
                        breaks="no planner can take its turn",
                        fix="run `auditexport init`",
                    )
                )
    return findings


def _check_clickhouse(log: ClickHouseAuditLog) -> list[Finding]:
    with clickhouse_errors("reading the catalogue"):
        client = log.client()
        columns: defaultdict[str, set[str]] = defaultdict(set)
        for table, name in client.query(_SQL["clickhouse_columns"]).result_rows:
            columns[table].add(name)
        tables = client.query(_SQL["clickhouse_table"]).result_rows
    if not tables:
        return [
            Finding(
                what="ClickHouse table audit_logs_raw_v1 does not exist or is not readable",
                breaks="nothing can be exported",
                fix="run `auditexport init`",
            )
        ]
    findings = []
    lacking = [name for name in _expected_columns("audit_logs_raw_v1") if name not in columns["audit_logs_raw_v1"]]
    if lacking:
        findings.append(
            Finding(
                what=f"ClickHouse table audit_logs_raw_v1 lacks {', '.join(lacking)}",
                breaks="INSERTs fail",
                fix="ALTER TABLE audit_logs_raw_v1 ADD COLUMN …, as in stores/setup.sql",
            )
        )
    engine, engine_full, partition_key, sorting_key = tables[0]
    if not engine.endswith("ReplacingMergeTree"):
        findings.append(
            Finding(
                what=f"audit_logs_raw_v1 is a {engine}",
                breaks="copies of one event would stay for ever",
                fix="create it anew with `auditexport init` and copy the rows",
            )
        )
    if "toYYYYMM" not in partition_key or sorting_key.replace(" ", "") != "workspace_id,bucket,time,event_id":
        findings.append(
            Finding(
                what=f"audit_logs_raw_v1 is partitioned by {partition_key or 'nothing'} and sorted by {sorting_key}",
                breaks="copies of one event do not collapse",
                fix="create it anew with `auditexport init` and copy the rows",
            )
        )
    # Replicated and Shared tables have a window by default; a plain one has none unless it says so.
    window = re.search(r"(?:non_)?replicated_deduplication_window = (\d+)", engine_full)
    if int(window.group(1)) if window else engine.startswith(("Replicated", "Shared")):
        return findings
    findings.append(
        Finding(
            what="audit_logs_raw_v1 has no deduplication window",
            breaks="an INSERT that is replayed while its first attempt still runs is stored twice",
            fix=f"ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}",
        )
    )
    return findings
