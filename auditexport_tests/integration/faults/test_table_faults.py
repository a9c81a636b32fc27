"""A table that refuses rows which parse: a column, constraint or index that somebody added to `audit_logs_raw_v1`.

The rows are sound, so none of them becomes a dead letter; they wait until the table's definition changes.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_tests.conftest import Stack
from auditexport_tests.support.prompts import started, urls
from auditexport_tests.support.waiting import wait_until

ROWS = 24
Drains = Callable[[], tuple[int, str]]
FAULTS = {
    "default": "ADD COLUMN n UInt32 DEFAULT toUInt32(description)",
    "materialized": "ADD COLUMN n UInt32 MATERIALIZED toUInt32(description)",
    "address": "ADD COLUMN address IPv4 DEFAULT toIPv4(remote_ip)",
    "throwIf": "ADD COLUMN n UInt8 MATERIALIZED throwIf(startsWith(description, 'word'), 'auditexport: no')",
    "constraint": "ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')",
    "projection": "ADD PROJECTION by_number (SELECT toUInt32(description) AS n, count() GROUP BY n)",
}


def put(stack: Stack, *, rows: int = ROWS, bad: set[int] | None = None, workspaces: int = 3, at: int = 0) -> None:
    """Events of several workspaces; `bad` have words where the others have a number."""
    events = []
    for number in range(at, at + rows):
        event = {
            "event_id": f"evt_{number}",
            "time": 1_700_000_000_000 + number,
            "workspace_id": f"ws_{number % workspaces}",
            "event": "key.create",
            "description": "words of a tenant" if bad is None or number in bad else str(number),
            "remote_ip": "elsewhere" if bad is None or number in bad else "10.0.0.1",
        }
        events.append((event["workspace_id"], event["event_id"], json.dumps(event)))
    stack.put(*events)  # type: ignore[arg-type]


def open_letters(stack: Stack) -> int:
    return len(stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state = 'open'"))


@pytest.fixture
def drains(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Drains:
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    preflight.forget()
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 MODIFY SETTING deduplicate_merge_projection_mode = 'drop'")

    def drain() -> tuple[int, str]:
        done = CliRunner().invoke(main, ["drain", "--once"], catch_exceptions=True)
        return done.exit_code, done.output

    return drain


# Some of them, where time is short: a value that does not fit, and an expression that fails.
QUICK = ("default", "throwIf")


@pytest.mark.parametrize(
    "fault", [pytest.param(name, marks=[pytest.mark.slow] * (name not in QUICK)) for name in FAULTS]
)
def test_a_table_that_refuses_every_row_sets_nothing_aside(stack: Stack, drains: Drains, fault: str) -> None:
    """All rows as dead letters, in a green run: the operator is told of broken rows, and the table is what is broken."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {FAULTS[fault]}")
    put(stack)

    outcomes = [drains(), drains()]

    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (0, 0), ROWS)
    assert {status for status, _ in outcomes} == {1}
    assert f"refuses all {ROWS} rows of batch 1" in outcomes[1][1]
    assert "words of a tenant" not in outcomes[0][1] + outcomes[1][1]


def test_the_rows_go_out_once_the_definition_is_mended(stack: Stack, drains: Drains) -> None:
    """Nothing was set aside, so nobody has to give anything another chance."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')")
    put(stack)
    drains()
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT no_words")

    drains()

    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (ROWS, ROWS), 0)


@pytest.mark.parametrize("fault", FAULTS)
def test_one_row_that_the_table_refuses_stops_nobody(stack: Stack, drains: Drains, fault: str) -> None:
    """Its neighbours are other tenants' evidence; the row itself is sound, and waits for the table."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {FAULTS[fault]}")
    put(stack, bad={7})

    _, output = drains()

    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (ROWS - 1, ROWS - 1), 1), output
    held = stack.sql("SELECT state, event_id FROM clickhouse_outbox_dead_letter")
    assert [(str(row.state), str(row.event_id)) for row in held] == [("held", "evt_7")]


def test_a_held_row_is_seen_and_goes_out_when_the_table_changes(stack: Stack, drains: Drains) -> None:
    """A number and the constraint's name until then; afterwards nothing that anybody has to do."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')")
    put(stack, bad={7})
    drains()
    drains()
    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (ROWS - 1, ROWS - 1), 1)
    seen = CliRunner().invoke(main, ["status", "--json"])
    assert json.loads(seen.output).get("held_rows") == 1
    assert "no_words" in seen.output
    assert "words of a tenant" not in seen.output

    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT no_words")
    drains()

    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (ROWS, ROWS), 0)
    assert json.loads(CliRunner().invoke(main, ["status", "--json"]).output).get("held_rows") == 0


def test_a_single_row_that_the_table_refuses_leaves_the_next_ones_alone(stack: Stack, drains: Drains) -> None:
    """A batch of one row is all refused as well, and is no reason to stop what comes after it."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')")
    put(stack, rows=1)
    drains()
    put(stack, rows=5, bad=set(), at=10)
    drains()

    assert (open_letters(stack), stack.counts(), stack.pending()) == (0, (5, 5), 1)


CONSTRAINT = "ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')"


def held_rows(stack: Stack) -> int:
    return len(stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state = 'held'"))


@pytest.mark.parametrize(("rows", "good"), [(3, 2), (4, 3), (5, 1), (5, 2), (6, 3), (7, 4)])
def test_the_one_good_row_of_a_small_batch_goes_out_wherever_it_stands(
    stack: Stack, drains: Drains, rows: int, good: int
) -> None:
    """Refused rows of two workspaces were "all rows" before the good one was sent alone; then it waited for ever."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {CONSTRAINT}")
    put(stack, rows=rows, bad=set(range(rows)) - {good}, workspaces=2)
    status, output = drains()
    assert (stack.counts(), stack.pending(), held_rows(stack)) == ((1, 1), rows - 1, rows - 1), output
    assert (status, open_letters(stack)) == (0, 0)


def test_the_few_good_rows_of_a_large_batch_go_out(stack: Stack, drains: Drains) -> None:
    """The same three of its rows were tried at every drain; all three were refused, so the good rows waited for ever."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {CONSTRAINT}")
    good = {50, 51, 52, 53}
    put(stack, rows=100, bad=set(range(100)) - good, workspaces=2)
    for _ in range(20):
        if stack.counts() == (len(good), len(good)):
            break
        drains()
    assert (stack.counts(), open_letters(stack)) == ((len(good), len(good)), 0)


@pytest.mark.parametrize("rows", [3, 5, 40])
def test_a_batch_of_refused_rows_alone_is_held_where_the_table_takes_others(
    stack: Stack, drains: Drains, rows: int
) -> None:
    """It was "all rows of the batch" at every drain, and every drain failed, although the table took everybody else's."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {CONSTRAINT}")
    time.sleep(1.1)  # the definition's age is in whole seconds
    put(stack, rows=4, bad=set())
    assert drains()[0] == 0
    put(stack, rows=rows, workspaces=2, at=100)
    status, output = drains()
    assert (status, held_rows(stack), open_letters(stack)) == (0, rows, 0), output
    assert stack.counts() == (4, 4)

    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT no_words")
    assert drains()[0] == 0
    assert (stack.counts(), stack.pending()) == ((4 + rows, 4 + rows), 0)


def test_a_table_that_took_rows_before_it_was_changed_is_still_told_from_rows(stack: Stack, drains: Drains) -> None:
    """What it took under another definition says nothing of this one."""
    put(stack, rows=4, bad=set())
    assert drains()[0] == 0
    time.sleep(2.1)  # as above, and not within the second of the next definition
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {CONSTRAINT}")
    put(stack, at=100)
    status, output = drains()
    assert (status, held_rows(stack), open_letters(stack)) == (1, 0, 0)
    assert f"refuses all {ROWS} rows of batch 2" in output


def test_a_run_that_stays_sends_held_rows_once_the_definition_changes(stack: Stack, drains: Drains) -> None:
    """They were released before a plan only, and a run that stays makes none that counted."""
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {CONSTRAINT}")
    put(stack, bad={7})
    with started(stack, "drain", "--linger-s", "300", "--linger-poll-ms", "50") as process:
        wait_until(lambda: held_rows(stack) == 1 and stack.pending() == 1, what="the held row")
        stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT no_words")
        wait_until(lambda: not stack.pending(), what="the held row to go out")
        assert process.poll() is None, "it stays"
        assert (stack.counts(), stack.pending(), held_rows(stack)) == ((ROWS, ROWS), 0, 0)
