"""The connection to MySQL: its URL and its engines.

What does not belong here: session variables (`mysql.session`), errors (`mysql.errors`), and transactions
(`mysql.database`).
"""

from __future__ import annotations

import logging
import re
import ssl
import struct
from collections.abc import Iterator
from functools import lru_cache
from typing import Any
from urllib.parse import parse_qsl

from sqlalchemy import Connection, Engine, create_engine, event
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

# Our own option: which images of changed rows our sessions leave in the binary log.
ROW_IMAGE = "binlog_row_image"
_ROW_IMAGES = ("FULL", "MINIMAL", "NOBLOB")
# The TLS options of a URL. PyMySQL has more, and none of them is safe: with ssl_verify_cert or ssl_verify_identity it
# ignores ssl_ca and does not check the host name.
_TLS_OPTIONS = {"ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_cipher", "ssl_check_hostname", "ssl_disabled"}
# The driver's other options would undo what a session states (init_command, sql_mode, autocommit), or end in a
# traceback.
_TIMEOUTS = {"connect_timeout": CONNECT_TIMEOUT_S, "read_timeout": READ_TIMEOUT_S, "write_timeout": READ_TIMEOUT_S}
_OPTIONS = {"unix_socket", "program_name", "bind_address", "charset", ROW_IMAGE, *_TIMEOUTS}
CHARSET, COLLATION = "utf8mb4", "utf8mb4_bin"
_FORM = "must read mysql+pymysql://user:password@host:port/database, with the password percent-encoded (@ is %40)"


def checked(url: str) -> str:
    """The URL, fit for `engine_for`. Raises `InvalidConfig` for any other; the message does not repeat the URL.

    Without TLS options, a connection to another machine uses TLS, and certificate and name are verified by the
    authorities that this machine trusts (`default_tls`). `ssl_ca` (or `ssl_capath`) names another authority;
    `ssl_disabled=true` sends plain text. A client's certificate alone would turn verification off, so it is refused,
    and so is any option that would quietly do the same.

    `binlog_row_image=MINIMAL` is set for our sessions, and needs BINLOG ADMIN (MariaDB) or SESSION_VARIABLES_ADMIN:
    marks are then logged as key and `deleted_at`, not twice with the payload. Do not use it where something reads full
    images.
    """
    for fault in _faults(url):
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL {fault}")
    return url


def _faults(url: str) -> Iterator[str]:
    """What is wrong with the URL, without its values. A later check relies on the earlier ones."""
    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        yield _FORM
        return
    secret = f"{parts.username or ''}{parts.password or ''}{parts.database}"
    if parts.drivername not in ("mysql+pymysql", "mariadb+pymysql") or not parts.database or not secret.isprintable():
        yield _FORM
    if "@" in (parts.host or ""):  # the end of a password, which would be sent to the name server
        yield _FORM
    if not _is_a_host(parts.host or "localhost"):
        yield "names a host that is neither a name nor an address"
    if parts.port is not None and not 0 < parts.port < 2**16:
        yield "has a port that is not from 1 to 65535"
    # SQLAlchemy drops an option without a value: an unset variable after ssl_ca= would be no TLS at all.
    given = parse_qsl(url.rpartition("@")[2].partition("?")[2], keep_blank_values=True)
    if empty := sorted(name for name, value in given if not value):
        yield f"has {_named(empty)} without a value"
    if unknown := sorted(name for name in parts.query if name not in _TLS_OPTIONS | _OPTIONS):
        yield (
            f"has {_named(unknown)}, which is no option here: there are {', '.join(sorted(_OPTIONS))}; for TLS there are "
            f"{', '.join(sorted(_TLS_OPTIONS))}, and ssl_ca verifies certificate and name"
        )
    for name, value in parts.query.items():
        if not isinstance(value, str) or not value.isprintable():
            yield f"has {name} more than once, or with a value that cannot be read"
    options = {name: str(value) for name, value in parts.query.items()}
    for name in _TIMEOUTS:
        value = options.get(name, "1")
        if not (value.isascii() and value.isdigit() and 0 < int(value) <= LONGEST_TIMEOUT_S):
            yield f"has a {name} that is not a number of seconds from 1 to {LONGEST_TIMEOUT_S}"
    if options.get("charset", CHARSET).lower() != CHARSET:
        yield f"has a charset other than {CHARSET}, in which payloads would not survive: remove it"
    if not _is_a_host(options.get("bind_address", "localhost")):
        yield "has a bind_address that is neither a name nor an address"
    if options.get(ROW_IMAGE, _ROW_IMAGES[0]).upper() not in _ROW_IMAGES:
        yield f"has a {ROW_IMAGE} that is none of {', '.join(_ROW_IMAGES)}"
    tls = {name for name in options if name.startswith("ssl")}
    if options.get("ssl_disabled", "true") != "true" or ("ssl_disabled" in tls and len(tls) > 1):
        yield "has ssl_disabled, which can only be true, and without other TLS options: remove it for TLS"
    if options.get("ssl_check_hostname", "true") not in ("true", "false"):
        yield "has an ssl_check_hostname that is neither true nor false"
    if tls and not {"ssl_ca", "ssl_capath", "ssl_disabled"} & tls:
        yield (
            f"has {', '.join(sorted(tls))} and no ssl_ca: the server would go unverified; add ssl_ca=/path/of/the/authority.pem"
        )


def _is_a_host(host: str) -> bool:
    try:
        return host.isprintable() and not host.startswith("/") and bool(host.encode("idna"))
    except UnicodeError:
        return False


def _named(options: list[str]) -> str:
    """The options' names, but for what cannot be one: it may be a piece of a password."""
    return ", ".join(dict.fromkeys(name if re.fullmatch(r"[a-z_]{1,40}", name) else "an option" for name in options))


def default_tls(url: str) -> dict[str, ssl.SSLContext]:
    """TLS where the URL has no option of it: the driver's default takes any certificate, or plain text."""
    parts = make_url(url)
    silent = not any(name.startswith("ssl") for name in parts.query)
    travels = not is_local(parts.host) and "unix_socket" not in parts.query
    return {"ssl": ssl.create_default_context()} if silent and travels else {}


# The pool logs a traceback when an idle connection was killed: the next use takes another one. A connection that is
# lost in a transaction is an error of ours.
_POOL = "auditexport"
logging.getLogger(f"sqlalchemy.pool.impl.QueuePool.{_POOL}").setLevel(logging.CRITICAL)


@lru_cache(maxsize=256)  # several of each of many outboxes
def engine_for(url: str, pid: int, lock_wait_s: int = LOCK_WAIT_S) -> Engine:
    """One pool per URL, process and lock wait: a forked child must not share its parent's connections."""
    parts = make_url(url)
    image = str(parts.query.get(ROW_IMAGE, "")).upper()
    timeouts = {name: int(str(parts.query.get(name, usual))) for name, usual in _TIMEOUTS.items()}
    variables = dict.fromkeys(("innodb_lock_wait_timeout", "lock_wait_timeout"), str(lock_wait_s))
    session = Session(variables | ({ROW_IMAGE: f"'{image}'"} if image else {}))
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
    """Begins the transaction by a statement, unless the pool's ping did. A proxy sees no transaction that begins by
    `autocommit = OFF` alone, and would send its first SELECT to a replica.
    """
    if not connection.connection.dbapi_connection.server_status & (IN_TRANSACTION | AUTOCOMMIT):  # type: ignore[union-attr]
        connection.exec_driver_sql("BEGIN")


def _connected(session: Session, options: dict[str, Any]) -> Any:
    """A connection of the driver's with our session variables. Raises the driver's errors, with host and port."""
    from pymysql import err

    from auditexport_pipeline.mysql.rows import RowsConnection  # the driver, which only a run needs

    if isinstance(options.get("password"), str):  # the driver would encode it as Latin-1
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
