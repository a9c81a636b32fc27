"""Batches and their blocks: what the ledger knows about a claimed, sealed, written and marked batch.

What belongs here: frozen values, digests, tokens, and their text forms in the ledger. What does not: SQL, and
the verbs that move a batch from one state to the next (`core.export`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import msgspec

from auditexport_pipeline.core.pks import PkSet

# A sealed batch's payloads by the digest of their block, in the order of its pks. The payloads of another seal have other keys.
Bodies = dict[str, list[bytes]]

# A note on a failed view begins so in the ledger's column `last_error`; SQL statements compare it.
VIEW_NOTE = "view "
# A note on a view that prevents a block from being stored begins so; it is cleared when the batch is written.
VIEW_BARS = "a materialized view "

# A few hundred kilobytes of usual events: large enough to cost nothing, small beside the batch.
PART_ROWS = 512
# Below this a second INSERT costs more than it saves: another part, another round trip, a merge later.
SMALLEST_BLOCK_ROWS = 5_000


class State(str, Enum):
    """The state of a batch. Batches in an `OPEN` state hold their rows: no other batch may take them."""

    CLAIMED = "claimed"
    SEALED = "sealed"
    WRITTEN = "written"  # ClickHouse acknowledged every block
    STOPPED = "stopped"  # its rows are no longer as they were sealed; the next run after the lease resolves it
    EXPORTED = "exported"  # marked in the outbox
    VERIFIED = "verified"  # counted and fingerprinted in ClickHouse
    DISCREPANT = "discrepant"  # exported, but ClickHouse does not hold what it should
    COMPACTED = "compacted"  # verified and swept long ago: counts, times and digests are kept, pks are not

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> State:
        """A state of a later release: it can be shown, and equals none of ours."""
        state = str.__new__(cls, value)
        state._name_, state._value_ = str(value), str(value)
        return state


class Left(str, Enum):
    """Why a batch that ClickHouse has is not marked yet."""

    LOCKED = "locked"  # somebody holds its rows or the table locked: a later run marks the rows
    REFUSED = "refused"  # a trigger or a CHECK undoes or refuses the mark: somebody has to change it first


OPEN = (State.CLAIMED, State.SEALED, State.WRITTEN, State.STOPPED)
CLOSED = (State.EXPORTED, State.VERIFIED, State.DISCREPANT, State.COMPACTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The fenced right to work on one batch: `epoch` is the plan that granted it, `key` is unique to that plan.

    Every effect of a claim is refused once another plan has adopted the batch, because the ledger then
    holds another epoch and key. After a failover that lost commits, batch ids and epochs recur; keys do not.
    A claim is small and has no payload, so Dagster's storage may hold it. A claim that was pickled by a release without keys gets
    an empty key, and the ledger has none for its batch either.
    """

    batch_id: int
    epoch: int
    version: str
    generation: int
    rows: int
    adopted: bool = False
    key: str = ""  # keep it last: a pickled claim is its values in this order, in every release

    def __new__(cls, **_: object) -> Claim:
        claim = object.__new__(cls)
        object.__setattr__(claim, "key", "")  # stays empty only if the pickle has no key
        return claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The part of a batch that one INSERT carries: one `inserted_at_ms`, one partition, one token, one part.

    `pks` are the rows whose payloads are sent, in that order; `normalised` are those among them that are
    sent in normal form (`core.event.normal_form`). `digest` and `fingerprint` are empty until the seal.

    `first`, in a batch of requeues: this block's rows were not proven to repeat an event and go out as new
    (`core.origins`); ask `Batch.is_requeue`. `renewed` are the rows among them that an earlier block had and that ClickHouse may
    have lost: their earlier entries must not be called missing.

    `limit` is the answer of ClickHouse or a proxy when the block exceeded a limit, set once it was refused `strikes` times; such
    a block is split before it is sent. `fits`: ClickHouse took another row when it refused this one.
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
    """The rows that a batch claimed and did not send, by what happened to them."""

    dead: int = 0  # became dead letters
    folded: int = 0  # the same event as another row of the batch: marked, not sent
    vanished: int = 0  # deleted from the outbox by somebody before they were sealed or marked
    elsewhere: int = 0  # marked by somebody else
    unmarked: int = 0  # of those two, rows that were sent and then could not be marked
    released: int = 0  # pending again: too many bytes, or never written and not reproducible


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What ClickHouse holds under one `inserted_at`: entries, and two sums over them modulo 2^64.

    `fingerprint` covers the columns whose bytes the payload fixes (`core.verify`), `content` every column as
    ClickHouse stores it, metas included. `copies` are entries that equal another entry in every column. `workspaces` are the
    sent entries by workspace, kept for swept rows of few workspaces: an erasure of another workspace explains no loss.
    """

    rows: int
    fingerprint: int
    content: int
    copies: int = 0
    workspaces: Mapping[str, int] = field(default_factory=dict, compare=False)


NO_ENTRIES = Holding(rows=0, fingerprint=0, content=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One row of the ledger. `pks` are the rows that it will mark; its blocks' pks are the rows that it sends.

    `given_back` are blocks of a requeue that left the batch although an earlier attempt may have sent them. Their
    `inserted_at` has entries of their rows in any case, so nobody can see whether these copies are there.
    """

    batch_id: int
    epoch: int
    generation: int
    version: str
    state: State
    owner: str
    claim_key: str = ""
    process: str = ""  # the process that holds it; empty where several processes do the steps
    pks: PkSet
    blocks: tuple[Block, ...]
    bytes: int = 0
    counts: Counts = field(default_factory=Counts)
    digest: str = ""
    attempts: int = 0
    inserts_until_ms: int = 0  # by ClickHouse's clock: an INSERT of it can be at work until then
    given_back: tuple[Block, ...] = ()
    exported_at_ms: int | None = None
    oldest_ms: int | None = None  # event times, as the payloads say
    newest_ms: int | None = None
    last_error: str = ""
    observed: Mapping[int, Holding] = field(default_factory=dict)  # by inserted_at, when it was compared last
    swept: bool = False  # none of its rows is in the outbox any more
    left: Left | None = None  # set by `core.export.mark` for its caller; the ledger has the reason in `last_error`

    @property
    def rows(self) -> int:
        return len(self.pks)

    @property
    def marked_rows(self) -> int:
        """Rows that this batch stamped, once it is exported."""
        return 0 if self.state in OPEN else self.rows - self.counts.unmarked

    @property
    def view_note(self) -> str:
        """The note on a materialized view that failed after entries of the batch were stored, or ""."""
        return self.last_error if self.last_error.startswith(VIEW_NOTE) else ""

    @property
    def entries(self) -> int:
        return sum(block.rows for block in self.blocks)

    @property
    def ids(self) -> int | None:
        """The sum of `core.event.id_hash` over the rows to mark, as they were sealed; None where it is unknown."""
        known = [block.ids for block in self.blocks if block.ids is not None]
        return sum(known) if len(known) == len(self.blocks) else None

    def is_requeue(self, block: Block) -> bool:
        """Whether a block sends rows again, under the `inserted_at` of their first export."""
        return self.generation > 0 and not block.first

    @property
    def first_blocks(self) -> tuple[Block, ...]:
        """The blocks that went out as new: each has an `inserted_at` that no other block had before."""
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
        """The `insert_deduplication_token` of a block: the same content at every attempt, and no other."""
        return f"auditexport-{self.batch_id}-{self.generation}-{block.digest}-{block.number}"


def unmarked(batches: Iterable[Batch]) -> dict[int, str]:
    """The batches that ClickHouse has and whose rows are not marked: why, by batch id."""
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
    """128 bits over everything that fixes what a block puts into ClickHouse; payloads come in the order of the pks."""

    def __init__(self, version: str, inserted_at_ms: int, pks: PkSet) -> None:
        self._digest = hashlib.sha256(f"{version}\n{inserted_at_ms}\n{pks}".encode())

    def add(self, payloads: Sequence[bytes]) -> None:
        for part in in_parts(payloads):
            self._digest.update(part)

    def __str__(self) -> str:
        return self._digest.hexdigest()[:32]


def block_digest(version: str, inserted_at_ms: int, pks: PkSet, payloads: Sequence[bytes]) -> str:
    """The `BlockDigest` of a whole block."""
    digest = BlockDigest(version, inserted_at_ms, pks)
    digest.add(payloads)
    return str(digest)


def in_parts(payloads: Sequence[bytes]) -> Iterator[bytes]:
    """A block's bytes, each payload after a newline, in parts of a few hundred rows, never as one piece."""
    for start in range(0, len(payloads), PART_ROWS):
        yield b"\n" + b"\n".join(payloads[start : start + PART_ROWS])


def sealed_block(
    version: str, block: Block, pks: PkSet, payloads: list[bytes], fingerprint: int, *, ids: int | None
) -> Block:
    """The block with these rows, sealed: digest and bytes are those of the payloads, in the order of the pks."""
    return replace(
        block,
        pks=pks,
        digest=block_digest(version, block.inserted_at_ms, pks, payloads),
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


class _Manifest(msgspec.Struct, omit_defaults=True):
    """The text form of a batch's blocks in the ledger's column `manifest`."""

    n: int
    at: int
    pks: str = ""
    rows: int = 0  # in compacted ones, instead of pks
    norm: str = ""
    digest: str = ""
    fp: str = ""
    bytes: int = 0
    given_back: bool = False
    first: bool = False
    renewed: str = ""
    limit: str = ""
    strikes: int = 0
    fits: bool = False
    ids: int | None = None


def blocks_to_text(blocks: Iterable[Block], given_back: Iterable[Block] = ()) -> str:
    return msgspec.json.encode(
        [
            _Manifest(
                n=block.number,
                at=block.inserted_at_ms,
                pks=str(block.pks),
                norm=str(block.normalised),
                digest=block.digest,
                fp=f"{block.fingerprint:016x}" if block.digest else "",
                bytes=block.bytes,
                given_back=left,
                first=block.first,
                renewed=str(block.renewed),
                limit=block.limit,
                strikes=block.strikes,
                fits=block.fits,
                ids=block.ids,
            )
            for part, left in ((blocks, False), (given_back, True))
            for block in part
        ]
    ).decode()


def compacted_text(blocks: Iterable[Block]) -> str:
    """The blocks of a compacted batch: their times, counts and digests, without pks."""
    return msgspec.json.encode(
        [
            _Manifest(
                n=block.number,
                at=block.inserted_at_ms,
                rows=block.rows,
                digest=block.digest,
                fp=f"{block.fingerprint:016x}",
                bytes=block.bytes,
                first=block.first,
            )
            for block in blocks
        ]
    ).decode()


def blocks_from_text(text: str) -> tuple[tuple[Block, ...], tuple[Block, ...]]:
    """A batch's blocks, and those that were given back."""
    parts = msgspec.json.decode(text, type=list[_Manifest])
    return (
        tuple(_block_of(part) for part in parts if not part.given_back),
        tuple(_block_of(part) for part in parts if part.given_back),
    )


def _block_of(part: _Manifest) -> Block:
    return Block(
        number=part.n,
        inserted_at_ms=part.at,
        pks=PkSet.parse(part.pks),
        normalised=PkSet.parse(part.norm),
        digest=part.digest,
        fingerprint=int(part.fp, 16) if part.fp else 0,
        bytes=part.bytes,
        first=part.first,
        renewed=PkSet.parse(part.renewed),
        limit=part.limit,
        strikes=part.strikes,
        fits=part.fits,
        ids=part.ids,
    )


class _Observed(msgspec.Struct, omit_defaults=True):
    """The text form of one `Holding` in the ledger's column `observed`."""

    at: int
    rows: int
    fp: str
    content: str
    copies: int = 0
    ws: dict[str, int] = {}


def observed_to_text(observed: Mapping[int, Holding]) -> str:
    return msgspec.json.encode(
        [
            _Observed(
                at=at_ms,
                rows=holding.rows,
                fp=f"{holding.fingerprint:016x}",
                content=f"{holding.content:016x}",
                copies=holding.copies,
                ws=dict(holding.workspaces),
            )
            for at_ms, holding in sorted(observed.items())
        ]
    ).decode()


def observed_from_text(text: str | None) -> dict[int, Holding]:
    return {
        part.at: Holding(
            rows=part.rows,
            fingerprint=int(part.fp, 16),
            content=int(part.content, 16),
            copies=part.copies,
            workspaces=part.ws,
        )
        for part in (msgspec.json.decode(text, type=list[_Observed]) if text else ())
    }
