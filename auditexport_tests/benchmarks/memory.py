"""How much memory: peak RSS of a Dagster process that drains few and many rows.

python -m auditexport_tests.benchmarks.memory [rows …]
"""

from __future__ import annotations

import sys

import pandas as pd

from auditexport_tests.benchmarks import bench, children


def main(*rows: int) -> None:
    measured = []
    for events in rows or (10_000, 1_000_000):
        with bench.benchmark_stack() as stack:
            bench.print_machine(stack)
            bench.seed(stack, events)
            child = children.run(stack, bench.DAGSTER_DRAIN)
            assert bench.exported(stack) == (events, events)
            measured.append((f"{events:,}", child.peak_rss_mb, child.seconds, child.cpu_s))
    frame = pd.DataFrame(measured, columns=["rows drained", "peak RSS MB", "seconds", "CPU s"])
    print(frame.round(1).to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
