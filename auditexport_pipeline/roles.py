"""The grants that each role needs, and which of them a user lacks by MySQL's SHOW GRANTS.

The tests compare the README's grants with these. `mysql.checks` and `clickhouse.checks` compare the servers with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from enum import Enum
from typing import NamedTuple

from auditexport_pipeline.core.versions import VERSIONS


class Role(str, Enum):
    """A user with the grants of one role can do its work and nothing else."""

    EXPORTER = "exporter"
    OPERATOR = "operator"
    SWEEPER = "sweeper"
    READER = "reader"
    OWNER = "owner"


OUTBOX = "clickhouse_outbox"
LEDGER = "clickhouse_outbox_batch"
DEAD_LETTERS = "clickhouse_outbox_dead_letter"
ACTIONS = "clickhouse_outbox_action"
ERASURES = "clickhouse_outbox_erasure"

_CREATE = ("CREATE", "INSERT", "SELECT")

MYSQL_GRANTS: dict[Role, dict[str, tuple[str, ...]]] = {
    Role.EXPORTER: {
        OUTBOX: ("SELECT", "UPDATE (deleted_at)"),
        LEDGER: ("SELECT", "INSERT", "UPDATE"),
        DEAD_LETTERS: ("SELECT", "INSERT", "UPDATE"),
    },
    Role.OPERATOR: {
        OUTBOX: ("SELECT", "UPDATE (deleted_at)"),
        LEDGER: ("SELECT", "UPDATE"),
        DEAD_LETTERS: ("SELECT", "UPDATE"),
        ACTIONS: ("SELECT", "INSERT", "UPDATE"),
        ERASURES: ("SELECT", "INSERT"),
    },
    Role.SWEEPER: {
        OUTBOX: ("SELECT", "DELETE"),
        LEDGER: ("SELECT", "UPDATE"),
        DEAD_LETTERS: ("SELECT", "UPDATE"),
        ACTIONS: ("SELECT", "INSERT", "UPDATE"),
        ERASURES: ("SELECT",),
    },
    Role.READER: dict.fromkeys((OUTBOX, LEDGER, DEAD_LETTERS, ACTIONS, ERASURES), ("SELECT",)),
    Role.OWNER: {OUTBOX: ("SELECT",), LEDGER: _CREATE, DEAD_LETTERS: _CREATE, ACTIONS: _CREATE, ERASURES: _CREATE},
}

# input(), null() and format() are table functions that read no table, and ClickHouse asks for CREATE TEMPORARY TABLE.
# The exporter writes by the first two; a comparison lets ClickHouse parse payloads by the third.
_FUNCTIONS = {"*.*": ("CREATE TEMPORARY TABLE",)}
CLICKHOUSE_GRANTS: dict[Role, dict[str, tuple[str, ...]]] = {
    Role.EXPORTER: {"audit_logs_raw_v1": ("SELECT", "INSERT"), **_FUNCTIONS},
    Role.OPERATOR: {"audit_logs_raw_v1": ("SELECT",), **_FUNCTIONS},
    Role.SWEEPER: {"audit_logs_raw_v1": ("SELECT",), **_FUNCTIONS},
    Role.READER: {"audit_logs_raw_v1": ("SELECT",), "audit_logs": ("SELECT",), **_FUNCTIONS},
    Role.OWNER: {"audit_logs_raw_v1": ("SELECT", "CREATE TABLE"), "audit_logs": ("CREATE VIEW",)},
}


def clickhouse_grants(role: Role) -> dict[str, tuple[str, ...]]:
    """What a role needs in ClickHouse: on the table of every payload version what it needs on the first one's."""
    needed = CLICKHOUSE_GRANTS[role]
    return needed | {version.table: needed["audit_logs_raw_v1"] for version in VERSIONS.values()}


class _Granted(NamedTuple):
    privileges: set[str]
    database: str
    table: str
    revoked: bool


_GRANT = re.compile(
    r"(?P<verb>GRANT|REVOKE) (?P<privileges>.+?) ON (?:TABLE )?(?P<database>\*|`(?:[^`]|``)+`)\."
    r"(?P<table>\*|`(?:[^`]|``)+`) (?:TO|FROM) "
)
_PRIVILEGE = re.compile(r"(?P<name>[A-Z][A-Z ]*[A-Z])(?: \((?P<columns>[^)]*)\))?")


class MySQLGrants:
    """The grants of the user and of its active roles, on tables, databases and everything, from SHOW GRANTS."""

    def __init__(self, lines: Iterable[str], *, wildcards: bool) -> None:
        self._wildcards = wildcards
        self._granted = [self._read(found) for line in lines if (found := _GRANT.match(line))]

    @staticmethod
    def _read(found: re.Match[str]) -> _Granted:
        privileges = set()
        for privilege in _PRIVILEGE.finditer(found["privileges"]):
            columns = re.findall(r"`?(\w+)`?", privilege["columns"] or "")
            privileges.update([f"{privilege['name']} ({column})" for column in columns] or [privilege["name"]])
        database, table = (found[name].strip("`").replace("``", "`") for name in ("database", "table"))
        return _Granted(privileges, database, table, revoked=found["verb"] == "REVOKE")

    def lacking(self, database: str, table: str, needed: Iterable[str]) -> list[str]:
        """Which of these privileges the user does not have on this table."""
        has: set[str] = set()
        for granted in self._granted:
            if granted.table in ("*", table) and self._matches(granted.database, database):
                has = has - granted.privileges if granted.revoked else has | granted.privileges
        if has & {"ALL PRIVILEGES", "ALL"}:
            return []
        return [name for name in needed if name not in has and name.split(" (")[0] not in has]

    def beyond_this_database(self) -> list[str]:
        """Privileges that reach every database: more than any role here needs."""
        return sorted(
            {name for granted in self._granted if granted.database == "*" for name in granted.privileges - {"USAGE"}}
        )

    def _matches(self, pattern: str, database: str) -> bool:
        if pattern in ("*", database):
            return True
        if not self._wildcards:
            return False
        parts = re.findall(r"\\.|.", pattern)
        like = {"%": ".*", "_": "."}
        return re.fullmatch("".join(like.get(part) or re.escape(part[-1]) for part in parts), database) is not None
