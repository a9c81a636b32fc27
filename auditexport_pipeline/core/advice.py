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
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import (
    RATE_WINDOW_S,
    VIEWS_WINDOW_S,
    OpenBatchStatus,
    Status,
    format_counts,
    format_duration,
    format_name,
    newest_of_each_view,
)

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


@dataclass(frozen=True, slots=True)
class Command:
    """A command of the CLI, without the program's name and without `--outbox`."""

    arguments: str

    def format(self, outbox: str) -> str:
        """The command as it is typed for this outbox."""
        return f"auditexport --outbox {outbox} {self.arguments}" if outbox else f"auditexport {self.arguments}"


@dataclass(frozen=True, slots=True)
class Definition:
    """A sensor or a schedule in Dagster, by its name without the outbox."""

    name: str

    def format(self, outbox: str) -> str:
        """Its name in this outbox's definitions."""
        return f"{outbox}_{self.name}" if outbox else self.name


# What to do: text between commands and names, in the order in which it is read.
Steps = tuple[str | Command | Definition, ...]

DRAIN, DOCTOR, STATUS = Command("drain"), Command("doctor"), Command("status")
REPAIR: Steps = (Command("reconcile --repair"), "; then a drain, and reconcile again")


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing that is wrong. `about` is its stable name, `what` has the numbers, `steps` fix it."""

    severity: Severity
    about: str
    what: str
    steps: Steps
    outbox: str = ""
    headline: str = ""  # of its alert, where `about` does not say it

    @property
    def todo(self) -> str:
        """What to do, in one line, with the commands and names of this outbox."""
        return "".join(step if isinstance(step, str) else step.format(self.outbox) for step in self.steps)

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
    return [replace(one, outbox=outbox) for one in found]


def needs_operator(found: Sequence[Advice]) -> bool:
    """Whether any of it is for a person to act on."""
    return any(one.severity is not Severity.NOTE for one in found)


def verdict(status: Status, found: Sequence[Advice]) -> str:
    """The headline: whether an operator is needed, in one line."""
    if needs_operator(found):
        counts = {each: sum(one.severity is each for one in found) for each in (Severity.ERROR, Severity.WARNING)}
        return "needs an operator: " + ", ".join(counted(count, str(each)) for each, count in counts.items() if count)
    if status.at_work:
        return f"healthy, draining: {status.backlog.shown_rows} rows pending"
    return f"healthy: {status.backlog.shown_rows} rows pending, lag {format_duration(status.backlog.lag_s)}"


def counted(count: int, one: str, many: str = "") -> str:
    """`1 batch`, `2 batches`."""
    return f"{count:,} {one if count == 1 else many or one + 's'}"


def _listed(batches: Sequence[str]) -> str:
    more = len(batches) - NAMED_BATCHES
    return "; ".join(batches[:NAMED_BATCHES]) + (f"; and {more:,} more" if more > 0 else "")


def _discrepant(status: Status) -> Iterator[Advice]:
    if not status.discrepant:
        return
    batches = [
        f"batch {batch_id} ({why})" if why else f"batch {batch_id}" for batch_id, why in status.discrepant.items()
    ]
    yield Advice(
        severity=Severity.ERROR,
        about="discrepant",
        what=f"{counted(len(batches), 'batch is', 'batches are')} discrepant: ClickHouse does not hold what was verified or "
        f"acknowledged: {_listed(batches)}",
        steps=REPAIR,
    )


def _reconcile(status: Status, targets: Targets) -> Iterator[Advice]:
    if not status.actions_read:
        yield Advice(
            severity=Severity.NOTE,
            about="actions",
            what="this user may not read clickhouse_outbox_action: when both stores were last reconciled is not known",
            steps=(Command("doctor --role reader"),),
        )
        return
    last, findings = status.last_reconcile, status.open_findings
    if last is not None and not last.clean:
        yield Advice(
            severity=Severity.ERROR,
            about="reconcile",
            what=f"the last reconciliation, {_ago(status, last.at_ms)} by {last.who}, found {last.found}",
            steps=REPAIR,
        )
    elif not findings:
        yield from _reconcile_late(status, targets)
    # A later reconciliation of another window says nothing about these.
    if findings:
        first, *more = findings
        total = first.found
        for one in more:
            total += one.found
        others = f", and {len(more):,} later ones" if more else ""
        yield Advice(
            severity=Severity.ERROR,
            about="reconcile",
            what=f"a reconciliation {_ago(status, first.at_ms)}{others} found {total}, and none has looked there again since",
            steps=(
                Command(f"reconcile --from {min(one.from_ms for one in findings)} --repair"),
                "; then a drain, and the same again",
            ),
        )


def _reconcile_late(status: Status, targets: Targets) -> Iterator[Advice]:
    last = status.last_reconcile
    since_ms = last.at_ms if last is not None else status.first_claimed_at_ms
    if since_ms is not None and status.at_ms - since_ms > targets.reconcile_hours * 3_600_000:
        ago = _ago(status, since_ms)
        late = f"the last reconciliation was {ago}" if last else f"exporting began {ago} and nobody has reconciled"
        yield Advice(
            severity=Severity.WARNING,
            about="reconcile",
            what=f"{late} (target: every {targets.reconcile_hours:g} h)",
            steps=(Command("reconcile"), "; then turn ", Definition("reconcile_schedule"), " on"),
        )


def _ago(status: Status, at_ms: int) -> str:
    return f"{format_duration((status.at_ms - at_ms) / 1000)} ago"


def _created_at(status: Status) -> Iterator[Advice]:
    backlog = status.backlog
    if backlog.odd_created_rows:
        yield Advice(
            severity=Severity.WARNING,
            about="created_at",
            what=f"{backlog.odd_created_rows:,} of the oldest pending rows have a created_at that is no epoch milliseconds, the "
            f"first with pk {backlog.odd_created_pk}; the lag is taken from other rows, or from the last claim",
            steps=("let the application write created_at in milliseconds since 1970, by a synchronized clock",),
        )


def _lag(status: Status, targets: Targets) -> Iterator[Advice]:
    backlog = status.backlog
    if not backlog.rows or backlog.lag_s <= targets.lag_s:
        return
    late = f"{backlog.shown_rows} rows are pending, the oldest for {format_duration(backlog.lag_s)} (target {format_duration(targets.lag_s)})"
    owners = ", ".join(status.at_work)
    if not owners:
        severity, what = Severity.ERROR, f"{late}, and no drain is at work"
        steps: Steps = (
            DRAIN,
            "; then see in the Dagster UI whether ",
            Definition("outbox_backlog_sensor"),
            " is on and why the last run failed",
        )
    elif not status.rows_per_s:
        severity = Severity.ERROR
        what = f"{late}; {owners} is at work and has exported nothing in {format_duration(RATE_WINDOW_S)}"
        steps = (DOCTOR, "; then the log of that run")
    else:
        severity = Severity.WARNING
        what = (
            f"{late}; {owners} is at work at {status.rows_per_s:,.0f} rows/s, {format_duration(status.eta_s or 0.0)} to go if nothing "
            "more arrives"
        )
        steps = (Command("status --watch"), "; if it does not shrink, see batch_rows and max_rows_per_second")
    yield Advice(severity=severity, about="lag", what=what, steps=steps)


def _open_batches(status: Status, targets: Targets) -> Iterator[Advice]:
    late = [batch for batch in status.open_batches if batch.age_s > targets.batch_open_minutes * 60]
    for leased, severity, why in (
        (False, Severity.ERROR, "their leases have ended and no run has adopted them"),
        (True, Severity.WARNING, "their leases still run"),
    ):
        batches = [batch for batch in late if batch.leased is leased]
        if batches:
            yield Advice(
                severity=severity,
                about="open_batches",
                what=f"{counted(len(batches), 'batch', 'batches')} open for more than {targets.batch_open_minutes:g} min, {why}: "
                f"{_listed([_described(batch) for batch in batches])}",
                steps=(Command(f"batches show {batches[0].batch_id}") if leased else DRAIN,),
            )


def _described(batch: OpenBatchStatus) -> str:
    error = f", {batch.last_error}" if batch.last_error else ""
    return f"batch {batch.batch_id} ({batch.state}, {batch.rows:,} rows, {format_duration(batch.age_s)}, owner {batch.owner}{error})"


def _unverified(status: Status, targets: Targets) -> Iterator[Advice]:
    if status.unverified_batches and status.unverified_age_s > targets.batch_open_minutes * 60:
        yield Advice(
            severity=Severity.WARNING,
            about="unverified",
            what=f"{counted(status.unverified_batches, 'exported batch is', 'exported batches are')} not verified, the oldest for "
            f"{format_duration(status.unverified_age_s)} (target {targets.batch_open_minutes:g} min)",
            steps=(DRAIN, "; it verifies what an interrupted run left"),
        )


def _views(status: Status) -> Iterator[Advice]:
    barred = next((batch for batch in status.open_batches if batch.last_error.startswith(VIEW_BARS)), None)
    if barred is not None:
        yield Advice(
            severity=Severity.ERROR,
            about="views",
            what=f"batch {barred.batch_id} ({barred.rows:,} rows): {barred.last_error}",
            steps=("fix or drop the view, then ", DRAIN, "; see A view fails in runbook.md"),
        )
    if status.view_failures:
        newest = newest_of_each_view(status.view_failures)
        yield Advice(
            severity=Severity.WARNING,
            about="views",
            what=f"a materialized view failed on {counted(len(status.view_failures), 'batch', 'batches')} of the last "
            f"{format_duration(VIEWS_WINDOW_S)}; the entries are stored. The newest, "
            + "; ".join(f"batch {batch_id}: {note}" for batch_id, note in newest.items()),
            steps=(
                "fix or drop the view and fill its target; see A view fails in runbook.md, and ",
                Command(f"batches show {next(iter(newest))}"),
            ),
        )


def _cleared(status: Status) -> Iterator[Advice]:
    if status.cleared_often is not None:
        yield Advice(
            severity=Severity.WARNING, about="cleared", what=str(status.cleared_often), steps=(LOOK_FOR_WHO_CLEARS,)
        )


def _held(status: Status) -> Iterator[Advice]:
    if status.backlog.held_rows:
        yield Advice(
            severity=Severity.WARNING,
            about="held",
            what=f"{counted(status.backlog.held_rows, 'row parses', 'rows parse')} and the ClickHouse table refuses them: "
            f"{format_counts(status.held_by_detail)}",
            steps=(
                "SHOW CREATE TABLE audit_logs_raw_v1; then drop or fix that column or constraint: the next drain sends them",
            ),
        )


def _dead_letters(status: Status, targets: Targets) -> Iterator[Advice]:
    dead = status.backlog.dead_rows
    if dead > targets.dead_letters:
        yield Advice(
            severity=Severity.WARNING,
            about="dead_letters",
            what=f"{counted(dead, 'dead letter waits', 'dead letters wait')} for an operator: {format_counts(status.dead_by_reason)}",
            steps=(Command("dead-letters list"), "; then fix the rows and retry, or discard"),
        )


def _unknown_versions(status: Status, targets: Targets) -> Iterator[Advice]:
    backlog = status.backlog
    if backlog.unknown_rows > targets.unknown_rows:
        versions = format_counts(backlog.unknown_by_version) or ", ".join(map(format_name, backlog.unknown_versions))
        yield Advice(
            severity=Severity.WARNING,
            about="unknown_versions",
            what=f"{counted(backlog.unknown_rows, 'row has a version', 'rows have versions')} that this release does not know and no "
            f"drain takes: {versions}",
            steps=("upgrade auditexport to a release that knows them, or fix the writer",),
        )


def _sweep(status: Status, targets: Targets) -> Iterator[Advice]:
    days = status.oldest_unswept_age_s / 86_400
    if days > targets.retention_days + targets.sweep_late_days:
        yield Advice(
            severity=Severity.WARNING,
            about="sweep",
            what=f"rows exported {days:,.1f} days ago are still in the outbox (retention is {targets.retention_days:g} days)",
            steps=(Command("sweep --dry-run"), "; then sweep, and turn ", Definition("sweep_schedule"), " on"),
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
    backlog = status.backlog
    return Advice(
        severity=Severity.ERROR,
        about="lag",
        headline="the backlog is not shrinking",
        what=f"{backlog.shown_rows} rows are pending ({before}), the oldest for {format_duration(backlog.lag_s)} (target "
        f"{format_duration(targets.lag_s)}). Likely: {'; '.join(likely_reasons(status, drains))}",
        steps=(STATUS, "; ", DRAIN, " exports from the command line, without Dagster"),
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
    if status.backlog.waiting_batches:
        reasons.append(
            f"{counted(status.backlog.waiting_batches, 'batch is', 'batches are')} stopped until the lease ends"
        )
    if status.backlog.unknown_rows:
        reasons.append(
            f"besides, {counted(status.backlog.unknown_rows, 'row has an unknown version', 'rows have unknown versions')}, which "
            "no drain takes"
        )
    return reasons


def _ids(run_ids: Sequence[str]) -> str:
    return ", ".join(run_id[:8] for run_id in run_ids)


def unreachable(error: str, *, permanent: bool) -> Advice:
    """MySQL does not answer, or refuses."""
    return Advice(
        severity=Severity.ERROR,
        about="mysql",
        headline="the outbox cannot be read",
        what=error,
        steps=(DOCTOR,) if permanent else ("is MySQL up, and can this host reach it? ", DOCTOR),
    )


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


_AFTER: dict[str, Steps] = {
    "SetupIncomplete": (DOCTOR, ": it prints the statement that fixes it"),
    "InvalidConfig": ("correct the setting that the line names, then launch again",),
    "VerificationFailed": REPAIR,
    "BatchAltered": (Command("batches list"), "; somebody changes outbox rows after they were written"),
    "IncompleteRun": ("launch a new run: it adopts what this one left",),
}
_CONTINUES = "nothing is lost and the next run continues; "
_AFTER_OTHERS: dict[bool | None, Steps] = {
    True: (f"{_CONTINUES}if it fails too: ", STATUS, ", then ", DOCTOR),
    False: ("read the run's log; then ", DOCTOR),
    None: (f"{_CONTINUES}read the run's log, and check the worker's host: memory, deployment, node",),
}


def run_failed(about: str, failure: Failure) -> Advice:
    """A run of this job failed."""
    return Advice(
        severity=Severity.ERROR,
        about=about,
        headline=f"{about} failed",
        what=f"{failure.place}: {failure.line}",
        steps=_AFTER.get(failure.error) or _AFTER_OTHERS[failure.rerun_helps],
    )
