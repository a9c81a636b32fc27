"""A run takes what it can finish: Dagster ends it after `max_runtime_seconds`, verified or not."""

from __future__ import annotations

import time
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Receipt
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, launchpad
from auditexport_tests.integration.dagster.location import the_export_job
from auditexport_tests.support.builders import events, everything_once, insert, states

MAX_RUNTIME_S = 60


def drain(exporter: Exporter, **settings: object) -> dg.ExecuteInProcessResult:
    return the_export_job().execute_in_process(
        instance=exporter.instance,
        run_config=launchpad(settings),
        tags={"dagster/max_runtime": str(MAX_RUNTIME_S)},
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("rows", "limits", "most"),
    [
        (600, {"max_rows_per_second": 5, "batch_rows": 100}, 300),
        (60, {"mark_pause_ms": 20_000, "mark_rows": 10, "mark_connections": 1}, 30),
    ],
    ids=["rows a second", "pauses"],
)
def test_a_throttled_run_takes_what_it_can_mark_in_its_time(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch, rows: int, limits: dict[str, int], most: int
) -> None:
    """A run that took more was ended before its verification, every time."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the throttle's pauses
    insert(stack, events(rows))
    assert drain(exporter, **limits).success
    assert 0 < rows - stack.pending() <= most
    assert set(states(stack)) == {"verified"}


@pytest.mark.slow
def test_no_batch_is_begun_for_which_there_is_no_time(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where nothing throttles a run and the databases are slow, it stops in time, and the rest is the next run's."""
    late_s = 0.0
    clock, monotonic, real = time.time, time.monotonic, export.write
    monkeypatch.setattr(time, "time", lambda: clock() + late_s)
    monkeypatch.setattr(time, "monotonic", lambda: monotonic() + late_s)

    def write(*arguments: Any) -> Receipt:
        nonlocal late_s
        receipt = real(*arguments)
        late_s = MAX_RUNTIME_S - 1.0
        return receipt

    monkeypatch.setattr(export, "write", write)
    stack.put(*events(6))
    assert drain(exporter, batch_rows=2).success
    assert (stack.counts(), states(stack)[0]) == ((2, 2), "verified")
    late_s = 0.0
    monkeypatch.setattr(export, "write", real)
    assert drain(exporter, batch_rows=2).success
    everything_once(stack, 6)
