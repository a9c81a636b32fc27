"""The two procedures of `docs/runbook.md` after a restore from a backup: of MySQL, and of ClickHouse."""

from __future__ import annotations

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once, merge, run, stop_merges
from auditexport_tests.support.maintenance import lose
from auditexport_tests.support.prompts import Prompt, prompt_in, urls

TABLES = (
    "clickhouse_outbox",
    "clickhouse_outbox_batch",
    "clickhouse_outbox_dead_letter",
    "clickhouse_outbox_action",
    "clickhouse_outbox_erasure",
)


def back_up(stack: Stack) -> None:
    """The whole database, at one moment."""
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
    stop_merges(stack)
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
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in(urls(stack), monkeypatch)


def test_after_a_restore_of_mysql_the_log_can_show_what_the_database_shows(lost: Stack, prompt: Prompt) -> None:
    """The entries after the restored ledger are deleted; everything that the outbox has is then there once."""
    after = f"inserted_at > {last_known_ms(lost)}"
    assert lost.clickhouse(f"SELECT count() FROM audit_logs_raw_v1 WHERE {after}") == [(15,)]
    lose(lost, after)
    run(lost, "run_1")
    everything_once(lost, 30)
    prompt("reconcile", "--days", "2")


def test_after_a_restore_of_mysql_the_log_can_show_what_happened(lost: Stack, prompt: Prompt) -> None:
    """The events of the lost changes stay; what goes out again is once in the view, and no batch is discrepant."""
    run(lost, "run_1")
    assert lost.clickhouse("SELECT count() FROM audit_logs") == [(35,)]
    assert lost.counts() == (45, 35)
    assert lost.pending() == 0
    merge(lost)
    assert lost.counts() == (35, 35)
    prompt("reconcile", "--days", "2", status=1)
    prompt("reconcile", "--days", "2", "--others-write")


def test_after_a_restore_of_clickhouse_the_outbox_brings_back_what_it_lost(stack: Stack, prompt: Prompt) -> None:
    """What came after the backup is missing, is requeued and is there again, once."""
    stack.put(*events(20, "before"))
    run(stack, "run_1")
    backed_up_ms = last_known_ms(stack)
    stack.put(*events(15, "after"))
    run(stack, "run_1")
    lose(stack, f"inserted_at > {backed_up_ms}")
    window = ["reconcile", "--from", str(backed_up_ms - 60_000), "--repair"]
    prompt(*window, "--dry-run", status=1)
    assert stack.pending() == 0
    prompt(*window, status=1)
    assert stack.pending() == 15
    run(stack, "run_1")
    everything_once(stack, 35)
    prompt("reconcile", "--days", "2")
