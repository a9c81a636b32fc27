"""The plan past this machine: what a drain would do on machines that nobody here has, worked out from what was measured here.

What belongs here: a simulation of the pipeline (`core/pipeline.py`) over machines with so many cores, so far apart; its
constants with the source of each, once; how far it is off where a measurement exists; where the walls are; what grows in a
year. What does not: measuring anything (`stages`, `speed`, `workers`, `growth`).

    python -m auditexport_tests.benchmarks.model                     # all tables, from the constants below
    python -m auditexport_tests.benchmarks.model --stages out.txt    # the same, from what `stages` printed on your machine
    python -m auditexport_tests.benchmarks.growth                    # counts again what the model takes from it: bytes, round trips

A fluid simulation: what works on a machine shares its cores evenly, up to what it can use; what waits for the network or a
disk uses none. Nothing in it is random, so a run gives the same figures every time.
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pandas as pd

from auditexport_pipeline.core.claiming import FIRST_BATCH_ROWS, FURTHER_BATCHES_GROW
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pipeline import BATCHES_IN_MEMORY

US = 1e-6
YEAR_S = 365 * 86_400


# ── constants ────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What an event, a round trip and a run cost. Microseconds of CPU an event where nothing else is said."""

    # benchmarks/README.md, "Where they go", MariaDB, 600 bytes: `stages 200000`, each stage alone.
    claim_exporter_us: float = 0.1
    claim_mysql_us: float = 0.7
    fetch_exporter_us: float = 10.0
    fetch_mysql_us: float = 1.9
    # The same command's line, 100,000 events beside other work (where a fetch took 10.7 and 1.6).
    reread_exporter_us: float = 4.9
    reread_mysql_us: float = 1.9
    write_exporter_us: float = 0.5
    write_mysql_us: float = 0.1
    write_clickhouse_us: float = 14.3
    mark_exporter_us: float = 0.4
    mark_mysql_us: float = 18.4
    verify_clickhouse_us: float = 1.2
    # The same page, "Speed": ClickHouse uses 22 of a run; less the INSERT and the verification, merges.
    merge_clickhouse_us: float = 6.5
    # MySQL uses 24 of it; less the four stages, purge and flushing, behind the marks.
    purge_mysql_us: float = 2.9
    # FACTS §1: a mark by one connection takes 24 and CPU 21: the rest is the commit's fsync.
    commit_wait_us: float = 3.0
    # FACTS §1: 24, 19 and 13.5 µs a row by 1, 2 and 4 connections: so much of a core does each of them get.
    mark_gain_2: float = 24 / 19
    mark_gain_4: float = 24 / 13.5
    # core/limits.py, blocks_per_batch: 300,000 rows take ClickHouse 6.8 CPU seconds, with two INSERTs a batch 9.6.
    two_blocks_clickhouse: float = 9.6 / 6.8
    # `growth`, on 1,000 to 100,000 rows: of MySQL, so many a batch, and besides one more for so many rows or each mark.
    fetch_trips: float = 15
    fetch_rows_a_trip: float = 1_120
    reread_trips: float = 6  # besides those for its rows
    write_trips: float = 20
    write_clickhouse_trips: float = 2
    mark_trips: float = 14
    mark_trips_a_chunk: float = 5.6
    claim_trips: float = 13
    verify_trips: float = 5.5
    # `growth`, batches of 50 rows: CPU that a batch costs however small it is, by round trip, and of one INSERT.
    trip_exporter_ms: float = 0.17
    trip_mysql_ms: float = 0.10
    insert_clickhouse_ms: float = 40
    # FACTS §3: a step in process takes 57 to 114 ms; three to a batch. README: a run begins with 3 s of imports and storage.
    step_s: float = 0.057
    steps_a_batch: int = 3
    run_start_s: float = 3.0
    event_bytes: int = 600

    @classmethod
    def of_stages(cls, printed: str) -> Costs:
        """The constants with the stages that `stages` printed; raises `ValueError` when there are none."""
        names = {
            "claim": "claim",
            "fetch: read, decode, seal": "fetch",
            "read again, on a worker": "reread",
            "write": "write",
            "mark": "mark",
            "verify": "verify",
        }
        found: dict[str, float] = {}
        known = {name for name in cls.__dataclass_fields__}  # noqa: C416 - of names, not a copy
        for line in printed.splitlines():
            read = re.match(r"\s*(?P<stage>[a-z:, ]+?)\s+(?P<numbers>-?[\d.]+(?:\s+-?[\d.]+){3})\s*$", line)
            if read is None or read["stage"] not in names:
                continue
            figures = dict(
                zip(("wall", "exporter", "mysql", "clickhouse"), map(float, read["numbers"].split()), strict=True)
            )
            for server in ("exporter", "mysql", "clickhouse"):
                if (name := f"{names[read['stage']]}_{server}_us") in known:
                    found[name] = max(0.0, figures[server])
        if len(found) < 9:
            raise ValueError("this is not what `stages` prints: no line for each of its five stages")
        return cls(**found)

    def exporter_us(self) -> float:
        return self.claim_exporter_us + self.fetch_exporter_us + self.write_exporter_us + self.mark_exporter_us

    def mysql_us(self) -> float:
        return (
            self.claim_mysql_us + self.fetch_mysql_us + self.write_mysql_us + self.mark_mysql_us + self.purge_mysql_us
        )

    def clickhouse_us(self) -> float:
        return self.write_clickhouse_us + self.verify_clickhouse_us + self.merge_clickhouse_us

    def served(self, *, mysql: float = 1.0, clickhouse: float = 1.0) -> Costs:
        """The same with databases that take so many times as long over everything; round trips and Python stay."""
        times = {"_mysql_us": mysql, "_mysql_ms": mysql, "commit_wait_us": mysql}
        times |= {"_clickhouse_us": clickhouse, "_clickhouse_ms": clickhouse}
        slower = {
            name: getattr(self, name) * by
            for name in self.__dataclass_fields__
            for ending, by in times.items()
            if name.endswith(ending)
        }
        return replace(self, **slower)

    def mark_width(self, connections: int) -> float:
        """Cores that each of so many marking connections keeps busy: they stand in each other's way."""
        gain = {1: 1.0, 2: self.mark_gain_2}.get(connections, self.mark_gain_4)
        return min(1.0, gain / connections)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Machines and how far apart they are. Without cores of their own, all three share the first."""

    exporter_cores: float = 8
    mysql_cores: float | None = 8
    clickhouse_cores: float | None = 16
    mysql_rtt_ms: float = 0.2
    clickhouse_rtt_ms: float = 0.2
    link_bytes_s: float = 1.1e9  # ten gigabits
    window_bytes: float = 4 * 1024**2  # what one TCP connection has on its way at most


# The machine of every figure in benchmarks/README.md.
HERE = Site(
    exporter_cores=2, mysql_cores=None, clickhouse_cores=None, mysql_rtt_ms=0, clickhouse_rtt_ms=0, window_bytes=1e12
)


# ── the simulation ───────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True, eq=False)
class Machine:
    cores: float
    busy_s: float = 0.0


@dataclass(slots=True, eq=False)
class Work:
    """CPU seconds on a machine, on `width` cores at most; works of one `group` share a single core, as Python's threads do."""

    machine: Machine
    seconds: float
    width: float = 1.0
    group: object = None


@dataclass(slots=True, eq=False)
class Wait:
    seconds: float


@dataclass(slots=True, eq=False)
class Store:
    """Things in order, and those who wait for one."""

    things: list[object] = field(default_factory=list)


Process = Generator["Work | Wait | Store", object, None]


class Simulation:
    """Runs processes over machines until none has anything left to do."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self._ready: list[tuple[Process, object]] = []
        self._working: dict[Process, Work] = {}
        self._waiting: dict[Process, float] = {}
        self._taking: list[tuple[Process, Store]] = []

    def start(self, process: Process) -> None:
        self._ready.append((process, None))

    def run(self) -> float:
        """The time at which the last process ends. Raises `RuntimeError` when some wait for each other for ever."""
        while True:
            self._step()
            ends = [self.now_s + left for left in self._left().values()] + list(self._waiting.values())
            if not ends:
                if self._taking:
                    raise RuntimeError(f"{len(self._taking)} processes wait for what nobody brings")
                return self.now_s
            self._advance(min(ends))

    def _step(self) -> None:
        while True:
            for taking in list(self._taking):
                process, store = taking
                if store.things:
                    self._taking.remove(taking)
                    self._ready.append((process, store.things.pop(0)))
            if not self._ready:
                return
            process, given = self._ready.pop(0)
            try:
                asked = process.send(given)
            except StopIteration:
                continue
            if isinstance(asked, Work):
                self._working[process] = asked
            elif isinstance(asked, Wait):
                self._waiting[process] = self.now_s + asked.seconds
            else:
                self._taking.append((process, asked))

    def _rates(self) -> dict[Process, float]:
        sharing: dict[tuple[int, object], int] = {}
        for work in self._working.values():
            key = (id(work.machine), work.group)
            sharing[key] = sharing.get(key, 0) + 1
        rates: dict[Process, float] = {}
        machines: dict[int, list[tuple[float, Process]]] = {}
        for process, work in self._working.items():
            share = 1.0 if work.group is None else 1 / sharing[id(work.machine), work.group]
            cap = work.width if work.group is None else min(work.width, share)
            machines.setdefault(id(work.machine), []).append((cap, process))
        for works in machines.values():
            left = self._working[works[0][1]].machine.cores
            for position, (cap, process) in enumerate(sorted(works, key=lambda work: work[0])):
                rates[process] = min(cap, left / (len(works) - position))
                left -= rates[process]
        return rates

    def _left(self) -> dict[Process, float]:
        rates = self._rates()
        return {process: work.seconds / rates[process] for process, work in self._working.items()}

    def _advance(self, to_s: float) -> None:
        spent, rates = to_s - self.now_s, self._rates()
        self.now_s = to_s
        for process, work in list(self._working.items()):
            work.seconds -= rates[process] * spent
            work.machine.busy_s += rates[process] * spent
            if work.seconds <= 1e-12:
                del self._working[process]
                self._ready.append((process, None))
        for process, due_s in list(self._waiting.items()):
            if due_s <= to_s:
                del self._waiting[process]
                self._ready.append((process, None))


AS_SHIPPED = Limits()


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one outbox is drained."""

    limits: Limits = AS_SHIPPED
    events: int = 6_400_000
    workers: int = 0  # processes that take batches one by one; 0 is one process that works ahead
    # Workers only: whether fetch hands the rows to write. Between processes it cannot, and the batch is read again.
    hands_over: bool = False
    in_memory: int = BATCHES_IN_MEMORY  # batches whose rows one that works ahead may hold
    first_rows: int = FIRST_BATCH_ROWS
    dagster: bool = True

    def batches(self) -> list[int]:
        """The sizes that `core.claiming` cuts."""
        sizes, left, rows = [], self.events, min(self.first_rows, self.limits.batch_rows)
        while left > 0:
            sizes.append(min(rows, left))
            left -= sizes[-1]
            rows = min(self.limits.batch_rows, int(rows * FURTHER_BATCHES_GROW))
        return sizes


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """Of all outboxes together. `busy` is the share of the time in which a stage had something under way."""

    events_s: float
    seconds: float
    busy: dict[str, float]
    cpu: dict[str, float]

    @property
    def wall(self) -> str:
        """The stage that all others wait for."""
        return max(self.busy, key=lambda stage: self.busy[stage])


class _Drain:
    """One outbox, one process (or some workers) on the exporter's machine, and its two databases."""

    def __init__(
        self, simulation: Simulation, machines: tuple[Machine, Machine, Machine], site: Site, costs: Costs, plan: Plan
    ) -> None:
        self.simulation = simulation
        self.exporter, self.mysql, self.clickhouse = machines
        self.site, self.costs, self.plan = site, costs, plan
        self.busy: dict[str, float] = dict.fromkeys(("claim", "fetch", "write", "mark", "verify"), 0.0)
        self.ended_s = 0.0
        simulation.start(self._whole())

    def _python(self, us: float, rows: float, group: object) -> Work:
        return Work(self.exporter, us * US * rows, group=group)

    def _trips(self, group: object, mysql: float, clickhouse: float = 0) -> Process:
        """Statements one after the other: the way there and back, and what each costs at both ends."""
        yield Wait((mysql * self.site.mysql_rtt_ms + clickhouse * self.site.clickhouse_rtt_ms) / 1000)
        yield Work(self.exporter, mysql * self.costs.trip_exporter_ms / 1000, group=group)
        yield Work(self.mysql, mysql * self.costs.trip_mysql_ms / 1000)

    def _carried(self, rows: int, rtt_ms: float) -> Wait:
        """Payloads over one connection: as fast as the link, or as its window allows at this distance."""
        bytes_s = min(self.site.link_bytes_s, self.site.window_bytes / (rtt_ms / 1000) if rtt_ms else math.inf)
        return Wait(rows * self.costs.event_bytes / bytes_s)

    def _timed(self, stage: str, steps: Iterable[Work | Wait | Store]) -> Process:
        began = self.simulation.now_s
        yield from steps
        self.busy[stage] += self.simulation.now_s - began

    def _whole(self) -> Process:
        batches = self.plan.batches()
        yield from self._timed("claim", self._claim(len(batches)))
        done = Store()
        if self.plan.workers:
            queue = Store(list(batches))
            for number in range(self.plan.workers):
                self.simulation.start(self._worker(queue, done, (id(self), number)))
        else:
            fetched, written, room = Store(), Store(), Store([None] * self.plan.in_memory)
            self.simulation.start(self._each("fetch", Store(list(batches)), fetched, self._fetch, take=room))
            self.simulation.start(self._each("write", fetched, written, self._write, give=room))
            self.simulation.start(self._each("mark", written, done, self._mark))
            if self.plan.dagster:
                self.simulation.start(self._steps(len(batches)))
        for _ in batches:
            yield done
        yield from self._timed("verify", self._verify(len(batches)))
        self.ended_s = self.simulation.now_s

    def _claim(self, batches: int) -> Process:
        yield from self._trips(self, self.costs.claim_trips * batches)
        yield Work(self.mysql, self.costs.claim_mysql_us * US * self.plan.events)
        yield self._python(self.costs.claim_exporter_us, self.plan.events, self)

    def _each(
        self,
        stage: str,
        source: Store,
        target: Store,
        verb: Callable[[int, object], Process],
        *,
        take: Store | None = None,
        give: Store | None = None,
    ) -> Process:
        for _ in self.plan.batches():
            if take is not None:
                yield take
            rows = yield source
            assert isinstance(rows, int)
            yield from self._timed(stage, verb(rows, self))
            target.things.append(rows)
            if give is not None:
                give.things.append(None)

    def _worker(self, queue: Store, done: Store, group: object) -> Process:
        while queue.things:
            rows = yield queue
            assert isinstance(rows, int)
            for stage, verb in (("fetch", self._fetch), ("write", self._write), ("mark", self._mark)):
                yield from self._timed(stage, verb(rows, group))
            done.things.append(rows)

    def _fetch(self, rows: int, group: object) -> Process:
        yield from self._trips(group, self.costs.fetch_trips + rows / self.costs.fetch_rows_a_trip)
        yield self._carried(rows, self.site.mysql_rtt_ms)
        yield Work(self.mysql, self.costs.fetch_mysql_us * US * rows)
        yield self._python(self.costs.fetch_exporter_us, rows, group)

    def _read_again(self, rows: int, group: object) -> Process:
        yield from self._trips(group, self.costs.reread_trips + rows / self.costs.fetch_rows_a_trip)
        yield self._carried(rows, self.site.mysql_rtt_ms)
        yield Work(self.mysql, self.costs.reread_mysql_us * US * rows)
        yield self._python(self.costs.reread_exporter_us, rows, group)

    def _write(self, rows: int, group: object) -> Process:
        if self.plan.workers and not self.plan.hands_over:
            yield from self._read_again(rows, group)
        blocks = self.plan.limits.blocks_per_batch
        dearer = 1.0 if blocks == 1 else self.costs.two_blocks_clickhouse
        yield from self._trips(group, self.costs.write_trips, self.costs.write_clickhouse_trips)
        yield Work(self.mysql, self.costs.write_mysql_us * US * rows)
        yield self._python(self.costs.write_exporter_us, rows, group)
        yield self._carried(rows // blocks, self.site.clickhouse_rtt_ms)
        yield Work(self.clickhouse, blocks * self.costs.insert_clickhouse_ms / 1000, width=blocks)
        yield Work(self.clickhouse, self.costs.write_clickhouse_us * US * rows * dearer, width=blocks)
        self.simulation.start(self._behind(self.clickhouse, self.costs.merge_clickhouse_us * US * rows * dearer))

    def _behind(self, machine: Machine, seconds: float) -> Process:
        yield Work(machine, seconds)

    def _mark(self, rows: int, group: object) -> Process:
        limits = self.plan.limits
        chunks = max(1, math.ceil(rows / limits.mark_rows))
        connections = min(limits.mark_connections, chunks)
        yield self._python(self.costs.mark_exporter_us, rows, group)
        yield from self._trips(
            group, self.costs.mark_trips + self.costs.mark_trips_a_chunk * (chunks - 1) / connections
        )
        yield Wait(self.costs.commit_wait_us * US * rows / connections)
        width = self.costs.mark_width(connections) * connections
        yield Work(self.mysql, self.costs.mark_mysql_us * US * rows, width=width)
        self.simulation.start(self._behind(self.mysql, self.costs.purge_mysql_us * US * rows))

    def _steps(self, batches: int) -> Process:
        for _ in range(batches):
            yield Work(self.exporter, self.costs.step_s * self.costs.steps_a_batch, group=self)

    def _verify(self, batches: int) -> Process:
        yield from self._trips(self, self.costs.verify_trips * batches, math.ceil(batches / 3))
        yield Work(self.clickhouse, self.costs.verify_clickhouse_us * US * self.plan.events)


def simulate(site: Site, plan: Plan, costs: Costs, *, outboxes: int = 1, a_clickhouse: int = 1) -> Outcome:
    """Drains `outboxes` at once: each has a MySQL of its own, `a_clickhouse` of them share a ClickHouse, all one exporter's machine."""
    simulation = Simulation()
    exporter = Machine(site.exporter_cores)
    drains: list[_Drain] = []
    servers: list[tuple[Machine, Machine]] = []
    for number in range(outboxes):
        mysql = exporter if site.mysql_cores is None else Machine(site.mysql_cores)
        if site.clickhouse_cores is None:
            clickhouse = exporter
        elif number % a_clickhouse == 0:
            clickhouse = Machine(site.clickhouse_cores)
        else:
            clickhouse = servers[-1][1]
        servers.append((mysql, clickhouse))
        drains.append(_Drain(simulation, (exporter, mysql, clickhouse), site, costs, plan))
    simulation.run()
    seconds = max(drain.ended_s for drain in drains)
    stages = {stage: sum(drain.busy[stage] for drain in drains) / outboxes / seconds for stage in drains[0].busy}
    cpu = {"exporter": exporter.busy_s / seconds / exporter.cores}
    if site.mysql_cores is not None:
        cpu["MySQL"] = max(mysql.busy_s / mysql.cores for mysql, _ in servers) / seconds
    if site.clickhouse_cores is not None:
        cpu["ClickHouse"] = max(clickhouse.busy_s / clickhouse.cores for _, clickhouse in servers) / seconds
    return Outcome(events_s=plan.events * outboxes / seconds, seconds=seconds, busy=stages, cpu=cpu)


# ── how far it is off ────────────────────────────────────────────────────────────────────────────

FAR = replace(HERE, mysql_rtt_ms=20, clickhouse_rtt_ms=50)


def _shared_batches(rows: int, events: int, workers: int, *, hands_over: bool = False) -> Plan:
    return Plan(
        limits=Limits(batch_rows=rows),
        events=events,
        workers=workers,
        hands_over=hands_over,
        first_rows=rows,
        dagster=False,
    )


def mysql_9(costs: Costs) -> Costs:
    """The same page's CPU figures for MySQL 9: MySQL 42 a run instead of 24, the exporter 17 instead of 16."""
    times = 42 / 24
    return replace(
        costs,
        claim_mysql_us=costs.claim_mysql_us * times,
        fetch_mysql_us=costs.fetch_mysql_us * times,
        mark_mysql_us=costs.mark_mysql_us * times,
        purge_mysql_us=costs.purge_mysql_us * times,
        fetch_exporter_us=costs.fetch_exporter_us * 17 / 16,
    )


# What was measured, on two cores that everything shares: all throughputs of a backlog of 600 bytes that the benchmarks' page
# and FACTS §1 have of us. None went into the constants. Name, events/s, where, how, and whether MySQL 9 did it.
MEASURED: tuple[tuple[str, float, Site, Plan, bool], ...] = (
    ("speed: a drain of a million, MariaDB", 31_450, HERE, Plan(events=1_000_000), False),
    ("speed: a drain of a million, MySQL 9", 23_999, HERE, Plan(events=1_000_000), True),
    (
        "FACTS: one after the other, 50,000 a batch",
        20_000,
        HERE,
        _shared_batches(50_000, 1_000_000, 1, hands_over=True),
        False,
    ),
    ("workers: 25,000 a batch, 1 worker", 22_493, HERE, _shared_batches(25_000, 300_000, 1), False),
    ("  2 workers", 30_279, HERE, _shared_batches(25_000, 300_000, 2), False),
    ("  4 workers", 31_444, HERE, _shared_batches(25_000, 300_000, 4), False),
    ("  one, working ahead", 31_974, HERE, _shared_batches(25_000, 300_000, 0), False),
    ("25,000 a batch, 20 and 50 ms away, 1 worker", 6_689, FAR, _shared_batches(25_000, 300_000, 1), False),
    ("  2 workers, away", 10_173, FAR, _shared_batches(25_000, 300_000, 2), False),
    ("  4 workers, away", 14_075, FAR, _shared_batches(25_000, 300_000, 4), False),
    ("  one, working ahead, away", 13_583, FAR, _shared_batches(25_000, 300_000, 0), False),
    ("workers: 1,000 a batch, 1 worker", 8_098, HERE, _shared_batches(1_000, 60_000, 1), False),
    ("  2 workers, 1,000 a batch", 9_698, HERE, _shared_batches(1_000, 60_000, 2), False),
    ("  4 workers, 1,000 a batch", 10_573, HERE, _shared_batches(1_000, 60_000, 4), False),
    ("  one, working ahead, 1,000 a batch", 9_360, HERE, _shared_batches(1_000, 60_000, 0), False),
    ("1,000 a batch, 20 and 50 ms away, 1 worker", 617, FAR, _shared_batches(1_000, 60_000, 1), False),
    ("  2 workers, 1,000 a batch, away", 1_044, FAR, _shared_batches(1_000, 60_000, 2), False),
    ("  4 workers, 1,000 a batch, away", 1_438, FAR, _shared_batches(1_000, 60_000, 4), False),
    ("  one, working ahead, 1,000 a batch, away", 1_050, FAR, _shared_batches(1_000, 60_000, 0), False),
)
# So full may a machine be: beyond it, the model knows no price of what works crowding each other costs, and a deployment has
# no reserve for a peak.
FULL = 0.7
# What "off by" stays within on machines that are less full than that; a test holds it.
STATED_ERROR = 0.25


def validation(costs: Costs) -> pd.DataFrame:
    """Measured against modelled, one row a measurement; `full` is the modelled share of the cores that are busy."""
    lines = []
    for name, measured, site, plan, nine in MEASURED:
        outcome = simulate(site, plan, mysql_9(costs) if nine else costs)
        lines.append(
            (name, measured, round(outcome.events_s), outcome.events_s / measured - 1, max(outcome.cpu.values()))
        )
    return pd.DataFrame(lines, columns=["measurement", "measured", "modelled", "off by", "full"])


# ── where the walls are ──────────────────────────────────────────────────────────────────────────

LADDER: tuple[tuple[str, dict[str, int]], ...] = (
    ("as shipped", {}),
    ("mark_connections 4", {"mark_connections": 4}),
    ("and blocks_per_batch 2", {"mark_connections": 4, "blocks_per_batch": 2}),
)
RTTS_MS = (0.2, 2.0, 20.0, 50.0)
BATCHES = (1_000, 10_000, 25_000, 100_000)
SIZES = (100_000, 1_000_000)


def by_batch_and_distance(costs: Costs) -> pd.DataFrame:
    """Events/s of one outbox as shipped, on machines of its own: one row a batch size, one column a round trip."""
    table = {}
    for rtt_ms in RTTS_MS:
        site = Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms)
        table[f"{rtt_ms:g} ms"] = {
            f"{rows:,}": round(
                simulate(site, Plan(limits=Limits(batch_rows=rows), events=rows * 64), costs).events_s, -2
            )
            for rows in BATCHES
        }
    return pd.DataFrame(table).astype(int).rename_axis("batch_rows")


def ladder(costs: Costs, rtt_ms: float = 0.2) -> pd.DataFrame:
    """One outbox on machines of its own: what it waits for, what moves that, and what it waits for then."""
    lines = []
    site = Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms)
    for name, limits in LADDER:
        outcome = simulate(site, Plan(limits=Limits(**limits)), costs)
        shares = {stage: round(share, 2) for stage, share in outcome.busy.items()}
        lines.append((name, round(outcome.events_s, -2), outcome.wall, *shares.values()))
    two = simulate(site, Plan(limits=Limits(mark_connections=4)), costs, outboxes=2, a_clickhouse=2)
    shares = {stage: round(share, 2) for stage, share in two.busy.items()}
    lines.append(("a second outbox, mark_connections 4", round(two.events_s, -2), two.wall, *shares.values()))
    table = pd.DataFrame(lines, columns=["", "events/s", "waits for", *outcome.busy])
    return table.astype({"events/s": int}).set_index("")


# Each with the batches in flight: one a worker, or what working ahead holds in memory and the one that is being marked.
WORKERS: dict[str, tuple[int, dict[str, int]]] = {
    "1 worker": (1, {"workers": 1}),
    "2 workers": (2, {"workers": 2}),
    "4 workers": (4, {"workers": 4}),
    "8 workers": (8, {"workers": 8}),
    "working ahead, 1 in memory": (2, {"in_memory": 1}),
    "working ahead, 2, as shipped": (BATCHES_IN_MEMORY + 1, {"in_memory": BATCHES_IN_MEMORY}),
    "working ahead, 4": (5, {"in_memory": 4}),
}
TIMES = (0.5, 1.0, 2.0)


def by_workers_and_distance(costs: Costs) -> pd.DataFrame:
    """Events/s of one outbox on machines of its own, without Dagster's part: one row a way to share its batches, one column
    a round trip.
    """
    lines = {}
    for name, (in_flight, ways) in WORKERS.items():
        plan = Plan(dagster=False, **ways)
        lines[name] = {"in flight": in_flight} | {
            f"{rtt_ms:g} ms": round(
                simulate(Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms), plan, costs).events_s, -2
            )
            for rtt_ms in RTTS_MS
        }
    return pd.DataFrame(lines).T.astype(int)


def by_service_time(costs: Costs, rtt_ms: float = 0.2) -> pd.DataFrame:
    """Events/s of one outbox as shipped: one row for how long MySQL takes over all it does, one column for ClickHouse."""
    site = Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms)
    table = {
        f"ClickHouse × {clickhouse:g}": {
            f"MySQL × {mysql:g}": round(
                simulate(site, Plan(), costs.served(mysql=mysql, clickhouse=clickhouse)).events_s, -2
            )
            for mysql in TIMES
        }
        for clickhouse in TIMES
    }
    return pd.DataFrame(table).astype(int)


def fleet(target: int, costs: Costs, rtt_ms: float = 0.2, cores: int = 16) -> dict[str, float]:
    """What it takes to carry `target` events/s with machines of `cores`, none of them and no outbox fuller than `FULL`."""
    site = Site(mysql_rtt_ms=rtt_ms, clickhouse_rtt_ms=rtt_ms, clickhouse_cores=cores)
    plan = Plan(limits=Limits(mark_connections=4))
    outboxes = math.ceil(target / (simulate(site, plan, costs).events_s * FULL))
    each = target / outboxes
    a_clickhouse = max(1, math.floor(FULL * cores / (each * costs.clickhouse_us() * US)))
    steps_us = costs.steps_a_batch * costs.step_s / plan.limits.batch_rows / US
    exporters = math.ceil(target * (costs.exporter_us() + steps_us) * US / (FULL * cores))
    site = replace(site, exporter_cores=exporters * cores)
    outcome = simulate(site, plan, costs, outboxes=outboxes, a_clickhouse=a_clickhouse)
    servers = math.ceil(outboxes / a_clickhouse)
    a_clickhouse = math.ceil(outboxes / servers)
    return {
        "outboxes, each with a MySQL": outboxes,
        "events/s of each": round(each, -2),
        "MySQL cores for it, each": round(each * costs.mysql_us() * US / FULL, 1),
        f"exporter hosts of {cores} cores": exporters,
        f"ClickHouse servers of {cores} cores": servers,
        "MB/s into each of these": round(each * a_clickhouse * costs.event_bytes / 1e6),
        "new parts/s in each, batches of 100,000": round(each * a_clickhouse / plan.limits.batch_rows, 1),
        "new parts/s in each, runs that stay": round(a_clickhouse * 1000 / plan.limits.linger_poll_ms, 1),
        "runs a day": round(outboxes * runs_a_day(each / plan.limits.batch_rows * 86_400, plan.limits)),
        "they could do, events/s": round(outcome.events_s, -3),
    }


# ── what grows ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Growth:
    """Bytes that stay, indexes included; from `growth 4` on MariaDB 10.11, Dagster 1.13.27 and PostgreSQL 15."""

    batch_bytes: float = 1_285  # whose rows lie together; 667 rows of every third pk: 8,462
    record_bytes: float = 772  # of the same, compacted
    run_bytes: float = 102_400  # a run of one batch in PostgreSQL, 50 events; in SQLite 243,000
    run_batch_bytes: float = 41_900  # each batch more of it, 27 events; in SQLite 75,500
    tick_bytes: float = 1_180  # in PostgreSQL, a skipped one; in SQLite 1,310


SCHEDULED_RUNS_A_DAY = 96.0  # the export schedule's, every 15 minutes


def runs_a_day(batches_a_day: float, limits: Limits = AS_SHIPPED) -> float:
    """The schedule's, or as many as it takes when each ends after `max_batches`: the sensor launches those between."""
    return max(SCHEDULED_RUNS_A_DAY, batches_a_day / limits.max_batches)


@dataclass(frozen=True, slots=True, kw_only=True)
class Way:
    """How one outbox is drained, a day. Of a batch that a run makes while it stays, Dagster stores nothing."""

    batches: float
    runs: float
    stays: bool = False

    @property
    def batches_in_steps(self) -> float:
        """Beyond each run's first, whose steps and observation are in what a run leaves."""
        return 0.0 if self.stays else self.batches - self.runs


_BATCHES_AT_20_000 = 20_000 / AS_SHIPPED.batch_rows * 86_400
WAYS: dict[str, Way] = {
    "20,000 events/s in batches of 100,000": Way(batches=_BATCHES_AT_20_000, runs=runs_a_day(_BATCHES_AT_20_000)),
    "the same, max_batches 180": Way(
        batches=_BATCHES_AT_20_000, runs=runs_a_day(_BATCHES_AT_20_000, Limits(max_batches=180))
    ),
    "a run a minute, of one batch": Way(batches=1_440, runs=1_440),
    "linger_s 900, something in every look": Way(batches=2 * 86_400, runs=SCHEDULED_RUNS_A_DAY, stays=True),
    "linger_s 900, linger_poll_ms 5000": Way(batches=86_400 / 5, runs=SCHEDULED_RUNS_A_DAY, stays=True),
}
TICKS_A_DAY = 86_400 / 15  # the sensor's; it skips nearly all of them
# As shipped: `ledger_days` of the sweep, `run_days` of the purge, skipped ticks in dagster.yaml.
LEDGER_DAYS, RUN_DAYS, TICK_DAYS = 400, 30, 2


def yearly(growth: Growth) -> pd.DataFrame:
    """Gigabytes of one outbox: of the ledger in the first 400 days and in each year after, of Dagster's storage without purges
    and with them. One row a way to drain.
    """
    table = {}
    for name, way in WAYS.items():
        runs_bytes_a_day = way.runs * growth.run_bytes + way.batches_in_steps * growth.run_batch_bytes
        ticks_bytes_a_day = TICKS_A_DAY * growth.tick_bytes
        table[name] = {
            "batches a day": f"{way.batches:,.0f}",
            "runs a day": f"{way.runs:,.0f}",
            "ledger at 400 days": way.batches * LEDGER_DAYS * growth.batch_bytes / 1e9,
            "and a year more": way.batches * 365 * growth.record_bytes / 1e9,
            "Dagster a year": 365 * (runs_bytes_a_day + ticks_bytes_a_day) / 1e9,
            "with its purges": (RUN_DAYS * runs_bytes_a_day + TICK_DAYS * ticks_bytes_a_day) / 1e9,
        }
    return pd.DataFrame(table).T


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--stages", type=Path, help="what `stages` printed, instead of the constants")
    chosen = parser.parse_args(arguments)
    costs = Costs.of_stages(chosen.stages.read_text()) if chosen.stages else Costs()
    print(
        f"microseconds of CPU an event: exporter {costs.exporter_us():.1f}, MySQL {costs.mysql_us():.1f}, "
        f"ClickHouse {costs.clickhouse_us():.1f}"
    )
    with pd.option_context("display.width", 250, "display.max_columns", 20, "display.max_colwidth", 60):
        for title, table in (
            ("How far it is off (two cores that everything shares)", _readable(validation(costs))),
            (
                "One outbox as shipped, 64 batches, events/s by batch size and round trip to both databases",
                by_batch_and_distance(costs),
            ),
            ("One outbox, events/s by workers and round trip to both databases", by_workers_and_distance(costs)),
            ("One outbox as shipped, in the same zone, events/s by how long a database takes", by_service_time(costs)),
            ("The same, 20 ms away", by_service_time(costs, 20.0)),
            ("What one outbox waits for, in the same zone", ladder(costs)),
            ("The same, 20 ms away", ladder(costs, 20.0)),
            (
                "Machines for a rate, in the same zone",
                _whole({f"{size:,}/s": fleet(size, costs) for size in SIZES}),
            ),
            ("What grows: gigabytes of one outbox", yearly(Growth())),
        ):
            lines = table.to_string(float_format="{:,.2f}".format).splitlines()
            print(f"\n{title}\n" + "\n".join(line.rstrip() for line in lines if line.strip()))


def _readable(table: pd.DataFrame) -> pd.DataFrame:
    shown = table.assign(
        **{"off by": [f"{off:+.0%}" for off in table["off by"]], "full": [f"{full:.0%}" for full in table["full"]]}
    )
    shown[" "] = ["too full to tell" if full > FULL else "" for full in table["full"]]
    # Names are indented under their heading, and need no more words there.
    shown["measurement"] = [re.sub(r"^(  [^,]+(?:, working ahead)?).*", r"\1", name) for name in table["measurement"]]
    shown["measurement"] = shown["measurement"].str.ljust(shown["measurement"].str.len().max())
    return shown.rename(columns={"measurement": ""}).set_index("")


def _whole(columns: dict[str, dict[str, float]]) -> pd.DataFrame:
    return pd.DataFrame(
        {
            name: {key: f"{value:,g}" if value < 1e6 else f"{value:,.0f}" for key, value in column.items()}
            for name, column in columns.items()
        }
    )


if __name__ == "__main__":
    main()
