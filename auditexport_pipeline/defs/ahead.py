"""Working ahead: while one batch is marked, the next is written to ClickHouse and the one after it fetched.

What belongs here: two threads that run `core.export.fetch` and `write` for the plan's next claims, and hand
the results to the steps when Dagster comes to them. What does not: anything about Dagster or the databases.
In another process there is no plan and nothing is ahead: each step works for itself.

Working early is safe because these are the same verbs under the same claim. What they leave in the ledger
is what the steps would have left, and a run that dies leaves two more batches for the next run to finish.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from threading import Event, Semaphore

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Claim, Receipt
from auditexport_pipeline.core.export import Bodies, FetchedBatch
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import AuditLog, Outbox

M_ARENA_MAX = -8  # of glibc's malloc.h
# Batches that the threads may have in hand: one being fetched, and one written or waiting to be marked.
BATCHES_AHEAD = 2


@dataclass(slots=True, kw_only=True)
class _Work:
    """One batch in the threads' hands. Its bodies stay with them: nobody else needs them."""

    claim: Claim
    fetched: Future[FetchedBatch] = field(default_factory=Future)
    receipt: Future[Receipt] = field(default_factory=Future)
    passed: bool = False  # the threads no longer wait for its steps
    taken: bool = False  # its receipt, or the error instead of one, is with the step: a retry works alone


class _Pipeline:
    """A fetching and a writing thread that take claims in order, until the last one or the first failure."""

    def __init__(self, outbox: Outbox, log: AuditLog, claims: Sequence[Claim], limits: Limits) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self.works = [_Work(claim=claim) for claim in claims]
        self._room = Semaphore(BATCHES_AHEAD)
        self._stopped = Event()
        self._fetching = ThreadPoolExecutor(1, thread_name_prefix="fetch_ahead")
        self._writing = ThreadPoolExecutor(1, thread_name_prefix="write_ahead")
        self._fetching.submit(self._fetch_all)

    def work(self, claim: Claim) -> _Work | None:
        """The work of this batch, or None when no thread will come to it."""
        return next((work for work in self.works if work.claim == claim and not work.fetched.cancelled()), None)

    def pass_by(self, work: _Work) -> None:
        """Lets the threads go on by one batch, because the steps are done with this one."""
        if not work.passed:
            work.passed = True
            self._room.release()

    def close(self) -> None:
        """Stops after what is under way, and waits for it: statements have time limits of their own."""
        self._stop()
        self._fetching.shutdown()
        self._writing.shutdown()

    def _stop(self) -> None:
        self._stopped.set()
        self._room.release()  # wakes the fetching thread, which then cancels what it will not come to

    def _fetch_all(self) -> None:
        for work in self.works:
            self._room.acquire()
            if self._stopped.is_set():
                work.fetched.cancel()
                self._room.release()
                continue
            try:
                fetched = export.fetch(self._outbox, work.claim, self._limits)
            except BaseException as error:  # whatever it was, it is raised in the step that waits for it
                work.fetched.set_exception(error)
                work.receipt.cancel()
                self._stop()
                continue
            self._writing.submit(self._write, work, fetched.bodies)
            work.fetched.set_result(replace(fetched, bodies={}))
            del fetched  # the next batch must not find this one still in memory

    def _write(self, work: _Work, bodies: Bodies) -> None:
        if self._stopped.is_set():
            work.receipt.cancel()
            return
        try:
            work.receipt.set_result(export.write(self._outbox, self._log, work.claim, bodies, self._limits))
        except BaseException as error:
            work.receipt.set_exception(error)
            self._stop()


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
        self._pipeline: _Pipeline | None = None

    def plan(self, claims: Sequence[Claim]) -> None:
        """The order in which batches will be asked for."""
        self._planned = list(claims)

    def fetch(self, outbox: Outbox, log: AuditLog, claim: Claim, limits: Limits) -> FetchedBatch:
        """`export.fetch`, by this thread or ahead: then without bodies. Raises what `fetch` raises."""
        if claim not in self._planned:
            return export.fetch(outbox, claim, limits)
        work = self._pipeline.work(claim) if self._pipeline else None
        if work is None or self._pipeline is None:
            self.close()
            self._pipeline = _Pipeline(outbox, log, self._planned[self._planned.index(claim) :], limits)
            (work, *_) = self._pipeline.works
        for earlier in self._pipeline.works[: self._pipeline.works.index(work)]:
            self._pipeline.pass_by(earlier)  # a step of it failed, or the steps come in another order
        self._planned.remove(claim)  # a retry of the step does it itself
        try:
            return work.fetched.result()
        except CancelledError:  # another batch failed before the thread came to this one
            return export.fetch(outbox, claim, limits)

    def write(self, outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt:
        """`export.write`, by this thread or ahead. Raises what `write` raises."""
        work = self._pipeline.work(claim) if self._pipeline else None
        if work is None or self._pipeline is None or work.taken:
            return export.write(outbox, log, claim, bodies, limits)
        work.taken = True
        try:
            return work.receipt.result()
        except CancelledError:  # another batch failed before the thread came to this one
            return export.write(outbox, log, claim, bodies, limits)
        finally:
            self._pipeline.pass_by(work)

    def close(self) -> None:
        """No thread of a run outlives it."""
        if self._pipeline is not None:
            self._pipeline.close()
            self._pipeline = None
