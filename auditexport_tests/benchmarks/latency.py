"""Does the application notice: latency of its INSERTs while ClickHouse is stalled for five seconds.

One writer commits single events at a steady pace. Beside it: nobody; our drain, over and over; the
ancestor's algorithm, over and over. In the last two, ClickHouse is stopped (SIGSTOP) for five seconds in
the middle, while fewer rows are pending than a batch may hold, which is the normal state.

    python -m auditexport_tests.benchmarks.latency [seconds]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pandas as pd
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.local.generator import Generator
from auditexport_pipeline.local.stack import LocalStack
from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
from auditexport_pipeline.stores.outbox import MySQLOutbox
from auditexport_tests.benchmarks import bench

PACE_PER_S = 100
STALL_S = 5.0
THIS = "auditexport_tests.benchmarks.latency"


def drain_for(mysql_url: str, clickhouse_url: str, seconds: float) -> None:
    """Our drain again and again, as the sensor would start it; the child process of the benchmark."""
    outbox, log, limits = MySQLOutbox(mysql_url), ClickHouseAuditLog(clickhouse_url), Limits()
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for claim in claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits):
            fetched = export.fetch(outbox, claim, limits)
            receipt = export.write(outbox, log, claim, fetched.bodies, limits)
            export.mark(outbox, receipt, limits)
        verify.verify(outbox, log, outbox.unverified(100))


def _write(stack: LocalStack, seconds: float, stop: threading.Event) -> list[float]:
    """Milliseconds of each INSERT and its COMMIT, at `PACE_PER_S`."""
    events = Generator(bench.SEED, stream=time.time_ns()).events(int(seconds * PACE_PER_S))
    engine = sa.create_engine(stack.outbox.url, pool_size=1)
    statement = sa.text(
        "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
        "VALUES (:version, :workspace_id, :event_id, :payload, :created_at)"
    )
    taken = []
    due = time.monotonic()
    with engine.connect() as connection:
        for event in events:
            due += 1 / PACE_PER_S
            stop.wait(max(0.0, due - time.monotonic()))
            values = {
                "version": event.version,
                "workspace_id": event.workspace_id,
                "event_id": event.event_id,
                "payload": event.payload,
                "created_at": event.created_at_ms,
            }
            started = time.perf_counter()
            connection.execute(statement, values)
            connection.commit()
            taken.append((time.perf_counter() - started) * 1000)
    engine.dispose()
    return taken


def _beside(stack: LocalStack, arguments: list[str] | None, seconds: float) -> list[float]:
    stop = threading.Event()
    exporter = None
    stall = threading.Timer(0, lambda: None)
    if arguments is not None:
        exporter = subprocess.Popen([sys.executable, *arguments], env=stack.environment(), stdout=subprocess.DEVNULL)
        stall = threading.Timer(seconds / 3, _stall, (stack.clickhouse.pid, stop))
        stall.start()
    try:
        return _write(stack, seconds, stop)
    finally:
        stop.set()
        stall.cancel()
        if exporter is not None:
            exporter.wait()
        stall.join() if stall.ident else None


def _stall(pid: int, stop: threading.Event) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        stop.wait(STALL_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def main(seconds: float = 20.0) -> None:
    measured = []
    with bench.benchmark_stack() as stack:
        print(
            f"{PACE_PER_S} commits/s for {seconds:.0f} s each, {stack.mysql.family} {stack.mysql.version}", flush=True
        )
        urls = [stack.outbox.url, stack.log.url]
        # The exporters stop a little before the writer, so that none drains an idle table at the end.
        until = str(seconds - 2)
        for name, arguments in (
            ("no exporter", None),
            ("auditexport, ClickHouse stalled 5 s", ["-m", THIS, "--drain", *urls, until]),
            ("ancestor, ClickHouse stalled 5 s", ["-m", "auditexport_tests.benchmarks.ancestor", *urls, until]),
        ):
            taken = pd.Series(_beside(stack, arguments, seconds))
            measured.append((name, taken.median(), taken.quantile(0.99), taken.max(), len(taken)))
    columns = ["beside the writer", "median ms", "p99 ms", "max ms", "commits"]
    print(pd.DataFrame(measured, columns=columns).round(2).to_string(index=False))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drain"]:
        drain_for(sys.argv[2], sys.argv[3], float(sys.argv[4]))
    else:
        main(*map(float, sys.argv[1:]))
