"""MySQL sessions inherit nothing that matters: whatever the server's globals are, a drain does the same.

What belongs here: session variables and what a URL may set. What does not: what an error of MySQL's means (`test_mysql_errors`).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from auditexport_pipeline.cli import main
from auditexport_pipeline.mysql.connection import engine_for
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events
from auditexport_tests.support.prompts import urls

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

ROWS = 12
# Values that a server may have, and that another session of it would inherit.
INHERITED = {
    "sql_select_limit": "5",
    "completion_type": "'RELEASE'",
    "transaction_read_only": "ON",
    "tx_read_only": "ON",
    "max_statement_time": "0.001",
    "max_execution_time": "1",
    "sql_safe_updates": "ON",
    "sql_big_selects": "OFF",
    "max_join_size": "10",
    "innodb_snapshot_isolation": "ON",
    "lock_wait_timeout": "77777",
    "innodb_lock_wait_timeout": "7777",
    "sql_auto_is_null": "ON",
    "max_sort_length": "64",
    "group_concat_max_len": "4",
    "div_precision_increment": "0",
    "foreign_key_checks": "OFF",
    "unique_checks": "OFF",
    "check_constraint_checks": "OFF",
    "net_write_timeout": "3",
    "net_read_timeout": "3",
    "wait_timeout": "99",
    "idle_transaction_timeout": "99",
    "autocommit": "ON",
    "system_versioning_asof": "'2020-01-01 00:00:00'",
    "lc_messages": "'pl_PL'",
    "sql_mode": "'ANSI_QUOTES,PIPES_AS_CONCAT,NO_BACKSLASH_ESCAPES,PAD_CHAR_TO_FULL_LENGTH'",
    "time_zone": "'+05:00'",
    "range_optimizer_max_mem_size": "1000",
    "optimizer_use_condition_selectivity": "1",
    "eq_range_index_dive_limit": "1",
    "big_tables": "ON",
    "init_connect": "'SET timestamp = 1000'",
}


@contextmanager
def globally(stack: Stack, values: dict[str, str]) -> Iterator[None]:
    """These global values of the server's for a while, and new connections of ours under them."""
    # A connection that is there before: what is set must not strike the one that takes it back.
    with sa.create_engine(stack.mysql_url, isolation_level="AUTOCOMMIT").connect() as admin:
        before = {}
        for variable in values:
            kept = admin.exec_driver_sql(f"SELECT @@GLOBAL.{variable}").scalar_one()
            before[variable] = str(kept) if isinstance(kept, (int, float)) or kept == "DEFAULT" else repr(str(kept))
        try:
            for variable, value in values.items():
                admin.exec_driver_sql(f"SET GLOBAL {variable} = {value}")
            stack.outbox.disconnect()
            engine_for.cache_clear()  # a process that has not met this server yet
            yield
        finally:
            for variable, value in before.items():
                admin.exec_driver_sql(f"SET GLOBAL {variable} = {value}")
            stack.outbox.disconnect()
    admin.engine.dispose()


def _variables(stack: Stack) -> dict[str, str]:
    return {str(row[0]).lower(): str(row[1]) for row in stack.sql("SHOW SESSION VARIABLES")}


def _session(stack: Stack, names: list[str]) -> dict[str, str]:
    """What a new session of ours has; one by one and without a COMMIT, for each of them can stop a larger statement."""
    connection = stack.outbox.engine.raw_connection()
    values = {}
    try:
        with connection.cursor() as cursor:
            for name in names:
                cursor.execute(f"SELECT @@SESSION.{name}")
                values[name] = str(cursor.fetchone()[0])
    finally:
        connection.invalidate()
    return values


@pytest.mark.parametrize(
    "variable",
    [
        "sql_select_limit",
        "completion_type",
        "read_only",
        "statement_time",
        "innodb_snapshot_isolation",
        "max_join_size",
    ],
)
def test_a_drain_is_the_same_whatever_the_server_sets(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, variable: str
) -> None:
    """A limit of rows let 2,000 rows vanish, and others let no run get through."""
    there = _variables(stack)
    names = {
        "read_only": ("transaction_read_only", "tx_read_only"),
        "statement_time": ("max_statement_time", "max_execution_time"),
    }.get(variable, (variable,))
    name = next((name for name in names if name in there), None)
    stack.put(*events(ROWS))
    for key, value in urls(stack).items():
        monkeypatch.setenv(key, value)
    with globally(stack, {} if name is None else {name: INHERITED[name]}):
        done = CliRunner().invoke(main, ["drain"])
    assert (done.exit_code, stack.counts(), stack.pending()) == (0, (ROWS, ROWS), 0), done.output


def test_a_session_has_the_same_values_whatever_the_globals_are(stack: Stack) -> None:
    """One variable that is inherited is one server on which a drain means something else."""
    there = _variables(stack)
    names = [name for name in INHERITED if name in there and name != "init_connect"]
    usual = _session(stack, names)
    # RELEASE ends a session that inherits it at its first COMMIT: asked for last, and alone.
    last = "completion_type"
    with globally(stack, {name: INHERITED[name] for name in [*names, "init_connect"] if name != last}):
        assert _session(stack, names) == usual
    with globally(stack, {last: INHERITED[last]}):
        assert _session(stack, [last]) == {last: usual[last]}


def test_a_clock_that_init_connect_stops_goes_on_for_us(stack: Stack) -> None:
    """`SET timestamp` freezes NOW(), and with it every lease."""
    name = stack.mysql_url.rsplit("/", 1)[1]
    with globally(stack, {"init_connect": INHERITED["init_connect"]}):
        stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'x'")
        stack.sql(f"GRANT ALL ON {name}.* TO '{name}'@'127.0.0.1'")
        try:
            from auditexport_pipeline.mysql.outbox import MySQLOutbox

            plain = MySQLOutbox(f"mysql+pymysql://{name}:x@{stack.mysql_url.split('@', 1)[1]}")
            with plain.transaction("asking") as connection:
                stopped = connection.exec_driver_sql("SELECT UNIX_TIMESTAMP(NOW()) <= 1000").scalar_one()
            plain.disconnect()
        finally:
            stack.sql(f"DROP USER '{name}'@'127.0.0.1'")
    assert stopped == 0


@pytest.mark.parametrize(
    "option", ["charset=latin1", "sql_mode=ANSI", "init_command=SET sql_select_limit=1", "autocommit=true"]
)
def test_a_url_cannot_change_what_a_session_states(stack: Stack, monkeypatch: pytest.MonkeyPatch, option: str) -> None:
    """`charset=latin1` passed doctor, and every payload beyond it became a dead letter."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", f"{stack.mysql_url}?{option}")
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    done = CliRunner().invoke(main, ["doctor"])
    assert (done.exit_code != 0, option.partition("=")[0] in done.output) == (True, True), done.output
