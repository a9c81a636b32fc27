"""Splits a sealed block of which ClickHouse refuses rows, or which is too large.

What belongs here: the parts of the block, and the rows that leave the batch: dead letters, held rows, released rows.
What does not: recording them (`core.cuts`), sending (`core.export`), and which rows to probe next (`core.poison`).
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Sequence
from dataclasses import replace

from auditexport_pipeline.core.batch import Block
from auditexport_pipeline.core.cuts import SealedRows, Writing
from auditexport_pipeline.core.errors import TableRefuses
from auditexport_pipeline.core.event import Undecodable, explain, normal_form
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.poison import Group, ProbeBudget, next_to_halve, search
from auditexport_pipeline.core.ports import LIMITS_OF_A_BLOCK, AuditLog, DeadLetter, Refusal
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS

# A block that is too large is split into twice as many parts each time, and at most into this many.
MOST_PARTS = 16
# A row within every limit; each payload version takes the fields that it knows.
SMALL_ROW = (
    b'{"event_id":"evt_small","time":1700000000000,"workspace_id":"ws_small","bucket":"b","source":"platform","event":"a.b",'
    b'"description":"a small row","actor":{"type":"user","id":"u","name":"n","meta":{"k":1}},"meta":{"k":[1,"a"]},'
    b'"targets":[{"type":"key","id":"k","name":"n","meta":{"k":1}}]}'
)
# Rows that are sent alone, to find out whether the table refuses all rows. A smaller batch sends all of its rows. Each
# attempt chooses other rows, so that a batch with one good row is not stuck.
SAMPLE = 32
# Fewer refused rows than this do not show that the table refuses all rows.
FEW_ROWS = 3
# Rows checked between lease renewals: half a second at 25 µs a row.
ROWS_PER_RENEWAL = 20_000


class Splitter:
    """Splits blocks of one batch, for one attempt to write it, within the attempt's budget of probes.

    A refused block was not written, so its rows may leave the batch. Rows that are unresolved when the budget is spent
    are released; the next drain begins without the dead letters of this one and resolves more.
    """

    def __init__(self, writing: Writing, log: AuditLog, limits: Limits) -> None:
        self._writing = writing
        self._log = log
        self._limits = limits
        self._budget = ProbeBudget()
        # By block number. The parser takes these rows and the table does not, for example because of a constraint. So
        # parsing cannot find the refused rows: each half becomes a block, and its INSERT is the probe.
        self._groups: dict[int, Group] = {}
        self._waiting: list[tuple[Group, Block]] = []  # refused, to be halved
        # Single rows that the table refuses, with its answer: they are held once another row was taken.
        self._refused_alone: list[tuple[Block, Refusal]] = []
        self._sampled = False
        self.taken = False  # whether ClickHouse has any row of the batch

    def split_refused(self, refused: list[tuple[Block, Refusal]]) -> list[Block]:
        """Finds the rows for which ClickHouse refused these blocks, and cuts the blocks again without them.

        The poison rows become dead letters, unless ClickHouse takes their normal form (a repeated key). Durable
        effect: each new cut with its dead letters, in one transaction. Returns the blocks to send.
        """
        to_send: list[Block] = []
        # Single rows first: if the table refuses several of them, larger blocks are not sampled again.
        for block, refusal in sorted(refused, key=lambda one: one[0].rows):
            to_send += self._split_one(block, refusal)
        if self._refused_alone:
            self._hold(to_send)
        while self._waiting and not to_send:
            if self._budget.left < 2:
                waiting, self._waiting = self._waiting, []
                self._writing.release([block for _, block in waiting])
                return []
            group, block = self._waiting.pop(next_to_halve([group for group, _ in self._waiting], self._budget))
            self._budget.left -= 2
            to_send = self._divide(block, self._writing.read(block), group.halves())
        return to_send

    def _split_one(self, block: Block, refusal: Refusal) -> list[Block]:
        group = self._groups.get(block.number)
        if group is not None and len(group) > 1:
            self._waiting.append((group, block))
            return []
        sealed = self._writing.read(block)
        rows = sealed.rows
        dead: dict[int, DeadLetter] = {}
        normalised: set[int] = set()
        unresolved: set[int] = set()
        if group is None:
            problems = self._explain(sealed.payloads)
            dead = {pk: DeadLetter.of(rows[pk], problem) for pk, problem in problems.items() if problem is not None}
            normalised = {pk for pk, problem in problems.items() if problem is None}
            if len(dead) < len(rows):
                found = search(
                    _group_of(sealed, [pk for pk in rows if pk not in dead]),
                    lambda pks: self._probe([sealed.payloads[pk] for pk in pks]),
                    self._budget,
                )
                unresolved = set(found.unresolved)
                for pk, answer in found.refused.items():
                    if answer.kind in LIMITS_OF_A_BLOCK:  # a busy server, which says nothing about the row
                        unresolved.add(pk)
                        continue
                    problem = explain(rows[pk].payload) if pk in normalised else None
                    dead[pk] = DeadLetter.of(rows[pk], problem or _refused(answer))
        if not dead and not normalised and not unresolved:
            return self._split_later(block, refusal, sealed)
        good = [pk for pk in rows if pk not in dead and pk not in unresolved]
        as_sent = replace(block, normalised=block.normalised | PkSet.of(sorted(normalised)))
        return self._writing.replace(
            block,
            self._parts(sealed, [good], [as_sent]) if good else [],
            dead=tuple(dead.values()),
            released=PkSet.of(sorted(unresolved)),
            lost=(rows[pk] for pk in (*dead, *unresolved)),
        )

    def _split_later(self, block: Block, refusal: Refusal, sealed: SealedRows) -> list[Block]:
        """Handles a block whose rows all parse: only INSERTs can find the rows that the table refuses."""
        group = _group_of(sealed, sealed.rows)
        if len(group) == 1:
            self._refused_alone.append((block, refusal))
            return []
        may_be_all = not self.taken and not self._sampled and not self._refused_alone
        if may_be_all and len(group) > SAMPLE and self._budget.left > 2 * SAMPLE:
            self._sampled = True
            self._budget.left -= SAMPLE + 1
            batch = self._writing.batch
            chosen = set(random.Random(f"{batch.batch_id} {batch.epoch}").sample(range(len(group)), SAMPLE))
            rest = Group([row for index, row in enumerate(group.rows) if index not in chosen])
            alone = [Group([group.rows[index]]) for index in sorted(chosen)]
            return self._divide(block, sealed, [rest, *alone])
        self._groups[block.number] = group
        self._waiting.append((group, block))
        return []

    def _hold(self, to_send: list[Block]) -> None:
        """Holds the single rows that the table refuses. Raises `TableRefuses` if the table has refused every row that
        was sent, and has taken no row of another batch since its definition changed.
        """
        batch = self._writing.batch
        none_taken = not self.taken and not to_send
        if none_taken and self._waiting and batch.entries <= SAMPLE and self._budget.left >= 2:
            return  # the table may take one of the rows that wait
        refused, self._refused_alone = self._refused_alone, []
        if none_taken and len(refused) >= FEW_ROWS:
            # If all rows are of one workspace, its data can be the reason: they are searched and held.
            workspaces = {row.workspace_id for row in self._writing.rows_of(block for block, _ in refused)}
            if len(workspaces) > 1 and not self._table_takes_other_batches():
                self._waiting = []
                raise TableRefuses(
                    f"{VERSIONS[batch.version].table} refuses all {len(refused):,} rows of batch {batch.batch_id} that "
                    f"were each sent alone (of {batch.entries:,}), and all of them parse: {_refused_by(refused[0][1])}. "
                    "The table's definition is wrong, not the rows: look at SHOW CREATE TABLE for a column, constraint "
                    "or index that somebody added, and drop or fix it. Nothing was set aside, and the next run sends "
                    "the rows"
                )
        for block, refusal in refused:
            problem = Undecodable(reason="refused_by_table", json_path=refusal.definition, detail=_refused_by(refusal))
            self._set_aside(block, self._writing.read(block), problem, held=True)

    def _table_takes_other_batches(self) -> bool:
        version = self._writing.batch.version
        return self._writing.outbox.written_within(version, self._log.definition_age_s(version))

    def _explain(self, payloads: dict[int, bytes]) -> dict[int, Undecodable | None]:
        """The problem of each row that has one, by pk; None for a repeated key, which is put in normal form."""
        problems: dict[int, Undecodable | None] = {}
        for number, (pk, payload) in enumerate(payloads.items()):
            if number % ROWS_PER_RENEWAL == 0:
                self._renew()
            problem = explain(payload)
            if problem is None:
                continue
            if problem.reason == "duplicate_key" and explain(text := normal_form(payload)) is None:
                payloads[pk] = text
                problem = None
            problems[pk] = problem
        return problems

    def _probe(self, payloads: list[bytes]) -> Refusal | None:
        self._renew()
        return self._log.probe(self._writing.batch.version, payloads, timeout_s=self._limits.insert_timeout_s)

    def _renew(self) -> None:
        self._writing.outbox.renew(self._writing.batch.claim, self._limits.lease_s)

    def is_too_large_alone(self, block: Block) -> bool:
        """Whether the block's only row exceeds a limit of the parser, and a small row does not."""
        (row,) = self._writing.read(block).payloads.values()
        if self._probe([SMALL_ROW]) is not None:
            return False
        refusal = self._probe([row])
        return refusal is not None and refusal.kind in LIMITS_OF_A_BLOCK

    def split_too_large(self, block: Block) -> list[Block]:
        """Splits a block that is too large. A single row becomes a dead letter, or is sent once more without `fits`.

        The caller has made sure that ClickHouse lacks the block and that no INSERT of it can be at work. Each part of a
        first export gets an `inserted_at` of its own. The parts of a requeue keep theirs, and the block stays in the
        ledger as given back, because an earlier attempt may have sent it.
        """
        sealed = self._writing.read(block)
        if block.rows == 1 and block.fits:
            self._set_aside(block, sealed, Undecodable(reason="too_large_for_clickhouse", detail=block.limit))
            return []
        if block.rows == 1:
            self._writing.bodies[block.digest] = list(sealed.payloads.values())
            return self._writing.replace(block, [replace(block, limit="")])
        if self._writing.batch.is_requeue(block):
            self._writing.may_be_sent(block)
        pks = list(sealed.rows)
        count = min(block.rows, MOST_PARTS, 2 ** max(1, block.strikes - 1))
        parts = [pks[len(pks) * n // count : len(pks) * (n + 1) // count] for n in range(count)]
        shells = self._new_blocks(block, count)
        if count == block.rows:  # what the block exceeded says nothing about a single row
            shells = [replace(shell, strikes=0) for shell in shells]
        return self._writing.replace(block, self._parts(sealed, parts, shells))

    def _divide(self, block: Block, sealed: SealedRows, groups: Sequence[Group]) -> list[Block]:
        """Divides a refused block into a block for each group; the first keeps number and `inserted_at`."""
        shells = [block, *self._new_blocks(block, len(groups) - 1)]
        self._groups |= {shell.number: group for shell, group in zip(shells, groups, strict=True)}
        return self._writing.replace(block, self._parts(sealed, [group.pks for group in groups], shells))

    def _new_blocks(self, block: Block, count: int) -> list[Block]:
        """Copies of the block, each with a new number and, unless it is a requeue, a new `inserted_at`."""
        number = self._writing.next_number()
        if self._writing.batch.is_requeue(block):
            at_ms = [block.inserted_at_ms] * count
        else:
            at_ms = self._writing.outbox.reserve_inserted_at(count)
        return [replace(block, number=number + n, inserted_at_ms=at_ms[n], limit="", fits=False) for n in range(count)]

    def _parts(self, sealed: SealedRows, parts: Sequence[Sequence[int]], shells: Sequence[Block]) -> list[Block]:
        """These blocks, each sealed with the rows of its part, whose payloads are in memory now."""
        blocks = [sealed.block_of(pks, shell) for pks, shell in zip(parts, shells, strict=True)]
        for pks, block in zip(parts, blocks, strict=True):
            self._writing.bodies[block.digest] = [sealed.payloads[pk] for pk in pks]
        return blocks

    def _set_aside(self, block: Block, sealed: SealedRows, problem: Undecodable, *, held: bool = False) -> None:
        """Removes a block from the batch: each of its rows becomes a dead letter, or is held."""
        rows = sealed.rows.values()
        letters = [replace(DeadLetter.of(row, problem), held=held) for row in rows]
        self._writing.replace(block, [], dead=letters, lost=rows)


def _group_of(sealed: SealedRows, pks: Iterable[int]) -> Group:
    return Group.of({pk: sealed.rows[pk].workspace_id for pk in pks})


def _refused(refusal: Refusal) -> Undecodable:
    return Undecodable(reason="refused_by_clickhouse", detail=f"code {refusal.code} ({refusal.name})")


def _refused_by(refusal: Refusal) -> str:
    """The part of the table that refuses a row, as far as ClickHouse names it."""
    part = f"column {refusal.column}" if refusal.column else "a column or an index of the table"
    return f"{f'constraint {refusal.constraint}' if refusal.constraint else part} ({refusal})"
