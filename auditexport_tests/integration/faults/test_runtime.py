"""A run takes what it can finish: Dagster ends it after `max_runtime_seconds`, verified or not."""

from __future__ import annotations

import time
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Receipt, State
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, launchpad, ledger
from auditexport_tests.integration.dagster.location import the_export_job

MAX_RUNTIME_S = 60
ROWS_PER_SECOND = 5
ROWS = 2 * MAX_RUNTIME_S * ROWS_PER_SECOND


def drain(exporter: Exporter, **settings: object) -> dg.ExecuteInProcessResult:
    return the_export_job().execute_in_process(
        instance=exporter.instance,
        run_config=launchpad(settings),
        tags={"dagster/max_runtime": str(MAX_RUNTIME_S)},
    )


def test_a_throttled_run_takes_what_it_can_mark_in_its_time(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run that took more was ended before its verification, every time."""
    monkeypatch.setattr(time, "sleep", lambda _: None)  # the throttle's rests
    stack.put(*events(ROWS))
    assert drain(exporter, max_rows_per_second=ROWS_PER_SECOND, batch_rows=100).success
    exported = ROWS - stack.pending()
    assert 0 < exported < MAX_RUNTIME_S * ROWS_PER_SECOND
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}


def test_a_run_that_pauses_counts_its_pauses(exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows every twenty seconds are a throttle too."""
    monkeypatch.setattr(time, "sleep", lambda _: None)
    stack.put(*events(60))
    assert drain(exporter, mark_pause_ms=20_000, mark_rows=10, mark_connections=1).success
    assert 0 < 60 - stack.pending() <= MAX_RUNTIME_S // 20 * 10


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
    assert stack.counts() == (2, 2)
    assert ledger(stack)[0].state is State.VERIFIED
    late_s = 0.0
    monkeypatch.setattr(export, "write", real)
    assert drain(exporter, batch_rows=2).success
    assert (stack.counts(), stack.pending()) == ((6, 6), 0)
