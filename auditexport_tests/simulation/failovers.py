"""What a failover of MySQL that lost commits explains, and what it does not.

It loses the last commits of all tables together, so outbox, ledger and dead letters still fit each other. What cannot fit is
ClickHouse, which has what the lost commits were about:

* entries of events whose rows were lost,
* for each such failover one more copy of each row's event: nothing knows any more that it went out,
* entries of blocks that only a lost commit had sealed,
* entries of a block that only a lost commit had split: they are there under the times of its parts, and the ledger lists them
  under that of the whole,
* entries that were erased, and whose erasure is not on record any more,
* batches that are discrepant because of such copies, and reports that name them,
* a batch that lists rows which were never sent: a lost cut had sent their neighbours under the block's `inserted_at`, and perhaps
  had set them aside. The next run takes the block for written, its verification finds the rows missing, and a repair tries them
  again, unless they are gone or past the TTL.

All else is judged as in any other history: no event is lost, pending, missing or altered, and no mark is there without its batch.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterator

from auditexport_pipeline.core.batch import Block, blocks_from_text
from auditexport_pipeline.core.pks import PkSet
from auditexport_tests.chaos.application import FOREIGN_MARK
from auditexport_tests.chaos.check import Facts
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.world import LEDGER, World

# Lines of `chaos.check` in the place of which `unexplained` has its own.
_INSTEAD = (
    "entries of events that were never committed",
    "times too often",
    "that the ledger does not list",
    "is discrepant, not verified: in ClickHouse: ",
)
_LISTED, _AT = "that the ledger lists are not there as committed", re.compile(r" at (\d+) ×")
_UNSENT = re.compile(
    r"sent row (\d+), which is (?:malformed|refused|unknown)|row (\d+) is (?:malformed|refused), and neither"
)
_UNMARKED = re.compile(r"row (\d+) has the mark None")


def after_failover(world: World) -> None:
    """Corrects the book: rows are gone, rows that were deleted or marked are back, and so are earlier payloads."""
    world.forgot = True
    world.invariants.forget()
    book = world.book
    known = {(pk, row.event_id): row for table in (*book.past, book.rows) for pk, row in table.items()}
    rows = world.mysql.tables[OUTBOX].rows
    inserted = {
        (change.key, change.after["event_id"])
        for commit in world.mysql.commits
        if commit.lost
        for change in commit.changes
        if change.table == OUTBOX and change.before is None and change.after is not None
    }
    there = {pk: known[pk, row["event_id"]] for pk, row in rows.items()}
    deleted = {pk: row for pk, row in book.rows.items() if pk not in rows and (pk, row.event_id) not in inserted}
    book.rows = {**deleted, **there}
    # What an earlier table had is there again where the TRUNCATE is lost, and was never there where its INSERT is.
    book.past = [
        {pk: row for pk, row in table.items() if row is not there.get(pk) and (pk, row.event_id) not in inserted}
        for table in book.past
    ]
    for pk, row in there.items():
        row.deleted = False
        row.taken = rows[pk]["deleted_at"] == FOREIGN_MARK and row.taken
        if row.payload != rows[pk]["payload"]:
            row.becomes(next(one for one in row.earlier if one.payload == rows[pk]["payload"]))


def unexplained(world: World, facts: Facts, violations: list[str]) -> Iterator[str]:
    """The violations that a failover with lost commits does not explain."""
    dead = {pk for pk, _ in facts.letters}
    cut_again = list(_cut_again_in_vain(world))
    cut_times, cut_rows = {block.inserted_at_ms for block in cut_again}, PkSet.union(block.pks for block in cut_again)
    for line in violations:
        unsent, unmarked = _UNSENT.search(line), _UNMARKED.search(line)
        by_lost_cut = unsent is not None and int(unsent[1] or unsent[2]) in cut_rows
        of_dead = unmarked is not None and int(unmarked[1]) in dead
        if _LISTED in line and not line.endswith("…") and cut_times.issuperset(map(int, _AT.findall(line))):
            continue
        if not any(text in line for text in _INSTEAD) and not by_lost_cut and not of_dead:
            yield line
    altered, kept_losses = len(world.altered()), world.kept_losses()
    for batch in facts.batches:
        if str(batch.state) != "discrepant":
            continue
        found = batch.last_error.removeprefix("in ClickHouse: ")
        counts = {kind: int(number) for number, kind in (one.split() for one in found.split(", "))}
        times = {block.inserted_at_ms for block in batch.blocks}
        erased = sum(entry.inserted_at_ms in times for entry in world.gone["erased"])
        lost = len(batch.pks & cut_rows) + sum(kept_losses[at_ms] for at_ms in times)
        expired = sum(entry.inserted_at_ms in times & facts.unexplained for entry in world.clickhouse.expired)
        if counts.get("missing", 0) > erased + lost + expired or counts.get("altered", 0) > altered:
            yield f"batch {batch.batch_id} is discrepant: {found}"
    inserts: Counter[str] = Counter()
    sealed: defaultdict[bool, set[str]] = defaultdict(set)  # digests of blocks, by whether the commit was lost
    for commit in world.mysql.commits:
        for change in commit.changes:
            if change.after is None:
                continue
            if change.table == OUTBOX:
                inserts[change.after["event_id"]] += change.before is None
            elif change.table == LEDGER and change.key:
                sealed[commit.lost] |= {block.get("digest", "") for block in json.loads(change.after["manifest"])}
    again: Counter[str] = Counter()
    for _, row in facts.book.all_rows():
        again[row.event_id] += row.cleared + row.requeued
    copies = Counter(str(columns[0]) for (_, columns), count in facts.stored.items() for _ in range(count))
    for event_id, count in copies.items():
        most = inserts[event_id] * (1 + world.failovers) + again[event_id] + (facts.forgetful if again[event_id] else 0)
        if count > most:
            yield f"event {event_id} is there {count} times, of which {world.failovers} failovers and others explain {most}"
    for block in world.clickhouse.received:
        digest = block.token.split("-")[3]
        if digest not in sealed[False] | sealed[True]:
            yield f"ClickHouse got a block at {block.at_ms} that no commit had sealed"
    lost_times = {block.at_ms for block in world.clickhouse.received if block.token.split("-")[3] in sealed[True]}
    listed = {block.inserted_at_ms for batch in facts.batches for block in (*batch.blocks, *batch.given_back)}
    if stray := {at_ms for at_ms, _ in facts.stored} - lost_times - listed:
        yield f"ClickHouse has entries at {sorted(stray)}, which no batch of the ledger has, and no lost commit had"


def _cut_again_in_vain(world: World) -> Iterator[Block]:
    """Each block that only a lost commit cut again."""
    for commit in world.mysql.commits:
        for change in commit.changes if commit.lost else ():
            if change.table == LEDGER and change.before is not None and change.after is not None:
                kept = {(block.inserted_at_ms, block.digest) for block in blocks_from_text(change.after["manifest"])[0]}
                for block in blocks_from_text(change.before["manifest"])[0]:
                    if (block.inserted_at_ms, block.digest) not in kept:
                        yield block
