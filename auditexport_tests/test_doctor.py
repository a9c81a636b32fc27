"""The preflight and `auditexport doctor`: every fault is made for real, and the printed fix is carried out."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.errors import InvalidConfig, SetupIncomplete
from auditexport_pipeline.stores import preflight
from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
from auditexport_pipeline.stores.findings import Finding, all_findings
from auditexport_pipeline.stores.outbox import MySQLOutbox
from auditexport_pipeline.stores.preflight_clickhouse import clickhouse_version
from auditexport_pipeline.stores.preflight_mysql import server_version
from auditexport_pipeline.stores.roles import MYSQL_GRANTS, MySQLGrants, Role
from auditexport_tests.conftest import Stack

LEDGER = "clickhouse_outbox_batch"
OUTBOX = "clickhouse_outbox"


def _findings(stack: Stack, role: Role = Role.EXPORTER) -> list[Finding]:
    return preflight.check(stack.outbox, stack.log, role=role)


def _mariadb(stack: Stack) -> bool:
    return "mariadb" in str(stack.sql("SELECT VERSION() AS v")[0].v).lower()


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
    assert _findings(stack) == []
    stack.sql(fault)
    (found,) = _findings(stack)
    assert what in found.what
    assert found.fatal is fatal
    assert found.breaks
    stack.sql(found.fix.split("so: ")[-1])
    assert _findings(stack) == []


def test_an_index_that_is_switched_off_is_found_and_its_fix_mends_it(stack: Stack) -> None:
    """It is listed like any other, yet naming it in a statement is an error: SHOW INDEX alone misleads."""
    state = "IGNORED" if _mariadb(stack) else "INVISIBLE"
    stack.sql(f"ALTER TABLE {OUTBOX} ALTER INDEX drainer_pending_idx {state}")
    with pytest.raises(sa.exc.DBAPIError):
        stack.sql(f"SELECT 1 FROM {OUTBOX} FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 1")
    (found,) = _findings(stack)
    assert "switched off" in found.what
    stack.sql(found.fix)
    assert _findings(stack) == []


def test_a_stamp_ahead_that_a_batch_carries_is_not_lowered(stack: Stack) -> None:
    """Handing out an inserted_at twice would let one batch be taken for another."""
    stack.sql(f"UPDATE {LEDGER} SET inserted_at_ms = 4100000000000 WHERE batch_id = 0")
    stack.sql(
        f"INSERT INTO {LEDGER} (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count,"
        " entry_count, bytes, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms)"
        " VALUES (1, 1, 0, 'audit_log.v1', 'verified', '', 0, 0, 0, 0, 0, '', '[]', '', '', 4100000000000, 0, '', 0)"
    )
    (found,) = _findings(stack)
    assert "UPDATE" not in found.fix
    assert "stamp twice" in found.fix


@contextmanager
def _globally(stack: Stack, name: str, value: str) -> Iterator[None]:
    """A global variable of the server, for new sessions, put back afterwards."""
    before = stack.sql(f"SELECT @@GLOBAL.{name} AS value")[0].value
    stack.sql(f"SET GLOBAL {name} = {value}")
    stack.outbox.engine.dispose()
    try:
        yield
    finally:
        stack.sql(f"SET GLOBAL {name} = :value", value=before)
        stack.outbox.engine.dispose()


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
    assert _findings(stack) == []
    with _globally(stack, name, value):
        (found,) = _findings(stack)
        assert what in found.what
        assert found.fatal is fatal
        stack.sql(found.fix.split("if this is it: ")[-1])
        stack.outbox.engine.dispose()
        assert _findings(stack) == []


def test_error_1665_is_what_a_statement_binlog_does_to_a_drain(stack: Stack) -> None:
    """The reason why the finding above is fatal, seen: without it the claim would be refused with a puzzling code."""
    with _globally(stack, "binlog_format", "'STATEMENT'"):
        with pytest.raises(sa.exc.DBAPIError) as refused:
            stack.sql(f"UPDATE {LEDGER} SET epoch = epoch + 1 WHERE batch_id = 0")
        assert refused.value.orig is not None
        assert refused.value.orig.args[0] == 1665


def test_a_payload_above_the_packet_is_found_before_it_reads_as_nothing(stack: Stack) -> None:
    """The servers answer with an empty text or NULL, not with an error: it would be set aside for a wrong reason."""
    stack.put(("ws_1", "evt_1", json.dumps({"event_id": "evt_1", "description": "x" * 200_000})))
    with _globally(stack, "max_allowed_packet", "65536"):
        assert not stack.sql(f"SELECT CAST(payload AS BINARY) AS payload FROM {OUTBOX}")[0].payload
        fatal = [found for found in _findings(stack) if found.fatal]
        assert len(fatal) == 1
        assert "a pending payload is larger than max_allowed_packet" in fatal[0].what
        stack.sql(fatal[0].fix)
        stack.outbox.engine.dispose()
        assert not [found for found in _findings(stack) if found.fatal]


@pytest.mark.parametrize(
    ("fault", "what", "fatal"),
    [
        ("MODIFY SETTING non_replicated_deduplication_window = 0", "no deduplication window", True),
        ("MODIFY SETTING non_replicated_deduplication_window = 5", "a deduplication window of 5 blocks", False),
        ("MODIFY COLUMN description Nullable(String)", "description is Nullable(String)", True),
        ("MODIFY COLUMN remote_ip String MATERIALIZED ''", "remote_ip is materialized", True),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 30 DAY", "is 30 days", False),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 1 HOUR", "the TTL", True),
        ("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(time)) + INTERVAL 90 DAY", "counts from time", True),
    ],
)
def test_a_fault_in_the_clickhouse_table_is_found_and_its_fix_mends_it(
    stack: Stack, fault: str, what: str, fatal: bool
) -> None:
    """An INSERT into such a table succeeds; what is wrong shows only later, as lost or doubled entries."""
    assert _findings(stack) == []
    stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 {fault}")
    (found,) = _findings(stack)
    assert what in found.what
    assert found.fatal is fatal
    stack.log.client().command(found.fix)
    assert _findings(stack) == []


def test_a_short_ttl_is_fatal_to_whoever_requeues(stack: Stack) -> None:
    """A requeued entry keeps its inserted_at and would be dropped on arrival, with everything looking green."""
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at)) + INTERVAL 4 WEEK"
    )
    (found,) = _findings(stack, Role.OPERATOR)
    assert found.fatal
    assert preflight.check(stack.outbox, stack.log, role=Role.OPERATOR, retention_days=20) == []


def test_a_view_without_final_is_found_for_readers(stack: Stack) -> None:
    """Readers trust the view to show each event once."""
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    assert "does not exist" in _findings(stack, Role.READER)[0].what
    client.command("CREATE VIEW audit_logs AS SELECT * FROM audit_logs_raw_v1")
    (found,) = _findings(stack, Role.READER)
    assert "without FINAL" in found.what
    assert not found.fatal


# ── grants ───────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def user(stack: Stack) -> Iterator[Callable[[], Stack]]:
    """A MySQL user without any grant; the function connects through it anew."""
    name = f"doctor{os.getpid()}"
    stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'doctor'")
    opened: list[MySQLOutbox] = []

    def connect() -> Stack:
        outbox = MySQLOutbox(f"mysql+pymysql://{name}:doctor@{stack.mysql_url.split('@', 1)[1]}")
        outbox.engine.dispose()
        opened.append(outbox)
        return replace(stack, mysql_url=outbox.url, outbox=outbox)

    yield connect
    for outbox in opened:
        outbox.engine.dispose()
    stack.sql(f"DROP USER '{name}'@'127.0.0.1'")


@pytest.mark.parametrize("role", list(Role))
def test_each_grant_that_a_role_lacks_is_named_and_the_printed_one_is_enough(
    stack: Stack, user: Callable[[], Stack], role: Role
) -> None:
    """Least privilege only stays least if the tool says exactly what is missing, and for whom."""
    database = stack.mysql_url.rsplit("/", 1)[1]
    name = f"'doctor{os.getpid()}'@'127.0.0.1'"
    for table, privileges in MYSQL_GRANTS[role].items():
        stack.sql(f"GRANT {', '.join(privileges)} ON {database}.{table} TO {name}")
    assert _findings(user(), role) == []
    for table, privileges in MYSQL_GRANTS[role].items():
        for privilege in privileges:
            stack.sql(f"REVOKE {privilege} ON {database}.{table} FROM {name}")
            lacking = [found for found in _findings(user(), role) if f"lacks {privilege} on {table}" in found.what]
            assert len(lacking) == 1, f"{privilege} on {table} is not missed"
            assert lacking[0].fatal
            stack.sql(lacking[0].fix)
            assert _findings(user(), role) == []


def test_grants_by_role_and_by_wildcard_count(stack: Stack, user: Callable[[], Stack]) -> None:
    """Most shops grant by role or by pattern: a false alarm here is how a tool gets ignored."""
    name, role = f"'doctor{os.getpid()}'@'127.0.0.1'", f"doctor_role{os.getpid()}"
    database = stack.mysql_url.rsplit("/", 1)[1]
    stack.sql(f"GRANT SELECT, INSERT, UPDATE ON `{database[:-1].replace('_', chr(92) + '_')}_`.* TO {name}")
    assert _findings(user()) == []
    stack.sql(f"REVOKE ALL PRIVILEGES, GRANT OPTION FROM {name}")
    stack.sql(f"CREATE ROLE {role}")
    try:
        for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items():
            stack.sql(f"GRANT {', '.join(privileges)} ON {database}.{table} TO {role}")
        stack.sql(f"GRANT {role} TO {name}")
        stack.sql(f"SET DEFAULT ROLE {role} {'FOR' if _mariadb(stack) else 'TO'} {name}")
        assert _findings(user()) == []
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


# ── versions, connections, clocks ────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "known"),
    [
        ("8.0.36-28", ("MySQL", (8, 0))),
        ("5.7.44-log", ("MySQL", (5, 7))),
        ("10.11.19-MariaDB-0+deb12u1-log", ("MariaDB", (10, 11))),
        ("5.5.5-10.6.1-MariaDB", ("MariaDB", (10, 6))),
    ],
)
def test_versions_are_read_as_the_servers_write_them(text: str, known: tuple[str, tuple[int, int]]) -> None:
    """MariaDB calls itself 5.5.5 to old clients, and 10.11 is above 10.6."""
    assert server_version(text) == known
    assert clickhouse_version("25.8.3.66") == (25, 8) < clickhouse_version("25.12.1.1")


def test_a_server_that_does_not_answer_is_a_finding_and_the_other_is_looked_at_all_the_same(stack: Stack) -> None:
    """At night two things are broken at once, and one at a time is the slowest way to learn it."""
    gone = MySQLOutbox("mysql+pymysql://root:hunter2@127.0.0.1:1/app")
    looks = preflight.examine(gone, stack.log)
    (found,) = all_findings(looks)
    assert found.fatal
    assert "AUDITEXPORT_MYSQL_URL" in found.fix
    assert "hunter2" not in str(looks)
    assert any(look.about == "ClickHouse version" for look in looks)
    looks = preflight.examine(stack.outbox, ClickHouseAuditLog("http://default:hunter2@127.0.0.1:1/default"))
    (found,) = all_findings(looks)
    assert "AUDITEXPORT_CLICKHOUSE_URL" in found.fix
    assert "hunter2" not in str(looks)


def test_a_connection_that_leaves_this_machine_unverified_is_a_warning(stack: Stack) -> None:
    """PyMySQL takes TLS where it is offered and verifies nothing; nobody is told unless somebody says so."""
    # 0.0.0.0 reaches this machine and is no loopback address by name.
    mysql = MySQLOutbox(stack.mysql_url.replace("127.0.0.1", "0.0.0.0"))
    log = ClickHouseAuditLog(stack.clickhouse_url.replace("127.0.0.1", "0.0.0.0"))
    found = preflight.check(mysql, log)
    assert [finding.fatal for finding in found] == [False, False]
    assert "ssl_ca" in found[0].fix
    assert "https://" in found[1].fix
    mysql.engine.dispose()


def test_a_url_that_asks_for_tls_and_names_no_authority_is_refused() -> None:
    """A client's certificate alone turns verification off in PyMySQL, which nobody expects of more security."""
    with pytest.raises(InvalidConfig, match="no ssl_ca"):
        MySQLOutbox("mysql+pymysql://u:hunter2@db/app?ssl_cert=/a.pem&ssl_key=/b.pem")
    with pytest.raises(InvalidConfig) as refused:
        MySQLOutbox("postgresql://u:hunter2@db/app")
    assert "hunter2" not in str(refused.value)


def test_a_clock_of_mysql_that_is_off_is_found(stack: Stack, user: Callable[[], Stack]) -> None:
    """Entries are stamped by one clock and expire by another."""
    database = stack.mysql_url.rsplit("/", 1)[1]
    for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items():
        stack.sql(f"GRANT {', '.join(privileges)} ON {database}.{table} TO 'doctor{os.getpid()}'@'127.0.0.1'")
    for off_s, fatal in ((7200, False), (-3 * 86_400, True)):
        # It is run for users without SUPER only, and holds NOW() at that moment.
        with _globally(stack, "init_connect", f"'SET timestamp = UNIX_TIMESTAMP() + {off_s}'"):
            (found,) = _findings(user())
            assert "MySQL's clock is" in found.what
            assert ("ahead" if off_s > 0 else "behind") in found.what
            assert found.fatal is fatal
    assert _findings(user()) == []


def test_a_clock_of_this_host_that_is_off_is_a_warning(stack: Stack) -> None:
    """Nothing that is exported depends on it; logs that do not line up cost an hour of a bad night."""
    looks = preflight.examine(stack.outbox, stack.log, host_ms=lambda: time.time() * 1000 - 600_000)
    (found,) = all_findings(looks)
    assert "this host's clock is 600 s behind" in found.what
    assert not found.fatal


# ── what every session says ──────────────────────────────────────────────────────────────────────


def test_our_sessions_keep_utc_and_refuse_to_cut_a_text(stack: Stack) -> None:
    """A server in local time repeats an hour in autumn, and one without strict mode stores half a list of pks."""
    with _globally(stack, "sql_mode", "''"), _globally(stack, "time_zone", "'+05:00'"):
        assert stack.sql("SELECT @@session.time_zone AS zone")[0].zone == "+00:00"
        with pytest.raises(sa.exc.DBAPIError):
            stack.sql(f"UPDATE {LEDGER} SET owner = :long WHERE batch_id = 0", long="x" * 200)


# ── when a run looks ─────────────────────────────────────────────────────────────────────────────


def test_a_clean_look_is_remembered_but_hides_nothing_deadly(stack: Stack) -> None:
    """A run an instant after a failover must not claim because the one before it found all in order."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    stack.sql(f"ALTER TABLE {LEDGER} DROP COLUMN digest")
    preflight.refuse_unless_ready(stack.outbox, stack.log)  # remembered: the columns are not read again
    with _globally(stack, "read_only", "1"), pytest.raises(SetupIncomplete, match="read-only"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)
    with pytest.raises(SetupIncomplete, match="lacks digest"):  # and a fatal finding ends the remembering
        preflight.refuse_unless_ready(stack.outbox, stack.log)


@pytest.mark.parametrize(
    "fault",
    [
        "MODIFY SETTING non_replicated_deduplication_window = 0",
        "drop",
    ],
)
def test_a_remembered_look_still_sees_the_table_turn_bad(stack: Stack, fault: str) -> None:
    """The window and the table itself decide over duplicates, and asking costs one small query."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    statement = "DROP TABLE audit_logs_raw_v1" if fault == "drop" else f"ALTER TABLE audit_logs_raw_v1 {fault}"
    stack.log.client().command(statement)
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)


# ── the prompt ───────────────────────────────────────────────────────────────────────────────────


def _doctor(stack: Stack, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    urls = {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}
    return subprocess.run(
        [sys.executable, "-m", "auditexport_pipeline.cli", "doctor", *arguments],
        env={**os.environ, "COLUMNS": "200", **urls, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_doctor_shows_what_is_right_what_is_wrong_and_how_to_mend_it(stack: Stack) -> None:
    """Its exit status stands in deployment scripts, and its fixes are copied by tired people."""
    well = _doctor(stack)
    assert well.returncode == 0, well.stdout + well.stderr
    assert "ok" in well.stdout
    assert "MySQL version" in well.stdout
    assert "nothing fatal" in well.stdout
    stack.sql(f"ALTER TABLE {OUTBOX} DROP INDEX drainer_pending_idx")
    ill = _doctor(stack)
    assert ill.returncode == 1
    assert f"fix:    ALTER TABLE {OUTBOX} ADD INDEX drainer_pending_idx (deleted_at, version, pk)" in ill.stdout
    told = json.loads(_doctor(stack, "--json").stdout)
    assert told["fatal"] == 1
    assert [found["fatal"] for look in told["looks"] for found in look["findings"]] == [True]


def test_doctor_says_what_is_wrong_with_a_call(stack: Stack) -> None:
    """A script must be able to tell a bad setup from a bad call."""
    assert _doctor(stack, "--role", "king").returncode == 2
    missing = _doctor(stack, AUDITEXPORT_MYSQL_URL="")
    assert missing.returncode == 2
    assert "AUDITEXPORT_MYSQL_URL is not set" in missing.stderr
    wrong = _doctor(stack, AUDITEXPORT_MYSQL_URL=stack.mysql_url.replace("root", "nobody:hunter2", 1))
    assert wrong.returncode == 1
    assert "1045" in wrong.stdout
    assert "hunter2" not in wrong.stdout + wrong.stderr
