"""`auditexport status`: how the export stands, on one screen, and what to do about it.

What belongs here: laying the numbers out, refreshing them, JSON. What does not: the numbers (`stores.status`) and what
they ask for (`core.status`). MySQL alone is asked: ClickHouse may be down, which `doctor` tells.
"""

from __future__ import annotations

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli import BAD_CALL, BAD_OUTCOME, main
from auditexport_pipeline.cli.pages import report_option, typed
from auditexport_pipeline.cli.shared import console, interactive, json_option, moment, print_json, table
from auditexport_pipeline.cli.stores import audit_log, outbox, upkeep
from auditexport_pipeline.core.errors import TransientError
from auditexport_pipeline.core.series import DAY_MS
from auditexport_pipeline.core.status import (
    RATE_WINDOW_S,
    Advice,
    Severity,
    Status,
    advice,
    needs_operator,
    shown_counts,
    shown_s,
    verdict,
)

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_S = 5.0
# Lines of each table where the screen's height does not say (a file, a pager).
LISTED = 20
# What a table takes beside its rows: a blank line, and its header.
TABLE_LINES = 2
# And the prompt that follows.
PROMPT_LINES = 1

_STYLES = {Severity.ERROR: "bold red", Severity.WARNING: "yellow", Severity.NOTE: "dim"}


@main.command()
@click.option(
    "--watch",
    "watch_s",
    type=click.FloatRange(0.2, 3_600),
    is_flag=False,
    flag_value=REFRESH_S,
    default=None,
    metavar="[SECONDS]",
    help=f"Look again every so many seconds (without a number {REFRESH_S:g}), until Ctrl-C.",
)
@report_option
@click.option(
    "--days", type=click.FloatRange(0.01, 3_650), default=7.0, show_default=True, help="Of the page: how far back."
)
@json_option
def status(watch_s: float | None, report_path: Path | None, days: float, as_json: bool) -> None:
    """How the export stands: backlog, lag, rate, ETA, open batches, runs, dead letters, upkeep, and what to do.

    Reads MySQL only, and needs no more than SELECT; with --report ClickHouse as well. Targets: AUDITEXPORT_TARGET_LAG_S and so on; the README lists them.

    Exit status: 0 healthy, 1 something needs an operator, 2 the call or the setup is wrong, or MySQL is down. With --watch,
    of what was seen last.
    """
    if watch_s is not None:
        if report_path is not None:
            raise click.UsageError("--report writes one page; leave --watch away")
        _watch(watch_s, as_json)
        return
    if report_path is not None:
        _write_page(report_path, days)
    now, found = look()
    if as_json:
        print_json(status_values(now, found))
    else:
        screen = console()
        screen.print(layout(now, found, width=screen.width, height=screen.height if interactive() else None))
        if report_path is not None:
            click.echo(f"the page is {report_path}")
    if needs_operator(found):
        sys.exit(BAD_OUTCOME)


def _write_page(path: Path, days: float) -> None:
    from auditexport_pipeline.report import page
    from auditexport_pipeline.report.gather import gather

    page.check_path(path)
    mysql = outbox()
    now_ms = upkeep().now_ms()
    figures = gather(mysql, audit_log(), now_ms - int(days * DAY_MS), now_ms)
    page.write(path, page.of_status(figures, typed(click.get_current_context())))


def look() -> tuple[Status, list[Advice]]:
    """How the export stands at this moment, held against the targets of the environment."""
    from auditexport_pipeline.stores.status import read_status, targets

    limits = targets()
    now = read_status(outbox())
    return now, advice(now, limits)


def _watch(every_s: float, as_json: bool) -> None:
    """Shows it again and again; ends with the exit status of what was seen last. MySQL may be away meanwhile."""
    from rich.live import Live
    from rich.text import Text

    came_to = 0
    look()  # a wrong call or setup ends here, and does not flicker
    screen = console()
    live = Live(console=screen, screen=True, auto_refresh=False) if interactive() and not as_json else None
    try:
        if live is not None:
            live.start()
        while True:
            try:
                now, found = look()
            except TransientError as error:
                came_to = BAD_CALL
                if live is not None:
                    live.update(
                        Text(f"{error}\nlooking again every {every_s:g} s; Ctrl-C ends", "bold red"), refresh=True
                    )
                else:
                    click.echo(f"auditexport: {error}", err=True)
            else:
                came_to = BAD_OUTCOME if needs_operator(found) else 0
                if as_json:
                    print_json(status_values(now, found))
                elif live is not None:
                    live.update(layout(now, found, width=screen.width, height=screen.height), refresh=True)
                else:
                    screen.print(layout(now, found, width=screen.width, height=None))
            time.sleep(every_s)
    except KeyboardInterrupt:
        pass
    finally:
        if live is not None:
            live.stop()
    sys.exit(came_to)


# ── for programs ─────────────────────────────────────────────────────────────────────────────────


def status_values(now: Status, found: list[Advice]) -> dict[str, Any]:
    """The status as JSON: one number a name as on Dagster's page, then the lists."""
    return {
        "verdict": verdict(now, found),
        "healthy": not needs_operator(found),
        "at_ms": now.at_ms,
        **now.numbers,
        "backlog_rows_at_least": now.backlog.rows_at_least,
        "unknown_by_version": dict(now.backlog.unknown_by_version),
        "dead_letters_by_reason": dict(now.dead_by_reason),
        "at_work": list(now.at_work),
        "last_exported_at_ms": now.last_exported_at_ms,
        "open": [{**asdict(batch), "state": str(batch.state)} for batch in now.open_batches],
        "runs": [
            {**asdict(run), "worst": str(run.worst), "seconds": run.seconds, "rows_per_s": round(run.rows_per_s, 1)}
            for run in now.runs
        ],
        "discrepant": {str(batch_id): why for batch_id, why in now.discrepant.items()},
        "last_sweep": asdict(now.last_sweep) if now.last_sweep else None,
        "last_reconcile": {**asdict(now.last_reconcile), "clean": now.last_reconcile.clean}
        if now.last_reconcile
        else None,
        "todo": [{**asdict(one), "severity": str(one.severity)} for one in found],
    }


# ── for people ───────────────────────────────────────────────────────────────────────────────────


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
    eta = "" if now.eta_s is None or not backlog.rows else f", {shown_s(now.eta_s)} to go if nothing more arrives"
    last = f"last export {_ago(now, now.last_exported_at_ms)}" if now.last_exported_at_ms else "nothing exported yet"
    aside = [
        f"{backlog.dead_rows:,} dead letters{_by(now.dead_by_reason)}" if backlog.dead_rows else "no dead letters",
        f"{backlog.unknown_rows:,} rows of unknown versions{_by(backlog.unknown_by_version)}"
        if backlog.unknown_rows
        else "no unknown versions",
    ]
    checked = [
        f"{now.unverified_batches:,} batches not verified yet"
        if now.unverified_batches
        else "all exported batches verified",
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
    oldest = f"; oldest exported rows: {shown_s(now.oldest_unswept_age_s)}" if now.oldest_unswept_age_s else ""
    return [
        ("backlog", f"{backlog.shown_rows} rows pending, lag {shown_s(backlog.lag_s)}"),
        ("export", f"{rate}{eta}; {now.recent_rows:,} rows in {shown_s(RATE_WINDOW_S)}, {last}"),
        ("at work", ", ".join(now.at_work) or "nobody"),
        ("set aside", "; ".join(aside)),
        ("verified", ", ".join(checked)),
        ("reconciled", reconciled),
        ("swept", f"{swept}{oldest}"),
    ]


def _by(counts: Any) -> str:
    return f" ({shown_counts(counts)})" if counts else ""


def _ago(now: Status, at_ms: int) -> str:
    return f"{shown_s(max(0.0, (now.at_ms - at_ms) / 1000))} ago"


def _owner(owner: str, width: int) -> str:
    """Whole where there is room; a run's id otherwise by its beginning, as on Dagster's page."""
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
        lease = shown_s(batch.lease_left_s) if batch.leased else "ended"
        shown.add_row(
            str(batch.batch_id),
            str(batch.state),
            f"{batch.rows:,}",
            shown_s(batch.age_s),
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
            "at work" if run.at_work else shown_s(run.seconds),
            f"{run.rows_per_s:,.0f}",
            _ago(now, run.started_at_ms),
            str(run.worst),
        )
    return ["", shown]
