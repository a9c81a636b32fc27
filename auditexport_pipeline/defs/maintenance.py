"""Upkeep as jobs: requeue, sweep, reconcile, and the schedules of the last two.

What belongs here: a launchpad form for each, and saying what came of it. What does not: the work, which `core`
does the same way for the prompt. Each may run beside a drain, and beside itself. Each function makes a definition for
the outbox of these `Names`; a form's wrong value is refused at the launch, by name.
"""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import dagster as dg

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.errors import InvalidConfig, SetupIncomplete, VerificationFailed
from auditexport_pipeline.core.excuses import TTL_UNKNOWN_TODO
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.retries import RETRIES
from auditexport_pipeline.core.status import LastReconcile
from auditexport_pipeline.core.sweep import Retention, sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.defs.config import checked
from auditexport_pipeline.defs.failures import told_to_dagster
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import reconcile_metadata, requeue_metadata, sweep_metadata
from auditexport_pipeline.mysql.status import targets
from auditexport_pipeline.preflight import SKEW_MS

_WHO = dg.Field(str, default_value="", description="Who wants this; empty: the run itself.")
_DRY_RUN = dg.Field(bool, default_value=False, description="Say what would be done, and change nothing.")
# A window of reconciliation beyond this is a mistake of units.
LONGEST_WINDOW_DAYS = 3_650


def by_of(context: dg.OpExecutionContext, why: str) -> Actor:
    """Who and why, by a launchpad's form with these two fields."""
    who = context.op_config["who"] or f"Dagster run {context.run_id[:8]} of {context.job_name}"
    return Actor(who=who, why=context.op_config.get("why") or why)


def _optional(kind: Any, meaning: str) -> dg.Field:
    return dg.Field(dg.Noneable(kind), default_value=None, description=meaning)


# ── requeue ──────────────────────────────────────────────────────────────────────────────────────

REQUEUE = {
    "event_ids": dg.Field([str], default_value=[], description="These events."),
    "workspace_id": _optional(str, "Of this workspace."),
    "from_event_ms": _optional(int, "Event time from, epoch milliseconds, inclusive."),
    "to_event_ms": _optional(int, "Event time to, exclusive."),
    "from_exported_ms": _optional(int, "Exported (`deleted_at`) from, epoch milliseconds, inclusive."),
    "to_exported_ms": _optional(int, "Exported to, exclusive."),
    "from_pk": _optional(int, "First pk of the outbox."),
    "to_pk": _optional(int, "Last pk of the outbox."),
    "batch_ids": dg.Field([int], default_value=[], description="Rows of these batches of the ledger."),
    "missing_only": dg.Field(bool, default_value=False, description="Only what ClickHouse lacks."),
    "dry_run": _DRY_RUN,
    "who": _WHO,
    "why": dg.Field(str, description="Why; it is kept with the action."),
}


def _rows_of(settings: Mapping[str, Any]) -> RowFilter:
    values = {name: settings[name] for name in RowFilter.__dataclass_fields__}
    conditions: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    wanted = RowFilter(**conditions)
    wanted.refuse_everything()
    return wanted


def _check_requeue(settings: Mapping[str, Any]) -> None:
    _rows_of(settings)
    Actor(who=settings["who"] or "the run", why=settings["why"])


def requeue_job(names: Names) -> dg.JobDefinition:
    """`requeue_events`."""

    @dg.op(
        config_schema=REQUEUE,
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.databases,
        description="Clears the marks of exported rows, so that the next drain exports them again under their first "
        "`inserted_at`. All conditions that are given hold together.",
    )
    def requeue_rows(context: dg.OpExecutionContext) -> None:
        settings = dict(context.op_config)
        mysql = names.mysql_of(context)
        with told_to_dagster(context):
            done = requeue(
                mysql.outbox(),
                mysql.upkeep(),
                names.clickhouse_of(context).audit_log(),
                _rows_of(settings),
                by_of(context, ""),
                missing_only=settings["missing_only"],
                dry_run=settings["dry_run"],
            )
        context.log.info(
            f"{'would requeue' if settings['dry_run'] else 'requeued'} {done.rows:,} rows of {len(done.by_batch)} batches"
            + (f", action {done.action_id}" if done.action_id else "")
        )
        context.add_output_metadata(requeue_metadata(done))

    form = checked(requeue_rows, names.of("requeue_rows"), REQUEUE, _check_requeue).alias("requeue_rows")

    @dg.job(
        name=names.of("requeue_events"),
        description="Exports rows again on purpose: by event, workspace, time, pk or batch.",
    )
    def requeue_events() -> None:
        form()

    return requeue_events


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────

_DEFAULTS = Retention()
SWEEP = {
    "outbox_days": dg.Field(
        float,
        default_value=_DEFAULTS.outbox_days,
        description="Exported rows stay this many days. From 0 to 3,650.",
    ),
    "ledger_days": dg.Field(
        float,
        default_value=_DEFAULTS.ledger_days,
        description="Batches keep their pks this many days; longer than ClickHouse's TTL. From 1 to 36,500.",
    ),
    "chunk_rows": dg.Field(
        int, default_value=_DEFAULTS.chunk_rows, description="Rows deleted by one transaction. From 1 to 50,000."
    ),
    "pause_s": dg.Field(
        float, default_value=_DEFAULTS.pause_s, description="Seconds between two of them. From 0 to 60."
    ),
    "max_rows": dg.Field(
        int, default_value=_DEFAULTS.max_rows, description="Rows of one sweep at most; the rest waits for the next."
    ),
    "ttl_days": _optional(
        float,
        "Where ClickHouse cannot evaluate the table's TTL: it keeps an entry this many days after `inserted_at`. Recorded; "
        "counts until the TTL reads otherwise.",
    ),
    "dry_run": _DRY_RUN,
    "who": _WHO,
}


def _retention_of(settings: Mapping[str, Any]) -> Retention:
    return Retention(**{name: settings[name] for name in Retention.__dataclass_fields__})


def sweep_job(names: Names) -> dg.JobDefinition:
    """`sweep_exported_rows`."""

    @dg.op(
        config_schema=SWEEP,
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.databases,
        description="Deletes exported rows past retention, once ClickHouse is seen to hold them.",
    )
    def sweep_rows(context: dg.OpExecutionContext) -> None:
        settings = dict(context.op_config)
        mysql = names.mysql_of(context)
        with told_to_dagster(context):
            retention = _retention_of(settings)
            done = sweep(
                mysql.outbox(),
                mysql.upkeep(),
                names.clickhouse_of(context).audit_log(),
                retention,
                by_of(context, f"retention of {retention.outbox_days:g} days"),
                ttl_days=settings["ttl_days"],
                dry_run=settings["dry_run"],
            )
            context.add_output_metadata(sweep_metadata(done))
            context.log.info(
                f"{'would sweep' if settings['dry_run'] else 'swept'} {done.rows:,} rows of {len(done.by_batch)} batches; "
                f"{done.held_back} batches held back, {done.compacted} compacted"
            )
            # An earlier attempt of this step may have found them: they are not due any more.
            standing = done.standing if context.retry_number else {}
            discrepant = standing | {batch_id: str(found) for batch_id, found in done.discrepant.items()}
            if done.ttl_unknown and not discrepant:
                raise VerificationFailed(
                    "batches past retention were not swept, because ClickHouse lacks entries of them and its TTL cannot be "
                    "evaluated: "
                    + "; ".join(f"batch {batch_id}: {found}" for batch_id, found in list(done.ttl_unknown.items())[:10])
                    + f". {TTL_UNKNOWN_TODO}"
                )
            if discrepant:
                raise VerificationFailed(
                    "batches past retention that ClickHouse no longer holds as it did were not swept: "
                    + "; ".join(f"batch {batch_id}: {found}" for batch_id, found in list(discrepant.items())[:10])
                    + f". Run {names.of('reconcile_audit_logs')} with repair, then sweep again"
                )

    form = checked(sweep_rows, names.of("sweep_rows"), SWEEP, _retention_of).alias("sweep_rows")

    @dg.job(
        name=names.of("sweep_exported_rows"),
        description="Retention: deletes exported and verified rows that are older than the window.",
    )
    def sweep_exported_rows() -> None:
        form()

    return sweep_exported_rows


# ── reconcile ────────────────────────────────────────────────────────────────────────────────────

RECONCILE = {
    "days": dg.Field(float, default_value=7.0, description="Exports of this many days up to now. Up to 3,650."),
    "from_ms": _optional(int, "Instead of `days`: first export from, epoch milliseconds, inclusive."),
    "to_ms": _optional(int, "First export to, exclusive; empty: up to now."),
    "others_write": dg.Field(
        bool,
        default_value=False,
        description="Somebody else fills audit_logs_raw_v1 as well: count and do not accuse.",
    ),
    "repair": dg.Field(bool, default_value=False, description="Requeue exactly what is missing."),
    "dry_run": dg.Field(bool, default_value=False, description="Record nothing of what is seen, and requeue nothing."),
    "report_path": _optional(
        str,
        "Also write the page for people to this file (.html), on the machine that runs the job; one page, replaced by the "
        "next run.",
    ),
    "who": _WHO,
    "why": dg.Field(str, default_value="reconciliation", description="Kept with the repair."),
}


def _check_window(settings: Mapping[str, Any]) -> None:
    first, last = settings["from_ms"], settings["to_ms"]
    if not 0 < settings["days"] <= LONGEST_WINDOW_DAYS:
        raise InvalidConfig(f"days is {settings['days']:g}; it must be above 0, and {LONGEST_WINDOW_DAYS:,} at most")
    if first is not None and last is not None and first >= last:
        raise InvalidConfig(f"from_ms is {first} and to_ms is {last}: the window is empty; swap them")
    if settings["report_path"]:
        from auditexport_pipeline.report import page  # only for who wants one: a run's start-up is part of its latency

        page.check_path(Path(settings["report_path"]))
    Actor(who=settings["who"] or "the run", why=settings["why"])


def _found_before(context: dg.OpExecutionContext, upkeep: Any, who: str) -> str:
    """What earlier attempts of this step have recorded: after a repair the next one finds nothing."""
    if not context.retry_number:
        return ""
    began_ms = (context.instance.get_run_stats(context.run_id).start_time or 0) * 1000 - SKEW_MS
    found = []
    with suppress(SetupIncomplete):  # who may not read actions has recorded none
        for verb in ("repair", "reconcile"):
            for action in upkeep.last_actions(verb, RETRIES):
                if action.by.who != who or action.at_ms < began_ms:
                    continue
                if verb == "repair" and action.rows:
                    found.append(f"{action.rows:,} rows were requeued (action {action.action_id})")
                differing = LastReconcile.of(action).found if verb == "reconcile" else None
                if differing:
                    found.append(f"{differing} (action {action.action_id})")
    return "; ".join(found)


def reconcile_job(names: Names, given_targets: Mapping[str, float] | None = None) -> dg.JobDefinition:
    """`reconcile_audit_logs`; its page holds the numbers against these targets, over those of the environment."""

    @dg.op(
        config_schema=RECONCILE,
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.databases,
        description="Compares outbox and ledger with ClickHouse: missing, duplicated, unexpected, altered.",
    )
    def reconcile_window(context: dg.OpExecutionContext) -> None:
        settings = dict(context.op_config)
        mysql = names.mysql_of(context)
        with told_to_dagster(context):
            upkeep = mysql.upkeep()
            now_ms = upkeep.now_ms()
            from_ms = settings["from_ms"]
            report = reconcile(
                mysql.outbox(),
                upkeep,
                names.clickhouse_of(context).audit_log(),
                from_ms=from_ms if from_ms is not None else now_ms - int(settings["days"] * DAY_MS),
                to_ms=settings["to_ms"] if settings["to_ms"] is not None else now_ms,
                by=by_of(context, "reconciliation"),
                repair=by_of(context, "reconciliation") if settings["repair"] else None,
                others_write=settings["others_write"],
                dry_run=settings["dry_run"],
            )
            metadata = reconcile_metadata(report)
            if settings["report_path"]:
                from auditexport_pipeline.report import page
                from auditexport_pipeline.report.figures import gather

                path = Path(settings["report_path"]).resolve()
                figures = gather(
                    mysql.outbox(),
                    names.clickhouse_of(context).audit_log(),
                    report.from_ms,
                    report.to_ms,
                    targets(given_targets),
                )
                made_by = f"Dagster run {context.run_id[:8]} of {context.job_name}"
                page.write(path, page.of_reconciliation(report, figures, made_by))
                metadata["page"] = dg.MetadataValue.path(path)
                context.log.info(f"the page is {path}")
            context.log_event(dg.AssetObservation(names.asset, metadata=metadata))
            context.add_output_metadata(metadata)
            context.log.info(f"reconciled {len(report.batches)} batches, {report.slots} blocks: {report.found}")
            if report.unrecorded:
                context.log.warning(f"that it was looked is not recorded: {report.unrecorded}")
            earlier = _found_before(context, upkeep, by_of(context, "reconciliation").who)
            if report.clean and earlier:
                raise VerificationFailed(
                    f"outbox and ClickHouse differed when an earlier attempt of this step looked: {earlier}. They agree now, or will "
                    "after the next drain; run again then"
                )
            if not report.clean:
                repaired = (
                    f"{report.repaired.rows:,} rows were requeued; run again after the next drain"
                    if report.repaired and report.repaired.action_id
                    else ""
                )
                raise VerificationFailed(
                    f"outbox and ClickHouse differ: {report.found}, events {', '.join(report.found.event_ids)}. "
                    + (
                        repaired
                        or "Missing: run again with repair. Altered: requeue those events. Duplicated: merges collapse them"
                    )
                )

    form = checked(reconcile_window, names.of("reconcile_window"), RECONCILE, _check_window).alias("reconcile_window")

    @dg.job(
        name=names.of("reconcile_audit_logs"),
        description="Holds outbox and ledger against ClickHouse over a window; with `repair`, requeues what is missing.",
    )
    def reconcile_audit_logs() -> None:
        form()

    return reconcile_audit_logs


def upkeep_schedules(names: Names, sweep: Any, reconcile: Any) -> list[dg.ScheduleDefinition]:
    """Once a day each, in the small hours; off until somebody turns them on."""
    return [
        dg.ScheduleDefinition(
            name=names.of("sweep_schedule"), job=sweep, cron_schedule="30 3 * * *", description="Retention, once a day."
        ),
        dg.ScheduleDefinition(
            name=names.of("reconcile_schedule"),
            job=reconcile,
            cron_schedule="30 4 * * *",
            description="The last seven days against ClickHouse, once a day.",
        ),
    ]
