"""Reconciling: both stores over a window of time, and what is missing, duplicated, unexpected or altered.

What belongs here: which batches, entries and marks a window covers, and the report. What does not: the comparison
of one slot (`core.compare`), and clearing marks (`core.requeue`), which a repair does.

Three questions, each from another side, so that none can hide what another would see:

* the ledger asks ClickHouse: does every slot (one `inserted_at`) of a closed batch still hold what it held? One
  grouped look-up answers for most; only where a sum differs are rows and entries read;
* ClickHouse asks the ledger: is there an `inserted_at` that no batch ever had?
* the outbox asks both: is there a mark that no batch has set, on a row that ClickHouse does not hold?

The window is of `inserted_at`, the time of the first export; of marks, all are looked at. Rows that were swept leave
counts and sums to compare, and no names. A batch that is not closed yet is left to the drain.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.actions import By, Erasure
from auditexport_pipeline.core.batch import OPEN, Batch, Holding, State
from auditexport_pipeline.core.compare import (
    NO_ENTRIES,
    ROW_BYTES,
    Comparison,
    Key,
    Slot,
    compare,
    compare_at_rest,
    entries_of,
    keys_absent,
    slot_at,
    slots_of,
)
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.event import Undecodable
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Outbox, Upkeep
from auditexport_pipeline.core.requeue import Requeue, clear
from auditexport_pipeline.core.verify import verify
from auditexport_pipeline.core.versions import VERSIONS

DAY_MS = 86_400_000
BATCHES_AT_ONCE = 100
# A batch is listed by the latest of its slots; its others lie at most this far before.
SLOTS_APART_MS = 60_000
# Entries of a slot that no batch had, read to say whose events they are. What is beyond counts as unexpected.
STRANGERS_READ = 100_000


@dataclass(slots=True, kw_only=True)
class BatchReport:
    """One batch of the window: entries that it sent, entries that ClickHouse holds in its slots, and the difference."""

    batch_id: int
    inserted_at_ms: int
    entries: int
    stored: int = 0
    swept: bool = False
    found: Discrepancy = field(default_factory=Discrepancy)
    explained: dict[str, int] = field(default_factory=dict)


@dataclass(slots=True, kw_only=True)
class PlaceReport:
    """One workspace on one day (UTC, by the first export): rows and entries there, and discrepancies in entries."""

    rows: int = 0  # in the outbox, of batches of the window; swept ones are gone
    entries: int = 0  # in ClickHouse
    missing: int = 0
    duplicated: int = 0
    unexpected: int = 0
    altered: int = 0

    @property
    def wrong(self) -> bool:
        return bool(self.missing or self.duplicated or self.unexpected or self.altered)


Place = tuple[str, int]  # workspace_id ('' where only a number is known), day's first millisecond


@dataclass(slots=True, kw_only=True)
class Report:
    """What a reconciliation found. `found` counts entries; `missing_pks` are the rows that a repair exports again."""

    from_ms: int
    to_ms: int
    count_places: bool = True
    batches: list[BatchReport] = field(default_factory=list)
    places: defaultdict[Place, PlaceReport] = field(default_factory=lambda: defaultdict(PlaceReport))
    found: Discrepancy = field(default_factory=Discrepancy)
    slots: int = 0
    slots_read: int = 0  # those of which rows and entries were compared one by one
    open_batches: int = 0  # not closed yet: left to the drain
    marked_by_others: int = 0  # marks that no batch has set, on rows that ClickHouse holds
    explained: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    missing_pks: PkSet = field(default_factory=PkSet)
    repaired: Requeue | None = None
    unrecorded: str = ""  # why no action tells of it, when one was asked for

    @property
    def clean(self) -> bool:
        return not self.found


def reconcile(
    outbox: Outbox,
    upkeep: Upkeep,
    log: AuditLog,
    *,
    from_ms: int,
    to_ms: int,
    by: By | None = None,
    repair: By | None = None,
    others_write: bool = False,
    count_places: bool = True,
    dry_run: bool = False,
) -> Report:
    """Compares outbox and ledger with ClickHouse for the exports of [from_ms, to_ms).

    With `others_write`, somebody else fills `audit_logs_raw_v1` too, and entries that no batch has sent are counted
    and not called unexpected. Without `count_places`, workspaces and days are told of discrepancies only: counting all
    of them reads every row of the window in the outbox. Durable effects: what was seen of each batch (`observed`), its
    state `verified` or `discrepant`; with `repair`, the marks of exactly the missing rows are cleared, and an action says
    so; with `by`, an action says who looked, at which window, and what differed, which is how `core.status` knows when it
    was done last (a user without the grant is told so in the report). With `dry_run` nothing of this is written, and a user
    that may only read can ask.
    """
    now_ms = upkeep.now_ms()
    # What is claimed from here on lies after the window.
    report = Report(from_ms=from_ms, to_ms=min(to_ms, now_ms), count_places=count_places)
    kept_ms = log.kept_ms()
    expired_ms = now_ms - kept_ms if kept_ms is not None else None
    erasures = [recorded.erasure for recorded in upkeep.erasures()]
    stored_slots = log.slots_between(report.from_ms, report.to_ms)
    known_slots: set[int] = set()
    missing = PkSet()
    for page in _pages(upkeep, report.from_ms, report.to_ms + SLOTS_APART_MS):
        missing |= _batches(outbox, upkeep, log, page, erasures, expired_ms, known_slots, report, dry_run=dry_run)
    unexported, keys_of_others = _marks(outbox, upkeep, log, report)
    report.missing_pks = missing | unexported
    strangers = [slot for slot in stored_slots if slot not in known_slots]
    _strangers(upkeep, log, strangers, keys_of_others, others_write, report)
    if count_places:
        for place, entries in log.by_workspace(report.from_ms, report.to_ms).items():
            report.places[place].entries += entries
    if repair is not None and report.missing_pks:
        selection: dict[str, object] = {"from_ms": report.from_ms, "to_ms": report.to_ms}
        report.repaired = clear(
            outbox,
            upkeep,
            log,
            report.missing_pks,
            repair,
            verb="repair",
            selection=selection,
            missing_only=False,
            dry_run=dry_run,
        )
    if by is not None and not dry_run:
        try:
            upkeep.record_action("reconcile", by, _record(report))
        except SetupIncomplete as error:  # what was found counts for more than the record of having looked
            report.unrecorded = str(error)
    return report


def _record(report: Report) -> dict[str, int]:
    """What the action of a reconciliation keeps: its window and its counts."""
    return {
        "from_ms": report.from_ms,
        "to_ms": report.to_ms,
        "batches": len(report.batches),
        "open_batches": report.open_batches,
        "missing": report.found.missing,
        "duplicated": report.found.duplicated,
        "unexpected": report.found.unexpected,
        "altered": report.found.altered,
    }


def _pages(upkeep: Upkeep, from_ms: int, to_ms: int) -> Iterator[list[Batch]]:
    after_id = 0
    while page := upkeep.inserted_between(from_ms, to_ms, after_id, BATCHES_AT_ONCE):
        after_id = page[-1].batch_id
        yield page


# ── the ledger asks ClickHouse ───────────────────────────────────────────────────────────────────


def _batches(
    outbox: Outbox,
    upkeep: Upkeep,
    log: AuditLog,
    page: Sequence[Batch],
    erasures: Sequence[Erasure],
    expired_ms: int | None,
    known_slots: set[int],
    report: Report,
    *,
    dry_run: bool,
) -> PkSet:
    """Compares the slots of some batches; returns the pks of the rows whose entries are missing."""
    known_slots.update(block.inserted_at_ms for batch in page for block in batch.blocks)
    report.open_batches += sum(1 for batch in page if batch.state in OPEN)
    closed = [batch for batch in page if batch.state not in OPEN]
    unverified = [batch for batch in closed if batch.state is State.EXPORTED]
    if unverified and not dry_run:
        verify(outbox, log, unverified)
        fresh = {batch.batch_id: batch for batch in outbox.batches([batch.batch_id for batch in unverified])}
        closed = [replace(fresh.get(batch.batch_id, batch), swept=batch.swept) for batch in closed]
    again = {
        batch.batch_id: _requeued(outbox, log, batch, erasures, expired_ms)
        for batch in closed
        if batch.state is State.DISCREPANT
    }
    # A requeue is looked at with the slot of the first export, wherever that was.
    firsts = [batch for batch in closed if batch.first_blocks]
    for batch in closed:
        if not batch.first_blocks and batch.batch_id in again and not again[batch.batch_id] and not dry_run:
            upkeep.record_reconciled(batch, Discrepancy(), batch.observed)
    if not firsts:
        return PkSet()
    slots = {slot.inserted_at_ms: slot for slot in slots_of(firsts)}
    holdings = log.holdings(list(slots))
    missing: set[int] = set()
    for batch in firsts:
        line = BatchReport(
            batch_id=batch.batch_id,
            inserted_at_ms=batch.blocks[-1].inserted_at_ms,
            entries=sum(block.rows for block in batch.first_blocks),
            swept=batch.swept,
        )
        observed = dict(batch.observed)
        for block in batch.first_blocks:
            at_ms = block.inserted_at_ms
            if not report.from_ms <= at_ms < report.to_ms:
                continue
            holding = holdings.get(at_ms, NO_ENTRIES)
            report.slots += 1
            line.stored += holding.rows
            _count_rows(upkeep, batch, block.pks, at_ms, report)
            expired = expired_ms is not None and at_ms <= expired_ms
            if _as_before(slots[at_ms], holding):
                observed[at_ms] = holding
                continue
            report.slots_read += 1
            found = compare_at_rest(outbox, log, batch, block, erasures=erasures, expired=expired)
            _add_comparison(found, at_ms, line, report)
            missing.update(pk for pks in found.missing.values() for pk in pks)
            if not found.discrepancy:
                observed[at_ms] = holding  # explained: the next comparison starts from here
        report.found += line.found
        report.batches.append(line)
        wrong = line.found + again.get(batch.batch_id, Discrepancy())
        state = State.DISCREPANT if wrong else State.VERIFIED
        if not dry_run and (observed != batch.observed or state is not batch.state):
            upkeep.record_reconciled(batch, wrong, observed)
    return PkSet.of(sorted(missing))


def _requeued(
    outbox: Outbox, log: AuditLog, batch: Batch, erasures: Sequence[Erasure], expired_ms: int | None
) -> Discrepancy:
    """What ClickHouse lacks of the rows that a batch sent again. The report has it with the slot of their first export."""
    found = Discrepancy()
    for block in batch.blocks:
        if batch.is_requeue(block):
            expired = expired_ms is not None and block.inserted_at_ms <= expired_ms
            slot = slot_at(outbox, batch, block)
            found += compare(outbox, log, slot, erasures=erasures, expired=expired).discrepancy
    return found


def _as_before(slot: Slot, holding: Holding) -> bool:
    """Whether a slot holds just what was sent, or what an earlier comparison had explained."""
    assert slot.first is not None
    _, block = slot.first
    baseline = slot.baseline
    if baseline is not None and baseline.copies == 0 and holding == baseline:
        return True
    as_sealed = holding.copies == 0 and (holding.rows, holding.fingerprint) == (block.rows, block.fingerprint)
    return as_sealed and (baseline is None or baseline.rows != holding.rows or baseline.content == holding.content)


def _count_rows(upkeep: Upkeep, batch: Batch, pks: PkSet, at_ms: int, report: Report) -> None:
    if report.count_places and not batch.swept:
        for workspace_id, rows in upkeep.by_workspace(pks).items():
            report.places[workspace_id, _day(at_ms)].rows += rows


def _add_comparison(found: Comparison, at_ms: int, line: BatchReport, report: Report) -> None:
    day = _day(at_ms)
    for key in found.missing:
        report.places[key[0], day].missing += 1
    for key in found.altered:
        report.places[key[0], day].altered += 1
    for key in found.unexpected:
        report.places[key[0], day].unexpected += 1
    for key, copies in found.duplicated.items():
        report.places[key[0], day].duplicated += copies
    if found.unnamed_missing or found.unnamed_altered or found.unnamed_unexpected:
        unnamed = report.places["", day]
        unnamed.missing += found.unnamed_missing
        unnamed.altered += found.unnamed_altered
        unnamed.unexpected += found.unnamed_unexpected
    for name, count in found.explained.items():
        line.explained[name] = line.explained.get(name, 0) + count
        report.explained[name] += count
    line.found += found.discrepancy


def _day(at_ms: int) -> int:
    return at_ms // DAY_MS * DAY_MS


# ── the outbox asks both ─────────────────────────────────────────────────────────────────────────


def _marks(outbox: Outbox, upkeep: Upkeep, log: AuditLog, report: Report) -> tuple[PkSet, set[Key]]:
    """Marks that no batch has set: the pks of rows that ClickHouse lacks, and the keys of the others."""
    unexported = PkSet()
    keys_of_others: set[Key] = set()
    stamps = [(stamp_ms, upkeep.stamped(stamp_ms, tuple(VERSIONS))) for stamp_ms in upkeep.strange_stamps()]
    for line in report.batches:
        stamps.extend(_borrowed(outbox, upkeep, line.batch_id))
    for stamp_ms, pks in stamps:
        for held in upkeep.held(pks).values():
            pks -= held  # marked by somebody else before its batch could; the batch has sent it
        pks -= upkeep.dead_among(pks)
        if not pks:
            continue
        absent = PkSet.of(sorted(keys_absent(outbox, log, pks)))
        unexported |= absent
        report.marked_by_others += len(pks) - len(absent)
        keys_of_others |= _keys(outbox, pks - absent, STRANGERS_READ - len(keys_of_others))
        for workspace_id, rows in upkeep.by_workspace(absent).items():
            report.places[workspace_id, _day(stamp_ms)].missing += rows
    if unexported:
        ids = tuple(row.event_id for row in outbox.read(next(unexported.chunks(10)), row_bytes=ROW_BYTES))
        report.found += Discrepancy(missing=len(unexported), event_ids=ids)
    return unexported, keys_of_others


def _borrowed(outbox: Outbox, upkeep: Upkeep, batch_id: int) -> Iterator[tuple[int, PkSet]]:
    """Rows that carry a batch's own stamp and were never its."""
    for batch in outbox.batches([batch_id]):
        if batch.exported_at_ms is not None and upkeep.count_stamped(batch.exported_at_ms) > batch.marked_rows:
            yield batch.exported_at_ms, upkeep.stamped(batch.exported_at_ms, tuple(VERSIONS)) - batch.pks


def _keys(outbox: Outbox, pks: PkSet, most: int) -> set[Key]:
    keys: set[Key] = set()
    for chunk in pks.chunks(1_000):
        if len(keys) >= most:
            break
        for row in outbox.read(chunk, row_bytes=ROW_BYTES):
            for version in VERSIONS.values():
                event = version.decode(row)
                if not isinstance(event, Undecodable):
                    keys.add(event.key)
                    break
    return keys


# ── ClickHouse asks the ledger ───────────────────────────────────────────────────────────────────


def _strangers(
    upkeep: Upkeep,
    log: AuditLog,
    slots: Sequence[int],
    keys_of_others: set[Key],
    others_write: bool,
    report: Report,
) -> None:
    """Entries under an `inserted_at` that no batch had: copies of our events, somebody else's export, or unexpected."""
    ours_since_ms = upkeep.first_inserted_ms()
    for slot_ms in slots:
        if ours_since_ms is None or slot_ms < ours_since_ms:
            report.explained["before the first batch"] += log.holdings([slot_ms])[slot_ms].rows
            continue
        if upkeep.slot_owner(slot_ms) is not None:
            continue
        entries = log.entries_at(slot_ms)
        keys = {entry.key for entry in entries[:STRANGERS_READ]}
        elsewhere = {entry.key for entry in entries_of(log, keys) if entry.inserted_at_ms != slot_ms}
        named: list[Key] = []
        duplicated = unexpected = 0
        for entry in entries:
            place = report.places[entry.key[0], _day(slot_ms)]
            if entry.key in elsewhere:
                duplicated += 1
                place.duplicated += 1
            elif entry.key in keys_of_others or others_write:
                report.explained["written by others"] += 1
                continue
            else:
                unexpected += 1
                place.unexpected += 1
            named.append(entry.key)
        report.found += Discrepancy(
            duplicated=duplicated, unexpected=unexpected, event_ids=tuple(key[3] for key in named[:10])
        )
