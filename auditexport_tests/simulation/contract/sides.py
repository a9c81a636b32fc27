"""A real MySQL server and the simulated one, with the same tables, the same moment and the same calls: the two sides of a contract.

`Side` runs stores and statements; what it does is written once. `Session` is one connection of a test about concurrency.
"""

from __future__ import annotations

import itertools
import os
import re
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from typing import Any, Protocol, TypeVar

import pymysql
import sqlalchemy as sa
from sqlalchemy.exc import DBAPIError

from auditexport_pipeline.mysql.errors import code_and_words
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import prepared
from auditexport_pipeline.sql import load
from auditexport_tests.chaos.proxy import Fault, Proxy
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.mysql_engine import outbox_on
from auditexport_tests.simulation.mysql_server import ANSWER_LOST, DIES, SimulatedMySQL, Transaction
from auditexport_tests.simulation.scheduler import Process, Scheduler
from auditexport_tests.simulation.statements import TABLES, Answer, definitions, run

Result = TypeVar("Result")
# Columns by table, and rows by table: what is compared.
Tables = dict[str, list[tuple[Any, ...]]]
COLUMNS = {name: tuple(definition.defaults) for name, definition in definitions().items()}
KEYS = {name: definition.key for name, definition in definitions().items()}
OUTBOX, LEDGER, LETTERS, ACTIONS, ERASURES = COLUMNS
# The moment at which a test begins, by both clocks. Servers truncate a time to milliseconds, so it lies within one.
START_MS = 1_700_000_000_123
_WITHIN_MS = 0.0005
# Locks are waited for so long. The servers count whole seconds.
SHORT_S, LONG_S = 1, 20
# Until a statement that must wait does wait. MariaDB shows its transactions as they were, to those that ask within 0.1 s again.
WAITS_WITHIN_S = 30.0
_numbers = itertools.count(1)


class Undone(Exception):
    """Rolls a transaction back whose answers have been read."""


class Side(Protocol):
    """One server with the five tables, the stores over it, and its clock."""

    name: str
    outbox: MySQLOutbox
    now_ms: int

    def do(self, work: Callable[[], Result]) -> Result:
        """Runs what speaks to the server."""

    def fill(self, tables: Tables) -> None:
        """Replaces all rows; a row has the values of `COLUMNS`. AUTO_INCREMENT begins after the last of them."""


def tables_of(connection: Any) -> Tables:
    """All rows by ascending key, as this connection sees them."""
    return {table: list(map(tuple, connection.execute(_READ[table]))) for table in COLUMNS}


def _shown(column: str) -> str:
    return "CAST(payload AS BINARY) AS payload" if column == "payload" else column


_READ = {
    table: sa.text(f"SELECT {', '.join(map(_shown, columns))} FROM {table} ORDER BY {KEYS[table]}")
    for table, columns in COLUMNS.items()
}


def answer_of(result: Any) -> Answer:
    """The answer to one statement, from SQLAlchemy's result of either side."""
    if not result.returns_rows:
        return Answer(rows=[], matched=result.rowcount, last_key=result.lastrowid)
    return Answer(names=tuple(result.keys()), rows=[tuple(row) for row in result])


# ── the real server ──────────────────────────────────────────────────────────────────────────────


class RealSide:
    name = "real"

    def __init__(self, url: str) -> None:
        self.outbox = MySQLOutbox(url)
        self.now_ms = START_MS
        for engine in (self.outbox.engine, self.outbox.marking_engine):
            sa.event.listen(engine, "begin", self._set_clock)

    def _set_clock(self, connection: sa.Connection) -> None:
        connection.exec_driver_sql(f"SET SESSION timestamp = {self.now_ms / 1000 + _WITHIN_MS:.6f}")

    def do(self, work: Callable[[], Result]) -> Result:
        return work()

    def fill(self, tables: Tables) -> None:
        with self.outbox.engine.begin() as connection:
            for table, columns in COLUMNS.items():
                remove = "TRUNCATE" if definitions()[table].counts_keys_up else "DELETE FROM"
                connection.exec_driver_sql(f"{remove} {table}")
                if tables.get(table):
                    places = ", ".join(["%s"] * len(columns))
                    insert = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({places})"
                    connection.exec_driver_sql(insert, tables[table])


@contextmanager
def real_tables(url: str) -> Iterator[sa.Engine]:
    """Creates the database that the URL names, if it is not there, and our tables, empty but for the ledger's head. Text
    compares as on the simulated side.
    """
    database = sa.make_url(url).database
    admin = sa.create_engine(sa.make_url(url).set(database=""))
    engine = sa.create_engine(url)
    loaded = load("mysql/schema.sql")
    with admin.begin() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE IF NOT EXISTS {database}")
    with engine.begin() as connection:
        for table in (*TABLES, "ledger_head"):
            connection.exec_driver_sql(loaded[table].replace("$collation", "utf8mb4_bin").replace("%", "%%"))
    try:
        yield engine
    finally:
        admin.dispose()
        engine.dispose()


@contextmanager
def real_database(mysql_server: str) -> Iterator[str]:
    """The URL of a fresh database with our tables, dropped afterwards."""
    name = f"auditexport_contract_{os.getpid()}_{next(_numbers)}"
    with real_tables(mysql_server + name) as engine:
        yield mysql_server + name
        with engine.begin() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {name}")


@contextmanager
def real_side(mysql_server: str) -> Iterator[RealSide]:
    with real_database(mysql_server) as url:
        side = RealSide(url)
        try:
            yield side
        finally:
            side.outbox.disconnect()


# ── the simulated server ─────────────────────────────────────────────────────────────────────────


class FrozenMySQL(SimulatedMySQL):
    """A simulated server whose clock stands still."""

    at_ms = START_MS

    def now_ms(self) -> int:
        return self.at_ms


class SimulatedSide:
    name = "simulated"

    def __init__(self) -> None:
        self._scheduler = Scheduler(Choices(), most_steps=10**9)
        self.server = FrozenMySQL(self._scheduler, list(definitions()))
        self.outbox = outbox_on(self.server)

    @property
    def now_ms(self) -> int:
        return self.server.at_ms

    @now_ms.setter
    def now_ms(self, at_ms: int) -> None:
        self.server.at_ms = at_ms

    def do(self, work: Callable[[], Result]) -> Result:
        results: list[Result] = []
        self._scheduler.story.clear()
        self._scheduler.spawn("contract", lambda: results.append(work()), Process("contract"))
        self._scheduler.run()
        return results[0]

    def fill(self, tables: Tables) -> None:
        for name, columns in COLUMNS.items():
            table = self.server.tables[name]
            rows = [dict(zip(columns, row, strict=True)) for row in tables.get(name, ())]
            table.rows = {row[KEYS[name]]: row for row in rows}
            table.next_key = max(table.rows, default=0) + 1


# MySQL names the table of a key, MariaDB does not.
_TABLE_OF_KEY = re.compile(r"\w+\.(?=PRIMARY)")


# ── calls whose results are compared ─────────────────────────────────────────────────────────────


def attempted(side: Side, work: Callable[[], Any]) -> Any:
    """What a call returns; or, of an error of ours or of the driver's, its class and words."""

    def attempt() -> Any:
        try:
            return work()
        except DBAPIError as error:
            code, words = code_and_words(error.orig)
            return ("raises", type(error).__name__, code, _TABLE_OF_KEY.sub("", words))
        except Exception as error:
            if not type(error).__module__.startswith("auditexport_pipeline"):
                raise
            return ("raises", type(error).__name__, str(error))

    return side.do(attempt)


def asked(side: Side, statement: sa.TextClause, values: Mapping[str, Any], *, changes: bool) -> Any:
    """The answer to one statement, with all tables as it leaves them if it `changes` something; then it is rolled back."""

    def ask() -> Any:
        found: list[Any] = []
        with suppress(Undone), side.outbox.engine.begin() as connection:
            found.append(answer_of(connection.execute(statement, dict(values))))
            found += [tables_of(connection)] if changes else []
            raise Undone
        return found

    return attempted(side, ask)


def maintenance(side: Side) -> MySQLMaintenance:
    return MySQLMaintenance(side.outbox)


# ── sessions that run at the same time ───────────────────────────────────────────────────────────


class Session(Protocol):
    """One connection in one transaction after the other."""

    def ask(self, statement: str, **values: Any) -> Any:
        """A SELECT's rows, an INSERT's key, otherwise the number of matched rows; `Refused` for the server's error."""

    def commit(self) -> None: ...

    def roll_back(self) -> None: ...


class Refused(Exception):
    """The server's error: `code`."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


class Stage(Protocol):
    """Where sessions meet. The test is the director: it starts what may wait, and goes on."""

    name: str

    def run(self, test: Callable[[], None]) -> None: ...

    def session(self, *, wait_s: int = LONG_S) -> Session: ...

    def start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        """Begins `work` beside the director; the returned function waits for its result."""

    def until_waiting(self, session: Session) -> None:
        """Returns when this session waits for a lock."""

    def kill(self, session: Session) -> None:
        """Ends the session's connection."""

    def truncate(self, table: str) -> None: ...

    def fragile_session(self, *, answer_lost: bool) -> Session:
        """Its connection ends at its COMMIT: before the server gets it, or after it has done it."""

    def until_gone(self, session: Session) -> None:
        """Returns when the server has noticed that the session's connection is gone."""


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except pymysql.err.MySQLError as error:
        raise Refused(code_and_words(error)[0]) from None
    except DBAPIError as error:
        raise Refused(code_and_words(error.orig)[0]) from None


def _answered(statement: str, answer: Answer) -> Any:
    if answer.names:
        return answer.rows
    return answer.last_key if statement.startswith("INSERT") else answer.matched


class RealSession:
    def __init__(self, engine: sa.Engine, wait_s: int) -> None:
        self._connection = engine.connect()
        self.id = int(self._connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
        self._connection.exec_driver_sql(f"SET SESSION innodb_lock_wait_timeout = {wait_s}")
        self._connection.rollback()

    def ask(self, statement: str, **values: Any) -> Any:
        with _refusals():
            return _answered(statement, answer_of(self._connection.execute(prepared(statement), values)))

    def commit(self) -> None:
        with _refusals():
            self._connection.commit()

    def roll_back(self) -> None:
        with _refusals():
            self._connection.rollback()

    def close(self) -> None:
        self._connection.invalidate()
        self._connection.close()


class RealStage:
    """Each session that may wait has a thread while it does."""

    name = "real"

    def __init__(self, url: str) -> None:
        self.url = url
        self.engine = MySQLOutbox(url).engine
        self._sessions: list[RealSession] = []
        self._threads = ThreadPoolExecutor(max_workers=8)
        self._proxies = ExitStack()

    def run(self, test: Callable[[], None]) -> None:
        with self.engine.begin() as connection:
            for table in (OUTBOX, LETTERS):
                connection.exec_driver_sql(f"DELETE FROM {table}")
            connection.execute(_THREE_ROWS)
        try:
            test()
        finally:
            for session in self._sessions:
                self.kill(session)
            self._threads.shutdown()
            for session in self._sessions:
                session.close()
            self._proxies.close()
            self.engine.dispose()

    def session(self, *, wait_s: int = LONG_S) -> RealSession:
        self._sessions.append(RealSession(self.engine, wait_s))
        return self._sessions[-1]

    def start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        future = self._threads.submit(work)
        return lambda: future.result(WAITS_WITHIN_S)

    def until_waiting(self, session: RealSession) -> None:
        end_s = time.monotonic() + WAITS_WITHIN_S
        while not self._waits(session):
            assert time.monotonic() < end_s, "the statement does not wait for a lock"
            time.sleep(0.11)

    def _waits(self, session: RealSession) -> bool:
        with self.engine.begin() as connection:
            found = connection.execute(_WAITING, {"id": session.id}).scalar_one()
        return bool(found)

    def kill(self, session: RealSession) -> None:
        with suppress(DBAPIError), self.engine.begin() as connection:  # it may be gone
            connection.exec_driver_sql(f"KILL CONNECTION {session.id}")
        self.until_gone(session)

    def until_gone(self, session: RealSession) -> None:
        end_s = time.monotonic() + WAITS_WITHIN_S
        while True:
            with self.engine.begin() as connection:
                if not connection.execute(_ALIVE, {"id": session.id}).scalar_one():
                    return
            assert time.monotonic() < end_s, "the connection does not end"
            time.sleep(0.01)

    def fragile_session(self, *, answer_lost: bool) -> RealSession:
        url = sa.make_url(self.url)
        assert url.port is not None
        proxy = self._proxies.enter_context(Proxy(url.port, speaks="mysql"))
        in_plain_text = url.set(port=proxy.port).update_query_dict({"ssl_disabled": "true"})  # the proxy has to read it
        through = MySQLOutbox(in_plain_text.render_as_string(hide_password=False))
        self._proxies.callback(through.disconnect)
        session = RealSession(through.engine, LONG_S)
        self._sessions.append(session)
        proxy.arm(Fault(kind="answer lost" if answer_lost else "unsent", aimed=True))
        return session

    def truncate(self, table: str) -> None:
        with self.engine.begin() as connection:
            connection.exec_driver_sql(f"TRUNCATE TABLE {table}")


_WAITING = sa.text(
    "SELECT COUNT(*) FROM information_schema.innodb_trx WHERE trx_mysql_thread_id = :id AND trx_state = 'LOCK WAIT'"
)
_ALIVE = sa.text("SELECT COUNT(*) FROM information_schema.processlist WHERE id = :id")
_THREE_ROWS = sa.text(
    "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at, deleted_at) "
    "VALUES (1, 'v', 'w', 'e1', '{}', 1, NULL), (2, 'v', 'w', 'e2', '{}', 2, NULL), (3, 'v', 'w', 'e3', '{}', 3, 7)"
)


class SimulatedSession:
    def __init__(self, server: SimulatedMySQL, wait_s: int) -> None:
        self._server = server
        self._wait_s = wait_s
        self.transaction: Transaction | None = None
        self._lost = False

    def ask(self, statement: str, **values: Any) -> Any:
        with _refusals():
            return _answered(statement, run(self._begun(), statement, values))

    def _begun(self) -> Transaction:
        if self.transaction is None or (self.transaction not in self._server.open and not self.transaction._dead):
            self.transaction = self._server.begin(self._wait_s)
        return self.transaction

    def commit(self) -> None:
        with _refusals():
            self._begun().commit()

    def roll_back(self) -> None:
        self._begun().roll_back()


class SimulatedStage:
    """The director is a task, and so is all that it starts."""

    name = "simulated"

    def __init__(self, seed: int = 1) -> None:
        self.scheduler = Scheduler(Choices(seed))
        self.server = SimulatedMySQL(self.scheduler, list(definitions()))

    def run(self, test: Callable[[], None]) -> None:
        table = self.server.tables[OUTBOX]
        for pk, deleted_at in ((1, None), (2, None), (3, 7)):
            values = (pk, "v", "w", f"e{pk}", "{}", pk, deleted_at)
            table.rows[pk] = dict(zip(COLUMNS[OUTBOX], values, strict=True))
        table.next_key = 4
        self.scheduler.spawn("director", test, Process("director"))
        self.scheduler.run()

    def session(self, *, wait_s: int = LONG_S) -> SimulatedSession:
        return SimulatedSession(self.server, wait_s)

    def start(self, work: Callable[[], Result]) -> Callable[[], Result]:
        ends: list[Callable[[], Result]] = []

        def task() -> None:
            try:
                result = work()
            except Exception as error:
                raised = error

                def fail() -> Result:
                    raise raised

                ends.append(fail)
            else:
                ends.append(lambda: result)

        self.scheduler.spawn("other", task, Process("other"))

        def outcome() -> Result:
            assert self.scheduler.wait(lambda: bool(ends), WAITS_WITHIN_S), "it does not end"
            return ends[0]()

        return outcome

    def until_waiting(self, session: SimulatedSession) -> None:
        def waits() -> bool:
            return session.transaction is not None and session.transaction.waits_for is not None

        assert self.scheduler.wait(waits, WAITS_WITHIN_S), "the statement does not wait for a lock"

    def kill(self, session: SimulatedSession) -> None:
        session._begun().die()

    def until_gone(self, session: SimulatedSession) -> None:
        return

    def fragile_session(self, *, answer_lost: bool) -> SimulatedSession:
        self.server.weather = lambda what: (ANSWER_LOST if answer_lost else DIES) if what == "COMMIT" else None
        return self.session()

    def truncate(self, table: str) -> None:
        self.server.truncate(table)
