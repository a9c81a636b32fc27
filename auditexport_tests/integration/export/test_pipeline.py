"""The pipeline: whatever order the callers ask in and whatever fails, every batch is exported once and nobody waits."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import TypeVar

import pytest

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.pipeline import VERBS, Pipeline
from auditexport_pipeline.core.ports import AuditLog, Outbox
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once, stop_merges
from auditexport_tests.support.crashes import CrashingAuditLog, CrashingOutbox, CrashPoint
from auditexport_tests.support.waiting import wait_until

T = TypeVar("T")

BATCHES, BATCH_ROWS = 6, 5
LIMITS = Limits(batch_rows=BATCH_ROWS)


@pytest.fixture
def pipeline() -> Iterator[Pipeline]:
    running = Pipeline()
    yield running
    running.close()
    assert not [thread for thread in threading.enumerate() if "prefetch" in thread.name]


def planned(stack: Stack, pipeline: Pipeline) -> list[Claim]:
    stop_merges(stack)
    stack.put(*events(BATCHES * BATCH_ROWS))
    claims = claiming.claim(stack.outbox, owner="one", dead_owners=(), limits=LIMITS)
    pipeline.plan(claims)
    return claims


def fetch(pipeline: Pipeline, outbox: Outbox, log: AuditLog, claim: Claim) -> None:
    assert pipeline.fetch(outbox, log, claim, LIMITS).bodies == {}


def lose_the_connection() -> None:
    """One error at one place, once; not the death of the process, which would end the steps as well."""
    raise OSError("the connection is gone")


def assert_all_once(stack: Stack) -> None:
    everything_once(stack, BATCHES * BATCH_ROWS)


def test_in_order_the_threads_do_the_work(stack: Stack, pipeline: Pipeline) -> None:
    """What the pipeline is for."""
    for claim in planned(stack, pipeline):
        fetch(pipeline, stack.outbox, stack.log, claim)
        assert pipeline.has_begun(claim)
        pipeline.mark(stack.outbox, stack.log, pipeline.write(stack.outbox, stack.log, claim, LIMITS), LIMITS)
    assert_all_once(stack)


def test_what_ran_ahead_is_known_with_when_and_how_long(stack: Stack, pipeline: Pipeline) -> None:
    """A caller that only takes a result sees milliseconds, whatever the work took; the first batch is the control."""
    first, second, *_ = claims = planned(stack, pipeline)
    fetch(pipeline, stack.outbox, stack.log, first)
    wait_until(lambda: pipeline.timing("mark", second.batch_id) is not None, what="the second batch marked ahead")
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
        pipeline.mark(stack.outbox, stack.log, pipeline.write(stack.outbox, stack.log, claim, LIMITS), LIMITS)
    for verb in VERBS:
        timing = pipeline.timing(verb, second.batch_id)
        assert timing is not None
        assert 0 < timing.seconds <= timing.ahead_s
    again, ahead = pipeline.timing("fetch", first.batch_id), pipeline.timing("fetch", second.batch_id)
    assert again is not None
    assert ahead is not None
    assert again.ahead_s == 0
    assert f"batch {first.batch_id} was written" in ahead.meanwhile
    pipeline.plan([])
    assert pipeline.timing("fetch", first.batch_id) is None


@pytest.mark.parametrize("in_reverse", [False, True])
def test_steps_in_another_order_wait_for_nothing_that_will_not_come(
    stack: Stack, pipeline: Pipeline, in_reverse: bool
) -> None:
    """Retries, priorities and failed steps change Dagster's order; a run that hangs holds its batches for a lease."""
    claims = planned(stack, pipeline)
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
    for claim in reversed(claims) if in_reverse else claims:
        pipeline.mark(stack.outbox, stack.log, pipeline.write(stack.outbox, stack.log, claim, LIMITS), LIMITS)
    assert_all_once(stack)


@pytest.mark.parametrize(
    "place",
    [
        *("before seal 1", "after seal 3", "before insert 1", "after insert 3", "before record_written 2"),
        *("before finish_mark 1", "after finish_mark 3", f"before finish_mark {BATCHES}"),
    ],
)
def test_a_failure_is_raised_in_its_own_step_and_the_others_go_on(stack: Stack, pipeline: Pipeline, place: str) -> None:
    """An error in a thread that nobody hears of would be a batch that never arrives."""
    claims = planned(stack, pipeline)
    point = CrashPoint(place, then=lose_the_connection)
    outbox, log = CrashingOutbox(stack.outbox, point), CrashingAuditLog(stack.log, point)
    failed = []

    def step(verb: Callable[[], T]) -> T:
        """As Dagster does one: again, and by itself, after an error that may pass."""
        try:
            return verb()
        except OSError as error:
            failed.append(error)
            return verb()

    for claim in claims:
        step(lambda claim=claim: fetch(pipeline, outbox, log, claim))  # type: ignore[misc]
        receipt = step(lambda claim=claim: pipeline.write(outbox, log, claim, LIMITS))  # type: ignore[misc]
        step(lambda receipt=receipt: pipeline.mark(outbox, log, receipt, LIMITS))  # type: ignore[misc]
    assert len(failed) == 1
    assert_all_once(stack)


def test_a_write_that_fails_behind_a_waiting_step_leaves_nobody_waiting(stack: Stack, pipeline: Pipeline) -> None:
    """The threads stop at a failure; a step that waits for a later batch would wait for ever."""
    claims = planned(stack, pipeline)
    sending = threading.Event()

    def fail() -> None:
        sending.wait(30)
        lose_the_connection()

    log = CrashingAuditLog(stack.log, CrashPoint("before insert 1", then=fail))
    fetch(pipeline, stack.outbox, log, claims[0])
    fetch(pipeline, stack.outbox, log, claims[1])
    threading.Timer(0.5, sending.set).start()
    fetch(pipeline, stack.outbox, log, claims[3])
    with pytest.raises(OSError, match="gone"):
        pipeline.write(stack.outbox, log, claims[0], LIMITS)
    for claim in claims:
        if claim != claims[3]:
            fetch(pipeline, stack.outbox, log, claim)
        pipeline.mark(stack.outbox, stack.log, pipeline.write(stack.outbox, log, claim, LIMITS), LIMITS)
    assert_all_once(stack)


def test_a_batch_whose_steps_never_come_does_not_stop_the_others(stack: Stack, pipeline: Pipeline) -> None:
    """Dagster skips what depends on a failed step and goes on with the other batches."""
    claims = planned(stack, pipeline)
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
        if claim not in claims[1:3]:
            pipeline.mark(stack.outbox, stack.log, pipeline.write(stack.outbox, stack.log, claim, LIMITS), LIMITS)
    pipeline.close()
    for claim in claims[1:3]:
        export.mark(stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, {}, LIMITS), LIMITS)
    assert_all_once(stack)
