"""Metrics: the names that dashboards and alert rules use, and their values.

`mysql.status` and `mysql.totals` read the numbers; `cli.metrics` hands them out. An id of a batch, a row, an event or a
workspace is never a label: each id would be a new series in Prometheus.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from auditexport_pipeline.core.advice import Severity, advice
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.settings import Targets
from auditexport_pipeline.core.status import Status

# States in which a batch waits for something. The other states hold as many batches as the ledger is old: counters show them.
WAITING = (State.CLAIMED, State.SEALED, State.WRITTEN, State.STOPPED, State.EXPORTED, State.DISCREPANT)

# None: no sample. A mapping: label values to value.
Value = float | None | Mapping[tuple[str, ...], float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Totals:
    """What closed batches up to `batch_id` have exported. Totals never fall: the ledger keeps the counts of batches that
    are swept and compacted.
    """

    batch_id: int = 0
    batches: int = 0
    rows: int = 0  # marked in the outbox
    entries: int = 0
    bytes: int = 0  # of payload


@dataclass(frozen=True, slots=True, kw_only=True)
class Reading:
    """The numbers of one outbox, read from MySQL within `seconds`."""

    status: Status
    totals: Totals
    last_verified_at_ms: int | None
    at_s: float  # when it ended, by this host's clock
    seconds: float


# Every metric in the order in which it is shown: (name, meaning, label names). A name that ends in _total is a counter.
NAMES: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    ("auditexport_up", "1 when MySQL answered; 0 when the numbers below are not known.", ()),
    ("auditexport_read_timestamp_seconds", "When these numbers were read: a file that nobody writes any more is old.", ()),
    ("auditexport_read_seconds", "How long reading these numbers took, in seconds.", ()),
    ("auditexport_backlog_rows", "Pending rows of known versions, without those that dead letters hold.", ()),
    ("auditexport_backlog_capped", "1 when there are more rows than were counted.", ()),
    ("auditexport_lag_seconds", "Age of the oldest pending row, in seconds; 0 when there is none.", ()),
    ("auditexport_lag_target_seconds", "What the lag should stay below (target lag_s), in seconds.", ()),
    ("auditexport_exported_rows_total", "Outbox rows exported and marked, by closed batches.", ()),
    ("auditexport_exported_entries_total", "Entries sent to ClickHouse by closed batches.", ()),
    ("auditexport_exported_bytes_total", "Payload bytes sent to ClickHouse by closed batches.", ()),
    ("auditexport_exported_batches_total", "Batches that are closed: exported, and maybe verified or swept since.", ()),
    ("auditexport_rows_per_second", "Recent rate of a drain at work, in rows per second; 0 without one.", ()),
    ("auditexport_drains_at_work", "Runs and processes that hold a lease on an open batch.", ()),
    ("auditexport_batches", "Batches by state, of states in which a batch waits for something; 200 at most.", ("state",)),
    ("auditexport_oldest_open_batch_seconds", "Age of the oldest open batch since its claim, in seconds.", ()),
    ("auditexport_open_batch_target_seconds", "Target for the age of the oldest open batch (batch_open_minutes).", ()),
    ("auditexport_oldest_unverified_batch_seconds", "Age of the oldest exported batch that is not verified.", ()),
    ("auditexport_dead_letters", "Open dead letters by reason.", ("reason",)),
    ("auditexport_held_rows", "Rows that parse and that the ClickHouse table refuses.", ()),
    ("auditexport_view_failures", "Batches of the last day on which a materialized view failed.", ()),
    ("auditexport_unknown_rows", "Pending rows by version, of versions that this release does not know.", ("version",)),
    ("auditexport_last_export_timestamp_seconds", "When the last batch was exported, by MySQL's clock.", ()),
    ("auditexport_last_verified_timestamp_seconds", "When a batch was verified in ClickHouse last.", ()),
    ("auditexport_oldest_unswept_seconds", "How long ago the oldest rows that a sweep could take were exported.", ()),
    ("auditexport_retention_seconds", "How long exported rows stay (target retention_days).", ()),
    ("auditexport_last_sweep_timestamp_seconds", "When a sweep deleted something last.", ()),
    ("auditexport_last_sweep_rows", "Rows that the last sweep deleted.", ()),
    ("auditexport_last_reconcile_timestamp_seconds", "When both stores were reconciled last.", ()),
    ("auditexport_last_reconcile_entries", "Entries that differed in the last reconciliation, or earlier if not reconciled again since, by kind.", ("kind",)),
    ("auditexport_reconcile_target_seconds", "Target for the time between two reconciliations (reconcile_hours).", ()),
    ("auditexport_advice", "1 for each thing that needs an operator, as auditexport status names it.", ("about", "severity")),
)  # fmt: skip


def samples(reading: Reading | None, targets: Targets, *, now_s: float) -> Iterator[tuple[str, tuple[str, ...], float]]:
    """(name, label values, value) of every sample; None is a reading that failed now: only the targets are known."""
    values: dict[str, Value] = {
        "auditexport_up": reading is not None,
        "auditexport_read_timestamp_seconds": reading.at_s if reading else now_s,
        "auditexport_lag_target_seconds": targets.lag_s,
        "auditexport_open_batch_target_seconds": targets.batch_open_minutes * 60,
        "auditexport_retention_seconds": targets.retention_days * 86_400,
        "auditexport_reconcile_target_seconds": targets.reconcile_hours * 3_600,
    }
    if reading is not None:
        values |= _values(reading, targets)
    for name, value in values.items():
        for labels, number in (value if isinstance(value, Mapping) else {(): value}).items():
            if number is not None:
                yield name, labels, float(number)


def _values(reading: Reading, targets: Targets) -> dict[str, Value]:
    status, backlog, totals = reading.status, reading.status.backlog, reading.totals
    by_state = Counter(batch.state for batch in status.open_batches)
    by_state[State.EXPORTED], by_state[State.DISCREPANT] = status.unverified_batches, status.discrepant_batches
    swept, reconciled = status.last_sweep, status.last_reconcile
    return {
        "auditexport_read_seconds": reading.seconds,
        "auditexport_backlog_rows": backlog.rows,
        "auditexport_backlog_capped": backlog.rows_at_least,
        "auditexport_lag_seconds": backlog.lag_s,
        "auditexport_exported_rows_total": totals.rows,
        "auditexport_exported_entries_total": totals.entries,
        "auditexport_exported_bytes_total": totals.bytes,
        "auditexport_exported_batches_total": totals.batches,
        "auditexport_rows_per_second": status.rows_per_s,
        "auditexport_drains_at_work": len(status.at_work),
        "auditexport_batches": {(str(state),): by_state[state] for state in WAITING},
        "auditexport_oldest_open_batch_seconds": status.oldest_open_age_s,
        "auditexport_oldest_unverified_batch_seconds": status.unverified_age_s,
        "auditexport_dead_letters": {(reason,): letters for reason, letters in status.dead_by_reason.items()},
        "auditexport_held_rows": backlog.held_rows,
        "auditexport_view_failures": len(status.view_failures),
        "auditexport_unknown_rows": {(version,): rows for version, rows in backlog.unknown_by_version.items()},
        "auditexport_last_export_timestamp_seconds": _seconds(status.last_exported_at_ms),
        "auditexport_last_verified_timestamp_seconds": _seconds(reading.last_verified_at_ms),
        "auditexport_oldest_unswept_seconds": status.oldest_unswept_age_s,
        "auditexport_last_sweep_timestamp_seconds": _seconds(swept.at_ms if swept else None),
        "auditexport_last_sweep_rows": swept.rows if swept else None,
        "auditexport_last_reconcile_timestamp_seconds": _seconds(reconciled.at_ms if reconciled else None),
        "auditexport_last_reconcile_entries": {
            (kind,): getattr(status.differing, kind) for kind in ("missing", "duplicated", "unexpected", "altered")
        }
        if reconciled
        else None,
        "auditexport_advice": {
            (one.about, str(one.severity)): 1 for one in advice(status, targets) if one.severity is not Severity.NOTE
        },
    }


def _seconds(at_ms: int | None) -> float | None:
    return None if at_ms is None else at_ms / 1000
