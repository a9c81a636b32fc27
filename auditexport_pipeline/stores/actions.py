"""MySQL: the record of what operators did, `clickhouse_outbox_action`.

What belongs here: writing an action in the transaction of its effect, and listing them. What does not: the
effects themselves.
"""

from __future__ import annotations

from collections.abc import Mapping

import msgspec
from sqlalchemy import Connection, text

from auditexport_pipeline.core.actions import Action, By

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
        "selection": msgspec.json.encode(selection).decode(),
        "rows": rows,
    }
    return int(connection.execute(_ADD, values).lastrowid)


def last(connection: Connection, count: int) -> list[Action]:
    """The last `count` actions, newest first."""
    return [
        Action(
            action_id=row.action_id,
            at_ms=row.at_ms,
            verb=row.verb,
            by=By(who=row.who, why=row.why),
            selection=row.selection,
            rows=row.row_count,
        )
        for row in connection.execute(_LAST, {"row_limit": count})
    ]
