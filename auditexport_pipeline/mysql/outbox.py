"""MySQL: the application's outbox, our ledger and our dead letters, as `core.ports.Outbox`.

What belongs here: effects and their fences. What does not: statements (`outbox.sql`), transactions (`mysql.database`),
creating and checking tables (`schema`), and decisions (`core`).
"""

from __future__ import annotations

import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from typing import Any, TypeVar

import msgspec
from sqlalchemy import Connection, Row
from sqlalchemy.exc import OperationalError

from auditexport_pipeline.core import threads
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import (
    Batch,
    Block,
    Claim,
    Counts,
    Holding,
    State,
    blocks_from_text,
    blocks_to_text,
    observed_from_text,
    observed_to_text,
    pks_of,
)
from auditexport_pipeline.core.errors import (
    LeaseLost,
    OutboxLocked,
    RowsLocked,
    RowsSwapped,
    SetupIncomplete,
)
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.ports import (
    Cut,
    Discrepancy,
    Holder,
    Marked,
    Moment,
    OpenBatch,
    PlannedBlock,
    StoredRow,
    UnreadableBatch,
)
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import dead_letters
from auditexport_pipeline.mysql.backlog import probe
from auditexport_pipeline.mysql.blockers import holders
from auditexport_pipeline.mysql.database import Database
from auditexport_pipeline.mysql.errors import LOCK_WAIT_TIMEOUT, code_and_words, translated
from auditexport_pipeline.mysql.marking import LIST_PKS, by_shape, own_ids, stamp, stamp_unlocked, take_back
from auditexport_pipeline.mysql.statements import SQL

# The rows of one SELECT are in memory as the driver's tuples before they are decoded: a few megabytes at this size.
READ_ROWS = 5_000
# Rows whose ids one statement sums up.
OWN_ROWS = 50_000
READ_BYTES = 8 * 1024**2
# A payload of up to this many times the average is read together with the others.
SHARES = 4
# No server accepts a longer payload (max_allowed_packet).
LONGEST_PAYLOAD_BYTES = 1024**3
# At most this many exported batches of versions that are not installed are skipped.
LEFT_ALONE_AT_MOST = 1_000
# The width of the ledger's column.
KEY_LETTERS = 32
# The beginning of the ledger's `last_error` of a discrepant batch.
IN_CLICKHOUSE = "in ClickHouse: "
# A plan that takes longer renews its leases before it commits.
LONG_PLAN_S = 3.0

# States of a batch that its own claim has exported.
CLOSED_HERE = (State.EXPORTED, State.VERIFIED, State.DISCREPANT)
# A function that stamps rows: connection, pks, `deleted_at`.
Stamp = Callable[[Connection, PkSet, int], Marked]
Result = TypeVar("Result")


class MySQLOutbox(Database):
    """`core.ports.Outbox` in the MySQL or MariaDB database that a SQLAlchemy URL names."""

    # ── planning ─────────────────────────────────────────────────────────────────────────────────

    def batch_holders(self) -> list[Holder]:
        return [
            Holder(
                owner=row.owner,
                process=row.at_work,
                batches=row.batches,
                rows=row.row_count,
                lease_left_s=row.lease_left_ms / 1000,
                lease_until_ms=row.lease_until_ms,
            )
            for row in self.rows("reading the ledger's owners", SQL["batch_holders"])
        ]

    @contextmanager
    def planning(self, owner: str, lease_s: int, process: str = "") -> Iterator[MySQLPlanning]:
        with self.transaction("planning batches") as connection:
            last_epoch, last_ms = _lock_ledger(connection)
            epoch = last_epoch + 1
            connection.execute(SQL["count_plan"], {"epoch": epoch})
            # The key begins with the epoch. So a batch shows whether a release that writes no keys has adopted it
            # since.
            key = f"{_key_of(epoch)}{secrets.token_hex(16)}"[:KEY_LETTERS]
            plan = Plan(epoch=epoch, claim_key=key, owner=owner, process=process, lease_ms=lease_s * 1000)
            started = threads.monotonic()
            yield MySQLPlanning(connection, plan, last_ms=last_ms)
            if threads.monotonic() - started > LONG_PLAN_S:  # the lease of the first batch began when it was claimed
                _renew_plan(connection, epoch, key, plan.lease_ms)

    def reserve_inserted_at(self, count: int) -> list[int]:
        with self.transaction("reserving an inserted_at") as connection:
            _, last_ms = _lock_ledger(connection)
            now_ms = connection.execute(SQL["now_ms"]).scalar_one()
            return _reserve(connection, max(now_ms, last_ms + 1), count)

    # ── a batch's life ───────────────────────────────────────────────────────────────────────────

    def renew(self, claim: Claim, lease_s: int) -> Batch:
        with self.transaction(f"renewing the lease of batch {claim.batch_id}") as connection:
            return _renew(connection, claim, lease_s)

    def allow_inserts(self, claim: Claim, digest: str, lease_s: int, until_ms: int) -> None:
        with self.transaction(f"renewing the lease of batch {claim.batch_id}") as connection:
            _renew(connection, claim, lease_s)
            _fence(connection, claim, State.SEALED, State.STOPPED, cut_digest=digest)
            values = {"batch_id": claim.batch_id, "until_ms": until_ms, "epoch": claim.epoch, "claim_key": claim.key}
            connection.execute(SQL["allow_inserts"], values)

    def read(self, pks: PkSet, *, row_bytes: int, version: str | None = None) -> Iterator[StoredRow]:
        """The rows of these pks that exist, by ascending pk, marked or not, of one version or of any.

        Memory: `READ_ROWS` rows at a time, fewer where rows are large, and at most `SHARES` times `READ_BYTES`. The
        first SELECT reads each payload up to its share of that. Longer payloads are read again: together up to
        `READ_BYTES`, or one alone. Source: the outbox's primary key; no lock.
        """
        for chunk in pks.chunks(max(1, min(READ_ROWS, READ_BYTES // max(1, row_bytes)))):
            share = SHARES * READ_BYTES // len(chunk)
            found = self._some_rows(chunk, share, version)
            cut_off = [row[0] for row in found if len(row[-1] or b"") == share]
            whole = self._whole(cut_off, version)
            large = set(cut_off)
            for row in found:
                if row[0] in large:
                    row = next(whole)
                    if row is None:  # gone since the first SELECT
                        continue
                pk, event_id, workspace_id, exported_at_ms, payload = row
                yield StoredRow(
                    pk=pk,
                    event_id=event_id,
                    workspace_id=workspace_id,
                    exported_at_ms=exported_at_ms,
                    payload=payload or b"",  # MariaDB returns NULL for one that exceeds max_allowed_packet
                )

    def _some_rows(self, pks: PkSet, most_bytes: int, version: str | None) -> list[Any]:
        with self.transaction("reading outbox rows") as connection:
            return [
                row
                for part, values in by_shape("rows", pks)
                for row in _driver_rows(connection, part, {**values, "most_bytes": most_bytes, "version": version})
            ]

    def _whole(self, pks: Sequence[int], version: str | None) -> Iterator[Any]:
        """These rows with their whole payloads, in the order of the pks; None for a row that is gone."""
        if not pks:
            return
        sizes: dict[int, int] = {}
        with self.transaction("measuring outbox rows") as connection:
            for at in range(0, len(pks), LIST_PKS):
                sizes.update(_driver_rows(connection, "payload_bytes", {"pks": list(pks[at : at + LIST_PKS])}))
        start = size = 0
        for end, pk in enumerate([*pks, None]):
            more = (sizes.get(pk) or 0) if pk is not None else READ_BYTES + 1
            if end > start and size + more > READ_BYTES:
                group = pks[start:end]
                found = {row[0]: row for row in self._some_rows(PkSet.of(group), LONGEST_PAYLOAD_BYTES, version)}
                yield from (found.pop(one, None) for one in group)
                start, size = end, 0
            size += more

    def seal(self, claim: Claim, cut: Cut) -> None:
        self._cut(claim, cut, State.CLAIMED)

    def replace_cut(self, claim: Claim, cut: Cut, *, instead_of: str) -> None:
        self._cut(claim, cut, State.SEALED, State.STOPPED, cut_digest=instead_of)

    def _cut(self, claim: Claim, cut: Cut, *states: State, cut_digest: str | None = None) -> None:
        # The ledger finds a requeue by all rows that it may have sent, also by those that it gave back.
        sent = cut.pks | pks_of(cut.given_back)
        with self.transaction(f"sealing batch {claim.batch_id}") as connection:
            _fence(connection, claim, *states, cut_digest=cut_digest)
            connection.execute(
                SQL["cut"],
                {
                    "batch_id": claim.batch_id,
                    "rows": len(cut.pks),
                    "entries": sum(block.rows for block in cut.blocks),
                    "bytes": sum(block.bytes for block in cut.blocks),
                    "first_pk": sent.first if sent else None,
                    "last_pk": sent.last if sent else None,
                    "pks": str(cut.pks),
                    "manifest": blocks_to_text(cut.blocks, cut.given_back),
                    "counts": _counts_to_text(cut.counts),
                    "digest": cut.digest,
                    "inserted_at_ms": max((block.inserted_at_ms for block in cut.blocks), default=0),
                    "oldest_ms": cut.oldest_ms,
                    "newest_ms": cut.newest_ms,
                    "generation": cut.generation,
                    "note": cut.note[:1000] if cut.note is not None else None,
                },
            )
            dead_letters.add(connection, claim, cut.dead_letters)

    def begin_write(self, claim: Claim, lease_s: int, until_ms: int = 0) -> Batch:
        with self.transaction(f"beginning to write batch {claim.batch_id}") as connection:
            batch = _fenced(connection, claim, State.SEALED, State.STOPPED, State.WRITTEN, *CLOSED_HERE)
            values = {"batch_id": claim.batch_id, "lease_ms": lease_s * 1000, "until_ms": until_ms}
            connection.execute(SQL["begin_write"], values)
            until_ms = max(batch.inserts_until_ms, until_ms)
            return replace(batch, attempts=batch.attempts + 1, inserts_until_ms=until_ms)

    def stop(self, claim: Claim, error: str, *, wait_ms: int) -> None:
        with self.transaction(f"stopping batch {claim.batch_id}") as connection:
            _fence(connection, claim, State.SEALED)
            values = {"batch_id": claim.batch_id, "error": error[:1000], "wait_ms": max(0, wait_ms)}
            connection.execute(SQL["stop"], values)

    def record_written(self, claim: Claim, digest: str) -> Batch:
        with self.transaction(f"recording batch {claim.batch_id} as written") as connection:
            _fence(connection, claim, State.SEALED, State.STOPPED, cut_digest=digest)
            connection.execute(SQL["record_written"], {"batch_id": claim.batch_id})
            return _own(connection, claim)

    def mark(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> Marked:
        def work(connection: Connection, stamp_rows: Stamp) -> Marked:
            _fence(connection, claim, State.WRITTEN, shared=True)
            return stamp_rows(connection, pks, exported_at_ms)

        return self._marking(f"marking rows of batch {claim.batch_id}", work)

    def finish_mark(self, claim: Claim, pks: PkSet, exported_at_ms: int, before: Marked, *, ids: int) -> Batch:
        def work(connection: Connection, stamp_rows: Stamp) -> Batch:
            batch = _fenced(connection, claim, State.WRITTEN)
            last = stamp_rows(connection, pks, exported_at_ms)
            if last.locked:
                raise RowsLocked(
                    f"{len(last.locked):,} of the last rows of batch {claim.batch_id} are locked; run again"
                )
            total = before + last
            if total.ids != ids:
                raise RowsSwapped(
                    f"rows under the pks of batch {claim.batch_id} are not those that it sealed; run again"
                )
            counts = replace(
                batch.counts,
                vanished=batch.counts.vanished + total.vanished,
                elsewhere=batch.counts.elsewhere + total.elsewhere,
                unmarked=total.vanished + total.elsewhere,
            )
            connection.execute(SQL["record_exported"], {"batch_id": claim.batch_id, "counts": _counts_to_text(counts)})
            return replace(batch, state=State.EXPORTED, counts=counts, last_error=batch.view_note)

        return self._marking(f"marking the last rows of batch {claim.batch_id}", work)

    def _marking(self, what: str, work: Callable[[Connection, Stamp], Result]) -> Result:
        """Runs `work` in a transaction that waits for a lock only briefly, and marks all rows by one UPDATE. Where rows
        are locked, or are not as the batch had them, runs it again in another transaction, which marks row by row. An
        open transaction cannot be rolled back in part, so there rows are marked row by row at once.
        """
        if not self.in_transaction:
            with suppress(_NotByOneUpdate), translated(what):
                try:
                    with self.marking_engine.begin() as connection:
                        return work(connection, _stamp)
                except OperationalError as error:
                    if code_and_words(error.orig)[0] != LOCK_WAIT_TIMEOUT:
                        raise
                    raise _NotByOneUpdate from None
        with self.transaction(what, self.marking_engine) as connection:
            return work(connection, self._stamp_unlocked)

    def _stamp_unlocked(self, connection: Connection, pks: PkSet, exported_at_ms: int) -> Marked:
        """As `marking.stamp_unlocked`. That skips locked rows, so if it waits for a lock, the whole table is locked."""
        try:
            return stamp_unlocked(connection, pks, exported_at_ms)
        except OperationalError as error:
            if code_and_words(error.orig)[0] != LOCK_WAIT_TIMEOUT or not error.statement:
                raise
            raise OutboxLocked(
                f"clickhouse_outbox is locked as a whole. {holders(self.engine, error.statement, error.params)}"
            ) from None

    def own_ids(self, pks: PkSet, exported_at_ms: int) -> int:
        ids = 0
        for chunk in pks.chunks(OWN_ROWS):
            with self.transaction("comparing rows with their batch") as connection:
                ids += own_ids(connection, chunk, exported_at_ms)
        return ids

    def take_back(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> None:
        with self.transaction(f"taking marks back of batch {claim.batch_id}") as connection:
            _fence(connection, claim, State.WRITTEN, shared=True)
            take_back(connection, pks, exported_at_ms)

    def leave_written(self, claim: Claim, why: str) -> Batch:
        with self.transaction(f"leaving batch {claim.batch_id} unmarked") as connection:
            _fence(connection, claim, State.WRITTEN)
            connection.execute(SQL["leave_written"], {"batch_id": claim.batch_id, "error": why[:1000]})
            return _own(connection, claim)

    def holders(self, pks: PkSet) -> str:
        return holders(self.engine, f"SELECT pk FROM clickhouse_outbox WHERE pk = {pks.first:d} FOR UPDATE")

    def written_within(self, version: str, age_s: int) -> bool:
        values = {"version": version, "age_s": age_s}
        return bool(self.rows("looking for batches that were written", SQL["written_within"], values))

    def moment(self) -> Moment:
        (row,) = self.rows("reading the ledger's last batch", SQL["moment"])
        return Moment(batch_id=row.batch_id or 0, at_ms=row.now_ms)

    def claimed_since(self, owner: str, since: Moment) -> list[Batch]:
        values = {"owner": owner, "after_id": since.batch_id}
        return [batch_of(row) for row in self.rows("listing a run's batches", SQL["claimed_since"], values)]

    def discrepant_since(self, since: Moment) -> dict[int, str]:
        found = self.rows("listing discrepant batches", SQL["discrepant_since"], {"since_ms": since.at_ms})
        return {row.batch_id: row.last_error.removeprefix(IN_CLICKHOUSE) for row in found}

    def unverified(self, batches: int) -> list[Batch]:
        # Batches of a version that is not installed stay as they are, and must not take the place of others.
        values = {"row_limit": batches + LEFT_ALONE_AT_MOST}
        found = self.rows("listing batches to verify", SQL["unverified"], values)
        return [batch_of(row) for row in found if row.version in VERSIONS][:batches]

    def record_verified(self, batch: Batch, discrepancy: Discrepancy, observed: Mapping[int, Holding]) -> bool:
        state = State.DISCREPANT if discrepancy else State.VERIFIED
        error = f"{IN_CLICKHOUSE}{discrepancy}" if discrepancy else ""
        with self.transaction(f"recording the verification of batch {batch.batch_id}") as connection:
            recorded = connection.execute(
                SQL["record_verified"],
                {
                    "batch_id": batch.batch_id,
                    "digest": batch.digest,
                    "state": str(state),
                    "error": error,
                    "observed": observed_to_text(observed),
                },
            )
            return recorded.rowcount > 0

    def sent_over(self, first_pk: int, last_pk: int) -> list[Batch]:
        with self.transaction("reading the ledger") as connection:
            return _sent_over(connection, first_pk, last_pk)

    def batches(self, batch_ids: Iterable[int]) -> list[Batch]:
        with self.transaction("reading batches") as connection:
            found = [connection.execute(SQL["batch"], {"batch_id": batch_id}).one_or_none() for batch_id in batch_ids]
            return [batch_of(row) for row in found if row is not None]

    # ── the backlog ──────────────────────────────────────────────────────────────────────────────

    def backlog(self, versions: Sequence[str], *, count_to: int) -> Backlog:
        with self.transaction("probing the backlog") as connection:
            return probe(connection, versions, count_to)

    def dead_by_reason(self) -> dict[str, int]:
        """Open dead letters by reason, most frequent first."""
        return {row.reason: row.n for row in self.rows("counting dead letters", SQL["dead_by_reason"])}


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a plan writes into its batches; the fields are named as the parameters of the statements."""

    epoch: int
    claim_key: str
    owner: str
    process: str
    lease_ms: int


class MySQLPlanning:
    """`core.ports.Planning`, in a transaction that has locked the ledger."""

    def __init__(self, connection: Connection, plan: Plan, *, last_ms: int) -> None:
        self._connection = connection
        self._plan = plan
        self._last_ms = last_ms
        self._letters: tuple[int, int] | None = None

    def open_batches(self) -> list[OpenBatch]:
        rows = self._connection.execute(SQL["open_batches"])
        return [
            OpenBatch(batch=batch_of(row), lease_expired=bool(row.lease_expired), lease_left_ms=row.lease_left_ms)
            for row in rows
        ]

    def unreadable(self) -> list[UnreadableBatch]:
        known = {str(state) for state in State} | {"head"}
        states = {row.state for row in self._connection.execute(SQL["states"])} - known
        return [
            UnreadableBatch(batch_id=row.batch_id, state=state, pks=PkSet.parse(row.pks))
            for state in sorted(states)
            for row in self._connection.execute(SQL["in_state"], {"state": state})
        ]

    def begin_lease_again(self, batch: Batch) -> None:
        self._connection.execute(
            SQL["begin_lease_again"], {"batch_id": batch.batch_id, "lease_ms": self._plan.lease_ms}
        )

    def adopt(self, batch: Batch) -> Claim | None:
        if not list(self._connection.execute(SQL["unlocked"], {"batch_ids": [batch.batch_id]})):
            return None
        self._connection.execute(SQL["adopt"], {"batch_id": batch.batch_id, **asdict(self._plan)})
        return replace(batch.claim, epoch=self._plan.epoch, key=self._plan.claim_key, adopted=True)

    def candidates(self, version: str, from_pk: int, rows: int) -> PkSet:
        page = {"version": version, "from_pk": from_pk, "row_limit": rows}
        pks = PkSet(tuple(self._read("candidates", page)))
        first_letter, last_letter = self._holding_letters()
        if pks and first_letter <= last_letter and first_letter <= pks.last and last_letter >= pks.first:
            return PkSet(tuple(self._read("candidates_beside_letters", page)))
        return pks

    def _holding_letters(self) -> tuple[int, int]:
        """The first and the last pk that a dead letter holds, read once: other rows get no letter during a plan.

        Not `cached_property`: until Python 3.12 its lock is one for all plans of the process, held during the statement.
        """
        if self._letters is None:
            ((first, last),) = self._read("holding_letters", {})
            self._letters = (first, last) if last is not None else (1, 0)
        return self._letters

    def _read(self, statement: str, values: Mapping[str, object]) -> list[Any]:
        return _driver_rows(self._connection, statement, values)

    def payload_bytes(self, pks: Sequence[int]) -> dict[int, int]:
        return dict(self._read("payload_bytes", {"pks": list(pks)}))

    def sent_over(self, first_pk: int, last_pk: int) -> list[Batch]:
        return _sent_over(self._connection, first_pk, last_pk)

    def add(self, version: str, generation: int, blocks: Sequence[PlannedBlock]) -> Claim:
        new = sum(1 for block in blocks if block.inserted_at_ms is None)
        last = self._connection.execute(SQL["moment"]).one()
        reserved = iter(_reserve(self._connection, max(last.now_ms, self._last_ms + 1), new) if new else [])
        planned = tuple(
            Block(
                number=number,
                inserted_at_ms=block.inserted_at_ms if block.inserted_at_ms is not None else next(reserved),
                pks=block.pks,
                bytes=block.bytes,
            )
            for number, block in enumerate(blocks)
        )
        if new:
            self._last_ms = max(block.inserted_at_ms for block in planned)
        pks = pks_of(planned)
        batch_id = last.batch_id + 1
        self._connection.execute(
            SQL["add_batch"],
            {
                **asdict(self._plan),
                "batch_id": batch_id,
                "generation": generation,
                "version": version,
                "rows": len(pks),
                "bytes": sum(block.bytes for block in planned),
                "first_pk": pks.first,
                "last_pk": pks.last,
                "pks": str(pks),
                "manifest": blocks_to_text(planned),
                "inserted_at_ms": max(block.inserted_at_ms for block in planned),
            },
        )
        return Claim(
            batch_id=batch_id,
            epoch=self._plan.epoch,
            key=self._plan.claim_key,
            version=version,
            generation=generation,
            rows=len(pks),
        )


class _NotByOneUpdate(Exception):
    """One UPDATE cannot mark this chunk: rolls its transaction back."""


def _stamp(connection: Connection, pks: PkSet, exported_at_ms: int) -> Marked:
    marked = stamp(connection, pks, exported_at_ms)
    if marked is None:
        raise _NotByOneUpdate
    return marked


def _driver_rows(connection: Connection, statement: str, values: Mapping[str, object]) -> list[Any]:
    """The rows as the driver's tuples: SQLAlchemy's rows would double the cost of reading."""
    cursor = connection.execute(SQL[statement], values).cursor
    assert cursor is not None
    return list(cursor.fetchall())


def _sent_over(connection: Connection, first_pk: int, last_pk: int) -> list[Batch]:
    found = connection.execute(SQL["sent_over"], {"first_pk": first_pk, "last_pk": last_pk})
    return [batch_of(row) for row in found]


def _lock_ledger(connection: Connection) -> tuple[int, int]:
    head = connection.execute(SQL["lock_ledger"]).one_or_none()
    if head is None:
        raise SetupIncomplete("clickhouse_outbox_batch lacks its row 0, the ledger's lock; run `auditexport init`")
    return head.epoch, head.inserted_at_ms


def _reserve(connection: Connection, first_ms: int, count: int) -> list[int]:
    """`count` values of `inserted_at` from this one on, which is greater than every earlier one, and not in the past."""
    connection.execute(SQL["reserve_inserted_at"], {"last_ms": first_ms + count - 1})
    return list(range(first_ms, first_ms + count))


def _fence(
    connection: Connection, claim: Claim, *states: State, cut_digest: str | None = None, shared: bool = False
) -> None:
    """Locks the batch's row of the ledger. Raises `LeaseLost` when another plan has adopted the batch, when the batch
    is past this step, or when it was split meanwhile.
    """
    _checked(connection, "fence_shared" if shared else "fence", claim, states, cut_digest)


def _fenced(connection: Connection, claim: Claim, *states: State) -> Batch:
    """As `_fence`; returns the batch."""
    return batch_of(_checked(connection, "fence_batch", claim, states))


def _checked(
    connection: Connection, fence: str, claim: Claim, states: Sequence[State], cut_digest: str | None = None
) -> Row[tuple[object, ...]]:
    row = connection.execute(SQL[fence], {"batch_id": claim.batch_id}).one_or_none()
    if row is None or not _holds(claim, row):
        raise _lost(claim, row)
    if row.state not in tuple(map(str, states)):
        raise LeaseLost(f"batch {claim.batch_id} is {row.state} already; this attempt came late and changed nothing")
    if cut_digest is not None and row.digest != cut_digest:
        raise LeaseLost(
            f"batch {claim.batch_id} was split meanwhile, by a second attempt of the same step that a queue started; "
            "this attempt is refused and changed nothing. Nothing is lost: the other attempt or the next run continues"
        )
    return row


def _key_of(epoch: int) -> str:
    """The beginning of a plan's key."""
    return f"{epoch:x}-"


def _holds(claim: Claim, row: Row[tuple[object, ...]]) -> bool:
    """Whether the claim still holds the batch. After a failover that lost commits, epochs recur; keys do not."""
    return (row.epoch, row.claim_key) == (claim.epoch, claim.key)


def _renew(connection: Connection, claim: Claim, lease_s: int) -> Batch:
    _renew_plan(connection, claim.epoch, claim.key, lease_s * 1000)
    return _own(connection, claim)


def _renew_plan(connection: Connection, epoch: int, key: str, lease_ms: int) -> None:
    plan = {"epoch": epoch, "claim_key": key}
    leased = list(connection.execute(SQL["leased"], plan).scalars())
    if not leased:
        return
    values = {"lease_ms": lease_ms, **plan}
    try:
        connection.execute(SQL["renew"], {"batch_ids": leased, **values})
    except OperationalError as error:
        if code_and_words(error.orig)[0] != LOCK_WAIT_TIMEOUT:
            raise
        # A batch of the plan is locked. No plan can adopt it meanwhile, and the other batches must not wait for it.
        free = list(connection.execute(SQL["unlocked"], {"batch_ids": leased}).scalars())
        if free:
            connection.execute(SQL["renew"], {"batch_ids": free, **values})


def _lost(claim: Claim, row: Row[tuple[object, ...]] | None) -> LeaseLost:
    if row is None:
        now = "is not in the ledger"
    elif row.epoch == 0:
        now = "is stopped: the first run after its lease takes it up"
    elif row.epoch == claim.epoch:
        now = f"is another batch, of {row.owner}: MySQL has forgotten this plan, as a failover or a restore does"
    else:
        now = f"is held by plan {row.epoch} of {row.owner}"
    return LeaseLost(
        f"batch {claim.batch_id} was claimed by plan {claim.epoch} and now {now}; this run is refused and changed nothing"
    )


def _own(connection: Connection, claim: Claim) -> Batch:
    row = connection.execute(SQL["batch"], {"batch_id": claim.batch_id}).one_or_none()
    if row is None or not _holds(claim, row):
        raise _lost(claim, row)
    return batch_of(row)


def _counts_to_text(counts: Counts) -> str:
    return msgspec.json.encode({name: count for name, count in asdict(counts).items() if count}).decode()


# Columns of the ledger that a batch has under the same names.
_SAME = [
    *("batch_id", "epoch", "generation", "version", "owner", "claim_key", "bytes", "digest", "attempts"),
    *("inserts_until_ms", "exported_at_ms", "last_error", "oldest_ms", "newest_ms"),
]


def batch_of(row: Row[tuple[object, ...]]) -> Batch:
    """The batch of a row with `$batch_columns`."""
    blocks, given_back = blocks_from_text(row.manifest)
    return Batch(
        **{name: getattr(row, name) for name in _SAME},
        state=State(row.state),
        process=row.process if row.claim_key.startswith(_key_of(row.epoch)) else "",
        pks=PkSet.parse(row.pks),
        blocks=blocks,
        given_back=given_back,
        counts=Counts(**msgspec.json.decode(row.counts, type=dict[str, int])) if row.counts else Counts(),
        observed=observed_from_text(row.observed),
    )
