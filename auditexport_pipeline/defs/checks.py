"""Asset checks: what should be true of `audit_logs_raw_v1` at any time, asked of the databases.

What belongs here: asking, and the severity of the answer. What does not: the comparison (`core.reconcile`).
"""

import dagster as dg

from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.reconcile import DAY_MS, reconcile
from auditexport_pipeline.defs.report import reconcile_metadata
from auditexport_pipeline.defs.resources import ClickHouseResource, MySQLResource

ASSET = "audit_logs_raw_v1"


@dg.asset_check(
    asset=ASSET,
    description="The exports of the last 24 hours are in ClickHouse as they were sent: nothing missing, duplicated, "
    "unexpected or altered.",
)
def recent_exports_reconcile(mysql: MySQLResource, clickhouse: ClickHouseResource) -> dg.AssetCheckResult:
    try:
        upkeep = mysql.upkeep()
        now_ms = upkeep.now_ms()
        report = reconcile(
            mysql.outbox(),
            upkeep,
            clickhouse.audit_log(),
            from_ms=now_ms - DAY_MS,
            to_ms=now_ms,
            count_places=False,
        )
    except AuditExportError as error:
        raise dg.Failure(description=str(error)) from None
    return dg.AssetCheckResult(
        passed=report.clean, severity=dg.AssetCheckSeverity.ERROR, metadata=reconcile_metadata(report)
    )
