"""What doctor finds in MySQL: every fault is made for real, a run claims nothing, and the printed fix is carried out."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.mysql import catalogue, checks
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import MYSQL_GRANTS, MySQLGrants, Role
from auditexport_pipeline.sql import columns_of, keys_of, load
from auditexport_tests.conftest import Stack
from auditexport_tests.support.faults import LEDGER, OUTBOX, claims_nothing, findings, globally, mariadb

# ── tables ───────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("fault", "what", "fatal"),
    [
        (f"ALTER TABLE {LEDGER} DROP COLUMN digest", "lacks digest", True),
        (f"ALTER TABLE {LEDGER} ENGINE = MyISAM", "stored by MyISAM", True),
        (f"ALTER TABLE {OUTBOX} ENGINE = MyISAM", "stored by MyISAM", True),
        (f"ALTER TABLE {OUTBOX} MODIFY deleted_at INT UNSIGNED NULL", "deleted_at is int unsigned", True),
        (f"ALTER TABLE {OUTBOX} MODIFY deleted_at BIGINT UNSIGNED NOT NULL", "deleted_at cannot be NULL", True),
        (f"ALTER TABLE {LEDGER} MODIFY pks VARCHAR(100) NOT NULL", "pks is varchar(100)", True),
        (f"ALTER TABLE {LEDGER} MODIFY last_error VARCHAR(1000) CHARACTER SET latin1 NOT NULL", "is in latin1", True),
        (
            f"ALTER TABLE {LEDGER} MODIFY owner VARCHAR(128) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL",
            "owner compares by utf8mb4_general_ci",
            False,
        ),
        (
            f"ALTER TABLE {OUTBOX} MODIFY version VARCHAR(64) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL",
            "version compares by utf8mb4_general_ci",
            False,
        ),
        (f"ALTER TABLE {OUTBOX} DROP INDEX drainer_pending_idx", "has no index drainer_pending_idx", True),
        (
            f"ALTER TABLE {OUTBOX} DROP INDEX drainer_pending_idx, ADD INDEX drainer_pending_idx (version, deleted_at)",
            "has no index drainer_pending_idx",
            True,
        ),
        (f"ALTER TABLE {LEDGER} DROP INDEX state_idx", "has no index state_idx", False),
        (f"UPDATE {LEDGER} SET inserted_at_ms = 4100000000000 WHERE batch_id = 0", "ahead of MySQL's clock", False),
        (f"UPDATE {LEDGER} SET inserted_at_ms = 4300000000000 WHERE batch_id = 0", "ahead of MySQL's clock", True),
    ],
)
def test_a_fault_in_a_mysql_table_is_found_and_its_fix_mends_it(
    stack: Stack, fault: str, what: str, fatal: bool
) -> None:
    """A fix that does not fix is worse than none: somebody runs it at night and believes it."""
    assert findings(stack) == []
    stack.sql(fault)
    (found,) = findings(stack)
    assert what in found.what
    assert found.fatal is fatal
    assert found.breaks
    if fatal:
        claims_nothing(stack)
    stack.sql(found.fix.split("so: ")[-1])
    assert findings(stack) == []


def _mend(stack: Stack, role: Role = Role.OPERATOR) -> None:
    """Carries out every printed statement, and sees that all is well."""
    found = findings(stack, role)
    assert found
    for finding in found:
        stack.sql(finding.fix)
    assert findings(stack, role) == []


# Every table of ours and the application's, which the five roles look at between them.
TABLES = {
    OUTBOX: ("outbox", Role.EXPORTER),
    LEDGER: ("ledger", Role.EXPORTER),
    "clickhouse_outbox_dead_letter": ("dead_letters", Role.EXPORTER),
    "clickhouse_outbox_action": ("actions", Role.OPERATOR),
    "clickhouse_outbox_erasure": ("erasures", Role.OPERATOR),
}


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_the_printed_statement_brings_back_any_column_and_any_index(stack: Stack, table: str) -> None:
    """Each declaration is printed only when its own column is missing, and each has to be one that the server takes."""
    name, role = TABLES[table]
    statement = load("mysql/schema.sql")[name]
    primary = str(stack.sql(f"SHOW INDEX FROM {table} WHERE Key_name = 'PRIMARY'")[0].Column_name)
    for column in columns_of(statement):
        if column != primary:
            stack.sql(f"ALTER TABLE {table} DROP COLUMN {column}")
            _mend(stack, role)
    for key in keys_of(statement):
        stack.sql(f"ALTER TABLE {table} DROP INDEX {key}")
        _mend(stack, role)


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
def test_the_printed_statement_widens_any_column(stack: Stack, table: str) -> None:
    """A table that somebody made by hand has one of them too narrow, and the key is as likely as any."""
    name, role = TABLES[table]
    for column in columns_of(load("mysql/schema.sql")[name]).values():
        narrow = (
            "VARCHAR(9)" if "VARCHAR" in column.type or "TEXT" in column.type or "JSON" in column.type else "TINYINT"
        )
        counts_up = " AUTO_INCREMENT" if "AUTO_INCREMENT" in column.declaration else ""
        nullable = " NULL" if column.nullable else f" NOT NULL{counts_up}"
        stack.sql(f"ALTER TABLE {table} MODIFY COLUMN {column.name} {narrow}{nullable}")
        _mend(stack, role)
        assert bool(counts_up) is (
            "auto_increment" in str(stack.sql(f"SHOW COLUMNS FROM {table} LIKE '{column.name}'"))
        )


@pytest.mark.slow
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("role", list(Role))
def test_a_table_that_a_role_needs_and_does_not_find_is_fatal_to_that_role(
    stack: Stack, role: Role, table: str
) -> None:
    """An operator's table is no business of the exporter's, and the owner is the one who creates what is missing."""
    stack.sql(f"DROP TABLE {table}")
    found = findings(stack, role)
    creates = role is Role.OWNER and table != OUTBOX
    if creates or table not in MYSQL_GRANTS[role]:
        assert found == []
    else:
        assert [finding.what for finding in found] == [f"MySQL table {table} does not exist"]
        assert found[0].fatal
        assert "auditexport init" in found[0].fix
    if role is Role.EXPORTER and found:
        claims_nothing(stack)
    setup.create(stack.outbox, stack.log, with_outbox=table == OUTBOX)
    assert findings(stack, role) == []


def test_a_ledger_without_its_row_0_is_mended_by_init(stack: Stack) -> None:
    """What the finding says to run is run."""
    stack.sql(f"DELETE FROM {LEDGER} WHERE batch_id = 0")
    (found,) = findings(stack)
    assert "auditexport init" in found.fix
    claims_nothing(stack)
    setup.create(stack.outbox, stack.log)
    assert findings(stack) == []


def test_an_index_that_is_switched_off_is_found_and_its_fix_mends_it(stack: Stack) -> None:
    """It is listed like any other, yet naming it in a statement is an error: SHOW INDEX alone misleads."""
    state = "IGNORED" if mariadb(stack) else "INVISIBLE"
    stack.sql(f"ALTER TABLE {OUTBOX} ALTER INDEX drainer_pending_idx {state}")
    with pytest.raises(sa.exc.DBAPIError):
        stack.sql(f"SELECT 1 FROM {OUTBOX} FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 1")
    (found,) = findings(stack)
    assert "switched off" in found.what
    stack.sql(found.fix)
    assert findings(stack) == []


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


@pytest.mark.parametrize(
    ("name", "value", "what", "fatal"),
    [
        ("binlog_format", "'STATEMENT'", "binlog_format = STATEMENT", True),
        ("read_only", "1", "MySQL is read-only (read_only)", True),
        ("max_allowed_packet", "1048576", "max_allowed_packet is 1,048,576 bytes", False),
    ],
)
def test_a_setting_of_mysql_that_breaks_a_drain_is_found(
    stack: Stack, name: str, value: str, what: str, fatal: bool
) -> None:
    """A failover or a colleague changes these without touching anything of ours."""
    assert findings(stack) == []
    with globally(stack, name, value):
        (found,) = findings(stack)
        assert what in found.what
        assert found.fatal is fatal
        if fatal:
            claims_nothing(stack)
        stack.sql(found.fix.split("if this is it: ")[-1])
        stack.outbox.disconnect()
        assert findings(stack) == []


def test_error_1665_is_what_a_statement_binlog_does_to_a_drain(stack: Stack) -> None:
    """The reason why the finding above is fatal, seen: without it the claim would be refused with a puzzling code."""
    with globally(stack, "binlog_format", "'STATEMENT'"):
        with pytest.raises(sa.exc.DBAPIError) as refused:
            stack.sql(f"UPDATE {LEDGER} SET epoch = epoch + 1 WHERE batch_id = 0")
        assert refused.value.orig is not None
        assert refused.value.orig.args[0] == 1665


def test_a_payload_above_the_packet_is_found_before_it_reads_as_nothing(stack: Stack) -> None:
    """The servers answer with an empty text or NULL, not with an error: it would be set aside for a wrong reason."""
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
def test_a_server_that_is_too_old_is_fatal(stack: Stack, monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    """Its SKIP LOCKED or JSON would fail in the middle of a run instead. Only the text that VERSION() gives is false."""
    asked = catalogue._SQL["server"]
    monkeypatch.setitem(catalogue._SQL, "server", asked.replace("VERSION()", f"'{version}'"))
    (found,) = findings(stack)
    assert version in found.what
    assert "upgrade it to" in found.fix
    assert found.fatal
    claims_nothing(stack)


@pytest.mark.parametrize("level", ["REPEATABLE-READ", "SERIALIZABLE"])
def test_the_servers_isolation_level_does_not_matter(stack: Stack, level: str) -> None:
    """Ours is said on every connection, not inherited."""
    variable = "tx_isolation" if mariadb(stack) else "transaction_isolation"
    with globally(stack, variable, f"'{level}'"):
        assert stack.sql(f"SELECT @@SESSION.{variable} AS level")[0].level == "READ-COMMITTED"
        assert findings(stack) == []


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
def test_a_session_that_does_not_keep_our_isolation_level_is_fatal(stack: Stack, level: str) -> None:
    """A proxy that hands one connection to several clients does this: marking would then lock gaps of the application's."""

    def somebody_else(connection: sa.pool.PoolProxiedConnection, *_: object) -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET SESSION TRANSACTION ISOLATION LEVEL {level}")

    sa.event.listen(stack.outbox.engine, "checkout", somebody_else)
    try:
        (found,) = findings(stack)
        assert level.replace(" ", "-") in found.what
        assert found.fatal
        claims_nothing(stack)
    finally:
        sa.event.remove(stack.outbox.engine, "checkout", somebody_else)
        stack.outbox.disconnect()
    assert findings(stack) == []


@pytest.mark.parametrize("role", [role for role in Role if role is not Role.READER])
def test_a_read_only_server_stops_everybody_who_writes(stack: Stack, role: Role) -> None:
    """A reader is what a replica is for."""
    with globally(stack, "read_only", "1"):
        assert "read-only" in findings(stack, role)[0].what
        assert findings(stack, Role.READER) == []


def test_a_super_read_only_primary_is_opened_by_the_printed_statement(stack: Stack) -> None:
    """MySQL has two switches, and the one statement turns both."""
    if mariadb(stack):
        return
    with globally(stack, "super_read_only", "1"):
        (found,) = findings(stack)
        stack.sql(found.fix.split("if this is it: ")[-1])
        assert findings(stack) == []


def test_a_server_that_was_started_read_only_is_not_told_to_set_a_variable() -> None:
    """innodb_read_only cannot be set while it runs: it is how a replica on shared storage shows."""
    db = catalogue.Catalogue(None, "", Role.EXPORTER)  # type: ignore[arg-type]
    db.variables = {"transaction_isolation": "READ-COMMITTED", "innodb_read_only": "ON"}
    (found,) = checks._settings(db)
    assert "SET GLOBAL" not in found.fix
    assert "innodb_read_only" in found.fix


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
def test_each_grant_that_a_role_lacks_is_named_and_the_printed_one_is_enough(
    stack: Stack, user: Callable[[], Stack], role: Role
) -> None:
    """Least privilege only stays least if the tool says exactly what is missing, and for whom."""
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


def test_one_printed_statement_brings_an_older_ledger_up(stack: Stack) -> None:
    """An upgrade is one ALTER that an administrator can read first; nothing alters a table by itself."""
    stack.sql(f"ALTER TABLE {LEDGER} DROP COLUMN claim_key, DROP COLUMN process")
    (finding,) = findings(stack)
    assert finding.what == f"{LEDGER} lacks claim_key, process"
    assert finding.fatal
    stack.sql(finding.fix)
    assert findings(stack) == []


def test_grants_by_role_and_by_wildcard_count(stack: Stack, user: Callable[[], Stack]) -> None:
    """Most shops grant by role or by pattern: a false alarm here is how a tool gets ignored."""
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


# ── clock and session ────────────────────────────────────────────────────────────────────────────


def test_a_clock_of_mysql_that_is_off_is_found(stack: Stack) -> None:
    """Entries are stamped by one clock and expire by another."""
    for off_s, fatal in ((7200, False), (-3 * 86_400, True)):

        def stepped(connection: sa.pool.PoolProxiedConnection, *_: object, off_s: int = off_s) -> None:
            with connection.cursor() as cursor:
                cursor.execute(f"SET timestamp = UNIX_TIMESTAMP(SYSDATE()) + {off_s}")

        sa.event.listen(stack.outbox.engine, "checkout", stepped)
        try:
            (found,) = findings(stack)
            assert "MySQL's clock is" in found.what
            assert ("ahead" if off_s > 0 else "behind") in found.what
            assert found.fatal is fatal
        finally:
            sa.event.remove(stack.outbox.engine, "checkout", stepped)
            stack.outbox.disconnect()
    assert findings(stack) == []


def test_our_sessions_keep_utc_and_refuse_to_cut_a_text(stack: Stack) -> None:
    """A server in local time repeats an hour in autumn, and one without strict mode stores half a list of pks."""
    with globally(stack, "sql_mode", "''"), globally(stack, "time_zone", "'+05:00'"):
        assert stack.sql("SELECT @@session.time_zone AS zone")[0].zone == "+00:00"
        with pytest.raises(sa.exc.DBAPIError):
            stack.sql(f"UPDATE {LEDGER} SET owner = :long WHERE batch_id = 0", long="x" * 200)
