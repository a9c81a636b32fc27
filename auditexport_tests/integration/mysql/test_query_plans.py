"""Query plans: the statements that run often touch what they need and nothing that grows with the tables.

What belongs here: EXPLAIN of the statements in `mysql/outbox.sql`, as they stand there, on tables of which
nearly everything is history. What does not: how long they take (`benchmarks`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.mysql import actions, ledger, status, totals
from auditexport_pipeline.mysql import maintenance as upkeep
from auditexport_pipeline.mysql.marking import over
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import SQL
from auditexport_pipeline.report import figures as report
from auditexport_tests.conftest import Stack

pytestmark = pytest.mark.mysql_sensitive

EXPORTED, PENDING, LEDGER = 32_768, 400, 1_024


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One line of EXPLAIN."""

    table: str
    access: str
    key: str
    rows: int
    extra: str


@pytest.fixture
def busy(stack: Stack) -> MySQLOutbox:
    """An outbox of 33,000 rows, 400 of them pending, some dead; a ledger of a thousand closed batches and four open."""
    with stack.outbox.engine.begin() as connection:
        columns = "version, workspace_id, event_id, payload, created_at"
        connection.exec_driver_sql(
            f"INSERT INTO clickhouse_outbox ({columns}, deleted_at) VALUES ('audit_log.v1', 'ws', 'evt', '{{}}', 1, 1)"
        )
        for _ in range(EXPORTED.bit_length() - 1):
            connection.exec_driver_sql(
                f"INSERT INTO clickhouse_outbox ({columns}, deleted_at) "
                f"SELECT {columns}, deleted_at + 1 FROM clickhouse_outbox"
            )
        for version, rows in (("audit_log.v1", PENDING), ("audit_log.v9", 50)):
            connection.exec_driver_sql(
                f"INSERT INTO clickhouse_outbox ({columns}) SELECT '{version}', workspace_id, event_id, payload, "
                f"created_at FROM clickhouse_outbox LIMIT {rows}"
            )
        connection.exec_driver_sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN (17, 1900)")
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox_dead_letter SELECT pk, IF(MOD(pk, 2), 'open', 'retried'), version, workspace_id, "
            "event_id, 'wrong_type', '$', '', 1, 1, 1, NULL FROM clickhouse_outbox WHERE deleted_at IS NULL LIMIT 40"
        )
        connection.execute(
            sa.text(SQL["add_batch"].text.replace("'claimed'", ":state")),
            [
                {
                    "batch_id": number,
                    "epoch": number,
                    "generation": 0,
                    "version": "audit_log.v1",
                    "state": "verified" if number < 1_010 else "exported" if number < LEDGER - 4 else "sealed",
                    "owner": "somebody",
                    "claim_key": "",
                    "process": "",
                    "lease_ms": 0,
                    "rows": 30,
                    "bytes": 1,
                    "first_pk": number * 30,
                    "last_pk": number * 30 + 29,
                    "pks": "1-30",
                    "manifest": "[]",
                    "inserted_at_ms": number,
                }
                for number in range(1, LEDGER)
            ],
        )
    with stack.outbox.engine.connect() as connection:
        for table in ("clickhouse_outbox", "clickhouse_outbox_batch", "clickhouse_outbox_dead_letter"):
            list(connection.exec_driver_sql(f"ANALYZE TABLE {table}"))
    return stack.outbox


def explain(
    outbox: MySQLOutbox, name: str, values: dict[str, object], statements: Mapping[str, sa.TextClause] = SQL
) -> list[Step]:
    statement = sa.text(f"EXPLAIN FORMAT=TRADITIONAL {statements[name].text}")
    for parameter, value in values.items():
        if isinstance(value, list):
            statement = statement.bindparams(sa.bindparam(parameter, expanding=True))
    with outbox.engine.connect() as connection:
        return [
            Step(
                table=row["table"] or "",
                access=row["type"] or "",
                key=row["key"] or "",
                rows=int(row["rows"] or 0),
                extra=row["Extra"] or "",
            )
            for row in connection.execute(statement, values).mappings()
        ]


PKS = list(range(20_000, 20_400, 2))
STATEMENTS: dict[str, tuple[str, str, dict[str, object]]] = {
    "candidates": (
        "clickhouse_outbox",
        "drainer_pending_idx",
        {"version": "audit_log.v1", "from_pk": 0, "row_limit": 100},
    ),
    "candidates_beside_letters": (
        "outbox",
        "drainer_pending_idx",
        {"version": "audit_log.v1", "from_pk": 0, "row_limit": 100},
    ),
    "oldest_pending": ("outbox", "drainer_pending_idx", {"version": "audit_log.v1", "row_limit": 100}),
    "count_pending": ("clickhouse_outbox", "drainer_pending_idx", {"version": "audit_log.v1", "row_limit": 100}),
    "count_beside_letters": ("outbox", "drainer_pending_idx", {"version": "audit_log.v1", "row_limit": 100}),
    "versions_like": ("clickhouse_outbox", "drainer_pending_idx", {"version": "audit_log.v1", "row_limit": 100}),
    "pending_version_to_empty": ("clickhouse_outbox", "drainer_pending_idx", {}),
    "next_pending_version": ("clickhouse_outbox", "drainer_pending_idx", {"version": "audit_log.v1"}),
    "rows_between": (
        "clickhouse_outbox",
        "PRIMARY",
        {"first_pk": 20_000, "last_pk": 20_400, "most_bytes": 1_000, "version": "audit_log.v1"},
    ),
    "rows_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS, "most_bytes": 1_000, "version": "audit_log.v1"}),
    "mark_between": ("clickhouse_outbox", "PRIMARY", {"first_pk": 20_000, "last_pk": 20_400, "exported_at_ms": 1}),
    "mark_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS, "exported_at_ms": 1}),
    "marked_between": ("clickhouse_outbox", "PRIMARY", {"first_pk": 20_000, "last_pk": 20_400, "exported_at_ms": 1}),
    "own_between": ("clickhouse_outbox", "PRIMARY", {"first_pk": 20_000, "last_pk": 20_400, "exported_at_ms": 1}),
    "own_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS, "exported_at_ms": 1}),
    "marked_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS, "exported_at_ms": 1}),
    "lock_between": ("clickhouse_outbox", "PRIMARY", {"first_pk": 20_000, "last_pk": 20_400}),
    "lock_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS}),
    "stamps_between": ("clickhouse_outbox", "PRIMARY", {"first_pk": 20_000, "last_pk": 20_400}),
    "stamps_in": ("clickhouse_outbox", "PRIMARY", {"pks": PKS}),
    "fence": ("clickhouse_outbox_batch", "PRIMARY", {"batch_id": 700}),
    "fence_shared": ("clickhouse_outbox_batch", "PRIMARY", {"batch_id": 700}),
    "leased": ("clickhouse_outbox_batch", "state_idx", {"epoch": 1_022, "claim_key": ""}),
    "renew": (
        "clickhouse_outbox_batch",
        "PRIMARY",
        {"epoch": 1_022, "claim_key": "", "lease_ms": 1, "batch_ids": [1_021, 1_022]},
    ),
    "open_batches": ("clickhouse_outbox_batch", "state_idx", {}),
    "states": ("clickhouse_outbox_batch", "state_idx", {}),
    "in_state": ("clickhouse_outbox_batch", "state_idx", {"state": "archiving"}),
    "batch_holders": ("clickhouse_outbox_batch", "state_idx", {}),
    "claimed_since": ("clickhouse_outbox_batch", "PRIMARY", {"after_id": 1_020, "owner": "somebody"}),
    "discrepant_since": ("clickhouse_outbox_batch", "state_idx", {"since_ms": 1}),
    "unverified": ("clickhouse_outbox_batch", "state_idx", {"row_limit": 10}),
    "sent_over": ("clickhouse_outbox_batch", "last_pk_idx", {"first_pk": 30_500, "last_pk": 40_000}),
    "count_dead": ("clickhouse_outbox_dead_letter", "letter_version_idx", {}),
}
# A handful of open or overlapping batches, found by an index that cannot also give their order.
MAY_SORT = {"open_batches", "batch_holders", "sent_over"}


def test_hot_statements_use_their_index_and_read_no_history(busy: MySQLOutbox) -> None:
    """A plan that turns with the statistics reads the whole outbox at every claim, and only in production."""
    wrong = []
    for name, (table, key, values) in STATEMENTS.items():
        steps = explain(busy, name, values)
        (step,) = [step for step in steps if step.table == table]
        scanned = [other for other in steps if other.access in ("ALL", "index") and not other.table.startswith("<")]
        # What a statement makes of its own answer (a derived table) may be sorted; reading a table must not.
        reads = [other for other in steps if not other.table.startswith("<")]
        sorts = name not in MAY_SORT and any("filesort" in other.extra or "temporary" in other.extra for other in reads)
        # Single table, right index: only rows of the answer, or of the pending part, are looked at.
        if step.key != key or scanned or sorts or step.rows > 2 * (PENDING + 100):
            wrong.append(f"{name}: {steps}")
    assert not wrong, "\n".join(wrong)


def test_few_runs_are_marked_by_one_statement_that_reads_nothing_between_them(busy: MySQLOutbox) -> None:
    """A statement for each run would be a round trip for each."""
    pks = PkSet.of(pk for first in range(2_000, 30_000, 4_000) for pk in range(first, first + 10))
    for kind, values in (
        ("mark", {"exported_at_ms": 1}),
        ("marked", {"exported_at_ms": 1}),
        ("lock", {}),
        ("stamps", {}),
    ):
        ((statement, ranges),) = over(kind, pks)
        (step,) = explain(busy, kind, values | ranges, {kind: statement})
        assert (step.key, step.access) == ("PRIMARY", "range")
        assert step.rows <= 2 * len(pks)
        assert "filesort" not in step.extra


def test_a_dead_letter_is_looked_up_by_its_pk(busy: MySQLOutbox) -> None:
    """Joined the other way round, every claim would begin with all dead letters there ever were."""
    for name in ("candidates_beside_letters", "count_beside_letters", "oldest_pending"):
        steps = explain(busy, name, STATEMENTS[name][2])
        (letter,) = [step for step in steps if step.table in ("letter", "clickhouse_outbox_dead_letter")]
        assert (letter.key, letter.access) == ("PRIMARY", "eq_ref"), steps


def test_of_the_letters_that_hold_rows_only_both_ends_are_read(busy: MySQLOutbox) -> None:
    """Every plan asks for them, and a flood leaves a million."""
    steps = explain(busy, "holding_letters", {})
    assert not [step for step in steps if step.table == "clickhouse_outbox_dead_letter"], steps
    # Those of a state that nothing is in are answered as early.
    ends = sorted(step.extra for step in steps if not step.table)
    assert ends[:3] == [*["No matching min/max row"] * 2, "Select tables optimized away"], steps


def test_the_probe_of_the_backlog_reads_only_the_index(busy: MySQLOutbox) -> None:
    """The sensor asks every few seconds; with payloads in the way it would read them all."""
    for name in ("count_pending", "versions_like", "pending_version_to_empty", "next_pending_version"):
        steps = explain(busy, name, STATEMENTS[name][2])
        (step,) = [step for step in steps if step.table == "clickhouse_outbox"]
        assert "Using index" in step.extra, steps


UPKEEP: dict[str, tuple[str, dict[str, object]]] = {
    "sweepable": ("sweep_idx", {"before_ms": 1, "after_id": 0, "row_limit": 50}),
    "held_back": ("sweep_idx", {"before_ms": 1}),
    "inserted_between": ("inserted_idx", {"from_ms": 1_010, "to_ms": 1_020, "after_id": 0, "row_limit": 100}),
    "held_between": ("last_pk_idx", {"first_pk": 30_500, "last_pk": 40_000}),
    "count_stamped": ("drainer_pending_idx", {"stamp_ms": 5}),
    "marked_between": (
        "PRIMARY",
        {
            "first_pk": 20_000,
            "last_pk": 20_400,
            "workspace_id": "ws",
            "any_event": 1,
            "event_ids": [""],
            "from_event_ms": None,
            "to_event_ms": None,
        },
    ),
    "unmark_between": ("PRIMARY", {"first_pk": 20_000, "last_pk": 20_400}),
    "unmark_in": ("PRIMARY", {"pks": PKS}),
    "delete_between": ("PRIMARY", {"first_pk": 20_000, "last_pk": 20_400, "before_ms": 1}),
    "delete_in": ("PRIMARY", {"pks": PKS, "before_ms": 1}),
}


def test_upkeep_goes_by_pk_or_by_the_ledgers_indexes(busy: MySQLOutbox) -> None:
    """A sweep that went by `deleted_at` would lock what it only looks at; a look back must not read the whole ledger."""
    wrong = []
    for name, (key, values) in UPKEEP.items():
        (step,) = explain(busy, name, values, upkeep.SQL)
        if step.key != key or step.access in ("ALL", "index"):
            wrong.append(f"{name}: {step}")
    assert not wrong, "\n".join(wrong)


STATUS: dict[str, tuple[str, dict[str, object]]] = {
    "open_batches": ("state_idx", {"row_limit": 200}),
    "last_batches": ("PRIMARY", {"row_limit": 100}),
    "exported_since": ("exported_idx", {"from_ms": 5, "row_limit": 100}),
    "last_exported": ("exported_idx", {}),
    "first_claimed": ("PRIMARY", {}),
    "not_swept": ("sweep_idx", {"state": "verified", "row_limit": 1}),
    "discrepant": ("state_idx", {"row_limit": 200}),
    "last_of_verb": ("verb_idx", {"verb": "sweep", "row_limit": 50}),
}


def test_a_status_goes_by_indexes_and_sorts_no_history(busy: MySQLOutbox) -> None:
    """It is asked for every few seconds by whoever watches; a year of batches must not make it slow."""
    with busy.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = batch_id WHERE batch_id > 0")
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
            "SELECT batch_id, IF(MOD(batch_id, 2), 'sweep', 'retry'), 'ada', 'x', '{}', 0 FROM clickhouse_outbox_batch"
        )
    with busy.engine.connect() as connection:
        for table in ("clickhouse_outbox_batch", "clickhouse_outbox_action"):
            list(connection.exec_driver_sql(f"ANALYZE TABLE {table}"))
    wrong = []
    statements = {**status.SQL, "last_of_verb": actions.SQL["last_of_verb"]}
    for name, (key, values) in STATUS.items():
        (step,) = explain(busy, name, values, statements)
        sorts = name != "open_batches" and "filesort" in step.extra
        # In the order of the index and by a limit: what EXPLAIN estimates of the rest is never read.
        in_order = "LIMIT" in statements[name].text and "ORDER BY" in statements[name].text
        if step.key != key or step.access == "ALL" or sorts or not in_order:
            wrong.append(f"{name}: {step}")
    assert not wrong, "\n".join(wrong)


BATCHES: dict[str, tuple[str, dict[str, object]]] = {
    "page": ("PRIMARY", {"before_id": 900, "row_limit": 20}),
    "page_in_state": ("state_idx", {"state": "verified", "before_id": 900, "row_limit": 20}),
    "one": ("PRIMARY", {"batch_id": 700}),
}


def test_a_page_of_the_ledger_is_read_in_the_order_of_its_index(busy: MySQLOutbox) -> None:
    """Whoever looks for one batch among a year's must not have all of them sorted."""
    wrong = []
    for name, (key, values) in BATCHES.items():
        (step,) = explain(busy, name, values, ledger.SQL)
        if step.key != key or step.access == "ALL" or "filesort" in step.extra:
            wrong.append(f"{name}: {step}")
    assert not wrong, "\n".join(wrong)


TOTALS: dict[str, tuple[str, dict[str, object]]] = {
    "first_open": ("state_idx", {}),
    "totals": ("PRIMARY", {"after_id": 500, "to_id": 600, "row_limit": 50}),
    "last_verified": ("exported_idx", {"row_limit": 50}),
}


def test_the_totals_read_a_range_of_the_ledger_and_sort_nothing(busy: MySQLOutbox) -> None:
    """Metrics are asked for every few seconds, and remember what they have added up."""
    with busy.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = batch_id WHERE batch_id > 0")
    with busy.engine.connect() as connection:
        list(connection.exec_driver_sql("ANALYZE TABLE clickhouse_outbox_batch"))
    for name, (key, values) in TOTALS.items():
        steps = explain(busy, name, values, totals.SQL)
        (step,) = [step for step in steps if step.table == "clickhouse_outbox_batch"]
        assert (step.key, step.access) in ((key, "range"), (key, "index")), steps
        assert step.access == "range" or name == "last_verified", steps
        assert "filesort" not in step.extra, steps


REPORT: dict[str, tuple[str, dict[str, object]]] = {
    "blocks": ("inserted_idx", {"from_ms": 900, "before_ms": 950, "row_limit": 20}),
    "batches": ("inserted_idx", {"from_ms": 900, "to_ms": 950, "row_limit": 20}),
    "hours_between": ("PRIMARY", {"first_pk": 100, "last_pk": 200, "low_ms": 0, "high_ms": 9, "step_ms": 1}),
    "hours_in": ("PRIMARY", {"pks": [5, 9, 300], "low_ms": 0, "high_ms": 9, "step_ms": 1}),
}


def test_a_page_reads_the_window_that_it_shows_and_not_the_outbox(busy: MySQLOutbox) -> None:
    """The outbox has no index on a time: a page of one hour must not read a year of rows for it."""
    wrong = []
    for name, (key, values) in REPORT.items():
        (step,) = explain(busy, name, values, report.SQL)
        if step.key != key or step.access not in ("range", "ref"):
            wrong.append(f"{name}: {step}")
    assert not wrong, "\n".join(wrong)
    for name in ("blocks", "batches"):  # the newest first, by the index's own order
        (step,) = explain(busy, name, REPORT[name][1], report.SQL)
        assert "filesort" not in step.extra, step
    with busy.engine.begin() as connection:
        connection.exec_driver_sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = batch_id WHERE batch_id > 0")
        list(connection.exec_driver_sql("ANALYZE TABLE clickhouse_outbox_batch"))
    values = {"from_ms": 900, "to_ms": 950, "step_ms": 1, "longest_ms": 1, "ahead_ms": 1}
    lag = [step for step in explain(busy, "lag", values, report.SQL) if not step.table.startswith("<")]
    assert [(step.table, step.key, step.access) for step in lag] == [
        ("batch", "exported_idx", "range"),
        ("outbox", "PRIMARY", "eq_ref"),
    ], lag
    letters = explain(busy, "letters", {"row_limit": 20}, report.SQL)
    (step,) = [step for step in letters if step.table == "clickhouse_outbox_dead_letter"]
    assert (step.key, step.access) == ("PRIMARY", "index"), step  # backwards, until the limit
    assert "filesort" not in step.extra, step
    pending = explain(busy, "pending", {"version": "audit_log.v1", "row_limit": 50}, report.SQL)
    assert [step.key for step in pending] == ["drainer_pending_idx", "PRIMARY", "PRIMARY"], pending
    assert not any("filesort" in step.extra or step.access == "ALL" for step in pending), pending
