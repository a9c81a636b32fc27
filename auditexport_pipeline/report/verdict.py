"""The verdict: whether both databases agree, how far behind the export is, and what to do, in words with numbers.

What belongs here: sentences. What does not: HTML, and deciding what is a discrepancy (`core.reconcile`).
"""

from __future__ import annotations

from auditexport_pipeline.core.advice import Severity
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.report.figures import Figures, Verdict
from auditexport_pipeline.report.words import some, span


def of_reconciliation(report: Report, figures: Figures) -> Verdict:
    """What a reconciliation found, in a sentence, and what to do about it."""
    compared = f"{some(report.slots, 'block')} of {some(len(report.batches), 'batch', 'batches')}"
    entries = sum(line.entries for line in report.batches)
    if report.found:
        headline = f"Outbox and ClickHouse differ: {report.found}."
    elif not report.slots:
        headline = "Nothing was exported in this window, and nothing differs."
    else:
        headline = f"Reconciled clean: outbox and ClickHouse agree on all {some(entries, 'entry', 'entries')}."
    facts = [
        f"Compared: {compared}, {some(entries, 'entry', 'entries')} sent; {report.slots_read:,} blocks entry by entry."
    ]
    if report.explained:
        told = ", ".join(f"{number:,} {what}" for what, number in report.explained.items())
        facts.append(f"Explained, and no discrepancy: {told}.")
    if report.open_batches:
        facts.append(
            f"{some(report.open_batches, 'batch is', 'batches are')} not closed yet and not compared: the next drain sees to them."
        )
    if report.marked_by_others:
        facts.append(
            f"{some(report.marked_by_others, 'row was', 'rows were')} marked by somebody else, and ClickHouse has them."
        )
    facts.extend(behind(figures))
    todo = []
    if report.repaired is not None and report.repaired.action_id is not None:
        todo.append(
            f"{some(report.repaired.rows, 'row was', 'rows were')} requeued (action {report.repaired.action_id}): "
            "let a drain run, then reconcile again."
        )
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
    todo.extend(advice(figures, compared=True))
    return Verdict(
        mood="bad" if report.found else "waiting" if todo else "good", headline=headline, facts=facts, todo=todo
    )


def behind(figures: Figures) -> list[str]:
    """How far behind the export is, now."""
    backlog = figures.backlog
    if not backlog.rows:
        return ["Behind: nothing is pending."]
    pending = f"{backlog.shown_rows} {'row is' if backlog.rows == 1 else 'rows are'} pending"
    return [f"Behind: {pending}, the oldest for {span(max(0.0, backlog.lag_s))}."]


def of_status(figures: Figures) -> Verdict:
    """What `auditexport status` says, for the page."""
    severe = any(one.severity is Severity.ERROR for one in figures.advice)
    said = figures.said[:1].upper() + figures.said[1:]
    return Verdict(
        mood="bad" if severe else "waiting" if figures.advice else "good",
        headline=f"{said}.",
        facts=behind(figures),
        todo=advice(figures),
    )


def advice(figures: Figures, *, compared: bool = False) -> list[str]:
    """What the numbers of now ask for; of the comparison itself the page says more where it was made."""
    return [
        f"{one.what[:1].upper()}{one.what[1:]}: {_commands(one.todo)}."
        for one in figures.advice
        if not (compared and one.about in ("reconcile", "discrepant"))
    ]


def _commands(todo: str) -> str:
    """With each `auditexport …` set as a command: the part of a to-do up to a semicolon."""
    return "; ".join(f"`{part}`" if part.startswith("auditexport ") else part for part in todo.split("; "))
