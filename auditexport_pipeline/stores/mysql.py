"""The connection to MySQL: engines, our statements, and the one place where MySQL's errors become ours.

What belongs here: how we connect, and what an error means to whoever runs again. What does not: what is said
over the connection (`outbox.sql`), and in which transaction (`stores.outbox`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

from sqlalchemy import Engine, TextClause, bindparam, create_engine, text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.exc import TimeoutError as PoolTimeout

from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig, OutboxUnavailable, SetupIncomplete
from auditexport_pipeline.stores.statements import load

# We are never worth waiting for: a lock that the application holds longer is tried again by the next attempt.
LOCK_WAIT_S = 5
CONNECT_TIMEOUT_S = 10
# A statement that gives no sign of life this long is given up: the longest of ours, a claim, takes seconds.
READ_TIMEOUT_S = 120

_LISTS = {"rows_in": "pks", "mark_in": "pks", "marks_in": "pks", "renew": "batch_ids", "payload_bytes": "pks"}
SQL: dict[str, TextClause] = {
    name: text(statement).bindparams(bindparam(_LISTS[name], expanding=True)) if name in _LISTS else text(statement)
    for name, statement in load("outbox.sql").items()
}

# Server errors that no rerun mends: access, unknown database, table or column, a statement without grant.
_SETUP_ERRORS = {1044, 1045, 1049, 1054, 1142, 1143, 1146, 1227, 1370, 1698}


@lru_cache(maxsize=16)
def engine_for(url: str, pid: int) -> Engine:
    """One pool per server and process: a forked child must not share its parent's connections."""
    return create_engine(
        url,
        isolation_level="READ COMMITTED",
        pool_size=20,
        max_overflow=20,
        pool_pre_ping=True,
        pool_recycle=1800,
        connect_args={
            "connect_timeout": CONNECT_TIMEOUT_S,
            "read_timeout": READ_TIMEOUT_S,
            "write_timeout": READ_TIMEOUT_S,
            "init_command": f"SET SESSION innodb_lock_wait_timeout = {LOCK_WAIT_S}",
        },
    )


@contextmanager
def translated(what: str) -> Iterator[None]:
    """The one place where MySQL's and SQLAlchemy's errors become this project's; `what` says what was being done."""
    try:
        yield
    except AuditExportError:
        raise
    except OSError as error:
        # PyMySQL opens the certificates that the URL names; a socket's own errors come as DBAPIError.
        raise InvalidConfig(f"AUDITEXPORT_MYSQL_URL names a file that cannot be read: {error.filename}") from error
    except PoolTimeout as error:
        raise OutboxUnavailable(f"MySQL: no free connection while {what}; run again") from error
    except DBAPIError as error:
        arguments: tuple[object, ...] = getattr(error.orig, "args", ())
        code = arguments[0] if arguments and isinstance(arguments[0], int) else 0
        if code in _SETUP_ERRORS:
            reason = " ".join(map(str, arguments[1:]))
            raise SetupIncomplete(
                f"MySQL refuses {what} (error {code}: {reason}); check AUDITEXPORT_MYSQL_URL and the grants, or run `auditexport init`"
            ) from error
        if isinstance(error.orig, _rerunnable()):
            raise OutboxUnavailable(
                f"MySQL failed while {what} (error {code}); nothing of it was kept, run again"
            ) from error
        raise


def _rerunnable() -> tuple[type[Exception], ...]:
    from pymysql.err import InterfaceError, InternalError, OperationalError

    return (OperationalError, InternalError, InterfaceError)
