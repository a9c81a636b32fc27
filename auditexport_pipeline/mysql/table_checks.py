"""Looking at our tables in MySQL and the application's: engine, columns, indexes, and the ledger's head.

What belongs here: how a table as it is differs from `schema.sql`, what that breaks, and the statement that mends it. What
does not: the server and its user (`mysql.checks`), and altering anything.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection

from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.roles import (
    ACTIONS,
    DEAD_LETTERS,
    ERASURES,
    LEDGER,
    MYSQL_GRANTS,
    OUTBOX,
    MySQLGrants,
    Role,
)
from auditexport_pipeline.sql import Column, columns_of, keys_of, load

_SQL = load("mysql/checks.sql")
_DECLARED = load("mysql/schema.sql")
_STATEMENT_OF = {
    OUTBOX: "outbox",
    LEDGER: "ledger",
    DEAD_LETTERS: "dead_letters",
    ACTIONS: "actions",
    ERASURES: "erasures",
}
# In a trigger's body: what can undo or refuse a mark.
_REFUSING = re.compile(r"\b(?:deleted_at|SIGNAL|RESIGNAL)\b", re.IGNORECASE)
# A clock that is this far ahead was wrong, not merely late.
AHEAD_MS = 3_600_000
# ClickHouse's DateTime ends in 2106, and a TTL counted from beyond it is in the past.
LAST_STAMP_MS = 4_284_000_000_000
_INTEGERS = ("tinyint", "smallint", "mediumint", "int", "bigint")
_TEXTS = {"tinytext": 255, "text": 65_535, "mediumtext": 16_777_215, "longtext": 4_294_967_295}


@dataclass(frozen=True, slots=True, kw_only=True)
class _There:
    """A column as the server describes it."""

    type: str
    nullable: bool
    charset: str | None
    collation: str | None


def look_at_tables(connection: Connection, grants: MySQLGrants, database: str, role: Role) -> Iterator[Look]:
    """The tables that this role works on, and the ledger's head. Source: catalogues, the ledger's row 0."""
    columns: defaultdict[str, dict[str, _There]] = defaultdict(dict)
    for row in connection.exec_driver_sql(_SQL["columns"]):
        columns[row.table_name][row.column_name] = _There(
            type=re.sub(r"(int)\(\d+\)", r"\1", row.column_type),
            nullable=row.nullable == "YES",
            charset=row.charset,
            collation=row.collation,
        )
    engines = {row.table_name: str(row.engine) for row in connection.exec_driver_sql(_SQL["tables"])}
    indexes = _indexes(connection)
    for table in MYSQL_GRANTS[role]:
        if table not in columns:
            yield _absent(table, role, readable=not grants.lacking(database, table, ("SELECT",)))
            continue
        statement = _DECLARED[_STATEMENT_OF[table]]
        findings = [
            *_engine(table, engines.get(table, "")),
            *_columns(table, columns_of(statement), columns[table]),
            *_keys(table, keys_of(statement), indexes.get(table, {})),
        ]
        yield Look(
            about=f"MySQL table {table}",
            seen=f"{engines.get(table)}, {len(columns[table])} columns",
            findings=tuple(findings),
        )
    if role is Role.EXPORTER and OUTBOX in columns:
        yield _triggers(connection)
    readable = LEDGER in MYSQL_GRANTS[role] and not grants.lacking(database, LEDGER, ("SELECT",))
    if readable and {"batch_id", "inserted_at_ms"} <= columns[LEDGER].keys():
        yield from look_at_head(connection)
    sees_outbox = OUTBOX in MYSQL_GRANTS[role] and not grants.lacking(database, OUTBOX, ("SELECT",))
    if readable and sees_outbox and OUTBOX in columns and "last_pk" in columns[LEDGER]:
        yield look_at_pks(connection)


def _triggers(connection: Connection) -> Look:
    """Triggers that a mark fires, as far as this user sees them; one that does not touch `deleted_at` or signal is fine."""
    triggers = list(connection.exec_driver_sql(_SQL["update_triggers"]))
    suspect = [f"{row.name} ({row.timing} UPDATE)" for row in triggers if _REFUSING.search(row.statement)]
    finding = Finding(
        what=f"the trigger {', '.join(suspect)} on clickhouse_outbox names deleted_at or signals",
        breaks="if it undoes or refuses the mark of an exported row, its batch stays open and each drain ends with it; the rows "
        "are in ClickHouse and are not sent again",
        fix="see that it leaves alone an UPDATE that sets deleted_at only",
        fatal=False,
    )
    return Look(
        about="MySQL triggers on marks",
        seen=", ".join(f"{row.name} ({row.timing} UPDATE)" for row in triggers) or "none that this user sees",
        findings=(finding,) if suspect else (),
    )


def _absent(table: str, role: Role, *, readable: bool) -> Look:
    if role is Role.OWNER and table != OUTBOX:
        return Look(about=f"MySQL table {table}", seen="not there; `auditexport init` creates it")
    fix = "run `auditexport init`"
    if table == OUTBOX:
        fix = "the application creates it (for a trial: `auditexport init --with-outbox`)"
    finding = Finding(
        what=f"MySQL table {table} does not exist" + ("" if readable else ", or this user may not see it"),
        breaks="nothing can be exported",
        fix=fix,
    )
    return Look(about=f"MySQL table {table}", seen="not there", findings=(finding,))


def _engine(table: str, engine: str) -> Iterator[Finding]:
    if engine.lower() != "innodb":
        yield Finding(
            what=f"{table} is stored by {engine}",
            breaks="an event would not be in the transaction of its change, and marking would lock the table"
            if table == OUTBOX
            else "the ledger's fences are locks of rows, which only InnoDB has",
            fix=f"ALTER TABLE {table} ENGINE = InnoDB",
        )


def _columns(table: str, declared: Mapping[str, Column], there: Mapping[str, _There]) -> Iterator[Finding]:
    lacking = [column for name, column in declared.items() if name not in there]
    if lacking:
        yield Finding(
            what=f"{table} lacks {', '.join(column.name for column in lacking)}",
            breaks="its statements fail",
            fix=f"ALTER TABLE {table} " + ", ".join(f"ADD COLUMN {column.declaration}" for column in lacking),
        )
    for name, column in declared.items():
        if name not in there:
            continue
        found = there[name]
        # The key is there: named a second time, it would be a second one.
        modify = f"ALTER TABLE {table} MODIFY COLUMN {column.declaration.removesuffix(' PRIMARY KEY')}"
        if not _holds(column.type.lower(), found.type):
            yield Finding(
                what=f"{table}.{name} is {found.type} and should be {column.type.lower()}",
                breaks="values do not fit, or read back as others",
                fix=modify,
            )
        elif column.nullable and not found.nullable:
            yield Finding(
                what=f"{table}.{name} cannot be NULL",
                breaks="no row can be pending" if table == OUTBOX else "its statements fail",
                fix=modify,
            )
        elif found.charset and column.type.upper().startswith(("VARCHAR", "MEDIUMTEXT", "TEXT")):
            yield from _collation(table, column, found)


def _collation(table: str, column: Column, found: _There) -> Iterator[Finding]:
    ours = table != OUTBOX
    where = f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    if found.charset != "utf8mb4":
        yield Finding(
            what=f"{table}.{column.name} is in {found.charset}",
            breaks="an id with a letter beyond it stops its batch"
            if ours
            else "ids with other letters cannot be written",
            fix=where,
            fatal=ours,
        )
    elif not (found.collation or "").endswith(("_bin", "_as_cs")):
        yield Finding(
            what=f"{table}.{column.name} compares by {found.collation}",
            breaks="ids and versions that differ in case or accents count as one: an operator's filter would take in "
            "another tenant's rows",
            fix=where,
            fatal=False,
        )


def _holds(declared: str, found: str) -> bool:
    """Whether a column of type `found` keeps every value of the declared type as it is."""
    if declared == "json":
        return found in ("json", "longtext")
    want, have = re.split(r"[( ]", declared)[0], re.split(r"[( ]", found)[0]
    if want in _INTEGERS:
        # A signed one of the next size would do, and ours are far below the sign.
        return have in _INTEGERS and _INTEGERS.index(have) >= _INTEGERS.index(want)
    if want == "varchar":
        size = re.search(r"\((\d+)\)", found)
        return (have == "varchar" and int(size[1] if size else 0) >= int(declared[8:-1])) or have in _TEXTS
    return have in _TEXTS and _TEXTS[have] >= _TEXTS[want]


def _keys(table: str, declared: Mapping[str, str], there: Mapping[str, list[dict[str, object]]]) -> Iterator[Finding]:
    for name, columns in declared.items():
        parts = there.get(name, [])
        forced = table == OUTBOX
        slow = (
            "every statement names it: claims and probes would fail, and without it read the whole table"
            if forced
            else "a drain slows down as the table grows"
        )
        if ",".join(str(part["column_name"]).lower() for part in parts) != columns:
            drop = f"DROP INDEX {name}, " if parts else ""
            yield Finding(
                what=f"{table} has no index {name} ({columns.replace(',', ', ')})",
                breaks=slow,
                fix=f"ALTER TABLE {table} {drop}ADD INDEX {name} ({columns.replace(',', ', ')})",
                fatal=forced,
            )
        elif not _usable(parts):
            yield Finding(
                what=f"index {name} of {table} is there and switched off",
                breaks=slow,
                fix=f"ALTER TABLE {table} ALTER INDEX {name} {'VISIBLE' if 'is_visible' in parts[0] else 'NOT IGNORED'}",
                fatal=forced,
            )


def look_at_head(connection: Connection) -> Iterator[Look]:
    """The ledger's row 0: the lock of all planners, and the last `inserted_at` handed out."""
    about = "ledger's head"
    head = connection.exec_driver_sql(_SQL["ledger_head"]).one_or_none()
    if head is None:
        finding = Finding(
            what=f"{LEDGER} lacks its row 0, the ledger's lock",
            breaks="no planner can take its turn",
            fix="run `auditexport init`",
        )
        yield Look(about=about, seen="not there", findings=(finding,))
        return
    ahead_ms = head.inserted_at_ms - head.now_ms
    seen = f"last inserted_at {head.inserted_at_ms}"
    if ahead_ms <= AHEAD_MS:
        yield Look(about=about, seen=seen)
        return
    used = (head.stamped_ms or 0) - head.now_ms > AHEAD_MS
    finding = Finding(
        what=f"the ledger's last inserted_at is {ahead_ms / 3_600_000:,.0f} hours ahead of MySQL's clock",
        breaks="every new entry is stamped after it: retention and months are counted from there"
        + (
            ", and beyond the year 2105 ClickHouse drops entries on arrival"
            if head.inserted_at_ms > LAST_STAMP_MS
            else ""
        ),
        fix="set MySQL's clock right; batches carry such stamps already, so wait until it has passed them: lowered, the "
        "ledger would hand out a stamp twice"
        if used
        else f"set MySQL's clock right; no batch carries such a stamp, so: UPDATE {LEDGER} SET inserted_at_ms = "
        f"{max(head.now_ms, head.stamped_ms or 0)} WHERE batch_id = 0",
        fatal=head.inserted_at_ms > LAST_STAMP_MS,
    )
    yield Look(about=about, seen=seen, findings=(finding,))


def look_at_pks(connection: Connection) -> Look:
    """Whether the outbox hands out pks that batches of the ledger had already."""
    about = "pks of the outbox"
    created = str(connection.exec_driver_sql(_SQL["next_pk"]).one()[1])
    last_pk = connection.exec_driver_sql(_SQL["last_exported_pk"]).scalar()
    if "AUTO_INCREMENT" not in created or last_pk is None:
        return Look(about=about, seen="nothing to compare")
    found = re.search(r"\bAUTO_INCREMENT=(\d+)", created.rpartition(")")[2])
    next_pk = int(found[1]) if found else 1
    seen = f"the next is {next_pk:,}, the ledger's last {last_pk:,}"
    if next_pk > last_pk:
        return Look(about=about, seen=seen)
    finding = Finding(
        what=f"{OUTBOX}'s pks repeat: the next one is {next_pk:,}, and batches of the ledger had pks up to {last_pk:,} (a "
        "TRUNCATE, a new table, AUTO_INCREMENT set back, or a restore)",
        breaks="new events are exported as such, each after a look whether it is a repetition; what ClickHouse has lost of "
        "earlier batches cannot be exported again from here",
        fix=f"nothing has to be done; ALTER TABLE {OUTBOX} AUTO_INCREMENT = {last_pk + 1} saves the looks",
        fatal=False,
    )
    return Look(about=about, seen=seen, findings=(finding,))


def can_be_sampled(connection: Connection) -> bool:
    """Whether the index and the columns of the sample are there; each that is not is a finding of its own."""
    parts = _indexes(connection).get(OUTBOX, {}).get("drainer_pending_idx", [])
    there = {row.column_name for row in connection.exec_driver_sql(_SQL["columns"]) if row.table_name == OUTBOX}
    return _usable(parts) and {"payload", "deleted_at"} <= there


def _indexes(connection: Connection) -> dict[str, dict[str, list[dict[str, object]]]]:
    """By table and index, the catalogue's row for each of the index's columns, in order."""
    indexes: defaultdict[str, defaultdict[str, list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for row in connection.exec_driver_sql(_SQL["indexes"]).mappings():
        part = {str(name).lower(): value for name, value in row.items()}
        indexes[str(part["table_name"]).lower()][str(part["index_name"]).lower()].append(part)
    return {table: dict(of_table) for table, of_table in indexes.items()}


def _usable(parts: list[dict[str, object]]) -> bool:
    """Whether the optimizer may use it: MySQL can make an index invisible, MariaDB can have it ignored."""
    return bool(parts) and parts[0].get("is_visible", "YES") == "YES" and parts[0].get("ignored", "NO") == "NO"
