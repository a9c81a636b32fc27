"""Crashes on demand: wrappers at the two Protocols that end, or pause, a run at a named crash point.

What belongs here: the crash points, the two delegating stores, and a drain without Dagster. What does
not: fakes; behind every wrapper stands a real store, and what it did before the crash is really there.

A crash point is `before X n` or `after X n`: beside the n-th time that a run has the durable effect X.
`after insert n` is the lost answer: ClickHouse has taken the block and nobody learns of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.batch import Batch, Block, Claim
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import (
    AuditLog,
    Cut,
    Discrepancy,
    Holder,
    Holding,
    Marked,
    Moment,
    Outbox,
    Planning,
    Refusal,
    StoredEntry,
    StoredRow,
    Upkeep,
)

# Durable effects, and which time of each is worth a crash in a drain of two batches with two blocks and four
# marking chunks each: the first, one in the second batch, both blocks of a batch, chunks in between.
EFFECTS: dict[str, tuple[int, ...]] = {
    "claim": (1,),
    "seal": (1, 2),
    "begin_write": (1,),
    "insert": (1, 2, 4),
    "reserve": (1,),
    "recut": (1, 2),
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
        """Lets a run go on that crashed here: the process is there again, and this point is behind it."""
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


class CrashingOutbox:
    """`core.ports.Outbox` over a real one, with a crash point around each durable effect."""

    def __init__(self, real: Outbox, crash_at: CrashPoint) -> None:
        self.real = real
        self.crash_at = crash_at

    def open_owners(self) -> list[str]:
        return self.real.open_owners()

    def batch_holders(self) -> list[Holder]:
        return self.real.batch_holders()

    @contextmanager
    def planning(self, owner: str, lease_s: int, process: str = "") -> Iterator[Planning]:
        with self.real.planning(owner, lease_s, process) as ledger:
            yield ledger
            self.crash_at.at("before claim")
        self.crash_at.at("after claim")

    def renew(self, claim: Claim, lease_s: int) -> Batch:
        with self.crash_at.around("renew"):
            return self.real.renew(claim, lease_s)

    def allow_inserts(self, claim: Claim, digest: str, lease_s: int, until_ms: int) -> None:
        with self.crash_at.around("allow_inserts"):
            self.real.allow_inserts(claim, digest, lease_s, until_ms)

    def read(self, pks: PkSet, *, row_bytes: int, version: str | None = None) -> Iterator[StoredRow]:
        return self.real.read(pks, row_bytes=row_bytes, version=version)

    def seal(self, claim: Claim, cut: Cut) -> None:
        with self.crash_at.around("seal"):
            self.real.seal(claim, cut)

    def begin_write(self, claim: Claim, lease_s: int) -> Batch:
        with self.crash_at.around("begin_write"):
            return self.real.begin_write(claim, lease_s)

    def recut(self, claim: Claim, cut: Cut, *, instead_of: str) -> None:
        with self.crash_at.around("recut"):
            self.real.recut(claim, cut, instead_of=instead_of)

    def reserve_inserted_at(self, count: int) -> list[int]:
        with self.crash_at.around("reserve"):
            return self.real.reserve_inserted_at(count)

    def stop(self, claim: Claim, error: str, *, wait_ms: int) -> None:
        with self.crash_at.around("stop"):
            self.real.stop(claim, error, wait_ms=wait_ms)

    def record_written(self, claim: Claim, digest: str) -> Batch:
        with self.crash_at.around("record_written"):
            return self.real.record_written(claim, digest)

    def mark(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> Marked:
        with self.crash_at.around("mark"):
            return self.real.mark(claim, pks, exported_at_ms)

    def finish_mark(self, claim: Claim, pks: PkSet, exported_at_ms: int, before: Marked, *, ids: int) -> Batch:
        with self.crash_at.around("finish_mark"):
            return self.real.finish_mark(claim, pks, exported_at_ms, before, ids=ids)

    def own_ids(self, pks: PkSet, exported_at_ms: int) -> int:
        return self.real.own_ids(pks, exported_at_ms)

    def take_back(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> None:
        with self.crash_at.around("take_back"):
            self.real.take_back(claim, pks, exported_at_ms)

    def leave_written(self, claim: Claim, why: str) -> Batch:
        with self.crash_at.around("leave_written"):
            return self.real.leave_written(claim, why)

    def holders(self, pks: PkSet) -> str:
        return self.real.holders(pks)

    def moment(self) -> Moment:
        return self.real.moment()

    def claimed_since(self, owner: str, since: Moment) -> list[Batch]:
        return self.real.claimed_since(owner, since)

    def discrepant_since(self, since: Moment) -> dict[int, str]:
        return self.real.discrepant_since(since)

    def unverified(self, batches: int) -> list[Batch]:
        return self.real.unverified(batches)

    def record_verified(self, batch: Batch, discrepancy: Discrepancy, observed: Mapping[int, Holding]) -> None:
        with self.crash_at.around("record_verified"):
            self.real.record_verified(batch, discrepancy, observed)

    def sent_over(self, first_pk: int, last_pk: int) -> list[Batch]:
        return self.real.sent_over(first_pk, last_pk)

    def batches(self, batch_ids: Iterable[int]) -> list[Batch]:
        return self.real.batches(batch_ids)


class CrashingAuditLog:
    """`core.ports.AuditLog` over a real one, with a crash point around each INSERT."""

    def __init__(self, real: AuditLog, crash_at: CrashPoint) -> None:
        self.real = real
        self.crash_at = crash_at

    def deadline_ms(self, within_s: float) -> int:
        with self.crash_at.around("deadline"):
            return self.real.deadline_ms(within_s)

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        with self.crash_at.around("insert"):
            return self.real.insert(batch, block, payloads, deadline_ms=deadline_ms, timeout_s=timeout_s)

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        return self.real.probe(version, payloads, timeout_s=timeout_s)

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        return self.real.holdings(inserted_at_ms)

    def entries_at(self, inserted_at_ms: int) -> list[StoredEntry]:
        return self.real.entries_at(inserted_at_ms)

    def entries_of(self, keys: Sequence[tuple[str, str, int, str]]) -> list[StoredEntry]:
        return self.real.entries_of(keys)

    def keys_held(
        self, keys: Sequence[tuple[str, str, int, str]], inserted_at_ms: Sequence[int]
    ) -> set[tuple[tuple[str, str, int, str], int]]:
        return self.real.keys_held(keys, inserted_at_ms)

    def some_entries_at(self, inserted_at_ms: int, most: int) -> list[StoredEntry]:
        return self.real.some_entries_at(inserted_at_ms, most)

    def workspaces_at(self, inserted_at_ms: int) -> dict[str, int]:
        return self.real.workspaces_at(inserted_at_ms)

    def count_at(self, inserted_at_ms: Sequence[int]) -> int:
        return self.real.count_at(inserted_at_ms)

    def ids_held(self, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        return self.real.ids_held(ids)

    def contents(self, version: str, payloads: Sequence[bytes], inserted_at_ms: int) -> list[int]:
        return self.real.contents(version, payloads, inserted_at_ms)

    def slots_between(self, from_ms: int, to_ms: int) -> list[int]:
        return self.real.slots_between(from_ms, to_ms)

    def by_workspace(self, from_ms: int, to_ms: int) -> dict[tuple[str, int], int]:
        return self.real.by_workspace(from_ms, to_ms)

    def named_by(self, erasure: Erasure, until_ms: int) -> int:
        return self.real.named_by(erasure, until_ms)

    def ttl(self, version: str) -> str:
        return self.real.ttl(version)

    def past_ttl(self, version: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        return self.real.past_ttl(version, inserted_at_ms, ahead_s=ahead_s)

    def past_ttl_of(
        self, version: str, inserted_at_ms: int, keys: Sequence[tuple[str, str, int, str]]
    ) -> dict[tuple[str, str, int, str], bool | None]:
        return self.real.past_ttl_of(version, inserted_at_ms, keys)

    def kept_ms(self) -> int | None:
        return self.real.kept_ms()


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


class CrashingUpkeep:
    """`core.ports.Upkeep` over a real one, with a crash point around each durable effect."""

    EFFECTS = ("record_action", "unmark", "delete", "record_swept", "close_letters", "compact")

    def __init__(self, real: Upkeep, crash_at: CrashPoint) -> None:
        self.real = real
        self.crash_at = crash_at

    def __getattr__(self, name: str) -> Any:
        verb = getattr(self.real, name)
        if name not in self.EFFECTS:
            return verb

        def crashing(*arguments: Any, **named: Any) -> Any:
            with self.crash_at.around(name):
                return verb(*arguments, **named)

        return crashing
