"""ClickHouse: which rows a table's TTL clause deletes.

What belongs here: splitting the clause into its parts, and the SQL that lets ClickHouse evaluate them. What does not:
what follows from an answer (`core.excuses`).

A clause is never computed here: ClickHouse knows its months, time zones, overflows and other columns. The answer for
what ClickHouse cannot evaluate is None: unknown.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auditexport_pipeline.clickhouse.connection import Connection, ServerError
from auditexport_pipeline.clickhouse.engines import under_of
from auditexport_pipeline.core.event import Key
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/ttl.sql")
# Entries in one statement: the ids of so many fit into the 128 KB of a form's field, in which they travel.
_KEYS_AT_ONCE = 100
_STAMPS_AT_ONCE = 2_000
_TTL = re.compile(r" TTL (.+?)(?= SETTINGS | COMMENT |$)", re.DOTALL)
_MOVES_OR_RECOMPRESSES = re.compile(r" (?:TO (?:DISK|VOLUME)|RECOMPRESS)\b")
_CONDITION = re.compile(r" (?:DELETE )?WHERE ")
_DELETES = re.compile(r" DELETE\s*$")
_QUOTED = re.compile(r"""'(?:[^'\\]|\\.)*'|"(?:[^"\\]|\\.)*"|`(?:[^`\\]|\\.)*`""", re.DOTALL)
_BRACKETED = re.compile(r"[(\[{][^()\[\]{}]*[)\]}]")
# ClickHouse cannot evaluate an expression over the columns that are given: an unknown column or function, or a type, a
# number or a date that it does not take.
_CANNOT_EVALUATE = {36, 42, 43, 44, 46, 47, 53, 70, 386, 456}


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """One part of a TTL clause that deletes rows: from `at` on, those for which `where` is true (all of them without)."""

    at: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.at} WHERE {self.where}" if self.where else self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTtl:
    """What a table's TTL clause deletes. `unreadable` says why that is not known."""

    text: str = ""
    deletions: tuple[Deletion, ...] = ()
    unreadable: str = ""


def ttl_of(engine_full: str) -> TableTtl:
    """The TTL of a MergeTree table, from `system.tables.engine_full`, as ClickHouse formats it."""
    found = _TTL.search(_masked(engine_full))
    if found is None:
        return TableTtl()
    text = engine_full[slice(*found.span(1))].strip()
    masked = _masked(text)
    if " GROUP BY " in masked:  # its keys and assignments are comma-separated lists too
        return TableTtl(text=text, unreadable="it aggregates rows (GROUP BY), and entries disappear in others")
    deletions = []
    for part in re.finditer("[^,]+", masked):
        if _MOVES_OR_RECOMPRESSES.search(part[0]):
            continue
        whole = text[slice(*part.span())]
        condition = _CONDITION.search(part[0])
        at = whole[: condition.start()] if condition else whole[: len(_DELETES.sub("", part[0]))]
        deletions.append(Deletion(at=at.strip(), where=whole[condition.end() :].strip() if condition else ""))
    return TableTtl(text=text, deletions=tuple(deletions))


def _masked(text: str) -> str:
    """The text with everything in quotes and brackets masked: only keywords and top-level commas remain. As long as
    before.
    """
    text = _QUOTED.sub(_mask, text)
    while (masked := _BRACKETED.sub(_mask, text)) != text:
        text = masked
    return text


def _mask(found: re.Match[str]) -> str:
    return "·" * len(found[0])


class TtlReader:
    """The TTL of the tables on one server, evaluated by that server."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    def ttl(self, table: str) -> TableTtl:
        """Of a Distributed table, the TTL of its local table, where this server has that one."""
        database = engine = ""
        for _ in range(2):
            found = self._evaluated(_SQL["table"], {"database": database, "table": table})
            if not found:
                return TableTtl(text=f"of {table}", unreadable=f"{table} is not on this server")
            engine, engine_full = map(str, found[0])
            if "MergeTree" in engine:
                return ttl_of(engine_full)
            under = under_of(engine_full, database)
            if under is None:
                break
            database, table = under.database, under.table
        return TableTtl(text=f"of {table}", unreadable=f"{table} is a {engine}, which has no TTL of its own")

    def past(self, table: str, inserted_at_ms: Sequence[int], *, ahead_s: int = 0) -> dict[int, bool | None]:
        """Whether ClickHouse's merges may delete entries with these `inserted_at`s (`ahead_s` from now); None: unknown."""
        ttl = self.ttl(table)
        past: dict[int, bool | None] = {}
        for start in range(0, len(inserted_at_ms), _STAMPS_AT_ONCE):
            some = list(inserted_at_ms[start : start + _STAMPS_AT_ONCE])
            found = self._past(ttl, "over_stamps", {"stamps": some, "ahead_s": ahead_s}, len(some))
            past |= zip(some, found, strict=True)
        return past

    def past_of(self, table: str, inserted_at_ms: int, keys: Sequence[Key]) -> dict[Key, bool | None]:
        """As `past`, of entries with one `inserted_at` whose sort keys are known."""
        ttl = self.ttl(table)
        past: dict[Key, bool | None] = {}
        for start in range(0, len(keys), _KEYS_AT_ONCE):
            some = keys[start : start + _KEYS_AT_ONCE]
            columns = zip(("workspaces", "buckets", "times", "events"), map(list, zip(*some, strict=True)), strict=True)
            values = {**dict(columns), "inserted_at": inserted_at_ms, "ahead_s": 0}
            past |= zip(some, self._past(ttl, "over_keys", values, len(some)), strict=True)
        return past

    def kept_ms(self, table: str) -> int | None:
        """The longest that an entry is kept after its `inserted_at`; None: for ever, or unknown."""
        ttl = self.ttl(table)
        whole = [deletion.at for deletion in ttl.deletions if not deletion.where]
        return self.kept_by(whole[0]) if whole else None

    def kept_by(self, at: str) -> int | None:
        """The same, by one expression; None when it cannot be evaluated from `inserted_at` alone."""
        found = self._evaluated(_SQL["kept"].replace("$at", at), {})
        return int(found[0][0]) if found else None

    def _past(self, ttl: TableTtl, name: str, values: Mapping[str, Any], count: int) -> list[bool | None]:
        if ttl.unreadable:
            return [None] * count
        deleted = []
        for deletion in ttl.deletions:
            conditions = [f"({deletion.at}) <= now() + toIntervalSecond({{ahead_s:Int64}})"]
            if deletion.where:
                conditions.append(f"({deletion.where}) != 0")
            met = []
            for condition in conditions:
                rows = self._evaluated(_SQL[name].replace("$condition", condition), values)
                met.append([bool(met) for _, met in sorted(rows)] if rows else [None] * count)
            deleted.append([_all(one) for one in zip(*met, strict=True)])
        return [_any(one) for one in zip(*deleted, strict=True)] if deleted else [False] * count

    def _evaluated(self, statement: str, values: Mapping[str, Any]) -> list[tuple[Any, ...]] | None:
        """The rows; None where ClickHouse cannot evaluate an expression over the columns that are given."""
        with self._connection.translated("reading a table's TTL"):
            try:
                return self._connection.query(statement, values, {"session_timezone": ""})
            except ServerError as error:
                if error.code in _CANNOT_EVALUATE:
                    return None
                raise


def _all(values: Sequence[bool | None]) -> bool | None:
    """SQL's AND: False if one is false, unknown if one is unknown."""
    return False if False in values else None if None in values else True


def _any(values: Sequence[bool | None]) -> bool | None:
    """SQL's OR: True if one is true, unknown if one is unknown."""
    return True if True in values else None if None in values else False
