"""Looking at MySQL before anything is claimed: version, transport, settings, packets and grants.

What belongs here: what is asked of the server and its user, and what each answer breaks and how it is mended. What does
not: the statements (`checks.sql`), the tables (`mysql.table_checks`), and when to look (`preflight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from sqlalchemy import Connection
from sqlalchemy.engine import make_url

from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.hosts import is_local
from auditexport_pipeline.mysql.connection import default_tls
from auditexport_pipeline.mysql.session import Stated, deviations
from auditexport_pipeline.mysql.table_checks import can_be_sampled, look_at_head, look_at_tables
from auditexport_pipeline.roles import MYSQL_GRANTS, OUTBOX, MySQLGrants, Role
from auditexport_pipeline.sql import load

_SQL = load("mysql/checks.sql")
OLDEST = {"MariaDB": (10, 6), "MySQL": (8, 0)}
# Two copies of 100,000 scattered pks, the default batch, are 3 MB of one statement; the column holds 16 MB.
PACKET_BYTES = 16 * 1024**2


def server_version(text: str) -> tuple[str, tuple[int, int]]:
    """Family and version from VERSION(): `8.0.36-28`, `10.11.19-MariaDB-0+deb12u1-log`, `5.5.5-10.6.1-MariaDB`."""
    mariadb = "mariadb" in text.lower()
    found = re.search(r"(\d+)\.(\d+)", text.removeprefix("5.5.5-") if mariadb else text)
    return "MariaDB" if mariadb else "MySQL", (int(found[1]), int(found[2])) if found else (0, 0)


def look_at_mysql(connection: Connection, url: str, role: Role) -> Iterator[Look]:
    """All that can be asked on one connection of ours. Source: catalogues, settings, the ledger's row 0."""
    server = connection.exec_driver_sql(_SQL["server"]).one()
    variables = _variables(connection)
    yield _version(server.version)
    yield _transport(connection, url)
    yield _settings(variables, role)
    yield _one_server(connection)
    grants = MySQLGrants(
        (row[0] for row in connection.exec_driver_sql(_SQL["grants"])),
        wildcards=variables.get("partial_revokes", "OFF") != "ON",
    )
    tables = list(look_at_tables(connection, grants, server.database_name, role))
    # Rows are looked at only in a table that is as it must be, or the statement that repairs it would never be printed.
    readable = not (any(look.findings for look in tables) or grants.lacking(server.database_name, OUTBOX, ("SELECT",)))
    yield _packet(connection, variables, sampled=role is Role.EXPORTER and readable)
    if role is Role.EXPORTER and readable and can_be_sampled(connection):
        yield _created_at(connection)
    user, at, host = server.granted_to.rpartition("@")
    yield _grants(grants, server.database_name, f"'{user}'{at}'{host}'", role)
    yield from tables


def look_at_what_changes(connection: Connection, role: Role) -> Iterator[Look]:
    """The part that a failover or one statement of somebody can turn bad at any moment; two cheap questions."""
    yield _settings(_variables(connection), role)
    yield from look_at_head(connection)


def _variables(connection: Connection) -> dict[str, str]:
    return {str(row[0]).lower(): str(row[1]) for row in connection.exec_driver_sql(_SQL["variables"])}


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
    cipher = str(connection.exec_driver_sql(_SQL["tls"]).one()[1])
    parts = make_url(url)
    options = parts.query
    verified = "ssl_ca" in options or "ssl_capath" in options or bool(default_tls(url))
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
        fix="in AUDITEXPORT_MYSQL_URL, "
        + (
            "take ssl_check_hostname away"
            if not named
            else "say ssl_ca=/path/of/the/authority.pem, not ssl_disabled=true"
        ),
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
    findings += [
        _unstated(name, found, stated) for name, found, stated in deviations(variables) if "_isolation" not in name
    ]
    if writes and variables.get("sql_log_bin", "ON") in ("OFF", "0") and logged:
        findings.append(
            Finding(
                what="our session writes no binary log (sql_log_bin = OFF)",
                breaks="replicas never learn what was exported, and after a failover everything is exported again",
                fix="take SET sql_log_bin = 0 out of the server's init_connect",
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


def _one_server(connection: Connection) -> Look:
    """Whether one server answers all statements of a transaction; outside of one, a proxy may ask whom it likes."""

    def answering(statement: str) -> str:
        return str(connection.exec_driver_sql(_SQL[statement]).scalar_one())

    about, inside, writer = "MySQL reads", answering("identity"), answering("identity_locked")
    if inside != writer:
        finding = Finding(
            what=f"within a transaction, {inside} answers reads and {writer} takes locks: a proxy splits them",
            breaks="decisions rest on what a replica has not heard of yet",
            fix="let the proxy keep a transaction on one server (in ProxySQL: transaction_persistent = 1 for this user), or let "
            "AUDITEXPORT_MYSQL_URL name the primary itself",
        )
        return Look(about=about, seen=f"{inside}, not {writer}", findings=(finding,))
    connection.exec_driver_sql("COMMIT")
    outside = answering("identity")
    connection.exec_driver_sql("COMMIT")
    connection.exec_driver_sql("BEGIN")
    others = "" if outside == inside else f"; outside of a transaction {outside} answers, where we ask for nothing"
    return Look(about=about, seen=f"all of a transaction from {inside}{others}")


def _unstated(name: str, found: str, stated: Stated) -> Finding:
    return Finding(
        what=f"our session has {name} = {found or 'nothing'}, though it asked for {stated.value}",
        breaks=stated.breaks,
        fix=f"let the user of AUDITEXPORT_MYSQL_URL set {name} for its session, or SET GLOBAL {name} = {stated.value}; a "
        "proxy in front of MySQL has to keep session settings",
    )


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
    if sampled and can_be_sampled(connection):
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


def _created_at(connection: Connection) -> Look:
    oldest = connection.exec_driver_sql(_SQL["odd_created"]).one()
    if not oldest.odd_rows:
        return Look(about="MySQL created_at", seen="the oldest pending rows have epoch milliseconds")
    finding = Finding(
        what=f"{oldest.odd_rows} of the oldest pending rows have a created_at that is no epoch milliseconds, the first with pk "
        f"{oldest.odd_pk}",
        breaks="their age is unknown: the lag is taken from other rows, or from the last claim",
        fix="let the application write created_at in milliseconds since 1970, by a clock that is kept",
        fatal=False,
    )
    return Look(about="MySQL created_at", seen=f"{oldest.odd_rows} odd ones", findings=(finding,))


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
