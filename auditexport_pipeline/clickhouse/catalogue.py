"""What ClickHouse's system tables say about the server, our user and our tables; for the checks."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

from auditexport_pipeline.clickhouse.connection import Connection
from auditexport_pipeline.clickhouse.engines import VIEW, Under, under_of
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.versions import VERSIONS, PayloadVersion, plain_type
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/checks.sql")


class Server(NamedTuple):
    """The server and our user on it. `read_only` is the profile's `readonly`: 0, 1 or 2."""

    version: str
    user: str
    database: str
    read_only: int


class FoundColumn(NamedTuple):
    """A column as the server describes it. `kind` is DEFAULT, MATERIALIZED, ALIAS or empty."""

    type: str
    kind: str
    expression: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as `system.tables` has it."""

    name: str
    database: str
    engine: str
    engine_full: str
    partition_key: str
    sorting_key: str
    created_by: str

    @property
    def replicated(self) -> bool:
        return self.engine.startswith(("Replicated", "Shared"))

    @property
    def under(self) -> Under | None:
        """What a Distributed table lies over; None for any other."""
        return under_of(self.engine_full, self.database)


class Catalogue:
    """The answers of one ClickHouse server to one user."""

    def __init__(self, client: Connection, url: str, role: Role, retention_days: int) -> None:
        self.client = client
        self.url = url
        self.role = role
        self.retention_days = retention_days

    def rows(self, name: str, **parameters: object) -> list[tuple[Any, ...]]:
        """The rows of a statement of checks.sql."""
        return self.client.query(_SQL[name], parameters)

    def rows_if_granted(self, name: str, **parameters: object) -> list[tuple[Any, ...]] | None:
        """The same; None where our user lacks the grant."""
        try:
            with self.client.translated(f"checking {name.replace('_', ' ')}"):
                return self.rows(name, **parameters)
        except SetupIncomplete:
            return None

    @cached_property
    def server(self) -> Server:
        version, user, database, read_only = self.rows("server")[0]
        return Server(str(version), str(user), str(database), int(read_only))

    @cached_property
    def tables(self) -> dict[str, Table]:
        """The tables of all payload versions and the view, as far as they are there."""
        return self._tables("", [*(version.table for version in VERSIONS.values()), VIEW])

    def local(self, table: Table) -> Table | None:
        """The table with keys, window and TTL: of a Distributed table its local table, or None if this server has none."""
        under = table.under
        return table if under is None else self._tables(under.database, [under.table]).get(under.table)

    def _tables(self, database: str, names: list[str]) -> dict[str, Table]:
        found = (
            Table(**dict(zip(Table.__slots__, row, strict=True)))
            for row in self.rows("tables", database=database, tables=names)
        )
        return {table.name: table for table in found}

    def columns(self, table: Table) -> dict[str, FoundColumn]:
        rows = self.rows("columns", database=table.database, table=table.name)
        return {str(name): FoundColumn(*map(str, found)) for name, *found in rows}


def compared_type(kind: str, version: PayloadVersion) -> str:
    """A type without the parts that do not change values. The canary event tests the parameters of the JSON types of
    the first version instead.
    """
    if version is next(iter(VERSIONS.values())) and "JSON(" in kind:
        kind = kind.split("JSON(", 1)[0] + "JSON" + (")" if kind.startswith("Array(") else "")
    return plain_type(kind)
