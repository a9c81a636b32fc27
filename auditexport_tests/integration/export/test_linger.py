"""A run that stays, and one that is throttled: what they do, step by step, on real servers.

What belongs here: the loop after a plan, and the rests while marking. What does not: how fast either is
(`benchmarks`), and Dagster (`integration.dagster`).
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from types import SimpleNamespace

import pytest

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Batch, Claim, State
from auditexport_pipeline.core.drain import Drain
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Discrepancy, Marked
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

NEVER = CrashPoint("before nothing 1")


class Heard:
    """`core.drain.Listener` that keeps what it was told."""

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
    """Each drain is a whole one: what it found is verified before the next look."""
    arriving = [events(3, "first"), [], events(2, "second")]

    def staying() -> bool:
        if not arriving:
            return False
        stack.put(*arriving.pop(0))
        return True

    heard = Heard()
    Drain(stack.outbox, stack.log, owner="one", limits=Limits(linger_poll_ms=20), listener=heard).stay(staying)
    assert (heard.exports, [[*outcome] for outcome in heard.outcomes]) == ([3, 2], [[1], [2]])
    assert [batch.state for batch in stack.outbox.batches([1, 2])] == [State.VERIFIED, State.VERIFIED]
    assert (stack.counts(), stack.pending(), heard.troubles) == ((5, 5), 0, [])


def test_what_an_earlier_look_left_open_is_taken_up_by_the_next(stack: Stack) -> None:
    """A step that Dagster tries again stays again, and finds its own batch where it stood."""
    stack.put(*events(2))
    crash_at = CrashPoint("after insert 1")
    with pytest.raises(Crash):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), Limits(), owner="one")
    looks = iter([True, False])
    Drain(stack.outbox, stack.log, owner="one", limits=Limits(), listener=Heard()).stay(lambda: next(looks))
    assert [batch.attempts for batch in stack.outbox.batches([1])] == [2]
    assert stack.counts() == (2, 2)


class Watched(CrashingOutbox):
    """Notes the size of every chunk that is marked, and each renewal while that goes on."""

    def __init__(self, stack: Stack) -> None:
        super().__init__(stack.outbox, NEVER)
        self.chunks: list[int] = []

    def mark(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> Marked:
        self.chunks.append(len(pks))
        return self.real.mark(claim, pks, exported_at_ms)

    def finish_mark(self, claim: Claim, pks: PkSet, exported_at_ms: int, before: Marked, *, ids: int) -> Batch:
        self.chunks.append(len(pks))
        return self.real.finish_mark(claim, pks, exported_at_ms, before, ids=ids)


def test_a_throttled_run_marks_in_small_chunks_and_rests_for_the_remainder(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Behind the COMMIT of a large chunk, the application's own transactions wait."""
    stack.put(*events(20))
    rests: list[float] = []
    # Marking takes no time, so that the whole remainder is to be seen, on a busy machine too.
    monkeypatch.setattr(
        export, "time", SimpleNamespace(monotonic=lambda: 0.0, perf_counter=time.perf_counter, sleep=rests.append)
    )
    outbox = Watched(stack)
    drain(outbox, stack.log, Limits(max_rows_per_second=500, mark_pause_ms=100, mark_connections=1), owner="one")
    assert outbox.chunks == [5, 5, 5, 5]
    assert rests == pytest.approx([5 / 500 + 0.1] * 4)
    assert stack.pending() == 0


def test_without_a_throttle_nothing_rests(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The default must cost nothing."""
    stack.put(*events(20))
    rests: list[float] = []
    monkeypatch.setattr(time, "sleep", rests.append)
    drain(stack.outbox, stack.log, Limits(mark_rows=5), owner="one")
    assert sum(rests) == 0
    assert stack.pending() == 0
