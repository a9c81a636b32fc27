"""The heartbeat: what a drain and the sensor on runs send to its URL."""

from __future__ import annotations

import logging
import re

import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.defs import resources
from auditexport_pipeline.defs.resources import HeartbeatResource
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import Sensor, cannot_begin, died, failing, succeeded
from auditexport_tests.integration.dagster.conftest import Exporter, events
from auditexport_tests.support.webhook import SECRET, Webhook

pytestmark = pytest.mark.usefixtures("no_waits")


@pytest.fixture
def runs(exporter: Exporter, stack: Stack, heart: Webhook) -> Sensor:
    """The sensor on runs, past its first tick; no webhook is set."""
    sensor = Sensor(exporter, stack, "run_alerts")
    sensor.tick()
    return sensor


def test_the_sensor_sends_fail_for_a_drain_that_died(runs: Sensor, exporter: Exporter, heart: Webhook) -> None:
    """A killed worker sends no /fail, and the service would wait for its grace time."""
    died(exporter, "sweep_exported_rows")
    run = exporter.put_run("audit_log_export", "STARTED")
    exporter.instance.report_run_failed(run)
    runs.tick()
    assert heart.paths == []  # a sweep has no heartbeat, and Dagster launches the drain again
    exporter.instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
    heart.answer = 500
    runs.tick()
    heart.answer = 200
    for _ in range(2):
        runs.tick()
    assert heart.paths == [f"/{SECRET}/fail"] * 2  # the first was answered 500


@pytest.mark.slow
def test_the_sensor_sends_no_fail_that_a_step_sent(
    runs: Sensor, exporter: Exporter, stack: Stack, heart: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A /fail after the success of a later run would be a false alarm."""
    failing(exporter, monkeypatch)

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    stack.put(*events(1))
    with monkeypatch.context() as patched:
        patched.setattr(export, "mark", broken)
        exporter.drain(raise_on_error=False)
    assert heart.paths == [f"/{SECRET}/start", f"/{SECRET}/fail"] * 2
    heart.paths.clear()
    runs.tick()
    # One that died, and another that succeeded before the next tick.
    died(exporter)
    succeeded(exporter)
    runs.tick()
    assert heart.paths == []


def test_the_sensor_sends_fail_for_a_drain_that_cannot_begin(runs: Sensor, exporter: Exporter, heart: Webhook) -> None:
    """A setting that is missing stops a run before its first step can send anything."""
    cannot_begin(exporter)
    assert heart.paths == []
    runs.tick()
    assert heart.paths == [f"/{SECRET}/fail"]


def test_a_drain_pings_its_start_and_its_success(exporter: Exporter, heart: Webhook) -> None:
    """Also of an empty outbox: an idle exporter must look different from a dead one."""
    exporter.drain()
    assert heart.paths == [f"/{SECRET}/start", f"/{SECRET}"]


def test_a_heartbeat_in_trouble_is_logged_without_its_url(
    heart: Webhook, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The URL is a secret: with it anybody can silence the alarm. No answer, or one of many bytes, must not delay a drain."""
    monkeypatch.setattr(resources, "HEARTBEAT_TIMEOUT_S", 0.2)
    with caplog.at_level(logging.DEBUG):
        for url in (f"http://127.0.0.1:1/{SECRET}", f"http://[{SECRET}", f"file:///{SECRET}"):
            assert not HeartbeatResource(url=url).success()
        heart.answer = 500
        assert not HeartbeatResource().fail()
        heart.holds = True
        assert not HeartbeatResource().start()
        heart.released.set()
        heart.released.clear()
        heart.holds, heart.drips = False, True
        assert not HeartbeatResource().start()
    lines = [record.getMessage() for record in caplog.records if "could not be sent" in record.getMessage()]
    kinds = [re.search(r"\((.*?)\)", line) for line in lines]
    assert [kind and kind[1] for kind in kinds] == [
        "URLError",
        "ValueError",
        "ValueError",
        "HTTP 500",
        "TimeoutError",
        "TimeoutError",
    ]
    assert all("the export itself is not affected" in line for line in lines)
    assert SECRET not in caplog.text


def test_without_a_heartbeat_url_nothing_is_sent(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The heartbeat is optional."""
    monkeypatch.delenv("AUDITEXPORT_HEARTBEAT_URL", raising=False)
    assert not HeartbeatResource().start()
    assert caplog.text == ""
