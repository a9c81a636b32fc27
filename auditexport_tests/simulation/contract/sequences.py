"""Random sequences of what runs, operators and applications do to MySQL, each step on both sides, one connection at a time.

Claims may be stale or of another epoch, rows are changed in between, and the clock steps. A step has a title and, for a side, its work.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import sqlalchemy as sa

from auditexport_pipeline.core.actions import Actor, Erasure, RowFilter
from auditexport_pipeline.core.batch import OPEN, Batch, Claim, Counts, Holding, State, pks_of
from auditexport_pipeline.core.dead_letters import DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.event import Undecodable
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import Cut, DeadLetter, Discrepancy, Marked, Moment, PlannedBlock
from auditexport_pipeline.mysql import dead_letters, outbox
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.contract.random_tables import (
    EVENTS,
    PAYLOADS,
    VERSIONS,
    WORKSPACES,
    maybe,
    random_tables,
    stamp_ms,
)
from auditexport_tests.simulation.contract.sides import (
    COLUMNS,
    LEDGER,
    OUTBOX,
    START_MS,
    Side,
    Tables,
    attempted,
    maintenance,
    tables_of,
)

ACTOR = Actor(who="contract", why="to compare")
KNOWN = VERSIONS[0]
MOST_PK = 24
STEPS = 25
ANY = DeadLetterFilter(state=None)
Work = Callable[[Side], Any]
Step = tuple[str, Work]


def first_tables(choices: Choices) -> Tables:
    """Pending rows, most of one version, and a ledger without batches; or anything."""
    anything = random_tables(choices) if choices.below(3) == 2 else {}
    if anything.get(LEDGER):
        return anything
    rows = [_pending_row(choices, pk) for pk in range(1, 2 + choices.below(MOST_PK)) if choices.below(8) < 7]
    return {OUTBOX: rows, LEDGER: [ledger_head()]}


def ledger_head() -> tuple[Any, ...]:
    """Row 0 of the ledger as `schema.sql` inserts it, but that its age is not its table's."""
    head = dict.fromkeys(COLUMNS[LEDGER], 0) | dict.fromkeys(
        ("version", "owner", "pks", "counts", "digest", "last_error"), ""
    )
    head |= {"state": "head", "manifest": "[]", "claim_key": "", "process": "", "claimed_at_ms": 1}
    nullable = ("first_pk", "last_pk", "previous_digest", "oldest_event_ms", "newest_event_ms", "observed")
    times = ("sealed_at_ms", "written_at_ms", "exported_at_ms", "verified_at_ms", "swept_at_ms")
    head |= dict.fromkeys((*nullable, *times))
    return tuple(head[column] for column in COLUMNS[LEDGER])


def _pending_row(choices: Choices, pk: int) -> tuple[Any, ...]:
    version = KNOWN if choices.below(6) else choices.one_of(VERSIONS)
    ids = choices.one_of(WORKSPACES), choices.one_of(EVENTS)
    return pk, version, *ids, choices.one_of(PAYLOADS), START_MS - 1000 * choices.below(3), None


class StoreSequence:
    """One sequence; `difference` plays it on both sides, and says where they part."""

    def __init__(self, choices: Choices, sides: Sequence[Side]) -> None:
        self._choices = choices
        self._sides = sides
        self._claims: list[Claim] = []
        self._held: Claim | None = None  # what the next step is about
        self.titles: list[str] = []
        self.moves: tuple[Callable[[], Step], ...] = (
            *(self._advance,) * 12,
            *(self._plan,) * 3,
            *(self._other_hands,) * 4,
            *(
                self._write_step,
                self._mark_step,
                self._cut_step,
                self._look,
                self._search,
                self._letters,
                self._operate,
            ),
            *(self._together, self._set_clock, self._erase, self._search, self._letters, self._operate),
        )

    def difference(self) -> str | None:
        tables = first_tables(self._choices)
        for side in self._sides:
            side.now_ms = START_MS
            side.do(functools.partial(side.fill, tables))
        ids = range(1, 1 + len(tables[LEDGER]))
        self._claims = [batch.claim for batch in attempted(self._sides[0], lambda: self._sides[0].outbox.batches(ids))]
        for number in range(STEPS):
            title, work = self._choices.one_of(self.moves)()
            self.titles.append(title)
            with _keys_of_plans(number):
                ours, theirs = (attempted(side, functools.partial(work, side)) for side in self._sides)
            if ours != theirs:
                return f"{self._told()}\nsimulated: {ours}\nreal:      {theirs}"
            first, second = (self._tables(side) for side in self._sides)
            if first != second:
                parts = {
                    table: (
                        [row for row in rows if row not in second[table]],
                        [row for row in second[table] if row not in rows],
                    )
                    for table, rows in first.items()
                }
                return f"{self._told()}\nreturns {ours} on both; rows of the simulated side only, of the real one only: {parts}"
        return None

    def _told(self) -> str:
        return "\n".join(self.titles)

    @staticmethod
    def _tables(side: Side) -> Tables:
        def read() -> Tables:
            with side.outbox.engine.begin() as connection:
                return tables_of(connection)

        return side.do(read)

    # ── what a step is about ─────────────────────────────────────────────────────────────────────

    def _claim(self) -> Claim:
        """Often the last one; now and then one that nobody has, or has no more."""
        choose = self._choices
        if self._held is not None:
            return self._held
        if not self._claims:
            return Claim(batch_id=1, epoch=1, version=KNOWN, generation=0, rows=1, key="1-none")
        claim = self._claims[-1 - choose.below(min(3, len(self._claims)))]
        if choose.chance(100):
            return replace(claim, **choose.one_of(({"epoch": claim.epoch + 1}, {"key": "1-none"}, {"batch_id": 99})))
        return claim

    def _batch(self, claim: Claim) -> Batch | None:
        """As it is on the simulated side, which is as on the other."""
        found = attempted(self._sides[0], lambda: self._sides[0].outbox.batches([claim.batch_id]))
        return found[0] if found else None

    def _lease_s(self) -> int:
        return self._choices.one_of((60, 0, 1))

    def _pks(self) -> PkSet:
        low = 1 + self._choices.below(MOST_PK)
        some = self._choices.below(2)
        return PkSet.of(
            pk for pk in range(low, low + 1 + self._choices.below(12)) if not some or self._choices.below(2)
        )

    # ── planning ─────────────────────────────────────────────────────────────────────────────────

    def _plan(self) -> Step:
        choose = self._choices
        version, from_pk, rows = (
            choose.one_of((KNOWN, KNOWN, *VERSIONS)),
            choose.one_of((0, 1, 5)),
            1 + choose.below(12),
        )
        owner, process, lease_s = choose.one_of(("run 1", "run 2")), choose.one_of(("", "h:1:2")), self._lease_s()
        adopts, again, fails = choose.below(2), choose.chance(200), choose.chance(100)
        block_rows, requeue = 1 + choose.below(6), choose.chance(200)

        def work(side: Side) -> Any:
            with side.outbox.planning(owner, lease_s, process) as planning:
                opened, unreadable = planning.open_batches(), planning.unreadable()
                claims = [planning.adopt(one.batch) for one in opened if one.lease_expired and adopts]
                for one in opened:
                    if again and not one.lease_expired:
                        planning.begin_lease_again(one.batch)
                pks = planning.candidates(version, from_pk, rows)
                free = pks - PkSet.union([*(one.batch.pks for one in opened), *(one.pks for one in unreadable)])
                sizes = planning.payload_bytes(list(free)) if free else {}
                blocks = [
                    PlannedBlock(
                        pks=part, bytes=sum(sizes[pk] for pk in part), inserted_at_ms=START_MS - 9 if requeue else None
                    )
                    for part in free.chunks(block_rows)
                ]
                if blocks:
                    claims.append(planning.add(version, 1 if requeue else 0, blocks))
                sent = planning.sent_over(1, MOST_PK)
                if fails:
                    raise LeaseLost("the run ends in its plan")
            if side is self._sides[0]:
                self._claims += [claim for claim in claims if claim is not None]
            return opened, unreadable, claims, pks, sizes, sent

        return f"plan of {owner}: {rows} rows of {version!r} from {from_pk}, {adopts=}, {again=}, {fails=}", work

    # ── a batch's life ───────────────────────────────────────────────────────────────────────────

    def _advance(self) -> Step:
        """What a batch needs next, by its claim."""
        held = [(claim, batch) for claim in self._claims[-4:] if (batch := self._batch(claim)) and batch.held_by(claim)]
        open_ = [(claim, batch) for claim, batch in held if batch.state in OPEN]
        if not held:
            return self._plan()
        self._held, batch = self._choices.one_of((open_ or held)[::-1])
        try:
            if batch.state is State.CLAIMED:
                return self._cut_step()
            if batch.state in (State.SEALED, State.STOPPED):
                return self._choices.one_of((self._write_step, self._write_step, self._together))()
            if batch.state is State.WRITTEN:
                return self._choices.one_of((self._mark_step, self._mark_step, self._together))()
            return self._operate()
        finally:
            self._held = None

    def _cut_step(self) -> Step:
        choose, claim = self._choices, self._claim()
        batch, digest = self._batch(claim), f"digest {len(self.titles)}"
        blocks = batch.blocks if batch is not None else ()
        pks = batch.pks if batch is not None else PkSet()
        dead = PkSet.of(pk for pk in pks if choose.below(6) == 5)
        kept = pks - dead
        given_back = blocks[-1:] if len(blocks) > 1 and choose.chance(100) else ()
        kept = kept - pks_of(given_back)
        problem = choose.one_of((Undecodable("not_json"), Undecodable("no_id", "$.id" * 70, "a number")))
        letters = tuple(
            DeadLetter(
                pk=pk,
                event_id=choose.one_of(EVENTS),
                workspace_id=choose.one_of(WORKSPACES),
                problem=problem,
                held=choose.below(3) == 2,
            )
            for pk in dead
        )
        cut = Cut(
            blocks=tuple(
                replace(block, pks=block.pks & kept, digest=digest, ids=5)
                for block in blocks
                if block not in given_back
            ),
            pks=kept,
            counts=Counts(dead=len(dead)),
            digest=digest,
            given_back=given_back,
            dead_letters=letters,
            oldest_ms=maybe(choose, stamp_ms),
            newest_ms=maybe(choose, stamp_ms),
            generation=maybe(choose, lambda choose: choose.below(3)),
            note=maybe(choose, lambda choose: choose.one_of(("view v failed", "a note", "é" * 1100))),
        )
        if batch is None or batch.state is State.CLAIMED or choose.below(4) == 3:
            return f"seal {claim.batch_id} with {kept}, dead {dead}", lambda side: side.outbox.seal(claim, cut)
        instead = batch.digest if choose.below(4) else "another"
        title = f"replace the cut of {claim.batch_id} by {kept}"
        return title, lambda side: side.outbox.replace_cut(claim, cut, instead_of=instead)

    def _write_step(self) -> Step:
        choose, claim = self._choices, self._claim()
        batch = self._batch(claim)
        digest = batch.digest if batch is not None and choose.below(5) else "another"
        lease_s, number, wait_ms = self._lease_s(), claim.batch_id, choose.one_of((0, 1000, -1))
        until_ms = START_MS + choose.below(3)
        error = choose.one_of(("rows changed", "view v failed", "x" * 1100))
        steps: tuple[Step, ...] = (
            (f"record {number} as written", lambda side: side.outbox.record_written(claim, digest)),
            (f"begin to write {number}", lambda side: side.outbox.begin_write(claim, lease_s)),
            (f"renew {number}", lambda side: side.outbox.renew(claim, lease_s)),
            (f"allow inserts of {number}", lambda side: side.outbox.allow_inserts(claim, digest, lease_s, until_ms)),
            (f"stop {number}", lambda side: side.outbox.stop(claim, error, wait_ms=wait_ms)),
            self._cut_step(),
        )
        return choose.one_of((steps[0], *steps))

    def _mark_step(self) -> Step:
        choose, claim = self._choices, self._claim()
        batch = self._batch(claim)
        pks = batch.pks if batch is not None and batch.pks else PkSet(((1, 3),))
        if choose.below(3) == 2:
            pks = next(pks.chunks(1 + choose.below(len(pks))))
        at_ms = (batch.exported_at_ms if batch is not None else None) or START_MS
        known = attempted(self._sides[0], lambda: self._sides[0].outbox.own_ids(pks, at_ms))
        before = choose.one_of((Marked(), Marked(elsewhere=1, vanished=2, ids=7)))
        ids = known + before.ids if choose.below(4) else 12345
        number = claim.batch_id
        steps: tuple[Step, ...] = (
            (
                f"finish to mark {number}: {pks}",
                lambda side: side.outbox.finish_mark(claim, pks, at_ms, before, ids=ids),
            ),
            (f"mark {pks} of {number}", lambda side: side.outbox.mark(claim, pks, at_ms)),
            (f"own ids of {number}", lambda side: side.outbox.own_ids(pks, at_ms)),
            (f"take {pks} of {number} back", lambda side: side.outbox.take_back(claim, pks, at_ms)),
            (f"leave {number} written", lambda side: side.outbox.leave_written(claim, "locked")),
        )
        return choose.one_of((steps[0], *steps))

    def _together(self) -> Step:
        """Effects in one transaction: all of them, or none."""
        steps = [self._choices.one_of((self._write_step, self._mark_step))() for _ in range(2)]

        def work(side: Side) -> Any:
            with side.outbox.one_transaction():
                return [part(side) for _, part in steps]

        return f"together: {', '.join(title for title, _ in steps)}", work

    # ── reports ──────────────────────────────────────────────────────────────────────────────────

    def _look(self) -> Step:
        choose, pks = self._choices, self._pks()
        row_bytes, version = choose.one_of((10, 8 * 1024**2)), choose.one_of((None, *VERSIONS))
        owner, age_s = choose.one_of(("run 1", "run 2")), choose.one_of((0, 1, 100))
        count_to = choose.one_of((100, 2))
        since = Moment(batch_id=choose.below(3), at_ms=START_MS - choose.below(2))
        steps: tuple[Step, ...] = (
            ("batch_holders", lambda side: side.outbox.batch_holders()),
            (f"read {pks}", lambda side: list(side.outbox.read(pks, row_bytes=row_bytes, version=version))),
            ("reserve", lambda side: side.outbox.reserve_inserted_at(2)),
            ("written_within", lambda side: side.outbox.written_within(KNOWN, age_s)),
            ("moment", lambda side: side.outbox.moment()),
            ("claimed_since", lambda side: side.outbox.claimed_since(owner, since)),
            ("discrepant_since", lambda side: side.outbox.discrepant_since(since)),
            ("unverified", lambda side: side.outbox.unverified(3)),
            (f"sent_over {pks}", lambda side: side.outbox.sent_over(pks.first, pks.last) if pks else None),
            ("backlog", lambda side: side.outbox.backlog([KNOWN], count_to=count_to)),
            ("dead_by_reason", lambda side: list(side.outbox.dead_by_reason().items())),
        )
        return choose.one_of(steps)

    def _search(self) -> Step:
        choose, pks, at_ms = self._choices, self._pks(), START_MS + self._choices.one_of((0, -1, 1, -70_000, 70_000))
        versions = [choose.one_of(VERSIONS), KNOWN]
        which = RowFilter(
            event_ids=choose.one_of(((), ("e1", "e2"))),
            workspace_id=choose.one_of((None, *WORKSPACES)),
            from_event_ms=choose.one_of((None, START_MS)),
            from_exported_ms=choose.one_of((None, START_MS - 5000)),
            to_pk=choose.one_of((None, 9)),
        )
        within = maybe(choose, lambda _: pks)
        steps: tuple[Step, ...] = (
            ("now", lambda side: maintenance(side).now_ms()),
            ("inserted_between", lambda side: maintenance(side).inserted_between(at_ms - 9, at_ms + 9, 0, 5)),
            (f"pks_by_batch {pks}", lambda side: maintenance(side).pks_by_batch(pks)),
            ("batch_with", lambda side: maintenance(side).batch_with(at_ms)),
            ("first_inserted", lambda side: maintenance(side).first_inserted_ms()),
            ("foreign_marks", lambda side: list(maintenance(side).foreign_marks(0, at_ms, versions))),
            ("count_stamped", lambda side: maintenance(side).count_stamped(at_ms)),
            ("stamped", lambda side: maintenance(side).stamped(at_ms, versions)),
            (f"dead_among {pks}", lambda side: maintenance(side).dead_among(pks)),
            (f"marked {which} within {within}", lambda side: list(maintenance(side).marked(which, within))),
            (f"by_workspace {pks}", lambda side: maintenance(side).by_workspace(pks)),
            (f"times {pks}", lambda side: maintenance(side).times(pks)),
            ("actions", lambda side: (maintenance(side).actions(5), maintenance(side).last_actions("retry", 5))),
            ("sweepable", lambda side: maintenance(side).sweepable(at_ms, 0, 5)),
            ("held_back", lambda side: (maintenance(side).held_back(at_ms), maintenance(side).discrepant_due(at_ms))),
            (f"count_due {pks}", lambda side: maintenance(side).count_due(pks, at_ms)),
        )
        return choose.one_of(steps)

    # ── operators ────────────────────────────────────────────────────────────────────────────────

    def _operate(self) -> Step:
        choose, claim, pks = self._choices, self._claim(), self._pks()
        batch = self._batch(claim)
        discrepancy = choose.one_of((Discrepancy(), Discrepancy(missing=1)))
        observed = choose.one_of(({}, {START_MS: Holding(rows=1, fingerprint=2, content=3, workspaces={"w1": 1})}))
        before_ms = START_MS + choose.one_of((70_000, 0, -1))
        if batch is not None and choose.below(3):
            pks = batch.pks or pks
        number = claim.batch_id

        def delete(side: Side) -> Any:
            action_id = maintenance(side).record_action("sweep", ACTOR, {"batch": number})
            return maintenance(side).delete(number, pks, before_ms, action_id)

        def unmark(side: Side) -> Any:
            return maintenance(side).unmark(pks, maintenance(side).record_action("requeue", ACTOR, {"pks": str(pks)}))

        steps: list[Step] = [
            (f"sweep {pks} of {number}", delete),
            (f"unmark {pks}", unmark),
            (f"record {number} as swept", lambda side: maintenance(side).record_swept(number)),
            ("compact", lambda side: maintenance(side).compact(before_ms, 5, ACTOR)),
            ("close letters", lambda side: maintenance(side).close_letters()),
        ]
        if batch is not None:
            verified: Step = (
                f"record {number} as verified: {discrepancy}",
                lambda side: side.outbox.record_verified(batch, discrepancy, observed),
            )
            reconciled: Step = (
                f"record {number} as reconciled: {discrepancy}",
                lambda side: maintenance(side).record_reconciled(batch, discrepancy, observed),
            )
            steps = [verified, verified, reconciled, *steps]
        return choose.one_of(steps)

    def _letters(self) -> Step:
        choose = self._choices
        which = DeadLetterFilter(
            state=choose.one_of((LetterState.OPEN, None, *LetterState)),
            workspace_id=choose.one_of((None, None, *WORKSPACES)),
            reason=choose.one_of((None, None, "not_json")),
            version=choose.one_of((None, None, KNOWN)),
            older_than_s=choose.one_of((None, None, 0, 1)),
            pks=maybe(choose, lambda _: self._pks()) or None,
        )
        at_most, newest, beyond = choose.one_of((None, 1, 3)), bool(choose.below(2)), choose.one_of((None, 5))
        pk = 1 + choose.below(MOST_PK)
        definition = choose.one_of(("$", "another"))

        def counted(side: Side) -> Any:
            found = dead_letters.count(side.outbox, which)
            return [
                found.letters,
                *(list(part.items()) for part in (found.by_reason, found.by_workspace, found.by_version)),
            ]

        def held(side: Side) -> Any:
            with side.outbox.transaction("looking") as connection:
                return list(dead_letters.held_by_detail(connection).items())

        steps: tuple[Step, ...] = (
            (f"retry {which}", lambda side: dead_letters.retry(side.outbox, which, ACTOR, at_most=at_most)),
            (f"discard {which}", lambda side: dead_letters.discard(side.outbox, which, ACTOR, at_most=at_most)),
            (
                f"page {which}",
                lambda side: dead_letters.page(side.outbox, which, newest_first=newest, beyond_pk=beyond),
            ),
            (f"count {which}", counted),
            (f"show {pk}", lambda side: dead_letters.show(side.outbox, pk, with_payload=True)),
            ("release held", lambda side: dead_letters.release_held(side.outbox, lambda _: definition)),
            ("held by detail", held),
        )
        return choose.one_of(steps)

    def _erase(self) -> Step:
        erasure = Erasure(workspace_id=self._choices.one_of(WORKSPACES), from_ms=self._choices.one_of((None, START_MS)))

        def work(side: Side) -> Any:
            return maintenance(side).add_erasures(ACTOR, [erasure, erasure]), maintenance(side).erasures()

        return f"erase {erasure}", work

    # ── others ───────────────────────────────────────────────────────────────────────────────────

    def _other_hands(self) -> Step:
        """The application, another exporter, an administrator."""
        choose, pk = self._choices, 1 + self._choices.below(MOST_PK)
        version, event, workspace = choose.one_of(VERSIONS), choose.one_of(EVENTS), choose.one_of(WORKSPACES)
        write = (
            "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
            "VALUES (:version, :workspace_id, :event_id, '{}', 1)"
        )
        changes: tuple[tuple[str, dict[str, Any]], ...] = (
            (write, {"version": KNOWN, "workspace_id": workspace, "event_id": event}),
            ("DELETE FROM clickhouse_outbox WHERE pk = :pk", {"pk": pk}),
            ("UPDATE clickhouse_outbox SET deleted_at = :at WHERE pk = :pk", {"at": stamp_ms(choose), "pk": pk}),
            ("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk = :pk", {"pk": pk}),
            ("UPDATE clickhouse_outbox SET payload = :new WHERE pk = :pk", {"new": choose.one_of(PAYLOADS), "pk": pk}),
            ("UPDATE clickhouse_outbox SET event_id = :new WHERE pk = :pk", {"new": event, "pk": pk}),
            ("UPDATE clickhouse_outbox SET version = :new WHERE pk = :pk", {"new": version, "pk": pk}),
            (
                "UPDATE clickhouse_outbox_batch SET state = 'paused' WHERE batch_id = :id AND state = 'claimed'",
                {"id": pk},
            ),
        )
        statement, values = choose.one_of((changes[0], *changes))

        def work(side: Side) -> Any:
            with side.outbox.engine.begin() as connection:
                result = connection.execute(sa.text(statement), values)
                return result.lastrowid if statement is write else result.rowcount

        return f"{statement} {values}", work

    def _set_clock(self) -> Step:
        by_ms = self._choices.one_of((1000, 60_000, 1, -1, -60_000))
        for side in self._sides:
            side.now_ms += by_ms
        return f"the clock steps {by_ms} ms", lambda side: maintenance(side).now_ms()


@contextmanager
def _keys_of_plans(number: int) -> Iterator[None]:
    """The random key of a plan is the same on both sides."""
    with patch.object(outbox.secrets, "token_hex", lambda size: f"{number:08x}" * 4):
        yield
