"""`auditexport drain`: a run in the foreground, without Dagster. Options from `core.settings.Limits`, progress, signals, totals."""

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
from auditexport_pipeline.cli.shared import console, interactive, json_option, print_json, setting_options
from auditexport_pipeline.cli.stores import audit_log, outbox
from auditexport_pipeline.core.claiming import held_line
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.status import format_duration
from auditexport_pipeline.core.versions import VERSIONS

if TYPE_CHECKING:
    from auditexport_pipeline.core.backlog import Backlog
    from auditexport_pipeline.core.batch import Batch, Claim
    from auditexport_pipeline.core.drain import Drained
    from auditexport_pipeline.core.ports import Discrepancy

# As a shell has it for what Ctrl-C ended.
INTERRUPTED = 130
# Nothing is wrong, and not all of it was this drain's to export.
LEFT_TO_OTHERS = 3
# A bar hides it.
SHOW_CURSOR = b"\x1b[?25h\n"
COUNT_BACKLOG_TO = 1_000_000


def _known_versions(context: click.Context, parameter: click.Parameter, given: tuple[str, ...]) -> tuple[str, ...]:
    """Looked up when a drain is asked for: installed packages register theirs at the first look."""
    for version in given:
        if version not in VERSIONS:
            raise click.BadParameter(f"{version!r} is not one of {', '.join(VERSIONS)}", context, parameter)
    return given


@main.command()
@click.option("--once", is_flag=True, help="One plan only: at most max_batches, and what is left waits.")
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
    """Export what is pending, here and now: claim, fetch, write, mark, verify, as a Dagster run does.

    Ends when everything that was pending at the start is exported, or with --linger-s after that time. A Dagster run or
    another drain may be at work meanwhile: the ledger gives each batch to one of them, and both finish sooner. Ctrl-C
    finishes the batch at hand and gives the others back; a second one leaves them to their lease. Whatever ends it, the
    next drain picks up. No heartbeat is sent: that is the business of what runs by itself.

    Exit status: 0 drained, 1 ClickHouse does not hold a batch that it acknowledged, a batch was altered or its rows could not
    be marked, 2 the call, the setup or a database is wrong, 3 rows are left to another run, which took a batch over or holds
    all that is pending, 130 interrupted.
    """
    from auditexport_pipeline.core.drain import Drain
    from auditexport_pipeline.mysql.dead_letters import release_held
    from auditexport_pipeline.preflight import refuse_unless_ready

    settings = Limits(**{name: value for name, value in limits.items() if value != ()})
    mysql, clickhouse = outbox(), audit_log()
    refuse_unless_ready(mysql, clickhouse)
    release_held(mysql, clickhouse.definition)
    owner = processes.this_process()
    began = time.monotonic()
    backlog = mysql.backlog(settings.versions, count_to=COUNT_BACKLOG_TO)
    screen = _Progress(owner, backlog, quiet=as_json)
    with _stoppable() as stopping, screen:
        work = Drain(
            mysql,
            clickhouse,
            owner=owner,
            process=owner,
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
    left = mysql.backlog(settings.versions, count_to=COUNT_BACKLOG_TO)
    if as_json:
        print_json(totals(done, left, owner=owner, seconds=seconds))
    else:
        _say(done, left, seconds)
    if done.discrepant or done.altered or done.unmarked or done.waiting:
        sys.exit(BAD_OUTCOME)
    if done.interrupted:
        sys.exit(INTERRUPTED)
    if (done.lost and (once or done.held)) or (done.held and not done.rows):
        sys.exit(LEFT_TO_OTHERS)


@contextmanager
def _stoppable() -> Iterator[Callable[[], bool]]:
    """The first Ctrl-C or SIGTERM asks to stop, the second one ends the process as it stands.

    A handler runs in the middle of whatever the main thread does, which may be printing, or holding the bar's lock: so it
    speaks to the file descriptors, and waits for nobody.
    """
    asked = 0

    def ask(*_: object) -> None:
        nonlocal asked
        asked += 1
        if asked > 1:
            if interactive():
                os.write(1, SHOW_CURSOR)
            os.write(
                2,
                b"auditexport: stopped at once; open batches are left to their lease, and the next drain finishes them\n",
            )
            # Threads may be in an INSERT that takes a minute: what the ledger says is enough to go on from.
            os._exit(INTERRUPTED)
        os.write(
            2, b"auditexport: stopping after the batch at hand; once more to stop at once, and leave it to its lease\n"
        )

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield lambda: asked > 0
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
        self._line(
            f"{self._backlog.shown_rows} rows pending, lag {format_duration(self._backlog.lag_s)}; draining as {self._owner}"
        )
        if others:
            self._line(f"{', '.join(others)} is at work as well: the ledger gives each batch to one of us")
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
        adopted = sum(1 for claim in claims if claim.adopted)
        rows = sum(claim.rows for claim in claims)
        taken = f"; {adopted} of them adopted from owners that are dead" if adopted else ""
        if claims and self._bar is None:
            self._line(f"claimed {len(claims)} batches, {rows:,} rows{taken}")
        elif claims:
            total = max(self._backlog.rows, self._rows + rows)
            self._bar.update(self._task, total=total, description="exporting")

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
            return
        self._line(
            f"exported batch {batch.batch_id}: {batch.marked_rows:,} rows, {batch.counts.dead:,} dead letters; "
            f"{self._rows:,} in all, {pace}"
        )

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        for batch_id, found in outcome.items():
            if found:
                self.trouble(f"batch {batch_id} is not in ClickHouse as it was sealed: {found}")

    def trouble(self, what: str) -> None:
        if self._bar is not None:
            self._bar.console.print(what, style="yellow")
        else:
            click.echo(f"auditexport: {what}", err=True)

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
        "discrepant": {str(batch_id): found for batch_id, found in done.discrepant.items()},
        "altered": {str(batch_id): why for batch_id, why in done.altered.items()},
        "unmarked": {str(batch_id): why for batch_id, why in done.unmarked.items()},
        "waiting": {str(batch_id): str(why) for batch_id, why in done.waiting.items()},
        "views_failed": {str(batch_id): note for batch_id, note in done.views.items()},
        "lost_batches": done.lost,
        "held_by_others_rows": sum(holder.rows for holder in done.held),
        "held_by": "; ".join(map(str, done.held)) or "nobody",
        "released_batches": done.released,
        "interrupted": done.interrupted,
        "backlog_rows": left.rows,
        "lag_s": round(left.lag_s, 1),
        "unknown_rows": left.unknown_rows,
        "unknown_versions": ", ".join(left.unknown_versions) or "none",
        "dead_letters_standing": left.dead_rows,
        "held_rows": left.held_rows,
        "open_batches": left.open_batches,
    }


def _say(done: Drained, left: Backlog, seconds: float) -> None:
    rate = done.rows / seconds if seconds else 0.0
    click.echo(
        f"exported {done.rows:,} rows in {done.batches:,} batches, {format_duration(seconds)}, {rate:,.0f} rows/s; "
        f"{done.dead_letters:,} dead letters; {len(done.verified) - len(done.discrepant):,} batches verified"
    )
    if left.held_rows:
        click.echo(
            f"{left.held_rows:,} rows are held because the ClickHouse table refuses them; auditexport status says why",
            err=True,
        )
    if done.interrupted:
        given = f"{len(done.released):,} batches were given back, " if done.released else ""
        click.echo(f"interrupted: {given}the next drain goes on from here")
    click.echo(
        f"{left.shown_rows} rows still pending, lag {format_duration(left.lag_s)}, {left.open_batches} open batches"
    )
    for batch_id, why in done.unmarked.items():
        click.echo(f"batch {batch_id} is in ClickHouse and not marked: {why}", err=True)
    if done.lost:
        click.echo(
            f"batches {', '.join(map(str, done.lost))} were taken over by another run, which exports them", err=True
        )
    if done.held:
        click.echo(held_line(done.held))
    if done.discrepant:
        click.echo("to do: `auditexport reconcile --repair`, then drain, then reconcile again", err=True)
