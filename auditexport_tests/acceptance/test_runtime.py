"""A run takes what it can finish: Dagster ends it after `max_runtime_seconds`, verified or not."""

from __future__ import annotations

import time
from collections.abc import Sequence

import dagster as dg
import pytest

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Claim, State
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.defs.ahead import Ahead
from auditexport_tests.conftest import Stack
from auditexport_tests.dagster_glue.conftest import Exporter, events, launchpad, ledger
from auditexport_tests.dagster_glue.location import the_export_job

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


def test_no_batch_is_begun_ahead_for_which_there_is_no_time(stack: Stack) -> None:
    """Where nothing throttles a run and the databases are slow, it stops in time, and the rest is the next run's."""
    stack.put(*events(6))
    limits = Limits(batch_rows=2)
    claims: Sequence[Claim] = claiming.claim(stack.outbox, owner="run", dead_owners=(), limits=limits)
    ahead = Ahead()
    ahead.plan(claims, lambda claim: claim == claims[0])
    fetched = ahead.fetch(stack.outbox, stack.log, claims[0], limits)
    receipt = ahead.write(stack.outbox, stack.log, claims[0], fetched.bodies, limits)
    ahead.mark(stack.outbox, stack.log, receipt, limits)
    ahead.close()
    assert not any(ahead.has_begun(claim) for claim in claims[1:])
    assert [str(batch.state) for batch in ledger(stack)] == ["exported", "claimed", "claimed"]
    assert export.fetch(stack.outbox, stack.log, claims[1], limits).rows == 2
