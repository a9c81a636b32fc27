"""A run that stays, and one that is throttled: the loop after a plan, and the pauses while it marks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import pytest

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.batch import Batch, Claim
from auditexport_pipeline.core.drain import Drain
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Discrepancy, Marked
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import NEVER, crash, events, everything_once, ledger, run, states
from auditexport_tests.support.crashes import CrashingOutbox, CrashPoint, drain


class Recorder:
    """A `core.drain.Listener` that records its calls."""

    def __init__(self) -> None:
        self.exports: list[int] = []
        self.outcomes: list[dict[int, Discrepancy]] = []
        self.troubles: list[str] = []

    def claimed(self, claims: Sequence[Claim]) -> None:
        pass

    def exported(self, batch: Batch) -> None:
        self.exports.append(batch.rows)

    def verified(self, outcome: dict[int, Discrepancy]) -> None:
        self.outcomes.append(outcome)

    def trouble(self, what: str) -> None:
        self.troubles.append(what)


def test_a_run_that_stays_drains_what_arrives_and_leaves_when_told(stack: Stack) -> None:
    """Each plan is exported and verified before the next check for rows."""
    arriving = [events(3, "first"), [], events(2, "second")]

    def staying() -> bool:
        if not arriving:
            return False
        stack.put(*arriving.pop(0))
        return True

    recorder = Recorder()
    Drain(stack.outbox, stack.log, owner="one", limits=Limits(linger_poll_ms=20), listener=recorder).stay(staying)
    assert (recorder.exports, [[*outcome] for outcome in recorder.outcomes]) == ([3, 2], [[1], [2]])
    assert (states(stack), recorder.troubles) == (["verified", "verified"], [])
    everything_once(stack, 5)


def test_a_batch_that_an_earlier_plan_left_open_is_finished(stack: Stack) -> None:
    """A step that Dagster retries stays again, and finds its own batch in the state in which it left it."""
    stack.put(*events(2))
    crash(stack, "after insert 1", "one")
    staying = iter([True, False])
    Drain(stack.outbox, stack.log, owner="one", limits=Limits(), listener=Recorder()).stay(lambda: next(staying))
    assert [batch.attempts for batch in ledger(stack)] == [2]
    everything_once(stack, 2)


class Watched(CrashingOutbox):
    """Records the size of every chunk that is marked."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack.outbox, CrashPoint(NEVER))
        self.chunks: list[int] = []

    def mark(self, claim: Claim, pks: PkSet, *arguments: Any) -> Marked:
        self.chunks.append(len(pks))
        return self.real.mark(claim, pks, *arguments)

    def finish_mark(self, claim: Claim, pks: PkSet, *arguments: Any, ids: int) -> Batch:
        self.chunks.append(len(pks))
        return self.real.finish_mark(claim, pks, *arguments, ids=ids)


class Timeless(threads.Threads):
    """Nothing takes time, so that the whole remainder of a throttle is to be seen, on a busy machine too."""

    def __init__(self) -> None:
        self.rests: list[float] = []

    def monotonic(self) -> float:
        return 0.0

    def sleep(self, seconds: float) -> None:
        self.rests.append(seconds)


def test_a_throttled_run_marks_in_small_chunks_and_rests_for_the_remainder(stack: Stack) -> None:
    """Behind the COMMIT of a large chunk, the application's own transactions wait."""
    stack.put(*events(20))
    outbox, timeless = Watched(stack), Timeless()
    with threads.replaced(timeless):
        drain(outbox, stack.log, Limits(max_rows_per_second=500, mark_pause_ms=100, mark_connections=1), owner="one")
    assert outbox.chunks == [5, 5, 5, 5]
    assert timeless.rests == pytest.approx([5 / 500 + 0.1] * 4)
    assert stack.pending() == 0


def test_without_a_throttle_nothing_rests(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default must cost nothing."""
    stack.put(*events(20))
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    run(stack, limits=Limits(mark_rows=5))
    assert sum(rests) == 0
    assert stack.pending() == 0
