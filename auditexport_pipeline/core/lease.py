"""Renews leases while a verb works, in a thread of its own, however long one statement takes.

A lease is short, so that a dead run holds its batches for less than a minute. The renewals end with the verb, when
another plan holds the batch, and when the verb has made no progress for so long that it must hang: then other runs may
take the batch. What does not belong here: how the ledger stores a lease (`mysql/outbox.sql`), and how long an INSERT
may take, which ClickHouse bounds by its own clock.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.ports import Outbox
from auditexport_pipeline.core.settings import Limits

# Two renewals may fail, as in a failover, before the lease ends.
RENEWALS_PER_LEASE = 3
# A verb without progress for `insert_timeout_s` and this time hangs: its lease is not renewed any more.
LONGEST_SILENCE_S = 300.0


class _Progress:
    """The time of a verb's last progress."""

    def __init__(self) -> None:
        self.at_s = threads.monotonic()


_thread = threading.local()


def progress() -> None:
    """Notes that the verb of this thread makes progress."""
    if (current := getattr(_thread, "current", None)) is not None:
        current.at_s = threads.monotonic()


@contextmanager
def leases_renewed(outbox: Outbox, claim: Claim, limits: Limits) -> Iterator[None]:
    """Renews the leases of the claim's plan while the block runs and makes progress.

    Not in an open transaction: it has locked the batch's row of the ledger, so no plan can adopt the batch.
    """
    if outbox.in_transaction:
        yield
        return
    last, done = _Progress(), threads.event()
    longest_s = limits.insert_timeout_s + LONGEST_SILENCE_S

    def renew() -> None:
        while not done.wait(limits.lease_s / RENEWALS_PER_LEASE) and threads.monotonic() - last.at_s < longest_s:
            try:
                outbox.renew(claim, limits.lease_s)
            except LeaseLost:
                return
            except BaseException:  # the verb meets the error too and raises it; the next turn tries again
                continue

    _thread.current = last
    threads.start(renew, "lease")
    try:
        yield
    finally:
        done.set()
        _thread.current = None
