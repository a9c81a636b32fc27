"""Floods of bad rows: one workspace's must not slow the others, and each drain's work is bounded.

What belongs here: how much is asked of ClickHouse and what gets through meanwhile, over real stores. What does not:
single bad rows among good ones (`integration.export.test_exactly_once`), and what operators do about letters (`integration.maintenance.test_dead_letters`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from auditexport_pipeline.core import poison
from auditexport_pipeline.core.batch import Batch, Block
from auditexport_pipeline.core.ports import Refusal
from auditexport_pipeline.mysql import dead_letters
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import (
    NEVER,
    Row,
    clear_marks,
    count,
    crash,
    everything_once,
    insert,
    run,
    small_event,
    states,
    stop_merges,
)
from auditexport_tests.support.crashes import CrashingAuditLog, CrashPoint


def row(number: int, workspace_id: str, **fields: object) -> Row:
    return small_event(f"evt_{number}", workspace_id, **{"time": number, **fields})


def mixed_in(good: int, bad: int, **fields: object) -> list[Row]:
    """Good rows of ten workspaces, spread evenly among bad ones of one."""
    rows = [row(number, f"ws_{number % 10}") for number in range(good)]
    every = bad // good
    return [
        each
        for number, sound in enumerate(rows)
        for each in (sound, *(row(good + number * every + n, "ws_flood", **fields) for n in range(every)))
    ]


class Counting(CrashingAuditLog):
    """Counts the requests to ClickHouse, and refuses as its parser would each payload that contains `refused`."""

    def __init__(self, stack: Stack, refused: bytes | None = None) -> None:
        super().__init__(stack.log, CrashPoint(NEVER))
        self.probes = self.inserts = 0
        self.refused = refused

    def probe(self, version: str, payloads: Sequence[bytes], **named: Any) -> Refusal | None:
        self.probes += 1
        return self._refusal(payloads) or self.real.probe(version, payloads, **named)

    def insert(self, batch: Batch, block: Block, payloads: Sequence[bytes], **named: Any) -> Refusal | None:
        self.inserts += 1
        return self._refusal(payloads) or self.real.insert(batch, block, payloads, **named)

    def _refusal(self, payloads: Sequence[bytes]) -> Refusal | None:
        bad = self.refused is not None and any(self.refused in payload for payload in payloads)
        return Refusal(code=117, name="INCORRECT_DATA") if bad else None


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    """A duplicate must still be there when it is counted."""
    stop_merges(stack)


@pytest.fixture
def few_probes(monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(poison, "PROBES", 20)
    return poison.PROBES


def workspaces(stack: Stack) -> dict[str, int]:
    found = stack.clickhouse("SELECT workspace_id, count() FROM audit_logs_raw_v1 GROUP BY ALL")
    return {str(name): int(str(rows)) for name, rows in found}


def refuse_floods(stack: Stack) -> None:
    """The table refuses what the parser takes: no probe and no explanation tells which rows."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_flood CHECK NOT startsWith(description, 'x')")


def set_aside(stack: Stack) -> int:
    """Rows that are held because the table refuses them, and dead letters."""
    return count(stack, "clickhouse_outbox_dead_letter", "state IN ('held', 'open')")


# ── fairness ─────────────────────────────────────────────────────────────────────────────────────


def _undecodable(stack: Stack) -> list[Row]:
    return mixed_in(1_000, 10_000, actor=5)


def _refused_by_the_table(stack: Stack) -> list[Row]:
    refuse_floods(stack)
    return mixed_in(1_000, 10_000, description="x")


@pytest.mark.parametrize("flood", [_undecodable, pytest.param(_refused_by_the_table, marks=pytest.mark.slow)])
def test_one_workspaces_flood_of_bad_rows_delays_nobody_else(stack: Stack, flood: object) -> None:
    """Audit evidence of a thousand tenants must not wait for one tenant's broken writer."""
    insert(stack, flood(stack))
    log = Counting(stack)
    run(stack, log=log)

    assert workspaces(stack) == {f"ws_{number}": 100 for number in range(10)}
    everything_once(stack, 1_000, pending=10_000)
    assert log.probes + log.inserts <= poison.PROBES + 2


# ── bounded work, and progress ───────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("refused", [None, b"x-flood"], ids=["by the table", "by the parser"])
def test_each_drain_stays_in_its_budget_and_gets_further(stack: Stack, few_probes: int, refused: bytes | None) -> None:
    """Bounded work that finds nothing would be repeated by every drain."""
    if refused is None:
        refuse_floods(stack)
    insert(stack, mixed_in(10, 30, description="x-flood"))
    found = [0]
    while found[-1] < 30:
        log = Counting(stack, refused)
        run(stack, f"owner {len(found)}", log=log)
        assert log.probes + log.inserts <= few_probes + 2
        found.append(set_aside(stack))
        assert found[-1] > found[-2], found
    assert len(found) > 2, "the flood was too small to need a second drain"
    everything_once(stack, 10, pending=30)
    assert set(states(stack)) == {"verified"}


def test_a_flood_of_repeated_keys_costs_a_handful_of_probes(stack: Stack) -> None:
    """Two probes a row made an hour of a drain; MySQL never keeps such a row, MariaDB does."""
    rows = [row(number, "ws_1", meta=0) for number in range(2_000)]
    insert(stack, [(ws, event, text.replace('"meta": 0', '"meta": {"k": 1, "k": 2}')) for ws, event, text in rows])
    log = Counting(stack)
    run(stack, log=log)
    assert log.probes <= 1
    assert log.inserts <= 2
    everything_once(stack, 2_000)


@pytest.mark.slow
@pytest.mark.parametrize("crash_point", [f"{side} replace_cut {n}" for n in (1, 3, 9) for side in ("before", "after")])
def test_a_crash_while_a_flood_is_cut_costs_and_doubles_nothing(
    stack: Stack, few_probes: int, crash_point: str
) -> None:
    """Giving rows back is one more durable effect, and one more wrong moment to die."""
    refuse_floods(stack)
    insert(stack, mixed_in(10, 30, description="x"))
    crash(stack, crash_point, "owner")
    for number in range(20):
        run(stack, f"owner {number}", dead_owners={"owner"})
        if set_aside(stack) == 30:
            break
    assert set_aside(stack) == 30
    everything_once(stack, 10, pending=30)


def test_rows_given_back_in_a_requeue_keep_their_inserted_at(stack: Stack, few_probes: int) -> None:
    """A later generation that loses the first `inserted_at` would be a second event to the table."""
    insert(stack, [row(number, f"ws_{number % 2}", description="x" if number % 2 else "y") for number in range(40)])
    run(stack, "one")
    ((at_ms,),) = stack.clickhouse("SELECT DISTINCT inserted_at FROM audit_logs_raw_v1")
    refuse_floods(stack)
    clear_marks(stack)
    run(stack, "two")
    assert stack.pending() == 20
    assert 0 < set_aside(stack) < 20, "no row was given back"
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 DROP CONSTRAINT no_flood")
    assert dead_letters.release_held(stack.outbox, stack.log.definition) > 0
    run(stack, "three")
    assert stack.pending() == 0
    assert stack.clickhouse("SELECT DISTINCT inserted_at FROM audit_logs_raw_v1") == [(at_ms,)]
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(40,)]


@pytest.mark.parametrize("fate", ["dead", "given back"])
def test_a_folded_row_whose_kept_row_leaves_the_batch_is_not_marked(
    stack: Stack, fate: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Marked without an entry, the event would be nowhere: the one loss that no count in the outbox shows."""
    refuse_floods(stack)
    if fate == "given back":
        monkeypatch.setattr(poison, "PROBES", 1)
    rows = [row(1, "ws_1", description="sound"), row(1, "ws_1", description="x"), row(2, "ws_1")]
    insert(stack, rows)
    run(stack, "one")
    marked = stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at IS NOT NULL")
    there = {str(event) for (event,) in stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1")}
    assert {str(found.event_id) for found in marked} <= there
    monkeypatch.undo()
    for owner in ("two", "three"):
        run(stack, owner)
    everything_once(stack, 2, pending=1)
