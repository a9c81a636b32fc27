"""Batches and their blocks, as the ledger has them.

What belongs here: frozen values, digests, tokens, and their text forms in the ledger. What does not: SQL, and
the verbs that move a batch from one state to the next (`core.export`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any

import msgspec

from auditexport_pipeline.core.pks import PkSet

# The payloads of a sealed batch by the digest of their block, in the order of its pks. Another seal has other digests.
Bodies = dict[str, list[bytes]]

# The beginning of a note on a failed view in the ledger's column `last_error`; SQL statements compare it.
VIEW_NOTE = "view "
# Between that note and the reason why rows of the batch are not marked.
NOT_MARKED = "; not marked: "
# The beginning of a note on a view that prevents a block from being stored. It is cleared when the batch is written.
VIEW_BARS = "a materialized view "

# A few hundred kilobytes of usual events: few calls, and small beside the batch.
PART_ROWS = 512
# A second INSERT of fewer rows costs more than it saves: another part, another round trip, a merge later.
SMALLEST_BLOCK_ROWS = 5_000


class State(str, Enum):
    """The state of a batch. Batches in an `OPEN` state hold their rows: no other batch may take them."""

    CLAIMED = "claimed"
    SEALED = "sealed"
    WRITTEN = "written"  # ClickHouse acknowledged every block
    STOPPED = "stopped"  # its rows are no longer as they were sealed; resolved when no INSERT of it can be at work
    EXPORTED = "exported"  # its rows are marked in the outbox
    VERIFIED = "verified"  # its entries were counted and fingerprinted in ClickHouse
    DISCREPANT = "discrepant"  # exported, but ClickHouse does not have its entries as sealed
    COMPACTED = "compacted"  # verified and swept long ago: the ledger has its counts, times and digests, not its pks

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> State:
        """A state of a later release: it can be shown, and differs from all others."""
        state = str.__new__(cls, value)
        state._name_, state._value_ = str(value), str(value)
        return state


class Left(str, Enum):
    """Why a batch that ClickHouse has is not marked yet."""

    LOCKED = "locked"  # its rows or the table are locked: a later run marks the rows
    REFUSED = "refused"  # a trigger or a CHECK undoes or refuses the mark, and has to be changed first


OPEN = (State.CLAIMED, State.SEALED, State.WRITTEN, State.STOPPED)
CLOSED = (State.EXPORTED, State.VERIFIED, State.DISCREPANT, State.COMPACTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The fenced right to work on one batch. `epoch` is the plan that granted it, `key` is unique to that plan.

    Every effect of a claim is refused once another plan has adopted the batch, because the ledger then has another
    epoch and key. After a failover that lost commits, batch ids and epochs recur; keys do not. A claim is small and has
    no payload, so Dagster's storage may hold it. A claim that a release without keys has pickled gets an empty key, and
    the ledger has none for its batch either.
    """

    batch_id: int
    epoch: int
    version: str
    generation: int
    rows: int
    adopted: bool = False
    key: str = ""  # must stay last: a pickled claim is its values in this order, in every release

    def __new__(cls, **_: object) -> Claim:
        claim = object.__new__(cls)
        object.__setattr__(claim, "key", "")  # stays empty only if the pickle has no key
        return claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The part of a batch that one INSERT carries: one `inserted_at_ms`, one partition, one token, one part.

    `pks` are the rows whose payloads are sent, in that order; `normalised` are those among them that are
    sent in normal form (`core.event.normal_form`). `digest` and `fingerprint` are empty until the seal.

    `first`, in a requeue: the rows of this block are not proven to repeat an event and go out as new (`core.origins`,
    `Batch.is_requeue`). `renewed` are the rows among them that an earlier block had and that ClickHouse may have lost:
    their earlier entries must not be called missing.

    `limit` is the answer of ClickHouse or a proxy when the block exceeded a limit. It is set after `strikes` refusals,
    and the block is split before it is sent again. `fits`: ClickHouse took another row when it refused this one.
    """

    number: int
    inserted_at_ms: int
    pks: PkSet
    normalised: PkSet = field(default_factory=PkSet)
    digest: str = ""
    fingerprint: int = 0
    bytes: int = 0
    first: bool = False
    renewed: PkSet = field(default_factory=PkSet)
    limit: str = ""
    strikes: int = 0
    fits: bool = False
    ids: int | None = None  # sum of `core.event.id_hash` over its rows and those folded into them; None where unknown

    @property
    def rows(self) -> int:
        return len(self.pks)

    @property
    def row_bytes(self) -> int:
        """Payload bytes of a row on average; an estimate until the seal."""
        return -(-self.bytes // max(1, self.rows))


@dataclass(frozen=True, slots=True, kw_only=True)
class Counts:
    """The rows that a batch claimed and did not send, by the reason."""

    dead: int = 0  # became dead letters
    folded: int = 0  # the same event as another row of the batch: marked, not sent
    vanished: int = 0  # deleted from the outbox before they were sealed or marked
    elsewhere: int = 0  # marked, but not by this batch
    unmarked: int = 0  # of those two, rows that were sent and then could not be marked
    released: int = 0  # pending again: too many bytes, or never written and not reproducible


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What ClickHouse has under one `inserted_at`: the number of entries, and two sums over them modulo 2^64.

    `fingerprint` covers the columns whose bytes follow from the payload (`core.verify`), `content` every column as
    ClickHouse stores it, metas included. `copies` are entries that equal another entry in every column. `workspaces`
    are the sent entries by workspace, stored for swept rows of few workspaces: an erasure of another workspace explains
    no loss.
    """

    rows: int
    fingerprint: int
    content: int
    copies: int = 0
    workspaces: Mapping[str, int] = field(default_factory=dict, compare=False)


NO_ENTRIES = Holding(rows=0, fingerprint=0, content=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One row of the ledger. `pks` are the rows that the batch will mark; its blocks' pks are the rows that it sends.

    `given_back` are blocks of a requeue that left the batch although an earlier attempt may have sent them. Entries of
    their rows are under that `inserted_at` in any case, so ClickHouse cannot show whether these copies were written.
    """

    batch_id: int
    epoch: int
    generation: int
    version: str
    state: State
    owner: str
    claim_key: str = ""
    process: str = ""  # the process that works on it; empty where several processes do the steps
    pks: PkSet
    blocks: tuple[Block, ...]
    bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    digest: str = ""
    attempts: int = 0
    inserts_until_ms: int = 0  # by ClickHouse's clock: an INSERT of it can be at work until then
    given_back: tuple[Block, ...] = ()
    exported_at_ms: int | None = None
    oldest_ms: int | None = None  # event times, from the payloads
    newest_ms: int | None = None
    last_error: str = ""
    observed: Mapping[int, Holding] = field(default_factory=dict)  # by inserted_at, at the last comparison
    swept: bool = False  # none of its rows is in the outbox any more
    left: Left | None = None  # set by `core.export.mark` for its caller; the ledger has the reason in `last_error`

    @property
    def rows(self) -> int:
        return len(self.pks)

    @property
    def marked_rows(self) -> int:
        """Rows that this batch has stamped; 0 until it is exported."""
        return 0 if self.state in OPEN else self.rows - self.counts.unmarked

    @property
    def view_note(self) -> str:
        """The note on a materialized view that failed after entries of the batch were stored, or ""."""
        return self.last_error.split(NOT_MARKED)[0] if self.last_error.startswith(VIEW_NOTE) else ""

    @property
    def entries(self) -> int:
        return sum(block.rows for block in self.blocks)

    @property
    def ids(self) -> int | None:
        """The sum of `core.event.id_hash` over the sealed rows that are to be marked; None where it is unknown."""
        known = [block.ids for block in self.blocks if block.ids is not None]
        return sum(known) if len(known) == len(self.blocks) else None

    def is_requeue(self, block: Block) -> bool:
        """Whether the block sends rows again, under the `inserted_at` of their first export."""
        return self.generation > 0 and not block.first

    @property
    def first_blocks(self) -> tuple[Block, ...]:
        """The blocks that are no requeue: each has an `inserted_at` that no block had before."""
        return tuple(block for block in self.blocks if not self.is_requeue(block))

    @property
    def claim(self) -> Claim:
        return Claim(
            batch_id=self.batch_id,
            epoch=self.epoch,
            version=self.version,
            generation=self.generation,
            rows=self.rows,
            key=self.claim_key,
        )

    def held_by(self, claim: Claim) -> bool:
        """Whether the plan of this claim still holds the batch."""
        return (self.epoch, self.claim_key) == (claim.epoch, claim.key)

    def token(self, block: Block) -> str:
        """The `insert_deduplication_token` of a block: the same at every attempt, and only for this content."""
        return f"auditexport-{self.batch_id}-{self.generation}-{block.digest}-{block.number}"


def unmarked(batches: Iterable[Batch]) -> dict[int, str]:
    """Of the batches that ClickHouse has and whose rows are not marked: the reasons, by batch id."""
    return {batch.batch_id: batch.last_error for batch in batches if batch.state is State.WRITTEN}


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """Proof that ClickHouse acknowledged every block of a batch; only `core.export.write` makes one."""

    claim: Claim
    digest: str
    entries: int
    blocks: int
    bytes: int
    found: int  # blocks that an earlier attempt had written already
    seconds: float
    note: str = ""  # for the operator, for example about a view that fails although everything was written


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed:
    """Instead of a receipt: the run has no time left for this batch; the next run takes it."""

    claim: Claim


class BlockDigest:
    """128 bits over all that determines a block's entries. The payloads are added in the order of the pks."""

    def __init__(self, version: str, inserted_at_ms: int, pks: PkSet) -> None:
        self._digest = hashlib.sha256(f"{version}\n{inserted_at_ms}\n{pks}".encode())

    def add(self, payloads: Sequence[bytes]) -> None:
        for part in in_parts(payloads):
            self._digest.update(part)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:32]


def in_parts(payloads: Sequence[bytes]) -> Iterator[bytes]:
    """A block's bytes, each payload after a newline, in parts of a few hundred rows."""
    for start in range(0, len(payloads), PART_ROWS):
        yield b"\n" + b"\n".join(payloads[start : start + PART_ROWS])


def sealed_block(
    version: str, block: Block, pks: PkSet, payloads: list[bytes], fingerprint: int, *, ids: int | None
) -> Block:
    """The block, sealed with these rows. The payloads are in the order of the pks."""
    digest = BlockDigest(version, block.inserted_at_ms, pks)
    digest.add(payloads)
    return replace(
        block,
        pks=pks,
        digest=str(digest),
        fingerprint=fingerprint,
        bytes=sum(map(len, payloads)),
        ids=ids,
    )


def pks_of(blocks: Collection[Block]) -> PkSet:
    """The pks of all these blocks."""
    return PkSet.union(block.pks for block in blocks)


def batch_digest(blocks: Iterable[Block], folded: PkSet) -> str:
    """The seal of a whole batch: its blocks' digests in order, and the rows folded into others."""
    return hashlib.sha256("\n".join([*(block.digest for block in blocks), str(folded)]).encode()).hexdigest()[:32]


# ── text forms in the ledger ─────────────────────────────────────────────────────────────────────

# Field of a value, its name in JSON, and how it is written and read. A field with its default value is left out.
Form = dict[str, tuple[str, Callable[[Any], Any], Callable[[Any], Any]]]


def _as_is(value: Any) -> Any:
    return value


_HEX = (lambda number: f"{number:016x}", lambda text: int(text, 16))
_PKS = (str, PkSet.parse)
_PLAIN = (_as_is, _as_is)
_BLOCK: Form = {
    "number": ("n", *_PLAIN),
    "inserted_at_ms": ("at", *_PLAIN),
    "pks": ("pks", *_PKS),
    "normalised": ("norm", *_PKS),
    "digest": ("digest", *_PLAIN),
    "fingerprint": ("fp", *_HEX),
    "bytes": ("bytes", *_PLAIN),
    "first": ("first", *_PLAIN),
    "renewed": ("renewed", *_PKS),
    "limit": ("limit", *_PLAIN),
    "strikes": ("strikes", *_PLAIN),
    "fits": ("fits", *_PLAIN),
    "ids": ("ids", *_PLAIN),
}
_EMPTY_BLOCK = Block(number=-1, inserted_at_ms=-1, pks=PkSet())
_HOLDING: Form = {
    "rows": ("rows", *_PLAIN),
    "fingerprint": ("fp", *_HEX),
    "content": ("content", *_HEX),
    "copies": ("copies", *_PLAIN),
    "workspaces": ("ws", dict, _as_is),
}
_EMPTY_HOLDING = Holding(rows=-1, fingerprint=-1, content=-1)


def _values(value: object, form: Form, empty: object) -> dict[str, Any]:
    return {
        name: write(getattr(value, field))
        for field, (name, write, _) in form.items()
        if getattr(value, field) != getattr(empty, field)
    }


def _fields(values: Mapping[str, Any], form: Form) -> dict[str, Any]:
    return {field: read(values[name]) for field, (name, _, read) in form.items() if name in values}


def _text(values: Iterable[Mapping[str, Any]]) -> str:
    return msgspec.json.encode(list(values)).decode()


def blocks_to_text(blocks: Iterable[Block], given_back: Iterable[Block] = ()) -> str:
    """The text for the column `manifest`."""
    return _text(
        [
            *(_values(block, _BLOCK, _EMPTY_BLOCK) for block in blocks),
            *(_values(block, _BLOCK, _EMPTY_BLOCK) | {"given_back": True} for block in given_back),
        ]
    )


def compacted_text(blocks: Iterable[Block]) -> str:
    """The same for a compacted batch: times, counts and digests, without pks."""
    form = {field: _BLOCK[field] for field in ("number", "inserted_at_ms", "digest", "fingerprint", "bytes", "first")}
    return _text(_values(block, form, _EMPTY_BLOCK) | {"rows": block.rows} for block in blocks)


def blocks_from_text(text: str) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """A batch's blocks, and those that were given back."""
    parts: list[dict[str, Any]] = msgspec.json.decode(text)
    blocks = [(part.get("given_back", False), Block(**{"pks": PkSet(), **_fields(part, _BLOCK)})) for part in parts]
    return tuple(block for left, block in blocks if not left), tuple(block for left, block in blocks if left)


def observed_to_text(observed: Mapping[int, Holding]) -> str:
    """The text for the column `observed`."""
    return _text({"at": at_ms} | _values(held, _HOLDING, _EMPTY_HOLDING) for at_ms, held in sorted(observed.items()))


def observed_from_text(text: str | None) -> dict[int, Holding]:
    return {part["at"]: Holding(**_fields(part, _HOLDING)) for part in (msgspec.json.decode(text) if text else ())}
