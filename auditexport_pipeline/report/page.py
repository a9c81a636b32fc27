"""The page of a report: `page.html`, filled with figures, charts and tables, and written as one file that needs nothing else."""

from __future__ import annotations

import os
import re
import tempfile
from importlib.metadata import version
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.report import charts, format, tables, verdict
from auditexport_pipeline.report.figures import Figures
from auditexport_pipeline.report.verdict import Verdict


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
        os.chmod(file.name, 0o644)  # as any other page; a temporary file is its owner's alone
        os.replace(file.name, path)
    except OSError as error:
        raise InvalidConfig(f"the report {path} cannot be written ({error.strerror})") from error


def of_reconciliation(report: Report, figures: Figures, made_by: str) -> str:
    """The page of one reconciliation. `made_by` is the command, or the run, that made it."""
    return _page("Reconciliation", figures, verdict.of_reconciliation(report, figures), made_by, report)


def of_status(figures: Figures, made_by: str) -> str:
    """The page of a status: the same figures, without a comparison entry by entry."""
    return _page("Status", figures, verdict.of_status(figures), made_by)


def _page(title: str, figures: Figures, said: Verdict, made_by: str, report: Report | None = None) -> str:
    # Made of numbers by matplotlib and pandas, which escape names: everything else is escaped by the template.
    drawn = {
        "hours_chart": charts.hours(figures.hours, figures.grid.step_ms),
        "hours_table": tables.wrong_hours(figures),
        "lag_chart": charts.lag(figures.lag, figures.lag_s),
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
        "counted": format.counted,
        "counts": format.join_counts,
        "time": format.format_time,
        "duration": format.format_seconds,
        "printable": format.printable,
        "sentence": _sentence,
    }
    return pages.get_template("page.html").render(
        title=title,
        figures=figures,
        backlog=figures.status.backlog,
        verdict=said,
        report=report,
        made_by=made_by,
        tool=f"auditexport {version('auditexport-pipeline')}",
        palette=charts.PALETTE,
        batches_drawn=min(len(figures.batches), charts.BATCHES_DRAWN),
        logarithmic=charts.lag_is_logarithmic(figures.lag, figures.lag_s),
        **{name: Markup(html) for name, html in drawn.items()},
    )


def _sentence(text: str) -> Markup:
    """A sentence of ours, escaped, with its `commands` set as such."""
    return Markup(re.sub(r"`([^`]+)`", r"<code>\1</code>", str(escape(text))))
