"""What MySQL's catalogue says about the server, our user and our tables, for the checks; and what `schema.sql`
declares.

Each statement is sent at most once, when a check needs it.
"""

from __future__ import annotations

import re
from collections import defaultdict
from functools import cached_property
from typing import Any, NamedTuple

from sqlalchemy import Connection

from auditexport_pipeline.roles import OUTBOX, MySQLGrants, Role
from auditexport_pipeline.sql import columns_of, keys_of, load

_SQL = load("mysql/checks.sql")
# The CREATE TABLE statement of each table, by the table's name.
DDL = {
    found[1]: statement
    for statement in load("mysql/schema.sql").values()
    if (found := re.match(r"CREATE TABLE IF NOT EXISTS (\w+)", statement))
}


class FoundColumn(NamedTuple):
    """A column as the server describes it. `type` has no width for integers, which only old servers print."""

    type: str
    nullable: bool
    charset: str | None
    collation: str | None


class FoundIndex(NamedTuple):
    """An index as the server describes it. MySQL can make one invisible, MariaDB can have it ignored."""

    columns: str
    usable: bool
    switch_on: str


class Catalogue:
    """The answers of one MySQL server to one user, read over one connection in a transaction."""

    def __init__(self, connection: Connection, url: str, role: Role) -> None:
        self.connection = connection
        self.url = url
        self.role = role

    def rows(self, name: str) -> list[Any]:
        """The rows of a statement of checks.sql."""
        return list(self.connection.exec_driver_sql(_SQL[name]))

    @cached_property
    def server(self) -> Any:
        return self.rows("server")[0]

    @property
    def database(self) -> str:
        return str(self.server.database_name)

    @cached_property
    def variables(self) -> dict[str, str]:
        return {str(row[0]).lower(): str(row[1]) for row in self.rows("variables")}

    @cached_property
    def grants(self) -> MySQLGrants:
        wildcards = self.variables.get("partial_revokes", "OFF") != "ON"
        return MySQLGrants((row[0] for row in self.rows("grants")), wildcards=wildcards)

    @cached_property
    def columns(self) -> dict[str, dict[str, FoundColumn]]:
        """By table and column; without an entry for a table that is not there."""
        columns: defaultdict[str, dict[str, FoundColumn]] = defaultdict(dict)
        for table, column, kind, nullable, charset, collation in self.rows("columns"):
            kind = re.sub(r"(int)\(\d+\)", r"\1", kind)
            columns[table][column] = FoundColumn(kind, nullable == "YES", charset, collation)
        return dict(columns)

    @cached_property
    def engines(self) -> dict[str, str]:
        return {row.table_name: str(row.engine) for row in self.rows("tables")}

    @cached_property
    def indexes(self) -> dict[tuple[str, str], FoundIndex]:
        """By table and name."""
        parts: defaultdict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
        for row in self.rows("indexes"):
            part = {str(name).lower(): value for name, value in row._mapping.items()}
            parts[str(part["table_name"]).lower(), str(part["index_name"]).lower()].append(part)
        return {
            name: FoundIndex(
                columns=",".join(str(part["column_name"]).lower() for part in index),
                usable=index[0].get("is_visible", "YES") == "YES" and index[0].get("ignored", "NO") == "NO",
                switch_on="VISIBLE" if "is_visible" in index[0] else "NOT IGNORED",
            )
            for name, index in parts.items()
        }

    def readable(self, table: str) -> bool:
        """Whether our user may read this table, there or not."""
        return not self.grants.lacking(self.database, table, ("SELECT",))

    @cached_property
    def pending_rows_are_readable(self) -> bool:
        """Whether pending rows can be sampled by their index. Other checks report what is missing for that."""
        ((name, declared),) = keys_of(DDL[OUTBOX]).items()
        index = self.indexes.get((OUTBOX, name))
        sound = index is not None and index.usable and index.columns == declared
        complete = columns_of(DDL[OUTBOX]).keys() <= self.columns.get(OUTBOX, {}).keys()
        return sound and complete and self.readable(OUTBOX)
