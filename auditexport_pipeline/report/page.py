"""The page: its sections in order, from the verdict to how it was made, as one HTML file that needs nothing else.

What belongs here: sections, sentences under pictures, and writing the file. What does not: numbers (`gather`), pictures
(`charts`) and tables (`tables`). Whatever does not come from this program is escaped, here or by pandas.
"""

from __future__ import annotations

import os
import re
import tempfile
from html import escape
from importlib.metadata import version
from pathlib import Path

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.report import charts, tables, verdict
from auditexport_pipeline.report.figures import Figures, Verdict
from auditexport_pipeline.report.look import STYLE
from auditexport_pipeline.report.words import count, moment, some, span

# A page refuses, by its own policy, whatever it might be made to load or run.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; form-action 'none'"


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
    return _page(
        "Reconciliation", figures, verdict.of_reconciliation(report, figures), made_by, _differences(report, figures)
    )


def of_status(figures: Figures, made_by: str) -> str:
    """The page of a status: the same figures, without a comparison entry by entry."""
    said = verdict.of_status(figures)
    differing = tables.discrepant(figures.discrepant)
    section = (
        f"<p>Batches that the last comparison called discrepant:</p>{differing}"
        if differing
        else '<p class="said">No batch of the ledger is discrepant. <code>auditexport reconcile --report FILE</code> compares now.</p>'
    )
    return _page("Status", figures, said, made_by, section)


def _page(title: str, figures: Figures, said: Verdict, made_by: str, differences: str) -> str:
    sections = [
        _said(said),
        _tiles(figures, said),
        _section("Events per hour, outbox against ClickHouse", _hours(figures)),
        _section("Discrepancies", differences),
        _section("Lag", _lag(figures)),
        _section("Batches", _batches(figures)),
        _section("Dead letters and unknown versions", _letters(figures)),
    ]
    servers = figures.servers
    about = {
        "Made": f"{moment(figures.at_ms)} UTC, by MySQL's clock",
        "Window": f"first exports from {moment(figures.from_ms)} to {moment(figures.to_ms)} UTC",
        "Outbox": f"{servers.mysql}, database {servers.mysql_database}",
        "Audit log": f"{servers.clickhouse}, database {servers.clickhouse_database}",
        "Tool": f"auditexport {version('auditexport-pipeline')}",
    }
    listed = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in about.items())
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>auditexport: {escape(title.lower())}, {moment(figures.at_ms, '%Y-%m-%d %H:%M')} UTC</title>\n"
        f"<style>{STYLE}</style>\n</head>\n<body>\n"
        f"<header><h1>auditexport · {escape(title)}</h1><dl>{listed}</dl></header>\n"
        f"<main>\n{''.join(sections)}</main>\n"
        f"<footer>Made by <code>{escape(made_by)}</code>. Ids and counts only, no payload; read with plain SELECTs, nothing "
        "locked. Times are UTC. The page loads nothing and runs nothing.</footer>\n</body>\n</html>\n"
    )


def _section(title: str, body: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{body}\n</section>\n"


def _said(said: Verdict) -> str:
    facts = "".join(f"<p>{_sentence(fact)}</p>" for fact in said.facts)
    todo = "".join(f"<li>{_sentence(step)}</li>" for step in said.todo)
    return (
        f'<div class="verdict {escape(said.mood)}"><strong>{escape(said.headline)}</strong>{facts}'
        + (f"<p><b>To do</b></p><ul>{todo}</ul>" if todo else "<p>Nothing to do.</p>")
        + "</div>\n"
    )


def _sentence(text: str) -> str:
    """A sentence of ours, escaped, with its `commands` set as such."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", escape(text))


def _tiles(figures: Figures, said: Verdict) -> str:
    backlog = figures.backlog
    differing = sum(abs(hour.difference) for hour in figures.everywhen)
    tiles = [
        (count(figures.rows), "exported rows counted in the outbox", False),
        (count(figures.entries), "their entries in ClickHouse", False),
        (count(differing), "difference, hour by hour", differing > 0 and said.mood != "good"),
        (backlog.shown_rows, "rows pending", False),
        (span(max(0.0, backlog.lag_s)), "lag now", False),
        (count(backlog.dead_rows), "dead letters open", backlog.dead_rows > 0),
        (count(backlog.unknown_rows), "rows of unknown versions", backlog.unknown_rows > 0),
        (count(backlog.open_batches), "batches open", False),
    ]
    return (
        '<div class="tiles">'
        + "".join(
            f'<div class="tile{" bad" if bad else ""}"><b>{escape(number)}</b><span>{escape(what)}</span></div>'
            for number, what, bad in tiles
        )
        + "</div>\n"
    )


def _hours(figures: Figures) -> str:
    compared = figures.compared
    said = [
        "Both sides counted now: rows of the outbox that the window's batches sent, by primary key from the ledger, and "
        "their entries in ClickHouse, where copies of an event count once, as in the view <code>audit_logs</code>."
    ]
    if compared.cut_short:
        said.append(
            f"The window holds more than a page counts: this is everything first exported since {moment(compared.from_ms)}."
        )
    if compared.swept_entries:
        said.append(
            f"{some(compared.swept_entries, 'entry', 'entries')} of swept batches are left out: their rows are gone from the outbox."
        )
    if compared.open_batches:
        said.append(f"{some(compared.open_batches, 'open batch is', 'open batches are')} left out on both sides.")
    if figures.pending_cut_short:
        said.append(f"Of the pending rows the oldest {figures.pending:,} are counted by hour.")
    for end, when in ((figures.before, "before the hours shown"), (figures.after, "after them")):
        if end.rows or end.entries or end.pending:
            said.append(
                f"Event times {when}: {some(end.rows, 'exported row')}, {some(end.entries, 'entry', 'entries')}, "
                f"{some(end.pending, 'pending row')}."
            )
    picture = _picture(charts.hours(figures.hours, figures.grid.step_ms), " ".join(said))
    if not picture:
        return f'<p class="said">{" ".join(said)}</p><p>No event of this window has its time in these hours.</p>'
    differing = tables.wrong_hours(figures)
    return picture + (
        f"<h3>Hours that differ</h3>{differing}"
        '<p class="said">A positive number is rows without an entry, as a loss or an erasure leaves them, or the same event in '
        "two batches; a negative one is entries without a row. Which of it is wrong, the discrepancies below say.</p>"
        if differing
        else ""
    )


def _differences(report: Report, figures: Figures) -> str:
    parts = []
    if report.clean:
        parts.append("<p>None: nothing is missing, duplicated, unexpected or altered.</p>")
    if report.explained:
        told = ", ".join(f"{number:,} {escape(what)}" for what, number in report.explained.items())
        parts.append(f"<p>Explained: {told}.</p>")
    if report.found.event_ids:
        ids = ", ".join(f"<code>{escape(tables.seen(event_id))}</code>" for event_id in report.found.event_ids)
        parts.append(f"<p>Events, the first ten: {ids}</p>")
    for title, body in (
        ("By workspace and day of the first export", tables.places(report)),
        ("By batch", tables.wrong_batches(report)),
    ):
        if body:
            parts.append(f"<h3>{title}</h3>{body}")
    return "".join(parts)


def _lag(figures: Figures) -> str:
    undated = sum(point.undated for point in figures.lag)
    batches = sum(point.batches for point in figures.lag)
    worst = max((point.worst_s for point in figures.lag if point.worst_s is not None), default=None)
    said = (
        f"{some(batches, 'first export')} in the window. The lag of a batch is the time from its first row's "
        "<code>created_at</code> (of a swept batch: its oldest event) to the stamp of its export, by the ledger."
    )
    if worst is not None:
        said += f" The worst was {span(worst)}; now it is {span(max(0.0, figures.backlog.lag_s))}."
        if charts.lag_is_apart(figures.lag, figures.backlog.lag_s):
            said += " The scale is logarithmic from a second on."
    if undated:
        said += f" Of {some(undated, 'batch', 'batches')} that time is years off and is left out."
    return _picture(charts.lag(figures.lag, max(0.0, figures.backlog.lag_s)), said) or f'<p class="said">{said}</p>'


def _batches(figures: Figures) -> str:
    if not figures.batches:
        return "<p>No batch in this window.</p>"
    said = (
        f"The newest {min(len(figures.batches), charts.BATCHES_DRAWN):,} batches of the window. Stamps are the database's: a "
        "batch is sealed when its rows are read and fixed, written when ClickHouse has acknowledged every block (its rows get "
        "that moment as <code>deleted_at</code>), verified when they are marked and counted back."
    )
    return (
        _picture(charts.batches(figures.batches), said)
        + f"<h3>Seconds per stage, of the newest {some(len(figures.batches), 'batch', 'batches')}</h3>{tables.stages(figures.batches)}"
        + f"<h3>The newest batches</h3>{tables.batches(figures.batches)}"
    )


def _letters(figures: Figures) -> str:
    parts = [
        _picture(
            charts.letters(figures.letters),
            "Rows that could not be exported, with the reason that was recorded; payloads are never shown.",
        )
    ]
    parts.append(tables.letters(figures.letters) or "<p>No row was ever set aside.</p>")
    backlog = figures.backlog
    if backlog.unknown_rows:
        names = ", ".join(f"<code>{escape(tables.seen(name))}</code>" for name in backlog.unknown_versions)
        parts.append(f"<p>Unknown versions: {some(backlog.unknown_rows, 'row')} of {names}, left as they are.</p>")
    else:
        parts.append("<p>No pending row has an unknown version.</p>")
    return "".join(parts)


def _picture(svg: str, said: str) -> str:
    return f"<figure>{svg}<figcaption>{said}</figcaption></figure>" if svg else ""
