"""Advice: what is not as it should be, and what mends it; the same for page, prompt and notices.

What belongs here: sentences with numbers, and how severe each thing is. What does not: the numbers (`core.status`) and
what they are held against (`core.targets`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from auditexport_pipeline.core.batch import VIEW_BARS
from auditexport_pipeline.core.claiming import LOOK_FOR_WHO_CLEARS
from auditexport_pipeline.core.status import (
    RATE_WINDOW_S,
    VIEWS_WINDOW_S,
    OpenBatchStatus,
    Status,
    newest_of_each_view,
    shown_counts,
    shown_name,
    shown_s,
)
from auditexport_pipeline.core.targets import Targets

# Batches named in a sentence; `auditexport batches list` has them all.
NAMED_BATCHES = 5


class Severity(str, Enum):
    """ERROR: evidence is at stake or late. WARNING: it waits for a person. NOTE: worth knowing, and nobody is called."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    def __str__(self) -> str:
        return self.value


_SEVEREST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing that is not as it should be. `about` is a stable name for it, `what` has the numbers, `todo` mends it."""

    severity: Severity
    about: str
    what: str
    todo: str


def advice(status: Status, targets: Targets) -> list[Advice]:
    """What is not as the targets want it, worst first, each with what mends it. Pure: the same for page and prompt."""
    found = [
        *_discrepant(status),
        *_reconcile(status, targets),
        *_lag(status, targets),
        *_created_at(status),
        *_open_batches(status, targets),
        *_unverified(status, targets),
        *_views(status),
        *_cleared(status),
        *_held(status),
        *_dead_letters(status, targets),
        *_unknown_versions(status, targets),
        *_sweep(status, targets),
    ]
    return sorted(found, key=lambda one: _SEVEREST_FIRST.index(one.severity))  # stable: as above within a severity


def needs_operator(found: Sequence[Advice]) -> bool:
    """Whether any of it is for a person to act on."""
    return any(one.severity is not Severity.NOTE for one in found)


def verdict(status: Status, found: Sequence[Advice]) -> str:
    """The headline: one line that says how it stands."""
    errors = sum(1 for one in found if one.severity is Severity.ERROR)
    warnings = sum(1 for one in found if one.severity is Severity.WARNING)
    if errors or warnings:
        counted = [_counted(errors, "error"), _counted(warnings, "warning")]
        return f"needs an operator: {', '.join(text for text in counted if text)}"
    if status.at_work:
        return f"healthy, draining: {status.backlog.shown_rows} rows pending"
    return f"healthy: {status.backlog.shown_rows} rows pending, lag {shown_s(status.backlog.lag_s)}"


def _counted(count: int, what: str, many: str = "") -> str:
    return f"{count:,} {what if count == 1 else many or what + 's'}" if count else ""


def _discrepant(status: Status) -> list[Advice]:
    if not status.discrepant:
        return []
    named = "; ".join(
        f"batch {batch_id} ({why})" if why else f"batch {batch_id}"
        for batch_id, why in list(status.discrepant.items())[:NAMED_BATCHES]
    )
    more = f"; and {len(status.discrepant) - NAMED_BATCHES:,} more" if len(status.discrepant) > NAMED_BATCHES else ""
    many = len(status.discrepant) != 1
    return [
        Advice(
            severity=Severity.ERROR,
            about="discrepant",
            what=f"{len(status.discrepant):,} batch{'es are' if many else ' is'} discrepant: ClickHouse does not hold what "
            f"was verified or acknowledged: {named}{more}",
            todo="auditexport reconcile --repair; then a drain, and reconcile again",
        )
    ]


def _reconcile(status: Status, targets: Targets) -> list[Advice]:
    if not status.actions_read:
        return [
            Advice(
                severity=Severity.NOTE,
                about="actions",
                what="this user may not read clickhouse_outbox_action: when both stores were reconciled last is not known",
                todo="auditexport doctor --role reader",
            )
        ]
    last = status.last_reconcile
    standing = _open_findings(status)
    if last is not None and not last.clean:
        return [
            Advice(
                severity=Severity.ERROR,
                about="reconcile",
                what=f"the last reconciliation, {shown_s((status.at_ms - last.at_ms) / 1000)} ago by {last.who}, found "
                f"{last.found}",
                todo="auditexport reconcile --repair; then a drain, and reconcile again",
            ),
            *standing,
        ]
    if standing:
        return standing
    since_ms = last.at_ms if last is not None else status.first_claimed_at_ms
    if since_ms is None or status.at_ms - since_ms <= targets.reconcile_hours * 3_600_000:
        return []
    ago = shown_s((status.at_ms - since_ms) / 1000)
    return [
        Advice(
            severity=Severity.WARNING,
            about="reconcile",
            what=f"{f'the last reconciliation was {ago} ago' if last else f'exporting began {ago} ago and nobody has reconciled'} "
            f"(target: every {targets.reconcile_hours:g} h)",
            todo="auditexport reconcile; then turn reconcile_schedule on",
        )
    ]


def _created_at(status: Status) -> list[Advice]:
    backlog = status.backlog
    if not backlog.odd_created_rows:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="created_at",
            what=f"{backlog.odd_created_rows:,} of the oldest pending rows have a created_at that is no epoch milliseconds, the "
            f"first with pk {backlog.odd_created_pk}; the lag is taken from other rows, or from the last claim",
            todo="let the application write created_at in milliseconds since 1970, by a clock that is kept",
        )
    ]


def _open_findings(status: Status) -> list[Advice]:
    """What an earlier reconciliation found: a later one that looked elsewhere says nothing about it."""
    found = status.open_findings
    if not found:
        return []
    first, *more = found
    total = first.found
    for one in more:
        total += one.found
    others = f", and {len(more):,} later ones" if more else ""
    return [
        Advice(
            severity=Severity.ERROR,
            about="reconcile",
            what=f"a reconciliation {shown_s((status.at_ms - first.at_ms) / 1000)} ago{others} found {total}, and none has looked "
            "there again since",
            todo=f"auditexport reconcile --from {min(one.from_ms for one in found)} --repair; then a drain, and the same again",
        )
    ]


def _lag(status: Status, targets: Targets) -> list[Advice]:
    backlog = status.backlog
    if not backlog.rows or backlog.lag_s <= targets.lag_s:
        return []
    late = (
        f"{backlog.shown_rows} rows are pending, the oldest for {shown_s(backlog.lag_s)} "
        f"(target {shown_s(targets.lag_s)})"
    )
    if not status.at_work:
        return [
            Advice(
                severity=Severity.ERROR,
                about="lag",
                what=f"{late}, and no drain is at work",
                todo="auditexport drain; then see on Dagster's page whether outbox_backlog_sensor is on and why the last "
                "run failed",
            )
        ]
    owners = ", ".join(status.at_work)
    if not status.rows_per_s:
        return [
            Advice(
                severity=Severity.ERROR,
                about="lag",
                what=f"{late}; {owners} is at work and has exported nothing in {shown_s(RATE_WINDOW_S)}",
                todo="auditexport doctor; then the log of that run",
            )
        ]
    return [
        Advice(
            severity=Severity.WARNING,
            about="lag",
            what=f"{late}; {owners} is at work at {status.rows_per_s:,.0f} rows/s, "
            f"{shown_s(status.eta_s or 0.0)} to go if nothing more arrives",
            todo="auditexport status --watch; if it does not shrink, see batch_rows and max_rows_per_second",
        )
    ]


def _open_batches(status: Status, targets: Targets) -> list[Advice]:
    late = [batch for batch in status.open_batches if batch.age_s > targets.batch_open_minutes * 60]
    left = [batch for batch in late if not batch.leased]
    held = [batch for batch in late if batch.leased]
    found = []
    for batches, severity, how, todo in (
        (left, Severity.ERROR, "their leases have ended and no run has taken them up", "auditexport drain"),
        (
            held,
            Severity.WARNING,
            "their leases still run",
            f"auditexport batches show {held[0].batch_id}" if held else "",
        ),
    ):
        if batches:
            named = "; ".join(_named(batch) for batch in batches[:NAMED_BATCHES])
            more = f"; and {len(batches) - NAMED_BATCHES:,} more" if len(batches) > NAMED_BATCHES else ""
            found.append(
                Advice(
                    severity=severity,
                    about="open_batches",
                    what=f"{_counted(len(batches), 'batch', 'batches')} open for more than "
                    f"{targets.batch_open_minutes:g} min, {how}: {named}{more}",
                    todo=todo,
                )
            )
    return found


def _named(batch: OpenBatchStatus) -> str:
    error = f", {batch.last_error}" if batch.last_error else ""
    return f"batch {batch.batch_id} ({batch.state}, {batch.rows:,} rows, {shown_s(batch.age_s)}, owner {batch.owner}{error})"


def _unverified(status: Status, targets: Targets) -> list[Advice]:
    if not status.unverified_batches or status.unverified_age_s <= targets.batch_open_minutes * 60:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="unverified",
            what=f"{status.unverified_batches:,} exported batches are not verified, the oldest for "
            f"{shown_s(status.unverified_age_s)} (target {targets.batch_open_minutes:g} min)",
            todo="auditexport drain; it verifies what an interrupted run left",
        )
    ]


def _views(status: Status) -> list[Advice]:
    barred = [
        Advice(
            severity=Severity.ERROR,
            about="views",
            what=f"batch {batch.batch_id} ({batch.rows:,} rows): {batch.last_error}",
            todo="fix or drop the view, then auditexport drain; see A view fails in runbook.md",
        )
        for batch in status.open_batches
        if batch.last_error.startswith(VIEW_BARS)
    ][:1]
    if not status.view_failures:
        return barred
    named = newest_of_each_view(status.view_failures)
    return [
        *barred,
        Advice(
            severity=Severity.WARNING,
            about="views",
            what=f"a materialized view failed on {_counted(len(status.view_failures), 'batch', 'batches')} of the last "
            f"{shown_s(VIEWS_WINDOW_S)}; the entries are stored. The newest, "
            + "; ".join(f"batch {batch_id}: {note}" for batch_id, note in named.items()),
            todo="fix or drop the view and fill its target; see A view fails in runbook.md, and auditexport batches show "
            f"{next(iter(named))}",
        ),
    ]


def _cleared(status: Status) -> list[Advice]:
    if status.cleared_often is None:
        return []
    return [
        Advice(severity=Severity.WARNING, about="cleared", what=str(status.cleared_often), todo=LOOK_FOR_WHO_CLEARS)
    ]


def _held(status: Status) -> list[Advice]:
    held = status.backlog.held_rows
    if not held:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="held",
            what=f"{_counted(held, 'row')} parse and the ClickHouse table refuses them: {shown_counts(status.held_by_detail)}",
            todo="SHOW CREATE TABLE audit_logs_raw_v1; then drop or mend that column or constraint: the next drain sends them",
        )
    ]


def _dead_letters(status: Status, targets: Targets) -> list[Advice]:
    dead = status.backlog.dead_rows
    if dead <= targets.dead_letters:
        return []
    reasons = shown_counts(status.dead_by_reason)
    return [
        Advice(
            severity=Severity.WARNING,
            about="dead_letters",
            what=f"{dead:,} dead letters wait for an operator: {reasons}",
            todo="auditexport dead-letters list; then mend the rows and retry, or discard",
        )
    ]


def _unknown_versions(status: Status, targets: Targets) -> list[Advice]:
    backlog = status.backlog
    if backlog.unknown_rows <= targets.unknown_rows:
        return []
    versions = shown_counts(backlog.unknown_by_version) or ", ".join(map(shown_name, backlog.unknown_versions))
    return [
        Advice(
            severity=Severity.WARNING,
            about="unknown_versions",
            what=f"{backlog.unknown_rows:,} rows have versions that this release does not know and no drain takes: {versions}",
            todo="upgrade auditexport to a release that knows them, or mend the writer",
        )
    ]


def _sweep(status: Status, targets: Targets) -> list[Advice]:
    days = status.oldest_unswept_age_s / 86_400
    if days <= targets.retention_days + targets.sweep_late_days:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="sweep",
            what=f"rows exported {days:,.1f} days ago are still in the outbox (retention is {targets.retention_days:g} days)",
            todo="auditexport sweep --dry-run; then sweep, and turn sweep_schedule on",
        )
    ]
