"""`auditexport requeue`, `sweep`, `reconcile` and `erasures`: options, tables and JSON.

`core` does the work, the same way for these commands and for the Dagster jobs.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.pages import report_option, typed
from auditexport_pipeline.cli.shared import (
    TABLE_ROWS,
    Time,
    by,
    day,
    dry_run_option,
    json_option,
    moment,
    print_json,
    print_table,
    setting_options,
    table,
    who_option,
)
from auditexport_pipeline.cli.stores import audit_log, outbox, upkeep
from auditexport_pipeline.core.actions import Erasure, RowFilter
from auditexport_pipeline.core.excuses import TTL_UNKNOWN_TODO
from auditexport_pipeline.core.settings import Retention

if TYPE_CHECKING:
    from auditexport_pipeline.core.reconcile import Report


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
@click.option("--why", required=True, help="Why; it is kept with the action.")
@json_option
def requeue(missing_only: bool, dry_run: bool, who: str | None, why: str, as_json: bool, **conditions: Any) -> None:
    """Export rows again: the next drain sends them with their first `inserted_at`, and readers see each event once.

    A row must meet all conditions that are given. A TIME is 2026-11-23, 2026-11-23T04:00 (UTC) or epoch milliseconds. Safe
    while a drain runs. Exit status: 0 done, 2 the call or the setup is wrong.
    """
    from auditexport_pipeline.core.requeue import requeue

    done = requeue(
        outbox(),
        upkeep(),
        audit_log(),
        RowFilter(**conditions),
        by(who, why),
        missing_only=missing_only,
        dry_run=dry_run,
    )
    if as_json:
        print_json(
            {
                **done.counts,
                "by_batch": {str(batch_id): rows for batch_id, rows in done.by_batch.items()},
                "action_id": done.action_id,
                "dry_run": dry_run,
            }
        )
        return
    click.echo(f"{'would requeue' if dry_run else 'requeued'} {done.rows:,} rows of {len(done.by_batch)} batches")
    left = {
        "never exported by us": done.no_batch,
        "left alone, in a batch that is still open": done.open_rows,
        "left alone, past ClickHouse's TTL": done.expired_rows,
        "left alone, ClickHouse has them": done.present_rows,
        "left alone, of a version that no installed package registers": done.unknown_rows,
    }
    for what, rows in left.items():
        if rows:
            click.echo(f"  {rows:,} {what}")
    if done.by_batch:
        shown = table("batch", "rows")
        for batch_id, rows in list(done.by_batch.items())[:TABLE_ROWS]:
            shown.add_row(str(batch_id), f"{rows:,}")
        print_table(shown)
    if done.action_id:
        click.echo(f"recorded as action {done.action_id}; the next drain exports them")


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────


@main.command()
@setting_options(Retention)
@click.option(
    "--ttl-days",
    type=float,
    help="Where ClickHouse cannot evaluate the table's TTL: it keeps an entry this long. Recorded; counts until the TTL reads "
    "otherwise.",
)
@dry_run_option
@who_option
@json_option
def sweep(ttl_days: float | None, dry_run: bool, who: str | None, as_json: bool, **retention: Any) -> None:
    """Delete exported rows past retention, after a check that ClickHouse holds them. Safe to interrupt.

    Exit status: 0 swept, 1 a batch was left because ClickHouse no longer holds it, or because its TTL cannot be evaluated,
    2 the call or the setup is wrong.
    """
    from auditexport_pipeline.core.sweep import sweep

    wanted = Retention(**retention)
    whose = by(who, f"retention of {wanted.outbox_days:g} days")
    done = sweep(outbox(), upkeep(), audit_log(), wanted, whose, ttl_days=ttl_days, dry_run=dry_run)
    if as_json:
        print_json(
            {
                **done.counts,
                "discrepant": {str(batch_id): str(found) for batch_id, found in done.discrepant.items()},
                "ttl_unknown": {str(batch_id): str(found) for batch_id, found in done.ttl_unknown.items()},
                "stopped_early": done.stopped_early,
            }
        )
    else:
        click.echo(f"{'would sweep' if dry_run else 'swept'} {done.rows:,} rows of {len(done.by_batch)} batches")
        if done.held_back:
            click.echo(
                f"  {done.held_back} batches held back: not verified, or discrepant; see `auditexport reconcile`"
            )
        if done.stopped_early:
            click.echo("  max-rows was reached; sweep again for the rest")
        for batch_id, found in done.discrepant.items():
            click.echo(f"  batch {batch_id} was left: ClickHouse no longer holds it ({found})", err=True)
        for batch_id, found in done.ttl_unknown.items():
            click.echo(f"  batch {batch_id} was left: {found} in ClickHouse, and its TTL cannot be evaluated", err=True)
        if done.ttl_unknown:
            click.echo(f"  {TTL_UNKNOWN_TODO}", err=True)
    if done.discrepant or done.ttl_unknown:
        sys.exit(BAD_OUTCOME)


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
@click.option("--why", default="reconciliation", show_default=True, help="Kept with the repair.")
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
    from auditexport_pipeline.core.units import DAY_MS

    if report_path is not None:
        from auditexport_pipeline.report import page

        page.check_path(report_path)
    ledger = upkeep()
    now_ms = ledger.now_ms()
    report = reconcile(
        outbox(),
        ledger,
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

        figures = gather(outbox(), audit_log(), report.from_ms, report.to_ms)
        page.write(report_path, page.of_reconciliation(report, figures, typed(click.get_current_context())))
    if as_json:
        print_json({**_report_values(report), "report_path": str(report_path) if report_path else None})
    else:
        _show_report(report)
        if report_path is not None:
            click.echo(f"the page is {report_path}")
    if not report.clean:
        sys.exit(BAD_OUTCOME)


def _report_values(report: Report) -> dict[str, object]:
    return {
        "from_ms": report.from_ms,
        "to_ms": report.to_ms,
        **report.counts,
        "event_ids": list(report.found.event_ids),
        "explained": dict(report.explained),
        "batches_of_unknown_versions": dict(report.left_alone),
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
            {"workspace_id": workspace_id, "day": day(day_ms), **asdict(place)}
            for (workspace_id, day_ms), place in sorted(report.places.items())
        ],
    }


def _show_report(report: Report) -> None:
    click.echo(
        f"{moment(report.from_ms)} to {moment(report.to_ms)} UTC: {len(report.batches):,} batches, {report.slots:,} blocks "
        f"({report.slots_read:,} compared entry by entry)"
    )
    click.secho(
        "outbox and ClickHouse agree" if report.clean else f"they differ: {report.found}",
        fg="green" if report.clean else "red",
    )
    for what, count in report.explained.items():
        click.echo(f"  explained: {count:,} {what}")
    if report.ttl_unknown:
        click.echo(
            f"  {report.ttl_unknown:,} of the missing may be past the TTL, which cannot be evaluated. {TTL_UNKNOWN_TODO}"
        )
    if report.unrecorded:
        click.echo(f"  not recorded that it was looked: {report.unrecorded}", err=True)
    if report.open_batches:
        click.echo(f"  {report.open_batches} batches are not closed yet: the next drain sees to them")
    for version, batches in report.left_alone.items():
        click.echo(f"  not compared: {batches} batches of {version}, which no installed package registers", err=True)
    if report.found.event_ids:
        click.echo(f"  events: {', '.join(report.found.event_ids)}")
    wrong = [line for line in report.batches if line.found]
    if wrong:
        shown = table("batch", "sent", "in ClickHouse", "differs", left=("differs",))
        for line in wrong[:TABLE_ROWS]:
            shown.add_row(str(line.batch_id), f"{line.entries:,}", f"{line.stored:,}", str(line.found))
        print_table(shown)
    places = [(place, numbers) for place, numbers in sorted(report.places.items()) if numbers.wrong]
    if places:
        shown = table("workspace", "day", "rows", "entries", "missing", "duplicated", "unexpected", "altered")
        for (workspace_id, day_ms), numbers in places[:TABLE_ROWS]:
            counts = (
                numbers.rows,
                numbers.entries,
                numbers.missing,
                numbers.duplicated,
                numbers.unexpected,
                numbers.altered,
            )
            shown.add_row(workspace_id or "(swept)", day(day_ms), *(f"{count:,}" for count in counts))
        print_table(shown)
    if report.repaired and report.repaired.action_id is None:
        click.echo(f"would requeue {report.repaired.rows:,} rows; nothing was recorded or changed")
    elif report.repaired:
        click.echo(
            f"requeued {report.repaired.rows:,} rows, action {report.repaired.action_id}; run again after a drain"
        )
    elif report.found.missing:
        click.echo("to do: `auditexport reconcile --repair`, then a drain, then reconcile again")
    if report.found.altered:
        click.echo(
            "to do: find out who altered them; `auditexport requeue --event-id …` exports the outbox's version again"
        )


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
def add_erasure(
    workspace_id: str,
    event_ids: tuple[str, ...],
    from_ms: int | None,
    to_ms: int | None,
    who: str | None,
    why: str,
    as_json: bool,
) -> None:
    """Record an erasure: who, when, why and which events. This command erases nothing.

    A TIME is 2026-11-23, 2026-11-23T04:00 (UTC) or epoch milliseconds.

    Exit status: 0 recorded, 2 the call or the setup is wrong.
    """
    wanted = [
        Erasure(workspace_id=workspace_id, event_id=event_id, from_ms=from_ms, to_ms=to_ms)
        for event_id in event_ids or ("",)
    ]
    action_id = upkeep().add_erasures(by(who, why), wanted)
    if as_json:
        print_json({"erasures": len(wanted), "action_id": action_id})
        return
    click.echo(f"recorded {len(wanted)} erasures as action {action_id}")


@erasures.command("list")
@json_option
def list_erasures(as_json: bool) -> None:
    """Every recorded erasure, oldest first. Exit status: 0, or 2 when the setup is wrong."""
    found = upkeep().erasures()
    if as_json:
        print_json({"erasures": [{"at_ms": one.at_ms, **asdict(one.by), **asdict(one.erasure)} for one in found]})
        return
    columns = ("when", "workspace", "event", "event time", "who", "why")
    shown = table(*columns, left=columns)
    for one in found:
        ends = [moment(end) if end is not None else "" for end in (one.erasure.from_ms, one.erasure.to_ms)]
        span = " – ".join(ends) if any(ends) else "any"
        shown.add_row(
            moment(one.at_ms), one.erasure.workspace_id, one.erasure.event_id or "all", span, one.by.who, one.by.why
        )
    print_table(shown)
