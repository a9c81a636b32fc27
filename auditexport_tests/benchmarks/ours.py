"""Our drain without Dagster, by the loop that the CLI and a run that stays use: one plan for each line of standard input.

python -m auditexport_tests.benchmarks.ours MYSQL_URL CLICKHOUSE_URL --turns
"""

from __future__ import annotations

import sys

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.drain import Drain, Listener
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.benchmarks.turns import answer


class _Silent(Listener):
    """Nothing is printed, as in a run that stays."""


def drain(work: Drain) -> int:
    """Claims, exports, marks and verifies what is pending; returns the rows exported so far."""
    return work.one_plan().rows


if __name__ == "__main__":
    outbox, log = MySQLOutbox(sys.argv[1]), ClickHouseAuditLog(sys.argv[2])
    work = Drain(outbox, log, owner="benchmark", limits=Limits(), listener=_Silent())
    answer(lambda: drain(work))
