"""The session variables that we set in MySQL, so that nothing that matters is inherited.

A server's globals, its `init_connect`, a user's defaults and a proxy all set session variables. The list was compared
with every session variable of MariaDB 10.11, MariaDB 11.8 and MySQL 9. Those that can change what a statement of ours
reads, writes, waits for or is refused are in `STATED`, each with what another value breaks. The others are not set:

    variables                                              why they do not matter here
    *_buffer_size, *_prealloc_size, tmp_table_size, …      speed and memory only; a limit that is reached is an error
                                                           with its name (`max_session_mem_used`, `connection_memory_limit`)
    optimizer_*cost*, *_search_depth, join_cache_level     plans only; the statements that matter name their index
    innodb_ddl_*, sql_require_primary_key, default_*,      DDL; `schema.sql` states engine, character set, collation and key
      explicit_defaults_for_timestamp, alter_algorithm
    auto_increment_*, insert_id, rand_seed*, gtid_*        no statement depends on which number comes next
    character_set_*, collation_connection                  stated by SET NAMES, which the driver sends before this
    log_*, long_query_time, profiling, sql_log_off         logging
    low_priority_updates, myisam_*, aria_*, deadlock_*     other engines
    session_track_*, resultset_metadata                    only for clients that ask for it
    sql_log_bin, skip_replication, binlog_*, wsrep_on,     need a privilege, so they are not inherited by accident;
      rbr_exec_mode, pseudo_*                              the preflight reads those that lose marks on replicas
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

# The application never waits for us: where it holds a lock for longer, the next attempt tries again.
LOCK_WAIT_S = 5
# The same for marks: meanwhile we lock the chunk's other rows, which the application may need.
MARK_LOCK_WAIT_S = 1
# A statement without an answer for this long has failed: the longest of ours, a claim, takes seconds.
READ_TIMEOUT_S = 120
_NO_LIMIT = str(2**64 - 1)

# Every value is what the servers default to, unless the reason says otherwise.
_ROWS = "SELECTs end early without an error: rows are claimed twice, or not at all"
_ENDS = "the server ends statements or idle transactions, and every run fails"
_WAITS = "a lock that the application holds stops the whole drain (a metadata lock by default for a day or a year)"
_TRANSACTION = "transactions do not begin and end where the program says"
_TEXT = "the text of statements and values means something else"
_STALE = "decisions rest on stale rows"
_PLANS = "long lists of pks become scans of the whole outbox"


class Stated(NamedTuple):
    """One variable: the value as SQL, what the server then shows (None where it cannot be compared), and why."""

    value: str
    shown: str | None
    breaks: str


def _all(breaks: str, **values: str) -> dict[str, Stated]:
    return {name: Stated(value, value.strip("'"), breaks) for name, value in values.items()}


STATED: dict[str, Stated] = {
    **_all(_TEXT, sql_mode="'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"),
    **_all(_ROWS, sql_select_limit=_NO_LIMIT, max_join_size=_NO_LIMIT, sql_big_selects="ON", sql_safe_updates="OFF"),
    **_all(
        _TRANSACTION,
        autocommit="OFF",
        completion_type="'NO_CHAIN'",
        transaction_isolation="'READ-COMMITTED'",
        tx_isolation="'READ-COMMITTED'",
        transaction_read_only="OFF",
        tx_read_only="OFF",
    ),
    # On by default since MariaDB 11.6.2: a row that changed since the transaction's first read is then error 1020.
    **_all("our locks are refused with error 1020 if the application changes rows", innodb_snapshot_isolation="OFF"),
    **_all(
        _ENDS,
        max_statement_time="0",
        max_execution_time="0",
        idle_transaction_timeout="0",
        idle_readonly_transaction_timeout="0",
        idle_write_transaction_timeout="0",
        wait_timeout="28800",
        net_read_timeout=str(READ_TIMEOUT_S),
        net_write_timeout=str(READ_TIMEOUT_S),
    ),
    **_all(_WAITS, innodb_lock_wait_timeout=str(LOCK_WAIT_S), lock_wait_timeout=str(LOCK_WAIT_S)),
    # A cluster's members answer from what they have applied; waiting for it costs nothing elsewhere.
    **_all(
        _STALE,
        wsrep_sync_wait="7",
        wsrep_dirty_reads="OFF",
        group_replication_consistency="'BEFORE'",
        query_cache_type="OFF",
        use_secondary_engine="'OFF'",
        system_versioning_asof="DEFAULT",
    ),
    **_all(
        "an INSERT of ours is kept though its row is invalid",
        foreign_key_checks="ON",
        unique_checks="ON",
        check_constraint_checks="ON",
    ),
    # In a time zone with summer time, NOW() as a number goes back an hour in autumn.
    **_all("leases, stamps and lags are off by hours", time_zone="'+00:00'"),
    "timestamp": Stated("DEFAULT", None, "NOW() stands still, and no lease ever ends"),
    **_all(
        "numbers, order or groups of an answer differ",
        sql_auto_is_null="OFF",
        div_precision_increment="4",
        max_sort_length="1024",
        group_concat_max_len="1048576",
        information_schema_stats_expiry="0",
        lc_messages="'en_US'",
        big_tables="OFF",
    ),
    # For a list whose ranges need more memory than this, MySQL and MariaDB use no index. 0, no limit, is not the
    # default.
    **_all(
        _PLANS,
        range_optimizer_max_mem_size="0",
        optimizer_max_sel_arg_weight="0",
        eq_range_index_dive_limit="200",
        in_predicate_conversion_threshold="1000",
        optimizer_use_condition_selectivity="4",
    ),
    # `default` would be the server's. These flags are on by default in all three servers.
    "optimizer_switch": Stated(
        "'index_merge=on,index_condition_pushdown=on,derived_merge=on,materialization=on,semijoin=on,firstmatch=on,"
        "loosescan=on'",
        None,
        _PLANS,
    ),
}

# Sent before anything is read: under inherited values, even `_READ` could end early. Each family reads its own comment.
_FIRST = (
    f"SET SESSION sql_select_limit = {_NO_LIMIT}, sql_safe_updates = OFF, max_join_size = {_NO_LIMIT}, sql_big_selects = ON "
    "/*M! , max_statement_time = 0 */ /*!80000 , max_execution_time = 0 */"
)
_READ = "SHOW SESSION VARIABLES"
# The variable is unknown, or this user may not set it, or not to this value.
_REFUSED = {1193, 1227, 1228, 1229, 1231, 1232, 1238, 1290}


class Session:
    """The one SET statement for a server's connections. The first connection learns it: what the server has and allows.

    The preflight reports the variables that a user may not set, where their values differ.
    """

    def __init__(self, required: Mapping[str, str]) -> None:
        self._values = {name: stated.value for name, stated in STATED.items()} | dict(required)
        self._required = set(required)
        self._statement = ""

    def state(self, connection: Any) -> None:
        """Sets the variables on a new connection of the driver. Raises the driver's errors."""
        # After a failover or behind a balancer, another version may refuse the statement: learn it again.
        if not self._statement or not self._accepted(connection, self._statement):
            self._statement = self._learn(connection)

    def _learn(self, connection: Any) -> str:
        connection.query(_FIRST)
        with connection.cursor() as cursor:
            cursor.execute(_READ)
            known = {str(row[0]).lower() for row in cursor.fetchall()} | self._required
        values = {name: value for name, value in self._values.items() if name in known}
        if not self._accepted(connection, _set(values)):
            # One at a time. What the URL asks for must be set.
            for name in list(values):
                if name in self._required:
                    connection.query(_set({name: values[name]}))
                elif not self._accepted(connection, _set({name: values[name]})):
                    del values[name]
        return _set(values)

    def _accepted(self, connection: Any, statement: str) -> bool:
        try:
            connection.query(statement)
        except connection.Error as error:
            if error.args[0] not in _REFUSED:
                raise
            return False
        return True


def _set(values: Mapping[str, str]) -> str:
    return "SET SESSION " + ", ".join(f"{name} = {value}" for name, value in values.items())


def deviations(variables: Mapping[str, str]) -> list[tuple[str, str, Stated]]:
    """The variables of a session of ours that differ from `STATED`: name, value found, and what was stated."""
    return [
        (name, variables[name], stated)
        for name, stated in STATED.items()
        if stated.shown is not None and name in variables and not _same(name, variables[name], stated.shown)
    ]


def _same(name: str, found: str, shown: str) -> bool:
    if name == "sql_mode":
        return set(found.split(",")) == set(shown.split(","))
    return _plain(found) == _plain(shown)


def _plain(value: str) -> str:
    """`0.000000` as `0`, `1` as `ON`: servers show one value in several ways."""
    number = value.rstrip("0").rstrip(".") if "." in value else value
    return {"": "0", "0": "OFF", "1": "ON"}.get(number, number).upper()
