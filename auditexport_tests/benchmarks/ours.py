"""Our drain without Dagster, one verb after the other in one thread; once for each line of standard input.

python -m auditexport_tests.benchmarks.ours MYSQL_URL CLICKHOUSE_URL --turns
"""

from __future__ import annotations

import sys

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.benchmarks.turns import answer


def drain(outbox: MySQLOutbox, log: ClickHouseAuditLog, limits: Limits) -> int:
    """Claims, fetches, writes, marks and verifies what is pending; returns the rows claimed."""
    claims = claiming.claim(outbox, owner="benchmark", dead_owners=(), limits=limits)
    for claim in claims:
        fetched = export.fetch(outbox, log, claim, limits)
        export.mark(outbox, log, export.write(outbox, log, claim, fetched.bodies, limits), limits)
    verify.verify(outbox, log, outbox.unverified(100))
    return sum(claim.rows for claim in claims)


if __name__ == "__main__":
    stores = MySQLOutbox(sys.argv[1]), ClickHouseAuditLog(sys.argv[2])
    answer(lambda: drain(*stores, Limits()))
