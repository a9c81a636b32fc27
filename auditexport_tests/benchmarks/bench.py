"""What every benchmark needs: a stack, a seeded outbox to put back, counts of what arrived, and the machine's name.

What belongs here: set-up and counting. What does not: child processes and their figures (`children`), any
benchmark, and any judgement of a figure.
"""

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

# What a server has that holds a million pending rows, and more than the local stack asks of a laptop: with a quarter of a
# gigabyte, pages were read from disk once to be fetched and once more to be marked.
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
    """What a figure means nothing without: the machine, the versions, what else it was doing, and the command."""
    clickhouse = stack.log.client().query("SELECT version()").result_rows[0][0]
    load_1min = os.getloadavg()[0]
    print(
        f"{_cpu_model()}, {os.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GB; "
        f"{stack.mysql.family} {stack.mysql.version}, ClickHouse {clickhouse} (embedded), "
        f"Python {platform.python_version()}, {platform.system()} {platform.release()}; load {load_1min:.1f} at the start\n"
        f"$ {' '.join([*_environment(), 'python', *_program(), *sys.argv[1:]])}",
        flush=True,
    )


def _environment() -> list[str]:
    server = os.environ.get("AUDITEXPORT_MYSQLD")
    return [f"AUDITEXPORT_MYSQLD={server}"] if server else []


def _program() -> list[str]:
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    return ["-m", spec.name.removesuffix(".__main__")] if spec else sys.argv[:1]


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def clear(stack: LocalStack) -> None:
    """An empty outbox, an empty ledger but for its head, no dead letters, and an empty ClickHouse table."""
    execute(stack, "TRUNCATE TABLE clickhouse_outbox", *EMPTY_LEDGER)
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")


def seed(stack: LocalStack, events: int, *, malformed: int = 0, payload_bytes: int | None = None) -> None:
    """Fills the outbox and keeps a copy, so that every contender gets the same rows in a fresh table."""
    seed_outbox(stack.outbox.url, seed=SEED, events=events, malformed=malformed, payload_bytes=payload_bytes)
    keep(stack)


def keep(stack: LocalStack) -> None:
    """Keeps a copy of the outbox's pending rows, for `restore`."""
    execute(
        stack,
        "DROP TABLE IF EXISTS outbox_seed",
        "CREATE TABLE outbox_seed LIKE clickhouse_outbox",
        "INSERT INTO outbox_seed SELECT * FROM clickhouse_outbox WHERE deleted_at IS NULL",
    )


def put(stack: LocalStack, rows: Iterable[OutboxRow]) -> None:
    """Commits these rows, a few thousand at a time."""
    statement = sa.text(
        "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
        "VALUES (:version, :workspace_id, :event_id, :payload, :created_at_ms)"
    )
    rows = iter(rows)
    engine = sa.create_engine(stack.outbox.url)
    while chunk := list(islice(rows, PUT_ROWS)):
        with engine.begin() as connection:
            connection.execute(statement, [{name: getattr(row, name) for name in OutboxRow.__slots__} for row in chunk])
    engine.dispose()


def age(stack: LocalStack, copies: int) -> None:
    """Puts exported rows before the pending ones: each pending row so many times, at lower pks, marked.

    They are marked as by another exporter: neither the ledger nor ClickHouse knows them.
    """
    ((span,),) = _query(stack, "SELECT COALESCE(MAX(pk), 0) FROM outbox_seed")
    columns = "version, workspace_id, event_id, payload, created_at"
    execute(
        stack,
        "TRUNCATE TABLE clickhouse_outbox",
        *(
            f"INSERT INTO clickhouse_outbox (pk, {columns}, deleted_at) "
            f"SELECT pk + {number * span}, {columns}, {'NULL' if number == copies else 'created_at'} "
            "FROM outbox_seed ORDER BY pk"
            for number in range(copies + 1)
        ),
    )
    keep(stack)


def restore(stack: LocalStack, *, aged: bool = False) -> None:
    """The seeded outbox again, an empty ledger but for its head, and an empty ClickHouse table.

    An aged outbox keeps its exported rows; its pending ones are made pending again where they are.
    """
    outbox = [
        "TRUNCATE TABLE clickhouse_outbox",
        "INSERT INTO clickhouse_outbox SELECT * FROM outbox_seed ORDER BY pk",
    ]
    if aged:
        ((first_pk,),) = _query(stack, "SELECT MIN(pk) FROM outbox_seed")
        outbox = [f"UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk >= {first_pk}"]
    execute(
        stack,
        *outbox,
        *EMPTY_LEDGER,
        "ANALYZE TABLE clickhouse_outbox",
    )
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")
    settle(stack)


def settle(stack: LocalStack) -> None:
    """Waits until both servers have done what the last contender left them to do: purges, merges, dirty pages."""
    servers = [psutil.Process(stack.mysql.pid), psutil.Process(stack.clickhouse.pid)]
    for _ in range(SETTLE_ROUNDS):
        if sum(server.cpu_percent(interval=0.5) for server in servers) < IDLE_CPU_PERCENT:
            return


def wait_for_quiet() -> bool:
    """Waits, half an hour at most, until nothing else keeps the machine busy; False when something still does."""
    return any(psutil.cpu_percent(interval=5) < QUIET_CPU_PERCENT for _ in range(QUIET_ROUNDS))


def execute(stack: LocalStack, *statements: str) -> None:
    """Runs each statement in a transaction of its own."""
    # A connection without the exporter's time limits: putting a million rows back takes a while.
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
    """What both databases hold: entries and distinct events without FINAL, pending rows, dead letters."""

    entries: int
    events: int
    pending: int
    dead: int


def counts(stack: LocalStack) -> Counts:
    """Counts everything, in both databases."""
    entries, events = exported(stack)
    ((pending,),) = _query(
        stack, f"SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NULL AND version = '{VERSION}'"
    )
    ((dead,),) = _query(stack, "SELECT COUNT(*) FROM clickhouse_outbox_dead_letter")
    return Counts(entries=entries, events=events, pending=pending, dead=dead)


def last_marked_pk(stack: LocalStack) -> int:
    """The highest pk that is marked: where a cursor over pks would stand."""
    return _query(stack, "SELECT COALESCE(MAX(pk), 0) FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")[0][0]


def marked(stack: LocalStack) -> int:
    """Rows of the outbox that are marked exported."""
    return _query(stack, "SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")[0][0]


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


def drain_seconds(stack: LocalStack) -> float:
    """The seconds of the last drain as its materialization says: from its plan to its verification."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(stack.dagster_home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("audit_logs_raw_v1"))
        assert event is not None
        assert event.asset_materialization is not None
        return float(str(event.asset_materialization.metadata["seconds"].value))
