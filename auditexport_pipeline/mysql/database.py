"""One MySQL or MariaDB database: its transactions, for every store and every look at it.

What belongs here: how a transaction begins, ends and fails. What does not: how we connect (`mysql.connection`), what an error
means (`mysql.errors`), and statements.

Every connection is READ COMMITTED by its engine, waits for a lock at most `LOCK_WAIT_S` (those that mark:
`MARK_LOCK_WAIT_S`), and holds no transaction while anything but MySQL is asked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Row, TextClause
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from auditexport_pipeline.core.errors import BatchLocked, OutboxUnavailable
from auditexport_pipeline.mysql.blockers import holders
from auditexport_pipeline.mysql.connection import checked, engine_for
from auditexport_pipeline.mysql.errors import LOCK_WAIT_TIMEOUT, code_and_words, translated
from auditexport_pipeline.mysql.session import MARK_LOCK_WAIT_S


class Database:
    """The database that a SQLAlchemy URL names."""

    def __init__(self, url: str) -> None:
        self.url = checked(url)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({make_url(self.url).render_as_string(hide_password=True)})"

    @property
    def engine(self) -> Engine:
        return engine_for(self.url, os.getpid())

    @property
    def marking_engine(self) -> Engine:
        """Connections that soon give up waiting for a lock."""
        return engine_for(self.url, os.getpid(), MARK_LOCK_WAIT_S)

    def disconnect(self) -> None:
        """Closes this process's idle connections; the next call opens others."""
        self.engine.dispose()
        self.marking_engine.dispose()

    @contextmanager
    def transaction(self, what: str, engine: Engine | None = None) -> Iterator[Connection]:
        """A READ COMMITTED transaction: committed at the end, rolled back by any exception.

        `what` names it in errors. Raises `OutboxUnavailable` and its kin for the driver's errors; after a wait for a lock in
        vain the error names who holds the lock, and is `BatchLocked` for a row of the ledger.
        """
        try:
            with translated(what), (engine or self.engine).begin() as connection:
                yield connection
        except OutboxUnavailable as error:
            locked = error.__cause__
            if not isinstance(locked, OperationalError) or code_and_words(locked.orig)[0] != LOCK_WAIT_TIMEOUT:
                raise
            if not locked.statement:  # a COMMIT
                raise
            said = f"{error}. {holders(self.engine, locked.statement, locked.params)}"
            # Every statement about one row of the ledger has this parameter.
            batch_id = locked.params.get("batch_id") if isinstance(locked.params, dict) else None
            raise (BatchLocked if batch_id else OutboxUnavailable)(said) from locked

    def rows(self, what: str, statement: TextClause, values: Mapping[str, object] | None = None) -> list[Row[Any]]:
        """The rows of one statement, in a transaction of its own; `what` names it in errors."""
        with self.transaction(what) as connection:
            return list(connection.execute(statement, dict(values or {})))
