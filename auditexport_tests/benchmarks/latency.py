"""Whether the application notices the exporter: latency of its INSERTs, and the locks that it meets.

One writer commits single events at a steady pace. Beside it runs nothing; or our drain of a large backlog, at full speed and
throttled; or our drain while ClickHouse is stopped (SIGSTOP) for five seconds; or the ancestor's algorithm. A third connection
samples the server's lock tables; first it has to see a wait that is made for it. A figure is over several rounds, in turns.

    python -m auditexport_tests.benchmarks.latency [seconds] [backlog rows] [rounds]
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import dataclass

import pandas as pd
import sqlalchemy as sa

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import Generator
from auditexport_pipeline.local.stack import LocalStack
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.benchmarks import bench

PACE_PER_S = 100
STALL_S = 5.0
# MariaDB answers from a copy of its lock table, which it renews only after a tenth of a second without a query.
SAMPLE_EVERY_S = 0.15
CONTROL_S = 1.5
# Far below the servers' limits, so that the machine has room for the application.
THROTTLED_ROWS_PER_S = (1_000, 4_000)
# Not counted: the writer's first commits open its connection and fill caches.
WARM_UP_S = 1.0
THIS = "auditexport_tests.benchmarks.latency"
ANCESTOR = ["-m", "auditexport_tests.benchmarks.ancestor"]

# Locks on rows of the outbox, by index and mode; and transactions that wait for one. MariaDB lists locks only while
# somebody waits for them.
LOCKS = {
    "mysql": "SELECT index_name, lock_mode, COUNT(*) AS n FROM performance_schema.data_locks "
    "WHERE object_name = 'clickhouse_outbox' AND lock_type = 'RECORD' GROUP BY index_name, lock_mode",
    "mariadb": "SELECT lock_index AS index_name, lock_mode, COUNT(*) AS n FROM information_schema.innodb_locks "
    "WHERE lock_table LIKE '%%clickhouse_outbox`' AND lock_type = 'RECORD' GROUP BY lock_index, lock_mode",
}
WAITS = {
    "mysql": "SELECT COUNT(*) AS n FROM performance_schema.data_lock_waits AS waits JOIN performance_schema.data_locks AS held "
    "ON held.engine_lock_id = waits.blocking_engine_lock_id WHERE held.object_name = 'clickhouse_outbox'",
    "mariadb": "SELECT COUNT(*) AS n FROM information_schema.innodb_lock_waits AS waits JOIN information_schema.innodb_locks "
    "AS held ON held.lock_id = waits.blocking_lock_id WHERE held.lock_table LIKE '%%clickhouse_outbox`'",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What runs beside the writer: a name, the arguments of its process, and what else happens."""

    name: str
    arguments: tuple[str, ...] = ()
    backlog: bool = False
    stalled: bool = False


def drain_for(mysql_url: str, clickhouse_url: str, seconds: float, rows_per_s: int) -> None:
    """Our drain again and again, as the sensor would start it; the child process of the benchmark."""
    outbox, log, limits = (
        MySQLOutbox(mysql_url),
        ClickHouseAuditLog(clickhouse_url),
        Limits(max_rows_per_second=rows_per_s, batch_rows=5_000 if rows_per_s else 100_000),
    )
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        for claim in claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits):
            fetched = export.fetch(outbox, log, claim, limits)
            receipt = export.write(outbox, log, claim, fetched.bodies, limits)
            export.mark(outbox, log, receipt, limits)
            if time.monotonic() > until:
                break
        verify.verify(outbox, log, outbox.unverified(100))
        time.sleep(0.05)


def _write(stack: LocalStack, seconds: float, stop: threading.Event) -> list[tuple[float, float]]:
    """Milliseconds of each INSERT and of its COMMIT, at `PACE_PER_S`, after a warm-up."""
    events = Generator(bench.SEED, stream=time.time_ns()).events(int((WARM_UP_S + seconds) * PACE_PER_S))
    engine = sa.create_engine(stack.outbox.url, pool_size=1)
    taken = []
    due = time.monotonic()
    with engine.connect() as connection:
        for event in events:
            due += 1 / PACE_PER_S
            stop.wait(max(0.0, due - time.monotonic()))
            values = bench.values_of(event)
            started = time.perf_counter()
            connection.execute(bench.INSERT, values)
            inserted = time.perf_counter()
            connection.commit()
            taken.append(((inserted - started) * 1000, (time.perf_counter() - inserted) * 1000))
    engine.dispose()
    return taken[int(WARM_UP_S * PACE_PER_S) :]


class Sampler(threading.Thread):
    """Samples the server's lock tables until stopped."""

    def __init__(self, stack: LocalStack) -> None:
        super().__init__(daemon=True)
        self.samples = self.waits = 0
        self.most: Counter[str] = Counter()  # of one sample, by index and mode
        self.stop = threading.Event()
        self._family = stack.mysql.family
        self._engine = sa.create_engine(stack.outbox.url, isolation_level="AUTOCOMMIT")

    def run(self) -> None:
        with self._engine.connect() as connection:
            while not self.stop.wait(SAMPLE_EVERY_S):
                self.samples += 1
                self.waits += bool(connection.exec_driver_sql(WAITS[self._family]).scalar_one())
                for index, mode, count in connection.exec_driver_sql(LOCKS[self._family]):
                    kind = f"{mode} on {index}"
                    self.most[kind] = max(self.most[kind], count)
        self._engine.dispose()


def _check_the_sampler(stack: LocalStack) -> None:
    """Makes a transaction wait for a row of the outbox; fails when the sampler does not see that."""
    bench.put(stack, Generator(bench.SEED).events(1))
    sampler = Sampler(stack)
    engine = sa.create_engine(stack.outbox.url)
    touch = sa.text("UPDATE clickhouse_outbox SET created_at = created_at + 1 ORDER BY pk LIMIT 1")

    def wait() -> None:
        with engine.begin() as waiting:
            waiting.execute(touch)

    waiter = threading.Thread(target=wait)
    with engine.begin() as holding:
        holding.execute(touch)
        waiter.start()
        sampler.start()
        sampler.join(CONTROL_S)
        sampler.stop.set()
    waiter.join()
    sampler.join()
    engine.dispose()
    if not sampler.waits or not sampler.most:
        raise AssertionError(f"a wait was made for {CONTROL_S} s, and {sampler.samples} samples show {sampler.most}")
    print(f"control: a wait of {CONTROL_S} s was seen in {sampler.waits} of {sampler.samples} samples", flush=True)


def _measure(stack: LocalStack, beside: Beside, seconds: float) -> tuple[list[tuple[float, float]], Sampler]:
    stop = threading.Event()
    sampler = Sampler(stack)
    exporter = None
    stall = threading.Timer(seconds / 3, _stall, (stack.clickhouse.pid, stop))
    sampler.start()
    if beside.arguments:
        # The exporters stop a little before the writer, so that none drains an idle table at the end.
        urls = [stack.outbox.url, stack.log.url, str(seconds - 2)]
        command = [
            sys.executable,
            *(word for part in beside.arguments for word in (urls if part == "URLS" else [part])),
        ]
        exporter = subprocess.Popen(command, env=stack.environment(), stdout=subprocess.DEVNULL)
        if beside.stalled:
            stall.start()
    try:
        return _write(stack, seconds, stop), sampler
    finally:
        stop.set()
        stall.cancel()
        sampler.stop.set()
        sampler.join()
        if exporter is not None:
            exporter.wait()
        if stall.ident:
            stall.join()


def _stall(pid: int, stop: threading.Event) -> None:
    os.kill(pid, signal.SIGSTOP)
    try:
        stop.wait(STALL_S)
    finally:
        os.kill(pid, signal.SIGCONT)


def main(seconds: float = 40.0, backlog: int = 300_000, rounds: int = 2) -> None:
    ours = ("-m", THIS, "--drain", "URLS", "0")
    ancestor = (*ANCESTOR, "URLS")
    scenes = (
        Beside(name="no exporter"),
        Beside(name="auditexport, large backlog", arguments=ours, backlog=True),
        *(
            Beside(
                name=f"auditexport, large backlog, {rate:,} rows/s",
                arguments=("-m", THIS, "--drain", "URLS", str(rate)),
                backlog=True,
            )
            for rate in THROTTLED_ROWS_PER_S
        ),
        Beside(name="auditexport, what the writer writes", arguments=ours),
        Beside(name="auditexport, ClickHouse stalled 5 s", arguments=ours, stalled=True),
        Beside(name="ancestor, large backlog", arguments=ancestor, backlog=True),
        Beside(name="ancestor, ClickHouse stalled 5 s", arguments=ancestor, stalled=True),
    )
    taken: dict[str, list[tuple[float, float]]] = {beside.name: [] for beside in scenes}
    waits: Counter[str] = Counter()
    samples: Counter[str] = Counter()
    most: dict[str, Counter[str]] = {beside.name: Counter() for beside in scenes}
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        print(
            f"{PACE_PER_S} commits/s, {rounds} rounds of {seconds:.0f} s each; a large backlog is {backlog:,} rows",
            flush=True,
        )
        _check_the_sampler(stack)
        bench.clear(stack)
        bench.seed(stack, backlog)
        for beside in scenes * rounds:
            if beside.backlog:
                bench.restore(stack)
            else:
                bench.clear(stack)
                bench.settle(stack)
            results, sampler = _measure(stack, beside, seconds)
            taken[beside.name] += results
            waits[beside.name] += sampler.waits
            samples[beside.name] += sampler.samples
            most[beside.name] |= sampler.most
    lines = []
    for name, results in taken.items():
        parts = pd.DataFrame(results, columns=["INSERT", "COMMIT"])
        both = parts.sum(axis=1)
        lines.append(
            {
                "beside the writer": name,
                "median ms": both.median(),
                "p99 ms": both.quantile(0.99),
                "INSERT p99": parts["INSERT"].quantile(0.99),
                "COMMIT p99": parts["COMMIT"].quantile(0.99),
                "p99.9 ms": both.quantile(0.999),
                "max ms": both.max(),
                "commits/s": len(both) / seconds / rounds,
                "samples with a wait": f"{waits[name]} of {samples[name]}",
            }
        )
    table = pd.DataFrame(lines)
    table.insert(3, "× idle p99", table["p99 ms"] / table["p99 ms"][0])
    print(table.round(2).to_string(index=False))
    for name, locks in most.items():
        seen = ", ".join(f"{count:,} {kind}" for kind, count in sorted(locks.items())) or "none"
        print(f"most row locks of one sample, {name}: {seen}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--drain"]:
        drain_for(sys.argv[2], sys.argv[3], float(sys.argv[4]), int(sys.argv[5]))
    else:
        main(*map(float, sys.argv[1:2]), *map(int, sys.argv[2:4]))
