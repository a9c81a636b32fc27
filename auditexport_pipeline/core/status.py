"""Status: how the export stands at one moment.

What belongs here: the numbers as a value, what follows from them alone, and how a number reads. What does not: what they
should be (`core.settings`) and what to do (`core.advice`), how they are read (`mysql.status`), how they are shown (the
prompt, asset checks, metrics), and whether a run is worth starting (`core.backlog`).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import OPEN, VIEW_NOTE, State
from auditexport_pipeline.core.open_findings import OpenFinding, record_in
from auditexport_pipeline.core.ports import Discrepancy

# What "recently" means for the rate: a few drains of the sensor's or one of the schedule's.
RATE_WINDOW_S = 900
# The name of the view in a note on one, however many a note tells of.
_VIEW = re.compile(rf"(?:^|; ){VIEW_NOTE}(.+?) failed \(")
# How long a view that failed is shown: whoever looks once a day sees it.
VIEWS_WINDOW_S = 86_400
# From the worst for whoever looks on: what needs a person, what is under way, what is done.
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


# ── what is so ───────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBatchStatus:
    """A batch that holds its rows. `age_s` counts from its claim; a lease that has ended is 0 s or less."""

    batch_id: int
    state: State
    version: str
    rows: int
    owner: str
    age_s: float
    lease_left_s: float
    attempts: int  # of writing
    last_error: str

    @property
    def leased(self) -> bool:
        return self.lease_left_s > 0


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchTimes:
    """One batch as the ledger's clockwork: what `runs_of` and `rate_of` are made from. `rows` are rows marked."""

    batch_id: int
    epoch: int
    owner: str
    state: State
    rows: int
    claimed_at_ms: int
    last_at_ms: int  # the latest of its states
    leased: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStatus:
    """One owner of the ledger: a Dagster run (its root run's id) or a process at the prompt."""

    owner: str
    batches: int
    open_batches: int
    rows: int  # exported
    started_at_ms: int
    ended_at_ms: int  # of one that is at work: this moment
    at_work: bool  # it has an open batch and a lease on it
    worst: State
    partial: bool  # older batches of it lie beyond what was looked at

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
    """The last reconciliation: its window of `inserted_at`, and what differed, in entries."""

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
        """From the record that `core.reconcile` leaves; what an older record does not tell counts as 0."""
        told = record_in(action)
        return cls(
            at_ms=action.at_ms,
            who=action.by.who,
            from_ms=told.get("from_ms", 0),
            to_ms=told.get("to_ms", 0),
            batches=told.get("batches", 0),
            found=Discrepancy(
                missing=told.get("missing", 0),
                duplicated=told.get("duplicated", 0),
                unexpected=told.get("unexpected", 0),
                altered=told.get("altered", 0),
            ),
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class ClearedOften:
    """Rows whose marks were cleared `times` times within a day, beyond requeues and repairs; `batch_id` exported them last."""

    batch_id: int
    rows: int
    times: int

    def __str__(self) -> str:
        return (
            f"the marks of rows of batch {self.batch_id} ({self.rows:,} rows) were cleared {self.times:,} times in the last "
            f"{format_duration(VIEWS_WINDOW_S)}, not by a requeue of ours, and each time they were exported again"
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Status:
    """How the export stands at `at_ms`, by MySQL's clock. Ids and counts; read from MySQL alone."""

    at_ms: int
    backlog: Backlog
    recent_rows: int  # exported within the last RATE_WINDOW_S
    rows_per_s: float  # of that time, while a drain was at work; 0 when none was
    open_batches: tuple[OpenBatchStatus, ...]  # oldest first; as many as were looked at
    runs: tuple[RunStatus, ...]  # newest first
    dead_by_reason: Mapping[str, int]  # open dead letters, most frequent first
    unverified_batches: int  # exported, and nobody has looked into ClickHouse yet
    unverified_age_s: float  # of the oldest of them
    discrepant: Mapping[int, str]  # batch id → what ClickHouse does not hold; as many as were looked at
    last_exported_at_ms: int | None
    first_claimed_at_ms: int | None  # of the oldest batch: since when there is something to reconcile
    oldest_unswept_age_s: float  # since the oldest rows that a sweep could take were exported; 0 when there are none
    last_sweep: LastSweep | None
    last_reconcile: LastReconcile | None
    # Batch id → what failed, of batches exported within VIEWS_WINDOW_S: stored, but a materialized view lacks rows.
    view_failures: Mapping[int, str] = field(default_factory=dict)
    cleared_often: ClearedOften | None = None
    held_by_detail: Mapping[str, int] = field(default_factory=dict)  # rows that the table refuses, by what refuses them
    # What earlier reconciliations found beside batches, and no later one has looked at again; oldest first.
    open_findings: tuple[OpenFinding, ...] = ()
    # Whether this user may read what operators did: not so for one with the exporter's grants only.
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
        """In entries, what the last reconciliation found and what earlier ones did that nobody has looked at again."""
        total = self.last_reconcile.found if self.last_reconcile is not None else Discrepancy()
        for finding in self.open_findings:
            total += finding.found
        return total

    @property
    def numbers(self) -> dict[str, int | float | str | None]:
        """The one-number-a-name form, under the names that runs and checks use in the Dagster UI."""
        return {
            "backlog_rows": self.backlog.rows,
            "lag_s": round(self.backlog.lag_s, 1),
            "odd_created_rows": self.backlog.odd_created_rows,
            "rows_per_s": round(self.rows_per_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "recent_rows": self.recent_rows,
            "unknown_rows": self.backlog.unknown_rows,
            "unknown_versions": ", ".join(self.backlog.unknown_versions) or "none",
            "dead_letters_standing": self.backlog.dead_rows,
            "held_rows": self.backlog.held_rows,
            "open_batches": self.backlog.open_batches,
            "oldest_open_batch_s": round(self.oldest_open_age_s, 1),
            "unverified_batches": self.unverified_batches,
            "discrepant_batches": self.discrepant_batches,
            "view_failures": len(self.view_failures),
            "oldest_unswept_s": round(self.oldest_unswept_age_s, 1),
            "open_findings": len(self.open_findings),
            "reconciled_s_ago": None
            if self.last_reconcile is None
            else (self.at_ms - self.last_reconcile.at_ms) / 1000,
        }


def runs_of(batches: Sequence[BatchTimes], *, now_ms: int, complete: bool) -> tuple[RunStatus, ...]:
    """The owners of these batches as runs, newest first; `complete` says that no older batch was left out.

    A plan claims its new batches at one moment, which is also the latest claim among those that it adopted: so a
    run begins with the latest claim of its earliest plan, and not with the claim of a run that died before it.
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
        at_work = any(batch.leased and batch.state in OPEN for batch in owned)
        runs.append(
            RunStatus(
                owner=owner,
                batches=len(owned),
                open_batches=sum(1 for batch in owned if batch.state in OPEN),
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

    `exported` are the batches exported within RATE_WINDOW_S, `leased` the open ones that are being worked on. Time
    in which nobody drained does not count: an idle quarter of an hour does not make the next backlog look slow.
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


# ── how numbers read ────────────────────────────────────────────────────────────────────────────────


def format_name(name: str) -> str:
    """A name that an application chose, on one line and without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "(empty)"


def format_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, in their order."""
    return ", ".join(f"{format_name(name)} {count:,}" for name, count in counts.items())


def format_duration(seconds: float) -> str:
    """A time that a person reads at a glance: 0.4 s, 45 s, 12 min, 3.5 h, 12 days."""
    for unit, length_s, until_s in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < until_s:
            shown = seconds / length_s
            return f"{shown:.{int(shown < 9.95)}f} {unit}".replace(".0 ", " ")
    return f"{seconds / 86_400:,.0f} days"


def newest_of_each_view(failures: Mapping[int, str]) -> dict[int, str]:
    """Of batches with notes on views that failed, newest first, those that name a view which no newer one names."""
    named: set[str] = set()
    newest = {}
    for batch_id, note in failures.items():
        views = set(_VIEW.findall(note)) or {note}
        if not views <= named:
            newest[batch_id] = note
        named |= views
    return newest
