"""More of what can happen in a simulated history: payloads that change, locks where batches are, runs that are asked to end."""

from __future__ import annotations

from typing import Any

from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_tests.simulation.actions import action
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.failovers import after_failover
from auditexport_tests.simulation.status_truth import false_status
from auditexport_tests.simulation.world import LEDGER, Run, World


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


@action(1)
def clickhouse_memory_comes_and_goes(world: World) -> None:
    """Other queries take ClickHouse's memory for moments."""
    world.clickhouse.conditions.lacks_memory = lambda: world.choices.chance(300)


@action(2)
def look_at_the_status(world: World) -> None:
    """Reads the status. If nothing was committed meanwhile, it must be true."""

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        world.violations += false_status(world, outbox)

    world.operate("status", work)


def some_rows(world: World, most: int) -> list[int]:
    """Some committed rows close to each other: of an open batch, the newest ones, or any."""
    pks = sorted(world.book.rows)
    if not pks:
        return []
    how = world.choices.below(3)
    opened = world.open_batches() if how == 1 else []
    if opened:
        of_batch = PkSet.parse(world.mysql.tables[LEDGER].rows[world.choices.one_of(opened)]["pks"])
        pks = [pk for pk in of_batch if pk in world.book.rows] or pks
    first = max(0, len(pks) - most) if how == 2 else world.choices.below(len(pks))
    return pks[first : first + 1 + world.choices.below(most)]
