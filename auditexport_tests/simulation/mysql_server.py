"""A simulated MySQL server: tables, READ COMMITTED transactions, row locks, a log of commits, and what goes wrong with them.

It knows nothing of the exporter. What statements mean is in `statements`. Errors are the driver's, with the server's codes.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import pymysql

from auditexport_tests.simulation.scheduler import Scheduler

Row = Mapping[str, Any]
Key = Any
LOCK_WAIT_TIMEOUT, DEADLOCK, DUPLICATE, CONNECTION_LOST, NOT_REACHED = 1205, 1213, 1062, 2013, 2003

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


@dataclass(slots=True, eq=False)
class Commit:
    """One commit, and the process that made it. For an oracle: the server itself forgets what a failover loses."""

    at_s: float
    who: str
    changes: tuple[Change, ...]
    lost: bool = False


@dataclass(frozen=True, slots=True)
class Wait:
    """For so long one process waited for a lock of another one that was alive and not paused."""

    who: str
    blocker: str
    table: str
    seconds: float


@dataclass(slots=True)
class Meter:
    """Payload bytes that a process holds, and held at most."""

    bytes: int = 0
    most: int = 0


class SimulatedMySQL:
    """One server. Its clock is the scheduler's, and what was set back or forward of it."""

    def __init__(self, scheduler: Scheduler, tables: Iterable[str], weather: Weather = lambda _: None) -> None:
        self.scheduler = scheduler
        self.tables = {name: Table(name) for name in tables}
        self.weather = weather
        self.clock_offset_ms = 0
        self.log: list[tuple[Change, ...]] = []
        self.on_commit: list[Callable[[Sequence[Change]], None]] = []  # called before the changes take effect
        self.locks: dict[tuple[str, Key], dict[Transaction, bool]] = {}  # by row: who holds it, and whether alone
        self.queues: dict[tuple[str, Key], dict[Transaction, bool]] = {}  # those that wait for a row, in their order
        self.open: set[Transaction] = set()
        self.down = False
        self.successor: SimulatedMySQL | None = (
            None  # another server has taken over from this one, which does not know it
        )
        self.old: tuple[SimulatedMySQL, frozenset[str]] | None = (
            None  # the one before, and the processes that still use it
        )
        # For an oracle: all commits, waits for locks, and statements by process, also of those that failed.
        self.commits: list[Commit] = []
        self.waits: list[Wait] = []
        self.asked: Counter[str] = Counter()
        self.failed: Counter[str] = Counter()
        self.meters: defaultdict[str, Meter] = defaultdict(Meter)  # of payloads, by process

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self.scheduler.now_s * 1000) + self.clock_offset_ms

    def begin(self, lock_wait_s: float) -> Transaction:
        """Raises error 2003 while the server is down."""
        if self.down:
            self.scheduler.step("cannot connect")
            raise failure(NOT_REACHED, "Can't connect to MySQL server")
        if self.old is not None and self.scheduler.process.name in self.old[1]:
            return Transaction(self.old[0], lock_wait_s)
        return Transaction(self, lock_wait_s)

    def in_use(self, table: str) -> bool:
        """Whether a transaction has changed or locked rows of the table, so that a TRUNCATE of it waits."""
        locked = any(held for (name, _), held in self.locks.items() if name == table)
        return locked or any(one.has_changed(table) for one in self.open)

    def fail_over(self, lost_commits: int = 0) -> None:
        """Another server takes over, which has not got the last commits. Every connection dies."""
        for transaction in list(self.open):
            transaction.die()
        kept = (commit for commit in reversed(self.commits) if not commit.lost)
        for _ in range(min(lost_commits, len(self.log))):
            next(kept).lost = True
            for change in reversed(self.log.pop()):
                self._put(change.table, change.key, change.before)
        if lost_commits:  # the other server has seen no higher keys than those of its commits
            for table in self.tables.values():
                logged = (change.key for changes in self.log for change in changes if change.table == table.name)
                numbers = [key for key in (*table.rows, *logged) if isinstance(key, int)]
                table.next_key = max(numbers, default=0) + 1

    def split(self, processes: Iterable[str], lost_commits: int = 0) -> None:
        """As `fail_over`, but the old server lives on for these processes, until `end_split`.

        Their transactions go on there, but for those that wait for a lock, and so do those that they begin. What the old server
        commits from now on is lost.
        """
        old = SimulatedMySQL(self.scheduler, (), lambda what: self.weather(what))
        old.tables = {name: Table(name, dict(table.rows), table.next_key) for name, table in self.tables.items()}
        old.clock_offset_ms, old.successor = self.clock_offset_ms, self
        old.commits, old.waits, old.asked, old.failed, old.meters = (
            *(self.commits, self.waits, self.asked, self.failed, self.meters),
        )
        self.old = (old, frozenset(processes))
        for transaction in [one for one in self.open if one.process.name in self.old[1] and one.waits_for is None]:
            transaction.move_to(old)
        self.fail_over(lost_commits)

    def end_split(self) -> None:
        """The old server is gone, and with it what it alone has committed."""
        if self.old is not None:
            for transaction in list(self.old[0].open):
                transaction.die()
            self.old = None

    def truncate(self, table: str) -> None:
        """TRUNCATE TABLE: a commit of its own, after which keys begin again at 1."""
        self.commit(tuple(Change(table, key, row, None) for key, row in self.tables[table].rows.items()))
        self.tables[table].next_key = 1

    def commit(self, changes: tuple[Change, ...]) -> None:
        if changes:
            self.log.append(changes)
            for listener in self.on_commit:
                listener(changes)
            who = self.scheduler.process.name
            self.commits.append(Commit(self.scheduler.now_s, who, changes, lost=self.successor is not None))
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
        self.task = server.scheduler.acting
        self._lock_wait_s = lock_wait_s
        self._own: dict[tuple[str, Key], Row | None] = {}
        self.waits_for: tuple[str, Key] | None = None
        self._waits = 0  # how often it has waited
        self._dead = False
        self._victim = False  # of a deadlock that another transaction closed while this one waited
        self.process = server.scheduler.process
        self._locked_at_s: dict[tuple[str, Key], float] = {}
        self._waits_since_s = 0.0
        self.committed = False  # whether the server did the COMMIT, whatever its client was told
        server.open.add(self)

    # ── statements ───────────────────────────────────────────────────────────────────────────────

    def statement(self, what: str) -> None:
        """The start of a statement: a step, at which the connection can die."""
        self.server.scheduler.step(what)
        self.server.asked[self.process.name] += 1
        if self._dead or self.server.weather(what) == DIES:
            self.server.failed[self.process.name] += 1
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

    def has_changed(self, table: str) -> bool:
        return any(name == table for name, _ in self._own)

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
        place = (table, key)
        held = self.server.locks.setdefault(place, {})
        if self in held and (held[self] or not alone):
            return True
        if self._blocked(place, alone):
            if skip:
                return False
            self.waits_for = place
            self._waits += 1
            self._waits_since_s = self.server.scheduler.now_s
            self.server.queues.setdefault(place, {})[self] = alone
            try:
                while circle := self._circle():
                    victim = min(circle, key=Transaction._weight)  # the first of equals is this one
                    victim.roll_back()
                    if victim is self:
                        raise failure(DEADLOCK, "Deadlock found when trying to get lock; try restarting transaction")
                    victim._victim = True
                ready = self.server.scheduler.wait(
                    lambda: self._dead or self._victim or not self._blocked(place, alone), self._lock_wait_s
                )
                if self._victim:
                    raise failure(DEADLOCK, "Deadlock found when trying to get lock; try restarting transaction")
                if not ready:
                    raise failure(LOCK_WAIT_TIMEOUT, "Lock wait timeout exceeded; try restarting transaction")
            finally:
                for other, other_alone in held.items():
                    if other is not self and (alone or other_alone):
                        other._blocked_since(self, place)
                self._leave_queue()
            if self._dead:
                raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")
        held[self] = alone
        self._locked_at_s[place] = self.server.scheduler.now_s
        return True

    def _blocked_since(self, other: Transaction, place: tuple[str, Key]) -> None:
        """Notes for how long another transaction has waited for this one, but not while this one's process was paused."""
        since_s = max(other._waits_since_s, self._locked_at_s[place], self.process.paused_until_s)
        seconds = self.server.scheduler.now_s - since_s
        if seconds > 0:
            self.server.waits.append(Wait(other.process.name, self.process.name, place[0], seconds))

    def _blocked(self, place: tuple[str, Key], alone: bool) -> bool:
        return next(self._blockers(place, alone), None) is not None

    def _blockers(self, place: tuple[str, Key], alone: bool) -> Iterator[Transaction]:
        """Those that have the row, and those that have waited for it longer, unless both sides share it."""
        held = self.server.locks.get(place, {})
        for other, other_alone in held.items():
            if other is not self and (alone or other_alone):
                yield other
        if self in held:  # it has a share already
            return
        for other, other_alone in self.server.queues.get(place, {}).items():
            if other is self:
                return
            if alone or other_alone:
                yield other

    def _leave_queue(self) -> None:
        if self.waits_for is not None:
            del self.server.queues[self.waits_for][self]
            if not self.server.queues[self.waits_for]:
                del self.server.queues[self.waits_for]
            self.waits_for = None

    def locked_row(
        self, table: str, key: Key, matches: Callable[[Row], bool], *, alone: bool = True, skip: bool = False
    ) -> Row | None:
        """Locks a row; the row, if it is there then and matches. If not, it is unlocked, unless it was waited for."""
        had, waits = self in self.server.locks.get((table, key), ()), self._waits
        if not self.lock(table, key, alone=alone, skip=skip):
            return None
        row = self.get(table, key)
        if row is not None and matches(row):
            return row
        if not had and waits == self._waits:
            del self.server.locks[table, key][self]
        return None

    def meets(self, table: str, key: Key) -> bool:
        """Whether a statement that locks meets a row here: one that is there, or that another transaction is inserting."""
        return next(self.versions(table, key), None) is not None

    def versions(self, table: str, key: Key) -> Iterator[Row]:
        """The row as this transaction sees it, and as another one is changing it."""
        row = self.get(table, key)
        if row is not None:
            yield row
        for other in self.server.locks.get((table, key), ()):
            changed = None if other is self else other._own.get((table, key))
            if changed is not None:
                yield changed

    def keys_that_may_be(self, table: str) -> set[Key]:
        """All keys under which `meets` can find a row."""
        changed = {key for one in self.server.open for name, key in one._own if name == table}
        return changed | self.server.tables[table].rows.keys()

    def put(self, table: str, key: Key, row: Row | None) -> None:
        """Inserts, changes or (None) deletes a row that this transaction has locked."""
        self._own[table, key] = row

    def new_key(self, table: str) -> int:
        """The next AUTO_INCREMENT; it is used up whatever becomes of the transaction."""
        number = self.server.tables[table].next_key
        self.server.tables[table].next_key += 1
        return number

    def use_key(self, table: str, key: int) -> None:
        """A key that the client gives: the next AUTO_INCREMENT is beyond it, whatever becomes of the transaction."""
        self.server.tables[table].next_key = max(self.server.tables[table].next_key, key + 1)

    def duplicate(self, table: str, key: Key) -> pymysql.err.IntegrityError:
        """Error 1062."""
        return pymysql.err.IntegrityError(DUPLICATE, f"Duplicate entry '{key}' for key '{table}.PRIMARY'")

    # ── its end ──────────────────────────────────────────────────────────────────────────────────

    def commit(self) -> None:
        """Raises error 2013 when the connection dies: before the server got the COMMIT, or after it did it."""
        self.server.scheduler.step("COMMIT")
        happens = None if self._dead else self.server.weather("COMMIT")
        if self._dead or happens == DIES:
            self.server.failed[self.process.name] += 1
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
            self.server.failed[self.process.name] += 1
            raise failure(CONNECTION_LOST, "Lost connection to MySQL server during query")

    def roll_back(self) -> None:
        self._own.clear()
        self._end()

    def die(self) -> None:
        """The server notices that the connection is gone, and rolls back."""
        self._dead = True
        self.roll_back()

    def move_to(self, server: SimulatedMySQL) -> None:
        """The transaction goes on at another server, with its locks."""
        for place, held in self.server.locks.items():
            if self in held:
                server.locks.setdefault(place, {})[self] = held.pop(self)
        self.server.open.discard(self)
        server.open.add(self)
        self.server = server

    def _end(self) -> None:
        self._leave_queue()
        self.server.open.discard(self)
        for place in [place for place, held in self.server.locks.items() if self in held]:
            alone = self.server.locks[place].pop(self)
            for other, other_alone in self.server.queues.get(place, {}).items():
                if alone or other_alone:
                    self._blocked_since(other, place)

    def _weight(self) -> int:
        """The transaction that has changed and locked least is the victim of a deadlock."""
        return len(self._own) + sum(1 for held in self.server.locks.values() if self in held)

    def _circle(self) -> list[Transaction]:
        """Transactions from this one on, each of which waits for the next, and the last one for this one; or none."""
        seen: set[Transaction] = {self}
        paths = [[self]]
        while paths:
            path = paths.pop()
            last, place = path[-1], path[-1].waits_for
            if place is None:
                continue
            for other in last._blockers(place, self.server.queues[place][last]):
                if other is self:
                    return path
                if other not in seen:
                    seen.add(other)
                    paths.append([*path, other])
        return []
