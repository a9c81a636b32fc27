"""A simulated MySQL server: tables, READ COMMITTED transactions, row locks, a log of commits, and what goes wrong with them.

It knows nothing of the exporter. What statements mean is in `statements`. Errors are the driver's, with the server's codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pymysql

from auditexport_tests.simulation.scheduler import Scheduler

Row = Mapping[str, Any]
Key = Any
LOCK_WAIT_TIMEOUT, DEADLOCK, DUPLICATE, CONNECTION_LOST = 1205, 1213, 1062, 2013

# Called before each statement and each COMMIT; says what happens to the connection there.
Weather = Callable[[str], "str | None"]
DIES, ANSWER_LOST = "the connection dies", "the answer is lost"


def failure(code: int, words: str) -> pymysql.err.OperationalError:
    return pymysql.err.OperationalError(code, words)


@dataclass(eq=False)
class Table:
    """Committed rows by primary key, in no order. A row is never changed in place."""

    name: str
    rows: dict[Key, Row] = field(default_factory=dict)
    next_key: int = 1  # AUTO_INCREMENT: not rolled back, and not restored by a failover beyond the rows that are there


@dataclass(frozen=True, slots=True)
class Change:
    table: str
    key: Key
    before: Row | None
    after: Row | None


class SimulatedMySQL:
    """One server. Its clock is the scheduler's, and what was set back or forward of it."""

    def __init__(self, scheduler: Scheduler, tables: Iterable[str], weather: Weather = lambda _: None) -> None:
        self.scheduler = scheduler
        self.tables = {name: Table(name) for name in tables}
        self.weather = weather
        self.clock_offset_ms = 0
        self.log: list[tuple[Change, ...]] = []
        self.locks: dict[tuple[str, Key], dict[Transaction, bool]] = {}  # by row: who holds it, and whether alone
        self.open: set[Transaction] = set()

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self.scheduler.now_s * 1000) + self.clock_offset_ms

    def begin(self, lock_wait_s: float) -> Transaction:
        return Transaction(self, lock_wait_s)

    def fail_over(self, lost_commits: int = 0) -> None:
        """Another server takes over, which has not got the last commits. Every connection dies."""
        for transaction in list(self.open):
            transaction.die()
        for _ in range(min(lost_commits, len(self.log))):
            for change in reversed(self.log.pop()):
                self._put(change.table, change.key, change.before)
        for table in self.tables.values():
            numbers = [key for key in table.rows if isinstance(key, int)]
            table.next_key = max(numbers, default=0) + 1

    def commit(self, changes: tuple[Change, ...]) -> None:
        if changes:
            self.log.append(changes)
        for change in changes:
            self._put(change.table, change.key, change.after)

    def _put(self, table: str, key: Key, row: Row | None) -> None:
        if row is None:
            self.tables[table].rows.pop(key, None)
        else:
            self.tables[table].rows[key] = row


class Transaction:
    """A READ COMMITTED transaction. Each read sees what is committed by then, and its own changes."""

    def __init__(self, server: SimulatedMySQL, lock_wait_s: float) -> None:
        self.server = server
        self._lock_wait_s = lock_wait_s
        self._own: dict[tuple[str, Key], Row | None] = {}
        self._waits_for: tuple[str, Key] | None = None
        self._dead = False
        self.committed = False  # whether the server did the COMMIT, whatever its client was told
        server.open.add(self)

    # ── statements ───────────────────────────────────────────────────────────────────────────────

    def statement(self, what: str) -> None:
        """The start of a statement: a step, at which the connection can die."""
        self.server.scheduler.step(what)
        if self._dead or self.server.weather(what) == DIES:
            self.die()
            raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")

    @contextmanager
    def undone_on_timeout(self) -> Iterator[None]:
        """A statement whose wait for a lock times out has changed nothing; its transaction goes on, and keeps its locks."""
        before = dict(self._own)
        try:
            yield
        except pymysql.err.OperationalError as error:
            if error.args[0] == LOCK_WAIT_TIMEOUT:
                self._own = before
            raise

    def get(self, table: str, key: Key) -> Row | None:
        if (table, key) in self._own:
            return self._own[table, key]
        return self.server.tables[table].rows.get(key)

    def rows(self, table: str, keys: Iterable[Key] | None = None) -> Iterator[tuple[Key, Row]]:
        """The rows with these ascending keys, or all rows by ascending key, as one statement sees them."""
        if keys is None:
            own = {key for name, key in self._own if name == table}
            keys = sorted({*self.server.tables[table].rows, *own})
        for key in keys:
            row = self.get(table, key)
            if row is not None:
                yield key, row

    def lock(self, table: str, key: Key, *, alone: bool = True, skip: bool = False) -> bool:
        """Locks a row until the end; False for `skip`, if another transaction has it. Raises errors 1205 and 1213."""
        held = self.server.locks.setdefault((table, key), {})

        def free() -> bool:
            return all(other is self or not (alone or held[other]) for other in held)

        if not free():
            if skip:
                return False
            self._waits_for = (table, key)
            try:
                if self._in_a_circle():
                    self.roll_back()
                    raise failure(DEADLOCK, "Deadlock found when trying to get lock; try restarting transaction")
                if not self.server.scheduler.wait(lambda: self._dead or free(), self._lock_wait_s):
                    raise failure(LOCK_WAIT_TIMEOUT, "Lock wait timeout exceeded; try restarting transaction")
            finally:
                self._waits_for = None
            if self._dead:
                raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")
        held[self] = alone or held.get(self, False)
        return True

    def put(self, table: str, key: Key, row: Row | None) -> None:
        """Inserts, changes or (None) deletes a row that this transaction has locked."""
        self._own[table, key] = row

    def new_key(self, table: str) -> int:
        """The next AUTO_INCREMENT; it is used up whatever becomes of the transaction."""
        number = self.server.tables[table].next_key
        self.server.tables[table].next_key += 1
        return number

    def duplicate(self, table: str, key: Key) -> pymysql.err.IntegrityError:
        """Error 1062."""
        return pymysql.err.IntegrityError(DUPLICATE, f"Duplicate entry '{key}' for key '{table}.PRIMARY'")

    # ── its end ──────────────────────────────────────────────────────────────────────────────────

    def commit(self) -> None:
        """Raises error 2013 when the connection dies: before the server got the COMMIT, or after it did it."""
        self.server.scheduler.step("COMMIT")
        happens = None if self._dead else self.server.weather("COMMIT")
        if self._dead or happens == DIES:
            self.die()
            raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")
        self.server.commit(
            tuple(
                Change(table, key, self.server.tables[table].rows.get(key), row)
                for (table, key), row in self._own.items()
            )
        )
        self.committed = True
        self._end()
        if happens == ANSWER_LOST:
            raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")

    def roll_back(self) -> None:
        self._own.clear()
        self._end()

    def die(self) -> None:
        """The server notices that the connection is gone, and rolls back."""
        self._dead = True
        self.roll_back()

    def _end(self) -> None:
        self.server.open.discard(self)
        for place in [place for place, held in self.server.locks.items() if self in held]:
            del self.server.locks[place][self]

    def _in_a_circle(self) -> bool:
        """Whether those that hold what this transaction waits for wait for it in turn."""
        seen: set[Transaction] = set()
        todo = [self]
        while todo:
            one = todo.pop()
            if one._waits_for is None:
                continue
            for other in self.server.locks.get(one._waits_for, {}):
                if other is self and one is not self:
                    return True
                if other not in seen and other is not self:
                    seen.add(other)
                    todo.append(other)
        return False
