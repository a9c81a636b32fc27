"""What the core needs of MySQL and of ClickHouse, as protocols, and the values that they exchange.

The stores implement the protocols; tests wrap the stores to inject crashes. What does not belong here: SQL, drivers,
decisions.

Every method that changes something is one durable effect. When it returns, the effect is complete. When it raises
`TransientError`, nothing has changed; only the outcome of `insert` can be unknown.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol

from auditexport_pipeline.core.actions import Action, Actor, Erasure, RecordedErasure, RowFilter
from auditexport_pipeline.core.batch import Batch, Block, Claim, Counts, Holding
from auditexport_pipeline.core.event import Key, OutboxRow, Undecodable
from auditexport_pipeline.core.pks import PkSet

# Event ids that a discrepancy names: enough to investigate, few enough for one line.
NAMED_EVENTS = 10


class StoredRow(OutboxRow, gc=False, frozen=True):
    """An outbox row with its mark: `exported_at_ms` is the column `deleted_at`."""

    exported_at_ms: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetter:
    """A row that is set aside: its ids and the reason, never its payload."""

    pk: int
    event_id: str
    workspace_id: str
    problem: Undecodable
    held: bool = False  # the ClickHouse table refuses the row: json_path has the table's definition

    @classmethod
    def of(cls, row: StoredRow, problem: Undecodable) -> DeadLetter:
        return cls(pk=row.pk, event_id=row.event_id, workspace_id=row.workspace_id, problem=problem)


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenBatch:
    """An open batch, for a plan: the plan adopts it, or does not claim its rows."""

    batch: Batch
    lease_expired: bool
    lease_left_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """The last batch of the ledger and the time of the database's clock, at one moment."""

    batch_id: int
    at_ms: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Holder:
    """A run or a process that holds open batches: how many rows, and when its lease ends."""

    owner: str
    process: str  # empty where several processes do the steps
    batches: int
    rows: int
    lease_left_s: float  # 0 or less: the next plan adopts them
    lease_until_ms: int

    def __str__(self) -> str:
        place = f" ({self.process})" if self.process not in ("", self.owner) else ""
        until = time.strftime("%H:%M:%S", time.gmtime(self.lease_until_ms / 1000))
        return f"{self.owner}{place}: {self.rows:,} rows until {until} UTC, in {max(0.0, self.lease_left_s):.0f} s"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedBlock:
    """A block to claim. `inserted_at_ms` is set only for a requeue, which keeps its first `inserted_at`."""

    pks: PkSet
    bytes: int
    inserted_at_ms: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cut:
    """How a batch is cut: its blocks, the rows that it will mark, and the counts of the other rows.

    `note` is a line for the operator, which the ledger stores; None leaves the earlier one there.
    """

    blocks: tuple[Block, ...]
    pks: PkSet
    counts: Counts
    digest: str
    given_back: tuple[Block, ...] = ()
    dead_letters: tuple[DeadLetter, ...] = ()
    oldest_ms: int | None = None
    newest_ms: int | None = None
    generation: int | None = None  # None: as it was
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """The result of marking some rows: how many others had marked, how many are gone, and which ones are locked.

    `locked` rows are unchanged and counted nowhere. `ids` is the sum of `core.event.id_hash` over the rows that have
    the batch's stamp now.
    """

    elsewhere: int = 0
    vanished: int = 0
    ids: int = 0
    locked: PkSet = field(default_factory=PkSet)

    def __add__(self, other: Marked) -> Marked:
        return Marked(
            elsewhere=self.elsewhere + other.elsewhere,
            vanished=self.vanished + other.vanished,
            ids=self.ids + other.ids,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class StoredEntry:
    """One entry in ClickHouse: its sort key, its `inserted_at`, its fingerprint and the hash of its content."""

    key: Key
    inserted_at_ms: int
    fingerprint: int
    content: int


class RefusalKind(str, Enum):
    """The cause that ClickHouse's answer names.

    ROWS: values of the rows, or a constraint or column of the table. VIEW: a materialized view that reads the block.
    MEMORY, SIZE and TIME: a limit that the block exceeds, also a proxy's (HTTP 413 and 504).
    """

    ROWS = "rows"
    VIEW = "view"
    MEMORY = "memory"
    SIZE = "size"
    TIME = "time"

    def __str__(self) -> str:
        return self.value


# ClickHouse can take a block that exceeds one of these in parts.
LIMITS_OF_A_BLOCK = (RefusalKind.MEMORY, RefusalKind.SIZE, RefusalKind.TIME)


@dataclass(frozen=True, slots=True, kw_only=True)
class Refusal:
    """ClickHouse's error for an INSERT or a probe: code, name and identifiers, never its text.

    It does not say whether the block is stored: the error of a view comes after the block was committed.
    `view`, `constraint` and `column` are names from the server's schema, as the answer gives them, or "".
    `permanent`: only a change of the schema or of grants helps.
    """

    code: int
    name: str
    kind: RefusalKind = RefusalKind.ROWS
    view: str = ""
    constraint: str = ""
    column: str = ""
    permanent: bool = False
    definition: str = ""  # of an INSERT: a hash of the definition of the table that refused the rows
    meaning: str = ""  # what the status means, if a proxy answered and not ClickHouse

    def __str__(self) -> str:
        return f"{self.name}, {self.meaning}" if self.meaning else f"code {self.code}, {self.name}"


# The kinds of discrepancy, in the order of every report.
KINDS = ("missing", "duplicated", "unexpected", "altered")


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """The result of comparing a batch with ClickHouse, in entries."""

    missing: int = 0
    duplicated: int = 0
    unexpected: int = 0
    altered: int = 0
    event_ids: tuple[str, ...] = field(default=())

    def __add__(self, other: Discrepancy) -> Discrepancy:
        counts = {kind: count + getattr(other, kind) for kind, count in self.counts.items()}
        return Discrepancy(**counts, event_ids=(self.event_ids + other.event_ids)[:NAMED_EVENTS])

    @property
    def counts(self) -> dict[str, int]:
        """The entries of each kind."""
        return {kind: getattr(self, kind) for kind in KINDS}

    @property
    def total(self) -> int:
        return sum(self.counts.values())

    def __bool__(self) -> bool:
        return bool(self.total)

    def __str__(self) -> str:
        return ", ".join(f"{count} {kind}" for kind, count in self.counts.items() if count) or "none"


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadableBatch:
    """A batch in a state of a later release. No other batch may take its rows."""

    batch_id: int
    state: str
    pks: PkSet


class Planning(Protocol):
    """One plan: a short transaction that holds the ledger's lock, and no lock on the outbox."""

    def open_batches(self) -> list[OpenBatch]: ...

    def unreadable(self) -> list[UnreadableBatch]: ...

    def adopt(self, batch: Batch) -> Claim | None:
        """Gives the batch to this plan. None when the batch's row of the ledger is locked."""

    def begin_lease_again(self, batch: Batch) -> None:
        """Shortens the lease of another owner's batch: it ends one lease from now."""

    def candidates(self, version: str, from_pk: int, rows: int) -> PkSet:
        """The first `rows` pks, from `from_pk` on, of pending rows that no dead letter holds, in ascending order."""

    def payload_bytes(self, pks: Sequence[int]) -> dict[int, int]: ...

    def sent_over(self, first_pk: int, last_pk: int) -> list[Batch]:
        """As `Outbox.sent_over`, in the plan's transaction."""

    def add(self, version: str, generation: int, blocks: Sequence[PlannedBlock]) -> Claim: ...


class Outbox(Protocol):
    """MySQL: the application's outbox, our ledger and our dead letters."""

    def one_transaction(self) -> AbstractContextManager[None]:
        """Commits all effects of this thread within the block together, or none of them. For small batches, to save
        commits.

        An effect that raises ends the transaction even if the caller catches the error; then repeat the effects
        outside. Each lock is waited for as briefly as when rows are marked. `core.export` says which verbs may share a
        transaction.
        """

    @property
    def in_transaction(self) -> bool:
        """Whether this thread is in a `one_transaction` block."""

    def batch_holders(self) -> list[Holder]:
        """The owners of open batches, with their rows and leases."""

    def planning(self, owner: str, lease_s: int, process: str = "") -> AbstractContextManager[Planning]:
        """A plan. `process` is the process that will do all of its work, empty where several processes do it."""

    def renew(self, claim: Claim, lease_s: int) -> Batch:
        """Extends the leases of the whole plan and returns the batch. Raises `LeaseLost` once it is adopted."""

    def allow_inserts(self, claim: Claim, digest: str, lease_s: int, until_ms: int) -> None:
        """As `renew`. Also records until when INSERTs of this cut can be at work, by ClickHouse's clock."""

    def read(self, pks: PkSet, *, row_bytes: int, version: str | None = None) -> Iterator[StoredRow]:
        """The rows that exist, by ascending pk, of one version or any. `row_bytes`, an estimate, bounds memory."""

    def seal(self, claim: Claim, cut: Cut) -> None: ...

    def begin_write(self, claim: Claim, lease_s: int, until_ms: int = 0) -> Batch:
        """Counts one more attempt to write, and returns the batch. Records `until_ms` as `allow_inserts` does."""

    def replace_cut(self, claim: Claim, cut: Cut, *, instead_of: str) -> None:
        """Replaces the cut with the digest `instead_of`. Raises `LeaseLost` when the ledger has another cut."""

    def reserve_inserted_at(self, count: int) -> list[int]: ...

    def stop(self, claim: Claim, error: str, *, wait_ms: int) -> None:
        """Ends the claim. No plan adopts the batch for `wait_ms`, because an INSERT of it can be at work."""

    def record_written(self, claim: Claim, digest: str) -> Batch:
        """Records this cut as written, fixes the time for `deleted_at` by MySQL's clock, returns the batch."""

    def mark(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> Marked:
        """Stamps these rows, but not those that are locked. Raises `MarkRefused` when rows do not keep the stamp."""

    def finish_mark(self, claim: Claim, pks: PkSet, exported_at_ms: int, before: Marked, *, ids: int) -> Batch:
        """Marks the last rows and records the batch as exported, in one transaction. `before` is the result of the
        other rows.

        Raises, without any change, `RowsLocked`, `MarkRefused`, and `RowsSwapped` when the sum of the stamped rows is
        not `ids`.
        """

    def own_ids(self, pks: PkSet, exported_at_ms: int) -> int:
        """The sum of `core.event.id_hash` over these rows, without rows that have another mark."""

    def take_back(self, claim: Claim, pks: PkSet, exported_at_ms: int) -> None:
        """Clears the marks of these rows where the mark is this batch's stamp."""

    def leave_written(self, claim: Claim, why: str) -> Batch:
        """Records why rows of a written batch are not marked. The batch stays open; a later run marks them."""

    def holders(self, pks: PkSet) -> str:
        """Who has locked the first of these rows, as far as this user may see, or how an administrator can see it."""

    def written_within(self, version: str, age_s: int) -> bool:
        """Whether ClickHouse has taken a batch of this version within that many seconds."""

    def moment(self) -> Moment:
        """The present moment of the ledger. The outcome of a run is read from here on."""

    def claimed_since(self, owner: str, since: Moment) -> list[Batch]:
        """Every batch of this owner that was claimed since then, by ascending id."""

    def discrepant_since(self, since: Moment) -> dict[int, str]:
        """Batches that a verification since then found wrong and that still are: the differences, by batch id."""

    def unverified(self, batches: int) -> list[Batch]: ...

    def record_verified(self, batch: Batch, discrepancy: Discrepancy, observed: Mapping[int, Holding]) -> bool:
        """Records the verification of an exported batch; False if another run has verified it. `observed` is what ClickHouse
        held, by `inserted_at`.
        """

    def sent_over(self, first_pk: int, last_pk: int) -> list[Batch]:
        """Batches with rows in this range of pks that may have sent something, by ascending id."""

    def batches(self, batch_ids: Iterable[int]) -> list[Batch]: ...


class Maintenance(Protocol):
    """MySQL: what requeue, sweep and reconcile need."""

    def now_ms(self) -> int: ...

    def inserted_between(self, from_ms: int, to_ms: int, after_id: int, batches: int) -> list[Batch]:
        """Batches in any state whose latest `inserted_at` is in [from, to), by ascending id."""

    def pks_by_batch(self, pks: PkSet) -> dict[int, PkSet]:
        """Which of these pks each batch of the ledger has, open or closed."""

    def batch_with(self, inserted_at_ms: int) -> int | None: ...

    def first_inserted_ms(self) -> int | None: ...

    def record_reconciled(self, batch: Batch, discrepancy: Discrepancy, observed: Mapping[int, Holding]) -> None: ...

    def foreign_marks(self, first_ms: int, last_ms: int, versions: Sequence[str]) -> Iterator[dict[int, int]]:
        """Rows with a `deleted_at` in [first, last] that no batch has set: pk to `deleted_at`, in portions."""

    def count_stamped(self, stamp_ms: int) -> int: ...

    def stamped(self, stamp_ms: int, versions: Sequence[str]) -> PkSet: ...

    def dead_among(self, pks: PkSet) -> PkSet: ...

    def marked(self, which: RowFilter, within: PkSet | None) -> Iterator[PkSet]: ...

    def by_workspace(self, pks: PkSet) -> dict[str, int]: ...

    def record_action(self, verb: str, by: Actor, selection: Mapping[str, object]) -> int: ...

    def unmark(self, pks: PkSet, action_id: int) -> int: ...

    def sweepable(self, before_ms: int, after_id: int, batches: int) -> list[Batch]: ...

    def held_back(self, before_ms: int) -> int: ...

    def discrepant_due(self, before_ms: int) -> dict[int, str]:
        """The first hundred discrepant batches that are old enough to be swept, and why they are discrepant."""

    def count_due(self, pks: PkSet, before_ms: int) -> int: ...

    def delete(self, batch_id: int, pks: PkSet, before_ms: int, action_id: int) -> int: ...

    def record_swept(self, batch_id: int) -> None: ...

    def compact(self, before_ms: int, batches: int, by: Actor) -> int: ...

    def close_letters(self) -> int: ...

    def erasures(self) -> list[RecordedErasure]: ...

    def last_actions(self, verb: str, count: int) -> list[Action]:
        """The last actions of one verb, newest first."""

    def times(self, pks: PkSet) -> dict[int, tuple[int, int | None]]:
        """`created_at` and `deleted_at` of those rows that exist, by pk."""


class AuditLog(Protocol):
    """ClickHouse: the tables of the payload versions, such as `audit_logs_raw_v1`."""

    def deadline_ms(self, within_s: float) -> int:
        """The time `within_s` from now, by ClickHouse's clock. ClickHouse refuses an INSERT that starts later."""

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        """One synchronous INSERT under the block's token; None when it is acknowledged. Empties `payloads`.

        A `Refusal` is an answer of ClickHouse or of a proxy. It does not say whether the block is stored.
        """

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        """Parses rows as `insert` does and writes nothing; None when the parser takes all of them."""

    def definition_age_s(self, version: str) -> int:
        """Seconds since the version's table was last altered, by ClickHouse's clock."""

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]: ...

    def holdings_now(self, batch: Batch) -> tuple[dict[int, Holding], int | None]:
        """As `holdings`, of a batch's blocks and in one request; also ClickHouse's time, None if it has none of them."""

    def entries_at(self, inserted_at_ms: int, *, most: int = ...) -> list[StoredEntry]:
        """The entries of one `inserted_at`, or `most` of them."""

    def entries_of(self, keys: Sequence[Key]) -> list[StoredEntry]: ...

    def keys_held(self, keys: Sequence[Key], inserted_at_ms: Sequence[int]) -> set[tuple[Key, int]]:
        """The keys that have an entry under one of these `inserted_at`s, each with that `inserted_at`."""

    def ids_held(self, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        """The pairs of workspace_id and event_id that have any entry."""

    def contents(self, version: str, payloads: Sequence[bytes], inserted_at_ms: int) -> list[int]:
        """The content hash that each payload's entry would have, by ClickHouse's parser. Writes nothing."""

    def count_by_inserted_at(self, from_ms: int, to_ms: int) -> dict[int, int]:
        """How many entries there are under each `inserted_at` in [from, to), ascending."""

    def count_by_workspace(self, from_ms: int, to_ms: int) -> dict[tuple[str, int], int]:
        """Entries by workspace and by UTC day of their `inserted_at` (its first millisecond), in [from, to)."""

    def named_by(self, erasure: Erasure, until_ms: int) -> int:
        """How many entries that an erasure names ClickHouse has, with an `inserted_at` up to `until_ms`."""

    def ttl(self, version: str) -> str:
        """The TTL clause of the version's table, as ClickHouse shows it; empty when it has none."""

    def past_ttl(self, version: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        """Whether the table's TTL allows ClickHouse to delete entries with these `inserted_at`s, `ahead_s` from now.

        ClickHouse evaluates it. None: the TTL depends on other columns too.
        """

    def past_ttl_of(self, version: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        """As `past_ttl`, for entries with these sort keys."""

    def kept_ms(self) -> int | None:
        """The longest time after its `inserted_at` that a table's TTL leaves an entry; None: unlimited or unknown."""
