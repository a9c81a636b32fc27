"""Cutting again: a sealed block that cannot go out as it is, read once more and cut around what is wrong with it.

What belongs here: holding rows against their seal, taking out the rows that ClickHouse refuses, and giving rows
back that cannot be reproduced, or that nobody had the time to look at. What does not: sending (`core.export`), and
how culprits are searched for (`core.culprits`). The ledger holds a new cut before any of it is sent.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace

from auditexport_pipeline.core.batch import (
    Batch,
    Block,
    Bodies,
    Counts,
    State,
    batch_digest,
    block_digest,
    pks_of,
    sealed_block,
)
from auditexport_pipeline.core.culprits import Group, Questions, search, take_next
from auditexport_pipeline.core.errors import BatchAltered, InsertRefused, TableRefuses
from auditexport_pipeline.core.event import Event, OutboxRow, Undecodable, explain, id_hash, normal_form
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import (
    LIMITS_OF_A_BLOCK,
    AuditLog,
    Cut,
    DeadLetter,
    Outbox,
    Refusal,
    StoredRow,
)
from auditexport_pipeline.core.versions import VERSIONS

# A block that is too large is cut into twice as many parts each time, and into this many at most.
MOST_PIECES = 16
# A row that any limit leaves room for; a version takes from it what it knows.
SMALL_ROW = (
    b'{"event_id":"evt_small","time":1700000000000,"workspace_id":"ws_small","bucket":"b","source":"platform","event":"a.b",'
    b'"description":"a small row","actor":{"type":"user","id":"u","name":"n","meta":{"k":1}},"meta":{"k":[1,"a"]},'
    b'"targets":[{"type":"key","id":"k","name":"n","meta":{"k":1}}]}'
)
# A table refuses everything when it refuses this many rows that were each sent alone: all rows of a smaller batch, and
# other ones at each attempt, so that a batch with one good row is not stuck.
SAMPLE = 32
# Fewer refused rows than this never say that the table refuses everything.
FEW_ROWS = 3
# Rows explained between two signs of life: half a second at 25 µs a row.
EXPLAINED_AT_ONCE = 20_000
Key = tuple[str, str, int, str]


def read_payloads(outbox: Outbox, batch: Batch, block: Block) -> list[bytes]:
    """A sealed block's payloads, read again; raises `BatchAltered` when they are not what was sealed."""
    _, payloads = _read_sealed(outbox, batch, block)
    return list(payloads.values())


def _read_sealed(outbox: Outbox, batch: Batch, block: Block) -> tuple[dict[int, StoredRow], dict[int, bytes]]:
    """A sealed block's rows, and beside them the payloads as they are sent, by pk; raises `BatchAltered`."""
    rows = {row.pk: row for row in outbox.read(block.pks, row_bytes=block.row_bytes)}
    payloads = {pk: normal_form(row.payload) if pk in block.normalised else row.payload for pk, row in rows.items()}
    if block_digest(batch.version, block.inserted_at_ms, PkSet.of(rows), list(payloads.values())) != block.digest:
        gone = block.rows - len(rows)
        raise BatchAltered(
            f"batch {batch.batch_id}, block {block.number}: of {block.rows} sealed rows {gone} are gone from the outbox"
            f"{'' if gone else ' but some were changed'} before ClickHouse had them; nothing of the block was written. "
            "Find out who deletes or changes outbox rows; once the lease has ended, the next run gives the remaining "
            "rows back to the backlog and exports them in a new batch"
        )
    return rows, payloads


def give_back(outbox: Outbox, batch: Batch, altered: list[Block]) -> Batch:
    """Gives the rows of blocks that cannot be reproduced back to pending, and keeps the count.

    Safe only here: ClickHouse was just looked at and has nothing of these blocks, after the last instant at which an
    INSERT of them could have been at work. Blocks of a requeue may be there all the same: the ledger keeps them as
    given back, because their copies are not to be called duplicates. From here on the batch is sealed again: its new
    owner is about to send the blocks it kept.
    """
    again = tuple(block for block in altered if batch.is_requeue(block))
    if again:
        batch = replace(batch, given_back=(*batch.given_back, *again))
    kept = tuple(block for block in batch.blocks if block not in altered)
    standing: set[Key] = set()
    if _folded(batch):
        for block in kept:
            rows = outbox.read(block.pks, row_bytes=block.row_bytes)
            standing.update(key for row in rows if (key := _key(batch, row)) is not None)
    return _without(outbox, batch, kept, (), pks_of(altered), lambda key: key not in standing)


def _without(
    outbox: Outbox,
    batch: Batch,
    blocks: tuple[Block, ...],
    dead: tuple[DeadLetter, ...],
    released: PkSet,
    orphaned: Callable[[Key], bool],
) -> Batch:
    """Records a cut that leaves rows out: dead ones as letters, others given back to pending.

    A folded row goes out as the row it was folded into. Where that one is left out (`orphaned` tells by the event's
    key), the folded one is given back as well, or it would be marked and its event be nowhere.
    """
    folded = _folded(batch)
    orphans = PkSet()
    if folded and (dead or released):
        rows = outbox.read(folded, row_bytes=-(-batch.bytes // max(1, batch.entries)))
        orphans = PkSet.of(row.pk for row in rows if (key := _key(batch, row)) is None or orphaned(key))
    held = sum(letter.held for letter in dead)
    counts = replace(
        batch.counts,
        dead=batch.counts.dead + len(dead) - held,
        released=batch.counts.released + len(released) + len(orphans) + held,
        folded=batch.counts.folded - len(orphans),
    )
    pks = batch.pks - PkSet.of(sorted(letter.pk for letter in dead)) - released - orphans
    return _recut(outbox, batch, blocks, pks, counts, dead)


def _folded(batch: Batch) -> PkSet:
    return batch.pks - pks_of(batch.blocks)


def _key(batch: Batch, row: OutboxRow) -> Key | None:
    event = VERSIONS[batch.version].decode(row)
    return event.key if isinstance(event, Event) else None


def _recut(
    outbox: Outbox,
    batch: Batch,
    blocks: tuple[Block, ...],
    pks: PkSet,
    counts: Counts,
    dead: tuple[DeadLetter, ...],
    note: str | None = None,
) -> Batch:
    digest = batch_digest(blocks, pks - pks_of(blocks))
    cut = Cut(
        blocks=blocks,
        pks=pks,
        counts=counts,
        digest=digest,
        given_back=batch.given_back,
        dead_letters=dead,
        note=note,
    )
    outbox.recut(batch.claim, cut, instead_of=batch.digest)
    return replace(
        batch,
        state=State.SEALED,
        blocks=blocks,
        pks=pks,
        counts=counts,
        digest=digest,
        bytes=sum(block.bytes for block in blocks),
    )


def annotate(outbox: Outbox, batch: Batch, blocks: tuple[Block, ...], note: str | None = None) -> Batch:
    """Records what was learnt of the blocks, or a note for the operator; what is sent stays as it is."""
    return _recut(outbox, batch, blocks, batch.pks, batch.counts, (), note)


def new_number(outbox: Outbox, batch: Batch, block: Block) -> tuple[Batch, Block]:
    """Gives a requeued block another number, and so another token. The copy under the old one may be there as well."""
    renewed = replace(block, number=_next_number(batch))
    batch = replace(batch, given_back=(*batch.given_back, block))
    return _recut(outbox, batch, _with_parts(batch, block, [renewed]), batch.pks, batch.counts, ()), renewed


def _next_number(batch: Batch) -> int:
    """A block number that no block of this batch has or had; tokens are made from it."""
    return max(block.number for block in (*batch.blocks, *batch.given_back)) + 1


class Recutter:
    """Cuts one batch's refused blocks again, for one attempt to write it and with that attempt's questions.

    A refused block was not written, so its rows may leave the batch. What an attempt does about refusals is bounded
    by `core.culprits.QUESTIONS`: rows that are unresolved by then are given back to pending, and the next drain,
    which starts without the dead letters of this one, gets further.
    """

    def __init__(self, outbox: Outbox, log: AuditLog, limits: Limits) -> None:
        self._outbox = outbox
        self._log = log
        self._limits = limits
        self._questions = Questions()
        # Blocks that the parser takes and the table does not, such as by a constraint that somebody added: no
        # probe tells about them, so each half is a block of its own, and its INSERT is the question.
        self._halved: dict[int, Group] = {}
        self._waiting: list[tuple[Group, Block]] = []
        # Single rows that the table refuses, with its answer: they are held once another row was taken.
        self._suspects: list[tuple[Block, Refusal]] = []
        self._sampled = False
        self.taken = False  # whether ClickHouse has any row of the batch

    def cut(
        self, batch: Batch, refused: list[tuple[Block, Refusal]], bodies: dict[str, list[bytes]]
    ) -> tuple[Batch, list[Block]]:
        """Finds the rows that made ClickHouse refuse these blocks, and cuts the blocks again without them.

        The offending rows become dead letters, unless their normal form is acceptable (a repeated key). Durable
        effect: each new cut with its dead letters, in one transaction. Returns the blocks to send; `bodies` gets
        their payloads.
        """
        again: list[Block] = []
        # Single rows first: where the table refuses several of them, larger blocks are not sampled once more.
        for block, refusal in sorted(refused, key=lambda one: one[0].rows):
            batch, parts = self._cut_around(batch, block, refusal, bodies)
            again += parts
        if self._suspects:
            batch = self._hold(batch, again)
        while self._waiting and not again:
            if self._questions.left < 2:
                return self._give_up(batch), []
            groups = [group for group, _ in self._waiting]
            chosen = take_next(groups, self._questions)
            block = next(block for group, block in self._waiting if group is chosen)
            self._waiting = [(group, other) for group, other in self._waiting if group is not chosen]
            batch, again = self._halve(batch, block, chosen, bodies)
        return batch, again

    def _cut_around(
        self, batch: Batch, block: Block, refusal: Refusal, bodies: dict[str, list[bytes]]
    ) -> tuple[Batch, list[Block]]:
        half = self._halved.get(block.number)
        if half is not None and len(half.rows) > 1:
            self._waiting.append((half, block))
            return batch, []
        rows, payloads = _read_sealed(self._outbox, batch, block)
        dead: dict[int, DeadLetter] = {}
        normalised: set[int] = set()
        unresolved: set[int] = set()
        if half is None:
            problems = self._explain(batch, payloads)
            dead = {pk: DeadLetter.of(rows[pk], problem) for pk, problem in problems.items() if problem is not None}
            normalised = {pk for pk, problem in problems.items() if problem is None}
            left = {pk: row.workspace_id for pk, row in rows.items() if pk not in dead}
            if left:
                found = search(
                    Group.of(left), lambda pks: self._probe(batch, [payloads[pk] for pk in pks]), self._questions
                )
                unresolved = set(found.unresolved)
                for pk, answer in found.refused.items():
                    problem = explain(rows[pk].payload) if pk in normalised else None
                    dead[pk] = DeadLetter.of(rows[pk], problem or _refused(answer))
        if not dead and not normalised and not unresolved:
            group = Group.of({pk: row.workspace_id for pk, row in rows.items()})
            if len(group.rows) == 1:
                self._suspects.append((block, refusal))
                return batch, []
            may_be_all = not self.taken and not self._sampled and not self._suspects
            if may_be_all and len(group.rows) > SAMPLE and self._questions.left > 2 * SAMPLE:
                return self._sample(batch, block, group, rows, payloads, bodies)
            self._halved[block.number] = group
            self._waiting.append((group, block))
            return batch, []

        kept = [pk for pk in rows if pk not in dead and pk not in unresolved]
        as_sent = block.normalised | PkSet.of(sorted(normalised))
        again = [self._part(batch, replace(block, normalised=as_sent), kept, rows, payloads, bodies)] if kept else []
        lost = {_key(batch, rows[pk]) for pk in (*dead, *unresolved)} if _folded(batch) else set()
        batch = _without(
            self._outbox,
            batch,
            _with_parts(batch, block, again),
            tuple(dead.values()),
            PkSet.of(sorted(unresolved)),
            lambda key: key in lost,
        )
        return batch, again

    def _sample(
        self,
        batch: Batch,
        block: Block,
        group: Group,
        rows: dict[int, StoredRow],
        payloads: dict[int, bytes],
        bodies: Bodies,
    ) -> tuple[Batch, list[Block]]:
        """Takes a few rows out into blocks of their own: where all of them are refused too, the table refuses everything."""
        self._sampled = True
        self._questions.left -= SAMPLE + 1
        attempt = random.Random(f"{batch.batch_id} {batch.epoch}")
        chosen = set(attempt.sample(range(len(group.rows)), SAMPLE))
        rest = Group([row for index, row in enumerate(group.rows) if index not in chosen])
        groups = [rest, *(Group([group.rows[index]]) for index in sorted(chosen))]
        number = _next_number(batch)
        slots = [block.inserted_at_ms] * SAMPLE if batch.is_requeue(block) else self._outbox.reserve_inserted_at(SAMPLE)
        parts = [block] + [replace(block, number=number + n, inserted_at_ms=slots[n]) for n in range(SAMPLE)]
        again = []
        for part, those in zip(parts, groups, strict=True):
            self._halved[part.number] = those
            again.append(self._part(batch, part, those.pks, rows, payloads, bodies))
        return _recut(self._outbox, batch, _with_parts(batch, block, again), batch.pks, batch.counts, ()), again

    def _workspaces(self, batch: Batch, suspects: list[tuple[Block, Refusal]]) -> set[str]:
        rows = (row for block, _ in suspects for row in self._outbox.read(block.pks, row_bytes=block.row_bytes))
        return {row.workspace_id for row in rows}

    def _takes_others(self, batch: Batch) -> bool:
        """Whether the table, as it is defined now, has taken events of another batch."""
        return self._outbox.written_within(batch.version, self._log.definition_age_s(batch.version))

    def _hold(self, batch: Batch, again: list[Block]) -> Batch:
        """Holds the single rows that the table refuses. Raises `TableRefuses` where it has refused all rows that it was sent,
        and has taken none of other batches since it is defined as it is.
        """
        none_taken = not self.taken and not again
        if none_taken and self._waiting and batch.entries <= SAMPLE and self._questions.left >= 2:
            return batch  # a row that the table takes can be among those that wait
        suspects, self._suspects = self._suspects, []
        all_refused = none_taken and len(suspects) >= FEW_ROWS
        # Of one workspace it can be a flood of its own, which is searched and held.
        if all_refused and len(self._workspaces(batch, suspects)) > 1 and not self._takes_others(batch):
            self._waiting = []
            raise TableRefuses(
                f"{VERSIONS[batch.version].table} refuses all {len(suspects):,} rows of batch {batch.batch_id} that were each "
                f"sent alone (of {batch.entries:,}), and all of them parse: {_by_what(suspects[0][1])}. The table's definition is wrong, not the rows: look at SHOW CREATE "
                "TABLE for a column, constraint or index that somebody added, and drop or mend it. Nothing was set aside, "
                "and the next run sends the rows"
            )
        for block, refusal in suspects:
            rows, _ = _read_sealed(self._outbox, batch, block)
            letters = tuple(
                replace(
                    DeadLetter.of(
                        row,
                        Undecodable(reason="refused_by_table", json_path=refusal.definition, detail=_by_what(refusal)),
                    ),
                    held=True,
                )
                for row in rows.values()
            )
            lost = {_key(batch, row) for row in rows.values()} if _folded(batch) else set()
            batch = _without(self._outbox, batch, _with_parts(batch, block, []), letters, PkSet(), lost.__contains__)
        return batch

    def _explain(self, batch: Batch, payloads: dict[int, bytes]) -> dict[int, Undecodable | None]:
        """The problem of each row that has one, by pk: None for a repeated key, whose payload is put in normal form."""
        problems: dict[int, Undecodable | None] = {}
        for number, (pk, payload) in enumerate(payloads.items()):
            if number % EXPLAINED_AT_ONCE == 0:
                self._outbox.renew(batch.claim, self._limits.lease_s)
            problem = explain(payload)
            if problem is None:
                continue
            if problem.reason == "duplicate_key" and explain(text := normal_form(payload)) is None:
                payloads[pk] = text
                problem = None
            problems[pk] = problem
        return problems

    def _probe(self, batch: Batch, payloads: list[bytes]) -> Refusal | None:
        self._outbox.renew(batch.claim, self._limits.lease_s)
        return self._log.probe(batch.version, payloads, timeout_s=self._limits.insert_timeout_s)

    def _halve(
        self, batch: Batch, block: Block, group: Group, bodies: dict[str, list[bytes]]
    ) -> tuple[Batch, list[Block]]:
        """Cuts a block in two, the second half under an `inserted_at` of its own."""
        self._questions.left -= 2
        rows, payloads = _read_sealed(self._outbox, batch, block)
        number = _next_number(batch)
        (second_at_ms,) = (
            self._outbox.reserve_inserted_at(1) if not batch.is_requeue(block) else (block.inserted_at_ms,)
        )
        again = []
        for half, part in zip(
            group.halves(), (block, replace(block, number=number, inserted_at_ms=second_at_ms)), strict=True
        ):
            self._halved[part.number] = half
            again.append(self._part(batch, part, half.pks, rows, payloads, bodies))
        return _recut(self._outbox, batch, _with_parts(batch, block, again), batch.pks, batch.counts, ()), again

    def payloads(self, batch: Batch, block: Block) -> list[bytes]:
        """The block's payloads, read again and held against the seal; raises `BatchAltered`."""
        return read_payloads(self._outbox, batch, block)

    def only_this_row_is_too_large(self, batch: Batch, block: Block) -> bool:
        """Whether the parser runs into a limit with this row and not with a small one."""
        (row,) = read_payloads(self._outbox, batch, block)
        if self._probe(batch, [SMALL_ROW]) is not None:
            return False
        refusal = self._probe(batch, [row])
        return refusal is not None and refusal.kind in LIMITS_OF_A_BLOCK

    def split(self, batch: Batch, block: Block, bodies: Bodies) -> tuple[Batch, list[Block]]:
        """Splits a block that is too large; a single row becomes a dead letter, or is sent as it is if `fits` is unset.

        The caller has made sure that ClickHouse lacks the block and that no INSERT of it can be at work. Each part of a
        first export gets an `inserted_at` of its own. Of a requeue the parts keep theirs, and what an earlier attempt
        may have sent under it is kept as given back.
        """
        rows, payloads = _read_sealed(self._outbox, batch, block)
        if block.rows == 1 and block.fits:
            return self._set_aside(batch, block, rows), []
        if block.rows == 1:
            again = replace(block, limit="")
            bodies[block.digest] = list(payloads.values())
            return annotate(self._outbox, batch, _with_parts(batch, block, [again])), [again]
        pieces = min(block.rows, MOST_PIECES, 2 ** max(1, block.strikes - 1))
        pks = list(rows)
        parts = [pks[len(pks) * n // pieces : len(pks) * (n + 1) // pieces] for n in range(pieces)]
        if batch.is_requeue(block):
            slots = [block.inserted_at_ms] * pieces
            batch = replace(batch, given_back=(*batch.given_back, block))
        else:
            slots = self._outbox.reserve_inserted_at(pieces)
        number = _next_number(batch)
        parts_of_it = [
            self._part(
                batch,
                replace(block, number=number + n, inserted_at_ms=slots[n], limit="", fits=False),
                part,
                rows,
                payloads,
                bodies,
            )
            for n, part in enumerate(parts)
        ]
        blocks = _with_parts(batch, block, parts_of_it)
        return _recut(self._outbox, batch, blocks, batch.pks, batch.counts, ()), parts_of_it

    def _set_aside(self, batch: Batch, block: Block, rows: dict[int, StoredRow]) -> Batch:
        letters = tuple(
            DeadLetter.of(row, Undecodable(reason="too_large_for_clickhouse", detail=block.limit))
            for row in rows.values()
        )
        lost = {_key(batch, row) for row in rows.values()}
        blocks = _with_parts(batch, block, [])
        return _without(self._outbox, batch, blocks, letters, PkSet(), lambda key: key in lost)

    def _give_up(self, batch: Batch) -> Batch:
        """Gives the rows of the blocks that are still waiting back to pending: none of them was written."""
        blocks = [block for _, block in self._waiting]
        self._waiting = []
        lost: set[Key | None] = set()
        if _folded(batch):
            for block in blocks:
                lost.update(_key(batch, row) for row in self._outbox.read(block.pks, row_bytes=block.row_bytes))
        kept = tuple(block for block in batch.blocks if block not in blocks)
        return _without(self._outbox, batch, kept, (), pks_of(blocks), lambda key: key in lost)

    def _part(
        self,
        batch: Batch,
        block: Block,
        pks: list[int],
        rows: dict[int, StoredRow],
        payloads: dict[int, bytes],
        bodies: dict[str, list[bytes]],
    ) -> Block:
        """The block with these of its rows only, sealed, and its payloads put where the next sending looks."""
        decode = VERSIONS[batch.version].decode
        fingerprint = sum(_fingerprint(decode(rows[pk])) for pk in pks) % 2**64
        body = [payloads[pk] for pk in pks]
        kept = PkSet.of(pks)
        ids = sum(id_hash(rows[pk].event_id) for pk in pks)
        sealed = sealed_block(batch.version, block, kept, body, fingerprint, ids=ids)
        bodies[sealed.digest] = body
        return replace(sealed, normalised=block.normalised & kept, renewed=block.renewed & kept)


def _with_parts(batch: Batch, block: Block, parts: list[Block]) -> tuple[Block, ...]:
    """The batch's blocks, with these in the place of that one."""
    position = batch.blocks.index(block)
    return (*batch.blocks[:position], *parts, *batch.blocks[position + 1 :])


def _refused(refusal: Refusal) -> Undecodable:
    return Undecodable(reason="refused_by_clickhouse", detail=f"code {refusal.code} ({refusal.name})")


def _by_what(refusal: Refusal) -> str:
    what = (
        f"constraint {refusal.constraint}"
        if refusal.constraint
        else f"column {refusal.column}"
        if refusal.column
        else ""
    )
    return f"{what or 'a column or an index of the table'} ({refusal})"


def _fingerprint(event: Event | Undecodable) -> int:
    if isinstance(event, Undecodable):
        raise InsertRefused(
            f"a sealed row no longer decodes ({event.reason} at {event.json_path}): was the program changed?"
        )
    return event.fingerprint
