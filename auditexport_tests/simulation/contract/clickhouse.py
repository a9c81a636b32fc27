"""The ClickHouse under test, simulated or real, with what a test does to it; and what every read method says of it.

Both do the same by the same few methods. Nothing happens by itself: no merge runs unless a test asks for it.
"""

from __future__ import annotations

import itertools
import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Protocol
from urllib.parse import urlsplit

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.engines import Layout
from auditexport_pipeline.clickhouse.settings import DDL_SETTINGS
from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.batch import Batch, Block, State
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Refusal, StoredEntry
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import SimulatedClickHouse, month_of
from auditexport_tests.simulation.payloads import read_entry
from auditexport_tests.simulation.scheduler import Process, Scheduler
from auditexport_tests.support.engines import chosen
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, NoAnswer, Request, pass_on
from auditexport_tests.support.waiting import wait_until

VERSION = "audit_log.v1"
DAY_MS = 86_400_000
NOBODY_MS = 10**15  # after the `inserted_at` of any test
# Merges happen when a test asks for one: no part is small enough for a merge of the server's own, and none is past its TTL. Else a
# server drops old parts in the moment in which a mutation may run.
NO_MERGES = (
    "max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1, "
    "max_number_of_merges_with_ttl_in_pool = 0"
)
VIEW = "CREATE MATERIALIZED VIEW failing_view TO numbers AS SELECT {} AS n FROM audit_logs_raw_v1"
_names = itertools.count(1)


def payload(event_id: str, /, **fields: object) -> bytes:
    """An event with the required fields, and these. A number in its id is its time."""
    required = {"event_id": event_id, "time": 1000, "workspace_id": "ws_1", "event": "key.create"}
    return json.dumps({**required, **fields}).encode()


def batch_of(
    batch_id: int, inserted_at_ms: int, rows: int, *, generation: int = 0, version: str = VERSION
) -> tuple[Batch, Block]:
    """A sealed batch of one block. Its token follows from its id and its generation."""
    block = Block(number=0, inserted_at_ms=inserted_at_ms, pks=PkSet.of(range(1, rows + 1)), digest="d")
    usual: dict[str, Any] = {"epoch": 1, "state": State.SEALED, "owner": "run", "pks": block.pks, "blocks": (block,)}
    return Batch(batch_id=batch_id, generation=generation, version=version, **usual), block


class ServerUnderTest(Protocol):
    """One table of one server. `log` is the port over it, with the faults that a test has set in front of it."""

    engine: str
    simulated: bool

    @property
    def log(self) -> AuditLog: ...

    def merge(self) -> None:
        """OPTIMIZE … FINAL: all parts of each partition. A merge deletes what is past the TTL, too."""

    def expire(self) -> None:
        """Deletes what is past the TTL, and merges nothing."""

    def delete(self, event_id: str) -> None:
        """A mutation, which is done when this returns."""

    def erase(self, workspace_id: str) -> None:
        """As `delete`, of all entries of a workspace."""

    def alter(self, before: bytes, after: bytes) -> None:
        """Entries of the first payload become those of the second, which differs in its description."""

    def drop_partition(self, at_ms: int) -> None: ...

    def remember(self, window: int) -> None:
        """Sets non_replicated_deduplication_window."""

    def keep(self, days: int | None, *, by: str = "inserted_at", workspace_id: str = "") -> None:
        """Another TTL; it deletes nothing yet."""

    def constrain(self, most_time: int | None) -> None:
        """CHECK time < most_time, by the name `small`; None drops it."""

    def view(self, kind: str) -> None:
        """A view that `fails` for descriptions `bad`, is `slow` (3 s) or has no `target`; "" drops it."""

    def be_slow(self, slow: bool) -> None:
        """An INSERT takes 3 s before its block is stored."""

    def starve(self, starve: bool) -> None:
        """No memory for any INSERT."""

    def limit_parts(self, most: int) -> None: ...

    def answer_instead(self, status: int, *, passes_on: bool) -> None:
        """A proxy answers every request itself, before or after it has passed the request on."""

    def lose_answers(self, *, passes_on: bool) -> None:
        """The connection closes without an answer to INSERTs, and their work is done or not."""

    def hold_back(self) -> None:
        """INSERTs are on their way until `let_go`; their senders get no answer."""

    def let_go(self) -> None:
        """Returns when they have ended."""

    def recover(self) -> None:
        """Nothing stands in front of the server any more."""

    def be_down(self, down: bool) -> None:
        """Nothing listens."""

    def pass_time(self, seconds: float) -> None: ...

    def start(self, work: Callable[[], None]) -> None:
        """Does work beside the test, as another process would."""


# ── simulated ────────────────────────────────────────────────────────────────────────────────────


class SimulatedServer:
    """The simulation of one engine. The calling thread takes part in its scheduler."""

    simulated = True
    HELD_BACK_S = 1000.0

    def __init__(self, scheduler: Scheduler, engine: str) -> None:
        self.server = SimulatedClickHouse(scheduler, engine=engine)
        self.engine = engine
        self.log: AuditLog = SimulatedAuditLog(self.server)
        self._scheduler = scheduler

    @property
    def _conditions(self) -> Any:
        return self.server.conditions

    def merge(self) -> None:
        for month in {part.month for part in self.server.parts}:
            self.server.merge(month)

    def expire(self) -> None:
        self.server.expire()

    def delete(self, event_id: str) -> None:
        self.server.mutate(lambda entry: None if entry.key[3] == event_id else entry)

    def erase(self, workspace_id: str) -> None:
        self.server.mutate(lambda entry: None if entry.key[0] == workspace_id else entry)

    def alter(self, before: bytes, after: bytes) -> None:
        def changed(entry: StoredEntry) -> StoredEntry | None:
            was = read_entry(before, entry.inserted_at_ms)
            return read_entry(after, entry.inserted_at_ms) if entry == was else entry

        self.server.mutate(changed)

    def drop_partition(self, at_ms: int) -> None:
        self.server.drop_partition(month_of(at_ms))

    def remember(self, window: int) -> None:
        self.server.remember(window)
        self.server.redefine()

    def keep(self, days: int | None, *, by: str = "inserted_at", workspace_id: str = "") -> None:
        self.server.keeps_days, self.server.keeps_by, self.server.keeps_but = days, by, workspace_id
        self.server.redefine()

    def constrain(self, most_time: int | None) -> None:
        self._conditions.table_refuses = lambda entry: most_time is not None and entry.key[2] >= most_time
        self.server.redefine()

    def view(self, kind: str) -> None:
        bad = {read_entry(one, 0).fingerprint for one in BAD}  # type: ignore[union-attr]
        self._conditions.view_fails = lambda entry: kind == "fails" and entry.fingerprint in bad
        self._conditions.view_s = lambda: 3.0 if kind == "slow" else 0.0
        self._conditions.view_lacks_target = kind == "target"

    def be_slow(self, slow: bool) -> None:
        self._conditions.insert_s = lambda: 3.0 if slow else 0.05
        self.server.redefine()

    def starve(self, starve: bool) -> None:
        self._conditions.most_rows = 0 if starve else 2**63

    def limit_parts(self, most: int) -> None:
        self._conditions.most_parts = most

    def answer_instead(self, status: int, *, passes_on: bool) -> None:
        self._conditions.proxy_answers = lambda: status
        self._conditions.passes_on = passes_on

    def lose_answers(self, *, passes_on: bool) -> None:
        self._conditions.dies = lambda: not passes_on
        self._conditions.answer_lost = lambda: passes_on

    def hold_back(self) -> None:
        self._conditions.arrives_after_s = lambda: self.HELD_BACK_S

    def let_go(self) -> None:
        self._scheduler.sleep(self.HELD_BACK_S)

    def recover(self) -> None:
        conditions = self._conditions
        conditions.proxy_answers, conditions.arrives_after_s = lambda: 0, lambda: 0.0
        conditions.dies = conditions.answer_lost = lambda: False

    def be_down(self, down: bool) -> None:
        self._conditions.down = down

    def pass_time(self, seconds: float) -> None:
        self._scheduler.sleep(seconds)

    def start(self, work: Callable[[], None]) -> None:
        self._scheduler.spawn("another process", work, Process("another process"))


@contextmanager
def simulated_server(engine: str, now_ms: int) -> Iterator[SimulatedServer]:
    """Its clock shows this time, at which its table is made."""
    scheduler = Scheduler(Choices(given=()))
    server = SimulatedServer(scheduler, engine)
    server.server.clock_offset_ms = now_ms - server.server.now_ms()
    server.server.redefine()
    with scheduler.taking_part("test"):
        yield server


# ── real ─────────────────────────────────────────────────────────────────────────────────────────


class RealServer:
    """A database of its own on a running server, with a proxy that can stand in front of it."""

    simulated = False

    def __init__(self, url: str, proxy: HttpProxy) -> None:
        self.engine = chosen()
        self._direct = ClickHouseAuditLog(url)
        self._proxy = proxy
        self._proxied = ClickHouseAuditLog(proxy.url)
        self._proxied.connection._listed = self._direct.connection.listed()
        port = urlsplit(url).port
        self._refused = ClickHouseAuditLog(url.replace(f":{port}/", ":1/"))
        self._refused.connection._listed = self._direct.connection.listed()
        self.log: AuditLog = self._direct
        self._gate = threading.Event()
        self._held: list[threading.Thread] = []

    def sql(self, statement: str) -> None:
        self._direct.connection.command(statement)

    def _mutate(self, statement: str) -> None:
        self.sql("SYSTEM START MERGES audit_logs_raw_v1")
        self.sql(statement)
        self.sql("SYSTEM STOP MERGES audit_logs_raw_v1")

    def merge(self) -> None:
        self._mutate("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")

    def expire(self) -> None:
        if self._direct.ttl(VERSION):  # without one the statement is an error
            self._mutate("ALTER TABLE audit_logs_raw_v1 MATERIALIZE TTL SETTINGS mutations_sync = 2")

    def delete(self, event_id: str) -> None:
        where = f"event_id = '{event_id}' SETTINGS mutations_sync = 2"
        self._mutate(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {where}")

    def erase(self, workspace_id: str) -> None:
        self._mutate(f"DELETE FROM audit_logs_raw_v1 WHERE workspace_id = '{workspace_id}'")

    def alter(self, before: bytes, after: bytes) -> None:
        was, becomes = json.loads(before), json.loads(after)
        where = f"event_id = '{was['event_id']}' AND description = '{was.get('description', '')}'"
        change = f"description = '{becomes['description']}' WHERE {where} SETTINGS mutations_sync = 2"
        self._mutate(f"ALTER TABLE audit_logs_raw_v1 UPDATE {change}")

    def drop_partition(self, at_ms: int) -> None:
        self.sql(f"ALTER TABLE audit_logs_raw_v1 DROP PARTITION {month_of(at_ms)}")

    def _set(self, **settings: object) -> None:
        values = ", ".join(f"{name} = {value}" for name, value in settings.items())
        self.sql(f"ALTER TABLE audit_logs_raw_v1 MODIFY SETTING {values}")

    def remember(self, window: int) -> None:
        self._set(non_replicated_deduplication_window=window)

    def keep(self, days: int | None, *, by: str = "inserted_at", workspace_id: str = "") -> None:
        if days is None:
            self.sql("ALTER TABLE audit_logs_raw_v1 REMOVE TTL")
            return
        where = f" DELETE WHERE workspace_id = '{workspace_id}'" if workspace_id else ""
        at = f"toDateTime(fromUnixTimestamp64Milli({by}, 'UTC')) + INTERVAL {days} DAY"
        self.sql(f"ALTER TABLE audit_logs_raw_v1 MODIFY TTL {at}{where} SETTINGS materialize_ttl_after_modify = 0")

    def constrain(self, most_time: int | None) -> None:
        self.sql(
            "ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT small"
            if most_time is None
            else f"ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT small CHECK time < {most_time}"
        )

    def view(self, kind: str) -> None:
        self.sql("DROP VIEW IF EXISTS failing_view")
        self.sql("CREATE TABLE IF NOT EXISTS numbers (n Int64) ENGINE = MergeTree ORDER BY n")
        if kind:
            fails = "throwIf(startsWith(description, 'bad'), 'no')"
            self.sql(VIEW.format({"fails": fails, "slow": "sleepEachRow(1.5)", "target": "time"}[kind]))
        if kind == "target":
            self.sql("DROP TABLE numbers")

    def be_slow(self, slow: bool) -> None:
        self.sql(
            "ALTER TABLE audit_logs_raw_v1 ADD COLUMN slow UInt8 MATERIALIZED sleepEachRow(1.5)"
            if slow
            else "ALTER TABLE audit_logs_raw_v1 MODIFY COLUMN slow UInt8 MATERIALIZED 0"
        )

    def starve(self, starve: bool) -> None:
        def habit(request: Request, forward: Forward) -> Answer:
            request.target += "&max_memory_usage=100000&max_untracked_memory=0" if _writes(request) else ""
            return forward(request)

        self._stand_in_front(habit) if starve else self.recover()

    def limit_parts(self, most: int) -> None:
        self._set(parts_to_throw_insert=min(most, 3000), parts_to_delay_insert=0)

    def _stand_in_front(self, habit: Callable[[Request, Forward], Answer]) -> None:
        self._proxy.habit = habit
        self.log = self._proxied

    def answer_instead(self, status: int, *, passes_on: bool) -> None:
        def habit(request: Request, forward: Forward) -> Answer:
            if passes_on:
                forward(request)
            return Answer(status=status)

        self._stand_in_front(habit)

    def lose_answers(self, *, passes_on: bool) -> None:
        def habit(request: Request, forward: Forward) -> Answer:
            if not passes_on:
                raise NoAnswer
            answer = forward(request)
            if _writes(request):
                raise NoAnswer
            return answer

        self._stand_in_front(habit)

    def hold_back(self) -> None:
        self._gate.clear()

        def habit(request: Request, forward: Forward) -> Answer:
            if not _writes(request):
                return forward(request)

            def later() -> None:
                self._gate.wait(60)
                forward(request)

            self._held.append(threading.Thread(target=later))
            self._held[-1].start()
            raise NoAnswer

        self._stand_in_front(habit)

    def let_go(self) -> None:
        self._gate.set()
        for thread in self._held:
            thread.join()

    def recover(self) -> None:
        self._proxy.habit = pass_on
        self.log = self._direct

    def be_down(self, down: bool) -> None:
        self.log = self._refused if down else self._direct

    def pass_time(self, seconds: float) -> None:
        end_ms = self._direct.deadline_ms(seconds)
        wait_until(lambda: self._direct.deadline_ms(0) > end_ms, what="ClickHouse's clock")

    def start(self, work: Callable[[], None]) -> None:
        threading.Thread(target=work, daemon=True).start()


def _writes(request: Request) -> bool:
    return request.statement.lstrip().startswith(b"INSERT")


@contextmanager
def real_server(clickhouse_server: str) -> Iterator[RealServer]:
    """A fresh database with the built-in table, dropped afterwards."""
    admin = ClickHouseAuditLog(clickhouse_server + "default").connection
    name = f"auditexport_contract_{os.getpid()}_{next(_names)}"
    admin.command(f"CREATE DATABASE {name}")
    url = clickhouse_server + name
    connection = ClickHouseAuditLog(url).connection
    connection._listed = admin.listed()
    table = next(iter(Layout().statements(name).values()))
    connection.command(f"{table}, {NO_MERGES}", DDL_SETTINGS)
    connection.command("SYSTEM STOP MERGES audit_logs_raw_v1")
    try:
        with HttpProxy(url) as proxy:
            yield RealServer(url, proxy)
    finally:
        connection.pool.clear()
        admin.command(f"DROP DATABASE {name}")


# ── what a test asks ─────────────────────────────────────────────────────────────────────────────


def put(
    server: ServerUnderTest,
    batch_id: int,
    at_ms: int,
    payloads: Sequence[bytes],
    *,
    generation: int = 0,
    within_s: float = 60,
    timeout_s: int = 30,
    deadline_ms: int | None = None,
) -> Refusal | None:
    """One INSERT, which empties its list of payloads whatever its end."""
    batch, block = batch_of(batch_id, at_ms, len(payloads), generation=generation)
    sent = [*payloads]
    if deadline_ms is None:
        deadline_ms = server.log.deadline_ms(within_s)
    refusal = server.log.insert(batch, block, sent, deadline_ms=deadline_ms, timeout_s=timeout_s)
    assert sent == []
    return refusal


def outcome(work: Callable[..., object], *arguments: object, **options: object) -> object:
    """What came of it, without words that only one server has: a refusal's facts, or the name of the error."""
    try:
        found = work(*arguments, **options)
    except AuditExportError as error:
        return type(error).__name__, getattr(error, "status", None)
    return facts(found) if isinstance(found, Refusal) else found


def facts(refusal: Refusal) -> Refusal:
    """A refusal without the database's name, and only whether there are a definition and a meaning."""
    view = refusal.view.rpartition(" ")[2].rpartition(".")[2] if refusal.kind == "view" else refusal.view
    gone = "with the target numbers, which does not exist" if "with the target" in refusal.view else view
    return replace(
        refusal, view=gone, definition="known" * bool(refusal.definition), meaning="known" * bool(refusal.meaning)
    )


def rows(server: ServerUnderTest, at_ms: int) -> tuple[int, int]:
    """Entries under one `inserted_at`, and those among them that equal another one."""
    held = server.log.holdings([at_ms]).get(at_ms)
    return (held.rows, held.copies) if held is not None else (0, 0)


@dataclass
class Known:
    """All payloads and times that a test uses: by them the answers of two servers are compared.

    The two hash contents each in its own way. So each hash gets the name of the first payload that has it: equal names on both
    sides are equal contents on both.
    """

    times: list[int]
    payloads: list[bytes] = field(default_factory=list)
    _names: dict[int, dict[int, str]] = field(default_factory=dict)

    def keys(self) -> list[Any]:
        return sorted({entry.key for one in self.payloads if (entry := read_entry(one, 0)) is not None})

    def answers(self, server: ServerUnderTest) -> dict[str, object]:
        """What every read method of the port says."""
        log, keys = server.log, self.keys()
        names = self._named_contents(server)
        held = log.holdings(self.times)
        entries = {at_ms: log.entries_at(at_ms) for at_ms in self.times}
        for at_ms, some in entries.items():
            whole = held.get(at_ms)
            assert (whole is None) == (not some)
            if whole is not None:
                assert whole.content == sum(entry.content for entry in some) % 2**64
                assert whole.fingerprint == sum(entry.fingerprint for entry in some) % 2**64
        if held:
            at_ms = min(held)
            (one,) = log.entries_at(at_ms, most=1)
            assert one in entries[at_ms]
        workspaces = sorted({key[0] for key in keys})
        return {
            "holdings": {at_ms: (one.rows, one.fingerprint, one.copies) for at_ms, one in sorted(held.items())},
            "entries_at": {at_ms: _named(some, names) for at_ms, some in entries.items()},
            "entries_of": _named(log.entries_of(keys), names),
            "keys_held": sorted(log.keys_held(keys[1:], self.times[1:])),
            "ids_held": sorted(log.ids_held([(key[0], key[3]) for key in keys])),
            "contents": sorted(names.values()),
            "count_by_inserted_at": list(log.count_by_inserted_at(0, NOBODY_MS).items()),
            "count_by_inserted_at without the last": log.count_by_inserted_at(min(self.times), max(self.times)),
            "count_by_workspace": log.count_by_workspace(0, NOBODY_MS),
            "named_by": [
                log.named_by(Erasure(workspace_id=workspaces[0]), NOBODY_MS),
                log.named_by(Erasure(workspace_id=workspaces[-1]), min(self.times)),
                log.named_by(
                    Erasure(workspace_id=keys[0][0], event_id=keys[0][3], from_ms=keys[0][2], to_ms=keys[0][2] + 1),
                    NOBODY_MS,
                ),
            ],
            "past_ttl": log.past_ttl(VERSION, self.times),
            "past_ttl in a month": log.past_ttl(VERSION, self.times, ahead_s=31 * 86_400),
            "past_ttl_of": {at_ms: log.past_ttl_of(VERSION, at_ms, keys) for at_ms in self.times[-1:]},
            "ttl": log.ttl(VERSION),
            "kept_ms": log.kept_ms(),
            "definition_age_s": 0 <= log.definition_age_s(VERSION) < 3600,
            "deadline_ms": 0 <= log.deadline_ms(600) - log.deadline_ms(0) - 600_000 + 5_000 <= 10_000,
            "probe": outcome(log.probe, VERSION, [*self.payloads], timeout_s=30),
        }

    def _named_contents(self, server: ServerUnderTest) -> dict[int, str]:
        """Asked once of each server, for an answer depends on nothing that the table holds."""
        names = self._names.setdefault(id(server), {})
        if not names:
            for at_ms in self.times:
                for number, content in enumerate(server.log.contents(VERSION, self.payloads, at_ms)):
                    names.setdefault(content, f"payload {number} at {at_ms}")
        return names


def _named(entries: Sequence[StoredEntry], names: dict[int, str]) -> list[object]:
    return sorted(
        (entry.key, entry.inserted_at_ms, entry.fingerprint, names.get(entry.content, "unknown")) for entry in entries
    )


# Payloads on which the failing view fails.
BAD = [payload(f"evt_{number}", description="bad") for number in range(1, 7)]
