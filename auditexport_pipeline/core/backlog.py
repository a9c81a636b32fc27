"""The backlog: how far behind the export is, and whether a run is worth starting.

What belongs here: the numbers that a probe brings back, and the decision. What does not: how they are
counted (`mysql.outbox`) and who launches the run (`defs.sensors`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from auditexport_pipeline.core.settings import Thresholds

# After a second failed run in a row the sensor waits this long, then twice as long, up to the longest, which is well below
# what a lag alarm is set to.
FIRST_WAIT_S = 15.0
LONGEST_WAIT_S = 300.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """How long an owner of open batches, but for stopped ones, is believed to live if it does not renew its lease."""

    owner: str
    process: str  # empty where several processes do the steps
    left_s: float  # 0 or less: it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How far behind we are. `rows` are pending rows of known versions, those that a dead letter holds not among them."""

    rows: int
    rows_at_least: bool  # the probe stopped counting here
    lag_s: float  # age of the oldest pending row by a sound created_at, else since the last claim; 0 when there is none
    unknown_rows: int
    unknown_versions: tuple[str, ...]
    dead_rows: int  # open dead letters: those that wait for an operator
    open_batches: int
    waiting_batches: int  # stopped ones whose lease has not ended: nobody may take them up yet
    leasing_owners: tuple[str, ...]  # owners of open batches whose lease has not ended
    leases: tuple[Lease, ...] = ()  # theirs, and those that have ended
    held_rows: int = 0  # rows that the ClickHouse table refuses: they go out once its definition changes
    unknown_by_version: Mapping[str, int] = field(default_factory=dict)
    # Of the oldest pending rows, those whose created_at cannot be epoch milliseconds, and the first of them.
    odd_created_rows: int = 0
    odd_created_pk: int | None = None

    @property
    def shown_rows(self) -> str:
        return f"{self.rows:,}+" if self.rows_at_least else f"{self.rows:,}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Drains that failed one after the other, up to now: how many, and how long ago the last one ended."""

    runs: int
    since_s: float

    @property
    def wait_s(self) -> float:
        """How much longer to leave it: nothing after one failure, which the next run mends; then ever longer,
        so that an outage is not a flood of runs.
        """
        if self.runs < 2:
            return 0.0
        wait_s: float = min(FIRST_WAIT_S * 2.0 ** (self.runs - 2), LONGEST_WAIT_S)
        return max(0.0, wait_s - self.since_s)


NO_FAILURES = Failures(runs=0, since_s=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to launch, and the sentence with the numbers that says why."""

    launch: bool
    reason: str


def decide(backlog: Backlog, thresholds: Thresholds, *, at_work: str | None, failures: Failures) -> Decision:
    """One drain at a time; then rows, lag, or batches that a dead run left behind start the next.

    `at_work` says which run or process drains already, and until when it is waited for; None when none does. After failed
    runs the next one waits a while.
    """
    numbers = (
        f"{backlog.shown_rows} pending rows (a run starts at {thresholds.rows:,}), "
        f"lag {backlog.lag_s:.0f} s (at {thresholds.lag_s:.0f} s), {backlog.open_batches} open batches"
    )
    if backlog.unknown_rows:
        numbers += f", {backlog.unknown_rows:,} rows of unknown versions {', '.join(backlog.unknown_versions)}"
    if backlog.dead_rows:
        numbers += f", {backlog.dead_rows:,} dead letters"
    if backlog.held_rows:
        numbers += f", {backlog.held_rows:,} rows held because the ClickHouse table refuses them"
    if backlog.odd_created_rows:
        numbers += f", {backlog.odd_created_rows:,} with a created_at that is no epoch milliseconds"
    if at_work is not None:
        return Decision(launch=False, reason=f"{at_work}: {numbers}")
    if failures.wait_s > 0:
        return Decision(
            launch=False,
            reason=f"the last {failures.runs} runs failed, the next starts in {failures.wait_s:.0f} s: {numbers}",
        )
    left_open = backlog.open_batches - backlog.waiting_batches
    if left_open > 0:
        return Decision(launch=True, reason=f"{left_open} batches were left open: {numbers}")
    if backlog.rows >= thresholds.rows:
        return Decision(launch=True, reason=f"backlog: {numbers}")
    if backlog.rows and backlog.lag_s >= thresholds.lag_s:
        return Decision(launch=True, reason=f"lag: {numbers}")
    return Decision(launch=False, reason=f"nothing to do: {numbers}")
