"""The exporter's own stores for MySQL on the simulated server: what they use of SQLAlchemy's engine, connection and result.

`outbox_on(server)` is a `MySQLOutbox` with its own code and SQL, fences included. Only the connection is simulated.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import pymysql
from sqlalchemy import TextClause
from sqlalchemy.engine import IteratorResult
from sqlalchemy.engine.result import SimpleResultMetaData
from sqlalchemy.exc import IntegrityError, InterfaceError, OperationalError

from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.session import LOCK_WAIT_S, MARK_LOCK_WAIT_S
from auditexport_tests.simulation.mysql_server import Meter, SimulatedMySQL, Transaction
from auditexport_tests.simulation.statements import Answer, run

_ERRORS = {pymysql.err.OperationalError: OperationalError, pymysql.err.IntegrityError: IntegrityError}


class SimulatedResult(IteratorResult[Any]):
    """SQLAlchemy's own result, over the rows of an answer."""

    def __init__(self, answer: Answer) -> None:
        super().__init__(SimpleResultMetaData(answer.names), iter(answer.rows))
        self.returns_rows = bool(answer.names)
        self.rowcount = answer.matched
        self.lastrowid = answer.last_key
        self.cursor = _Cursor(answer.rows)


class _Cursor:
    def __init__(self, rows: Sequence[tuple[Any, ...]]) -> None:
        self._rows = rows

    def fetchall(self) -> Sequence[tuple[Any, ...]]:
        return self._rows


class Held(bytes):
    """A payload that a process has read, counted for as long as the process holds it."""

    meter: Meter

    def __del__(self) -> None:
        self.meter.bytes -= len(self)


class _Dialect:
    is_mariadb = False


class SimulatedConnection:
    def __init__(self, transaction: Transaction) -> None:
        self._transaction = transaction
        self.info: dict[str, Any] = {}
        self.dialect = _Dialect()

    def execute(self, statement: TextClause, values: Any = None) -> SimulatedResult:
        """A statement, or the same for each of several sets of values. Raises SQLAlchemy's errors."""
        given: Sequence[Mapping[str, Any]] = values if isinstance(values, list) else [values or {}]
        with _as_sqlalchemy(statement.text, values):
            answer = Answer(rows=[])
            for one in given:
                answer = run(self._transaction, statement.text, one)
        if "payload" in answer.names:
            self._count(answer)
        return SimulatedResult(answer)

    def _count(self, answer: Answer) -> None:
        """Counts the payloads of an answer as held by the process that gets it."""
        place, server = answer.names.index("payload"), self._transaction.server
        meter = server.meters[server.scheduler.process.name]
        for number, row in enumerate(answer.rows):
            if row[place] is not None:
                held = Held(row[place])
                held.meter = meter
                meter.bytes += len(held)
                answer.rows[number] = (*row[:place], held, *row[place + 1 :])
        if meter.bytes > meter.most:
            gc.collect(1)  # what only a traceback still holds is not in use
        meter.most = max(meter.most, meter.bytes)


class SimulatedEngine:
    """Transactions of one process, which wait for a lock for so long."""

    dialect = _Dialect()

    def __init__(self, server: SimulatedMySQL, lock_wait_s: float) -> None:
        self._server = server
        self._lock_wait_s = lock_wait_s

    @contextmanager
    def begin(self) -> Iterator[SimulatedConnection]:
        with _as_sqlalchemy(None, None):
            transaction = self._server.begin(self._lock_wait_s)
        try:
            yield SimulatedConnection(transaction)
            with _as_sqlalchemy(None, None):
                transaction.commit()
        except BaseException:  # also when the process is killed: the server sees its connections close
            transaction.roll_back()
            raise

    def connect(self) -> SimulatedConnection:
        """Only `mysql.blockers` asks for one, which then says that it cannot see who has a lock."""
        raise InterfaceError("(simulated)", {}, pymysql.err.InterfaceError(0, "(simulated)"))

    def dispose(self) -> None:
        return


@contextmanager
def _as_sqlalchemy(statement: str | None, values: Any) -> Iterator[None]:
    try:
        yield
    except pymysql.err.Error as error:
        raise _ERRORS[type(error)](statement, values, error) from error


class _Outbox(MySQLOutbox):
    def __init__(self, server: SimulatedMySQL) -> None:
        super().__init__("mysql+pymysql://simulated@127.0.0.1/simulated")
        self._engine = SimulatedEngine(server, LOCK_WAIT_S)
        self._marking_engine = SimulatedEngine(server, MARK_LOCK_WAIT_S)

    @property
    def engine(self) -> Any:
        return self._engine

    @property
    def marking_engine(self) -> Any:
        return self._marking_engine


def outbox_on(server: SimulatedMySQL) -> MySQLOutbox:
    """The store of one process on this server."""
    return _Outbox(server)
