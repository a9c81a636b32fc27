"""The verdict of a report: whether both databases agree, how far behind the export is, and what to do."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from auditexport_pipeline.core.advice import Severity, verdict
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.report.figures import Figures
from auditexport_pipeline.report.format import counted, format_seconds, join_counts


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The first sentence of a report, the facts under it, and what to do; `commands` stand between backticks."""

    mood: str  # good, waiting or bad
    headline: str
    facts: Sequence[str]
    todo: Sequence[str]


def of_status(figures: Figures) -> Verdict:
    """What `auditexport status` says."""
    severe = any(one.severity is Severity.ERROR for one in figures.advice)
    return Verdict(
        mood="bad" if severe else "waiting" if figures.advice else "good",
        headline=f"{_capital(verdict(figures.status, figures.advice))}.",
        facts=[_backlog(figures)],
        todo=_advice(figures),
    )


def of_reconciliation(report: Report, figures: Figures) -> Verdict:
    """What a reconciliation found."""
    entries = sum(line.entries for line in report.batches)
    sent = counted(entries, "entry", "entries")
    if report.found:
        headline = f"Outbox and ClickHouse differ: {report.found}."
    elif not report.slots:
        headline = "Nothing was exported in this window, and nothing differs."
    else:
        headline = f"Reconciled clean: outbox and ClickHouse agree on all {sent}."
    facts = [
        f"Compared: {counted(report.slots, 'block')} of {counted(len(report.batches), 'batch', 'batches')}, {sent} sent; "
        f"{report.slots_read:,} blocks entry by entry."
    ]
    if report.explained:
        facts.append(f"Explained, and no discrepancy: {join_counts(report.explained)}.")
    if report.open_batches:
        batches = counted(report.open_batches, "batch is", "batches are")
        facts.append(f"{batches} not closed yet and not compared: the next drain finishes them.")
    if report.marked_by_others:
        rows = counted(report.marked_by_others, "row was", "rows were")
        facts.append(f"{rows} marked by another program, and ClickHouse has them.")
    todo = [*_to_do(report), *_advice(figures, but=("reconcile", "discrepant"))]
    return Verdict(
        mood="bad" if report.found else "waiting" if todo else "good",
        headline=headline,
        facts=[*facts, _backlog(figures)],
        todo=todo,
    )


def _to_do(report: Report) -> list[str]:
    todo = []
    if report.repaired is not None and report.repaired.action_id is not None:
        rows = counted(report.repaired.rows, "row was", "rows were")
        todo.append(f"{rows} requeued (action {report.repaired.action_id}): let a drain run, then reconcile again.")
    elif report.found.missing:
        todo.append("Missing: `auditexport reconcile --repair`, then a drain, then reconcile again.")
    if report.found.altered:
        todo.append(
            "Altered: find out who changed them; `auditexport requeue --event-id …` exports the outbox's version again."
        )
    if report.found.duplicated:
        todo.append("Duplicated: merges collapse the copies, and the view `audit_logs` shows each event once already.")
    if report.found.unexpected:
        todo.append(
            "Unexpected: find out who else writes to the table; with a reason, reconcile with `--others-write`."
        )
    return todo


def _backlog(figures: Figures) -> str:
    backlog = figures.status.backlog
    if not backlog.rows:
        return "Behind: nothing is pending."
    pending = f"{backlog.shown_rows} {'row is' if backlog.rows == 1 else 'rows are'} pending"
    return f"Behind: {pending}, the oldest for {format_seconds(figures.lag_s)}."


def _advice(figures: Figures, but: Sequence[str] = ()) -> list[str]:
    """What the numbers of now ask for; the parts of a to-do that are commands are set as such."""
    todo = []
    for one in figures.advice:
        if one.about not in but:
            parts = [f"`{part}`" if part.startswith("auditexport ") else part for part in one.todo.split("; ")]
            todo.append(f"{_capital(one.what)}: {'; '.join(parts)}.")
    return todo


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
