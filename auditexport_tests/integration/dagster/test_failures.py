"""What goes wrong around a run, and what Dagster, the ledger and the heartbeat then say."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core import claiming, export, retries
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.defs.resources import HeartbeatResource
from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, events, everything_once, ledger
from auditexport_tests.support.engines import local_clickhouse

RETRIES = 2
DEAD_PORT = "http://default@127.0.0.1:1/default"


@pytest.fixture(autouse=True)
def _short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few retries and short waits between them; what is decided stays the same."""
    monkeypatch.setattr(retries, "RETRIES", RETRIES)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)


def told(exporter: Exporter, run_id: str) -> tuple[str, str, bool]:
    """(line, error, rerun helps) of the one step that failed."""
    (record,) = exporter.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert record.dagster_event is not None
    failure = record.dagster_event.step_failure_data.user_failure_data
    assert failure is not None
    line = str(failure.description)
    assert line
    assert "\n" not in line
    return line, str(failure.metadata["error"].value), bool(failure.metadata["rerun_helps"].value)


# ── ClickHouse is away ───────────────────────────────────────────────────────────────────────────


@pytest.fixture
def mortal(home: Path, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[LocalClickHouse]:
    """A ClickHouse of the test's own, which it may kill; the environment points at it."""
    with local_clickhouse(tmp_path / "mortal") as server:
        setup.create(stack.outbox, ClickHouseAuditLog(server.url))
        monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", server.url)
        yield server


def _entries(server: LocalClickHouse) -> tuple[int, int]:
    query = "SELECT count(), uniqExact(workspace_id, event_id) FROM audit_logs_raw_v1"
    ((entries, distinct),) = ClickHouseAuditLog(server.url).client().query(query).result_rows
    return int(entries), int(distinct)


def test_a_run_fails_with_one_line_when_clickhouse_goes_away_and_the_next_run_completes(
    mortal: LocalClickHouse, exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An outage is everyday: on call reads one line, and nobody has to repair anything."""
    real = export.write

    def write_after_the_crash(*arguments: Any) -> object:
        mortal.kill()
        return real(*arguments)

    stack.put(*events(3, description="very-secret"))
    with monkeypatch.context() as patched:
        patched.setattr(export, "write", write_after_the_crash)
        run_id = exporter.drain(raise_on_error=False).run_id
    assert (
        exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED)
        == ["export_batch.write_clickhouse[batch_1]"] * RETRIES
    )
    line, error, rerun_helps = told(exporter, run_id)
    assert "ClickHouse" in line
    assert "very-secret" not in line
    assert error in ("AuditLogUnavailable", "InsertOutcomeUnknown")
    assert rerun_helps
    assert stack.pending() == 3
    assert [str(batch.state) for batch in ledger(stack)] == ["sealed"]

    mortal.start()
    exporter.drain()
    assert _entries(mortal) == (3, 3)
    assert stack.pending() == 0


def test_a_short_outage_is_ridden_out_within_the_run(
    mortal: LocalClickHouse, exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of ClickHouse takes seconds and must not cost a failed run."""
    real = export.write
    calls: list[int] = []

    def write_through_a_restart(*arguments: Any) -> object:
        calls.append(1)
        mortal.kill() if len(calls) == 1 else mortal.start()
        return real(*arguments)

    monkeypatch.setattr(export, "write", write_through_a_restart)
    stack.put(*events(3))
    assert exporter.drain().success
    assert len(calls) == 2
    assert _entries(mortal) == (3, 3)
    assert stack.pending() == 0


def test_a_run_claims_nothing_while_clickhouse_cannot_be_asked(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be sent should not be claimed either."""
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
    stack.put(*events(1))
    run_id = exporter.drain(raise_on_error=False).run_id
    assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == ["plan_batches"] * RETRIES
    _, error, rerun_helps = told(exporter, run_id)
    assert (error, rerun_helps) == ("AuditLogUnavailable", True)
    assert ledger(stack) == []


# ── the setup is wrong ───────────────────────────────────────────────────────────────────────────


def _other_url(url: str, **parts: Any) -> str:
    return sa.make_url(url).set(**parts).render_as_string(hide_password=False)


def _without_clickhouse_table(stack: Stack) -> dict[str, str]:
    stack.log.client().command("DROP TABLE audit_logs_raw_v1")
    return {}


def _without_window(stack: Stack) -> dict[str, str]:
    stack.log.client().command("ALTER TABLE audit_logs_raw_v1 MODIFY SETTING non_replicated_deduplication_window = 0")
    return {}


def _on_a_plain_merge_tree(stack: Stack) -> dict[str, str]:
    client = stack.log.client()
    ((statement,),) = client.query("SHOW CREATE TABLE audit_logs_raw_v1").result_rows
    client.command("DROP TABLE audit_logs_raw_v1")
    client.command(
        statement.replace("ReplacingMergeTree", "MergeTree"), settings={"allow_suspicious_low_cardinality_types": 1}
    )
    return {}


def _in_an_unknown_clickhouse_database(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url + "_not_there"}


def _with_an_odd_clickhouse_url(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_CLICKHOUSE_URL": "clickhouse://127.0.0.1/default"}


def _with_another_mysql_driver(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_MYSQL_URL": _other_url(stack.mysql_url, drivername="mysql", password="very-secret")}


def _with_an_odd_mysql_url(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_MYSQL_URL": "root:very-secret at the usual place"}


def _without_ledger(stack: Stack) -> dict[str, str]:
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    return {}


def _with_a_wrong_password(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_MYSQL_URL": _other_url(stack.mysql_url, username="nobody_here", password="wrong")}


def _without_index(stack: Stack) -> dict[str, str]:
    stack.sql("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx")
    return {}


WRONG_SETUPS = [
    (_without_clickhouse_table, "ClickHouse table audit_logs_raw_v1 does not exist", "auditexport init"),
    (_without_window, "no deduplication window", "MODIFY SETTING non_replicated_deduplication_window"),
    (_on_a_plain_merge_tree, "audit_logs_raw_v1 is a MergeTree", "create it anew"),
    (_in_an_unknown_clickhouse_database, "UNKNOWN_DATABASE", "AUDITEXPORT_CLICKHOUSE_URL"),
    (_with_an_odd_clickhouse_url, "AUDITEXPORT_CLICKHOUSE_URL", "http[s]://user:password@host:port/database"),
    (_with_another_mysql_driver, "AUDITEXPORT_MYSQL_URL", "mysql+pymysql://user:password@host:port/database"),
    (_with_an_odd_mysql_url, "AUDITEXPORT_MYSQL_URL", "mysql+pymysql://user:password@host:port/database"),
    (_without_ledger, "MySQL table clickhouse_outbox_dead_letter does not exist", "auditexport init"),
    (_with_a_wrong_password, "MySQL refuses", "AUDITEXPORT_MYSQL_URL"),
    (_without_index, "drainer_pending_idx", "ADD INDEX drainer_pending_idx"),
]


@pytest.mark.parametrize(
    ("spoil", "what", "fix"), WRONG_SETUPS, ids=[case[0].__name__.strip("_") for case in WRONG_SETUPS]
)
def test_a_wrong_setup_is_refused_before_anything_is_claimed(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch, spoil: Any, what: str, fix: str
) -> None:
    """Found out half-way, each of these would leave claimed batches or duplicates; at the start it is a sentence."""
    stack.put(*events(2))
    for name, value in spoil(stack).items():
        monkeypatch.setenv(name, value)
    run_id = exporter.drain(raise_on_error=False).run_id
    line, error, rerun_helps = told(exporter, run_id)
    assert what in line
    assert fix in line
    assert "very-secret" not in line
    assert error in ("SetupIncomplete", "InvalidConfig")
    assert not rerun_helps
    assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == []
    assert ledger(stack) == []
    assert stack.pending() == 2


def test_a_user_without_grants_is_refused_before_anything_is_claimed(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing grant shows as a missing table in the catalogue; the line must send people the right way."""
    url = sa.make_url(stack.mysql_url)
    user = f"limited_{url.database}"[-32:]
    stack.put(*events(2))
    stack.sql(f"CREATE USER '{user}'@'%' IDENTIFIED BY 'Limited-1'")
    try:
        stack.sql(f"GRANT SELECT, INSERT, UPDATE ON {url.database}.clickhouse_outbox_batch TO '{user}'@'%'")
        stack.sql(f"GRANT SELECT, INSERT, UPDATE ON {url.database}.clickhouse_outbox_dead_letter TO '{user}'@'%'")
        monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", _other_url(stack.mysql_url, username=user, password="Limited-1"))
        run_id = exporter.drain(raise_on_error=False).run_id
    finally:
        stack.sql(f"DROP USER '{user}'@'%'")
    line, error, _ = told(exporter, run_id)
    assert "lacks SELECT, UPDATE (deleted_at) on clickhouse_outbox" in line
    assert error == "SetupIncomplete"
    assert ledger(stack) == []


# ── another run took over; ClickHouse lost what it had ───────────────────────────────────────────


def test_a_lost_lease_is_not_retried(exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The batch has a new owner: whatever this run tries again would only be refused again."""
    real = export.fetch

    def fetch_after_a_take_over(outbox: Any, log: Any, claim: Claim, limits: Limits) -> object:
        owners = claiming.open_owners(outbox)
        claiming.claim(outbox, owner="another run", dead_owners=owners, limits=limits)
        return real(outbox, log, claim, limits)

    monkeypatch.setattr(export, "fetch", fetch_after_a_take_over)
    stack.put(*events(2))
    run_id = exporter.drain(raise_on_error=False).run_id
    line, error, rerun_helps = told(exporter, run_id)
    assert "another run" in line
    assert (error, rerun_helps) == ("LeaseLost", False)
    assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == []
    assert [batch.owner for batch in ledger(stack)] == ["another run"]
    assert stack.counts() == (0, 0)


def test_rows_that_clickhouse_loses_after_its_acknowledgement_fail_the_run(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An acknowledgement is not proof, and a green run must be."""
    real = export.mark

    def mark_and_lose(*arguments: Any) -> object:
        batch = real(*arguments)
        stack.log.client().command("DELETE FROM audit_logs_raw_v1 WHERE event_id IN ('evt_1', 'evt_4')")
        return batch

    monkeypatch.setattr(export, "mark", mark_and_lose)
    stack.put(*events(6))
    run_id = exporter.drain(raise_on_error=False, batch_rows=3).run_id
    line, error, rerun_helps = told(exporter, run_id)
    assert (error, rerun_helps) == ("VerificationFailed", False)
    assert "batch 1: 1 missing, events evt_1" in line
    assert "batch 2: 1 missing, events evt_4" in line
    assert "`auditexport reconcile --repair`" in line
    assert [str(batch.state) for batch in ledger(stack)] == ["discrepant", "discrepant"]
    assert exporter.instance.get_latest_materialization_event(ASSET) is None

    monkeypatch.setattr(export, "mark", real)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE event_id IN ('evt_1', 'evt_4')")
    exporter.drain()
    everything_once(stack, 6)


# ── the heartbeat ────────────────────────────────────────────────────────────────────────────────


@dataclass(slots=True)
class Check:
    """A healthcheck service on loopback, and the paths it was asked for."""

    url: str = ""
    answer: int = 200
    paths: list[str] = field(default_factory=list)


@pytest.fixture
def check(monkeypatch: pytest.MonkeyPatch, home: Path) -> Iterator[Check]:
    seen = Check()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            seen.paths.append(self.path)
            self.send_response(seen.answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Says nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        seen.url = f"http://127.0.0.1:{server.server_port}/secret-check-id"
        monkeypatch.setenv("AUDITEXPORT_HEARTBEAT_URL", seen.url)
        yield seen
        server.shutdown()
        thread.join()


def test_the_heartbeat_hears_of_start_and_success_also_when_nothing_was_pending(
    check: Check, exporter: Exporter, stack: Stack
) -> None:
    """Whoever watches the check must be able to tell an idle exporter from a dead one."""
    exporter.drain()
    assert check.paths == ["/secret-check-id/start", "/secret-check-id"]
    check.paths.clear()
    stack.put(*events(4))
    exporter.drain(batch_rows=2)
    assert check.paths == ["/secret-check-id/start", "/secret-check-id"]


def test_the_heartbeat_hears_of_a_failure_once_however_often_the_step_was_tried(
    check: Check, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A step's retry is not a new run: a second start would reset the check's clock."""
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
    exporter.drain(raise_on_error=False)
    assert check.paths == ["/secret-check-id/start", "/secret-check-id/fail"]


def test_the_heartbeat_hears_of_a_defect_that_nobody_foresaw(
    check: Check, exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The alarm matters most for what nobody thought of."""

    def broken(*_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(export, "mark", broken)
    stack.put(*events(1))
    run_id = exporter.drain(raise_on_error=False).run_id
    assert check.paths == ["/secret-check-id/start", "/secret-check-id/fail"]
    assert exporter.failures(run_id)[0].startswith("ZeroDivisionError at test_failures.py:")


@pytest.mark.parametrize("trouble", ["erroring", "unreachable", "not a URL", "not http"])
def test_a_heartbeat_in_trouble_fails_no_export_and_is_logged_without_its_url(
    check: Check,
    exporter: Exporter,
    stack: Stack,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    trouble: str,
) -> None:
    """A ping is a courtesy; and whoever knows the URL can silence the alarm."""
    check.answer = 500
    urls = {
        "erroring": check.url,
        "unreachable": "http://127.0.0.1:1/secret-check-id",
        "not a URL": "http://[secret-check-id",
        "not http": "file:///secret-check-id",
    }
    monkeypatch.setenv("AUDITEXPORT_HEARTBEAT_URL", urls[trouble])
    stack.put(*events(2))
    with caplog.at_level(logging.DEBUG):
        run_id = exporter.drain().run_id
    everything_once(stack, 2)
    lines = [entry.user_message for entry in exporter.instance.all_logs(run_id)]
    assert sum("could not be sent" in line for line in lines) == 2
    assert "the export itself is not affected" in " ".join(lines)
    assert "secret-check-id" not in " ".join(lines) + caplog.text


def test_without_a_heartbeat_url_nothing_is_sent_and_nothing_is_said(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The heartbeat is optional."""
    monkeypatch.delenv("AUDITEXPORT_HEARTBEAT_URL", raising=False)
    assert not HeartbeatResource().start()
    assert caplog.text == ""
