"""The pipeline of one process: while one batch is marked, the next is written and the one after it is fetched.

Three threads run the verbs of `core.export` for the batches of a plan, in order. The caller asks for each batch in
turn. It gets the result of a thread, or does the verb itself where no thread does. The callers are Dagster's steps and
`core.drain`. Other processes do not prefetch.

A thread runs the same verb under the same claim as the caller would, so a process that dies leaves the same open
batches, which the next run finishes. Rows stay inside: callers see counts only. `timing` says when each verb ran,
because a caller that waits for a result cannot tell how long the work took.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass, field, replace
from typing import Literal

from auditexport_pipeline.core import export, threads
from auditexport_pipeline.core.batch import Batch, Bodies, Claim, Receipt
from auditexport_pipeline.core.export import FetchedBatch
from auditexport_pipeline.core.ports import AuditLog, Outbox
from auditexport_pipeline.core.settings import Limits

M_ARENA_MAX = -8  # of glibc's malloc.h
# Batches whose rows may be in memory: one being fetched, and one being written or waiting for it.
BATCHES_IN_MEMORY = 2


Verb = Literal["fetch", "write", "mark"]
VERBS: tuple[Verb, ...] = ("fetch", "write", "mark")
_DONE: dict[Verb, str] = {"fetch": "fetched", "write": "written", "mark": "marked"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """When a verb of one batch ran, seen from the call that asked for its result."""

    seconds: float
    ahead_s: float  # the verb started this long before the call; 0 when the call started it
    meanwhile: tuple[str, ...]  # what was done for other batches at the same time, such as "batch 2 was written"


@dataclass(slots=True, kw_only=True)
class _Span:
    """When a verb was at work, by `threads.monotonic`; without an end while it still is."""

    started_s: float
    ended_s: float | None = None

    def overlaps(self, other: _Span) -> bool:
        return (self.ended_s is None or other.started_s < self.ended_s) and (
            other.ended_s is None or self.started_s < other.ended_s
        )


class _Journal:
    """When each verb of each batch was called and at work. The threads and the caller both write to it."""

    def __init__(self) -> None:
        self._called_s: dict[tuple[Verb, int], float] = {}
        self._spans: dict[tuple[Verb, int], _Span] = {}

    def called(self, verb: Verb, claim: Claim) -> None:
        self._called_s[verb, claim.batch_id] = threads.monotonic()

    @contextlib.contextmanager
    def at_work(self, verb: Verb, claim: Claim) -> Iterator[None]:
        span = self._spans[verb, claim.batch_id] = _Span(started_s=threads.monotonic())
        try:
            yield
        finally:
            span.ended_s = threads.monotonic()

    def timing(self, verb: Verb, batch_id: int) -> Timing | None:
        span = self._spans.get((verb, batch_id))
        if span is None or span.ended_s is None:
            return None
        others = [
            f"batch {other_id} was {_DONE[other_verb]}"
            for (other_verb, other_id), other in list(self._spans.items())  # a copy: the threads go on
            if other_id != batch_id and other.overlaps(span)
        ]
        return Timing(
            seconds=span.ended_s - span.started_s,
            ahead_s=max(0.0, self._called_s.get((verb, batch_id), span.started_s) - span.started_s),
            meanwhile=tuple(others),
        )


@dataclass(slots=True, kw_only=True)
class _Work:
    """One batch for the threads, and its results."""

    claim: Claim
    fetched: Future[FetchedBatch] = field(default_factory=threads.future)
    receipt: Future[Receipt] = field(default_factory=threads.future)
    marked: Future[Batch] = field(default_factory=threads.future)
    written: bool = False  # the caller has the receipt or the error; if it asks again, it writes the batch itself
    done: bool = False  # the same for the mark

    def cancel(self) -> None:
        """Leaves the verbs that have not begun to the caller."""
        for future in (self.fetched, self.receipt, self.marked):
            future.cancel()


class _Threads:
    """A fetching, a writing and a marking thread. They take claims in order until the last one, or until one fails."""

    def __init__(
        self,
        outbox: Outbox,
        log: AuditLog,
        claims: Sequence[Claim],
        limits: Limits,
        time_for: Callable[[Claim], bool],
        journal: _Journal,
    ) -> None:
        self._journal = journal
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._time_for = time_for
        self.works = [_Work(claim=claim) for claim in claims]
        self._room = threads.semaphore(BATCHES_IN_MEMORY)
        self._stopped = threads.event()
        self._pools = [threads.pool(1, f"prefetch_{verb}") for verb in VERBS]
        self._fetching, self._writing, self._marking = self._pools
        self._fetching.submit(self._fetch_all)

    def work(self, claim: Claim) -> _Work | None:
        """The work on this batch, or None when no thread will do it."""
        return next((work for work in self.works if work.claim == claim and not work.fetched.cancelled()), None)

    def close(self) -> None:
        """Waits for the statements that are running; each of them has a time limit."""
        self._stopped.set()
        for pool in self._pools:
            pool.shutdown()

    def _fetch_all(self) -> None:
        for work in self.works:
            self._room.acquire()
            if self._stopped.is_set() or not self._time_for(work.claim):
                work.cancel()
                self._room.release()
                continue
            try:
                with self._journal.at_work("fetch", work.claim):
                    fetched = export.fetch(self._outbox, self._log, work.claim, self._limits)
            except BaseException as error:  # raised in the call that asks for this batch
                self._stopped.set()
                work.fetched.set_exception(error)
                work.cancel()
                self._room.release()
                continue
            self._writing.submit(self._write, work, fetched.bodies)
            work.fetched.set_result(replace(fetched, bodies={}))
            del fetched  # otherwise it would stay in memory beside the next batch

    def _write(self, work: _Work, bodies: Bodies) -> None:
        try:
            if self._stopped.is_set() or not self._time_for(work.claim):
                work.cancel()
                return
            with self._journal.at_work("write", work.claim):
                receipt = export.write(self._outbox, self._log, work.claim, bodies, self._limits)
        except BaseException as error:
            self._stopped.set()
            work.receipt.set_exception(error)
            work.cancel()
        else:
            work.receipt.set_result(receipt)
            self._marking.submit(self._mark, work, receipt)
        finally:
            bodies.clear()
            self._room.release()

    def _mark(self, work: _Work, receipt: Receipt) -> None:
        if self._stopped.is_set():
            work.cancel()
            return
        try:
            with self._journal.at_work("mark", work.claim):
                batch = export.mark(self._outbox, self._log, receipt, self._limits)
        except BaseException as error:
            self._stopped.set()
            work.marked.set_exception(error)
        else:
            work.marked.set_result(batch)


def _share_one_arena() -> None:
    """Makes all threads use one heap. In glibc each thread has its own, which keeps the memory of a batch."""
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # only glibc has mallopt
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class Pipeline:
    """The verbs of `core.export` for the batches of one plan after the other. For one caller at a time."""

    def __init__(self) -> None:
        _share_one_arena()
        self._planned: list[Claim] = []
        self._time_for: Callable[[Claim], bool] = lambda _: True
        self._threads: _Threads | None = None
        self._fetched: tuple[Claim, Bodies] | None = None
        self._journal = _Journal()

    def plan(self, claims: Sequence[Claim], time_for: Callable[[Claim], bool] = lambda _: True) -> None:
        """Sets the order in which the caller will ask for batches. Prefetches those for which there is time."""
        self._planned = list(claims) if len(claims) > 1 else []
        self._time_for = time_for
        self._journal = _Journal()

    def timing(self, verb: Verb, batch_id: int) -> Timing | None:
        """When the verb ran; None when it did not run for a batch of this plan in this process."""
        return self._journal.timing(verb, batch_id)

    def has_begun(self, claim: Claim) -> bool:
        """Whether a thread is writing this batch or has written it."""
        work = self._work(claim)
        return work is not None and not work.receipt.cancelled() and work.fetched.done()

    def fetch(self, outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits) -> FetchedBatch:
        """`export.fetch`; the rows stay here until `write`. Raises what it raises."""
        self._journal.called("fetch", claim)
        if claim in self._planned:
            work = self._work(claim)
            if work is None:
                self.close()
                rest = self._planned[self._planned.index(claim) :]
                self._threads = _Threads(outbox, log, rest, limits, self._time_for, self._journal)
                (work, *_) = self._threads.works
            self._planned.remove(claim)  # if the caller asks again, it fetches the batch itself
            with contextlib.suppress(CancelledError):  # another batch failed before the thread came to this one
                return work.fetched.result()
        with self._journal.at_work("fetch", claim):
            fetched = export.fetch(outbox, log, claim, limits)
        self._fetched = (claim, fetched.bodies)
        return replace(fetched, bodies={})

    def write(self, outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits) -> Receipt:
        """`export.write`; rows that are not here are read again. Raises what it raises."""
        self._journal.called("write", claim)
        work = self._work(claim)
        if work is not None and not work.written:
            work.written = True
            with contextlib.suppress(CancelledError):
                return work.receipt.result()
        fetched, self._fetched = self._fetched, None
        bodies = fetched[1] if fetched is not None and fetched[0] == claim else {}
        with self._journal.at_work("write", claim):
            return export.write(outbox, log, claim, bodies, limits)

    def mark(self, outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits) -> Batch:
        """`export.mark`. Raises what it raises."""
        self._journal.called("mark", receipt.claim)
        work = self._work(receipt.claim)
        if work is not None and not work.done:
            work.done = True
            with contextlib.suppress(CancelledError):
                return work.marked.result()
        with self._journal.at_work("mark", receipt.claim):
            return export.mark(outbox, log, receipt, limits)

    def close(self) -> None:
        """Ends the threads."""
        self._fetched = None
        if self._threads is not None:
            self._threads.close()
            self._threads = None

    def _work(self, claim: Claim) -> _Work | None:
        return self._threads.work(claim) if self._threads is not None else None
