"""What can happen in a history: one function each, with the weight by which it is chosen.

An action may find nothing to act on. `World.hit` counts it only when it has really hit something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import pymysql

from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.chaos.application import Row, connected, meddle, swap
from auditexport_tests.chaos.proxy import WIRE_KINDS, Fault, Kind, Proxy
from auditexport_tests.chaos.worker import OPERATOR_RETRIES
from auditexport_tests.chaos.world import OPEN_STATES, World

Act = Callable[[World], None]
A = TypeVar("A", bound=Act)

ACTIONS: dict[str, Act] = {}
WEIGHTS: dict[str, float] = {}


def action(weight: float) -> Callable[[A], A]:
    """Registers a function under its name, with spaces for underscores."""

    def register(act: A) -> A:
        name = act.__name__.replace("_", " ")
        ACTIONS[name], WEIGHTS[name] = act, weight
        return act

    return register


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


@action(12)
def drain(world: World) -> None:
    if len(world.working()) < 2:
        world.start_run()


@action(3)
def concurrent_drain(world: World) -> None:
    """One more run beside those at work."""
    if len(world.working()) < 4:
        world.start_run()
        if len(world.working()) > 1:
            world.hit("concurrent drain")


@action(6)
def wait_for_a_run(world: World) -> None:
    for worker in world.working()[:1]:
        worker.wait(5)


@action(5)
def kill_run(world: World) -> None:
    """SIGKILL at a random moment."""
    if workers := world.working():
        world.random.choice(workers).kill()
        world.kill("run")


@action(3)
def zombie(world: World) -> None:
    """A run is stopped and declared dead; others adopt its batches, and later it wakes."""
    workers = world.working()
    if workers and len(world.zombies) < 3 and not world.overflow:
        worker = world.random.choice(workers)
        worker.stop()
        worker.declared_dead = True
        world.zombies.append(worker)
        world.start_run()


@action(3)
def wake(world: World) -> None:
    if world.zombies:
        worker = world.zombies.pop(world.random.randrange(len(world.zombies)))
        if worker.alive:
            worker.wake()
            world.hit("zombie")


@action(1)
def declare_dead(world: World) -> None:
    """A run at work is declared dead, and another started: Dagster lost its connection to it."""
    workers = world.working()
    if workers and not world.overflow:
        workers[0].declared_dead = True
        world.start_run()
        world.hit("declare dead")


@action(2)
def die_unseen(world: World) -> None:
    """SIGKILL of a run, and no other run knows: its container is gone, or no daemon monitors it."""
    workers = [worker for worker in world.working() if worker.run.verb == "drain"]
    if workers:
        worker = world.random.choice(workers)
        worker.kill()
        worker.unseen = True
        owned = f"owner = '{worker.run.owner}' AND state IN ({OPEN_STATES})"
        if world.ids(f"SELECT batch_id FROM clickhouse_outbox_batch WHERE {owned}"):
            world.kill("run unseen")


# ── servers ──────────────────────────────────────────────────────────────────────────────────────


@action(1.5)
def kill_mysql(world: World) -> None:
    world.rig.mysql.kill()
    world.kill("mysql")
    world.pause(0.0, 1.0)
    world.rig.mysql.start()


@action(1.5)
def kill_clickhouse(world: World) -> None:
    world.rig.clickhouse.kill()
    world.kill("clickhouse")
    world.pause(0.0, 1.0)
    world.rig.clickhouse.start()


# ── the wire ─────────────────────────────────────────────────────────────────────────────────────

# Two or three usual events with the statement before them: one event always fits.
SMALLEST_INSERT_BYTES = 12_000
FAT_INSERT_BYTES = 1_500_000
# An INSERT of up to five fat events takes less than 16 MB, of ten 26 MB, of twenty 60 MB (measured on the embedded 26.9).
INSERT_MEMORY_BYTES = 20 * 1024**2
# What a view computes of a row, and sometimes cannot: codes 395, 6, 469 and 153.
FAILING = (
    "throwIf(rand() % 20 = 0)",
    "toUInt32(if(rand() % 20 = 0, event_id, '1'))",
    "if(rand() % 20 = 0, 10, 1)",
    "intDiv(1, rand() % 20)",
)
# Some are longer than the client waits, some shorter.
SECONDS: dict[Kind, tuple[float, float]] = {
    "stall": (0.3, 4.0),
    "late": (0.0, 2.0),
    "drip": (0.2, 4.0),
    "refuse": (0.2, 1.5),
}


def _wire(world: World, *, proxy: Callable[[World], Proxy], kind: Kind) -> None:
    if kind in ("late", "stall", "drip") and world.overflow:
        return
    random, target = world.random, proxy(world)
    seconds = random.uniform(*SECONDS.get(kind, (0.0, 0.0)))
    # One in four INSERTs is delivered only after the lease of its run has ended.
    if kind == "late" and target.speaks == "http" and random.random() < 0.25:
        seconds += 5
    fault = Fault(kind=kind, aimed=random.random() < 0.6, seconds=seconds, forwarded=random.random() < 0.5)
    if not target.armed:
        target.arm(fault)
    if kind not in ("cut", "refuse"):
        world.ensure_run()


for _server, _proxy, _speaks, _weight in (
    ("clickhouse", lambda world: world.rig.to_clickhouse, "http", 1.5),
    ("mysql", lambda world: world.rig.to_mysql, "mysql", 1.0),
):
    for _kind in WIRE_KINDS[_speaks]:
        ACTIONS[f"{_server} {_kind}"] = partial(_wire, proxy=_proxy, kind=_kind)
        WEIGHTS[f"{_server} {_kind}"] = _weight


@action(1)
def too_large(world: World) -> None:
    """A proxy begins to refuse large INSERTs, or stops; half of the time it takes no more than a few rows."""
    proxy = world.rig.to_clickhouse
    if proxy.largest_insert_bytes is None:
        smallest = FAT_INSERT_BYTES if world.book.fat else SMALLEST_INSERT_BYTES
        proxy.largest_insert_bytes = world.random.choice((smallest, 4 * smallest))
        world.ensure_run()
    else:
        proxy.largest_insert_bytes = None


# ── inside ClickHouse ────────────────────────────────────────────────────────────────────────────


@action(1)
def memory_limit(world: World) -> None:
    """INSERTs get less memory than a block of fat events needs, and more than one event does; or enough again."""
    proxy = world.rig.to_clickhouse
    if proxy.insert_memory_bytes is None:
        world.book.fat = True
        proxy.largest_insert_bytes = None  # no fat event may pass it
        proxy.insert_memory_bytes = INSERT_MEMORY_BYTES
        world.ensure_run()
    elif world.has_hit("clickhouse memory limit") or world.random.random() < 0.2:
        proxy.insert_memory_bytes = None


@action(1)
def view_fails(world: World) -> None:
    """A view on the audit log fails for one row in twenty, in one of several ways; or the view is dropped."""
    with suppress(Exception):
        clickhouse = world.direct.log.client().command
        if clickhouse("EXISTS VIEW watching"):
            clickhouse("DROP VIEW watching")
            return
        clickhouse(
            "CREATE TABLE IF NOT EXISTS watched (event_id String, n UInt32, CONSTRAINT small CHECK n < 9) "
            "ENGINE = MergeTree ORDER BY event_id"
        )
        fails = world.random.choice(FAILING)
        clickhouse(
            f"CREATE MATERIALIZED VIEW watching TO watched AS SELECT event_id, {fails} AS n FROM audit_logs_raw_v1"
        )


# ── inside MySQL ─────────────────────────────────────────────────────────────────────────────────


@action(1.5)
def lock_rows(world: World) -> None:
    """The application locks rows that are about to be marked, from high to low, some for longer than we wait."""
    pks = sorted(world.open_pks(6), reverse=True)
    if len(pks) > 1:
        _lock(world, [f"UPDATE clickhouse_outbox SET created_at = created_at + 1 WHERE pk = {pk}" for pk in pks])


@action(1.5)
def lock_ledger(world: World) -> None:
    """Maintenance locks rows of the ledger, the newest first, and the ledger's own lock last."""
    ids = world.ids("SELECT batch_id FROM clickhouse_outbox_batch ORDER BY batch_id DESC LIMIT 3")
    _lock(
        world, [f"SELECT 1 FROM clickhouse_outbox_batch WHERE batch_id = {number} FOR UPDATE" for number in [*ids, 0]]
    )


def _lock(world: World, statements: list[str]) -> None:
    """One transaction with pauses between its statements, rolled back at its end."""
    pauses = [world.random.uniform(0.0, 0.2) for _ in statements]
    pauses[-1] += world.random.choice((0.1, 0.5, 2.0))

    def lock() -> None:
        with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
            for statement, pause in zip(statements, pauses, strict=True):
                try:
                    cursor.execute(statement)
                except pymysql.MySQLError as error:
                    if error.args[0] == 1213:
                        world.hit("deadlock")
                    return
                world.pause(pause, pause)

    _beside(world, lock)


@action(1)
def hold_rows(world: World) -> None:
    """A transaction of the application locks rows of an open batch, and rests, for several of our lock waits."""
    pks = world.open_pks(2)
    seconds = world.random.uniform(3.0, 8.0)

    def hold() -> None:
        with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
            cursor.execute("SELECT pk FROM clickhouse_outbox WHERE pk IN %s AND deleted_at IS NULL FOR UPDATE", [pks])
            if cursor.fetchall():
                world.pause(seconds, seconds)
                cursor.execute("SELECT pks FROM clickhouse_outbox_batch WHERE state = 'written'")
                if any(pk in PkSet.parse(row[0]) for row in cursor.fetchall() for pk in pks):
                    world.hit("hold rows")

    if pks:
        _beside(world, hold)


def _beside(world: World, work: Callable[[], None]) -> None:
    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    world.intruders.append(thread)
    world.ensure_run()


@action(1.5)
def kill_connection(world: World) -> None:
    """An administrator kills connections of the exporter."""
    ports = world.rig.to_mysql.server_side_ports()
    with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id, host FROM information_schema.processlist")
        for number, host in cursor.fetchall():
            port = host.rpartition(":")[2]
            if port.isdigit() and int(port) in ports:
                with suppress(pymysql.MySQLError):
                    cursor.execute(f"KILL CONNECTION {number}")
                    world.hit("kill connection")


# ── operators ────────────────────────────────────────────────────────────────────────────────────


@action(4)
def requeue(world: World) -> None:
    """By the tool: of rows around one pk, of some events, of a workspace or of a batch."""
    random, book = world.random, world.book
    some = book.some(random, 5)
    batches = world.ids("SELECT batch_id FROM clickhouse_outbox_batch WHERE state IN ('exported', 'verified')")
    if not some or not batches:
        return
    arguments: dict[str, Any] = {"missing_only": True} if random.random() < 0.3 else {}
    selects: Callable[[int, Row], bool]
    low, high = some[0] - 100, some[0]
    how = random.choice(("pks", "events", "workspace", "batch"))
    if how == "pks":
        arguments |= {"from_pk": low, "to_pk": high}
        selects = lambda pk, row: low <= pk <= high  # noqa: E731
    elif how == "events":
        ids = {book.rows[pk].event_id for pk in some}
        arguments["event_ids"] = tuple(sorted(ids))
        selects = lambda pk, row: row.event_id in ids  # noqa: E731
    elif how == "workspace":
        workspace_id = book.rows[some[0]].workspace_id
        arguments |= {"workspace_id": workspace_id, "from_pk": low, "to_pk": high}
        selects = lambda pk, row: row.workspace_id == workspace_id and low <= pk <= high  # noqa: E731
    else:
        batch_id = random.choice(batches)
        pks = {pk for batch in world.direct.outbox.batches([batch_id]) for pk in batch.pks}
        arguments["batch_ids"] = (batch_id,)
        selects = lambda pk, row: pk in pks  # noqa: E731
    book.expect_requeue(OPERATOR_RETRIES + 1, selects)
    world.operate("requeue", **arguments)


@action(3)
def sweep(world: World) -> None:
    """With a retention of no time, or of seconds: rows are deleted while other verbs work on them."""
    world.swept = True
    world.operate("sweep", days=world.random.choice((0.0, 0.0, 2 / 86_400)))


@action(1.5)
def reconcile(world: World) -> None:
    world.operate("reconcile")


def _letters(world: World, verb: str, states: str) -> None:
    pks = world.ids(f"SELECT pk FROM clickhouse_outbox_dead_letter WHERE state IN ({states})")
    if pks:
        world.operate(verb, pks=sorted(world.random.sample(pks, min(5, len(pks)))))


@action(1)
def retry_letters(world: World) -> None:
    """Nothing was fixed: they become dead letters again."""
    _letters(world, "retry letters", "'open', 'discarded'")


@action(0.5)
def discard_letters(world: World) -> None:
    _letters(world, "discard letters", "'open'")


# ── other hands ──────────────────────────────────────────────────────────────────────────────────


def _meddle(world: World, what: str, pks: list[int], hit: str) -> None:
    if meddle(world.databases, world.book, pks, what):
        world.hit(hit)


@action(1.5)
def delete_rows(world: World) -> None:
    """Rows vanish between claim and mark."""
    _meddle(world, "delete", world.known(world.open_pks(3)), "delete rows")


@action(1.5)
def mark_rows(world: World) -> None:
    """Other hands mark rows between claim and mark."""
    _meddle(world, "mark", world.known(world.open_pks(3)), "mark rows")


@action(1.5)
def requeue_by_hand(world: World) -> None:
    """Marks are cleared by SQL, of rows exported long ago or being marked now."""
    pks = world.known(world.open_pks(5)) if world.random.random() < 0.3 else world.book.some(world.random, 20)
    _meddle(world, "clear", pks, "requeue by hand")


@action(0.5)
def swap_the_outbox(world: World) -> None:
    """The table is renamed, truncated, or emptied and counted from 1 again; its writers go on at once."""
    for worker in world.working():
        if worker.run.verb != "drain":  # it works on rows of the old table
            worker.kill()
    if swap(world.databases, world.book, world.writers, world.random.choice(("rename", "truncate", "delete"))):
        world.hit("swap the outbox")


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────

# Entries live for 90 days: with MySQL's clock further ahead they would have expired as soon as they arrive.
FURTHEST_AHEAD_S = 40 * 86_400


@action(1)
def clock_steps_back(world: World) -> None:
    """MySQL's clock is set back, by seconds or by months. A step of hours can delay a stopped batch as long."""
    if world.clock_offset_s:
        world.step_clock(-world.random.choice((2.0, 20.0, 5_000_000.0)))
        world.hit("clock steps back")


@action(1)
def month_changes(world: World) -> None:
    """A batch is claimed in one month and reaches ClickHouse in the next; the ledger shows its hits."""
    left_s = world.month_end_in_s()
    if left_s > 10 and 0 < world.clock_offset_s < FURTHEST_AHEAD_S:
        world.step_clock(left_s - 3)
        left_s = world.month_end_in_s()
    if 0 < left_s < 10:
        world.ensure_run()
        world.rig.to_clickhouse.arm(Fault(kind="refuse", seconds=left_s + 0.5))
        world.pause(left_s, left_s)
