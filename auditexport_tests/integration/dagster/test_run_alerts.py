"""Who is told of runs: the sensor on a real Dagster instance, real servers and a real webhook."""

from __future__ import annotations

import json
import logging
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.core.notices import Policy
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_pipeline.defs import alerts, resources
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import (
    DEAD_MYSQL,
    DEAD_PORT,
    Clock,
    Sensor,
    cannot_begin,
    died,
    ended_untold,
    failing,
)
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, event
from auditexport_tests.support.webhook import SECRET, Webhook

pytestmark = [pytest.mark.usefixtures("no_waits"), pytest.mark.slow]


@pytest.fixture
def runs(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    """The sensor on runs, past its first look."""
    sensor = Sensor(exporter, stack, "run_alerts")
    assert sensor.tick() == "0 alerts sent, 0 stand"
    return sensor


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
