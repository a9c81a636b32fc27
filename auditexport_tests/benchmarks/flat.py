"""Cost that does not grow: the sensor's probe, a claim and a drain, in a new outbox and in an old one.

The old outbox has ten times as many exported rows before its pending ones, and a ledger of 100,000 batches.

    python -m auditexport_tests.benchmarks.flat [exported rows] [pending rows] [batches in the ledger]
"""

from __future__ import annotations

import resource
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager

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
    """Exported rows first, then pending ones with higher pks."""
    seed_outbox(stack.outbox.url, seed=bench.SEED, events=SEEDED_ROWS)
    engine = sa.create_engine(stack.outbox.url, isolation_level="AUTOCOMMIT")
    with engine.connect() as connection:
        connection.exec_driver_sql("SET SESSION sql_log_bin = 0")  # not measured
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
    """Medians of some rounds."""
    outbox, log, limits = stack.outbox, stack.log, Limits(max_batches=1)
    taken: defaultdict[str, list[float]] = defaultdict(list)

    @contextmanager
    def timed(name: str, unit_s: float) -> Iterator[None]:
        started = time.perf_counter()
        yield
        taken[name].append((time.perf_counter() - started) / unit_s)

    for number in range(ROUNDS):
        with timed("sensor's probe, ms", 1e-3):
            outbox.backlog(limits.versions, count_to=1_000_000)
        (claim,) = claiming.claim(outbox, owner=f"round {number}", dead_owners=(), limits=limits)
        with timed("drain, µs an event", claim.rows * 1e-6):
            fetched = export.fetch(outbox, log, claim, limits)
            export.mark(outbox, log, export.write(outbox, log, claim, fetched.bodies, limits), limits)
            verify.verify(outbox, log, outbox.unverified(10))
        # The first batch of a plan is small, so the claim of a whole one is measured by itself.
        with (
            outbox.planning(f"round {number}", limits.lease_s) as ledger,
            timed("claim of 100,000 rows, ms", 1e-3),
        ):
            ledger.candidates("audit_log.v1", 0, 100_000)
    return {name: float(pd.Series(values).median()) for name, values in taken.items()}


def main(exported: int = 10_000_000, pending: int = 1_000_000, batches: int = 100_000) -> None:
    columns = {}
    # First the one that takes long to grow: the other is measured a minute later, on the same machine.
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
