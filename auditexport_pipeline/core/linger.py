"""Lingering: a run that has drained its plan stays for a while, and drains what arrives while it is there.

What belongs here: the loop of small drains, and when it ends. What does not: the verbs of a batch (`core.export`),
and who asks a run to stay (`defs.assets`).

Starting a run takes seconds, a small drain takes tens of milliseconds: an event that finds a run there is in
ClickHouse within one poll.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterator

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Batch
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox
from auditexport_pipeline.core.verify import verify

# Batches of earlier drains that are verified on the way, if a crash has left any.
VERIFY_AT_ONCE = 200
# One look at MySQL, and one at ClickHouse's definition of the table while rows are held.
RELEASE_EVERY_S = 5.0


def linger(
    outbox: Outbox,
    log: AuditLog,
    *,
    owner: str,
    limits: Limits,
    stays: Callable[[], bool],
    process: str = "",
    max_rows: Callable[[], int | None] = lambda: None,
    exported: Collection[int] = (),
    left_alone: Callable[[str], None] = lambda line: None,
    release: Callable[[], object] = lambda: None,
) -> Iterator[tuple[list[Batch], dict[int, Discrepancy]]]:
    """Drains again and again while `stays()`, every `linger_poll_ms`; yields what each drain that found something did.

    Each drain is a whole one: claimed, sealed, written, marked, verified. Memory: one batch's rows. Raises what the
    verbs raise; what is open then is the next run's to finish. Ends early when a batch could not be marked. Rows of
    `exported`, the run's earlier batches, and of its own, are not exported again: `left_alone` hears of them, once. `release` is
    called every `RELEASE_EVERY_S`: rows that the table refused are taken again once its definition has changed.
    """
    own = set(exported)
    said: set[str] = set()

    def say(line: str, key: str = "") -> None:
        if (key or line) not in said:
            said.add(key or line)
            left_alone(line)

    def cleared(pks: PkSet) -> None:
        say(claiming.cleared_line(pks), "cleared")

    released = time.monotonic()
    while stays():
        started = time.monotonic()
        if started - released >= RELEASE_EVERY_S:
            released = started
            release()
        claims = claiming.claim(
            outbox,
            owner=owner,
            process=process,
            dead_owners=(),
            limits=limits,
            max_rows=max_rows(),
            left_alone=say,
            exported=own,
            cleared=cleared,
        )
        own.update(claim.batch_id for claim in claims)
        unmarked = False
        for claim in claims:
            fetched = export.fetch(outbox, log, claim, limits)
            receipt = export.write(outbox, log, claim, fetched.bodies, limits)
            unmarked |= export.mark(outbox, log, receipt, limits).left is not None
        if claims:
            verified = verify(outbox, log, outbox.unverified(len(claims) + VERIFY_AT_ONCE))
            yield outbox.batches([claim.batch_id for claim in claims]), verified
        if unmarked:  # it would be taken up again at every look
            return
        time.sleep(max(0.0, started + limits.linger_poll_ms / 1000 - time.monotonic()))
