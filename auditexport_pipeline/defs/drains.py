"""The runs that drain an outbox, as Dagster's storage has them: which live, which are dead, and how long one may run.

What a drain does is in `defs.assets`, what starts one in `defs.sensors` and `defs.schedules`.

Dagster notices a worker that dies under its daemon. A run of `dagster job execute` or `dagster asset materialize` has no
daemon: when it is killed, it stays STARTED, and holds the pool, until `max_runtime_seconds`. So a run names its process in a
tag. For a run on another machine, the lease in the ledger decides; while it has no open batch, its last event does.
"""

import itertools
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress

import dagster as dg

from auditexport_pipeline import processes
from auditexport_pipeline.core.backlog import Lease
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.lease import LONGEST_SILENCE_S
from auditexport_pipeline.core.runtime import WORKING_SHARE, fits
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.defs.names import Names

# The run's id, because Dagster gives a retry the tags of its parent, and the process.
PROCESS_TAG = "auditexport/process"
# A run whose leases have ended may be about to retry a step.
SILENCE_S = 60.0
AT_WORK = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
_BEING_STARTED = "is being started, waiting until Dagster has started it or given it up"
_BEFORE_WORK = {
    dg.DagsterRunStatus.QUEUED: "is queued, waiting until Dagster starts it",
    dg.DagsterRunStatus.NOT_STARTED: _BEING_STARTED,
    dg.DagsterRunStatus.STARTING: _BEING_STARTED,
}

# What "Materialize" in the Dagster UI runs.
IMPLICIT_JOB = "__ASSET_JOB"
# More failures in a row than these change nothing: the sensor's wait has stopped growing.
FAILURES_READ = 8
# The run's own limit; the second name is the one of the instance's setting, which Dagster takes as well.
_MAX_RUNTIME_TAGS = ("dagster/max_runtime", "dagster/max_runtime_seconds")


def failed_in_a_row(instance: dg.DagsterInstance, names: Names) -> list[dg.RunRecord]:
    """The last runs of our job that failed, newest first, up to the last one that did not. Runs of the implicit asset job do not
    count: a person launched them, and watches them.
    """
    records = instance.get_run_records(
        dg.RunsFilter(job_name=names.job, statuses=[dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]),
        limit=FAILURES_READ,
    )
    return list(itertools.takewhile(lambda record: record.dagster_run.status == dg.DagsterRunStatus.FAILURE, records))


def drain_in(instance: dg.DagsterInstance, names: Names, statuses: Sequence[dg.DagsterRunStatus]) -> str | None:
    """The id of a run in one of these states that drains this outbox: our job's, one of the implicit asset job with the asset,
    or any that holds the pool.
    """
    return next((record.dagster_run.run_id for record in _drains_in(instance, names, statuses)), None)


def say_alive(instance: dg.DagsterInstance, run_id: str, process: str) -> None:
    """A run's sign of life where it writes no event. `process` does all of the run, or is empty."""
    instance.add_run_tags(run_id, {PROCESS_TAG: f"{run_id[:8]} {process}".rstrip()})


def living_drains(instance: dg.DagsterInstance, names: Names, leases: Sequence[Lease] | None = None) -> list[str]:
    """A line for each run that drains this outbox, those at work first: until when to wait for it. Dead runs are ended.

    Durable effect: fails dead runs in Dagster's storage, as Dagster's own monitoring does. That frees the pool, and their batches
    for the next run. Without the ledger's `leases`, only runs whose process was on this machine can be dead.
    """
    at_work, others = [], []
    for record in _drains_in(instance, names, [dg.DagsterRunStatus.QUEUED, *AT_WORK]):
        run = record.dagster_run
        if (why := _BEFORE_WORK.get(run.status)) is not None:
            others.append(f"run {run.run_id[:8]} {why}")
            continue
        process = _process_of(run)
        alive = processes.lives(process)
        line, why = f"is at work in the process {process}, waiting until it ends", ""
        if alive is False:
            line, why = "", f"Its process {process} is gone, and its end was not reported."
        elif alive is None and leases is not None:
            line, why = _by_signs(instance, record, leases)
        elif alive is None:
            line = "is at work, waiting until it ends"
        if line:
            at_work.append(f"run {run.run_id[:8]} {line}")
        # Another job with the asset in it may be silent, and go on without a drain.
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
        if run.job_name == names.job or names.asset in (run.asset_selection or ()) or names.job in (pools or ()):
            found.append(record)
    return found


def _process_of(run: dg.DagsterRun) -> str:
    run_id, _, process = run.tags.get(PROCESS_TAG, "").partition(" ")
    return process if run_id == run.run_id[:8] else ""


def _by_signs(instance: dg.DagsterInstance, record: dg.RunRecord, leases: Sequence[Lease]) -> tuple[str, str]:
    """For a run whose process is on another machine: until when it counts as alive, or "" and why it counts as dead."""
    run = record.dagster_run
    left = [lease.left_s for lease in leases if lease.owner == (run.root_run_id or run.run_id)]
    if max(left, default=0.0) > 0:
        return f"is at work, waiting until {lease_end(max(left))}", ""
    now_s = time.time()
    events = instance.get_records_for_run(run.run_id, limit=1, ascending=False).records
    last_s = max([record.update_timestamp.timestamp(), *(event.timestamp for event in events)])
    until_s = last_s + (SILENCE_S if left else LONGEST_SILENCE_S)
    if now_s < until_s:
        return f"is at work, waiting until {_clock_time(until_s)}, unless it gives a sign of life before", ""
    ended = "its leases in the ledger have ended." if left else "it has no open batch in the ledger."
    return "", f"It wrote no event for {now_s - last_s:.0f} s, and {ended}"


def _clock_time(at_s: float) -> str:
    return time.strftime("%H:%M:%S UTC", time.gmtime(at_s))


def lease_end(left_s: float) -> str:
    """When a lease ends, for the reason of a tick."""
    return f"{_clock_time(time.time() + left_s)}, when its lease ends unless it renews it"


def _end(instance: dg.DagsterInstance, run_id: str, why: str) -> None:
    run = instance.get_run_by_id(run_id)
    if run is None or run.is_finished:  # it ended by itself meanwhile
        return
    line = f"{why} The next run exports what it left."
    if run.status is dg.DagsterRunStatus.CANCELING:
        instance.report_run_canceled(run, line)
    else:
        instance.report_run_failed(run, line)


def finished_runs(instance: dg.DagsterInstance, owners: Collection[str]) -> set[str]:
    """Owners that are Dagster runs which have ended, and whose retries, sharing the root, have ended too."""
    finished = set()
    for owner in owners:
        root = instance.get_run_by_id(owner)
        if root is not None:
            retries = instance.get_runs(dg.RunsFilter(tags={"dagster/root_run_id": owner}), limit=10)
            if all(run.is_finished for run in (root, *retries)):
                finished.add(owner)
    return finished


def refuse_if_ended(context: dg.OpExecutionContext) -> None:
    """Raises `LeaseLost` when the run has ended: a step that was left in a queue would take batches that no run exports, or
    those of the run's own retry, which has the same root and so the same owner.
    """
    run = context.instance.get_run_by_id(context.run_id)
    if run is not None and run.is_finished:
        raise LeaseLost(
            f"run {context.run_id[:8]} has ended, and this step of it was still in a queue. It claimed nothing, and there "
            "is nothing to do: the next run takes the rows"
        )


# ── how long a run may run ───────────────────────────────────────────────────────────────────────


def left_s(context: dg.OpExecutionContext, share: float) -> float | None:
    """Seconds until this share of the run's time is over; None when Dagster does not limit it."""
    if not context.instance.run_monitoring_enabled:
        return None
    longest_s = float(context.instance.run_monitoring_max_runtime_seconds or 0)
    given = [context.run.tags[tag] for tag in _MAX_RUNTIME_TAGS if tag in context.run.tags]
    with suppress(ValueError):  # Dagster ignores a tag that is no number
        longest_s = float(given[0]) if given else longest_s
    if not longest_s:
        return None
    record = context.instance.get_run_record_by_id(context.run_id)
    started_s = record.start_time if record is not None else None
    return longest_s * share - (time.time() - started_s if started_s else 0.0)


def time_for(context: dg.OpExecutionContext, limits: Limits) -> Callable[[Claim], bool]:
    """A function that says whether this run still has the time for a batch; any thread of the step's process may call it."""
    left = left_s(context, WORKING_SHARE)
    if left is None:
        return lambda _: True
    until_s = time.monotonic() + left
    # An adopted batch may be larger than one run can do: what is marked of it stays marked.
    return lambda claim: fits(limits, 0 if claim.adopted else claim.rows, until_s - time.monotonic())
