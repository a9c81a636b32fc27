"""Who is told that nothing runs: the heartbeat's URL, which a drain and the sensor on runs call."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.defs import resources
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import (
    Sensor,
    cannot_begin,
    died,
    failing,
)
from auditexport_tests.integration.dagster.conftest import Exporter, events
from auditexport_tests.support.webhook import SECRET, Webhook

pytestmark = pytest.mark.usefixtures("no_waits")


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
