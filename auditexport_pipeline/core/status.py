"""Status: how the export stands at one moment, and what an operator should do about it.

What belongs here: the numbers as a value, the targets that they are held against, and the advice that follows from
both. What does not: how they are read (`stores.status`), how they are shown (the prompt, asset checks, metrics), and
whether a run is worth starting (`core.backlog`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from enum import Enum

import msgspec

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import OPEN, State
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import RETENTION_DAYS
from auditexport_pipeline.core.ports import Discrepancy

# What "recently" means for the rate: a few drains of the sensor's or one of the schedule's.
RATE_WINDOW_S = 900
# The environment variable of a target is this and the field's name in capitals.
TARGET_VARIABLES = "AUDITEXPORT_TARGET_"
# Batches named in a sentence; `auditexport batches list` has them all.
NAMED_BATCHES = 5
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
        try:
            told = msgspec.json.decode(action.selection, type=dict[str, int])
        except msgspec.DecodeError:
            told = {}
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
    def numbers(self) -> dict[str, int | float | str | None]:
        """The one-number-a-name form, under the names that runs and checks use on Dagster's page."""
        return {
            "backlog_rows": self.backlog.rows,
            "lag_s": round(self.backlog.lag_s, 1),
            "rows_per_s": round(self.rows_per_s, 1),
            "eta_s": None if self.eta_s is None else round(self.eta_s, 1),
            "recent_rows": self.recent_rows,
            "unknown_rows": self.backlog.unknown_rows,
            "unknown_versions": ", ".join(self.backlog.unknown_versions) or "none",
            "dead_letters_standing": self.backlog.dead_rows,
            "open_batches": self.backlog.open_batches,
            "oldest_open_batch_s": round(self.oldest_open_age_s, 1),
            "unverified_batches": self.unverified_batches,
            "discrepant_batches": self.discrepant_batches,
            "oldest_unswept_s": round(self.oldest_unswept_age_s, 1),
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


# ── what it should be ────────────────────────────────────────────────────────────────────────────


def _target(default: float, low: float, high: float, meaning: str) -> float:
    return field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What an operator is called for. Raises `InvalidConfig`, naming the field, for a value out of bounds."""

    lag_s: float = _target(300.0, 1, 604_800, "The oldest pending row may be this old, in seconds.")
    batch_open_minutes: float = _target(15.0, 1, 10_080, "A batch may be open, or unverified, this long.")
    reconcile_hours: float = _target(36.0, 1, 8_760, "Both stores are held against each other at least this often.")
    retention_days: float = _target(RETENTION_DAYS, 1, 3_650, "Exported rows stay in the outbox this long.")
    sweep_late_days: float = _target(2.0, 0, 365, "And at most this much longer: a sweep a day that failed once.")
    dead_letters: float = _target(0, 0, 1_000_000_000, "Open dead letters that nobody needs to be called for.")
    unknown_rows: float = _target(0, 0, 1_000_000_000, "Rows of unknown versions that nobody needs to be called for.")

    def __post_init__(self) -> None:
        for target in fields(self):
            value = getattr(self, target.name)
            low, high = target.metadata["low"], target.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidConfig(f"{target.name} is {value!r}; it must be a number from {low:,} to {high:,}")

    def but(self, given: Mapping[str, float]) -> Targets:
        """These, with those that are given in their place; raises `InvalidConfig`, naming the target."""
        names = [target.name for target in fields(self)]
        for name in given:
            if name not in names:
                raise InvalidConfig(f"{name} is no target; there are {', '.join(names)}")
        return replace(self, **given)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Targets:
        """The targets that the variables AUDITEXPORT_TARGET_… name; raises `InvalidConfig`, naming the variable."""
        variables = {f"{TARGET_VARIABLES}{target.name.upper()}": target for target in fields(cls)}
        values: dict[str, float] = {}
        for name, text in environment.items():
            if not name.startswith(TARGET_VARIABLES) or not text:
                continue
            if name not in variables:
                raise InvalidConfig(f"{name} is no target; there are {', '.join(sorted(variables))}")
            low, high = variables[name].metadata["low"], variables[name].metadata["high"]
            try:
                value = float(text)
            except ValueError:
                value = math.nan
            if not low <= value <= high:
                raise InvalidConfig(f"{name} is {text!r}; it must be a number from {low:,} to {high:,}")
            values[variables[name].name] = value
        return cls(**values)


# ── what to do ───────────────────────────────────────────────────────────────────────────────────


class Severity(str, Enum):
    """ERROR: evidence is at stake or late. WARNING: it waits for a person. NOTE: worth knowing, and nobody is called."""

    ERROR = "error"
    WARNING = "warning"
    NOTE = "note"

    def __str__(self) -> str:
        return self.value


_SEVEREST_FIRST = (Severity.ERROR, Severity.WARNING, Severity.NOTE)


@dataclass(frozen=True, slots=True, kw_only=True)
class Advice:
    """One thing that is not as it should be. `about` is a stable name for it, `what` has the numbers, `todo` mends it."""

    severity: Severity
    about: str
    what: str
    todo: str


def advice(status: Status, targets: Targets) -> list[Advice]:
    """What is not as the targets want it, worst first, each with what mends it. Pure: the same for page and prompt."""
    found = [
        *_discrepant(status),
        *_reconcile(status, targets),
        *_lag(status, targets),
        *_open_batches(status, targets),
        *_unverified(status, targets),
        *_dead_letters(status, targets),
        *_unknown_versions(status, targets),
        *_sweep(status, targets),
    ]
    return sorted(found, key=lambda one: _SEVEREST_FIRST.index(one.severity))  # stable: as above within a severity


def needs_operator(found: Sequence[Advice]) -> bool:
    """Whether any of it is for a person to act on."""
    return any(one.severity is not Severity.NOTE for one in found)


def verdict(status: Status, found: Sequence[Advice]) -> str:
    """The headline: one line that says how it stands."""
    errors = sum(1 for one in found if one.severity is Severity.ERROR)
    warnings = sum(1 for one in found if one.severity is Severity.WARNING)
    if errors or warnings:
        counted = [_counted(errors, "error"), _counted(warnings, "warning")]
        return f"needs an operator: {', '.join(text for text in counted if text)}"
    if status.at_work:
        return f"healthy, draining: {status.backlog.shown_rows} rows pending"
    return f"healthy: {status.backlog.shown_rows} rows pending, lag {shown_s(status.backlog.lag_s)}"


def _counted(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}" if count else ""


def _discrepant(status: Status) -> list[Advice]:
    if not status.discrepant:
        return []
    named = "; ".join(
        f"batch {batch_id} ({why})" if why else f"batch {batch_id}"
        for batch_id, why in list(status.discrepant.items())[:NAMED_BATCHES]
    )
    more = f"; and {len(status.discrepant) - NAMED_BATCHES:,} more" if len(status.discrepant) > NAMED_BATCHES else ""
    many = len(status.discrepant) != 1
    return [
        Advice(
            severity=Severity.ERROR,
            about="discrepant",
            what=f"{len(status.discrepant):,} batch{'es are' if many else ' is'} discrepant: ClickHouse does not hold what "
            f"was verified or acknowledged: {named}{more}",
            todo="auditexport reconcile --repair; then a drain, and reconcile again",
        )
    ]


def _reconcile(status: Status, targets: Targets) -> list[Advice]:
    if not status.actions_read:
        return [
            Advice(
                severity=Severity.NOTE,
                about="actions",
                what="this user may not read clickhouse_outbox_action: when both stores were reconciled last is not known",
                todo="auditexport doctor --role reader",
            )
        ]
    last = status.last_reconcile
    if last is not None and not last.clean:
        return [
            Advice(
                severity=Severity.ERROR,
                about="reconcile",
                what=f"the last reconciliation, {shown_s((status.at_ms - last.at_ms) / 1000)} ago by {last.who}, found "
                f"{last.found}",
                todo="auditexport reconcile --repair; then a drain, and reconcile again",
            )
        ]
    since_ms = last.at_ms if last is not None else status.first_claimed_at_ms
    if since_ms is None or status.at_ms - since_ms <= targets.reconcile_hours * 3_600_000:
        return []
    ago = shown_s((status.at_ms - since_ms) / 1000)
    return [
        Advice(
            severity=Severity.WARNING,
            about="reconcile",
            what=f"{f'the last reconciliation was {ago} ago' if last else f'exporting began {ago} ago and nobody has reconciled'} "
            f"(target: every {targets.reconcile_hours:g} h)",
            todo="auditexport reconcile; then turn reconcile_schedule on",
        )
    ]


def _lag(status: Status, targets: Targets) -> list[Advice]:
    backlog = status.backlog
    if not backlog.rows or backlog.lag_s <= targets.lag_s:
        return []
    late = (
        f"{backlog.shown_rows} rows are pending, the oldest for {shown_s(backlog.lag_s)} "
        f"(target {shown_s(targets.lag_s)})"
    )
    if not status.at_work:
        return [
            Advice(
                severity=Severity.ERROR,
                about="lag",
                what=f"{late}, and no drain is at work",
                todo="auditexport drain; then see on Dagster's page whether outbox_backlog_sensor is on and why the last "
                "run failed",
            )
        ]
    owners = ", ".join(status.at_work)
    if not status.rows_per_s:
        return [
            Advice(
                severity=Severity.ERROR,
                about="lag",
                what=f"{late}; {owners} is at work and has exported nothing in {shown_s(RATE_WINDOW_S)}",
                todo="auditexport doctor; then the log of that run",
            )
        ]
    return [
        Advice(
            severity=Severity.WARNING,
            about="lag",
            what=f"{late}; {owners} is at work at {status.rows_per_s:,.0f} rows/s, "
            f"{shown_s(status.eta_s or 0.0)} to go if nothing more arrives",
            todo="auditexport status --watch; if it does not shrink, see batch_rows and max_rows_per_second",
        )
    ]


def _open_batches(status: Status, targets: Targets) -> list[Advice]:
    late = [batch for batch in status.open_batches if batch.age_s > targets.batch_open_minutes * 60]
    left = [batch for batch in late if not batch.leased]
    held = [batch for batch in late if batch.leased]
    found = []
    for batches, severity, how, todo in (
        (left, Severity.ERROR, "their leases have ended and no run has taken them up", "auditexport drain"),
        (
            held,
            Severity.WARNING,
            "their leases still run",
            f"auditexport batches show {held[0].batch_id}" if held else "",
        ),
    ):
        if batches:
            named = "; ".join(_named(batch) for batch in batches[:NAMED_BATCHES])
            more = f"; and {len(batches) - NAMED_BATCHES:,} more" if len(batches) > NAMED_BATCHES else ""
            found.append(
                Advice(
                    severity=severity,
                    about="open_batches",
                    what=f"{_counted(len(batches), 'batch').replace('batchs', 'batches')} open for more than "
                    f"{targets.batch_open_minutes:g} min, {how}: {named}{more}",
                    todo=todo,
                )
            )
    return found


def _named(batch: OpenBatchStatus) -> str:
    error = f", {batch.last_error}" if batch.last_error else ""
    return f"batch {batch.batch_id} ({batch.state}, {batch.rows:,} rows, {shown_s(batch.age_s)}, owner {batch.owner}{error})"


def _unverified(status: Status, targets: Targets) -> list[Advice]:
    if not status.unverified_batches or status.unverified_age_s <= targets.batch_open_minutes * 60:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="unverified",
            what=f"{status.unverified_batches:,} exported batches are not verified, the oldest for "
            f"{shown_s(status.unverified_age_s)} (target {targets.batch_open_minutes:g} min)",
            todo="auditexport drain; it verifies what an interrupted run left",
        )
    ]


def _dead_letters(status: Status, targets: Targets) -> list[Advice]:
    dead = status.backlog.dead_rows
    if dead <= targets.dead_letters:
        return []
    reasons = shown_counts(status.dead_by_reason)
    return [
        Advice(
            severity=Severity.WARNING,
            about="dead_letters",
            what=f"{dead:,} dead letters wait for an operator: {reasons}",
            todo="auditexport dead-letters list; then mend the rows and retry, or discard",
        )
    ]


def _unknown_versions(status: Status, targets: Targets) -> list[Advice]:
    backlog = status.backlog
    if backlog.unknown_rows <= targets.unknown_rows:
        return []
    versions = shown_counts(backlog.unknown_by_version) or ", ".join(map(shown_name, backlog.unknown_versions))
    return [
        Advice(
            severity=Severity.WARNING,
            about="unknown_versions",
            what=f"{backlog.unknown_rows:,} rows have versions that this release does not know and no drain takes: {versions}",
            todo="upgrade auditexport to a release that knows them, or mend the writer",
        )
    ]


def _sweep(status: Status, targets: Targets) -> list[Advice]:
    days = status.oldest_unswept_age_s / 86_400
    if days <= targets.retention_days + targets.sweep_late_days:
        return []
    return [
        Advice(
            severity=Severity.WARNING,
            about="sweep",
            what=f"rows exported {days:,.1f} days ago are still in the outbox (retention is {targets.retention_days:g} days)",
            todo="auditexport sweep --dry-run; then sweep, and turn sweep_schedule on",
        )
    ]


def shown_name(name: str) -> str:
    """A name that an application chose, on one line and without anything that a terminal would obey."""
    return "".join(letter if letter.isprintable() else "?" for letter in name) or "(empty)"


def shown_counts(counts: Mapping[str, int]) -> str:
    """Names with their counts, in their order."""
    return ", ".join(f"{shown_name(name)} {count:,}" for name, count in counts.items())


def shown_s(seconds: float) -> str:
    """A time that a person reads at a glance: 0.4 s, 45 s, 12 min, 3.5 h, 12 days."""
    for unit, length_s, until_s in (("s", 1, 120), ("min", 60, 7_200), ("h", 3_600, 172_800)):
        if seconds < until_s:
            shown = seconds / length_s
            return f"{shown:.{int(shown < 9.95)}f} {unit}".replace(".0 ", " ")
    return f"{seconds / 86_400:,.0f} days"
