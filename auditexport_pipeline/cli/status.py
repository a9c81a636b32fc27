"""`auditexport status`: how the export stands, on one screen, and what to do about it.

What belongs here: the command, looking at one outbox or all of them, refreshing, JSON. What does not: the screen
(`cli.screen`), the numbers (`mysql.status`) and what they ask for (`core.advice`). MySQL alone is asked: ClickHouse may
be down, which `doctor` tells.
"""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_CALL, BAD_OUTCOME, main
from auditexport_pipeline.cli.pages import report_option, typed
from auditexport_pipeline.cli.screen import Line, layout, overview
from auditexport_pipeline.cli.shared import (
    console,
    interactive,
    json_option,
    print_json,
    until_stopped,
)
from auditexport_pipeline.cli.stores import Chosen, audit_log, chosen, every, outbox, upkeep
from auditexport_pipeline.core.advice import Advice, advice, needs_operator, verdict
from auditexport_pipeline.core.errors import AuditExportError, TransientError
from auditexport_pipeline.core.status import Status
from auditexport_pipeline.core.units import DAY_MS

if TYPE_CHECKING:
    from rich.console import RenderableType

REFRESH_S = 5.0
# Looks that wait for a server at the same time.
OUTBOXES_AT_ONCE = 16


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
@click.option("--all", "of_all", is_flag=True, help="Every outbox of AUDITEXPORT_OUTBOXES on one screen, a line each.")
@report_option
@click.option(
    "--days", type=click.FloatRange(0.01, 3_650), default=7.0, show_default=True, help="Of the page: how far back."
)
@json_option
def status(watch_s: float | None, of_all: bool, report_path: Path | None, days: float, as_json: bool) -> None:
    """How the export stands: backlog, lag, rate, ETA, open batches, runs, dead letters, upkeep, and what to do.

    Reads MySQL only, and needs no more than SELECT; with --report ClickHouse as well. operations.md lists the targets.

    Exit status: 0 healthy, 1 something needs an operator, 2 the call or the setup is wrong, or MySQL is down. With --watch,
    of what was seen last; with --all, the worst of them.
    """
    if report_path is not None and (of_all or watch_s is not None):
        raise click.UsageError("--report writes one page of one outbox; leave --watch and --all away")
    view = _all_outboxes if of_all else _one_outbox
    if watch_s is not None:
        _watch(watch_s, as_json, view)
        return
    if report_path is not None:
        _write_page(report_path, days)
    seen = view()
    if as_json:
        print_json(seen.values())
    else:
        screen = console()
        screen.print(seen.show(screen.width, screen.height if interactive() else None))
        if report_path is not None:
            click.echo(f"the page is {report_path}")
    sys.exit(seen.status)


def _write_page(path: Path, days: float) -> None:
    from auditexport_pipeline.report import page
    from auditexport_pipeline.report.figures import gather

    page.check_path(path)
    mysql = outbox()
    now_ms = upkeep().now_ms()
    figures = gather(mysql, audit_log(), now_ms - int(days * DAY_MS), now_ms, chosen().targets())
    page.write(path, page.of_status(figures, typed(click.get_current_context())))


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """One look: the exit status it comes to, its JSON, and its screen of a width and, where there is one, a height."""

    status: int
    values: Callable[[], dict[str, Any]]
    show: Callable[[int, int | None], RenderableType]


def look(at: Chosen | None = None) -> tuple[Status, list[Advice]]:
    """The status of the chosen outbox, and the advice by its targets."""
    from auditexport_pipeline.mysql.status import read_status

    at = at or chosen()
    targets = at.targets()
    now = read_status(at.outbox())
    return now, advice(now, targets, at.name)


def _one_outbox() -> Seen:
    now, found = look()
    return Seen(
        status=BAD_OUTCOME if needs_operator(found) else 0,
        values=lambda: status_values(now, found),
        show=lambda width, height: layout(now, found, width=width, height=height),
    )


def _all_outboxes() -> Seen:
    """Each outbox by a thread of its own: one whose server does not answer delays no other."""
    from concurrent.futures import ThreadPoolExecutor

    which = every()
    with ThreadPoolExecutor(max_workers=min(len(which), OUTBOXES_AT_ONCE)) as threads:
        lines = list(threads.map(_line_of, which))
    return Seen(
        status=max(line.status for line in lines),
        values=lambda: {
            "healthy": not any(line.status for line in lines),
            "outboxes": [{"outbox": line.name, **_line_values(line)} for line in lines],
        },
        show=lambda width, _: overview(lines, width),
    )


def _line_of(which: Chosen) -> Line:
    try:
        now, found = look(which)
    except AuditExportError as error:
        return Line(name=which.name, now=None, found=[], trouble=str(error))
    return Line(name=which.name, now=now, found=found)


def _watch(every_s: float, as_json: bool, view: Callable[[], Seen]) -> None:
    """Shows it again and again; ends with the exit status of what was seen last. MySQL may be away meanwhile."""
    from rich.live import Live
    from rich.text import Text

    came_to = 0
    view()  # a wrong call or setup ends here, and does not flicker
    screen = console()
    live = Live(console=screen, screen=True, auto_refresh=False) if interactive() and not as_json else None
    with until_stopped(signal.SIGINT) as waited:
        try:
            if live is not None:
                live.start()
            while True:
                try:
                    seen = view()
                except TransientError as error:
                    came_to = BAD_CALL
                    if live is not None:
                        live.update(
                            Text(f"{error}\nlooking again every {every_s:g} s; Ctrl-C ends", "bold red"), refresh=True
                        )
                    else:
                        click.echo(f"auditexport: {error}", err=True)
                else:
                    came_to = seen.status
                    if as_json:
                        print_json(seen.values())
                    elif live is not None:
                        live.update(seen.show(screen.width, screen.height), refresh=True)
                    else:
                        screen.print(seen.show(screen.width, None))
                if not waited(every_s):
                    break
        finally:
            if live is not None:
                live.stop()
    sys.exit(came_to)


# ── for programs ─────────────────────────────────────────────────────────────────────────────────


def _line_values(line: Line) -> dict[str, Any]:
    if line.now is None:
        return {"verdict": "not known", "healthy": False, "error": line.trouble, "todo": []}
    return status_values(line.now, line.found)


def status_values(now: Status, found: list[Advice]) -> dict[str, Any]:
    """The status as JSON: one number a name as in the Dagster UI, then the lists."""
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
        "findings": [{**asdict(one), "found": str(one.found)} for one in now.open_findings],
        "todo": [one.values for one in found],
    }
