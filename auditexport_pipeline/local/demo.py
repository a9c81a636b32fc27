"""The demo: a hundred thousand events from MySQL to ClickHouse through Dagster, and proof of it.

The proof does not depend on the exporter: it compares the event ids in MySQL with those in ClickHouse, and reads neither the
ledger nor the fingerprints.
"""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import sqlalchemy as sa
from rich.console import Console
from rich.panel import Panel
from rich.progress import BarColumn, MofNCompleteColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from auditexport_pipeline.core.backlog import COUNT_TO, Backlog
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.generator import MALFORMED_KINDS, Seeded, seed_outbox
from auditexport_pipeline.local.stack import LocalStack

SEED = 20_260
UNKNOWN = 25
WRITERS = 4
BUSIEST = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What both databases hold after the drain, counted by event id."""

    seeded: Seeded
    expected: int
    stored: int
    duplicated: int
    missing: int
    unexpected: int
    unmarked: int
    dead_by_reason: dict[str, int]
    backlog: Backlog

    @property
    def dead(self) -> int:
        return sum(self.dead_by_reason.values())

    @property
    def adds_up(self) -> bool:
        return (
            self.expected == self.stored == self.seeded.events
            and self.duplicated == self.missing == self.unexpected == 0
            and self.dead == sum(self.seeded.malformed.values())
            and self.backlog.unknown_rows == self.seeded.unknown
            and self.unmarked == self.dead + self.seeded.unknown
        )


def run(directory: Path, events: int, *, as_json: bool = False) -> int:
    """Runs the demo on a fresh stack under `directory`; returns 0 only if every number adds up.

    With `as_json` the numbers are one JSON object on standard output, and the tables go to standard error.
    """
    console = Console(stderr=as_json)
    started = time.monotonic()
    console.print("[bold]auditexport demo[/bold]: a private MySQL and an embedded ClickHouse, on this machine only\n")
    with contextlib.ExitStack() as running:
        with console.status("starting both servers and creating the tables"):
            stack = running.enter_context(LocalStack(directory, fresh=True))
        ((version,),) = stack.log.client().query("SELECT version()").result_rows
        console.print(f"  {stack.mysql.family} {stack.mysql.version} · ClickHouse {version} · tables created")
        with _progress(console) as progress:
            malformed = len(MALFORMED_KINDS)
            task = progress.add_task(f"{WRITERS} writers fill the outbox", total=events + malformed + UNKNOWN)
            seeded = seed_outbox(
                stack.outbox.url,
                seed=SEED,
                events=events,
                malformed=malformed,
                unknown=UNKNOWN,
                writers=WRITERS,
                progress=lambda rows: progress.update(task, completed=rows),
            )
        draining = time.monotonic()
        log = stack.directory / "demo-run.log"
        if _drain(console, stack, log, events) != 0:
            shown = log.relative_to(Path.cwd()) if log.is_relative_to(Path.cwd()) else log
            console.print(f"[red]The Dagster run failed[/red]; its log is {shown}")
            return 1
        dagster_s = time.monotonic() - draining
        tally = _count(stack, seeded)
        rows_per_s, drain_s = stack.last_drain()
        console.print()
        numbers = _numbers(tally)
        how = f"the drain: {drain_s:.1f} s; with Dagster's start-up {dagster_s:.1f} s"
        numbers.add_row("rows per second", f"{rows_per_s:,.0f}", how)
        numbers.add_row("lag left", f"{tally.backlog.lag_s:.0f} s", f"{tally.backlog.rows} rows pending")
        verdict = (
            "[green]every event is in ClickHouse exactly once[/green]"
            if tally.adds_up
            else "[red]the numbers do not add up[/red]"
        )
        total_s = time.monotonic() - started
        console.print(Panel(numbers, title=verdict, subtitle=f"{total_s:.0f} s in all", expand=False))
        console.print(_busiest(stack))
        console.print("\nNext:  [bold]make dev[/bold]   the same stack with the Dagster UI and new events all the time")
        console.print("       [bold]make test[/bold]  the tests, against the same kind of servers\n")
        if as_json:
            values = {
                "adds_up": tally.adds_up,
                "rows": seeded.rows,
                "expected": tally.expected,
                "stored": tally.stored,
                "duplicated": tally.duplicated,
                "missing": tally.missing,
                "unexpected": tally.unexpected,
                "dead_letters_by_reason": tally.dead_by_reason,
                "unknown_rows": tally.backlog.unknown_rows,
                "backlog_rows": tally.backlog.rows,
                "rows_per_s": rows_per_s,
                "seconds": drain_s,
            }
            print(json.dumps(values))
        return 0 if tally.adds_up else 1


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _drain(console: Console, stack: LocalStack, log: Path, events: int) -> int:
    """Materializes the asset in a Dagster process of its own; returns its exit status."""
    arguments = ["asset", "materialize", "--select", "audit_logs_raw_v1", "-m", "auditexport_pipeline.definitions"]
    with log.open("wb") as output, _progress(console) as progress:
        task = progress.add_task("Dagster materializes the asset", total=events)
        dagster = subprocess.Popen(
            [sys.executable, "-m", "dagster", *arguments], env=stack.environment(), stdout=output, stderr=output
        )
        try:
            while dagster.poll() is None:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    dagster.wait(0.25)
                progress.update(task, completed=_exported_rows(stack))
        finally:
            dagster.terminate()
            dagster.wait()
    return dagster.returncode


def _exported_rows(stack: LocalStack) -> int:
    with stack.outbox.transaction("reading the ledger") as connection:
        rows = connection.execute(
            sa.text("SELECT SUM(row_count) FROM clickhouse_outbox_batch WHERE state IN ('exported', 'verified')")
        ).scalar()
    return int(rows or 0)


def _count(stack: LocalStack, seeded: Seeded) -> Tally:
    known = sa.text(
        "SELECT event_id FROM clickhouse_outbox WHERE version IN :versions AND pk NOT IN "
        "(SELECT pk FROM clickhouse_outbox_dead_letter)"
    ).bindparams(sa.bindparam("versions", list(VERSIONS), expanding=True))
    with stack.outbox.transaction("counting events") as connection:
        expected = set(connection.execute(known).scalars())
        pending = sa.text("SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NULL")
        unmarked = int(connection.execute(pending).scalar_one())
    entries = stack.log.client().query("SELECT event_id FROM audit_logs_raw_v1").result_rows
    stored = {event_id for (event_id,) in entries}
    return Tally(
        seeded=seeded,
        expected=len(expected),
        stored=len(entries),
        duplicated=len(entries) - len(stored),
        missing=len(expected - stored),
        unexpected=len(stored - expected),
        unmarked=unmarked,
        dead_by_reason=stack.outbox.dead_by_reason(),
        backlog=stack.outbox.backlog(tuple(VERSIONS), count_to=COUNT_TO),
    )


def _numbers(tally: Tally) -> Table:
    seeded, backlog = tally.seeded, tally.backlog
    origin = f"{WRITERS} writers, {len(seeded.workspace_ids)} workspaces, {seeded.late_transactions:,} late commits"
    unknown = f"{', '.join(backlog.unknown_versions)}: not touched, but counted"
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row("seeded", f"{seeded.rows:,}", origin)
    table.add_row("exported", f"{tally.stored:,}", "entries in audit_logs_raw_v1")
    table.add_row("dead letters", f"{tally.dead:,}", "malformed payloads, set aside; all other rows were exported")
    for reason, count in tally.dead_by_reason.items():
        table.add_row(f"  {reason}", f"{count:,}", "")
    table.add_row("unknown versions", f"{backlog.unknown_rows:,}", unknown)
    for name, count, how in (
        ("duplicates", tally.duplicated, "counted without FINAL"),
        ("missing", tally.missing + tally.unexpected, "event ids in MySQL compared with event ids in ClickHouse"),
    ):
        table.add_row(name, f"[{'red' if count else 'green'}]{count:,}[/]", how)
    return table


def _busiest(stack: LocalStack) -> Table:
    rows = stack.log.client().query(
        "SELECT workspace_id, count() AS events, uniqExact(event), (max(time) - min(time)) / 60000 "
        f"FROM audit_logs GROUP BY workspace_id ORDER BY events DESC LIMIT {BUSIEST}"
    )
    title = f"The {BUSIEST} busiest workspaces, read from the view audit_logs"
    table = Table("workspace", title=title, title_justify="left", box=None)
    for column in ("events", "kinds", "minutes"):
        table.add_column(column, justify="right")
    for workspace_id, events, kinds, minutes in rows.result_rows:
        table.add_row(workspace_id, f"{events:,}", str(kinds), f"{minutes:.0f}")
    return table
