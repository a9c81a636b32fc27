"""Reconciling: compares both stores over a window of time, and reports what is missing, duplicated, unexpected or altered.

What belongs here: which batches, entries and marks a window covers, and the report. What does not: the comparison
of one insert group (`core.compare`), and clearing marks (`core.requeue`), which a repair does.

It asks three questions:

* of the ledger: does ClickHouse still hold every insert group (one `inserted_at`) of a closed batch as it was? One
  grouped look-up answers for most groups; rows and entries are read only where a sum differs;
* of the outbox: is there a mark that no batch has set, on a row that ClickHouse does not hold?
* of ClickHouse: is there an `inserted_at` that no batch ever had?

The window is by `inserted_at`, the time of the first export; for marks that no batch has set, by the mark. For swept
rows, counts and sums are compared, without names. A batch that is not closed yet is left to the drain.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.batch import NO_ENTRIES, OPEN, Batch, Block, Holding, State, pks_of
from auditexport_pipeline.core.compare import (
    ROW_BYTES,
    Comparison,
    as_sealed,
    compare_block,
    entries_of,
    event_of,
)
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.excuses import BEFORE_US, OTHERS, Excuses
from auditexport_pipeline.core.foreign import AHEAD_MS, FIRST_TIME_MS, Foreign, is_time, look_up, successors
from auditexport_pipeline.core.open_findings import RECORDS_READ, OpenFinding, open_findings, record_of
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import KINDS, NAMED_EVENTS, AuditLog, Discrepancy, Maintenance, Outbox
from auditexport_pipeline.core.requeue import Requeue, clear
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.verify import verify
from auditexport_pipeline.core.versions import VERSIONS

BATCHES_AT_ONCE = 100
# A batch is listed by its latest `inserted_at`; its others are at most this much earlier.
SLOTS_APART_MS = 60_000
# Entries read under an `inserted_at` that no batch had, to tell whose events they are: several usual batches of another exporter.
UNKNOWN_ENTRIES_READ = 10_000
# Keys in memory of rows that others have exported, to recognise their entries.
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
    explained: Counter[str] = field(default_factory=Counter)


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
        return any(getattr(self, kind) for kind in KINDS)


Place = tuple[str, int]  # workspace_id ('' where only a number is known), first millisecond of the day


@dataclass(slots=True, kw_only=True)
class Report:
    """The result of a reconciliation. `found` counts entries; `missing_pks` are the rows that a repair exports again."""

    from_ms: int
    to_ms: int
    batches: list[BatchReport] = field(default_factory=list)
    places: defaultdict[Place, PlaceReport] = field(default_factory=lambda: defaultdict(PlaceReport))
    found: Discrepancy = field(default_factory=Discrepancy)
    slots: int = 0  # insert groups
    slots_read: int = 0  # insert groups of which rows and entries were compared one by one
    open_batches: int = 0  # not closed yet: left to the drain
    left_alone: Counter[str] = field(default_factory=Counter)  # batches by version, of those that are not installed
    marked_by_others: int = 0  # marks that no batch has set, on rows that ClickHouse holds
    explained: Counter[str] = field(default_factory=Counter)  # entries by reason (`core.excuses`)
    missing_pks: PkSet = field(default_factory=PkSet)
    repaired: Requeue | None = None
    ttl_unknown: int = 0  # of the missing: those that may be past a TTL that cannot be evaluated
    unrecorded: str = ""  # why the action could not be recorded

    loose: OpenFinding | None = None  # the part of `found` that belongs to no batch, with its window

    @property
    def clean(self) -> bool:
        return not self.found

    @property
    def counts(self) -> dict[str, int]:
        """Its numbers, under the names of `--json` and of the job's metadata."""
        return {
            **self.found.counts,
            "blocks": self.slots,
            "blocks_compared_by_entry": self.slots_read,
            "entries_expected": sum(line.entries for line in self.batches),
            "entries_stored": sum(line.stored for line in self.batches),
            "open_batches": self.open_batches,
            "ttl_unknown": self.ttl_unknown,
            "marked_by_others": self.marked_by_others,
            "repaired_rows": self.repaired.rows if self.repaired and self.repaired.action_id else 0,
        }

    def covers(self, at_ms: int) -> bool:
        return self.from_ms <= at_ms < self.to_ms

    def count(self, workspace_id: str, at_ms: int, what: str, number: int = 1) -> None:
        """Counts rows, entries or a kind of discrepancy for a workspace, on the day of `at_ms`."""
        place = self.places[workspace_id, at_ms // DAY_MS * DAY_MS]
        setattr(place, what, getattr(place, what) + number)

    def add_comparison(self, compared: Comparison, at_ms: int, line: BatchReport) -> None:
        """Adds the comparison of one insert group of a batch."""
        for kind in KINDS:
            for key, entries in getattr(compared, kind).items():
                self.count(key[0], at_ms, kind, entries)
            if unnamed := getattr(compared.unnamed, kind):
                self.count("", at_ms, kind, unnamed)
        line.explained += compared.explained
        line.found += compared.discrepancy
        self.explained += compared.explained
        self.found += compared.discrepancy
        self.ttl_unknown += compared.ttl_unknown

    def add_loose(self, found: Discrepancy, at_ms: int) -> None:
        """Adds a finding that belongs to no batch, under its `inserted_at` or mark."""
        if found:
            self.found += found
            finding = OpenFinding(at_ms=self.to_ms, from_ms=at_ms, to_ms=at_ms + 1, found=found)
            self.loose = self.loose + finding if self.loose else finding


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
    excuses = Excuses(upkeep, log)
    # Batches that are claimed from now on are after the window.
    report = Report(from_ms=from_ms, to_ms=min(to_ms, excuses.now_ms))
    work = _Reconciliation(outbox, upkeep, log, excuses, report, dry_run, count_places)
    stored = log.count_by_inserted_at(report.from_ms, report.to_ms)
    known_times = work.compare_batches()
    keys_of_others = work.check_foreign_marks()
    unknown = {at_ms: entries for at_ms, entries in stored.items() if at_ms not in known_times}
    work.check_unknown_entries(unknown, keys_of_others, others_write=others_write)
    if count_places:
        for (workspace_id, day_ms), entries in log.count_by_workspace(report.from_ms, report.to_ms).items():
            report.count(workspace_id, day_ms, "entries", entries)
    if repair is not None and report.missing_pks:
        selection: dict[str, object] = {"from_ms": report.from_ms, "to_ms": report.to_ms}
        report.repaired = clear(
            outbox, upkeep, log, report.missing_pks, repair, verb="repair", selection=selection, dry_run=dry_run
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
        **report.found.counts,
        **record_of(report.from_ms, report.to_ms, report.loose, still_open),
    }


@dataclass(slots=True)
class _Reconciliation:
    """One reconciliation at work: the three questions, each of which adds to the report."""

    outbox: Outbox
    upkeep: Maintenance
    log: AuditLog
    excuses: Excuses
    report: Report
    dry_run: bool
    count_places: bool

    # ── of the ledger ────────────────────────────────────────────────────────────────────────────

    def compare_batches(self) -> set[int]:
        """Compares the closed batches of the window; returns each `inserted_at` that a batch has, open or closed."""
        times: set[int] = set()
        after_id = 0
        to_ms = self.report.to_ms + SLOTS_APART_MS
        while page := self.upkeep.inserted_between(self.report.from_ms, to_ms, after_id, BATCHES_AT_ONCE):
            after_id = page[-1].batch_id
            times.update(block.inserted_at_ms for batch in page for block in batch.blocks)
            self._compare_page(page)
        return times

    def _compare_page(self, page: Sequence[Batch]) -> None:
        self.report.open_batches += sum(batch.state in OPEN for batch in page)
        self.report.left_alone.update(batch.version for batch in page if batch.version not in VERSIONS)
        closed = [batch for batch in page if batch.version in VERSIONS and batch.state not in OPEN]
        unverified = [batch for batch in closed if batch.state is State.EXPORTED]
        if unverified and not self.dry_run:
            verify(self.outbox, self.log, unverified, upkeep=self.upkeep)
            fresh = {batch.batch_id: batch for batch in self.outbox.batches(batch.batch_id for batch in unverified)}
            closed = [replace(fresh.get(batch.batch_id, batch), swept=batch.swept) for batch in closed]
        holdings = self.log.holdings([block.inserted_at_ms for batch in closed for block in batch.blocks])
        came_back = self._came_back(closed)
        missing = [pk for batch in closed for pk in self._compare_batch(batch, holdings, came_back)]
        self.report.missing_pks |= PkSet.of(sorted(set(missing)))

    def _came_back(self, batches: Sequence[Batch]) -> set[int]:
        """Each `inserted_at` that lacked entries when it was last compared, and under which a requeue has sent some again.
        What explained the first loss does not explain a second one. The TTL explains both, so expired ones are left out.
        """
        lacking: defaultdict[str, list[Block]] = defaultdict(list)
        for batch in batches:
            for block in batch.first_blocks:
                before = batch.observed.get(block.inserted_at_ms)
                if before is not None and before.rows - before.copies < block.rows:
                    lacking[batch.version].append(block)
        came_back: set[int] = set()
        for version, blocks in lacking.items():
            past = self.excuses.past(version, [block.inserted_at_ms for block in blocks])
            if pks := pks_of([block for block in blocks if not past[block.inserted_at_ms]]):
                senders = self.outbox.sent_over(pks.first, pks.last)
                came_back |= {one.inserted_at_ms for batch in senders for one in batch.blocks if batch.is_requeue(one)}
        return came_back

    def _compare_batch(self, batch: Batch, holdings: Mapping[int, Holding], came_back: set[int]) -> list[int]:
        """Compares the insert groups of one batch and records the outcome; returns the pks of the missing entries.

        A requeue is reported with the insert group of the first export. Its own rows are compared only to end a discrepancy.
        """
        line = BatchReport(
            batch_id=batch.batch_id,
            inserted_at_ms=max((block.inserted_at_ms for block in batch.blocks), default=0),
            entries=sum(block.rows for block in batch.first_blocks),
            swept=batch.swept,
        )
        if batch.first_blocks:
            self.report.batches.append(line)
        observed = dict(batch.observed)
        missing: list[int] = []
        wrong = Discrepancy()
        for block in batch.blocks:
            at_ms = block.inserted_at_ms
            holding = holdings.get(at_ms, NO_ENTRIES)
            if batch.is_requeue(block):
                if batch.state is State.DISCREPANT:
                    compared = compare_block(self.outbox, self.log, batch, block, holding, excuses=self.excuses)
                    wrong += compared.discrepancy
                continue
            if not self.report.covers(at_ms):
                continue
            before = batch.observed.get(at_ms)
            holding = replace(holding, workspaces=before.workspaces if before else {})
            self.report.slots += 1
            line.stored += holding.rows
            self._count_rows(batch, block)
            # Otherwise it is as an earlier comparison found and explained it.
            if at_ms in came_back or holding.copies or holding != before:
                self.report.slots_read += not as_sealed(batch, block, holding)
                compared = compare_block(self.outbox, self.log, batch, block, holding, excuses=self.excuses)
                self.report.add_comparison(compared, at_ms, line)
                missing += compared.missing_pks
                if not compared.settled:
                    continue
            observed[at_ms] = holding  # the next comparison starts here
        wrong += line.found
        # A group outside the window was not compared: what is wrong there stays wrong.
        complete = all(self.report.covers(block.inserted_at_ms) for block in batch.first_blocks)
        if batch.state is State.DISCREPANT and not wrong and not complete:
            return missing
        state = State.DISCREPANT if wrong else State.VERIFIED
        # A repair can end one of several differences, which changes neither the state nor what was settled.
        differs = bool(wrong) and complete
        if not self.dry_run and (differs or observed != batch.observed or state is not batch.state):
            self.upkeep.record_reconciled(batch, wrong, observed)
        return missing

    def _count_rows(self, batch: Batch, block: Block) -> None:
        if self.count_places and not batch.swept:
            for workspace_id, rows in self.upkeep.by_workspace(block.pks).items():
                self.report.count(workspace_id, block.inserted_at_ms, "rows", rows)

    # ── of the outbox ────────────────────────────────────────────────────────────────────────────

    def check_foreign_marks(self) -> set[Key]:
        """Reports the rows of marks that no batch has set and whose events ClickHouse lacks; returns the keys of the others."""
        known_missing = self.report.missing_pks  # reported with their batches
        keys: set[Key] = set()
        for marked_at in self._foreign_marks():
            pks = PkSet.of(sorted(marked_at))
            batches, in_open = self._batches_of(pks)
            # An open batch sends its rows even if others mark them. A closed batch may have had another event under the same pk.
            events = (event_of(row) for row in self.outbox.read(in_open, row_bytes=ROW_BYTES))
            keys.update(event[1] for event in events if event)
            pks -= in_open
            pks -= self.upkeep.dead_among(pks)
            foreign = look_up(self.outbox, self.log, self.excuses, {pk: marked_at[pk] for pk in pks})
            for pk in self._expired_with_their_batch(batches, foreign.missing) | {*(known_missing & pks)}:
                foreign.missing.pop(pk, None)
            self._report_foreign(foreign, marked_at, batches)
            # If a batch sent a row and another exporter marked it, both may have sent it: its key is always needed.
            some = foreign.found if len(keys) < KEYS_OF_OTHERS else foreign.found.keys() & batches.keys()
            keys.update(key for pk in some if (key := foreign.found[pk]) is not None)
        return keys

    def _report_foreign(self, foreign: Foreign, marked_at: Mapping[int, int], batches: Mapping[int, object]) -> None:
        report = self.report
        missing = [pk for pk in foreign.missing if marked_at[pk] < report.to_ms]
        for pk in missing:
            workspace_id, _, _, event_id = foreign.missing[pk]
            report.count(workspace_id, marked_at[pk], "missing")
            report.add_loose(Discrepancy(missing=1, event_ids=(event_id,)), marked_at[pk])
        report.missing_pks |= PkSet.of(sorted(missing))
        report.marked_by_others += sum(marked_at[pk] < report.to_ms and pk not in batches for pk in foreign.found)
        report.ttl_unknown += foreign.ttl_unknown
        report.explained += foreign.explained

    def _batches_of(self, pks: PkSet) -> tuple[dict[int, list[Batch]], PkSet]:
        """The closed batches that had these pks, by pk, and the pks that open batches have."""
        by_batch = self.upkeep.pks_by_batch(pks)
        closed: defaultdict[int, list[Batch]] = defaultdict(list)
        in_open = PkSet()
        for batch in self.outbox.batches(by_batch):
            if batch.state in OPEN:
                in_open |= by_batch[batch.batch_id]
                continue
            for pk in by_batch[batch.batch_id]:
                closed[pk].append(batch)
        return closed, in_open

    def _expired_with_their_batch(self, batches: Mapping[int, Sequence[Batch]], missing: Iterable[int]) -> set[int]:
        """Rows that a batch may have exported so long ago that ClickHouse need not hold them any more."""
        pks = PkSet.of(sorted(pk for pk in missing if pk in batches))
        exported_by = {batch.batch_id: batch for pk in pks for batch in batches[pk]}

        def may_be_expired(pk: int, batch: Batch) -> bool:
            times = [block.inserted_at_ms for block in batch.blocks if pk in block.pks]
            return any(past is not False for past in self.excuses.past(batch.version, times).values())

        pks -= successors(self.upkeep, exported_by.values(), pks)
        return {pk for pk in pks if any(may_be_expired(pk, batch) for batch in batches[pk])}

    def _foreign_marks(self) -> Iterator[dict[int, int]]:
        """Rows of the window with a mark that no batch has set, by pk with the time of their export, in portions."""
        report, now_ms, versions = self.report, self.excuses.now_ms, tuple(VERSIONS)
        first_ms = max(report.from_ms, FIRST_TIME_MS)
        last_ms = min(report.to_ms + MARKED_AFTER_MS, now_ms + AHEAD_MS)
        if first_ms <= last_ms:
            yield from self.upkeep.foreign_marks(first_ms, last_ms, versions)
        for low_ms, high_ms in ((0, FIRST_TIME_MS - 1), (now_ms + AHEAD_MS + 1, 2**63 - 1)):
            for marks in self.upkeep.foreign_marks(low_ms, high_ms, versions):
                created = {pk: at_ms for pk, (at_ms, _) in self.upkeep.times(PkSet.of(sorted(marks))).items()}
                yield {
                    # A row without any valid time counts as of now: it is checked, and nothing explains it.
                    pk: at_ms if is_time(at_ms, now_ms) else report.to_ms - 1
                    for pk, at_ms in created.items()
                    if report.covers(at_ms) or not is_time(at_ms, now_ms)
                }
        # Rows that have the very mark of a batch and were never in it.
        ids = [line.batch_id for line in report.batches]
        for start in range(0, len(ids), BATCHES_AT_ONCE):
            for batch in self.outbox.batches(ids[start : start + BATCHES_AT_ONCE]):
                stamp_ms = batch.exported_at_ms
                if stamp_ms is not None and self.upkeep.count_stamped(stamp_ms) > batch.marked_rows:
                    pks = self.upkeep.stamped(stamp_ms, versions) - batch.pks
                    yield dict.fromkeys(pks, min(stamp_ms, report.to_ms - 1))

    # ── of ClickHouse ────────────────────────────────────────────────────────────────────────────

    def check_unknown_entries(self, counts: Mapping[int, int], keys_of_others: set[Key], *, others_write: bool) -> None:
        """Reports entries under an `inserted_at` that no batch had: copies of our events, another exporter's, or unexpected ones.

        `counts` are the entries by `inserted_at`.
        """
        ours_since_ms = self.upkeep.first_inserted_ms()
        for inserted_at_ms, entries in counts.items():
            if ours_since_ms is None or inserted_at_ms < ours_since_ms:
                self.report.explained[BEFORE_US] += entries
            elif self.upkeep.batch_with(inserted_at_ms) is None:
                self._check_unknown_group(inserted_at_ms, keys_of_others, others_write)

    def _check_unknown_group(self, at_ms: int, keys_of_others: set[Key], others_write: bool) -> None:
        """Reports one such `inserted_at`. ClickHouse counts its entries; some are read, and the others count as unexpected."""
        report = self.report
        counts = self.log.count_by_workspace(at_ms, at_ms + 1)
        unread = Counter({workspace_id: rows for (workspace_id, _), rows in counts.items()})
        entries = self.log.entries_at(at_ms, most=UNKNOWN_ENTRIES_READ)
        copies = entries_of(self.log, {entry.key for entry in entries})
        elsewhere = {entry.key for entry in copies if entry.inserted_at_ms != at_ms}
        named: list[Key] = []
        found = Counter[str]()

        def count(workspace_id: str, kind: str, number: int) -> None:
            report.count(workspace_id, at_ms, kind, number)
            found[kind] += number

        for entry in entries:
            unread[entry.key[0]] -= 1
            if entry.key not in elsewhere and (entry.key in keys_of_others or others_write):
                report.explained[OTHERS] += 1
                continue
            count(entry.key[0], "duplicated" if entry.key in elsewhere else "unexpected", 1)
            named.append(entry.key)
        for workspace_id, entries_left in (+unread).items():
            if others_write:
                report.explained[OTHERS] += entries_left
            else:
                count(workspace_id, "unexpected", entries_left)
        event_ids = tuple(key[3] for key in named[:NAMED_EVENTS])
        report.add_loose(Discrepancy(**found, event_ids=event_ids), at_ms)
