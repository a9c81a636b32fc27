"""Renews leases while a verb works, in a timed loop of its own, however long one statement takes.

What does not belong here: what a lease is (`mysql/outbox.sql`), and how long an INSERT may take, which ClickHouse bounds by
its own clock.

A lease is short, so that a dead run holds its batches for less than a minute. The loop ends with its verb, when another plan
holds the batch, and when the verb has shown no progress for so long that it must hang: then others may take the batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.ports import Outbox
from auditexport_pipeline.core.settings import Limits

# Two renewals may fail, as in a failover, before the lease ends.
RENEWALS_PER_LEASE = 3
# Added to an INSERT's own time-out: a verb that shows no progress for longer hangs in a call that does not end.
LONGEST_SILENCE_S = 300.0

_at_work = threading.local()


def progress() -> None:
    """Notes progress of this thread's verb: the silence is measured from here."""
    for silence in getattr(_at_work, "silences", ()):
        silence.since = time.monotonic()


class _Silence:
    def __init__(self) -> None:
        self.since = time.monotonic()


@contextmanager
def kept(outbox: Outbox, claim: Claim, limits: Limits) -> Iterator[None]:
    """Renews the leases of the claim's plan while the block runs and shows progress."""
    silence, over = _Silence(), threading.Event()
    longest_s = limits.insert_timeout_s + LONGEST_SILENCE_S

    def renew() -> None:
        while not over.wait(limits.lease_s / RENEWALS_PER_LEASE) and time.monotonic() - silence.since < longest_s:
            try:
                outbox.renew(claim, limits.lease_s)
            except LeaseLost:
                return
            except BaseException:  # the verb meets the error too, and raises it; the next turn tries again
                continue

    silences = getattr(_at_work, "silences", ())
    _at_work.silences = (*silences, silence)
    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _at_work.silences = silences
