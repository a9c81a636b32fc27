"""Advice: what is wrong with an export, how severe it is, and what an operator should do.

The Dagster UI, the CLI, metrics and alerts all show this advice. The numbers come from `core.status`, the limits from
`core.settings`; nothing here reads anything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from enum import Enum

import msgspec

from auditexport_pipeline.core.batch import VIEW_BARS
from auditexport_pipeline.core.claiming import LOOK_FOR_WHO_CLEARS
from auditexport_pipeline.core.format import batches, counted, for_outbox, format_counts, format_duration, printable
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import RATE_WINDOW_S, VIEWS_WINDOW_S, OpenBatchStatus, Status, newest_of_each_view

# Batches named in a sentence; `auditexport batches list` has them all.
NAMED_BATCHES = 5


class Severity(str, Enum):
    """ERROR: evidence is at stake or late. WARNING: it waits for a person. NOTE: worth knowing, no alert."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    def __str__(self) -> str:
        return self.value


_WORST_FIRST = list(Severity)
_REPAIR = "`auditexport reconcile --repair`; then a drain, and reconcile again"


@dataclass(frozen=True, slots=True)
class Advice:
    """One thing that is wrong. `about` is its stable name, `what` has the numbers, `fix` says what to do.

    In both texts, commands and names of Dagster definitions stand between backticks, so that `for_outbox` finds them.
    """

    severity: Severity
    about: str
    what: str
    fix: str
    headline: str = ""  # of its alert, where `about` does not say it

    @property
    def todo(self) -> str:
        """The fix as plain text."""
        return self.fix.replace("`", "")

    def for_outbox(self, outbox: str) -> Advice:
        """The same with the commands and names of this outbox."""
        return replace(self, what=for_outbox(self.what, outbox), fix=for_outbox(self.fix, outbox))

    @property
    def values(self) -> dict[str, str]:
        """For JSON."""
        return {"severity": str(self.severity), "about": self.about, "what": self.what, "todo": self.todo}


def advice(status: Status, targets: Targets, outbox: str = "") -> list[Advice]:
    """What is not within the targets, worst first. `outbox` is the name that its commands need; empty for the only one."""
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
    found.sort(key=lambda one: _WORST_FIRST.index(one.severity))  # stable: in the order above within a severity
    return [one.for_outbox(outbox) for one in found]


def needs_operator(found: Sequence[Advice]) -> bool:
    """Whether any of it is for a person to act on."""
    return any(one.severity is not Severity.NOTE for one in found)


def verdict(status: Status, found: Sequence[Advice]) -> str:
    """The headline: whether an operator is needed, in one line."""
    if needs_operator(found):
        counts = {each: sum(one.severity is each for one in found) for each in (Severity.ERROR, Severity.WARNING)}
        return "needs an operator: " + ", ".join(counted(count, str(each)) for each, count in counts.items() if count)
    if status.at_work:
        return f"healthy, draining: {status.backlog.pending}"
    return f"healthy: {status.backlog.pending}, lag {format_duration(status.backlog.lag_s)}"


def _error(about: str, what: str, fix: str, headline: str = "") -> Advice:
    return Advice(Severity.ERROR, about, what, fix, headline)


def _warning(about: str, what: str, fix: str) -> Advice:
    return Advice(Severity.WARNING, about, what, fix)


def _listed(texts: Sequence[str]) -> str:
    more = len(texts) - NAMED_BATCHES
    return "; ".join(texts[:NAMED_BATCHES]) + (f"; and {more:,} more" if more > 0 else "")


def _discrepant(status: Status) -> Iterator[Advice]:
    if status.discrepant:
        found = [
            f"batch {batch_id} ({why})" if why else f"batch {batch_id}" for batch_id, why in status.discrepant.items()
        ]
        yield _error(
            "discrepant",
            f"{counted(len(found), 'batch is', 'batches are')} discrepant: ClickHouse does not hold what was verified or "
            f"acknowledged: {_listed(found)}",
            _REPAIR,
        )


def _reconcile(status: Status, targets: Targets) -> Iterator[Advice]:
    if not status.actions_read:
        yield Advice(
            Severity.NOTE,
            "actions",
            "this user may not read clickhouse_outbox_action: when both stores were last reconciled is not known",
            "`auditexport doctor --role reader`",
        )
        return
    last, findings = status.last_reconcile, status.open_findings
    if last is not None and not last.clean:
        what = f"the last reconciliation, {_ago(status, last.at_ms)} by {last.who}, found {last.found}"
        yield _error("reconcile", what, _REPAIR)
    elif not findings:
        yield from _reconcile_late(status, targets)
    # A later reconciliation of another window says nothing about these.
    if findings:
        first, *more = findings
        total = first.found
        for one in more:
            total += one.found
        others = f", and {counted(len(more), 'later one')}" if more else ""
        from_ms = min(one.from_ms for one in findings)
        yield _error(
            "reconcile",
            f"a reconciliation {_ago(status, first.at_ms)}{others} found {total}, and no reconciliation has covered that time again",
            f"`auditexport reconcile --from {from_ms} --repair`; then a drain, and the same again",
        )


def _reconcile_late(status: Status, targets: Targets) -> Iterator[Advice]:
    last = status.last_reconcile
    since_ms = last.at_ms if last is not None else status.first_claimed_at_ms
    if since_ms is not None and status.at_ms - since_ms > targets.reconcile_hours * 3_600_000:
        ago = _ago(status, since_ms)
        late = f"the last reconciliation was {ago}" if last else f"exporting began {ago}, and no reconciliation has run"
        yield _warning(
            "reconcile",
            f"{late} (target: every {targets.reconcile_hours:g} h)",
            "`auditexport reconcile`; then turn `reconcile_schedule` on",
        )


def _ago(status: Status, at_ms: int) -> str:
    return f"{format_duration((status.at_ms - at_ms) / 1000)} ago"


def _created_at(status: Status) -> Iterator[Advice]:
    backlog = status.backlog
    if backlog.odd_created_rows:
        yield _warning(
            "created_at",
            f"{backlog.odd_created_rows:,} of the oldest pending rows have a created_at that is no epoch milliseconds, the first with "
            f"pk {backlog.odd_created_pk}; the lag is taken from other rows, or from the last claim",
            "let the application write created_at in milliseconds since 1970, by a synchronized clock",
        )


def _lag(status: Status, targets: Targets) -> Iterator[Advice]:
    if not status.backlog.rows or status.backlog.lag_s <= targets.lag_s:
        return
    late = _late(status, targets)
    if not status.at_work:
        yield _error(
            "lag",
            f"{late}, and no drain is at work",
            "`auditexport drain`; then see in the Dagster UI whether `outbox_backlog_sensor` is on and why the last run failed",
        )
    elif not status.rows_per_s:
        what = f"{late}; {_at_work(status.at_work)} exported nothing in {format_duration(RATE_WINDOW_S)}"
        yield _error("lag", what, "`auditexport doctor`; then the log of that run")
    else:
        owners, eta = ", ".join(status.at_work), format_duration(status.eta_s or 0.0)
        yield _warning(
            "lag",
            f"{late}; {owners} {_is(status.at_work)} at work at {status.rows_per_s:,.0f} rows/s, {eta} to go if nothing more arrives",
            "`auditexport status --watch`; if it does not shrink, see batch_rows and max_rows_per_second",
        )


def _late(status: Status, targets: Targets, before: str = "") -> str:
    backlog = status.backlog
    rows = f"{backlog.shown_rows} {'row is' if backlog.rows == 1 else 'rows are'} pending{before}"
    return f"{rows}, the oldest for {format_duration(backlog.lag_s)} (target {format_duration(targets.lag_s)})"


def _is(owners: Sequence[str]) -> str:
    return "is" if len(owners) == 1 else "are"


def _at_work(owners: Sequence[str]) -> str:
    return f"{', '.join(owners)} {_is(owners)} at work and {'has' if len(owners) == 1 else 'have'}"


def _open_batches(status: Status, targets: Targets) -> Iterator[Advice]:
    late = [batch for batch in status.open_batches if batch.age_s > targets.batch_open_minutes * 60]
    for leased, of_severity, why in (
        (False, _error, "their leases have ended and no run has adopted them"),
        (True, _warning, "their leases still run"),
    ):
        found = [batch for batch in late if batch.leased is leased]
        if found:
            yield of_severity(
                "open_batches",
                f"{batches(len(found))} open for more than {targets.batch_open_minutes:g} min, {why}: "
                f"{_listed([_described(batch) for batch in found])}",
                f"`auditexport batches show {found[0].batch_id}`" if leased else "`auditexport drain`",
            )


def _described(batch: OpenBatchStatus) -> str:
    error = f", {batch.last_error}" if batch.last_error else ""
    rows, age = counted(batch.rows, "row"), format_duration(batch.age_s)
    return f"batch {batch.batch_id} ({batch.state}, {rows}, {age}, owner {batch.owner}{error})"


def _unverified(status: Status, targets: Targets) -> Iterator[Advice]:
    if status.unverified_batches and status.unverified_age_s > targets.batch_open_minutes * 60:
        yield _warning(
            "unverified",
            f"{counted(status.unverified_batches, 'exported batch is', 'exported batches are')} not verified, the oldest for "
            f"{format_duration(status.unverified_age_s)} (target {targets.batch_open_minutes:g} min)",
            "`auditexport drain`; it verifies what an interrupted run left",
        )


def _views(status: Status) -> Iterator[Advice]:
    barred = next((batch for batch in status.open_batches if batch.last_error.startswith(VIEW_BARS)), None)
    if barred is not None:
        yield _error(
            "views",
            f"batch {barred.batch_id} ({counted(barred.rows, 'row')}): {barred.last_error}",
            "fix or drop the view, then `auditexport drain`; see A view fails in runbook.md",
        )
    if status.view_failures:
        newest = newest_of_each_view(status.view_failures)
        notes = "; ".join(f"batch {batch_id}: {note}" for batch_id, note in newest.items())
        yield _warning(
            "views",
            f"a materialized view failed on {batches(len(status.view_failures))} of the last "
            f"{format_duration(VIEWS_WINDOW_S)}; the entries are stored. The newest, {notes}",
            "fix or drop the view and fill its target; see A view fails in runbook.md, and "
            f"`auditexport batches show {next(iter(newest))}`",
        )


def _cleared(status: Status) -> Iterator[Advice]:
    if status.cleared_often is not None:
        yield _warning("cleared", str(status.cleared_often), LOOK_FOR_WHO_CLEARS)


def _held(status: Status) -> Iterator[Advice]:
    if status.backlog.held_rows:
        yield _warning(
            "held",
            f"{counted(status.backlog.held_rows, 'row parses', 'rows parse')} and the ClickHouse table refuses them: "
            f"{format_counts(status.held_by_detail)}",
            "SHOW CREATE TABLE audit_logs_raw_v1; then drop or fix that column or constraint: the next drain sends them",
        )


def _dead_letters(status: Status, targets: Targets) -> Iterator[Advice]:
    dead = status.backlog.dead_rows
    if dead > targets.dead_letters:
        yield _warning(
            "dead_letters",
            f"{counted(dead, 'dead letter waits', 'dead letters wait')} for an operator: {format_counts(status.dead_by_reason)}",
            "`auditexport dead-letters list`; then fix the rows and retry, or discard",
        )


def _unknown_versions(status: Status, targets: Targets) -> Iterator[Advice]:
    backlog = status.backlog
    if backlog.unknown_rows > targets.unknown_rows:
        versions = format_counts(backlog.unknown_by_version) or ", ".join(map(printable, backlog.unknown_versions))
        yield _warning(
            "unknown_versions",
            f"{counted(backlog.unknown_rows, 'row has a version', 'rows have versions')} that this release does not know and no drain "
            f"takes: {versions}",
            "upgrade auditexport to a release that knows them, or fix the writer",
        )


def _sweep(status: Status, targets: Targets) -> Iterator[Advice]:
    days = status.oldest_unswept_age_s / 86_400
    if days > targets.retention_days + targets.sweep_late_days:
        yield _warning(
            "sweep",
            f"rows exported {days:,.1f} days ago are still in the outbox (retention is {targets.retention_days:g} days)",
            "`auditexport sweep --dry-run`; then sweep, and turn `sweep_schedule` on",
        )


# ── for alerts: what no status shows ─────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Drains:
    """What Dagster knows of this outbox's drains. `starters_off` are its sensor and schedule when neither is on."""

    starters_off: Sequence[str] = ()
    running: Sequence[str] = ()  # run ids
    queued: Sequence[str] = ()
    failed_in_a_row: int = 0
    last_failure: str = ""


def not_shrinking(status: Status, targets: Targets, drains: Drains, *, before: str) -> Advice:
    """The backlog is late and has as many rows as `before` says, or more."""
    return _error(
        "lag",
        f"{_late(status, targets, f' ({before})')}. Likely: {'; '.join(likely_reasons(status, drains))}",
        "`auditexport status`; `auditexport drain` exports from the command line, without Dagster",
        "the backlog is not shrinking",
    )


def likely_reasons(status: Status, drains: Drains) -> list[str]:
    """Why a backlog does not shrink, the likeliest first; never empty."""
    reasons = []
    if drains.failed_in_a_row:
        runs = "the last run" if drains.failed_in_a_row == 1 else f"the last {drains.failed_in_a_row} runs"
        reasons.append(f"{runs} failed" + (f" ({drains.last_failure})" if drains.last_failure else ""))
    who = f"run {_ids(drains.running)}" if drains.running else ", ".join(status.at_work)
    if who and status.rows_per_s:
        reasons.append(f"{who} exports {status.rows_per_s:,.0f} rows/s, and more arrives (is max_rows_per_second set?)")
    elif who:
        reasons.append(f"{who} is at work and has exported nothing lately")
    elif drains.queued:
        reasons.append(f"run {_ids(drains.queued)} waits in the queue: is another run holding the pool?")
    else:
        reasons.append("no run is at work")
    if drains.starters_off and not who:
        reasons.append(f"{' and '.join(drains.starters_off)} are off, so nothing starts a run")
    if waiting := status.backlog.waiting_batches:
        reasons.append(f"{counted(waiting, 'batch is', 'batches are')} stopped until the lease ends")
    if unknown := status.backlog.unknown_rows:
        versions = counted(unknown, "row has an unknown version", "rows have unknown versions")
        reasons.append(f"besides, {versions}, which no drain takes")
    return reasons


def _ids(run_ids: Sequence[str]) -> str:
    return ", ".join(run_id[:8] for run_id in run_ids)


def unreachable(error: str, *, permanent: bool) -> Advice:
    """MySQL does not answer, or refuses."""
    fix = "`auditexport doctor`" if permanent else "is MySQL up, and can this host reach it? `auditexport doctor`"
    return _error("mysql", error, fix, "the outbox cannot be read")


class Failure(msgspec.Struct, frozen=True, kw_only=True):
    """Why a run failed, in one line. `error` is the class of the error, or what happened to the worker."""

    error: str = ""
    step: str = ""
    line: str = ""
    rerun_helps: bool | None = None  # None: not an error of ours
    reported: bool = False  # by the step itself, to the heartbeat too

    @property
    def place(self) -> str:
        return f"{self.error} at {self.step}" if self.step else self.error


_AFTER = {
    "SetupIncomplete": "`auditexport doctor`: it prints the statement that fixes it",
    "InvalidConfig": "correct the setting that the line names, then launch again",
    "VerificationFailed": _REPAIR,
    "BatchAltered": "`auditexport batches list`; outbox rows are changed after they were written",
    "IncompleteRun": "launch a new run: it adopts what this one left",
}
_CONTINUES = "nothing is lost and the next run continues; "
_AFTER_OTHERS = {
    True: f"{_CONTINUES}if it fails too: `auditexport status`, then `auditexport doctor`",
    False: "read the run's log; then `auditexport doctor`",
    None: f"{_CONTINUES}read the run's log, and check the worker's host: memory, deployment, node",
}


def run_failed(about: str, failure: Failure) -> Advice:
    """A run of this job failed."""
    fix = _AFTER.get(failure.error) or _AFTER_OTHERS[failure.rerun_helps]
    return _error(about, f"{failure.place}: {failure.line}", fix, f"{about} failed")
