"""Who tells somebody: two sensors that start nothing, one on runs and one on the numbers.

What belongs here: reading Dagster's runs and the outbox's numbers, sending what is due, and keeping the memory in the
sensor's cursor. What does not: what is worth telling (`core.run_alerts`, `core.number_alerts`), how it reads
(`core.notices`), and the webhook (`defs.resources`).

`run_alerts` follows every run of this outbox's jobs and, because a drain launched from the page runs Dagster's implicit
asset job, every run of that job with our asset or a check of it. Dagster's own run status sensors would miss those when
they are given jobs, take everybody's when they are not, and lend nobody their cursor: they could not know that a failure
was told before. A failure that Dagster retries (`dagster/will_retry`) is told only when the retry does not come or fails.

`number_alerts` reads the status every minute. An exporter that does not run fails no run: only the numbers show it.

Both are on from the start. Without a webhook they skip, with a reason that says how to get one, and read nothing; they
launch nothing; and an alarm that has to be turned on is off on the day that it is needed.

To tell by other ways:

* Put your own object under the resource key `alerts` (`build_audit_export_defs(alerts=…)`), with `is_set`,
  `link(run_id)` and `send(body)`: muting, deduplication and recovery stay.
* Or turn `run_alerts` off and use Dagster's integrations, which tell of every failure of the code location:
  `make_slack_on_run_failure_sensor(channel, token, text_fn=failure_text)` of dagster-slack, `make_email_on_run_failure_sensor`,
  or a `run_failure_sensor` of your own that asks `will_be_retried(context.dagster_run)` first. Do not give them
  `monitored_jobs`, or they miss launches from the page.
"""

import os
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime, timezone
from typing import TypeVar

import dagster as dg
import msgspec

from auditexport_pipeline.core.errors import AuditExportError, BrokerUnavailable, OutboxUnavailable, TransientError
from auditexport_pipeline.core.notices import Board, Notice, Policy
from auditexport_pipeline.core.number_alerts import Around, NumberAlerts
from auditexport_pipeline.core.run_alerts import Ended, Failure, Retry, RunAlerts
from auditexport_pipeline.core.status import Status
from auditexport_pipeline.defs.drains import IMPLICIT_JOB, failed_in_a_row
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.defs.resources import AlertsResource, HeartbeatResource
from auditexport_pipeline.mysql.status import read_status
from auditexport_pipeline.mysql.status import targets as targets_of

RUNS_INTERVAL_S = 30
NUMBERS_INTERVAL_S = 60
# Runs that ended this long before the last look are looked for again: another host's clock stamps them, and what
# Dagster says of a retry comes after the end.
OVERLAP_S = 180
# Runs of one job taken in by one look; the next one takes the rest.
PAGE_RUNS = 100
# Dagster gives a tick up after 60 s, and with it the news that MySQL does not answer.
READ_WITHIN_S = 20.0
SEND_WITHIN_S = 25.0

HOW = (
    "nobody is told: set AUDITEXPORT_ALERT_WEBHOOK_URL to an incoming webhook (Slack's, Mattermost's, or anything that takes "
    'a POST of {{"text": …}}) where this code location runs{or_else}, or turn this sensor off'
)
_ENDED = [dg.DagsterRunStatus.SUCCESS, dg.DagsterRunStatus.FAILURE]
_BEFORE_THE_END = [
    dg.DagsterRunStatus.NOT_STARTED,
    dg.DagsterRunStatus.STARTING,
    dg.DagsterRunStatus.STARTED,
    dg.DagsterRunStatus.CANCELING,
]
T = TypeVar("T")


def alert_sensors(
    names: Names,
    upkeep_jobs: Sequence[str],
    *,
    targets: Mapping[str, float] | None = None,
    policy: Policy | None = None,
) -> list[dg.SensorDefinition]:
    """`run_alerts` and `number_alerts` of this outbox. `upkeep_jobs` are the names of its jobs beside the drain's.

    `targets` say what is wrong (AUDITEXPORT_TARGET_… for those that are not given), `policy` when somebody is told (AUDITEXPORT_ALERT_…
    otherwise); both are read at every tick.
    """
    return [_run_alerts(names, upkeep_jobs, policy), _number_alerts(names, targets, policy)]


def _run_alerts(names: Names, upkeep_jobs: Sequence[str], given: Policy | None) -> dg.SensorDefinition:
    @dg.sensor(
        name=names.of("run_alerts"),
        minimum_interval_seconds=RUNS_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.alerts, names.heartbeat},
        description="Tells a webhook of failed runs and of their recovery, once, and not of those that Dagster retries; "
        "tells the heartbeat of drains that died without a word. Starts nothing.",
    )
    def run_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        to: AlertsResource = getattr(context.resources, names.alerts)
        heartbeat: HeartbeatResource = getattr(context.resources, names.heartbeat)
        if not to.is_set and not heartbeat.is_set:
            # What happened while nobody was to be told is not told later.
            return _said(HOW.format(or_else=", or AUDITEXPORT_HEARTBEAT_URL for /fail of dead drains"), cursor="")
        policy = _policy(given)
        now_ms = int(time.time() * 1000)
        memory = _remembered(context.cursor, RunAlerts) or RunAlerts(from_ms=now_ms, looked_ms=now_ms)
        ended = _ended(context, names, upkeep_jobs, memory, to)
        for run in ended:
            memory.heard(run, policy, outbox=names.name, now_ms=now_ms)
        ended += memory.overdue(policy, outbox=names.name, now_ms=now_ms)
        memory.board.reminded(policy, outbox=names.name, now_ms=now_ms)
        memory.looked_ms = now_ms
        _ping(names, memory, heartbeat, ended)
        said = _send(memory.board, to)
        if memory.waiting:
            said += f"; {len(memory.waiting)} failed runs are to be launched again by Dagster"
        return _said(said, cursor=msgspec.json.encode(memory).decode())

    return run_alerts


def _number_alerts(
    names: Names, given_targets: Mapping[str, float] | None, given: Policy | None
) -> dg.SensorDefinition:
    @dg.sensor(
        name=names.of("number_alerts"),
        minimum_interval_seconds=NUMBERS_INTERVAL_S,
        default_status=dg.DefaultSensorStatus.RUNNING,
        required_resource_keys={names.alerts, names.mysql},
        description="Tells a webhook when the numbers are wrong although no run failed: a backlog that does not shrink, batches "
        "open for long, unknown versions, dead letters, MySQL away; and when it is over. Starts nothing.",
    )
    def number_alerts(context: dg.SensorEvaluationContext) -> dg.SensorResult:
        to: AlertsResource = getattr(context.resources, names.alerts)
        if not to.is_set:
            return _said(HOW.format(or_else=""), cursor="")
        policy = _policy(given)
        with in_one_line():
            targets = targets_of(given_targets)
        memory = _remembered(context.cursor, NumberAlerts) or NumberAlerts()
        now_ms = int(time.time() * 1000)
        try:
            status: Status = _within(READ_WITHIN_S, lambda: read_status(names.mysql_of(context).outbox()))
        except AuditExportError as error:
            permanent = not isinstance(error, TransientError)
            memory.unanswered(str(error), policy, permanent=permanent, outbox=names.name, now_ms=now_ms)
            numbers = str(error)
        else:
            memory.looked(status, targets, policy, lambda: _around(context, names), outbox=names.name, now_ms=now_ms)
            numbers = f"{status.backlog.shown_rows} pending rows, lag {status.backlog.lag_s:.0f} s"
        said = _send(memory.board, to)
        return _said(f"{said}: {numbers}", cursor=msgspec.json.encode(memory).decode())

    return number_alerts


def _policy(given: Policy | None) -> Policy:
    with in_one_line():
        return given or Policy.of(os.environ)


def _said(reason: str, *, cursor: str) -> dg.SensorResult:
    return dg.SensorResult(skip_reason=dg.SkipReason(reason), cursor=cursor)


def _remembered(cursor: str | None, kind: type[T]) -> T | None:
    """The memory; None when there is none yet, or one that was set by hand on the page."""
    try:
        return msgspec.json.decode(cursor or "", type=kind)
    except msgspec.DecodeError:
        return None


def _send(board: Board, to: AlertsResource) -> str:
    """Sends what is due, oldest first, until one cannot be sent: that one and the rest are for the next tick."""
    if not to.is_set:
        board.unsent.clear()
        return f"{len(board.standing)} alerts stand"
    deadline_s = time.monotonic() + SEND_WITHIN_S
    sent = 0
    while board.unsent and time.monotonic() < deadline_s:
        trouble = to.send(board.unsent[0].body)
        if trouble:
            dg.get_dagster_logger("auditexport").warning(
                f"{len(board.unsent)} alerts could not be sent ({trouble}); they are tried again in a moment. Runs are not "
                "affected"
            )
            break
        board.unsent.pop(0)
        sent += 1
    waits = f", {len(board.unsent)} wait to be sent" if board.unsent else ""
    dropped = f", {board.dropped} were dropped" if board.dropped else ""
    return f"{sent} alerts sent{waits}{dropped}, {len(board.standing)} stand"


def _within(seconds: float, read: Callable[[], T]) -> T:
    """The answer of `read`; raises `OutboxUnavailable` after a while, and leaves the question to its thread."""
    answers: list[T] = []
    errors: list[BaseException] = []

    def ask() -> None:
        try:
            answers.append(read())
        except BaseException as error:  # told by whoever asked
            errors.append(error)

    thread = threading.Thread(target=ask, name="auditexport-status", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not answers:
        raise OutboxUnavailable(f"MySQL did not answer within {seconds:.0f} s; run again")
    return answers[0]


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def will_be_retried(run: dg.DagsterRun) -> bool:
    """Whether Dagster said that it will launch this failed run again, and has not said otherwise since."""
    return _retry(run) in (Retry.WILL, Retry.LAUNCHED)


def _retry(run: dg.DagsterRun) -> Retry:
    if run.tags.get("dagster/auto_retry_run_id"):
        return Retry.LAUNCHED
    said = run.tags.get("dagster/will_retry")
    if said is None:
        return Retry.UNTOLD
    return Retry.WILL if said.lower() == "true" else Retry.NO


def failure_text(context: dg.RunFailureSensorContext) -> str:
    """The message of a failed run, for Dagster's own integrations: `text_fn` of `make_slack_on_run_failure_sensor`."""
    run = context.dagster_run
    now_ms = int(time.time() * 1000)
    memory = RunAlerts(from_ms=0, looked_ms=0)
    failure = failure_of(context.instance, run.run_id)
    ended = Ended(
        run_id=run.run_id,
        job=run.job_name,
        subject=run.job_name,
        ended_ms=now_ms,
        failure=failure,
        link=AlertsResource().link(run.run_id),
    )
    memory.heard(ended, Policy(), outbox="", now_ms=now_ms)
    notice: Notice = memory.board.unsent[0]
    return notice.text


def failure_of(instance: dg.DagsterInstance, run_id: str) -> Failure:
    """Why a run failed, from its log. The text of errors that are not ours is withheld: it may quote an event."""
    records = instance.get_records_for_run(
        run_id, of_type={dg.DagsterEventType.STEP_FAILURE, dg.DagsterEventType.RUN_FAILURE}, limit=20
    ).records
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is None or event.event_type is not dg.DagsterEventType.STEP_FAILURE:
            continue
        step = (event.step_key or "").rpartition(".")[2]
        told = event.step_failure_data.user_failure_data
        error = event.step_failure_data.error
        if told is not None and "error" in told.metadata:
            helps = told.metadata.get("rerun_helps")
            return Failure(
                error=str(told.metadata["error"].value),
                step=step.partition("[")[0],
                line=str(told.description),
                rerun_helps=bool(helps.value) if helps is not None else None,
                told=True,
            )
        if told is not None and told.description and error is not None and error.cls_name == "Failure":
            # Our glue's own line, without an error of the tree beside it.
            return Failure(error="Failure", step=step.partition("[")[0], line=told.description, rerun_helps=None)
        name = error.cause.cls_name if error is not None and error.cause else error.cls_name if error else None
        return Failure(
            error=name or "step failure",
            step=step.partition("[")[0],
            line="its text is withheld, because it may quote an event; it is in the run's log",
            rerun_helps=None,
        )
    for record in records:
        event = record.event_log_entry.dagster_event
        if event is not None and event.event_type is dg.DagsterEventType.RUN_FAILURE:
            data = event.event_specific_data  # absent where somebody else marked the run failed
            error = getattr(data, "error", None)
            if error is not None and error.cls_name == BrokerUnavailable.__name__:  # ours, although no step raised it
                line = error.message.strip().partition(": ")[2]
                return Failure(error=error.cls_name, step="", line=line, rerun_helps=True)
            reason = getattr(getattr(data, "failure_reason", None), "value", "run failure")
            # Dagster's own words, as of a worker that ended. What an exception says is not among them.
            lines = (event.message or "").splitlines()
            return Failure(error=reason, step="", line=lines[0] if lines else "the run failed", rerun_helps=None)
    return Failure(error="run failure", step="", line="the run failed, and its log does not say why", rerun_helps=None)


def _subject(names: Names, upkeep_jobs: Sequence[str], run: dg.DagsterRun) -> str | None:
    """What this run's end is the news of; None for a run that is not ours."""
    if run.job_name == names.job:
        return names.job
    if run.job_name in upkeep_jobs:
        return run.job_name
    if run.job_name == IMPLICIT_JOB:
        assets, checks = run.asset_selection, run.asset_check_selection or ()
        if names.asset in (assets or ()) or (assets is None and not checks):
            return names.job
        if any(check.asset_key == names.asset for check in checks):
            return f"{names.asset.to_user_string()} checks"
    return None


def _here(context: dg.SensorEvaluationContext, run: dg.DagsterRun) -> bool:
    """Whether the run is of this code location: another one may have jobs of the same names. One without origin, as from
    the prompt, is.
    """
    ours, origin = context.code_location_origin, run.remote_job_origin
    if ours is None or origin is None:
        return True
    repository = origin.repository_origin
    return (
        repository.code_location_origin.location_name == ours.location_name
        and repository.repository_name == context.repository_name
    )


def _ended(
    context: dg.SensorEvaluationContext,
    names: Names,
    upkeep_jobs: Sequence[str],
    memory: RunAlerts,
    to: AlertsResource,
) -> list[Ended]:
    """Runs of ours that ended since the last look, in the order of their ends."""
    # A clock that was set back must not leave a time out.
    looked_s = min(memory.looked_ms / 1000, time.time())
    after = datetime.fromtimestamp(looked_s - OVERLAP_S, tz=timezone.utc)
    ended = []
    for job in (names.job, *upkeep_jobs, IMPLICIT_JOB):
        for record in _updated(context.instance, job, after):
            run = record.dagster_run
            ended_ms = int((record.end_time or record.update_timestamp.timestamp()) * 1000)
            if not memory.is_new(run.run_id, ended_ms) or not _here(context, run):
                continue
            subject = _subject(names, upkeep_jobs, run)
            if subject is None:
                continue
            failed = run.status is dg.DagsterRunStatus.FAILURE
            ended.append(
                Ended(
                    run_id=run.run_id,
                    job=names.job if run.job_name == IMPLICIT_JOB and subject == names.job else run.job_name,
                    subject=subject,
                    ended_ms=ended_ms,
                    retry=_retry(run) if failed else Retry.NO,
                    failure=failure_of(context.instance, run.run_id) if failed else None,
                    link=to.link(run.run_id),
                )
            )
    return sorted(ended, key=lambda run: run.ended_ms)


def _updated(instance: dg.DagsterInstance, job: str, after: datetime) -> Sequence[dg.RunRecord]:
    records: list[dg.RunRecord] = []
    while True:
        page = instance.get_run_records(
            dg.RunsFilter(job_name=job, statuses=_ENDED, updated_after=after),
            limit=PAGE_RUNS,
            ascending=True,
            cursor=records[-1].dagster_run.run_id if records else None,
        )
        records += page
        if len(page) < PAGE_RUNS:
            return records


def _ping(names: Names, memory: RunAlerts, heartbeat: HeartbeatResource, ended: Sequence[Ended]) -> None:
    """`/fail` for a drain that could not say so itself: its worker was killed, or never came up."""
    for run in ended:
        if run.subject != names.job:
            continue
        if run.failure is None:
            memory.fail_owed = False
        elif run.run_id in memory.seen and run.run_id not in memory.waiting and run.retry is not Retry.LAUNCHED:
            memory.fail_owed = memory.fail_owed or (not run.failure.told and memory.is_news(run))
    if memory.fail_owed and heartbeat.is_set and heartbeat.fail():
        memory.fail_owed = False


# ── around the numbers ───────────────────────────────────────────────────────────────────────────


def _around(context: dg.SensorEvaluationContext, names: Names) -> Around:
    """What Dagster knows about drains of this outbox."""
    instance = context.instance
    on: list[str] = []
    off: list[str] = []
    states = {
        state.instigator_name: state.status.value
        for state in instance.all_instigator_state()
        if state.instigator_name in (names.of("outbox_backlog_sensor"), names.of("audit_log_export_schedule"))
        and (
            context.code_location_origin is None
            or state.origin.repository_origin.code_location_origin.location_name
            == context.code_location_origin.location_name
        )
    }
    for starter in (names.of("outbox_backlog_sensor"), names.of("audit_log_export_schedule")):
        (on if states.get(starter) in ("RUNNING", "DECLARED_IN_CODE") else off).append(starter)
    running: list[dg.DagsterRun] = []
    queued: list[dg.DagsterRun] = []
    for run in instance.get_runs(dg.RunsFilter(statuses=[*_BEFORE_THE_END, dg.DagsterRunStatus.QUEUED]), limit=200):
        if _here(context, run) and _subject(names, (), run) == names.job:
            (queued if run.status is dg.DagsterRunStatus.QUEUED else running).append(run)
    failed = failed_in_a_row(instance, names)
    throttles = [_throttle(run, names) for run in running]
    failure = failure_of(instance, failed[0].dagster_run.run_id) if failed else None
    return Around(
        starters_on=on,
        starters_off=off,
        running=[run.run_id for run in running],
        queued=[run.run_id for run in queued],
        failed_in_a_row=len(failed),
        last_failure=f"{failure.error}: {failure.line}" if failure else "",
        throttled_rows_per_s=max(throttles, default=0.0),
    )


def _throttle(run: dg.DagsterRun, names: Names) -> float:
    """`max_rows_per_second` as the run was launched with; 0 when it is not throttled, or not ours to read."""
    value: object = run.run_config
    for key in ("ops", names.node, "config", "max_rows_per_second"):
        value = value.get(key) if isinstance(value, dict) else None
    return float(value) if isinstance(value, (int, float)) else 0.0
