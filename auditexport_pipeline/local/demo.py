"""The demo: a hundred thousand events from MySQL to ClickHouse through Dagster, and proof of it.

What belongs here: the story a newcomer watches, and the count that decides its exit status. What does
not: the stack (`stack`), the events (`generator`), and exporting, which a Dagster run of its own does.

The proof is independent of the exporter: it compares the event ids in MySQL with those in ClickHouse,
and asks neither the ledger nor the fingerprints.
"""

from __future__ import annotations

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

from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.generator import Seeded, seed_outbox
from auditexport_pipeline.local.stack import LocalStack

SEED = 20_260
MALFORMED = 19  # one of each kind the generator knows
UNKNOWN = 25
WRITERS = 4
WORKSPACES_SHOWN = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Tally:
    """What both databases hold after the drain, counted by event id."""

    seeded: Seeded
    expected: int
    stored: int
    distinct: int
    missing: int
    unexpected: int
    unmarked: int
    dead_by_reason: dict[str, int]
    backlog: Backlog

    @property
    def duplicates(self) -> int:
        return self.stored - self.distinct

    @property
    def adds_up(self) -> bool:
        return (
            self.expected == self.stored == self.distinct == self.seeded.events
            and self.missing == self.unexpected == 0
            and sum(self.dead_by_reason.values()) == sum(self.seeded.malformed.values())
            and self.backlog.unknown_rows == self.seeded.unknown
            and self.unmarked == sum(self.seeded.malformed.values()) + self.seeded.unknown
        )


def run(directory: Path, events: int, *, as_json: bool = False) -> int:
    """Runs the demo on a fresh stack under `directory`; returns 0 only if every number adds up.

    With `as_json` the numbers are one JSON object on standard output, and the story goes to the standard error.
    """
    console = Console(stderr=as_json)
    started = time.monotonic()
    console.print("[bold]auditexport demo[/bold]: a private MySQL and an embedded ClickHouse, on this machine only\n")
    with console.status("starting both servers and creating the tables"):
        stack = LocalStack(directory, fresh=True)
        stack.__enter__()
    try:
        console.print(
            f"  {stack.mysql.family} {stack.mysql.version} · ClickHouse {_clickhouse_version(stack)} · tables created"
        )
        seeded = _seed(console, stack, events)
        seconds, status = _drain(console, stack, seeded)
        if status != 0:
            console.print(f"[red]The Dagster run failed[/red]; its log is {_shown(stack.directory / 'demo-run.log')}")
            return 1
        tally = _count(stack, seeded)
        _report(console, stack, tally, seconds, time.monotonic() - started)
        if as_json:
            print(json.dumps(_values(stack, tally)))
        return 0 if tally.adds_up else 1
    finally:
        stack.__exit__(None, None, None)


def _values(stack: LocalStack, tally: Tally) -> dict[str, object]:
    rows_per_s, drain_s = _run_numbers(stack)
    return {
        "adds_up": tally.adds_up,
        "rows": tally.seeded.rows,
        "expected": tally.expected,
        "stored": tally.stored,
        "duplicated": tally.duplicates,
        "missing": tally.missing,
        "unexpected": tally.unexpected,
        "dead_letters_by_reason": tally.dead_by_reason,
        "unknown_rows": tally.backlog.unknown_rows,
        "backlog_rows": tally.backlog.rows,
        "rows_per_s": rows_per_s,
        "seconds": drain_s,
    }


def _progress(console: Console) -> Progress:
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description:<34}"),
        BarColumn(bar_width=40),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        console=console,
    )


def _seed(console: Console, stack: LocalStack, events: int) -> Seeded:
    with _progress(console) as progress:
        task = progress.add_task(f"{WRITERS} writers fill the outbox", total=events + MALFORMED + UNKNOWN)
        return seed_outbox(
            stack.outbox.url,
            seed=SEED,
            events=events,
            malformed=MALFORMED,
            unknown=UNKNOWN,
            writers=WRITERS,
            progress=lambda rows: progress.update(task, completed=rows),
        )


def _drain(console: Console, stack: LocalStack, seeded: Seeded) -> tuple[float, int]:
    """Materializes the asset in a Dagster process of its own; returns its seconds and exit status."""
    started = time.monotonic()
    log = stack.directory / "demo-run.log"
    arguments = ["asset", "materialize", "--select", "audit_logs_raw_v1", "-m", "auditexport_pipeline.definitions"]
    with log.open("wb") as output, _progress(console) as progress:
        task = progress.add_task("Dagster materializes the asset", total=seeded.events)
        dagster = subprocess.Popen(
            [sys.executable, "-m", "dagster", *arguments], env=stack.environment(), stdout=output, stderr=output
        )
        try:
            while dagster.poll() is None:
                progress.update(task, completed=_exported_rows(stack))
                try:
                    dagster.wait(0.25)
                except subprocess.TimeoutExpired:
                    continue
            progress.update(task, completed=_exported_rows(stack))
        finally:
            if dagster.poll() is None:
                dagster.terminate()
                dagster.wait()
    return time.monotonic() - started, dagster.returncode


def _exported_rows(stack: LocalStack) -> int:
    with stack.outbox.transaction("looking at the ledger") as connection:
        rows = connection.execute(
            sa.text("SELECT SUM(row_count) FROM clickhouse_outbox_batch WHERE state IN ('exported', 'verified')")
        ).scalar()
    return int(rows or 0)


def _clickhouse_version(stack: LocalStack) -> str:
    ((version,),) = stack.log.client().query("SELECT version()").result_rows
    return str(version)


def _count(stack: LocalStack, seeded: Seeded) -> Tally:
    with stack.outbox.transaction("counting events") as connection:
        expected = {
            row.event_id
            for row in connection.execute(
                sa.text(
                    "SELECT event_id FROM clickhouse_outbox WHERE version IN :versions AND pk NOT IN "
                    "(SELECT pk FROM clickhouse_outbox_dead_letter)"
                ).bindparams(sa.bindparam("versions", list(VERSIONS), expanding=True))
            )
        }
        unmarked = connection.execute(
            sa.text("SELECT COUNT(*) FROM clickhouse_outbox WHERE deleted_at IS NULL")
        ).scalar_one()
    stored = [row[0] for row in stack.log.client().query("SELECT event_id FROM audit_logs_raw_v1").result_rows]
    distinct = set(stored)
    return Tally(
        seeded=seeded,
        expected=len(expected),
        stored=len(stored),
        distinct=len(distinct),
        missing=len(expected - distinct),
        unexpected=len(distinct - expected),
        unmarked=int(unmarked),
        dead_by_reason=stack.outbox.dead_by_reason(),
        backlog=stack.outbox.backlog(tuple(VERSIONS), count_to=1_000_000),
    )


def _run_numbers(stack: LocalStack) -> tuple[float, float]:
    """(rows per second, seconds) of the drain itself, as its materialization says."""
    import dagster as dg

    with dg.DagsterInstance.from_config(str(stack.dagster_home)) as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("audit_logs_raw_v1"))
        assert event is not None
        assert event.asset_materialization is not None
        metadata = event.asset_materialization.metadata
        return float(str(metadata["rows_per_s"].value)), float(str(metadata["seconds"].value))


def _report(console: Console, stack: LocalStack, tally: Tally, dagster_s: float, total_s: float) -> None:
    rows_per_s, drain_s = _run_numbers(stack)
    seeded = tally.seeded
    table = Table(show_header=False, box=None, padding=(0, 2))
    table.add_column(style="bold")
    table.add_column(justify="right")
    table.add_column(style="dim")
    table.add_row(
        "seeded",
        f"{seeded.rows:,}",
        f"{WRITERS} writers, {seeded.workspaces} workspaces, {seeded.late_transactions:,} late commits",
    )
    table.add_row("exported", f"{tally.stored:,}", "entries in audit_logs_raw_v1")
    table.add_row(
        "dead letters", f"{sum(tally.dead_by_reason.values()):,}", "malformed payloads, set aside; neighbours went on"
    )
    for reason, count in tally.dead_by_reason.items():
        table.add_row(f"  {reason}", f"{count:,}", "")
    table.add_row(
        "unknown versions",
        f"{tally.backlog.unknown_rows:,}",
        f"{', '.join(tally.backlog.unknown_versions)}: untouched, visible",
    )
    table.add_row("duplicates", _zero(tally.duplicates), "counted without FINAL")
    table.add_row(
        "missing", _zero(tally.missing + tally.unexpected), "event ids in MySQL against event ids in ClickHouse"
    )
    table.add_row(
        "rows per second",
        f"{rows_per_s:,.0f}",
        f"the drain: {drain_s:.1f} s; with Dagster's start-up {dagster_s:.1f} s",
    )
    table.add_row("lag left", f"{tally.backlog.lag_s:.0f} s", f"{tally.backlog.rows} rows pending")
    verdict = (
        "[green]every event is in ClickHouse exactly once[/green]"
        if tally.adds_up
        else "[red]the numbers do not add up[/red]"
    )
    console.print()
    console.print(Panel(table, title=verdict, subtitle=f"{total_s:.0f} s in all", expand=False))
    console.print(_busiest(stack))
    console.print("\nNext:  [bold]make dev[/bold]   the same stack with Dagster's page and a live trickle of events")
    console.print("       [bold]make test[/bold]  the tests, against the same kind of servers\n")


def _zero(count: int) -> str:
    return f"[green]{count}[/green]" if count == 0 else f"[red]{count:,}[/red]"


def _busiest(stack: LocalStack) -> Table:
    frame = stack.log.client().query_df(
        "SELECT workspace_id, count() AS events, uniqExact(event) AS kinds, (max(time) - min(time)) / 60000 AS minutes "
        f"FROM audit_logs GROUP BY workspace_id ORDER BY events DESC LIMIT {WORKSPACES_SHOWN}"
    )
    table = Table(
        title=f"The {WORKSPACES_SHOWN} busiest workspaces, read from the view audit_logs",
        title_justify="left",
        box=None,
    )
    table.add_column("workspace")
    table.add_column("events", justify="right")
    table.add_column("kinds", justify="right")
    table.add_column("minutes", justify="right")
    for row in frame.itertuples(index=False):
        table.add_row(str(row.workspace_id), f"{row.events:,}", str(row.kinds), f"{row.minutes:.0f}")
    return table


def _shown(path: Path) -> str:
    """A path as the reader would type it."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)
