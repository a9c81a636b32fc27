"""`auditexport requeue`, `sweep`, `reconcile` and `erasures`: options, tables and JSON.

`core` does the work, for these commands and for the Dagster jobs.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import main
from auditexport_pipeline.cli.shared import (
    TABLE_ROWS,
    Time,
    answer,
    by,
    dry_run_option,
    json_option,
    print_json,
    print_table,
    report_option,
    say,
    setting_options,
    table,
    typed,
    who_option,
)
from auditexport_pipeline.cli.stores import audit_log, chosen, maintenance, outbox
from auditexport_pipeline.core.actions import Erasure, RowFilter
from auditexport_pipeline.core.excuses import TTL_UNKNOWN_TODO
from auditexport_pipeline.core.format import batches, counted, format_time
from auditexport_pipeline.core.settings import Retention
from auditexport_pipeline.core.units import DAY_MS

if TYPE_CHECKING:
    from auditexport_pipeline.core.reconcile import Report
    from auditexport_pipeline.core.requeue import Requeue
    from auditexport_pipeline.core.sweep import Sweep

_KINDS = ("missing", "duplicated", "unexpected", "altered")


# ── requeue ──────────────────────────────────────────────────────────────────────────────────────


@main.command()
@click.option("--event-id", "event_ids", multiple=True, help="This event; may be repeated.")
@click.option("--workspace", "workspace_id", help="Of one workspace.")
@click.option("--from-event", "from_event_ms", type=Time(), help="Event time from, inclusive.")
@click.option("--to-event", "to_event_ms", type=Time(), help="Event time to, exclusive.")
@click.option("--from-exported", "from_exported_ms", type=Time(), help="Exported from, inclusive.")
@click.option("--to-exported", "to_exported_ms", type=Time(), help="Exported to, exclusive.")
@click.option("--from-pk", type=click.IntRange(min=0), help="First pk of the outbox.")
@click.option("--to-pk", type=click.IntRange(min=0), help="Last pk of the outbox.")
@click.option("--batch", "batch_ids", type=click.IntRange(min=1), multiple=True, help="Of this batch; may be repeated.")
@click.option("--missing-only", is_flag=True, help="Only what ClickHouse lacks.")
@dry_run_option
@who_option
@click.option("--why", required=True, help="Why; recorded with the action.")
@json_option
def requeue(missing_only: bool, dry_run: bool, who: str | None, why: str, as_json: bool, **conditions: Any) -> None:
    """Export rows again: the next drain sends them with their first `inserted_at`, and readers see each event once.

    A row must meet all conditions that are given. A TIME is 2026-11-23, 2026-11-23T04:00 (UTC) or epoch milliseconds. Safe
    while a drain runs. Exit status: 0 done, 2 the call or the setup is wrong.
    """
    from auditexport_pipeline.core.requeue import requeue

    rows, actor = RowFilter(**conditions), by(who, why)
    done = requeue(outbox(), maintenance(), audit_log(), rows, actor, missing_only=missing_only, dry_run=dry_run)
    answer(
        as_json,
        lambda: {**done.counts, "by_batch": done.by_batch, "action_id": done.action_id, "dry_run": dry_run},
        lambda: _print_requeue(done, dry_run=dry_run),
    )


def _print_requeue(done: Requeue, *, dry_run: bool) -> None:
    verb = "would requeue" if dry_run else "requeued"
    click.echo(f"{verb} {counted(done.rows, 'row')} of {batches(len(done.by_batch))}")
    for what, rows in {
        "never exported by us": done.no_batch,
        "left alone, in a batch that is still open": done.open_rows,
        "left alone, past ClickHouse's TTL": done.expired_rows,
        "left alone, ClickHouse has them": done.present_rows,
        "left alone, of a version that no installed package registers": done.unknown_rows,
    }.items():
        if rows:
            click.echo(f"  {rows:,} {what}")
    if done.by_batch:
        lines = [(str(batch_id), rows) for batch_id, rows in done.by_batch.items()]
        print_table(table(("batch", ">rows"), lines[:TABLE_ROWS]))
    if done.action_id:
        click.echo(f"recorded as action {done.action_id}; the next drain exports them")


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────


@main.command()
@setting_options(Retention)
@click.option(
    "--ttl-days",
    type=float,
    help="How long ClickHouse keeps an entry, if it cannot evaluate the table's TTL. Recorded; valid until the TTL clause "
    "changes.",
)
@dry_run_option
@who_option
@json_option
def sweep(ttl_days: float | None, dry_run: bool, who: str | None, as_json: bool, **settings: Any) -> None:
    """Delete exported rows past retention, after a check that ClickHouse holds them. Safe to interrupt.

    Exit status: 0 swept, 1 a batch was left because ClickHouse no longer holds it, or because its TTL cannot be evaluated,
    2 the call or the setup is wrong.
    """
    from auditexport_pipeline.core.sweep import sweep

    retention = Retention(**settings)
    actor = by(who, f"retention of {retention.outbox_days:g} days")
    done = sweep(outbox(), maintenance(), audit_log(), retention, actor, ttl_days=ttl_days, dry_run=dry_run)
    answer(
        as_json,
        lambda: {
            **done.counts,
            "discrepant": {batch_id: str(found) for batch_id, found in done.discrepant.items()},
            "ttl_unknown": {batch_id: str(found) for batch_id, found in done.ttl_unknown.items()},
            "stopped_early": done.stopped_early,
        },
        lambda: _print_sweep(done, dry_run=dry_run),
        bad=bool(done.discrepant or done.ttl_unknown),
    )


def _print_sweep(done: Sweep, *, dry_run: bool) -> None:
    verb = "would sweep" if dry_run else "swept"
    click.echo(f"{verb} {counted(done.rows, 'row')} of {batches(len(done.by_batch))}")
    if done.held_back:
        say(f"  {batches(done.held_back)} held back: not verified, or discrepant; see `auditexport reconcile`")
    if done.stopped_early:
        click.echo("  max-rows was reached; sweep again for the rest")
    for batch_id, found in done.discrepant.items():
        click.echo(f"  batch {batch_id} was left: ClickHouse no longer holds it ({found})", err=True)
    for batch_id, found in done.ttl_unknown.items():
        click.echo(f"  batch {batch_id} was left: {found} in ClickHouse, and its TTL cannot be evaluated", err=True)
    if done.ttl_unknown:
        say(f"  {TTL_UNKNOWN_TODO}", err=True)


# ── reconcile ────────────────────────────────────────────────────────────────────────────────────


@main.command()
@click.option("--days", type=float, default=7.0, show_default=True, help="Exports of this many days up to now.")
@click.option("--from", "from_ms", type=Time(), help="Instead of --days: first export from, inclusive.")
@click.option("--to", "to_ms", type=Time(), help="First export to, exclusive.  [default: now]")
@click.option(
    "--others-write", is_flag=True, help="Other writers fill the table too: count unknown entries, do not report them."
)
@click.option("--repair", is_flag=True, help="Requeue exactly what is missing.")
@click.option("--dry-run", is_flag=True, help="Do not record the result; with --repair, say what would be requeued.")
@who_option
@click.option("--why", default="reconciliation", show_default=True, help="Recorded with the repair.")
@report_option
@json_option
def reconcile(
    days: float,
    from_ms: int | None,
    to_ms: int | None,
    others_write: bool,
    repair: bool,
    dry_run: bool,
    who: str | None,
    why: str,
    report_path: Path | None,
    as_json: bool,
) -> None:
    """Compare outbox and ledger with ClickHouse: missing, duplicated, unexpected, altered. --report writes a page too.

    A TIME is 2026-11-23, 2026-11-23T04:00 (UTC) or epoch milliseconds.

    Exit status: 0 they agree, 1 they differ, also after a repair (run again after the next drain), 2 the call or the
    setup is wrong.
    """
    from auditexport_pipeline.core.reconcile import reconcile

    if report_path is not None:
        from auditexport_pipeline.report import page

        page.check_path(report_path)
    store = maintenance()
    now_ms = store.now_ms()
    report = reconcile(
        outbox(),
        store,
        audit_log(),
        from_ms=from_ms if from_ms is not None else now_ms - int(days * DAY_MS),
        to_ms=to_ms if to_ms is not None else now_ms,
        by=None if dry_run else by(who, why),
        repair=by(who, why) if repair else None,
        others_write=others_write,
        dry_run=dry_run,
    )
    if report_path is not None:
        from auditexport_pipeline.report.figures import gather

        at = chosen()
        figures = gather(at.outbox(), at.audit_log(), report.from_ms, report.to_ms, at.targets(), at.name)
        page.write(report_path, page.of_reconciliation(report, figures, typed(click.get_current_context())))

    def show() -> None:
        _print_report(report)
        if report_path is not None:
            click.echo(f"the page is {report_path}")

    answer(
        as_json,
        lambda: {**_report_values(report), "report_path": str(report_path) if report_path else None},
        show,
        bad=not report.clean,
    )


def _report_values(report: Report) -> dict[str, object]:
    return {
        "from_ms": report.from_ms,
        "to_ms": report.to_ms,
        **report.counts,
        "event_ids": report.found.event_ids,
        "explained": report.explained,
        "batches_of_unknown_versions": report.left_alone,
        "unrecorded": report.unrecorded,
        "batches": [
            {
                "batch_id": line.batch_id,
                "entries": line.entries,
                "stored": line.stored,
                "swept": line.swept,
                "found": str(line.found),
                "explained": line.explained,
            }
            for line in report.batches
        ],
        "places": [
            {"workspace_id": workspace_id, "day": format_time(day_ms, "%Y-%m-%d"), **asdict(place)}
            for (workspace_id, day_ms), place in sorted(report.places.items())
        ],
    }


def _print_report(report: Report) -> None:
    click.echo(
        f"{format_time(report.from_ms)} to {format_time(report.to_ms)} UTC: {batches(len(report.batches))}, "
        f"{counted(report.slots, 'block')} ({report.slots_read:,} compared entry by entry)"
    )
    click.secho(
        "outbox and ClickHouse agree" if report.clean else f"they differ: {report.found}",
        fg="green" if report.clean else "red",
    )
    for what, count in report.explained.items():
        click.echo(f"  explained: {count:,} {what}")
    if report.ttl_unknown:
        say(
            f"  {report.ttl_unknown:,} of the missing may be past the TTL, which cannot be evaluated. {TTL_UNKNOWN_TODO}"
        )
    if report.unrecorded:
        click.echo(f"  this reconciliation is not recorded: {report.unrecorded}", err=True)
    if report.open_batches:
        open_batches = counted(report.open_batches, "batch is", "batches are")
        click.echo(f"  {open_batches} not closed yet: the next drain finishes them")
    for version, left in report.left_alone.items():
        click.echo(f"  not compared: {batches(left)} of {version}, which no installed package registers", err=True)
    if report.found.event_ids:
        click.echo(f"  events: {', '.join(report.found.event_ids)}")
    wrong = [(str(line.batch_id), line.entries, line.stored, line.found) for line in report.batches if line.found]
    if wrong:
        print_table(table(("batch", ">sent", ">in ClickHouse", "differs"), wrong[:TABLE_ROWS]))
    places = [
        (
            workspace_id or "(swept)",
            format_time(day_ms, "%Y-%m-%d"),
            place.rows,
            place.entries,
            *(getattr(place, kind) for kind in _KINDS),
        )
        for (workspace_id, day_ms), place in sorted(report.places.items())
        if place.wrong
    ]
    if places:
        columns = ("workspace", ">day", ">rows", ">entries", *(f">{kind}" for kind in _KINDS))
        print_table(table(columns, places[:TABLE_ROWS]))
    if report.repaired and report.repaired.action_id is None:
        click.echo(f"would requeue {counted(report.repaired.rows, 'row')}; nothing was recorded or changed")
    elif report.repaired:
        rows = counted(report.repaired.rows, "row")
        click.echo(f"requeued {rows}, action {report.repaired.action_id}; run again after a drain")
    elif report.found.missing:
        say("to do: `auditexport reconcile --repair`, then a drain, then reconcile again")
    if report.found.altered:
        say("to do: find out who altered them; `auditexport requeue --event-id …` exports the outbox's version again")


# ── erasures ─────────────────────────────────────────────────────────────────────────────────────


@main.group()
def erasures() -> None:
    """Record deliberate erasures from ClickHouse, so that a reconciliation does not report a loss."""


@erasures.command("add")
@click.option("--workspace", "workspace_id", required=True, help="Whose events.")
@click.option(
    "--event-id", "event_ids", multiple=True, help="These events; without, all of the workspace in the range."
)
@click.option("--from-event", "from_ms", type=Time(), help="Event time from, inclusive.")
@click.option("--to-event", "to_ms", type=Time(), help="Event time to, exclusive.")
@who_option
@click.option("--why", required=True, help="Such as the request's number.")
@json_option
def add_erasure(event_ids: tuple[str, ...], who: str | None, why: str, as_json: bool, **scope: Any) -> None:
    """Record an erasure: who, when, why and which events. This command erases nothing.

    A TIME is 2026-11-23, 2026-11-23T04:00 (UTC) or epoch milliseconds.

    Exit status: 0 recorded, 2 the call or the setup is wrong.
    """
    added = [Erasure(event_id=event_id, **scope) for event_id in event_ids or ("",)]
    action_id = maintenance().add_erasures(by(who, why), added)
    answer(
        as_json,
        lambda: {"erasures": len(added), "action_id": action_id},
        lambda: click.echo(f"recorded {counted(len(added), 'erasure')} as action {action_id}"),
    )


@erasures.command("list")
@json_option
def list_erasures(as_json: bool) -> None:
    """Every recorded erasure, oldest first. Exit status: 0, or 2 when the setup is wrong."""
    found = maintenance().erasures()
    if as_json:
        print_json({"erasures": [{"at_ms": one.at_ms, **asdict(one.by), **asdict(one.erasure)} for one in found]})
        return
    lines = []
    for one in found:
        erased = one.erasure
        ends = [format_time(end) if end is not None else "" for end in (erased.from_ms, erased.to_ms)]
        times = " – ".join(ends) if any(ends) else "any"
        at = format_time(one.at_ms)
        lines.append((at, erased.workspace_id, erased.event_id or "all", times, one.by.who, one.by.why))
    print_table(table(("when", "workspace", "event", "event time", "who", "why"), lines))
