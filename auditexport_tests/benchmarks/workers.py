"""Events/s with 1, 2 and 4 workers, and with one process that prefetches, when the databases are far away.

A proxy delays every byte in both directions. The workers share the batches of one plan and hand over no rows from fetch to
write, as on Celery and Kubernetes: each batch is read twice. What an executor costs for each step (a second in Celery's queue,
a pod's start) is not included.

python -m auditexport_tests.benchmarks.workers [events] [batch_rows] [rounds] [mysql_ms] [clickhouse_ms]
"""

from __future__ import annotations

import asyncio
import contextlib
import multiprocessing
import socket
import sys
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.stack import LocalStack
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.benchmarks import bench

WORKERS = (1, 2, 4)
# Round trips: between two zones with something slow between them, and to a ClickHouse service elsewhere.
MYSQL_MS = 20
CLICKHOUSE_MS = 50
# Below FIRST_BATCH_ROWS of core.claiming, so that every batch of the plan is of this size.
BATCH_ROWS = 25_000
PIECE_BYTES = 1 << 18

_processes = multiprocessing.get_context("spawn")


# ── the delay ─────────────────────────────────────────────────────────────────────────────────────


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, one_way_s: float) -> None:
    """Bytes arrive `one_way_s` after they were sent, however many are on their way."""
    loop = asyncio.get_running_loop()
    on_their_way: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue()

    async def deliver() -> None:
        while True:
            due, piece = await on_their_way.get()
            await asyncio.sleep(max(0.0, due - loop.time()))
            if not piece:
                return
            writer.write(piece)
            await writer.drain()

    delivering = asyncio.ensure_future(deliver())
    with contextlib.suppress(OSError):
        while piece := await reader.read(PIECE_BYTES):
            on_their_way.put_nowait((loop.time() + one_way_s, piece))
    on_their_way.put_nowait((loop.time() + one_way_s, b""))
    with contextlib.suppress(OSError):
        await delivering
    writer.close()


async def _serve(targets: dict[int, float], ports: Connection) -> None:
    def line_to(target: int, one_way_s: float) -> Any:
        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            theirs, ours = await asyncio.open_connection("127.0.0.1", target, limit=PIECE_BYTES)
            for end in (writer, ours):
                end.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            await asyncio.gather(_carry(reader, ours, one_way_s), _carry(theirs, writer, one_way_s))

        return accept

    servers = [
        await asyncio.start_server(line_to(target, one_way_s), "127.0.0.1", 0, limit=PIECE_BYTES)
        for target, one_way_s in targets.items()
    ]
    ports.send([server.sockets[0].getsockname()[1] for server in servers])
    await asyncio.gather(*(server.serve_forever() for server in servers))


def _line(targets: dict[int, float], ports: Connection) -> None:
    asyncio.run(_serve(targets, ports))


@contextlib.contextmanager
def far_away(stack: LocalStack, mysql_ms: float, clickhouse_ms: float) -> Iterator[tuple[str, str]]:
    """The URLs of both databases with so many milliseconds added to each round trip, by a process of its own."""
    mysql_port, clickhouse_port = (
        int(url.rsplit(":", 1)[1].split("/")[0]) for url in (stack.outbox.url, stack.log.url)
    )
    ours, theirs = _processes.Pipe()
    targets = {mysql_port: mysql_ms / 2000, clickhouse_port: clickhouse_ms / 2000}
    line = _processes.Process(target=_line, args=(targets, theirs), daemon=True)
    line.start()
    try:
        mysql, clickhouse = ours.recv()
        yield (
            stack.outbox.url.replace(f":{mysql_port}/", f":{mysql}/"),
            stack.log.url.replace(f":{clickhouse_port}/", f":{clickhouse}/"),
        )
    finally:
        line.terminate()
        line.join()


# ── the workers ──────────────────────────────────────────────────────────────────────────────────


def _work(urls: tuple[str, str], limits: Limits, claims: Any, done: Any) -> None:
    outbox, log = MySQLOutbox(urls[0]), ClickHouseAuditLog(urls[1])
    log.client().command("SELECT 1")
    claiming.open_owners(outbox)
    done.put(None)  # connected
    while (claim := claims.get()) is not None:
        export.fetch(outbox, log, claim, limits)
        # No rows are handed over: between steps in different processes they are only in the outbox.
        export.mark(outbox, log, export.write(outbox, log, claim, {}, limits), limits)
        done.put(claim.batch_id)


def with_workers(urls: tuple[str, str], limits: Limits, count: int) -> float:
    """Seconds from the claim to the verification, with the batches shared by `count` processes."""
    claims, done = _processes.Queue(), _processes.Queue()
    workers = [_processes.Process(target=_work, args=(urls, limits, claims, done), daemon=True) for _ in range(count)]
    for worker in workers:
        worker.start()
    for _ in workers:
        done.get(timeout=120)
    outbox, log = MySQLOutbox(urls[0]), ClickHouseAuditLog(urls[1])
    claiming.open_owners(outbox)
    started = time.monotonic()
    planned = claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits)
    for claim in planned:
        claims.put(claim)
    for _ in planned:
        done.get(timeout=600)
    _verify(outbox, log, len(planned))
    seconds = time.monotonic() - started
    for _ in workers:
        claims.put(None)
    for worker in workers:
        worker.join()
    outbox.disconnect()
    return seconds


def prefetching(urls: tuple[str, str], limits: Limits) -> float:
    """The same for one process that prefetches, as a run on the default executor does."""
    outbox, log = MySQLOutbox(urls[0]), ClickHouseAuditLog(urls[1])
    claiming.open_owners(outbox)
    started = time.monotonic()
    planned = claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits)
    pipeline = Pipeline()
    pipeline.plan(planned)
    try:
        for claim in planned:
            pipeline.fetch(outbox, log, claim, limits)
            receipt = pipeline.write(outbox, log, claim, limits)
            pipeline.mark(outbox, log, receipt, limits)
    finally:
        pipeline.close()
    _verify(outbox, log, len(planned))
    seconds = time.monotonic() - started
    outbox.disconnect()
    return seconds


def _verify(outbox: MySQLOutbox, log: ClickHouseAuditLog, batches: int) -> None:
    found = verify.verify(outbox, log, outbox.unverified(batches))
    assert len(found) == batches
    assert not any(found.values()), found


def main(
    events: int = 400_000,
    batch_rows: int = BATCH_ROWS,
    rounds: int = 2,
    mysql_ms: int = MYSQL_MS,
    clickhouse_ms: int = CLICKHOUSE_MS,
) -> None:
    limits = Limits(batch_rows=batch_rows, max_batches=-(-events // batch_rows))
    measured = []
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        print(f"{events:,} events, {limits.max_batches} batches of {batch_rows:,}, {rounds} rounds", flush=True)
        bench.seed(stack, events)
        with far_away(stack, mysql_ms, clickhouse_ms) as far:
            places = {"near": (stack.outbox.url, stack.log.url), f"{mysql_ms} and {clickhouse_ms} ms away": far}
            for number in range(rounds):
                for place, urls in places.items():
                    for workers in (*WORKERS, 0):
                        bench.restore(stack)
                        seconds = with_workers(urls, limits, workers) if workers else prefetching(urls, limits)
                        assert bench.exported(stack) == (events, events)
                        name = f"{workers} worker{'s' * (workers > 1)}" if workers else "one, prefetching"
                        measured.append((place, name, events / seconds))
                        print(f"  round {number + 1}, {place}, {name}: {events / seconds:,.0f} events/s", flush=True)
    frame = pd.DataFrame(measured, columns=["databases", "workers", "events/s"])
    median = frame.groupby(["databases", "workers"], sort=False).median().reset_index()
    alone = median[median["workers"] == "1 worker"].set_index("databases")["events/s"]
    median["× 1 worker"] = (median["events/s"] / median["databases"].map(alone)).round(2)
    print(median.round({"events/s": 0}).to_string(index=False))


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
