"""`make bench`: every benchmark, one after the other, printed; `--quick`: a little of `speed`."""

from __future__ import annotations

import sys

from auditexport_tests.benchmarks import flat, freshness, latency, sizes, speed, stages

# Under five minutes on two cores.
QUICK = ["--rounds", "2", "backlog:100000", "steady:1000"]


def main() -> None:
    if sys.argv[1:] == ["--quick"]:
        speed.parsed(QUICK)
        return
    for title, benchmark in (
        ("Speed", lambda: speed.parsed([])),
        ("The stages of a drain", stages.main),
        ("The application's latency", latency.main),
        ("From commit to answer", freshness.main),
        ("Behind a million exported rows and 100,000 batches", lambda: flat.main(1_000_000)),
        ("Cost and memory by the size of the backlog", sizes.main),
    ):
        print(f"\n── {title} ", flush=True)
        benchmark()


if __name__ == "__main__":
    main()
