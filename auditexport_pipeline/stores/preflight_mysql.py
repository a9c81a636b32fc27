"""Looking at MySQL before anything is claimed: version, settings, grants, tables and the ledger's head.

What belongs here: what is asked of MySQL, and what each answer breaks and how it is mended. What does not: the
statements (`preflight.sql`), what the tables should be (`setup.sql`), and when to look (`stores.preflight`).
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from auditexport_pipeline.stores.declared import Column, columns_of, keys_of
from auditexport_pipeline.stores.findings import Finding, Look
from auditexport_pipeline.stores.mysql import is_local
from auditexport_pipeline.stores.roles import DEAD_LETTERS, LEDGER, MYSQL_GRANTS, OUTBOX, MySQLGrants, Role
from auditexport_pipeline.stores.statements import load

_SQL = load("preflight.sql")
_DECLARED = load("setup.sql")
_STATEMENT_OF = {
    OUTBOX: "outbox",
    LEDGER: "ledger",
    DEAD_LETTERS: "dead_letters",
    "clickhouse_outbox_action": "actions",
    "clickhouse_outbox_erasure": "erasures",
}
OLDEST = {"MariaDB": (10, 6), "MySQL": (8, 0)}
# Two copies of 100,000 scattered pks, the default batch, are 3 MB of one statement; the column holds 16 MB.
PACKET_BYTES = 16 * 1024**2
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


def server_version(text: str) -> tuple[str, tuple[int, int]]:
    """Family and version from VERSION(): `8.0.36-28`, `10.11.19-MariaDB-0+deb12u1-log`, `5.5.5-10.6.1-MariaDB`."""
    mariadb = "mariadb" in text.lower()
    found = re.search(r"(\d+)\.(\d+)", text.removeprefix("5.5.5-") if mariadb else text)
    return "MariaDB" if mariadb else "MySQL", (int(found[1]), int(found[2])) if found else (0, 0)


def look_at_mysql(connection: Connection, url: str, role: Role) -> Iterator[Look]:
    """All that can be asked on one connection of ours. Source: catalogues, settings, the ledger's row 0."""
    server = connection.exec_driver_sql(_SQL["mysql_server"]).one()
    variables = _variables(connection)
    yield _version(server.version)
    yield _transport(connection, url)
    yield _settings(variables, role)
    grants = MySQLGrants(
        (row[0] for row in connection.exec_driver_sql(_SQL["mysql_grants"])),
        wildcards=variables.get("partial_revokes", "OFF") != "ON",
    )
    readable = not grants.lacking(server.database_name, OUTBOX, ("SELECT",))
    yield _packet(connection, variables, sampled=role is Role.EXPORTER and readable)
    user, at, host = server.granted_to.rpartition("@")
    yield _grants(grants, server.database_name, f"'{user}'{at}'{host}'", role)
    yield from _tables(connection, grants, server.database_name, role)


def look_at_what_changes(connection: Connection, role: Role) -> Iterator[Look]:
    """The part that a failover or one statement of somebody can turn bad at any moment; two cheap questions."""
    yield _settings(_variables(connection), role)
    yield from _head(connection)


def _variables(connection: Connection) -> dict[str, str]:
    return {str(row[0]).lower(): str(row[1]) for row in connection.exec_driver_sql(_SQL["mysql_variables"])}


def _version(text: str) -> Look:
    family, version = server_version(text)
    oldest = OLDEST[family]
    if version >= oldest:
        return Look(about="MySQL version", seen=f"{family} {text}")
    finding = Finding(
        what=f"the server is {family} {text}",
        breaks="statements of this program are beyond it, and none was ever tried there",
        fix=f"upgrade it to {family} {oldest[0]}.{oldest[1]} or later",
    )
    return Look(about="MySQL version", seen=text, findings=(finding,))


def _transport(connection: Connection, url: str) -> Look:
    cipher = str(connection.exec_driver_sql(_SQL["mysql_tls"]).one()[1])
    parts = make_url(url)
    options = parts.query
    verified = "ssl_ca" in options or "ssl_capath" in options
    named = options.get("ssl_check_hostname", "true") == "true"
    seen = f"TLS, {cipher}" if cipher else "no TLS"
    if cipher:
        seen += ", certificate and name verified" if verified and named else ", certificate not verified"
    if is_local(parts.host) or (cipher and verified and named):
        return Look(about="MySQL transport", seen=seen)
    finding = Finding(
        what=f"the connection to {parts.host} has {seen}",
        breaks="whoever sits between can read events and the password"
        + (", by answering in the server's place" if cipher else ""),
        fix="add ?ssl_ca=/path/of/the/authority.pem to AUDITEXPORT_MYSQL_URL"
        + ("" if named else " and take ssl_check_hostname away")
        + ("" if cipher else "; the server has TLS turned off: give it ssl_cert and ssl_key"),
        fatal=False,
    )
    return Look(about="MySQL transport", seen=seen, findings=(finding,))


def _settings(variables: Mapping[str, str], role: Role) -> Look:
    writes = role is not Role.READER
    isolation = variables.get("transaction_isolation") or variables.get("tx_isolation", "")
    logged = variables.get("log_bin", "OFF") in ("ON", "1")
    format_ = variables.get("binlog_format", "ROW")
    findings = []
    if isolation != "READ-COMMITTED":
        findings.append(
            Finding(
                what=f"our session runs at {isolation}, though it asked for READ COMMITTED",
                breaks="marking takes gap locks, and the application waits to insert",
                fix="let the proxy in front of MySQL keep session settings (in ProxySQL: no multiplexing for this user)",
            )
        )
    if logged and format_ == "STATEMENT":
        findings.append(
            Finding(
                what="the binary log is written with binlog_format = STATEMENT",
                breaks="every write at READ COMMITTED is refused with error 1665",
                fix="SET GLOBAL binlog_format = 'ROW'",
                fatal=writes,
            )
        )
    closed = [
        name
        for name in ("super_read_only", "read_only", "innodb_read_only")
        if variables.get(name, "OFF") not in ("OFF", "0")
    ]
    if closed and writes:
        findings.append(
            Finding(
                what=f"MySQL is read-only ({', '.join(closed)})",
                breaks="this is a replica, or a primary that was closed for writing: nothing can be claimed or marked",
                fix="let AUDITEXPORT_MYSQL_URL name the primary; if this is it"
                # The only one that cannot be set; turning read_only off turns super_read_only off with it.
                + (
                    ", start it without innodb_read_only"
                    if "innodb_read_only" in closed
                    else ": SET GLOBAL read_only = OFF"
                ),
            )
        )
    seen = f"{isolation}, binary log {format_ if logged else 'off'}{', read-only' if closed else ''}"
    return Look(about="MySQL settings", seen=seen, findings=tuple(findings))


def _packet(connection: Connection, variables: Mapping[str, str], *, sampled: bool) -> Look:
    packet = int(variables.get("max_allowed_packet", PACKET_BYTES))
    findings = []
    if packet < PACKET_BYTES:
        findings.append(
            Finding(
                what=f"max_allowed_packet is {packet:,} bytes",
                breaks="sealing a large batch of scattered pks is one statement of up to 16 MB, and a larger payload "
                "reads as nothing",
                fix=f"SET GLOBAL max_allowed_packet = {PACKET_BYTES}",
                fatal=False,
            )
        )
    seen = f"max_allowed_packet {packet:,}"
    if sampled and _can_be_sampled(connection):
        oldest = connection.exec_driver_sql(_SQL["largest_pending"]).one()
        largest = int(oldest.bytes or 0)
        seen += f", largest of the oldest pending payloads {largest:,} bytes"
        # A row travels with its other columns.
        if oldest.empty_ones or largest + 1024 > packet:
            findings.append(
                Finding(
                    what=f"a pending payload is larger than max_allowed_packet, {packet:,} bytes",
                    breaks="it cannot be read: its batch would stop, or set it aside for a reason that is not its own",
                    fix=f"SET GLOBAL max_allowed_packet = {max(4 * PACKET_BYTES, 1 << (largest + 1024).bit_length())}",
                )
            )
    return Look(about="MySQL packets", seen=seen, findings=tuple(findings))


def _grants(grants: MySQLGrants, database: str, user: str, role: Role) -> Look:
    findings = []
    for table, needed in MYSQL_GRANTS[role].items():
        lacking = grants.lacking(database, table, needed)
        if lacking:
            findings.append(
                Finding(
                    what=f"{user}, as {role.value}, lacks {', '.join(lacking)} on {table}",
                    breaks="a run would write to ClickHouse and then be unable to mark"
                    if role is Role.EXPORTER and lacking == ["UPDATE (deleted_at)"]
                    else f"what the {role.value} does there is refused",
                    fix=f"GRANT {', '.join(lacking)} ON `{database}`.{table} TO {user}",
                )
            )
    beyond = grants.beyond_this_database()
    seen = f"{user} has what the {role.value} needs" if not findings else f"{user} lacks some"
    if beyond:
        seen += f", and {'everything' if 'ALL PRIVILEGES' in beyond or len(beyond) > 10 else ', '.join(beyond)} on *.*"
    return Look(about=f"MySQL grants of the {role.value}", seen=seen, findings=tuple(findings))


def _can_be_sampled(connection: Connection) -> bool:
    """Whether the index and the columns of the sample are there; each that is not is a finding of its own."""
    parts = _indexes(connection).get(OUTBOX, {}).get("drainer_pending_idx", [])
    there = {row.column_name for row in connection.exec_driver_sql(_SQL["mysql_columns"]) if row.table_name == OUTBOX}
    return _usable(parts) and {"payload", "deleted_at"} <= there


def _indexes(connection: Connection) -> dict[str, dict[str, list[dict[str, object]]]]:
    """By table and index, the catalogue's row for each of the index's columns, in order."""
    indexes: defaultdict[str, defaultdict[str, list[dict[str, object]]]] = defaultdict(lambda: defaultdict(list))
    for row in connection.exec_driver_sql(_SQL["mysql_indexes"]).mappings():
        part = {str(name).lower(): value for name, value in row.items()}
        indexes[str(part["table_name"]).lower()][str(part["index_name"]).lower()].append(part)
    return {table: dict(of_table) for table, of_table in indexes.items()}


def _usable(parts: list[dict[str, object]]) -> bool:
    """Whether the optimizer may use it: MySQL can make an index invisible, MariaDB can have it ignored."""
    return bool(parts) and parts[0].get("is_visible", "YES") == "YES" and parts[0].get("ignored", "NO") == "NO"


def _tables(connection: Connection, grants: MySQLGrants, database: str, role: Role) -> Iterator[Look]:
    columns: defaultdict[str, dict[str, _There]] = defaultdict(dict)
    for row in connection.exec_driver_sql(_SQL["mysql_columns"]):
        columns[row.table_name][row.column_name] = _There(
            type=re.sub(r"(int)\(\d+\)", r"\1", row.column_type),
            nullable=row.nullable == "YES",
            charset=row.charset,
            collation=row.collation,
        )
    engines = {row.table_name: str(row.engine) for row in connection.exec_driver_sql(_SQL["mysql_tables"])}
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
    readable = LEDGER in MYSQL_GRANTS[role] and not grants.lacking(database, LEDGER, ("SELECT",))
    if readable and {"batch_id", "inserted_at_ms"} <= columns[LEDGER].keys():
        yield from _head(connection)


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


def _head(connection: Connection) -> Iterator[Look]:
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
