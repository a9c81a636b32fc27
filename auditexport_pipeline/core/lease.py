"""Keeping a lease while a verb is at work: a small timed loop renews it, however long one statement takes.

What belongs here: when a lease is renewed, and when no more. What does not: what a lease is (`mysql/outbox.sql`), and how
long an INSERT may take, which ClickHouse bounds by its own clock.

A lease is short, so that a run that died holds its batches for less than a minute. The loop ends with its verb; when
another plan holds the batch; and when the verb shows no progress for so long that it hangs: then others may have the batch.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.ports import Outbox

# Two renewals may fail, as in a failover, before the lease ends.
RENEWALS_PER_LEASE = 3
# Beyond an INSERT's own time-out: a verb that shows no progress for longer hangs, in a call without an end.
LONGEST_SILENCE_S = 300.0

_at_work = threading.local()


def progress() -> None:
    """Says that the verb of this thread got on: the silence is counted from here."""
    for silence in getattr(_at_work, "silences", ()):
        silence.since = time.monotonic()


class _Silence:
    def __init__(self) -> None:
        self.since = time.monotonic()


@contextmanager
def kept(outbox: Outbox, claim: Claim, limits: Limits) -> Iterator[None]:
    """Renews the leases of the claim's plan for as long as the block runs, and shows progress now and then."""
    silence, over = _Silence(), threading.Event()
    longest_s = limits.insert_timeout_s + LONGEST_SILENCE_S

    def renew() -> None:
        while not over.wait(limits.lease_s / RENEWALS_PER_LEASE) and time.monotonic() - silence.since < longest_s:
            try:
                outbox.renew(claim, limits.lease_s)
            except LeaseLost:
                return
            except BaseException:  # the verb meets it too, and says so; the next turn tries again
                continue

    silences = getattr(_at_work, "silences", ())
    _at_work.silences = (*silences, silence)
    threading.Thread(target=renew, name="lease", daemon=True).start()
    try:
        yield
    finally:
        over.set()
        _at_work.silences = silences
