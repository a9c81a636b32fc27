"""The ledger for operators: the values that `mysql.ledger` returns to the CLI.

What does not belong here: the life of a batch (`core.batch`, `core.export`).
"""

from __future__ import annotations

from dataclasses import dataclass

from auditexport_pipeline.core.batch import Batch, State
from auditexport_pipeline.core.errors import InvalidConfig

# Batches of one page: a screen.
PAGE_BATCHES = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchFilter:
    """A filter for batches: all given conditions must hold. Raises `InvalidConfig` for a `before_id` below 1."""

    states: tuple[State, ...] = ()  # one of these; none given: any state
    owner: str = ""  # the beginning of the owner's id, as the Dagster UI shows a run
    since_ms: int | None = None  # claimed at this time or later, by MySQL's clock
    before_id: int | None = None  # the last batch of the previous page

    def __post_init__(self) -> None:
        if self.before_id is not None and self.before_id < 1:
            raise InvalidConfig(f"before_id is {self.before_id}; batches are counted from 1")


@dataclass(frozen=True, slots=True, kw_only=True)
class LedgerBatch:
    """One row of the ledger without its pks and blocks. Times are epoch milliseconds, by MySQL's clock.

    At `written_at_ms` ClickHouse had acknowledged the whole batch, and `exported_at_ms`, the stamp of its rows, was
    fixed. The ledger does not have the time at which marking ended.
    """

    batch_id: int
    epoch: int
    generation: int
    version: str
    state: State
    owner: str
    claimed_rows: int
    rows: int
    unmarked_rows: int
    entries: int
    bytes: int
    attempts: int  # to write
    digest: str
    first_pk: int | None
    last_pk: int | None
    claimed_at_ms: int
    sealed_at_ms: int | None
    written_at_ms: int | None
    exported_at_ms: int | None
    verified_at_ms: int | None
    swept_at_ms: int | None
    swept_rows: int
    lease_left_s: float  # 0 or less: the lease has ended, or the batch is closed
    last_error: str

    @property
    def steps(self) -> list[tuple[str, int]]:
        """The states of the batch so far, each with its time, in order."""
        times = {
            "claimed": self.claimed_at_ms,
            "sealed": self.sealed_at_ms,
            "written": self.written_at_ms,
            "verified": self.verified_at_ms,
            "swept": self.swept_at_ms,
        }
        return [(name, at_ms) for name, at_ms in times.items() if at_ms is not None]

    @property
    def seconds(self) -> float:
        """From the claim to the last state, without the sweep."""
        return (max(at_ms for name, at_ms in self.steps if name != "swept") - self.claimed_at_ms) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchDetails:
    """One batch: its row, its pks, blocks and counts, and what ClickHouse held of it."""

    line: LedgerBatch
    batch: Batch
