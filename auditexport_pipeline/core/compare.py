"""Comparing what was sent under one `inserted_at` with what ClickHouse holds there, entry by entry.

What belongs here: the expected entries, read again from the outbox, and what a difference means. What does
not: which batches are compared, and when (`core.verify` right after an export, `core.reconcile` later).

An entry is expected by its key (workspace_id, bucket, time, event_id). Two values are compared: its fingerprint,
which Python computes from the payload, and its content, a hash over every column, metas included. ClickHouse computes
the content once from what it stores, and once from the payload through the same parser.

Entries can be gone for good reasons: the merge of two copies of one event (the outbox held it
twice, or it was requeued), the table's TTL, and a recorded erasure. A requeue adds copies under the
same `inserted_at`, until they merge. Any other difference is a discrepancy.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace

from auditexport_pipeline.core.batch import Batch, Block, Holding, pks_of
from auditexport_pipeline.core.event import Key, Undecodable, normal_form
from auditexport_pipeline.core.excuses import Excuses
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import NAMED_EVENTS, AuditLog, Discrepancy, Outbox, StoredEntry, StoredRow
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

    @property
    def added(self) -> PkSet:
        """Rows that only a requeue sent here: the first export had folded them into another row."""
        assert self.first is not None
        return self.pks - self.first[1].pks

    @property
    def surplus(self) -> int:
        """How many additional copies requeues and their replays may have left here; merges remove them."""
        return self.surplus_of_all_but(PkSet())

    def surplus_of_all_but(self, pks: PkSet) -> int:
        """The same, without the copies of these rows."""
        return sum(
            len(block.pks - pks) * max(1, batch.attempts) for batch, block in self.blocks if batch.is_requeue(block)
        )

    @property
    def baseline(self) -> Holding | None:
        """What ClickHouse held here when the group was last compared without a discrepancy; None before."""
        return self.first[0].observed.get(self.inserted_at_ms) if self.first else None


def insert_groups_of(batches: Collection[Batch]) -> list[InsertGroup]:
    """The groups of these batches, by ascending `inserted_at`; requeues join the group of the first export, also with
    the blocks that they gave back.
    """
    by_time: dict[int, list[tuple[Batch, Block]]] = {}
    sent = [
        (batch, block)
        for batch in sorted(batches, key=lambda batch: batch.batch_id)
        for block in (*batch.blocks, *batch.given_back)
    ]
    for batch, block in sent:
        by_time.setdefault(block.inserted_at_ms, []).append((batch, block))
    groups = [InsertGroup(inserted_at_ms=at_ms, blocks=tuple(parts)) for at_ms, parts in sorted(by_time.items())]
    if len(pks_of([block for _, block in sent])) == sum(len(group.pks) for group in groups):
        return groups  # no pk is in two groups
    return [_with_successors(group, sent) for group in groups]


def _with_successors(group: InsertGroup, sent: Sequence[tuple[Batch, Block]]) -> InsertGroup:
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


@dataclass(slots=True, kw_only=True)
class Comparison:
    """The result of comparing one group, by key; after the blank line, what was explained.

    `unnamed_…` are entries whose outbox rows are gone: only their number is known.
    """

    missing: dict[Key, tuple[int, ...]] = field(default_factory=dict)  # with the pks of their outbox rows
    altered: list[Key] = field(default_factory=list)
    duplicated: dict[Key, int] = field(default_factory=dict)  # surplus copies
    unexpected: list[Key] = field(default_factory=list)
    unnamed_missing: int = 0
    unnamed_altered: int = 0
    unnamed_unexpected: int = 0

    superseded: int = 0  # merged into another copy of the same event
    replaced: int = 0  # by the entry of another row of the same event, which was requeued and is gone from the outbox
    erased: int = 0
    expired: int = 0
    unmerged: int = 0  # copies that a requeue added
    renewed: int = 0  # sent again as new: nothing proved that they were the same events
    requeued: int = 0  # not there, and pending again
    unprovable: int = 0  # gone since an erasure was recorded, and from the outbox too
    ttl_unknown: int = 0  # of the missing: those that may be past a TTL that cannot be evaluated

    @property
    def explained(self) -> dict[str, int]:
        """What was explained, in entries, in words; without the zeros."""
        counts = {
            "merged into another copy": self.superseded,
            "replaced by a requeued row of the same event": self.replaced,
            "erased on record": self.erased,
            "past the TTL": self.expired,
            "copies of a requeue": self.unmerged,
            "exported again as new": self.renewed,
            "requeued and pending": self.requeued,
            "gone since an erasure, unprovable": self.unprovable,
        }
        return {name: count for name, count in counts.items() if count}

    @property
    def discrepancy(self) -> Discrepancy:
        named = [*self.missing, *self.altered, *self.duplicated, *self.unexpected]
        return Discrepancy(
            missing=len(self.missing) + self.unnamed_missing,
            altered=len(self.altered) + self.unnamed_altered,
            duplicated=sum(self.duplicated.values()),
            unexpected=len(self.unexpected) + self.unnamed_unexpected,
            event_ids=tuple(key[3] for key in named[:NAMED_EVENTS]),
        )


@dataclass(slots=True)
class _Expected:
    """One event of a group: its rows, and what its entry may hold. Rows of one event can differ."""

    pks: list[int] = field(default_factory=list)
    again_ms: int | None = None  # the last export of one of them, if that was a requeue
    held: set[tuple[int, int]] = field(default_factory=set)  # fingerprint and content
    pending: bool = False
    marked: bool = False  # by a batch of this group
    surplus: int = 0


def insert_group_at(outbox: Outbox, batch: Batch, block: Block) -> InsertGroup:
    """The group of a batch's block, with the requeues of its rows that have sent something by now."""
    sent = outbox.sent_over(batch.pks.first, batch.pks.last) if batch.pks else []
    others = [other for other in sent if other.batch_id != batch.batch_id]
    group = next(group for group in insert_groups_of([batch, *others]) if group.inserted_at_ms == block.inserted_at_ms)
    return replace(
        group,
        blocks=tuple(
            (other, part) for other, part in group.blocks if other.batch_id == batch.batch_id or other.is_requeue(part)
        ),
    )


def pks_still_of(outbox: Outbox, batch: Batch) -> PkSet:
    """The rows of a batch, without the pks that a later batch exported as new for other events."""
    sent = outbox.sent_over(batch.pks.first, batch.pks.last) if batch.pks else []
    later = [block for other in sent if other.batch_id > batch.batch_id for block in other.first_blocks]
    return batch.pks - (pks_of(later) - PkSet.union(block.renewed for block in later))


def compare_at_rest(
    outbox: Outbox,
    log: AuditLog,
    batch: Batch,
    block: Block,
    *,
    excuses: Excuses | None = None,
) -> Comparison:
    """As `compare`, for the group of a first export. A requeue that arrives while entries are read is no discrepancy: when
    something differs, the comparison is repeated until nobody has sent anything to the group meanwhile.
    """
    group = insert_group_at(outbox, batch, block)
    while True:
        found = compare(outbox, log, group, excuses=excuses)
        before, group = group, insert_group_at(outbox, batch, block)
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
    found = Comparison()
    _leave_out_others(group, expected, stored)
    seen = PkSet.of(sorted(pk for known in expected.values() for pk in known.pks))
    _compare_expected(log, group, expected, seen, stored, excuses, found)
    if group.first is None:  # the other senders of these rows are not known here
        found.unmerged += sum(found.duplicated.values())
        found.duplicated.clear()
    else:
        _compare_rest(group, expected, seen, stored, excuses, found)
    return found


def _expected(outbox: Outbox, log: AuditLog, group: InsertGroup) -> dict[Key, _Expected]:
    expected: defaultdict[Key, _Expected] = defaultdict(_Expected)
    decode = VERSIONS[group.version].decode
    normalised = PkSet.union(block.normalised for _, block in group.blocks)
    row_bytes = max(block.row_bytes for _, block in group.blocks)
    stamps = {batch.exported_at_ms for batch, _ in group.blocks} - {None}
    for rows in _batched(outbox.read(group.pks, row_bytes=row_bytes), ROWS_AT_ONCE):
        events = [(row, event) for row in rows if not isinstance(event := decode(row), Undecodable)]
        payloads = [normal_form(row.payload) if row.pk in normalised else row.payload for row, _ in events]
        contents = log.contents(group.version, payloads, group.inserted_at_ms)
        for (row, event), content in zip(events, contents, strict=True):
            known = expected[event.key]  # has a row already where a requeued one had been folded into another one
            known.pks.append(row.pk)
            known.held.add((event.fingerprint, content))
            known.pending |= row.exported_at_ms is None
            known.marked |= row.exported_at_ms in stamps
    for batch, block in group.blocks:
        if batch.is_requeue(block):
            for known in expected.values():
                again = [pk for pk in known.pks if pk in block.pks]
                known.surplus += len(again) * max(1, batch.attempts)
                if again:
                    known.again_ms = max(known.again_ms or 0, batch.exported_at_ms or 0)
    return expected


def _leave_out_others(group: InsertGroup, expected: dict[Key, _Expected], stored: dict[Key, list[StoredEntry]]) -> None:
    """Leaves out rows that are other events under this group's pks; the group's own rows are gone from the outbox.

    A row whose event is among the entries is the group's own. Of the others, these are other events: rows that a later
    batch sent elsewhere; all rows, where the entries are exactly what was sealed; and, where there are more entries than
    rows that are gone, as many of the rows that no batch of this group has marked.
    """
    absent = [key for key in expected if key not in stored]
    for key in absent:
        if all(pk in group.reused for pk in expected[key].pks):
            del expected[key]
    if group.first is None or group.added:
        return
    absent = [key for key in absent if key in expected]
    _, block = group.first
    baseline = group.baseline
    whole = baseline if baseline is not None and baseline.copies == 0 else None
    rows, fingerprint = (whole.rows, whole.fingerprint) if whole else (block.rows, block.fingerprint)
    entries = _one_of_each(stored, expected) or []
    others = sum(1 for key in stored if key not in expected)
    if (len(entries), sum(entry.fingerprint for entry in entries) % 2**64) == (rows, fingerprint):
        too_many = len(absent)
    elif len(stored) <= rows:
        gone = max(0, block.rows - sum(any(pk in block.pks for pk in known.pks) for known in expected.values()))
        too_many = max(0, others - gone)
        absent = [key for key in absent if not expected[key].marked]
    else:
        return
    for key in absent[:too_many]:
        del expected[key]


def _batched(rows: Iterator[StoredRow], size: int) -> Iterator[list[StoredRow]]:
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


def _compare_expected(
    log: AuditLog,
    group: InsertGroup,
    expected: dict[Key, _Expected],
    seen: PkSet,
    stored: dict[Key, list[StoredEntry]],
    excuses: Excuses | None,
    found: Comparison,
) -> None:
    absent = []
    # Requeued rows that are gone from the outbox left copies too, and may have replaced another row's entry.
    spare = group.surplus_of_all_but(seen)
    replacing = len(group.added - seen) if group.first else 0
    for key, known in expected.items():
        copies = stored.get(key)
        if not copies:
            absent.append(key)
            continue
        if not any((copy.fingerprint, copy.content) in known.held for copy in copies):
            if replacing:
                replacing -= 1
                found.replaced += 1
            else:
                found.altered.append(key)
        unmerged = min(len(copies) - 1, known.surplus + spare)
        spare -= max(0, unmerged - known.surplus)
        found.unmerged += unmerged
        if len(copies) - 1 > unmerged:
            found.duplicated[key] = len(copies) - 1 - unmerged
    # Two copies of one event merge into the later one, under its `inserted_at`.
    elsewhere = {entry.key for entry in entries_of(log, absent)}
    found.superseded += len(elsewhere)
    gone = []
    for key in absent:
        if key in elsewhere:
            continue
        known = expected[key]
        if excuses and excuses.erased(key, known.pks, inserted_at_ms=group.inserted_at_ms, again_ms=known.again_ms):
            found.erased += 1
        else:
            gone.append(key)
    past = excuses.past_of(group.version, group.inserted_at_ms, gone) if excuses else {}
    for key in gone:
        if past.get(key):
            found.expired += 1
        elif expected[key].pending:
            found.requeued += 1
        else:
            found.missing[key] = tuple(expected[key].pks)
            found.ttl_unknown += int(key in past and past[key] is None)


def _compare_rest(
    group: InsertGroup,
    expected: dict[Key, _Expected],
    seen: PkSet,
    stored: dict[Key, list[StoredEntry]],
    excuses: Excuses | None,
    found: Comparison,
) -> None:
    """Compares entries whose rows are gone from the outbox: by number, and by sum where nothing else differs."""
    assert group.first is not None
    _, block = group.first
    baseline = group.baseline
    others = [key for key in stored if key not in expected]
    # Entries that an earlier comparison found gone and explained are not expected any more.
    settled = max(0, block.rows - (baseline.rows - baseline.copies)) if baseline else 0
    own = sum(any(pk in block.pks for pk in known.pks) for known in expected.values())
    gone = max(0, block.rows - own)
    added = group.added
    added_gone = len(added - seen)
    room = max(0, group.surplus - found.unmerged)
    for key in others:
        copies = len(stored[key]) - 1
        unmerged = min(copies, room)
        room -= unmerged
        found.unmerged += unmerged
        if copies > unmerged:
            found.duplicated[key] = copies - unmerged
    if len(others) > gone + added_gone:
        if gone + added_gone:
            found.unnamed_unexpected += len(others) - gone - added_gone
        else:
            found.unexpected.extend(others)
    # The entry of a row that is gone can have the key of an added row that is still there.
    by_added = sum(key in stored and not any(pk in block.pks for pk in known.pks) for key, known in expected.items())
    lost = max(0, gone - len(others) - settled - by_added)
    found.renewed = min(lost, len(group.renewed - seen))
    lost -= found.renewed
    past = excuses.past(group.version, [group.inserted_at_ms])[group.inserted_at_ms] if excuses and lost else False
    if past:
        found.expired += lost
    else:
        erased = (
            excuses.erased_unseen(group.inserted_at_ms, lost, _lost_of(baseline, stored)) if excuses and lost else 0
        )
        found.unprovable += erased
        found.unnamed_missing += lost - erased
        found.ttl_unknown += (lost - erased) * int(past is None)
    # Of two rows of one event, the added one may have replaced the other.
    comparable = baseline is not None and baseline.copies == 0 and not added and not found.discrepancy
    entries = _one_of_each(stored, expected) if comparable and not lost else None
    if baseline is not None and entries is not None:
        now = Holding(
            rows=len(entries),
            fingerprint=sum(entry.fingerprint for entry in entries) % 2**64,
            content=sum(entry.content for entry in entries) % 2**64,
        )
        if now.rows == baseline.rows and now != baseline:
            found.unnamed_altered += 1


def _lost_of(baseline: Holding | None, stored: dict[Key, list[StoredEntry]]) -> dict[str, int] | None:
    """How many entries each workspace can have lost, if the ledger has counts by workspace."""
    if baseline is None or not baseline.workspaces:
        return None
    held = Counter(key[0] for key in stored)
    return {name: rows - held[name] for name, rows in baseline.workspaces.items() if rows > held[name]}


def _one_of_each(stored: dict[Key, list[StoredEntry]], expected: dict[Key, _Expected]) -> list[StoredEntry] | None:
    """One entry of each key. Where unmerged copies differ, the one that the outbox's row makes; None if that is not unique."""
    chosen = []
    for key, copies in stored.items():
        held = expected[key].held if key in expected else set()
        sound = [copy for copy in copies if (copy.fingerprint, copy.content) in held] or copies
        if len({(copy.fingerprint, copy.content) for copy in sound}) > 1:
            return None
        chosen.append(sound[0])
    return chosen


def entries_of(log: AuditLog, keys: Collection[Key]) -> Iterator[StoredEntry]:
    """Every copy of these keys, under any `inserted_at`; a thousand keys at a time."""
    ordered = list(keys)
    for start in range(0, len(ordered), KEYS_AT_ONCE):
        yield from log.entries_of(ordered[start : start + KEYS_AT_ONCE])


def rows_held(outbox: Outbox, log: AuditLog, pks: PkSet) -> Iterator[tuple[StoredRow, bool]]:
    """These rows as they are now, of any known version, each with whether ClickHouse holds its event anywhere.

    A row that does not decode is looked up by the ids of its columns alone: another exporter may have sent it.
    """
    for rows in _batched(outbox.read(pks, row_bytes=ROW_BYTES), KEYS_AT_ONCE):
        keys: dict[int, Key] = {}
        for row in rows:
            events = (version.decode(row) for version in VERSIONS.values())
            event = next((event for event in events if not isinstance(event, Undecodable)), None)
            if event is not None:
                keys[row.pk] = event.key
        held = {entry.key for entry in entries_of(log, set(keys.values()))}
        ids_held = log.ids_held([(row.workspace_id, row.event_id) for row in rows if row.pk not in keys])
        for row in rows:
            key = keys.get(row.pk)
            yield row, key in held if key else (row.workspace_id, row.event_id) in ids_held
