"""What a larger backlog costs: time and CPU an event, and peak RSS, of a Dagster run that drains few and many rows.

python -m auditexport_tests.benchmarks.memory [rows …]
"""

from __future__ import annotations

import sys

import pandas as pd

from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.benchmarks import bench, children, contenders, scenarios

# Room for ten million rows: with less, filling the outbox waits for its secondary indexes longer than all drains take.
POOL = "--innodb-buffer-pool-size=12G"


def main(*rows: int) -> None:
    measured = []
    (ours,) = contenders.named("auditexport")
    for events in rows or (10_000, 100_000, 1_000_000):
        (scenario,) = scenarios.named(f"backlog:{events}")
        with bench.benchmark_stack(POOL) as stack:
            if not measured:
                bench.print_machine(stack)
            scenarios.WARM_UP.seed(stack)
            children.run(stack, contenders.dagster_run(ours, stack, scenarios.WARM_UP))
            bench.clear(stack)
            seed_outbox(stack.outbox.url, seed=bench.SEED, events=events)
            bench.execute(stack, "ANALYZE TABLE clickhouse_outbox")
            bench.settle(stack)
            child = children.run(stack, contenders.dagster_run(ours, stack, scenario))
            assert bench.exported(stack) == (events, events)
            an_event = 1e6 / events
            spent = (child.cpu_s, child.mysql_cpu_s, child.clickhouse_cpu_s)
            drain_us = bench.drain_seconds(stack) * an_event
            measured.append(
                (f"{events:,}", child.seconds, drain_us, *(cpu_s * an_event for cpu_s in spent), child.peak_rss_mb)
            )
            print(f"{events:,} drained in {child.seconds:.0f} s", flush=True)
    columns = ["rows", "seconds", "drain, µs an event", "CPU µs: exporter", "MySQL", "ClickHouse", "peak RSS MB"]
    print(pd.DataFrame(measured, columns=columns).round(1).to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
