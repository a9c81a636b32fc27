"""`make bench`: speed, memory and the application's latency, one after the other, printed."""

from __future__ import annotations

from auditexport_tests.benchmarks import latency, memory, speed

if __name__ == "__main__":
    for title, benchmark in (
        ("Speed", speed.main),
        ("The application's latency", latency.main),
        ("Memory", memory.main),
    ):
        print(f"\n── {title} ", flush=True)
        benchmark()
