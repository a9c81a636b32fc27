"""MySQL sessions inherit nothing that matters: whatever the server's globals are, a drain does the same.

What an error of MySQL's means is in `test_mysql_errors`.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import sqlalchemy as sa

from auditexport_pipeline.mysql.connection import engine_for
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once
from auditexport_tests.support.prompts import prompt_in, urls

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
    """Sets global variables of the server for a while, with new connections of ours under them."""
    # This connection is older than the values, so that it can set them back.
    with sa.create_engine(stack.mysql_url, isolation_level="AUTOCOMMIT").connect() as admin:
        before = {}
        for variable in values:
            value = admin.exec_driver_sql(f"SELECT @@GLOBAL.{variable}").scalar_one()
            before[variable] = str(value) if isinstance(value, (int, float)) or value == "DEFAULT" else repr(str(value))
        try:
            for variable, value in values.items():
                admin.exec_driver_sql(f"SET GLOBAL {variable} = {value}")
            stack.outbox.disconnect()
            engine_for.cache_clear()  # as in a process that has not connected to this server yet
            yield
        finally:
            for variable, value in before.items():
                admin.exec_driver_sql(f"SET GLOBAL {variable} = {value}")
            stack.outbox.disconnect()
    admin.engine.dispose()


def _variables(stack: Stack) -> dict[str, str]:
    return {str(row[0]).lower(): str(row[1]) for row in stack.sql("SHOW SESSION VARIABLES")}


def _session(stack: Stack, names: list[str]) -> dict[str, str]:
    """The values of a new session of ours; one by one and without a COMMIT, because each of them can stop a larger statement."""
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


def test_a_drain_is_the_same_whatever_the_server_sets(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Under an inherited limit of rows, rows would be lost; under the other values no run would end."""
    names = ("sql_select_limit", "completion_type", "transaction_read_only", "tx_read_only", "max_statement_time")
    names += ("max_execution_time", "innodb_snapshot_isolation", "max_join_size")
    there = _variables(stack)
    stack.put(*events(ROWS))
    with globally(stack, {name: INHERITED[name] for name in names if name in there}):
        prompt_in(urls(stack), monkeypatch)("drain")
    everything_once(stack, ROWS)


def test_a_session_has_the_same_values_whatever_the_globals_are(stack: Stack) -> None:
    """With one inherited variable, a drain would do something else on some server."""
    there = _variables(stack)
    names = [name for name in INHERITED if name in there and name != "init_connect"]
    usual = _session(stack, names)
    # RELEASE ends a session that inherits it at its first COMMIT, so it is set last and alone.
    last = "completion_type"
    with globally(stack, {name: INHERITED[name] for name in [*names, "init_connect"] if name != last}):
        assert _session(stack, names) == usual
    with globally(stack, {last: INHERITED[last]}):
        assert _session(stack, [last]) == {last: usual[last]}


def test_a_clock_that_init_connect_stops_runs_in_our_sessions(stack: Stack) -> None:
    """`SET timestamp` freezes NOW(), and with it every lease."""
    name = stack.mysql_url.rsplit("/", 1)[1]
    with globally(stack, {"init_connect": INHERITED["init_connect"]}):
        stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'x'")
        stack.sql(f"GRANT ALL ON {name}.* TO '{name}'@'127.0.0.1'")
        try:
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
def test_a_url_cannot_change_what_a_session_states(
    mysql_server: str, clickhouse_server: str, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    """With `charset=latin1`, every payload with other characters would become a dead letter."""
    given = {"MYSQL": f"{mysql_server}mysql?{option}", "CLICKHOUSE": f"{clickhouse_server}default"}
    prompt = prompt_in({f"AUDITEXPORT_{server}_URL": url for server, url in given.items()}, monkeypatch)
    done = prompt("doctor", status=2)
    assert option.partition("=")[0] in done.output, done.output
