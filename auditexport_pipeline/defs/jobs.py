"""The jobs of one outbox: the drain, the checks, and requeue, sweep, reconcile, dead letters and old runs.

Each op calls `core`, as the CLI does, and reports what came of it; `defs.config` has their configuration. Each job may run beside a
drain, and beside itself. Only the CLI discards dead letters, because it shows them first.
"""

import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import dagster as dg

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.errors import SetupIncomplete, VerificationFailed
from auditexport_pipeline.core.excuses import TTL_UNKNOWN_TODO
from auditexport_pipeline.core.format import batches, counted, for_outbox
from auditexport_pipeline.core.reconcile import Report, reconcile
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.retries import RETRIES
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import LastReconcile
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.defs.config import (
    Form,
    PurgeConfig,
    ReconcileConfig,
    RequeueConfig,
    RetryConfig,
    SweepConfig,
    checked,
)
from auditexport_pipeline.defs.dagster_internals import delete_events_file
from auditexport_pipeline.defs.drains import IMPLICIT_JOB
from auditexport_pipeline.defs.failures import dagster_errors
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import reconcile_metadata, requeue_metadata, sweep_metadata
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.preflight import SKEW_MS


def export_job(names: Names) -> Any:
    """The job that drains."""
    return dg.define_asset_job(
        names.job,
        # Checks read a day's batches; a drain verifies its own.
        selection=dg.AssetSelection.assets(names.asset).without_checks(),
        description="Drains the outbox into ClickHouse. Safe to launch at any time and as often as you like.",
        # From failure, Dagster would skip mapped steps that had not started and end green.
        tags={"dagster/retry_strategy": "ALL_STEPS", **names.drain_tags},
    )


def checks_job(names: Names) -> Any:
    """The job that executes every asset check, and does not drain."""
    return dg.define_asset_job(
        names.of("audit_log_checks"),
        selection=dg.AssetSelection.checks_for_assets(names.asset),
        description="Executes every check of the asset. A drain leaves them out, and after it Dagster calls them not evaluated.",
    )


def _by(context: dg.OpExecutionContext, who: str, why: str) -> Actor:
    return Actor(who=who or f"Dagster run {context.run_id[:8]} of {context.job_name}", why=why)


def _job(names: Names, name: str, op: dg.OpDefinition, form: type[Form], description: str) -> dg.JobDefinition:
    """The job of this name with this one op, which has its plain name in the run configuration."""
    node = checked(op, names.of(op.name), form).alias(op.name)

    @dg.job(name=names.of(name), description=description)
    def job() -> None:
        node()

    return job


def requeue_job(names: Names) -> dg.JobDefinition:
    """`requeue_events`."""

    @dg.op(
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.keys("mysql", "clickhouse"),
        description="Clears the marks of exported rows, so that the next drain exports them again under their first "
        "`inserted_at`. All conditions that are given hold together.",
    )
    def requeue_rows(context: dg.OpExecutionContext, config: RequeueConfig) -> None:
        with dagster_errors(context):
            done = requeue(
                names.outbox(context),
                names.maintenance(context),
                names.audit_log(context),
                config.rows(),
                _by(context, config.who, config.why),
                missing_only=config.missing_only,
                dry_run=config.dry_run,
            )
        context.log.info(
            f"{'would requeue' if config.dry_run else 'requeued'} {counted(done.rows, 'row')} of {batches(len(done.by_batch))}"
            + (f", action {done.action_id}" if done.action_id else "")
        )
        context.add_output_metadata(requeue_metadata(done))

    return _job(
        names,
        "requeue_events",
        requeue_rows,
        RequeueConfig,
        "Exports rows again on purpose: by event, workspace, time, pk or batch.",
    )


def sweep_job(names: Names) -> dg.JobDefinition:
    """`sweep_exported_rows`."""

    @dg.op(
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.keys("mysql", "clickhouse"),
        description="Deletes exported rows past retention, once ClickHouse is seen to hold them.",
    )
    def sweep_rows(context: dg.OpExecutionContext, config: SweepConfig) -> None:
        with dagster_errors(context):
            done = sweep(
                names.outbox(context),
                names.maintenance(context),
                names.audit_log(context),
                config,
                _by(context, config.who, f"retention of {config.outbox_days:g} days"),
                ttl_days=config.ttl_days,
                dry_run=config.dry_run,
            )
            context.add_output_metadata(sweep_metadata(done))
            context.log.info(
                f"{'would sweep' if config.dry_run else 'swept'} {counted(done.rows, 'row')} of {batches(len(done.by_batch))}; "
                f"{batches(done.held_back)} held back, {done.compacted} compacted"
            )
            # What an earlier attempt of this step found is not due any more.
            earlier = done.standing if context.retry_number else {}
            discrepant = earlier | {batch_id: str(found) for batch_id, found in done.discrepant.items()}
            if discrepant:
                raise VerificationFailed(
                    "batches past retention that ClickHouse no longer holds as it did were not swept: "
                    f"{_first_ten(discrepant)}. Run {names.of('reconcile_audit_logs')} with repair, then sweep again"
                )
            if done.ttl_unknown:
                raise VerificationFailed(
                    "batches past retention were not swept, because ClickHouse lacks entries of them and its TTL cannot be "
                    + for_outbox(f"evaluated: {_first_ten(done.ttl_unknown)}. {TTL_UNKNOWN_TODO}", names.name)
                )

    return _job(
        names,
        "sweep_exported_rows",
        sweep_rows,
        SweepConfig,
        "Retention: deletes exported and verified rows that are older than the window.",
    )


def _first_ten(found: Mapping[int, object]) -> str:
    return "; ".join(f"batch {batch_id}: {what}" for batch_id, what in list(found.items())[:10])


def _found_before(context: dg.OpExecutionContext, maintenance: MySQLMaintenance, who: str) -> str:
    """What earlier attempts of this step have recorded: after a repair the next one finds nothing."""
    if not context.retry_number:
        return ""
    began_ms = (context.instance.get_run_stats(context.run_id).start_time or 0) * 1000 - SKEW_MS
    found = []
    with suppress(SetupIncomplete):  # a user that may not read actions has recorded none
        for verb in ("repair", "reconcile"):
            for action in maintenance.last_actions(verb, RETRIES):
                if action.by.who != who or action.at_ms < began_ms:
                    continue
                if verb == "repair" and action.rows:
                    found.append(f"{counted(action.rows, 'row was', 'rows were')} requeued (action {action.action_id})")
                differing = LastReconcile.of(action).found if verb == "reconcile" else None
                if differing:
                    found.append(f"{differing} (action {action.action_id})")
    return "; ".join(found)


def reconcile_job(names: Names, targets: Targets) -> dg.JobDefinition:
    """`reconcile_audit_logs`. Its report compares the numbers with these targets."""

    @dg.op(
        out=dg.Out(dg.Nothing),
        required_resource_keys=names.keys("mysql", "clickhouse"),
        description="Compares outbox and ledger with ClickHouse: missing, duplicated, unexpected, altered.",
    )
    def reconcile_window(context: dg.OpExecutionContext, config: ReconcileConfig) -> None:
        with dagster_errors(context):
            by = _by(context, config.who, config.why)
            outbox, audit_log, maintenance = (
                names.outbox(context),
                names.audit_log(context),
                names.maintenance(context),
            )
            now_ms = maintenance.now_ms()
            report = reconcile(
                outbox,
                maintenance,
                audit_log,
                from_ms=config.from_ms if config.from_ms is not None else now_ms - int(config.days * DAY_MS),
                to_ms=config.to_ms if config.to_ms is not None else now_ms,
                by=by,
                repair=by if config.repair else None,
                others_write=config.others_write,
                dry_run=config.dry_run,
            )
            metadata = reconcile_metadata(report)
            if config.report_path:
                from auditexport_pipeline.report import page
                from auditexport_pipeline.report.figures import gather

                path = Path(config.report_path).resolve()
                figures = gather(outbox, audit_log, report.from_ms, report.to_ms, targets, names.name)
                made_by = f"Dagster run {context.run_id[:8]} of {context.job_name}"
                page.write(path, page.of_reconciliation(report, figures, made_by))
                metadata["page"] = dg.MetadataValue.path(path)
                context.log.info(f"the report is {path}")
            context.log_event(dg.AssetObservation(names.asset, metadata=metadata))
            context.add_output_metadata(metadata)
            context.log.info(
                f"reconciled {batches(len(report.batches))}, {counted(report.slots, 'block')}: {report.found}"
            )
            if report.unrecorded:
                context.log.warning(f"this reconciliation is not recorded: {report.unrecorded}")
            _raise_if_different(report, _found_before(context, maintenance, by.who))

    return _job(
        names,
        "reconcile_audit_logs",
        reconcile_window,
        ReconcileConfig,
        "Compares outbox and ledger with ClickHouse over a window; with `repair`, requeues what is missing.",
    )


def _raise_if_different(report: Report, earlier: str) -> None:
    if not report.clean:
        todo = "Missing: run again with repair. Altered: requeue those events. Duplicated: merges collapse them"
        if report.repaired and report.repaired.action_id:
            todo = f"{counted(report.repaired.rows, 'row was', 'rows were')} requeued; run again after the next drain"
        raise VerificationFailed(
            f"outbox and ClickHouse differ: {report.found}, events {', '.join(report.found.event_ids)}. {todo}"
        )
    if earlier:
        raise VerificationFailed(
            f"outbox and ClickHouse differed in an earlier attempt of this step: {earlier}. They agree now, or will "
            "after the next drain; run again then"
        )


def retry_job(names: Names) -> dg.JobDefinition:
    """`retry_dead_letters`."""

    @dg.op(
        required_resource_keys=names.keys("mysql"),
        description="Lets the rows of dead letters go back to pending; the next drain tries them again.",
    )
    def retry_letters(context: dg.OpExecutionContext, config: RetryConfig) -> None:
        with dagster_errors(context):
            which = config.letters()
            by = Actor(who=config.who or f"Dagster run {context.run_id}", why=config.why)
            outbox = names.outbox(context)
            if config.dry_run:
                letters, gone = dead_letters.count(outbox, which).letters, 0
                context.log.info(f"would be retried: {counted(letters, 'dead letter')}; nothing was changed")
            else:
                acted = dead_letters.retry(outbox, which, by)
                letters, gone = acted.changed, acted.gone
                context.log.info(f"retried: {counted(letters, 'dead letter')}; {gone:,} more are gone with their rows")
        context.add_output_metadata({"dead_letters": letters, "gone": gone, "dry_run": config.dry_run})

    return _job(
        names,
        "retry_dead_letters",
        retry_letters,
        RetryConfig,
        "Lets the rows of dead letters go back to pending, after their cause was fixed. Dry run by default.",
    )


_FINISHED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE, dg.DagsterRunStatus.CANCELED]
_PAGE_RUNS = 200


def purge_job(names: Names, jobs: list[str]) -> dg.JobDefinition:
    """`purge_old_runs`, of runs of these jobs, and of the implicit asset job with our asset."""

    @dg.op(
        out=dg.Out(dg.Nothing),
        description="Deletes old finished runs and their event logs from Dagster's storage. The asset's latest "
        "materialization stays, and so do the runs of other jobs.",
    )
    def purge_runs(context: dg.OpExecutionContext, config: PurgeConfig) -> None:
        instance = context.instance
        before_s = time.time() - config.run_days * 86_400
        latest = instance.get_latest_materialization_event(names.asset)
        keep = {context.run_id, *([latest.run_id] if latest is not None else [])}
        old = _old_runs(instance, names, [*jobs, names.of("purge_old_runs")], before_s, keep, config.max_runs + 1)
        if len(old) > config.max_runs:
            context.log.info("max_runs was reached; the rest waits for the next purge")
        purged = old[: config.max_runs]
        for run_id in purged if not config.dry_run else ():
            _delete(instance, run_id)
        context.log.info(
            f"{'would purge' if config.dry_run else 'purged'} {counted(len(purged), 'run')} created more than "
            f"{config.run_days:g} days ago"
        )
        context.add_output_metadata({"runs": len(purged), "dry_run": config.dry_run})

    return _job(
        names,
        "purge_old_runs",
        purge_runs,
        PurgeConfig,
        "Keeps Dagster's storage small: a run a minute leaves thirty million events a year.",
    )


def _old_runs(
    instance: dg.DagsterInstance, names: Names, jobs: list[str], before_s: float, keep: set[str], most: int
) -> list[str]:
    """Ids of at most `most` finished runs of ours that were created before, oldest first within a job."""
    before = datetime.fromtimestamp(before_s, tz=timezone.utc)
    old: list[str] = []
    for job in (*jobs, IMPLICIT_JOB):
        page: Sequence[dg.RunRecord] = ()
        while len(old) < most:
            page = instance.get_run_records(
                dg.RunsFilter(job_name=job, statuses=_FINISHED, created_before=before),
                limit=_PAGE_RUNS,
                ascending=True,
                cursor=page[-1].dagster_run.run_id if page else None,
            )
            runs = [record.dagster_run for record in page]
            ours = [run for run in runs if job != IMPLICIT_JOB or names.asset in (run.asset_selection or ())]
            old += [run.run_id for run in ours if run.run_id not in keep]
            if len(page) < _PAGE_RUNS:
                break
    return old[:most]


def _delete(instance: dg.DagsterInstance, run_id: str) -> None:
    """Deletes the run, its events and its captured output; on SQLite also the file of its events."""
    instance.delete_run(run_id)
    with suppress(NotImplementedError):  # a store that cannot delete has its own rules
        instance.compute_log_manager.delete_logs(prefix=[run_id, "compute_logs"])
    delete_events_file(instance, run_id)
