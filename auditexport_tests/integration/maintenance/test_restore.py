"""The runbook's ways back from a backup, walked: MySQL to an earlier moment, ClickHouse to an earlier moment.

What belongs here: the procedures of `docs/runbook.md`, step by step. What does not: crashes and failovers that lose
nothing.
"""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from auditexport_pipeline.cli import main
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once, run

TABLES = (
    "clickhouse_outbox",
    "clickhouse_outbox_batch",
    "clickhouse_outbox_dead_letter",
    "clickhouse_outbox_action",
    "clickhouse_outbox_erasure",
)


def back_up(stack: Stack) -> None:
    """All of the database, of one moment."""
    for table in TABLES:
        stack.sql(f"CREATE TABLE {table}_backup AS SELECT * FROM {table}")


def restore(stack: Stack) -> None:
    for table in TABLES:
        stack.sql(f"TRUNCATE TABLE {table}")
        stack.sql(f"INSERT INTO {table} SELECT * FROM {table}_backup")


def last_known_ms(stack: Stack) -> int:
    (row,) = stack.sql("SELECT inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0")
    return int(str(row.inserted_at_ms))


@pytest.fixture
def lost(stack: Stack) -> Stack:
    """MySQL, restored: 20 events exported before the backup, 10 pending in it, 5 committed and exported after it."""
    stack.put(*events(20, "before"))
    run(stack, "run_1")
    stack.put(*events(10, "pending"))
    back_up(stack)
    stack.put(*events(5, "lost"))
    run(stack, "run_1")
    everything_once(stack, 35)
    restore(stack)
    return stack


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> CliRunner:
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    return CliRunner()


def test_after_a_restore_of_mysql_the_log_can_show_what_the_database_shows(lost: Stack, prompt: CliRunner) -> None:
    """The entries beyond the restored ledger are deleted; everything that the outbox holds is then there once."""
    beyond = f"inserted_at > {last_known_ms(lost)}"
    assert lost.clickhouse(f"SELECT count() FROM audit_logs_raw_v1 WHERE {beyond}") == [(15,)]
    lost.log.client().command(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {beyond} SETTINGS mutations_sync = 2")
    run(lost, "run_1")
    everything_once(lost, 30)
    done = prompt.invoke(main, ["reconcile", "--days", "2"])
    assert done.exit_code == 0, done.output


def test_after_a_restore_of_mysql_the_log_can_show_what_happened(lost: Stack, prompt: CliRunner) -> None:
    """Kept, the lost changes' events stay; what goes out again is once in the view, and nobody calls a batch wrong."""
    run(lost, "run_1")
    assert lost.clickhouse("SELECT count() FROM audit_logs") == [(35,)]
    assert lost.counts() == (45, 35)
    assert lost.pending() == 0
    lost.log.client().command("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert lost.counts() == (35, 35)
    assert prompt.invoke(main, ["reconcile", "--days", "2"]).exit_code == 1
    done = prompt.invoke(main, ["reconcile", "--days", "2", "--others-write"])
    assert done.exit_code == 0, done.output


def test_after_a_restore_of_clickhouse_the_outbox_brings_back_what_it_lost(stack: Stack, prompt: CliRunner) -> None:
    """What came after the backup is missing, is requeued and is there again, once."""
    stack.put(*events(20, "before"))
    run(stack, "run_1")
    backed_up_ms = last_known_ms(stack)
    stack.put(*events(15, "after"))
    run(stack, "run_1")
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE inserted_at > {backed_up_ms} SETTINGS mutations_sync = 2"
    )
    window = ["reconcile", "--from", str(backed_up_ms - 60_000), "--repair"]
    assert prompt.invoke(main, [*window, "--dry-run"]).exit_code == 1
    assert stack.pending() == 0
    assert prompt.invoke(main, window).exit_code == 1
    assert stack.pending() == 15
    run(stack, "run_1")
    everything_once(stack, 35)
    done = prompt.invoke(main, ["reconcile", "--days", "2"])
    assert done.exit_code == 0, done.output
