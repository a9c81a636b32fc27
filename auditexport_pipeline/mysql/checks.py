"""The checks of MySQL: version, transport, settings, packets and grants. Those of the tables are in
`mysql.table_checks`.

`preflight` runs them. Each only reads, through `mysql.catalogue`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from sqlalchemy.engine import make_url

from auditexport_pipeline.core.findings import Check, Checking, Finding, warning
from auditexport_pipeline.hosts import is_local
from auditexport_pipeline.mysql.catalogue import Catalogue
from auditexport_pipeline.mysql.connection import default_tls
from auditexport_pipeline.mysql.session import deviations
from auditexport_pipeline.mysql.table_checks import ledger_head, table_checks
from auditexport_pipeline.roles import MYSQL_GRANTS, Role

OLDEST = {"MariaDB": (10, 6), "MySQL": (8, 0)}
# Two copies of 100,000 scattered pks, the default batch, are 3 MB of one statement; the column holds 16 MB.
PACKET_BYTES = 16 * 1024**2


def mysql_checks(db: Catalogue) -> Iterator[Check]:
    """Every check of MySQL for the role of `db`, in the order in which doctor shows them."""
    yield Check("MySQL version", _version(db))
    yield Check("MySQL transport", _transport(db))
    yield Check("MySQL settings", _settings(db))
    yield Check("MySQL reads", _one_server(db))
    yield Check("MySQL packets", _packets(db))
    if db.role is Role.EXPORTER and db.pending_rows_are_readable:
        yield Check("MySQL created_at", _created_at(db))
    yield Check(f"MySQL grants of the {db.role.value}", _grants(db))
    yield from table_checks(db)


def mysql_checks_of_every_run(db: Catalogue) -> Iterator[Check]:
    """What a failover or one statement can change at any moment, by two cheap reads."""
    yield Check("MySQL settings", _settings(db))
    yield Check("ledger's head", ledger_head(db))


def server_version(text: str) -> tuple[str, tuple[int, int]]:
    """Family and version from VERSION(): `8.0.36-28`, `10.11.19-MariaDB-0+deb12u1-log`, `5.5.5-10.6.1-MariaDB`."""
    mariadb = "mariadb" in text.lower()
    found = re.search(r"(\d+)\.(\d+)", text.removeprefix("5.5.5-") if mariadb else text)
    return "MariaDB" if mariadb else "MySQL", (int(found[1]), int(found[2])) if found else (0, 0)


def _version(db: Catalogue) -> Checking:
    family, version = server_version(db.server.version)
    oldest = OLDEST[family]
    if version < oldest:
        yield Finding(
            what=f"the server is {family} {db.server.version}",
            breaks="it lacks statements of this program, which was not tested with it",
            fix=f"upgrade it to {family} {oldest[0]}.{oldest[1]} or later",
        )
    return f"{family} {db.server.version}"


def _transport(db: Catalogue) -> Checking:
    """A connection that leaves this host is encrypted, and the server's certificate and name are verified."""
    cipher = str(db.rows("tls")[0][1])
    url = make_url(db.url)
    named = url.query.get("ssl_check_hostname", "true") == "true"
    verified = named and ("ssl_ca" in url.query or "ssl_capath" in url.query or bool(default_tls(db.url)))
    seen = f"TLS, {cipher}, certificate {'and name' if verified else 'not'} verified" if cipher else "no TLS"
    if not is_local(url.host) and not (cipher and verified):
        authority = "say ssl_ca=/path/of/the/authority.pem, not ssl_disabled=true"
        yield warning(
            what=f"the connection to {url.host} has {seen}",
            breaks=f"anyone on the way can read events and the password{', by answering as the server' if cipher else ''}",
            fix=f"in AUDITEXPORT_MYSQL_URL, {authority if named else 'remove ssl_check_hostname'}",
        )
    return seen


def _settings(db: Catalogue) -> Checking:
    """MySQL applied our session variables, and the server takes and logs our writes."""

    def on(name: str, otherwise: str = "OFF") -> bool:
        return db.variables.get(name, otherwise) not in ("OFF", "0")

    writes = db.role is not Role.READER
    isolation = db.variables.get("transaction_isolation") or db.variables.get("tx_isolation", "")
    logged, binlog_format = on("log_bin"), db.variables.get("binlog_format", "ROW")
    if isolation != "READ-COMMITTED":
        yield Finding(
            what=f"our session runs at {isolation}, though it has set READ COMMITTED",
            breaks="marking takes gap locks, and the application waits to insert",
            fix="let the proxy in front of MySQL keep session settings (in ProxySQL: no multiplexing for this user)",
        )
    if logged and binlog_format == "STATEMENT":
        yield Finding(
            what="the binary log is written with binlog_format = STATEMENT",
            breaks="every write at READ COMMITTED is refused with error 1665",
            fix="SET GLOBAL binlog_format = 'ROW'",
            fatal=writes,
        )
    for name, found, stated in deviations(db.variables):
        if "_isolation" not in name:
            yield Finding(
                what=f"our session has {name} = {found or 'nothing'}, though it has set {stated.value}",
                breaks=stated.breaks,
                fix=f"let the user of AUDITEXPORT_MYSQL_URL set {name} for its session, or SET GLOBAL {name} = {stated.value}; "
                "a proxy in front of MySQL has to keep session settings",
            )
    if writes and logged and not on("sql_log_bin", "ON"):
        yield Finding(
            what="our session writes no binary log (sql_log_bin = OFF)",
            breaks="replicas never learn what was exported, and after a failover everything is exported again",
            fix="remove SET sql_log_bin = 0 from the server's init_connect",
        )
    closed = [name for name in ("super_read_only", "read_only", "innodb_read_only") if on(name)]
    if writes and closed:
        # innodb_read_only cannot be set at runtime; turning read_only off turns super_read_only off with it.
        restart = "innodb_read_only" in closed
        yield Finding(
            what=f"MySQL is read-only ({', '.join(closed)})",
            breaks="this is a replica, or a primary that was closed for writing: nothing can be claimed or marked",
            fix="let AUDITEXPORT_MYSQL_URL name the primary; if this is it"
            + (", start it without innodb_read_only" if restart else ": SET GLOBAL read_only = OFF"),
        )
    return f"{isolation}, binary log {binlog_format if logged else 'off'}{', read-only' if closed else ''}"


def _one_server(db: Catalogue) -> Checking:
    """One server answers all statements of a transaction. Outside of one, a proxy may use any server."""

    def answering(statement: str) -> str:
        return str(db.rows(statement)[0][0])

    inside, writer = answering("identity"), answering("identity_locked")
    if inside != writer:
        yield Finding(
            what=f"within a transaction, {inside} answers reads and {writer} takes locks: a proxy splits them",
            breaks="decisions rest on rows that a replica may not have yet",
            fix="let the proxy keep a transaction on one server (in ProxySQL: transaction_persistent = 1 for this user), or let "
            "AUDITEXPORT_MYSQL_URL name the primary itself",
        )
        return f"{inside}, not {writer}"
    db.connection.exec_driver_sql("COMMIT")
    outside = answering("identity")
    db.connection.exec_driver_sql("COMMIT")
    db.connection.exec_driver_sql("BEGIN")
    others = f"; outside of a transaction, where this program reads nothing, from {outside}"
    return f"all of a transaction from {inside}{others if outside != inside else ''}"


def _packets(db: Catalogue) -> Checking:
    """A packet takes our largest statement, and the largest of the oldest pending payloads."""
    packet = int(db.variables.get("max_allowed_packet", PACKET_BYTES))
    if packet < PACKET_BYTES:
        yield warning(
            what=f"max_allowed_packet is {packet:,} bytes",
            breaks="sealing a large batch of scattered pks is one statement of up to 16 MB, and a larger payload reads as empty",
            fix=f"SET GLOBAL max_allowed_packet = {PACKET_BYTES}",
        )
    if db.role is not Role.EXPORTER or not db.pending_rows_are_readable:
        return f"max_allowed_packet {packet:,}"
    oldest = db.rows("largest_pending")[0]
    largest = int(oldest.bytes or 0)
    if oldest.empty_ones or largest + 1024 > packet:  # a row travels with its other columns
        yield Finding(
            what=f"a pending payload is larger than max_allowed_packet, {packet:,} bytes",
            breaks="it cannot be read: its batch would stop, or make it a dead letter with a wrong reason",
            fix=f"SET GLOBAL max_allowed_packet = {max(4 * PACKET_BYTES, 1 << (largest + 1024).bit_length())}",
        )
    return f"max_allowed_packet {packet:,}, largest of the oldest pending payloads {largest:,} bytes"


def _created_at(db: Catalogue) -> Checking:
    oldest = db.rows("odd_created")[0]
    if not oldest.odd_rows:
        return "the oldest pending rows have epoch milliseconds"
    yield warning(
        what=f"{oldest.odd_rows} of the oldest pending rows have a created_at that is not in epoch milliseconds, the first with "
        f"pk {oldest.odd_pk}",
        breaks="their age is unknown: the lag comes from other rows, or from the last claim",
        fix="let the application write created_at in milliseconds since 1970, from a synchronized clock",
    )
    return f"{oldest.odd_rows} are not"


def _grants(db: Catalogue) -> Checking:
    name, at, host = db.server.granted_to.rpartition("@")
    user = f"'{name}'{at}'{host}'"
    seen = f"{user} has what the {db.role.value} needs"
    for table, needed in MYSQL_GRANTS[db.role].items():
        if lacking := db.grants.lacking(db.database, table, needed):
            seen = f"{user} lacks some"
            cannot_mark = db.role is Role.EXPORTER and lacking == ["UPDATE (deleted_at)"]
            yield Finding(
                what=f"{user}, as {db.role.value}, lacks {', '.join(lacking)} on {table}",
                breaks="a run would write to ClickHouse and then be unable to mark"
                if cannot_mark
                else f"what the {db.role.value} does there is refused",
                fix=f"GRANT {', '.join(lacking)} ON `{db.database}`.{table} TO {user}",
            )
    if beyond := db.grants.beyond_this_database():
        everything = "ALL PRIVILEGES" in beyond or len(beyond) > 10
        seen += f", and {'everything' if everything else ', '.join(beyond)} on *.*"
    return seen
