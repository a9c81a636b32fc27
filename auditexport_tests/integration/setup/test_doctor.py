"""The preflight and `auditexport doctor`: connections, this host's clock, when a run checks, and the CLI."""

from __future__ import annotations

import json
import time

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.clickhouse.checks import clickhouse_version
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.findings import all_findings
from auditexport_pipeline.mysql.checks import server_version
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.faults import LEDGER, OUTBOX, but_for_the_engine, globally
from auditexport_tests.support.prompts import Prompt, prompt_in, urls

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
    """Two faults at once must not be found one after the other."""
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
    """Plain text must be asked for, and doctor reports it."""
    # 0.0.0.0 reaches this machine and is no loopback address by name.
    mysql = MySQLOutbox(stack.mysql_url.replace("127.0.0.1", "0.0.0.0") + "?ssl_disabled=true")
    log = ClickHouseAuditLog(stack.clickhouse_url.replace("127.0.0.1", "0.0.0.0"))
    found = but_for_the_engine(preflight.check(mysql, log))
    assert [finding.fatal for finding in found] == [False, False]
    assert "ssl_ca" in found[0].fix
    assert "https://" in found[1].fix
    mysql.disconnect()


def test_a_clock_of_this_host_that_is_off_is_a_warning(stack: Stack) -> None:
    """The export does not depend on it, but logs with other times mislead an operator."""
    results = preflight.examine(stack.outbox, stack.log, host_ms=lambda: time.time() * 1000 - 600_000)
    (found,) = but_for_the_engine(all_findings(results))
    assert "this host's clock is 600 s behind" in found.what
    assert not found.fatal


# ── when a run checks ────────────────────────────────────────────────────────────────────────────


def test_cached_checks_hide_no_failover(stack: Stack) -> None:
    """A run right after a failover must not claim because the run before it found no fault."""
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
    """Without window or table there would be duplicates, and the check is one small query."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    stack.log.client().command(statement.format("audit_logs_raw_v1"))
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)


# ── the CLI ──────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in({**urls(stack), "COLUMNS": "200"}, monkeypatch)


def test_doctor_shows_what_is_right_what_is_wrong_and_the_fix(stack: Stack, prompt: Prompt) -> None:
    """Deployment scripts read its exit status, and operators copy its fixes."""
    output = prompt("doctor").output
    for text in ("ok", "MySQL version", "nothing fatal"):
        assert text in output
    stack.sql(f"ALTER TABLE {OUTBOX} DROP INDEX drainer_pending_idx")
    fix = f"fix:    ALTER TABLE {OUTBOX} ADD INDEX drainer_pending_idx (deleted_at, version, pk)"
    assert fix in prompt("doctor", status=1).output
    report = json.loads(prompt("doctor", "--json", status=1).output)
    assert report["fatal"] == 1
    found = [found for check in report["looks"] for found in check["findings"] if "2^53" not in found["what"]]
    assert [one["fatal"] for one in found] == [True]


def test_doctor_says_what_is_wrong_with_a_call(stack: Stack, prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """A script must be able to tell a bad setup from a bad call."""
    prompt("doctor", "--role", "king", status=2)
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", "")
    assert "AUDITEXPORT_MYSQL_URL is not set" in prompt("doctor", status=2).output
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url.replace("root", "nobody:hunter2", 1))
    output = prompt("doctor", status=1).output
    assert "1045" in output
    assert "hunter2" not in output
