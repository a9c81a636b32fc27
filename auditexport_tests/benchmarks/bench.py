"""What every benchmark needs: a stack, a seeded outbox to put back, and children measured by the kernel.

What belongs here: set-up and measurement. What does not: any benchmark, and any judgement of a figure.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import sqlalchemy as sa

from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.local.stack import LocalStack

SEED = 4_711
IDLE_CPU_PERCENT = 10
DAGSTER_DRAIN = [
    "-m",
    "dagster",
    "asset",
    "materialize",
    "--select",
    "audit_logs_raw_v1",
    "-m",
    "auditexport_pipeline.definitions",
]


@contextmanager
def benchmark_stack(*mysql_options: str) -> Iterator[LocalStack]:
    """A stack in a temporary directory, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="auditexport-bench-") as directory,
        LocalStack(Path(directory), mysql_options=mysql_options) as stack,
    ):
        yield stack


def seed(stack: LocalStack, events: int) -> None:
    """Fills the outbox and keeps a copy, so that every contender gets the same rows in a fresh table."""
    seed_outbox(stack.outbox.url, seed=SEED, events=events)
    _execute(
        stack,
        "CREATE TABLE outbox_seed LIKE clickhouse_outbox",
        "INSERT INTO outbox_seed SELECT * FROM clickhouse_outbox",
    )


def restore(stack: LocalStack) -> None:
    """The seeded outbox again, an empty ledger but for its head, and an empty ClickHouse table."""
    _execute(
        stack,
        "TRUNCATE TABLE clickhouse_outbox",
        "INSERT INTO clickhouse_outbox SELECT * FROM outbox_seed ORDER BY pk",
        "DELETE FROM clickhouse_outbox_batch WHERE batch_id > 0",
        "TRUNCATE TABLE clickhouse_outbox_dead_letter",
        "ANALYZE TABLE clickhouse_outbox",
    )
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")
    settle(stack)


def settle(stack: LocalStack) -> None:
    """Waits until both servers have done what the last contender left them to do: purges, merges, dirty pages."""
    servers = [psutil.Process(stack.mysql.pid), psutil.Process(stack.clickhouse.pid)]
    for _ in range(60):
        if sum(server.cpu_percent(interval=0.5) for server in servers) < IDLE_CPU_PERCENT:
            return


def _execute(stack: LocalStack, *statements: str) -> None:
    # A connection without the exporter's time limits: putting a million rows back takes a while.
    engine = sa.create_engine(stack.outbox.url)
    for statement in statements:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    engine.dispose()


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A finished process: wall seconds, CPU seconds of it and of the servers meanwhile, and its peak resident set
    in megabytes (10^6 bytes).
    """

    seconds: float
    cpu_s: float
    mysql_cpu_s: float
    clickhouse_cpu_s: float
    peak_rss_mb: float


def run(stack: LocalStack, arguments: list[str]) -> Child:
    """Runs Python with these arguments against the stack; raises when it fails."""
    before = _server_cpu_s(stack)
    started = time.monotonic()
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, *arguments], env=stack.environment(), stdout=output, stderr=output)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode != 0:
            output.seek(0)
            raise RuntimeError(output.read().decode(errors="replace")[-3_000:])
    seconds = time.monotonic() - started
    mysql_cpu_s, clickhouse_cpu_s = (now - then for now, then in zip(_server_cpu_s(stack), before, strict=True))
    kilobyte = 1 if sys.platform == "darwin" else 1024
    return Child(
        seconds=seconds,
        cpu_s=usage.ru_utime + usage.ru_stime,
        mysql_cpu_s=mysql_cpu_s,
        clickhouse_cpu_s=clickhouse_cpu_s,
        peak_rss_mb=usage.ru_maxrss * kilobyte / 1e6,
    )


def _server_cpu_s(stack: LocalStack) -> list[float]:
    times = [psutil.Process(pid).cpu_times() for pid in (stack.mysql.pid, stack.clickhouse.pid)]
    return [time.user + time.system for time in times]


def exported(stack: LocalStack) -> tuple[int, int]:
    """(entries, distinct events) in ClickHouse, without FINAL."""
    ((entries, events),) = (
        stack.log.client().query("SELECT count(), uniqExact(event_id) FROM audit_logs_raw_v1").result_rows
    )
    return int(entries), int(events)


def drain_seconds(stack: LocalStack) -> float:
    """The seconds of the last drain as its materialization says: from its plan to its verification."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(stack.dagster_home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("audit_logs_raw_v1"))
        assert event is not None
        assert event.asset_materialization is not None
        return float(str(event.asset_materialization.metadata["seconds"].value))
