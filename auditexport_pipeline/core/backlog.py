"""The backlog: how far behind the export is, and whether a run is worth starting.

`mysql.backlog` counts it; `defs.sensors` launches the run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from auditexport_pipeline.core.format import batches, counted, format_duration
from auditexport_pipeline.core.settings import Thresholds

# After a second failed run in a row the sensor waits this long, then twice as long, up to the longest, which is well below
# the lag at which people set an alert.
FIRST_WAIT_S = 15.0
LONGEST_WAIT_S = 300.0
# Pending rows are counted up to here: it takes a quarter of a second.
COUNT_TO = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Lease:
    """The lease of an owner on its open batches; stopped batches do not count."""

    owner: str
    process: str  # empty where several processes do the steps
    left_s: float  # 0 or less: it has ended


@dataclass(frozen=True, slots=True, kw_only=True)
class Backlog:
    """How far behind the export is. `rows` are pending rows of known versions, without those that dead letters keep."""

    rows: int = 0
    rows_at_least: bool = False  # the probe stopped counting here
    lag_s: float = (
        0.0  # age of the oldest pending row by a sound created_at, else since the last claim; 0 without a row
    )
    unknown_rows: int = 0
    unknown_versions: tuple[str, ...] = ()
    dead_rows: int = 0  # open dead letters: those that wait for an operator
    open_batches: int = 0
    waiting_batches: int = 0  # stopped batches whose lease has not ended: no run may adopt them yet
    leasing_owners: tuple[str, ...] = ()  # owners of open batches whose lease has not ended
    leases: tuple[Lease, ...] = ()  # the leases on open batches, ended ones too
    held_rows: int = 0  # rows that the ClickHouse table refuses: they go out once its definition changes
    unknown_by_version: Mapping[str, int] = field(default_factory=dict)
    # Of the oldest pending rows, those whose created_at cannot be epoch milliseconds, and the first of them.
    odd_created_rows: int = 0
    odd_created_pk: int | None = None

    @property
    def shown_rows(self) -> str:
        return f"{self.rows:,}+" if self.rows_at_least else f"{self.rows:,}"

    @property
    def pending(self) -> str:
        """`1 row pending`, `2,000+ rows pending`."""
        return f"{self.shown_rows} {'row' if self.rows == 1 else 'rows'} pending"

    @property
    def numbers(self) -> dict[str, int | float | str]:
        """Under the names that the CLI's JSON and Dagster's metadata share."""
        return {
            "backlog_rows": self.rows,
            "lag_s": round(self.lag_s, 1),
            "unknown_rows": self.unknown_rows,
            "unknown_versions": ", ".join(self.unknown_versions) or "none",
            "dead_letters_standing": self.dead_rows,
            "held_rows": self.held_rows,
            "open_batches": self.open_batches,
        }

    def __str__(self) -> str:
        return f"{self.pending}, lag {format_duration(self.lag_s)}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Failures:
    """Drains that failed one after the other, up to now: how many, and how long ago the last one ended."""

    runs: int = 0
    since_s: float = 0.0

    @property
    def wait_s(self) -> float:
        """How long the next run still waits: not after one failure, then ever longer, so that an outage is no flood of runs."""
        if self.runs < 2:
            return 0.0
        wait_s: float = min(FIRST_WAIT_S * 2.0 ** (self.runs - 2), LONGEST_WAIT_S)
        return max(0.0, wait_s - self.since_s)


NO_FAILURES = Failures()


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """Whether to launch a run, and why, with the numbers."""

    launch: bool
    reason: str


def decide(backlog: Backlog, thresholds: Thresholds, *, at_work: str | None, failures: Failures) -> Decision:
    """Rows, lag, or batches that a dead run left open start a run, but not while another drains or soon after failures.

    `at_work` says which run or process drains already, and how long to wait for it.
    """
    pending = f"{backlog.shown_rows} pending {'row' if backlog.rows == 1 else 'rows'}"
    numbers = [
        f"{pending} (a run starts at {thresholds.rows:,})",
        f"lag {backlog.lag_s:.0f} s (at {thresholds.lag_s:.0f} s)",
        counted(backlog.open_batches, "open batch", "open batches"),
    ]
    if backlog.unknown_rows:
        versions = ", ".join(backlog.unknown_versions)
        numbers.append(f"{counted(backlog.unknown_rows, 'row')} of unknown versions {versions}")
    if backlog.dead_rows:
        numbers.append(counted(backlog.dead_rows, "dead letter"))
    if backlog.held_rows:
        numbers.append(f"{counted(backlog.held_rows, 'row')} held because the ClickHouse table refuses them")
    if backlog.odd_created_rows:
        numbers.append(f"{backlog.odd_created_rows:,} with a created_at that is no epoch milliseconds")
    left_open = backlog.open_batches - backlog.waiting_batches
    launch = False
    if at_work is not None:
        why = at_work
    elif failures.wait_s > 0:
        why = f"the last {failures.runs} runs failed, the next starts in {failures.wait_s:.0f} s"
    elif left_open > 0:
        launch, why = True, f"{batches(left_open)} {'was' if left_open == 1 else 'were'} left open"
    elif backlog.rows >= thresholds.rows:
        launch, why = True, "backlog"
    elif backlog.rows and backlog.lag_s >= thresholds.lag_s:
        launch, why = True, "lag"
    else:
        why = "nothing to do"
    return Decision(launch=launch, reason=f"{why}: {', '.join(numbers)}")
