"""Claiming: decides which rows become which batches, in one short transaction under the ledger's lock.

What belongs here: adopting the open batches of dead owners, and cutting new batches and their blocks from pending
rows. What does not: reading payloads (`core.reading`), and finding candidates (`mysql/outbox.sql`).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Iterator, Sequence
from itertools import islice

from auditexport_pipeline.core.batch import OPEN, SMALLEST_BLOCK_ROWS, Claim, State
from auditexport_pipeline.core.format import counted
from auditexport_pipeline.core.origins import ORIGIN_SPANS
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Holder, Outbox, PlannedBlock, Planning
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS

# The size of a plan's first batch. Each further batch may be half as large again, up to `batch_rows`, so that no stage
# waits long for the stage before it. With 100,000 rows in the first batch, ClickHouse waited four seconds for the first
# block, and MySQL waited as long for the first rows to mark.
FIRST_BATCH_ROWS = 25_000
FURTHER_BATCHES_GROW = 1.5
# Rows of each page of candidates that are measured: few enough to cost nothing, enough to find large rows.
SAMPLED_ROWS = 64
# Blocks of one requeue. Each is one INSERT, and one requeue can cover all small drains of a lingering run.
MOST_BLOCKS = 256
# A row that is exported more often than this without a requeue is a sign of a mistake.
CLEARED_OFTEN = 3
# A job that clears marks again and again is likelier than a person.
LOOK_FOR_WHO_CLEARS = (
    "look for what sets deleted_at to NULL: SELECT * FROM information_schema.events; SELECT * FROM information_schema.triggers; "
    "and the application's own jobs"
)
# No run can ask for a longer lease. A lease that ends later was granted before the server's clock was set back. Without
# this bound, its batch would wait for as long as the clock was set back.
LONGEST_LEASE_MS = DAY_MS


def claim(
    outbox: Outbox,
    *,
    owner: str,
    dead_owners: Collection[str],
    limits: Limits,
    process: str = "",
    max_rows: int | None = None,
    left_alone: Callable[[str], None] = lambda line: None,
    exported: Collection[int] = (),
    cleared: Callable[[PkSet], None] = lambda pks: None,
    taken_over: Callable[[int], None] = lambda batch_id: None,
) -> list[Claim]:
    """Adopts the open batches of dead owners, then cuts new batches from pending rows, oldest pk first.

    `dead_owners` are owners and processes that are known to be dead; `process` is the process that does all claimed
    work. `max_rows` is the number of rows for which there is time. `exported` are the batches that this drain has
    exported: rows of them that are pending again wait for the next drain, and `cleared` gets their pks. `left_alone`
    gets a line for each open batch that this release or installation cannot continue, and for rows that are exported
    again and again. `taken_over` gets the id of each batch that is adopted from another owner: after a failed plan, a
    drain adopts its own batches too.

    Source: the ledger, and `drainer_pending_idx` of the outbox. Durable effect: the returned batches are
    in the ledger under a new epoch. Loads pks only of rows that it claims. Idempotent: when the same
    owner runs it again, it adopts what it claimed before.
    """
    with outbox.planning(owner, limits.lease_s, process) as ledger:
        claims: list[Claim] = []
        open_batches = ledger.open_batches()
        unreadable = ledger.unreadable()
        for one in unreadable:
            left_alone(
                f"batch {one.batch_id} is {one.state}, a state that this release does not know: it is left alone. Run the release "
                "that made it"
            )
        for open_batch in open_batches:
            batch = open_batch.batch
            is_open = f"batch {batch.batch_id} is open ({batch.state}, {batch.rows:,} rows)"
            if batch.version not in VERSIONS:
                left_alone(
                    f"{is_open} and of {batch.version}, which no installed "
                    "package registers: it is left alone. Install the package again, and the next run continues it"
                )
                continue
            abandoned = open_batch.lease_expired
            if batch.state is not State.STOPPED:  # a stopped batch waits until no INSERT of it can be at work
                abandoned |= batch.owner == owner or not {batch.owner, batch.process}.isdisjoint(dead_owners)
            # A batch that is larger than there is time for is adopted too, alone: its marked rows stay marked.
            fits = len(claims) < limits.max_batches and (not claims or _room(claims, max_rows) >= batch.rows)
            if abandoned and fits and max_rows != 0:
                claim = ledger.adopt(batch)
                if claim is not None:
                    claims.append(claim)
                    if batch.owner != owner:
                        taken_over(batch.batch_id)
                else:
                    left_alone(
                        f"{is_open}, and its row of clickhouse_outbox_batch is locked: it is left alone. End that transaction, "
                        "and the next run continues it"
                    )
            elif open_batch.lease_left_ms > LONGEST_LEASE_MS:
                ledger.begin_lease_again(batch)
        in_batches = PkSet.union([*(one.batch.pks for one in open_batches), *(one.pks for one in unreadable)])
        cutter = _Cutter(ledger, limits, in_batches, frozenset(exported), cleared)
        for position, version in enumerate(limits.versions):
            batches = -(-(limits.max_batches - len(claims)) // (len(limits.versions) - position))
            claims.extend(cutter.cut(version, batches, _room(claims, max_rows)))
        for claim in claims:
            if claim.generation > CLEARED_OFTEN and not claim.adopted:
                left_alone(
                    f"batch {claim.batch_id} has {claim.rows:,} rows that are exported for the {claim.generation + 1}th time. If "
                    f"nobody requeues them, {LOOK_FOR_WHO_CLEARS}"
                )
        return claims


def _room(claims: Sequence[Claim], max_rows: int | None) -> int:
    """Rows that may still be claimed."""
    return sys.maxsize if max_rows is None else max_rows - sum(claim.rows for claim in claims)


def open_owners(outbox: Outbox) -> list[str]:
    """The owners of open batches, and their processes."""
    return sorted({name for holder in outbox.batch_holders() for name in (holder.owner, holder.process) if name})


def leased_by_others(outbox: Outbox, owner: str) -> list[Holder]:
    """The other owners of leases on pending rows: runs at work, or dead runs whose lease has not ended."""
    return [holder for holder in outbox.batch_holders() if holder.owner != owner]


def leased_line(holders: Sequence[Holder]) -> str:
    """The line about rows that others have leased, for the end of a run."""
    rows = counted(sum(holder.rows for holder in holders), "row is", "rows are")
    return (
        f"{rows} leased by {'; '.join(map(str, holders))}. Each is at work, or has died: "
        "then the first run after that time exports them"
    )


def cleared_line(pks: PkSet) -> str:
    """A line about rows that a drain has exported and that are pending again."""
    return (
        f"{len(pks):,} rows that this drain has exported are pending again, the first is pk {pks.first}: it leaves them to the next "
        f"one. If nobody requeued them, and the outbox was not filled anew, {LOOK_FOR_WHO_CLEARS}"
    )


class _Cutter:
    """Cuts new batches of one plan from the pending rows that are in no open batch."""

    def __init__(
        self,
        ledger: Planning,
        limits: Limits,
        in_batches: PkSet,
        exported: frozenset[int],
        cleared: Callable[[PkSet], None],
    ) -> None:
        self._ledger = ledger
        self._limits = limits
        self._in_batches = in_batches
        self._exported = exported
        self._cleared = cleared

    def cut(self, version: str, most_batches: int, most_rows: int) -> Iterator[Claim]:
        """Cuts batches of one version. Each comes from one page of candidates and is bounded by bytes. The first
        batches are small, so that every stage of the pipeline soon has work.

        A page that is not full was the last one: rows that commit from now on wait for the next plan. Otherwise a busy
        application would get a batch, and an INSERT, for each row or two that commit while its rows are claimed.
        """
        limits = self._limits
        from_pk = batches = rows = 0
        batch_rows = min(FIRST_BATCH_ROWS, limits.batch_rows)
        while batches < most_batches and rows < most_rows:
            batch_rows = min(batch_rows, most_rows - rows)
            while (run := self._in_batches.run_of(from_pk)) is not None:
                from_pk = run[1] + 1
            page = self._ledger.candidates(version, from_pk, batch_rows)
            if not page:
                return
            from_pk = page.last + 1
            last_page = len(page) < batch_rows
            free = page - self._in_batches
            if not free:
                if last_page:
                    return
                continue
            pks, size = self._within_bytes(free)
            if len(pks) < len(free):
                from_pk, last_page = pks.last + 1, False
            for claim in islice(self._add(version, pks, size), most_batches - batches):
                batches += 1
                rows += claim.rows
                yield claim
            if last_page:
                return
            # Where bytes bound the batches, and not rows, longer pages would be read in vain.
            taken = batch_rows if len(pks) == len(free) else len(pks)
            batch_rows = min(limits.batch_rows, max(FIRST_BATCH_ROWS, int(taken * FURTHER_BATCHES_GROW)))

    def _within_bytes(self, pks: PkSet) -> tuple[PkSet, int]:
        """The first of these pks that fit into `batch_bytes`, at least one, and the estimate of their bytes.

        Some rows are measured, and each stands for the rows up to the next measured one. Measuring every row would read
        every row twice; `fetch` sees the real sizes and bounds the batch.
        """
        stretches = list(pks.chunks(-(-len(pks) // SAMPLED_ROWS)))
        measured = self._ledger.payload_bytes([stretch.first for stretch in stretches])
        usual = sum(measured.values()) // len(measured) if measured else 0
        rows = size = 0
        for stretch in stretches:
            row_bytes = measured.get(stretch.first, usual)
            # At least one: a row larger than the limit goes alone.
            fitting = max(int(rows == 0), min(len(stretch), (self._limits.batch_bytes - size) // max(1, row_bytes)))
            rows += fitting
            size += fitting * row_bytes
            if fitting < len(stretch):
                break
        return next(pks.chunks(rows)), size

    def _add(self, version: str, pks: PkSet, size: int) -> Iterator[Claim]:
        """Adds a batch of rows that were never exported, and batches of rows that are pending again, with their old
        `inserted_at`.

        A pk that was exported before is only a hint: the fetch proves that the row is the same event, or takes it as
        new.
        """
        row_bytes = size // len(pks)
        # By spans: for one old row among new ones, the batches between them must not be read.
        sent = (origin for span in pks.spans(ORIGIN_SPANS) for origin in self._ledger.sent_over(*span))
        origins = {origin.batch_id: origin for origin in sent if origin.state not in OPEN}
        own = PkSet.union(origin.pks for batch_id, origin in origins.items() if batch_id in self._exported) & pks
        if own:
            self._cleared(own)
            pks -= own
        again: dict[int, int] = {}
        generation = 0
        for _, origin in sorted(origins.items()):
            overlap = pks & origin.pks
            if overlap and origin.version == version:
                generation = max(generation, origin.generation + 1)
                again.update({pk: block.inserted_at_ms for block in origin.blocks for pk in overlap & block.pks})
                # A folded row went out as another row's entry. If it never went out itself, it goes to a block of the
                # batch that folded it first. If it did, it keeps its own `inserted_at`, whatever a requeue folded it
                # into.
                again.update(
                    {pk: origin.blocks[-1].inserted_at_ms for pk in overlap if origin.blocks and pk not in again}
                )
        fresh = pks - PkSet.of(sorted(again))
        if fresh:
            block_rows = max(SMALLEST_BLOCK_ROWS, -(-len(fresh) // self._limits.blocks_per_batch))
            chunks = fresh.chunks(block_rows)
            yield self._ledger.add(version, 0, [PlannedBlock(pks=pks, bytes=row_bytes * len(pks)) for pks in chunks])
        by_time: dict[int, list[int]] = {}
        for pk, at_ms in again.items():
            by_time.setdefault(at_ms, []).append(pk)
        blocks = [
            PlannedBlock(pks=PkSet.of(sorted(group)), bytes=row_bytes * len(group), inserted_at_ms=at_ms)
            for at_ms, group in sorted(by_time.items())
        ]
        for start in range(0, len(blocks), MOST_BLOCKS):
            yield self._ledger.add(version, generation, blocks[start : start + MOST_BLOCKS])
