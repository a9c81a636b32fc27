"""How fast: a drain through Dagster beside the ancestor's algorithm, alternating on the same servers.

python -m auditexport_tests.benchmarks.speed [events] [rounds]
"""

from __future__ import annotations

import sys

import pandas as pd

from auditexport_tests.benchmarks import bench

ANCESTOR = ["-m", "auditexport_tests.benchmarks.ancestor"]


def main(events: int = 300_000, rounds: int = 3, *mysql_options: str) -> None:
    measured = []
    with bench.benchmark_stack(*mysql_options) as stack:
        print(
            f"{events:,} events, {rounds} rounds, {stack.mysql.family} {stack.mysql.version} {mysql_options}",
            flush=True,
        )
        bench.seed(stack, events)
        for number in range(1, rounds + 1):
            bench.restore(stack)
            ancestor = bench.run(stack, [*ANCESTOR, stack.outbox.url, stack.log.url])
            assert bench.exported(stack) == (events, events)
            bench.restore(stack)
            ours = bench.run(stack, bench.DAGSTER_DRAIN)
            assert bench.exported(stack) == (events, events)
            drain_s = bench.drain_seconds(stack)
            for name, seconds, child in (
                ("ancestor's algorithm, no Dagster", ancestor.seconds, ancestor),
                ("auditexport, Dagster process from start to end", ours.seconds, ours),
                ("auditexport, the Dagster run: plan to verified", drain_s, ours),
            ):
                measured.append(
                    (
                        name,
                        number,
                        events / seconds,
                        ancestor.seconds / seconds,
                        child.cpu_s,
                        child.mysql_cpu_s,
                        child.clickhouse_cpu_s,
                        child.peak_rss_mb,
                    )
                )
            print(
                f"round {number}: ancestor {ancestor.seconds:.1f} s, Dagster {ours.seconds:.1f} s, drain {drain_s:.1f} s",
                flush=True,
            )
    figures = ["rows/s", "× ancestor", "CPU s", "MySQL CPU s", "ClickHouse CPU s", "peak RSS MB"]
    frame = pd.DataFrame(measured, columns=["contender", "round", *figures])
    table = frame.groupby("contender", sort=False)[figures].median()
    spread = frame.groupby("contender", sort=False)["rows/s"].agg(["min", "max"])
    table["rows/s min–max"] = [f"{low:,.0f}–{high:,.0f}" for low, high in spread.itertuples(index=False)]
    print(table.round(dict.fromkeys(figures, 1) | {"rows/s": 0, "× ancestor": 2, "peak RSS MB": 0}).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]), *sys.argv[3:])
