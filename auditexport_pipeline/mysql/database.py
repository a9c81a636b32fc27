"""One MySQL or MariaDB database: its transactions, for all stores and reports.

What belongs here: how a transaction begins, ends and fails. What does not: connecting (`mysql.connection`), the meaning
of errors (`mysql.errors`), and statements.

Every connection is READ COMMITTED by its engine, waits for a lock at most `LOCK_WAIT_S` (those that mark:
`MARK_LOCK_WAIT_S`), and has no transaction open while anything but MySQL is asked.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from sqlalchemy import Connection, Engine, Row, TextClause
from sqlalchemy.engine import make_url
from sqlalchemy.exc import OperationalError

from auditexport_pipeline.core.errors import BatchLocked, OutboxUnavailable
from auditexport_pipeline.mysql.blockers import holders
from auditexport_pipeline.mysql.connection import checked, engine_for
from auditexport_pipeline.mysql.errors import LOCK_WAIT_TIMEOUT, code_and_words, translated
from auditexport_pipeline.mysql.session import MARK_LOCK_WAIT_S


class _Open(threading.local):
    """The transaction that this thread has open by `one_transaction`, and the error that ended it."""

    connection: Connection | None = None
    failure: BaseException | None = None


class Database:
    """The database that a SQLAlchemy URL names."""

    def __init__(self, url: str) -> None:
        self.url = checked(url)
        self._open = _Open()

    def __repr__(self) -> str:
        return f"{type(self).__name__}({make_url(self.url).render_as_string(hide_password=True)})"

    @property
    def engine(self) -> Engine:
        return engine_for(self.url, os.getpid())

    @property
    def marking_engine(self) -> Engine:
        """Connections that wait for a lock only briefly."""
        return engine_for(self.url, os.getpid(), MARK_LOCK_WAIT_S)

    def disconnect(self) -> None:
        """Closes this process's idle connections; the next call opens others."""
        self.engine.dispose()
        self.marking_engine.dispose()

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is in a `one_transaction` block."""
        return self._open.connection is not None

    @contextmanager
    def one_transaction(self) -> Iterator[None]:
        """As `core.ports.Outbox.one_transaction`, with the short lock wait of marking."""
        if self.in_transaction:
            raise RuntimeError("a transaction is open in this thread already")
        try:
            with self.transaction("committing several effects together", self.marking_engine) as connection:
                self._open.connection = connection
                yield
                if self._open.failure is not None:
                    raise self._open.failure
        finally:
            self._open.connection = self._open.failure = None

    @contextmanager
    def transaction(self, what: str, engine: Engine | None = None) -> Iterator[Connection]:
        """A READ COMMITTED transaction: committed at the end, rolled back by any exception.

        Inside `one_transaction` it is a part of that transaction, which any exception here ends: every later part
        raises the same exception. There are no savepoints, because after a deadlock MySQL has none left.

        `what` names it in errors. Raises `OutboxUnavailable` or a subclass for the driver's errors. When a lock
        wait times out, the error names who holds the lock, and is `BatchLocked` for a row of the ledger.
        """
        joined = self._open.connection
        if self._open.failure is not None:
            raise self._open.failure
        try:
            with (
                self._translated(what),
                nullcontext(joined) if joined else (engine or self.engine).begin() as connection,
            ):
                yield connection
        except BaseException as error:
            if joined:
                self._open.failure = error
            raise

    @contextmanager
    def _translated(self, what: str) -> Iterator[None]:
        """As `mysql.errors.translated`; also names who holds the lock when a lock wait times out."""
        try:
            with translated(what):
                yield
        except OutboxUnavailable as error:
            locked = error.__cause__
            if not isinstance(locked, OperationalError) or code_and_words(locked.orig)[0] != LOCK_WAIT_TIMEOUT:
                raise
            if not locked.statement or error is self._open.failure:  # a COMMIT, or a part that has named the holder
                raise
            message = f"{error}. {holders(self.engine, locked.statement, locked.params)}"
            # Every statement about one row of the ledger has this parameter.
            batch_id = locked.params.get("batch_id") if isinstance(locked.params, dict) else None
            raise (BatchLocked if batch_id else OutboxUnavailable)(message) from locked

    def rows(self, what: str, statement: TextClause, values: Mapping[str, object] | None = None) -> list[Row[Any]]:
        """The rows of one statement, in a transaction of its own; `what` names it in errors."""
        with self.transaction(what) as connection:
            return list(connection.execute(statement, dict(values or {})))
