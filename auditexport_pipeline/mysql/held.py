"""Held rows: the ClickHouse table refuses them although they parse. They are held until the table's definition changes.

They are in `clickhouse_outbox_dead_letter` with the state `held` and the definition that refused them. What does not belong
here: finding them (`core.split`), and dead letters, which wait for an operator.
"""

from __future__ import annotations

from collections.abc import Callable

from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql.database import Database
from auditexport_pipeline.mysql.dead_letters import SQL


def release(outbox: Database, definition_of: Callable[[str], str]) -> int:
    """Releases held rows whose table has another definition now; returns how many.

    A run calls it before a plan, and a run that stays calls it now and then. `definition_of` returns the present definition of a
    version's table; it is called only when rows are held. Durable effect: the rows' state, one statement a version; the next
    claim takes them. Raises `OutboxUnavailable`, `AuditLogUnavailable`.
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
