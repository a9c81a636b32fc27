"""Reconciling: compares both stores over a window of time, and reports what is missing, duplicated, unexpected or altered.

What belongs here: which batches, entries and marks a window covers, and the report. What does not: the comparison
of one insert group (`core.compare`), and clearing marks (`core.requeue`), which a repair does.

It asks three questions, each from another side:

* from the ledger: does ClickHouse still hold every insert group (one `inserted_at`) of a closed batch as it was? One
  grouped look-up answers for most groups; rows and entries are read only where a sum differs;
* from ClickHouse: is there an `inserted_at` that no batch ever had?
* from the outbox: is there a mark that no batch has set, on a row that ClickHouse does not hold?

The window is by `inserted_at`, the time of the first export; for marks that no batch has set, by the mark. For swept
rows, counts and sums are compared, without names. A batch that is not closed yet is left to the drain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import NO_ENTRIES, OPEN, Batch, Holding, State
from auditexport_pipeline.core.compare import (
    Comparison,
    InsertGroup,
    compare,
    compare_at_rest,
    entries_of,
    insert_group_at,
    insert_groups_of,
)
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.excuses import Excuses
from auditexport_pipeline.core.foreign import AHEAD_MS, FIRST_TIME_MS, is_time, keys_of, look_for, successors
from auditexport_pipeline.core.open_findings import RECORDS_READ, OpenFinding, open_findings, record_of
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import AuditLog, Discrepancy, Maintenance, Outbox
from auditexport_pipeline.core.requeue import Requeue, clear
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.verify import verify
from auditexport_pipeline.core.versions import VERSIONS

BATCHES_AT_ONCE = 100
# A batch is listed by its latest `inserted_at`; its others are at most this much earlier.
SLOTS_APART_MS = 60_000
# Entries read under an `inserted_at` that no batch had, to tell whose events they are: several usual batches of another exporter.
UNKNOWN_ENTRIES_READ = 10_000
# Keys kept of rows that others have exported, to recognise their entries.
KEYS_OF_OTHERS = 1_000_000
# Another exporter marks its rows at most this long after its INSERT.
MARKED_AFTER_MS = 600_000


@dataclass(slots=True, kw_only=True)
class BatchReport:
    """One batch of the window: entries that it sent, entries that ClickHouse holds in its insert groups, the difference."""

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


Place = tuple[str, int]  # workspace_id ('' where only a number is known), first millisecond of the day


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of a reconciliation. `found` counts entries; `missing_pks` are the rows that a repair exports again."""

    from_ms: int
    to_ms: int
    count_places: bool = True
    batches: list[BatchReport] = field(default_factory=list)
    places: defaultdict[Place, PlaceReport] = field(default_factory=lambda: defaultdict(PlaceReport))
    found: Discrepancy = field(default_factory=Discrepancy)
    slots: int = 0
    slots_read: int = 0  # insert groups of which rows and entries were compared one by one
    open_batches: int = 0  # not closed yet: left to the drain
    left_alone: Counter[str] = field(default_factory=Counter)  # batches by version, of those that are not installed
    marked_by_others: int = 0  # marks that no batch has set, on rows that ClickHouse holds
    explained: defaultdict[str, int] = field(default_factory=lambda: defaultdict(int))
    missing_pks: PkSet = field(default_factory=PkSet)
    repaired: Requeue | None = None
    ttl_unknown: int = 0  # of the missing: those that may be past a TTL that cannot be evaluated
    unrecorded: str = ""  # why no action was recorded, although one was asked for

    loose: OpenFinding | None = None  # the part of `found` that belongs to no batch, with its window

    @property
    def clean(self) -> bool:
        return not self.found

    def add_loose(self, found: Discrepancy, at_ms: int) -> None:
        """Adds a finding that belongs to no batch, under its `inserted_at` or mark."""
        if not found:
            return
        self.found += found
        before = self.loose
        self.loose = OpenFinding(
            at_ms=self.to_ms,
            from_ms=min(at_ms, before.from_ms) if before else at_ms,
            to_ms=max(at_ms + 1, before.to_ms) if before else at_ms + 1,
            found=before.found + found if before else found,
        )


def reconcile(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    *,
    from_ms: int,
    to_ms: int,
    by: Actor | None = None,
    repair: Actor | None = None,
    others_write: bool = False,
    count_places: bool = True,
    dry_run: bool = False,
) -> Report:
    """Compares outbox and ledger with ClickHouse for the exports of [from_ms, to_ms).

    With `others_write`, other programs write to `audit_logs_raw_v1` too: entries that no batch has sent are counted
    and not reported as unexpected. Without `count_places`, workspaces and days have discrepancies only: counting all
    rows and entries reads every row of the window in the outbox.

    Durable effects: for each batch what ClickHouse held (`observed`), and its state `verified` or `discrepant`; with `repair`,
    the cleared marks of exactly the missing rows, and an action; with `by`, an action with the window and the
    differences, from which `core.status` knows the last reconciliation (without the grant for it, the report says
    so). With `dry_run` nothing is written, and a user who may only read can run it.
    """
    now_ms = upkeep.now_ms()
    # Batches that are claimed from now on are after the window.
    report = Report(from_ms=from_ms, to_ms=min(to_ms, now_ms), count_places=count_places)
    excuses = Excuses(upkeep, log)
    stored = log.count_by_inserted_at(report.from_ms, report.to_ms)
    known_times: set[int] = set()
    missing = PkSet()
    for page in _pages(upkeep, report.from_ms, report.to_ms + SLOTS_APART_MS):
        missing |= _batches(outbox, upkeep, log, page, excuses, known_times, report, dry_run=dry_run)
    unexported, keys_of_others = _marks(outbox, upkeep, log, excuses, missing, report)
    report.missing_pks = missing | unexported
    unknown = {at_ms: entries for at_ms, entries in stored.items() if at_ms not in known_times}
    _unknown_entries(upkeep, log, unknown, keys_of_others, others_write, report)
    if count_places:
        for place, entries in log.count_by_workspace(report.from_ms, report.to_ms).items():
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
            still_open = open_findings(upkeep.last_actions("reconcile", RECORDS_READ))
            upkeep.record_action("reconcile", by, _record(report, still_open))
        except SetupIncomplete as error:  # the findings matter more than the record of this reconciliation
            report.unrecorded = str(error)
    return report


def _record(report: Report, still_open: Sequence[OpenFinding]) -> dict[str, int]:
    """The selection of a reconciliation's action: its window, its counts, and what `core.open_findings` needs."""
    return {
        "from_ms": report.from_ms,
        "to_ms": report.to_ms,
        "batches": len(report.batches),
        "open_batches": report.open_batches,
        "missing": report.found.missing,
        "duplicated": report.found.duplicated,
        "unexpected": report.found.unexpected,
        "altered": report.found.altered,
        **record_of((report.from_ms, report.to_ms), report.loose, still_open),
    }


def _pages(upkeep: Maintenance, from_ms: int, to_ms: int) -> Iterator[list[Batch]]:
    after_id = 0
    while page := upkeep.inserted_between(from_ms, to_ms, after_id, BATCHES_AT_ONCE):
        after_id = page[-1].batch_id
        yield page


# ── from the ledger ───────────────────────────────────────────────────────────────────


def _batches(
    outbox: Outbox,
    upkeep: Maintenance,
    log: AuditLog,
    page: Sequence[Batch],
    excuses: Excuses,
    known_times: set[int],
    report: Report,
    *,
    dry_run: bool,
) -> PkSet:
    """Compares the insert groups of some batches; returns the pks of the rows whose entries are missing."""
    known_times.update(block.inserted_at_ms for batch in page for block in batch.blocks)
    report.open_batches += sum(1 for batch in page if batch.state in OPEN)
    for batch in page:
        if batch.version not in VERSIONS:
            report.left_alone[batch.version] += 1
    page = [batch for batch in page if batch.version in VERSIONS]
    closed = [batch for batch in page if batch.state not in OPEN]
    unverified = [batch for batch in closed if batch.state is State.EXPORTED]
    if unverified and not dry_run:
        verify(outbox, log, unverified)
        fresh = {batch.batch_id: batch for batch in outbox.batches([batch.batch_id for batch in unverified])}
        closed = [replace(fresh.get(batch.batch_id, batch), swept=batch.swept) for batch in closed]
    again = {
        batch.batch_id: _requeued(outbox, log, batch, excuses) for batch in closed if batch.state is State.DISCREPANT
    }
    # A requeue is compared with the insert group of the first export, wherever that was.
    firsts = [batch for batch in closed if batch.first_blocks]
    for batch in closed:
        if not batch.first_blocks and batch.batch_id in again and not again[batch.batch_id] and not dry_run:
            upkeep.record_reconciled(batch, Discrepancy(), batch.observed)
    if not firsts:
        return PkSet()
    groups = {group.inserted_at_ms: group for group in insert_groups_of(firsts)}
    holdings = log.holdings(list(groups))
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
            if (before := batch.observed.get(at_ms)) is not None:
                holding = replace(holding, workspaces=before.workspaces)
            if _as_before(groups[at_ms], holding):
                observed[at_ms] = holding
                continue
            report.slots_read += 1
            found = compare_at_rest(outbox, log, batch, block, excuses=excuses)
            _add_comparison(found, at_ms, line, report)
            missing.update(pk for pks in found.missing.values() for pk in pks)
            if not found.discrepancy and not found.unprovable:
                observed[at_ms] = holding  # explained: the next comparison starts here
        report.found += line.found
        report.batches.append(line)
        wrong = line.found + again.get(batch.batch_id, Discrepancy())
        # A group outside the window was not compared: what is wrong there stays wrong.
        seen = all(report.from_ms <= block.inserted_at_ms < report.to_ms for block in batch.blocks)
        if not wrong and not seen and batch.state is State.DISCREPANT:
            continue
        state = State.DISCREPANT if wrong else State.VERIFIED
        if not dry_run and (observed != batch.observed or state is not batch.state):
            upkeep.record_reconciled(batch, wrong, observed)
    return PkSet.of(sorted(missing))


def _requeued(outbox: Outbox, log: AuditLog, batch: Batch, excuses: Excuses) -> Discrepancy:
    """What ClickHouse lacks of a batch's requeued rows. The report has it with the insert group of their first export."""
    found = Discrepancy()
    for block in batch.blocks:
        if batch.is_requeue(block):
            group = insert_group_at(outbox, batch, block)
            found += compare(outbox, log, group, excuses=excuses).discrepancy
    return found


def _as_before(group: InsertGroup, holding: Holding) -> bool:
    """Whether a group holds exactly what was sent, or what an earlier comparison explained."""
    assert group.first is not None
    _, block = group.first
    baseline = group.baseline
    if baseline is not None and baseline.copies == 0 and holding == baseline:
        return True
    as_sealed = holding.copies == 0 and (holding.rows, holding.fingerprint) == (block.rows, block.fingerprint)
    return as_sealed and (baseline is None or baseline.rows != holding.rows or baseline.content == holding.content)


def _count_rows(upkeep: Maintenance, batch: Batch, pks: PkSet, at_ms: int, report: Report) -> None:
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
    report.ttl_unknown += found.ttl_unknown


def _day(at_ms: int) -> int:
    return at_ms // DAY_MS * DAY_MS


# ── from the outbox ─────────────────────────────────────────────────────────────────────────


def _marks(
    outbox: Outbox, upkeep: Maintenance, log: AuditLog, excuses: Excuses, named: PkSet, report: Report
) -> tuple[PkSet, set[Key]]:
    """Marks of the window that no batch has set: the pks of rows that ClickHouse lacks and that are not `named` with their
    batches, and the keys of the others.
    """
    unexported: set[int] = set()
    keys_of_others: set[Key] = set()
    for marked_at in _foreign_marks(outbox, upkeep, excuses.now_ms, report):
        pks = PkSet.of(sorted(marked_at))
        taken, open_ = _in_batches(outbox, upkeep, pks)
        # An open batch sends its rows even if others mark them. A closed batch may have had another event under the same pk.
        pks -= open_
        keys_of_others.update(keys_of(outbox, open_))
        pks -= upkeep.dead_among(pks)
        found = look_for(outbox, log, excuses, {pk: marked_at[pk] for pk in pks})
        for pk in _expired_with_their_batch(upkeep, excuses, taken, found.missing) | {*(named & pks)}:
            found.missing.pop(pk, None)
        beyond = {pk for pk in found.missing if marked_at[pk] >= report.to_ms}
        for pk, key in found.missing.items():
            if pk not in beyond:
                unexported.add(pk)
                report.places[key[0], _day(marked_at[pk])].missing += 1
                report.add_loose(Discrepancy(missing=1, event_ids=(key[3],)), marked_at[pk])
        report.marked_by_others += sum(1 for pk in found.held if marked_at[pk] < report.to_ms and pk not in taken)
        report.ttl_unknown += found.ttl_unknown
        for what, count in (("erased on record", found.erased), ("past the TTL", found.expired)):
            if count:
                report.explained[what] += count
        # A batch sent this row and somebody else marked it: that other may have sent it too.
        sent = {key for pk, key in found.held.items() if key is not None and pk in taken}
        if len(keys_of_others) < KEYS_OF_OTHERS:
            sent.update(key for key in found.held.values() if key is not None)
        keys_of_others |= sent
    return PkSet.of(sorted(unexported)), keys_of_others


def _in_batches(outbox: Outbox, upkeep: Maintenance, pks: PkSet) -> tuple[dict[int, list[Batch]], PkSet]:
    """The closed batches that had these pks, by pk, and the pks that open batches have."""
    held = upkeep.held(pks)
    taken: dict[int, list[Batch]] = {}
    open_ = PkSet()
    for batch in outbox.batches(held):
        if batch.state in OPEN:
            open_ |= held[batch.batch_id]
            continue
        for pk in held[batch.batch_id]:
            taken.setdefault(pk, []).append(batch)
    return taken, open_


def _expired_with_their_batch(
    upkeep: Maintenance, excuses: Excuses, taken: Mapping[int, Sequence[Batch]], missing: Iterable[int]
) -> set[int]:
    """Rows that a batch may have exported so long ago that ClickHouse need not hold them any more."""
    pks = PkSet.of(sorted(pk for pk in missing if pk in taken))
    pks -= successors(upkeep, {batch.batch_id: batch for pk in pks for batch in taken[pk]}.values(), pks)
    expired = set()
    for pk in pks:
        for batch in taken[pk]:
            groups = {block.inserted_at_ms for block in batch.blocks if pk in block.pks}
            if any(past is not False for past in excuses.past(batch.version, groups).values()):
                expired.add(pk)
    return expired


def _foreign_marks(outbox: Outbox, upkeep: Maintenance, now_ms: int, report: Report) -> Iterator[dict[int, int]]:
    """Rows of the window with a mark that no batch has set, by pk with the time of their export, in portions."""
    first_ms, last_ms = max(report.from_ms, FIRST_TIME_MS), min(report.to_ms + MARKED_AFTER_MS, now_ms + AHEAD_MS)
    if first_ms <= last_ms:
        yield from upkeep.foreign_marks(first_ms, last_ms, tuple(VERSIONS))
    for low_ms, high_ms in ((0, FIRST_TIME_MS - 1), (now_ms + AHEAD_MS + 1, 2**63 - 1)):
        for marks in upkeep.foreign_marks(low_ms, high_ms, tuple(VERSIONS)):
            times = upkeep.times(PkSet.of(sorted(marks)))
            yield {
                # A row without any valid time counts as of now: it is checked, and nothing excuses it.
                pk: at_ms if is_time(at_ms, now_ms) else report.to_ms - 1
                for pk, (at_ms, _) in times.items()
                if report.from_ms <= at_ms < report.to_ms or not is_time(at_ms, now_ms)
            }
    for line in report.batches:
        for stamp_ms, pks in _borrowed(outbox, upkeep, line.batch_id):
            yield dict.fromkeys(pks, min(stamp_ms, report.to_ms - 1))


def _borrowed(outbox: Outbox, upkeep: Maintenance, batch_id: int) -> Iterator[tuple[int, PkSet]]:
    """Rows that have a batch's own stamp and were never in the batch."""
    for batch in outbox.batches([batch_id]):
        if batch.exported_at_ms is not None and upkeep.count_stamped(batch.exported_at_ms) > batch.marked_rows:
            yield batch.exported_at_ms, upkeep.stamped(batch.exported_at_ms, tuple(VERSIONS)) - batch.pks


# ── from ClickHouse ───────────────────────────────────────────────────────────────────


def _unknown_entries(
    upkeep: Maintenance,
    log: AuditLog,
    counts: Mapping[int, int],
    keys_of_others: set[Key],
    others_write: bool,
    report: Report,
) -> None:
    """Handles entries under an `inserted_at` that no batch had: copies of our events, another exporter's, or unexpected ones.

    `counts` are the entries by `inserted_at`.
    """
    ours_since_ms = upkeep.first_inserted_ms()
    for inserted_at_ms, entries in counts.items():
        if ours_since_ms is None or inserted_at_ms < ours_since_ms:
            report.explained["before the first batch"] += entries
        elif upkeep.batch_with(inserted_at_ms) is None:
            _unknown_group(log, inserted_at_ms, keys_of_others, others_write, report)


def _unknown_group(
    log: AuditLog, inserted_at_ms: int, keys_of_others: set[Key], others_write: bool, report: Report
) -> None:
    """Handles one such `inserted_at`. ClickHouse counts its entries; some are read, and the others count as unexpected."""
    left = {
        workspace_id: rows
        for (workspace_id, _), rows in log.count_by_workspace(inserted_at_ms, inserted_at_ms + 1).items()
    }
    entries = log.entries_at(inserted_at_ms, most=UNKNOWN_ENTRIES_READ)
    elsewhere = {
        entry.key
        for entry in entries_of(log, {entry.key for entry in entries})
        if entry.inserted_at_ms != inserted_at_ms
    }
    named: list[Key] = []
    duplicated = unexpected = 0
    for entry in entries:
        workspace_id = entry.key[0]
        left[workspace_id] = left.get(workspace_id, 1) - 1
        place = report.places[workspace_id, _day(inserted_at_ms)]
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
    for workspace_id, count in left.items():
        if count > 0 and others_write:
            report.explained["written by others"] += count
        elif count > 0:
            unexpected += count
            report.places[workspace_id, _day(inserted_at_ms)].unexpected += count
    event_ids = tuple(key[3] for key in named[:10])
    report.add_loose(Discrepancy(duplicated=duplicated, unexpected=unexpected, event_ids=event_ids), inserted_at_ms)
