"""The statements of the `.sql` files by name, and what our own CREATE TABLE statements declare.

What belongs here: the loader, and reading a CREATE TABLE statement of ours, so that what is created and what is checked
cannot differ. What does not: statements, SQL in general, and tables as a server describes them.

A statement begins with a line `-- name: some_name`; the comments under it say which index it uses, what
it locks and which race it survives, and stay in the text that the server's slow log shows.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from auditexport_pipeline.core.versions import statements_of

_COLUMN = re.compile(r"  (?P<quote>`?)(?P<name>[a-z_.]+)(?P=quote) (?P<rest>.+?),?$")
_TYPE_ENDS = re.compile(r" (?:NOT NULL|NULL|AUTO_INCREMENT|PRIMARY KEY|DEFAULT|MATERIALIZED|COMMENT)\b")
_KEY = re.compile(r"  KEY (?P<name>\w+) \((?P<columns>[\w, ]+)\)")


def load(path: str) -> dict[str, str]:
    """The statements of a `.sql` file of this package, by name; `path` is like `mysql/outbox.sql`."""
    return statements_of((Path(__file__).parent / path).read_text(), path)


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column: its type as declared, and its whole declaration, fit for an ALTER TABLE."""

    name: str
    type: str
    declaration: str
    nullable: bool


def columns_of(statement: str) -> dict[str, Column]:
    """The columns of one of our CREATE TABLE statements, by name."""
    columns = {}
    for line in statement.splitlines():
        found = _COLUMN.match(line)
        if found:
            rest = found["rest"]
            columns[found["name"]] = Column(
                name=found["name"],
                type=_TYPE_ENDS.split(rest)[0],
                declaration=f"{found['quote']}{found['name']}{found['quote']} {rest}",
                nullable=" NULL" in rest and " NOT NULL" not in rest,
            )
    return columns


def keys_of(statement: str) -> dict[str, str]:
    """The secondary indexes of one of our CREATE TABLE statements: name → columns, comma-separated."""
    return {
        found["name"]: found["columns"].replace(" ", "")
        for line in statement.splitlines()
        if (found := _KEY.match(line))
    }
