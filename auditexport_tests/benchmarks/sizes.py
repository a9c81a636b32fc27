"""Time, CPU and memory of a Dagster run by the size of the backlog, or of its batches.

python -m auditexport_tests.benchmarks.sizes [rows …]
python -m auditexport_tests.benchmarks.sizes --batch-rows 5000 25000 100000 -- 200000
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import replace

import pandas as pd

from auditexport_tests.benchmarks import bench, children, scenarios
from auditexport_tests.benchmarks.speed import OURS

# Room for ten million rows: with less, filling the outbox takes longer than all drains.
POOL = "--innodb-buffer-pool-size=12G"


def main(rows: Sequence[int] = (10_000, 100_000, 1_000_000), batch_rows: Sequence[int] = (100_000,)) -> None:
    measured = []
    for events in rows:
        scenario = scenarios.backlog(events)
        with bench.benchmark_stack(POOL) as stack:
            if not measured:
                bench.print_machine(stack)
            scenarios.WARM_UP.seed(stack)
            children.run(stack, OURS.dagster_run(stack, scenarios.WARM_UP))
            scenario.seed(stack)
            for size in batch_rows:
                bench.restore(stack)
                contender = replace(OURS, limits={"batch_rows": size})
                child = children.run(stack, contender.dagster_run(stack, scenario))
                assert bench.exported(stack) == (events, events)
                _, drain_s = stack.last_drain()
                spent = (drain_s, child.cpu_s, child.mysql_cpu_s, child.clickhouse_cpu_s)
                an_event = [seconds / events * 1e6 for seconds in spent]
                measured.append((f"{events:,}", f"{size:,}", child.seconds, *an_event, child.peak_rss_mb))
                print(f"{events:,} in batches of {size:,}: {child.seconds:.0f} s", flush=True)
    columns = [
        "rows",
        "batch_rows",
        "seconds",
        "drain, µs an event",
        "CPU µs: exporter",
        "MySQL",
        "ClickHouse",
        "RSS MB",
    ]
    print(pd.DataFrame(measured, columns=columns).round(1).to_string(index=False))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("rows", nargs="*", type=int, default=[10_000, 100_000, 1_000_000])
    parser.add_argument("--batch-rows", nargs="*", type=int, default=[100_000])
    options = parser.parse_args()
    main(options.rows, options.batch_rows)
