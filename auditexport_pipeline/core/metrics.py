"""Metrics: the names that dashboards and alert rules hold, and their values, from a status.

What belongs here: name, kind, unit and meaning of each metric, and its samples. What does not: reading the numbers
(`mysql.status`, `mysql.totals`), and the text format and who asks for it (`cli.metrics`). Ids of batches, rows, events and
workspaces are no labels: a label's values are few and known.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from auditexport_pipeline.core.advice import Severity, advice
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.status import Status
from auditexport_pipeline.core.targets import Targets

# States in which a batch waits for something. Of the others there are as many as the ledger is old; a counter has them.
STANDING = (State.CLAIMED, State.SEALED, State.WRITTEN, State.STOPPED, State.EXPORTED, State.DISCREPANT)
NO_LABELS: Mapping[str, str] = {}


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What batches that are closed for good have exported, up to `batch_id`. It never becomes less: the ledger keeps the
    counts of batches that are swept and compacted.
    """

    batch_id: int = 0
    batches: int = 0
    rows: int = 0  # marked in the outbox
    entries: int = 0
    bytes: int = 0  # of payload

    def __add__(self, more: Totals) -> Totals:
        return Totals(
            batch_id=max(self.batch_id, more.batch_id),
            batches=self.batches + more.batches,
            rows=self.rows + more.rows,
            entries=self.entries + more.entries,
            bytes=self.bytes + more.bytes,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class Metric:
    """One metric and its samples: labels to value."""

    name: str
    counter: bool
    meaning: str
    samples: tuple[tuple[Mapping[str, str], float], ...] = field(default=())


@dataclass(frozen=True, slots=True, kw_only=True)
class Read:
    """What one look at MySQL brought back."""

    status: Status
    totals: Totals
    last_verified_at_ms: int | None
    seconds: float


# Every metric, in the order in which it is shown: (name, meaning, label names). A name ending in _total is a counter.
NAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("auditexport_up", "1 when MySQL answered this look; 0 when nothing below is known.", ()),
    ("auditexport_read_timestamp_seconds", "When these numbers were read: a file that nobody writes any more is old.", ()),
    ("auditexport_read_seconds", "How long reading these numbers took, in seconds.", ()),
    ("auditexport_backlog_rows", "Pending rows of known versions, without those that dead letters hold.", ()),
    ("auditexport_backlog_capped", "1 when there are more rows than were counted.", ()),
    ("auditexport_lag_seconds", "Age of the oldest pending row, in seconds; 0 when there is none.", ()),
    ("auditexport_lag_target_seconds", "What the lag should stay below (AUDITEXPORT_TARGET_LAG_S), in seconds.", ()),
    ("auditexport_exported_rows_total", "Outbox rows exported and marked, by closed batches.", ()),
    ("auditexport_exported_entries_total", "Entries sent to ClickHouse by closed batches.", ()),
    ("auditexport_exported_bytes_total", "Payload bytes sent to ClickHouse by closed batches.", ()),
    ("auditexport_exported_batches_total", "Batches that are closed: exported, and maybe verified or swept since.", ()),
    ("auditexport_rows_per_second", "Recent rate of a drain at work, in rows per second; 0 without one.", ()),
    ("auditexport_drains_at_work", "Runs and processes that hold a lease on an open batch.", ()),
    ("auditexport_batches", "Batches by state, of states in which a batch waits for something; 200 at most.", ("state",)),
    ("auditexport_oldest_open_batch_seconds", "Age of the oldest open batch since its claim, in seconds.", ()),
    ("auditexport_open_batch_target_seconds", "What it should stay below (AUDITEXPORT_TARGET_BATCH_OPEN_MINUTES).", ()),
    ("auditexport_oldest_unverified_batch_seconds", "Age of the oldest exported batch that is not verified.", ()),
    ("auditexport_dead_letters", "Open dead letters by reason.", ("reason",)),
    ("auditexport_held_rows", "Rows that parse and that the ClickHouse table refuses.", ()),
    ("auditexport_view_failures", "Batches of the last day on which a materialized view failed.", ()),
    ("auditexport_unknown_rows", "Pending rows by version, of versions that this release does not know.", ("version",)),
    ("auditexport_last_export_timestamp_seconds", "When the last batch was exported, by MySQL's clock.", ()),
    ("auditexport_last_verified_timestamp_seconds", "When a batch was verified in ClickHouse last.", ()),
    ("auditexport_oldest_unswept_seconds", "How long ago the oldest rows that a sweep could take were exported.", ()),
    ("auditexport_retention_seconds", "How long exported rows stay (AUDITEXPORT_TARGET_RETENTION_DAYS).", ()),
    ("auditexport_last_sweep_timestamp_seconds", "When a sweep deleted something last.", ()),
    ("auditexport_last_sweep_rows", "Rows that it deleted.", ()),
    ("auditexport_last_reconcile_timestamp_seconds", "When both stores were reconciled last.", ()),
    ("auditexport_last_reconcile_entries", "Entries in which they differed then, or before where nobody has looked again, by kind.", ("kind",)),
    ("auditexport_reconcile_target_seconds", "How often they should be (AUDITEXPORT_TARGET_RECONCILE_HOURS).", ()),
    ("auditexport_advice", "1 for each thing that needs an operator, as auditexport status names it.", ("about", "severity")),
)  # fmt: skip
_MEANINGS = {name: meaning for name, meaning, _ in NAMES}


def metrics_of(read: Read | None, targets: Targets, *, at_s: float) -> list[Metric]:
    """The metrics of one look at `at_s`, or of one that failed: then only `auditexport_up`, its time and the targets."""
    values: dict[str, list[tuple[Mapping[str, str], float]]] = {}

    def put(name: str, value: float | None, **labels: str) -> None:
        if value is not None:
            values.setdefault(name, []).append((labels or NO_LABELS, float(value)))

    put("auditexport_up", read is not None)
    put("auditexport_read_timestamp_seconds", at_s)
    put("auditexport_lag_target_seconds", targets.lag_s)
    put("auditexport_open_batch_target_seconds", targets.batch_open_minutes * 60)
    put("auditexport_retention_seconds", targets.retention_days * 86_400)
    put("auditexport_reconcile_target_seconds", targets.reconcile_hours * 3_600)
    if read is not None:
        status, backlog = read.status, read.status.backlog
        put("auditexport_read_seconds", read.seconds)
        put("auditexport_backlog_rows", backlog.rows)
        put("auditexport_backlog_capped", backlog.rows_at_least)
        put("auditexport_lag_seconds", backlog.lag_s)
        put("auditexport_exported_rows_total", read.totals.rows)
        put("auditexport_exported_entries_total", read.totals.entries)
        put("auditexport_exported_bytes_total", read.totals.bytes)
        put("auditexport_exported_batches_total", read.totals.batches)
        put("auditexport_rows_per_second", status.rows_per_s)
        put("auditexport_drains_at_work", len(status.at_work))
        by_state = dict.fromkeys(STANDING, 0)
        for batch in status.open_batches:
            by_state[batch.state] += 1
        by_state[State.EXPORTED], by_state[State.DISCREPANT] = status.unverified_batches, status.discrepant_batches
        for state, count in by_state.items():
            put("auditexport_batches", count, state=str(state))
        put("auditexport_oldest_open_batch_seconds", status.oldest_open_age_s)
        put("auditexport_oldest_unverified_batch_seconds", status.unverified_age_s)
        put("auditexport_held_rows", status.backlog.held_rows)
        put("auditexport_view_failures", len(status.view_failures))
        for reason, letters in status.dead_by_reason.items():
            put("auditexport_dead_letters", letters, reason=reason)
        for version, rows in backlog.unknown_by_version.items():
            put("auditexport_unknown_rows", rows, version=version)
        put("auditexport_last_export_timestamp_seconds", _seconds(status.last_exported_at_ms))
        put("auditexport_last_verified_timestamp_seconds", _seconds(read.last_verified_at_ms))
        put("auditexport_oldest_unswept_seconds", status.oldest_unswept_age_s)
        if status.last_sweep is not None:
            put("auditexport_last_sweep_timestamp_seconds", _seconds(status.last_sweep.at_ms))
            put("auditexport_last_sweep_rows", status.last_sweep.rows)
        if status.last_reconcile is not None:
            put("auditexport_last_reconcile_timestamp_seconds", _seconds(status.last_reconcile.at_ms))
            for kind in ("missing", "duplicated", "unexpected", "altered"):
                put("auditexport_last_reconcile_entries", getattr(status.differing, kind), kind=kind)
        for one in advice(status, targets):
            if one.severity is not Severity.NOTE:
                put("auditexport_advice", 1, about=one.about, severity=str(one.severity))
    return [
        Metric(name=name, counter=name.endswith("_total"), meaning=_MEANINGS[name], samples=tuple(values.get(name, ())))
        for name, _, _ in NAMES
    ]


def _seconds(at_ms: int | None) -> float | None:
    return None if at_ms is None else at_ms / 1000
