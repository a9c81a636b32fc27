"""A model of a drain on larger machines, further apart, from costs that other benchmarks measured.

A batch uses CPU on three machines and waits for round trips. A process that prefetches is as fast as its slowest stage. A
worker does the stages of a batch one after the other. No machine gives more CPU than it has cores.

    python -m auditexport_tests.benchmarks.model                                        # the tables of docs/scale.md
    python -m auditexport_tests.benchmarks.model --set mark_mysql_us=12 event_bytes=900 # with costs of your machine
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace

import pandas as pd

from auditexport_pipeline.core.claiming import FIRST_BATCH_ROWS
from auditexport_pipeline.core.settings import Limits

AS_SHIPPED = Limits()
# Above this a machine has no room for a peak, and the model does not know what contention costs.
FULL = 0.7


@dataclass(frozen=True, slots=True, kw_only=True)
class Costs:
    """What an event, a round trip, an INSERT and a step cost. `_us` is CPU an event, `_trips` are round trips a batch."""

    # benchmarks/README.md, the stages of a drain: `stages 200000` on MariaDB, events of 600 bytes.
    claim_exporter_us: float = 0.1
    claim_mysql_us: float = 0.7
    fetch_exporter_us: float = 10.0
    fetch_mysql_us: float = 1.9
    reread_exporter_us: float = 4.9  # a worker that did not fetch the batch itself: `stages 100000`
    reread_mysql_us: float = 1.9
    write_exporter_us: float = 0.5
    write_mysql_us: float = 0.1
    write_clickhouse_us: float = 14.3
    mark_exporter_us: float = 0.4
    mark_mysql_us: float = 18.4
    verify_clickhouse_us: float = 1.2
    # The same page, "Speed": what ClickHouse (22) and MySQL (24) use in a whole run beyond the stages, behind them.
    merge_clickhouse_us: float = 6.5
    purge_mysql_us: float = 2.9
    # A mark by one connection takes 24 µs of which 21 are CPU; by 1, 2 and 4 connections 24, 19 and 13.5.
    commit_wait_us: float = 3.0
    two_connections_gain: float = 24 / 19
    four_connections_gain: float = 24 / 13.5
    # core/settings.py, blocks_per_batch: 300,000 rows take ClickHouse 6.8 CPU seconds, with two INSERTs a batch 9.6.
    two_blocks_clickhouse: float = 9.6 / 6.8
    # `growth`, batches of 1,000 to 100,000 rows.
    claim_trips: float = 13
    fetch_trips: float = 15
    rows_a_trip: float = 1_120
    reread_trips: float = 6
    write_trips: float = 20
    write_clickhouse_trips: float = 2
    mark_trips: float = 14
    mark_trips_a_chunk: float = 5.6
    verify_trips: float = 5.5
    # `growth`, batches of 50 rows: CPU of a round trip at both ends, and of one INSERT however small.
    trip_exporter_us: float = 170
    trip_mysql_us: float = 100
    insert_clickhouse_us: float = 40_000
    # A Dagster step in process takes 57 ms at least; a batch has three.
    steps_s: float = 3 * 0.057
    event_bytes: float = 600


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """Machines and the round trips between them. With `shared` all run on the exporter's cores."""

    exporter_cores: float = 8
    mysql_cores: float = 8
    clickhouse_cores: float = 16
    shared: bool = False
    mysql_ms: float = 0.2
    clickhouse_ms: float = 0.2
    link_bytes_s: float = 1.1e9  # ten gigabits
    window_bytes: float = 4 * 1024**2  # what one TCP connection has in flight at most

    def carry_s(self, size_bytes: float, round_trip_ms: float) -> float:
        in_flight = self.window_bytes / (round_trip_ms / 1000) if round_trip_ms else math.inf
        return size_bytes / min(self.link_bytes_s, in_flight)


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """How one outbox is drained: `workers` take batches one by one; 0 is one process that prefetches."""

    limits: Limits = AS_SHIPPED
    events: int = 6_400_000
    workers: int = 0
    dagster: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class Stage:
    """Seconds of one batch: CPU on each machine, and wall time."""

    exporter_s: float = 0.0
    mysql_s: float = 0.0
    clickhouse_s: float = 0.0
    wall_s: float


def stages_of(rows: float, site: Site, plan: Plan, costs: Costs) -> dict[str, Stage]:
    """Each stage of a batch of `rows`, on idle machines."""
    limits, us = plan.limits, 1e-6

    def stage(
        name: str, trips: float, *, wait_s: float = 0.0, mysql_width: float = 1.0, clickhouse_s: float = 0.0
    ) -> Stage:
        exporter_s = us * (trips * costs.trip_exporter_us + rows * getattr(costs, f"{name}_exporter_us", 0.0))
        statements_s = us * trips * costs.trip_mysql_us
        rows_s = us * rows * getattr(costs, f"{name}_mysql_us", 0.0)
        wall_s = wait_s + trips * site.mysql_ms / 1000 + exporter_s + statements_s + rows_s / mysql_width
        return Stage(
            exporter_s=exporter_s,
            mysql_s=statements_s + rows_s,
            clickhouse_s=clickhouse_s,
            wall_s=wall_s + clickhouse_s / (blocks if name == "write" else 1),
        )

    blocks = limits.blocks_per_batch
    read_s = site.carry_s(rows * costs.event_bytes, site.mysql_ms)
    sent_s = site.carry_s(rows * costs.event_bytes / blocks, site.clickhouse_ms)
    sent_s += costs.write_clickhouse_trips * site.clickhouse_ms / 1000
    insert_s = us * (blocks * costs.insert_clickhouse_us + rows * costs.write_clickhouse_us * dearer(limits, costs))
    chunks = math.ceil(rows / limits.mark_rows)
    connections = min(limits.mark_connections, chunks)
    gain = (1.0, costs.two_connections_gain, costs.two_connections_gain, costs.four_connections_gain)
    mark_trips = costs.mark_trips + costs.mark_trips_a_chunk * (chunks - 1) / connections
    commits_s = us * rows * costs.commit_wait_us / connections
    return {
        "claim": stage("claim", costs.claim_trips),
        "fetch": stage("fetch", costs.fetch_trips + rows / costs.rows_a_trip, wait_s=read_s),
        "reread": stage("reread", costs.reread_trips + rows / costs.rows_a_trip, wait_s=read_s),
        "write": stage("write", costs.write_trips, wait_s=sent_s, clickhouse_s=insert_s),
        "mark": stage("mark", mark_trips, wait_s=commits_s, mysql_width=gain[min(connections, 4) - 1]),
        "verify": stage(
            "verify",
            costs.verify_trips,
            wait_s=site.clickhouse_ms / 3000,
            clickhouse_s=us * rows * costs.verify_clickhouse_us,
        ),
    }


def dearer(limits: Limits, costs: Costs) -> float:
    """How much more CPU ClickHouse takes for a batch in several blocks."""
    return 1.0 if limits.blocks_per_batch == 1 else costs.two_blocks_clickhouse


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """`busy` is the share of the time in which a stage works, `cpu` that of each machine's cores."""

    events_s: float
    busy: dict[str, float]
    cpu: dict[str, float]

    @property
    def wall(self) -> str:
        """The stage that the others wait for."""
        return max(self.busy, key=lambda stage: self.busy[stage])


def drain(site: Site, plan: Plan, costs: Costs) -> Outcome:
    """One outbox: as fast as its slowest stage or its workers, and as a machine's cores allow."""
    rows = min(plan.limits.batch_rows, plan.events)
    batches = plan.events / rows
    stages = stages_of(rows, site, plan, costs)
    if plan.workers:
        write, again = stages["write"], stages["reread"]
        stages["write"] = Stage(**{name: getattr(write, name) + getattr(again, name) for name in Stage.__slots__})
    del stages["reread"]
    overlapping = [stages[name] for name in ("fetch", "write", "mark")]
    python_s = sum(stage.exporter_s for stage in overlapping) + (costs.steps_s if plan.dagster else 0.0)
    if plan.workers:
        batch_s, fill_s = sum(stage.wall_s for stage in overlapping) / min(plan.workers, batches), 0.0
    else:
        batch_s = max(python_s, *(stage.wall_s for stage in overlapping))
        first = stages_of(min(rows, FIRST_BATCH_ROWS), site, plan, costs)
        walls = [first[name].wall_s for name in ("fetch", "write", "mark")]
        fill_s = sum(walls) - max(walls)
    seconds = fill_s + batches * (batch_s + stages["claim"].wall_s + stages["verify"].wall_s)

    behind = plan.events * 1e-6
    exporter_s = batches * (python_s + stages["claim"].exporter_s + stages["verify"].exporter_s)
    mysql_s = batches * sum(stage.mysql_s for stage in stages.values()) + behind * costs.purge_mysql_us
    clickhouse_s = batches * sum(stage.clickhouse_s for stage in stages.values())
    clickhouse_s += behind * costs.merge_clickhouse_us * dearer(plan.limits, costs)
    if site.shared:
        needed = {"exporter": (exporter_s + mysql_s + clickhouse_s) / site.exporter_cores}
    else:
        needed = {
            "exporter": exporter_s / site.exporter_cores,
            "MySQL": mysql_s / site.mysql_cores,
            "ClickHouse": clickhouse_s / site.clickhouse_cores,
        }
    seconds = max(seconds, *needed.values())
    return Outcome(
        events_s=plan.events / seconds,
        busy={name: batches * stage.wall_s / seconds for name, stage in stages.items()},
        cpu={name: cores_s / seconds for name, cores_s in needed.items()},
    )


# ── how far it is off ────────────────────────────────────────────────────────────────────────────

HERE = Site(exporter_cores=2, shared=True, mysql_ms=0, clickhouse_ms=0, window_bytes=math.inf)
FAR = replace(HERE, mysql_ms=20, clickhouse_ms=50)


def _workers(count: int) -> str:
    return {0: "prefetching, as shipped", 1: "1 worker"}.get(count, f"{count} workers")


def measured() -> list[tuple[str, float, Site, Plan]]:
    """Throughputs of benchmarks/README.md, none of which is in the constants."""

    def workers(rows: int, events: int, count: int) -> Plan:
        return Plan(limits=Limits(batch_rows=rows), events=events, workers=count, dagster=False)

    lines = [("speed: a drain of a million", 31_450.0, HERE, Plan(events=1_000_000))]
    for rows, events, near, far in (
        (25_000, 300_000, (22_493, 30_279, 31_444, 31_974), (6_689, 10_173, 14_075, 13_583)),
        (1_000, 60_000, (8_098, 9_698, 10_573, 9_360), (617, 1_044, 1_438, 1_050)),
    ):
        for where, site, rates in (("here", HERE, near), ("20 and 50 ms away", FAR, far)):
            for count, rate in zip((1, 2, 4, 0), rates, strict=True):
                name = f"{rows:,} a batch, {where}, {_workers(count)}"
                lines.append((name, float(rate), site, workers(rows, events, count)))
    return lines


def validation(costs: Costs) -> pd.DataFrame:
    lines = {}
    for name, rate, site, plan in measured():
        outcome = drain(site, plan, costs)
        full = max(outcome.cpu.values())
        lines[name] = {
            "measured": f"{rate:,.0f}",
            "modelled": f"{outcome.events_s:,.0f}",
            "off by": f"{outcome.events_s / rate - 1:+.0%}",
            "full": f"{full:.0%}",
        }
    return pd.DataFrame(lines).T


# ── tables ───────────────────────────────────────────────────────────────────────────────────────

ROUND_TRIPS_MS = (0.2, 2.0, 20.0, 50.0)


def _rate(site: Site, plan: Plan, costs: Costs) -> str:
    return f"{round(drain(site, plan, costs).events_s, -2):,.0f}"


def by_distance(plans: dict[str, Plan], costs: Costs) -> pd.DataFrame:
    """Events/s of one outbox on machines of its own: one row a plan, one column a round trip to both databases."""
    return pd.DataFrame(
        {
            f"{ms:g} ms": {
                name: _rate(Site(mysql_ms=ms, clickhouse_ms=ms), plan, costs) for name, plan in plans.items()
            }
            for ms in ROUND_TRIPS_MS
        }
    )


def walls(costs: Costs, ms: float) -> pd.DataFrame:
    """What one outbox waits for, as shipped and with other settings."""
    site, lines = Site(mysql_ms=ms, clickhouse_ms=ms), {}
    for name, limits in (
        ("as shipped", Limits()),
        ("mark_connections 4", Limits(mark_connections=4)),
        ("and blocks_per_batch 2", Limits(mark_connections=4, blocks_per_batch=2)),
    ):
        outcome = drain(site, Plan(limits=limits), costs)
        shares = {stage: f"{share:.2f}" for stage, share in outcome.busy.items()}
        lines[name] = {"events/s": f"{round(outcome.events_s, -2):,.0f}", "waits for": outcome.wall, **shares}
    return pd.DataFrame(lines).T


def fleet(target: int, costs: Costs, cores: int = 16) -> dict[str, float]:
    """Machines of `cores` that carry `target` events/s in one zone, none of them and no outbox fuller than `FULL`."""
    plan = Plan(limits=Limits(mark_connections=4))
    one = drain(Site(), plan, costs)
    outboxes = math.ceil(target / (one.events_s * FULL))
    each = target / outboxes

    def cores_a_rate(machine: str, of: float) -> float:
        return one.cpu[machine] * of / one.events_s

    a_clickhouse = max(1, math.floor(FULL * cores / (each * cores_a_rate("ClickHouse", Site().clickhouse_cores))))
    servers = math.ceil(outboxes / a_clickhouse)
    a_clickhouse = math.ceil(outboxes / servers)
    return {
        "outboxes, each with a MySQL": outboxes,
        "events/s of each": round(each, -2),
        "MySQL cores for each": round(each * cores_a_rate("MySQL", Site().mysql_cores) / FULL, 1),
        f"exporter hosts of {cores} cores": math.ceil(
            target * cores_a_rate("exporter", Site().exporter_cores) / (FULL * cores)
        ),
        f"ClickHouse servers of {cores} cores": servers,
        "MB/s into each of these": round(each * a_clickhouse * costs.event_bytes / 1e6),
        "new parts/s in each, batches of 100,000": round(each * a_clickhouse / plan.limits.batch_rows, 1),
        "new parts/s in each, runs that stay": round(a_clickhouse * 1000 / plan.limits.linger_poll_ms, 1),
        "runs a day": round(outboxes * runs_a_day(each / plan.limits.batch_rows * 86_400)),
    }


# `growth 4` on MariaDB 10.11, Dagster 1.13.27 and PostgreSQL 15: bytes that stay, indexes included.
BATCH_BYTES, RECORD_BYTES = 1_285, 772  # in the ledger, and compacted
RUN_BYTES, RUN_BATCH_BYTES, TICK_BYTES = (
    102_400,
    41_900,
    1_180,
)  # in PostgreSQL: a run of one batch, each one more, a tick
# As shipped: the schedule's runs, the sensor's ticks, ledger_days, run_days, and skipped ticks in dagster.yaml.
SCHEDULED_RUNS, TICKS = 96.0, 86_400 / 15
LEDGER_DAYS, RUN_DAYS, TICK_DAYS = 400, 30, 2


def runs_a_day(batches: float, max_batches: int = AS_SHIPPED.max_batches) -> float:
    """The schedule's, or more where `max_batches` ends them earlier."""
    return max(SCHEDULED_RUNS, batches / max_batches)


def year(batches: float, runs: float, *, stays: bool = False) -> dict[str, float]:
    """Gigabytes of one outbox by batches and runs a day. Of the batches of a run that stays, Dagster stores the first only."""
    run_bytes = runs * RUN_BYTES + (0 if stays else batches - runs) * RUN_BATCH_BYTES
    return {
        "batches a day": batches,
        "runs a day": runs,
        "ledger at 400 days": batches * LEDGER_DAYS * BATCH_BYTES / 1e9,
        "and a year more": batches * 365 * RECORD_BYTES / 1e9,
        "Dagster a year": 365 * (run_bytes + TICKS * TICK_BYTES) / 1e9,
        "with its purges": (RUN_DAYS * run_bytes + TICK_DAYS * TICKS * TICK_BYTES) / 1e9,
    }


def growth() -> pd.DataFrame:
    full = 20_000 * 86_400 / AS_SHIPPED.batch_rows
    return pd.DataFrame(
        {
            "20,000 events/s in batches of 100,000": year(full, runs_a_day(full)),
            "a run a minute, of one batch": year(1_440, 1_440),
            "linger_s 900, rows at each poll": year(2 * 86_400, SCHEDULED_RUNS, stays=True),
            "linger_s 900, linger_poll_ms 5000": year(86_400 / 5, SCHEDULED_RUNS, stays=True),
        }
    ).T


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--set", nargs="*", default=[], metavar="COST=VALUE", help="costs of another machine")
    given = dict(pair.split("=") for pair in parser.parse_args(arguments).set)
    costs = Costs(**{name: float(value) for name, value in given.items()})
    batches = {f"{rows:,}": rows for rows in (1_000, 10_000, 25_000, 100_000)}
    sizes = {name: Plan(limits=Limits(batch_rows=rows), events=rows * 64) for name, rows in batches.items()}
    ways = {_workers(count): Plan(workers=count, dagster=False) for count in (1, 2, 4, 8)}
    ways[_workers(0)] = Plan(dagster=False)
    tables = [
        ("How far it is off", validation(costs)),
        ("Events/s by batch_rows and round trip", by_distance(sizes, costs)),
        ("Events/s by workers and round trip", by_distance(ways, costs)),
        ("Machines for a rate", pd.DataFrame({f"{rate:,}/s": fleet(rate, costs) for rate in (100_000, 1_000_000)})),
        ("Gigabytes of one outbox", growth()),
    ]
    for ms in (0.2, 20.0):
        tables.append((f"What one outbox waits for, {ms:g} ms away", walls(costs, ms)))
    for title, table in tables:
        print(f"\n{title}\n{table.to_string(float_format='{:,.6g}'.format)}")


if __name__ == "__main__":
    main()
