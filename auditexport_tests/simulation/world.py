"""The world of one simulated history: both servers, what is at work on them, and what is known of them afterwards.

The exporter's code is the real one: `core.drain`, `core.pipeline`, the operators' verbs, and the stores for MySQL with their SQL.
Simulated are both servers, the threads and the time.
"""

from __future__ import annotations

import json
import traceback
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auditexport_pipeline.core import claiming, reconcile
from auditexport_pipeline.core.actions import Actor, Erasure
from auditexport_pipeline.core.batch import OPEN, Claim, Receipt, blocks_from_text
from auditexport_pipeline.core.drain import Drain, Drained, Listener
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.export import fetch, mark, write
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import StoredEntry
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.verify import verify_recent
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import IN_CLICKHOUSE
from auditexport_tests.chaos.application import FOREIGN_MARK, Book, Key
from auditexport_tests.chaos.check import Facts, forgetful_attempts
from auditexport_tests.simulation.application import KNOWN, OUTBOX, REFUSED, Application, columns_of
from auditexport_tests.simulation.audit_log import SimulatedAuditLog
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import Conditions, SimulatedClickHouse
from auditexport_tests.simulation.invariants import Invariants
from auditexport_tests.simulation.mysql_engine import outbox_on
from auditexport_tests.simulation.mysql_server import ANSWER_LOST, DIES, SimulatedMySQL
from auditexport_tests.simulation.scheduler import Killed, Process, Scheduler
from auditexport_tests.simulation.statements import definitions

LEDGER, LETTERS, ERASURES = "clickhouse_outbox_batch", "clickhouse_outbox_dead_letter", "clickhouse_outbox_erasure"
ACTOR = Actor(who="simulation", why="to see what happens")
# Days, the column by which ClickHouse counts them, and the only workspace whose entries it deletes.
TTLS: tuple[tuple[int | None, str, str], ...] = (
    (90, "inserted_at", ""),
    (90, "inserted_at", ""),
    (90, "inserted_at", "ws_1"),
    (90, "time", ""),
    (None, "inserted_at", ""),
)
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
    stopping: bool = False  # it was asked to end
    mark_rows: int = 50  # that a drain marks in one transaction
    result: object = None  # of an operator's verb
    report: reconcile.Report | None = None


class World:
    """The state of one history."""

    def __init__(self, choices: Choices) -> None:
        self.choices = choices
        self.scheduler = Scheduler(choices)
        self.mysql = SimulatedMySQL(self.scheduler, list(definitions()), self._weather)
        self.clickhouse = SimulatedClickHouse(self.scheduler, engine=choices.one_of(ENGINES))
        ttl = self.clickhouse
        ttl.keeps_days, ttl.keeps_by, ttl.keeps_but = choices.one_of(TTLS)
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
        self.failovers = 0  # that lost commits
        self.forgot_s = -1.0  # when the last of those failovers was
        # Entries that were removed from ClickHouse. What merges and the TTL take, the server knows.
        self.gone: dict[str, list[StoredEntry]] = {"lost": [], "erased": []}
        self.last_gone: dict[Key, str] = {}  # why the last entry of a key was removed
        self.forgetful = False  # a requeue may leave more copies: tokens were forgotten, or a view failed
        self.set_back = False  # MySQL's clock: an erasure can be recorded before what it erased
        self.calm_clickhouse()
        self.invariants = Invariants(self.mysql, self.clickhouse, self.book, lambda: {run.owner for run in self.runs})

    # ── what is at work ──────────────────────────────────────────────────────────────────────────

    def start(
        self, name: str, work: Callable[[Run], None], step_of: Run | None = None, claim: Claim | None = None
    ) -> Run:
        """A process of its own, or a step of a run. Errors of the exporter's tree end it; any other is a violation."""
        owner = step_of.owner if step_of is not None else f"{name} {len(self.runs)}"
        process = Process(owner, plan=claim.key if claim is not None else None)
        run = Run(owner=owner, process=process, began_s=self.scheduler.now_s)
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

        self.scheduler.spawn(run.process.name if step_of is None else f"{owner}/{name}", life, run.process)
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
        alive = {run.owner for run in self.runs if not (run.process.dead or run.ended or run.declared_dead)}
        known = {run.owner for run in self.runs} - alive
        return [owner for owner in owners if owner in known]

    def _limits(self, *, quiet: bool = False) -> Limits:
        choose = self.choices
        return Limits(
            batch_rows=1_000 if quiet else (4, 10, 40)[choose.below(3)],
            max_batches=64 if quiet else (8, 2)[choose.below(2)],
            blocks_per_batch=1 if quiet else (1, 2, 4)[choose.below(3)],
            mark_rows=50 if quiet else (50, 3)[choose.below(2)],
            mark_connections=1 if quiet else (1, 2)[choose.below(2)],
            insert_timeout_s=60 if quiet else (60, 2)[choose.below(2)],
            linger_s=60,
            linger_poll_ms=1_000,
            max_rows_per_second=0 if quiet else (0, 0, 50)[choose.below(3)],
            mark_pause_ms=0 if quiet else (0, 0, 10)[choose.below(3)],
        )

    def drain(self, *, quiet: bool = False, stays: bool = False) -> Run:
        """A drain in one of three ways; one that `stays` has mostly limits under which its batches are small."""
        choose = self.choices
        limits = self._limits(quiet=quiet or (stays and choose.below(4) < 3))
        how = 2 if stays else 1 if quiet else choose.below(3)
        retried = quiet or not choose.below(2)
        knows_dead = quiet or not choose.chance(200)

        def work(run: Run) -> None:
            run.mark_rows = 1 if limits.max_rows_per_second else limits.mark_rows
            outbox, log = outbox_on(self.mysql), self.audit_log()
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
                until_s = self.scheduler.now_s + (10 if stays else 30)
                drain.stay(
                    lambda: self.scheduler.now_s < until_s,
                    release=lambda: dead_letters.release_held(outbox, log.definition),
                )
            drain.done.settle(outbox, run.owner)
            run.settled = True

        return self.start("quiet" if quiet else "run", work)

    def run_in_steps(self) -> Run:
        """A run as Dagster's multiprocess executor does it: a plan, then a process for each step of each batch.

        A step can be started again while its first process is at work, and so can the whole run. The steps of a run that is
        killed go on.
        """
        limits = self._limits()

        def work(run: Run) -> None:
            outbox, log = outbox_on(self.mysql), self.audit_log()
            for _ in range(1 + self.choices.below(2)):
                owners = claiming.open_owners(outbox)
                claims = claiming.claim(outbox, owner=run.owner, dead_owners=self.dead_owners(owners), limits=limits)
                for claim in claims:
                    self._steps(run, claim, limits)
                verify_recent(outbox, log, len(claims), upkeep=MySQLMaintenance(outbox))

        return self.start("steps", work)

    def _steps(self, run: Run, claim: Claim, limits: Limits) -> None:
        receipts: list[Receipt] = []

        def step(verb: str, work: Callable[[Any, SimulatedAuditLog], object]) -> bool:
            """Whether one of the processes of the step ended well."""
            attempts: list[Run] = []
            for patience_s in ((100.0, 0.02, 1.0)[self.choices.below(3)], 600.0):
                attempts.append(self.start(verb, lambda _: work(outbox_on(self.mysql), self.audit_log()), run, claim))
                self.scheduler.wait(lambda: all(one.ended or one.process.dead for one in attempts), patience_s)
                if any(one.ended and one.error is None and not one.process.dead for one in attempts):
                    return True
            return False

        if step("fetch", lambda outbox, log: fetch(outbox, log, claim, limits)) and step(
            "write", lambda outbox, log: receipts.append(write(outbox, log, claim, {}, limits))
        ):
            step("mark", lambda outbox, log: mark(outbox, log, receipts[-1], limits))

    def operate(self, verb: str, work: Callable[[Run, Any, MySQLMaintenance, SimulatedAuditLog], None]) -> Run:
        """An operator's verb, beside everything else that is at work."""

        def life(run: Run) -> None:
            outbox = outbox_on(self.mysql)
            work(run, outbox, MySQLMaintenance(outbox), self.audit_log())

        return self.start(verb, life)

    def audit_log(self) -> SimulatedAuditLog:
        return SimulatedAuditLog(self.clickhouse, self.invariants)

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

    def open_batches(self, *, unverified: bool = False) -> list[int]:
        states = {*map(str, OPEN), *(["exported"] if unverified else [])}
        return [key for key, row in self.mysql.tables[LEDGER].rows.items() if row["state"] in states]

    def rows_in_work(self) -> set[int]:
        batches = self.mysql.tables[LEDGER].rows.values()
        return {pk for row in batches if row["state"] in map(str, OPEN) for pk in PkSet.parse(row["pks"])}

    def pending_rows(self) -> list[int]:
        letters = {pk for pk, row in self.mysql.tables[LETTERS].rows.items() if row["state"] in HOLDING}
        rows = self.mysql.tables[OUTBOX].rows.items()
        return [pk for pk, row in rows if row["deleted_at"] is None and row["version"] == KNOWN and pk not in letters]

    def erasures(self) -> list[Erasure]:
        """Those on record."""
        return [_erasure(row) for row in self.mysql.tables[ERASURES].rows.values()]

    def absent_rows(self) -> set[int]:
        """Rows that are marked, and that ClickHouse has lost, or that other hands marked before they were exported."""
        clickhouse = self.clickhouse
        ahead_s = min(0, self.mysql.now_ms() - clickhouse.now_ms()) // 1000
        erased = [entry for entry in self.gone["erased"] if self.last_gone[entry.key] == "erased"]
        known = {entry.key for entry in [*clickhouse.entries(), *erased, *clickhouse.expired]}
        lost = {entry.key: not clickhouse.past_ttl(entry.key, entry.inserted_at_ms) for entry in self.gone["lost"]}
        letters = self.mysql.tables[LETTERS].rows.items()
        set_aside = {(pk, row["event_id"]) for pk, row in letters if row["state"] != "retried"}
        batches = [row for key, row in self.mysql.tables[LEDGER].rows.items() if key]
        sent = PkSet.union(block.pks for row in batches for block in blocks_from_text(row["manifest"])[0])
        folded = PkSet.union(PkSet.parse(row["pks"]) for row in batches) - sent
        absent = set()
        for pk, row in self.mysql.tables[OUTBOX].rows.items():
            meant = self.book.rows[pk]
            # A folded row went out as another row, by which a reconciliation looks for its event.
            if row["deleted_at"] is None or (pk, row["event_id"]) in set_aside or pk in folded:
                continue
            if meant.kind == "unknown" or meant.key in known:
                continue
            # Of a row that was never exported, its age decides, if that is all that the TTL asks for; of others, the entry.
            young = not clickhouse.past_ttl(None, row["created_at"], ahead_s)
            if lost.get(meant.key, young) if meant.key else young:
                absent.add(pk)
        return absent

    def unsure_rows(self) -> set[int]:
        """Rows of which a reconciliation may say either: an erasure names their events, and they were there when it was recorded; or
        other hands have marked them since their export, and the TTL that took their entries depends on the event.
        """
        clickhouse = self.clickhouse
        expired = {one.key for one in clickhouse.expired if clickhouse.past_ttl(None, one.inserted_at_ms) is None}
        rows = self.mysql.tables[OUTBOX].rows.items()
        marked = {pk for pk, row in rows if row["deleted_at"] == FOREIGN_MARK and self.book.rows[pk].key in expired}
        erasures = self.mysql.tables[ERASURES].rows.values()
        recorded = self.mysql.tables["clickhouse_outbox_action"].rows
        # An erasure can be recorded, by a clock that was set back, before what it erased; or a failover lost the record.
        unsure = {entry.key for entry in self.gone["erased"]} if self.set_back or self.forgot else set()
        marked |= {pk for pk, _ in rows if self.book.rows[pk].key in unsure}
        return marked | {
            pk
            for row in erasures
            for pk, written in rows
            if (key := self._key(pk)) is not None
            and names(_erasure(row), key)
            and written["created_at"] <= recorded[row["action_id"]]["at_ms"]
            and not self._sent_again_after(pk, recorded[row["action_id"]]["at_ms"])
        }

    def _sent_again_after(self, pk: int, at_ms: int) -> bool:
        """Whether the row's event went out once more after that, under an earlier `inserted_at`: it was there already."""
        mark, meant = self.mysql.tables[OUTBOX].rows[pk]["deleted_at"], self.book.rows[pk]
        if mark is None or mark <= at_ms or not meant.requeued or meant.cleared or self.forgot:
            return False
        times = [one.at_ms for one in self.clickhouse.received if meant.payload.encode() in one.payloads]
        return bool(times) and times[-1] <= at_ms

    def _key(self, pk: int) -> tuple[str, str, int, str] | None:
        """By which an erasure names the row's event; also of one that the table refuses. None for a malformed one."""
        row = self.book.rows[pk]
        if row.kind != "refused":
            return row.key
        event = json.loads(row.payload)
        return (event["workspace_id"], event["bucket"], event["time"], event["event_id"])

    def unexplained(self) -> set[int]:
        """The `inserted_at`s of entries that expired by a TTL that depends on the event, and whose rows are gone."""
        rows = {(row["workspace_id"], row["event_id"]) for row in self.mysql.tables[OUTBOX].rows.values()}
        times = {one.inserted_at_ms for one in self.clickhouse.expired if (one.key[0], one.key[3]) not in rows}
        return {at_ms for at_ms in times if self.clickhouse.past_ttl(None, at_ms) is None}

    def kept_losses(self) -> Counter[int]:
        """By `inserted_at`: lost or erased entries that their batch lacks for good.

        Of a block one of whose rows was changed since its export and sent again, nothing proves that the others are what was sent: a
        repair sends them as new. Of a repeated event, a repair sends no row but the one that went out, which may be gone. And an
        erasure that names events which a requeue brought back explains no other entry whose row is gone.
        """
        changed = {pk for pk, row in self.book.all_rows() if row.earlier and (row.requeued or row.cleared)}
        sent: defaultdict[int, set[int]] = defaultdict(set)
        for row in self.mysql.tables[LEDGER].rows.values():
            for block in blocks_from_text(row["manifest"])[0]:
                sent[block.inserted_at_ms] |= {*block.pks}
        rows = self.mysql.tables[OUTBOX].rows
        there = {at_ms: {rows[pk]["event_id"] for pk in pks & rows.keys()} for at_ms, pks in sent.items()}
        lost = (
            entry
            for entry in self.gone["lost"]
            if sent[entry.inserted_at_ms] & changed or entry.key[3] not in there.get(entry.inserted_at_ms, ())
        )
        back = [one for one in self.erasures() if any(names(one, entry.key) for entry in self.clickhouse.entries())]
        erased = (entry for entry in self.gone["erased"] if any(names(one, entry.key) for one in back))
        return Counter(entry.inserted_at_ms for entry in (*lost, *erased))

    def named(self, pks: set[int]) -> set[str]:
        """The events of these rows: of several rows of one event, a reconciliation names one."""
        return {self.book.rows[pk].event_id for pk in pks}

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
            unexplained=self.unexplained(),
            in_view=Counter({entry.key for entry in self.clickhouse.entries()}),  # the view is not simulated
            forgetful=forgetful_attempts(batches, overflow=self.forgetful),
            swept_rows=sum(row["swept_rows"] for key, row in ledger.items() if key) if self.swept else 0,
            explained=[
                *(f"{IN_CLICKHOUSE}{n + 1} altered" for n in range(len(self.altered()))),
                *(f"{IN_CLICKHOUSE}{n + 1} missing" for n in range(self.kept_losses().total())),
            ],
        )


def _erasure(row: Mapping[str, Any]) -> Erasure:
    return Erasure(**{name: row[name] for name in ("workspace_id", "event_id", "from_ms", "to_ms")})


def names(erasure: Erasure, key: Key) -> bool:
    """Whether an erasure is about the entry. `Erasure.covers` is what is judged."""
    workspace_id, _, at_ms, event_id = key
    from_ms, to_ms = erasure.from_ms, erasure.to_ms
    within = (from_ms is None or from_ms <= at_ms) and (to_ms is None or at_ms < to_ms)
    return within and workspace_id == erasure.workspace_id and (not erasure.event_id or event_id == erasure.event_id)


def _counted(entries: Iterable[StoredEntry]) -> Counter[tuple[int, tuple[object, ...]]]:
    return Counter((entry.inserted_at_ms, columns_of(entry.key, entry.fingerprint)) for entry in entries)


class _Tells(Listener):
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def trouble(self, what: str) -> None:
        self._scheduler.tell(what)
