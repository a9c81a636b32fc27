"""A simulated ClickHouse server: parts, deduplication tokens, merges, TTL, views, limits, and INSERTs that outlive their sender.

It knows nothing of the exporter but the text of a payload. An INSERT is work of the server's own: a sender that dies, or stops
waiting, does not end it. A block is stored whole or not at all.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from auditexport_pipeline.core.event import Key, OutboxRow, Undecodable
from auditexport_pipeline.core.ports import Refusal, RefusalKind, StoredEntry
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.simulation.scheduler import Process, Scheduler

DAY_MS = 86_400_000


@dataclass(eq=False)
class Part:
    """What one INSERT or merge wrote. ClickHouse merges parts of one partition only."""

    month: int
    entries: list[StoredEntry]


@dataclass(kw_only=True)
class Conditions:
    """What a server and its surroundings do at the moment. The world of a history changes them."""

    down: bool = False
    insert_s: Callable[[], float] = lambda: 0.05  # how long an INSERT takes
    dies: Callable[[], bool] = lambda: False  # the connection, before the request arrives
    answer_lost: Callable[[], bool] = lambda: False
    proxy_answers: Callable[[], int] = lambda: 0  # an HTTP status instead of ClickHouse's answer
    passes_on: bool = True  # whether that proxy has passed the request on
    view_fails: Callable[[StoredEntry], bool] = lambda _: False
    table_refuses: Callable[[StoredEntry], bool] = lambda _: False
    most_rows: int = 2**63  # of one INSERT's memory
    most_bytes: int = 2**63  # of one request


class SimulatedClickHouse:
    """One server and its table of the built-in version, with a clock of its own."""

    def __init__(self, scheduler: Scheduler, *, window: int = 10_000, keeps_days: int | None = 90) -> None:
        self.scheduler = scheduler
        self.process = Process("clickhouse")
        self.clock_offset_ms = 0
        self.conditions = Conditions()
        self.parts: list[Part] = []
        self.merged_away: list[
            StoredEntry
        ] = []  # for the oracle: what merges have replaced by a later entry of its key
        self.tokens: deque[str] = deque(maxlen=window)
        self.keeps_days = keeps_days
        self.defined_at_ms = 0
        self.definition = 1

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self.scheduler.now_s * 1000) + self.clock_offset_ms

    def entries(self) -> Iterator[StoredEntry]:
        for part in self.parts:
            yield from part.entries

    # ── what happens by itself ───────────────────────────────────────────────────────────────────

    def merge(self, month: int) -> None:
        """Merges all parts of a partition: of entries with one sort key the last one stays."""
        found = [part for part in self.parts if part.month == month]
        if len(found) < 2:
            return
        last: dict[Key, StoredEntry] = {}
        for part in found:
            for entry in part.entries:
                if entry.key in last:
                    self.merged_away.append(last[entry.key])
                last[entry.key] = entry
        self.parts = [part for part in self.parts if part.month != month]
        self.parts.append(Part(month, [last[key] for key in sorted(last)]))

    def expire(self) -> None:
        """Deletes what is past the table's TTL."""
        if self.keeps_days is not None:
            until_ms = self.now_ms() - self.keeps_days * DAY_MS
            self.mutate(lambda entry: None if entry.inserted_at_ms < until_ms else entry)

    def mutate(self, change: Callable[[StoredEntry], StoredEntry | None]) -> None:
        """ALTER TABLE … DELETE or UPDATE: None deletes the entry."""
        for part in self.parts:
            part.entries = [changed for entry in part.entries if (changed := change(entry)) is not None]
        self.parts = [part for part in self.parts if part.entries]

    # ── an INSERT ────────────────────────────────────────────────────────────────────────────────

    def store(self, entries: list[StoredEntry], token: str) -> Refusal | None:
        """One block, after it was parsed: the whole of it, at one instant."""
        refused = [entry for entry in entries if self.conditions.table_refuses(entry)]
        if refused:
            return Refusal(code=469, name="VIOLATED_CONSTRAINT", constraint="small", definition=f"{self.definition}")
        if token not in self.tokens:
            if token:
                self.tokens.append(token)
            self.parts.append(Part(_month(entries[0].inserted_at_ms), entries))
            if any(self.conditions.view_fails(entry) for entry in entries):
                return Refusal(code=395, name="FUNCTION_THROW…", kind=RefusalKind.VIEW, view="failing_view")
        return None


def entry_of(version: str, payload: bytes, inserted_at_ms: int) -> StoredEntry | None:
    """What the table holds of a payload; None when ClickHouse cannot parse it."""
    try:
        fields = json.loads(payload)
        row = OutboxRow(pk=0, event_id=fields["event_id"], workspace_id=fields["workspace_id"], payload=payload)
    except (ValueError, KeyError, TypeError):
        return None
    event = VERSIONS[version].decode(row)
    if isinstance(event, Undecodable):
        return None
    text = f"{inserted_at_ms}\n{json.dumps(fields, sort_keys=True)}"
    content = int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big")
    return StoredEntry(key=event.key, inserted_at_ms=inserted_at_ms, fingerprint=event.fingerprint, content=content)


def _month(at_ms: int) -> int:
    return at_ms // (30 * DAY_MS)
