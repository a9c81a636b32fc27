"""Foreign marks: rows that another exporter marked, or somebody by hand.

What belongs here: whether ClickHouse holds their events, and what excuses it if not. What does not: which marks a window
covers (`core.reconcile`), and clearing them (`core.requeue`).

Such a row has no `inserted_at` of ours. Its mark is taken as the time of its export, for the TTL, for erasures and for the
window. A mark that is no time (for example 1, set by hand) is ignored; the application's `created_at` is taken instead.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

from auditexport_pipeline.core.batch import Batch
from auditexport_pipeline.core.compare import KEYS_AT_ONCE, ROW_BYTES, entries_of
from auditexport_pipeline.core.event import Key, Undecodable
from auditexport_pipeline.core.excuses import Excuses
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
    held: dict[int, Key | None] = field(default_factory=dict)  # by pk; None: looked up by its ids alone
    erased: int = 0
    expired: int = 0
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
    return PkSet.of(
        sorted(
            pk
            for pk, (created_ms, marked_ms) in times.items()
            if marked_ms not in stamps[pk] and created_ms > latest_ms[pk]
        )
    )


def keys_of(outbox: Outbox, pks: PkSet) -> Iterator[Key]:
    """The keys of the rows that decode."""
    for row in outbox.read(pks, row_bytes=ROW_BYTES) if pks else ():
        for version in VERSIONS.values():
            event = version.decode(row)
            if not isinstance(event, Undecodable):
                yield event.key
                break


def look_for(outbox: Outbox, log: AuditLog, excuses: Excuses, marked_at: Mapping[int, int]) -> Foreign:
    """Looks up the events of rows that no batch has exported, a thousand rows at a time; `marked_at` is the time of export by pk.

    A row that does not decode is looked up by the ids of its columns alone: another exporter may have sent it.
    """
    found = Foreign()
    for chunk in PkSet.of(sorted(marked_at)).chunks(KEYS_AT_ONCE):
        keys: dict[int, tuple[str, Key]] = {}
        bare: dict[int, Key] = {}
        for row in outbox.read(chunk, row_bytes=ROW_BYTES):
            for version in VERSIONS.values():
                event = version.decode(row)
                if not isinstance(event, Undecodable):
                    keys[row.pk] = (version.name, event.key)
                    break
            else:
                bare[row.pk] = (row.workspace_id, "", marked_at[row.pk], row.event_id)
        stored = {entry.key for entry in entries_of(log, {key for _, key in keys.values()})}
        ids = log.ids_held(sorted({(key[0], key[3]) for key in bare.values()}))
        gone: dict[int, tuple[str, Key]] = {}
        for pk, (name, key) in keys.items():
            if key in stored:
                found.held[pk] = key
            else:
                gone[pk] = (name, key)
        for pk, key in bare.items():
            if (key[0], key[3]) in ids:
                found.held[pk] = None
            else:
                gone[pk] = (next(iter(VERSIONS)), key)
        _excuse(excuses, gone, marked_at, found)
    return found


def _excuse(
    excuses: Excuses, gone: Mapping[int, tuple[str, Key]], marked_at: Mapping[int, int], found: Foreign
) -> None:
    left = {}
    times: defaultdict[str, set[int]] = defaultdict(set)
    for pk, (version, key) in gone.items():
        if excuses.erased(key, (pk,), inserted_at_ms=marked_at[pk], again_ms=None):
            found.erased += 1
        else:
            left[pk] = (version, key)
            times[version].add(marked_at[pk])
    past = {version: excuses.past(version, sorted(of)) for version, of in times.items()}
    for pk, (version, key) in left.items():
        over = past[version][marked_at[pk]]
        if over:
            found.expired += 1
        else:
            found.missing[pk] = key
            found.ttl_unknown += int(over is None)
