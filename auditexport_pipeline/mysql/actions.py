"""MySQL: the record of what operators did, `clickhouse_outbox_action`.

What belongs here: writing an action in the transaction of its effect, and listing them. What does not: the
effects themselves.
"""

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
# Of a list that does not fit, so many entries are named.
NAMED_ENTRIES = 100

SQL = statements("mysql/actions.sql")


def record(connection: Connection, verb: str, by: Actor, selection: Mapping[str, object], rows: int) -> int:
    """Writes one action and returns its id; call it in the transaction of what it records."""
    values = {
        "verb": verb,
        "who": by.who,
        "why": by.why,
        "selection": _text_of(selection),
        "rows": rows,
    }
    return int(connection.execute(SQL["add"], values).lastrowid)


def count_rows(connection: Connection, action_id: int, rows: int) -> None:
    """Adds rows to an action, in the transaction of their effect."""
    connection.execute(SQL["count"], {"action_id": action_id, "rows": rows})


def _text_of(selection: Mapping[str, object]) -> str:
    """The conditions as JSON, as much of them as the column holds: of a list that is too long its first entries, its length
    and a digest of all of it, and of a long text its beginning.
    """
    encoded = msgspec.json.encode(selection)
    named = NAMED_ENTRIES
    while len(encoded) > LONGEST_SELECTION:
        kept: dict[str, object] = {}
        for name, value in selection.items():
            whole = msgspec.json.encode(value)
            if len(whole) <= 64 * max(named, 1):
                kept[name] = value
                continue
            if isinstance(value, (list, tuple)):
                kept[name] = list(value[:named])
                kept[f"{name}_count"] = len(value)
            else:
                kept[name] = str(value)[: 16 * named]
            kept[f"{name}_sha256"] = hashlib.sha256(whole).hexdigest()
        encoded = msgspec.json.encode(kept)
        named //= 2
    return encoded.decode()


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
