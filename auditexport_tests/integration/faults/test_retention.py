"""The table's TTL: what is past it, what is not, and that the sweep never deletes a last copy because a TTL was misread."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.core.reconcile import Report
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.builders import run, small_event
from auditexport_tests.support.maintenance import (
    BY,
    batch_states,
    move_back,
    outbox_rows,
    reconciled,
    requeued,
    swept,
)
from auditexport_tests.support.prompts import Prompt, prompt_in, urls

pytestmark = pytest.mark.clickhouse_sensitive

ROWS = 6
AT = "toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC'))"
UNKNOWN_TTL = f"{AT} + INTERVAL 7 DAY DELETE WHERE event != 'x'"


def export_and_empty(stack: Stack) -> None:
    """Six events of 2023, exported and verified; then ClickHouse loses them."""
    stack.put(*(small_event(f"evt_{n}", time=1_700_000_000_000) for n in range(ROWS)))
    run(stack)
    stack.clickhouse("TRUNCATE TABLE audit_logs_raw_v1")


@pytest.fixture
def emptied(stack: Stack) -> Stack:
    """Six events that were exported 20 days ago, and that ClickHouse lost."""
    export_and_empty(stack)
    move_back(stack, 20)
    return stack


@pytest.fixture(scope="module")
def shared(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """As `emptied`, exported today, for tests that change nothing but the TTL and the ledger's times."""
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        export_and_empty(stack)
        yield stack


def set_ttl(stack: Stack, ttl: str) -> None:
    """Sets the table's TTL, or removes it."""
    has_ttl = "TTL" in str(stack.clickhouse("SHOW CREATE TABLE audit_logs_raw_v1")[0][0])
    if ttl or has_ttl:
        stack.log.client().command(
            f"ALTER TABLE audit_logs_raw_v1 {f'MODIFY TTL {ttl}' if ttl else 'REMOVE TTL'}", settings={"alter_sync": 2}
        )


def missing_and_expired(report: Report) -> tuple[int, int]:
    return report.found.missing, report.explained["past the TTL"]


LOST, PAST = (ROWS, 0), (0, ROWS)


@pytest.mark.parametrize(
    ("ttl", "days_ago", "means"),
    [
        (f"{AT} + INTERVAL 90 DAY, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY TO DISK 'default', {AT} + INTERVAL 90 DAY", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY DELETE WHERE event = 'x', {AT} + INTERVAL 90 DAY", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY DELETE WHERE event = ', TTL y + toIntervalDay(1)'", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY GROUP BY workspace_id SET description = any(description)", 20, LOST),
        (f"{AT} + INTERVAL 7 DAY + INTERVAL 83 DAY", 20, LOST),
        (f"if(event = 'x', {AT}, {AT} + INTERVAL 90 DAY) + INTERVAL 7 DAY", 20, LOST),
        ("", 1_000, LOST),
        (f"{AT} + INTERVAL 3 MONTH", 20, LOST),
        (f"{AT} + INTERVAL 3 MONTH", 95, PAST),
        (f"{AT} + INTERVAL 1 YEAR", 370, PAST),
        (f"{AT} + toIntervalHour(240)", 11, PAST),
        (f"toDate({AT}) + 30", 32, PAST),
        (f"toStartOfMonth({AT}) + INTERVAL 2 MONTH", 100, PAST),
        (f"{AT} + INTERVAL 30 DAY, {AT} + INTERVAL 90 DAY RECOMPRESS CODEC(ZSTD(9))", 31, PAST),
        ("toDateTime(intDiv(time, 1000)) + INTERVAL 30 DAY", 20, PAST),
        (f"{AT} + INTERVAL 7 DAY DELETE WHERE workspace_id = 'ws_1'", 20, PAST),
    ],
)
def test_a_ttl_means_what_clickhouse_makes_of_it(
    shared: Stack, ttl: str, days_ago: int, means: tuple[int, int]
) -> None:
    """The sweep deletes the outbox's copies of what is past the TTL, so a TTL that is misread loses events."""
    set_ttl(shared, ttl)
    move_back(shared, days_ago)
    try:
        assert missing_and_expired(reconciled(shared, dry_run=True)) == means
        swept_rows = swept(shared, outbox_days=0, ledger_days=3_000, dry_run=True).rows
        assert swept_rows == (ROWS if means == PAST else 0)
    finally:
        move_back(shared, -days_ago)
    assert batch_states(shared) == ["verified"]


def test_an_emptied_clickhouse_costs_no_outbox_row_before_the_ttl(emptied: Stack) -> None:
    """The outbox has the last copy, and a repair brings all of it back."""
    set_ttl(emptied, f"{AT} + INTERVAL 90 DAY, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))")
    assert missing_and_expired(reconciled(emptied)) == LOST
    assert swept(emptied, outbox_days=0).rows == 0
    assert outbox_rows(emptied) == ROWS
    reconciled(emptied, repair=BY)
    run(emptied)
    assert emptied.counts() == (ROWS, ROWS)
    assert reconciled(emptied).clean
    assert swept(emptied, outbox_days=0).rows == ROWS


@pytest.fixture
def prompt(emptied: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    set_ttl(emptied, UNKNOWN_TTL)
    return prompt_in(urls(emptied), monkeypatch)


def test_where_the_ttl_is_unknown_rows_stay_until_it_is_declared(prompt: Prompt, emptied: Stack) -> None:
    """A sweep that cannot tell a loss from retention asks an operator, prints what to type, and records the answer."""
    left = prompt("sweep", "--outbox-days", "0", status=1)
    assert outbox_rows(emptied) == ROWS
    assert "auditexport sweep --ttl-days DAYS" in left.output
    young = prompt("sweep", "--outbox-days", "0", "--ttl-days", "30", "--dry-run", status=1)
    assert "ClickHouse no longer holds it (6 missing)" in young.output, "thirty days are not over after twenty"
    announced = prompt("sweep", "--outbox-days", "0", "--ttl-days", "7", "--dry-run")
    assert outbox_rows(emptied) == ROWS
    assert "would sweep 6 rows" in announced.output
    prompt("sweep", "--outbox-days", "0", "--ttl-days", "7", "--who", "ada")
    assert outbox_rows(emptied) == 0
    (declared,) = emptied.sql("SELECT who, selection FROM clickhouse_outbox_action WHERE verb = 'ttl'")
    assert (declared.who, json.loads(str(declared.selection))["days"]) == ("ada", 7)
    assert reconciled(emptied).clean, "what was swept rightly is not missing afterwards"


def test_a_declared_ttl_is_valid_until_the_clause_changes(prompt: Prompt, emptied: Stack) -> None:
    """An answer belongs to the clause that it was given for; reconciliation uses it too."""
    found = prompt("reconcile", "--days", "40", "--json", status=1)
    assert json.loads(found.output)["missing"] == ROWS
    assert "auditexport sweep --ttl-days DAYS" in prompt("reconcile", "--days", "40", status=1).output
    prompt("sweep", "--outbox-days", "3000", "--ledger-days", "3000", "--ttl-days", "7")
    set_ttl(emptied, f"{AT} + INTERVAL 8 DAY DELETE WHERE event != 'x'")
    assert missing_and_expired(reconciled(emptied)) == LOST
    set_ttl(emptied, UNKNOWN_TTL)
    assert missing_and_expired(reconciled(emptied)) == PAST


def test_a_requeue_leaves_rows_alone_that_the_ttl_would_soon_delete(emptied: Stack) -> None:
    """A requeued entry keeps its inserted_at; ClickHouse would drop it before anybody reads it."""
    for ttl, expired in (
        (f"{AT} + INTERVAL 3 WEEK", ROWS),  # less than a day is left of it
        (f"{AT} + INTERVAL 5 WEEK, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))", 0),
        (f"{AT} + toIntervalHour(24)", ROWS),
    ):
        set_ttl(emptied, ttl)
        found = requeued(emptied, workspace_id="ws_1", dry_run=True)
        assert (found.expired_rows, found.rows) == (expired, ROWS - expired), ttl


def test_doctor_reads_the_same_ttl(shared: Stack) -> None:
    """What doctor shows is what the sweep uses."""
    cases = (
        (f"{AT} + INTERVAL 90 DAY, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))", []),
        (f"{AT} + INTERVAL 6 MONTH", []),
        (f"{AT} + INTERVAL 3 DAY", ["3 days"]),
        (f"{AT} + INTERVAL 90 DAY DELETE WHERE event = 'x'", ["cannot always be told"]),
        (f"{AT} + INTERVAL 90 DAY GROUP BY workspace_id SET description = any(description)", ["cannot always be told"]),
    )
    set_ttl(shared, f"{AT} + INTERVAL 90 DAY")
    before = preflight.check(shared.outbox, shared.log)  # an old server has a finding of its own
    for ttl, says in cases:
        set_ttl(shared, ttl)
        found = [finding for finding in preflight.check(shared.outbox, shared.log) if finding not in before]
        assert len(found) == len(says), ttl
        assert all(text in finding.what for text, finding in zip(says, found, strict=True)), ttl
