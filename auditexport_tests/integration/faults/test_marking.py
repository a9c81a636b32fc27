"""Rows that cannot be marked: the application locks them, or triggers undo or refuse the mark."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import pytest
import sqlalchemy as sa

from auditexport_pipeline import preflight
from auditexport_pipeline.core import claiming, export, retries
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import MYSQL_GRANTS, Role
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter
from auditexport_tests.support.builders import (
    claim,
    clear_marks,
    end_leases,
    events,
    everything_once,
    ledger,
    lose,
    open_transaction,
    states,
)
from auditexport_tests.support.prompts import Prompt
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.mysql_sensitive


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A drain gives up locked rows after the first wait of a second, and retries at once."""
    monkeypatch.setattr(export, "LOCKED_PATIENCE_S", 0.1)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.0)


@contextmanager
def least_grants(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The commands connect as a MySQL user with the exporter's grants and no others."""
    database = str(sa.make_url(stack.mysql_url).database)
    user = f"least_{database[-20:]}"
    stack.sql(f"CREATE USER {user} IDENTIFIED BY 'least'")
    for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items():
        stack.sql(f"GRANT {', '.join(privileges)} ON `{database}`.{table} TO {user}")
    url = sa.make_url(stack.mysql_url).set(username=user, password="least").render_as_string(hide_password=False)
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", url)
    try:
        yield
    finally:
        MySQLOutbox(url).disconnect()
        stack.sql(f"DROP USER {user}")


# ── locked rows ──────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("locked", "pending", "expected"),
    [
        ("pk = {}", 1, ["verified", "written", "verified"]),
        # The last chunk is marked together with the ledger's row: both have to wait, and nothing else.
        ("pk >= {} + 3", 2, ["verified", "verified", "written"]),
    ],
    ids=["one row", "the last chunk"],
)
def test_a_locked_row_holds_up_its_own_mark_and_nothing_else(
    stack: Stack, auditexport: Prompt, locked: str, pending: int, expected: list[str]
) -> None:
    """One open SELECT … FOR UPDATE of the application kept every tenant's rows unmarked."""
    pks = stack.put(*events(9))
    lock = f"SELECT * FROM clickhouse_outbox WHERE {locked.format(pks[4])} FOR UPDATE"
    with open_transaction(stack, lock) as process:
        done = auditexport("drain", "--batch-rows", "3", "--mark-rows", "2", status=1)
        assert (stack.pending(), states(stack)) == (pending, expected)
        assert f"process {process} (" in done.output
    auditexport("drain")
    everything_once(stack, 9)
    assert [(str(batch.state), batch.last_error) for batch in ledger(stack)] == [("verified", "")] * 3


def test_a_drain_finds_a_loss_although_a_row_is_locked(stack: Stack, auditexport: Prompt) -> None:
    """While the application held a row, nothing was verified: a real loss stayed unseen."""
    stack.put(*events(3))
    auditexport("drain", "--once")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported', observed = '' WHERE batch_id = 1")
    lose(stack, "evt_1")
    pks = stack.put(*events(3, "later"))
    with open_transaction(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[1]} FOR UPDATE"):
        auditexport("drain", status=1)
        assert states(stack)[0] == "discrepant"


def test_a_run_verifies_what_it_could_mark_and_then_fails(stack: Stack, exporter: Exporter) -> None:
    """In Dagster the others were exported, nothing was verified, and the error named neither batch nor blocker."""
    pks = stack.put(*events(9))
    with open_transaction(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[4]} FOR UPDATE") as process:
        run = exporter.drain(raise_on_error=False, batch_rows=3)
        assert states(stack) == ["verified", "written", "verified"]
        assert not run.success
        (line,) = exporter.failures(run.run_id)
        assert "batch 2 is in ClickHouse and not marked" in line
        assert f"process {process} (" in line
    assert exporter.drain().success
    everything_once(stack, 9)


def test_a_user_without_process_learns_what_to_ask_an_administrator(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To see who holds a lock takes a grant that an exporter does not need: the drain prints the SELECT instead."""
    pks = stack.put(*events(2))
    lock = f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[0]} FOR UPDATE"
    with least_grants(stack, monkeypatch), open_transaction(stack, lock):
        assert "SELECT * FROM information_schema.innodb_trx" in auditexport("drain", status=1).output
        assert stack.pending() == 1


def test_a_blocker_is_named_with_what_it_runs_and_without_values(stack: Stack, auditexport: Prompt) -> None:
    """A statement's text can contain an event's; its kind tells enough to find it."""
    pks = stack.put(*events(2))
    with stack.outbox.engine.connect() as connection:
        process = int(connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
        connection.exec_driver_sql(f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[0]} FOR UPDATE")

        def busy() -> None:
            with suppress(sa.exc.DBAPIError):
                connection.exec_driver_sql("SELECT SLEEP(60), 'a secret of a tenant'")

        thread = threading.Thread(target=busy)
        thread.start()
        try:
            done = auditexport("drain", status=1)
        finally:
            stack.sql(f"KILL QUERY {process}")
            thread.join()
    assert f"process {process} (" in done.output
    assert "which runs SELECT, in transaction" in done.output
    assert "secret" not in done.output


# ── the whole outbox, or the ledger, locked ──────────────────────────────────────────────────────


def names_who_locks_the_table(stack: Stack, process: int, output: str) -> bool:
    """MySQL shows who has a lock on a table; MariaDB does with a plugin only, and shows what ours waits for."""
    output = " ".join(output.split())
    if getattr(stack.outbox.engine.dialect, "is_mariadb", False):
        return "Ours waits there (Waiting for " in output and "information_schema.metadata_lock_info" in output
    return f"process {process} (" in output


def test_rows_of_an_outbox_locked_for_writing_are_marked_later(stack: Stack, auditexport: Prompt) -> None:
    """LOCK TABLES … READ lets everything be read: the first batch's mark ended the drain, with a number for a cause."""
    stack.put(*events(9))
    with open_transaction(stack, "LOCK TABLES clickhouse_outbox READ") as process:
        done = auditexport("drain", "--batch-rows", "3", "--mark-rows", "2", status=1)
    assert (stack.counts(), stack.pending(), states(stack)) == ((9, 9), 9, ["written"] * 3)
    assert "batch 3 is in ClickHouse and not marked: clickhouse_outbox is locked as a whole" in done.output
    assert names_who_locks_the_table(stack, process, done.output)
    auditexport("drain")
    everything_once(stack, 9)
    assert states(stack) == ["verified"] * 3


def alter(stack: Stack) -> None:
    engine = sa.create_engine(stack.mysql_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE clickhouse_outbox COMMENT = 'another'")
    engine.dispose()


WHOLE = {
    "LOCK TABLES": "LOCK TABLES clickhouse_outbox WRITE",
    "FLUSH TABLES": "FLUSH TABLES WITH READ LOCK",
    "ALTER TABLE that waits": "SELECT * FROM clickhouse_outbox LIMIT 1",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_drain_that_can_do_nothing_ends_and_names_who_holds_the_outbox(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Error 1205 alone does not say which lock it was, nor whose."""
    monkeypatch.setattr(retries, "RETRIES", 0)
    stack.put(*events(3))
    with ExitStack() as locks:
        process = locks.enter_context(open_transaction(stack, WHOLE[kind]))
        if "ALTER" in kind:
            altering = threading.Thread(target=alter, args=(stack,))
            altering.start()
            altered = "SELECT 1 FROM information_schema.processlist WHERE info LIKE 'ALTER%'"
            wait_until(lambda: bool(stack.sql(altered)), what="the ALTER")
        done = auditexport("drain", status=2)
    if "ALTER" in kind:
        altering.join()
    assert names_who_locks_the_table(stack, process, done.output), done.output
    auditexport("drain")
    everything_once(stack, 3)


def test_a_ledger_row_locked_before_the_claim_stops_only_its_batch(stack: Stack, auditexport: Prompt) -> None:
    """An operator's SELECT … FOR UPDATE on one batch stopped every plan."""
    stack.put(*events(9))
    claim(stack, "a dead run", batch_rows=3)
    end_leases(stack)
    stack.put(*events(3, "later"))
    with open_transaction(stack, "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 2 FOR UPDATE"):
        done = auditexport("drain", status=None)
        assert states(stack) == ["verified", "claimed", "verified", "verified"]
        assert "batch 2 is open (claimed, 3 rows), and its row of clickhouse_outbox_batch is locked" in done.output
    auditexport("drain")
    everything_once(stack, 12)
    assert states(stack) == ["verified"] * 4


def test_a_ledger_row_locked_after_the_claim_stops_only_its_batch(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is one for the whole plan, so one locked row stopped all of its batches."""
    real = claiming.claim
    stack.put(*events(6))
    processes: list[int] = []
    with ExitStack() as locks:

        def claim_and_lock(*arguments: Any, **named: Any) -> Any:
            claims = real(*arguments, **named)
            if not processes:
                lock = "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 1 FOR UPDATE"
                processes.append(locks.enter_context(open_transaction(stack, lock)))
            return claims

        monkeypatch.setattr(claiming, "claim", claim_and_lock)
        done = auditexport("drain", "--batch-rows", "3", "--once", status=1)
        assert states(stack) == ["claimed", "verified"], done.output
        assert f"process {processes[0]} (" in done.output
    auditexport("drain")
    everything_once(stack, 6)
    assert states(stack) == ["verified"] * 2


def test_who_holds_the_ledgers_lock_is_named(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No run can plan meanwhile, and "lock wait timeout" does not say whom to ask."""
    monkeypatch.setattr(retries, "RETRIES", 0)
    stack.put(*events(3))
    with open_transaction(stack, "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE") as process:
        assert f"process {process} (" in auditexport("drain", status=2).output
    auditexport("drain")
    everything_once(stack, 3)


# ── triggers ─────────────────────────────────────────────────────────────────────────────────────

UNDOING = {
    "clears it": "SET NEW.deleted_at = NULL",
    "keeps the old one": "SET NEW.deleted_at = OLD.deleted_at",
    "sets another": "SET NEW.deleted_at = 7",
    "clears some": "SET NEW.deleted_at = IF(NEW.event_id = 'evt_1', NULL, NEW.deleted_at)",
    "signals": "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'this table is closed on Sundays'",
    "signals by a number of its own": "SIGNAL SQLSTATE '45123' SET MYSQL_ERRNO = 31234, MESSAGE_TEXT = 'closed'",
    "writes to a table that is gone": "INSERT INTO changes_of_last_year VALUES (NEW.pk)",
    "writes to the outbox": "UPDATE clickhouse_outbox SET created_at = 1 WHERE pk = NEW.pk",
}


def before_update(stack: Stack, body: str) -> None:
    stack.sql(f"CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW {body}")


@pytest.mark.parametrize("body", UNDOING.values(), ids=UNDOING)
def test_rows_that_cannot_be_marked_are_not_sent_again(stack: Stack, auditexport: Prompt, body: str) -> None:
    """A trigger that undid the mark made each drain export the same rows again, and an operator saw green runs."""
    stack.put(*events(3))
    before_update(stack, body)
    for once in ([], ["--once"]):  # a drain that went on until nothing is pending never ended
        preflight.forget()
        done = auditexport("drain", "--mark-rows", "1", *once, status=1)
        assert (stack.counts(), states(stack)) == ((3, 3), ["written"])
        assert "frozen (BEFORE UPDATE)" in done.output
    stack.sql("DROP TRIGGER frozen")
    auditexport("drain")
    everything_once(stack, 3)
    assert states(stack) == ["verified"]


@pytest.mark.slow
def test_a_run_fails_where_a_trigger_undoes_the_mark(stack: Stack, exporter: Exporter) -> None:
    """Each run was green, exported the same rows, and called them verified."""
    stack.put(*events(3))
    before_update(stack, UNDOING["clears it"])
    for _ in range(2):
        run = exporter.drain(raise_on_error=False)
        assert not run.success
        (line,) = exporter.failures(run.run_id)
        assert "frozen (BEFORE UPDATE)" in line
        assert stack.counts() == (3, 3)


def test_a_trigger_that_this_user_cannot_see_is_an_administrators_to_find(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MySQL hides triggers from users without TRIGGER, which an exporter does not need."""
    stack.put(*events(2))
    before_update(stack, UNDOING["clears it"])
    with least_grants(stack, monkeypatch):
        output = auditexport("drain", "--once", status=1).output
    # MariaDB shows it to every user with UPDATE on the table.
    assert "FROM information_schema.triggers WHERE" in output or "frozen (BEFORE UPDATE)" in output
    assert states(stack) == ["written"]


def test_doctor_names_update_triggers_and_lets_a_harmless_one_be(stack: Stack, auditexport: Prompt) -> None:
    """A trigger that writes a history of changes does no harm; one that undoes marks is named before a drain."""
    stack.sql("CREATE TABLE changes (pk BIGINT)")
    stack.sql(
        "CREATE TRIGGER history AFTER UPDATE ON clickhouse_outbox FOR EACH ROW INSERT INTO changes VALUES (NEW.pk)"
    )
    assert "history (AFTER UPDATE)" in auditexport("doctor").output
    stack.put(*events(2))
    auditexport("drain")
    everything_once(stack, 2)


# ── marks that others clear ──────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "options", [("--batch-rows", "3", "--max-batches", "1"), ("--linger-s", "2", "--linger-poll-ms", "100")]
)
def test_a_drain_exports_no_row_twice_if_its_mark_is_cleared_at_once(
    stack: Stack, auditexport: Prompt, options: tuple[str, ...]
) -> None:
    """Otherwise the drain never ends: each plan finds the rows of the one before it pending."""
    stack.put(*events(6))
    stack.sql(
        "CREATE TRIGGER unmark AFTER UPDATE ON clickhouse_outbox_batch FOR EACH ROW UPDATE clickhouse_outbox "
        "SET deleted_at = NULL "
        "WHERE NEW.state = 'exported' AND OLD.state = 'written' AND deleted_at = NEW.exported_at_ms"
    )
    done = auditexport("drain", *options, status=None)
    everything_once(stack, 6, pending=6)
    assert "rows that this drain has exported are pending again" in done.output
    assert "information_schema.events" in done.output


def test_marks_that_are_cleared_again_and_again_are_reported(stack: Stack, auditexport: Prompt) -> None:
    """Each drain exported the same rows as a requeue, and status, doctor and log called that healthy."""
    stack.put(*events(3))
    auditexport("drain")
    for _ in range(4):
        clear_marks(stack)
        done = auditexport("drain")
    assert "are exported for the 5th time" in done.output
    assert "cleared 4 times in the last" in auditexport("status", status=None).output
    assert "cleared 4 times in the last" in auditexport("doctor", status=None).output


def test_requeues_by_command_are_not_reported_as_cleared_marks(stack: Stack, auditexport: Prompt) -> None:
    """Clearing marks is how rows are exported again, and each time is on record."""
    stack.put(*events(3))
    for _ in range(5):
        auditexport("drain")
        auditexport("requeue", "--from-pk", "0", "--why", "a test")
    auditexport("drain")
    assert ledger(stack)[-1].generation == 5, "they were requeued"
    assert "were cleared" not in auditexport("status", status=None).output
