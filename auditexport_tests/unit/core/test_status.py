"""Status: what follows from the ledger's times alone, and how times read."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.format import format_duration
from auditexport_pipeline.core.status import RATE_WINDOW_S, BatchTimes, rate_of, runs_of

NOW_MS = 1_800_000_000_000


def test_the_rate_counts_no_idle_time() -> None:
    """An idle quarter of an hour would make the rate too low, and the ETA too long."""

    def batch(number: int, claimed_s: float, last_s: float, state: State = State.VERIFIED) -> BatchTimes:
        return BatchTimes(
            batch_id=number,
            epoch=number,
            owner="one",
            state=state,
            rows=1_000,
            claimed_at_ms=NOW_MS - int(claimed_s * 1000),
            last_at_ms=NOW_MS - int(last_s * 1000),
            leased=True,
        )

    # Two that overlap, from 100 s to 90 s before now; one begun before the window and done 5 s into it.
    done = [batch(1, 100, 95), batch(2, 98, 90), batch(3, RATE_WINDOW_S + 500, RATE_WINDOW_S - 5)]
    assert rate_of(done, [], now_ms=NOW_MS) == (3_000, 3_000 / 15)
    # And one at work for 5 s.
    assert rate_of(done, [batch(4, 5, 5, State.SEALED)], now_ms=NOW_MS) == (3_000, 3_000 / 20)
    assert rate_of([], [], now_ms=NOW_MS) == (0, 0.0)


def test_a_run_begins_with_its_own_plan() -> None:
    """Otherwise a run that cleans up after a crash looks as if it had taken the night for it."""

    def batch(number: int, epoch: int, owner: str, claimed_ms: int, state: State, last_ms: int) -> BatchTimes:
        return BatchTimes(
            batch_id=number,
            epoch=epoch,
            owner=owner,
            state=state,
            rows=100,
            claimed_at_ms=claimed_ms,
            last_at_ms=last_ms,
            leased=state is State.SEALED,
        )

    runs = runs_of(
        [
            batch(1, 1, "old", 1_000, State.VERIFIED, 3_000),
            batch(2, 5, "new", 1_000, State.DISCREPANT, 95_000),  # claimed by `old`, adopted by `new`
            batch(3, 5, "new", 90_000, State.VERIFIED, 96_000),
            batch(4, 6, "now", 98_000, State.SEALED, 99_000),
        ],
        now_ms=100_000,
        complete=False,
    )
    assert [(run.owner, run.batches, run.rows, run.seconds) for run in runs] == [
        ("now", 1, 0, 2.0),
        ("new", 2, 200, 6.0),
        ("old", 1, 100, 2.0),
    ]
    assert [run.worst for run in runs] == [State.SEALED, State.DISCREPANT, State.VERIFIED]
    assert [(run.at_work, run.partial) for run in runs] == [(True, False), (False, False), (False, True)]
    assert runs[1].rows_per_s == pytest.approx(200 / 6)


def test_durations_read_as_a_person_says_them() -> None:
    """A lag of 93,600 s is a number that nobody reads at night."""
    assert [format_duration(seconds) for seconds in (0, 0.05, 0.42, 45.4, 300, 5_400, 40_000, 300_000)] == [
        "0 s",
        "50 ms",
        "0.42 s",
        "45 s",
        "5 min",
        "90 min",
        "11 h",
        "3 days",
    ]
