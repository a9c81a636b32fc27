"""ClickHouse: what a table's TTL clause says about deleting rows, read from the server's own words.

What belongs here: telling the parts of the clause apart, and the SQL that lets ClickHouse evaluate them. What does not: who
asks (`clickhouse.audit_log`, `clickhouse.table_checks`), and what follows from an answer (`core.excuses`).

A clause is never computed here: months, time zones, overflows and other columns are ClickHouse's business. What cannot be
evaluated is unknown, which is neither past nor not past.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from auditexport_pipeline.core.event import Key
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/ttl.sql")
# Slots or keys of one question: their ids fit the 128 KB of a form's field, in which they travel.
_AT_ONCE = 100
_SLOTS_AT_ONCE = 2_000
# Engines Remote and RemoteSecure are Distributed ones that name addresses in the cluster's place.
_UNDER = re.compile(r"(?:Distributed|Remote|RemoteSecure)\('[^']*', '(?P<database>[^']*)', '(?P<table>[^']*)'")
_TTL_PART = re.compile(r" TTL (?P<what>.+?)(?= SETTINGS | COMMENT |$)", re.DOTALL)
_MOVES_OR_RECOMPRESSES = re.compile(r" (?:TO (?:DISK|VOLUME)|RECOMPRESS)\b")
_GROUPS = re.compile(r" GROUP BY ")
_CONDITION = re.compile(r" (?:DELETE )?WHERE ")
_DELETES = re.compile(r" DELETE\s*$")
# Codes that say that an expression cannot be evaluated over the columns that are given: an unknown column or function, a
# type, a number or a date that it does not take.
CANNOT_EVALUATE = frozenset({36, 42, 43, 44, 46, 47, 53, 70, 386, 456})


@dataclass(frozen=True, slots=True, kw_only=True)
class Deletion:
    """One part of a TTL clause that deletes rows: from `at` on, those for which `where` is true (all of them without)."""

    at: str
    where: str = ""

    def __str__(self) -> str:
        return f"{self.at} WHERE {self.where}" if self.where else self.at


@dataclass(frozen=True, slots=True, kw_only=True)
class TableTtl:
    """What a table's TTL clause deletes. `text` is the clause; `unreadable` says why it cannot be told what it deletes."""

    text: str = ""
    deletions: tuple[Deletion, ...] = ()
    unreadable: str = ""


def ttl_of(engine_full: str) -> TableTtl:
    """The TTL of a MergeTree table, from `system.tables.engine_full`, where ClickHouse has written it anew."""
    found = _TTL_PART.search(_masked(engine_full))
    if found is None:
        return TableTtl()
    text = engine_full[slice(*found.span("what"))].strip()
    masked = _masked(text)
    if _GROUPS.search(masked):  # its keys and assignments are comma-separated lists too
        return TableTtl(text=text, unreadable="it aggregates rows (GROUP BY), and entries disappear in others")
    deletions = []
    for first, last in _parts(masked):
        part, hidden = text[first:last], masked[first:last]
        if _MOVES_OR_RECOMPRESSES.search(hidden):
            continue
        condition = _CONDITION.search(hidden)
        at = part[: condition.start()] if condition else part[: len(_DELETES.sub("", hidden))]
        deletions.append(Deletion(at=at.strip(), where=part[condition.end() :].strip() if condition else ""))
    return TableTtl(text=text, deletions=tuple(deletions))


def _masked(text: str) -> str:
    """The text, as long as it was, with everything inside quotes and brackets blotted out: what is left are keywords."""
    shown = []
    quote, depth, escaped = "", 0, False
    for letter in text:
        inside = bool(quote) or depth > 0
        if quote:
            if escaped:
                escaped = False
            elif letter == "\\":
                escaped = True
            elif letter == quote:
                quote = ""
        elif letter in "'\"`":
            quote, inside = letter, True
        elif letter in "([{":
            depth += 1
        elif letter in ")]}":
            depth -= 1
            inside = True
        shown.append("·" if inside or depth else letter)
    return "".join(shown)


def _parts(masked: str) -> list[tuple[int, int]]:
    cuts = [index for index, letter in enumerate(masked) if letter == ","]
    return list(zip([0, *(cut + 1 for cut in cuts)], [*cuts, len(masked)], strict=True))


Ask = Callable[[str, Mapping[str, Any]], Sequence[Sequence[Any]]]
"""Sends a statement with parameters and returns its rows; raises `CannotEvaluate` for the codes above."""


class CannotEvaluate(Exception):
    """ClickHouse cannot evaluate an expression over the columns that it was given."""


class TtlReader:
    """The TTL of the tables on one server, evaluated by that server."""

    def __init__(self, ask: Ask) -> None:
        self._ask = ask

    def ttl(self, table: str) -> TableTtl:
        """Under a Distributed table, the TTL of the table beneath it, where this server has that one."""
        database = ""
        for _ in range(2):
            found = self._ask(_SQL["table"], {"database": database, "table": table})
            if not found:
                return TableTtl(text=f"of {table}", unreadable=f"{table} is not on this server")
            engine, engine_full = map(str, found[0])
            if "MergeTree" in engine:
                return ttl_of(engine_full)
            under = _UNDER.match(engine_full)
            if engine != "Distributed" or under is None:
                break
            database, table = under["database"], under["table"]
        return TableTtl(text=f"of {table}", unreadable=f"{table} is a {engine}, whose TTL is not its own")

    def past_slots(self, table: str, slots: Sequence[int], *, ahead_s: int = 0) -> list[bool | None]:
        """Whether ClickHouse's merges may delete entries with these `inserted_at`s (`ahead_s` from now); None: unknown."""
        found: list[bool | None] = []
        ttl = self.ttl(table)
        for start in range(0, len(slots), _SLOTS_AT_ONCE):
            some = list(slots[start : start + _SLOTS_AT_ONCE])
            found.extend(self._past(ttl, "of_slots", {"slots": some, "ahead_s": ahead_s}, len(some)))
        return found

    def past_keys(self, table: str, inserted_at_ms: int, keys: Sequence[Key]) -> list[bool | None]:
        """As `past_slots`, of entries of one slot whose sort keys are known."""
        found: list[bool | None] = []
        ttl = self.ttl(table)
        for start in range(0, len(keys), _AT_ONCE):
            some = keys[start : start + _AT_ONCE]
            values = {
                "workspaces": [key[0] for key in some],
                "buckets": [key[1] for key in some],
                "times": [key[2] for key in some],
                "events": [key[3] for key in some],
                "inserted_at": inserted_at_ms,
                "ahead_s": 0,
            }
            found.extend(self._past(ttl, "of_keys", values, len(some)))
        return found

    def kept_ms(self, table: str) -> int | None:
        """The longest that an entry is kept after its `inserted_at`; None: for ever, or unknown."""
        ttl = self.ttl(table)
        whole = [deletion.at for deletion in ttl.deletions if not deletion.where]
        if ttl.unreadable or not whole:
            return None
        return self.kept_by(whole[0])

    def kept_by(self, at: str) -> int | None:
        """The same, by one expression; None when it cannot be evaluated from `inserted_at` alone."""
        try:
            ((kept_ms,),) = self._ask(_SQL["kept"].replace("$at", at), {})
        except CannotEvaluate:
            return None
        return int(kept_ms)

    def _past(self, ttl: TableTtl, name: str, values: Mapping[str, Any], count: int) -> list[bool | None]:
        if ttl.unreadable:
            return [None] * count
        past: list[bool | None] = [False] * count
        for deletion in ttl.deletions:
            reached = self._evaluated(name, "$at", deletion.at, values, count)
            if deletion.where:
                true = self._evaluated(f"{name}_where", "$where", deletion.where, values, count)
                reached = [_both(one, other) for one, other in zip(reached, true, strict=True)]
            past = [_either(one, other) for one, other in zip(past, reached, strict=True)]
        return past

    def _evaluated(
        self, name: str, place: str, expression: str, values: Mapping[str, Any], count: int
    ) -> list[bool | None]:
        try:
            rows = self._ask(_SQL[name].replace(place, expression), values)
        except CannotEvaluate:
            return [None] * count
        return [bool(row[1]) for row in sorted(rows, key=lambda row: int(row[0]))]


def _both(one: bool | None, other: bool | None) -> bool | None:
    if one is False or other is False:
        return False
    return None if one is None or other is None else True


def _either(one: bool | None, other: bool | None) -> bool | None:
    if one or other:
        return True
    return None if one is None or other is None else False
