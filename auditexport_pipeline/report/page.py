"""The page of a report: its verdict, and `page.html` filled with figures, charts and tables, written as one file."""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from auditexport_pipeline.core.advice import Advice, Severity
from auditexport_pipeline.core.advice import verdict as headline_of
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.format import (
    batches,
    counted,
    for_outbox,
    format_duration,
    format_time,
    join_counts,
    printable,
)
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.report import charts, tables
from auditexport_pipeline.report.figures import Figures


def check_path(path: Path) -> None:
    """Raises `InvalidConfig` when no page can be written there: before an hour of comparing, not after."""
    directory = path.parent
    if path.is_dir() or not directory.is_dir() or not os.access(directory, os.W_OK):
        raise InvalidConfig(
            f"the report {path} cannot be written: {directory} must be a directory that this user may write to"
        )


def write(path: Path, html: str) -> None:
    """Writes the page whole or not at all. Raises `InvalidConfig` when the file cannot be written."""
    try:
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=path.parent, prefix=".report-", delete=False
        ) as file:
            file.write(html)
        os.chmod(file.name, 0o644)  # a temporary file can be read by its owner only
        os.replace(file.name, path)
    except OSError as error:
        raise InvalidConfig(f"the report {path} cannot be written ({error.strerror})") from error


# ── the verdict ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class _Verdict:
    """The first sentence of a report, the facts under it, and what to do. Commands stand between backticks."""

    mood: str  # good, waiting or bad
    headline: str
    facts: Sequence[str]
    todo: Sequence[str]


def of_status(figures: Figures, made_by: str) -> str:
    """The page of a status. `made_by` is the command that made it."""
    severe = any(one.severity is Severity.ERROR for one in figures.advice)
    verdict = _Verdict(
        mood="bad" if severe else "waiting" if figures.advice else "good",
        headline=f"{_capital(headline_of(figures.status, figures.advice))}.",
        facts=[_backlog(figures)],
        todo=_todo(figures.advice),
    )
    return _page("Status", figures, verdict, made_by)


def of_reconciliation(report: Report, figures: Figures, made_by: str) -> str:
    """The page of one reconciliation. `made_by` is the command, or the run, that made it."""
    sent = counted(sum(line.entries for line in report.batches), "entry", "entries")
    if report.found:
        headline = f"Outbox and ClickHouse differ: {report.found}."
    elif not report.slots:
        headline = "Nothing was exported in this window, and nothing differs."
    else:
        headline = f"Reconciled clean: outbox and ClickHouse agree on all {sent}."
    facts = [
        f"Compared: {counted(report.slots, 'block')} of {batches(len(report.batches))}, {sent} sent; "
        f"{counted(report.slots_read, 'block')} entry by entry."
    ]
    if report.explained:
        facts.append(f"Explained, and no discrepancy: {join_counts(report.explained)}.")
    if report.open_batches:
        open_batches = counted(report.open_batches, "batch is", "batches are")
        facts.append(f"{open_batches} not closed yet and not compared: the next drain finishes them.")
    if report.marked_by_others:
        rows = counted(report.marked_by_others, "row was", "rows were")
        facts.append(f"{rows} marked by another program, and ClickHouse has them.")
    others = [one for one in figures.advice if one.about not in ("reconcile", "discrepant")]
    todo = [*_repairs(report), *_todo(others)]
    verdict = _Verdict(
        mood="bad" if report.found else "waiting" if todo else "good",
        headline=headline,
        facts=[*facts, _backlog(figures)],
        todo=todo,
    )
    return _page("Reconciliation", figures, verdict, made_by, report)


def _repairs(report: Report) -> list[str]:
    found, todo = report.found, []
    if report.repaired is not None and report.repaired.action_id is not None:
        rows = counted(report.repaired.rows, "row was", "rows were")
        todo.append(f"{rows} requeued (action {report.repaired.action_id}): let a drain run, then reconcile again.")
    elif found.missing:
        todo.append("Missing: `auditexport reconcile --repair`, then a drain, then reconcile again.")
    if found.altered:
        todo.append(
            "Altered: find out who changed them; `auditexport requeue --event-id …` exports the outbox's version again."
        )
    if found.duplicated:
        todo.append("Duplicated: merges collapse the copies, and the view `audit_logs` shows each event once already.")
    if found.unexpected:
        todo.append("Unexpected: find out who else writes to the table; if they may, reconcile with `--others-write`.")
    return todo


def _backlog(figures: Figures) -> str:
    backlog = figures.status.backlog
    if not backlog.rows:
        return "Backlog: nothing is pending."
    pending = f"{backlog.shown_rows} {'row is' if backlog.rows == 1 else 'rows are'} pending"
    return f"Backlog: {pending}, the oldest for {format_duration(backlog.lag_s)}."


def _todo(advice: Sequence[Advice]) -> list[str]:
    return [f"{_capital(one.what)}: {one.fix}." for one in advice]


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


# ── the page ─────────────────────────────────────────────────────────────────────────────────────


def _page(title: str, figures: Figures, verdict: _Verdict, made_by: str, report: Report | None = None) -> str:
    # matplotlib and pandas make these and escape names; the template escapes everything else.
    drawn = {
        "hours_chart": charts.hours(figures.hours, figures.grid.step_ms),
        "hours_table": tables.wrong_hours(figures),
        "lag_chart": charts.lag(figures.lag, figures.status.backlog.lag_s),
        "batches_chart": charts.batches(figures.batches) if len(figures.batches) else "",
        "stages_table": tables.stages(figures.batches),
        "batches_table": tables.batches(figures.batches),
        "letters_chart": charts.letters(figures.letters),
        "letters_table": tables.letters(figures.letters),
        "discrepant_table": tables.discrepant(figures.status.discrepant),
        "places_table": tables.places(report) if report else "",
        "differing_table": tables.wrong_batches(report) if report else "",
    }
    pages = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    pages.filters |= {
        "counted": counted,
        "counts": join_counts,
        "time": format_time,
        "duration": format_duration,
        "printable": printable,
        "sentence": partial(_sentence, outbox=figures.outbox),
    }
    return pages.get_template("page.html").render(
        title=title,
        figures=figures,
        backlog=figures.status.backlog,
        verdict=verdict,
        report=report,
        made_by=made_by,
        tool=f"auditexport {version('auditexport-pipeline')}",
        palette=charts.PALETTE,
        batches_drawn=min(len(figures.batches), charts.BATCHES_DRAWN),
        logarithmic=charts.lag_is_logarithmic(figures.lag, figures.status.backlog.lag_s),
        **{name: Markup(html) for name, html in drawn.items()},
    )


def _sentence(text: str, outbox: str) -> Markup:
    """A sentence, escaped, with its `commands` set as such and named for this outbox."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(for_outbox(text, outbox)))))
