"""The table's TTL: what is past it, what is not, and that the sweep never deletes a last copy because a TTL was misread."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.reconcile import Report, reconcile
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import Sweep, sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

pytestmark = pytest.mark.clickhouse_sensitive

BY = Actor(who="auditor", why="a test")
ROWS = 6
AT = "toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC'))"
Prompt = Callable[..., Result]


def exported(stack: Stack, days_ago: int) -> None:
    """Six events of 2023, exported and verified some days ago by the ledger's account."""
    event = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "event": "a.b"}
    stack.put(*(("ws_1", f"evt_{n}", json.dumps({**event, "event_id": f"evt_{n}"})) for n in range(ROWS)))
    drain(stack.outbox, stack.log, Limits(), owner="drain")
    move(stack, days_ago)


def move(stack: Stack, days: int) -> None:
    """Moves the ledger's only batch into the past; ClickHouse's entries stay where they are."""
    ((batch_id, manifest),) = stack.sql("SELECT batch_id, manifest FROM clickhouse_outbox_batch WHERE batch_id > 0")
    blocks = json.loads(str(manifest))
    for block in blocks:
        block["at"] -= days * DAY_MS
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET manifest = :manifest, observed = NULL, state = 'verified', "
        "inserted_at_ms = inserted_at_ms - :ms WHERE batch_id = :id",
        manifest=json.dumps(blocks, separators=(",", ":")),
        ms=days * DAY_MS,
        id=batch_id,
    )


def set_ttl(stack: Stack, ttl: str) -> None:
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 {f'MODIFY TTL {ttl}' if ttl else 'REMOVE TTL'}", settings={"alter_sync": 2}
    )


def empty_clickhouse(stack: Stack) -> None:
    stack.clickhouse("TRUNCATE TABLE audit_logs_raw_v1")


def look(stack: Stack) -> Report:
    return reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62)


def swept(stack: Stack) -> Sweep:
    return sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=0), BY)


def in_outbox(stack: Stack) -> int:
    return int(str(stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n))


def of(found: Report) -> tuple[int, int]:
    """(missing, past the TTL)."""
    return found.found.missing, found.explained.get("past the TTL", 0)


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
def test_a_ttl_means_what_clickhouse_makes_of_it(stack: Stack, ttl: str, days_ago: int, means: tuple[int, int]) -> None:
    """The sweep deletes the outbox's copies of what is past the TTL, so a TTL that is misread loses events."""
    exported(stack, days_ago)
    set_ttl(stack, ttl)
    empty_clickhouse(stack)
    seen = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62, dry_run=True)
    assert of(seen) == means
    swept(stack)
    assert in_outbox(stack) == (0 if means == PAST else ROWS)
    assert look(stack).clean is (means == PAST)


def test_an_emptied_clickhouse_costs_no_outbox_row_before_the_ttl(stack: Stack) -> None:
    """The outbox has the last copy, and a repair brings all of it back."""
    exported(stack, 20)
    set_ttl(stack, f"{AT} + INTERVAL 90 DAY, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))")
    empty_clickhouse(stack)
    assert of(look(stack)) == LOST
    assert swept(stack).rows == 0
    assert in_outbox(stack) == ROWS
    reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62, repair=BY)
    drain(stack.outbox, stack.log, Limits(), owner="again")
    assert stack.counts() == (ROWS, ROWS)
    assert look(stack).clean
    assert swept(stack).rows == ROWS


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    return lambda *words: CliRunner().invoke(main, list(words), catch_exceptions=False)


def test_where_the_ttl_is_unknown_rows_stay_until_an_operator_says_how_long(prompt: Prompt, stack: Stack) -> None:
    """Whoever cannot tell a loss from retention asks a person, prints what to type, and keeps the answer on record."""
    exported(stack, 20)
    set_ttl(stack, f"{AT} + INTERVAL 7 DAY DELETE WHERE event != 'x'")
    empty_clickhouse(stack)
    kept = prompt("sweep", "--outbox-days", "0")
    assert (in_outbox(stack), kept.exit_code) == (ROWS, 1)
    assert "auditexport sweep --ttl-days DAYS" in kept.output
    told = prompt("sweep", "--outbox-days", "0", "--ttl-days", "7", "--dry-run")
    assert (told.exit_code, in_outbox(stack)) == (0, ROWS)
    assert "would sweep 6 rows" in told.output
    released = prompt("sweep", "--outbox-days", "0", "--ttl-days", "7", "--who", "ada")
    assert (released.exit_code, in_outbox(stack)) == (0, 0)
    declared = stack.sql("SELECT who, selection FROM clickhouse_outbox_action WHERE verb = 'ttl' ORDER BY action_id")
    assert [row.who for row in declared] == ["ada"]
    assert json.loads(str(declared[0].selection))["days"] == 7
    assert look(stack).clean, "what was swept rightly is not missing afterwards"


def test_a_declaration_releases_nothing_that_is_younger(prompt: Prompt, stack: Stack) -> None:
    """Thirty days are not over after twenty: then it is a loss, by name."""
    exported(stack, 20)
    set_ttl(stack, f"{AT} + INTERVAL 7 DAY DELETE WHERE event != 'x'")
    empty_clickhouse(stack)
    refused = prompt("sweep", "--outbox-days", "0", "--ttl-days", "30")
    assert (refused.exit_code, in_outbox(stack)) == (1, ROWS)
    assert "ClickHouse no longer holds it (6 missing)" in refused.output


def test_a_declared_ttl_counts_until_the_clause_reads_otherwise(prompt: Prompt, stack: Stack) -> None:
    """An answer belongs to the clause that it was given for, and reconciliation goes by it as well."""
    exported(stack, 20)
    set_ttl(stack, f"{AT} + INTERVAL 7 DAY DELETE WHERE event != 'x'")
    empty_clickhouse(stack)
    found = prompt("reconcile", "--days", "40", "--json")
    assert (json.loads(found.output)["missing"], found.exit_code) == (ROWS, 1)
    assert "auditexport sweep --ttl-days DAYS" in prompt("reconcile", "--days", "40").output
    prompt("sweep", "--outbox-days", "3000", "--ledger-days", "3000", "--ttl-days", "7")
    set_ttl(stack, f"{AT} + INTERVAL 8 DAY DELETE WHERE event != 'x'")
    assert of(look(stack)) == LOST
    set_ttl(stack, f"{AT} + INTERVAL 7 DAY DELETE WHERE event != 'x'")
    assert of(look(stack)) == PAST


def test_a_requeue_goes_by_the_ttl_as_clickhouse_evaluates_it(stack: Stack) -> None:
    """Rows past the TTL are left alone, because ClickHouse would drop them; rows that are not are exported."""
    exported(stack, 20)
    wanted = RowFilter(workspace_id="ws_1")
    set_ttl(stack, f"{AT} + INTERVAL 3 WEEK")  # less than a day is left of it
    assert requeue(stack.outbox, stack.upkeep, stack.log, wanted, BY, dry_run=True).expired_rows == ROWS
    set_ttl(stack, f"{AT} + INTERVAL 5 WEEK, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))")
    assert requeue(stack.outbox, stack.upkeep, stack.log, wanted, BY, dry_run=True).rows == ROWS
    set_ttl(stack, f"{AT} + toIntervalHour(24)")
    assert requeue(stack.outbox, stack.upkeep, stack.log, wanted, BY, dry_run=True).expired_rows == ROWS


@pytest.mark.parametrize(
    ("ttl", "says"),
    [
        (f"{AT} + INTERVAL 90 DAY, {AT} + INTERVAL 7 DAY RECOMPRESS CODEC(ZSTD(9))", []),
        (f"{AT} + INTERVAL 6 MONTH", []),
        (f"{AT} + INTERVAL 3 DAY", ["3 days"]),
        (f"{AT} + INTERVAL 90 DAY DELETE WHERE event = 'x'", ["cannot always be told"]),
        (f"{AT} + INTERVAL 90 DAY GROUP BY workspace_id SET description = any(description)", ["cannot always be told"]),
    ],
)
def test_doctor_reads_the_same_ttl(stack: Stack, ttl: str, says: list[str]) -> None:
    """One reader of the clause: what doctor shows is what the sweep goes by."""
    before = preflight.check(stack.outbox, stack.log)  # an old server has a finding of its own
    set_ttl(stack, ttl)
    found = [finding for finding in preflight.check(stack.outbox, stack.log) if finding not in before]
    assert len(found) == len(says)
    assert all(text in finding.what for text, finding in zip(says, found, strict=True))
