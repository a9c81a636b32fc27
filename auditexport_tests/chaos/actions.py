"""What can happen in a history: one function each, with the weight that it is chosen by.

What belongs here: drains, faults, kills, and other people's hands. What does not: the order they come in
(`history`). A new verb of the product is one more function here.

An action may find nothing to act on; it is counted, by `World.hit`, only when it has really hit something.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any, TypeVar

import pymysql

from auditexport_pipeline.core.batch import OPEN as OPEN_STATES
from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.chaos.application import Row, connected, meddle, swap
from auditexport_tests.chaos.proxy import WIRE_KINDS, Fault, Kind, Proxy
from auditexport_tests.chaos.worker import UPKEEP_RETRIES
from auditexport_tests.chaos.world import World

Act = Callable[[World], None]
A = TypeVar("A", bound=Act)

OPEN = ", ".join(f"'{state}'" for state in OPEN_STATES)

ACTIONS: dict[str, Act] = {}
WEIGHTS: dict[str, float] = {}


def action(weight: float) -> Callable[[A], A]:
    """Enters a function under its name with spaces for underscores."""

    def enter(act: A) -> A:
        name = act.__name__.replace("_", " ")
        ACTIONS[name], WEIGHTS[name] = act, weight
        return act

    return enter


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


@action(12)
def drain(world: World) -> None:
    """A run that knows which earlier ones have ended, as Dagster would tell it."""
    if len(world.working()) < 2:
        world.start_run()


@action(3)
def concurrent_drain(world: World) -> None:
    """One more run, whatever is at work already."""
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
    """SIGKILL, at a random moment of one that works."""
    workers = world.working()
    if workers:
        world.random.choice(workers).kill()
        world.kill("run")


@action(3)
def zombie(world: World) -> None:
    """A run is stopped and declared dead; others adopt what it holds, and later it wakes."""
    if world.settles_between_runs:  # a zombie's INSERT may be under way while the window is overflowed
        return
    workers = world.working()
    if workers and len(world.zombies) < 3:
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
    """A run that works is declared dead, and another started: Dagster lost sight of it."""
    workers = world.working()
    if workers and not world.settles_between_runs:
        workers[0].declared_dead = True
        world.start_run()
        world.hit("declare dead")


@action(2)
def die_unseen(world: World) -> None:
    """SIGKILL of a run that no other is told of: its container is gone, or nobody's daemon watches it."""
    workers = [worker for worker in world.working() if worker.run.verb == "drain"]
    if workers:
        worker = world.random.choice(workers)
        worker.kill()
        worker.unseen = True
        if world.ids(
            f"SELECT batch_id FROM clickhouse_outbox_batch WHERE owner = '{worker.run.owner}' AND state IN ({OPEN})"
        ):
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
# What a view may compute of a row, and now and then cannot: codes 395, 6, 469 and 153.
FAILING = (
    "throwIf(rand() % 20 = 0)",
    "toUInt32(if(rand() % 20 = 0, event_id, '1'))",
    "if(rand() % 20 = 0, 10, 1)",
    "intDiv(1, rand() % 20)",
)
# Longer than the client waits, or shorter.
SECONDS: dict[Kind, tuple[float, float]] = {
    "stall": (0.3, 4.0),
    "late": (0.0, 2.0),
    "drip": (0.2, 4.0),
    "refuse": (0.2, 1.5),
}


def _wire(world: World, *, proxy: Callable[[World], Proxy], kind: Kind) -> None:
    if kind in ("late", "stall", "drip") and world.settles_between_runs:
        return
    low, high = SECONDS.get(kind, (0.0, 0.0))
    # In one of four the INSERT is delivered only after the lease of its run has ended.
    seconds = world.random.uniform(low, high)
    if kind == "late" and proxy(world).speaks == "http" and world.random.random() < 0.25:
        seconds += 5
    aimed = world.random.random() < 0.6
    forwarded = kind == "bad gateway" and world.random.random() < 0.5
    if not proxy(world).armed:
        proxy(world).arm(Fault(kind=kind, aimed=aimed, seconds=seconds, forwarded=forwarded))
    if kind not in ("cut", "refuse") and not world.working():
        world.start_run()


for _server, _proxy, _speaks in (
    ("clickhouse", lambda world: world.rig.to_clickhouse, "http"),
    ("mysql", lambda world: world.rig.to_mysql, "mysql"),
):
    for _kind in WIRE_KINDS[_speaks]:
        ACTIONS[f"{_server} {_kind}"] = partial(_wire, proxy=_proxy, kind=_kind)
        WEIGHTS[f"{_server} {_kind}"] = 1.5 if _server == "clickhouse" else 1.0


@action(1)
def too_large(world: World) -> None:
    """A proxy begins to refuse large INSERTs, or takes them again; half of the time it takes no more than a few rows."""
    proxy = world.rig.to_clickhouse
    if proxy.largest_insert_bytes is None:
        smallest = FAT_INSERT_BYTES if world.book.fat else SMALLEST_INSERT_BYTES
        proxy.largest_insert_bytes = world.random.choice((smallest, 4 * smallest))
        if not world.working():
            world.start_run()
    else:
        proxy.largest_insert_bytes = None


# ── inside ClickHouse ────────────────────────────────────────────────────────────────────────────


@action(1)
def memory_limit(world: World) -> None:
    """INSERTs get less memory than a block of fat events needs, and more than one of them does; or enough again."""
    proxy = world.rig.to_clickhouse
    if proxy.insert_memory_bytes is None:
        world.book.fat = True
        proxy.largest_insert_bytes = None  # it may be one that no fat event passes
        proxy.insert_memory_bytes = INSERT_MEMORY_BYTES
        if not world.working():
            world.start_run()
    elif world.has_hit("clickhouse memory limit") or world.random.random() < 0.2:
        proxy.insert_memory_bytes = None


@action(1)
def view_fails(world: World) -> None:
    """Somebody's view on the audit log fails for one row in twenty, by chance and in one of many ways, or is dropped."""
    with suppress(Exception):
        clickhouse = world.databases.clickhouse
        if clickhouse("EXISTS VIEW watching") == [(1,)]:
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
    first, *others = sorted(world.open_pks(6) or [0], reverse=True)
    if others:
        _intrude(
            world,
            f"UPDATE clickhouse_outbox SET created_at = created_at + 1 WHERE pk = {first}",
            *(f"UPDATE clickhouse_outbox SET created_at = created_at + 1 WHERE pk = {pk}" for pk in others),
        )


@action(1)
def hold_rows(world: World) -> None:
    """A transaction of the application's holds rows of an open batch, and rests, for several of our lock waits."""
    pks = world.open_pks(2)
    if not pks:
        return
    held_s = world.random.uniform(3.0, 8.0)
    among = ", ".join(map(str, pks))

    def hold() -> None:
        with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
            cursor.execute(f"SELECT pk FROM clickhouse_outbox WHERE pk IN ({among}) AND deleted_at IS NULL FOR UPDATE")
            if cursor.fetchall():
                world.pause(held_s, held_s)
                cursor.execute("SELECT pks FROM clickhouse_outbox_batch WHERE state = 'written'")
                if any(pk in PkSet.parse(row[0]) for row in cursor.fetchall() for pk in pks):
                    world.hit("hold rows")

    _beside(world, hold)


@action(1.5)
def lock_ledger(world: World) -> None:
    """Somebody's maintenance holds ledger rows, the newest first, the ledger's own lock last."""
    with suppress(Exception):
        found = world.databases.sql("SELECT batch_id FROM clickhouse_outbox_batch ORDER BY batch_id DESC LIMIT 3")
        ids = [row.batch_id for row in found] + [0]
        locks = [f"SELECT 1 FROM clickhouse_outbox_batch WHERE batch_id = {batch_id} FOR UPDATE" for batch_id in ids]
        _intrude(world, *locks)


def _intrude(world: World, *statements: str) -> None:
    """One transaction, statement by statement with pauses between, rolled back at its end; in a thread."""
    pauses = [world.random.uniform(0.0, 0.2) for _ in statements]
    held_s = world.random.choice((0.1, 0.5, 2.0))

    def intrude() -> None:
        with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
            for statement, pause in zip(statements, pauses, strict=True):
                try:
                    cursor.execute(statement)
                except pymysql.MySQLError as error:
                    if error.args[0] == 1213:
                        world.hit("deadlock")
                    return
                world.pause(pause, pause)
            world.pause(held_s, held_s)

    _beside(world, intrude)


def _beside(world: World, intrude: Callable[[], None]) -> None:
    thread = threading.Thread(target=intrude, daemon=True)
    thread.start()
    world.intruders.append(thread)
    if not world.working():
        world.start_run()


@action(1.5)
def kill_connection(world: World) -> None:
    """An administrator kills connections of the exporter."""
    ports = world.rig.to_mysql.server_side_ports()
    killed = 0
    with suppress(pymysql.MySQLError), connected(world.databases) as connection, connection.cursor() as cursor:
        cursor.execute("SELECT id, host FROM information_schema.processlist")
        for number, host in cursor.fetchall():
            if host.rpartition(":")[2].isdigit() and int(host.rpartition(":")[2]) in ports:
                with suppress(pymysql.MySQLError):
                    cursor.execute(f"KILL CONNECTION {number}")
                    killed += 1
    if killed:
        world.hit("kill connection")


# ── operators ────────────────────────────────────────────────────────────────────────────────────


@action(4)
def requeue(world: World) -> None:
    """The tool's own: of rows around one pk, of some events, of a workspace or of a batch."""
    random, book = world.random, world.book
    some = book.some(random, 5)
    batches = world.ids("SELECT batch_id FROM clickhouse_outbox_batch WHERE state IN ('exported', 'verified')")
    if not some or not batches:
        return
    wanted: dict[str, Any] = {"missing_only": True} if random.random() < 0.3 else {}
    meant: Callable[[int, Row], bool]
    how = random.choice(("pks", "events", "workspace", "batch"))
    if how == "pks":
        low, high = some[0] - 20, some[0] + 20
        wanted |= {"from_pk": low, "to_pk": high}
        meant = lambda pk, row: low <= pk <= high  # noqa: E731
    elif how == "events":
        ids = {book.rows[pk].event_id for pk in some}
        wanted["event_ids"] = tuple(sorted(ids))
        meant = lambda pk, row: row.event_id in ids  # noqa: E731
    elif how == "workspace":
        workspace_id = book.rows[some[0]].workspace_id
        wanted |= {"workspace_id": workspace_id, "from_pk": some[0] - 100, "to_pk": some[0]}
        meant = lambda pk, row: row.workspace_id == workspace_id and some[0] - 100 <= pk <= some[0]  # noqa: E731
    else:
        batch_id = random.choice(batches)
        (batch,) = world.databases.outbox.batches([batch_id]) or (None,)
        if batch is None:
            return
        wanted["batch_ids"] = (batch_id,)
        meant = lambda pk, row: pk in batch.pks  # noqa: E731
    book.ask_again(UPKEEP_RETRIES + 1, meant)
    world.start_upkeep("requeue", **wanted)


@action(3)
def sweep(world: World) -> None:
    """With a retention of no time, or of seconds: rows go that other verbs are about at this moment."""
    world.swept = True
    world.start_upkeep("sweep", days=world.random.choice((0.0, 0.0, 2 / 86_400)))


@action(1.5)
def reconcile(world: World) -> None:
    world.start_upkeep("reconcile")


@action(1)
def retry_letters(world: World) -> None:
    """Nothing was mended: they come back."""
    pks = world.ids("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state IN ('open', 'discarded')")
    if pks:
        world.start_upkeep("retry letters", pks=sorted(world.random.sample(pks, min(5, len(pks)))))


@action(0.5)
def discard_letters(world: World) -> None:
    pks = world.ids("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state = 'open'")
    if pks:
        world.start_upkeep("discard letters", pks=sorted(world.random.sample(pks, min(3, len(pks)))))


# ── other people's hands ─────────────────────────────────────────────────────────────────────────


@action(1.5)
def delete_rows(world: World) -> None:
    """Rows vanish between claim and mark."""
    if meddle(world.databases, world.book, world.known(world.open_pks(3)), "delete"):
        world.hit("delete rows")


@action(1.5)
def mark_rows(world: World) -> None:
    """Rows are marked by somebody else between claim and mark."""
    if meddle(world.databases, world.book, world.known(world.open_pks(3)), "mark"):
        world.hit("mark rows")


@action(1.5)
def requeue_by_hand(world: World) -> None:
    """Marks are taken off in SQL, of rows exported long ago or being marked at this moment."""
    pks = world.known(world.open_pks(5)) if world.random.random() < 0.3 else world.book.some(world.random, 20)
    if meddle(world.databases, world.book, pks, "clear"):
        world.hit("requeue by hand")


@action(0.5)
def swap_the_outbox(world: World) -> None:
    """The table is renamed away, truncated, or emptied and counted from 1 again; its writers go on at once."""
    for worker in world.working():
        if worker.run.verb != "drain":  # asked for rows of the old table
            worker.kill()
    if swap(world.databases, world.book, world.writers, world.random.choice(("rename", "truncate", "delete"))):
        world.hit("swap the outbox")


# Entries live for 90 days: with MySQL's clock further ahead they would have expired as soon as they arrive.
FURTHEST_AHEAD_S = 40 * 86_400


# ── clocks ───────────────────────────────────────────────────────────────────────────────────────


@action(1)
def clock_steps_back(world: World) -> None:
    """MySQL's clock is set back, by seconds or by months. A step of hours can delay a stopped batch as long."""
    if world.clock_offset_s:
        world.step_clock(-world.random.choice((2.0, 20.0, 5_000_000.0)))
        world.hit("clock steps back")


@action(1)
def month_changes(world: World) -> None:
    """A batch is claimed in one month and reaches ClickHouse in the next; its hits are read from the ledger."""
    left_s = world.month_end_in_s()
    if left_s > 10 and 0 < world.clock_offset_s < FURTHEST_AHEAD_S:
        world.step_clock(left_s - 3)
        left_s = world.month_end_in_s()
    if 0 < left_s < 10:
        if not world.working():
            world.start_run()
        world.rig.to_clickhouse.arm(Fault(kind="refuse", seconds=left_s + 0.5))
        world.pause(left_s, left_s)
