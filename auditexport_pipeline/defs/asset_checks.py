"""Asset checks on `audit_logs_raw_v1`: what needs a person although every run succeeded.

The export job leaves them out, so that no drain waits for them. `mysql.status` counts.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import dagster as dg

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.advice import Severity, advice, needs_operator
from auditexport_pipeline.core.dead_letters import DeadLetterFilter
from auditexport_pipeline.core.format import counted, for_outbox
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import counts_table, reconcile_metadata
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.status import read_status


@dataclass(frozen=True, slots=True, kw_only=True)
class _StatusCheck:
    """A check that fails when `core.advice` says that one of these things needs an operator. It shows these numbers."""

    name: str
    about: tuple[str, ...]
    numbers: tuple[str, ...]
    description: str


_STATUS_CHECKS = (
    _StatusCheck(
        name="lag_within_target",
        about=("lag", "created_at"),
        numbers=("lag_s", "backlog_rows", "rows_per_s", "eta_s", "odd_created_rows"),
        description="The oldest pending row is younger than the target `lag_s` (default 300). A warning while a drain is "
        "at work on it, an error when none is; also a warning where created_at is not in epoch milliseconds.",
    ),
    _StatusCheck(
        name="no_unknown_versions",
        about=("unknown_versions",),
        numbers=("unknown_rows", "unknown_versions"),
        description="No pending row has a version that this release does not know. Such rows stay in the outbox, untouched.",
    ),
    _StatusCheck(
        name="no_batch_open_too_long",
        about=("open_batches",),
        numbers=("open_batches", "oldest_open_batch_s"),
        description="No batch holds its rows for longer than its target (`batch_open_minutes`, 15).",
    ),
    _StatusCheck(
        name="recent_batches_verified",
        about=("unverified", "discrepant"),
        numbers=("unverified_batches", "discrepant_batches"),
        description="Every exported batch was read back from ClickHouse soon after, and ClickHouse holds what was sent.",
    ),
    _StatusCheck(
        name="retention_keeping_up",
        about=("sweep",),
        numbers=("oldest_unswept_s",),
        description="Exported rows leave the outbox when retention says so (`retention_days`, 30): `sweep_schedule`.",
    ),
    _StatusCheck(
        name="reconciled_recently",
        about=("reconcile", "actions"),
        numbers=("reconciled_s_ago",),
        description="Both stores were compared within the target (`reconcile_hours`, 36), and agreed: "
        "`reconcile_schedule`.",
    ),
)

# Checks that read MySQL only, in milliseconds; the others read a day's entries in ClickHouse.
LIGHT = (*(check.name for check in _STATUS_CHECKS), "no_dead_letters_standing")


def asset_checks(names: Names, targets: Targets) -> list[dg.AssetChecksDefinition]:
    """All checks of this outbox's asset."""
    return [
        _status_checks(names, targets),
        _no_duplicates_recently(names),
        _recent_exports_reconcile(names),
        _no_dead_letters_standing(names),
    ]


def _status_checks(names: Names, targets: Targets) -> dg.AssetChecksDefinition:
    """All of `_STATUS_CHECKS` from one reading of the status."""

    @dg.multi_asset_check(
        name=names.of("status_checks"),
        specs=[
            dg.AssetCheckSpec(check.name, asset=names.asset, description=check.description) for check in _STATUS_CHECKS
        ],
        can_subset=True,
        required_resource_keys=names.keys("mysql"),
    )
    def status_checks(context: dg.AssetCheckExecutionContext) -> Iterator[dg.AssetCheckResult]:
        with in_one_line():
            status = read_status(names.outbox(context))
            advised = advice(status, targets, names.name)
        selected = {key.name for key in context.selected_asset_check_keys}
        for check in _STATUS_CHECKS:
            if check.name not in selected:
                continue
            found = [one for one in advised if one.about in check.about]
            severe = any(one.severity is Severity.ERROR for one in found)
            yield dg.AssetCheckResult(
                check_name=check.name,
                passed=not needs_operator(found),
                severity=dg.AssetCheckSeverity.ERROR if severe else dg.AssetCheckSeverity.WARN,
                description="; ".join(f"{one.what}. To do: {one.todo}" for one in found) or "as it should be",
                metadata={key: value for key in check.numbers if (value := status.numbers[key]) is not None},
            )

    return status_checks


def _no_duplicates_recently(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys=names.keys("mysql", "clickhouse"),
        description="Counted without FINAL, no event of the last 24 hours is in the table twice. A requeue, or an event that the "
        "outbox holds twice, puts a second entry there until ClickHouse merges; the view `audit_logs` shows one at all times.",
    )
    def no_duplicates_recently(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with in_one_line():
            now_ms = names.maintenance(context).now_ms()
            entries, copies, same_slot = names.audit_log(context).surplus(now_ms - DAY_MS, now_ms)
        return dg.AssetCheckResult(
            passed=copies == 0,
            severity=dg.AssetCheckSeverity.WARN,
            description=for_outbox(
                f"{copies:,} of {entries:,} entries repeat an event, {same_slot:,} of them under the same inserted_at. To do: "
                "`auditexport reconcile` tells requeues and repetitions in the outbox from the rest",
                names.name,
            )
            if copies
            else "each event once",
            metadata={"entries": entries, "duplicated": copies, "duplicated_same_inserted_at": same_slot},
        )

    return no_duplicates_recently


def _recent_exports_reconcile(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys=names.keys("mysql", "clickhouse"),
        description="The exports of the last 24 hours are in ClickHouse as they were sent: nothing missing, duplicated, "
        "unexpected or altered.",
    )
    def recent_exports_reconcile(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with in_one_line():
            maintenance = names.maintenance(context)
            now_ms = maintenance.now_ms()
            report = reconcile(
                names.outbox(context),
                maintenance,
                names.audit_log(context),
                from_ms=now_ms - DAY_MS,
                to_ms=now_ms,
                by=Actor(who="check recent_exports_reconcile", why="the last 24 hours"),
                count_places=False,
            )
        return dg.AssetCheckResult(
            passed=report.clean, severity=dg.AssetCheckSeverity.ERROR, metadata=reconcile_metadata(report)
        )

    return recent_exports_reconcile


def _no_dead_letters_standing(names: Names) -> dg.AssetChecksDefinition:
    @dg.asset_check(
        asset=names.asset,
        required_resource_keys=names.keys("mysql"),
        description="No outbox row is an open dead letter. Discarded ones do not count. Dead letters whose row was deleted or "
        "marked meanwhile are closed.",
    )
    def no_dead_letters_standing(context: dg.AssetCheckExecutionContext) -> dg.AssetCheckResult:
        with in_one_line():
            outbox = names.outbox(context)
            gone = dead_letters.close_gone(outbox)
            counts = dead_letters.count(outbox, DeadLetterFilter())
        open_letters = f"{counted(counts.letters, 'open dead letter')}: `auditexport dead-letters list`"
        return dg.AssetCheckResult(
            passed=counts.letters == 0,
            severity=dg.AssetCheckSeverity.WARN,
            description=for_outbox(open_letters, names.name) if counts.letters else "no open dead letter",
            metadata={
                "dead_letters_standing": counts.letters,
                "dead_letters_gone": gone,
                "by_reason": dg.MetadataValue.md(counts_table("reason", counts.by_reason)),
                "by_workspace": dg.MetadataValue.md(counts_table("workspace", counts.by_workspace)),
                "by_version": dg.MetadataValue.md(counts_table("version", counts.by_version)),
            },
        )

    return no_dead_letters_standing
