"""The pipeline: in whatever order the steps come and whatever fails, every batch is exported once and no step hangs."""

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


def write_and_mark(stack: Stack, pipeline: Pipeline, claim: Claim, log: AuditLog | None = None) -> None:
    receipt = pipeline.write(stack.outbox, log or stack.log, claim, LIMITS)
    pipeline.mark(stack.outbox, stack.log, receipt, LIMITS)


def test_the_log_knows_what_was_prefetched_and_how_long_it_took(stack: Stack, pipeline: Pipeline) -> None:
    """A step that only takes a result lasts milliseconds, however long the work took; the first batch is the control."""
    first, second, *_ = claims = planned(stack, pipeline)
    fetch(pipeline, stack.outbox, stack.log, first)
    wait_until(lambda: pipeline.timing("mark", second.batch_id) is not None, what="the second batch marked ahead")
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
        assert pipeline.has_begun(claim)
        write_and_mark(stack, pipeline, claim)
    everything_once(stack, BATCHES * BATCH_ROWS)
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
def test_steps_in_another_order_do_not_hang(stack: Stack, pipeline: Pipeline, in_reverse: bool) -> None:
    """Retries, priorities and failed steps change Dagster's order; a run that hangs holds its batches for a lease."""
    claims = planned(stack, pipeline)
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
    for claim in reversed(claims) if in_reverse else claims:
        write_and_mark(stack, pipeline, claim)
    everything_once(stack, BATCHES * BATCH_ROWS)


@pytest.mark.parametrize(
    "place",
    [
        *("before seal 1", "after seal 3", "before insert 1", "after insert 3", "before record_written 2"),
        *("before finish_mark 1", "after finish_mark 3", f"before finish_mark {BATCHES}"),
    ],
)
def test_a_failure_is_raised_in_its_own_step_and_the_others_go_on(stack: Stack, pipeline: Pipeline, place: str) -> None:
    """An error that is lost in a thread would be a batch that never arrives."""
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
    everything_once(stack, BATCHES * BATCH_ROWS)


def test_a_write_that_fails_while_a_step_waits_lets_no_step_hang(stack: Stack, pipeline: Pipeline) -> None:
    """The threads stop at a failure; a step that waits for a later batch would hang."""
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
        write_and_mark(stack, pipeline, claim, log)
    everything_once(stack, BATCHES * BATCH_ROWS)


def test_a_batch_whose_steps_never_come_does_not_stop_the_others(stack: Stack, pipeline: Pipeline) -> None:
    """Dagster skips what depends on a failed step and goes on with the other batches."""
    claims = planned(stack, pipeline)
    for claim in claims:
        fetch(pipeline, stack.outbox, stack.log, claim)
        if claim not in claims[1:3]:
            write_and_mark(stack, pipeline, claim)
    pipeline.close()
    for claim in claims[1:3]:
        export.mark(stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, {}, LIMITS), LIMITS)
    everything_once(stack, BATCHES * BATCH_ROWS)
