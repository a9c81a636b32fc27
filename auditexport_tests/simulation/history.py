"""One simulated history: applications, runs, operators and faults in an order that choices give; then quiet, then the oracle.

The exporter's code is the real one: `core.drain`, `core.pipeline`, the operators' verbs, and the stores for MySQL with their SQL.
Simulated are both servers, the threads and the time.
"""

from __future__ import annotations

import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from auditexport_pipeline.core import claiming, reading, reconcile, requeue, sweep, threads
from auditexport_pipeline.core.actions import Actor, Erasure, RowFilter
from auditexport_pipeline.core.batch import OPEN
from auditexport_pipeline.core.dead_letters import DeadLetterFilter
from auditexport_pipeline.core.drain import Drain, Drained, Listener
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import StoredEntry
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.sql import load
from auditexport_tests.chaos.application import Book
from auditexport_tests.chaos.check import Facts, Verdict, forgetful_attempts, verdict_of
from auditexport_tests.simulation.application import KNOWN, OUTBOX, REFUSED, Application, columns_of
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import Conditions, SimulatedClickHouse
from auditexport_tests.simulation.concurrency import SimulatedThreads
from auditexport_tests.simulation.mysql_engine import outbox_on
from auditexport_tests.simulation.mysql_server import ANSWER_LOST, DIES, SimulatedMySQL
from auditexport_tests.simulation.scheduler import Killed, Process, Scheduler, Stuck
from auditexport_tests.simulation.statements import definitions
from auditexport_tests.simulation.statements import run as statement

LEDGER, LETTERS = "clickhouse_outbox_batch", "clickhouse_outbox_dead_letter"
ACTOR = Actor(who="simulation", why="to see what happens")
# Blocks of a few rows, and chunks of a few batches.
SHORTENED: tuple[tuple[Any, str, int], ...] = (
    *((module, "SMALLEST_BLOCK_ROWS", 2) for module in (claiming, reading)),
    (claiming, "FIRST_BATCH_ROWS", 5),
    (requeue, "CHUNK_ROWS", 3),
    (sweep, "BATCHES_AT_ONCE", 2),
    (reconcile, "BATCHES_AT_ONCE", 2),
)
# How long a pause of the director, or of a process, can be.
PAUSES_S = (0.0, 0.05, 1.0, 20.0, 100.0)
# Quiet drains at the end. A batch that is stopped or split needs those after its INSERTs.
LAST_DRAINS = 20
# Simulated time within which everything that is at work ends once there are no faults.
QUIET_WITHIN_S = 7_200.0


@dataclass(eq=False)
class Run:
    """A drain or an operator's verb at work, in a process of its own."""

    owner: str
    process: Process
    ended: bool = False
    declared_dead: bool = False
    error: AuditExportError | None = None
    done: Drained | None = None
    report: reconcile.Report | None = None


@dataclass(kw_only=True)
class Outcome:
    """What a history came to."""

    choices: list[int]
    steps: int = 0
    simulated_s: float = 0.0
    happened: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    story: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        return self.verdict.violations


def play(choices: Choices, *, most_actions: int = 25) -> Outcome:
    """Plays one history to its end and judges it."""
    world = World(choices, most_actions)
    outcome = Outcome(choices=choices.taken, happened=world.happened, story=world.scheduler.story)
    with ExitStack() as shortened:
        shortened.enter_context(threads.replaced(SimulatedThreads(world.scheduler)))
        for module, name, value in SHORTENED:
            shortened.enter_context(patch.object(module, name, value))
        world.scheduler.spawn("director", world.direct, Process("director"))
        try:
            world.scheduler.run()
            outcome.verdict = world.verdict
        except Stuck as error:
            outcome.verdict.violations.append(f"stuck: {error}")
        except Exception:
            outcome.verdict.violations.append(traceback.format_exc())
    outcome.verdict.violations += world.violations
    outcome.steps, outcome.simulated_s = world.scheduler.steps, world.scheduler.now_s
    return outcome


class World:
    """The state of one history."""

    def __init__(self, choices: Choices, most_actions: int) -> None:
        self.choices = choices
        self.scheduler = Scheduler(choices)
        self.mysql = SimulatedMySQL(self.scheduler, list(definitions()), self._weather)
        self.clickhouse = SimulatedClickHouse(self.scheduler)
        self.book = Book()
        # Of a repeated event whose rows are swept, nobody can tell a merge of the two entries from the loss of one.
        self.repeats = bool(choices.below(2))
        self.applications = [
            Application(f"app{n}", self.mysql, self.book, choices, repeats=self.repeats) for n in range(2)
        ]
        self.runs: list[Run] = []
        self.others_at_work = 0
        self.happened: Counter[str] = Counter()
        self.violations: list[str] = []
        self.verdict = Verdict()
        self.storm = 0  # of MySQL's connections: so many of a thousand statements fail
        self.swept = False
        self.forgot = False  # a failover lost commits
        # Entries that were removed from ClickHouse. What merges and the TTL take, the server knows.
        self.gone: dict[str, list[StoredEntry]] = {"lost": [], "erased": []}
        self.erasures: set[tuple[str, str]] = set()  # workspace_id and event_id
        self._most_actions = most_actions
        self._calm_clickhouse()

    # ── what is at work ──────────────────────────────────────────────────────────────────────────

    def start(self, name: str, work: Callable[[Run], None]) -> Run:
        """A process of its own. Errors of the exporter's tree end it; any other is a violation."""
        run = Run(owner=f"{name} {len(self.runs)}", process=Process(f"{name} {len(self.runs)}"))
        self.runs.append(run)

        def life() -> None:
            try:
                work(run)
            except Killed:
                raise
            except AuditExportError as error:
                run.error = error
                self.happened[type(error).__name__] += 1
                self.scheduler.tell(f"ends with {type(error).__name__}: {error}")
            except Exception:
                self.violations.append(f"{run.owner} met an error outside the tree:\n{traceback.format_exc()}")
            finally:
                run.ended = True

        self.scheduler.spawn(run.process.name, life, run.process)
        return run

    def at_work(self) -> list[Run]:
        return [run for run in self.runs if not run.ended and not run.process.dead]

    def beside(self, name: str, work: Callable[[], None]) -> None:
        """Something of the application's, which ends by itself."""
        self.others_at_work += 1

        def life() -> None:
            try:
                work()
            finally:
                self.others_at_work -= 1

        self.scheduler.spawn(name, life, Process(name))

    def dead_owners(self, owners: Sequence[str]) -> list[str]:
        """Those that a run knows to be dead; one that was declared dead may be alive."""
        known = {run.owner for run in self.runs if run.process.dead or run.ended or run.declared_dead}
        return [owner for owner in owners if owner in known]

    def drain(self, *, quiet: bool = False) -> Run:
        choose = self.choices
        limits = Limits(
            batch_rows=1_000 if quiet else (4, 10, 40)[choose.below(3)],
            max_batches=64 if quiet else (8, 2)[choose.below(2)],
            blocks_per_batch=1 if quiet else (1, 2, 4)[choose.below(3)],
            mark_rows=50 if quiet else (50, 3)[choose.below(2)],
            mark_connections=1 if quiet else (1, 2)[choose.below(2)],
            insert_timeout_s=60 if quiet else (60, 2)[choose.below(2)],
            linger_s=60,
        )
        how = 1 if quiet else choose.below(3)
        retried = quiet or not choose.below(2)
        knows_dead = quiet or not choose.chance(200)

        def work(run: Run) -> None:
            outbox, log = outbox_on(self.mysql), SimulatedAuditLog(self.clickhouse)
            dead_letters.release_held(outbox, log.definition)
            drain = Drain(
                outbox,
                log,
                owner=run.owner,
                upkeep=MySQLMaintenance(outbox),
                limits=limits,
                listener=_Tells(self.scheduler),
                dead_owners=self.dead_owners if knows_dead else lambda owners: (),
                retried=retried,
            )
            run.done = drain.done
            if how == 0:
                drain.one_plan()
            elif how == 1:
                drain.until_empty(lambda: outbox.backlog(limits.versions, count_to=1_000))
            else:
                until_s = self.scheduler.now_s + 30
                drain.stay(
                    lambda: self.scheduler.now_s < until_s,
                    release=lambda: dead_letters.release_held(outbox, log.definition),
                )

        return self.start("quiet" if quiet else "run", work)

    def operate(self, verb: str, work: Callable[[Run, Any, MySQLMaintenance, SimulatedAuditLog], None]) -> Run:
        """An operator's verb, beside everything else that is at work."""

        def life(run: Run) -> None:
            outbox = outbox_on(self.mysql)
            work(run, outbox, MySQLMaintenance(outbox), SimulatedAuditLog(self.clickhouse))

        return self.start(verb, life)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def _weather(self, what: str) -> str | None:
        if self.storm and self.choices.chance(self.storm):
            self.happened["mysql: connection lost"] += 1
            if what == "COMMIT" and self.choices.below(2):
                self.happened["mysql: answer to COMMIT lost"] += 1
                return ANSWER_LOST
            return DIES
        return None

    def _calm_clickhouse(self) -> None:
        self.clickhouse.conditions = Conditions(table_refuses=lambda entry: entry.key[3].startswith(REFUSED))

    # ── the history ──────────────────────────────────────────────────────────────────────────────

    def direct(self) -> None:
        transaction = self.mysql.begin(1.0)
        statement(transaction, load("mysql/schema.sql")["ledger_head"], {})
        transaction.commit()
        self.mysql.log.clear()  # no failover loses this
        for _ in range(1 + self.choices.below(self._most_actions)):
            name = self.choices.one_of(_WEIGHTED)
            self.happened[name] += 1
            self.scheduler.tell(f"── {name}")
            ACTIONS[name](self)
            self.scheduler.sleep(self.choices.one_of(PAUSES_S))
        self.scheduler.tell("── quiet")
        if self._settle():
            self._judge()

    def _settle(self) -> bool:
        """Ends all faults, and drains until nothing is open."""
        self.storm = 0
        self.mysql.down = False
        self._calm_clickhouse()
        for run in self.runs:
            run.process.paused_until_s = 0.0
        if not self.scheduler.wait(lambda: not self.at_work() and not self.others_at_work, QUIET_WITHIN_S):
            names = ", ".join(run.owner for run in self.at_work())
            return self._violated(f"{names} did not end within {QUIET_WITHIN_S:.0f} s without faults")
        return self._drain_quietly() and self._reconcile_quietly()

    def _violated(self, what: str) -> bool:
        self.violations.append(what)
        return False

    def _drain_quietly(self) -> bool:
        for _ in range(LAST_DRAINS):
            run = self.drain(quiet=True)
            if not self.scheduler.wait(lambda run=run: run.ended, QUIET_WITHIN_S):  # type: ignore[misc]
                return self._violated("a quiet drain does not end")
            if run.error is not None:
                self.scheduler.sleep(30)
                continue
            if not self.open_batches() and not self._pending():
                return True
            self.scheduler.sleep(30)
        return self._violated(
            f"after {LAST_DRAINS} quiet drains, open: {self.open_batches()}, pending: {self._pending()}"
        )

    def _reconcile_quietly(self) -> bool:
        """A reconciliation names exactly the rows that other hands marked before they were exported."""
        # After a clock was set back, what was written and exported "later" than now is not in a reconciliation's window.
        times_ms = [row["created_at"] for row in self.mysql.tables[OUTBOX].rows.values()]
        last_ms = max(self.mysql.tables[LEDGER].rows[0]["inserted_at_ms"], *times_ms, 0)
        self.scheduler.sleep(max(0, last_ms + 1_000 - self.mysql.now_ms()) / 1000)
        for repaired in (False, True):
            absent = self._absent()
            run = self.operate("reconcile", _reconcile(repair=True))
            if not self.scheduler.wait(lambda run=run: run.ended, QUIET_WITHIN_S) or run.report is None:  # type: ignore[misc]
                return self._violated(f"a quiet reconciliation did not end: {run.error}")
            repaired_pks = set(run.report.missing_pks)
            self.book.expect_requeue(1, lambda pk, row: pk in repaired_pks)  # noqa: B023 - called here and now
            erased = {pk for pk, row in self.book.rows.items() if (row.workspace_id, row.event_id) in self.erasures}
            found, absent = self._named(repaired_pks - erased), self._named(absent - erased)
            if self.forgot:
                return self._drain_quietly()
            if found != absent or (repaired and absent):
                return self._violated(f"reconcile finds {found} missing, the book {absent}, repaired {repaired}")
            if not self._drain_quietly():
                return False
        return True

    def open_batches(self) -> list[int]:
        return [
            key for key, row in self.mysql.tables[LEDGER].rows.items() if row["state"] in {*map(str, OPEN), "exported"}
        ]

    def _pending(self) -> list[int]:
        letters = {pk for pk, row in self.mysql.tables[LETTERS].rows.items() if row["state"] in _HOLDING}
        rows = self.mysql.tables[OUTBOX].rows.items()
        return [pk for pk, row in rows if row["deleted_at"] is None and row["version"] == KNOWN and pk not in letters]

    def _absent(self) -> set[int]:
        """Rows that are marked, and that ClickHouse has lost, or that other hands marked before they were exported."""
        keeps_days = self.clickhouse.keeps_days or 36_500
        past_ttl_ms = min(self.mysql.now_ms(), self.clickhouse.now_ms()) - keeps_days * 86_400_000
        known = {entry.key for entry in [*self.clickhouse.entries(), *self.gone["erased"], *self.clickhouse.expired]}
        lost = {entry.key: entry.inserted_at_ms > past_ttl_ms for entry in self.gone["lost"]}
        set_aside = {pk for pk, row in self.mysql.tables[LETTERS].rows.items() if row["state"] != "retried"}
        absent = set()
        for pk, row in self.mysql.tables[OUTBOX].rows.items():
            meant = self.book.rows[pk]
            if row["deleted_at"] is None or pk in set_aside or meant.kind == "unknown" or meant.key in known:
                continue
            # Of a row that was never exported, its age decides; of one that was, that of its entry.
            if lost.get(meant.key, row["created_at"] > past_ttl_ms) if meant.key else row["created_at"] > past_ttl_ms:
                absent.add(pk)
        return absent

    def _named(self, pks: set[int]) -> list[str]:
        """The events of these rows: of several rows of one event, a reconciliation names one."""
        return sorted({self.book.rows[pk].event_id for pk in pks})

    def _judge(self) -> None:
        self.verdict = verdict_of(self.facts())
        if self.forgot:  # rows go out again where nothing knows any more that they did
            self.verdict.violations = [line for line in self.verdict.violations if "lost" in line or "pending" in line]
            return
        for run in self.runs:
            if run.report is not None:
                seen = run.report.found
                if seen.altered or seen.unexpected or (seen.duplicated and not self.verdict.forgetful):
                    self.violations.append(f"{run.owner} reconciled and found {seen}: {', '.join(seen.event_ids)}")
            if run.done is not None and run.done.discrepant and not self.gone["lost"]:
                self.violations.append(f"{run.owner} found {run.done.discrepant}")

    def facts(self) -> Facts:
        ledger = self.mysql.tables[LEDGER].rows
        outbox = outbox_on(self.mysql)
        batches = outbox.batches(sorted(key for key in ledger if key))
        stored = _counted(self.clickhouse.entries())
        taken = [*self.clickhouse.merged, *self.clickhouse.expired, *self.gone["lost"], *self.gone["erased"]]
        letters = self.mysql.tables[LETTERS].rows
        return Facts(
            book=self.book,
            marks={pk: row["deleted_at"] for pk, row in self.mysql.tables[OUTBOX].rows.items()},
            batches=batches,
            claimed_rows={key: row["claimed_rows"] for key, row in ledger.items() if key},
            letters={(pk, row["event_id"]): row["reason"] for pk, row in letters.items() if row["state"] in _HOLDING},
            stored=stored,
            gone=_counted(taken),
            in_view=Counter({entry.key for entry in self.clickhouse.entries()}),  # the view is not simulated
            forgetful=forgetful_attempts(batches),
            swept_rows=sum(row["swept_rows"] for key, row in ledger.items() if key) if self.swept else 0,
        )


_HOLDING = ("open", "discarded", "held")


def _counted(entries: Iterable[StoredEntry]) -> Counter[tuple[int, tuple[object, ...]]]:
    return Counter((entry.inserted_at_ms, columns_of(entry.key, entry.fingerprint)) for entry in entries)


class _Tells(Listener):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def trouble(self, what: str) -> None:
        self._scheduler.tell(what)


# ── actions ──────────────────────────────────────────────────────────────────────────────────────

Act = Callable[[World], None]
ACTIONS: dict[str, Act] = {}
_WEIGHTED: list[str] = []


def action(weight: int) -> Callable[[Act], Act]:
    """Registers a function under its name, chosen by this weight. The first one is the plain choice."""

    def register(act: Act) -> Act:
        name = act.__name__.replace("_", " ")
        ACTIONS[name] = act
        _WEIGHTED.extend([name] * weight)
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


@action(2)
def clickhouse_storm(world: World) -> None:
    """Connections die, answers are lost, a proxy answers, INSERTs are slow; or that is over."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = choose.below(6)
    if how == 0:
        world._calm_clickhouse()
    elif how == 1:
        conditions.dies = lambda: choose.chance(200)
    elif how == 2:
        conditions.answer_lost = lambda: choose.chance(300)
    elif how == 3:
        statuses = (502, 504, 429)
        conditions.passes_on = bool(choose.below(2))
        conditions.proxy_answers = lambda: choose.one_of(statuses) if choose.chance(200) else 0
    elif how == 4:
        conditions.insert_s = lambda: (0.05, 1.0, 30.0, 170.0)[choose.below(4)]
    else:
        conditions.down = not conditions.down


@action(1)
def clickhouse_limits(world: World) -> None:
    """A limit of rows or bytes for one INSERT, or a failing view; or none."""
    choose, conditions = world.choices, world.clickhouse.conditions
    how = choose.below(4)
    conditions.most_rows, conditions.most_bytes = 2**63, 2**63
    conditions.view_fails = lambda entry: False
    if how == 1:
        conditions.most_rows = 1 + choose.below(3)
    elif how == 2:
        conditions.most_bytes = 400
    elif how == 3:
        odd = choose.below(5)
        conditions.view_fails = lambda entry: entry.key[2] % 5 == odd


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
    if lost:  # rows are gone, and rows that had been deleted are back
        book = world.book
        known = {(pk, row.event_id): row for table in (*book.past, book.rows) for pk, row in table.items()}
        rows = world.mysql.tables[OUTBOX].rows.items()
        book.rows = {pk: known[pk, row["event_id"]] for pk, row in rows}


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
        requeue.requeue(outbox, upkeep, log, which, ACTOR, missing_only=missing_only)

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
            verb(outbox, DeadLetterFilter(state=None, pks=PkSet.of(pks)), ACTOR)

        world.operate(verb.__name__, work)


def _reconcile(*, repair: bool) -> Callable[[Run, Any, MySQLMaintenance, SimulatedAuditLog], None]:
    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        by = ACTOR if repair else None
        run.report = reconcile.reconcile(outbox, upkeep, log, from_ms=0, to_ms=2**62, repair=by)

    return work


@action(1)
def reconcile_all(world: World) -> None:
    repair = bool(world.choices.below(2))
    if repair:
        world.book.expect_requeue(1, lambda pk, row: True)
    world.operate("reconcile", _reconcile(repair=repair))


@action(1)
def sweep_rows(world: World) -> None:
    """Deletes rows that were exported a minute ago."""
    if world.repeats or world.gone["lost"]:
        return
    world.swept = True

    def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
        sweep.sweep(outbox, upkeep, log, Retention(outbox_days=1 / 1440, chunk_rows=3), ACTOR)

    world.operate("sweep", work)


def _some(world: World, most: int) -> list[int]:
    """Some rows that are committed, close to each other."""
    pks = sorted(world.book.rows)
    if not pks:
        return []
    first = world.choices.below(len(pks))
    return pks[first : first + 1 + world.choices.below(most)]
