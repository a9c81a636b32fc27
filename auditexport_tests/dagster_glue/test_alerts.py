"""Who is told: the two alert sensors on a real Dagster instance, real servers and a real webhook."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from datetime import datetime, timezone
from typing import Any

import dagster as dg
import msgspec
import pytest

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.notices import Policy
from auditexport_pipeline.core.run_alerts import RunAlerts
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_pipeline.defs import alerts, failures, resources
from auditexport_pipeline.defs.resources import AlertsResource, HeartbeatResource, MySQLResource
from auditexport_tests.conftest import Stack
from auditexport_tests.dagster_glue.conftest import ASSET, Exporter, event, events, launchpad
from auditexport_tests.webhook import SECRET, Webhook, webhook

DEAD_PORT = "http://default@127.0.0.1:1/default"
DEAD_MYSQL = "mysql+pymysql://nobody:very-secret@127.0.0.1:1/app"


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(failures, "STEP_RETRIES", 0)


@pytest.fixture
def hook(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as listening:
        monkeypatch.setenv("AUDITEXPORT_ALERT_WEBHOOK_URL", listening.url)
        monkeypatch.setenv("AUDITEXPORT_PAGE_URL", "https://dagster.example.com/")
        yield listening


@pytest.fixture
def heart(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as listening:
        monkeypatch.setenv("AUDITEXPORT_HEARTBEAT_URL", listening.url)
        yield listening


class Clock:
    """The sensors' clock, which a test sets forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return __import__("time").time() + self.ahead_s

    def monotonic(self) -> float:
        return float(__import__("time").monotonic())


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    forward = Clock()
    monkeypatch.setattr(alerts, "time", forward)
    return forward


class Sensor:
    """An alert sensor as the daemon ticks it, its cursor carried from tick to tick."""

    def __init__(self, exporter: Exporter, stack: Stack, name: str, definitions: dg.Definitions = defs) -> None:
        self._instance = exporter.instance
        self._definitions = definitions
        self.name = name
        self.mysql_url = stack.mysql_url
        self.cursor: str | None = None

    def tick(self) -> str:
        """One evaluation; what it says."""
        sensor = self._definitions.resolve_sensor_def(self.name)
        prefix = self.name.removesuffix("run_alerts").removesuffix("number_alerts")
        every = {
            "mysql": MySQLResource(url=self.mysql_url),
            "alerts": AlertsResource(),
            "heartbeat": HeartbeatResource(),
        }
        with dg.build_sensor_context(
            instance=self._instance,
            cursor=self.cursor,
            resources={
                f"{prefix}{key}": each
                for key, each in every.items()
                if f"{prefix}{key}" in sensor.required_resource_keys
            },
        ) as context:
            result = sensor._raw_fn(context)
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        self.cursor = result.cursor
        assert result.skip_reason is not None
        return str(result.skip_reason.skip_message)

    def later(self, seconds: float) -> None:
        """Sets what it remembers back, which is the same as its clock forward, but not the runs'."""
        memory = msgspec.json.decode(self.cursor or "", type=RunAlerts)
        for stands in memory.board.standing.values():
            stands.told_ms -= int(seconds * 1000)
        memory.waiting = {
            run_id: msgspec.structs.replace(waits, ended_ms=waits.ended_ms - int(seconds * 1000))
            for run_id, waits in memory.waiting.items()
        }
        self.cursor = msgspec.json.encode(memory).decode()


@pytest.fixture
def runs(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    """The sensor on runs, past its first look."""
    sensor = Sensor(exporter, stack, "run_alerts")
    assert sensor.tick() == "0 alerts sent, 0 stand"
    return sensor


def failing(exporter: Exporter, monkeypatch: pytest.MonkeyPatch, **settings: object) -> str:
    """The id of a drain that failed because ClickHouse is away."""
    with monkeypatch.context() as away:
        away.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
        return exporter.drain(raise_on_error=False, **settings).run_id


def died(
    exporter: Exporter, job: str = "audit_log_export", selection: frozenset[dg.AssetKey] | None = None
) -> dg.DagsterRun:
    """A run that failed from outside, as when its worker was killed, and that Dagster does not launch again."""
    run = exporter.put_run(job, "STARTED", selection)
    exporter.instance.report_run_failed(run, "Run worker process unexpectedly exited")
    exporter.instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
    return run


def ended_untold(exporter: Exporter) -> dg.DagsterRun:
    """A run whose failure is stored, to the microsecond, and of whose retry Dagster has yet to speak."""
    run = exporter.put_run("audit_log_export", "STARTED")
    failed = dg.DagsterEvent(event_type_value="PIPELINE_FAILURE", job_name=run.job_name)
    exporter.instance.run_storage.handle_run_event(run.run_id, failed, datetime.now(timezone.utc))
    found = exporter.instance.get_run_by_id(run.run_id)
    assert found is not None
    assert found.status is dg.DagsterRunStatus.FAILURE
    assert "dagster/will_retry" not in found.tags
    return found


class Broken(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Somebody's database that cannot be set up."""

    url: str = ""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        raise ValueError("very-secret-payload")


def cannot_begin(exporter: Exporter) -> None:
    """A drain that fails before its first step could tell anybody."""
    broken = dg.Definitions.merge(
        build_audit_export_defs(mysql=Broken()), dg.Definitions(executor=dg.in_process_executor)
    )
    result = broken.resolve_job_def("audit_log_export").execute_in_process(
        instance=exporter.instance, raise_on_error=False
    )
    assert not result.success
    exporter.instance.add_run_tags(result.run_id, {"dagster/will_retry": "false"})


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


def test_a_failed_drain_is_told_once_and_its_recovery_once(
    runs: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On call reads one message when it begins and one when it is over, whatever the number of failed runs between."""
    stack.put(event("evt_1", description="very-secret-payload"))
    run_id = failing(exporter, monkeypatch)
    assert runs.tick() == "1 alerts sent, 1 stand"
    (text,) = hook.texts()
    title, what, run, since, todo = text.splitlines()
    assert title == "*[ERROR] auditexport: audit_log_export failed*"
    assert what.startswith("AuditLogUnavailable at plan_batches: ClickHouse ")
    assert run == f"Run: {run_id} https://dagster.example.com/runs/{run_id}"
    assert since.startswith("Since: 20")
    assert todo.startswith("Do: nothing is lost and the next run continues")
    assert "very-secret-payload" not in text

    for _ in range(3):
        failing(exporter, monkeypatch)
    assert runs.tick() == "0 alerts sent, 1 stand"
    assert runs.tick() == "0 alerts sent, 1 stand"
    assert hook.texts() == []

    run_id = exporter.drain().run_id
    assert runs.tick() == "1 alerts sent, 0 stand"
    (text,) = hook.texts()
    assert text.startswith(
        "*[RECOVERED] auditexport: audit_log_export failed*\na run of audit_log_export has succeeded; 4 runs"
    )
    assert run_id in text
    exporter.drain()
    assert runs.tick() == "0 alerts sent, 0 stand"
    assert hook.texts() == []


def test_what_still_fails_is_told_again_after_hours_and_a_new_cause_at_once(
    runs: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page that was missed at night must come again, and a second trouble must not hide behind the first."""
    failing(exporter, monkeypatch)
    runs.tick()
    hook.bodies.clear()
    runs.later(3_600 * 5)
    runs.tick()
    assert hook.texts() == []
    stack.sql("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx")
    exporter.drain(raise_on_error=False)
    runs.tick()
    (text,) = hook.texts()
    assert "SetupIncomplete at plan_batches: " in text
    assert "Do: auditexport doctor" in text
    runs.later(3_600 * 5)
    runs.tick()
    assert hook.texts() == []
    runs.later(3_600 * 1.1)
    runs.tick()
    (text,) = hook.texts()
    assert "still so, 2 times by now: SetupIncomplete" in text


def test_a_launch_from_the_page_is_told_and_heals_with_any_other_drain(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Materialize runs Dagster's implicit asset job, which a sensor on jobs does not see."""
    job = defs.get_repository_def().get_job("__ASSET_JOB")
    with monkeypatch.context() as away:
        away.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
        failed = job.execute_in_process(instance=exporter.instance, asset_selection=[ASSET], raise_on_error=False)
    assert not failed.success
    runs.tick()
    (text,) = hook.texts()
    assert "audit_log_export failed" in text
    assert failed.run_id in text
    exporter.drain()
    runs.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: audit_log_export failed"]


@pytest.mark.parametrize(
    "job",
    ["requeue_events", "sweep_exported_rows", "reconcile_audit_logs", "retry_dead_letters", "purge_old_runs"],
)
def test_upkeep_that_fails_is_told_and_does_not_heal_with_a_drain(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch, job: str
) -> None:
    """A sweep that has failed for a week fills MySQL's disk while every drain is green."""
    died(exporter, job)
    runs.tick()
    assert hook.titles() == [f"[ERROR] auditexport: {job} failed"]
    exporter.drain()
    runs.tick()
    assert hook.titles() == []
    exporter.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name=job), exporter.put_run(job, "STARTED").run_id
    )
    runs.tick()
    assert hook.titles() == [f"[RECOVERED] auditexport: {job} failed"]


def test_a_job_s_own_error_line_is_in_the_notice(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one line why is what saves on call the way to the page."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", DEAD_MYSQL)
    for job, config in (
        ("sweep_exported_rows", {}),
        ("retry_dead_letters", {"ops": {"retry_letters": {"config": {"why": "test", "everything": True}}}}),
    ):
        defs.resolve_job_def(job).execute_in_process(
            instance=exporter.instance, raise_on_error=False, run_config=config
        )
        runs.tick()
        (text,) = hook.texts()
        assert f"{job} failed" in text
        assert "MySQL failed while" in text
        assert "very-secret" not in text


def test_runs_of_others_are_nobody_s_alert(runs: Sensor, exporter: Exporter, hook: Webhook) -> None:
    """In an instance that many share, everybody's failures would bury ours."""
    other = dg.AssetKey("something_else")
    for job, selection in (("their_job", None), ("__ASSET_JOB", frozenset([other]))):
        died(exporter, job, selection)
    assert runs.tick() == "0 alerts sent, 0 stand"
    died(exporter, "__ASSET_JOB", frozenset([other, ASSET]))
    assert runs.tick() == "1 alerts sent, 1 stand"


def test_two_outboxes_in_one_location_have_alerts_of_their_own(exporter: Exporter, stack: Stack, hook: Webhook) -> None:
    """Whoever is called must know which outbox; and one that works must not settle the other's alarm."""
    both = dg.Definitions.merge(build_audit_export_defs("eu"), build_audit_export_defs("us"))
    sensors = {name: Sensor(exporter, stack, f"{name}_run_alerts", both) for name in ("eu", "us")}
    for sensor in sensors.values():
        sensor.tick()
    died(exporter, "eu_audit_log_export")
    for sensor in sensors.values():
        sensor.tick()
    assert hook.titles() == ["[ERROR] auditexport eu: eu_audit_log_export failed"]


def test_a_failure_that_dagster_retries_is_muted_until_the_retry_fails_or_does_not_come(
    runs: Sensor, exporter: Exporter, hook: Webhook
) -> None:
    """A worker that died is launched again in seconds: nobody has to get up for it, unless that fails too."""
    instance = exporter.instance

    def to_be_retried() -> dg.DagsterRun:
        run = exporter.put_run("audit_log_export", "STARTED")
        instance.report_run_failed(run, "Run worker process unexpectedly exited")
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        return found

    first = to_be_retried()
    # Dagster itself said so, by the repository's own dagster.yaml.
    assert first.tags["dagster/will_retry"] == "true"
    assert runs.tick().endswith("1 failed runs are to be launched again by Dagster")
    assert hook.titles() == []
    # The daemon has launched it, and the retry works.
    retry = exporter.put_run("audit_log_export", "STARTED")
    instance.add_run_tags(first.run_id, {"dagster/auto_retry_run_id": retry.run_id})
    instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name="audit_log_export"), retry.run_id
    )
    assert runs.tick() == "0 alerts sent, 0 stand"
    runs.later(600)
    assert runs.tick() == "0 alerts sent, 0 stand"

    # The daemon could not launch the retry, and says so by the tag.
    second = to_be_retried()
    runs.tick()
    assert hook.titles() == []
    instance.add_run_tags(second.run_id, {"dagster/will_retry": "false"})
    runs.tick()
    (text,) = hook.texts()
    assert second.run_id in text
    assert "Run worker process unexpectedly exited" in text
    exporter.drain()
    runs.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: audit_log_export failed"]

    # The daemon lost the retry.
    to_be_retried()
    runs.tick()
    assert hook.titles() == []
    runs.later(301)
    runs.tick()
    (text,) = hook.texts()
    assert "Dagster said that it would launch it again, and has not" in text


def test_the_last_of_dagster_s_retries_is_told(runs: Sensor, exporter: Exporter, hook: Webhook) -> None:
    """Muting ends where Dagster gives up; a tag on every failure would otherwise be silence."""
    instance = exporter.instance
    root = exporter.put_run("audit_log_export", "STARTED")
    instance.report_run_failed(root)
    told = []
    previous = root
    for number in (1, 2):
        retry = exporter.put_run("audit_log_export", "STARTED")
        instance.add_run_tags(previous.run_id, {"dagster/auto_retry_run_id": retry.run_id})
        instance.delete_run(retry.run_id)
        retry = instance.add_run(
            retry.with_tags(
                {
                    "dagster/root_run_id": root.run_id,
                    "dagster/parent_run_id": previous.run_id,
                    "dagster/retry_number": str(number),
                }
            )._replace(root_run_id=root.run_id, parent_run_id=previous.run_id)
        )
        instance.report_run_failed(retry)
        runs.tick()
        told.append(hook.titles())
        previous = retry
    assert told == [[], ["[ERROR] auditexport: audit_log_export failed"]]


def test_before_dagster_has_said_whether_it_retries_nothing_is_told(
    runs: Sensor, exporter: Exporter, hook: Webhook, clock: Clock
) -> None:
    """The end of a run is stored a moment before the tag: a look between the two must not page."""
    run = ended_untold(exporter)
    runs.tick()
    assert hook.titles() == []
    exporter.instance.add_run_tags(run.run_id, {"dagster/will_retry": "true"})
    assert runs.tick().endswith("1 failed runs are to be launched again by Dagster")
    untold = ended_untold(exporter)
    runs.tick()
    clock.ahead_s += 61
    runs.tick()
    (text,) = hook.texts()
    assert untold.run_id in text


def test_what_happened_before_the_webhook_was_set_is_not_told(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting it up must not begin with last month's failures."""
    sensor = Sensor(exporter, stack, "run_alerts")
    with monkeypatch.context() as unset:
        unset.delenv("AUDITEXPORT_ALERT_WEBHOOK_URL")
        said = sensor.tick()
        assert said.startswith("nobody is told: set AUDITEXPORT_ALERT_WEBHOOK_URL to an incoming webhook")
        assert '{"text": …}' in said
        failing(exporter, monkeypatch)
        sensor.tick()
        assert Sensor(exporter, stack, "number_alerts").tick().startswith("nobody is told: set AUDITEXPORT_ALERT_")
    sensor.tick()
    sensor.tick()
    assert hook.titles() == []


@pytest.mark.parametrize("trouble", ["erroring", "unreachable", "not a URL", "not http", "silent", "dripping"])
def test_a_webhook_in_trouble_keeps_its_notices_for_later_and_its_url_to_itself(
    runs: Sensor,
    exporter: Exporter,
    hook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    """It must neither hold the daemon up nor lose the alarm, and whoever knows the URL can raise false ones."""
    failing(exporter, monkeypatch)
    monkeypatch.setattr(resources, "NOTICE_TIMEOUT_S", 0.2)
    urls = {
        "unreachable": f"http://127.0.0.1:1/{SECRET}",
        "not a URL": f"http://[{SECRET}",
        "not http": f"file:///{SECRET}",
    }
    hook.answer = 500 if trouble == "erroring" else 200
    hook.holds, hook.drips = trouble == "silent", trouble == "dripping"
    with monkeypatch.context() as troubled, caplog.at_level(logging.DEBUG):
        troubled.setenv("AUDITEXPORT_ALERT_WEBHOOK_URL", urls.get(trouble, hook.url))
        assert runs.tick() == "0 alerts sent, 1 wait to be sent, 1 stand"
        assert runs.tick() == "0 alerts sent, 1 wait to be sent, 1 stand"
        assert "1 alerts could not be sent (" in caplog.text
        assert SECRET not in caplog.text + str(runs.cursor)
    hook.answer, hook.holds, hook.drips = 200, False, False
    hook.released.set()
    hook.bodies.clear()
    exporter.drain()
    assert runs.tick() == "2 alerts sent, 0 stand"
    assert hook.titles() == [
        "[ERROR] auditexport: audit_log_export failed",
        "[RECOVERED] auditexport: audit_log_export failed",
    ]


def test_a_cursor_that_somebody_set_by_hand_begins_anew(runs: Sensor, exporter: Exporter, hook: Webhook) -> None:
    """The page lets people edit it; the sensor must not fail for it ever after."""
    for cursor in ("", "12345", "nonsense", '{"from_ms": "x"}'):
        runs.cursor = cursor
        assert runs.tick() == "0 alerts sent, 0 stand"


def test_the_body_is_what_slack_takes(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`text` alone has to say it, and the fields are for whoever routes by them."""
    run_id = failing(exporter, monkeypatch)
    runs.tick()
    (body,) = hook.bodies
    assert set(body) == {"text", "attachments"}
    (attachment,) = body["attachments"]
    fields = {each["title"]: each["value"] for each in attachment["fields"]}
    assert attachment["color"] == "danger"
    assert {key: fields[key] for key in ("kind", "severity", "about", "job", "run")} == {
        "kind": "alert",
        "severity": "error",
        "about": "audit_log_export",
        "job": "audit_log_export",
        "run": run_id,
    }
    assert hook.paths == [f"/{SECRET}"]


def test_dagster_s_own_failure_sensor_can_take_the_text(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever has Slack's, Teams' or a mail integration of Dagster's gives it our line instead of the whole error."""
    run_id = failing(exporter, monkeypatch)
    run = exporter.instance.get_run_by_id(run_id)
    assert run is not None
    assert not alerts.will_be_retried(run)
    (record,) = exporter.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records
    texts: list[str] = []

    @dg.run_failure_sensor
    def theirs(context: dg.RunFailureSensorContext) -> None:
        texts.append(alerts.failure_text(context))

    theirs(
        dg.build_run_status_sensor_context(
            "theirs", record.event_log_entry.dagster_event, exporter.instance, run
        ).for_run_failure()
    )
    (text,) = texts
    assert "AuditLogUnavailable at plan_batches: ClickHouse " in text
    assert f"https://dagster.example.com/runs/{run_id}" in text


def test_the_text_of_an_error_that_is_not_ours_is_withheld(
    runs: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Somebody's resource or hook may quote a row in what it raises; a chat keeps it for ever."""

    @dg.op
    def theirs() -> None:
        raise ValueError("very-secret-payload")

    @dg.job(name="requeue_events")
    def replaced() -> None:
        theirs()

    replaced.execute_in_process(instance=exporter.instance, raise_on_error=False)
    cannot_begin(exporter)
    runs.tick()
    both = hook.texts()
    assert "very-secret-payload" not in str(both)
    assert any("ValueError at theirs: its text is withheld" in text for text in both)
    assert any("audit_log_export failed" in text for text in both)


# ── the heartbeat ────────────────────────────────────────────────────────────────────────────────


def test_a_drain_that_died_without_a_word_is_told_to_the_heartbeat_by_the_sensor(
    exporter: Exporter, stack: Stack, heart: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A killed worker sends no /fail, and the check would wait for its grace time. No webhook is needed for it."""
    sensor = Sensor(exporter, stack, "run_alerts")
    sensor.tick()
    died(exporter, "sweep_exported_rows")
    sensor.tick()
    assert heart.paths == []
    run = exporter.put_run("audit_log_export", "STARTED")
    exporter.instance.report_run_failed(run)
    sensor.tick()
    assert heart.paths == []  # Dagster launches it again
    exporter.instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
    heart.answer = 500
    sensor.tick()
    heart.answer = 200
    sensor.tick()
    sensor.tick()
    assert heart.paths == [f"/{SECRET}/fail"] * 2  # the first was answered 500


def test_a_failure_that_a_step_has_told_is_not_told_to_the_heartbeat_again(
    exporter: Exporter, stack: Stack, heart: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /fail after the success of a later run would be a false alarm."""
    sensor = Sensor(exporter, stack, "run_alerts")
    sensor.tick()
    failing(exporter, monkeypatch)
    real = export.mark

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(export, "mark", broken)
    stack.put(*events(1))
    exporter.drain(raise_on_error=False)
    monkeypatch.setattr(export, "mark", real)
    assert heart.paths == [f"/{SECRET}/start", f"/{SECRET}/fail"] * 2
    heart.paths.clear()
    sensor.tick()
    assert heart.paths == []
    # One that died, and another that succeeded before anybody looked.
    died(exporter)
    exporter.drain()
    heart.paths.clear()
    sensor.tick()
    assert heart.paths == []


@pytest.mark.parametrize("trouble", ["silent", "dripping"])
def test_a_heartbeat_that_does_not_answer_holds_no_drain_up(
    exporter: Exporter, stack: Stack, heart: Webhook, monkeypatch: pytest.MonkeyPatch, trouble: str
) -> None:
    """A time-out of a socket is one for each byte; a run that waits for the last one exports nothing meanwhile."""
    monkeypatch.setattr(resources, "HEARTBEAT_TIMEOUT_S", 0.2)
    heart.holds, heart.drips = trouble == "silent", trouble == "dripping"
    stack.put(*events(2))
    run_id = exporter.drain().run_id
    lines = [entry.user_message for entry in exporter.instance.all_logs(run_id)]
    assert sum("could not be sent (TimeoutError)" in line for line in lines) == 2
    assert stack.counts() == (2, 2)


def test_a_drain_that_cannot_even_begin_is_told_to_the_heartbeat(
    exporter: Exporter, stack: Stack, heart: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A setting that is missing stops a run before its first step can tell anybody."""
    sensor = Sensor(exporter, stack, "run_alerts")
    sensor.tick()
    cannot_begin(exporter)
    assert heart.paths == []
    sensor.tick()
    assert heart.paths == [f"/{SECRET}/fail"]


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def numbers(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    return Sensor(exporter, stack, "number_alerts")


def age(stack: Stack, seconds: float) -> None:
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - :ms", ms=int(seconds * 1000))


def test_a_backlog_that_does_not_shrink_is_told_with_numbers_and_reasons_and_its_recovery(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """An exporter that nobody starts fails no run: this is the alarm that tells it from an idle one."""
    stack.put(*events(30))
    age(stack, 400)
    for _ in range(10):
        numbers.tick()
        clock.ahead_s += 60
    assert hook.titles() == []
    numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: the backlog is not shrinking*")
    assert "30 rows are pending (30 10 min ago), the oldest for" in text
    assert "(target 5 min)" in text
    assert "no run is at work, and nothing starts one" in text
    assert "outbox_backlog_sensor and audit_log_export_schedule are off" in text
    clock.ahead_s += 60
    numbers.tick()
    assert hook.texts() == []
    exporter.drain()
    clock.ahead_s += 60
    assert numbers.tick() == "1 alerts sent, 0 stand: 0 pending rows, lag 0 s"
    (text,) = hook.texts()
    assert text.startswith(
        "*[RECOVERED] auditexport: the backlog is not shrinking*\nit is over: 0 rows pending, lag 0 s"
    )


def test_the_reasons_name_failed_runs_waiting_runs_and_a_throttle(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number of rows has five different remedies."""
    stack.put(*events(3))
    stack.put(event("evt_unknown"), version="audit_log.v9")
    age(stack, 4_000)
    failing(exporter, monkeypatch)

    def told() -> str:
        numbers.cursor = ""
        numbers.tick()
        clock.ahead_s += 601
        numbers.tick()
        return next(text for text in hook.texts() if "not shrinking" in text)

    text = told()
    assert "the last run failed (AuditLogUnavailable: ClickHouse " in text
    assert "no run is at work" in text
    assert "1 rows are of unknown versions" in text
    queued = exporter.put_run("audit_log_export", "QUEUED")
    assert f"run {queued.run_id[:8]} waits in the queue" in told()
    exporter.instance.delete_run(queued.run_id)
    run = exporter.put_run("audit_log_export", "STARTED")
    exporter.instance.delete_run(run.run_id)
    exporter.instance.add_run(run._replace(run_config=launchpad({"max_rows_per_second": 50})))
    text = told()
    assert f"run {run.run_id[:8]} is at work and has exported nothing lately" in text
    assert "throttled to 50 rows/s by max_rows_per_second" in text


def test_a_backlog_that_shrinks_or_is_within_its_target_alarms_nobody(
    numbers: Sensor, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """A long drain of a big backlog is what should happen; an alarm for it is one that people learn to ignore."""
    stack.put(*events(40))
    age(stack, 4_000)
    for _ in range(15):
        numbers.tick()
        clock.ahead_s += 60
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE deleted_at IS NULL ORDER BY pk LIMIT 2")
    assert hook.titles() == []
    stack.sql("UPDATE clickhouse_outbox SET created_at = UNIX_TIMESTAMP() * 1000")
    for _ in range(15):
        numbers.tick()
        clock.ahead_s += 60
    assert hook.titles() == []


def test_unknown_versions_and_dead_letters_are_told_once_and_when_they_are_gone(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook
) -> None:
    """No drain ever fails for them, and both wait for a person."""
    numbers.tick()
    stack.put(*events(2), version="audit_log.v9")
    stack.put(("ws_1", "evt_dead", '{"secret-payload": 1}'))
    exporter.drain()
    for _ in range(3):
        numbers.tick()
    texts = hook.texts()
    assert [text.splitlines()[0] for text in texts] == [
        "*[WARNING] auditexport: dead letters*",
        "*[WARNING] auditexport: unknown versions*",
    ]
    assert "audit_log.v9 2" in texts[1]
    assert "Do: upgrade auditexport" in texts[1]
    assert "secret-payload" not in str(texts)
    stack.sql("DELETE FROM clickhouse_outbox WHERE version = 'audit_log.v9'")
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: unknown versions"]


def test_a_batch_that_stays_open_is_told(
    numbers: Sensor, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its rows: they are not pending, so no backlog shows them."""
    stack.put(*events(2))
    claiming.claim(stack.outbox, owner="a-dead-run", dead_owners=[], limits=Limits())
    numbers.tick()
    assert hook.titles() == []
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - 1000000, lease_until_ms = 1 WHERE batch_id > 0"
    )
    numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: open batches*")
    assert "batch 1 (claimed, 2 rows," in text
    monkeypatch.setenv("AUDITEXPORT_TARGET_BATCH_OPEN_MINUTES", "30")
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: open batches"]


def test_mysql_away_is_told_after_a_while_and_a_refusal_at_once(
    numbers: Sensor, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """A failover takes seconds; an outage leaves every other number unknown, not fine."""
    stack.put(event("evt_1"), version="audit_log.v9")
    numbers.tick()
    assert hook.titles() == ["[WARNING] auditexport: unknown versions"]
    good, numbers.mysql_url = numbers.mysql_url, DEAD_MYSQL
    numbers.tick()
    clock.ahead_s += 60
    numbers.tick()
    assert hook.titles() == []
    clock.ahead_s += 121
    said = numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: the outbox cannot be read*\nMySQL failed while reading the status")
    assert "very-secret" not in text + said + str(numbers.cursor)
    numbers.mysql_url = good
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    numbers.tick()
    (text,) = hook.texts()
    assert "clickhouse_outbox_dead_letter" in text
    assert "Do: auditexport doctor" in text


def test_a_mysql_that_hangs_is_told_before_dagster_gives_the_tick_up(
    numbers: Sensor, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A firewall that drops packets lets a connection hang for minutes; a tick that is given up tells nobody."""
    monkeypatch.setattr(alerts, "READ_WITHIN_S", 0.3)
    numbers.tick()
    with stack.outbox.engine.connect() as holder:
        holder.exec_driver_sql("LOCK TABLES clickhouse_outbox_batch WRITE")
        try:
            assert numbers.tick() == "0 alerts sent, 0 stand: MySQL did not answer within 0 s; run again"
            clock.ahead_s += 200
            numbers.tick()
            assert hook.titles() == ["[ERROR] auditexport: the outbox cannot be read"]
        finally:
            holder.exec_driver_sql("UNLOCK TABLES")
    monkeypatch.setattr(alerts, "READ_WITHIN_S", 20)
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AUDITEXPORT_ALERT_REPEAT_HOURS", "0"),
        ("AUDITEXPORT_ALERT_REPAET_HOURS", "6"),
        ("AUDITEXPORT_TARGET_LAG_S", "soon"),
    ],
)
def test_a_wrong_setting_fails_the_tick_with_its_name(
    numbers: Sensor, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """An alarm with a silently ignored setting is found out on the wrong day."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(dg.Failure) as refused:
        numbers.tick()
    assert variable.rpartition("REPEAT_HOURS")[1].lower() in str(refused.value.description) or variable in str(
        refused.value.description
    )


def test_the_sensors_are_on_and_ask_for_nothing_else(exporter: Exporter) -> None:
    """Harmless without a webhook, so nobody has to remember to turn them on."""
    for name in ("run_alerts", "number_alerts"):
        sensor = defs.resolve_sensor_def(name)
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        assert not sensor.targets
    assert Policy().repeat_hours == 6


def test_somebody_s_own_sender_takes_the_notices(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PagerDuty, mail, Teams: an object with three methods, and muting and deduplication stay ours."""
    sent: list[dict[str, Any]] = []

    class Pager(dg.ConfigurableResource):  # type: ignore[type-arg]
        routing_key: str = "R1"

        @property
        def is_set(self) -> bool:
            return True

        def link(self, run_id: str) -> str:
            return f"pager:{run_id}"

        def send(self, body: dict[str, Any]) -> str:
            sent.append(body)
            return ""

    theirs = build_audit_export_defs(alerts=Pager())
    given = theirs.resources or {}
    cursor = None
    for _ in range(2):
        with dg.build_sensor_context(
            instance=exporter.instance, cursor=cursor, resources={key: given[key] for key in ("alerts", "heartbeat")}
        ) as context:
            cursor = theirs.resolve_sensor_def("run_alerts")._raw_fn(context).cursor
        run_id = failing(exporter, monkeypatch)
    with dg.build_sensor_context(
        instance=exporter.instance, cursor=cursor, resources={key: given[key] for key in ("alerts", "heartbeat")}
    ) as context:
        theirs.resolve_sensor_def("run_alerts")._raw_fn(context)
    assert len(sent) == 1
    assert "pager:" in json.dumps(sent)
    assert run_id
