"""Marking in a world that resists: rows that the application holds locked, triggers that undo or refuse the mark."""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from typing import Any

import pytest
import sqlalchemy as sa
from click.testing import CliRunner, Result

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.core import claiming, retries
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.roles import MYSQL_GRANTS, Role
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, ledger
from auditexport_tests.support.prompts import started, urls
from auditexport_tests.support.waiting import wait_until

pytestmark = pytest.mark.mysql_sensitive


def drain(stack: Stack, monkeypatch: pytest.MonkeyPatch, *words: str) -> Result:
    """`auditexport drain` in this process, whatever its exit status."""
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    return CliRunner().invoke(main, ["drain", *words])


@contextmanager
def held(stack: Stack, statement: str) -> Iterator[int]:
    """A connection of the application that has said this and not ended its transaction; yields its process id."""
    with stack.outbox.engine.connect() as connection:
        process = int(connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
        connection.exec_driver_sql(statement)
        try:
            yield process
        finally:
            connection.exec_driver_sql("UNLOCK TABLES")
            connection.rollback()


@contextmanager
def as_exporter(stack: Stack) -> Iterator[Stack]:
    """The same databases, for a MySQL user with the exporter's grants and no other."""
    database = str(sa.make_url(stack.mysql_url).database)
    user = f"least_{database[-20:]}"
    stack.sql(f"CREATE USER {user} IDENTIFIED BY 'least'")
    for table, privileges in MYSQL_GRANTS[Role.EXPORTER].items():
        stack.sql(f"GRANT {', '.join(privileges)} ON `{database}`.{table} TO {user}")
    url = sa.make_url(stack.mysql_url).set(username=user, password="least").render_as_string(hide_password=False)
    least = MySQLOutbox(url)
    try:
        yield replace(stack, mysql_url=url, outbox=least)
    finally:
        least.disconnect()
        stack.sql(f"DROP USER {user}")


def states(stack: Stack) -> list[str]:
    return [str(batch.state) for batch in ledger(stack)]


# ── locked rows ──────────────────────────────────────────────────────────────────────────────────


def test_a_locked_row_holds_up_its_own_mark_and_nothing_else(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """One open SELECT … FOR UPDATE of the application kept every tenant's rows unmarked."""
    pks = stack.put(*events(9))
    with held(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[4]} FOR UPDATE") as process:
        done = drain(stack, monkeypatch, "--batch-rows", "3", "--mark-rows", "2")
        assert stack.pending() == 1, "all but the locked one are marked"
        assert states(stack) == ["verified", "written", "verified"]
        assert f"process {process} (" in done.output
        assert done.exit_code == 1
    again = drain(stack, monkeypatch)
    assert again.exit_code == 0, again.output
    assert (stack.counts(), stack.pending()) == ((9, 9), 0)
    assert [(str(batch.state), batch.last_error) for batch in ledger(stack)] == [("verified", "")] * 3


def test_a_drain_finds_a_loss_although_a_row_is_locked(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing at all was verified while somebody held a row: a real loss stayed unseen."""
    pks = stack.put(*events(6))
    drain(stack, monkeypatch, "--batch-rows", "3", "--once")
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported', observed = '' WHERE batch_id = 1")
    stack.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'evt_1'")
    pks = stack.put(*events(3, "later"))
    with held(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[1]} FOR UPDATE"):
        drain(stack, monkeypatch)
        assert states(stack)[0] == "discrepant"


def test_a_run_verifies_what_it_could_mark_and_then_fails(
    stack: Stack, exporter: Exporter, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In Dagster the others were exported, nothing was verified, and the error named neither batch nor blocker."""
    pks = stack.put(*events(9))
    with held(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[4]} FOR UPDATE") as process:
        run = exporter.drain(raise_on_error=False, batch_rows=3)
        assert states(stack) == ["verified", "written", "verified"]
        assert not run.success
        (line,) = exporter.failures(run.run_id)
        assert "batch 2 is in ClickHouse and not marked" in line
        assert f"process {process} (" in line
    assert exporter.drain().success
    assert (stack.counts(), stack.pending()) == ((9, 9), 0)


def test_a_user_without_process_learns_what_an_administrator_asks(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who holds a lock takes a grant that an exporter does not need: it says the SELECT instead of asking for one."""
    pks = stack.put(*events(2))
    with as_exporter(stack) as least, held(stack, f"SELECT * FROM clickhouse_outbox WHERE pk = {pks[0]} FOR UPDATE"):
        done = drain(least, monkeypatch)
        assert stack.pending() == 1
        assert "SELECT * FROM information_schema.innodb_trx" in done.output


def test_the_last_rows_of_a_batch_can_be_the_locked_ones(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last chunk is marked together with the ledger's row: both have to wait, and nothing else."""
    pks = stack.put(*events(9))
    with held(stack, f"SELECT * FROM clickhouse_outbox WHERE pk >= {pks[7]} FOR UPDATE") as process:
        done = drain(stack, monkeypatch, "--batch-rows", "3", "--mark-rows", "2")
        assert (stack.pending(), states(stack)) == (2, ["verified", "verified", "written"])
        assert f"process {process} (" in done.output
        assert done.exit_code == 1
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending()) == ((9, 9), 0)


def test_a_holder_is_named_with_what_it_does_and_without_its_values(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A statement's text can hold an event's; its kind tells enough to find it."""
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
            done = drain(stack, monkeypatch)
        finally:
            stack.sql(f"KILL QUERY {process}")
            thread.join()
    assert f"process {process} (" in done.output
    assert "which runs SELECT, in transaction" in done.output
    assert "secret" not in done.output


# ── the whole outbox, or the ledger, locked ──────────────────────────────────────────────────────


def names_who_locks_the_table(stack: Stack, process: int, output: str) -> bool:
    """MySQL shows who has a lock on a table; MariaDB does with a plugin only, and shows what ours waits for."""
    if getattr(stack.outbox.engine.dialect, "is_mariadb", False):
        return "Ours waits there (Waiting for " in output and "information_schema.metadata_lock_info" in output
    return f"process {process} (" in output


def test_rows_of_an_outbox_locked_against_writing_are_exported_and_marked_later(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """LOCK TABLES … READ lets everything be read: the first batch's mark ended the drain, five times, with a code for a cause."""
    stack.put(*events(9))
    with held(stack, "LOCK TABLES clickhouse_outbox READ") as process:
        done = drain(stack, monkeypatch, "--batch-rows", "3", "--mark-rows", "2")
    assert (stack.counts(), stack.pending(), states(stack)) == ((9, 9), 9, ["written"] * 3)
    assert "batch 3 is in ClickHouse and not marked: clickhouse_outbox is locked as a whole" in done.output
    assert names_who_locks_the_table(stack, process, done.output)
    assert done.exit_code == 1
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending(), states(stack)) == ((9, 9), 0, ["verified"] * 3)


WHOLE = {
    "LOCK TABLES": "LOCK TABLES clickhouse_outbox WRITE",
    "FLUSH TABLES": "FLUSH TABLES WITH READ LOCK",
    "ALTER TABLE that waits": "SELECT * FROM clickhouse_outbox LIMIT 1",
}


@pytest.mark.parametrize("kind", WHOLE)
def test_a_drain_that_can_do_nothing_ends_and_names_who_holds_the_outbox(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    """Error 1205 alone does not say which lock it was, nor whose."""
    monkeypatch.setattr(retries, "RETRIES", 0)
    stack.put(*events(3))
    altering: threading.Thread | None = None
    with held(stack, WHOLE[kind]) as process:
        if "ALTER" in kind:
            altering = threading.Thread(target=alter, args=(stack,))
            altering.start()
            wait_until(
                lambda: bool(stack.sql("SELECT 1 FROM information_schema.processlist WHERE info LIKE 'ALTER%'")),
                what="the ALTER",
            )
        done = drain(stack, monkeypatch)
    if altering is not None:
        altering.join()
    assert names_who_locks_the_table(stack, process, done.output), done.output
    assert done.exit_code == 2
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending()) == ((3, 3), 0)


def alter(stack: Stack) -> None:
    engine = sa.create_engine(stack.mysql_url)
    with engine.connect() as connection:
        connection.exec_driver_sql("ALTER TABLE clickhouse_outbox COMMENT = 'another'")
    engine.dispose()


def test_an_open_batch_whose_ledger_row_is_locked_lets_the_others_go_on(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An operator's SELECT … FOR UPDATE on one batch stopped every plan."""
    stack.put(*events(9))
    claiming.claim(stack.outbox, owner="a dead run", dead_owners=(), limits=Limits(batch_rows=3))
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 1 WHERE batch_id > 0")
    stack.put(*events(3, "later"))
    with held(stack, "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 2 FOR UPDATE"):
        done = drain(stack, monkeypatch)
        assert states(stack) == ["verified", "claimed", "verified", "verified"]
        assert "batch 2 is open (claimed, 3 rows), and its row of clickhouse_outbox_batch is locked" in done.output
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending(), states(stack)) == ((12, 12), 0, ["verified"] * 4)


def test_a_batch_whose_ledger_row_is_locked_on_its_way_lets_the_others_go_on(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The lease is one for the whole plan, so one locked row stopped all of its batches."""
    real = claiming.claim
    stack.put(*events(6))
    with ExitStack() as locks:

        def claim(*arguments: Any, **named: Any) -> Any:
            claims = real(*arguments, **named)
            if not holder:
                locked = "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 1 FOR UPDATE"
                holder.append(locks.enter_context(held(stack, locked)))
            return claims

        holder: list[int] = []
        monkeypatch.setattr(claiming, "claim", claim)
        done = drain(stack, monkeypatch, "--batch-rows", "3", "--once")
        assert states(stack) == ["claimed", "verified"], done.output
        assert f"process {holder[0]} (" in done.output
        assert done.exit_code == 1
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending(), states(stack)) == ((6, 6), 0, ["verified"] * 2)


def test_who_holds_the_ledgers_lock_is_named(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody can plan meanwhile, and "lock wait timeout" does not say whom to ask."""
    monkeypatch.setattr(retries, "RETRIES", 0)
    stack.put(*events(3))
    with held(stack, "SELECT * FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE") as process:
        done = drain(stack, monkeypatch)
        assert f"process {process} (" in done.output
        assert done.exit_code == 2
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending()) == ((3, 3), 0)


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


@pytest.mark.parametrize("body", UNDOING.values(), ids=UNDOING)
def test_rows_that_cannot_be_marked_are_not_sent_again(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, body: str
) -> None:
    """A trigger that undid the mark made each drain export the same rows again, and an operator saw green runs."""
    stack.put(*events(3))
    stack.sql(f"CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW {body}")
    for _ in range(2):
        preflight.forget()
        done = drain(stack, monkeypatch, "--once", "--mark-rows", "1")
        assert stack.counts() == (3, 3)
        assert states(stack) == ["written"]
        assert done.exit_code == 1, done.output
        assert "frozen (BEFORE UPDATE)" in done.output
    stack.sql("DROP TRIGGER frozen")
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending(), states(stack)) == ((3, 3), 0, ["verified"])


def test_a_drain_ends_where_a_trigger_undoes_the_mark(stack: Stack) -> None:
    """It never ended, and sent the same rows at every round."""
    stack.put(*events(3))
    stack.sql("CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW SET NEW.deleted_at = NULL")
    with started(stack, "drain") as process:
        try:
            status: int | None = process.wait(30)
        except subprocess.TimeoutExpired:
            status = None
        assert (status, stack.counts()) == (1, (3, 3))


def test_a_run_ends_red_where_a_trigger_undoes_the_mark(stack: Stack, exporter: Exporter) -> None:
    """Each run was green, exported the same rows, and called them verified."""
    stack.put(*events(3))
    stack.sql("CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW SET NEW.deleted_at = NULL")
    for _ in range(2):
        run = exporter.drain(raise_on_error=False)
        assert not run.success
        (line,) = exporter.failures(run.run_id)
        assert "frozen (BEFORE UPDATE)" in line
        assert stack.counts() == (3, 3)


def test_a_trigger_that_this_user_cannot_see_is_an_administrators_to_find(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MySQL hides triggers from users without TRIGGER, which an exporter does not need."""
    stack.put(*events(2))
    stack.sql("CREATE TRIGGER frozen BEFORE UPDATE ON clickhouse_outbox FOR EACH ROW SET NEW.deleted_at = NULL")
    with as_exporter(stack) as least:
        done = drain(least, monkeypatch, "--once")
        # MariaDB shows it to whoever may UPDATE the table.
        assert "FROM information_schema.triggers WHERE" in done.output or "frozen (BEFORE UPDATE)" in done.output
        assert (states(stack), done.exit_code) == (["written"], 1)


def test_doctor_names_update_triggers_and_lets_a_harmless_one_be(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who writes a history of changes by a trigger must not be kept from exporting; who undoes marks is warned before."""
    stack.sql("CREATE TABLE changes (pk BIGINT)")
    stack.sql(
        "CREATE TRIGGER history AFTER UPDATE ON clickhouse_outbox FOR EACH ROW INSERT INTO changes VALUES (NEW.pk)"
    )
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    done = CliRunner().invoke(main, ["doctor"])
    assert "history (AFTER UPDATE)" in done.output
    assert done.exit_code == 0, done.output
    stack.put(*events(2))
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts(), stack.pending()) == ((2, 2), 0)


# ── marks that somebody clears ───────────────────────────────────────────────────────────────────


@contextmanager
def clearing_event(stack: Stack) -> Iterator[None]:
    """An event of somebody's that clears all marks, every second."""
    before = stack.sql("SELECT @@GLOBAL.event_scheduler AS on_or_off")[0].on_or_off
    stack.sql("SET GLOBAL event_scheduler = ON")
    stack.sql(
        "CREATE EVENT nightly ON SCHEDULE EVERY 1 SECOND DO UPDATE clickhouse_outbox SET deleted_at = NULL "
        "WHERE deleted_at IS NOT NULL"
    )
    try:
        yield
    finally:
        stack.sql("DROP EVENT IF EXISTS nightly")
        stack.sql(f"SET GLOBAL event_scheduler = {before}")


def said(stack: Stack, monkeypatch: pytest.MonkeyPatch, *words: str) -> str:
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    return CliRunner().invoke(main, [*words]).output


def test_a_drain_exports_no_row_twice_though_its_mark_is_cleared_at_once(stack: Stack) -> None:
    """It never ended: each plan found the rows of the one before it pending."""
    stack.put(*events(6))
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 600000")
    stack.sql(
        "CREATE TRIGGER unmark AFTER UPDATE ON clickhouse_outbox_batch FOR EACH ROW UPDATE clickhouse_outbox SET deleted_at = NULL "
        "WHERE NEW.state = 'exported' AND OLD.state = 'written' AND deleted_at = NEW.exported_at_ms"
    )
    with started(stack, "drain", "--batch-rows", "3", "--max-batches", "1") as process:
        try:
            output, errors = process.communicate(timeout=60)
        except subprocess.TimeoutExpired:
            output, errors = "never ended", ""
    assert (stack.counts(), stack.pending()) == ((6, 6), 6), output
    assert "rows that this drain has exported are pending again" in output + errors
    assert "information_schema.events" in output + errors


def test_an_event_that_clears_marks_is_looked_for(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each drain exported the same rows as a requeue, and status, doctor and log called that healthy."""
    stack.put(*events(3))
    with clearing_event(stack):
        for _ in range(5):
            wait_until(lambda: stack.pending() == 3, what="the three others")
            done = drain(stack, monkeypatch)
            assert done.exit_code == 0, done.output
    assert "are exported for the 5th time. If nobody requeues them" in done.output
    assert "cleared 4 times in the last" in said(stack, monkeypatch, "status")
    assert "cleared 4 times in the last" in said(stack, monkeypatch, "doctor")
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts()[1], stack.pending()) == (3, 0)


def test_a_run_that_stays_exports_no_row_twice_either(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """At every look it found its own rows pending."""
    stack.put(*events(3))
    with clearing_event(stack):
        done = drain(stack, monkeypatch, "--linger-s", "5", "--linger-poll-ms", "100")
    assert stack.counts() == (3, 3)
    assert "rows that this drain has exported are pending again" in done.output
    assert drain(stack, monkeypatch).exit_code == 0
    assert (stack.counts()[1], stack.pending()) == (3, 0)


def test_requeues_of_ours_are_nobodys_mistake(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clearing marks is how rows are exported again, and each time is on record."""
    stack.put(*events(3))
    for _ in range(5):
        drain(stack, monkeypatch)
        said(stack, monkeypatch, "requeue", "--from-pk", "0", "--why", "a test")
    drain(stack, monkeypatch)
    assert [batch.generation for batch in ledger(stack)][-1] == 5, "they were requeued"
    assert "were cleared" not in said(stack, monkeypatch, "status")
