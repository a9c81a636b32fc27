"""The oracle: what must be true of both databases after a history.

It states what holds for every history, in three layers, none of which trusts the one below it.

1. By what the application committed, without the ledger. Each committed event of a known version is in ClickHouse, unless
   other hands deleted or marked its row before it was exported. Each malformed or refused row is an open dead letter, and no
   other row is. No entry is there that was never committed. Counted without FINAL, an event is there at most as often as it
   was committed and its mark was cleared: so once, where neither happened twice. The view shows each event once.
2. By the ledger. ClickHouse holds, under each `inserted_at`, exactly the entries of the blocks that closed batches list there,
   column by column as they were committed: as a multiset, so that one copy more or less is seen. Only a requeue may leave
   more: where its token was forgotten or its rows were released, one copy an attempt, because a requeued block shares its
   `inserted_at` with the first export.
3. The outbox compared with the ledger. No batch is open, none discrepant. Each row of a batch has its mark, or a later
   batch's, or other hands touched it. Each mark is that of a batch that lists the row. The counts of a batch account for each
   claimed row. Rows of unknown versions are as their writer left them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from auditexport_pipeline.core.batch import Batch, State
from auditexport_tests.chaos.application import COLUMNS, FOREIGN_MARK, Book, Key, Row
from auditexport_tests.chaos.rig import Databases

CLOSED = (State.EXPORTED, State.VERIFIED, State.DISCREPANT)
NAMED = 5

# `inserted_at`, and the columns.
Entry = tuple[int, tuple[object, ...]]


@dataclass(slots=True)
class Verdict:
    """What was found. `violations` are sentences with ids and counts."""

    events: int = 0
    entries: int = 0
    dead: int = 0
    lost: int = 0
    duplicated: int = 0
    batches: int = 0
    replayed: int = 0  # batches that took more than one attempt
    forgetful: int = 0  # attempts of requeued batches that nothing can tell from the first one
    month_changed: int = 0  # replayed batches with another month at the write than at the claim
    violations: list[str] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)  # printed with violations


@dataclass(frozen=True, slots=True, kw_only=True)
class Facts:
    """What both databases hold after a history."""

    book: Book
    marks: dict[int, int | None]
    batches: list[Batch]
    claimed_rows: dict[int, int]
    letters: dict[tuple[int, str], str]  # reasons, by pk and event_id: an earlier table can have had the same pk
    stored: Counter[Entry]
    in_view: Counter[Key]
    forgetful: int
    swept_rows: int
    # inserted_at of entries that expired by a TTL that only the row could have told, which is gone too.
    unexplained: set[int] = field(default_factory=set)
    gone: Counter[Entry] = field(default_factory=Counter)  # was there; merges, a TTL or other hands took it
    explained: Collection[str] = ()  # differences of a batch that are true


def judge(databases: Databases, book: Book, *, overflow: bool, swept: bool) -> Verdict:
    """Compares both databases with the book. With `overflow` ClickHouse forgot tokens."""
    sql, clickhouse = databases.direct.sql, databases.direct.clickhouse
    ledger = sql("SELECT batch_id, claimed_rows, swept_rows FROM clickhouse_outbox_batch WHERE batch_id > 0")
    letters = sql(
        "SELECT pk, event_id, reason FROM clickhouse_outbox_dead_letter WHERE state IN ('open', 'discarded', 'held')"
    )
    batches = databases.direct.outbox.batches(sorted(row.batch_id for row in ledger))
    facts = Facts(
        book=book,
        marks={row.pk: row.deleted_at for row in sql("SELECT pk, deleted_at FROM clickhouse_outbox")},
        batches=batches,
        claimed_rows={row.batch_id: row.claimed_rows for row in ledger},
        letters={(row.pk, row.event_id): row.reason for row in letters},
        stored=Counter(
            (int(str(at_ms)), _comparable(columns))
            for at_ms, *columns in clickhouse(f"SELECT inserted_at, {COLUMNS} FROM audit_logs_raw_v1")
        ),
        in_view=Counter(_keys(databases, "audit_logs")),
        forgetful=forgetful_attempts(batches, overflow=overflow),
        swept_rows=sum(row.swept_rows for row in ledger) if swept else 0,
    )
    verdict = verdict_of(facts)
    verdict.month_changed = month_changes(databases)
    return verdict


def forgetful_attempts(batches: list[Batch], *, overflow: bool = False) -> int:
    """Attempts of requeued batches that nothing can tell from the first one: each may have left one more copy.

    ClickHouse forgot a token; or rows were released; or a view failed: it fails for a block under a known token too, and of
    a requeue nothing shows that its copy is there, so that it goes out under another token. So does one that is split after
    a proxy gave up on its INSERT.
    """
    views_fail = any(batch.view_note for batch in batches)
    again = (batch for batch in batches if batch.generation)
    return sum(
        batch.attempts
        for batch in again
        if overflow or batch.counts.released or (batch.attempts > 1 and (views_fail or _was_split(batch)))
    )


def _was_split(batch: Batch) -> bool:
    """Blocks are numbered from 0, and those of a split have new numbers."""
    return [block.number for block in batch.blocks] != [*range(len(batch.blocks))]


def verdict_of(facts: Facts) -> Verdict:
    """What is wrong with these facts."""
    verdict = Verdict(
        events=len({row.key for _, row in facts.book.all_rows() if row.kind == "event"}),
        entries=sum(facts.stored.values()),
        dead=len(facts.letters),
        batches=len(facts.batches),
        replayed=sum(batch.attempts > 1 for batch in facts.batches),
        forgetful=facts.forgetful,
    )
    verdict.violations = [
        *_against_the_application(facts, verdict),
        *_against_the_ledger(facts),
        *_outbox_against_ledger(facts),
    ]
    verdict.ledger = [
        f"batch {batch.batch_id} generation {batch.generation} {batch.state} epoch {batch.epoch} attempts {batch.attempts} "
        f"pks {batch.pks} {batch.counts} blocks {[(block.inserted_at_ms, str(block.pks)) for block in batch.blocks]}"
        for batch in facts.batches
    ]
    return verdict


def _against_the_application(facts: Facts, verdict: Verdict) -> Iterator[str]:
    committed: defaultdict[Key, list[Row]] = defaultdict(list)
    for pk, row in facts.book.all_rows():
        letter = facts.letters.get((pk, row.event_id))
        if row.kind == "event" and row.key is not None:
            may_be_dead = any(content.kind != "event" for content in row.earlier)
            if not (letter and may_be_dead):
                committed[row.key].append(row)
            if letter and not may_be_dead:
                yield f"row {pk} is a sound event and a dead letter: {letter}"
        elif row.kind in ("malformed", "refused") and not row.taken and not row.deleted and not letter:
            yield f"row {pk} is {row.kind}, and neither a dead letter nor held"
        elif row.kind == "unknown" and not row.taken and facts.marks.get(pk, 0) is not None and not row.deleted:
            yield f"row {pk} is of an unknown version and was touched"
    copies: Counter[Key] = Counter()
    for (_, columns), count in facts.stored.items():
        copies[_key_of(columns)] += count
    if unknown := copies.keys() - committed.keys():
        yield f"{len(unknown)} entries of events that were never committed: {_named(unknown)}"
    there = copies.keys() | {_key_of(columns) for _, columns in facts.gone}
    lost = {key for key, rows in committed.items() if key not in there and not all(row.taken for row in rows)}
    if lost:
        yield f"{len(lost)} events are lost: {_named(lost)}"
    surplus: Counter[Key] = Counter()
    for key, rows in committed.items():
        again = sum(row.cleared + row.requeued for row in rows)
        surplus[key] = copies[key] - len(rows) - again - (facts.forgetful if again else 0)
    surplus = +surplus
    if surplus:
        yield f"{len(surplus)} events are there {surplus.total()} times too often: {_named(surplus)}"
    verdict.lost, verdict.duplicated = len(lost), surplus.total()
    twice = sum(count > 1 for count in facts.in_view.values())
    if twice or facts.in_view.keys() != copies.keys():
        yield f"the view shows {twice} events twice and {len(copies.keys() - facts.in_view.keys())} not at all"


def _against_the_ledger(facts: Facts) -> Iterator[str]:
    expected: Counter[Entry] = Counter()
    requeued: set[Entry] = set()
    closed = [batch for batch in facts.batches if batch.state in CLOSED]
    listed = [
        (batch.batch_id, block.inserted_at_ms, pk) for batch in closed for block in batch.blocks for pk in block.pks
    ]
    there = facts.stored + facts.gone
    for batch_id, inserted_at_ms, pk in listed:
        rows = facts.book.at(pk)
        # Where several tables had this pk, the entry shows whose row was sealed.
        entries = {
            (inserted_at_ms, _comparable(content.columns)): row
            for row in rows
            for content in row.contents
            if content.kind == "event"
        }
        if not entries:
            yield f"batch {batch_id} sent row {pk}, which is {rows[0].kind if rows else 'not committed'}"
            continue
        entry = next((one for one in entries if there[one] > expected[one]), next(iter(entries)))
        expected[entry] += 1
        if entries[entry].cleared or entries[entry].requeued:  # whatever the row held when a copy went out
            requeued |= {one for one, row in entries.items() if row is entries[entry]}
    missing, surplus = expected - facts.stored - facts.gone, facts.stored - expected
    for entry in requeued:
        surplus[entry] -= facts.forgetful
    surplus = +surplus
    if missing:
        yield f"{missing.total()} entries that the ledger lists are not there as committed: {_entries(missing)}"
    if surplus:
        yield f"{surplus.total()} entries are there that the ledger does not list: {_entries(surplus)}"


def _outbox_against_ledger(facts: Facts) -> Iterator[str]:
    listed: defaultdict[int, set[int]] = defaultdict(set)  # the marks of the batches that list a pk
    for batch in facts.batches:
        counts, claimed = batch.counts, facts.claimed_rows[batch.batch_id]
        unexplained = facts.unexplained & {block.inserted_at_ms for block in batch.blocks}
        known = batch.last_error in facts.explained or (batch.state is State.DISCREPANT and unexplained)
        if batch.state is not State.VERIFIED and not known:
            yield f"batch {batch.batch_id} is {batch.state}, not verified: {batch.last_error}"
        gone = counts.dead + counts.released + counts.vanished + counts.elsewhere - counts.unmarked
        if batch.state in CLOSED and claimed != batch.rows + gone:
            yield f"batch {batch.batch_id} claimed {claimed} rows, accounts for {batch.rows} + {gone}"
        touched = sum(any(row.touched for row in facts.book.at(pk)) for pk in batch.pks)
        if counts.unmarked > touched:
            yield f"batch {batch.batch_id} left {counts.unmarked} rows unmarked, and other hands touched {touched}"
        for pk in batch.pks:
            listed[pk].add(batch.exported_at_ms or 0)
    gone = 0
    for pk, marks in listed.items():
        row, mark = facts.book.rows.get(pk), facts.marks.get(pk)
        if any(pk in table for table in facts.book.past) and mark is None:
            continue  # the batch was of an earlier table
        if row is None:
            yield f"row {pk} is in a batch and was never committed"
        elif pk not in facts.marks:
            gone += not row.deleted
        elif mark not in marks and not (mark == FOREIGN_MARK and (row.taken or row.cleared)):
            yield f"row {pk} has the mark {mark}, and those of its batches are {sorted(marks)}"
    if gone > facts.swept_rows:
        yield f"{gone} rows are gone that no other hand deleted, and sweeps account for {facts.swept_rows}"
    for pk, mark in facts.marks.items():
        row = facts.book.rows.get(pk)
        if mark is not None and mark != FOREIGN_MARK and mark not in listed[pk]:
            yield f"row {pk} has the mark {mark}, and no batch that lists it has"
        if mark is None and row is not None and row.kind == "event" and (pk, row.event_id) not in facts.letters:
            yield f"row {pk} is pending in the end"


def never_exported(databases: Databases, book: Book) -> set[int]:
    """Rows that other hands marked before they were exported or set aside: those that a reconciliation must name."""
    sql = databases.direct.sql
    stored = set(_keys(databases, "audit_logs_raw_v1"))
    set_aside = {row.pk for row in sql("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state != 'retried'")}
    marked = {row.pk for row in sql("SELECT pk FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")}
    rows = {pk: book.rows[pk] for pk in marked - set_aside}
    return {pk for pk, row in rows.items() if row.kind != "unknown" and row.key not in stored}


def _keys(databases: Databases, table: str) -> list[Key]:
    """The key of each entry, with repetitions."""
    found = databases.direct.clickhouse(f"SELECT workspace_id, bucket, time, event_id FROM {table}")
    return [(str(row[0]), str(row[1]), int(str(row[2])), str(row[3])) for row in found]


def _key_of(columns: tuple[object, ...]) -> Key:
    return (str(columns[2]), str(columns[3]), int(str(columns[1])), str(columns[0]))


def _comparable(columns: Iterable[object]) -> tuple[object, ...]:
    """Entries compare as values; metas as JSON, whose keys have no order."""
    *values, meta = columns
    return (
        *(tuple(value) if isinstance(value, (list, tuple)) else value for value in values),
        json.dumps(json.loads(str(meta)), sort_keys=True),
    )


def _named(keys: Collection[Key]) -> str:
    names = sorted(f"{key[0]}/{key[3]}" for key in keys)
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


def _entries(entries: Counter[Entry]) -> str:
    names = [f"{columns[0]} at {at_ms} × {count}" for (at_ms, columns), count in sorted(entries.items(), key=str)]
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


def month_changes(databases: Databases) -> int:
    """Batches that were claimed in one month and written in another, after more than one attempt."""
    found = databases.direct.sql(
        "SELECT inserted_at_ms, written_at_ms FROM clickhouse_outbox_batch "
        "WHERE batch_id > 0 AND attempts > 1 AND written_at_ms IS NOT NULL"
    )
    return sum(_month(row.inserted_at_ms) != _month(row.written_at_ms) for row in found)


def _month(at_ms: int) -> str:
    return f"{datetime.fromtimestamp(at_ms / 1000, timezone.utc):%Y-%m}"
