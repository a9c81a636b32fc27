"""`make bench`: every benchmark, one after the other, printed; `--quick`: a little of speed.

What belongs here: which benchmarks, and how much of each. What does not: the benchmarks.
"""

from __future__ import annotations

import sys

from auditexport_tests.benchmarks import flat, freshness, latency, memory, speed, stages, timeline

# Under five minutes on two cores.
QUICK = ["--rounds", "2", "backlog:100000", "steady:1000"]


def main() -> None:
    if sys.argv[1:] == ["--quick"]:
        speed.parsed(QUICK)
        return
    print("`behind` is scaled to a tenth: `speed behind:1000000` puts a million rows behind ten million.")
    for title, benchmark in (
        ("Speed", lambda: speed.parsed([])),
        ("Where the time goes", stages.main),
        ("Who has the cores", timeline.main),
        ("The application's latency", latency.main),
        ("From commit to answer", freshness.main),
        ("Behind a million exported rows and 100,000 batches", lambda: flat.main(1_000_000)),
        ("Cost and memory by the size of the backlog", memory.main),
    ):
        print(f"\n── {title} ", flush=True)
        benchmark()


if __name__ == "__main__":
    main()
