"""The constants of `model`: bytes that a batch, a run and a tick leave in the ledger and in Dagster's storage, and round trips.

python -m auditexport_tests.benchmarks.growth [runs]
"""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.local.stack import LocalStack
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_tests.benchmarks import bench

ROOT = Path(__file__).resolve().parents[2]
LEDGER = "clickhouse_outbox_batch"
# Copies of one batch, so that pages of InnoDB are as full as they are in a ledger that grew.
COPIES = 32_768
TICKS = 2_000
# Of a Dagster run: so many rows, in one batch or in so many.
RUN_ROWS, RUN_BATCHES = 1_000, 10
TRIP_ROWS = (1_000, 5_000, 25_000)
ACTOR = Actor(who="benchmark", why="counting")


@contextmanager
def counted() -> Iterator[Callable[[str], Counter[str]]]:
    """Counts this process's commands to MySQL and requests to ClickHouse, under the name that was given last."""
    from pymysql.connections import Connection
    from urllib3 import PoolManager

    counts: dict[str, Counter[str]] = {}
    verb = [""]
    command, request = Connection._execute_command, PoolManager.request

    def count(server: str, real: Callable[..., Any]) -> Callable[..., Any]:
        def counting(*arguments: Any, **named: Any) -> Any:
            counts.setdefault(verb[0], Counter())[server] += 1
            return real(*arguments, **named)

        return counting

    def under(name: str) -> Counter[str]:
        verb[0] = name
        return counts.setdefault(name, Counter())

    Connection._execute_command = count("MySQL", command)
    PoolManager.request = count("ClickHouse", request)
    try:
        yield under
    finally:
        Connection._execute_command = command
        PoolManager.request = request


def _emptied(stack: LocalStack, rows: int) -> None:
    """An outbox of so many pending rows, and a ledger without batches."""
    bench.execute(stack, f"DELETE FROM {LEDGER} WHERE batch_id > 0", "TRUNCATE TABLE clickhouse_outbox")
    bench.seed(stack, rows)


def _drain(
    stack: LocalStack,
    rows: int,
    batches: int,
    under: Callable[[str], object] = lambda verb: None,
    *,
    hands_over: bool = True,
) -> list[Claim]:
    """Claims `batches` of exactly `rows` rows, exports each step by step, and verifies them all; returns the claims.

    `under` is called with each verb before it begins. Without `hands_over` each batch is read again to be written, as on a
    worker whose fetch was in another process.
    """
    first, claiming.FIRST_BATCH_ROWS = claiming.FIRST_BATCH_ROWS, rows
    limits = Limits(batch_rows=rows, max_batches=batches)
    try:
        under("claim")
        claims = claiming.claim(stack.outbox, owner="benchmark", dead_owners=(), limits=limits)
    finally:
        claiming.FIRST_BATCH_ROWS = first
    for claim in claims:
        under("fetch")
        fetched = export.fetch(stack.outbox, stack.log, claim, limits)
        under("write")
        receipt = export.write(stack.outbox, stack.log, claim, fetched.bodies if hands_over else {}, limits)
        under("mark")
        export.mark(stack.outbox, stack.log, receipt, limits)
    under("verify")
    verify.verify(stack.outbox, stack.log, stack.outbox.unverified(len(claims)))
    return claims


def round_trips(stack: LocalStack, rows: int, batches: int = 3, *, hands_over: bool = True) -> pd.DataFrame:
    """For a batch of `rows` rows: one row a verb, one column a server. `hands_over` as in `_drain`."""
    _emptied(stack, rows)
    _drain(stack, rows, 1)  # opens the connections
    _emptied(stack, rows * batches)
    with counted() as under:
        found: dict[str, Counter[str]] = {}

        def count_under(verb: str) -> None:
            found[verb] = under(verb)

        claims = _drain(stack, rows, batches, count_under, hands_over=hands_over)
    table = pd.DataFrame({verb: dict(counts) for verb, counts in found.items()}).T.fillna(0) / len(claims)
    return table.rename_axis(f"{rows:,} rows").round(1)


def fixed_costs(stack: LocalStack, rows: int = 50, batches: int = 60) -> dict[str, float]:
    """Milliseconds that a small batch takes: wall, and CPU of exporter, MySQL and ClickHouse."""
    _emptied(stack, rows * batches)
    bench.settle(stack)
    servers = [psutil.Process(pid) for pid in (stack.mysql.pid, stack.clickhouse.pid)]

    def now() -> list[float]:
        return [time.perf_counter(), time.process_time(), *(sum(server.cpu_times()[:2]) for server in servers)]

    began = now()
    claims = _drain(stack, rows, batches)
    spent = [(ended - before) / len(claims) * 1000 for ended, before in zip(now(), began, strict=True)]
    return dict(zip(("wall", "exporter", "MySQL", "ClickHouse"), (round(ms, 1) for ms in spent), strict=True))


def ledger_bytes(stack: LocalStack) -> dict[str, float]:
    """In InnoDB, with indexes: a batch of adjacent rows, one of scattered rows, and a compacted one."""
    _emptied(stack, 2_000)
    # As with several transactions at once: every third row is another batch's.
    bench.execute(stack, "DELETE FROM clickhouse_outbox WHERE MOD(pk, 3) = 0 AND pk > 1000")
    claims = _drain(stack, rows=1_000, batches=10)
    together, apart = (claim.batch_id for claim in claims[:2])
    found = {"rows together": _copied(stack, together), "667 rows apart": _copied(stack, apart)}
    upkeep = MySQLMaintenance(stack.outbox)
    sweep(stack.outbox, upkeep, stack.log, Retention(outbox_days=0), ACTOR)
    assert upkeep.compact(upkeep.now_ms() + 1, 10, ACTOR) == len(claims)
    return {**found, "the record only": _copied(stack, together)}


def _copied(stack: LocalStack, batch_id: int) -> float:
    """Bytes a row of a table that has one batch of the ledger thousands of times, with other ids and times."""
    copy = f"{LEDGER}_copied"
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql(f"DROP TABLE IF EXISTS {copy}")
        connection.exec_driver_sql(f"CREATE TABLE {copy} LIKE {LEDGER}")
        columns = [row[0] for row in connection.exec_driver_sql(f"SHOW COLUMNS FROM {LEDGER}")]
        connection.exec_driver_sql(f"INSERT INTO {copy} SELECT * FROM {LEDGER} WHERE batch_id = {batch_id}")
    moving = {
        "batch_id": 1,
        "first_pk": 100_000,
        "last_pk": 100_000,
        "inserted_at_ms": 10_000,
        "exported_at_ms": 10_000,
    }
    for doubling in range(int(math.log2(COPIES))):
        by = 2**doubling
        values = ", ".join(f"{name} + {moving[name] * by}" if name in moving else name for name in columns)
        bench.execute(stack, f"INSERT INTO {copy} ({', '.join(columns)}) SELECT {values} FROM {copy}")
    bench.execute(stack, f"ANALYZE TABLE {copy}")
    engine = sa.create_engine(stack.outbox.url)
    with engine.connect() as connection:
        (size,) = connection.exec_driver_sql(
            "SELECT DATA_LENGTH + INDEX_LENGTH AS bytes FROM information_schema.tables "
            f"WHERE table_schema = DATABASE() AND table_name = '{copy}'"
        ).one()
    engine.dispose()
    bench.execute(stack, f"DROP TABLE {copy}")
    return float(size) / COPIES


def dagster_bytes(stack: LocalStack, runs: int, postgres_url: str = "") -> dict[str, float]:
    """In SQLite or PostgreSQL: of a run of one batch, as the schedule launches it, of each batch more, and of a skipped tick.

    One batch or ten have the same `RUN_ROWS` rows, so the difference is what a batch leaves.
    """
    with tempfile.TemporaryDirectory(prefix="auditexport-growth-") as directory:
        home = Path(directory)
        configuration = ROOT / ("auditexport_pipeline/deploy/dagster.yaml" if postgres_url else "dagster.yaml")
        shutil.copy(configuration, home / "dagster.yaml")
        environment = {
            **os.environ,
            "DAGSTER_HOME": directory,
            "DAGSTER_POSTGRES_URL": postgres_url,
            "AUDITEXPORT_MYSQL_URL": stack.outbox.url,
            "AUDITEXPORT_CLICKHOUSE_URL": stack.log.url,
        }

        def run(batches: int) -> None:
            bench.restore(stack)
            settings = {"ops": {"audit_logs_raw_v1": {"config": {"batch_rows": RUN_ROWS // batches}}}}
            (home / "run.yaml").write_text(json.dumps(settings))  # which is YAML
            subprocess.run(
                [*bench.DAGSTER_DRAIN, "-c", str(home / "run.yaml")],
                env=environment,
                cwd=ROOT,
                check=True,
                capture_output=True,
            )

        def of_a_run(batches: int) -> tuple[float, float]:
            before, events_before = _size(home, postgres_url), _events(home, postgres_url)
            for _ in range(runs):
                run(batches)
            grown = _size(home, postgres_url) - before
            return grown / runs, (_events(home, postgres_url) - events_before) / runs

        run(1)  # schemas, and pages that are begun
        one, one_events = of_a_run(1)
        more, more_events = of_a_run(RUN_BATCHES)
        before = _size(home, postgres_url)
        subprocess.run(
            [sys.executable, "-c", _MAKE_TICKS, str(TICKS)], env=environment, cwd=ROOT, check=True, capture_output=True
        )
        return {
            "bytes a run of one batch": one,
            "event rows of it": one_events,
            "bytes a batch more": (more - one) / (RUN_BATCHES - 1),
            "event rows of that": (more_events - one_events) / (RUN_BATCHES - 1),
            "bytes a tick": (_size(home, postgres_url) - before) / TICKS,
        }


# Ticks as the daemon stores them, with a skip reason as long as the sensor's.
_MAKE_TICKS = """
import sys, time
import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._core.scheduler.instigation import TickData, TickStatus
with dg.DagsterInstance.get() as instance:
    for number in range(int(sys.argv[1])):
        instance.create_tick(TickData(
            instigator_origin_id="a" * 40, instigator_name="outbox_backlog_sensor", instigator_type=InstigatorType.SENSOR,
            status=TickStatus.SKIPPED, timestamp=time.time(), selector_id="b" * 40,
            skip_reason="12 rows are pending, the oldest for 4 s: fewer than 10,000, younger than 60 s"))
"""


def _size(home: Path, postgres_url: str) -> int:
    if not postgres_url:
        return sum(path.stat().st_size for path in home.rglob("*") if path.is_file() and path.suffix != ".yaml")
    engine = sa.create_engine(postgres_url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("VACUUM")
        size = connection.exec_driver_sql("SELECT pg_database_size(current_database())").scalar_one()
    engine.dispose()
    return int(size)


def _events(home: Path, postgres_url: str) -> int:
    if postgres_url:
        engine = sa.create_engine(postgres_url)
        with engine.connect() as connection:
            rows = connection.exec_driver_sql("SELECT count(*) FROM event_logs").scalar_one()
        engine.dispose()
        return int(rows)
    rows = 0
    for path in (home / "history" / "runs").glob("*.db"):
        engine = sa.create_engine(f"sqlite:///{path}")
        with engine.connect() as connection:
            if sa.inspect(connection).has_table("event_logs") and path.stem != "index":
                rows += int(connection.exec_driver_sql("SELECT count(*) FROM event_logs").scalar_one())
        engine.dispose()
    return rows


def main(runs: int = 6) -> None:
    started = time.monotonic()
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        for rows in TRIP_ROWS:
            print(f"round trips a batch of\n{round_trips(stack, rows).to_string()}", flush=True)
            again = round_trips(stack, rows, hands_over=False).loc["write"]
            print(f"write, with the batch read again  {again['MySQL']}  {again['ClickHouse']}", flush=True)
        print("milliseconds a batch of 50 rows: ", fixed_costs(stack), flush=True)
        print("bytes a batch in the ledger, indexes included: ", ledger_bytes(stack), flush=True)
        _emptied(stack, RUN_ROWS)
        print("Dagster on SQLite: ", dagster_bytes(stack, runs), flush=True)
        from auditexport_tests.e2e.servers import postgres

        with postgres() as url:
            print("Dagster on PostgreSQL: ", dagster_bytes(stack, runs, url), flush=True)
    print(f"{time.monotonic() - started:.0f} s")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
