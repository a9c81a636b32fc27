"""Working ahead: while one batch is marked in MySQL, the next one is fetched and written to ClickHouse.

What belongs here: one thread that runs `core.export.fetch` and `write` for the next claim of the same
plan, and hands the results to the steps when Dagster comes to them. What does not: anything about Dagster
or the databases. In another process there is no plan and nothing is ahead: each step works for itself.

Working early is safe because these are the same verbs under the same claim. What they leave in the ledger
is what the steps would have left, and a run that dies leaves one more batch for the next run to mark.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import sys
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from threading import Thread

from auditexport_pipeline.core import export
from auditexport_pipeline.core.batch import Claim, Receipt
from auditexport_pipeline.core.export import Bodies, FetchedBatch
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import AuditLog, Outbox

M_ARENA_MAX = -8  # of glibc's malloc.h


@dataclass(frozen=True, slots=True, kw_only=True)
class _Work:
    """One batch in the thread's hands. Its bodies stay in the thread: nobody else needs them."""

    claim: Claim
    fetched: Future[FetchedBatch] = field(default_factory=Future)
    receipt: Future[Receipt] = field(default_factory=Future)

    def run(self, outbox: Outbox, log: AuditLog, limits: Limits) -> None:
        try:
            fetched = export.fetch(outbox, self.claim, limits)
            self.fetched.set_result(replace(fetched, bodies={}))
            self.receipt.set_result(export.write(outbox, log, self.claim, fetched.bodies, limits))
        except BaseException as error:  # whatever it was, it is raised in the step that waits for it
            waiting = self.receipt if self.fetched.done() else self.fetched
            waiting.set_exception(error)


def _share_one_arena() -> None:
    """Asks glibc to give all threads one heap: with one each, what a batch freed stays with the thread that had it,
    and a drain holds a batch's worth of memory for every thread that ever read one.
    """
    if sys.platform == "linux":
        with contextlib.suppress(OSError, AttributeError):  # another C library has neither the call nor the habit
            ctypes.CDLL(None).mallopt(M_ARENA_MAX, 1)


class OneAhead:
    """At most one batch ahead, so memory holds one: the batch being marked needs none."""

    def __init__(self) -> None:
        _share_one_arena()
        self._next: dict[int, Claim] = {}
        self._work: _Work | None = None
        self._thread: Thread | None = None

    def plan(self, claims: Sequence[Claim]) -> None:
        """The order in which batches will be asked for."""
        self._next = {claim.batch_id: following for claim, following in itertools.pairwise(claims)}

    def fetch(self, outbox: Outbox, claim: Claim, limits: Limits) -> FetchedBatch:
        """`export.fetch`, or what the thread has of it: then without bodies. Raises what `fetch` raises."""
        work = self._work
        if work is None or work.claim != claim:
            return export.fetch(outbox, claim, limits)
        try:
            return work.fetched.result()
        except BaseException:
            self._work = None  # a retry of the step does it itself
            raise

    def write(self, outbox: Outbox, log: AuditLog, claim: Claim, bodies: Bodies, limits: Limits) -> Receipt:
        """`export.write`, or the thread's receipt; then sets the thread to work on the next batch."""
        work, self._work = self._work, None
        if work is not None and work.claim == claim:
            receipt = work.receipt.result()
        else:
            receipt = export.write(outbox, log, claim, bodies, limits)
        following = self._next.pop(claim.batch_id, None)
        if following is not None:
            self._work = _Work(claim=following)
            self._thread = Thread(target=self._work.run, args=(outbox, log, limits), name="ahead", daemon=True)
            self._thread.start()
        return receipt

    def close(self) -> None:
        """Waits for what is under way: no thread of a run outlives it. Statements have time limits of their own."""
        if self._thread is not None:
            self._thread.join()
