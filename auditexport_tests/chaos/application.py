"""The application of a history: writers that commit and roll back in any order, and the book of what they committed.

Nothing here goes through the exporter or a proxy. A commit whose answer was lost is in doubt until the outbox is read; so is
what other hands did to rows.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, replace
from random import Random
from typing import Any, Literal

import pymysql

from auditexport_tests.chaos.rig import REFUSED_DESCRIPTION, Databases

Kind = Literal["event", "malformed", "refused", "unknown"]
Key = tuple[str, str, int, str]
START_MS = 1_700_000_000_000
FAT_WORDS = 250_000
# No batch marks its rows with this.
FOREIGN_MARK = 5


@dataclass(slots=True, kw_only=True)
class Row:
    """A row of the outbox as its writer meant it. `columns` are what its entry must hold in ClickHouse."""

    kind: Kind
    event_id: str
    workspace_id: str
    payload: str
    key: Key | None = None
    columns: tuple[object, ...] = ()
    taken: bool = False  # other hands deleted or marked it before it was exported, or perhaps before
    deleted: bool = False  # by other hands, at any time
    cleared: int = 0  # times that its mark was cleared by hand
    requeued: int = 0  # times that a requeue may have cleared its mark
    earlier: list[Row] = field(default_factory=list)  # what was committed here before other hands changed the payload

    @property
    def touched(self) -> bool:
        return bool(self.taken or self.deleted or self.cleared or self.requeued)

    @property
    def contents(self) -> list[Row]:
        """Each content that was committed here: the present one first."""
        return [self, *self.earlier]

    def becomes(self, content: Row) -> None:
        """Its payload is that of `content` now."""
        self.earlier.append(replace(self, earlier=[]))
        self.kind, self.payload, self.key, self.columns = content.kind, content.payload, content.key, content.columns


@dataclass(slots=True)
class Book:
    """What was committed, by pk. Its lock is never held across a call to a database.

    `past` has the rows of earlier tables of this name, whose pks began again.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    past: list[dict[int, Row]] = field(default_factory=list)
    in_doubt: dict[int, Row] = field(default_factory=dict)
    fat: bool = False  # some events are large from now on
    lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, databases: Databases) -> None:
        """Reads the commits in doubt from the outbox: no other hands touch their rows."""
        for pk, row in self.in_doubt.items():
            found = databases.direct.sql("SELECT event_id FROM clickhouse_outbox WHERE pk = :pk", pk=pk)
            if found and found[0].event_id == row.event_id:
                self.rows[pk] = row
        self.in_doubt.clear()

    def begin_again(self, marks: Mapping[int, int | None]) -> None:
        """The table is a new one: the old rows are gone, and those without a mark may never be exported."""
        with self.lock:
            for pk, row in self.rows.items():
                row.deleted = True
                row.taken |= marks.get(pk) in (None, FOREIGN_MARK) and not row.cleared
            self.past.append(self.rows)
            self.rows = {}

    def all_rows(self) -> list[tuple[int, Row]]:
        """Each row that was ever committed, with its pk."""
        return [(pk, row) for rows in (*self.past, self.rows) for pk, row in rows.items()]

    def at(self, pk: int) -> list[Row]:
        """The rows of this pk, one of each table that had it."""
        return [rows[pk] for rows in (self.rows, *self.past) if pk in rows]

    def expect_requeue(self, attempts: int, selects: Callable[[int, Row], bool]) -> None:
        """Notes which rows a requeue may export again, once for each of its attempts."""
        with self.lock:
            for pk, row in self.rows.items():
                if selects(pk, row):
                    row.requeued += attempts

    def some(self, random: Random, count: int) -> list[int]:
        with self.lock:
            return sorted(random.sample([*self.rows], min(count, len(self.rows))))


@contextmanager
def connected(databases: Databases) -> Iterator[pymysql.connections.Connection[Any]]:
    """A direct connection at READ COMMITTED, without a pool; what it has not committed is rolled back at the end."""
    url = databases.direct.outbox.engine.url
    connection = pymysql.connect(
        host=url.host or "",
        port=url.port or 0,
        user="root",
        database=databases.name,
        read_timeout=20,
        init_command="SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED",
    )
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 5, lock_wait_timeout = 5")
        yield connection
    finally:
        with suppress(pymysql.MySQLError):
            connection.close()


class Writer(threading.Thread):
    """One writer: transactions of a few rows, some of them held open for a while, some rolled back."""

    def __init__(self, databases: Databases, book: Book, random: Random, *, name: str, repeated_keys: bool) -> None:
        super().__init__(name=name, daemon=True)
        self._databases = databases
        self._book = book
        self._random = random
        self._repeated_keys = repeated_keys
        self._ending = threading.Event()
        self._number = 0
        self._written: list[Row] = []
        self.turn = threading.Lock()  # held from a transaction's begin until the book has its rows

    def end(self) -> None:
        self._ending.set()
        self.join()

    def run(self) -> None:
        while not self._ending.is_set():
            with suppress(pymysql.MySQLError), connected(self._databases) as connection:
                while not self._ending.is_set():
                    with self.turn:
                        self._transaction(connection)
                    self._ending.wait(self._random.uniform(0.01, 0.15))
            self._ending.wait(0.2)  # the server is away

    def _transaction(self, connection: pymysql.connections.Connection[Any]) -> None:
        rows: dict[int, Row] = {}
        with connection.cursor() as cursor:
            for _ in range(self._random.choice((1, 1, 2, 3, 8, 20))):
                row = self._row([*rows.values()])
                version = "audit_log.v9" if row.kind == "unknown" else "audit_log.v1"
                cursor.execute(
                    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                    "VALUES (%s, %s, %s, %s, UNIX_TIMESTAMP(NOW(3)) * 1000)",
                    (version, row.workspace_id, row.event_id, row.payload),
                )
                rows[int(cursor.lastrowid or 0)] = row
        if self._random.random() < 0.2:
            self._ending.wait(self._random.uniform(0.1, 1.0))  # others commit higher pks meanwhile
        if self._random.random() < 0.15:
            connection.rollback()
            return
        try:
            connection.commit()
        except pymysql.MySQLError:
            with self._book.lock:
                self._book.in_doubt.update(rows)
            raise
        with self._book.lock:
            self._book.rows.update(rows)
        self._written = (self._written + [row for row in rows.values() if row.kind == "event"])[-50:]

    def _row(self, same_transaction: list[Row]) -> Row:
        chance = self._random.random()
        again = [row for row in self._written + same_transaction if row.kind == "event"]
        if chance < 0.06 and again:
            # The same event twice, with the same or another description: the key is what makes it the same.
            event = json.loads(self._random.choice(again).payload)
            if self._random.random() < 0.5:
                event["description"] = f"again {self._random.random()}"
            return _event_row(event)
        self._number += 1
        event = self._event(f"{self.name}-{self._number}")
        if chance < 0.09:
            broken = self._random.choice(({"time": None}, {"time": "soon"}, {"bucket": 7}))
            return _row("malformed", {**event, **broken})
        if chance < 0.1:
            return _row("refused", {**event, "description": REFUSED_DESCRIPTION})
        if chance < 0.12:
            return _row("unknown", event)
        row = _event_row(event)
        if chance < 0.14 and self._repeated_keys:
            # The last of two keys counts; ClickHouse takes the payload only in normal form.
            row.payload = row.payload[:-1] + ', "meta": {"k": 1, "k": 2}}'
            row.columns = (*row.columns[:-1], '{"k": 2}')
        return row

    def _event(self, event_id: str) -> dict[str, Any]:
        random = self._random
        event: dict[str, Any] = {
            "event_id": event_id,
            "time": START_MS + random.randrange(10**9),
            "workspace_id": f"ws_{random.randrange(4)}",
            "bucket": random.choice(("unkey_mutations", "api")),
            "event": random.choice(("key.create", "key.delete", "role.update")),
            "description": random.choice(("", "created", "snowman ☃ 'quoted' \\ \n")),
            "actor": {"type": "user", "id": f"user_{random.randrange(9)}"},
        }
        if self._book.fat and random.random() < 0.5:
            event["description"] = "fat " * FAT_WORDS
        if random.random() < 0.5:
            event["actor"]["name"] = "Zoë"
            event |= {"remote_ip": "10.0.0.1", "source": "dashboard"}
        if random.random() < 0.3:
            event["targets"] = [{"type": "key", "id": f"key_{n}"} for n in range(random.randrange(3))]
        return event


def _row(kind: Kind, event: dict[str, Any]) -> Row:
    payload = json.dumps(event)
    return Row(kind=kind, event_id=event["event_id"], workspace_id=event["workspace_id"], payload=payload)


COLUMNS = (
    "event_id, time, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name, remote_ip, "
    "targets.type, targets.id, meta_text"
)


def _event_row(event: dict[str, Any]) -> Row:
    row = _row("event", event)
    row.key = (event["workspace_id"], event["bucket"], event["time"], event["event_id"])
    actor, targets = event["actor"], event.get("targets", [])
    row.columns = (
        *(event["event_id"], event["time"], event["workspace_id"], event["bucket"], event.get("source", "platform")),
        *(event["event"], event["description"], actor["type"], actor["id"], actor.get("name", "")),
        event.get("remote_ip", ""),
        tuple(target["type"] for target in targets),
        tuple(target["id"] for target in targets),
        json.dumps(event.get("meta", {})),
    )
    return row


# ── other hands ──────────────────────────────────────────────────────────────────────────────────

SWAPS = {
    "rename": (
        "CREATE TABLE fresh_outbox_{n} LIKE clickhouse_outbox",
        "RENAME TABLE clickhouse_outbox TO old_outbox_{n}, fresh_outbox_{n} TO clickhouse_outbox",
    ),
    "truncate": ("TRUNCATE TABLE clickhouse_outbox",),
    "delete": ("DELETE FROM clickhouse_outbox", "COMMIT", "ALTER TABLE clickhouse_outbox AUTO_INCREMENT = 1"),
}


def swap(databases: Databases, book: Book, writers: Collection[Writer], how: str) -> bool:
    """The outbox becomes an empty one whose pks begin again, between two transactions of its writers."""
    with ExitStack() as turns:
        for writer in writers:
            turns.enter_context(writer.turn)
        marks: dict[int, int | None] = {}
        try:
            book.settle(databases)
            with connected(databases) as connection, connection.cursor() as cursor:
                cursor.execute("SELECT pk, deleted_at FROM clickhouse_outbox")
                marks = dict(cursor.fetchall())  # type: ignore[arg-type]
                connection.commit()
                for statement in SWAPS[how]:
                    cursor.execute(statement.format(n=len(book.past)))
                connection.commit()
        except pymysql.MySQLError:
            if not marks or not _gone(databases, marks):
                return False
        book.begin_again(marks)
        return True


def _gone(databases: Databases, pks: Collection[int]) -> bool:
    """Whether these rows are gone, after the answer to the statement that removes them was lost."""
    for _ in range(100):
        with suppress(pymysql.MySQLError), connected(databases) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT COUNT(*) FROM clickhouse_outbox WHERE pk <= %s", [max(pks)])
            ((left,),) = cursor.fetchall()
            return not left
        time.sleep(0.2)  # the server is away
    return False


# By what is done to rows: the statement, and which rows it changes, by their mark.
MEDDLING: dict[str, tuple[str, Callable[[int | None], bool]]] = {
    "delete": ("DELETE FROM clickhouse_outbox", lambda mark: True),
    "mark": (f"UPDATE clickhouse_outbox SET deleted_at = {FOREIGN_MARK}", lambda mark: mark is None),
    "clear": ("UPDATE clickhouse_outbox SET deleted_at = NULL", lambda mark: mark not in (None, FOREIGN_MARK)),
}


def meddle(databases: Databases, book: Book, pks: Collection[int], what: str) -> int:
    """Deletes or marks rows, or clears their marks, by SQL; returns how many it changed."""
    if not pks:
        return 0
    statement, changes = MEDDLING[what]
    changed: dict[int, int | None] = {}
    try:
        with connected(databases) as connection, connection.cursor() as cursor:
            # In descending order: against the exporter, which marks upwards, this can deadlock.
            cursor.execute(
                "SELECT pk, deleted_at FROM clickhouse_outbox WHERE pk IN %s ORDER BY pk DESC FOR UPDATE", [[*pks]]
            )
            changed = {pk: mark for pk, mark in cursor.fetchall() if changes(mark)}  # type: ignore[misc]
            if changed:
                cursor.execute(f"{statement} WHERE pk IN %s", [[*changed]])
            # Before the commit: the exporter may meet the change as soon as it is there.
            with book.lock:
                for pk, mark in changed.items():
                    row = book.rows[pk]
                    row.cleared += what == "clear"
                    row.deleted |= what == "delete"
                    # A row with a batch's mark, or that had one before it was cleared, was exported before.
                    row.taken |= what != "clear" and mark in (None, FOREIGN_MARK) and not row.cleared
            connection.commit()
    except pymysql.MySQLError:
        with book.lock:
            for pk in changed:
                book.rows[pk].taken |= what != "clear" and not book.rows[pk].cleared
        return 0
    return len(changed)
