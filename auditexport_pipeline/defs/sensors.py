"""The sensor that starts a drain when a backlog builds up.

It reads Dagster's runs and the ledger; `core.backlog.decide` decides.
"""

import time
from collections.abc import Mapping, Sequence
from typing import Any

import dagster as dg
import msgspec

from auditexport_pipeline import processes
from auditexport_pipeline.core.backlog import COUNT_TO, NO_FAILURES, Failures, Lease, decide
from auditexport_pipeline.core.settings import Thresholds
from auditexport_pipeline.defs.drains import failed_in_a_row, lease_end, living_drains
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.report import backlog_metadata

# A tick costs a few milliseconds of MySQL and a daemon's poll; a lag target of a minute needs no more.
SENSOR_INTERVAL_S = 15
# How often the outbox is observed: when nothing changes, and when rows come and go. Dagster keeps observations as long as their
# asset: one at every tick would be two million a year.
OBSERVE_EVERY_S = 600
OBSERVE_CHANGES_EVERY_S = 120
# A change of these needs a person: it is observed at once.
_OBSERVED_AT_ONCE = ("unknown_rows", "unknown_versions", "dead_letters_standing")


def _at_work(instance: dg.DagsterInstance, names: Names, leases: Sequence[Lease]) -> str | None:
    """The run or other process that drains already, and until when the sensor waits for it; None when there is none."""
    for line in living_drains(instance, names, leases):
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


class _Observed(msgspec.Struct):
    """The sensor's cursor: what was observed last and when. Never a pk: each tick counts the whole backlog."""

    numbers: dict[str, str]
    at_s: float


def _is_due(cursor: str | None, numbers: Mapping[str, str]) -> bool:
    """Whether these numbers are observed at this tick."""
    try:
        last = msgspec.json.decode(cursor or "", type=_Observed)
    except msgspec.DecodeError:  # none yet, or one that was set by hand in the Dagster UI
        return True
    if any(last.numbers.get(name) != numbers[name] for name in _OBSERVED_AT_ONCE):
        return True
    return time.time() - last.at_s >= (OBSERVE_EVERY_S if last.numbers == numbers else OBSERVE_CHANGES_EVERY_S)


def backlog_sensor(
    names: Names, job: Any, run_config: dict[str, Any], versions: Sequence[str], thresholds: Thresholds
) -> dg.SensorDefinition:
    """`outbox_backlog_sensor`. `versions` are those that its drains export: other rows are no reason to start one."""

    @dg.sensor(
        name=names.of("outbox_backlog_sensor"),
        job=job,
        minimum_interval_seconds=SENSOR_INTERVAL_S,
        required_resource_keys=names.keys("mysql"),
        description=f"Starts a drain at {thresholds.rows:,} pending rows or {thresholds.lag_s:g} s of lag, when none is running.",
    )
    def outbox_backlog_sensor(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        with in_one_line():
            backlog = names.outbox(context).backlog(versions, count_to=max(thresholds.rows, COUNT_TO))
        decision = decide(
            backlog,
            thresholds,
            at_work=_at_work(context.instance, names, backlog.leases),
            failures=_failures(context.instance, names),
        )
        numbers = backlog_metadata(backlog)
        steady = {name: str(value) for name, value in numbers.items() if name != "lag_s"}
        due = _is_due(context.cursor, steady)
        return dg.SensorResult(
            # No run_key: Dagster would never launch the same key again, even after a failed run.
            run_requests=[dg.RunRequest(run_config=run_config, tags={"auditexport/why": decision.reason[:250]})]
            if decision.launch
            else [],
            skip_reason=None if decision.launch else dg.SkipReason(decision.reason),
            cursor=msgspec.json.encode(_Observed(numbers=steady, at_s=time.time())).decode() if due else context.cursor,
            asset_events=[dg.AssetObservation(names.outbox_asset, metadata=numbers)] if due else [],
        )

    return outbox_backlog_sensor
