"""Cost that does not grow: the sensor's probe, a claim and a drain, alone and behind everything a long life leaves.

What belongs here: a fresh outbox with pending rows only, beside one whose pending rows lie behind ten times as many
exported ones and a ledger of 100,000 batches; one figure each, and their ratio. What does not: throughput by backlog
(`speed`), and dead letters (`floods`).

    python -m auditexport_tests.benchmarks.flat [exported rows] [pending rows] [batches in the ledger]
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable

import pandas as pd
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench

SEEDED_ROWS = 100_000
ROUNDS = 5
DOUBLE = (
    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at, deleted_at) "
    "SELECT version, workspace_id, event_id, payload, created_at, {stamp} FROM clickhouse_outbox ORDER BY pk LIMIT {rows}"
)
# Verified batches, each over its own run of exported rows.
LEDGER = """
INSERT INTO clickhouse_outbox_batch
  (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count, entry_count, bytes,
   first_pk, last_pk, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms, exported_at_ms,
   verified_at_ms)
SELECT n, 1, 0, 'audit_log.v1', 'verified', 'an old run', 1, {size}, {size}, {size}, {size} * 600,
       (n - 1) * {size} + 1, n * {size}, CONCAT((n - 1) * {size} + 1, '-', n * {size}),
       CONCAT('[{{"n":0,"at":', 1000000000000 + n, ',"pks":"', (n - 1) * {size} + 1, '-', n * {size}, '","digest":"d","fp":"0"}}]'),
       '', REPEAT('d', 32), 1000000000000 + n, 1, '', 1000000000000 + n, 1000000000000 + n, 1000000000000 + n
FROM (SELECT ROW_NUMBER() OVER () AS n FROM clickhouse_outbox LIMIT {batches}) AS numbers
"""


def _grow(stack: LocalStack, exported: int, pending: int, batches: int) -> None:
    """Exported rows first, then pending ones, as their pks would have it."""
    seed_outbox(stack.outbox.url, seed=bench.SEED, events=SEEDED_ROWS)
    engine = sa.create_engine(stack.outbox.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("SET SESSION sql_log_bin = 0")  # of the growing, nothing is measured
        if exported:
            connection.exec_driver_sql("UPDATE clickhouse_outbox SET deleted_at = 1")
            for _ in range(exported // SEEDED_ROWS - 1):
                connection.exec_driver_sql(DOUBLE.format(stamp="1", rows=SEEDED_ROWS))
            if batches:
                connection.exec_driver_sql(LEDGER.format(size=max(1, exported // batches), batches=batches))
        for _ in range(pending // SEEDED_ROWS - (not exported)):
            connection.exec_driver_sql(DOUBLE.format(stamp="NULL", rows=SEEDED_ROWS))
        connection.exec_driver_sql("ANALYZE TABLE clickhouse_outbox")
    engine.dispose()
    bench.settle(stack)


def _measured(stack: LocalStack) -> dict[str, float]:
    """Medians of some rounds, in milliseconds for the looks and in microseconds an event for the drain."""
    outbox, log, limits = stack.outbox, stack.log, Limits(max_batches=1)
    taken: dict[str, list[float]] = {
        "sensor's probe, ms": [],
        "claim of 100,000 rows, ms": [],
        "drain, µs an event": [],
    }

    def timed(name: str, work: Callable[[], object], *, by: float) -> object:
        started = time.perf_counter()
        result = work()
        taken[name].append((time.perf_counter() - started) / by)
        return result

    def one_batch() -> int:
        fetched = export.fetch(outbox, log, claim, limits)
        export.mark(outbox, log, export.write(outbox, log, claim, fetched.bodies, limits), limits)
        verify.verify(outbox, log, outbox.unverified(10))
        return fetched.rows

    for number in range(ROUNDS):
        timed("sensor's probe, ms", lambda: outbox.backlog(limits.versions, count_to=1_000_000), by=1e-3)
        owner = f"round {number}"
        (claim,) = claiming.claim(outbox, owner=owner, dead_owners=(), limits=limits)
        # A claim of a whole batch: the first of a plan is small.
        started = time.perf_counter()
        one_batch()
        taken["drain, µs an event"].append((time.perf_counter() - started) / claim.rows * 1e6)
        with outbox.planning(owner, limits.lease_s) as ledger:
            timed("claim of 100,000 rows, ms", lambda: ledger.candidates("audit_log.v1", 0, 100_000), by=1e-3)
    return {name: float(pd.Series(values).median()) for name, values in taken.items()}


def main(exported: int = 10_000_000, pending: int = 1_000_000, batches: int = 100_000) -> None:
    columns = {}
    # The one that takes long to grow first: the other is then measured a minute later, on the same machine.
    for name, before, old in (
        (f"behind {exported:,} exported, {batches:,} batches", exported, batches),
        ("pending rows only", 0, 0),
    ):
        with bench.benchmark_stack() as stack:
            print(f"{stack.mysql.family} {stack.mysql.version}: growing {name}", flush=True)
            _grow(stack, before, pending, old)
            quiet = bench.wait_for_quiet()
            print(
                f"measuring {name}{'' if quiet else ', beside something else that keeps the machine busy'}", flush=True
            )
            columns[name] = _measured(stack)
    table = pd.DataFrame(columns)
    table["×"] = table.iloc[:, 0] / table.iloc[:, 1]
    print(
        f"{pending:,} pending rows; medians of {ROUNDS}; peak RSS of the exporter "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000:.0f} MB"
    )
    print(table.round(2).to_string())


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
