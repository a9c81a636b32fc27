"""ClickHouse: the tables of the payload versions, such as `audit_logs_raw_v1`, behind `core.ports.AuditLog`.

What belongs here: building a version's SQL, and what a refusal means. What does not: the statements (`audit_log.sql`),
their settings (`settings`), requests and answers (`connection`), creating and checking tables (`schema`), and any
decision about what to send.

A payload is sent as the text that the outbox holds; ClickHouse parses it, into the types of the version's `input`.
"""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import lru_cache
from string import Template
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from auditexport_pipeline.clickhouse import connection as clickhouse_connection
from auditexport_pipeline.clickhouse.connection import (
    ANSWER_GRACE_S,
    CONNECT_TIMEOUT_S,
    LOOK_UP_TIMEOUT_S,
    Connection,
    NotClickHouse,
    ServerError,
    connection_arguments,
)
from auditexport_pipeline.clickhouse.refusals import is_fence, refusal_of, refusal_of_status
from auditexport_pipeline.clickhouse.settings import (
    CONTENT_SETTINGS,
    EVERYWHERE,
    INSERT_SETTINGS,
    Value,
    stated,
)
from auditexport_pipeline.clickhouse.ttl import TtlReader
from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.batch import PART_ROWS, Batch, Block, Holding, in_parts
from auditexport_pipeline.core.errors import ForeignAnswer, InvalidConfig
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.core.ports import Refusal, RefusalKind, StoredEntry
from auditexport_pipeline.core.versions import VERSIONS, top_level_parts
from auditexport_pipeline.sql import load

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

_Value = TypeVar("_Value")

# Payloads, keys and ids of one look-up, in bytes; a larger value goes alone.
CONTENT_BYTES = 1024**2
# Parameters are sent as fields of a form, of 128 KB at most: this many characters of any kind fit.
PARAMETER_CHARACTERS = 30_000
# More entries than any `inserted_at` has.
MOST_ENTRIES = 2**63 - 1

_PIECES = load("clickhouse/audit_log.sql")
# The text mirrors of the metas as the table holds them, and as they are computed.
_STORED_MIRRORS = {"meta_text": "meta_text", "targets_meta_text": "targets_meta_text"}
_COMPUTED_MIRRORS = {
    "meta_text": "toJSONString(meta)",
    "targets_meta_text": r"arrayStringConcat(arrayMap(target -> toJSONString(target), `targets.meta`), '\n')",
}


@lru_cache(maxsize=64)
def _sql(name: str, version: str) -> str:
    """A statement for one payload version; both come from the program, never from data."""
    if version not in VERSIONS:
        raise InvalidConfig(f"{version} is not a known payload version")
    pieces, columns = VERSIONS[version].pieces, VERSIONS[version].columns
    select = pieces["select"]
    content = Template(pieces["content"])
    stored_content = content.substitute(_STORED_MIRRORS)
    return Template(_PIECES[name]).substitute(
        table=pieces["table"],
        columns=pieces["columns"],
        column_names=", ".join(f"`{column}`" for column in columns),
        input=pieces["input"],
        select=select,
        fingerprint=pieces["fingerprint"],
        content=stored_content,
        entry=(
            f"workspace_id, bucket, time, event_id, inserted_at, {pieces['fingerprint']} AS fingerprint, "
            f"{stored_content} AS content"
        ),
        content_of_columns=content.substitute(_COMPUTED_MIRRORS),
        typed_select=", ".join(
            f"CAST({expression.strip()}, '{type_}') AS `{column}`"
            for expression, (column, type_) in zip(top_level_parts(select), columns.items(), strict=True)
        ),
    )


def _request(statement: bytes, payloads: list[bytes]) -> Generator[bytes, None, None]:
    """The body of an INSERT, in parts. The HTTP client copies each part, and never repeats a request by itself.

    The list is emptied, so that the next batch can be read while ClickHouse works on this one.
    """
    yield statement
    payloads.reverse()
    while payloads:
        part = payloads[: -PART_ROWS - 1 : -1]
        del payloads[-PART_ROWS:]
        yield from in_parts(part)


def _portions(values: Sequence[_Value], bytes_of: Callable[[_Value], int]) -> Iterator[Sequence[_Value]]:
    """Consecutive values of about `CONTENT_BYTES` together, at least one."""
    start = size = 0
    for index, value in enumerate(values):
        value_bytes = bytes_of(value)
        if size and size + value_bytes > CONTENT_BYTES:
            yield values[start:index]
            start, size = index, 0
        size += value_bytes
    if start < len(values):
        yield values[start:]


def _key_bytes(key: Sequence[str | int]) -> int:
    return sum(len(part) if isinstance(part, str) else 20 for part in key) + 20


def _in_pieces(name: str, value: str) -> tuple[str, dict[str, str]]:
    """An expression for a text of any length, and its parameters, of which ClickHouse takes 128 KB each."""
    pieces = {
        f"{name}_{number}": value[start : start + PARAMETER_CHARACTERS]
        for number, start in enumerate(range(0, len(value), PARAMETER_CHARACTERS))
    }
    whole = ", ".join(["''", *(f"{{{piece}:String}}" for piece in pieces)])
    return f"concat({whole})", pieces


def _with_lists(statement: str, lists: Mapping[str, Sequence[object]]) -> tuple[str, dict[str, str]]:
    """The statement with its `{name:Array(…)}` parameters replaced by JSON in pieces; and the parameters of the pieces.

    ClickHouse takes minutes to analyse a literal list of a few thousand keys.
    """
    parameters: dict[str, str] = {}
    for name, values in lists.items():
        whole, pieces = _in_pieces(name, msgspec.json.encode(values).decode())
        parameters |= pieces
        before, _, rest = statement.partition(f"{{{name}:")
        kind, _, after = rest.partition("}")
        statement = f"{before}JSONExtract({whole}, '{kind}'){after}"
    return statement, parameters


@lru_cache(maxsize=256)
def _client(url: str, timeout_s: int, pid: int) -> Client:
    import clickhouse_connect

    arguments = connection_arguments(url)
    settings = arguments.pop("settings", {})
    return clickhouse_connect.get_client(
        **arguments,
        settings=settings,
        pool_mgr=clickhouse_connection.connection(url, pid).pool,
        autogenerate_session_id=False,  # a session allows one query at a time
        connect_timeout=CONNECT_TIMEOUT_S,
        send_receive_timeout=timeout_s,
        client_name="auditexport",
        form_encode_query_params=True,
    )


class ClickHouseAuditLog:
    """`core.ports.AuditLog` over one ClickHouse database named by an `http[s]://` URL."""

    def __init__(self, url: str) -> None:
        self.url = url
        connection_arguments(url)

    def __repr__(self) -> str:
        arguments = connection_arguments(self.url)
        return f"ClickHouseAuditLog({arguments['host']}:{arguments['port']}/{arguments['database']})"

    @property
    def connection(self) -> Connection:
        """The connection of this store, for other statements to the same server."""
        return clickhouse_connection.connection(self.url, os.getpid())

    def client(self, timeout_s: int = LOOK_UP_TIMEOUT_S) -> Client:
        """The driver's own client to the same server, for the demo and tests: no decision rests on its answers."""
        return _client(self.url, timeout_s + ANSWER_GRACE_S, os.getpid())

    def rows(
        self,
        what: str,
        statement: str,
        parameters: Mapping[str, Any] | None = None,
        settings: Mapping[str, Value] | None = None,
    ) -> list[tuple[Any, ...]]:
        """The rows of a SELECT, proven to be ClickHouse's answer (`Connection.query`); `what` names it in errors."""
        connection = self.connection
        with connection.translated(what):
            return connection.query(statement, parameters, settings)

    def deadline_ms(self, within_s: float) -> int:
        ((now_ms,),) = self.rows("reading the time", _PIECES["now_ms"])
        return int(now_ms) + int(within_s * 1000)

    def insert(
        self, batch: Batch, block: Block, payloads: list[bytes], *, deadline_ms: int, timeout_s: int
    ) -> Refusal | None:
        """One synchronous INSERT of one block; None when ClickHouse acknowledged it. `payloads` is emptied.

        Durable effect: `block.rows` rows and one part in the version's table, or nothing; after a `Refusal` either can
        be the case. Raises `InsertOutcomeUnknown` when no answer came, `LeaseLost` when ClickHouse's clock is past the
        deadline, `AuditLogUnavailable` or `SetupIncomplete` for an error that is not about rows, a view or a limit.
        """
        what = f"the INSERT of batch {batch.batch_id}, block {block.number} ({block.rows:,} rows)"
        # Where a proxy drops ClickHouse's headers, a requeue is proven by the entries that it adds. A replay of a
        # requeue may add none: it is proven by content.
        counted = batch.is_requeue(block) and not self.connection.headers_arrive
        before = self._rows_at(block) if counted else None
        sent = [*payloads] if counted and batch.attempts > 1 else []
        answer = self._post(
            "insert",
            batch.version,
            payloads,
            what,
            parameters={"inserted_at_ms": block.inserted_at_ms, "deadline_ms": deadline_ms},
            settings={
                "insert_deduplication_token": batch.token(block),
                # The default is ten minutes; without a quorum the setting has no effect.
                "insert_quorum_timeout": timeout_s * 1000,
            },
            timeout_s=timeout_s,
            sending=True,
        )
        if isinstance(answer, Refusal):
            return answer
        if not answer and not self._holds(batch, block, before, sent):
            raise ForeignAnswer(
                f"the answer to {what} is a 200 that does not prove to be ClickHouse's, and ClickHouse does not hold the block. It may "
                "still be at work on it, the next attempt looks first. Check what answers at AUDITEXPORT_CLICKHOUSE_URL",
                200,
            )
        return None

    def _rows_at(self, block: Block) -> int:
        found = self.holdings([block.inserted_at_ms]).get(block.inserted_at_ms)
        return found.rows if found is not None else 0

    def _holds(self, batch: Batch, block: Block, before: int | None, payloads: Sequence[bytes]) -> bool:
        """Whether ClickHouse has taken this block. For a requeue, present entries alone prove nothing."""
        rows = self._rows_at(block)
        if not batch.is_requeue(block):
            return rows > 0
        if before is not None and rows >= before + block.rows:
            return True
        contents = {entry.content for entry in self.entries_at(block.inserted_at_ms)} if payloads else set()
        return bool(payloads) and contents.issuperset(self.contents(batch.version, payloads, block.inserted_at_ms))

    def probe(self, version: str, payloads: list[bytes], *, timeout_s: int) -> Refusal | None:
        parameters, what = {"inserted_at_ms": 0}, "parsing rows without writing them"
        answer = self._post("probe", version, payloads, what, parameters=parameters, timeout_s=timeout_s)
        return answer if isinstance(answer, Refusal) else None

    def _post(
        self,
        name: str,
        version: str,
        payloads: list[bytes],
        what: str,
        *,
        parameters: Mapping[str, int],
        settings: Mapping[str, Value] = MappingProxyType({}),
        timeout_s: int,
        sending: bool = False,
    ) -> Refusal | bool:
        """Sends payloads and empties the list. True when ClickHouse acknowledged, False when a 200 proves nothing."""
        connection = self.connection
        settings = {
            **EVERYWHERE,
            **INSERT_SETTINGS,
            **connection.replica_settings,
            **settings,
            "max_execution_time": timeout_s,
        }
        with connection.translated(what, sending=sending):
            try:
                statement = _sql(name, version).replace("{settings}", stated(settings, connection.listed()))
                for parameter, value in parameters.items():
                    statement = statement.replace(f"{{{parameter}:Int64}}", str(int(value)))
                return connection.insert(_request(statement.encode(), payloads), timeout_s=timeout_s)
            except ServerError as error:
                if error.code == clickhouse_connection.UNKNOWN_SETTING:
                    connection.read_settings_again()
                refusal = None if is_fence(error.code, error.text) else refusal_of(error.code, error.name, error.text)
                if refusal is None:
                    raise
            except NotClickHouse as error:
                refusal = refusal_of_status(error.status, clickhouse_connection.FOREIGN.get(error.status, ""))
                if refusal is None:
                    raise
        if sending and refusal.kind is RefusalKind.ROWS:
            refusal = replace(refusal, definition=self.definition(version))
        return refusal

    def definition(self, version: str) -> str:
        """A hash of the definition of the version's table: columns, constraints and indexes."""
        found = self.rows("reading the table's definition", _PIECES["definition"], {"table": VERSIONS[version].table})
        return "definition " + hashlib.sha256("\n".join(row[0] for row in found).encode()).hexdigest()[:32]

    def definition_age_s(self, version: str) -> int:
        found = self.rows("reading the table's age", _PIECES["definition_age"], {"table": VERSIONS[version].table})
        return int(found[0][0])

    def holdings(self, inserted_at_ms: Sequence[int]) -> dict[int, Holding]:
        if not inserted_at_ms:
            return {}
        return _holdings(self._look_up("holdings", "looking for blocks", {"inserted_at_ms": list(inserted_at_ms)}))[0]

    def holdings_now(self, batch: Batch) -> tuple[dict[int, Holding], int | None]:
        lists = {"inserted_at_ms": [block.inserted_at_ms for block in batch.blocks]}
        statement, pieces = _with_lists(_sql("holdings", batch.version), lists)
        return _holdings(self.rows("looking for blocks", statement, pieces) if batch.blocks else ())

    def entries_at(self, inserted_at_ms: int, *, most: int = MOST_ENTRIES) -> list[StoredEntry]:
        values = {"inserted_at_ms": inserted_at_ms, "most": most}
        return [_entry(row) for row in self._look_up("entries_at", "reading entries", values=values)][:most]

    def entries_of(self, keys: Sequence[Key]) -> list[StoredEntry]:
        return [
            _entry(row)
            for some in _portions(keys, _key_bytes)
            for row in self._look_up("entries_of", "reading entries", {"keys": some})
        ]

    def keys_held(self, keys: Sequence[Key], inserted_at_ms: Sequence[int]) -> set[tuple[Key, int]]:
        return {
            ((row[0], row[1], row[2], row[3]), row[4])
            for some in _portions(keys, _key_bytes)
            for row in self._look_up(
                "keys_held", "looking for events", {"keys": some, "inserted_at_ms": inserted_at_ms}
            )
        }

    def ids_held(self, ids: Sequence[tuple[str, str]]) -> set[tuple[str, str]]:
        found: set[tuple[str, str]] = set()
        for some in _portions(ids, _key_bytes):
            lists: dict[str, Sequence[object]] = {"workspaces": sorted({pair[0] for pair in some}), "ids": some}
            found.update((row[0], row[1]) for row in self._look_up("ids_held", "looking for events", lists))
        return found

    def _look_up(
        self,
        name: str,
        what: str,
        lists: Mapping[str, Sequence[object]] = MappingProxyType({}),
        values: Mapping[str, Any] = MappingProxyType({}),
    ) -> Iterator[tuple[Any, ...]]:
        """The rows of a statement, over the tables of all versions."""
        for version in VERSIONS:
            statement, pieces = _with_lists(_sql(name, version), lists)
            yield from self.rows(what, statement, {**values, **pieces})

    def contents(self, version: str, payloads: Sequence[bytes], inserted_at_ms: int) -> list[int]:
        found: list[int] = []
        for part in _portions(payloads, len):
            whole, pieces = _in_pieces("payloads", b"\n".join(part).decode())
            rows = self.rows(
                "parsing payloads for a comparison",
                _sql("contents", version).replace("{payloads:String}", whole),
                {**pieces, "inserted_at_ms": inserted_at_ms},
                {**INSERT_SETTINGS, **CONTENT_SETTINGS},
            )
            found.extend(row[0] for row in rows)
        return found

    def count_by_inserted_at(self, from_ms: int, to_ms: int) -> dict[int, int]:
        counts: Counter[int] = Counter()
        for at_ms, entries in self._in_window("count_by_inserted_at", from_ms, to_ms):
            counts[at_ms] += entries
        return dict(sorted(counts.items()))

    def count_by_workspace(self, from_ms: int, to_ms: int) -> dict[tuple[str, int], int]:
        counts: Counter[tuple[str, int]] = Counter()
        for workspace_id, day_ms, entries in self._in_window("count_by_workspace", from_ms, to_ms):
            counts[workspace_id, day_ms] += entries
        return dict(counts)

    def surplus(self, from_ms: int, to_ms: int) -> tuple[int, int, int]:
        """Counted without FINAL, of [from_ms, to_ms) by `inserted_at`: entries, those that repeat an event, and those
        that repeat it under the same `inserted_at`. Merges remove the repetitions.
        """
        found = [[int(count or 0) for count in row] for row in self._in_window("surplus", from_ms, to_ms)]
        entries, copies, same_slot = map(sum, zip(*found, strict=True))
        return entries, copies, same_slot

    def _in_window(self, name: str, from_ms: int, to_ms: int) -> Iterator[tuple[Any, ...]]:
        return self._look_up(name, "counting entries", values={"from_ms": from_ms, "to_ms": to_ms})

    def named_by(self, erasure: Erasure, until_ms: int) -> int:
        values = {
            "workspace": erasure.workspace_id,
            "event": erasure.event_id,
            "from_ms": erasure.from_ms if erasure.from_ms is not None else -(2**63),
            "to_ms": erasure.to_ms if erasure.to_ms is not None else 2**63 - 1,
            "until_ms": until_ms,
        }
        return sum(row[0] for row in self._look_up("named_by", "counting what an erasure names", values=values))

    # ── the TTL ──────────────────────────────────────────────────────────────────────────────────

    def _ttls(self) -> TtlReader:
        return TtlReader(self.connection)

    def ttl(self, version: str) -> str:
        return self._ttls().ttl(VERSIONS[version].table).text

    def past_ttl(self, version: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        return self._ttls().past(VERSIONS[version].table, inserted_at_ms, ahead_s=ahead_s)

    def past_ttl_of(self, version: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        return self._ttls().past_of(VERSIONS[version].table, inserted_at_ms, keys)

    def kept_ms(self) -> int | None:
        kept = [self._ttls().kept_ms(version.table) for version in VERSIONS.values()]
        return None if None in kept else max(one for one in kept if one is not None)


def _holdings(rows: Iterable[Sequence[Any]]) -> tuple[dict[int, Holding], int | None]:
    """By `inserted_at`, and the time of the query; None if it has no rows."""
    held: dict[int, Holding] = {}
    times_ms = set()
    for at_ms, count, fingerprint, content, copies, now_ms in rows:
        held[at_ms] = Holding(rows=count, fingerprint=fingerprint, content=content, copies=copies)
        times_ms.add(int(now_ms))
    return held, min(times_ms, default=None)


def _entry(row: Sequence[Any]) -> StoredEntry:
    key = (row[0], row[1], row[2], row[3])
    return StoredEntry(key=key, inserted_at_ms=row[4], fingerprint=row[5], content=row[6])
