"""Which runs drain an outbox, which of them live, and how to find them in Dagster's storage.

What belongs here: look-ups, and ending in Dagster's storage what is dead. What does not: what a drain does (`defs.assets`),
what starts one (`defs.sensors`, `defs.schedules`), and who is told of one that failed (`defs.alerts`).

Dagster notices a worker that dies under its daemon. A run of `dagster job execute` or `dagster asset materialize` has none:
when it is killed, it stays STARTED, and holds the pool, until `max_runtime_seconds`. So a run names its process in a tag.
Of a run on another machine, the lease in the ledger tells; while it has no open batch, what it last said to Dagster.
"""

import itertools
import time
from collections.abc import Sequence

import dagster as dg

from auditexport_pipeline import processes
from auditexport_pipeline.core.backlog import Lease
from auditexport_pipeline.core.lease import LONGEST_SILENCE_S
from auditexport_pipeline.defs.names import Names

# The run's id, by which a retry that Dagster gave its parent's tags is told from it, and the process.
PROCESS_TAG = "auditexport/process"
# A run whose leases have ended may be about to try a step again, which Dagster was told of.
SILENCE_S = 60.0
_UNFINISHED = [
    dg.DagsterRunStatus.QUEUED,
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_BEFORE_WORK = {
    dg.DagsterRunStatus.QUEUED: "is queued, waiting until Dagster starts it",
    dg.DagsterRunStatus.NOT_STARTED: "is being started, waiting until Dagster has started it or given it up",
    dg.DagsterRunStatus.STARTING: "is being started, waiting until Dagster has started it or given it up",
}

# What "Materialize" in the Dagster UI runs.
IMPLICIT_JOB = "__ASSET_JOB"
# More failures in a row than these change nothing: a wait stops growing before, and so does the reader's patience.
FAILURES_LOOKED_AT = 8


def failed_in_a_row(instance: dg.DagsterInstance, names: Names) -> list[dg.RunRecord]:
    """The last runs of our job that failed, newest first, up to the last one that did not fail. Runs of the implicit asset job do
    not count: a person launched them, and watches them.
    """
    records = instance.get_run_records(
        dg.RunsFilter(job_name=names.job, statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]),
        limit=FAILURES_LOOKED_AT,
    )
    return list(itertools.takewhile(lambda record: record.dagster_run.status == dg.DagsterRunStatus.FAILURE, records))


def drain_in(instance: dg.DagsterInstance, names: Names, statuses: Sequence[dg.DagsterRunStatus]) -> str | None:
    """The id of a run in one of these states that drains this outbox: our job's, one of the implicit asset job with the asset,
    or any that holds the pool.
    """
    return next((record.dagster_run.run_id for record in _drains_in(instance, names, statuses)), None)


def say_alive(instance: dg.DagsterInstance, run_id: str, process: str) -> None:
    """A run's sign of life where it writes no event: names the process that does all of it, if one does."""
    instance.add_run_tags(run_id, {PROCESS_TAG: f"{run_id[:8]} {process}".rstrip()})


def end_dead(instance: dg.DagsterInstance, names: Names, leases: Sequence[Lease] | None = None) -> list[str]:
    """Which runs drain this outbox, a line each with until when they are waited for: those at work first.

    Durable effect: a run that is dead is failed in Dagster's storage, as Dagster's own monitoring does. That frees the pool,
    and its batches for the next run. Without `leases`, the ledger's, only those count as dead whose process was of this machine.
    """
    at_work, others = [], []
    for record in _drains_in(instance, names, _UNFINISHED):
        run = record.dagster_run
        if (why := _BEFORE_WORK.get(run.status)) is not None:
            others.append(f"run {run.run_id[:8]} {why}")
            continue
        process = _process_of(run)
        alive = processes.lives(process)
        line, why = f"is at work in the process {process}, waiting until it ends", ""
        if alive is False:
            line, why = "", f"Its process {process} is gone, and nobody reported its end."
        elif alive is None and leases is not None:
            line, why = _by_signs(instance, record, leases)
        elif alive is None:
            line = "is at work, waiting until it ends"
        if line:
            at_work.append(f"run {run.run_id[:8]} {line}")
        # Somebody's own job with the asset in it may be silent, and go on without a drain.
        elif alive is False or run.job_name == names.job or run.asset_selection == {names.asset}:
            _end(instance, run.run_id, why)
    return at_work + others


def _drains_in(
    instance: dg.DagsterInstance, names: Names, statuses: Sequence[dg.DagsterRunStatus]
) -> list[dg.RunRecord]:
    found = []
    for record in instance.get_run_records(dg.RunsFilter(statuses=list(statuses)), limit=200):
        run = record.dagster_run
        pools = run.run_op_concurrency.all_pools if run.run_op_concurrency else None
        if run.job_name == names.job or names.asset in (run.asset_selection or ()) or names.pool in (pools or ()):
            found.append(record)
    return found


def _process_of(run: dg.DagsterRun) -> str:
    run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
    return process if run_id == run.run_id[:8] else ""


def _by_signs(instance: dg.DagsterInstance, record: dg.RunRecord, leases: Sequence[Lease]) -> tuple[str, str]:
    """Until when a run whose process cannot be looked for is believed to live; or nothing, and why it is not."""
    run = record.dagster_run
    owner = run.root_run_id or run.run_id
    now = time.time()
    left = [lease.left_s for lease in leases if lease.owner == owner]
    if max(left, default=0.0) > 0:
        return f"is at work, waiting until {lease_end(max(left))}", ""
    events = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
    last = max([record.update_timestamp.timestamp(), *(event.timestamp for event in events)])
    silence_s = SILENCE_S if left else LONGEST_SILENCE_S
    if now < last + silence_s:
        until = time.strftime("%H:%M:%S", time.gmtime(last + silence_s))
        return f"is at work, waiting until {until} UTC, unless it gives a sign of life before", ""
    said = f"It has said nothing for {now - last:.0f} s, and "
    return "", said + ("its leases in the ledger have ended." if left else "it has no open batch in the ledger.")


def lease_end(left_s: float) -> str:
    """When a lease ends, as a tick says it."""
    until = time.strftime("%H:%M:%S", time.gmtime(time.time() + left_s))
    return f"{until} UTC, when its lease ends unless it renews it"


def _end(instance: dg.DagsterInstance, run_id: str, why: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:  # it ended by itself between the two looks
        return
    line = f"{why} The next run continues with what it left."
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, line)
    else:
        instance.report_run_failed(run, line)
