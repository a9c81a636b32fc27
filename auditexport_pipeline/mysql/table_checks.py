"""The checks of the tables in MySQL: the differences from `schema.sql`, what they break, and the statements that fix
them.

Nothing is altered, and only the ledger's row 0 and its last pk are read from a table.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from auditexport_pipeline.core.findings import Check, Checking, Finding, warning
from auditexport_pipeline.mysql.catalogue import DDL, Catalogue, FoundColumn
from auditexport_pipeline.roles import LEDGER, MYSQL_GRANTS, OUTBOX, Role
from auditexport_pipeline.sql import Column, columns_of, keys_of

# Words of a trigger that can undo or refuse a mark.
_REFUSING = re.compile(r"\b(?:deleted_at|SIGNAL|RESIGNAL)\b", re.IGNORECASE)
# A clock that is this far ahead was wrong.
AHEAD_MS = 3_600_000
# ClickHouse's DateTime ends in 2106, and a TTL counted from beyond it is in the past.
LAST_STAMP_MS = 4_284_000_000_000
_INTEGERS = ("tinyint", "smallint", "mediumint", "int", "bigint")
_TEXTS = {"tinytext": 255, "text": 65_535, "mediumtext": 16_777_215, "longtext": 4_294_967_295}


def table_checks(db: Catalogue) -> Iterator[Check]:
    """The checks of the tables that the role of `db` works on."""
    for table in MYSQL_GRANTS[db.role]:
        yield Check(f"MySQL table {table}", _table(db, table))
    if db.role is Role.EXPORTER and OUTBOX in db.columns:
        yield Check("MySQL triggers on marks", _triggers(db))
    ledger = db.columns.get(LEDGER, {}).keys() if db.readable(LEDGER) else set()
    if {"batch_id", "inserted_at_ms"} <= ledger:
        yield Check("ledger's head", ledger_head(db))
    if "last_pk" in ledger and OUTBOX in db.columns and db.readable(OUTBOX):
        yield Check("pks of the outbox", _pks(db))


def _table(db: Catalogue, table: str) -> Checking:
    """The table is there, in InnoDB, with every column and index that `schema.sql` declares."""
    if table not in db.columns:
        if db.role is Role.OWNER and table != OUTBOX:
            return "not there; `auditexport init` creates it"
        yield Finding(
            what=f"MySQL table {table} does not exist{'' if db.readable(table) else ', or this user may not see it'}",
            breaks="nothing can be exported",
            fix="the application creates it (for a trial: `auditexport init --with-outbox`)"
            if table == OUTBOX
            else "run `auditexport init`",
        )
        return "not there"
    engine = db.engines.get(table, "")
    if engine.lower() != "innodb":
        yield Finding(
            what=f"{table} is stored by {engine}",
            breaks="an event would not be in the transaction of its change, and marking would lock the table"
            if table == OUTBOX
            else "the ledger's fences are locks of rows, which only InnoDB has",
            fix=f"ALTER TABLE {table} ENGINE = InnoDB",
        )
    declared, found = columns_of(DDL[table]), db.columns[table]
    if lacking := [column for name, column in declared.items() if name not in found]:
        yield Finding(
            what=f"{table} lacks {', '.join(column.name for column in lacking)}",
            breaks="its statements fail",
            fix=f"ALTER TABLE {table} " + ", ".join(f"ADD COLUMN {column.declaration}" for column in lacking),
        )
    for name, column in declared.items():
        if name in found:
            yield from _column(table, column, found[name])
    for name, columns in keys_of(DDL[table]).items():
        yield from _index(db, table, name, columns)
    return f"{engine}, {len(found)} columns"


def _column(table: str, column: Column, found: FoundColumn) -> Iterator[Finding]:
    """The column takes every value of its declared type, and compares texts exactly."""
    ours = table != OUTBOX
    # The primary key exists: the statement must not add a second one.
    modify = f"ALTER TABLE {table} MODIFY COLUMN {column.declaration.removesuffix(' PRIMARY KEY')}"
    convert = f"ALTER TABLE {table} CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_bin"
    if not _takes(column.type.lower(), found.type):
        yield Finding(
            what=f"{table}.{column.name} is {found.type} and should be {column.type.lower()}",
            breaks="values do not fit, or are read back changed",
            fix=modify,
        )
    elif column.nullable and not found.nullable:
        yield Finding(
            what=f"{table}.{column.name} cannot be NULL",
            breaks="its statements fail" if ours else "no row can be pending",
            fix=modify,
        )
    elif not found.charset or not column.type.upper().startswith(("VARCHAR", "MEDIUMTEXT", "TEXT")):
        return
    elif found.charset != "utf8mb4":
        yield Finding(
            what=f"{table}.{column.name} is in {found.charset}",
            breaks="an id with a character outside it stops its batch"
            if ours
            else "ids with other characters cannot be written",
            fix=convert,
            fatal=ours,
        )
    elif not (found.collation or "").endswith(("_bin", "_as_cs")):
        yield warning(
            what=f"{table}.{column.name} compares by {found.collation}",
            breaks="ids and versions that differ in case or accents count as one: an operator's filter would also take another "
            "tenant's rows",
            fix=convert,
        )


def _takes(declared: str, found: str) -> bool:
    """Whether a column of type `found` stores every value of the declared type unchanged."""
    if declared == "json":
        return found in ("json", "longtext")
    want, have = re.split(r"[( ]", declared)[0], re.split(r"[( ]", found)[0]
    if want in _INTEGERS:
        # The sign does not matter: our values are far below it.
        return have in _INTEGERS and _INTEGERS.index(have) >= _INTEGERS.index(want)
    if want == "varchar":
        size = re.search(r"\((\d+)\)", found)
        return (have == "varchar" and int(size[1] if size else 0) >= int(declared[8:-1])) or have in _TEXTS
    return have in _TEXTS and _TEXTS[have] >= _TEXTS[want]


def _index(db: Catalogue, table: str, name: str, columns: str) -> Iterator[Finding]:
    """The index is there, with its columns in order, and the optimizer may use it. Statements name the outbox's."""
    forced = table == OUTBOX
    breaks = "a drain slows down as the table grows"
    if forced:
        breaks = "every statement names it: claims and probes would fail"
    found, shown = db.indexes.get((table, name)), columns.replace(",", ", ")
    if found is None or found.columns != columns:
        yield Finding(
            what=f"{table} has no index {name} ({shown})",
            breaks=breaks,
            fix=f"ALTER TABLE {table} {f'DROP INDEX {name}, ' if found else ''}ADD INDEX {name} ({shown})",
            fatal=forced,
        )
    elif not found.usable:
        yield Finding(
            what=f"index {name} of {table} exists but is switched off",
            breaks=breaks,
            fix=f"ALTER TABLE {table} ALTER INDEX {name} {found.switch_on}",
            fatal=forced,
        )


def _triggers(db: Catalogue) -> Checking:
    """No trigger that a mark fires, as far as our user sees them, names `deleted_at` or signals."""
    triggers = {f"{row.name} ({row.timing} UPDATE)": row.statement for row in db.rows("update_triggers")}
    if suspect := [name for name, statement in triggers.items() if _REFUSING.search(statement)]:
        yield warning(
            what=f"the trigger {', '.join(suspect)} on clickhouse_outbox names deleted_at or signals",
            breaks="if it undoes or refuses the mark of an exported row, the batch stays open and each drain fails at it; its rows "
            "are in ClickHouse and are not sent again",
            fix="change it so that it ignores an UPDATE that sets only deleted_at",
        )
    return ", ".join(triggers) or "none that this user sees"


def ledger_head(db: Catalogue) -> Checking:
    """Row 0 of the ledger, the lock of all planners, is there, and its last `inserted_at` is not in the future."""
    rows = db.rows("ledger_head")
    if not rows:
        yield Finding(
            what=f"{LEDGER} lacks its row 0, the ledger's lock",
            breaks="no run can claim a batch",
            fix="run `auditexport init`",
        )
        return "not there"
    (head,) = rows
    ahead_ms, stamped_ms = head.inserted_at_ms - head.now_ms, head.stamped_ms or 0
    if ahead_ms > AHEAD_MS:
        too_late = head.inserted_at_ms > LAST_STAMP_MS
        wait = (
            "batches have such stamps already, so wait until it has passed them: with a lower value, the ledger would give a stamp "
            "twice"
        )
        lower = f"no batch has such a stamp, so: UPDATE {LEDGER} SET inserted_at_ms = {max(head.now_ms, stamped_ms)} WHERE batch_id = 0"
        yield Finding(
            what=f"the ledger's last inserted_at is {ahead_ms / 3_600_000:,.0f} hours ahead of MySQL's clock",
            breaks="every new entry has a later stamp: retention and months are counted from there"
            + (", and beyond the year 2105 ClickHouse drops entries on arrival" if too_late else ""),
            fix=f"set MySQL's clock right; {wait if stamped_ms - head.now_ms > AHEAD_MS else lower}",
            fatal=too_late,
        )
    return f"last inserted_at {head.inserted_at_ms}"


def _pks(db: Catalogue) -> Checking:
    """The outbox hands out pks above those of the ledger's batches."""
    created, last_pk = str(db.rows("next_pk")[0][1]), db.rows("last_exported_pk")[0][0]
    if "AUTO_INCREMENT" not in created or last_pk is None:
        return "nothing to compare"
    found = re.search(r"\bAUTO_INCREMENT=(\d+)", created.rpartition(")")[2])
    next_pk = int(found[1]) if found else 1
    if next_pk <= last_pk:
        yield warning(
            what=f"{OUTBOX}'s pks repeat: the next one is {next_pk:,}, and batches of the ledger had pks up to {last_pk:,} (a "
            "TRUNCATE, a new table, AUTO_INCREMENT set back, or a restore)",
            breaks="new events are exported, each after a look-up for an earlier copy; entries of earlier batches that ClickHouse has "
            "lost cannot be exported again from here",
            fix=f"no fix is needed; ALTER TABLE {OUTBOX} AUTO_INCREMENT = {last_pk + 1} avoids these look-ups",
        )
    return f"the next is {next_pk:,}, the ledger's last {last_pk:,}"
