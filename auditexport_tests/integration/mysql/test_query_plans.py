"""Query plans: no statement reads more as the tables grow.

What belongs here: EXPLAIN of the statements in the `.sql` files, on tables of which nearly everything is history. What
does not: how long they take (`benchmarks`).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.mysql import actions, ledger, maintenance, status, totals
from auditexport_pipeline.mysql.marking import over
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.statements import SQL
from auditexport_pipeline.report import figures as report
from auditexport_tests.conftest import fresh_stack

pytestmark = pytest.mark.mysql_sensitive

EXPORTED, PENDING, LEDGER = 32_768, 400, 1_024


class Step(NamedTuple):
    """One line of EXPLAIN."""

    table: str
    access: str
    key: str
    rows: int
    extra: str


@pytest.fixture(scope="module")
def busy(mysql_server: str, clickhouse_server: str) -> Iterator[MySQLOutbox]:
    """An outbox of 33,000 rows, 400 of them pending, some dead; a ledger of a thousand closed batches and four open."""
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        fill(stack.outbox)
        yield stack.outbox


def fill(outbox: MySQLOutbox) -> None:
    with outbox.engine.begin() as connection:
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
        connection.exec_driver_sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = batch_id WHERE batch_id > 0")
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
            "SELECT batch_id, IF(MOD(batch_id, 2), 'sweep', 'retry'), 'ada', 'x', '{}', 0 FROM clickhouse_outbox_batch"
        )
    with outbox.engine.connect() as connection:
        for table in ("outbox", "outbox_batch", "outbox_dead_letter", "outbox_action"):
            list(connection.exec_driver_sql(f"ANALYZE TABLE clickhouse_{table}"))


def explain(
    outbox: MySQLOutbox, name: str, values: Mapping[str, object], statements: Mapping[str, sa.TextClause] = SQL
) -> list[Step]:
    """The plan's steps, without derived tables: a statement may sort what it makes of its own answer."""
    statement = sa.text(f"EXPLAIN FORMAT=TRADITIONAL {statements[name].text}")
    for parameter, value in values.items():
        if isinstance(value, list):
            statement = statement.bindparams(sa.bindparam(parameter, expanding=True))
    with outbox.engine.connect() as connection:
        rows = connection.execute(statement, values).mappings()
        return [
            Step(row["table"] or "", row["type"] or "", row["key"] or "", int(row["rows"] or 0), row["Extra"] or "")
            for row in rows
            if not (row["table"] or "").startswith("<")
        ]


PKS = list(range(20_000, 20_400, 2))
BETWEEN = {"first_pk": 20_000, "last_pk": 20_400}
V1 = {"version": "audit_log.v1"}
LIMITED = V1 | {"row_limit": 100}
MARKS = {"exported_at_ms": 1}
# Statements of a drain and of the sensor, by table: the index that each must use, and its parameters.
HOT: dict[str, dict[str, tuple[str, Mapping[str, object]]]] = {
    "clickhouse_outbox": {
        "candidates": ("drainer_pending_idx", LIMITED | {"from_pk": 0}),
        "count_pending": ("drainer_pending_idx", LIMITED),
        "versions_like": ("drainer_pending_idx", LIMITED),
        "pending_version_to_empty": ("drainer_pending_idx", {}),
        "next_pending_version": ("drainer_pending_idx", V1),
        "rows_between": ("PRIMARY", BETWEEN | V1 | {"most_bytes": 1_000}),
        "rows_in": ("PRIMARY", V1 | {"pks": PKS, "most_bytes": 1_000}),
        **{f"{kind}_between": ("PRIMARY", BETWEEN | MARKS) for kind in ("mark", "marked", "own")},
        **{f"{kind}_in": ("PRIMARY", MARKS | {"pks": PKS}) for kind in ("mark", "marked", "own")},
        **{f"{kind}_between": ("PRIMARY", BETWEEN) for kind in ("lock", "stamps")},
        **{f"{kind}_in": ("PRIMARY", {"pks": PKS}) for kind in ("lock", "stamps")},
    },
    "outbox": {
        "candidates_beside_letters": ("drainer_pending_idx", LIMITED | {"from_pk": 0}),
        "oldest_pending": ("drainer_pending_idx", LIMITED),
        "count_beside_letters": ("drainer_pending_idx", LIMITED),
    },
    "clickhouse_outbox_batch": {
        "fence": ("PRIMARY", {"batch_id": 700}),
        "fence_shared": ("PRIMARY", {"batch_id": 700}),
        "leased": ("state_idx", {"epoch": 1_022, "claim_key": ""}),
        "renew": ("PRIMARY", {"epoch": 1_022, "claim_key": "", "lease_ms": 1, "batch_ids": [1_021, 1_022]}),
        "open_batches": ("state_idx", {}),
        "states": ("state_idx", {}),
        "in_state": ("state_idx", {"state": "archiving"}),
        "batch_holders": ("state_idx", {}),
        "claimed_since": ("PRIMARY", {"after_id": 1_020, "owner": "somebody"}),
        "discrepant_since": ("state_idx", {"since_ms": 1}),
        "unverified": ("state_idx", {"row_limit": 10}),
        "sent_over": ("last_pk_idx", {"first_pk": 30_500, "last_pk": 40_000}),
    },
    "clickhouse_outbox_dead_letter": {"count_dead": ("letter_version_idx", {})},
}
# Some batches (open, overlapping, due for a sweep or of a window), found by an index that cannot also give their order.
MAY_SORT = {"open_batches", "batch_holders", "sent_over", "sweepable", "inserted_between"}


def test_hot_statements_use_their_index_and_read_no_history(busy: MySQLOutbox) -> None:
    """With another plan, every claim would read the whole outbox, and only in production."""
    wrong = []
    for table, statements in HOT.items():
        for name, (key, values) in statements.items():
            steps = explain(busy, name, values)
            (step,) = [step for step in steps if step.table == table]
            scans = any(other.access in ("ALL", "index") for other in steps)
            sorts = any("filesort" in other.extra or "temporary" in other.extra for other in steps)
            # Only rows of the answer, or of the pending part, are read.
            if step.key != key or scans or (sorts and name not in MAY_SORT) or step.rows > 2 * (PENDING + 100):
                wrong.append(f"{name}: {steps}")
    assert not wrong, "\n".join(wrong)


def test_few_runs_are_marked_by_one_statement_that_reads_nothing_between_them(busy: MySQLOutbox) -> None:
    """A statement for each run of pks would be a round trip for each."""
    pks = PkSet.of(pk for first in range(2_000, 30_000, 4_000) for pk in range(first, first + 10))
    for kind, values in (("mark", MARKS), ("marked", MARKS), ("lock", {}), ("stamps", {})):
        ((statement, ranges),) = over(kind, pks)
        (step,) = explain(busy, kind, values | ranges, {kind: statement})
        assert (step.key, step.access) == ("PRIMARY", "range")
        assert step.rows <= 2 * len(pks)
        assert "filesort" not in step.extra


def test_a_dead_letter_is_looked_up_by_its_pk(busy: MySQLOutbox) -> None:
    """Joined in the other order, every claim would begin with all dead letters ever."""
    for name, (_, values) in HOT["outbox"].items():
        steps = explain(busy, name, values)
        (letter,) = [step for step in steps if step.table in ("letter", "clickhouse_outbox_dead_letter")]
        assert (letter.key, letter.access) == ("PRIMARY", "eq_ref"), steps


def test_of_the_letters_that_hold_rows_only_both_ends_are_read(busy: MySQLOutbox) -> None:
    """Every plan reads them, and a flood leaves a million."""
    steps = explain(busy, "holding_letters", {})
    assert not [step for step in steps if step.table == "clickhouse_outbox_dead_letter"], steps
    # States without dead letters need no row either.
    ends = sorted(step.extra for step in steps if not step.table)
    assert ends[:3] == [*["No matching min/max row"] * 2, "Select tables optimized away"], steps


def test_the_probe_of_the_backlog_reads_only_the_index(busy: MySQLOutbox) -> None:
    """The sensor reads it every few seconds; by the table it would read all payloads."""
    for name in ("count_pending", "versions_like", "pending_version_to_empty", "next_pending_version"):
        steps = explain(busy, name, HOT["clickhouse_outbox"][name][1])
        (step,) = [step for step in steps if step.table == "clickhouse_outbox"]
        assert "Using index" in step.extra, steps


WINDOW = {"from_ms": 900, "to_ms": 950}
MARKED = {"any_event": 1, "event_ids": [""], "from_event_ms": None, "to_event_ms": None, "workspace_id": "ws"}
HOURS = {"low_ms": 0, "high_ms": 9, "step_ms": 1}
# Statements of one table, by what they are for.
COLD: dict[str, tuple[Mapping[str, sa.TextClause], dict[str, tuple[str, Mapping[str, object]]]]] = {
    "maintenance": (
        maintenance.SQL,
        {
            "sweepable": ("sweep_idx", {"before_ms": 1, "after_id": 0, "row_limit": 50}),
            "held_back": ("sweep_idx", {"before_ms": 1}),
            "inserted_between": ("inserted_idx", WINDOW | {"after_id": 0, "row_limit": 100}),
            "held_between": ("last_pk_idx", {"first_pk": 30_500, "last_pk": 40_000}),
            "count_stamped": ("drainer_pending_idx", {"stamp_ms": 5}),
            "marked_between": ("PRIMARY", BETWEEN | MARKED),
            "unmark_between": ("PRIMARY", BETWEEN),
            "unmark_in": ("PRIMARY", {"pks": PKS}),
            "delete_between": ("PRIMARY", BETWEEN | {"before_ms": 1}),
            "delete_in": ("PRIMARY", {"pks": PKS, "before_ms": 1}),
        },
    ),
    "status": (
        status.SQL | actions.SQL,
        {
            "open_batches": ("state_idx", {"row_limit": 200}),
            "last_batches": ("PRIMARY", {"row_limit": 100}),
            "exported_since": ("exported_idx", {"from_ms": 5, "row_limit": 100}),
            "last_exported": ("exported_idx", {}),
            "first_claimed": ("PRIMARY", {}),
            "not_swept": ("sweep_idx", {"state": "verified", "row_limit": 1}),
            "discrepant": ("state_idx", {"row_limit": 200}),
            "last_of_verb": ("verb_idx", {"verb": "sweep", "row_limit": 50}),
        },
    ),
    "batches": (
        ledger.SQL,
        {
            "page": ("PRIMARY", {"before_id": 900, "row_limit": 20}),
            "page_in_state": ("state_idx", {"state": "verified", "before_id": 900, "row_limit": 20}),
            "one": ("PRIMARY", {"batch_id": 700}),
        },
    ),
    "metrics": (
        totals.SQL,
        {
            "first_open": ("state_idx", {}),
            "totals": ("PRIMARY", {"after_id": 500, "to_id": 600, "row_limit": 50}),
            "last_verified": ("exported_idx", {"row_limit": 50}),
        },
    ),
    "report": (
        report.SQL,
        {
            "blocks": ("inserted_idx", {"from_ms": 900, "before_ms": 950, "row_limit": 20}),
            "batches": ("inserted_idx", WINDOW | {"row_limit": 20}),
            "hours_between": ("PRIMARY", HOURS | {"first_pk": 100, "last_pk": 200}),
            "hours_in": ("PRIMARY", HOURS | {"pks": [5, 9, 300]}),
        },
    ),
}


@pytest.mark.parametrize("purpose", COLD)
def test_other_statements_use_their_index_and_sort_no_history(busy: MySQLOutbox, purpose: str) -> None:
    """Status, metrics and pages are read every few seconds; a sweep must not lock rows that it only reads."""
    statements, plans = COLD[purpose]
    wrong = []
    for name, (key, values) in plans.items():
        steps = explain(busy, name, values, statements)
        step = steps[0]
        # In the order of the index and by a limit, only the rows of the answer are read, whatever EXPLAIN estimates.
        in_order = "LIMIT" in statements[name].text and "ORDER BY" in statements[name].text
        sorts = "filesort" in step.extra and name not in MAY_SORT and not name.startswith("hours_")
        scans = step.access == "ALL" or (step.access == "index" and not in_order)
        if step.key != key or scans or sorts:
            wrong.append(f"{name}: {steps}")
    assert not wrong, "\n".join(wrong)


def test_a_page_reads_the_window_that_it_shows_and_not_the_outbox(busy: MySQLOutbox) -> None:
    """The outbox has no index on a time: a page of one hour must not read a year of rows."""
    lag = explain(busy, "lag", WINDOW | {"step_ms": 1, "longest_ms": 1, "ahead_ms": 1}, report.SQL)
    assert [(step.table, step.key, step.access) for step in lag] == [
        ("batch", "exported_idx", "range"),
        ("outbox", "PRIMARY", "eq_ref"),
    ], lag
    letters = explain(busy, "letters", {"row_limit": 20}, report.SQL)
    (step,) = [step for step in letters if step.table == "clickhouse_outbox_dead_letter"]
    assert (step.key, step.access) == ("PRIMARY", "index"), step  # backwards, until the limit
    assert "filesort" not in step.extra, step
