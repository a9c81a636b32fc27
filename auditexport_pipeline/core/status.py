"""The status of an export at one moment, as numbers.

`mysql.status` reads them, `core.settings` has their targets, `core.advice` says what to do about them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import OPEN, VIEW_NOTE, State
from auditexport_pipeline.core.format import counted, format_duration
from auditexport_pipeline.core.open_findings import OpenFinding, discrepancy_in, record_in
from auditexport_pipeline.core.ports import Discrepancy

# The rate is taken over this time: a few drains of the sensor, or one of the schedule.
RATE_WINDOW_S = 900
# The name of each view in a note, which can name several.
_VIEW = re.compile(rf"(?:^|; ){VIEW_NOTE}(.+?) failed \(")
# A failed view is shown for this long: a daily check of the status sees it.
VIEWS_WINDOW_S = 86_400
# The state of a run is the first of these that one of its batches has.
_WORST_FIRST = (
    State.DISCREPANT,
    State.STOPPED,
    State.CLAIMED,
    State.SEALED,
    State.WRITTEN,
    State.EXPORTED,
    State.VERIFIED,
    State.COMPACTED,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBatchStatus:
    """An open batch. `age_s` counts from its claim; `lease_left_s` is 0 or less when the lease has ended."""

    batch_id: int
    state: State
    version: str
    rows: int
    owner: str
    age_s: float
    lease_left_s: float
    attempts: int  # to write it
    last_error: str

    @property
    def leased(self) -> bool:
        return self.lease_left_s > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """The times of one batch, from which `runs_of` and `rate_of` are computed. `rows` are rows marked."""

    batch_id: int
    epoch: int
    owner: str
    state: State
    rows: int
    claimed_at_ms: int
    last_at_ms: int  # of its latest state
    leased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One owner of batches: a Dagster run (the id of its root run) or a process of the CLI."""

    owner: str
    batches: int
    open_batches: int
    rows: int  # exported
    started_at_ms: int
    ended_at_ms: int  # now, while it is at work
    at_work: bool  # it has an open batch and a lease on it
    worst: State
    partial: bool  # it may have older batches, which were not read

    @property
    def seconds(self) -> float:
        return max(0.0, (self.ended_at_ms - self.started_at_ms) / 1000)

    @property
    def rows_per_s(self) -> float:
        return self.rows / self.seconds if self.seconds else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LastSweep:
    """The last sweep that deleted something."""

    at_ms: int
    who: str
    rows: int

    @classmethod
    def of(cls, action: Action) -> LastSweep:
        return cls(at_ms=action.at_ms, who=action.by.who, rows=action.rows)


@dataclass(frozen=True, slots=True, kw_only=True)
class LastReconcile:
    """The last reconciliation: its window of `inserted_at`, and the differences in entries."""

    at_ms: int
    who: str
    from_ms: int
    to_ms: int
    batches: int
    found: Discrepancy

    @property
    def clean(self) -> bool:
        return not self.found

    @classmethod
    def of(cls, action: Action) -> LastReconcile:
        """From the record that `core.reconcile` leaves; a number that an older record lacks counts as 0."""
        record = record_in(action)
        return cls(
            at_ms=action.at_ms,
            who=action.by.who,
            **{name: record.get(name, 0) for name in ("from_ms", "to_ms", "batches")},
            found=discrepancy_in(record),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearedOften:
    """Rows whose marks were cleared `times` times within a day, beyond requeues and repairs; `batch_id` exported them last."""

    batch_id: int
    rows: int
    times: int

    def __str__(self) -> str:
        return (
            f"the marks of rows of batch {self.batch_id} ({counted(self.rows, 'row')}) were cleared "
            f"{counted(self.times, 'time')} in the last {format_duration(VIEWS_WINDOW_S)}, not by a requeue of ours, and each time "
            "they were exported again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """The status of an export at `at_ms`, by MySQL's clock, read from MySQL alone. Ids and counts."""

    at_ms: int
    backlog: Backlog = Backlog()  # noqa: RUF009 - it is frozen
    recent_rows: int = 0  # exported within the last RATE_WINDOW_S
    rows_per_s: float = 0.0  # of that time, while a drain was at work; 0 when none was
    open_batches: tuple[OpenBatchStatus, ...] = ()  # oldest first, up to a limit
    runs: tuple[RunStatus, ...] = ()  # newest first
    dead_by_reason: Mapping[str, int] = field(default_factory=dict)  # open dead letters, most frequent first
    unverified_batches: int = 0  # exported, and not yet verified in ClickHouse
    unverified_age_s: float = 0.0  # of the oldest of them
    discrepant: Mapping[int, str] = field(default_factory=dict)  # batch id → what ClickHouse lacks, up to a limit
    last_exported_at_ms: int | None = None
    first_claimed_at_ms: int | None = None  # of the oldest batch: since then there is something to reconcile
    oldest_unswept_age_s: float = 0.0  # since the oldest rows that a sweep could take were exported; 0 without a row
    last_sweep: LastSweep | None = None
    last_reconcile: LastReconcile | None = None
    # Batch id → note, of batches exported within VIEWS_WINDOW_S that are stored while a materialized view failed.
    view_failures: Mapping[int, str] = field(default_factory=dict)
    cleared_often: ClearedOften | None = None
    held_by_detail: Mapping[str, int] = field(default_factory=dict)  # rows that the table refuses, by what refuses them
    # Findings of earlier reconciliations that belong to no batch and were not checked again; oldest first.
    open_findings: tuple[OpenFinding, ...] = ()
    # False for a user with the exporter's grants only: it may not read the table of actions.
    actions_read: bool = True

    @property
    def eta_s(self) -> float | None:
        """How long the backlog takes at the recent rate, if nothing more arrives; None when there is no rate."""
        if not self.backlog.rows:
            return 0.0
        return self.backlog.rows / self.rows_per_s if self.rows_per_s else None

    @property
    def discrepant_batches(self) -> int:
        return len(self.discrepant)

    @property
    def at_work(self) -> tuple[str, ...]:
        """Owners that hold a lease on an open batch."""
        return self.backlog.leasing_owners

    @property
    def oldest_open_age_s(self) -> float:
        return max((batch.age_s for batch in self.open_batches), default=0.0)

    @property
    def differing(self) -> Discrepancy:
        """In entries: what the last reconciliation found, and earlier findings that are still open."""
        total = self.last_reconcile.found if self.last_reconcile is not None else Discrepancy()
        for finding in self.open_findings:
            total += finding.found
        return total

    @property
    def numbers(self) -> dict[str, int | float | str | None]:
        """The single numbers, under the names that runs and checks have in the Dagster UI."""
        reconciled = self.last_reconcile
        return {
            **self.backlog.numbers,
            "odd_created_rows": self.backlog.odd_created_rows,
            "rows_per_s": round(self.rows_per_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "recent_rows": self.recent_rows,
            "oldest_open_batch_s": round(self.oldest_open_age_s, 1),
            "unverified_batches": self.unverified_batches,
            "discrepant_batches": self.discrepant_batches,
            "view_failures": len(self.view_failures),
            "oldest_unswept_s": round(self.oldest_unswept_age_s, 1),
            "open_findings": len(self.open_findings),
            "reconciled_s_ago": None if reconciled is None else (self.at_ms - reconciled.at_ms) / 1000,
        }


def runs_of(batches: Sequence[BatchTimes], *, now_ms: int, complete: bool) -> tuple[RunStatus, ...]:
    """The owners of these batches as runs, newest first; `complete` says that no older batch was left out.

    A run begins with the claims of its earliest plan. A plan claims its new batches at one moment, which is later than the
    claims of the batches that it adopts.
    """
    by_owner: dict[str, list[BatchTimes]] = {}
    for batch in sorted(batches, key=lambda one: -one.batch_id):
        by_owner.setdefault(batch.owner, []).append(batch)
    oldest = min((batch.batch_id for batch in batches), default=0)
    runs = []
    for owner, owned in by_owner.items():
        plans: dict[int, int] = {}
        for batch in owned:
            plans[batch.epoch] = max(plans.get(batch.epoch, 0), batch.claimed_at_ms)
        opened = [batch for batch in owned if batch.state in OPEN]
        at_work = any(batch.leased for batch in opened)
        runs.append(
            RunStatus(
                owner=owner,
                batches=len(owned),
                open_batches=len(opened),
                rows=sum(batch.rows for batch in owned if batch.state not in OPEN),
                started_at_ms=min(plans.values()),
                ended_at_ms=now_ms if at_work else max(batch.last_at_ms for batch in owned),
                at_work=at_work,
                worst=min((batch.state for batch in owned), key=_WORST_FIRST.index),
                partial=not complete and any(batch.batch_id == oldest for batch in owned),
            )
        )
    return tuple(runs)


def rate_of(exported: Sequence[BatchTimes], leased: Sequence[BatchTimes], *, now_ms: int) -> tuple[int, float]:
    """(rows exported within the window, rows per second of the time in which a drain was at work).

    `exported` are the batches exported within RATE_WINDOW_S, `leased` the open batches with a lease. Idle time does not
    count: otherwise an idle quarter of an hour would make the next backlog look slow.
    """
    from_ms = now_ms - RATE_WINDOW_S * 1000
    rows = sum(batch.rows for batch in exported)
    spans = sorted(
        (max(from_ms, batch.claimed_at_ms), now_ms if batch.state in OPEN else min(now_ms, batch.last_at_ms))
        for batch in (*exported, *leased)
    )
    busy_ms = 0
    until_ms = from_ms
    for begin_ms, end_ms in spans:
        busy_ms += max(0, end_ms - max(begin_ms, until_ms))
        until_ms = max(until_ms, end_ms)
    return rows, rows / busy_ms * 1000 if busy_ms else 0.0


def newest_of_each_view(failures: Mapping[int, str]) -> dict[int, str]:
    """Of notes on failed views, by batch and newest first: those that name a view which no newer note names."""
    named: set[str] = set()
    newest = {}
    for batch_id, note in failures.items():
        views = set(_VIEW.findall(note)) or {note}
        if not views <= named:
            newest[batch_id] = note
        named |= views
    return newest
