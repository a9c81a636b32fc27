"""Crashes on demand: wrappers around the stores that end, or pause, a run at a named crash point.

What belongs here: the crash points, the wrappers, and a drain without Dagster. What does not: fakes. Behind every wrapper
is a real store, and what it did before the crash stays done.

A crash point is `before X n` or `after X n`: beside the n-th time that a run has the durable effect X.
`after insert n` is the lost answer: ClickHouse has the block, and the run does not know.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.ports import AuditLog, Outbox, Planning
from auditexport_pipeline.core.settings import Limits

# Durable effects, and which time of each is worth a crash in a drain of two batches with two blocks and four
# marking chunks each: the first, one in the second batch, both blocks of a batch, chunks in between.
EFFECTS: dict[str, tuple[int, ...]] = {
    "claim": (1,),
    "seal": (1, 2),
    "begin_write": (1,),
    "insert": (1, 2, 4),
    "reserve": (1,),
    "replace_cut": (1, 2),
    "record_written": (1, 2),
    "mark": (1, 3, 5),
    "finish_mark": (1, 2),
    "record_verified": (1, 2),
}

CRASH_POINTS: tuple[str, ...] = tuple(
    f"{side} {effect} {time}" for effect, times in EFFECTS.items() for time in times for side in ("before", "after")
)


class Crash(BaseException):
    """The process is gone. No `Exception`: nothing in the program may catch it and go on."""


class CrashPoint:
    """One place in a run, shared by both wrappers: counts how often it is reached and acts once.

    Without `then` it raises `Crash`, and so does everything that the dead run's other threads try to do
    afterwards. With `then` the run is only paused there: `then` happens, and the run goes on, a zombie.
    """

    def __init__(self, name: str, then: Callable[[], None] | None = None) -> None:
        self.place, _, time = name.rpartition(" ")
        self.left = int(time)
        self.then = then
        self.reached = False
        self._lock = threading.Lock()

    @property
    def crashed(self) -> bool:
        return self.reached and self.then is None

    def revive(self) -> None:
        """Lets a run that crashed here continue: its process is there again, and has passed this point."""
        self.reached = False
        self.left = 0

    def at(self, place: str) -> None:
        if self.crashed:
            raise Crash("this run is dead already")
        if place != self.place:
            return
        with self._lock:
            self.left -= 1
            due = self.left == 0
            self.reached = self.reached or due
        if due and self.then is None:
            raise Crash(place)
        if due and self.then is not None:
            self.then()

    @contextmanager
    def around(self, effect: str) -> Iterator[None]:
        self.at(f"before {effect}")
        yield
        self.at(f"after {effect}")


class Crashing:
    """A real store, with a crash point around each durable effect. `PLACES` names them, by the store's method."""

    PLACES: Mapping[str, str] = {}

    def __init__(self, real: Any, crash_at: CrashPoint) -> None:
        self.real = real
        self.crash_at = crash_at

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.real, name)
        if name not in self.PLACES:
            return verb

        def crashing(*arguments: Any, **named: Any) -> Any:
            with self.crash_at.around(self.PLACES[name]):
                return verb(*arguments, **named)

        return crashing


def _named_alike(*methods: str) -> dict[str, str]:
    return {method: method for method in methods}


class CrashingOutbox(Crashing):
    """`core.ports.Outbox`."""

    PLACES: Mapping[str, str] = {
        **_named_alike(
            "renew", "allow_inserts", "seal", "begin_write", "replace_cut", "stop", "record_written", "mark"
        ),
        **_named_alike("finish_mark", "take_back", "leave_written", "record_verified"),
        "reserve_inserted_at": "reserve",
    }

    @contextmanager
    def planning(self, owner: str, lease_s: int, process: str = "") -> Iterator[Planning]:
        with self.real.planning(owner, lease_s, process) as ledger:
            yield ledger
            self.crash_at.at("before claim")
        self.crash_at.at("after claim")

    @contextmanager
    def one_transaction(self) -> Iterator[None]:
        with self.real.one_transaction():
            yield
            self.crash_at.at("before commit")
        self.crash_at.at("after commit")


class CrashingAuditLog(Crashing):
    """`core.ports.AuditLog`."""

    PLACES: Mapping[str, str] = {"insert": "insert", "deadline_ms": "deadline", "holdings_now": "look"}


class CrashingMaintenance(Crashing):
    """`core.ports.Maintenance`."""

    PLACES: Mapping[str, str] = _named_alike(
        "record_action", "unmark", "delete", "record_swept", "close_letters", "compact"
    )


def drain(
    outbox: Outbox,
    log: AuditLog,
    limits: Limits,
    *,
    owner: str,
    dead_owners: Collection[str] = (),
    hand_over: bool = True,
    step: Callable[[Callable[[], Any]], Any] = lambda verb: verb(),
) -> list[Claim]:
    """One run as the asset's ops make it: claim, then batch by batch fetch, write and mark, then verify.

    `step` runs each verb, once or more often. Without `hand_over` every body is read again from the
    outbox, as it is in another process; so it is when `step` runs a write a second time.
    """
    claims = step(lambda: claiming.claim(outbox, owner=owner, dead_owners=dead_owners, limits=limits))
    for claim in claims:
        fetched = step(lambda claim=claim: export.fetch(outbox, log, claim, limits))
        kept = [fetched.bodies] if hand_over else []
        receipt = step(
            lambda claim=claim, kept=kept: export.write(outbox, log, claim, kept.pop() if kept else {}, limits)
        )
        step(lambda receipt=receipt: export.mark(outbox, log, receipt, limits))
    step(lambda: verify.verify(outbox, log, outbox.unverified(1_000)))
    return claims
