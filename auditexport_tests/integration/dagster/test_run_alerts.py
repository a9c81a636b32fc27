"""Alerts of runs: the sensor on a real Dagster instance, real servers and a real webhook."""

from __future__ import annotations

import logging
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.core.alerts import Retry
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_pipeline.defs import alerts, resources
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import (
    DEAD_MYSQL,
    DEAD_PORT,
    Sensor,
    cannot_begin,
    died,
    failing,
    succeeded,
)
from auditexport_tests.integration.dagster.conftest import ASSET, Clock, Exporter, event
from auditexport_tests.support.webhook import SECRET, Webhook

pytestmark = [pytest.mark.usefixtures("no_waits"), pytest.mark.slow]


@pytest.fixture
def runs(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    """The sensor on runs, past its first tick."""
    sensor = Sensor(exporter, stack, "run_alerts")
    assert sensor.tick() == "alerts: 0 sent, 0 active"
    return sensor


def test_a_failed_drain_is_one_alert_and_one_recovery(
    runs: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On call reads one message when it begins and one when it is over, whatever the number of failed runs between."""
    stack.put(event("evt_1", description="very-secret-payload"))
    run_id = failing(exporter, monkeypatch)
    assert runs.tick() == "alerts: 1 sent, 1 active"
    (text,) = hook.texts()
    title, what, run, since, todo = text.splitlines()
    assert title == "*[ERROR] auditexport: audit_log_export failed*"
    assert what.startswith("AuditLogUnavailable at plan_batches: ClickHouse ")
    assert run == f"Run: {run_id} https://dagster.example.com/runs/{run_id}"
    assert since.startswith("Since: 20")
    assert todo.startswith("Do: nothing is lost and the next run continues")
    assert "very-secret-payload" not in text
    failing(exporter, monkeypatch)
    for _ in range(2):
        assert runs.tick() == "alerts: 0 sent, 1 active"
    run_id = exporter.drain().run_id
    assert runs.tick() == "alerts: 1 sent, 0 active"
    (text,) = hook.texts()
    assert text.startswith(
        "*[RECOVERED] auditexport: audit_log_export failed*\na run of audit_log_export has succeeded; 2 runs had failed"
    )
    assert run_id in text
    exporter.drain()
    assert runs.tick() == "alerts: 0 sent, 0 active"
    assert hook.paths == [f"/{SECRET}"] * 2


def test_a_run_of_the_ui_fires_and_any_drain_resolves_it(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Materialize runs Dagster's implicit asset job, which a sensor on jobs does not see."""
    job = defs.get_repository_def().get_job("__ASSET_JOB")
    with monkeypatch.context() as away:
        away.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
        failed = job.execute_in_process(instance=exporter.instance, asset_selection=[ASSET], raise_on_error=False)
    runs.tick()
    (text,) = hook.texts()
    assert "audit_log_export failed" in text
    assert failed.run_id in text
    succeeded(exporter)
    runs.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: audit_log_export failed"]


def test_a_drain_does_not_resolve_another_job_s_alert(runs: Sensor, exporter: Exporter, hook: Webhook) -> None:
    """A sweep that has failed for a week fills MySQL's disk while every drain is green."""
    jobs = [job.name for job in defs.resolve_all_job_defs() if job.name not in ("audit_log_export", "__ASSET_JOB")]
    assert len(jobs) == 6
    for job in jobs:
        died(exporter, job)
    runs.tick()
    assert sorted(hook.titles()) == sorted(f"[ERROR] auditexport: {job} failed" for job in jobs)
    succeeded(exporter)
    runs.tick()
    assert hook.titles() == []
    for job in jobs:
        succeeded(exporter, job)
    runs.tick()
    assert sorted(hook.titles()) == sorted(f"[RECOVERED] auditexport: {job} failed" for job in jobs)


def test_the_notice_has_the_job_s_own_error_line(
    runs: Sensor, exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The one line that says why saves on call the way to the Dagster UI."""
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


def test_runs_of_other_jobs_fire_nothing(runs: Sensor, exporter: Exporter) -> None:
    """In an instance that many share, other failures would bury ours."""
    other = dg.AssetKey("something_else")
    for job, selection in (("their_job", None), ("__ASSET_JOB", frozenset([other]))):
        died(exporter, job, selection)
    assert runs.tick() == "alerts: 0 sent, 0 active"
    died(exporter, "__ASSET_JOB", frozenset([other, ASSET]))
    assert runs.tick() == "alerts: 1 sent, 1 active"


def test_two_outboxes_in_one_location_have_their_own_alerts(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On call must know which outbox, and the command must not act on the other one."""
    both = dg.Definitions.merge(build_audit_export_defs("eu"), build_audit_export_defs("us"))
    sensors = {name: Sensor(exporter, stack, f"{name}_run_alerts", both) for name in ("eu", "us")}
    for sensor in sensors.values():
        sensor.tick()
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
    both.resolve_job_def("eu_audit_log_export").execute_in_process(instance=exporter.instance, raise_on_error=False)
    for sensor in sensors.values():
        sensor.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport eu: eu_audit_log_export failed*")
    assert text.endswith("auditexport --outbox eu status, then auditexport --outbox eu doctor")


def test_a_failure_that_dagster_retries_is_muted_until_the_retry_fails(
    runs: Sensor, exporter: Exporter, hook: Webhook, clock: Clock
) -> None:
    """A worker that died is launched again in seconds; an alert is due only if the retry fails too."""
    instance = exporter.instance

    def to_be_retried() -> dg.DagsterRun:
        run = exporter.put_run("audit_log_export", "STARTED")
        instance.report_run_failed(run, "Run worker process unexpectedly exited")
        found = instance.get_run_by_id(run.run_id)
        assert found is not None
        # Dagster itself says so, by the repository's own dagster.yaml.
        assert alerts.will_be_retried(found)
        return found

    first = to_be_retried()
    assert runs.tick().endswith("; Dagster will launch again: 1")
    # The daemon has launched it, and the retry works.
    instance.add_run_tags(first.run_id, {"dagster/auto_retry_run_id": succeeded(exporter).run_id})
    assert runs.tick() == "alerts: 0 sent, 0 active"

    # The daemon could not launch the retry, and says so by the tag.
    second = to_be_retried()
    runs.tick()
    assert hook.titles() == []
    instance.add_run_tags(second.run_id, {"dagster/will_retry": "false"})
    runs.tick()
    (text,) = hook.texts()
    assert second.run_id in text
    assert "Run worker process unexpectedly exited" in text
    succeeded(exporter)
    runs.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: audit_log_export failed"]

    # The daemon lost the retry.
    to_be_retried()
    runs.tick()
    assert hook.titles() == []
    clock.ahead_s += 301
    runs.tick()
    assert "Dagster has not launched the retry that it promised" in hook.texts()[0]


@pytest.mark.parametrize(
    ("tags", "retry"),
    [
        ({}, Retry.UNKNOWN),
        ({"dagster/will_retry": "true"}, Retry.WILL),
        ({"dagster/will_retry": "false"}, Retry.NO),
        ({"dagster/will_retry": "true", "dagster/auto_retry_run_id": "x"}, Retry.LAUNCHED),
    ],
)
def test_whether_dagster_retries_is_read_from_its_tags(tags: dict[str, str], retry: Retry) -> None:
    """A run has no tag for a moment after its end: unknown is not no."""
    assert alerts._retry(dg.DagsterRun(job_name="audit_log_export", tags=tags)) is retry


def test_what_happened_before_the_webhook_was_set_is_not_sent(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Setting it up must not begin with last month's failures."""
    sensors = [Sensor(exporter, stack, name) for name in ("run_alerts", "number_alerts")]
    with monkeypatch.context() as unset:
        unset.delenv("AUDITEXPORT_ALERT_WEBHOOK_URL")
        for sensor in sensors:
            reason = sensor.tick()
            assert reason.startswith("no alerts are sent: set AUDITEXPORT_ALERT_WEBHOOK_URL to an incoming webhook")
            assert '{"text": …}' in reason
        died(exporter)
        sensors[0].tick()
    for _ in range(2):
        sensors[0].tick()
    assert hook.titles() == []


@pytest.mark.parametrize("trouble", ["erroring", "not a URL", "dripping"])
def test_notices_wait_for_a_webhook_in_trouble(
    runs: Sensor,
    exporter: Exporter,
    hook: Webhook,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    """It must neither block the daemon nor lose the alert; and with its URL anybody can raise false ones."""
    died(exporter)
    monkeypatch.setattr(resources, "NOTICE_TIMEOUT_S", 0.2)
    hook.answer, hook.drips = 500 if trouble == "erroring" else 200, trouble == "dripping"
    with monkeypatch.context() as troubled, caplog.at_level(logging.DEBUG):
        if trouble == "not a URL":
            troubled.setenv("AUDITEXPORT_ALERT_WEBHOOK_URL", f"http://[{SECRET}")
        for _ in range(2):
            assert runs.tick() == "alerts: 0 sent, 1 unsent, 1 active"
        assert "alerts could not be sent (" in caplog.text
        assert SECRET not in caplog.text + str(runs.cursor)
    hook.answer, hook.drips = 200, False
    hook.released.set()
    hook.bodies.clear()
    succeeded(exporter)
    assert runs.tick() == "alerts: 2 sent, 0 active"
    assert hook.titles() == [f"[{mark}] auditexport: audit_log_export failed" for mark in ("ERROR", "RECOVERED")]


def test_a_cursor_that_was_set_by_hand_begins_anew(runs: Sensor) -> None:
    """The Dagster UI lets people edit it, and the sensor must not fail for it."""
    for cursor in ("", "nonsense", '{"from_ms": "x"}'):
        runs.cursor = cursor
        assert runs.tick() == "alerts: 0 sent, 0 active"


def test_dagster_s_own_failure_sensor_can_use_the_text(
    exporter: Exporter, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Dagster's integrations with Slack, Teams or mail then send our line instead of the whole error."""
    run_id = failing(exporter, monkeypatch)
    run = exporter.instance.get_run_by_id(run_id)
    assert run is not None
    assert not alerts.will_be_retried(run)
    (record,) = exporter.instance.get_records_for_run(run_id, of_type=dg.DagsterEventType.RUN_FAILURE).records
    text = alerts.failure_text(
        dg.build_run_status_sensor_context(
            "theirs", record.event_log_entry.dagster_event, exporter.instance, run
        ).for_run_failure()
    )
    assert "AuditLogUnavailable at plan_batches: ClickHouse " in text
    assert run_id in text


def test_the_text_of_an_error_that_is_not_ours_is_withheld(runs: Sensor, exporter: Exporter, hook: Webhook) -> None:
    """Another resource or hook may quote a row in its error, and a chat stores it."""

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


def test_the_sensors_are_on_from_the_start_and_target_nothing() -> None:
    """An alert that has to be turned on is off on the day that it is needed."""
    for name in ("run_alerts", "number_alerts"):
        sensor = defs.resolve_sensor_def(name)
        assert sensor.default_status is dg.DefaultSensorStatus.RUNNING
        assert not sensor.targets


def test_a_sender_of_one_s_own_gets_the_notices(exporter: Exporter, stack: Stack) -> None:
    """PagerDuty, mail, Teams: a resource with three members; muting and deduplication stay ours."""
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
    sensor = Sensor(exporter, stack, "run_alerts", theirs)
    sensor.resources = {"alerts": (theirs.resources or {})["alerts"]}
    sensor.tick()
    run = died(exporter)
    for _ in range(2):
        sensor.tick()
    assert len(sent) == 1
    assert f"pager:{run.run_id}" in sent[0]["text"]
