"""`core.ports.AuditLog` over the simulated ClickHouse: what a process sends, and the answers that it gets or does not get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TypeVar

from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.batch import Batch, Block, Holding
from auditexport_pipeline.core.errors import (
    AuditLogUnavailable,
    ForeignAnswer,
    InsertOutcomeUnknown,
    LeaseLost,
    WrongAddress,
)
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.ports import Refusal, RefusalKind, StoredEntry
from auditexport_tests.simulation.clickhouse_server import DAY_MS, OUT_OF_MEMORY, TIMED_OUT, SimulatedClickHouse

T = TypeVar("T")
LIMITS = {413: RefusalKind.SIZE, 504: RefusalKind.TIME, 408: RefusalKind.TIME}
# Statuses to which a rerun gets the same answer.
PERMANENT = (401, 404, 405, 407, 411)
# How much longer the sender waits than the server may work.
GRACE_S = 15


class Watch:
    """Sees what a process sends. This one looks away."""

    def asks(self) -> None:
        """Called before each request."""

    @contextmanager
    def insert(
        self, batch: Batch, block: Block, payloads: Sequence[bytes], deadline_ms: int
    ) -> Iterator[Callable[[float], None]]:
        """Around the server's work on an INSERT; gets to know when it arrives."""
        yield lambda at_s: None


class SimulatedAuditLog:
    """The connection of one process to the server."""

    def __init__(self, server: SimulatedClickHouse, watch: Watch | None = None) -> None:
        self._server = server
        self._watch = watch or Watch()
        self._scheduler = server.scheduler

    # ── questions ────────────────────────────────────────────────────────────────────────────────

    def _ask(self, what: str, answer: Callable[[], T]) -> T:
        """A SELECT: one step, and an answer of that instant. It is sent again once when its connection dies."""
        self._watch.asks()
        self._scheduler.step(what)
        self._server.asked[self._scheduler.process.name] += 1
        conditions = self._server.conditions
        if conditions.down or (conditions.dies() and conditions.dies()):
            raise AuditLogUnavailable("ClickHouse (simulated) gave no answer; run again")
        status = conditions.proxy_answers()
        if status:
            raise _foreign(status)
        return answer()

    def deadline_ms(self, within_s: float) -> int:
        return self._ask("asks for the time", self._server.now_ms) + int(within_s * 1000)

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        wanted = set(inserted_at_ms)
        return self._ask(
            "looks for blocks", lambda: _holdings(e for e in self._entries() if e.inserted_at_ms in wanted)
        )

    def holdings_now(self, batch: Batch) -> tuple[dict[int, Holding], int | None]:
        if not batch.blocks:
            return {}, None
        held = self.holdings([block.inserted_at_ms for block in batch.blocks])
        return held, self._server.now_ms() if held else None

    def entries_at(self, inserted_at_ms: int, *, most: int = 2**63 - 1) -> list[StoredEntry]:
        return self._ask(
            "reads entries", lambda: [e for e in self._entries() if e.inserted_at_ms == inserted_at_ms][:most]
        )

    def entries_of(self, keys: Sequence[Key]) -> list[StoredEntry]:
        wanted = set(keys)
        return self._ask("reads entries", lambda: [e for e in self._entries() if e.key in wanted])

    def keys_held(self, keys: Sequence[Key], inserted_at_ms: Sequence[int]) -> set[tuple[Key, int]]:
        wanted, times = set(keys), set(inserted_at_ms)
        return self._ask(
            "looks for events",
            lambda: {
                (e.key, e.inserted_at_ms) for e in self._entries() if e.key in wanted and e.inserted_at_ms in times
            },
        )

    def ids_held(self, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        wanted = set(ids)
        return self._ask("looks for events", lambda: {(e.key[0], e.key[3]) for e in self._entries()} & wanted)

    def contents(self, version: str, payloads: Sequence[bytes], inserted_at_ms: int) -> list[int]:
        def answer() -> list[int]:
            entries, refusal = self._server.parse(payloads, inserted_at_ms)
            if refusal is not None:
                raise AuditLogUnavailable("ClickHouse (simulated) cannot parse a payload; run again")
            return [entry.content for entry in entries]

        return self._ask("parses payloads for a comparison", answer)

    def count_by_inserted_at(self, from_ms: int, to_ms: int) -> dict[int, int]:
        return self._ask(
            "counts entries",
            lambda: dict(sorted(Counter(e.inserted_at_ms for e in self._between(from_ms, to_ms)).items())),
        )

    def count_by_workspace(self, from_ms: int, to_ms: int) -> dict[tuple[str, int], int]:
        return self._ask(
            "counts entries",
            lambda: dict(
                Counter((e.key[0], e.inserted_at_ms // DAY_MS * DAY_MS) for e in self._between(from_ms, to_ms))
            ),
        )

    def named_by(self, erasure: Erasure, until_ms: int) -> int:
        def named(entry: StoredEntry) -> bool:
            workspace_id, _, time_ms, event_id = entry.key
            return (
                workspace_id == erasure.workspace_id
                and erasure.event_id in ("", event_id)
                and (erasure.from_ms is None or time_ms >= erasure.from_ms)
                and (erasure.to_ms is None or time_ms < erasure.to_ms)
                and entry.inserted_at_ms <= until_ms
            )

        return self._ask("counts what an erasure names", lambda: sum(map(named, self._entries())))

    def definition(self, version: str) -> str:
        return self._ask("reads the table's definition", lambda: f"definition {self._server.definition}")

    def definition_age_s(self, version: str) -> int:
        # The clock's seconds that began since.
        server = self._server
        return self._ask("reads the table's age", lambda: server.now_ms() // 1000 - server.defined_at_ms // 1000)

    def ttl(self, version: str) -> str:
        return self._ask("reads the table's TTL", self._server.ttl)

    def past_ttl(self, version: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        past = self._server.past_ttl
        return self._ask("evaluates the TTL", lambda: {at: past(None, at, ahead_s) for at in inserted_at_ms})

    def past_ttl_of(self, version: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        past = self._server.past_ttl
        return self._ask("evaluates the TTL", lambda: {key: past(key, inserted_at_ms) for key in keys})

    def kept_ms(self) -> int | None:
        def answer() -> int | None:
            server = self._server
            known = server.keeps_days is not None and server.keeps_by == "inserted_at" and not server.keeps_but
            return server.keeps_days * DAY_MS if known and server.keeps_days is not None else None

        return self._ask("reads the table's TTL", answer)

    def _entries(self) -> list[StoredEntry]:
        return list(self._server.entries())

    def _between(self, from_ms: int, to_ms: int) -> list[StoredEntry]:
        return [entry for entry in self._server.entries() if from_ms <= entry.inserted_at_ms < to_ms]

    # ── INSERTs ──────────────────────────────────────────────────────────────────────────────────

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        """It goes once, as an INSERT does, and a proxy's limit is an answer to it too."""
        sent = [bytes(payload) for payload in payloads]
        payloads.clear()
        self._watch.asks()
        self._scheduler.step("probes rows")
        self._server.asked[self._scheduler.process.name] += 1
        conditions = self._server.conditions
        if conditions.down or conditions.dies():
            raise AuditLogUnavailable("ClickHouse (simulated) gave no answer; run again")
        if (status := conditions.proxy_answers()) or sum(map(len, sent)) > conditions.most_bytes:
            return _limit(status or 413)
        return self._server.parse(sent, 0)[1]

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        sent = [bytes(payload) for payload in payloads]
        payloads.clear()
        server, scheduler = self._server, self._scheduler
        what = f"batch {batch.batch_id}, block {block.number}"
        self._watch.asks()
        scheduler.step(f"sends the INSERT of {what}")
        server.asked[scheduler.process.name] += 1
        conditions = server.conditions
        if conditions.down:
            raise AuditLogUnavailable("ClickHouse (simulated) cannot be reached; nothing was sent, run again")
        if conditions.dies():
            raise _unknown(what)  # the sender cannot tell this from an answer that is lost
        status = conditions.proxy_answers()
        if status and not conditions.passes_on:
            return _limit(status)
        if sum(map(len, sent)) > conditions.most_bytes:
            return _limit(413)

        answers: list[Refusal | BaseException | None] = []

        def work() -> None:
            with self._watch.insert(batch, block, sent, deadline_ms) as arrives:
                answers.append(
                    self._work(sent, block.inserted_at_ms, batch.token(block), deadline_ms, timeout_s, arrives)
                )

        scheduler.spawn(f"clickhouse: INSERT of {what}", work, server.process)
        proxy_s, own_s = conditions.proxy_waits_s if status else conditions.proxy_patience_s, timeout_s + GRACE_S
        answered = scheduler.wait(lambda: bool(answers), min(proxy_s, own_s))
        if not answered and proxy_s < own_s:
            status = status or 504
        if status:  # the INSERT may go on
            return _limit(status)
        if not answered or conditions.answer_lost():
            raise _unknown(what)
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _work(
        self,
        payloads: Sequence[bytes],
        at_ms: int,
        token: str,
        deadline_ms: int,
        timeout_s: int,
        arrives: Callable[[float], None],
    ) -> Refusal | BaseException | None:
        """What the server does with an INSERT, also when nobody waits for it any more."""
        server, conditions = self._server, self._server.conditions
        on_its_way_s = conditions.arrives_after_s()
        arrives(self._scheduler.now_s + on_its_way_s)
        if on_its_way_s:
            self._scheduler.sleep(on_its_way_s)
        if not conditions.most_rows:
            return OUT_OF_MEMORY
        if server.now_ms() > deadline_ms:
            return LeaseLost("the deadline of this INSERT has passed (simulated)")
        if (refused := server.refuses()) is not None:
            return refused
        entries, refusal = server.parse(payloads, at_ms)
        if refusal is None and len(entries) > conditions.most_rows:
            return OUT_OF_MEMORY
        if refusal is None:
            takes_s = conditions.insert_s()
            self._scheduler.sleep(min(takes_s, float(timeout_s)))
            refusal = TIMED_OUT if takes_s > timeout_s else server.store(entries, token, timeout_s - takes_s, payloads)
        if refusal is not None and refusal.kind is RefusalKind.ROWS:
            return replace(refusal, definition=f"definition {server.definition}")
        return refusal


def _unknown(what: str) -> InsertOutcomeUnknown:
    return InsertOutcomeUnknown(f"no answer from ClickHouse (simulated) to the INSERT of {what}; run again")


def _limit(status: int) -> Refusal:
    """A proxy's answer to rows. Raises unless it is about a limit."""
    if status not in LIMITS:
        raise _foreign(status)
    return Refusal(code=status, name=f"HTTP {status}", kind=LIMITS[status], meaning="a proxy (simulated) answered")


def _foreign(status: int) -> ForeignAnswer | WrongAddress:
    kind = WrongAddress if status in PERMANENT or 300 <= status < 400 else ForeignAnswer
    return kind(f"a proxy (simulated) answered HTTP {status}; run again", status)


def _holdings(entries: object) -> dict[int, Holding]:
    found: dict[int, list[StoredEntry]] = {}
    for entry in entries:  # type: ignore[attr-defined]
        found.setdefault(entry.inserted_at_ms, []).append(entry)
    return {
        at_ms: Holding(
            rows=len(some),
            fingerprint=sum(entry.fingerprint for entry in some) % 2**64,
            content=sum(entry.content for entry in some) % 2**64,
            copies=len(some) - len({entry.content for entry in some}),
        )
        for at_ms, some in found.items()
    }
