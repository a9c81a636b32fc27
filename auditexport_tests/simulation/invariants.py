"""The invariants of the design, checked whenever one of the two servers commits something.

Later runs repair a lot: another run finishes a batch that a zombie changed, and the end of the history does not show the fault. So
each rule is checked at the moment at which it could be broken.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from auditexport_pipeline.core.batch import OPEN, Batch, Block, State, blocks_from_text
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import StoredEntry
from auditexport_tests.chaos.application import FOREIGN_MARK, Book
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.audit_log import Watch
from auditexport_tests.simulation.clickhouse_server import SimulatedClickHouse
from auditexport_tests.simulation.mysql_server import Change, Row, SimulatedMySQL

LEDGER = "clickhouse_outbox_batch"
# Columns that a plan, a renewed lease or a reason for waiting changes. A change of any other column is work on the batch.
NO_WORK = frozenset(("lease_until_ms", "epoch", "claim_key", "owner", "process", "last_error"))
STEPS: Mapping[State, Collection[State]] = {
    State.CLAIMED: (State.SEALED,),
    State.SEALED: (State.SEALED, State.WRITTEN, State.STOPPED, State.EXPORTED),
    State.STOPPED: (State.SEALED, State.WRITTEN),
    State.WRITTEN: (State.WRITTEN, State.EXPORTED),
    State.EXPORTED: (State.EXPORTED, State.VERIFIED, State.DISCREPANT),
    State.DISCREPANT: (State.DISCREPANT, State.VERIFIED, State.COMPACTED),
    State.VERIFIED: (State.VERIFIED, State.DISCREPANT, State.COMPACTED),
}
Event = tuple[str, str]  # workspace_id and event_id


@dataclass(eq=False)
class Insert:
    """An INSERT that a run has sent, until the server has stored or refused it."""

    batch: Batch
    block: Block
    payloads: Sequence[bytes]
    deadline_ms: int
    offset_ms: int  # of ClickHouse's clock when it was sent
    arrives_s: float = 0.0

    def arrive(self, at_s: float) -> None:
        self.arrives_s = at_s

    @property
    def is_first(self) -> bool:
        return not self.batch.is_requeue(self.block)

    @property
    def what(self) -> str:
        return f"block {self.block.number} of batch {self.batch.batch_id}"


class Invariants(Watch):
    """What both servers did so far, as far as the rules need it. `broken` has a sentence for each rule that was broken."""

    def __init__(
        self,
        mysql: SimulatedMySQL,
        clickhouse: SimulatedClickHouse,
        book: Book,
        exporters: Callable[[], Collection[str]],
    ) -> None:
        """`exporters` are the owners of all runs and verbs so far: other processes may do as they like."""
        self.broken: list[str] = []
        self.armed: list[tuple[str, str, Callable[[], object]]] = []  # an owner, an effect, and what follows it
        self.forgot = False  # a failover lost commits: the ledger is not what it was
        self._mysql = mysql
        self._clickhouse = clickhouse
        self._book = book  # gets to know which rows were requeued
        self._exporters = exporters
        self._at_work: list[Insert] = []
        self._stored_at: dict[Event, int] = {}  # the step of the last time
        self._cleared_at: dict[int, int] = {}  # by pk
        self._stored_blocks: set[int] = set()  # inserted_at of first exports
        self._times: dict[int, int] = {}  # inserted_at of first exports: the batch
        mysql.on_commit.append(self._commit)
        clickhouse.on_store.append(self._store)

    def forget(self) -> None:
        """A failover lost commits."""
        self.forgot = True
        self._cleared_at.clear()

    def _fire(self, owner: str, effect: str) -> None:
        """What the world wants to happen right after this effect."""
        due = [one for one in self.armed if one[:2] == (owner, effect)]
        self.armed = [one for one in self.armed if one not in due]
        for _, _, act in due:
            act()

    def _require(self, holds: bool, sentence: str) -> None:
        if not holds and sentence not in self.broken:
            self.broken.append(sentence)
            self._mysql.scheduler.tell(f"BROKEN: {sentence}")

    # ── MySQL ────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, changes: Sequence[Change]) -> None:
        actor = self._mysql.scheduler.process.name
        exporter = actor in self._exporters()
        for change in changes:
            if change.table == LEDGER and change.key == 0 and change.before is not None and change.after is not None:
                last_ms, now_ms = change.before["inserted_at_ms"], change.after["inserted_at_ms"]
                self._require(now_ms >= last_ms, f"{now_ms} is reserved as inserted_at after {last_ms}")
            elif change.table == LEDGER and change.key and change.after is not None:
                self._ledger(actor, change.key, change.before, change.after)
                was = change.before["state"] if change.before is not None else ""
                if not self.forgot and was in ("sealed", "written") and change.after["state"] == "exported":
                    self._exported(actor, change.after, changes)
                self._fire(actor, change.after["state"])
            elif change.table == OUTBOX and change.before is not None:
                self._outbox(actor if exporter else "", change.key, change.before, change.after, changes)

    def _ledger(self, actor: str, batch_id: int, before: Row | None, after: Row) -> None:
        if not self.forgot:
            self._own_times(batch_id, after)
        if before is None:
            self._begins(batch_id, after)
            return
        was, now = State(before["state"]), State(after["state"])
        changed = {name for name in after if before[name] != after[name]}
        work = changed - NO_WORK
        if was is not now:
            self._require(now in STEPS[was], f"batch {batch_id} went from {was} to {now}")
        if (was, now) == (State.SEALED, State.EXPORTED) and not self.forgot:
            self._exported_at_once(batch_id, after)
        if (was in OPEN and work) or "attempts" in work:
            self._require(
                self._held(actor, before),
                f"{actor} changed {', '.join(sorted(work))} of batch {batch_id}, which {before['owner']} holds",
            )
            self._require(
                "attempts" not in work or after["attempts"] > before["attempts"], f"batch {batch_id} forgot attempts"
            )
        if "manifest" in work and not self.forgot and was in (State.SEALED, State.STOPPED):
            self._left_the_cut(batch_id, before, after)

    def _begins(self, batch_id: int, row: Row) -> None:
        """A batch that is sealed by the commit that claims it is no requeue, and what may be sent of it is bounded."""
        if row["state"] != State.CLAIMED:
            sealed = row["state"] == State.SEALED and not row["generation"] and row["digest"]
            self._require(bool(sealed), f"batch {batch_id} began as {row['state']}, of generation {row['generation']}")
            bounded = row["attempts"] == 1  # and nothing is sent before the ledger knows until when
            self._require(bounded, f"batch {batch_id} began with {row['attempts']} attempts")

    def _exported_at_once(self, batch_id: int, row: Row) -> None:
        """A batch skips `written` only at its first attempt, of a first export, and when all its blocks are stored."""
        first = (row["attempts"], row["generation"]) == (1, 0)
        self._require(first, f"batch {batch_id} skipped written at attempt {row['attempts']}")
        times = {block.inserted_at_ms for block in blocks_from_text(row["manifest"])[0]}
        self._require(
            times <= self._stored_blocks, f"batch {batch_id} skipped written, and not all its blocks are stored"
        )

    def _held(self, actor: str, row: Row) -> bool:
        plan = self._mysql.scheduler.current.process.plan
        return row["owner"] == actor and plan in (None, row["claim_key"])

    def _own_times(self, batch_id: int, row: Row) -> None:
        """One block, one `inserted_at`, which no other block had, but of a requeue."""
        first = [block for block in blocks_from_text(row["manifest"])[0] if not row["generation"] or block.first]
        if row["state"] == State.CLAIMED and row["generation"]:
            return  # which of these rows are sent again is not known before the seal
        for block in first:
            owner = self._times.setdefault(block.inserted_at_ms, batch_id)
            self._require(
                owner == batch_id, f"batches {owner} and {batch_id} have the inserted_at {block.inserted_at_ms}"
            )
        times = [block.inserted_at_ms for block in first]
        self._require(len(set(times)) == len(times), f"two blocks of batch {batch_id} have one inserted_at")

    def _left_the_cut(self, batch_id: int, before: Row, after: Row) -> None:
        """A block is cut again only when no INSERT of it can be at work, unless ClickHouse would refuse it anyway."""
        left = {(block.number, block.digest) for block in blocks_from_text(after["manifest"])[0]}
        for insert in self._at_work:
            block = insert.block
            if insert.batch.batch_id != batch_id or not insert.is_first or (block.number, block.digest) in left:
                continue
            sealed = {(one.number, one.digest) for one in blocks_from_text(before["manifest"])[0]}
            if (block.number, block.digest) in sealed and self._can_be_stored(insert):
                self._require(
                    False, f"batch {batch_id} was cut again while an INSERT of its block {block.number} was at work"
                )

    def _can_be_stored(self, insert: Insert) -> bool:
        clickhouse = self._clickhouse
        late_ms = int(1000 * (insert.arrives_s - clickhouse.scheduler.now_s))
        if late_ms > 0 and clickhouse.now_ms() + late_ms > insert.deadline_ms:
            return False
        entries, refusal = clickhouse.parse(insert.payloads, insert.block.inserted_at_ms)
        return refusal is None and not any(map(clickhouse.conditions.table_refuses, entries))

    def _outbox(self, exporter: str, pk: int, before: Row, after: Row | None, changes: Sequence[Change]) -> None:
        step = self._mysql.scheduler.steps
        if after is None:
            self._cleared_at.pop(pk, None)
            if exporter:
                event = (before["workspace_id"], before["event_id"])
                self._require(before["deleted_at"] is not None, f"{exporter} deleted row {pk}, which is not exported")
                self._require(event in self._stored_at, f"{exporter} deleted row {pk}, which ClickHouse never had")
        elif before["deleted_at"] is not None and after["deleted_at"] is None:
            if not self._open_batches(pk):
                self._cleared_at[pk] = step
                self._book.rows[pk].requeued += bool(exporter)
        elif exporter and not self.forgot and before["deleted_at"] is None and after["deleted_at"] is not None:
            # The commit that exports a batch can fix its stamp too.
            stamps = {
                one.key: one.after["exported_at_ms"]
                for one in changes
                if one.table == LEDGER and one.after is not None and one.after["state"] == State.EXPORTED
            }
            holders = [
                row
                for row in self._open_batches(pk)
                if stamps.get(row["batch_id"], row["exported_at_ms"]) == after["deleted_at"]
            ]
            held = any(self._held(exporter, row) for row in holders)
            self._require(held, f"{exporter} marked row {pk}, and holds no batch with this mark that has it")
            self._require(
                after["deleted_at"] != FOREIGN_MARK, f"{exporter} marked row {pk} with a mark that is no time"
            )

    def _exported(self, exporter: str, batch: Row, changes: Sequence[Change]) -> None:
        """A batch is exported when ClickHouse has all that it marked. Until then it may take marks back from other events."""
        rows = dict(self._mysql.tables[OUTBOX].rows) | {one.key: one.after for one in changes if one.table == OUTBOX}
        for pk in PkSet.parse(batch["pks"]):
            row = rows.get(pk)
            if row is None or row["deleted_at"] != batch["exported_at_ms"]:
                continue
            stored = self._stored_at.get((row["workspace_id"], row["event_id"]))
            self._require(stored is not None, f"{exporter} marked row {pk}, which ClickHouse never had")
            again = stored is None or stored > self._cleared_at.get(pk, -1)
            self._require(again, f"{exporter} marked row {pk} again, and did not send it after its mark was cleared")

    def _open_batches(self, pk: int) -> list[Row]:
        rows = self._mysql.tables[LEDGER].rows
        return [
            row for key, row in rows.items() if key and State(row["state"]) in OPEN and pk in PkSet.parse(row["pks"])
        ]

    # ── ClickHouse ───────────────────────────────────────────────────────────────────────────────

    def asks(self) -> None:
        """Called before each request to ClickHouse: no transaction in MySQL may be open across it."""
        task = self._mysql.scheduler.current
        mine = any(transaction.task is task for transaction in self._mysql.open)
        self._require(not mine, f"{task.process.name} asks ClickHouse while its transaction in MySQL is open")

    @contextmanager
    def insert(
        self, batch: Batch, block: Block, payloads: Sequence[bytes], deadline_ms: int
    ) -> Iterator[Callable[[float], None]]:
        insert = Insert(batch, block, payloads, deadline_ms, self._clickhouse.clock_offset_ms)
        row = self._mysql.tables[LEDGER].rows.get(batch.batch_id)
        allowed = row is not None and row["attempts"] > 0 and row["inserts_until_ms"] > deadline_ms
        self._require(allowed or self.forgot, f"{insert.what} was sent, and the ledger does not know until when")
        self._at_work.append(insert)
        self._fire(batch.owner, "INSERT")
        try:
            yield insert.arrive
        finally:
            self._at_work.remove(insert)

    def _store(self, entries: Sequence[StoredEntry], token: str) -> None:
        """A block is in the table, under a token that was not known."""
        for entry in entries:
            self._stored_at[entry.key[0], entry.key[3]] = self._clickhouse.scheduler.steps
        insert = next((one for one in self._at_work if one.batch.token(one.block) == token), None)
        if insert is None or not insert.is_first or self.forgot:
            return
        block, row = insert.block, self._mysql.tables[LEDGER].rows.get(insert.batch.batch_id)
        self._require(block.inserted_at_ms not in self._stored_blocks, f"{insert.what} was stored a second time")
        self._stored_blocks.add(block.inserted_at_ms)
        if row is None:
            self._require(False, f"{insert.what} was stored, and the ledger has no such batch")
            return
        listed = {(one.number, one.digest) for one in blocks_from_text(row["manifest"])[0]}
        self._require(
            (block.number, block.digest) in listed, f"{insert.what} was stored, and the ledger does not list it"
        )
        # What the clock was set forward by since it was sent is no time that has passed.
        forward_ms = max(0, self._clickhouse.clock_offset_ms - insert.offset_ms)
        late_ms = self._clickhouse.now_ms() - forward_ms - row["inserts_until_ms"]
        self._require(late_ms <= 0, f"{insert.what} was stored {late_ms} ms after the ledger's limit for its INSERTs")
