"""Asset checks on `audit_logs_raw_v1`: what a person should look at although every run was green.

What belongs here: turning counts into a check's result. What does not: counting (`stores`), and anything that a
drain would have to wait for: the export job leaves checks out, and each check runs by itself, in seconds.
"""

from collections.abc import Mapping

import dagster as dg

from auditexport_pipeline.core.actions import By
from auditexport_pipeline.core.dead_letters import LetterCounts, Which
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.reconcile import DAY_MS, reconcile
from auditexport_pipeline.core.status import Severity, advice, needs_operator
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import counts_table, reconcile_metadata
from auditexport_pipeline.stores import dead_letters
from auditexport_pipeline.stores.status import read_status, targets


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


def asset_checks(names: Names, given: Mapping[str, float] | None = None) -> list[dg.AssetChecksDefinition]:
    """All checks of this outbox's asset; `given` are targets of its own."""
    return [
        _of_status(
            names,
            given,
            "lag_within_target",
            ("lag",),
            ("lag_s", "backlog_rows", "rows_per_s", "eta_s"),
            "The oldest pending row is younger than the target (AUDITEXPORT_TARGET_LAG_S, 300 s). A warning while a drain is "
            "at work on it, an error when none is.",
        ),
        _of_status(
            names,
            given,
            "no_unknown_versions",
            ("unknown_versions",),
            ("unknown_rows", "unknown_versions"),
            "No pending row has a version that this release does not know: nothing takes such rows, and nothing loses them.",
        ),
        _of_status(
            names,
            given,
            "no_batch_open_too_long",
            ("open_batches",),
            ("open_batches", "oldest_open_batch_s"),
            "No batch holds its rows for longer than AUDITEXPORT_TARGET_BATCH_OPEN_MINUTES (15).",
        ),
        _of_status(
            names,
            given,
            "recent_batches_verified",
            ("unverified", "discrepant"),
            ("unverified_batches", "discrepant_batches"),
            "Every exported batch was read back from ClickHouse soon after, and ClickHouse holds what was sent.",
        ),
        _of_status(
            names,
            given,
            "retention_keeping_up",
            ("sweep",),
            ("oldest_unswept_s",),
            "Exported rows leave the outbox when retention says so (AUDITEXPORT_TARGET_RETENTION_DAYS, 30): `sweep_schedule`.",
        ),
        _of_status(
            names,
            given,
            "reconciled_recently",
            ("reconcile", "actions"),
            ("reconciled_s_ago",),
            "Both stores were held against each other within AUDITEXPORT_TARGET_RECONCILE_HOURS (36), and agreed: "
            "`reconcile_schedule`.",
        ),
        _no_duplicates_recently(names),
        _recent_exports_reconcile(names),
        _no_dead_letters_standing(names),
    ]


def _of_status(
    names: Names,
    given: Mapping[str, float] | None,
    name: str,
    about: tuple[str, ...],
    numbers: tuple[str, ...],
    description: str,
) -> dg.AssetChecksDefinition:
    """A check that passes while `core.status.advice` calls nobody about these things."""

    @dg.asset_check(asset=names.asset, name=name, required_resource_keys={names.mysql}, description=description)
    def check(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        try:
            status = read_status(names.mysql_of(context).outbox())
            found = [one for one in advice(status, targets(given)) if one.about in about]
        except AuditExportError as error:
            raise dg.Failure(description=str(error)) from None
        severe = any(one.severity is Severity.ERROR for one in found)
        return dg.AssetCheckResult(
            passed=not needs_operator(found),
            severity=dg.AssetCheckSeverity.ERROR if severe else dg.AssetCheckSeverity.WARN,
            description="; ".join(f"{one.what}. To do: {one.todo}" for one in found) or "as it should be",
            metadata={key: value for key in numbers if (value := status.numbers[key]) is not None},
        )

    return check


def _no_duplicates_recently(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys=names.databases,
        description="Counted without FINAL, no event of the last 24 hours is in the table twice. A requeue, or an event that the "
        "outbox holds twice, puts a second entry there until ClickHouse merges; the view `audit_logs` shows one at all times.",
    )
    def no_duplicates_recently(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        try:
            now_ms = names.mysql_of(context).upkeep().now_ms()
            entries, copies, same_slot = names.clickhouse_of(context).audit_log().surplus(now_ms - DAY_MS, now_ms)
        except AuditExportError as error:
            raise dg.Failure(description=str(error)) from None
        return dg.AssetCheckResult(
            passed=copies == 0,
            severity=dg.AssetCheckSeverity.WARN,
            description=f"{copies:,} of {entries:,} entries repeat an event, {same_slot:,} of them under the same inserted_at. To do: "
            "`auditexport reconcile` tells requeues and the outbox's own repetitions from the rest"
            if copies
            else "each event once",
            metadata={"entries": entries, "duplicated": copies, "duplicated_same_inserted_at": same_slot},
        )

    return no_duplicates_recently


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
