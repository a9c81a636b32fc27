"""Requeueing and sweeping: rows exported again on purpose, and rows deleted once they may be.

What belongs here: which rows an operator's words reach, and which stay. What does not: the second export itself
(`integration.export.test_exactly_once`), and what reconciliation makes of it (`integration.maintenance.test_reconcile`).
"""

from __future__ import annotations

import json
from typing import Any

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.requeue import Requeue, requeue
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import Sweep, sweep
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import Row, runner, small_event, stop_merges
from auditexport_tests.support.crashes import Crash, CrashingMaintenance, CrashPoint

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

BY = Actor(who="operator", why="a test")
LIMITS = Limits(batch_rows=10, mark_rows=5, mark_connections=1)
ROWS = 30
run = runner(LIMITS)


@pytest.fixture
def exported(stack: Stack) -> Stack:
    """Thirty events in three batches, of workspaces ws_0 to ws_2 in turn, an hour of event time apart."""
    stop_merges(stack)
    stack.put(*map(row, range(ROWS)))
    run(stack)
    return stack


def row(number: int, workspace_id: str | None = None) -> Row:
    return small_event(f"evt_{number}", workspace_id or f"ws_{number % 3}", time=number * HOUR_MS)


def again(stack: Stack, *, missing_only: bool = False, dry_run: bool = False, **conditions: Any) -> Requeue:
    wanted = RowFilter(**conditions)
    return requeue(stack.outbox, stack.upkeep, stack.log, wanted, BY, missing_only=missing_only, dry_run=dry_run)


def swept(stack: Stack, *, dry_run: bool = False, **retention: Any) -> Sweep:
    return sweep(stack.outbox, stack.upkeep, stack.log, Retention(**retention), BY, dry_run=dry_run)


def pending(stack: Stack) -> list[str]:
    rows = stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at IS NULL ORDER BY pk")
    return [str(row.event_id) for row in rows]


def in_view(stack: Stack) -> tuple[int, int]:
    ((entries, events),) = stack.clickhouse("SELECT count(), uniqExact(event_id) FROM audit_logs")
    return int(str(entries)), int(str(events))


def age(stack: Stack, batch_id: int, days: int) -> None:
    """Lets a batch have been exported some days ago."""
    stack.sql(
        "UPDATE clickhouse_outbox AS o JOIN clickhouse_outbox_batch AS b ON b.exported_at_ms = o.deleted_at "
        "SET o.deleted_at = o.deleted_at - :ms WHERE b.batch_id = :id",
        ms=days * DAY_MS,
        id=batch_id,
    )
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - :ms WHERE batch_id = :id",
        ms=days * DAY_MS,
        id=batch_id,
    )


# ── requeue ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("conditions", "events"),
    [
        ({"event_ids": ("evt_4", "evt_17", "evt_none")}, {4, 17}),
        ({"workspace_id": "ws_1"}, set(range(1, ROWS, 3))),
        ({"from_event_ms": 5 * HOUR_MS, "to_event_ms": 8 * HOUR_MS}, {5, 6, 7}),
        ({"batch_ids": (2,)}, set(range(10, 20))),
        ({"batch_ids": (1, 3), "workspace_id": "ws_0"}, {0, 3, 6, 9, 21, 24, 27}),
        ({"from_exported_ms": 0, "to_exported_ms": 2**62}, set(range(ROWS))),
        ({"to_exported_ms": 5}, set()),
    ],
)
def test_a_requeue_takes_the_rows_that_its_conditions_name(
    exported: Stack, conditions: dict[str, Any], events: set[int]
) -> None:
    """An operator at 3 a.m. says which events; one row too many is an incident of its own."""
    told = again(exported, dry_run=True, **conditions)
    assert (told.rows, told.action_id) == (len(events), None)
    assert pending(exported) == []

    done = again(exported, **conditions)
    assert pending(exported) == [f"evt_{number}" for number in sorted(events)]
    assert done.by_batch == told.by_batch
    assert sum(done.by_batch.values()) == len(events)
    if events:
        (action,) = exported.upkeep.actions(1)
        assert (action.verb, action.by, action.rows) == ("requeue", BY, len(events))


def test_a_range_of_pks_is_a_condition_too(exported: Stack) -> None:
    """It is what somebody has who looked into the table."""
    pks = [int(str(row.pk)) for row in exported.sql("SELECT pk FROM clickhouse_outbox ORDER BY pk")]
    assert again(exported, from_pk=pks[8], to_pk=pks[11]).by_batch == {1: 2, 2: 2}
    assert pending(exported) == ["evt_8", "evt_9", "evt_10", "evt_11"]


def test_a_requeue_of_everything_by_accident_is_refused(exported: Stack) -> None:
    """No condition would mean all rows there are."""
    with pytest.raises(InvalidConfig, match="names its rows"):
        again(exported)
    with pytest.raises(InvalidConfig, match="batch_ids names 77"):
        again(exported, batch_ids=(1, 77))
    with pytest.raises(InvalidConfig, match="who is empty"):
        Actor(who=" ", why="because")


def test_requeued_events_are_once_in_the_view_at_once_and_keep_their_time(exported: Stack) -> None:
    """Readers see no double, and retention does not start over."""
    before = dict(exported.clickhouse("SELECT event_id, inserted_at FROM audit_logs"))
    again(exported, workspace_id="ws_2")
    run(exported)
    assert exported.counts() == (ROWS + 10, ROWS)
    assert in_view(exported) == (ROWS, ROWS)
    assert dict(exported.clickhouse("SELECT event_id, inserted_at FROM audit_logs")) == before
    generations = [
        row.generation for row in exported.sql("SELECT generation FROM clickhouse_outbox_batch WHERE batch_id > 3")
    ]
    assert generations == [1]


def test_missing_only_exports_what_clickhouse_lacks_and_nothing_else(exported: Stack) -> None:
    """After a loss of unknown size, the smallest repair is the one that nobody has to think about."""
    exported.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    exported.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id IN ('evt_3', 'evt_25')", settings={"mutations_sync": 2}
    )
    found = again(exported, missing_only=True, from_pk=0)
    assert (found.rows, found.present_rows, found.by_batch) == (2, ROWS - 2, {1: 1, 3: 1})
    run(exported)
    assert exported.counts() == (ROWS, ROWS)


def test_rows_of_an_open_batch_are_left_alone(exported: Stack) -> None:
    """Clearing a mark that a batch has just set would let that batch set it again and the requeue be lost."""
    exported.put(*(row(n, "ws_0") for n in (90, 91)))
    (claim,) = claiming.claim(exported.outbox, owner="at work", dead_owners=(), limits=LIMITS)
    fetched = export.fetch(exported.outbox, exported.log, claim, LIMITS)
    export.write(exported.outbox, exported.log, claim, fetched.bodies, LIMITS)
    exported.sql("UPDATE clickhouse_outbox SET deleted_at = 7 WHERE event_id = 'evt_90'")
    found = again(exported, event_ids=("evt_90", "evt_1"))
    assert (found.rows, found.open_rows) == (1, 1)
    assert pending(exported) == ["evt_1", "evt_91"]


def test_rows_that_clickhouse_would_drop_on_arrival_are_left_alone(exported: Stack) -> None:
    """A requeued entry keeps its inserted_at; past the table's TTL it would be gone before anybody reads it."""
    (row,) = exported.sql("SELECT manifest FROM clickhouse_outbox_batch WHERE batch_id = 2")
    blocks = [{**block, "at": block["at"] - 90 * DAY_MS} for block in json.loads(str(row.manifest))]
    exported.sql("UPDATE clickhouse_outbox_batch SET manifest = :text WHERE batch_id = 2", text=json.dumps(blocks))
    found = again(exported, from_pk=0)
    assert (found.rows, found.expired_rows) == (20, 10)


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────


def rows_left(stack: Stack) -> int:
    return int(str(stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n))


def test_only_exported_rows_of_verified_batches_past_retention_are_swept(exported: Stack) -> None:
    """What is pending, young or unproven is somebody's only copy."""
    exported.put(row(0))
    age(exported, 1, 31)
    age(exported, 2, 31)
    exported.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 2")

    told = swept(exported, dry_run=True)
    assert (told.rows, told.batches, told.held_back, rows_left(exported)) == (10, 1, 1, 31)
    done = swept(exported)
    assert (done.rows, done.batches, done.held_back, rows_left(exported)) == (10, 1, 1, 21)
    assert pending(exported) == ["evt_0"]
    (action,) = exported.upkeep.actions(1)
    assert (action.verb, action.rows) == ("sweep", 10)
    assert swept(exported).rows == 0
    (batch,) = exported.sql(
        "SELECT state, swept_rows, swept_at_ms, pks FROM clickhouse_outbox_batch WHERE batch_id = 1"
    )
    assert (batch.state, batch.swept_rows, bool(batch.swept_at_ms), bool(batch.pks)) == ("verified", 10, True, True)


def test_a_batch_that_clickhouse_lost_since_is_not_swept(exported: Stack) -> None:
    """The outbox holds the last copy: a verification of a month ago is no reason to delete it."""
    age(exported, 1, 31)
    exported.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    exported.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_3'", settings={"mutations_sync": 2}
    )
    done = swept(exported)
    assert (done.rows, rows_left(exported)) == (0, ROWS)
    assert {batch_id: str(found) for batch_id, found in done.discrepant.items()} == {1: "1 missing"}
    assert swept(exported).held_back == 1


def test_a_requeued_row_is_swept_with_the_batch_that_exported_it_last(exported: Stack) -> None:
    """Its newest export is not past retention, or not even done."""
    age(exported, 1, 31)
    again(exported, event_ids=("evt_1", "evt_2"))
    run(exported)
    again(exported, event_ids=("evt_4",))
    assert swept(exported).rows == 7
    left = [str(row.event_id) for row in exported.sql("SELECT event_id FROM clickhouse_outbox ORDER BY pk LIMIT 3")]
    assert left == ["evt_1", "evt_2", "evt_4"]


def test_a_sweep_that_ends_early_is_taken_up_where_it_ended(exported: Stack) -> None:
    """Ten million rows do not go in one night."""
    for batch_id in (1, 2, 3):
        age(exported, batch_id, 31)
    first = swept(exported, chunk_rows=4, max_rows=6)
    assert (first.rows, first.stopped_early) == (8, True)
    assert swept(exported, chunk_rows=4).rows == ROWS - 8
    swept_rows = exported.sql("SELECT SUM(swept_rows) AS n FROM clickhouse_outbox_batch")[0].n
    assert int(str(swept_rows)) == ROWS


def test_a_sweep_waits_for_no_gap_and_no_gap_waits_for_it(exported: Stack) -> None:
    """A DELETE at REPEATABLE READ would lock where the application's next rows go."""
    age(exported, 3, 31)
    with exported.outbox.engine.connect() as sweeping:
        sweeping.execute(
            sa.text("DELETE FROM clickhouse_outbox WHERE pk BETWEEN 21 AND 30 AND deleted_at + 0 <= 2000000000000")
        )
        exported.sql("SET SESSION innodb_lock_wait_timeout = 1")
        exported.put(row(0))
        sweeping.rollback()


def test_old_batches_are_compacted_once_their_rows_and_entries_are_gone(exported: Stack) -> None:
    """The record stays for as long as anybody may ask; which pks they were does not."""
    age(exported, 1, 500)
    done = swept(exported)
    assert (done.rows, done.compacted) == (10, 1)
    (batch,) = exported.sql(
        "SELECT state, pks, row_count, digest, manifest FROM clickhouse_outbox_batch WHERE batch_id = 1"
    )
    assert (batch.state, batch.pks, batch.row_count) == ("compacted", "", 10)
    assert len(str(batch.digest)) == 32
    assert '"rows":10' in str(batch.manifest)
    again(exported, workspace_id="ws_0")
    run(exported)
    assert in_view(exported)[1] == ROWS


def test_a_ledger_that_would_forget_too_early_is_refused(exported: Stack) -> None:
    """Entries whose batch is forgotten look like somebody else's."""
    with pytest.raises(InvalidConfig, match="raise ledger_days"):
        swept(exported, ledger_days=60)
    with pytest.raises(InvalidConfig, match="chunk_rows"):
        Retention(chunk_rows=0)


def test_letters_of_rows_that_are_gone_are_closed(exported: Stack) -> None:
    """A letter without a row asks an operator for something that cannot be done."""
    exported.put(("ws_0", "evt_bad", "{}"), ("ws_0", "evt_worse", "[]"))
    run(exported)
    exported.sql("DELETE FROM clickhouse_outbox WHERE event_id = 'evt_bad'")
    assert swept(exported).letters_closed == 1
    assert exported.outbox.dead_by_reason() == {"not_an_object": 1}


# ── crashes and zombies ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize(
    "effect",
    ["record_action 1", "delete 1", "delete 4", "record_swept 1", "record_swept 3", "close_letters 1", "compact 1"],
)
def test_a_sweep_that_dies_anywhere_is_taken_up_and_every_row_counted_once(
    exported: Stack, side: str, effect: str
) -> None:
    """What it deleted is counted in the same transaction, so the evidence says how many rows went, whoever swept."""
    for batch_id in (1, 2, 3):
        age(exported, batch_id, 500)
    point = CrashPoint(f"{side} {effect}")
    with pytest.raises(Crash):
        sweep(exported.outbox, CrashingMaintenance(exported.upkeep, point), exported.log, Retention(chunk_rows=4), BY)
    assert point.reached
    swept(exported, chunk_rows=4)

    assert exported.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 0
    ledger = exported.sql("SELECT state, swept_rows, swept_at_ms FROM clickhouse_outbox_batch WHERE batch_id > 0")
    assert [(row.state, row.swept_rows, row.swept_at_ms is not None) for row in ledger] == [("compacted", 10, True)] * 3
    recorded = exported.sql("SELECT SUM(row_count) AS n FROM clickhouse_outbox_action WHERE verb = 'sweep'")
    assert int(str(recorded[0].n)) == ROWS
    assert in_view(exported) == (ROWS, ROWS)


@pytest.mark.parametrize("side", ["before", "after"])
@pytest.mark.parametrize("effect", ["record_action 1", "unmark 1", "unmark 2"])
def test_a_requeue_that_dies_anywhere_is_repeated_and_exports_once(
    exported: Stack, monkeypatch: pytest.MonkeyPatch, side: str, effect: str
) -> None:
    """Half of the rows pending is a state like any other; the second call finds the rest."""
    monkeypatch.setattr("auditexport_pipeline.core.requeue.CHUNK_ROWS", 7)
    point = CrashPoint(f"{side} {effect}")
    crashing = CrashingMaintenance(exported.upkeep, point)
    with pytest.raises(Crash):
        requeue(exported.outbox, crashing, exported.log, RowFilter(batch_ids=(1, 2)), BY)
    cleared = len(pending(exported))
    assert again(exported, batch_ids=(1, 2)).rows == 20 - cleared
    assert len(pending(exported)) == 20
    run(exported)

    assert pending(exported) == []
    assert in_view(exported) == (ROWS, ROWS)
    (stored,) = exported.clickhouse("SELECT count() FROM audit_logs_raw_v1")
    assert stored == (ROWS + 20,)
    recorded = exported.sql("SELECT SUM(row_count) AS n FROM clickhouse_outbox_action WHERE verb = 'requeue'")
    assert int(str(recorded[0].n)) == 20


@pytest.mark.parametrize("drained", [False, True])
def test_a_sweep_that_slept_leaves_what_was_requeued_meanwhile(exported: Stack, drained: bool) -> None:
    """It wakes with an old list: rows that are pending again, or were exported anew, are not past retention."""
    for batch_id in (1, 2, 3):
        age(exported, batch_id, 31)

    def meanwhile() -> None:
        again(exported, batch_ids=(1,))
        if drained:
            run(exported)

    point = CrashPoint("before delete 1", then=meanwhile)
    sweep(exported.outbox, CrashingMaintenance(exported.upkeep, point), exported.log, Retention(), BY)

    assert point.reached
    left = exported.sql("SELECT event_id FROM clickhouse_outbox ORDER BY pk")
    assert [row.event_id for row in left] == [f"evt_{n}" for n in range(10)]
    run(exported)
    assert in_view(exported) == (ROWS, ROWS)
    assert swept(exported).rows == 0
