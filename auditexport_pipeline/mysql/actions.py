"""MySQL: the record of what operators did, `clickhouse_outbox_action`. The effects themselves do not belong here."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, Row

from auditexport_pipeline.core.actions import Action, Actor
from auditexport_pipeline.mysql.statements import statements

# The column is TEXT: 65,535 bytes.
LONGEST_SELECTION = 60_000
# Of a selection that does not fit, longer values are shortened.
LONGEST_VALUE = 4_000
# Entries of a longer list that are named, and characters of each: event ids have 48.
NAMED_ENTRIES = 100
NAMED_CHARACTERS = 64

SQL = statements("mysql/actions.sql")


def record(connection: Connection, verb: str, by: Actor, selection: Mapping[str, object], rows: int) -> int:
    """Writes one action and returns its id; call it in the transaction of what it records."""
    values = {"verb": verb, "who": by.who, "why": by.why, "selection": _text_of(selection), "rows": rows}
    return int(connection.execute(SQL["add"], values).lastrowid)


def count_rows(connection: Connection, action_id: int, rows: int) -> None:
    """Adds rows to an action, in the transaction of their effect."""
    connection.execute(SQL["count"], {"action_id": action_id, "rows": rows})


def _text_of(selection: Mapping[str, object]) -> str:
    """The conditions as JSON. If the column cannot hold all of it, a long list is its first entries and its length, and a long
    text its beginning, both with a digest of the whole.
    """
    encoded = msgspec.json.encode(selection)
    if len(encoded) <= LONGEST_SELECTION:
        return encoded.decode()
    shortened: dict[str, object] = {}
    for name, value in selection.items():
        whole = msgspec.json.encode(value)
        if len(whole) <= LONGEST_VALUE:
            shortened[name] = value
            continue
        if isinstance(value, (list, tuple)):
            shortened[name] = [str(entry)[:NAMED_CHARACTERS] for entry in value[:NAMED_ENTRIES]]
            shortened[f"{name}_count"] = len(value)
        else:
            shortened[name] = str(value)[: LONGEST_VALUE // 4]
        shortened[f"{name}_sha256"] = hashlib.sha256(whole).hexdigest()
    return msgspec.json.encode(shortened).decode()


def last(connection: Connection, count: int) -> list[Action]:
    """The last `count` actions, newest first."""
    return [_action_of(row) for row in connection.execute(SQL["last"], {"row_limit": count})]


def last_of_verb(connection: Connection, verb: str, count: int) -> list[Action]:
    """The last `count` actions of one verb, newest first."""
    return [_action_of(row) for row in connection.execute(SQL["last_of_verb"], {"verb": verb, "row_limit": count})]


def one(connection: Connection, action_id: int) -> Action | None:
    row = connection.execute(SQL["one"], {"action_id": action_id}).one_or_none()
    return _action_of(row) if row is not None else None


def _action_of(row: Row[Any]) -> Action:
    return Action(
        action_id=row.action_id,
        at_ms=row.at_ms,
        verb=row.verb,
        by=Actor(who=row.who, why=row.why),
        selection=row.selection,
        rows=row.row_count,
    )
