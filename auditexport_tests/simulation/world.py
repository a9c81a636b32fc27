"""The world of one simulated history: both servers, what is at work on them, and what is known of them afterwards.

The exporter's code is the real one: `core.drain`, `core.pipeline`, the operators' verbs, and the stores for MySQL with their SQL.
Simulated are both servers, the threads and the time.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from auditexport_pipeline.core import reconcile
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import OPEN
from auditexport_pipeline.core.drain import Drain, Drained, Listener
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.ports import StoredEntry
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import IN_CLICKHOUSE
from auditexport_tests.chaos.application import Book
from auditexport_tests.chaos.check import Facts, forgetful_attempts
from auditexport_tests.simulation.application import KNOWN, OUTBOX, REFUSED, Application, columns_of
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import Conditions, SimulatedClickHouse
from auditexport_tests.simulation.mysql_engine import outbox_on
from auditexport_tests.simulation.mysql_server import ANSWER_LOST, DIES, SimulatedMySQL
from auditexport_tests.simulation.scheduler import Killed, Process, Scheduler
from auditexport_tests.simulation.statements import definitions

LEDGER, LETTERS = "clickhouse_outbox_batch", "clickhouse_outbox_dead_letter"
ACTOR = Actor(who="simulation", why="to see what happens")
ENGINES = ("26.9", "26.3", "25.8")
# States in which a dead letter keeps its row out of batches.
HOLDING = ("open", "discarded", "held")


@dataclass(eq=False)
class Run:
    """A drain or an operator's verb at work, in a process of its own."""

    owner: str
    process: Process
    began_s: float = 0.0
    ended_s: float = 0.0
    ended: bool = False
    declared_dead: bool = False
    error: AuditExportError | None = None
    done: Drained | None = None
    settled: bool = False  # whether `done` is what the run reports at its end
    stopping: bool = False  # somebody has asked it to end
    result: object = None  # of an operator's verb
    report: reconcile.Report | None = None


class World:
    """The state of one history."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.scheduler = Scheduler(choices)
        self.mysql = SimulatedMySQL(self.scheduler, list(definitions()), self._weather)
        self.clickhouse = SimulatedClickHouse(self.scheduler, engine=choices.one_of(ENGINES))
        self.book = Book()
        # Of a repeated event whose rows are swept, nobody can tell a merge of the two entries from the loss of one.
        self.repeats = bool(choices.below(2))
        odd_in = (40, 10)[choices.below(2)]
        self.applications = [
            Application(f"app{n}", self.mysql, self.book, choices, repeats=self.repeats, odd_in=odd_in)
            for n in range(2)
        ]
        self.runs: list[Run] = []
        self.others_at_work = 0
        self.happened: Counter[str] = Counter()
        self.violations: list[str] = []
        self.storm = 0  # of MySQL's connections: so many of a thousand statements fail
        self.swept = False
        self.forgot = False  # a failover lost commits
        self.failovers = 0  # of those
        self.forgot_s = -1.0  # when the last one was
        # Entries that were removed from ClickHouse. What merges and the TTL take, the server knows.
        self.gone: dict[str, list[StoredEntry]] = {"lost": [], "erased": []}
        self.erasures: set[tuple[str, str]] = set()  # workspace_id and event_id
        self.calm_clickhouse()

    # ── what is at work ──────────────────────────────────────────────────────────────────────────

    def start(self, name: str, work: Callable[[Run], None]) -> Run:
        """A process of its own. Errors of the exporter's tree end it; any other is a violation."""
        process = Process(f"{name} {len(self.runs)}")
        run = Run(owner=process.name, process=process, began_s=self.scheduler.now_s)
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
                run.ended, run.ended_s = True, self.scheduler.now_s

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
                stopping=lambda: run.stopping,
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
            drain.done.settle(outbox, run.owner)
            run.settled = True

        return self.start("quiet" if quiet else "run", work)

    def operate(self, verb: str, work: Callable[[Run, Any, MySQLMaintenance, SimulatedAuditLog], None]) -> Run:
        """An operator's verb, beside everything else that is at work."""

        def life(run: Run) -> None:
            outbox = outbox_on(self.mysql)
            work(run, outbox, MySQLMaintenance(outbox), SimulatedAuditLog(self.clickhouse))

        return self.start(verb, life)

    def reconcile(self, *, repair: bool) -> Run:
        """A reconciliation of everything so far."""

        def work(run: Run, outbox: Any, upkeep: MySQLMaintenance, log: SimulatedAuditLog) -> None:
            by = ACTOR if repair else None
            run.report = reconcile.reconcile(outbox, upkeep, log, from_ms=0, to_ms=2**62, repair=by)

        return self.operate("reconcile", work)

    # ── faults ───────────────────────────────────────────────────────────────────────────────────

    def _weather(self, what: str) -> str | None:
        if self.storm and self.choices.chance(self.storm):
            self.happened["mysql: connection lost"] += 1
            if what == "COMMIT" and self.choices.below(2):
                self.happened["mysql: answer to COMMIT lost"] += 1
                return ANSWER_LOST
            return DIES
        return None

    def calm_clickhouse(self) -> None:
        self.clickhouse.conditions = Conditions(table_refuses=lambda entry: entry.key[3].startswith(REFUSED))

    # ── what is there ────────────────────────────────────────────────────────────────────────────

    def open_batches(self) -> list[int]:
        return [
            key for key, row in self.mysql.tables[LEDGER].rows.items() if row["state"] in {*map(str, OPEN), "exported"}
        ]

    def pending_rows(self) -> list[int]:
        letters = {pk for pk, row in self.mysql.tables[LETTERS].rows.items() if row["state"] in HOLDING}
        rows = self.mysql.tables[OUTBOX].rows.items()
        return [pk for pk, row in rows if row["deleted_at"] is None and row["version"] == KNOWN and pk not in letters]

    def only_refused_rows(self) -> bool:
        """Whether the table refuses every pending row."""
        return all(self.book.rows[pk].kind == "refused" for pk in self.pending_rows())

    def absent_rows(self) -> set[int]:
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

    def named(self, pks: set[int]) -> list[str]:
        """The events of these rows: of several rows of one event, a reconciliation names one."""
        return sorted({self.book.rows[pk].event_id for pk in pks})

    def altered(self) -> set[str]:
        """Events of which ClickHouse got another payload than their row has now: both stores really differ."""
        changed = {row.event_id: row.payload.encode() for _, row in self.book.all_rows() if row.earlier}
        sent = (payload for block in self.clickhouse.received for payload in block.payloads) if changed else ()
        return {
            event_id
            for payload in sent
            if (event_id := json.loads(payload)["event_id"]) in changed and payload != changed[event_id]
        }

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
            letters={(pk, row["event_id"]): row["reason"] for pk, row in letters.items() if row["state"] in HOLDING},
            stored=stored,
            gone=_counted(taken),
            in_view=Counter({entry.key for entry in self.clickhouse.entries()}),  # the view is not simulated
            forgetful=forgetful_attempts(batches),
            swept_rows=sum(row["swept_rows"] for key, row in ledger.items() if key) if self.swept else 0,
            explained=[f"{IN_CLICKHOUSE}{n + 1} altered" for n in range(len(self.altered()))],
        )


def _counted(entries: Iterable[StoredEntry]) -> Counter[tuple[int, tuple[object, ...]]]:
    return Counter((entry.inserted_at_ms, columns_of(entry.key, entry.fingerprint)) for entry in entries)


class _Tells(Listener):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def trouble(self, what: str) -> None:
        self._scheduler.tell(what)
