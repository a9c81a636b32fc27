"""A drain at the prompt as Dagster sees it: the sensor leaves it the work, and takes it up when it is dead."""

from __future__ import annotations

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, everything_once
from auditexport_tests.integration.dagster.test_automation import Sensor, reason, requests
from auditexport_tests.support.prompts import started
from auditexport_tests.support.waiting import wait_until


@pytest.fixture
def sensor(exporter: Exporter, stack: Stack) -> Sensor:
    return Sensor(exporter, stack, sensor_rows=1)


def test_the_sensor_waits_for_a_drain_at_the_prompt_and_a_run_finishes_what_it_left(
    sensor: Sensor, exporter: Exporter, stack: Stack
) -> None:
    """Two launchers that do not know of each other would otherwise start a run into somebody's drain."""
    stack.put(*events(200))
    with started(stack, "drain", "--batch-rows", "50", "--max-rows-per-second", "50") as drain:
        wait_until(lambda: stack.pending() < 200, what="the first rows of the drain")
        result = sensor.tick()
        assert not requests(result)
        assert reason(result).startswith("the process ")
        assert f":{drain.pid}:" in reason(result)
        drain.kill()
        drain.wait()
    # A process that was on this machine, and is gone, is not waited for, though its lease has not ended.
    (requested,) = requests(sensor.tick())
    assert "were left open" in requested.tags["auditexport/why"]
    assert exporter.drain().success
    everything_once(stack, 200)
