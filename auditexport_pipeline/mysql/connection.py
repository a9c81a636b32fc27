"""The connection to MySQL: its URL and its engines.

What does not belong here: what a session states (`mysql.session`), what an error means (`mysql.errors`), and transactions
(`mysql.database`).
"""

from __future__ import annotations

import logging
import re
import ssl
import struct
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from sqlalchemy import URL, Connection, Engine, create_engine, event
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.hosts import is_local
from auditexport_pipeline.mysql.errors import NOT_REACHED, not_reached
from auditexport_pipeline.mysql.session import LOCK_WAIT_S, READ_TIMEOUT_S, Session

CONNECT_TIMEOUT_S = 10
# The server's flags: a transaction is open; every statement is its own.
IN_TRANSACTION, AUTOCOMMIT = 1, 2
LONGEST_TIMEOUT_S = 3600

# Ours, beside the driver's: which images of changed rows our sessions leave in the binary log.
ROW_IMAGE = "binlog_row_image"
_ROW_IMAGES = ("FULL", "MINIMAL", "NOBLOB")
# What a URL may say about TLS. PyMySQL knows more, and none of it is safe: beside ssl_verify_cert or
# ssl_verify_identity it drops the ssl_ca and the host name's check with it.
_TLS_OPTIONS = {"ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_cipher", "ssl_check_hostname", "ssl_disabled"}


# The driver's others would undo what a session states (init_command, sql_mode, autocommit), or end in a traceback.
_TIMEOUTS = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S, "write_timeout": READ_TIMEOUT_S}
_OPTIONS = {"unix_socket", "program_name", "bind_address", "charset", ROW_IMAGE, *_TIMEOUTS}
CHARSET, COLLATION = "utf8mb4", "utf8mb4_bin"
_FORM = (
    "AUDITEXPORT_MYSQL_URL must read mysql+pymysql://user:password@host:port/database, "
    "with % signs for what is special in user and password"
)


def checked(url: str) -> str:
    """The URL, fit for `engine_for`. Raises `InvalidConfig`, which does not repeat it, for one of another kind.

    Nothing about TLS in it means, for a server beyond this machine, that TLS is required and its certificate and name
    are verified by the authorities that this machine trusts (`default_tls`). An `ssl_ca` (or `ssl_capath`) names
    another authority; `ssl_disabled=true` sends plain text. A client's certificate
    alone would not, so it is refused, and so is any option that would quietly undo the verification.

    `binlog_row_image=MINIMAL` is set for our sessions, and needs BINLOG ADMIN (MariaDB) or SESSION_VARIABLES_ADMIN: marks
    are then logged as key and `deleted_at`, not twice with the payload. Not where something reads full images from it.
    """
    parts = _parsed(url)
    if "@" in (parts.host or ""):  # the end of a password, which would go to the name server
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL must read mysql+pymysql://user:password@host:port/database, and an @ in the "
            "password %40"
        )
    if not _is_a_host(parts.host or "localhost"):
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL names a host that is neither a name nor an address")
    if parts.port is not None and not 0 < parts.port < 2**16:
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL has a port that is not from 1 to 65535")
    # SQLAlchemy drops an option without a value: an unset variable after ssl_ca= would be no TLS at all.
    said = parse_qsl(url.rpartition("@")[2].partition("?")[2], keep_blank_values=True)
    if empty := sorted(name for name, value in said if not value):
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL has {_named(empty)} without a value")
    unknown = sorted(name for name in parts.query if name not in _TLS_OPTIONS | _OPTIONS)
    if unknown:
        raise InvalidConfig(
            f"AUDITEXPORT_MYSQL_URL has {_named(unknown)}, which is no option here: there are "
            f"{', '.join(sorted(_OPTIONS))}; for TLS there are {', '.join(sorted(_TLS_OPTIONS))}, and ssl_ca verifies "
            "certificate and name"
        )
    options: dict[str, str] = {}
    for name, value in parts.query.items():
        if not isinstance(value, str) or not value.isprintable():
            raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL has {name} more than once, or with a value that cannot be read")
        options[name] = value
    _check_options(options)
    return url


def _parsed(url: str) -> URL:
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        parts = None
    if parts is None or parts.drivername not in ("mysql+pymysql", "mariadb+pymysql") or not parts.database:
        raise InvalidConfig(_FORM)
    if not f"{parts.username or ''}{parts.password or ''}{parts.database}".isprintable():
        raise InvalidConfig(_FORM)
    return parts


def _is_a_host(host: str) -> bool:
    try:
        return host.isprintable() and not host.startswith("/") and bool(host.encode("idna"))
    except UnicodeError:
        return False


def _named(options: list[str]) -> str:
    """The options' names, but for what cannot be one: it may be a piece of a password."""
    return ", ".join(dict.fromkeys(name if re.fullmatch(r"[a-z_]{1,40}", name) else "an option" for name in options))


def _check_options(options: dict[str, str]) -> None:
    for name in _TIMEOUTS:
        value = options.get(name, "1")
        if not (value.isascii() and value.isdigit() and 0 < int(value) <= LONGEST_TIMEOUT_S):
            raise InvalidConfig(
                f"AUDITEXPORT_MYSQL_URL has a {name} that is not a number of seconds from 1 to {LONGEST_TIMEOUT_S}"
            )
    if options.get("charset", CHARSET).lower() != CHARSET:
        raise InvalidConfig(
            f"AUDITEXPORT_MYSQL_URL has a charset other than {CHARSET}, which payloads would not survive: take it away"
        )
    if not _is_a_host(options.get("bind_address", "localhost")):
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL has a bind_address that is neither a name nor an address")
    if options.get(ROW_IMAGE, _ROW_IMAGES[0]).upper() not in _ROW_IMAGES:
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL has a {ROW_IMAGE} that is none of {', '.join(_ROW_IMAGES)}")
    asked = {name for name in options if name.startswith("ssl")}
    if options.get("ssl_disabled", "true") != "true" or ("ssl_disabled" in asked and len(asked) > 1):
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL has ssl_disabled, which can only be true, and then stands alone: take it away for TLS"
        )
    if options.get("ssl_check_hostname", "true") not in ("true", "false"):
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL has an ssl_check_hostname that is neither true nor false")
    if asked and not {"ssl_ca", "ssl_capath", "ssl_disabled"} & asked:
        raise InvalidConfig(
            f"AUDITEXPORT_MYSQL_URL has {', '.join(sorted(asked))} and no ssl_ca: the server would go unverified; add "
            "ssl_ca=/path/of/the/authority.pem"
        )


def default_tls(url: str) -> dict[str, ssl.SSLContext]:
    """What the driver is told where the URL says nothing: alone it would take any certificate, or plain text."""
    parts = make_url(url)
    silent = not any(name.startswith("ssl") for name in parts.query)
    travels = not is_local(parts.host) and "unix_socket" not in parts.query
    return {"ssl": ssl.create_default_context()} if silent and travels else {}


# The pool's own log tells, with a traceback, of a connection that was killed while it lay idle or was given back: the next use
# takes another one, and what was lost in a transaction is an error of ours.
_POOL = "auditexport"
logging.getLogger(f"sqlalchemy.pool.impl.QueuePool.{_POOL}").setLevel(logging.CRITICAL)


@lru_cache(maxsize=256)  # several of each of many outboxes
def engine_for(url: str, pid: int, lock_wait_s: int = LOCK_WAIT_S) -> Engine:
    """One pool per server, process and patience with locks: a forked child must not share its parent's connections."""
    parts = make_url(url)
    image = str(parts.query.get(ROW_IMAGE, "")).upper()
    timeouts = {name: int(str(parts.query.get(name, usual))) for name, usual in _TIMEOUTS.items()}
    wanted = {"innodb_lock_wait_timeout": str(lock_wait_s), "lock_wait_timeout": str(lock_wait_s)} | (
        {ROW_IMAGE: f"'{image}'"} if image else {}
    )
    session = Session(wanted)
    engine = create_engine(
        parts.difference_update_query([ROW_IMAGE, *_TIMEOUTS]),
        pool_size=20,
        max_overflow=20,
        pool_pre_ping=True,
        pool_logging_name=_POOL,
        pool_recycle=1800,
        # An error's text would repeat what was sent.
        hide_parameters=True,
        # `autocommit` is a variable like others, and stated with them.
        connect_args={"charset": CHARSET, "collation": COLLATION, "autocommit": None, **timeouts, **default_tls(url)},
    )
    event.listen(engine, "do_connect", lambda _dialect, _record, _args, options: _connected(session, options))
    event.listen(engine, "begin", _begin)
    return engine


def _begin(connection: Connection) -> None:
    """Begins the transaction by a statement, where the pool's ping has not: `autocommit = OFF` alone begins none that a
    proxy sees, and its first SELECT would be answered by a replica.
    """
    if not connection.connection.dbapi_connection.server_status & (IN_TRANSACTION | AUTOCOMMIT):  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN")


def _connected(session: Session, options: dict[str, Any]) -> Any:
    """A connection of the driver's that has stated its session. Raises the driver's errors, with host and port."""
    from pymysql import err

    from auditexport_pipeline.mysql.rows import RowsConnection  # the driver, which only a run needs

    if isinstance(options.get("password"), str):  # the driver knows Latin-1 alone
        options = {**options, "password": options["password"].encode()}
    try:
        connection = RowsConnection(**options)
    except (err.MySQLError, struct.error, LookupError, ValueError) as error:  # the last three: what is no MySQL answers
        host, port = options.get("host") or "localhost", options.get("port") or 3306
        where = options.get("unix_socket") or (f"[{host}]:{port}" if ":" in host else f"{host}:{port}")
        why = not_reached(error, where, options["connect_timeout"])
        if why is None:
            raise
        located = err.OperationalError(NOT_REACHED, why)
        located.original_exception = getattr(error, "original_exception", None)  # type: ignore[attr-defined]
        raise located from error
    try:
        session.state(connection)
    except BaseException:
        connection.close()
        raise
    return connection
