"""The world of one history, on which actions act: databases, writers, runs, and the quiet at the end."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from random import Random
from typing import Any

from auditexport_pipeline.core.batch import OPEN
from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.chaos.application import Book, Writer
from auditexport_tests.chaos.check import Verdict, month_changes, never_exported
from auditexport_tests.chaos.rig import Databases, Rig
from auditexport_tests.chaos.worker import LEASE_S, Result, Run, Worker

# Quiet drains at the end. One is usually enough; a batch that is stopped or split needs those after its INSERTs.
LAST_DRAINS = 20
# Without faults every drain and reconciliation ends; to find a row that the table refuses takes a dozen INSERTs.
QUIET_WITHIN_S = 180
OPEN_STATES = ", ".join(f"'{state}'" for state in OPEN)


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


class World:
    """The state of one history."""

    def __init__(self, rig: Rig, databases: Databases, plan: Plan, outcome: Outcome) -> None:
        self.rig = rig
        self.databases = databases
        self.direct = databases.direct
        self.plan = plan
        self.outcome = outcome
        self.random = Random(plan.seed)
        self.book = Book()
        self.workers: list[Worker] = []
        self.zombies: list[Worker] = []
        self.writers: list[Writer] = []
        self.intruders: list[threading.Thread] = []
        # With a window of a few blocks ClickHouse forgets a token while its INSERT may still run, which the product's window
        # of 10,000 makes impossible. There, runs follow each other.
        self.overflow = bool(plan.overflow)
        self.swept = False
        self.clock_offset_s = 0.0
        if plan.clock if plan.clock is not None else self.random.random() < 0.25:
            self.step_clock(_to_month_end_s() - self.random.uniform(2, 5))
        self.hits_before = self.wire_hits()

    # ── what actions do ──────────────────────────────────────────────────────────────────────────

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
        """Starts a drain, which knows most dead owners. Returns None if a drain is at work and drains must not overlap."""
        if self.overflow:
            if self.working():
                return None
            self._wait_until(self._no_insert_runs)
        random = self.random
        dead = tuple(
            worker.run.owner for worker in self.workers if worker.declared_dead or not (worker.alive or worker.unseen)
        )
        return self._start(
            dead_owners=dead if quiet or random.random() < 0.8 else (),
            limits={
                "batch_rows": 200 if quiet else random.choice((20, 60, 200)),
                "blocks_per_batch": random.choice((1, 2, 4)),
                "max_batches": 64 if quiet else random.choice((2, 8)),
                "mark_rows": random.choice((5, 17, 50)),
                "mark_connections": random.choice((1, 2)),
                # A loaded machine takes longer than a second for a block of fat events.
                "insert_timeout_s": 4 if quiet else 1,
            },
            prefetch=random.random() < 0.4,
            hand_over=random.random() < 0.7,
            retries=0 if self.overflow else 2 if quiet else random.choice((0, 1, 3)),
            mutation=self.plan.mutation,
        )

    def ensure_run(self) -> None:
        """Starts a drain if nothing is at work."""
        if not self.working():
            self.start_run()

    def operate(self, verb: str, **arguments: Any) -> Worker:
        """An operator's verb, beside everything else that is at work; it can fail and be killed as a drain can."""
        return self._start(verb=verb, arguments=arguments)

    def _start(self, **how: Any) -> Worker:
        worker = Worker(
            Run(
                owner=f"run {len(self.workers)} of {self.plan.seed}",
                mysql_url=self.databases.mysql_url,
                clickhouse_url=self.databases.clickhouse_url,
                clock=self.databases.clock,
                **how,
            )
        )
        self.workers.append(worker)
        return worker

    def step_clock(self, seconds: float) -> None:
        self.clock_offset_s += seconds
        # Renamed: a run may read the file at this moment.
        new = self.databases.clock.with_suffix(".new")
        new.write_text(str(self.clock_offset_s))
        new.replace(self.databases.clock)

    def month_end_in_s(self) -> float:
        """By MySQL's clock; 0 where its clock is right."""
        return _to_month_end_s(self.clock_offset_s) if self.clock_offset_s else 0.0

    def ids(self, query: str) -> list[Any]:
        """The first column of a query's result in MySQL; nothing while MySQL is down."""
        with suppress(Exception):
            return [row[0] for row in self.direct.sql(query)]
        return []

    def open_pks(self, count: int) -> list[int]:
        """Some pks of batches that are open now."""
        found = self.ids(f"SELECT pks FROM clickhouse_outbox_batch WHERE state IN ({OPEN_STATES})")
        pks = [pk for text in found for pk in PkSet.parse(text)]
        return self.random.sample(pks, min(count, len(pks)))

    def known(self, pks: Collection[int]) -> list[int]:
        """Those pks whose commit is certain."""
        with self.book.lock:
            return sorted(pk for pk in pks if pk in self.book.rows)

    # ── what has happened ────────────────────────────────────────────────────────────────────────

    def has_hit(self, name: str) -> bool:
        if name == "month changes":
            return bool(month_changes(self.databases))
        if name == "window overflowed":
            return bool(self.direct.sql("SELECT 1 FROM clickhouse_outbox_batch WHERE attempts > 1 LIMIT 1"))
        return bool((self.outcome.hits + self.found_hits())[name])

    def found_hits(self) -> Counter[str]:
        """Hits that the proxies and the results of runs show."""
        hits = self.wire_hits() - self.hits_before
        for worker in self.workers:
            if result := worker.result():
                hits += Counter({"deadlock": result.codes[1213], "lock wait": result.codes[1205]})
                hits[worker.run.verb] += worker.run.verb != "drain" and bool(result.changed)
        return hits

    def wire_hits(self) -> Counter[str]:
        proxies = (("clickhouse", self.rig.to_clickhouse), ("mysql", self.rig.to_mysql))
        return Counter(
            {f"{server} {kind}": count for server, proxy in proxies for kind, count in [*proxy.hits.items()]}
        )

    # ── the quiet at the end ─────────────────────────────────────────────────────────────────────

    def _wait_until(self, condition: Callable[[], bool], within_s: float = 30) -> None:
        deadline = time.monotonic() + within_s
        while not condition() and time.monotonic() < deadline:
            self.pause(0.05, 0.05)

    def _no_insert_runs(self) -> bool:
        with suppress(Exception):
            sql = "SELECT count() FROM system.processes WHERE query_kind = 'Insert'"
            return self.direct.clickhouse(sql) == [(0,)] and not self.rig.to_clickhouse.held
        return False

    def settle(self) -> list[str]:
        """Ends all faults, wakes the zombies, drains and reconciles; returns what is stuck."""
        self.rig.restore()
        self.direct.clickhouse("DROP VIEW IF EXISTS watching")
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
        self._wait_until(lambda: not (self.rig.to_clickhouse.held or self.rig.to_mysql.held))
        self.book.settle(self.databases)
        return self._drain_quietly() or self._reconcile_quietly()

    def _drain_quietly(self) -> list[str]:
        for _ in range(LAST_DRAINS):
            worker = self.start_run(quiet=True)
            if worker is None or not worker.wait(QUIET_WITHIN_S):
                return [f"a quiet drain did not end within {QUIET_WITHIN_S} s"]
            result = worker.result() or Result()
            if result.claimed and not result.errors:
                continue
            if not result.errors and not self._open_batches():
                return []
            self.pause(LEASE_S / 2, LEASE_S / 2)
        return [f"after {LAST_DRAINS} quiet drains there are open batches: {self._open_batches()}"]

    def _reconcile_quietly(self) -> list[str]:
        """Compares a reconciliation with the book, and repairs; after the repair it must find nothing."""
        for repaired in (False, True):
            absent = never_exported(self.databases, self.book)
            self.book.expect_requeue(1, lambda pk, row: pk in absent)  # noqa: B023 - called here and now
            worker = self.operate("reconcile", repair=True)
            if not worker.wait(QUIET_WITHIN_S) or (report := (worker.result() or Result()).report) is None:
                return [f"a quiet reconciliation did not end within {QUIET_WITHIN_S} s"]
            found = set(report.missing_pks)
            if found != absent or (repaired and absent):
                return [f"reconcile finds rows {sorted(found)} missing, the book {sorted(absent)}, repaired {repaired}"]
            if absent:
                self.hit("repair")
            if stuck := self._drain_quietly():
                return stuck
        return []

    def _open_batches(self) -> list[str]:
        rows = self.direct.sql(
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
