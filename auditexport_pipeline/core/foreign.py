"""Foreign marks: rows that another exporter marked, or somebody by hand.

What belongs here: whether ClickHouse holds their events, and what explains it if not. What does not: which marks a window
covers (`core.reconcile`), and clearing them (`core.requeue`).

Such a row has no `inserted_at` of ours. Its mark is taken as the time of its export, for the TTL, for erasures and for the
window. A mark that is no time (for example 1, set by hand) is ignored; the application's `created_at` is taken instead.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

from auditexport_pipeline.core.batch import Batch
from auditexport_pipeline.core.compare import rows_held
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.excuses import Excuses, SentEvent
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Maintenance, Outbox
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

# A mark before the year 2000, or more than a day in the future, is no time of an export.
FIRST_TIME_MS = 946_684_800_000
AHEAD_MS = DAY_MS


@dataclass(slots=True, kw_only=True)
class Foreign:
    """The result for some rows that no batch has exported."""

    missing: dict[int, Key] = field(default_factory=dict)  # by pk
    found: dict[int, Key | None] = field(default_factory=dict)  # by pk; None: looked up by its ids alone
    explained: Counter[str] = field(default_factory=Counter)
    ttl_unknown: int = 0  # of the missing


def is_time(stamp_ms: int, now_ms: int) -> bool:
    return FIRST_TIME_MS <= stamp_ms <= now_ms + AHEAD_MS


def successors(upkeep: Maintenance, batches: Collection[Batch], pks: PkSet) -> PkSet:
    """The rows that are other events than those that batches exported under their pks: they have the mark of none of these
    batches, and were created (by the application's `created_at`) after the entries' `inserted_at`.
    """
    latest_ms: dict[int, int] = {}
    stamps: defaultdict[int, set[int | None]] = defaultdict(set)
    for batch in batches:
        inserted_ms = max((block.inserted_at_ms for block in batch.blocks), default=0)
        for pk in batch.pks & pks:
            latest_ms[pk] = max(inserted_ms, latest_ms.get(pk, 0))
            stamps[pk].add(batch.exported_at_ms)
    times = upkeep.times(PkSet.of(sorted(latest_ms))) if latest_ms else {}
    others = (pk for pk, (created_ms, at_ms) in times.items() if at_ms not in stamps[pk] and created_ms > latest_ms[pk])
    return PkSet.of(sorted(others))


def look_up(outbox: Outbox, log: AuditLog, excuses: Excuses, marked_at: Mapping[int, int]) -> Foreign:
    """Looks up the events of rows that no batch has exported; `marked_at` is the time of export by pk."""
    result = Foreign()
    gone: dict[int, SentEvent] = {}
    for row, event, held in rows_held(outbox, log, PkSet.of(sorted(marked_at))):
        if held:
            result.found[row.pk] = event[1] if event else None
            continue
        at_ms = marked_at[row.pk]
        version, key = event or (next(iter(VERSIONS)), (row.workspace_id, "", at_ms, row.event_id))
        gone[row.pk] = SentEvent(version=version, key=key, inserted_at_ms=at_ms, pks=[row.pk])
    # Not by key: that would be a query for each mark.
    for (pk, one), (reason, ttl_unknown) in zip(
        gone.items(), excuses.explain(list(gone.values()), by_key=False), strict=True
    ):
        if reason:
            result.explained[reason] += 1
        else:
            result.missing[pk] = one.key
            result.ttl_unknown += ttl_unknown
    return result
