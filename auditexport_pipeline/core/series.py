"""What happened over a window, as counts by hour, by batch and by day: the values that a page for people shows.

What belongs here: frozen values and the grid of hours. What does not: how they are counted (`report.source`), what is
compared (`core.reconcile`), and anything that is drawn. Ids and counts only.
"""

from __future__ import annotations

from dataclasses import dataclass

from auditexport_pipeline.core.pks import PkSet

HOUR_MS = 3_600_000
DAY_MS = 24 * HOUR_MS
# A window longer than this is counted by day: columns of less than three pixels tell nothing.
MOST_STEPS = 14 * 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Consecutive hours (or days) of UTC. Event times are any 64-bit integer: those outside fall into two bins at the ends.

    Bin 0 is everything before, bins 1 to `steps` are the hours, bin `steps + 1` is everything after.
    """

    starts_ms: int
    step_ms: int
    steps: int

    @classmethod
    def over(cls, from_ms: int, to_ms: int) -> Grid:
        """The hours that have a millisecond of [from, to), or the days if there were too many hours."""
        to_ms = max(to_ms, from_ms + 1)
        step_ms = HOUR_MS if to_ms - from_ms <= MOST_STEPS * HOUR_MS else DAY_MS
        while (to_ms - from_ms) // step_ms > MOST_STEPS:
            step_ms *= 2
        starts_ms = from_ms // step_ms * step_ms
        return cls(starts_ms=starts_ms, step_ms=step_ms, steps=-(-(to_ms - starts_ms) // step_ms))

    @property
    def low_ms(self) -> int:
        """Any time below `starts_ms` is counted as if it were this one."""
        return self.starts_ms - self.step_ms

    @property
    def high_ms(self) -> int:
        """Any time from the end on is counted as if it were this one."""
        return self.starts_ms + self.steps * self.step_ms

    def at_ms(self, number: int) -> int:
        """When a bin begins; of bin 0 only that it is before the first hour."""
        return self.low_ms + number * self.step_ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Which two databases were asked; no host, no user."""

    mysql: str
    mysql_database: str
    clickhouse: str
    clickhouse_database: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """Which exports the two sides can be counted for: rows in the outbox, and entries under their `inserted_at`.

    `excluded` are `inserted_at`s in [from_ms, to_ms) that only ClickHouse could count: of batches that are still open,
    and of swept ones, whose rows are gone.
    """

    from_ms: int
    to_ms: int
    pks: PkSet
    excluded: tuple[int, ...]
    batches: int
    swept_entries: int
    open_batches: int
    cut_short: bool  # more batches or rows than are counted: from_ms is later than what was asked for


@dataclass(frozen=True, slots=True, kw_only=True)
class Hour:
    """One hour (or day) of event time: exported rows of the outbox, their entries in ClickHouse, and pending rows."""

    at_ms: int
    rows: int
    entries: int
    pending: int

    @property
    def difference(self) -> int:
        """Rows that have no entry; negative where ClickHouse holds more."""
        return self.rows - self.entries


@dataclass(frozen=True, slots=True, kw_only=True)
class LagBin:
    """Batches whose stamp falls into one part of the window. A lag is None where no batch has a plausible beginning."""

    at_ms: int
    batches: int
    rows: int
    worst_s: float | None
    mean_s: float | None
    undated: int


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchLine:
    """One batch of the ledger, by its timestamps. A stage that is not over yet is None."""

    batch_id: int
    generation: int
    state: str
    rows: int
    entries: int
    bytes: int
    attempts: int
    claimed_at_ms: int
    fetch_s: float | None  # claimed to sealed; waiting for its turn included
    write_s: float | None  # sealed to written
    mark_s: float | None  # written to verified: the marks, then the verification

    @property
    def total_s(self) -> float:
        return sum(stage or 0.0 for stage in (self.fetch_s, self.write_s, self.mark_s))


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterCount:
    """Dead letters that were set aside on one day, by reason and by where they stand."""

    day_ms: int
    state: str
    reason: str
    letters: int
