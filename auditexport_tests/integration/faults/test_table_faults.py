"""A table that refuses rows which parse: a column, constraint or index was added to `audit_logs_raw_v1`.

The rows are sound, so none of them becomes a dead letter; they wait until the table's definition changes.
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.core import retries
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import everything_once, small_event, stop_merges
from auditexport_tests.support.prompts import started, urls
from auditexport_tests.support.waiting import wait_until

ROWS = 24
Drain = Callable[[], tuple[int, str]]
FAULTS = {
    "default": "ADD COLUMN n UInt32 DEFAULT toUInt32(description)",
    "throwIf": "ADD COLUMN n UInt8 MATERIALIZED throwIf(startsWith(description, 'word'), 'auditexport: no')",
    "materialized": "ADD COLUMN n UInt32 MATERIALIZED toUInt32(description)",
    "address": "ADD COLUMN address IPv4 DEFAULT toIPv4(remote_ip)",
    "constraint": "ADD CONSTRAINT no_words CHECK NOT startsWith(description, 'word')",
    "projection": "ADD PROJECTION by_number (SELECT toUInt32(description) AS n, count() GROUP BY n)",
}


def of_each_fault(*fast: str) -> pytest.MarkDecorator:
    """Parametrizes a test; the other faults are slow."""
    cases = [pytest.param(name, marks=[pytest.mark.slow] * (name not in fast)) for name in FAULTS]
    return pytest.mark.parametrize("fault", cases)


def alter(stack: Stack, change: str) -> None:
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 {change}")


def add_constraint(stack: Stack) -> None:
    alter(stack, FAULTS["constraint"])


def drop_constraint(stack: Stack) -> None:
    alter(stack, "DROP CONSTRAINT no_words")


def insert(
    stack: Stack, *, rows: int = ROWS, refused: set[int] | None = None, workspaces: int = 3, at: int = 0
) -> None:
    """Events of several workspaces; the refused ones (all by default) have words where the others have a number."""
    events = []
    for number in range(at, at + rows):
        bad = refused is None or number in refused
        fields = {"description": "words of a tenant" if bad else str(number), "remote_ip": "x" if bad else "10.0.0.1"}
        events.append(
            small_event(f"evt_{number}", f"ws_{number % workspaces}", time=1_700_000_000_000 + number, **fields)
        )
    stack.put(*events)


def dead_letters(stack: Stack, state: str) -> int:
    return len(stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter WHERE state = :state", state=state))


@pytest.fixture
def drain(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Drain:
    """`auditexport drain --once`, with one attempt and no waits: exit status and output."""
    monkeypatch.setattr(retries, "RETRIES", 0)
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    preflight.forget()
    stop_merges(stack)
    alter(stack, "MODIFY SETTING deduplicate_merge_projection_mode = 'drop'")

    def drain() -> tuple[int, str]:
        done = CliRunner().invoke(main, ["drain", "--once"], catch_exceptions=True)
        return done.exit_code, done.output

    return drain


@of_each_fault("default")
def test_a_table_that_refuses_every_row_sets_nothing_aside(stack: Stack, drain: Drain, fault: str) -> None:
    """With all rows as dead letters in a green run, the operator would look for broken rows, not for the table."""
    alter(stack, FAULTS[fault])
    insert(stack)

    outcomes = [drain(), drain()]

    assert (dead_letters(stack, "open"), stack.counts(), stack.pending()) == (0, (0, 0), ROWS)
    assert {status for status, _ in outcomes} == {1}
    assert f"refuses all {ROWS} rows of batch 1" in outcomes[1][1]
    assert "words of a tenant" not in outcomes[0][1] + outcomes[1][1]


def test_the_rows_go_out_once_the_definition_is_mended(stack: Stack, drain: Drain) -> None:
    """Nothing was set aside, so nothing has to be retried by hand."""
    add_constraint(stack)
    insert(stack)
    drain()
    drop_constraint(stack)

    drain()

    everything_once(stack, ROWS)
    assert dead_letters(stack, "open") == 0


@of_each_fault("default", "throwIf")
def test_one_row_that_the_table_refuses_stops_nobody(stack: Stack, drain: Drain, fault: str) -> None:
    """Its neighbours are other tenants' evidence; the row itself is sound, and waits for the table."""
    alter(stack, FAULTS[fault])
    insert(stack, refused={7})

    _, output = drain()

    assert (dead_letters(stack, "open"), stack.counts(), stack.pending()) == (0, (ROWS - 1, ROWS - 1), 1), output
    letters = stack.sql("SELECT state, event_id FROM clickhouse_outbox_dead_letter")
    assert [(str(row.state), str(row.event_id)) for row in letters] == [("held", "evt_7")]


def test_a_held_row_is_seen_and_goes_out_when_the_table_changes(stack: Stack, drain: Drain) -> None:
    """Until then `status` shows a number and the constraint's name; afterwards nothing is left to do."""
    add_constraint(stack)
    insert(stack, refused={7})
    drain()
    drain()
    assert (dead_letters(stack, "open"), stack.counts(), stack.pending()) == (0, (ROWS - 1, ROWS - 1), 1)
    status = CliRunner().invoke(main, ["status", "--json"]).output
    assert json.loads(status)["held_rows"] == 1
    assert "no_words" in status
    assert "words of a tenant" not in status

    drop_constraint(stack)
    drain()

    everything_once(stack, ROWS)
    assert json.loads(CliRunner().invoke(main, ["status", "--json"]).output)["held_rows"] == 0


def test_a_single_row_that_the_table_refuses_leaves_the_next_ones_alone(stack: Stack, drain: Drain) -> None:
    """A batch of one row is all refused as well; later batches go on."""
    add_constraint(stack)
    insert(stack, rows=1)
    drain()
    insert(stack, rows=5, refused=set(), at=10)
    drain()

    assert (dead_letters(stack, "open"), stack.counts(), stack.pending()) == (0, (5, 5), 1)


@pytest.mark.parametrize(("rows", "good"), [(3, 2), (5, 1), (6, 3)])
def test_the_one_good_row_of_a_small_batch_goes_out_wherever_it_stands(
    stack: Stack, drain: Drain, rows: int, good: int
) -> None:
    """Refused rows of two workspaces are not yet "all rows": the good one is sent alone."""
    add_constraint(stack)
    insert(stack, rows=rows, refused=set(range(rows)) - {good}, workspaces=2)
    status, output = drain()
    assert (stack.counts(), stack.pending(), dead_letters(stack, "held")) == ((1, 1), rows - 1, rows - 1), output
    assert (status, dead_letters(stack, "open")) == (0, 0)


@pytest.mark.slow
def test_the_few_good_rows_of_a_large_batch_go_out(stack: Stack, drain: Drain, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt tries other rows of the batch: else three refused rows would hold the good ones for ever."""
    monkeypatch.setattr(retries, "RETRIES", 4)
    add_constraint(stack)
    good = {50, 51, 52, 53}
    insert(stack, rows=100, refused=set(range(100)) - good, workspaces=2)
    for _ in range(20):
        if stack.counts() == (len(good), len(good)):
            break
        drain()
    assert (stack.counts(), dead_letters(stack, "open")) == ((len(good), len(good)), 0)


def old_definition(stack: Stack) -> None:
    """Waits until the definition is one second old: ages are in whole seconds."""
    wait_until(lambda: stack.log.definition_age_s("audit_log.v1") >= 1, what="a second")


@pytest.mark.parametrize("rows", [3, 40])
def test_a_batch_of_refused_rows_alone_is_held_where_the_table_takes_others(
    stack: Stack, drain: Drain, rows: int
) -> None:
    """Under this definition the table has taken other rows, so the rows are at fault and the drain must not fail."""
    add_constraint(stack)
    old_definition(stack)
    insert(stack, rows=4, refused=set())
    assert drain()[0] == 0
    insert(stack, rows=rows, workspaces=2, at=100)
    status, output = drain()
    assert (status, dead_letters(stack, "held"), dead_letters(stack, "open")) == (0, rows, 0), output
    assert stack.counts() == (4, 4)

    drop_constraint(stack)
    assert drain()[0] == 0
    everything_once(stack, 4 + rows)


def test_a_table_that_took_rows_before_it_was_changed_is_still_told_from_rows(stack: Stack, drain: Drain) -> None:
    """What it took under another definition says nothing about this one."""
    insert(stack, rows=4, refused=set())
    assert drain()[0] == 0
    ((taken_s,),) = stack.clickhouse("SELECT toUnixTimestamp(now())")
    wait_until(lambda: stack.clickhouse("SELECT toUnixTimestamp(now())")[0][0] >= int(str(taken_s)) + 2, what="2 s")
    add_constraint(stack)
    insert(stack, at=100)
    status, output = drain()
    assert (status, dead_letters(stack, "held"), dead_letters(stack, "open")) == (1, 0, 0)
    assert f"refuses all {ROWS} rows of batch 2" in output


def test_a_run_that_stays_sends_held_rows_once_the_definition_changes(stack: Stack, drain: Drain) -> None:
    """A run that stays makes no plans that release held rows: it releases them itself."""
    add_constraint(stack)
    insert(stack, refused={7})
    with started(stack, "drain", "--linger-s", "300", "--linger-poll-ms", "50") as process:
        wait_until(lambda: dead_letters(stack, "held") == 1 and stack.pending() == 1, what="the held row")
        drop_constraint(stack)
        wait_until(lambda: not stack.pending(), what="the held row to go out")
        assert process.poll() is None, "it stays"
        everything_once(stack, ROWS)
        assert dead_letters(stack, "held") == 0
