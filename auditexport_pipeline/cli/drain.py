"""`auditexport drain`: a run in the foreground, without Dagster. Options of `core.settings.Limits`, progress, signals, totals."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline import processes
from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import console, interactive, json_option, print_json, say, setting_options
from auditexport_pipeline.cli.stores import audit_log, outbox
from auditexport_pipeline.core.claiming import leased_line
from auditexport_pipeline.core.format import batches, counted, format_duration
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS

if TYPE_CHECKING:
    from auditexport_pipeline.core.backlog import Backlog
    from auditexport_pipeline.core.batch import Batch, Claim
    from auditexport_pipeline.core.drain import Drained
    from auditexport_pipeline.core.ports import Discrepancy

# A shell's exit status for a program that Ctrl-C ended.
INTERRUPTED = 130
# Nothing is wrong, and another run exports the rest.
LEFT_TO_OTHERS = 3
# The progress bar hides the cursor.
SHOW_CURSOR = b"\x1b[?25h\n"
STOPPING = b"auditexport: stopping after the batch at hand; once more to stop at once, and leave it to its lease\n"
STOPPED = b"auditexport: stopped at once; open batches are left to their lease, and the next drain finishes them\n"


def _known_versions(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Checks --versions when a drain starts: installed packages register theirs only then."""
    for version in given:
        if version not in VERSIONS:
            raise click.BadParameter(f"{version!r} is not one of {', '.join(VERSIONS)}", context, parameter)
    return given


@main.command()
@click.option("--once", is_flag=True, help="One plan only: at most max_batches; the rest waits.")
@json_option
@setting_options(Limits, without=("versions",))
@click.option(
    "--versions",
    multiple=True,
    metavar="VERSION",
    callback=_known_versions,
    shell_complete=lambda *_: list(VERSIONS),
    help=f"{Limits.model_fields['versions'].description}  [default: all that are known]",
)
def drain(once: bool, as_json: bool, **limits: Any) -> None:
    """Export pending rows in this process: claim, fetch, write, mark, verify, as a Dagster run does.

    Ends when everything that was pending at the start is exported. With --linger-s it stays for that many seconds. Dagster runs and
    other drains may run at the same time: the ledger gives each batch to one of them. Ctrl-C finishes the current batch and
    gives the others back; a second Ctrl-C leaves them to their lease. The next drain continues in any case. No heartbeat
    is sent.

    Exit status: 0 drained, 1 ClickHouse does not hold a batch that it acknowledged, a batch was altered or its rows could not
    be marked, 2 the call, the setup or a database is wrong, 3 rows are left to another run, which took a batch over or has
    all pending rows, 130 interrupted.
    """
    from auditexport_pipeline.core.backlog import COUNT_TO
    from auditexport_pipeline.core.drain import Drain
    from auditexport_pipeline.mysql.dead_letters import release_held
    from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
    from auditexport_pipeline.preflight import refuse_unless_ready

    settings = Limits(**{name: value for name, value in limits.items() if value != ()})
    mysql, clickhouse = outbox(), audit_log()
    refuse_unless_ready(mysql, clickhouse)
    release_held(mysql, clickhouse.definition)
    owner = processes.this_process()
    began = time.monotonic()
    backlog = mysql.backlog(settings.versions, count_to=COUNT_TO)
    screen = _Progress(owner, backlog, quiet=as_json)
    with _stoppable() as stopping, screen:
        work = Drain(
            mysql,
            clickhouse,
            owner=owner,
            process=owner,
            upkeep=MySQLMaintenance(mysql),
            dead_owners=processes.dead,
            limits=settings,
            stopping=stopping,
            listener=screen,
        )
        done = work.one_plan() if once else work.until_empty(lambda: mysql.backlog(settings.versions, count_to=1))
        if settings.linger_s and not once and not done.discrepant and not done.unmarked:
            work.stay(
                lambda: time.monotonic() - began < settings.linger_s,
                release=lambda: release_held(mysql, clickhouse.definition),
            )
        done.settle(mysql, owner)
    seconds = time.monotonic() - began
    left = mysql.backlog(settings.versions, count_to=COUNT_TO)
    if as_json:
        print_json(totals(done, left, owner=owner, seconds=seconds))
    else:
        _print_totals(done, left, seconds)
    if done.discrepant or done.altered or done.unmarked or done.waiting:
        sys.exit(BAD_OUTCOME)
    if done.interrupted:
        sys.exit(INTERRUPTED)
    if (done.lost and (once or done.leased_by_others)) or (done.leased_by_others and not done.rows):
        sys.exit(LEFT_TO_OTHERS)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks to stop, the second one ends the process at once.

    A handler can interrupt the main thread while it prints or has the bar's lock: so it takes no lock, and writes to the file
    descriptors.
    """
    signals = 0

    def stop(*_: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            if interactive():
                os.write(1, SHOW_CURSOR)
            os.write(2, STOPPED)
            # Threads may be in an INSERT that takes a minute. The next drain continues from the ledger.
            os._exit(INTERRUPTED)
        os.write(2, STOPPING)

    before = {name: signal.signal(name, stop) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: signals > 0
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


class _Progress:
    """`core.drain.Listener`: a bar on a terminal, else a line for each batch, nothing with `quiet`."""

    def __init__(self, owner: str, backlog: Backlog, *, quiet: bool) -> None:
        self._owner = owner
        self._backlog = backlog
        self._quiet = quiet
        self._began = time.monotonic()
        self._rows = 0
        self._bar: Any = None
        self._task: Any = None

    def __enter__(self) -> _Progress:
        others = self._backlog.leasing_owners
        self._line(f"{self._backlog}; draining as {self._owner}")
        if others:
            are = "is" if len(others) == 1 else "are"
            self._line(f"{', '.join(others)} {are} at work as well: the ledger gives each batch to one of us")
        if not self._quiet and interactive():
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(bar_width=None),
                TextColumn("{task.completed:,}/{task.total:,} rows"),
                TextColumn("{task.fields[pace]}"),
                TimeElapsedColumn(),
                console=console(),
                expand=True,
            )
            self._task = self._bar.add_task("claiming", total=self._backlog.rows, pace="")
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def claimed(self, claims: Sequence[Claim]) -> None:
        if not claims:
            return
        adopted = sum(1 for claim in claims if claim.adopted)
        rows = sum(claim.rows for claim in claims)
        if self._bar is not None:
            self._bar.update(self._task, total=max(self._backlog.rows, self._rows + rows), description="exporting")
        else:
            left_open = f"; {adopted} of them had been left open" if adopted else ""
            self._line(f"claimed {batches(len(claims))}, {counted(rows, 'row')}{left_open}")

    def exported(self, batch: Batch) -> None:
        if batch.view_note:
            self.trouble(f"warning: batch {batch.batch_id}: {batch.view_note}")
        self._rows += batch.marked_rows
        rate = self._rows / max(0.001, time.monotonic() - self._began)
        left = max(0, self._backlog.rows - self._rows)
        pace = f"{rate:,.0f} rows/s" + (f", {format_duration(left / rate)} to go" if left and rate else "")
        if self._bar is not None:
            total = max(self._bar.tasks[0].total or 0, self._rows)
            self._bar.update(self._task, completed=self._rows, total=total, pace=pace)
        else:
            exported = f"{counted(batch.marked_rows, 'row')}, {counted(batch.counts.dead, 'dead letter')}"
            self._line(f"exported batch {batch.batch_id}: {exported}; {self._rows:,} in all, {pace}")

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        for batch_id, found in outcome.items():
            if found:
                self.trouble(f"batch {batch_id} is not in ClickHouse as it was sealed: {found}")

    def trouble(self, what: str) -> None:
        if self._bar is not None:
            self._bar.console.print(what, style="yellow")
        else:
            say(f"auditexport: {what}", err=True)

    def _line(self, text: str) -> None:
        if not self._quiet:
            click.echo(text)


def totals(done: Drained, left: Backlog, *, owner: str, seconds: float) -> dict[str, Any]:
    """What a drain did, under the names of the metadata of a Dagster run."""
    return {
        "owner": owner,
        "rounds": done.rounds,
        "rows": done.rows,
        "entries": done.entries,
        "batches": done.batches,
        "adopted_batches": done.adopted,
        "dead_letters": done.dead_letters,
        "folded_rows": done.folded_rows,
        "deleted_by_others_rows": done.deleted_by_others_rows,
        "marked_by_others_rows": done.marked_by_others_rows,
        "bytes": done.bytes,
        "seconds": round(seconds, 3),
        "rows_per_s": round(done.rows / seconds, 1) if seconds else 0.0,
        "verified_batches": len(done.verified) - len(done.discrepant),
        "discrepant": done.discrepant,
        "altered": done.altered,
        "unmarked": done.unmarked,
        "waiting": {batch_id: str(why) for batch_id, why in done.waiting.items()},
        "views_failed": done.views,
        "lost_batches": done.lost,
        "held_by_others_rows": sum(holder.rows for holder in done.leased_by_others),
        "held_by": "; ".join(map(str, done.leased_by_others)) or "nobody",
        "released_batches": done.released,
        "interrupted": done.interrupted,
        **left.numbers,
    }


def _print_totals(done: Drained, left: Backlog, seconds: float) -> None:
    rate = done.rows / seconds if seconds else 0.0
    click.echo(
        f"exported {counted(done.rows, 'row')} in {batches(done.batches)}, {format_duration(seconds)}, {rate:,.0f} rows/s; "
        f"{counted(done.dead_letters, 'dead letter')}; {batches(len(done.verified) - len(done.discrepant))} verified"
    )
    if left.held_rows:
        refused = counted(left.held_rows, "row is held", "rows are held")
        say(f"{refused} because the ClickHouse table refuses them; `auditexport status` says why", err=True)
    if done.interrupted:
        released = counted(len(done.released), "batch was given back", "batches were given back")
        click.echo(f"interrupted: {f'{released}, ' if done.released else ''}the next drain goes on from here")
    pending = f"{left.shown_rows} {'row' if left.rows == 1 else 'rows'} still pending"
    open_batches = counted(left.open_batches, "open batch", "open batches")
    click.echo(f"{pending}, lag {format_duration(left.lag_s)}, {open_batches}")
    for batch_id, why in done.unmarked.items():
        say(f"batch {batch_id} is in ClickHouse and not marked: {why}", err=True)
    if done.lost:
        one = len(done.lost) == 1
        lost = f"{'batch' if one else 'batches'} {', '.join(map(str, done.lost))} {'was' if one else 'were'}"
        click.echo(f"{lost} taken over by another run, which exports {'it' if one else 'them'}", err=True)
    if done.leased_by_others:
        click.echo(leased_line(done.leased_by_others))
    if done.discrepant:
        say("to do: `auditexport reconcile --repair`, then drain, then reconcile again", err=True)
