"""The connection to MySQL: engines, our statements, and the one place where MySQL's errors become ours.

What belongs here: how we connect, and what an error means to whoever runs again. What does not: what is said
over the connection (`outbox.sql`), and in which transaction (`stores.outbox`).
"""

from __future__ import annotations

import inspect
import ipaddress
import ssl
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from urllib.parse import parse_qsl

from sqlalchemy import Engine, TextClause, bindparam, create_engine, event, text
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, OutboxUnavailable, SetupIncomplete
from auditexport_pipeline.stores.statements import load

# We are never worth waiting for: a lock that the application holds longer is tried again by the next attempt.
LOCK_WAIT_S = 5
CONNECT_TIMEOUT_S = 10
# A statement that gives no sign of life this long is given up: the longest of ours, a claim, takes seconds.
READ_TIMEOUT_S = 120
# Said on every connection rather than inherited. In a time zone with summer time, NOW() as a number goes back an hour
# in autumn; without a strict mode, a text that is too long for its column is cut and stored.
SESSION = (
    "SET SESSION innodb_lock_wait_timeout = {lock_wait_s}, time_zone = '+00:00', "
    "sql_mode = 'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"
)

_LISTS = {"rows_in": "pks", "mark_in": "pks", "marks_in": "pks", "renew": "batch_ids", "payload_bytes": "pks"}


def expanding(name: str, statement: TextClause) -> TextClause:
    """The statement with the parameter that stands for a list, if the one of this name has such a one."""
    return statement.bindparams(bindparam(_LISTS[name], expanding=True)) if name in _LISTS else statement


SQL: dict[str, TextClause] = {name: expanding(name, text(statement)) for name, statement in load("outbox.sql").items()}

# Server errors that no rerun mends: access, unknown database, table or column, a statement without grant, TLS that
# the server insists on.
_SETUP_ERRORS = {1044, 1045, 1049, 1054, 1142, 1143, 1146, 1227, 1370, 1698, 3159}
_TLS_NOT_OFFERED = 2026
# The client's own: nobody answers there, by socket, by TCP or by name.
_NOT_REACHED = {2002, 2003, 2005}

# Ours, beside the driver's: which images of changed rows our sessions leave in the binary log.
ROW_IMAGE = "binlog_row_image"
_ROW_IMAGES = ("FULL", "MINIMAL", "NOBLOB")
# What a URL may say about TLS. PyMySQL knows more, and none of it is safe: beside ssl_verify_cert or
# ssl_verify_identity it drops the ssl_ca and the host name's check with it.
_TLS_OPTIONS = {"ssl_ca", "ssl_capath", "ssl_cert", "ssl_key", "ssl_cipher", "ssl_check_hostname", "ssl_disabled"}


def checked(url: str) -> str:
    """The URL, fit for `engine_for`. Raises `InvalidConfig`, which does not repeat it, for one of another kind.

    Nothing about TLS in it means, for a server beyond this machine, that TLS is required and its certificate and name
    are verified by the authorities that this machine trusts (`default_tls`). An `ssl_ca` (or `ssl_capath`) names
    another authority; `ssl_disabled=true` sends plain text. A client's certificate
    alone would not, so it is refused, and so is any option that would quietly undo the verification.

    `binlog_row_image=MINIMAL` is set for our sessions, and needs BINLOG ADMIN (MariaDB) or SESSION_VARIABLES_ADMIN: marks
    are then logged as key and `deleted_at`, not twice with the payload. Not where something reads full images from it.
    """
    from pymysql.connections import Connection

    try:
        parts = make_url(url)
    except (ArgumentError, ValueError):
        parts = None
    if parts is None or parts.drivername not in ("mysql+pymysql", "mariadb+pymysql") or not parts.database:
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL must read mysql+pymysql://user:password@host:port/database")
    if "@" in (parts.host or ""):  # the end of a password, which would go to the name server
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL must read mysql+pymysql://user:password@host:port/database, and an @ in the "
            "password %40"
        )
    # SQLAlchemy drops an option without a value: an unset variable after ssl_ca= would be no TLS at all.
    said = parse_qsl(url.rpartition("@")[2].partition("?")[2], keep_blank_values=True)
    if empty := sorted(name for name, value in said if not value):
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL has {', '.join(empty)} without a value")
    known = {*inspect.signature(Connection).parameters, ROW_IMAGE}
    unknown = sorted(name for name in parts.query if name not in (_TLS_OPTIONS if name.startswith("ssl") else known))
    if unknown:
        raise InvalidConfig(
            f"AUDITEXPORT_MYSQL_URL has {', '.join(unknown)}, which is no option here; for TLS there are "
            f"{', '.join(sorted(_TLS_OPTIONS))}, and ssl_ca verifies certificate and name"
        )
    if str(parts.query.get(ROW_IMAGE, _ROW_IMAGES[0])).upper() not in _ROW_IMAGES:
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL has a {ROW_IMAGE} that is none of {', '.join(_ROW_IMAGES)}")
    asked = {name for name in parts.query if name.startswith("ssl")}
    if parts.query.get("ssl_disabled", "true") != "true" or ("ssl_disabled" in asked and len(asked) > 1):
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL has ssl_disabled, which can only be true, and then stands alone: take it away for TLS"
        )
    if parts.query.get("ssl_check_hostname", "true") not in ("true", "false"):
        raise InvalidConfig("AUDITEXPORT_MYSQL_URL has an ssl_check_hostname that is neither true nor false")
    if asked and not {"ssl_ca", "ssl_capath", "ssl_disabled"} & asked:
        raise InvalidConfig(
            f"AUDITEXPORT_MYSQL_URL has {', '.join(sorted(asked))} and no ssl_ca: the server would go unverified; add "
            "ssl_ca=/path/of/the/authority.pem"
        )
    return url


def is_local(host: str | None) -> bool:
    """Whether a host, as a URL names it, is this machine's loopback, so that nothing travels."""
    try:
        return not host or host == "localhost" or ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False


def default_tls(url: str) -> dict[str, ssl.SSLContext]:
    """What the driver is told where the URL says nothing: alone it would take any certificate, or plain text."""
    parts = make_url(url)
    silent = not any(name.startswith("ssl") for name in parts.query)
    travels = not is_local(parts.host) and "unix_socket" not in parts.query
    return {"ssl": ssl.create_default_context()} if silent and travels else {}


@lru_cache(maxsize=256)  # several of each of many outboxes
def engine_for(url: str, pid: int) -> Engine:
    """One pool per server and process: a forked child must not share its parent's connections."""
    from auditexport_pipeline.stores.rows import RowsConnection  # the driver, which only a run needs

    image = str(make_url(url).query.get(ROW_IMAGE, "")).upper()
    session = SESSION.format(lock_wait_s=LOCK_WAIT_S) + (f", {ROW_IMAGE} = '{image}'" if image else "")
    engine = create_engine(
        make_url(url).difference_update_query([ROW_IMAGE]),
        isolation_level="READ COMMITTED",
        pool_size=20,
        max_overflow=20,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "write_timeout": READ_TIMEOUT_S,
            "init_command": session,
            **default_tls(url),
        },
    )
    event.listen(engine, "do_connect", lambda _dialect, _record, args, options: RowsConnection(*args, **options))
    return engine


@contextmanager
def translated(what: str) -> Iterator[None]:
    """The one place where MySQL's and SQLAlchemy's errors become this project's; `what` says what was being done."""
    try:
        yield
    except AuditExportError:
        raise
    except OSError as error:
        # PyMySQL opens the certificates that the URL names; a socket's own errors come as DBAPIError.
        # One that holds no certificate is an error without a file name.
        raise InvalidConfig(
            "AUDITEXPORT_MYSQL_URL names a file that cannot be read as a certificate or key, in ssl_ca, ssl_cert or "
            f"ssl_key: {error.filename or error.strerror}"
        ) from error
    except PoolTimeout as error:
        raise OutboxUnavailable(f"MySQL: no free connection while {what}; run again") from error
    except DBAPIError as error:
        arguments: tuple[object, ...] = getattr(error.orig, "args", ())
        code = arguments[0] if arguments and isinstance(arguments[0], int) else 0
        if (refused := _certificate_refused(error.orig)) is not None:
            raise SetupIncomplete(
                f"MySQL's certificate was refused while {what} ({refused}); nothing was sent. Let ssl_ca in "
                "AUDITEXPORT_MYSQL_URL name the authority that signed it, and the URL a host name that stands in it"
            ) from error
        if code == _TLS_NOT_OFFERED:
            raise SetupIncomplete(
                "AUDITEXPORT_MYSQL_URL means TLS, as it does for every server beyond this machine, and the server has no "
                "TLS; nothing was sent. Give the server ssl_cert and ssl_key, or say ssl_disabled=true for plain text"
            ) from error
        if code in _SETUP_ERRORS:
            reason = " ".join(map(str, arguments[1:]))
            raise SetupIncomplete(
                f"MySQL refuses {what} (error {code}: {reason}); check AUDITEXPORT_MYSQL_URL and the grants, or run `auditexport init`"
            ) from error
        if code in _NOT_REACHED:  # the driver's own words: host and reason
            raise OutboxUnavailable(
                f"MySQL failed while {what} (error {code}: {arguments[1]}); nothing of it was kept. See that the server runs and "
                "that AUDITEXPORT_MYSQL_URL names it, then run again; `auditexport doctor` looks at both databases"
            ) from error
        if isinstance(error.orig, _rerunnable()):
            raise OutboxUnavailable(
                f"MySQL failed while {what} (error {code}); nothing of it was kept, run again"
            ) from error
        raise


def _certificate_refused(error: BaseException | None) -> str | None:
    """Why a certificate was refused, when that is what PyMySQL wraps as a connection that failed."""
    cause = getattr(error, "original_exception", None)
    return cause.verify_message if isinstance(cause, ssl.SSLCertVerificationError) else None


def _rerunnable() -> tuple[type[Exception], ...]:
    from pymysql.err import InterfaceError, InternalError, OperationalError

    return (OperationalError, InternalError, InterfaceError)
