"""What a session of ours states to MySQL, so that nothing that matters is inherited.

A server's globals, its `init_connect`, a user's defaults and a proxy all set session variables. Every session variable
of MariaDB 10.11, MariaDB 11.8 and MySQL 9 was looked at once. Those that can change what a statement of ours reads,
writes, waits for or is refused are in `STATED`, each with what another value breaks. The others are left alone:

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
    sql_log_bin, skip_replication, binlog_*, wsrep_on,     need a privilege, so nobody inherits them by accident;
      rbr_exec_mode, pseudo_*                              the preflight reads those that lose marks on replicas
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# We are never worth waiting for: a lock that the application holds longer is tried again by the next attempt.
LOCK_WAIT_S = 5
# The same, while this chunk's other rows are locked by us and the application may want one.
MARK_LOCK_WAIT_S = 1
# A statement that gives no sign of life this long is given up: the longest of ours, a claim, takes seconds.
READ_TIMEOUT_S = 120
_NO_LIMIT = str(2**64 - 1)

# Every value is what the servers default to, unless the reason says otherwise.
_ROWS = "SELECTs end early without an error: rows are claimed twice, or not at all"
_ENDS = "statements or idle transactions are ended by the server, and no run gets through"
_WAITS = "a lock that the application holds stops the whole drain (a metadata lock by default for a day or a year)"
_TRANSACTION = "transactions do not begin and end where the program says"
_TEXT = "the text of statements and values means something else"
_STALE = "decisions rest on stale rows"
_PLANS = "long lists of pks become scans of the whole outbox"


@dataclass(frozen=True, slots=True, kw_only=True)
class Stated:
    """One variable: the value as SQL, what the server then shows (None where it cannot be compared), and why."""

    value: str
    shown: str | None
    breaks: str


def _said(breaks: str, **values: str) -> dict[str, Stated]:
    return {name: Stated(value=value, shown=value.strip("'"), breaks=breaks) for name, value in values.items()}


STATED: dict[str, Stated] = {
    **_said(_TEXT, sql_mode="'STRICT_ALL_TABLES,NO_ENGINE_SUBSTITUTION'"),
    **_said(_ROWS, sql_select_limit=_NO_LIMIT, max_join_size=_NO_LIMIT, sql_big_selects="ON", sql_safe_updates="OFF"),
    **_said(
        _TRANSACTION,
        autocommit="OFF",
        completion_type="'NO_CHAIN'",
        transaction_isolation="'READ-COMMITTED'",
        tx_isolation="'READ-COMMITTED'",
        transaction_read_only="OFF",
        tx_read_only="OFF",
    ),
    # On by default since MariaDB 11.6.2: a row that changed since the transaction's first read is then error 1020.
    **_said(
        "what the application changes meanwhile refuses our locks with error 1020", innodb_snapshot_isolation="OFF"
    ),
    **_said(
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
    **_said(_WAITS, innodb_lock_wait_timeout=str(LOCK_WAIT_S), lock_wait_timeout=str(LOCK_WAIT_S)),
    # A cluster's members answer from what they have applied; waiting for it costs nothing elsewhere.
    **_said(
        _STALE,
        wsrep_sync_wait="7",
        wsrep_dirty_reads="OFF",
        group_replication_consistency="'BEFORE'",
        query_cache_type="OFF",
        use_secondary_engine="'OFF'",
        system_versioning_asof="DEFAULT",
    ),
    **_said("an INSERT of ours is kept though its row is invalid", foreign_key_checks="ON", unique_checks="ON"),
    **_said("an INSERT of ours is kept though its row is invalid", check_constraint_checks="ON"),
    # In a time zone with summer time, NOW() as a number goes back an hour in autumn.
    **_said("leases, stamps and lags are off by hours", time_zone="'+00:00'"),
    "timestamp": Stated(value="DEFAULT", shown=None, breaks="NOW() stands still, and no lease ever ends"),
    **_said(
        "numbers, order or groups of an answer differ",
        sql_auto_is_null="OFF",
        div_precision_increment="4",
        max_sort_length="1024",
        group_concat_max_len="1048576",
        information_schema_stats_expiry="0",
        lc_messages="'en_US'",
        big_tables="OFF",
    ),
    # MySQL and MariaDB stop looking at an index for a list whose ranges need more than this; 0 is no bound. Not the default.
    **_said(
        _PLANS,
        range_optimizer_max_mem_size="0",
        optimizer_max_sel_arg_weight="0",
        eq_range_index_dive_limit="200",
        in_predicate_conversion_threshold="1000",
        optimizer_use_condition_selectivity="4",
    ),
    # `default` would be the server's. These are the flags that all three servers have on.
    "optimizer_switch": Stated(
        value="'index_merge=on,index_condition_pushdown=on,derived_merge=on,materialization=on,semijoin=on,"
        "firstmatch=on,loosescan=on'",
        shown=None,
        breaks=_PLANS,
    ),
}

# Before anything is read: with these inherited, even the question below ends early. Each family reads its own comment.
_FIRST = (
    f"SET SESSION sql_select_limit = {_NO_LIMIT}, sql_safe_updates = OFF, max_join_size = {_NO_LIMIT}, sql_big_selects = ON "
    "/*M! , max_statement_time = 0 */ /*!80000 , max_execution_time = 0 */"
)
_ASK = "SHOW SESSION VARIABLES"
_UNKNOWN, _UNSETTABLE = 1193, {1193, 1227, 1228, 1229, 1231, 1232, 1238, 1290}


class Session:
    """The one SET statement of a server's connections, learnt from its first one: only what that server has and allows.

    What a user may not set stays out, and the preflight says so where its value is another.
    """

    def __init__(self, extra: Mapping[str, str]) -> None:
        self._wanted = {name: stated.value for name, stated in STATED.items()} | dict(extra)
        self._required = set(extra)
        self._statement = ""

    def state(self, connection: Any) -> None:
        """Says it on a new connection of the driver. Raises the driver's errors."""
        if self._statement:
            try:
                connection.query(self._statement)
                return
            except connection.Error as error:
                # Behind a failover or a balancer stands another version: learn again.
                if error.args[0] not in _UNSETTABLE:
                    raise
        self._statement = self._learn(connection)

    def _learn(self, connection: Any) -> str:
        connection.query(_FIRST)
        with connection.cursor() as cursor:
            cursor.execute(_ASK)
            there = {str(row[0]).lower() for row in cursor.fetchall()}
        wanted = {name: value for name, value in self._wanted.items() if name in there or name in self._required}
        try:
            connection.query(_set(wanted))
        except connection.Error as error:
            if error.args[0] not in _UNSETTABLE:
                raise
            wanted = self._allowed(connection, wanted)
        return _set(wanted)

    def _allowed(self, connection: Any, wanted: Mapping[str, str]) -> dict[str, str]:
        """Says one at a time, for a server that refuses some. What the URL asks for has to be said."""
        allowed = {}
        for name, value in wanted.items():
            try:
                connection.query(_set({name: value}))
                allowed[name] = value
            except connection.Error as error:
                if error.args[0] not in _UNSETTABLE or name in self._required:
                    raise
        return allowed


def _set(values: Mapping[str, str]) -> str:
    return "SET SESSION " + ", ".join(f"{name} = {value}" for name, value in values.items())


def deviations(variables: Mapping[str, str]) -> list[tuple[str, str, Stated]]:
    """What a session of ours has otherwise than it was stated: name, value found, and what was stated."""
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
