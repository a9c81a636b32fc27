"""Looking at the tables of payload versions beyond `audit_log.v1` before anything is claimed.

What belongs here: whether each table stands beside that of `audit_log.v1` and is what its version declares. What does not: the
table of `audit_log.v1` (`clickhouse.checks`), what any of them stands on (`clickhouse.engine_checks`), and whether a
version can be exported at all (`core.versions`).
"""

from __future__ import annotations

from collections.abc import Iterator

from auditexport_pipeline.clickhouse.connection import Connection
from auditexport_pipeline.clickhouse.engine_checks import (
    Table,
    distributed,
    engine,
    held_by,
    init_for,
    table_of,
    under_of,
    window,
)
from auditexport_pipeline.clickhouse.engines import family_of
from auditexport_pipeline.clickhouse.ttl import TableTtl, ttl_of
from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.core.versions import VERSIONS, PayloadVersion, plain_type
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/checks.sql")


def look_at_other_versions(client: Connection, url: str, role: Role, *, fully: bool = True) -> Iterator[Look]:
    """Looks at the table of each version but the first; with `fully` also columns and TTL. Source: system tables; nothing
    is written.
    """
    first, *others = VERSIONS.values()
    if not others:
        return
    wanted = [version.table for version in (first, *others)]
    found = client.query(_SQL["version_tables"], parameters={"tables": wanted}).result_rows
    tables = {table.name: table for table in map(table_of, found)}
    ours = tables.get(first.table)
    first_held = held_by(client, ours) if ours is not None else None
    for version in others:
        about = f"ClickHouse table {version.table} of {version.name}"
        if version.table not in tables and role is Role.OWNER:
            yield Look(about=about, seen="not there; `auditexport init` creates it")
            continue
        if version.table not in tables:
            finding = Finding(
                what=f"ClickHouse table {version.table} of payload version {version.name} does not exist or is not readable",
                breaks="rows of that version cannot be exported, and looking for blocks fails for every version",
                fix=f"run {init_for(ours) if ours is not None else '`auditexport init`'}, or uninstall the package that "
                "registers the version",
            )
            yield Look(about=about, seen="not there", findings=(finding,))
            continue
        named = tables[version.table]
        held = held_by(client, named)
        beside = tuple(_beside(ours, named)) if ours is not None else ()
        if (under := under_of(named)) is not None:
            look = distributed(client, url, version.table, under)
            yield Look(about=look.about, seen=look.seen, findings=(*beside, *look.findings))
            beside = ()
        if held is None:
            yield Look(about=about, seen="not on this server; run doctor on a server of each shard")
            continue
        anew = f"RENAME TABLE {held.name} TO {held.name}_old while no drain runs, then {init_for(ours or named)}"
        findings = [*beside, *engine(held, anew), *window(client, held)]
        if fully:
            findings += _columns(version, held.name, _kinds(client, held))
            if first_held is not None:
                findings += _retention(held.name, ttl_of(held.engine_full), ttl_of(first_held.engine_full))
        yield Look(
            about=about, seen=f"{held.engine}, by {held.partition_key or 'no partition'}", findings=tuple(findings)
        )


def _beside(ours: Table, table: Table) -> Iterator[Finding]:
    if family_of(table.engine) != family_of(ours.engine):
        yield Finding(
            what=f"{table.name} is a {table.engine}, and {ours.name} a {ours.engine}",
            breaks="it is not on every server that is asked, where drains of all versions then fail, and its entries are lost "
            "with the one that has it",
            fix=f"RENAME TABLE {table.name} TO {table.name}_old while no drain runs, then {init_for(ours)}, then copy them over",
        )


def _kinds(client: Connection, table: Table) -> dict[str, str]:
    parameters = {"database": table.database, "table": table.name}
    found = client.query(_SQL["columns"], parameters=parameters).result_rows
    return {str(name): str(kind) for name, kind, _ in found}


def _columns(version: PayloadVersion, table: str, there: dict[str, str]) -> Iterator[Finding]:
    for name, kind in version.columns.items():
        if name not in there:
            yield Finding(
                what=f"{table} lacks {name}",
                breaks="INSERTs fail",
                fix=f"ALTER TABLE {table} ADD COLUMN `{name}` {kind}",
            )
        elif plain_type(there[name]) != plain_type(kind):
            yield Finding(
                what=f"{table}.{name} is {there[name]} and {version.name} sends {kind}",
                breaks="what is stored differs from what was sent, or INSERTs fail",
                fix=f"ALTER TABLE {table} MODIFY COLUMN `{name}` {kind}",
            )


def _retention(table: str, ttl: TableTtl, kept: TableTtl) -> Iterator[Finding]:
    if ttl.deletions != kept.deletions:
        yield Finding(
            what=f"{table} keeps entries {_kept(ttl)} and the first version's table {_kept(kept)}",
            breaks="one retention cannot be right for both: the ledger keeps a batch as long as the longer one needs it",
            fix=f"give {table} the same TTL",
            fatal=False,
        )


def _kept(ttl: TableTtl) -> str:
    return f"until {', '.join(map(str, ttl.deletions))}" if ttl.deletions else "for ever"
