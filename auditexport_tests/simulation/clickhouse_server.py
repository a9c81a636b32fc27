"""A simulated ClickHouse server: parts, deduplication tokens, merges, TTL, views, limits, and INSERTs that outlive their sender.

It knows nothing of the exporter but the text of a payload. An INSERT is work of the server's own: a sender that dies, or stops
waiting, does not end it. A block is stored whole or not at all.

All that it does was seen on engines 25.8, 26.3 and 26.9 unless a comment names fewer; `contract/test_clickhouse.py` asks the
simulation and the servers the same.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from auditexport_pipeline.core.errors import AuditLogUnavailable
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.ports import Refusal, RefusalKind, StoredEntry
from auditexport_tests.simulation.payloads import Unparsable, read_entry
from auditexport_tests.simulation.scheduler import Process, Scheduler

DAY_MS = 86_400_000
NEWEST = "26.9"
# In one of three INSERTs there, the error of a view that fails ended the INSERT before its block was stored.
VIEWS_MAY_FAIL_FIRST = ("25.8", "26.3")
# Each INSERT takes two places of the window there: one for its token, one for its rows.
TOKENS_TAKE_TWO_PLACES = ("26.3",)


@dataclass(eq=False)
class Part:
    """What one INSERT or merge wrote. ClickHouse merges parts of one partition only."""

    month: int
    entries: list[StoredEntry]


class Received(NamedTuple):
    """A block that was stored, as it was sent."""

    token: str
    at_ms: int
    payloads: tuple[bytes, ...]


class Token(NamedTuple):
    """Of a block that was stored, and the partition of its part."""

    text: str
    month: int


@dataclass(kw_only=True)
class Conditions:
    """What a server and its surroundings do at the moment. The world of a history changes them."""

    down: bool = False
    arrives_after_s: Callable[[], float] = lambda: 0.0  # how long an INSERT is on its way
    insert_s: Callable[[], float] = lambda: 0.05  # how long an INSERT takes
    dies: Callable[[], bool] = lambda: False  # the connection, before the request arrives
    answer_lost: Callable[[], bool] = lambda: False
    proxy_answers: Callable[[], int] = lambda: 0  # an HTTP status instead of ClickHouse's answer
    passes_on: bool = True  # whether that proxy has passed the request on
    proxy_waits_s: float = math.inf  # for ClickHouse's answer, before it answers itself
    proxy_patience_s: float = math.inf  # an INSERT that takes longer gets a 504, and goes on
    view_fails: Callable[[StoredEntry], bool] = lambda _: False
    view_fails_first: Callable[[], bool] = lambda: False  # before the block is stored; `VIEWS_MAY_FAIL_FIRST`
    view_s: Callable[[], float] = lambda: 0.0  # how long the views take after the block is stored
    view_lacks_target: bool = False  # its target was dropped
    table_refuses: Callable[[StoredEntry], bool] = lambda _: False
    most_rows: int = 2**63  # of one INSERT's memory; 0: there is no memory for any INSERT or probe
    lacks_memory: Callable[[], bool] = lambda: False  # now and then there is none
    most_bytes: int = 2**63  # of one request
    most_parts: int = (
        2**63
    )  # of a partition (parts_to_throw_insert); one that is full refuses INSERTs into every partition


class SimulatedClickHouse:
    """One server of one engine, and its table of the built-in version, with a clock of its own."""

    def __init__(
        self, scheduler: Scheduler, *, window: int = 10_000, keeps_days: int | None = 90, engine: str = NEWEST
    ) -> None:
        self.scheduler = scheduler
        self.engine = engine
        self.process = Process("clickhouse")
        self.clock_offset_ms = 0
        self.conditions = Conditions()
        self.parts: list[Part] = []
        self.on_store: list[
            Callable[[Sequence[StoredEntry], str], None]
        ] = []  # gets each block that is new, and its token
        # For an oracle: entries that a merge replaced by a later one of their key, and that the TTL deleted.
        self.merged: list[StoredEntry] = []
        self.expired: list[StoredEntry] = []
        self.received: list[Received] = []
        self.asked: Counter[str] = Counter()  # requests by process
        self.tokens: deque[Token] = deque()
        self.remember(window)
        self.keeps_days = keeps_days
        self.keeps_by = "inserted_at"  # the column of the TTL: inserted_at or time
        self.keeps_but = ""  # the TTL has a WHERE: it deletes entries of this workspace only
        self.defined_at_ms = self.now_ms()
        self.definition = 1

    def now_ms(self) -> int:
        return 1_700_000_000_000 + int(self.scheduler.now_s * 1000) + self.clock_offset_ms

    def entries(self) -> Iterator[StoredEntry]:
        for part in self.parts:
            yield from part.entries

    # ── what happens by itself ───────────────────────────────────────────────────────────────────

    def merge(self, month: int) -> None:
        """Merges all parts of a partition, also a single one: of entries with one sort key the last one stays, if it is not past
        the TTL.

        A server leaves entries of parts that it wrote under an earlier TTL until MATERIALIZE TTL; not so here.
        """
        found = [part for part in self.parts if part.month == month]
        last: dict[Key, StoredEntry] = {}
        for part in found:
            for entry in part.entries:
                if entry.key in last:
                    self.merged.append(last[entry.key])
                last[entry.key] = entry
        self.parts = [part for part in self.parts if part.month != month]
        left = [last[key] for key in sorted(last)]
        if left:
            self.parts.append(Part(month, left))
            self._expire(self.parts[-1:])

    def expire(self) -> None:
        """Deletes what is past the table's TTL."""
        self._expire(self.parts)

    def _expire(self, parts: list[Part]) -> None:
        for part in parts:
            past = [entry for entry in part.entries if self.past_ttl(entry.key, entry.inserted_at_ms)]
            if past:
                self.expired += past
                part.entries = [entry for entry in part.entries if entry not in past]
        self.parts = [part for part in self.parts if part.entries]

    def crash(self) -> None:
        """Ends all INSERTs that are at work, without an answer. What is stored stays, and so do the tokens."""
        self.scheduler.kill(self.process)
        self.process = Process("clickhouse")

    # ── what an administrator does ───────────────────────────────────────────────────────────────

    def mutate(self, change: Callable[[StoredEntry], StoredEntry | None]) -> None:
        """ALTER TABLE … DELETE or UPDATE: None deletes the entry. Neither merges equal keys, nor forgets a token."""
        for part in self.parts:
            part.entries = [changed for entry in part.entries if (changed := change(entry)) is not None]
        self.parts = [part for part in self.parts if part.entries]

    def drop_partition(self, month: int) -> None:
        """Unlike a mutation it forgets the tokens of the blocks that it drops: a replay is stored again."""
        self.parts = [part for part in self.parts if part.month != month]
        self.tokens = deque((token for token in self.tokens if token.month != month), maxlen=self.tokens.maxlen)

    def remember(self, window: int) -> None:
        """Sets the window: of so many blocks the tokens are known, the first ones are forgotten first."""
        places = -(-window // 2) if self.engine in TOKENS_TAKE_TWO_PLACES else window
        self.tokens = deque(self.tokens, maxlen=places)

    def redefine(self) -> None:
        """Whatever changes the table's definition makes it new."""
        self.definition += 1
        self.defined_at_ms = self.now_ms()

    # ── the TTL ──────────────────────────────────────────────────────────────────────────────────

    def ttl(self) -> str:
        """As ClickHouse shows it."""
        where = f" WHERE workspace_id = '{self.keeps_but}'" if self.keeps_but else ""
        at = f"toDateTime(fromUnixTimestamp64Milli({self.keeps_by}, 'UTC')) + toIntervalDay({self.keeps_days})"
        return "" if self.keeps_days is None else at + where

    def past_ttl(self, key: Key | None, inserted_at_ms: int, ahead_s: int = 0) -> bool | None:
        """None: it depends on a column that is not given. ClickHouse counts in whole seconds."""
        if self.keeps_days is None:
            return False
        if key is None and self.keeps_by == "time":
            return None
        at_ms = key[2] if key is not None and self.keeps_by == "time" else inserted_at_ms
        if at_ms // 1000 + self.keeps_days * DAY_MS // 1000 > self.now_ms() // 1000 + ahead_s:
            return False
        if self.keeps_but:
            return None if key is None else key[0] == self.keeps_but
        return True

    # ── an INSERT ────────────────────────────────────────────────────────────────────────────────

    def parse(self, payloads: Sequence[bytes], at_ms: int) -> tuple[list[StoredEntry], Refusal | None]:
        """The entries of a block, or the parser's error at the first row that it cannot read."""
        if not self.conditions.most_rows or self.conditions.lacks_memory():
            return [], OUT_OF_MEMORY
        try:
            return [entry for payload in payloads if (entry := read_entry(payload, at_ms)) is not None], None
        except Unparsable as error:
            return [], error.refusal

    def refuses(self) -> Refusal | BaseException | None:
        """What ends an INSERT before its rows are read."""
        conditions = self.conditions
        if conditions.view_lacks_target:
            view = "with the target numbers, which does not exist"
            return Refusal(code=60, name="UNKNOWN_TABLE", kind=RefusalKind.VIEW, view=view, permanent=True)
        parts = Counter(part.month for part in self.parts)
        if max(parts.values(), default=0) >= conditions.most_parts:
            return AuditLogUnavailable("ClickHouse (simulated) has too many parts (code 252); run again")
        return None

    def store(
        self, entries: list[StoredEntry], token: str, timeout_s: float = 2**31, payloads: Sequence[bytes] = ()
    ) -> Refusal | None:
        """One block, after it was parsed: the whole of it, at one instant. Then the views get it, also when its token is known."""
        conditions = self.conditions
        if any(conditions.table_refuses(entry) for entry in entries):
            return Refusal(code=469, name="VIOLATED_CONSTRAINT", constraint="small")
        failed = any(conditions.view_fails(entry) for entry in entries)
        failure = Refusal(
            code=395, name="FUNCTION_THROW_IF_VALUE_IS_NON_ZERO", kind=RefusalKind.VIEW, view="failing_view"
        )
        if failed and self.engine in VIEWS_MAY_FAIL_FIRST and conditions.view_fails_first():
            return failure
        if entries and token not in [known.text for known in self.tokens]:
            month = month_of(entries[0].inserted_at_ms)
            if token:
                self.tokens.append(Token(token, month))
            self.parts.append(Part(month, sorted(entries, key=lambda entry: entry.key)))
            self.received.append(Received(token, entries[0].inserted_at_ms, tuple(payloads)))
            for listener in self.on_store:
                listener(entries, token)
        takes_s = conditions.view_s()
        if takes_s:
            self.scheduler.sleep(min(takes_s, timeout_s))
        if takes_s > timeout_s:
            return TIMED_OUT
        return failure if failed else None


OUT_OF_MEMORY = Refusal(code=241, name="MEMORY_LIMIT_EXCEEDED", kind=RefusalKind.MEMORY)
# The time limit of a view has no view's name in its error.
TIMED_OUT = Refusal(code=159, name="TIMEOUT_EXCEEDED", kind=RefusalKind.TIME)


def month_of(at_ms: int) -> int:
    """The partition of an `inserted_at`, as toYYYYMM gives it."""
    year, month, *_ = time.gmtime(at_ms // 1000)
    return year * 100 + month
