"""`auditexport status`: the status of one outbox or of all on one screen, what to do, and the same as JSON.

`mysql.status` reads the numbers, `core.advice` says what to do. Only MySQL is asked, so that a ClickHouse that is down does
not matter; `doctor` checks both.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_CALL, BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import (
    console,
    grid,
    interactive,
    json_option,
    print_json,
    report_option,
    table,
    typed,
    until_stopped,
)
from auditexport_pipeline.cli.stores import Chosen, chosen, every, maintenance
from auditexport_pipeline.core.advice import Advice, Severity, advice, needs_operator, verdict
from auditexport_pipeline.core.errors import AuditExportError, TransientError
from auditexport_pipeline.core.format import batches, counted, format_counts, format_duration, format_time
from auditexport_pipeline.core.status import RATE_WINDOW_S, Status
from auditexport_pipeline.core.units import DAY_MS

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_S = 5.0
# Outboxes that are read at the same time.
OUTBOXES_AT_ONCE = 16
# Lines of each table in a file or a pipe, which have no height.
LISTED = 20
# Lines of a table beside its rows: a blank line and the header.
TABLE_LINES = 2
# The shell's prompt after the screen.
PROMPT_LINES = 1
_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What was read of one outbox: its status and advice, or the error that hides them."""

    name: str
    now: Status | None = None
    found: Sequence[Advice] = ()
    error: str = ""

    @property
    def exit_status(self) -> int:
        return BAD_CALL if self.now is None else BAD_OUTCOME if needs_operator(self.found) else 0

    @property
    def values(self) -> dict[str, Any]:
        """As JSON: single numbers under the names of the Dagster UI, then lists."""
        now = self.now
        if now is None:
            return {"verdict": "not known", "healthy": False, "error": self.error, "todo": []}
        reconciled = now.last_reconcile
        return {
            "verdict": verdict(now, self.found),
            "healthy": not needs_operator(self.found),
            "at_ms": now.at_ms,
            **now.numbers,
            "backlog_rows_at_least": now.backlog.rows_at_least,
            "unknown_by_version": now.backlog.unknown_by_version,
            "dead_letters_by_reason": now.dead_by_reason,
            "at_work": now.at_work,
            "last_exported_at_ms": now.last_exported_at_ms,
            "open": now.open_batches,
            "runs": [
                {**asdict(run), "seconds": run.seconds, "rows_per_s": round(run.rows_per_s, 1)} for run in now.runs
            ],
            "discrepant": now.discrepant,
            "last_sweep": now.last_sweep,
            "last_reconcile": {**asdict(reconciled), "clean": reconciled.clean} if reconciled else None,
            "findings": [{**asdict(one), "found": str(one.found)} for one in now.open_findings],
            "todo": [one.values for one in self.found],
        }


@main.command()
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(0.2, 3_600),
    is_flag=False,
    flag_value=REFRESH_S,
    default=None,
    metavar="[SECONDS]",
    help=f"Refresh every so many seconds (without a number {REFRESH_S:g}), until Ctrl-C.",
)
@click.option("--all", "of_all", is_flag=True, help="Every outbox of AUDITEXPORT_OUTBOXES on one screen, a line each.")
@report_option
@click.option(
    "--days", type=click.FloatRange(0.01, 3_650), default=7.0, show_default=True, help="Of the page: how far back."
)
@json_option
def status(watch_s: float | None, of_all: bool, report_path: Path | None, days: float, as_json: bool) -> None:
    """The status of the export: backlog, lag, rate, ETA, open batches, runs, dead letters, maintenance, and what to do.

    Reads MySQL only, and needs only SELECT; with --report ClickHouse as well. operations.md lists the targets.

    Exit status: 0 healthy, 1 something needs an operator, 2 the call or the setup is wrong, or MySQL is down. With --watch,
    the last status that was shown; with --all, the worst.
    """
    if report_path is not None and (of_all or watch_s is not None):
        raise click.UsageError("--report writes one page of one outbox; leave --watch and --all out")
    if watch_s is not None:
        sys.exit(_watch(watch_s, of_all=of_all, as_json=as_json))
    if report_path is not None:
        _write_page(report_path, days)
    seen = _look(of_all=of_all)
    if as_json:
        print_json(_values(seen, of_all=of_all))
    else:
        screen = console()
        screen.print(_screen(seen, screen.width, screen.height if interactive() else None, of_all=of_all))
        if report_path is not None:
            click.echo(f"the page is {report_path}")
    sys.exit(_exit_status(seen))


def _write_page(path: Path, days: float) -> None:
    from auditexport_pipeline.report import page
    from auditexport_pipeline.report.figures import gather

    page.check_path(path)
    at, now_ms = chosen(), maintenance().now_ms()
    figures = gather(at.outbox(), at.audit_log(), now_ms - int(days * DAY_MS), now_ms, at.targets(), at.name)
    page.write(path, page.of_status(figures, typed(click.get_current_context())))


def _look(*, of_all: bool) -> list[Seen]:
    """The chosen outbox, or all. Of all, each has its own thread: a server that does not answer delays no other outbox."""
    if not of_all:
        return [_seen(chosen())]
    from concurrent.futures import ThreadPoolExecutor

    def attempt(which: Chosen) -> Seen:
        try:
            return _seen(which)
        except AuditExportError as error:
            return Seen(name=which.name, error=str(error))

    outboxes = every()
    with ThreadPoolExecutor(max_workers=min(len(outboxes), OUTBOXES_AT_ONCE)) as threads:
        return list(threads.map(attempt, outboxes))


def _seen(which: Chosen) -> Seen:
    from auditexport_pipeline.mysql.status import read_status

    targets = which.targets()
    now = read_status(which.outbox())
    return Seen(name=which.name, now=now, found=advice(now, targets, which.name))


def _exit_status(seen: Iterable[Seen]) -> int:
    return max(one.exit_status for one in seen)


def _values(seen: Sequence[Seen], *, of_all: bool) -> dict[str, Any]:
    if not of_all:
        return seen[0].values
    return {"healthy": not _exit_status(seen), "outboxes": [{"outbox": one.name, **one.values} for one in seen]}


def _screen(seen: Sequence[Seen], width: int, height: int | None, *, of_all: bool) -> RenderableType:
    one = seen[0]
    return overview(seen) if of_all or one.now is None else layout(one.now, one.found, width=width, height=height)


def _watch(every_s: float, *, of_all: bool, as_json: bool) -> int:
    """Shows the status again and again until Ctrl-C; returns the exit status of the last one. MySQL may be away meanwhile."""
    from rich.live import Live
    from rich.text import Text

    exit_status = 0
    _look(of_all=of_all)  # a wrong call or setup ends here
    screen = console()
    live = Live(console=screen, screen=True, auto_refresh=False) if interactive() and not as_json else None
    with until_stopped(signal.SIGINT) as wait:
        try:
            if live is not None:
                live.start()
            while True:
                try:
                    seen = _look(of_all=of_all)
                except TransientError as error:
                    exit_status = BAD_CALL
                    if live is not None:
                        again = f"{error}\ntrying again every {every_s:g} s; Ctrl-C ends"
                        live.update(Text(again, "bold red"), refresh=True)
                    else:
                        click.echo(f"auditexport: {error}", err=True)
                else:
                    exit_status = _exit_status(seen)
                    if as_json:
                        print_json(_values(seen, of_all=of_all))
                    elif live is not None:
                        live.update(_screen(seen, screen.width, screen.height, of_all=of_all), refresh=True)
                    else:
                        screen.print(_screen(seen, screen.width, None, of_all=of_all))
                if not wait(every_s):
                    break
        finally:
            if live is not None:
                live.stop()
    return exit_status


# ── one outbox ───────────────────────────────────────────────────────────────────────────────────


def layout(now: Status, found: Sequence[Advice], *, width: int, height: int | None) -> RenderableType:
    """One screen: the verdict, what to do, the numbers; then as many open batches and runs as there is room for."""
    from rich.console import Group
    from rich.text import Text

    worst = _STYLES[found[0].severity] if needs_operator(found) else "bold green"
    todo, numbers = grid(7), grid(10)
    for one in found:
        _add(todo, str(one.severity), one)
    for name, text in _lines(now):
        numbers.add_row(Text(name, "bold"), Text(text))
    headline = Text.assemble((verdict(now, found), worst), (f"   {format_time(now.at_ms)} UTC", "dim"))
    top = Group(headline, *([todo] if found else []), numbers)
    open_batches, runs = len(now.open_batches), len(now.runs)
    if height is None:
        room_batches = room_runs = LISTED
    else:
        screen = console()
        room = height - PROMPT_LINES - len(screen.render_lines(top, screen.options.update(width=width)))
        # Open batches come first, because they may need an operator. Each table says how many batches it leaves out.
        room_batches = min(open_batches, max(0, room - TABLE_LINES - (TABLE_LINES + min(runs, 2) if runs else 0)))
        room -= room_batches + TABLE_LINES if room_batches else 0
        room_runs = min(runs, max(0, room - TABLE_LINES))
    parts: list[RenderableType] = [top]
    if open_batches and room_batches:
        parts += ["", _batches(now, room_batches, width)]
    if runs and room_runs:
        parts += ["", _runs(now, room_runs, width)]
    return Group(*parts)


def _add(todo: Any, label: str, one: Advice) -> None:
    """Two rows of a grid: what is wrong, and what to do."""
    from rich.text import Text

    todo.add_row(Text(label, _STYLES[one.severity]), Text(one.what.replace("`", "")))
    todo.add_row("", Text(f"→ {one.todo}", "cyan"))


def _lines(now: Status) -> list[tuple[str, str]]:
    backlog, reconciled, swept = now.backlog, now.last_reconcile, now.last_sweep
    rate = f"{now.rows_per_s:,.0f} rows/s" if now.rows_per_s else "no rate yet"
    eta = f", {format_duration(now.eta_s)} to go if nothing more arrives" if now.eta_s and backlog.rows else ""
    last = f"last export {_ago(now, now.last_exported_at_ms)}" if now.last_exported_at_ms else "nothing exported yet"
    aside = [
        f"{counted(backlog.dead_rows, 'dead letter')}{_by(now.dead_by_reason)}"
        if backlog.dead_rows
        else "no dead letters",
        f"{counted(backlog.unknown_rows, 'row')} of unknown versions{_by(backlog.unknown_by_version)}"
        if backlog.unknown_rows
        else "no unknown versions",
        *([f"{counted(backlog.held_rows, 'held row')}{_by(now.held_by_detail)}"] if backlog.held_rows else []),
    ]
    verified = (
        f"{batches(now.unverified_batches)} not verified yet"
        if now.unverified_batches
        else "all exported batches were read back"
    )
    unknown = "never" if now.actions_read else "not known: this user may not read clickhouse_outbox_action"
    if reconciled is not None:
        result = f"{'clean' if reconciled.clean else reconciled.found}, {batches(reconciled.batches)}"
        unknown = f"{_ago(now, reconciled.at_ms)} by {reconciled.who}: {result}"
    last_sweep = "never" if now.actions_read else "not known"
    if swept is not None:
        last_sweep = f"{_ago(now, swept.at_ms)} by {swept.who}: {counted(swept.rows, 'row')}"
    oldest = f"; oldest exported rows: {format_duration(now.oldest_unswept_age_s)}" if now.oldest_unswept_age_s else ""
    return [
        ("backlog", str(backlog)),
        ("export", f"{rate}{eta}; {counted(now.recent_rows, 'row')} in {format_duration(RATE_WINDOW_S)}, {last}"),
        ("at work", ", ".join(now.at_work) or "nobody"),
        ("set aside", "; ".join(aside)),
        ("verified", f"{verified}, {now.discrepant_batches:,} discrepant"),
        ("reconciled", unknown),
        ("swept", f"{last_sweep}{oldest}"),
    ]


def _by(counts: Mapping[str, int]) -> str:
    return f" ({format_counts(counts)})" if counts else ""


def _ago(now: Status, at_ms: int) -> str:
    return f"{format_duration(max(0.0, (now.at_ms - at_ms) / 1000))} ago"


def _owner(owner: str, width: int) -> str:
    """The owner, or its beginning where it does not fit."""
    room = max(12, width - 60)
    return owner if len(owner) <= room else f"{owner[: room - 1]}…"


def _batches(now: Status, rows: int, width: int) -> RenderableType:
    more = now.backlog.open_batches - rows
    columns = (f"open batch{f' (+{more:,})' if more > 0 else ''}", "state", ">rows", ">age", ">lease", "owner")
    return table(
        columns,
        (
            (
                str(batch.batch_id),
                batch.state,
                batch.rows,
                format_duration(batch.age_s),
                format_duration(batch.lease_left_s) if batch.leased else "ended",
                _owner(batch.owner, width) + (f": {batch.last_error}" if batch.last_error and width >= 120 else ""),
            )
            for batch in now.open_batches[:rows]
        ),
    )


def _runs(now: Status, rows: int, width: int) -> RenderableType:
    return table(
        ("last run", ">rows", ">batches", ">took", ">rows/s", ">began", "worst"),
        (
            (
                _owner(run.owner, width),
                run.rows,
                f"{run.batches:,}{'+' if run.partial else ''}",
                "at work" if run.at_work else format_duration(run.seconds),
                f"{run.rows_per_s:,.0f}",
                _ago(now, run.started_at_ms),
                run.worst,
            )
            for run in now.runs[:rows]
        ),
    )


# ── all outboxes ─────────────────────────────────────────────────────────────────────────────────


def overview(seen: Sequence[Seen]) -> RenderableType:
    """A line for each outbox, and below them what to do."""
    from rich.console import Group
    from rich.text import Text

    shown = table(("outbox", "status", ">pending", ">lag", ">rows/s", ">open", ">dead letters"), ())
    todo = grid(None)
    for one in seen:
        name, now = one.name or "the outbox", one.now
        if now is None:
            shown.add_row(name, Text("not known", "bold red"), *["–"] * 5)
            todo.add_row(Text(name, "bold red"), Text(one.error))
            continue
        health = "needs an operator" if one.exit_status else "draining" if now.at_work else "healthy"
        shown.add_row(
            name,
            Text(health, "yellow" if one.exit_status else "green"),
            now.backlog.shown_rows,
            format_duration(now.backlog.lag_s),
            f"{now.rows_per_s:,.0f}",
            f"{now.backlog.open_batches:,}",
            f"{now.backlog.dead_rows:,}",
        )
        for each in one.found:
            if each.severity is not Severity.NOTE:
                _add(todo, name, each)
    return Group(shown, "", todo) if todo.row_count else shown
