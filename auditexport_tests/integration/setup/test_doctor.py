"""The preflight and `auditexport doctor`: connections, this host's clock, when a run checks, and the CLI."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.checks import clickhouse_version
from auditexport_pipeline.core.errors import InvalidConfig, SetupIncomplete
from auditexport_pipeline.core.findings import all_findings
from auditexport_pipeline.mysql.checks import server_version
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.faults import LEDGER, OUTBOX, but_for_the_engine, globally

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

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


def test_a_server_that_does_not_answer_is_a_finding_beside_the_others(stack: Stack) -> None:
    """At night two things are broken at once, and one at a time is the slowest way to learn it."""
    no_mysql = MySQLOutbox("mysql+pymysql://root:hunter2@127.0.0.1:1/app")
    no_clickhouse = ClickHouseAuditLog("http://default:hunter2@127.0.0.1:1/default")
    for outbox, log, variable, other in (
        (no_mysql, stack.log, "AUDITEXPORT_MYSQL_URL", "ClickHouse version"),
        (stack.outbox, no_clickhouse, "AUDITEXPORT_CLICKHOUSE_URL", "MySQL version"),
    ):
        results = preflight.examine(outbox, log)
        (found,) = but_for_the_engine(all_findings(results))
        assert found.fatal
        assert variable in found.fix
        assert other in [result.about for result in results]
        assert "hunter2" not in str(results)


def test_a_connection_that_leaves_this_machine_unverified_is_a_warning(stack: Stack) -> None:
    """It has to be asked for in so many words, and nobody else is told unless somebody says so."""
    # 0.0.0.0 reaches this machine and is no loopback address by name.
    mysql = MySQLOutbox(stack.mysql_url.replace("127.0.0.1", "0.0.0.0") + "?ssl_disabled=true")
    log = ClickHouseAuditLog(stack.clickhouse_url.replace("127.0.0.1", "0.0.0.0"))
    found = but_for_the_engine(preflight.check(mysql, log))
    assert [finding.fatal for finding in found] == [False, False]
    assert "ssl_ca" in found[0].fix
    assert "https://" in found[1].fix
    mysql.disconnect()


def test_a_url_that_asks_for_tls_and_names_no_authority_is_refused() -> None:
    """A client's certificate alone turns verification off in PyMySQL, which nobody expects of more security."""
    with pytest.raises(InvalidConfig, match="no ssl_ca"):
        MySQLOutbox("mysql+pymysql://u:hunter2@db/app?ssl_cert=/a.pem&ssl_key=/b.pem")
    with pytest.raises(InvalidConfig) as refused:
        MySQLOutbox("postgresql://u:hunter2@db/app")
    assert "hunter2" not in str(refused.value)


def test_a_clock_of_this_host_that_is_off_is_a_warning(stack: Stack) -> None:
    """Nothing that is exported depends on it; logs that do not line up cost an hour of a bad night."""
    results = preflight.examine(stack.outbox, stack.log, host_ms=lambda: time.time() * 1000 - 600_000)
    (found,) = but_for_the_engine(all_findings(results))
    assert "this host's clock is 600 s behind" in found.what
    assert not found.fatal


# ── when a run checks ────────────────────────────────────────────────────────────────────────────


def test_clean_checks_are_cached_and_hide_nothing_deadly(stack: Stack) -> None:
    """A run an instant after a failover must not claim because the one before it found all in order."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    stack.sql(f"ALTER TABLE {LEDGER} DROP COLUMN digest")
    preflight.refuse_unless_ready(stack.outbox, stack.log)  # cached: the columns are not read again
    with globally(stack, "read_only", "1"), pytest.raises(SetupIncomplete, match="read-only"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)
    with pytest.raises(SetupIncomplete, match="lacks digest"):  # a fatal finding ends the caching
        preflight.refuse_unless_ready(stack.outbox, stack.log)


@pytest.mark.parametrize(
    "statement", ["ALTER TABLE {} MODIFY SETTING non_replicated_deduplication_window = 0", "DROP TABLE {}"]
)
def test_while_checks_are_cached_a_table_that_turns_bad_is_seen(stack: Stack, statement: str) -> None:
    """The window and the table itself decide over duplicates, and asking costs one small query."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    stack.log.client().command(statement.format("audit_logs_raw_v1"))
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)


# ── the CLI ──────────────────────────────────────────────────────────────────────────────────────


def _doctor(stack: Stack, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    urls = {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}
    return subprocess.run(
        [sys.executable, "-m", "auditexport_pipeline.cli", "doctor", *arguments],
        env={**os.environ, "COLUMNS": "200", **urls, **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_doctor_shows_what_is_right_what_is_wrong_and_the_fix(stack: Stack) -> None:
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
    assert [found["fatal"] for look in told["looks"] for found in look["findings"] if "2^53" not in found["what"]] == [
        True
    ]


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
