"""`core.ports.AuditLog` over the simulated ClickHouse: what a process sends, and the answers that it gets or does not get."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeVar

from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.batch import Batch, Block, Holding
from auditexport_pipeline.core.errors import AuditLogUnavailable, ForeignAnswer, InsertOutcomeUnknown, LeaseLost
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.ports import Refusal, RefusalKind, StoredEntry
from auditexport_tests.simulation.clickhouse_server import DAY_MS, SimulatedClickHouse, entry_of

T = TypeVar("T")
LIMITS = {413: RefusalKind.SIZE, 504: RefusalKind.TIME, 408: RefusalKind.TIME}


class SimulatedAuditLog:
    """The connection of one process to the server."""

    def __init__(self, server: SimulatedClickHouse) -> None:
        self._server = server
        self._scheduler = server.scheduler

    # ── questions ────────────────────────────────────────────────────────────────────────────────

    def _ask(self, what: str, answer: Callable[[], T]) -> T:
        """A SELECT: one step, and an answer of that instant."""
        self._scheduler.step(what)
        conditions = self._server.conditions
        if conditions.down or conditions.dies():
            raise AuditLogUnavailable("ClickHouse (simulated) gave no answer; run again")
        status = conditions.proxy_answers()
        if status:
            raise ForeignAnswer("a proxy (simulated) answered; run again", status)
        return answer()

    def deadline_ms(self, within_s: float) -> int:
        return self._ask("asks for the time", self._server.now_ms) + int(within_s * 1000)

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        wanted = set(inserted_at_ms)
        return self._ask(
            "looks for blocks", lambda: _holdings(e for e in self._entries() if e.inserted_at_ms in wanted)
        )

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
            entries = [entry_of(version, payload, inserted_at_ms) for payload in payloads]
            if None in entries:
                raise AuditLogUnavailable("ClickHouse (simulated) cannot parse a payload; run again")
            return [entry.content for entry in entries if entry is not None]

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

    def definition_age_s(self, version: str) -> int:
        return self._ask("reads the table's age", lambda: (self._server.now_ms() - self._server.defined_at_ms) // 1000)

    def ttl(self, version: str) -> str:
        keeps = self._server.keeps_days
        return self._ask("reads the table's TTL", lambda: "" if keeps is None else f"inserted_at + {keeps} days")

    def past_ttl(self, version: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        return self._ask("evaluates the TTL", lambda: {at: self._past(at, ahead_s) for at in inserted_at_ms})

    def past_ttl_of(self, version: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        return self._ask("evaluates the TTL", lambda: dict.fromkeys(keys, self._past(inserted_at_ms, 0)))

    def kept_ms(self) -> int | None:
        keeps = self._server.keeps_days
        return self._ask("reads the table's TTL", lambda: None if keeps is None else keeps * DAY_MS)

    def _past(self, at_ms: int, ahead_s: int) -> bool:
        keeps = self._server.keeps_days
        return keeps is not None and at_ms + keeps * DAY_MS <= self._server.now_ms() + ahead_s * 1000

    def _entries(self) -> list[StoredEntry]:
        return list(self._server.entries())

    def _between(self, from_ms: int, to_ms: int) -> list[StoredEntry]:
        return [entry for entry in self._server.entries() if from_ms <= entry.inserted_at_ms < to_ms]

    # ── INSERTs ──────────────────────────────────────────────────────────────────────────────────

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        sent = [*payloads]
        payloads.clear()
        return self._ask("probes rows", lambda: self._parse(version, sent, 0)[1])

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        sent = [*payloads]
        payloads.clear()
        server, scheduler = self._server, self._scheduler
        what = f"batch {batch.batch_id}, block {block.number}"
        scheduler.step(f"sends the INSERT of {what}")
        conditions = server.conditions
        status = conditions.proxy_answers()
        if conditions.down or conditions.dies() or (status and not conditions.passes_on):
            if status:
                return self._foreign(status)
            raise AuditLogUnavailable("ClickHouse (simulated) cannot be reached; nothing was sent, run again")

        answers: list[Refusal | BaseException | None] = []

        def work() -> None:
            answers.append(
                self._work(batch.version, sent, block.inserted_at_ms, batch.token(block), deadline_ms, timeout_s)
            )

        scheduler.spawn(f"clickhouse: INSERT of {what}", work, server.process)
        answered = scheduler.wait(lambda: bool(answers), timeout_s + 10)
        if not answered or conditions.answer_lost():
            raise InsertOutcomeUnknown(f"no answer from ClickHouse (simulated) to the INSERT of {what}; run again")
        if status:
            return self._foreign(status)
        (answer,) = answers
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _work(
        self, version: str, payloads: Sequence[bytes], at_ms: int, token: str, deadline_ms: int, timeout_s: int
    ) -> Refusal | BaseException | None:
        """What the server does with an INSERT, also when nobody waits for it any more."""
        server, conditions = self._server, self._server.conditions
        if server.now_ms() > deadline_ms:
            return LeaseLost("the deadline of this INSERT has passed (simulated)")
        if sum(map(len, payloads)) > conditions.most_bytes:
            return Refusal(code=413, name="HTTP 413", kind=RefusalKind.SIZE)
        entries, refusal = self._parse(version, payloads, at_ms)
        if refusal is not None:
            return refusal
        if len(entries) > conditions.most_rows:
            return Refusal(code=241, name="MEMORY_LIMIT_EXCEEDED", kind=RefusalKind.MEMORY)
        takes_s = conditions.insert_s()
        self._scheduler.sleep(min(takes_s, float(timeout_s)))
        if takes_s > timeout_s:
            return Refusal(code=159, name="TIMEOUT_EXCEEDED", kind=RefusalKind.TIME)
        return server.store(entries, token)

    def _parse(self, version: str, payloads: Sequence[bytes], at_ms: int) -> tuple[list[StoredEntry], Refusal | None]:
        entries = [entry_of(version, payload, at_ms) for payload in payloads]
        if None in entries:
            return [], Refusal(code=117, name="INCORRECT_DATA")
        return [entry for entry in entries if entry is not None], None

    def _foreign(self, status: int) -> Refusal:
        if status in LIMITS:
            return Refusal(code=status, name=f"HTTP {status}", kind=LIMITS[status])
        raise ForeignAnswer("a proxy (simulated) answered the INSERT; run again", status)


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
