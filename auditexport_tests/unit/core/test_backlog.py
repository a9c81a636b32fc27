"""When a run is worth starting: every reason, with its numbers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from auditexport_pipeline.core.backlog import LONGEST_WAIT_S, NO_FAILURES, Backlog, Failures, decide
from auditexport_pipeline.core.settings import Thresholds

THRESHOLDS = Thresholds(rows=1_000, lag_s=60.0)
IDLE = Backlog()


@pytest.mark.parametrize(
    ("backlog", "launch", "why"),
    [
        (IDLE, False, "nothing to do"),
        (replace(IDLE, rows=999, lag_s=59.0), False, "nothing to do"),
        (replace(IDLE, rows=1_000), True, "backlog"),
        (replace(IDLE, rows=1, lag_s=60.0), True, "lag"),
        (replace(IDLE, rows=0, lag_s=600.0), False, "nothing to do"),
        (replace(IDLE, open_batches=2), True, "2 batches were left open"),
        (replace(IDLE, open_batches=2, waiting_batches=2), False, "nothing to do"),
        (replace(IDLE, open_batches=2, waiting_batches=1), True, "1 batch was left open"),
    ],
)
def test_rows_lag_or_what_was_left_open_start_a_run(backlog: Backlog, launch: bool, why: str) -> None:
    """A stopped batch whose lease still runs must not start runs that can do nothing with it."""
    decision = decide(backlog, THRESHOLDS, at_work=None, failures=NO_FAILURES)
    assert decision.launch is launch
    assert decision.reason.startswith(why)
    assert "(a run starts at 1,000)" in decision.reason
    assert "(at 60 s)" in decision.reason


def test_one_drain_at_a_time() -> None:
    """The drain at work finishes first, however large the backlog is."""
    decision = decide(
        replace(IDLE, rows=10**6),
        THRESHOLDS,
        at_work="run 1234 is at work, waiting until it ends",
        failures=NO_FAILURES,
    )
    assert not decision.launch
    assert decision.reason.startswith("run 1234 is at work, waiting until it ends: 1,000,000 pending rows")


def test_an_outage_is_not_a_flood_of_runs() -> None:
    """While ClickHouse is down every run fails; a run at every tick would only fill the list of runs."""
    busy = replace(IDLE, rows=5_000)
    assert decide(busy, THRESHOLDS, at_work=None, failures=Failures(runs=1, since_s=0.0)).launch
    waits = [Failures(runs=runs, since_s=0.0).wait_s for runs in range(2, 10)]
    assert waits == sorted(waits)
    assert waits[0] > 0
    assert waits[-1] == LONGEST_WAIT_S
    waiting = decide(busy, THRESHOLDS, at_work=None, failures=Failures(runs=3, since_s=10.0))
    assert not waiting.launch
    assert "the last 3 runs failed, the next starts in 20 s" in waiting.reason
    assert decide(busy, THRESHOLDS, at_work=None, failures=Failures(runs=3, since_s=31.0)).launch


def test_the_reason_counts_what_is_set_aside() -> None:
    """Unknown versions and dead letters wait for an operator, who reads the reason of a tick."""
    backlog = replace(IDLE, unknown_rows=25, unknown_versions=("audit_log.v99",), dead_rows=3)
    reason = decide(backlog, THRESHOLDS, at_work=None, failures=NO_FAILURES).reason
    assert "25 rows of unknown versions audit_log.v99" in reason
    assert "3 dead letters" in reason
