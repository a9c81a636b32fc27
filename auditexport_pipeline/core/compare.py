"""Comparing what was sent under one `inserted_at` with what ClickHouse holds there, entry by entry.

What does not belong here: which batches are compared, and when (`core.verify` right after an export, `core.reconcile` later),
and the reasons for which entries may be gone (`core.excuses`).

An entry is expected by its key (workspace_id, bucket, time, event_id). Two values are compared: its fingerprint,
which Python computes from the payload, and its content, a hash over every column, metas included. ClickHouse computes
the content once from what it stores, and once from the payload through the same parser.

Entries can be gone for good reasons: two copies of one event merge (the outbox held it twice, or it was requeued), the
table's TTL deletes them, or they are erased on record. A requeue adds copies under the same `inserted_at`, until they merge.
Any other difference is a discrepancy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.batch import Batch, Block, Holding, pks_of
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.event import Key, Undecodable, explain, normal_form
from auditexport_pipeline.core.excuses import (
    COPIES,
    EXPIRED,
    MERGED,
    PENDING,
    RENEWED,
    REPLACED,
    UNPROVABLE,
    Excuses,
    SentEvent,
)
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import (
    KINDS,
    NAMED_EVENTS,
    AuditLog,
    Discrepancy,
    Outbox,
    StoredEntry,
    StoredRow,
)
from auditexport_pipeline.core.versions import VERSIONS

# Rows decoded and parsed again together.
ROWS_AT_ONCE = 1_000
BYTES_AT_ONCE = 8 * 1024**2
KEYS_AT_ONCE = 1_000
# The expected size of a row where nothing else is known.
ROW_BYTES = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class InsertGroup:
    """Everything that was sent under one `inserted_at`: the block of a first export, and requeues of its rows."""

    inserted_at_ms: int
    blocks: tuple[tuple[Batch, Block], ...]
    # `reused`: rows whose pks a later batch sent under another `inserted_at`, as other events. `renewed`: those of them that
    # may be this group's own events, sent as new because ClickHouse had lost them.
    reused: PkSet = field(default_factory=PkSet)
    renewed: PkSet = field(default_factory=PkSet)

    @property
    def version(self) -> str:
        return self.blocks[0][0].version

    @property
    def first(self) -> tuple[Batch, Block] | None:
        """The first export; None when only requeues of its rows are compared."""
        return next(((batch, block) for batch, block in self.blocks if not batch.is_requeue(block)), None)

    @property
    def pks(self) -> PkSet:
        return pks_of([block for _, block in self.blocks])

    @property
    def senders(self) -> list[tuple[int, int, PkSet]]:
        """The batches that have sent something, with their attempts and pks."""
        return [(batch.batch_id, batch.attempts, block.pks) for batch, block in self.blocks]

    def copies(self, without: PkSet) -> int:
        """How many copies requeues and their replays may have left here, without these rows' copies; merges remove them."""
        return sum(
            len(block.pks - without) * max(1, batch.attempts) for batch, block in self.blocks if batch.is_requeue(block)
        )


def insert_groups_of(batches: Collection[Batch]) -> list[InsertGroup]:
    """The groups of these batches, by ascending `inserted_at`; requeues join the group of the first export, also with
    the blocks that they gave back.
    """
    sent = [
        (batch, block)
        for batch in sorted(batches, key=lambda batch: batch.batch_id)
        for block in (*batch.blocks, *batch.given_back)
    ]
    by_time: defaultdict[int, list[tuple[Batch, Block]]] = defaultdict(list)
    for batch, block in sent:
        by_time[block.inserted_at_ms].append((batch, block))
    groups = [InsertGroup(inserted_at_ms=at_ms, blocks=tuple(parts)) for at_ms, parts in sorted(by_time.items())]
    if len(pks_of([block for _, block in sent])) == sum(len(group.pks) for group in groups):
        return groups  # no pk is in two groups
    return [_with_reused_pks(group, sent) for group in groups]


def _with_reused_pks(group: InsertGroup, sent: Sequence[tuple[Batch, Block]]) -> InsertGroup:
    own = group.pks
    first_id = group.blocks[0][0].batch_id
    reused = renewed = PkSet()
    for batch, block in sent:
        if batch.batch_id <= first_id:
            continue
        if block.inserted_at_ms == group.inserted_at_ms:
            reused, renewed = reused - block.pks, renewed - block.pks
        else:
            reused, renewed = reused | block.pks & own, renewed | block.renewed & own
    return replace(group, reused=reused, renewed=renewed)


def _insert_group_of(outbox: Outbox, batch: Batch, block: Block) -> InsertGroup:
    """The group of a batch's block: of a first export with the requeues of its rows that have sent something by now, of a
    requeue the block alone, which can be one of several parts under its `inserted_at`.
    """
    others = [other for other in _sent_over(outbox, batch) if other.batch_id != batch.batch_id]
    groups = insert_groups_of([batch, *others])
    group = next(group for group in groups if group.inserted_at_ms == block.inserted_at_ms)
    if batch.is_requeue(block):
        return replace(group, blocks=((batch, block),))
    parts = (
        (other, part) for other, part in group.blocks if other.batch_id == batch.batch_id or other.is_requeue(part)
    )
    return replace(group, blocks=tuple(parts))


def pks_still_of(outbox: Outbox, batch: Batch) -> PkSet:
    """The rows of a batch, without the pks that a later batch exported as new for other events."""
    later = [
        block for other in _sent_over(outbox, batch) if other.batch_id > batch.batch_id for block in other.first_blocks
    ]
    return batch.pks - (pks_of(later) - PkSet.union(block.renewed for block in later))


def _sent_over(outbox: Outbox, batch: Batch) -> list[Batch]:
    return outbox.sent_over(batch.pks.first, batch.pks.last) if batch.pks else []


@dataclass(slots=True, kw_only=True)
class Comparison:
    """The result of comparing one group: entries by key for each kind of discrepancy, and what was explained."""

    missing: Counter[Key] = field(default_factory=Counter)
    duplicated: Counter[Key] = field(default_factory=Counter)  # surplus copies
    unexpected: Counter[Key] = field(default_factory=Counter)
    altered: Counter[Key] = field(default_factory=Counter)
    # Entries whose outbox rows are gone: only a number is known.
    unnamed: Discrepancy = field(default_factory=Discrepancy)
    missing_pks: list[int] = field(default_factory=list)  # the outbox rows of the missing
    ttl_unknown: int = 0  # of the missing: those that may be past a TTL that cannot be evaluated
    explained: Counter[str] = field(default_factory=Counter)  # entries by reason (`core.excuses`)

    @property
    def discrepancy(self) -> Discrepancy:
        named = [key[3] for kind in KINDS for key in getattr(self, kind)]
        counts = {kind: getattr(self, kind).total() for kind in KINDS}
        return Discrepancy(**counts, event_ids=tuple(named[:NAMED_EVENTS])) + self.unnamed

    @property
    def settled(self) -> bool:
        """Whether what ClickHouse holds now is where the next comparison may start."""
        return not self.discrepancy and not self.explained[UNPROVABLE]


def as_sealed(batch: Batch, block: Block, holding: Holding) -> bool:
    """Whether ClickHouse holds exactly a block's entries under its `inserted_at`, metas included where it held as many before.

    A requeue of a whole block is there as often as it was sent: every entry has that many equal copies.
    """
    times = holding.rows // block.rows if batch.is_requeue(block) else 1
    sealed = (block.rows * times, block.fingerprint * times % 2**64, block.rows * (times - 1))
    before = batch.observed.get(block.inserted_at_ms)  # which a requeue does not have
    return (
        times > 0
        and (holding.rows, holding.fingerprint, holding.copies) == sealed
        and (before is None or before.rows != holding.rows or before.content == holding.content)
    )


def compare_block(
    outbox: Outbox, log: AuditLog, batch: Batch, block: Block, holding: Holding, *, excuses: Excuses | None = None
) -> Comparison:
    """Compares what ClickHouse holds of a batch's block with the seal, and entry by entry (`compare`) where that differs.

    A requeue that arrives while entries are read is no discrepancy: when something differs, the comparison is repeated until
    nothing was sent to the group meanwhile.
    """
    if as_sealed(batch, block, holding):
        return Comparison()
    group = _insert_group_of(outbox, batch, block)
    while True:
        found = compare(outbox, log, group, excuses=excuses)
        before, group = group, _insert_group_of(outbox, batch, block)
        if not found.discrepancy or group.senders == before.senders:
            return found


def compare(outbox: Outbox, log: AuditLog, group: InsertGroup, *, excuses: Excuses | None = None) -> Comparison:
    """Reads a group's rows and entries, and returns the differences. Changes nothing.

    Source: the outbox by pk; `audit_logs_raw_v1` by `inserted_at`, and by key for entries that are not there. `excuses` explain
    entries that are gone; without them, none is explained. Memory: three numbers and a key per row; payloads a thousand at a
    time.
    """
    expected = _expected(outbox, log, group)
    stored: defaultdict[Key, list[StoredEntry]] = defaultdict(list)
    for entry in log.entries_at(group.inserted_at_ms):
        stored[entry.key].append(entry)
    work = _Work(group=group, expected=expected, stored=dict(stored), excuses=excuses)
    work.leave_out_other_events()
    absent = work.compare_entries_of_rows()
    work.explain(absent, {entry.key for entry in entries_of(log, absent)})
    if group.first is None:  # the other senders of these rows are not known here
        work.found.explained[COPIES] += work.found.duplicated.total()
        work.found.duplicated.clear()
    else:
        work.compare_entries_without_rows(*group.first)
    work.found.explained = +work.found.explained  # without the zeros
    return work.found


@dataclass(slots=True, kw_only=True)
class _Expected(SentEvent):
    """One event of a group, and what its entry may hold. The rows of one event can differ."""

    contents: set[tuple[int, int]] = field(default_factory=set)  # fingerprint and content
    pending: bool = False
    marked: bool = False  # by a batch of this group
    copies: int = 0  # that requeues may have added

    @property
    def came_back(self) -> bool:
        """Whether a requeue has sent the event again, and its row still has a mark of this group."""
        return self.again_ms is not None and self.marked

    def allows(self, entry: StoredEntry) -> bool:
        return (entry.fingerprint, entry.content) in self.contents

    def has_row_in(self, pks: PkSet) -> bool:
        return any(pk in pks for pk in self.pks)


def _expected(outbox: Outbox, log: AuditLog, group: InsertGroup) -> dict[Key, _Expected]:
    expected: dict[Key, _Expected] = {}
    version, at_ms = group.version, group.inserted_at_ms
    decode = VERSIONS[version].decode
    normalised = PkSet.union(block.normalised for _, block in group.blocks)
    row_bytes = max(block.row_bytes for _, block in group.blocks)
    stamps = {batch.exported_at_ms for batch, _ in group.blocks} - {None}
    for rows in _batched(outbox.read(group.pks, row_bytes=row_bytes), ROWS_AT_ONCE):
        events = [(row, event) for row in rows if not isinstance(event := decode(row), Undecodable)]
        payloads = [normal_form(row.payload) if row.pk in normalised else row.payload for row, _ in events]
        for (row, event), content in zip(events, _contents(log, version, payloads, at_ms), strict=True):
            # Has a row already where a requeued one had been folded into another one.
            known = expected.setdefault(event.key, _Expected(version=version, key=event.key, inserted_at_ms=at_ms))
            known.pks.append(row.pk)
            if content is not None:
                known.contents.add((event.fingerprint, content))
            known.pending |= row.exported_at_ms is None
            known.marked |= row.exported_at_ms in stamps
    for batch, block in group.blocks:
        if batch.is_requeue(block):
            for known in expected.values():
                if again := sum(pk in block.pks for pk in known.pks):
                    known.copies += again * max(1, batch.attempts)
                    known.again_ms = max(known.again_ms or 0, batch.exported_at_ms or 0)
    return expected


def _contents(log: AuditLog, version: str, payloads: list[bytes], at_ms: int) -> list[int | None]:
    """As `AuditLog.contents`, also where ClickHouse refuses payloads: None for one that it takes in no form. Under pks
    that began again there can be rows that were never sent.
    """
    try:
        return [*log.contents(version, payloads, at_ms)]
    except AuditExportError:
        forms = [_form_that_is_taken(payload) for payload in payloads]
        if forms == payloads:
            raise
    contents = iter(log.contents(version, [form for form in forms if form is not None], at_ms))
    return [None if form is None else next(contents) for form in forms]


def _form_that_is_taken(payload: bytes) -> bytes | None:
    problem = explain(payload)
    if problem is not None and problem.reason == "duplicate_key":
        payload = normal_form(payload)
        problem = explain(payload)
    return payload if problem is None else None


@dataclass(slots=True, kw_only=True)
class _Work:
    """One comparison at work: what is expected and what is stored, by key, and what was found so far."""

    group: InsertGroup
    expected: dict[Key, _Expected]
    stored: dict[Key, list[StoredEntry]]
    excuses: Excuses | None
    found: Comparison = field(default_factory=Comparison)

    @property
    def baseline(self) -> Holding | None:
        """What ClickHouse held here when the group was last compared without a discrepancy; None before."""
        return self.group.first[0].observed.get(self.group.inserted_at_ms) if self.group.first else None

    @property
    def added(self) -> PkSet:
        """Rows that only a requeue sent here: the first export had folded them into another row."""
        return self.group.pks - self.group.first[1].pks if self.group.first else PkSet()

    @property
    def seen(self) -> PkSet:
        """The rows of the expected events."""
        return PkSet.of(sorted(pk for known in self.expected.values() for pk in known.pks))

    def rows_gone(self, block: Block) -> int:
        """Rows of the first export that are gone from the outbox."""
        return max(0, block.rows - sum(known.has_row_in(block.pks) for known in self.expected.values()))

    def leave_out_other_events(self) -> None:
        """Leaves out rows that are other events under this group's pks; the group's own rows are gone from the outbox.

        A row whose event is among the entries is the group's own, and so is one that came back by a requeue. Of the others,
        these are other events: rows that a later batch sent elsewhere; all rows, where the entries are exactly what was
        sealed; and, where there are more entries than rows that are gone, as many of the rows that no batch of this group
        has marked.
        """
        for key in [key for key in self.expected if key not in self.stored]:
            if all(pk in self.group.reused for pk in self.expected[key].pks):
                del self.expected[key]
        if self.group.first is None or self.added:
            return
        absent = [key for key in self.expected if key not in self.stored and not self.expected[key].came_back]
        _, block = self.group.first
        rows, fingerprint = block.rows, block.fingerprint
        if self.baseline is not None and self.baseline.copies == 0:
            rows, fingerprint = self.baseline.rows, self.baseline.fingerprint
        entries = _sum_of(self._one_of_each() or [])
        if (entries.rows, entries.fingerprint) == (rows, fingerprint):
            too_many = len(absent)
        elif len(self.stored) <= rows:
            others = sum(1 for key in self.stored if key not in self.expected)
            too_many = max(0, others - self.rows_gone(block))
            absent = [key for key in absent if not self.expected[key].marked]
        else:
            return
        for key in absent[:too_many]:
            del self.expected[key]

    def compare_entries_of_rows(self) -> list[Key]:
        """Compares the entries of events that the outbox still has; returns the keys without an entry."""
        absent = []
        seen = self.seen
        # Requeued rows that are gone from the outbox left copies too, and may have replaced another row's entry.
        spare = self.group.copies(without=seen)
        replacing = len(self.added - seen)
        for key, known in self.expected.items():
            entries = self.stored.get(key)
            if not entries:
                absent.append(key)
                continue
            if not any(map(known.allows, entries)):
                if replacing:
                    replacing -= 1
                    self.found.explained[REPLACED] += 1
                else:
                    self.found.altered[key] += 1
            spare -= max(0, self._count_copies(key, known.copies + spare) - known.copies)
        return absent

    def _count_copies(self, key: Key, allowed: int) -> int:
        """Counts the copies of an entry: as many as `allowed` are explained, the others duplicated. Returns the explained."""
        copies = len(self.stored[key]) - 1
        explained = min(copies, allowed)
        self.found.explained[COPIES] += explained
        if copies > explained:
            self.found.duplicated[key] += copies - explained
        return explained

    def explain(self, absent: Sequence[Key], elsewhere: Collection[Key]) -> None:
        """Explains entries that are not there, or counts them as missing. `elsewhere` are keys under another `inserted_at`:
        two copies of one event merge into the later one, under its `inserted_at`.
        """
        self.found.explained[MERGED] += len(elsewhere)
        gone = [self.expected[key] for key in absent if key not in elsewhere]
        reasons = self.excuses.explain(gone, by_key=True) if self.excuses else [("", False)] * len(gone)
        for event, (reason, ttl_unknown) in zip(gone, reasons, strict=True):
            if reason or event.pending:
                self.found.explained[reason or PENDING] += 1
            else:
                self.found.missing[event.key] += 1
                self.found.missing_pks += event.pks
                self.found.ttl_unknown += ttl_unknown

    def compare_entries_without_rows(self, batch: Batch, block: Block) -> None:
        """Compares entries whose rows are gone from the outbox: by number, and by sum where nothing else differs."""
        found, baseline, added, seen = self.found, self.baseline, self.added, self.seen
        others = [key for key in self.stored if key not in self.expected]
        gone = self.rows_gone(block)
        room = max(0, self.group.copies(without=PkSet()) - found.explained[COPIES])
        for key in others:
            room -= self._count_copies(key, room)
        allowed = gone + len(added - seen)
        if len(others) > allowed:
            if allowed:
                found.unnamed += Discrepancy(unexpected=len(others) - allowed)
            else:
                found.unexpected.update(others)
        # Entries that an earlier comparison found gone and explained are not expected any more.
        settled = max(0, block.rows - (baseline.rows - baseline.copies)) if baseline else 0
        # The entry of a row that is gone can have the key of an added row that is still there.
        by_added = sum(key in self.stored and not known.has_row_in(block.pks) for key, known in self.expected.items())
        lost = max(0, gone - len(others) - settled - by_added)
        found.explained[RENEWED] += min(lost, len(self.group.renewed - seen))
        lost -= found.explained[RENEWED]
        self._explain_without_rows(batch.version, lost)
        # Entries whose rows are there are compared with them. Of two rows of one event, the added one may have replaced the other.
        same = baseline is not None and baseline.copies == 0 and not added and not found.discrepancy and not lost
        comparable = same and bool(gone or others)
        entries = self._one_of_each() if comparable else None
        if baseline is not None and entries is not None:
            now = _sum_of(entries)
            if now.rows == baseline.rows and now != baseline:
                found.unnamed += Discrepancy(altered=1)

    def _explain_without_rows(self, version: str, lost: int) -> None:
        at_ms = self.group.inserted_at_ms
        past: bool | None = False
        erased = 0
        if self.excuses and lost:
            past = self.excuses.past(version, [at_ms])[at_ms]
            erased = 0 if past else self.excuses.erased_without_rows(at_ms, lost, self._lost_by_workspace())
        self.found.explained[EXPIRED] += lost if past else 0
        self.found.explained[UNPROVABLE] += erased
        missing = 0 if past else lost - erased
        self.found.unnamed += Discrepancy(missing=missing)
        self.found.ttl_unknown += missing if past is None else 0

    def _lost_by_workspace(self) -> dict[str, int] | None:
        """How many entries each workspace can have lost, if the ledger has counts by workspace."""
        if self.baseline is None or not self.baseline.workspaces:
            return None
        held = Counter(key[0] for key in self.stored)
        return {name: rows - held[name] for name, rows in self.baseline.workspaces.items() if rows > held[name]}

    def _one_of_each(self) -> list[StoredEntry] | None:
        """One entry of each key. Of copies that differ, the one that the outbox's row makes; None if that is not unique."""
        chosen = []
        for key, copies in self.stored.items():
            known = self.expected.get(key)
            sound = [copy for copy in copies if known and known.allows(copy)] or copies
            if len({(copy.fingerprint, copy.content) for copy in sound}) > 1:
                return None
            chosen.append(sound[0])
        return chosen


def _sum_of(entries: Sequence[StoredEntry]) -> Holding:
    return Holding(
        rows=len(entries),
        fingerprint=sum(entry.fingerprint for entry in entries) % 2**64,
        content=sum(entry.content for entry in entries) % 2**64,
    )


def _batched(rows: Iterable[StoredRow], size: int) -> Iterator[list[StoredRow]]:
    """Lists of at most `size` rows, shorter where they are large."""
    some: list[StoredRow] = []
    taken = 0
    for row in rows:
        if some and (len(some) == size or taken + len(row.payload) > BYTES_AT_ONCE):
            yield some
            some, taken = [], 0
        some.append(row)
        taken += len(row.payload)
    if some:
        yield some


def entries_of(log: AuditLog, keys: Collection[Key]) -> Iterator[StoredEntry]:
    """Every copy of these keys, under any `inserted_at`; a thousand keys at a time."""
    ordered = list(keys)
    for start in range(0, len(ordered), KEYS_AT_ONCE):
        yield from log.entries_of(ordered[start : start + KEYS_AT_ONCE])


def event_of(row: StoredRow) -> tuple[str, Key] | None:
    """The version and the key of a row's event, if the row decodes as any known version."""
    for version in VERSIONS.values():
        event = version.decode(row)
        if not isinstance(event, Undecodable):
            return version.name, event.key
    return None


def rows_held(outbox: Outbox, log: AuditLog, pks: PkSet) -> Iterator[tuple[StoredRow, tuple[str, Key] | None, bool]]:
    """These rows as they are now, each with its event (`event_of`) and whether ClickHouse holds the event anywhere.

    A row that does not decode is looked up by the ids of its columns alone: another exporter may have sent it.
    """
    for rows in _batched(outbox.read(pks, row_bytes=ROW_BYTES), KEYS_AT_ONCE):
        events = {row.pk: event_of(row) for row in rows}
        held = {entry.key for entry in entries_of(log, {event[1] for event in events.values() if event})}
        ids_held = log.ids_held([(row.workspace_id, row.event_id) for row in rows if not events[row.pk]])
        for row in rows:
            event = events[row.pk]
            yield row, event, event[1] in held if event else (row.workspace_id, row.event_id) in ids_held
