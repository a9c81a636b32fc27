"""Working ahead: while one batch is marked, the next is written to ClickHouse and the one after it fetched.

What belongs here: three threads that run `core.export.fetch`, `write` and `mark` for the plan's next claims, and hand
the results to the steps when Dagster comes to them. What does not: anything about Dagster or the databases.
In another process there is no plan and nothing is ahead: each step works for itself.

Working early is safe because these are the same verbs under the same claim. What they leave in the ledger
is what the steps would have left, and a run that dies leaves a few batches for the next run to finish.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event, Semaphore

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Batch, Claim, Receipt
from auditexport_pipeline.core.export import Bodies, FetchedBatch
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import AuditLog, Outbox

M_ARENA_MAX = -8  # of glibc's malloc.h
# Batches whose rows may be in memory: one being fetched, and one being written or waiting for it.
BATCHES_IN_MEMORY = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class MarkedBatch:
    """A batch as `core.export.mark` left it, and how long that took."""

    batch: Batch
    seconds: float


@dataclass(slots=True, kw_only=True)
class _Work:
    """One batch in the threads' hands. Its bodies stay with them: nobody else needs them."""

    claim: Claim
    fetched: Future[FetchedBatch] = field(default_factory=Future)
    receipt: Future[Receipt] = field(default_factory=Future)
    marked: Future[MarkedBatch] = field(default_factory=Future)
    written: bool = False  # its receipt, or the error instead of one, is with the step: a retry works alone
    done: bool = False  # the same, of its marking

    def cancel(self) -> None:
        """Leaves what has not happened yet to the steps."""
        for future in (self.fetched, self.receipt, self.marked):
            future.cancel()


class _Pipeline:
    """A fetching, a writing and a marking thread that take claims in order, until the last one or the first failure."""

    def __init__(
        self,
        outbox: Outbox,
        log: AuditLog,
        claims: Sequence[Claim],
        limits: Limits,
        time_for: Callable[[Claim], bool],
    ) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._time_for = time_for
        self.works = [_Work(claim=claim) for claim in claims]
        self._room = Semaphore(BATCHES_IN_MEMORY)
        self._stopped = Event()
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="fetch_ahead")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write_ahead")
        self._marking = ThreadPoolExecutor(1, thread_name_prefix="mark_ahead")
        self._fetching.submit(self._fetch_all)

    def work(self, claim: Claim) -> _Work | None:
        """The work of this batch, or None when no thread will come to it."""
        return next((work for work in self.works if work.claim == claim and not work.fetched.cancelled()), None)

    def close(self) -> None:
        """Stops after what is under way, and waits for it: statements have time limits of their own."""
        self._stopped.set()
        self._fetching.shutdown()
        self._writing.shutdown()
        self._marking.shutdown()

    def _fetch_all(self) -> None:
        for work in self.works:
            self._room.acquire()
            if self._stopped.is_set() or not self._time_for(work.claim):
                work.cancel()
                self._room.release()
                continue
            try:
                fetched = export.fetch(self._outbox, self._log, work.claim, self._limits)
            except BaseException as error:  # whatever it was, it is raised in the step that waits for it
                self._stopped.set()
                work.fetched.set_exception(error)
                work.cancel()
                self._room.release()
                continue
            self._writing.submit(self._write, work, fetched.bodies)
            work.fetched.set_result(replace(fetched, bodies={}))
            del fetched  # the next batch must not find this one still in memory

    def _write(self, work: _Work, bodies: Bodies) -> None:
        try:
            if self._stopped.is_set() or not self._time_for(work.claim):
                work.cancel()
                return
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
            work.marked.set_result(timed_mark(self._outbox, self._log, receipt, self._limits))
        except BaseException as error:
            self._stopped.set()
            work.marked.set_exception(error)


def timed_mark(outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits) -> MarkedBatch:
    """`export.mark`, and how long it took. Raises what `mark` raises."""
    started = time.perf_counter()
    batch = export.mark(outbox, log, receipt, limits)
    return MarkedBatch(batch=batch, seconds=time.perf_counter() - started)


def _share_one_arena() -> None:
    """Asks glibc to give all threads one heap: with one each, what a batch freed stays with the thread that had it,
    and a drain holds a batch's worth of memory for every thread that ever read one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has neither the call nor the habit
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class Ahead:
    """What the steps of one process ask for their batches: the threads' result, or their own work."""

    def __init__(self) -> None:
        _share_one_arena()
        self._planned: list[Claim] = []
        self._time_for: Callable[[Claim], bool] = lambda _: True
        self._pipeline: _Pipeline | None = None

    def plan(self, claims: Sequence[Claim], time_for: Callable[[Claim], bool] = lambda _: True) -> None:
        """The order in which batches will be asked for; none is begun ahead for which there is no time."""
        self._planned = list(claims)
        self._time_for = time_for

    def has_begun(self, claim: Claim) -> bool:
        """Whether a thread is writing this batch, or has written it."""
        work = self._pipeline.work(claim) if self._pipeline else None
        return work is not None and not work.receipt.cancelled() and work.fetched.done()

    def fetch(self, outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits) -> FetchedBatch:
        """`export.fetch`, by this thread or ahead: then without bodies. Raises what `fetch` raises."""
        if claim not in self._planned:
            return export.fetch(outbox, log, claim, limits)
        work = self._pipeline.work(claim) if self._pipeline else None
        if work is None or self._pipeline is None:
            self.close()
            self._pipeline = _Pipeline(outbox, log, self._planned[self._planned.index(claim) :], limits, self._time_for)
            (work, *_) = self._pipeline.works
        self._planned.remove(claim)  # a retry of the step does it itself
        try:
            return work.fetched.result()
        except CancelledError:  # another batch failed before the thread came to this one
            return export.fetch(outbox, log, claim, limits)

    def write(self, outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt:
        """`export.write`, by this thread or ahead. Raises what `write` raises."""
        work = self._pipeline.work(claim) if self._pipeline else None
        if work is None or work.written:
            return export.write(outbox, log, claim, bodies, limits)
        work.written = True
        try:
            return work.receipt.result()
        except CancelledError:  # another batch failed before the thread came to this one
            return export.write(outbox, log, claim, bodies, limits)

    def mark(self, outbox: Outbox, log: AuditLog, receipt: Receipt, limits: Limits) -> MarkedBatch:
        """`export.mark`, by this thread or ahead. Raises what `mark` raises."""
        work = self._pipeline.work(receipt.claim) if self._pipeline else None
        if work is None or work.done:
            return timed_mark(outbox, log, receipt, limits)
        work.done = True
        try:
            return work.marked.result()
        except CancelledError:  # its write failed first, or another batch did
            return timed_mark(outbox, log, receipt, limits)

    def close(self) -> None:
        """No thread of a run outlives it."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
