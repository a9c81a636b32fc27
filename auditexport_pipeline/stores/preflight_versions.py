"""Looking at the tables of payload versions beyond `audit_log.v1` before anything is claimed.

What belongs here: whether each table is what its version declares, in engine, keys, window and columns. What does not: the
table of `audit_log.v1` (`stores.preflight_clickhouse`), and whether a version can be exported at all (`core.versions`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import TYPE_CHECKING

from auditexport_pipeline.core.versions import SORT_KEY, VERSIONS, PayloadVersion, plain_type
from auditexport_pipeline.stores.engines import LOCAL
from auditexport_pipeline.stores.findings import Finding, Look
from auditexport_pipeline.stores.roles import Role
from auditexport_pipeline.stores.statements import load

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

_SQL = load("preflight.sql")
_WINDOW = re.compile(r"deduplication_window = (\d+)")
_DAYS = re.compile(r"toIntervalDay\((\d+)\)")


def look_at_other_versions(client: Client, role: Role) -> Iterator[Look]:
    """One look for the table of each version but the first. Source: system tables; nothing is written."""
    first, *others = VERSIONS.values()
    if not others:
        return
    wanted = [f"{version.table}{level}" for version in (first, *others) for level in ("", LOCAL)]
    tables = {
        row[0]: row[1:] for row in client.query(_SQL["version_tables"], parameters={"tables": wanted}).result_rows
    }
    # A Distributed table has neither keys nor window nor TTL: that of the shard, where this server has it, stands for it.
    held = {
        name: f"{name}{LOCAL}" if engine == "Distributed" and f"{name}{LOCAL}" in tables else name
        for name, (engine, *_) in tables.items()
    }
    columns: dict[str, dict[str, str]] = {}
    for table, name, kind in client.query(_SQL["version_columns"], parameters={"tables": wanted}).result_rows:
        columns.setdefault(table, {})[name] = kind
    kept = _DAYS.findall(tables[held[first.table]][1]) if first.table in tables else []
    for version in others:
        about = f"ClickHouse table {version.table} of {version.name}"
        if version.table not in tables and role is Role.OWNER:
            yield Look(about=about, seen="not there; `auditexport init` creates it")
        elif version.table not in tables:
            finding = Finding(
                what=f"ClickHouse table {version.table} of payload version {version.name} does not exist or is not readable",
                breaks="rows of that version cannot be exported",
                fix="run `auditexport init`, or uninstall the package that registers the version",
            )
            yield Look(about=about, seen="not there", findings=(finding,))
        elif tables[held[version.table]][0] == "Distributed":
            yield Look(about=about, seen="not on this server; run doctor on a server of each shard")
        else:
            table = held[version.table]
            engine, full, sorting_key = tables[table]
            findings = (
                *_keys(table, engine, full, sorting_key),
                *_columns(version, table, columns.get(table, {})),
                *_retention(table, _DAYS.findall(full), kept),
            )
            yield Look(about=about, seen=str(engine), findings=findings)


def _keys(table: str, engine: str, full: str, sorting_key: str) -> Iterator[Finding]:
    anew = f"RENAME TABLE {table} TO {table}_old while no drain runs, then `auditexport init`"
    if not engine.endswith("ReplacingMergeTree"):
        yield Finding(what=f"{table} is a {engine}", breaks="copies of one event would stay for ever", fix=anew)
    if sorting_key.replace(" ", "") != ",".join(SORT_KEY):
        yield Finding(
            what=f"{table} is sorted by {sorting_key}", breaks="copies of one event do not collapse", fix=anew
        )
    window = _WINDOW.search(full)
    if not engine.startswith(("Replicated", "Shared")) and (window is None or not int(window[1])):
        yield Finding(
            what=f"{table} has no deduplication window",
            breaks="an INSERT that is replayed while its first attempt still runs is stored twice",
            fix=f"ALTER TABLE {table} MODIFY SETTING non_replicated_deduplication_window = 10000",
        )


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


def _retention(table: str, days: list[str], kept: list[str]) -> Iterator[Finding]:
    if days != kept:
        yield Finding(
            what=f"{table} keeps entries {' + '.join(days) or 'for ever'} and the first version's table "
            f"{' + '.join(kept) or 'for ever'}, in days",
            breaks="sweep, requeue and reconciliation go by the first version's retention for all",
            fix=f"give {table} the same TTL",
            fatal=False,
        )
