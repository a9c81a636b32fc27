"""What can happen in a simulated history: one function each, with the weight by which it is chosen.

An action may find nothing to act on.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from auditexport_pipeline.core import requeue, sweep
from auditexport_pipeline.core.actions import Erasure, RowFilter
from auditexport_pipeline.core.dead_letters import DeadLetterFilter
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import StoredEntry
from auditexport_pipeline.core.settings import Retention
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.failovers import after_failover
from auditexport_tests.simulation.world import ACTOR, LETTERS, Run, World

Act = Callable[[World], None]
ACTIONS: dict[str, Act] = {}
WEIGHTED: list[str] = []


def action(weight: int) -> Callable[[Act], Act]:
    """Registers a function under its name, chosen by this weight. The first one is the plain choice."""

    def register(act: Act) -> Act:
        name = act.__name__.replace("_", " ")
        ACTIONS[name] = act
        WEIGHTED.extend([name] * weight)
        return act

    return register


@action(12)
def write(world: World) -> None:
    application = world.choices.one_of(world.applications)
    world.beside("writer", application.write)


@action(8)
def drain(world: World) -> None:
    if len(world.at_work()) < 4:
        world.drain()


@action(4)
def kill(world: World) -> None:
    if runs := world.at_work():
        world.scheduler.kill(world.choices.one_of(runs).process)


@action(3)
def pause(world: World) -> None:
    """A process stops for up to an hour, as its machine does, and goes on."""
    if runs := world.at_work():
        run = world.choices.one_of(runs)
        run.process.paused_until_s = world.scheduler.now_s + (10.0, 100.0, 3_600.0)[world.choices.below(3)]
        run.declared_dead = bool(world.choices.below(2))
        if run.declared_dead:
            world.drain()


@action(1)
def declare_dead(world: World) -> None:
    """A run at work is taken for dead."""
    if runs := world.at_work():
        world.choices.one_of(runs).declared_dead = True
        world.drain()


@action(2)
def mysql_storm(world: World) -> None:
    """Connections die, and answers to COMMIT are lost; or that is over."""
    world.storm = 0 if world.storm else (10, 50, 300)[world.choices.below(3)]


@action(3)
def clickhouse_storm(world: World) -> None:
    """Connections die, answers are lost, a proxy answers, INSERTs are slow or late, the server is killed; or that is over."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = choose.below(8)
    if how == 0:
        world.calm_clickhouse()
    elif how == 1:
        conditions.dies = lambda: choose.chance(200)
    elif how == 2:
        conditions.answer_lost = lambda: choose.chance(300)
    elif how == 3:
        statuses = (502, 504, 429)
        conditions.passes_on = bool(choose.below(2))
        conditions.proxy_waits_s = (math.inf, 1.0)[choose.below(2)]
        conditions.insert_s = lambda: (0.05, 30.0)[choose.below(2)]
        conditions.proxy_answers = lambda: choose.one_of(statuses) if choose.chance(200) else 0
    elif how == 4:
        conditions.insert_s = lambda: (0.05, 1.0, 30.0, 170.0)[choose.below(4)]
    elif how == 5:
        conditions.arrives_after_s = lambda: (0.0, 0.0, 5.0, 100.0, 400.0)[choose.below(5)]
    elif how == 6:
        world.clickhouse.crash()
    else:
        conditions.down = not conditions.down


@action(2)
def clickhouse_limits(world: World) -> None:
    """A limit of rows, bytes or memory for one INSERT, or a view that fails, is slow or has no target; or none."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = choose.below(7)
    conditions.most_rows, conditions.most_bytes = 2**63, 2**63
    conditions.view_fails, conditions.view_s, conditions.view_lacks_target = lambda entry: False, lambda: 0.0, False
    if how == 1:
        conditions.most_rows = 1 + choose.below(3)
    elif how == 2:
        conditions.most_bytes = 400
    elif how == 3:
        odd = choose.below(5)
        conditions.view_fails = lambda entry: entry.key[2] % 5 == odd
        conditions.view_fails_first = lambda: bool(choose.below(2))
    elif how == 4:
        conditions.view_s = lambda: (0.0, 170.0)[choose.below(2)]
    elif how == 5:
        conditions.view_lacks_target = True
    elif how == 6:
        conditions.most_rows = 0


@action(1)
def mysql_goes_down(world: World) -> None:
    """Every connection dies, and for a while there is no other; or that is over."""
    world.mysql.down = not world.mysql.down
    if world.mysql.down:
        world.mysql.fail_over()


@action(1)
def mysql_fails_over(world: World) -> None:
    """Another server takes over; one time in four it has not got the last commits."""
    lost = 1 + world.choices.below(20) if world.choices.below(4) == 3 else 0
    world.forgot = world.forgot or lost > 0
    world.mysql.fail_over(lost)
    if lost:
        world.failovers += 1
        world.forgot_s = world.scheduler.now_s
        after_failover(world)


@action(1)
def pks_begin_again(world: World) -> None:
    """The application empties its table, which counts from 1 again. TRUNCATE waits for every transaction on the table."""
    # What is gone from both cannot be repaired, and an event that is written again under its old pk is taken for a requeue.
    if not world.mysql.in_use(OUTBOX) and not world.gone["lost"] and not world.repeats:
        world.book.begin_again({pk: row["deleted_at"] for pk, row in world.mysql.tables[OUTBOX].rows.items()})
        world.mysql.truncate(OUTBOX)


@action(1)
def clickhouse_loses_entries(world: World) -> None:
    """Entries are gone whose rows are marked in the outbox: nothing else could name them."""
    marked = _marked_events(world)
    entries = [entry for entry in world.clickhouse.entries() if entry.key[3] in marked]
    if entries and not world.swept:
        first = world.choices.below(len(entries))
        _remove(world, "lost", entries[first : first + 1 + world.choices.below(3)])


@action(1)
def erase(world: World) -> None:
    """An erasure of one event, recorded first.

    Of an event whose row is marked, and whose batch is not open: until then its row can be exported again.
    """
    marked = set() if world.open_batches() else _marked_events(world)
    entries = [entry for entry in world.clickhouse.entries() if entry.key[3] in marked]
    if not entries:
        return
    workspace_id, _, _, event_id = world.choices.one_of(entries).key

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        world.erasures.add((workspace_id, event_id))
        upkeep.add_erasures(ACTOR, [Erasure(workspace_id=workspace_id, event_id=event_id)])
        named = [one for one in world.clickhouse.entries() if (one.key[0], one.key[3]) == (workspace_id, event_id)]
        _remove(world, "erased", named)

    world.operate("erase", work)


@action(1)
def months_pass(world: World) -> None:
    """Days or months in which nobody works, and the table's TTL.

    Not while a batch is open: of entries that have expired since, no run can know that they were there.
    """
    if world.open_batches():
        return
    world.scheduler.sleep((1, 40, 100)[world.choices.below(3)] * 86_400.0)
    if world.choices.below(2):
        world.clickhouse.expire()


def _marked_events(world: World) -> set[str]:
    """Events all of whose rows are marked."""
    rows = world.mysql.tables[OUTBOX].rows.values()
    pending = {row["event_id"] for row in rows if row["deleted_at"] is None}
    return {row["event_id"] for row in rows} - pending


def _remove(world: World, why: str, entries: Sequence[StoredEntry]) -> None:
    removed = set(map(id, entries))
    world.gone[why] += entries
    world.clickhouse.mutate(lambda entry: None if id(entry) in removed else entry)


@action(1)
def clickhouse_merges(world: World) -> None:
    if world.clickhouse.parts:
        world.clickhouse.merge(world.choices.one_of(world.clickhouse.parts).month)


@action(1)
def clocks_step(world: World) -> None:
    """One of the two clocks is set forward, or back."""
    step_ms = (1_000, 60_000, -1_000, -60_000)[world.choices.below(4)]
    if world.choices.below(2):
        world.clickhouse.clock_offset_ms += step_ms
    else:
        world.mysql.clock_offset_ms += step_ms


@action(2)
def meddle(world: World) -> None:
    """Other hands delete rows, mark them, or clear their marks."""
    pks = _some(world, 4)
    what = world.choices.one_of(("delete", "mark", "clear"))
    if pks and not (what == "delete" and world.gone["lost"]):  # what is gone from both cannot be repaired
        application = world.choices.one_of(world.applications)
        world.beside("other hands", lambda: application.meddle(pks, what))


@action(2)
def hold_rows(world: World) -> None:
    """The application locks rows, from high to low, and rests."""
    pks = _some(world, 3)
    seconds = (0.5, 3.0, 30.0)[world.choices.below(3)]
    if pks:
        world.beside("holder", lambda: world.applications[0].hold(pks, seconds))


@action(2)
def requeue_rows(world: World) -> None:
    pks = _some(world, 3)
    if not pks:
        return
    missing_only = world.choices.chance(300)
    low, high = min(pks), max(pks)
    world.book.expect_requeue(1, lambda pk, row: low <= pk <= high)

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        which = RowFilter(from_pk=low, to_pk=high)
        run.result = requeue.requeue(outbox, upkeep, log, which, ACTOR, missing_only=missing_only)

    world.operate("requeue", work)


@action(1)
def retry_letters(world: World) -> None:
    _on_letters(world, dead_letters.retry)


@action(1)
def discard_letters(world: World) -> None:
    _on_letters(world, dead_letters.discard)


def _on_letters(world: World, verb: Callable[..., Any]) -> None:
    pks = sorted(world.mysql.tables[LETTERS].rows)
    if pks:

        def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
            run.result = verb(outbox, DeadLetterFilter(state=None, pks=PkSet.of(pks)), ACTOR)

        world.operate(verb.__name__, work)


@action(1)
def reconcile_all(world: World) -> None:
    repair = bool(world.choices.below(2))
    if repair:
        world.book.expect_requeue(1, lambda pk, row: True)
    world.reconcile(repair=repair)


@action(1)
def sweep_rows(world: World) -> None:
    """Deletes rows that were exported a minute ago."""
    if world.repeats or world.gone["lost"]:
        return
    world.swept = True

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        run.result = sweep.sweep(outbox, upkeep, log, Retention(outbox_days=1 / 1440, chunk_rows=3), ACTOR)

    world.operate("sweep", work)


def _some(world: World, most: int) -> list[int]:
    """Some rows that are committed, close to each other."""
    pks = sorted(world.book.rows)
    if not pks:
        return []
    first = world.choices.below(len(pks))
    return pks[first : first + 1 + world.choices.below(most)]
