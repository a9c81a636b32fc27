"""What all benchmarks need: a stack, a seeded outbox that can be restored, counts, and a description of the machine."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import psutil
import sqlalchemy as sa

from auditexport_pipeline.local.generator import VERSION, OutboxRow, seed_outbox
from auditexport_pipeline.local.stack import LocalStack

# Room for a million pending rows: with the local stack's buffer pool, pages were read from the disk twice.
MYSQL_OPTIONS = (
    "--innodb-buffer-pool-size=1G",
    "--loose-innodb-log-file-size=1G",
    "--loose-innodb-redo-log-capacity=1G",
)
SEED = 4_711
IDLE_CPU_PERCENT = 10
SETTLE_ROUNDS = 60
# Of all cores together.
QUIET_CPU_PERCENT = 8
QUIET_ROUNDS = 360
PUT_ROWS = 2_000
CONTENT = """
SELECT sum(cityHash64(event_id, time, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name,
                      toString(actor_meta), remote_ip, user_agent, meta_text, `targets.type`, `targets.id`, `targets.name`,
                      targets_meta_text, correlation_id))
FROM audit_logs_raw_v1
"""
INSERT = sa.text(
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
    "VALUES (:version, :workspace_id, :event_id, :payload, :created_at_ms)"
)
EMPTY_LEDGER = (
    "DELETE FROM clickhouse_outbox_batch WHERE batch_id > 0",
    "TRUNCATE TABLE clickhouse_outbox_dead_letter",
)
# The run that the sensor and the schedule launch. `dagster asset materialize` would run the asset checks too, which
# look back over a day.
DAGSTER_DRAIN = [
    *(sys.executable, "-m", "dagster", "job", "execute"),
    *("-j", "audit_log_export", "-m", "auditexport_pipeline.definitions"),
]


@contextmanager
def benchmark_stack(*mysql_options: str) -> Iterator[LocalStack]:
    """A stack in a temporary directory, gone afterwards."""
    with (
        tempfile.TemporaryDirectory(prefix="auditexport-bench-") as directory,
        LocalStack(Path(directory), mysql_options=(*MYSQL_OPTIONS, *mysql_options)) as stack,
    ):
        yield stack


def print_machine(stack: LocalStack) -> None:
    """Prints the machine, the versions, the load and the command."""
    clickhouse = stack.log.client().query("SELECT version()").result_rows[0][0]
    load_1min = os.getloadavg()[0]
    print(
        f"{_cpu_model()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB; "
        f"{stack.mysql.family} {stack.mysql.version}, ClickHouse {clickhouse} (embedded), "
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}; load {load_1min:.1f} at the start\n"
        f"$ python {' '.join(sys.orig_argv[1:])}",
        flush=True,
    )


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def clear(stack: LocalStack) -> None:
    """Empties the outbox, the ledger (not its head), the dead letters and the ClickHouse table."""
    execute(stack, "TRUNCATE TABLE clickhouse_outbox", *EMPTY_LEDGER)
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")


def seed(stack: LocalStack, events: int, *, malformed: int = 0, payload_bytes: int | None = None) -> None:
    """Fills the outbox and saves it, so that each contender gets the same rows in a new table."""
    seed_outbox(stack.outbox.url, seed=SEED, events=events, malformed=malformed, payload_bytes=payload_bytes)
    save(stack)


def save(stack: LocalStack) -> None:
    """Copies the outbox's pending rows, for `restore`."""
    execute(
        stack,
        "DROP TABLE IF EXISTS outbox_seed",
        "CREATE TABLE outbox_seed LIKE clickhouse_outbox",
        "INSERT INTO outbox_seed SELECT * FROM clickhouse_outbox WHERE deleted_at IS NULL",
    )


def values_of(row: OutboxRow) -> dict[str, object]:
    """The parameters of `INSERT`."""
    return {name: getattr(row, name) for name in OutboxRow.__slots__}


def put(stack: LocalStack, rows: Iterable[OutboxRow]) -> None:
    """Commits these rows, a few thousand at a time."""
    rows = iter(rows)
    engine = sa.create_engine(stack.outbox.url)
    while chunk := list(islice(rows, PUT_ROWS)):
        with engine.begin() as connection:
            connection.execute(INSERT, [values_of(row) for row in chunk])
    engine.dispose()


def restore(stack: LocalStack) -> None:
    """The seeded outbox again, an empty ledger except for its head, and an empty ClickHouse table."""
    clear(stack)
    execute(
        stack,
        "INSERT INTO clickhouse_outbox SELECT * FROM outbox_seed ORDER BY pk",
        "ANALYZE TABLE clickhouse_outbox",
    )
    settle(stack)


def settle(stack: LocalStack) -> None:
    """Waits until both servers have finished purges, merges and writes of the last contender."""
    servers = [psutil.Process(stack.mysql.pid), psutil.Process(stack.clickhouse.pid)]
    for _ in range(SETTLE_ROUNDS):
        if sum(server.cpu_percent(interval=0.5) for server in servers) < IDLE_CPU_PERCENT:
            return


def wait_for_quiet() -> bool:
    """Waits, half an hour at most, until the machine is quiet; False when it never is."""
    return any(psutil.cpu_percent(interval=5) < QUIET_CPU_PERCENT for _ in range(QUIET_ROUNDS))


def execute(stack: LocalStack, *statements: str) -> None:
    """Runs each statement in a transaction of its own."""
    # A connection without the exporter's time limits: to restore a million rows takes a while.
    engine = sa.create_engine(stack.outbox.url)
    for statement in statements:
        with engine.begin() as connection:
            connection.exec_driver_sql(statement)
    engine.dispose()


def _query(stack: LocalStack, statement: str) -> list[tuple[int, ...]]:
    engine = sa.create_engine(stack.outbox.url)
    with engine.connect() as connection:
        found = [tuple(int(value) for value in row) for row in connection.exec_driver_sql(statement)]
    engine.dispose()
    return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """Entries and distinct events without FINAL, pending rows, dead letters."""

    entries: int
    events: int
    pending: int
    dead: int


def counts(stack: LocalStack) -> Counts:
    entries, events = exported(stack)
    ((pending,),) = _query(
        stack, f"SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NULL AND version = '{VERSION}'"
    )
    ((dead,),) = _query(stack, "SELECT COUNT(*) FROM clickhouse_outbox_dead_letter")
    return Counts(entries=entries, events=events, pending=pending, dead=dead)


def exported(stack: LocalStack) -> tuple[int, int]:
    """(entries, distinct events) in ClickHouse, without FINAL."""
    ((entries, events),) = (
        stack.log.client().query("SELECT count(), uniqExact(event_id) FROM audit_logs_raw_v1").result_rows
    )
    return int(entries), int(events)


def content(stack: LocalStack) -> int:
    """A sum over every column of every entry but `inserted_at`, the same for the same entries in any order."""
    ((found,),) = stack.log.client().query(CONTENT).result_rows
    return int(found)
