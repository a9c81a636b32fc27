"""The screen of `auditexport status`: how an export stands, and what to do about it, for people.

What belongs here: laying numbers out for a width and a height. What does not: looking, refreshing and JSON (`cli.status`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from auditexport_pipeline.cli.group import BAD_CALL, BAD_OUTCOME
from auditexport_pipeline.cli.shared import console, moment, table
from auditexport_pipeline.core.advice import Advice, Severity, needs_operator, verdict
from auditexport_pipeline.core.status import RATE_WINDOW_S, Status, format_counts, format_duration

if TYPE_CHECKING:
    from rich.console import RenderableType

# Lines of each table where the screen's height does not say (a file, a pager).
LISTED = 20
# What a table takes beside its rows: a blank line, and its header.
TABLE_LINES = 2
# And the prompt that follows.
PROMPT_LINES = 1

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


def layout(now: Status, found: list[Advice], *, width: int, height: int | None) -> RenderableType:
    """One screen: the verdict, what to do, the numbers; then as many open batches and runs as there is room for."""
    from rich.console import Group

    top = Group(_headline(now, found), *_todo(found), _numbers(now))
    batches, runs = len(now.open_batches), len(now.runs)
    if height is None:
        room_batches, room_runs = LISTED, LISTED
    else:
        measured = console()
        measured.width = width
        left = height - PROMPT_LINES - len(measured.render_lines(top, measured.options.update(width=width)))
        # The open batches first, because they are what somebody may have to act on; each table says how many it left out.
        room_batches = min(batches, max(0, left - TABLE_LINES - (TABLE_LINES + min(runs, 2) if runs else 0)))
        left -= room_batches + TABLE_LINES if room_batches else 0
        room_runs = min(runs, max(0, left - TABLE_LINES))
    return Group(
        top,
        *(_batches(now, room_batches, width) if batches and room_batches else ()),
        *(_runs(now, room_runs, width) if runs and room_runs else ()),
    )


def _headline(now: Status, found: list[Advice]) -> RenderableType:
    from rich.text import Text

    worst = found[0].severity if needs_operator(found) else None
    return Text.assemble(
        (verdict(now, found), _STYLES[worst] if worst else "bold green"), (f"   {moment(now.at_ms)} UTC", "dim")
    )


def _todo(found: list[Advice]) -> list[RenderableType]:
    from rich.table import Table
    from rich.text import Text

    if not found:
        return []
    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=7)
    grid.add_column(overflow="fold")
    for one in found:
        grid.add_row(Text(str(one.severity), _STYLES[one.severity]), Text(one.what))
        grid.add_row("", Text(f"→ {one.todo}", "cyan"))
    return [grid]


def _numbers(now: Status) -> RenderableType:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 1))
    grid.add_column(width=10)
    grid.add_column(overflow="fold")
    for name, text in _lines(now):
        grid.add_row(Text(name, "bold"), Text(text))
    return grid


def _lines(now: Status) -> list[tuple[str, str]]:
    backlog = now.backlog
    rate = f"{now.rows_per_s:,.0f} rows/s" if now.rows_per_s else "no rate yet"
    eta = (
        "" if now.eta_s is None or not backlog.rows else f", {format_duration(now.eta_s)} to go if nothing more arrives"
    )
    last = f"last export {_ago(now, now.last_exported_at_ms)}" if now.last_exported_at_ms else "nothing exported yet"
    aside = [
        f"{backlog.dead_rows:,} dead letters{_by(now.dead_by_reason)}" if backlog.dead_rows else "no dead letters",
        f"{backlog.unknown_rows:,} rows of unknown versions{_by(backlog.unknown_by_version)}"
        if backlog.unknown_rows
        else "no unknown versions",
        *([f"{backlog.held_rows:,} held rows{_by(now.held_by_detail)}"] if backlog.held_rows else []),
    ]
    checked = [
        f"{now.unverified_batches:,} batches not verified yet"
        if now.unverified_batches
        else "all exported batches were read back",
        f"{now.discrepant_batches:,} discrepant",
    ]
    if now.last_reconcile is not None:
        seen = "clean" if now.last_reconcile.clean else str(now.last_reconcile.found)
        reconciled = f"{_ago(now, now.last_reconcile.at_ms)} by {now.last_reconcile.who}: {seen}, {now.last_reconcile.batches:,} batches"
    else:
        reconciled = "never" if now.actions_read else "not known: this user may not read clickhouse_outbox_action"
    if now.last_sweep is not None:
        swept = f"{_ago(now, now.last_sweep.at_ms)} by {now.last_sweep.who}: {now.last_sweep.rows:,} rows"
    else:
        swept = "never" if now.actions_read else "not known"
    oldest = f"; oldest exported rows: {format_duration(now.oldest_unswept_age_s)}" if now.oldest_unswept_age_s else ""
    return [
        ("backlog", f"{backlog.shown_rows} rows pending, lag {format_duration(backlog.lag_s)}"),
        ("export", f"{rate}{eta}; {now.recent_rows:,} rows in {format_duration(RATE_WINDOW_S)}, {last}"),
        ("at work", ", ".join(now.at_work) or "nobody"),
        ("set aside", "; ".join(aside)),
        ("verified", ", ".join(checked)),
        ("reconciled", reconciled),
        ("swept", f"{swept}{oldest}"),
    ]


def _by(counts: Any) -> str:
    return f" ({format_counts(counts)})" if counts else ""


def _ago(now: Status, at_ms: int) -> str:
    return f"{format_duration(max(0.0, (now.at_ms - at_ms) / 1000))} ago"


def _owner(owner: str, width: int) -> str:
    """Whole where there is room; a run's id otherwise by its beginning, as in the Dagster UI."""
    room = max(12, width - 60)
    return owner if len(owner) <= room else f"{owner[: room - 1]}…"


def _batches(now: Status, rows: int, width: int) -> list[RenderableType]:
    left = now.backlog.open_batches - rows
    shown = table(
        f"open batch{f' (+{left:,})' if left > 0 else ''}",
        "state",
        "rows",
        "age",
        "lease",
        "owner",
        left=("state", "owner"),
    )
    for batch in now.open_batches[:rows]:
        lease = format_duration(batch.lease_left_s) if batch.leased else "ended"
        shown.add_row(
            str(batch.batch_id),
            str(batch.state),
            f"{batch.rows:,}",
            format_duration(batch.age_s),
            lease,
            _owner(batch.owner, width) + (f": {batch.last_error}" if batch.last_error and width >= 120 else ""),
        )
    return ["", shown]


def _runs(now: Status, rows: int, width: int) -> list[RenderableType]:
    columns = ("last run", "rows", "batches", "took", "rows/s", "began", "worst")
    shown = table(*columns, left=("worst",))
    for run in now.runs[:rows]:
        shown.add_row(
            _owner(run.owner, width),
            f"{run.rows:,}",
            f"{run.batches:,}{'+' if run.partial else ''}",
            "at work" if run.at_work else format_duration(run.seconds),
            f"{run.rows_per_s:,.0f}",
            _ago(now, run.started_at_ms),
            str(run.worst),
        )
    return ["", shown]


@dataclass(frozen=True, slots=True, kw_only=True)
class Line:
    """One outbox among others. Without a status, `trouble` says why there is none."""

    name: str
    now: Status | None
    found: list[Advice]
    trouble: str = ""

    @property
    def status(self) -> int:
        """The exit status that this outbox calls for."""
        return BAD_CALL if self.now is None else BAD_OUTCOME if needs_operator(self.found) else 0


def overview(lines: list[Line], width: int) -> RenderableType:
    """A line each, and below what to do about those that need somebody."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    shown = table("outbox", "stands", "pending", "lag", "rows/s", "open", "dead letters", left=("stands",))
    for line in lines:
        name = line.name or "the outbox"
        if line.now is None:
            shown.add_row(name, Text("not known", "bold red"), *["–"] * 5)
            continue
        said = "needs an operator" if line.status else "draining" if line.now.at_work else "healthy"
        shown.add_row(
            name,
            Text(said, "yellow" if line.status else "green"),
            line.now.backlog.shown_rows,
            format_duration(line.now.backlog.lag_s),
            f"{line.now.rows_per_s:,.0f}",
            f"{line.now.backlog.open_batches:,}",
            f"{line.now.backlog.dead_rows:,}",
        )
    todo = Table.grid(padding=(0, 1))
    todo.add_column()
    todo.add_column(overflow="fold")
    for line in lines:
        if line.now is None:
            todo.add_row(Text(line.name or "the outbox", "bold red"), Text(line.trouble))
        for one in line.found:
            if one.severity is not Severity.NOTE:
                todo.add_row(Text(line.name or "the outbox", _STYLES[one.severity]), Text(one.what))
                todo.add_row("", Text(f"→ {one.todo}", "cyan"))
    return Group(shown, "", todo) if todo.row_count else shown
