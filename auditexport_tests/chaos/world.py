"""The world of one history: databases, writers, runs, and how the dust settles.

What belongs here: what actions act on. What does not: the actions, and the order they come in (`history`).
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any

from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.chaos.application import Book, Writer
from auditexport_tests.chaos.check import Verdict, month_changes, never_exported
from auditexport_tests.chaos.rig import Databases, Rig
from auditexport_tests.chaos.worker import LEASE_S, UPKEEP_RETRIES, Run, Told, Worker

# Quiet drains after the dust has settled; one is usually enough, a batch that is stopped or split needs those after its INSERTs.
LAST_DRAINS = 20
# Without faults every drain and reconciliation ends; a row that the table refuses takes a dozen INSERTs to find.
QUIET_WITHIN_S = 180


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a history is made of. With a `theme` it consists of these actions, each until it has hit."""

    seed: int
    theme: tuple[str, ...] = ()
    clock: bool | None = None
    overflow: bool | None = None
    mutation: str = ""


@dataclass(slots=True)
class Outcome:
    """What happened, counted, and what was wrong."""

    plan: Plan
    verdict: Verdict = field(default_factory=Verdict)
    hits: Counter[str] = field(default_factory=Counter)
    kills: Counter[str] = field(default_factory=Counter)
    runs: int = 0
    refused_zombies: int = 0
    errors: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0


class World:
    """The state of one history, as actions see it."""

    def __init__(self, rig: Rig, databases: Databases, plan: Plan, outcome: Outcome) -> None:
        self.rig = rig
        self.databases = databases
        self.plan = plan
        self.outcome = outcome
        self.random = Random(plan.seed)
        self.book = Book()
        self.workers: list[Worker] = []
        self.zombies: list[Worker] = []
        self.writers: list[Writer] = []
        self.intruders: list[threading.Thread] = []
        self.overflow = bool(plan.overflow)
        self.swept = False
        self.clock_offset_s = 0.0
        if plan.clock if plan.clock is not None else self.random.random() < 0.25:
            self.step_clock(_to_month_end_s() - self.random.uniform(2, 5))
        self.seen = Counter(self.wire_hits())

    # ── what actions do ──────────────────────────────────────────────────────────────────────────

    @property
    def settles_between_runs(self) -> bool:
        """With a window of a few blocks a token is forgotten while its INSERT may still be running, which the
        product's window of 10,000 makes impossible: there, runs follow each other.
        """
        return self.overflow

    def hit(self, what: str) -> None:
        self.outcome.hits[what] += 1

    def kill(self, what: str) -> None:
        self.outcome.kills[what] += 1
        self.hit(f"kill {what}")

    def pause(self, low: float, high: float) -> None:
        threading.Event().wait(self.random.uniform(low, high) if low < high else low)

    def working(self) -> list[Worker]:
        return [worker for worker in self.workers if worker.alive and not worker.stopped]

    def start_run(self, *, quiet: bool = False) -> Worker | None:
        if self.settles_between_runs:
            if self.working():
                return None
            self._wait_for_inserts()
        random = self.random
        dead = tuple(
            worker.run.owner for worker in self.workers if worker.declared_dead or not (worker.alive or worker.unseen)
        )
        worker = Worker(
            Run(
                owner=f"run {len(self.workers)} of {self.plan.seed}",
                mysql_url=self.databases.mysql_url,
                clickhouse_url=self.databases.clickhouse_url,
                clock=self.databases.clock,
                dead_owners=dead if quiet or random.random() < 0.8 else (),
                limits={
                    "batch_rows": 200 if quiet else random.choice((20, 60, 200)),
                    "blocks_per_batch": random.choice((1, 2, 4)),
                    "max_batches": 64 if quiet else random.choice((2, 8)),
                    "mark_rows": random.choice((5, 17, 50)),
                    "mark_connections": random.choice((1, 2)),
                },
                prefetch=random.random() < 0.4,
                hand_over=random.random() < 0.7,
                retries=0 if self.settles_between_runs else 2 if quiet else random.choice((0, 1, 3)),
                mutation=self.plan.mutation,
            )
        )
        self.workers.append(worker)
        return worker

    def start_upkeep(self, verb: str, **arguments: Any) -> Worker:
        """An operator's verb, at work beside whatever else is; it fails and is killed as a drain is."""
        worker = Worker(
            Run(
                owner=f"run {len(self.workers)} of {self.plan.seed}",
                mysql_url=self.databases.mysql_url,
                clickhouse_url=self.databases.clickhouse_url,
                clock=self.databases.clock,
                verb=verb,
                arguments=arguments,
                retries=UPKEEP_RETRIES,
            )
        )
        self.workers.append(worker)
        return worker

    def step_clock(self, seconds: float) -> None:
        self.clock_offset_s += seconds
        # Renamed into its place: a run may read it at this moment.
        new = self.databases.clock.with_suffix(".new")
        new.write_text(str(self.clock_offset_s))
        new.replace(self.databases.clock)

    def month_end_in_s(self) -> float:
        """By MySQL's clock; 0 where its clock is right."""
        return _to_month_end_s(self.clock_offset_s) if self.clock_offset_s else 0.0

    def open_pks(self, count: int) -> list[int]:
        """Some pks of batches that are open at this moment."""
        with suppress(Exception):
            rows = self.databases.sql(
                "SELECT pks FROM clickhouse_outbox_batch WHERE state IN ('claimed', 'sealed', 'written', 'stopped')"
            )
            pks = [pk for row in rows for pk in PkSet.parse(str(row.pks))]
            return self.random.sample(pks, min(count, len(pks)))
        return []

    def ids(self, query: str) -> list[int]:
        """What a query finds in MySQL, by its one column; nothing while MySQL is down."""
        with suppress(Exception):
            return [int(str(row[0])) for row in self.databases.sql(query)]
        return []

    def known(self, pks: Collection[int]) -> list[int]:
        """Those of which we know that they were committed."""
        with self.book.lock:
            return sorted(pk for pk in pks if pk in self.book.rows)

    # ── what has happened ────────────────────────────────────────────────────────────────────────

    def has_hit(self, name: str) -> bool:
        if name == "month changes":
            return bool(month_changes(self.databases))
        if name == "window overflowed":
            return bool(self.databases.sql("SELECT 1 FROM clickhouse_outbox_batch WHERE attempts > 1 LIMIT 1"))
        return bool((self.outcome.hits + self.wire_hits() + self.told_hits() - self.seen)[name])

    def told_hits(self) -> Counter[str]:
        codes = sum((told.codes for worker in self.workers if (told := worker.told())), Counter[int]())
        verbs = Counter(
            worker.run.verb
            for worker in self.workers
            if worker.run.verb != "drain" and (told := worker.told()) and told.changed
        )
        return verbs + Counter({"deadlock": codes[1213], "lock wait": codes[1205]})

    def wire_hits(self) -> Counter[str]:
        return Counter(
            {
                f"{server} {kind}": count
                for server, proxy in (("clickhouse", self.rig.to_clickhouse), ("mysql", self.rig.to_mysql))
                for kind, count in proxy.hits.items()
            }
        )

    def _wait_for_inserts(self) -> None:
        """Until nothing that a run sent is under way."""
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with suppress(Exception):
                ((running,),) = self.databases.clickhouse(
                    "SELECT count() FROM system.processes WHERE query_kind = 'Insert'"
                )
                if not running and not self.rig.to_clickhouse.held:
                    return
            self.pause(0.05, 0.05)

    def settle(self) -> list[str]:
        """Lifts what is left, wakes the zombies, and drains in peace; returns what is stuck."""
        self.rig.restore()
        self.databases.clickhouse("DROP VIEW IF EXISTS watching")
        for worker in self.workers:
            if worker.stopped:
                worker.wake()
                self.hit("zombie")
        for worker in self.workers:
            if not worker.wait(QUIET_WITHIN_S):
                worker.kill()
                return [f"{worker.run.owner} did not end within {QUIET_WITHIN_S} s of quiet"]
        for thread in self.intruders:
            thread.join(30)
        deadline = time.monotonic() + 30
        while (self.rig.to_clickhouse.held or self.rig.to_mysql.held) and time.monotonic() < deadline:
            self.pause(0.05, 0.05)
        self.book.settle(self.databases)
        return self._drain_in_peace() or self._reconcile_in_peace()

    def _drain_in_peace(self) -> list[str]:
        for _ in range(LAST_DRAINS):
            worker = self.start_run(quiet=True)
            if worker is None or not worker.wait(QUIET_WITHIN_S):
                return [f"a quiet drain did not end within {QUIET_WITHIN_S} s"]
            told = worker.told() or Told()
            if told.claimed and not told.errors:
                continue
            if not told.errors and not self._open():
                return []
            self.pause(LEASE_S / 2, LEASE_S / 2)
        return [f"after {LAST_DRAINS} quiet drains {self._open()} batches are open: {self._who_is_open()}"]

    def _reconcile_in_peace(self) -> list[str]:
        """The tool's own judgement, held against the book; then its repair, after which it must find nothing."""
        for repaired in (False, True):
            absent = never_exported(self.databases, self.book)
            self.book.ask_again(1, lambda pk, row: pk in absent)  # noqa: B023 - called here and now
            worker = self.start_upkeep("reconcile", repair=True)
            if not worker.wait(QUIET_WITHIN_S) or (report := (worker.told() or Told()).report) is None:
                return [f"a quiet reconciliation did not end within {QUIET_WITHIN_S} s"]
            found = set(report.missing_pks)
            if found != absent or (repaired and absent):
                return [f"reconcile finds rows {sorted(found)} missing, the book {sorted(absent)}, repaired {repaired}"]
            if absent:
                self.hit("repair")
            if stuck := self._drain_in_peace():
                return stuck
        return []

    def _open(self) -> int:
        return len(self._who_is_open())

    def _who_is_open(self) -> Sequence[str]:
        rows = self.databases.sql(
            "SELECT batch_id, state, owner, lease_until_ms FROM clickhouse_outbox_batch "
            "WHERE state NOT IN ('head', 'verified', 'discrepant')"
        )
        return [f"batch {row.batch_id} {row.state} of {row.owner} until {row.lease_until_ms}" for row in rows]

    def close(self) -> None:
        for worker in self.workers:
            if worker.alive:
                worker.kill()


def _to_month_end_s(offset_s: float = 0.0) -> float:
    now = datetime.now(timezone.utc) + timedelta(seconds=offset_s)
    next_month = (now.replace(day=1) + timedelta(days=32)).replace(day=1, hour=0, minute=0, second=0, microsecond=0)
    return (next_month - now).total_seconds()
