"""Batches and their blocks: what the ledger knows about a claimed, sealed, written and marked batch.

What belongs here: frozen values, digests and tokens, all pure. What does not: how they are stored, and
the verbs that move a batch from one state to the next (`core.export`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum

import msgspec

from auditexport_pipeline.core.pks import PkSet

# A sealed batch's payloads by their block's digest, in the order of its pks: another seal's are never found here.
Bodies = dict[str, list[bytes]]

# How a note on a view begins in the ledger's column `last_error`; the statements know it too.
VIEW_NOTE = "view "
# How the note on one begins that lets a block not be stored; it ends when the batch is written.
VIEW_BARS = "a materialized view "

# A few hundred kilobytes of usual events: enough that a part costs nothing, little beside the batch.
PART_ROWS = 512
# Below this a second INSERT costs more than it saves: a part of its own, a round trip, a merge later.
SMALLEST_BLOCK_ROWS = 5_000


class State(str, Enum):
    """Where a batch stands. `OPEN` ones hold their rows: no other batch may take them."""

    CLAIMED = "claimed"
    SEALED = "sealed"
    WRITTEN = "written"  # ClickHouse acknowledged every block
    STOPPED = "stopped"  # its rows no longer read as sealed; resolved by the next run after the lease
    EXPORTED = "exported"  # marked in the outbox
    VERIFIED = "verified"  # counted and fingerprinted in ClickHouse
    DISCREPANT = "discrepant"  # exported, but ClickHouse does not hold what it should
    COMPACTED = "compacted"  # verified and swept long ago: counts, times and digests are kept, pks are not

    def __str__(self) -> str:
        return self.value

    @classmethod
    def _missing_(cls, value: object) -> State:
        """A state of a later release: it can be shown, and is none of ours."""
        state = str.__new__(cls, value)
        state._name_, state._value_ = str(value), str(value)
        return state


class Left(str, Enum):
    """Why a batch that ClickHouse has is not marked yet."""

    LOCKED = "locked"  # somebody holds rows of it, or the table: a later run marks them
    REFUSED = "refused"  # a trigger or a CHECK undoes or refuses the mark: somebody has to change it first


OPEN = (State.CLAIMED, State.SEALED, State.WRITTEN, State.STOPPED)
CLOSED = (State.EXPORTED, State.VERIFIED, State.DISCREPANT, State.COMPACTED)


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """The fenced right to work on one batch: `epoch` is the plan that granted it, `key` what no other plan has.

    Every effect of a claim is refused once another plan has adopted the batch, because the ledger then
    holds another epoch and key. After a failover that lost commits, batch ids and epochs recur; keys do not.
    Small and without payload: this is what Dagster's storage may hold. A claim of a release without keys unpickles with an
    empty one, and the ledger has none for its batch either.
    """

    batch_id: int
    epoch: int
    version: str
    generation: int
    rows: int
    adopted: bool = False
    key: str = ""  # the last field: a pickled claim is its values in this order, in whichever release it is read

    def __new__(cls, **_: object) -> Claim:
        claim = object.__new__(cls)
        object.__setattr__(claim, "key", "")  # stays so only where the pickle has none
        return claim


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """The part of a batch that one INSERT carries: one `inserted_at_ms`, one partition, one token, one part.

    `pks` are the rows whose payloads are sent, in that order; `normalised` are those among them that are
    sent in normal form (`core.event.normal_form`). `digest` and `fingerprint` are empty until the seal.

    `first` says, in a batch of requeues, that this block's rows were not proven to repeat anything and go out as new
    (`core.origins`); ask `Batch.is_requeue`. `renewed` are those of them that an earlier block had and that ClickHouse may
    have lost: their earlier entries are not to be called missing.

    `limit` is what ClickHouse, or a proxy, answered when the block exceeded a limit; such a block is not sent again
    as it is once it was refused `strikes` times. `fits` tells that another row was taken beside its last refusal.
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
    """What became of the rows that a batch claimed, beside those it sent."""

    dead: int = 0  # became dead letters
    folded: int = 0  # the same event as another row of the batch: marked, not sent
    vanished: int = 0  # deleted from the outbox by somebody before they were sealed or marked
    elsewhere: int = 0  # marked by somebody else
    unmarked: int = 0  # of those two, rows that were sent and then could not be marked
    released: int = 0  # given back to pending: too many bytes, or never written and not to be reproduced


@dataclass(frozen=True, slots=True, kw_only=True)
class Holding:
    """What ClickHouse holds under one `inserted_at`: entries, and two sums over them modulo 2^64.

    `fingerprint` is over what the payload fixes byte by byte (`core.verify`), `content` over every column as
    ClickHouse stores it, metas included. `copies` are entries that equal another one here in every column. `workspaces` is
    what was sent, by workspace, where that was few and the rows are swept: an erasure of another one explains no loss.
    """

    rows: int
    fingerprint: int
    content: int
    copies: int = 0
    workspaces: Mapping[str, int] = field(default_factory=dict, compare=False)


NO_ENTRIES = Holding(rows=0, fingerprint=0, content=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One row of the ledger. `pks` are the rows it will mark; its blocks' pks are those it sends.

    `given_back` are blocks of a requeue that left the batch although an earlier attempt may have sent them: the slot
    that they went to holds their rows' entries in any case, so nobody can see whether these copies are there.
    """

    batch_id: int
    epoch: int
    generation: int
    version: str
    state: State
    owner: str
    claim_key: str = ""
    process: str = ""  # that holds it; empty where several processes do the steps
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
    left: Left | None = None  # by `core.export.mark`, for whoever called it: the ledger has the reason in `last_error`

    @property
    def rows(self) -> int:
        return len(self.pks)

    @property
    def marked_rows(self) -> int:
        """Rows that this batch stamped, once it is exported."""
        return 0 if self.state in OPEN else self.rows - self.counts.unmarked

    @property
    def view_note(self) -> str:
        """What the ledger says of a materialized view that failed after entries of the batch were stored, or ""."""
        return self.last_error if self.last_error.startswith(VIEW_NOTE) else ""

    @property
    def entries(self) -> int:
        return sum(block.rows for block in self.blocks)

    @property
    def ids(self) -> int | None:
        """The sum of `core.event.id_hash` over the rows that it marks, as they were sealed; None where it is unknown."""
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
    """Those of these batches that ClickHouse has and whose rows are not marked, by id, and why."""
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
    note: str = ""  # what the operator should know although everything was written, such as a view that fails


@dataclass(frozen=True, slots=True, kw_only=True)
class Postponed:
    """Instead of a receipt: the run has no time left for this batch, which waits for the next one as it stands."""

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
    """A block's bytes, each payload after a newline, in parts of a few hundred rows: never all in one piece."""
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
    """What a compacted batch keeps of its blocks: when, how many, and the digests."""
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
