"""Asset checks on `audit_logs_raw_v1`: what a person should look at although every run was green.

What belongs here: turning counts into a check's result. What does not: counting (`stores`), and anything that a
drain would have to wait for: the export job leaves checks out, and each check runs by itself, in seconds.
"""

import dagster as dg

from auditexport_pipeline.core.actions import By
from auditexport_pipeline.core.dead_letters import LetterCounts, Which
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.reconcile import DAY_MS, reconcile
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import counts_table, reconcile_metadata
from auditexport_pipeline.stores import dead_letters


def letters_standing(counts: LetterCounts, gone: int) -> dg.AssetCheckResult:
    """The result for these open letters: ids and counts only."""
    return dg.AssetCheckResult(
        passed=counts.letters == 0,
        severity=dg.AssetCheckSeverity.WARN,
        description=f"{counts.letters:,} dead letters wait for an operator: `auditexport dead-letters list`"
        if counts.letters
        else "no row waits for an operator",
        metadata={
            "dead_letters_standing": counts.letters,
            "dead_letters_gone": gone,
            "by_reason": dg.MetadataValue.md(counts_table("reason", counts.by_reason)),
            "by_workspace": dg.MetadataValue.md(counts_table("workspace", counts.by_workspace)),
            "by_version": dg.MetadataValue.md(counts_table("version", counts.by_version)),
        },
    )


def asset_checks(names: Names) -> list[dg.AssetChecksDefinition]:
    """All checks of this outbox's asset."""
    return [_recent_exports_reconcile(names), _no_dead_letters_standing(names)]


def _recent_exports_reconcile(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys=names.databases,
        description="The exports of the last 24 hours are in ClickHouse as they were sent: nothing missing, duplicated, "
        "unexpected or altered.",
    )
    def recent_exports_reconcile(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        mysql = names.mysql_of(context)
        try:
            upkeep = mysql.upkeep()
            now_ms = upkeep.now_ms()
            report = reconcile(
                mysql.outbox(),
                upkeep,
                names.clickhouse_of(context).audit_log(),
                from_ms=now_ms - DAY_MS,
                to_ms=now_ms,
                by=By(who="check recent_exports_reconcile", why="the last 24 hours"),
                count_places=False,
            )
        except AuditExportError as error:
            raise dg.Failure(description=str(error)) from None
        return dg.AssetCheckResult(
            passed=report.clean, severity=dg.AssetCheckSeverity.ERROR, metadata=reconcile_metadata(report)
        )

    return recent_exports_reconcile


def _no_dead_letters_standing(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys={names.mysql},
        description="No outbox row is set aside as an open dead letter. Discarded ones do not count; letters whose row "
        "was deleted or marked by somebody are closed on the way.",
    )
    def no_dead_letters_standing(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        try:
            outbox = names.mysql_of(context).outbox()
            gone = dead_letters.upkeep(outbox)
            return letters_standing(dead_letters.count(outbox, Which()), gone)
        except AuditExportError as error:
            raise dg.Failure(description=str(error)) from None

    return no_dead_letters_standing
