"""Rows that the ClickHouse table refuses although they parse: held until the table's definition changes.

They are in `clickhouse_outbox_dead_letter` in the state `held`, with the definition that refused them. What does not belong
here: finding them (`core.split`), and dead letters, which wait for an operator.
"""

from __future__ import annotations

from collections.abc import Callable

from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql.database import Database
from auditexport_pipeline.mysql.dead_letters import SQL


def release(outbox: Database, definition_of: Callable[[str], str]) -> int:
    """Lets held rows go back to pending whose table has another definition by now; returns how many.

    Called before a plan, and now and then by a run that stays. `definition_of` a version is what ClickHouse says of its table
    now; it is asked only when rows are held. Durable effect: their state, one statement a version; the next claim takes them. Raises `OutboxUnavailable`, `AuditLogUnavailable`.
    """
    with outbox.transaction("looking for held rows") as connection:
        held = {row.version for row in connection.execute(SQL["held_versions"])}
    released = 0
    for version in sorted(held & set(VERSIONS)):
        definition = definition_of(version)
        with outbox.transaction("releasing held rows") as connection:
            values = {"version": version, "definition": definition}
            released += connection.execute(SQL["release_held"], values).rowcount
    return released
