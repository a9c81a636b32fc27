"""The asset of one outbox: a graph of five ops. Each op calls one verb of `core.export` and reports what came of it.

    plan_batches ─▶ map( fetch_batch ─▶ write_clickhouse ─▶ mark_exported ) ─▶ finish_export

Three things about Dagster shape this graph:

* A crashed run that is retried from failure skips mapped steps that had not started, and ends green. So the plan is idempotent,
  the jobs retry all steps, and `finish_export` counts the batches.
* "Materialize" in the Dagster UI runs the implicit asset job, to which the tags of our job do not apply. So what must always hold is
  on the ops.
* Steps run breadth-first: Dagster would fetch every batch before the first is written. So steps have a priority.

In one process `core.pipeline` prefetches: while the step of one batch runs, threads fetch, write and mark the next batches, and the
steps of those only take the results. So the time of a step in the Dagster UI is not the time of its work. Each step reports in its log
line and its output's metadata how long its verb took (`fetch_s`, `write_s`, `mark_s`), and how long before the step the verb had
started (`…_ahead_s`; 0 when the step did the work).

Ops of several outboxes in one code location have different names, so functions make them. Inside the asset the nodes have the names
of the contract: configuration and steps read the same for each outbox.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import dagster as dg

from auditexport_pipeline import processes
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.backlog import COUNT_TO
from auditexport_pipeline.core.batch import Claim, Postponed, State, unmarked
from auditexport_pipeline.core.drain import Drain, Listener
from auditexport_pipeline.core.errors import AuditExportError, BatchUnmarked, IncompleteRun, VerificationFailed
from auditexport_pipeline.core.format import batches, counted, for_outbox
from auditexport_pipeline.core.lease import RENEWALS_PER_LEASE
from auditexport_pipeline.core.outcome import Outcome, outcome_of
from auditexport_pipeline.core.pipeline import VERBS, Pipeline
from auditexport_pipeline.core.ports import Discrepancy, Moment
from auditexport_pipeline.core.runtime import CLAIMING_SHARE, most_rows
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.verify import verify_recent
from auditexport_pipeline.defs.config import DrainConfig, drain_config
from auditexport_pipeline.defs.drains import drain_in, finished_runs, left_s, refuse_if_ended, say_alive, time_for
from auditexport_pipeline.defs.executors import limits_of, process_of, tags_of_step
from auditexport_pipeline.defs.failures import dagster_errors
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import batch_metadata, format_prefetch, run_metadata, timing_metadata
from auditexport_pipeline.defs.resources import HeartbeatResource
from auditexport_pipeline.mysql.dead_letters import release_held
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.preflight import refuse_unless_ready

# How often a run that stays sends its heartbeat, and checks whether another run waits for it to leave.
HEARTBEAT_EVERY_S = 60.0
LOOK_FOR_OTHERS_EVERY_S = 2.0


def export_asset(names: Names, freshness: dg.FreshnessPolicy, **attributes: Any) -> dg.AssetsDefinition:
    """The asset of one outbox: a graph of the five ops. `attributes` are `graph_asset`'s: group, owners, metadata, …"""
    plan = _plan_batches(names).alias("plan_batches")
    fetch = _fetch_batch(names).alias("fetch_batch")
    write = _write_clickhouse(names).alias("write_clickhouse")
    mark = _mark_exported(names).alias("mark_exported")
    finish = _finish_export(names).alias("finish_export")

    @dg.graph(name=names.of("export_batch"))
    def export_batch(claim: Claim) -> Any:
        return mark(write(fetch(claim)))

    @dg.graph_asset(
        key=names.asset,
        config=drain_config,
        ins={"clickhouse_outbox": dg.AssetIn(key=names.outbox_asset, dagster_type=dg.Nothing)},
        **attributes,
    )
    def audit_logs_raw_v1(clickhouse_outbox: Any) -> Any:
        claims, planned = plan(clickhouse_outbox)
        return finish(claims.map(export_batch.alias("export_batch")).collect(), planned)

    # `graph_asset` takes no freshness policy.
    (fresh,) = dg.map_asset_specs(lambda spec: spec.replace_attributes(freshness_policy=freshness), [audit_logs_raw_v1])
    return fresh


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """What `plan_batches` promises to `finish_export`."""

    batches: int
    started_at_s: float
    since: Moment


@dataclass(frozen=True, slots=True, kw_only=True)
class _Step:
    """What a step works with."""

    outbox: MySQLOutbox
    audit_log: ClickHouseAuditLog
    pipeline: Pipeline
    heartbeat: HeartbeatResource
    limits: Limits


@contextmanager
def _step(names: Names, context: dg.OpExecutionContext, config: DrainConfig) -> Iterator[_Step]:
    """Opens the stores; an error of ours fails the step with one line, and sends the heartbeat's /fail."""
    heartbeat = names.resource(context, "heartbeat")
    with dagster_errors(context, heartbeat):
        yield _Step(
            outbox=names.outbox(context),
            audit_log=names.audit_log(context),
            pipeline=names.resource(context, "pipeline"),
            heartbeat=heartbeat,
            limits=limits_of(context, config),
        )


def _has_time(context: dg.OpExecutionContext, step: _Step, claim: Claim) -> bool:
    """Whether this run can finish the batch before `max_runtime_seconds` ends it. What has begun is finished."""
    return step.pipeline.has_begun(claim) or time_for(context, step.limits)(claim)


def _owner(context: dg.OpExecutionContext) -> str:
    """The root run: a retry of a run inherits what the run it retries had claimed."""
    return context.run.root_run_id or context.run_id


def _op(names: Names, name: str, level: int) -> dict[str, Any]:
    """What each op has: the name, a queue and priority for its steps, and the resources of a drain."""
    return {
        "name": names.of(name),
        "tags": tags_of_step(level, names.celery_queue),
        "required_resource_keys": names.keys("mysql", "clickhouse", "heartbeat", "pipeline"),
    }


def _plan_batches(names: Names) -> dg.OpDefinition:
    @dg.op(
        # Several outboxes may share a queue of Celery's: the plan goes first, so that a drain that is due is planned at once.
        **_op(names, "plan_batches", 4),
        out={
            "claims": dg.DynamicOut(Claim, description="One claimed batch each: ids and counts, no rows."),
            "planned": dg.Out(Planned),
        },
        ins={"clickhouse_outbox": dg.In(dg.Nothing)},
        pool=names.job,
        description="Adopts batches that dead runs left open, then claims pending rows, oldest first.",
    )
    def plan_batches(context: dg.OpExecutionContext, config: DrainConfig) -> Iterator[Any]:
        started_at_s = time.time()
        with dagster_errors(context):  # without the heartbeat, which belongs to the run that lives
            refuse_if_ended(context)
        say_alive(context.instance, context.run_id, process_of(context))
        if context.retry_number == 0:
            names.resource(context, "heartbeat").start()
        with _step(names, context, config) as step:
            outbox, audit_log, limits = step.outbox, step.audit_log, step.limits
            refuse_unless_ready(outbox, audit_log)
            release_held(outbox, audit_log.definition)
            owners = claiming.open_owners(outbox)
            since = outbox.moment()
            left = left_s(context, CLAIMING_SHARE)
            claims = claiming.claim(
                outbox,
                owner=_owner(context),
                # Dagster may take a run for started whose process was killed while nothing monitored it.
                dead_owners=finished_runs(context.instance, owners) | processes.dead(owners),
                limits=limits,
                left_alone=context.log.warning,
                process=process_of(context),
                max_rows=None if left is None else most_rows(limits, left),
            )
        if left is not None and left <= 0:
            context.log.warning("max_runtime_seconds leaves this run no time to export: it claimed nothing. Raise it")
        claimed_s = time.monotonic()
        step.pipeline.plan(claims, time_for(context, limits))
        adopted = sum(claim.adopted for claim in claims)
        context.log.info(
            f"claimed {batches(len(claims))}, {counted(sum(claim.rows for claim in claims), 'row')}"
            + (f"; {adopted} of them adopted from runs that ended before they were done" if adopted else "")
        )
        for claim in claims:
            yield dg.DynamicOutput(claim, mapping_key=f"batch_{claim.batch_id}", output_name="claims")
            if time.monotonic() - claimed_s > limits.lease_s / RENEWALS_PER_LEASE:  # Dagster stores each of a thousand
                claimed_s = time.monotonic()
                with suppress(AuditExportError):  # the steps meet it too
                    outbox.renew(claim, limits.lease_s)
        planned = Planned(batches=len(claims), started_at_s=started_at_s, since=since)
        yield dg.Output(planned, output_name="planned")

    return plan_batches


def _fetch_batch(names: Names) -> dg.OpDefinition:
    @dg.op(
        **_op(names, "fetch_batch", 0),
        description="Reads one batch by pk, decodes and validates it, sets undecodable rows aside, and seals it.",
    )
    def fetch_batch(context: dg.OpExecutionContext, config: DrainConfig, claim: Claim) -> dg.Output[Claim]:
        with _step(names, context, config) as step:
            if not _has_time(context, step, claim):
                context.log.info(f"batch {claim.batch_id} waits for the next run: this one has no time left for it")
                return dg.Output(claim, metadata={"rows": 0, "dead_letters": 0, "prefetched": False})
            fetched = step.pipeline.fetch(step.outbox, step.audit_log, claim, step.limits)
        timing = step.pipeline.timing("fetch", claim.batch_id)
        context.log.info(
            f"fetched batch {claim.batch_id}: {fetched.rows:,} of {claim.rows:,} rows sealed, "
            f"{counted(fetched.dead, 'dead letter')}, {fetched.seconds:.2f} s{format_prefetch(timing)}"
        )
        metadata = {
            "rows": fetched.rows,
            "dead_letters": fetched.dead,
            "prefetched": timing is not None and timing.ahead_s > 0,
            **timing_metadata({"fetch": timing}),
        }
        return dg.Output(claim, metadata=metadata)

    return fetch_batch


def _write_clickhouse(names: Names) -> dg.OpDefinition:
    @dg.op(
        **_op(names, "write_clickhouse", 1),
        description="Puts the sealed batch into ClickHouse: one INSERT and one deduplication token per block.",
    )
    def write_clickhouse(context: dg.OpExecutionContext, config: DrainConfig, claim: Claim) -> dg.Output[Any]:
        with _step(names, context, config) as step:
            if not _has_time(context, step, claim):
                return dg.Output(Postponed(claim=claim), metadata={"entries": 0, "blocks": 0, "bytes": 0})
            receipt = step.pipeline.write(step.outbox, step.audit_log, claim, step.limits)
        timing = step.pipeline.timing("write", claim.batch_id)
        context.log.info(
            f"wrote batch {claim.batch_id}: {counted(receipt.entries, 'entry', 'entries')} in "
            f"{counted(receipt.blocks, 'block')}, {receipt.bytes:,} bytes, {receipt.seconds:.2f} s"
            + (f"; {counted(receipt.found, 'block was', 'blocks were')} there already" if receipt.found else "")
            + format_prefetch(timing)
        )
        if receipt.note:
            context.log.warning(f"batch {claim.batch_id} is stored, but {receipt.note}")
        written = {"entries": receipt.entries, "blocks": receipt.blocks, "bytes": receipt.bytes}
        return dg.Output(receipt, metadata={**written, **timing_metadata({"write": timing})})

    return write_clickhouse


def _mark_exported(names: Names) -> dg.OpDefinition:
    @dg.op(
        **_op(names, "mark_exported", 2),
        description="Stamps the batch's rows exported in the outbox; takes the receipt that only a write makes.",
    )
    def mark_exported(context: dg.OpExecutionContext, config: DrainConfig, receipt: Any) -> dg.Output[int]:
        if isinstance(receipt, Postponed):
            return dg.Output(receipt.claim.batch_id, metadata={"rows": 0})
        with _step(names, context, config) as step:
            batch = step.pipeline.mark(step.outbox, step.audit_log, receipt, step.limits)
        if batch.left is not None:
            context.log.warning(f"batch {batch.batch_id} is in ClickHouse and not marked: {batch.last_error}")
            return dg.Output(batch.batch_id, metadata={"rows": 0})
        timings = {verb: step.pipeline.timing(verb, batch.batch_id) for verb in VERBS}
        timing = timings["mark"]
        counts = batch.counts
        others = {
            "deleted by others": counts.vanished,
            "marked by others": counts.elsewhere,
            "given back": counts.released,
        }
        context.log.info(
            f"marked batch {batch.batch_id}: {counted(batch.marked_rows, 'row')}"
            + (f", {timing.seconds:.2f} s" if timing else "")
            + "".join(f"; {count:,} {what}" for what, count in others.items() if count)
            + format_prefetch(timing)
        )
        observation = dg.AssetObservation(
            names.asset,
            description=f"batch {batch.batch_id}, exported",
            metadata=batch_metadata(batch, write_s=receipt.seconds, timings=timings, outbox=names.name),
        )
        context.log_event(observation)
        return dg.Output(batch.batch_id, metadata={"rows": batch.marked_rows, **timing_metadata({"mark": timing})})

    return mark_exported


def _finish_export(names: Names) -> dg.OpDefinition:
    @dg.op(
        **_op(names, "finish_export", 3),
        out=dg.Out(dg.Nothing),
        description="Counts that every planned batch arrived, verifies them in ClickHouse, and reports.",
    )
    def finish_export(
        context: dg.OpExecutionContext, config: DrainConfig, batch_ids: list[int], planned: Planned
    ) -> None:
        with _step(names, context, config) as step:
            outbox, limits = step.outbox, step.limits
            if len(batch_ids) != planned.batches:
                raise IncompleteRun(
                    f"{planned.batches} batches were planned and {len(batch_ids)} arrived: steps were skipped, as a retry "
                    "from failure does. Nothing is lost: launch a new run, which adopts the others"
                )
            verified = verify_recent(outbox, step.audit_log, len(batch_ids), upkeep=names.maintenance(context))
            if limits.linger_s and not any(verified.values()) and not unmarked(outbox.batches(batch_ids)):
                verified |= _stay(context, names, step, planned.started_at_s, batch_ids)
            done = outcome_of(outbox, _owner(context), batch_ids, planned.since, verified)
            backlog = outbox.backlog(limits.versions, count_to=COUNT_TO)
            leased = claiming.leased_by_others(outbox, _owner(context))
            seconds = time.time() - planned.started_at_s
            context.add_output_metadata(
                run_metadata(done.batches, done.verified, backlog, outbox.dead_by_reason(), seconds, leased)
            )
            _raise_if_wrong(done, names.name)
        waiting = sum(batch.state is not State.WRITTEN for batch in done.left)
        context.log.info(
            f"verified {batches(len(done.verified))}; {backlog}"
            + (
                f"; {counted(waiting, 'batch waits', 'batches wait')} for the next run, for lack of time"
                if waiting
                else ""
            )
            + (f"; {claiming.leased_line(leased)}" if leased else "")
        )
        step.heartbeat.success()

    return finish_export


def _stay(
    context: dg.OpExecutionContext, names: Names, step: _Step, started_at_s: float, exported: Sequence[int]
) -> dict[int, Discrepancy]:
    """Exports what arrives until `linger_s` after the run's start, or until another drain waits in the queue. Returns what
    verification found.
    """
    limits = step.limits
    pinged_s = looked_s = time.monotonic()
    context.log.info(f"staying until {limits.linger_s} s after the start, looking every {limits.linger_poll_ms} ms")
    left = left_s(context, CLAIMING_SHARE)
    until_s = None if left is None else time.monotonic() + left

    def max_rows() -> int | None:
        return None if until_s is None else most_rows(limits, until_s - time.monotonic())

    def stays() -> bool:
        nonlocal pinged_s, looked_s
        if time.monotonic() - pinged_s >= HEARTBEAT_EVERY_S:
            step.heartbeat.success()
            say_alive(context.instance, context.run_id, process_of(context))
            pinged_s = time.monotonic()
        if time.monotonic() - looked_s >= LOOK_FOR_OTHERS_EVERY_S:
            looked_s = time.monotonic()
            other = drain_in(context.instance, names, [dg.DagsterRunStatus.QUEUED])
            if other:
                context.log.info(f"leaving, because run {other[:8]} waits")
                return False
        return time.time() < started_at_s + limits.linger_s and max_rows() != 0

    drain = Drain(
        step.outbox,
        step.audit_log,
        owner=_owner(context),
        process=process_of(context),
        upkeep=names.maintenance(context),
        limits=limits,
        listener=_Warnings(context),
        exported=exported,
        retried=False,  # Dagster retries this step
    )
    return drain.stay(
        stays, max_rows=max_rows, release=lambda: release_held(step.outbox, step.audit_log.definition)
    ).verified


class _Warnings(Listener):
    """Writes warnings to the run's log."""

    def __init__(self, context: dg.OpExecutionContext) -> None:
        self._log = context.log

    def trouble(self, what: str) -> None:
        self._log.warning(what)


def _raise_if_wrong(done: Outcome, outbox: str) -> None:
    left = "; ".join(
        f"batch {batch_id} is in ClickHouse and not marked: {why}" for batch_id, why in unmarked(done.left).items()
    )
    if done.wrong:
        repair = for_outbox("`auditexport reconcile --repair`", outbox)
        raise VerificationFailed(
            f"ClickHouse acknowledged and does not hold as sealed: {done.why()}. The rows are marked; {repair}, then a drain, "
            "exports again what is missing, under the same inserted_at" + (f". Also: {left}" if left else "")
        )
    if left:
        raise BatchUnmarked(left)
