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
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.failovers import after_failover
from auditexport_tests.simulation.world import ACTOR, LEDGER, LETTERS, Run, World, names

Act = Callable[[World], None]
ACTIONS: dict[str, Act] = {}
WEIGHTS: dict[str, int] = {}
# By what a history multiplies the weight of an action. The plain choice comes first.
SWARM = (1, 1, 0, 4)
EFFECTS = ("INSERT", "sealed", "written", "exported", "claimed")


def weighted(choices: Choices) -> list[str]:
    """The names of all actions, each as often as one history may choose it.

    Histories differ: some have many of an action, others none of it (Groce et al., "Swarm Testing"). With the same weights
    everywhere, what takes four kills in one minute or two weeks of quiet would never be seen.
    """
    factors = {name: choices.one_of(SWARM) for name in WEIGHTS} | {"write": 1, "drain": 1}
    return [name for name, weight in WEIGHTS.items() for _ in range(weight * factors[name])]


def action(weight: int) -> Callable[[Act], Act]:
    """Registers a function under its name, chosen by this weight. The first one is the plain choice."""

    def register(act: Act) -> Act:
        name = act.__name__.replace("_", " ")
        ACTIONS[name] = act
        WEIGHTS[name] = weight
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
    """At once, or after one of its next effects."""
    if runs := world.at_work():
        run = world.choices.one_of(runs)
        _at_once_or_later(world, run, lambda: world.scheduler.kill(run.process))


@action(3)
def run_in_steps(world: World) -> None:
    """A run whose steps are processes of their own, as Dagster starts them."""
    if len(world.at_work()) < 4:
        world.run_in_steps()


@action(3)
def pause(world: World) -> None:
    """A process stops for up to an hour, as its machine does, and goes on."""
    if runs := world.at_work():
        run = world.choices.one_of(runs)
        seconds = (100.0, 0.05, 0.3, 3.0, 3_600.0)[world.choices.below(5)]
        declared_dead = bool(world.choices.below(2))

        def stop() -> None:
            run.process.paused_until_s = world.scheduler.now_s + seconds
            run.declared_dead = declared_dead
            if declared_dead:
                world.drain()

        _at_once_or_later(world, run, stop)


def _at_once_or_later(world: World, run: Run, act: Callable[[], object]) -> None:
    """Half of the time after the run's next commit to the ledger that leaves a batch in a chosen state, or its next INSERT."""
    if world.choices.below(2):
        after(world, run, world.choices.one_of(EFFECTS), act)
    else:
        act()


def after(world: World, run: Run, effect: str, act: Callable[[], object]) -> None:
    """Acts right after the run's next effect of this kind."""
    world.invariants.armed.append((run.owner, effect, act))


def _at_any_time(world: World, what: str, act: Callable[[], None]) -> None:
    """At once, or as `_at_once_or_later`, by a process of its own."""
    runs = world.at_work()
    if runs:
        _at_once_or_later(world, world.choices.one_of(runs), lambda: world.beside(what, act))
    else:
        act()


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
    """Connections die, answers are lost, INSERTs are slow or late, the server is killed; or that is over."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = choose.below(7)
    if how == 0:
        world.calm_clickhouse()
    elif how == 1:
        conditions.dies = lambda: choose.chance(200)
    elif how == 2:
        conditions.answer_lost = lambda: choose.chance(300)
    elif how == 3:
        conditions.insert_s = lambda: (0.05, 1.0, 30.0, 170.0)[choose.below(4)]
    elif how == 4:
        conditions.arrives_after_s = lambda: (0.0, 0.0, 5.0, 100.0, 400.0)[choose.below(5)]
    elif how == 5:
        world.clickhouse.crash()
    else:
        conditions.down = not conditions.down


@action(2)
def proxy(world: World) -> None:
    """Something in front of ClickHouse answers some requests itself, and perhaps passes them on; or it is impatient; or that is over."""
    choose, conditions = world.choices, world.clickhouse.conditions
    status, often = choose.one_of((0, 502, 504, 504, 429)), (200, 800)[choose.below(2)]
    conditions.passes_on = bool(choose.below(2))
    conditions.proxy_waits_s = (math.inf, 1.0)[choose.below(2)]
    conditions.insert_s = (lambda: 0.05, lambda: (0.05, 30.0)[choose.below(2)])[choose.below(2)]
    conditions.proxy_answers = lambda: status if choose.chance(often) else 0
    conditions.proxy_patience_s = (math.inf, 1.0, 20.0)[choose.below(3)]
    if conditions.proxy_patience_s < math.inf:
        conditions.proxy_answers = lambda: 0


@action(3)
def clickhouse_limits(world: World) -> None:
    """A limit of rows, bytes or memory for one INSERT, or a view that fails, is slow or has no target; or none."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = min(choose.below(9), 7)
    conditions.most_rows, conditions.most_bytes, conditions.lacks_memory = 2**63, 2**63, lambda: False
    conditions.view_fails, conditions.view_s, conditions.view_lacks_target = lambda entry: False, lambda: 0.0, False
    world.forgetful = world.forgetful or how in (3, 4, 5)
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
    elif how == 7:
        conditions.lacks_memory = lambda: choose.chance(300)


@action(1)
def mysql_goes_down(world: World) -> None:
    """Every connection dies, and for a while there is no other; or that is over."""
    world.mysql.down = not world.mysql.down
    if world.mysql.down:
        world.mysql.fail_over()


@action(2)
def mysql_fails_over(world: World) -> None:
    """Another server takes over. It may lack the last commits, or just those of a run that has claimed rows."""
    choose = world.choices
    how = choose.below(4)
    if how == 3 and len(world.at_work()) < 4:
        choose.one_of(world.applications).write()
        run, lost = world.drain(), 1 + choose.below(3)

        def lose_the_claim() -> None:
            run.process.paused_until_s = world.scheduler.now_s + 0.02  # so that no statement of its dies
            world.beside("failover", lambda: _fail_over(world, lost))

        after(world, run, "claimed", lose_the_claim)
    else:
        lost = 1 + choose.below(20) if how == 2 else 0
        _at_any_time(world, "failover", lambda: _fail_over(world, lost))


def _fail_over(world: World, lost: int) -> None:
    world.mysql.fail_over(lost)
    if lost:
        world.failovers += 1
        world.forgot_s = world.scheduler.now_s
        after_failover(world)
        world.drain()
        _rest(world)


def _rest(world: World) -> None:
    """What was at work waits, each run for so long: for a dead connection to be given up, or behind a TRUNCATE's lock."""
    for run in world.at_work()[:-1]:
        seconds = (0.03, 0.0, 0.1, 20.0)[world.choices.below(4)]
        run.process.paused_until_s = max(run.process.paused_until_s, world.scheduler.now_s + seconds)


@action(1)
def pks_begin_again(world: World) -> None:
    """The application empties its table, which counts from 1 again, and goes on."""
    runs = world.at_work()
    if runs and world.choices.below(2):  # between its INSERTs and its marks
        run = world.choices.one_of(runs)
        after(world, run, "written", lambda: world.beside("TRUNCATE", lambda: _begin_again(world)))
    else:
        _at_any_time(world, "TRUNCATE", lambda: _begin_again(world))


def _begin_again(world: World) -> None:
    # It waits for every transaction on the table. What is gone from both servers cannot be repaired, and an event that is
    # written again under its old pk is taken for a requeue.
    world.scheduler.wait(lambda: not world.mysql.in_use(OUTBOX), 50.0)
    if not world.mysql.in_use(OUTBOX) and not world.gone["lost"] and not world.repeats:
        world.book.begin_again({pk: row["deleted_at"] for pk, row in world.mysql.tables[OUTBOX].rows.items()})
        world.mysql.truncate(OUTBOX)
        for application in world.applications:
            world.beside("writer", application.write)
        world.drain()
        _rest(world)


@action(2)
def clickhouse_loses_entries(world: World) -> None:
    """Entries are gone whose rows are marked in the outbox and as they were: nothing else could name them."""
    entries = entries_that_can_be_lost(world)
    how, erasures = world.choices.below(3), world.erasures()
    if how == 1:  # those that an erasure could wrongly explain: in its workspace, or sent again since
        entries = [entry for entry in entries if entry.key[0] in {one.workspace_id for one in erasures}] or entries
    elif how == 2:
        entries = [entry for entry in entries if any(names(one, entry.key) for one in erasures)] or entries
    if entries and not world.others_at_work:
        first = world.choices.below(len(entries))
        remove(world, "lost", entries[first : first + 1 + world.choices.below(3)])


def entries_that_can_be_lost(world: World) -> list[StoredEntry]:
    """Those whose loss a reconciliation can prove."""
    changed = {row.event_id for _, row in world.book.all_rows() if row.earlier}
    marked = _marked_events(world) - changed
    return [entry for entry in world.clickhouse.entries() if entry.key[3] in marked and not world.swept]


@action(3)
def erase(world: World) -> None:
    """At once, or when a run has exported a batch and dies before it has verified it."""
    runs = world.at_work()
    if runs and world.choices.below(2):
        run = world.choices.one_of(runs)

        def act() -> None:
            world.scheduler.kill(run.process)
            world.beside("eraser", lambda: _erase(world))

        after(world, run, "exported", act)
    else:
        _erase(world)


def _erase(world: World) -> None:
    """An erasure of one event, or of a workspace's events within a time, recorded first.

    Of events whose rows are marked, while no batch is open: until then a row can be exported again.
    """
    marked = set() if world.open_batches() else _marked_events(world)
    entries = list(world.clickhouse.entries())
    if not entries:
        return
    workspace_id, _, time_ms, event_id = world.choices.one_of(entries).key
    if world.choices.below(2):
        erasure = Erasure(workspace_id=workspace_id, event_id=event_id)
    else:
        earlier_ms, later_ms = world.choices.below(500), 1 + world.choices.below(500)
        erasure = Erasure(workspace_id=workspace_id, from_ms=time_ms - earlier_ms, to_ms=time_ms + later_ms)
    if not all(entry.key[3] in marked for entry in entries if names(erasure, entry.key)):
        return

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        upkeep.add_erasures(ACTOR, [erasure])
        remove(world, "erased", [one for one in world.clickhouse.entries() if names(erasure, one.key)])

    world.operate("erase", work)


@action(1)
def clickhouse_forgets_tokens(world: World) -> None:
    """More blocks were inserted than its window has; not while an INSERT of an open batch can be at work."""
    ledger = world.mysql.tables[LEDGER].rows.values()
    if max(row["inserts_until_ms"] for row in ledger) < world.clickhouse.now_ms() and not world.forgot:
        world.clickhouse.tokens.clear()
        world.forgetful = True


@action(2)
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


def remove(world: World, why: str, entries: Sequence[StoredEntry]) -> None:
    removed = set(map(id, entries))
    world.gone[why] += entries
    world.last_gone |= {entry.key: why for entry in entries}
    world.clickhouse.mutate(lambda entry: None if id(entry) in removed else entry)


@action(1)
def clickhouse_merges(world: World) -> None:
    if world.clickhouse.parts:
        world.clickhouse.merge(world.choices.one_of(world.clickhouse.parts).month)


@action(2)
def clocks_step(world: World) -> None:
    """One of the two clocks is set forward, or back."""
    step_ms = (1_000, -120_000, 60_000, -1_000, -120_000, -20)[world.choices.below(6)]
    if world.choices.below(3) == 1:  # we promise nothing where ClickHouse's is set back by more than a minute
        world.clickhouse.clock_offset_ms = max(-60_000, world.clickhouse.clock_offset_ms + step_ms)
    else:
        world.mysql.clock_offset_ms += step_ms
        world.set_back = world.set_back or step_ms < 0


@action(2)
def meddle(world: World) -> None:
    """Other hands delete rows, mark them, or clear their marks."""
    what = world.choices.one_of(("delete", "mark", "clear"))
    application = world.choices.one_of(world.applications)

    def act() -> None:
        pks = some_rows(world, 4)
        if pks and not (what == "delete" and world.gone["lost"]):  # what is gone from both cannot be repaired
            world.beside("other hands", lambda: application.meddle(pks, what))

    _at_any_time(world, "other hands", act)


@action(2)
def hold_rows(world: World) -> None:
    """The application locks rows, from high to low, and rests."""
    pks = some_rows(world, 3)
    seconds = (0.5, 3.0, 30.0)[world.choices.below(3)]
    if pks:
        world.beside("holder", lambda: world.applications[0].hold(pks, seconds))


@action(3)
def requeue_rows(world: World) -> None:
    """By pks, by workspace, by event, by batch, or those of which some are erased."""
    pks, choose = some_rows(world, 3), world.choices
    if not pks:
        return
    missing_only, how, erasures = choose.chance(300), choose.below(5), world.erasures()
    row = world.book.rows[pks[0]]
    which = RowFilter(from_pk=min(pks), to_pk=max(pks))
    if how == 1:
        which = RowFilter(workspace_id=row.workspace_id)
    elif how == 2:
        which = RowFilter(event_ids=(row.event_id,))
    elif how == 3 and (batches := sorted(key for key in world.mysql.tables[LEDGER].rows if key)):
        which = RowFilter(batch_ids=(choose.one_of(batches),))
    elif how == 4 and erasures:
        which = RowFilter(workspace_id=choose.one_of(erasures).workspace_id)

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        run.result = requeue.requeue(outbox, upkeep, log, which, ACTOR, missing_only=missing_only)

    world.operate("requeue", work)


@action(1)
def retry_letters(world: World) -> None:
    _on_letters(world, dead_letters.retry)


@action(1)
def discard_letters(world: World) -> None:
    _on_letters(world, dead_letters.discard)


def _on_letters(world: World, verb: Callable[..., Any]) -> None:
    """All letters; perhaps other hands have just deleted the row of one."""
    pks = sorted(world.mysql.tables[LETTERS].rows)
    if len(pks) > 1 and world.choices.below(2) and not world.gone["lost"]:
        world.applications[0].meddle(pks[:1], "delete")
    if pks:

        def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
            run.result = verb(outbox, DeadLetterFilter(state=None, pks=PkSet.of(pks)), ACTOR)

        world.operate(verb.__name__, work)


@action(1)
def reconcile_all(world: World) -> None:
    world.reconcile(repair=bool(world.choices.below(2)))


@action(1)
def sweep_rows(world: World) -> None:
    """Deletes rows that were exported a minute ago."""
    if world.repeats or world.gone["lost"]:
        return
    world.swept = True

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        run.result = sweep.sweep(outbox, upkeep, log, Retention(outbox_days=1 / 1440, chunk_rows=3), ACTOR)

    world.operate("sweep", work)


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
