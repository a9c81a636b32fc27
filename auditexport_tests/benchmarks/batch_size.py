"""How large a batch: rows per second and memory of a Dagster drain by `batch_rows`; the default comes from here.

python -m auditexport_tests.benchmarks.batch_size [events] [rounds]
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import pandas as pd

from auditexport_tests.benchmarks import bench, children

SIZES = (5_000, 10_000, 25_000, 50_000, 100_000, 200_000)


def main(events: int = 200_000, rounds: int = 2) -> None:
    measured = []
    with bench.benchmark_stack() as stack, tempfile.TemporaryDirectory() as directory:
        bench.print_machine(stack)
        print(f"{events:,} events, {rounds} rounds", flush=True)
        bench.seed(stack, events)
        for _ in range(rounds):
            for size in SIZES:
                bench.restore(stack)
                config = Path(directory) / "config.yaml"
                config.write_text(f"ops:\n  audit_logs_raw_v1:\n    config:\n      batch_rows: {size}\n")
                child = children.run(stack, [*bench.DAGSTER_DRAIN, "--config", str(config)])
                assert bench.exported(stack) == (events, events)
                measured.append((f"{size:,}", events / bench.drain_seconds(stack), child.peak_rss_mb))
    frame = pd.DataFrame(measured, columns=["batch_rows", "rows/s", "peak RSS MB"])
    print(frame.groupby("batch_rows", sort=False).median().round(0).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
