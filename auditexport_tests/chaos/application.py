"""The application of a history: writers that commit and roll back in any order, and the book of what they committed.

What belongs here: events and how they get into the outbox, what others do to its rows, and what of it is known to
be true. What does not: the exporter; nothing here goes through it or through a proxy.

A commit whose answer was lost is in doubt until the outbox itself is read; so is what others did to rows.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from random import Random
from typing import Any, Literal

import pymysql

from auditexport_tests.chaos.rig import REFUSED_DESCRIPTION, Databases

Kind = Literal["event", "malformed", "refused", "unknown"]
Key = tuple[str, str, int, str]
START_MS = 1_700_000_000_000
FAT_WORDS = 250_000
# No batch gives its rows this stamp.
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
    taken: bool = False  # deleted or marked by others before it was exported, or nobody knows whether before
    deleted: bool = False  # by others, at any time
    cleared: int = 0  # times that its mark was taken off by hand
    requeued: int = 0  # times that a requeue may have taken its mark off


@dataclass(slots=True)
class Book:
    """What was committed, by pk. Its lock is never held while a database is asked.

    `past` has the rows of earlier tables of this name, whose pks began again.
    """

    rows: dict[int, Row] = field(default_factory=dict)
    past: list[dict[int, Row]] = field(default_factory=list)
    in_doubt: dict[int, Row] = field(default_factory=dict)
    rolled_back: int = 0
    fat: bool = False  # some events are large from now on
    lock: threading.Lock = field(default_factory=threading.Lock)

    def settle(self, databases: Databases) -> None:
        """Asks the outbox about the commits in doubt. Others never touch such rows, so they are there or were not."""
        for pk, row in self.in_doubt.items():
            found = databases.sql("SELECT event_id FROM clickhouse_outbox WHERE pk = :pk", pk=pk)
            if found and found[0].event_id == row.event_id:
                self.rows[pk] = row
        self.in_doubt.clear()

    def begin_again(self, marks: dict[int, int | None]) -> None:
        """The table is another one from here on: its rows are gone, and those without a mark may never be exported."""
        with self.lock:
            for pk, row in self.rows.items():
                row.deleted = True
                row.taken |= marks.get(pk) in (None, FOREIGN_MARK) and not row.cleared
            self.past.append(self.rows)
            self.rows = {}

    def all_rows(self) -> list[tuple[int, Row]]:
        """Each row that was ever committed, with its pk."""
        return [(pk, row) for rows in (*self.past, self.rows) for pk, row in rows.items()]

    def ask_again(self, attempts: int, meant: Callable[[int, Row], bool]) -> None:
        """Notes which rows a requeue may export again, each of its attempts by itself."""
        with self.lock:
            for pk, row in self.rows.items():
                if meant(pk, row):
                    row.requeued += attempts

    def some(self, random: Random, count: int) -> list[int]:
        with self.lock:
            return sorted(random.sample([*self.rows], min(count, len(self.rows))))


@contextmanager
def connected(databases: Databases) -> Iterator[pymysql.connections.Connection[Any]]:
    """A direct connection at READ COMMITTED, outside any pool; gone with its transaction at the end."""
    url = databases.outbox.engine.url
    connection = pymysql.connect(
        host=url.host or "", port=url.port or 0, user="root", database=databases.name, read_timeout=20
    )
    try:
        with connection.cursor() as cursor:
            cursor.execute("SET SESSION TRANSACTION ISOLATION LEVEL READ COMMITTED")
            cursor.execute("SET SESSION innodb_lock_wait_timeout = 5")
        yield connection
    finally:
        with suppress(pymysql.MySQLError):
            connection.close()


class Writer(threading.Thread):
    """One writer: transactions of a few rows, held open now and then, rolled back now and then."""

    def __init__(self, databases: Databases, book: Book, random: Random, *, name: str, repeated_keys: bool) -> None:
        super().__init__(name=name, daemon=True)
        self._databases = databases
        self._book = book
        self._random = random
        self._repeated_keys = repeated_keys
        self._ending = threading.Event()
        self._number = 0
        self._written: list[Row] = []
        self.turn = threading.Lock()  # held from a transaction's begin until the book has it

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
                cursor.execute(
                    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                    "VALUES (%s, %s, %s, %s, UNIX_TIMESTAMP(NOW(3)) * 1000)",
                    (
                        "audit_log.v9" if row.kind == "unknown" else "audit_log.v1",
                        row.workspace_id,
                        row.event_id,
                        row.payload,
                    ),
                )
                rows[int(cursor.lastrowid or 0)] = row
        if self._random.random() < 0.2:
            self._ending.wait(self._random.uniform(0.1, 1.0))  # others commit higher pks meanwhile
        if self._random.random() < 0.15:
            connection.rollback()
            self._book.rolled_back += len(rows)
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
            # The same event twice, word for word or with another description: the key is what makes it the same.
            event = json.loads(self._random.choice(again).payload)
            if self._random.random() < 0.5:
                event["description"] = f"again {self._random.random()}"
            return _event_row(event)
        self._number += 1
        event = self._event(f"{self.name}-{self._number}")
        if chance < 0.09:
            self._random.choice(
                (lambda: event.pop("time"), lambda: event.update(time="soon"), lambda: event.update(bucket=7))
            )()
            return _row("malformed", event)
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
            event["remote_ip"] = "10.0.0.1"
            event["source"] = "dashboard"
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
    targets = event.get("targets", [])
    row.columns = (
        event["event_id"],
        event["time"],
        event["workspace_id"],
        event["bucket"],
        event.get("source", "platform"),
        event["event"],
        event["description"],
        event["actor"]["type"],
        event["actor"]["id"],
        event["actor"].get("name", ""),
        event.get("remote_ip", ""),
        tuple(target["type"] for target in targets),
        tuple(target["id"] for target in targets),
        json.dumps(event.get("meta", {})),
    )
    return row


def swap(
    databases: Databases, book: Book, writers: Collection[Writer], how: Literal["rename", "truncate", "delete"]
) -> bool:
    """The outbox becomes an empty one whose pks begin again, between two transactions of its writers."""
    with ExitStack() as turns:
        for writer in writers:
            turns.enter_context(writer.turn)
        marks: dict[int, int | None] = {}
        try:
            book.settle(databases)
            with connected(databases) as connection, connection.cursor() as cursor:
                cursor.execute("SET SESSION lock_wait_timeout = 5")
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
    """Whether these rows are gone, where the answer to the statement that removes them was lost. No writer is at work."""
    for _ in range(100):
        with suppress(pymysql.MySQLError), connected(databases) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT COUNT(*) FROM clickhouse_outbox WHERE pk <= %s", [max(pks)])
            ((left,),) = cursor.fetchall()
            return not left
        time.sleep(0.2)  # the server is away
    return False


SWAPS = {
    "rename": (
        "CREATE TABLE fresh_outbox_{n} LIKE clickhouse_outbox",
        "RENAME TABLE clickhouse_outbox TO old_outbox_{n}, fresh_outbox_{n} TO clickhouse_outbox",
    ),
    "truncate": ("TRUNCATE TABLE clickhouse_outbox",),
    "delete": ("DELETE FROM clickhouse_outbox", "COMMIT", "ALTER TABLE clickhouse_outbox AUTO_INCREMENT = 1"),
}


# ── other people's hands ─────────────────────────────────────────────────────────────────────────


def meddle(databases: Databases, book: Book, pks: Collection[int], what: Literal["delete", "mark", "clear"]) -> int:
    """Deletes rows, marks them, or takes their marks off, as somebody in SQL would; returns how many it changed."""
    if not pks:
        return 0
    names = ", ".join(["%s"] * len(pks))
    changed: dict[int, int | None] = {}
    try:
        with connected(databases) as connection, connection.cursor() as cursor:
            # In descending order: against the exporter, which marks upwards, this can deadlock.
            cursor.execute(
                f"SELECT pk, deleted_at FROM clickhouse_outbox WHERE pk IN ({names}) ORDER BY pk DESC FOR UPDATE",
                [*pks],
            )
            before: dict[int, int | None] = dict(cursor.fetchall())  # type: ignore[arg-type]
            changed = {
                pk: mark
                for pk, mark in before.items()
                if what == "delete" or (mark is None if what == "mark" else mark not in (None, FOREIGN_MARK))
            }
            if not changed:
                return 0
            names = ", ".join(["%s"] * len(changed))
            statement = {
                "delete": f"DELETE FROM clickhouse_outbox WHERE pk IN ({names})",
                "mark": f"UPDATE clickhouse_outbox SET deleted_at = {FOREIGN_MARK} WHERE pk IN ({names})",
                "clear": f"UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN ({names})",
            }[what]
            cursor.execute(statement, [*changed])
            # Before the commit: the exporter may meet the change the moment it is there.
            _note(book, changed, what)
            connection.commit()
    except pymysql.MySQLError:
        _note_doubt(book, changed, what)
        return 0
    return len(changed)


def _note(book: Book, changed: dict[int, int | None], what: str) -> None:
    with book.lock:
        for pk, mark in changed.items():
            row = book.rows[pk]
            row.cleared += what == "clear"
            row.deleted |= what == "delete"
            # What bears a batch's stamp, or did before it was cleared, was exported before it was touched.
            row.taken |= what != "clear" and mark in (None, FOREIGN_MARK) and not row.cleared


def _note_doubt(book: Book, changed: dict[int, int | None], what: str) -> None:
    with book.lock:
        for pk in changed:
            book.rows[pk].taken |= what != "clear" and not book.rows[pk].cleared
