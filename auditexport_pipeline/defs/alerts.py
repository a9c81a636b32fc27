"""Alert sensors: `run_alerts` follows runs, `number_alerts` follows the status. They send notices and launch nothing.

`core.alerts` decides what to send, and its state is the sensors' cursor. Both sensors are on from the start, and skip until a
webhook is set.

`run_alerts` is no run status sensor of Dagster's. A drain launched in the Dagster UI is a run of the implicit asset job: a run
status sensor misses it when given jobs, sees all runs of the instance otherwise, and has no cursor of ours.

docs/alerts.md has other ways to send: a resource of your own under the key `alerts`, or Dagster's integrations with
`failure_text` and `will_be_retried`.
"""

import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import TypeVar

import dagster as dg
import msgspec

from auditexport_pipeline.core.advice import Drains, Failure
from auditexport_pipeline.core.alerts import AlertState, EndedRun, NumberAlerts, Policy, Retry, RunAlerts, Tick
from auditexport_pipeline.core.errors import AuditExportError, BrokerUnavailable, TransientError
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.defs.drains import AT_WORK, IMPLICIT_JOB, failed_in_a_row
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.resources import AlertsResource, HeartbeatResource, within
from auditexport_pipeline.mysql.status import read_status

RUNS_INTERVAL_S = 30
NUMBERS_INTERVAL_S = 60
# Runs that ended this long before the last tick are read again: another host's clock stamps them, and Dagster tags a run that it
# will retry only after the end.
OVERLAP_S = 180
# Dagster ends a tick after 60 s; reading and sending together take less.
READ_WITHIN_S = 20.0
SEND_WITHIN_S = 25.0

NO_WEBHOOK = (
    "no alerts are sent: set AUDITEXPORT_ALERT_WEBHOOK_URL to an incoming webhook (Slack's, Mattermost's, or anything that takes "
    'a POST of {{"text": …}}) where this code location runs{or_else}, or turn this sensor off'
)
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
T = TypeVar("T")


def alert_sensors(
    names: Names, other_jobs: Sequence[str], targets: Targets, policy: Policy
) -> list[dg.SensorDefinition]:
    """`run_alerts` and `number_alerts` of this outbox. `targets` say what is wrong, `policy` when alerts are sent."""
    return [_run_alerts(names, [names.job, *other_jobs], policy), _number_alerts(names, targets, policy)]


def _run_alerts(names: Names, jobs: Sequence[str], policy: Policy) -> dg.SensorDefinition:
    @dg.sensor(
        name=names.of("run_alerts"),
        minimum_interval_seconds=RUNS_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys=names.keys("alerts", "heartbeat"),
        description="Sends an alert for failed runs, once, and one for their recovery; not for runs that Dagster retries. Sends "
        "the heartbeat's /fail for drains that died. Launches nothing.",
    )
    def run_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        to: AlertsResource = names.resource(context, "alerts")
        heartbeat: HeartbeatResource = names.resource(context, "heartbeat")
        if not to.is_set and not heartbeat.is_set:
            # Without a cursor, failures before a webhook is set are never sent.
            return _skip(NO_WEBHOOK.format(or_else=", or AUDITEXPORT_HEARTBEAT_URL for /fail of dead drains"))
        tick = _tick(names, policy)
        cursor = _decoded(context.cursor, RunAlerts) or RunAlerts(from_ms=tick.now_ms, looked_ms=tick.now_ms)
        for run in _ended_runs(context, names, jobs, cursor, to):
            cursor.observe(run, tick)
        cursor.observe_missing_retries(tick)
        cursor.state.repeat(tick)
        cursor.looked_ms = tick.now_ms
        if cursor.fail_owed and heartbeat.is_set and heartbeat.fail():
            cursor.fail_owed = False
        done = _send(cursor.state, to)
        if cursor.waiting:
            done += f"; Dagster will launch again: {len(cursor.waiting)}"
        return _skip(done, cursor)

    return run_alerts


def _number_alerts(names: Names, targets: Targets, policy: Policy) -> dg.SensorDefinition:
    @dg.sensor(
        name=names.of("number_alerts"),
        minimum_interval_seconds=NUMBERS_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys=names.keys("alerts", "mysql"),
        description="Sends an alert when the numbers are wrong although no run failed: a backlog that does not shrink, batches "
        "open for long, unknown versions, dead letters, MySQL away; and when it is over. Launches nothing.",
    )
    def number_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        to: AlertsResource = names.resource(context, "alerts")
        if not to.is_set:
            return _skip(NO_WEBHOOK.format(or_else=""))
        tick = _tick(names, policy)
        cursor = _decoded(context.cursor, NumberAlerts) or NumberAlerts()
        try:
            status = within(READ_WITHIN_S, lambda: read_status(names.outbox(context)))
        except TimeoutError:
            numbers = f"MySQL did not answer within {READ_WITHIN_S:.0f} s; run again"
            cursor.observe_error(numbers, tick, permanent=False)
        except AuditExportError as error:
            numbers = str(error)
            cursor.observe_error(numbers, tick, permanent=not isinstance(error, TransientError))
        else:
            numbers = str(status.backlog)
            cursor.observe(status, targets, lambda: _drains(context, names), tick)
        done = _send(cursor.state, to)
        return _skip(f"{done}: {numbers}", cursor)

    return number_alerts


def _tick(names: Names, policy: Policy) -> Tick:
    return Tick(policy=policy, outbox=names.name, drain_job=names.job, now_ms=int(time.time() * 1000))


def _skip(reason: str, cursor: RunAlerts | NumberAlerts | None = None) -> dg.SensorResult:
    """A tick that sends alerts launches no run, so Dagster shows it as skipped; the reason says what was sent."""
    text = msgspec.json.encode(cursor).decode() if cursor is not None else ""
    return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=text)


def _decoded(cursor: str | None, kind: type[T]) -> T | None:
    """The state; None when there is none yet, or one that was set by hand in the Dagster UI."""
    try:
        return msgspec.json.decode(cursor or "", type=kind)
    except msgspec.DecodeError:
        return None


def _send(state: AlertState, to: AlertsResource) -> str:
    """Sends the notices, oldest first. If one cannot be sent, it and the others wait for the next tick."""
    if not to.is_set:
        state.unsent.clear()
        return f"alerts: {len(state.active)} active"
    deadline_s = time.monotonic() + SEND_WITHIN_S
    sent = 0
    while state.unsent and time.monotonic() < deadline_s:
        trouble = to.send(state.unsent[0].body)
        if trouble:
            dg.get_dagster_logger("auditexport").warning(
                f"alerts could not be sent ({trouble}); waiting for the next tick: {len(state.unsent)}. Runs are not affected"
            )
            break
        state.unsent.pop(0)
        sent += 1
    unsent = f", {len(state.unsent)} unsent" if state.unsent else ""
    dropped = f", {state.dropped} dropped" if state.dropped else ""
    return f"alerts: {sent} sent{unsent}{dropped}, {len(state.active)} active"


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def will_be_retried(run: dg.DagsterRun) -> bool:
    """Whether Dagster launches this failed run again, by its tags."""
    return _retry(run) in (Retry.WILL, Retry.LAUNCHED)


def _retry(run: dg.DagsterRun) -> Retry:
    if run.tags.get("dagster/auto_retry_run_id"):
        return Retry.LAUNCHED
    will_retry = run.tags.get("dagster/will_retry")
    if will_retry is None:
        return Retry.UNKNOWN
    return Retry.WILL if will_retry.lower() == "true" else Retry.NO


def failure_text(context: dg.RunFailureSensorContext) -> str:
    """The message of a failed run, for Dagster's own integrations: `text_fn` of `make_slack_on_run_failure_sensor`."""
    run = context.dagster_run
    outbox = run.tags.get("auditexport/outbox", "default")
    tick = Tick(policy=Policy(), outbox="" if outbox == "default" else outbox, now_ms=int(time.time() * 1000))
    alerts = RunAlerts(from_ms=0, looked_ms=0)
    alerts.observe(
        EndedRun(
            subject=run.job_name,
            ended_ms=tick.now_ms,
            run_id=run.run_id,
            **msgspec.structs.asdict(failure_of(context.instance, run.run_id)),
        ),
        tick,
    )
    return alerts.state.unsent[0].text


def failure_of(instance: dg.DagsterInstance, run_id: str) -> Failure:
    """Why a run failed, from its log. The text of errors that are not ours is withheld: it may quote an event."""
    records = instance.get_records_for_run(
        run_id, of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}, limit=20
    ).records
    events = [event for record in records if (event := record.event_log_entry.dagster_event) is not None]
    for event in events:
        if event.event_type is dg.DagsterEventType.STEP_FAILURE:
            return _step_failure(event)
    for event in events:
        return _run_failure(event)
    return Failure(error="run failure", line="the run failed, and its log does not say why")


def _step_failure(event: dg.DagsterEvent) -> Failure:
    step = (event.step_key or "").rpartition(".")[2].partition("[")[0]
    ours, error = event.step_failure_data.user_failure_data, event.step_failure_data.error
    if ours is not None and "error" in ours.metadata:  # as `defs.failures` leaves it
        helps = ours.metadata.get("rerun_helps")
        return Failure(
            error=str(ours.metadata["error"].value),
            step=step,
            line=str(ours.description),
            rerun_helps=bool(helps.value) if helps is not None else None,
            reported=True,
        )
    if ours is not None and ours.description and error is not None and error.cls_name == "Failure":
        return Failure(error="Failure", step=step, line=ours.description)  # a line of `in_one_line`
    cause = error.cause or error if error is not None else None
    return Failure(
        error=(cause.cls_name if cause is not None else None) or "step failure",
        step=step,
        line="its text is withheld, because it may quote an event; it is in the run's log",
    )


def _run_failure(event: dg.DagsterEvent) -> Failure:
    data = event.event_specific_data  # absent where a user marked the run failed
    error = getattr(data, "error", None)
    if error is not None and error.cls_name == BrokerUnavailable.__name__:  # ours, although no step raised it
        return Failure(error=error.cls_name, line=error.message.strip().partition(": ")[2], rerun_helps=True)
    reason = getattr(getattr(data, "failure_reason", None), "value", "run failure")
    # Dagster's own line, such as of a worker that ended; never an exception's text.
    lines = (event.message or "").splitlines()
    return Failure(error=reason, line=lines[0] if lines else "the run failed")


def _subject(names: Names, jobs: Sequence[str], run: dg.DagsterRun) -> str | None:
    """The job of this outbox that the run executes, also through the implicit asset job; None for a run that is not ours."""
    if run.job_name in jobs:
        return run.job_name
    if run.job_name == IMPLICIT_JOB:
        assets, checks = run.asset_selection, run.asset_check_selection or ()
        if names.asset in (assets or ()) or (assets is None and not checks):
            return names.job
        if any(check.asset_key == names.asset for check in checks):
            return f"{names.asset.to_user_string()} checks"
    return None


def _is_here(context: dg.SensorEvaluationContext, run: dg.DagsterRun) -> bool:
    """Whether the run is of this code location: others may have jobs of the same names. A run without an origin counts as ours."""
    here, origin = context.code_location_origin, run.remote_job_origin
    if here is None or origin is None:
        return True
    repository = origin.repository_origin
    return (repository.code_location_origin.location_name, repository.repository_name) == (
        here.location_name,
        context.repository_name,
    )


def _ended_runs(
    context: dg.SensorEvaluationContext, names: Names, jobs: Sequence[str], cursor: RunAlerts, to: AlertsResource
) -> list[EndedRun]:
    """Runs of ours that ended since the last tick, in the order of their ends."""
    # The clock may have been set back since the last tick.
    after = datetime.fromtimestamp(min(cursor.looked_ms / 1000, time.time()) - OVERLAP_S, tz=timezone.utc)
    ended = []
    for job in (*jobs, IMPLICIT_JOB):
        for record in context.instance.get_run_records(
            dg.RunsFilter(job_name=job, statuses=_ENDED, updated_after=after)
        ):
            run = record.dagster_run
            ended_ms = int((record.end_time or record.update_timestamp.timestamp()) * 1000)
            subject = _subject(names, jobs, run)
            if subject is None or not cursor.is_new(run.run_id, ended_ms) or not _is_here(context, run):
                continue
            failed = run.status is dg.DagsterRunStatus.FAILURE
            failure = failure_of(context.instance, run.run_id) if failed else Failure()
            ended.append(
                EndedRun(
                    subject=subject,
                    ended_ms=ended_ms,
                    run_id=run.run_id,
                    retry=_retry(run) if failed else Retry.NO,
                    link=to.link(run.run_id),
                    **msgspec.structs.asdict(failure),
                )
            )
    return sorted(ended, key=lambda run: run.ended_ms)


def _drains(context: dg.SensorEvaluationContext, names: Names) -> Drains:
    """What Dagster knows of this outbox's drains."""
    instance, here = context.instance, context.code_location_origin
    starters = [names.of("outbox_backlog_sensor"), names.of("audit_log_export_schedule")]
    on = any(
        state.instigator_name in starters
        and state.is_running
        and (here is None or state.origin.repository_origin.code_location_origin.location_name == here.location_name)
        for state in instance.all_instigator_state()
    )
    runs = [
        run
        for run in instance.get_runs(dg.RunsFilter(statuses=[*AT_WORK, dg.DagsterRunStatus.QUEUED]), limit=200)
        if _subject(names, [names.job], run) == names.job and _is_here(context, run)
    ]
    running = [run for run in runs if run.status is not dg.DagsterRunStatus.QUEUED]
    failed = failed_in_a_row(instance, names)
    failure = failure_of(instance, failed[0].dagster_run.run_id) if failed else Failure()
    return Drains(
        starters_off=[] if on else starters,
        running=[run.run_id for run in running],
        queued=[run.run_id for run in runs if run not in running],
        failed_in_a_row=len(failed),
        last_failure=f"{failure.error}: {failure.line}",
    )
