"""What doctor finds in MySQL: each test makes a real fault, a run claims nothing, and the printed fix is carried out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from auditexport_pipeline.mysql import catalogue
from auditexport_pipeline.mysql.catalogue import DDL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import MYSQL_GRANTS, MySQLGrants, Role
from auditexport_pipeline.sql import columns_of, keys_of
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.faults import (
    LEDGER,
    OUTBOX,
    Fault,
    carry_out,
    findings,
    globally,
    mariadb,
    the_finding,
)

# ── tables ───────────────────────────────────────────────────────────────────────────────────────

INDEX = "drainer_pending_idx"
BY_CASE = "CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL"
FAULTS = (
    Fault(f"ALTER TABLE {LEDGER} DROP COLUMN digest", f"{LEDGER} lacks digest"),
    # An older ledger: one statement, which an administrator can read first.
    Fault(f"ALTER TABLE {LEDGER} DROP COLUMN claim_key, DROP COLUMN process", f"{LEDGER} lacks claim_key, process"),
    Fault(f"ALTER TABLE {OUTBOX} DROP COLUMN created_at", f"{OUTBOX} lacks created_at"),
    Fault(f"ALTER TABLE {LEDGER} ENGINE = MyISAM", "stored by MyISAM"),
    Fault(f"ALTER TABLE {OUTBOX} ENGINE = MyISAM", "stored by MyISAM"),
    Fault(f"ALTER TABLE {OUTBOX} MODIFY deleted_at INT UNSIGNED NULL", "deleted_at is int unsigned"),
    Fault(f"ALTER TABLE {OUTBOX} MODIFY deleted_at BIGINT UNSIGNED NOT NULL", "deleted_at cannot be NULL"),
    Fault(f"ALTER TABLE {LEDGER} MODIFY pks VARCHAR(100) NOT NULL", "pks is varchar(100)"),
    Fault(f"ALTER TABLE {LEDGER} MODIFY last_error VARCHAR(1000) CHARACTER SET latin1 NOT NULL", "is in latin1"),
    Fault(f"ALTER TABLE {LEDGER} MODIFY owner VARCHAR(128) {BY_CASE}", "owner compares by utf8mb4_general_ci", False),
    Fault(
        f"ALTER TABLE {OUTBOX} MODIFY version VARCHAR(64) {BY_CASE}", "version compares by utf8mb4_general_ci", False
    ),
    Fault(f"ALTER TABLE {OUTBOX} DROP INDEX {INDEX}", f"has no index {INDEX}"),
    Fault(f"ALTER TABLE {OUTBOX} DROP INDEX {INDEX}, ADD INDEX {INDEX} (version, deleted_at)", f"has no index {INDEX}"),
    Fault(
        f"ALTER TABLE {OUTBOX} ALTER INDEX {INDEX} {{switched off}}",
        "switched off",
    ),
    Fault(f"ALTER TABLE {LEDGER} DROP INDEX state_idx", "has no index state_idx", False),
    Fault(f"DELETE FROM {LEDGER} WHERE batch_id = 0", "lacks its row 0"),
    Fault(f"UPDATE {LEDGER} SET inserted_at_ms = 4100000000000 WHERE batch_id = 0", "ahead of MySQL's clock", False),
    Fault(f"UPDATE {LEDGER} SET inserted_at_ms = 4300000000000 WHERE batch_id = 0", "ahead of MySQL's clock"),
)


@pytest.fixture(scope="module")
def healed(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Databases for many faults: each test repairs its fault, and sees that nothing is left."""
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        yield stack


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.words)
def test_a_fault_in_a_mysql_table_is_found_and_its_fix_heals_it(healed: Stack, fault: Fault) -> None:
    """A fix that does not fix is worse than none: an operator runs it at night and believes it."""
    healed.sql(fault.statement.replace("{switched off}", "IGNORED" if mariadb(healed) else "INVISIBLE"))
    carry_out(healed, the_finding(healed, fault.words, fatal=fault.fatal).fix)
    assert findings(healed) == []


def _heal(stack: Stack, role: Role) -> None:
    """Carries out every printed statement; then nothing is found."""
    found = findings(stack, role)
    assert found
    for finding in found:
        carry_out(stack, finding.fix)
    assert findings(stack, role) == []


# Every table, and a role that works on it.
TABLES = {table: Role.EXPORTER if table in MYSQL_GRANTS[Role.EXPORTER] else Role.OPERATOR for table in DDL}


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_the_printed_statement_adds_any_column_and_index(stack: Stack, table: str) -> None:
    """A declaration is printed only when its column is missing, and the server must accept each."""
    primary = str(stack.sql(f"SHOW INDEX FROM {table} WHERE Key_name = 'PRIMARY'")[0].Column_name)
    for column in columns_of(DDL[table]).keys() - {primary}:
        stack.sql(f"ALTER TABLE {table} DROP COLUMN {column}")
        _heal(stack, TABLES[table])
    for key in keys_of(DDL[table]):
        stack.sql(f"ALTER TABLE {table} DROP INDEX {key}")
        _heal(stack, TABLES[table])


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_the_printed_statement_widens_any_column(stack: Stack, table: str) -> None:
    """In a table that was created by hand, any column can be too narrow."""
    for column in columns_of(DDL[table]).values():
        text = any(kind in column.type for kind in ("VARCHAR", "TEXT", "JSON"))
        counts_up = " AUTO_INCREMENT" if "AUTO_INCREMENT" in column.declaration else ""
        nullable = " NULL" if column.nullable else f" NOT NULL{counts_up}"
        stack.sql(f"ALTER TABLE {table} MODIFY COLUMN {column.name} {'VARCHAR(9)' if text else 'TINYINT'}{nullable}")
        _heal(stack, TABLES[table])
        shown = str(stack.sql(f"SHOW COLUMNS FROM {table} LIKE '{column.name}'"))
        assert ("auto_increment" in shown) is bool(counts_up)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_a_missing_table_is_fatal_to_the_roles_that_need_it(stack: Stack, table: str) -> None:
    """The exporter does not need the operator's tables, and the owner creates what is missing."""
    stack.sql(f"DROP TABLE {table}")
    fixes = set()
    for role in Role:
        if table in MYSQL_GRANTS[role] and (role is not Role.OWNER or table == OUTBOX):
            found = the_finding(stack, f"MySQL table {table} does not exist", role=role)
            assert found.what == f"MySQL table {table} does not exist"
            fixes.add(found.fix)
        else:
            assert findings(stack, role) == []
    carry_out(stack, *fixes)
    assert [findings(stack, role) for role in Role] == [[]] * len(Role)


def test_a_stamp_ahead_that_a_batch_carries_is_not_lowered(stack: Stack) -> None:
    """Handing out an inserted_at twice would let one batch be taken for another."""
    stack.sql(f"UPDATE {LEDGER} SET inserted_at_ms = 4100000000000 WHERE batch_id = 0")
    stack.sql(
        f"INSERT INTO {LEDGER} (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count,"
        " entry_count, bytes, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms)"
        " VALUES (1, 1, 0, 'audit_log.v1', 'verified', '', 0, 0, 0, 0, 0, '', '[]', '', '', 4100000000000, 0, '', 0)"
    )
    (found,) = findings(stack)
    assert "UPDATE" not in found.fix
    assert "stamp twice" in found.fix


@pytest.mark.mysql_sensitive
@pytest.mark.parametrize(
    ("name", "value", "words", "fatal"),
    [
        ("binlog_format", "'STATEMENT'", "binlog_format = STATEMENT", True),
        ("read_only", "1", "MySQL is read-only (read_only)", True),
        ("super_read_only", "1", "MySQL is read-only (super_read_only, read_only)", True),
        ("max_allowed_packet", "1048576", "max_allowed_packet is 1,048,576 bytes", False),
    ],
)
def test_a_setting_of_mysql_that_breaks_a_drain_is_found(
    healed: Stack, name: str, value: str, words: str, fatal: bool
) -> None:
    """A failover or a colleague can change these. One statement turns both switches of read-only off."""
    if name == "super_read_only" and mariadb(healed):
        assert healed.sql("SHOW GLOBAL VARIABLES LIKE 'super_read_only'") == []  # MariaDB has no such variable
        return
    with globally(healed, name, value):
        carry_out(healed, the_finding(healed, words, fatal=fatal).fix)
        assert findings(healed) == []


def test_a_payload_above_the_packet_is_found_before_it_reads_as_nothing(stack: Stack) -> None:
    """The servers answer with an empty text or NULL, not with an error: the dead letter would have a wrong reason."""
    stack.put(("ws_1", "evt_1", json.dumps({"event_id": "evt_1", "description": "x" * 200_000})))
    with globally(stack, "max_allowed_packet", "65536"):
        assert not stack.sql(f"SELECT CAST(payload AS BINARY) AS payload FROM {OUTBOX}")[0].payload
        fatal = [found for found in findings(stack) if found.fatal]
        assert len(fatal) == 1
        assert "a pending payload is larger than max_allowed_packet" in fatal[0].what
        stack.sql(fatal[0].fix)
        stack.outbox.disconnect()
        assert not [found for found in findings(stack) if found.fatal]


# ── version and isolation ────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("version", ["5.7.44-log", "10.5.29-MariaDB-log"])
def test_a_mysql_that_is_too_old_is_fatal(healed: Stack, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Its SKIP LOCKED or JSON would fail in the middle of a run. Only the result of VERSION() is faked."""
    statement = catalogue._SQL["server"]
    monkeypatch.setitem(catalogue._SQL, "server", statement.replace("VERSION()", f"'{version}'"))
    assert "upgrade it to" in the_finding(healed, version).fix


def test_the_servers_isolation_level_does_not_matter(healed: Stack) -> None:
    """Ours is set on every connection, not inherited."""
    stack = healed
    variable = "tx_isolation" if mariadb(stack) else "transaction_isolation"
    with globally(stack, variable, "'SERIALIZABLE'"):
        assert stack.sql(f"SELECT @@SESSION.{variable} AS level")[0].level == "READ-COMMITTED"
        assert findings(stack) == []


@pytest.mark.parametrize(
    ("statement", "words", "fatal"),
    [
        ("SET SESSION TRANSACTION ISOLATION LEVEL REPEATABLE READ", "runs at REPEATABLE-READ", True),
        ("SET timestamp = UNIX_TIMESTAMP(SYSDATE()) + 7200", "s ahead of ClickHouse's", False),
        ("SET timestamp = UNIX_TIMESTAMP(SYSDATE()) - 259200", "s behind ClickHouse's", True),
    ],
)
def test_a_changed_session_and_a_wrong_clock_are_found(stack: Stack, statement: str, words: str, fatal: bool) -> None:
    """A proxy that shares connections changes sessions: marking then locks gaps. Entries expire by a clock."""

    def change(connection: sa.pool.PoolProxiedConnection, *_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(statement)

    sa.event.listen(stack.outbox.engine, "checkout", change)
    try:
        the_finding(stack, words, fatal=fatal)
    finally:
        sa.event.remove(stack.outbox.engine, "checkout", change)
        stack.outbox.disconnect()
    assert findings(stack) == []


def test_a_read_only_server_stops_every_role_that_writes(healed: Stack) -> None:
    """A reader can use a replica."""
    with globally(healed, "read_only", "1"):
        for role in set(Role) - {Role.READER}:
            assert "read-only" in findings(healed, role)[0].what
        assert findings(healed, Role.READER) == []


# ── grants ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def user(stack: Stack) -> Iterator[Callable[[], Stack]]:
    """A MySQL user without any grant; the function connects through it anew."""
    name = f"doctor{os.getpid()}"
    stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'doctor'")
    opened: list[MySQLOutbox] = []

    def connect() -> Stack:
        outbox = MySQLOutbox(f"mysql+pymysql://{name}:doctor@{stack.mysql_url.split('@', 1)[1]}")
        outbox.disconnect()
        opened.append(outbox)
        return replace(stack, mysql_url=outbox.url, outbox=outbox)

    yield connect
    for outbox in opened:
        outbox.disconnect()
    stack.sql(f"DROP USER '{name}'@'127.0.0.1'")


@pytest.mark.slow
@pytest.mark.parametrize("role", list(Role))
def test_each_missing_grant_is_named_and_the_printed_one_is_enough(
    stack: Stack, user: Callable[[], Stack], role: Role
) -> None:
    """Users keep few privileges only if doctor names exactly what is missing, and for which user."""
    database = stack.mysql_url.rsplit("/", 1)[1]
    name = f"'doctor{os.getpid()}'@'127.0.0.1'"
    for table, privileges in MYSQL_GRANTS[role].items():
        stack.sql(f"GRANT {', '.join(privileges)} ON {database}.{table} TO {name}")
    assert findings(user(), role) == []
    for table, privileges in MYSQL_GRANTS[role].items():
        for privilege in privileges:
            stack.sql(f"REVOKE {privilege} ON {database}.{table} FROM {name}")
            lacking = [found for found in findings(user(), role) if f"lacks {privilege} on {table}" in found.what]
            assert len(lacking) == 1, f"{privilege} on {table} is not missed"
            assert lacking[0].fatal
            stack.sql(lacking[0].fix)
            assert findings(user(), role) == []


def test_grants_by_role_and_by_wildcard_count(stack: Stack, user: Callable[[], Stack]) -> None:
    """Most companies grant by role or by pattern: false alarms would make doctor useless."""
    name, role = f"'doctor{os.getpid()}'@'127.0.0.1'", f"doctor_role{os.getpid()}"
    database = stack.mysql_url.rsplit("/", 1)[1]
    stack.sql(f"GRANT SELECT, INSERT, UPDATE ON `{database[:-1].replace('_', chr(92) + '_')}_`.* TO {name}")
    assert findings(user()) == []
    stack.sql(f"REVOKE ALL PRIVILEGES, GRANT OPTION FROM {name}")
    stack.sql(f"CREATE ROLE {role}")
    try:
        for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items():
            stack.sql(f"GRANT {', '.join(privileges)} ON {database}.{table} TO {role}")
        stack.sql(f"GRANT {role} TO {name}")
        stack.sql(f"SET DEFAULT ROLE {role} {'FOR' if mariadb(stack) else 'TO'} {name}")
        assert findings(user()) == []
    finally:
        stack.sql(f"DROP ROLE {role}")


def test_show_grants_is_read_as_mysql_means_it() -> None:
    """Partial revokes and escaped wildcards are where a reader of grants goes wrong."""
    lines = [
        "GRANT SELECT, UPDATE ON *.* TO `u`@`%`",
        "REVOKE UPDATE ON `app`.* FROM `u`@`%`",
        "GRANT INSERT ON `ap\\_`.* TO `u`@`%`",
        "GRANT DELETE, UPDATE (`a`, `b`) ON `app`.`t` TO `u`@`%`",
    ]
    grants = MySQLGrants(lines, wildcards=True)
    assert grants.lacking("app", "t", ("SELECT", "DELETE", "UPDATE (a)", "UPDATE (b)")) == []
    assert grants.lacking("app", "t", ("UPDATE (c)", "UPDATE", "INSERT")) == ["UPDATE (c)", "UPDATE", "INSERT"]
    assert grants.lacking("ap_", "x", ("INSERT",)) == []
    assert grants.lacking("other", "x", ("UPDATE (a)", "DELETE")) == ["DELETE"]
