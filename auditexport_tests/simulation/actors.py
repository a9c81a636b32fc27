"""More of what can happen in a simulated history: payloads that change, locks where batches are, runs that are asked to end."""

from __future__ import annotations

from typing import Any

from auditexport_pipeline.core import requeue
from auditexport_pipeline.core.actions import RowFilter
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_tests.simulation.actions import action, after, entries_that_can_be_lost, remove, some_rows
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.failovers import after_failover
from auditexport_tests.simulation.status_truth import false_status
from auditexport_tests.simulation.world import ACTOR, Run, World, names


@action(2)
def change_payloads(world: World) -> None:
    """The application changes payloads of pending, claimed, sealed or exported rows."""
    if (pks := some_rows(world, 4)) and not world.gone["lost"]:
        application = world.choices.one_of(world.applications)
        world.beside("changer", lambda: application.change(pks))


@action(2)
def lock_rows_of_a_batch(world: World) -> None:
    """One transaction of the application rests on a lock, and another one soon wants the row beside it; a run may begin."""
    pks = some_rows(world, 6)
    if len(pks) < 2:
        return
    rests_s = (3.0, 0.8, 10.0)[world.choices.below(3)]
    after_s = (0.3, 0.1, 1.0)[world.choices.below(3)]
    first, second = world.applications[0], world.applications[1]

    def wait_and_change() -> None:
        world.scheduler.sleep(after_s)
        if not world.gone["lost"]:
            second.change(pks[:-1])

    world.beside("holder", lambda: first.hold(pks[-1:], rests_s))
    world.beside("changer", wait_and_change)
    if world.choices.below(2) and len(world.at_work()) < 4:
        world.drain()


@action(2)
def trickle(world: World) -> None:
    """A run stays, and an application goes on writing: its batches follow each other, and share commits."""
    if len(world.at_work()) >= 4:
        return
    application = world.choices.one_of(world.applications)
    pauses_s = [(0.6, 0.1, 3.0)[world.choices.below(3)] for _ in range(3 + world.choices.below(4))]

    def go_on() -> None:
        for pause_s in pauses_s:
            application.write()
            world.scheduler.sleep(pause_s)

    world.drain(stays=True)
    world.beside("writer", go_on)


@action(1)
def stop_a_run(world: World) -> None:
    """A run is asked to end, as by Ctrl-C."""
    if runs := [run for run in world.at_work() if run.owner.startswith("run")]:
        world.choices.one_of(runs).stopping = True


@action(1)
def mysql_splits(world: World) -> None:
    """Another server takes over, but some runs go on with the old one for a while, and read and write there."""
    if world.mysql.old is not None or world.choices.below(2) == 0:
        return
    if not world.at_work():
        world.drain()
    runs = [run.owner for run in world.at_work()]
    some = runs if world.choices.below(2) else runs[:1]
    lasts_s = (1.0, 10.0, 60.0)[world.choices.below(3)]
    world.failovers += 1
    world.happened["mysql is split"] += 1
    world.mysql.split(some, world.choices.below(5))
    after_failover(world)

    def end() -> None:
        world.scheduler.sleep(lasts_s)
        world.mysql.end_split()
        world.forgot_s = world.scheduler.now_s

    world.beside("old server", end)


@action(2)
def changes_beside_a_late_insert(world: World) -> None:
    """A run dies right after it has sent an INSERT, which arrives late; the application changes rows of its batch, and runs go on."""
    if world.gone["lost"] or not (runs := world.at_work()):
        return
    run, application = world.choices.one_of(runs), world.choices.one_of(world.applications)
    late_s = (30.0, 3.0, 100.0, 400.0)[world.choices.below(4)]
    again_s = (0.1, 5.0, 40.0)[world.choices.below(3)]

    def go_on() -> None:
        for _ in range(2):
            world.drain()
            world.scheduler.sleep(again_s)

    def act() -> None:
        world.clickhouse.conditions.arrives_after_s = lambda: late_s
        world.scheduler.kill(run.process)
        if pks := sorted(world.rows_in_work() & world.book.rows.keys()):
            world.beside("changer", lambda: application.change(pks[-2:]))
        world.beside("runs", go_on)

    after(world, run, "INSERT", act)


@action(1)
def backlog(world: World) -> None:
    """Some dozens of rows are pending, and ClickHouse is slow, when a run begins."""
    for _ in range(6):
        application = world.choices.one_of(world.applications)
        application.write()
    world.clickhouse.conditions.insert_s = lambda: 1.0
    world.drain()


@action(1)
def requeue_under_a_limit(world: World) -> None:
    """Requeues all rows, while ClickHouse takes few bytes, and a run begins."""

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        run.result = requeue.requeue(outbox, upkeep, log, RowFilter(from_pk=0), ACTOR)
        world.clickhouse.conditions.most_bytes = 400
        world.drain()

    world.operate("requeue", work)


@action(2)
def an_erased_event_returns_and_is_lost(world: World) -> None:
    """What an erasure named is requeued and exported again; ClickHouse loses it, and a reconciliation looks."""
    erasures = world.erasures()
    if not erasures:
        return
    erasure = world.choices.one_of(erasures)

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        which = RowFilter(workspace_id=erasure.workspace_id)
        run.result = requeue.requeue(outbox, upkeep, log, which, ACTOR)
        last = world.drain()
        world.scheduler.wait(lambda: last.ended or last.process.dead, 600.0)
        entries = [entry for entry in entries_that_can_be_lost(world) if names(erasure, entry.key)]
        if entries and not world.others_at_work:
            remove(world, "lost", entries[:1])
            world.reconcile(repair=bool(world.choices.below(2)))

    world.operate("requeue", work)


@action(2)
def look_at_the_status(world: World) -> None:
    """Reads the status. If nothing was committed meanwhile, it must be true."""

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        world.violations += false_status(world, outbox)

    world.operate("status", work)
