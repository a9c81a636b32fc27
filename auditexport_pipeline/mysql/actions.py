"""MySQL: the record of what operators did, `clickhouse_outbox_action`.

What belongs here: writing an action in the transaction of its effect, and listing them. What does not: the
effects themselves.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import msgspec
from sqlalchemy import Connection, Row, text

from auditexport_pipeline.core.actions import Action, By

# The column is TEXT: 65,535 bytes.
LONGEST_SELECTION = 60_000
# Of a list that does not fit, so many entries are named.
NAMED_ENTRIES = 100

_ADD = text(
    "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
    "VALUES (CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED), :verb, :who, :why, :selection, :rows)"
)
# Primary key, descending; no lock.
_LAST = text(
    "SELECT action_id, at_ms, verb, who, why, selection, row_count FROM clickhouse_outbox_action "
    "ORDER BY action_id DESC LIMIT :row_limit"
)


def record(connection: Connection, verb: str, by: By, selection: Mapping[str, object], rows: int) -> int:
    """Writes one action and returns its id; call it in the transaction of what it records."""
    values = {
        "verb": verb,
        "who": by.who,
        "why": by.why,
        "selection": _text_of(selection),
        "rows": rows,
    }
    return int(connection.execute(_ADD, values).lastrowid)


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
    return [action_of(row) for row in connection.execute(_LAST, {"row_limit": count})]


def action_of(row: Row[Any]) -> Action:
    """An action as a row of its table."""
    return Action(
        action_id=row.action_id,
        at_ms=row.at_ms,
        verb=row.verb,
        by=By(who=row.who, why=row.why),
        selection=row.selection,
        rows=row.row_count,
    )
