"""Each stage of a drain by itself, in microseconds of CPU an event, and which part of a mark is MySQL's UPDATE.

python -m auditexport_tests.benchmarks.stages [events]
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pandas as pd
import psutil

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.cuts import read_sealed
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench

CHUNK_PKS = 5_000
UPDATE = "UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET {change} WHERE pk BETWEEN {first} AND {last}"
# In this order: each needs the rows as the one before leaves them.
CHANGES = {
    "mark, by one connection: NULL becomes a stamp": "deleted_at = 1790000000000",
    "the same again, in place: a stamp becomes another": "deleted_at = 1790000000001",
    "in place and not indexed: created_at": "created_at = created_at + 1",
}


class Stages:
    """Microseconds an event: wall, and CPU of this process, MySQL and ClickHouse."""

    def __init__(self, stack: LocalStack, events: int) -> None:
        self.lines: dict[str, list[float]] = {}
        self._events = events
        self._servers = [psutil.Process(pid) for pid in (stack.mysql.pid, stack.clickhouse.pid)]

    def _now(self) -> list[float]:
        servers = [sum(server.cpu_times()[:2]) for server in self._servers]
        return [time.perf_counter(), time.process_time(), *servers]

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        before = self._now()
        yield
        spent = [(now - then) / self._events * 1e6 for now, then in zip(self._now(), before, strict=True)]
        self.lines[name] = [
            earlier + more for earlier, more in zip(self.lines.get(name, [0.0] * 4), spent, strict=True)
        ]

    def table(self) -> str:
        columns = ["wall", "exporter", "MySQL", "ClickHouse"]
        return pd.DataFrame.from_dict(self.lines, orient="index", columns=columns).round(1).to_string()


def main(events: int = 200_000) -> None:
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        bench.seed(stack, events)
        # Not measured: connections, imports, and the servers' caches.
        bench.restore(stack)
        _drain(stack, Stages(stack, events))
        bench.restore(stack)
        stages = Stages(stack, events)
        _drain(stack, stages)
        bench.restore(stack)
        for name, change in CHANGES.items():
            updates = [
                UPDATE.format(change=change, first=first, last=first + CHUNK_PKS - 1)
                for first in range(1, events + 1, CHUNK_PKS)
            ]
            with stages.stage(name):
                bench.execute(stack, *updates)
            bench.settle(stack)
    print(f"microseconds an event, {events:,} events of 600 bytes; a stage begins when both servers are at rest")
    print(stages.table())


def _drain(stack: LocalStack, stages: Stages) -> None:
    outbox, log, limits = stack.outbox, stack.log, Limits()
    with stages.stage("claim"):
        claims = claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits)
    for claim in claims:
        with stages.stage("fetch: read, decode, seal"):
            fetched = export.fetch(outbox, log, claim, limits)
        (sealed,) = outbox.batches([claim.batch_id])
        with stages.stage("read again, on a worker"):
            for block in sealed.blocks:
                read_sealed(outbox, sealed, block)
        with stages.stage("write"):
            receipt = export.write(outbox, log, claim, fetched.bodies, limits)
        bench.settle(stack)
        with stages.stage("mark"):
            export.mark(outbox, log, receipt, limits)
        bench.settle(stack)
    with stages.stage("verify"):
        verify.verify(outbox, log, outbox.unverified(len(claims)))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
