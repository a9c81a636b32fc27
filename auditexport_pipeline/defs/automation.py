"""What starts a drain: the job, the sensor on the backlog, the schedule.

What belongs here: asking Dagster and the ledger, and handing the answer to `core.backlog.decide`. What
does not: the decision itself, or the counting. Each function makes a definition for the outbox of these `Names`.
"""

import math
import os
import time
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import msgspec

from auditexport_pipeline import processes
from auditexport_pipeline.core.backlog import DEFAULT_THRESHOLDS, NO_FAILURES, Failures, Lease, Thresholds, decide
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.defs.checks import LIGHT
from auditexport_pipeline.defs.drains import end_dead, failed_in_a_row, lease_end
from auditexport_pipeline.defs.executors import limits_here
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import backlog_metadata

# A tick costs a few milliseconds of MySQL and a daemon's poll; a lag target of a minute needs no more.
SENSOR_INTERVAL_S = 15
# What a check of a day's entries costs grows with the day: the schedule of reconciliation looks at them as well.
CHECK_EVERY_MINUTES = 15
READ_ENTRIES_EVERY_HOURS = 6
# How often the page gets a fresh observation of the outbox: when nothing changes, and when rows come and go, as they do at
# every tick. Nothing but its asset ever deletes such an event: at every tick they would be two million a year.
OBSERVE_EVERY_S = 600
OBSERVE_CHANGES_EVERY_S = 120
# What waits for a person is told at once.
_TOLD_AT_ONCE = ("unknown_rows", "unknown_versions", "dead_letters_standing")


def export_job(names: Names) -> Any:
    """The job that drains, the asset and nothing else."""
    return dg.define_asset_job(
        names.job,
        # Checks look back over a day; a drain looks at its own batches.
        selection=dg.AssetSelection.assets(names.asset).without_checks(),
        description="Drains the outbox into ClickHouse. Safe to launch at any time and as often as you like.",
        # From failure, Dagster would skip mapped steps that had not started and end green.
        tags={"dagster/retry_strategy": "ALL_STEPS", **names.drain_tags},
    )


def drain_settings(names: Names, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run configuration of drains that nobody launches by hand: what was given to the definitions, or else
    AUDITEXPORT_DRAIN, the launchpad's form as JSON.

    Read at every tick; raises `InvalidConfig`, naming the field, for what the launchpad would refuse.
    """
    settings = dict(given) if given is not None else _drain_of_environment()
    limits_here(settings)
    return {"ops": {names.node: {"config": settings}}} if settings else {}


def _drain_of_environment() -> dict[str, Any]:
    text = os.environ.get("AUDITEXPORT_DRAIN", "")
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidConfig(
            f"AUDITEXPORT_DRAIN is no JSON object of a drain's settings ({error}); write it as "
            '{"linger_s": 900, "max_rows_per_second": 5000}'
        ) from None


def export_schedule(names: Names, job: Any, drain: Mapping[str, Any] | None) -> dg.ScheduleDefinition:
    @dg.schedule(
        name=names.of("audit_log_export_schedule"),
        job=job,
        cron_schedule="*/15 * * * *",
        description="Runs whether or not there is a backlog, so that an idle exporter still proves that it is alive.",
    )
    def audit_log_export_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        end_dead(context.instance, names)  # or the run would wait in the queue behind one that never ends
        with in_one_line():
            return dg.RunRequest(run_config=drain_settings(names, drain))

    return audit_log_export_schedule


def thresholds() -> Thresholds:
    """AUDITEXPORT_SENSOR_ROWS and AUDITEXPORT_SENSOR_LAG_S, read at every tick; raises `InvalidConfig`."""
    return Thresholds(
        rows=math.ceil(_positive("AUDITEXPORT_SENSOR_ROWS", DEFAULT_THRESHOLDS.rows)),
        lag_s=_positive("AUDITEXPORT_SENSOR_LAG_S", DEFAULT_THRESHOLDS.lag_s),
    )


def _positive(name: str, default: float) -> float:
    text = os.environ.get(name, "")
    try:
        value = float(text) if text else float(default)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise InvalidConfig(f"{name} is {text!r}; it must be a number above 0")
    return value


def _at_work(instance: dg.DagsterInstance, names: Names, leases: Sequence[Lease]) -> str | None:
    """Who drains already and until when the sensor waits: a run, or a process outside this Dagster that holds a lease. A
    run that has ended holds nothing any more.
    """
    for line in end_dead(instance, names, leases):
        return line
    for lease in leases:
        if lease.left_s <= 0 or processes.dead([lease.owner, lease.process]):
            continue
        if instance.get_run_by_id(lease.owner) is None:
            return f"the process {lease.owner} is at work, waiting until {lease_end(lease.left_s)}"
    return None


def _failures(instance: dg.DagsterInstance, names: Names) -> Failures:
    """How many drains in a row have failed, and how long ago."""
    failed = failed_in_a_row(instance, names)
    if not failed:
        return NO_FAILURES
    return Failures(
        runs=len(failed), since_s=time.time() - (failed[0].end_time or failed[0].update_timestamp.timestamp())
    )


class _Seen(msgspec.Struct):
    """The sensor's cursor: what was observed last and when. Never a pk: the backlog is counted anew each time."""

    numbers: dict[str, str]
    at_s: float


def _seen(cursor: str | None) -> _Seen | None:
    try:
        return msgspec.json.decode(cursor or "", type=_Seen)
    except msgspec.DecodeError:  # none yet, or one that was set by hand on the page
        return None


def _worth_telling(seen: _Seen | None, numbers: Mapping[str, str]) -> bool:
    if seen is None or any(seen.numbers.get(name) != numbers[name] for name in _TOLD_AT_ONCE):
        return True
    return time.time() - seen.at_s >= (OBSERVE_EVERY_S if seen.numbers == numbers else OBSERVE_CHANGES_EVERY_S)


def checks_job(names: Names) -> Any:
    """The job that executes every asset check, the drain left out."""
    return dg.define_asset_job(
        names.of("audit_log_checks"),
        selection=dg.AssetSelection.checks_for_assets(names.asset),
        description="Executes every check of the asset. A drain leaves them out, and after it Dagster calls them not evaluated.",
    )


def checks_schedule(names: Names, job: Any) -> dg.ScheduleDefinition:
    """Between two runs of the export's schedule; off until somebody turns it on."""

    @dg.schedule(
        name=names.of("checks_schedule"),
        job=job,
        cron_schedule="8-59/15 * * * *",
        description="The lights on the page: every quarter of an hour those that ask MySQL alone, and four times a day those "
        "that read a day's entries in ClickHouse.",
    )
    def checks_schedule(context: dg.ScheduleEvaluationContext) -> dg.RunRequest:
        at = context.scheduled_execution_time
        if at.hour % READ_ENTRIES_EVERY_HOURS == 0 and at.minute < CHECK_EVERY_MINUTES:
            return dg.RunRequest()
        return dg.RunRequest(asset_check_keys=[dg.AssetCheckKey(names.asset, name) for name in LIGHT])

    return checks_schedule


def backlog_sensor(
    names: Names, job: Any, drain: Mapping[str, Any] | None, given: Thresholds | None
) -> dg.SensorDefinition:
    @dg.sensor(
        name=names.of("outbox_backlog_sensor"),
        job=job,
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        required_resource_keys={names.mysql},
        description=(
            f"Starts a drain at {given.rows:,} pending rows or {given.lag_s:g} s of lag"
            if given
            else f"Starts a drain at {DEFAULT_THRESHOLDS.rows:,} pending rows (AUDITEXPORT_SENSOR_ROWS) or {DEFAULT_THRESHOLDS.lag_s:g} s "
            "of lag (AUDITEXPORT_SENSOR_LAG_S)"
        )
        + ", when none is running.",
    )
    def outbox_backlog_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with in_one_line():
            limits = given or thresholds()
            settings = drain_settings(names, drain)
            backlog = names.mysql_of(context).outbox().backlog(tuple(VERSIONS), count_to=max(limits.rows, 1_000_000))
        decision = decide(
            backlog,
            limits,
            at_work=_at_work(context.instance, names, backlog.leases),
            failures=_failures(context.instance, names),
        )
        numbers = backlog_metadata(backlog)
        steady = {name: str(value) for name, value in numbers.items() if name != "lag_s"}
        fresh = _worth_telling(_seen(context.cursor), steady)
        return dg.SensorResult(
            # No run_key: Dagster remembers one for ever, failed runs included.
            run_requests=[dg.RunRequest(run_config=settings, tags={"auditexport/why": decision.reason[:250]})]
            if decision.launch
            else [],
            skip_reason=None if decision.launch else dg.SkipReason(decision.reason),
            cursor=msgspec.json.encode(_Seen(numbers=steady, at_s=time.time())).decode() if fresh else context.cursor,
            asset_events=[dg.AssetObservation(names.outbox, metadata=numbers)] if fresh else [],
        )

    return outbox_backlog_sensor
