"""Reading many rows: our loop gives what PyMySQL's gives, and fails as PyMySQL fails.

What belongs here: `mysql.rows` and `mysql.marking` beside the driver's own way, on a real server. What does not: what
is done with the rows.
"""

from __future__ import annotations

import re
import threading
from contextlib import suppress
from typing import Any

import pymysql
import pytest
from sqlalchemy.engine import make_url

from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.errors import InvalidConfig, OutboxUnavailable, SetupIncomplete
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.rows import RowsConnection
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import events
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.faults import mariadb

pytestmark = pytest.mark.mysql_sensitive

MEGABYTE = 1024**2


def opened(stack: Stack, kind: type[Any]) -> Any:
    server = make_url(stack.outbox.url)
    return kind(host=server.host, port=server.port, user=server.username, database=server.database)


def answers(stack: Stack, statement: str) -> list[Any]:
    found = []
    for kind in (pymysql.connections.Connection, RowsConnection):
        connection = opened(stack, kind)
        with connection.cursor() as cursor:
            cursor.execute(statement)
            found.append((cursor.fetchall(), cursor.rowcount, cursor.description))
            cursor.execute("SELECT 'the connection is in sync'")
            found[-1] = (*found[-1], cursor.fetchall())
        connection.close()
    return found


@pytest.mark.parametrize(
    "statement",
    [
        "SELECT 1 WHERE FALSE",
        "SELECT NULL, '', 0, -1, 18446744073709551615, 1.5, TIMESTAMP'2026-01-02 03:04:05', CAST('a' AS BINARY), 'ä€😀'",
        *(f"SELECT 1, REPEAT('x', {length}), NULL, 'end'" for length in (249, 250, 251, 255, 65_535, 65_536, 300_000)),
        f"SELECT CAST(REPEAT('x', {17 * MEGABYTE}) AS BINARY), 'end' UNION ALL SELECT 'short', NULL",
        # A row of exactly one full packet is followed by an empty one; three bytes beside the value are its length.
        f"SELECT REPEAT('x', {2**24 - 1 - 4})",
        f"SELECT REPEAT('x', {2**24 - 1 - 5}), 'y'",
        "WITH RECURSIVE n AS (SELECT 1 AS i UNION ALL SELECT i + 1 FROM n WHERE i < 900) "
        "SELECT i, REPEAT(CHAR(97 + i % 26), i * 7), IF(i % 3, NULL, i) FROM n",
        "SELECT pk, payload, CAST(payload AS BINARY), deleted_at FROM clickhouse_outbox ORDER BY pk",
    ],
)
def test_rows_are_those_that_the_driver_reads(stack: Stack, statement: str) -> None:
    """Lengths in every form, NULL, packets that go on in the next one, and more rows than one read of the socket."""
    stack.put(*events(50))
    drivers, ours = answers(stack, statement)
    assert ours == drivers


def test_an_error_among_the_rows_leaves_the_connection_in_sync(stack: Stack) -> None:
    """A statement that was killed half-way has sent rows: they must not pass for the whole answer."""
    stack.put(*events(1))
    connection = opened(stack, RowsConnection)
    killer = threading.Timer(0.5, lambda: stack.sql(f"KILL QUERY {connection.thread_id()}"))
    killer.start()
    slow = "SELECT SLEEP(0.02), REPEAT('x', 1000) FROM " + ", ".join(
        f"(SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS t{n}" for n in range(7)
    )
    try:
        with connection.cursor() as cursor, pytest.raises(pymysql.err.Error) as failed:
            cursor.execute(slow)
        assert failed.value.args[0] == 1317
        with connection.cursor() as cursor:
            cursor.execute("SELECT 7")
            assert cursor.fetchall() == ((7,),)
    finally:
        killer.join()
        connection.close()


def test_a_connection_lost_among_the_rows_is_an_unavailable_outbox(stack: Stack) -> None:
    """Half an answer is none, and a rerun can succeed."""
    numbers = ", ".join(f"(SELECT 1 UNION ALL SELECT 2 UNION ALL SELECT 3) AS t{n}" for n in range(7))

    def read() -> None:
        with MySQLOutbox(stack.outbox.url).transaction("reading outbox rows") as connection:
            thread = connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one()
            threading.Timer(0.5, lambda: stack.sql(f"KILL {thread}")).start()
            connection.exec_driver_sql(f"SELECT SLEEP(0.02), REPEAT('x', 1000) FROM {numbers}")

    with pytest.raises(OutboxUnavailable):
        read()


def test_an_applications_own_check_applies_to_marks(stack: Stack) -> None:
    """Marks skip MariaDB's CHECK of unchanged JSON, but not the application's CHECK of `deleted_at`."""
    stack.put(*events(2))
    stack.sql(
        "ALTER TABLE clickhouse_outbox ADD CONSTRAINT late CHECK (deleted_at IS NULL OR deleted_at > 4102444800000)"
    )
    drain(stack.outbox, stack.log, Limits(), owner="one")
    (batch,) = stack.outbox.batches([1])
    assert batch.state is State.WRITTEN
    assert re.search("error (4025|3819)", batch.last_error)  # MariaDB and MySQL
    assert stack.pending() == 2
    stack.sql("ALTER TABLE clickhouse_outbox DROP CONSTRAINT late")


def test_marks_leave_small_images_in_the_binary_log_where_the_url_asks_for_it(stack: Stack) -> None:
    """A mark changes eight bytes; with full images it logs the payload twice."""
    stack.put(*(("ws_1", f"evt_{n}", _long(n)) for n in range(200)))
    grown = {}
    for image in ("FULL", "MINIMAL"):
        outbox = MySQLOutbox(f"{stack.outbox.url}?binlog_row_image={image}")
        before = _binlog(stack)
        drain(outbox, stack.log, Limits(), owner=image)
        grown[image] = _binlog(stack) - before
        assert stack.pending() == 0
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    assert grown["MINIMAL"] * 5 < grown["FULL"]


def _long(number: int) -> str:
    return f'{{"event_id": "evt_{number}", "time": 1, "workspace_id": "ws_1", "event": "e", "description": "{"x" * 5000}"}}'


def _binlog(stack: Stack) -> int:
    return sum(int(row[1]) for row in stack.sql("SHOW BINARY LOGS"))


def test_the_missing_grant_for_the_row_image_is_named(stack: Stack) -> None:
    """Few users have it; the run names it before it claims anything."""
    stack.sql("CREATE USER 'plain'@'127.0.0.1' IDENTIFIED BY 'pw'")
    try:
        server = make_url(stack.outbox.url).set(username="plain", password="pw")
        stack.sql(f"GRANT SELECT ON {server.database}.* TO 'plain'@'127.0.0.1'")
        url = server.update_query_dict({"binlog_row_image": "MINIMAL"}).render_as_string(hide_password=False)
        with pytest.raises(SetupIncomplete, match="BINLOG ADMIN" if mariadb(stack) else "SESSION_VARIABLES_ADMIN"):
            MySQLOutbox(url).batch_holders()
    finally:
        stack.sql("DROP USER 'plain'@'127.0.0.1'")


def test_another_image_is_refused_by_name() -> None:
    with pytest.raises(InvalidConfig, match="binlog_row_image that is none of FULL, MINIMAL, NOBLOB"):
        MySQLOutbox("mysql+pymysql://root@127.0.0.1/app?binlog_row_image=SMALL")


def test_a_connection_is_rolled_back_unless_it_has_just_committed(stack: Stack) -> None:
    """After a COMMIT it is a round trip for nothing; without one, the next user would commit what was left behind."""
    with stack.outbox.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as watching:

        def rollbacks(*statements: str, fails: bool = False) -> int:
            before = so_far()
            with suppress(InterruptedError), stack.outbox.engine.begin() as connection:
                for statement in statements:
                    connection.exec_driver_sql(statement)
                if fails:
                    raise InterruptedError
            return so_far() - before

        def so_far() -> int:
            return int(watching.exec_driver_sql("SHOW GLOBAL STATUS LIKE 'Com_rollback'").one()[1])

        change = "UPDATE clickhouse_outbox_batch SET last_error = 'changed' WHERE batch_id = 0"
        assert rollbacks(change) == 0
        assert rollbacks(change.replace("changed", "left behind"), fails=True) > 0
        assert rollbacks("SELECT 1") == 0
        # SQLAlchemy rolls back what it has begun; a transaction that a COMMIT began is none of its own.
        assert rollbacks("SET SESSION completion_type = 'CHAIN'") == 1
    assert [row.last_error for row in stack.sql("SELECT last_error FROM clickhouse_outbox_batch")] == ["changed"]
