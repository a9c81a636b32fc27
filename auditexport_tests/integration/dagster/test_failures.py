"""What goes wrong around a run, and what Dagster and the ledger then show."""

from __future__ import annotations

from collections.abc import Iterator
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


def failure_of(exporter: Exporter, run_id: str) -> tuple[str, str, bool]:
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


@pytest.mark.slow
def test_a_short_outage_costs_no_run_and_a_long_one_no_event(
    mortal: LocalClickHouse, exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A restart of ClickHouse takes seconds. After an outage on call reads one line, and has nothing to repair."""
    real = export.write
    calls: list[int] = []

    def write_through_a_restart(*arguments: Any) -> object:
        calls.append(1)
        mortal.kill() if len(calls) == 1 else mortal.start()
        return real(*arguments)

    stack.put(*events(3))
    with monkeypatch.context() as patched:
        patched.setattr(export, "write", write_through_a_restart)
        assert exporter.drain().success
    assert len(calls) == 2
    assert (_entries(mortal), stack.pending()) == ((3, 3), 0)

    def write_after_the_crash(*arguments: Any) -> object:
        mortal.kill()
        return real(*arguments)

    stack.put(*events(3, "later", description="very-secret"))
    with monkeypatch.context() as patched:
        patched.setattr(export, "write", write_after_the_crash)
        run_id = exporter.drain(raise_on_error=False).run_id
    restarted = exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED)
    assert restarted == ["export_batch.write_clickhouse[batch_2]"] * RETRIES
    line, error, rerun_helps = failure_of(exporter, run_id)
    assert "ClickHouse" in line
    assert "very-secret" not in line
    assert error in ("AuditLogUnavailable", "InsertOutcomeUnknown")
    assert rerun_helps
    assert (stack.pending(), [str(batch.state) for batch in ledger(stack)]) == (3, ["verified", "sealed"])
    mortal.start()
    exporter.drain()
    assert (_entries(mortal), stack.pending()) == ((6, 6), 0)


@pytest.mark.slow
def test_a_run_claims_nothing_while_clickhouse_cannot_be_asked(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What cannot be sent should not be claimed either."""
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
    stack.put(*events(1))
    run_id = exporter.drain(raise_on_error=False).run_id
    assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == ["plan_batches"] * RETRIES
    _, error, rerun_helps = failure_of(exporter, run_id)
    assert (error, rerun_helps) == ("AuditLogUnavailable", True)
    assert ledger(stack) == []


# ── the setup is wrong ───────────────────────────────────────────────────────────────────────────


def _other_url(url: str, **parts: Any) -> str:
    return sa.make_url(url).set(**parts).render_as_string(hide_password=False)


# What is spoiled (a variable and its URL, or a statement, beside those before it), and the fact and the fix in the line.
# `setup.test_doctor` has the other findings of the same preflight.
WRONG_SETUPS = [
    ("AUDITEXPORT_CLICKHOUSE_URL: {clickhouse}_not_there", "UNKNOWN_DATABASE", "AUDITEXPORT_CLICKHOUSE_URL"),
    (
        "AUDITEXPORT_CLICKHOUSE_URL: clickhouse://127.0.0.1/default",
        "AUDITEXPORT_CLICKHOUSE_URL",
        "http[s]://user:password@",
    ),
    (
        "AUDITEXPORT_MYSQL_URL: root:very-secret at the usual place",
        "AUDITEXPORT_MYSQL_URL",
        "mysql+pymysql://user:password@",
    ),
    ("AUDITEXPORT_MYSQL_URL: {unknown_user}", "MySQL refuses", "AUDITEXPORT_MYSQL_URL"),
    (
        "MySQL: ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx",
        "drainer_pending_idx",
        "ADD INDEX drainer_pending_idx",
    ),
    (
        "ClickHouse: DROP TABLE audit_logs_raw_v1",
        "ClickHouse table audit_logs_raw_v1 does not exist",
        "auditexport init",
    ),
    (
        "MySQL: DROP TABLE clickhouse_outbox_dead_letter",
        "MySQL table clickhouse_outbox_dead_letter does not exist",
        "auditexport init",
    ),
]


def _spoil(stack: Stack, spoil: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, _, what = spoil.partition(": ")
    if where == "ClickHouse":
        stack.log.client().command(what)
    elif where == "MySQL":
        stack.sql(what)
    else:
        unknown_user = _other_url(stack.mysql_url, username="nobody_here", password="wrong")
        monkeypatch.setenv(where, what.format(clickhouse=stack.clickhouse_url, unknown_user=unknown_user))


@pytest.mark.slow
def test_a_wrong_setup_is_refused_before_anything_is_claimed(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found half-way, each of these would leave claimed batches or duplicates; at the start it is one line."""
    stack.put(*events(2))
    for spoil, what, fix in WRONG_SETUPS:
        with monkeypatch.context() as patched:
            _spoil(stack, spoil, patched)
            run_id = exporter.drain(raise_on_error=False).run_id
        line, error, rerun_helps = failure_of(exporter, run_id)
        assert what in line
        assert fix in line
        assert "very-secret" not in line
        assert error in ("SetupIncomplete", "InvalidConfig")
        assert not rerun_helps
        assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == []
        assert (ledger(stack), stack.pending()) == ([], 2)


def test_a_user_without_grants_is_refused_before_anything_is_claimed(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A missing grant shows as a missing table in the catalogue; the line must name the grant."""
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
    line, error, _ = failure_of(exporter, run_id)
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
    line, error, rerun_helps = failure_of(exporter, run_id)
    assert "another run" in line
    assert (error, rerun_helps) == ("LeaseLost", False)
    assert exporter.steps(run_id, dg.DagsterEventType.STEP_RESTARTED) == []
    assert [batch.owner for batch in ledger(stack)] == ["another run"]
    assert stack.counts() == (0, 0)


@pytest.mark.slow
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
    line, error, rerun_helps = failure_of(exporter, run_id)
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
