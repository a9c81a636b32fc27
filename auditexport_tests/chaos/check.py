"""The oracle: what must be true of both databases once the dust has settled.

What belongs here: the tightest statements that hold for every history, in three layers, none of which trusts the
one below it. What does not: how the history came about.

1. By what the application committed, the ledger not asked. Every committed event of a known version is in ClickHouse,
   unless others deleted or marked its row before it was exported; what is malformed or refused is an open dead letter,
   and nothing else is. Nothing is there that was never committed. Counted without FINAL, an event is there at most as
   often as it was committed and its mark was taken off again; so once, where neither happened twice. The view shows
   each event once.
2. By the ledger. ClickHouse holds, under each `inserted_at`, exactly the entries of the blocks that closed batches
   list there, column by column as they were committed: as a multiset, so that a copy more or less is seen.
   Only a requeue may leave more: where its token was forgotten or its rows were given back, one copy an attempt,
   because a requeued block shares its `inserted_at` with the first export and looking first cannot tell.
3. The outbox against the ledger. No batch is open, none discrepant. Each row of a batch bears its stamp, or a later
   batch's, or others deleted, marked or cleared it; each stamp is that of a batch that lists the row. Every claimed
   row is accounted for in the counts. Rows of unknown versions are as their writer left them.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import datetime, timezone

from auditexport_pipeline.core.batch import Batch, State
from auditexport_tests.chaos.application import COLUMNS, FOREIGN_MARK, Book, Key, Row
from auditexport_tests.chaos.rig import Databases

CLOSED = (State.EXPORTED, State.VERIFIED, State.DISCREPANT)
NAMED = 5


@dataclass(slots=True)
class Verdict:
    """What was found; `violations` are sentences with ids and counts, empty when all is well."""

    events: int = 0
    entries: int = 0
    dead: int = 0
    lost: int = 0
    duplicated: int = 0
    batches: int = 0
    replayed: int = 0  # batches that took more than one attempt
    swept: int = 0  # rows
    forgetful: int = 0  # replays that could not be told from a first attempt
    month_changed: int = 0  # of those, with the month changing between claim and write
    violations: list[str] = field(default_factory=list)
    ledger: list[str] = field(default_factory=list)  # for a violation's dump


@dataclass(frozen=True, slots=True, kw_only=True)
class _Facts:
    rows: dict[int, Row]
    book: Book
    marks: dict[int, int | None]
    batches: list[Batch]
    claimed_rows: dict[int, int]
    letters: dict[tuple[int, str], str]  # reasons, by pk and event_id: a letter of an earlier table is not this row's
    stored: Counter[tuple[int, tuple[object, ...]]]
    overflow: bool
    swept_rows: int


def judge(databases: Databases, book: Book, *, overflow: bool, swept: bool) -> Verdict:
    """Reads both databases and holds them against the book. With `overflow` ClickHouse forgot tokens."""
    found = databases.sql("SELECT batch_id, claimed_rows, swept_rows FROM clickhouse_outbox_batch WHERE batch_id > 0")
    facts = _Facts(
        rows=book.rows,
        book=book,
        marks={
            int(str(row.pk)): row.deleted_at for row in databases.sql("SELECT pk, deleted_at FROM clickhouse_outbox")
        },
        batches=databases.outbox.batches(sorted(int(str(row.batch_id)) for row in found)),
        claimed_rows={row.batch_id: row.claimed_rows for row in found},
        letters={
            (row.pk, row.event_id): row.reason
            for row in databases.sql(
                "SELECT pk, event_id, reason FROM clickhouse_outbox_dead_letter WHERE state IN ('open', 'discarded', 'held')"
            )
        },
        stored=Counter(
            (int(str(at_ms)), _comparable(columns))
            for at_ms, *columns in databases.clickhouse(f"SELECT inserted_at, {COLUMNS} FROM audit_logs_raw_v1")
        ),
        overflow=overflow,
        swept_rows=sum(row.swept_rows for row in found) if swept else 0,
    )
    verdict = Verdict(
        events=len({row.key for _, row in book.all_rows() if row.kind == "event"}),
        entries=sum(facts.stored.values()),
        dead=len(facts.letters),
        batches=len(facts.batches),
        replayed=sum(batch.attempts > 1 for batch in facts.batches),
        month_changed=month_changes(databases),
        swept=facts.swept_rows,
        forgetful=_forgetful_attempts(facts),
    )
    in_view = Counter(
        (str(row[0]), str(row[1]), int(str(row[2])), str(row[3]))
        for row in databases.clickhouse("SELECT workspace_id, bucket, time, event_id FROM audit_logs")
    )
    verdict.violations = [
        *_against_the_application(facts, in_view, verdict),
        *_against_the_ledger(facts),
        *_outbox_against_ledger(facts),
    ]
    if verdict.violations:
        verdict.ledger = [
            f"batch {batch.batch_id} generation {batch.generation} {batch.state} epoch {batch.epoch} attempts {batch.attempts} "
            f"pks {batch.pks} {batch.counts} blocks {[(block.inserted_at_ms, str(block.pks)) for block in batch.blocks]}"
            for batch in facts.batches
        ]
    return verdict


def _against_the_application(facts: _Facts, in_view: Counter[Key], verdict: Verdict) -> Iterator[str]:
    committed: defaultdict[Key, list[Row]] = defaultdict(list)
    for pk, row in facts.book.all_rows():
        letter = facts.letters.get((pk, row.event_id))
        if row.kind == "event" and row.key is not None:
            committed[row.key].append(row)
            if letter:
                yield f"row {pk} is a sound event and a dead letter: {letter}"
        elif row.kind in ("malformed", "refused") and not row.taken and not row.deleted and not letter:
            yield f"row {pk} is {row.kind}, and neither a dead letter nor held"
        elif row.kind == "unknown" and not row.taken and facts.marks.get(pk, 0) is not None and not row.deleted:
            yield f"row {pk} is of an unknown version and was touched"
    copies: Counter[Key] = Counter()
    for (_, columns), count in facts.stored.items():
        copies[(str(columns[2]), str(columns[3]), int(str(columns[1])), str(columns[0]))] += count
    unknown = copies.keys() - committed.keys()
    if unknown:
        yield f"{len(unknown)} entries of events that were never committed: {_named(unknown)}"
    lost = {key for key, rows in committed.items() if not copies[key] and not all(row.taken for row in rows)}
    attempts = _forgetful_attempts(facts)
    duplicated = {
        key: count - allowed
        for key, count in copies.items()
        if key in committed
        and count
        > (
            allowed := len(committed[key])
            + sum(row.cleared + row.requeued for row in committed[key])
            + (attempts if any(row.cleared or row.requeued for row in committed[key]) else 0)
        )
    }
    verdict.lost, verdict.duplicated = len(lost), sum(duplicated.values())
    if lost:
        yield f"{len(lost)} events are lost: {_named(lost)}"
    if duplicated:
        yield f"{len(duplicated)} events are there {sum(duplicated.values())} times too often: {_named(duplicated.keys())}"
    twice = {key for key, count in in_view.items() if count > 1}
    if twice or in_view.keys() != copies.keys():
        yield f"the view shows {len(twice)} events twice and {len(copies.keys() - in_view.keys())} not at all"


def _forgetful_attempts(facts: _Facts) -> int:
    """Replays of requeued batches that nothing but a token could have told from the first attempt, and it could not."""
    return sum(
        batch.attempts for batch in facts.batches if batch.generation and (facts.overflow or batch.counts.released)
    )


def _against_the_ledger(facts: _Facts) -> Iterator[str]:
    expected: Counter[tuple[int, tuple[object, ...]]] = Counter()
    requeued: set[tuple[int, tuple[object, ...]]] = set()
    for batch in facts.batches:
        if batch.state not in CLOSED:
            continue
        for block in batch.blocks:
            for pk in block.pks:
                rows = [table[pk] for table in (facts.rows, *facts.book.past) if pk in table]
                sound = [row for row in rows if row.kind == "event"]
                if not sound:
                    yield f"batch {batch.batch_id} sent row {pk}, which is {rows[0].kind if rows else 'not committed'}"
                    continue
                # Of several tables whose pks began again, the one whose row was sealed is known by what was sent.
                entries = {(block.inserted_at_ms, _comparable(row.columns)): row for row in sound}
                entry = next((one for one in entries if facts.stored[one] > expected[one]), next(iter(entries)))
                row = entries[entry]
                expected[entry] += 1
                if row.cleared or row.requeued:
                    requeued.add(entry)
    missing, surplus = expected - facts.stored, facts.stored - expected
    slack = _forgetful_attempts(facts)
    surplus = Counter({entry: count for entry, count in surplus.items() if entry not in requeued or count > slack})
    if missing:
        yield f"{missing.total()} entries that the ledger lists are not there as committed: {_entries(missing)}"
    if surplus:
        yield f"{surplus.total()} entries are there that the ledger does not list: {_entries(surplus)}"


def _outbox_against_ledger(facts: _Facts) -> Iterator[str]:
    listed: defaultdict[int, set[int]] = defaultdict(set)  # stamps, by pk
    for batch in facts.batches:
        counts = batch.counts
        if batch.state is not State.VERIFIED:
            yield f"batch {batch.batch_id} is {batch.state}, not verified: {batch.last_error}"
        before_the_seal = counts.vanished + counts.elsewhere - counts.unmarked
        gone = counts.dead + counts.released + before_the_seal
        if batch.state in CLOSED and facts.claimed_rows[batch.batch_id] != batch.rows + gone:
            yield f"batch {batch.batch_id} claimed {facts.claimed_rows[batch.batch_id]} rows, accounts for {batch.rows} + {gone}"
        touched = sum(
            1
            for pk in batch.pks
            if any(
                row.taken or row.deleted or row.cleared or row.requeued
                for table in (facts.rows, *facts.book.past)
                if (row := table.get(pk))
            )
        )
        if counts.unmarked > touched:
            yield f"batch {batch.batch_id} left {counts.unmarked} rows unmarked, and others touched {touched}"
        for pk in batch.pks:
            listed[pk].add(batch.exported_at_ms or 0)
    gone = 0
    for pk, stamps in listed.items():
        row = facts.rows.get(pk)
        if any(pk in table for table in facts.book.past) and facts.marks.get(pk) is None:
            continue  # the batch was of an earlier table
        if row is None:
            yield f"row {pk} is in a batch and was never committed"
        elif pk not in facts.marks:
            gone += not row.deleted
        elif facts.marks[pk] not in stamps and not (facts.marks[pk] == FOREIGN_MARK and row.taken | bool(row.cleared)):
            yield f"row {pk} bears {facts.marks[pk]}, and its batches' stamps are {sorted(stamps)}"
    if gone > facts.swept_rows:
        yield f"{gone} rows are gone that nobody deleted, and sweeps account for {facts.swept_rows}"
    for pk, mark in facts.marks.items():
        row = facts.rows.get(pk)
        if mark is not None and mark != FOREIGN_MARK and mark not in listed[pk]:
            yield f"row {pk} bears {mark}, which no batch that lists it gave"
        if mark is None and row is not None and row.kind == "event":
            yield f"row {pk} is pending in the end"


def never_exported(databases: Databases, book: Book) -> set[int]:
    """Rows that somebody marked before they were exported or set aside, as the book knows them: what a reconciliation
    must name.
    """
    stored = {
        (str(row[0]), str(row[1]), int(str(row[2])), str(row[3]))
        for row in databases.clickhouse("SELECT workspace_id, bucket, time, event_id FROM audit_logs_raw_v1")
    }
    set_aside = {
        row.pk for row in databases.sql("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state != 'retried'")
    }
    marked = {row.pk for row in databases.sql("SELECT pk FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")}
    return {
        pk
        for pk in marked - set_aside
        if book.rows[pk].kind in ("malformed", "refused")
        or (book.rows[pk].kind == "event" and book.rows[pk].key not in stored)
    }


def _comparable(columns: object) -> tuple[object, ...]:
    """Entries compare as values; metas as JSON, whose keys have no order."""
    *values, meta = columns  # type: ignore[misc]
    return (
        *(tuple(value) if isinstance(value, (list, tuple)) else value for value in values),
        json.dumps(json.loads(str(meta)), sort_keys=True),
    )


def _named(keys: object) -> str:
    names = sorted(f"{key[0]}/{key[3]}" for key in keys)  # type: ignore[attr-defined]
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


def _entries(entries: Counter[tuple[int, tuple[object, ...]]]) -> str:
    names = [f"{columns[0]} at {at_ms} × {count}" for (at_ms, columns), count in sorted(entries.items(), key=str)]
    return ", ".join(names[:NAMED]) + (" …" if len(names) > NAMED else "")


def month_changes(databases: Databases) -> int:
    """Batches that were claimed in one month and written in another, after more than one attempt."""
    found = databases.sql(
        "SELECT inserted_at_ms, written_at_ms FROM clickhouse_outbox_batch "
        "WHERE batch_id > 0 AND attempts > 1 AND written_at_ms IS NOT NULL"
    )
    return sum(_month(row.inserted_at_ms) != _month(row.written_at_ms) for row in found)


def _month(at_ms: int) -> tuple[int, int]:
    at = datetime.fromtimestamp(at_ms / 1000, timezone.utc)
    return at.year, at.month
