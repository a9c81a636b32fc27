"""Requeueing and sweeping: rows exported again on purpose, and rows deleted after retention.

The second export itself is in `integration.export.test_exactly_once`, what reconciliation makes of it in
`integration.maintenance.test_reconcile`.
"""

from __future__ import annotations

from typing import Any

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import Row, runner, small_event, stop_merges
from auditexport_tests.support.crashes import Crash, CrashingMaintenance, CrashPoint
from auditexport_tests.support.maintenance import BY, lose_events, outbox_rows, pending_events, requeued, swept

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

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


def in_view(stack: Stack) -> tuple[int, int]:
    ((entries, events),) = stack.clickhouse("SELECT count(), uniqExact(event_id) FROM audit_logs")
    return int(str(entries)), int(str(events))


def age(stack: Stack, days: int, *batch_ids: int) -> None:
    """Lets batches have been exported some days ago."""
    for batch_id in batch_ids:
        values = {"ms": days * DAY_MS, "id": batch_id}
        stack.sql(
            "UPDATE clickhouse_outbox AS o JOIN clickhouse_outbox_batch AS b ON b.exported_at_ms = o.deleted_at "
            "SET o.deleted_at = o.deleted_at - :ms WHERE b.batch_id = :id",
            **values,
        )
        stack.sql(
            "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - :ms WHERE batch_id = :id", **values
        )


# ── requeue ──────────────────────────────────────────────────────────────────────────────────────


def test_a_requeue_takes_exactly_the_rows_that_its_conditions_name(exported: Stack) -> None:
    """Each row too many in an operator's repair is an incident of its own."""
    pks = [int(str(row.pk)) for row in exported.sql("SELECT pk FROM clickhouse_outbox ORDER BY pk")]
    exported.sql("CREATE TABLE marks AS SELECT pk, deleted_at FROM clickhouse_outbox")
    cases: list[tuple[dict[str, Any], set[int], dict[int, int]]] = [
        ({"event_ids": ("evt_4", "evt_17", "evt_none")}, {4, 17}, {1: 1, 2: 1}),
        ({"workspace_id": "ws_1"}, set(range(1, ROWS, 3)), {1: 3, 2: 4, 3: 3}),
        ({"from_event_ms": 5 * HOUR_MS, "to_event_ms": 8 * HOUR_MS}, {5, 6, 7}, {1: 3}),
        ({"batch_ids": (2,)}, set(range(10, 20)), {2: 10}),
        ({"batch_ids": (1, 3), "workspace_id": "ws_0"}, {0, 3, 6, 9, 21, 24, 27}, {1: 4, 3: 3}),
        ({"from_exported_ms": 0, "to_exported_ms": 2**62}, set(range(ROWS)), {1: 10, 2: 10, 3: 10}),
        ({"to_exported_ms": 5}, set(), {}),
        ({"from_pk": pks[8], "to_pk": pks[11]}, {8, 9, 10, 11}, {1: 2, 2: 2}),
    ]
    for conditions, events, by_batch in cases:
        announced = requeued(exported, dry_run=True, **conditions)
        assert (announced.rows, announced.by_batch, announced.action_id) == (len(events), by_batch, None), conditions
        assert exported.pending() == 0
        done = requeued(exported, **conditions)
        assert done.by_batch == by_batch
        assert pending_events(exported) == [f"evt_{number}" for number in sorted(events)]
        if events:
            (action,) = exported.upkeep.actions(1)
            assert (action.verb, action.by, action.rows) == ("requeue", BY, len(events))
        exported.sql("UPDATE clickhouse_outbox AS o JOIN marks ON marks.pk = o.pk SET o.deleted_at = marks.deleted_at")


def test_a_requeue_of_everything_by_accident_is_refused(stack: Stack) -> None:
    """No condition would mean all rows."""
    with pytest.raises(InvalidConfig, match="names its rows"):
        requeued(stack)
    with pytest.raises(InvalidConfig, match="batch_ids names 77"):
        requeued(stack, batch_ids=(77,))
    with pytest.raises(InvalidConfig, match="who is empty"):
        Actor(who=" ", why="because")


def test_requeued_events_are_once_in_the_view_at_once_and_keep_their_time(exported: Stack) -> None:
    """Readers see no duplicate, and retention does not start over."""
    before = dict(exported.clickhouse("SELECT event_id, inserted_at FROM audit_logs"))
    requeued(exported, workspace_id="ws_2")
    run(exported)
    assert exported.counts() == (ROWS + 10, ROWS)
    assert in_view(exported) == (ROWS, ROWS)
    assert dict(exported.clickhouse("SELECT event_id, inserted_at FROM audit_logs")) == before
    ((generation,),) = exported.sql("SELECT generation FROM clickhouse_outbox_batch WHERE batch_id > 3")
    assert generation == 1


def test_missing_only_exports_what_clickhouse_lacks_and_nothing_else(exported: Stack) -> None:
    """After a loss of unknown size, this is the smallest repair."""
    lose_events(exported, "evt_3", "evt_25")
    found = requeued(exported, missing_only=True, from_pk=0)
    assert (found.rows, found.present_rows, found.by_batch) == (2, ROWS - 2, {1: 1, 3: 1})
    run(exported)
    assert exported.counts() == (ROWS, ROWS)


def test_rows_of_an_open_batch_are_left_alone(exported: Stack) -> None:
    """The open batch would set the cleared mark again, and the requeue would be lost."""
    exported.put(*(row(n, "ws_0") for n in (90, 91)))
    (claim,) = claiming.claim(exported.outbox, owner="at work", dead_owners=(), limits=LIMITS)
    fetched = export.fetch(exported.outbox, exported.log, claim, LIMITS)
    export.write(exported.outbox, exported.log, claim, fetched.bodies, LIMITS)
    exported.sql("UPDATE clickhouse_outbox SET deleted_at = 7 WHERE event_id = 'evt_90'")
    found = requeued(exported, event_ids=("evt_90", "evt_1"))
    assert (found.rows, found.open_rows) == (1, 1)
    assert pending_events(exported) == ["evt_1", "evt_91"]


# ── sweep ────────────────────────────────────────────────────────────────────────────────────────


def test_only_exported_rows_of_verified_batches_past_retention_are_swept(exported: Stack) -> None:
    """A row that is pending, young or of an unverified batch may be the only copy."""
    exported.put(("ws_0", "evt_bad", "{}"), ("ws_0", "evt_worse", "[]"))
    run(exported)
    exported.sql("DELETE FROM clickhouse_outbox WHERE event_id = 'evt_bad'")
    exported.put(row(0))
    age(exported, 31, 1, 2)
    exported.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 2")

    announced = swept(exported, dry_run=True)
    assert (announced.rows, announced.batches, announced.held_back, outbox_rows(exported)) == (10, 1, 1, 32)
    done = swept(exported)
    assert (done.rows, done.batches, done.held_back, outbox_rows(exported)) == (10, 1, 1, 22)
    assert pending_events(exported) == ["evt_worse", "evt_0"]
    assert (done.letters_closed, exported.outbox.dead_by_reason()) == (1, {"not_an_object": 1})
    (action,) = exported.upkeep.actions(1)
    assert (action.verb, action.rows) == ("sweep", 10)
    assert swept(exported).rows == 0
    (batch,) = exported.sql(
        "SELECT state, swept_rows, swept_at_ms, pks FROM clickhouse_outbox_batch WHERE batch_id = 1"
    )
    assert (batch.state, batch.swept_rows, bool(batch.swept_at_ms), bool(batch.pks)) == ("verified", 10, True, True)


def test_a_batch_that_clickhouse_lost_since_is_not_swept(exported: Stack) -> None:
    """The outbox has the last copy: a verification of a month ago is no reason to delete it."""
    age(exported, 31, 1)
    lose_events(exported, "evt_3")
    done = swept(exported)
    assert (done.rows, outbox_rows(exported)) == (0, ROWS)
    assert {batch_id: str(found) for batch_id, found in done.discrepant.items()} == {1: "1 missing"}
    assert swept(exported).held_back == 1


def test_a_requeued_row_is_swept_with_the_batch_that_exported_it_last(exported: Stack) -> None:
    """Its newest export is not past retention, or is still to come."""
    age(exported, 31, 1)
    requeued(exported, event_ids=("evt_1", "evt_2"))
    run(exported)
    requeued(exported, event_ids=("evt_4",))
    assert swept(exported).rows == 7
    left = [str(row.event_id) for row in exported.sql("SELECT event_id FROM clickhouse_outbox ORDER BY pk LIMIT 3")]
    assert left == ["evt_1", "evt_2", "evt_4"]


def test_a_sweep_that_reaches_max_rows_is_continued_by_the_next_one(exported: Stack) -> None:
    """Ten million rows take more than one night."""
    age(exported, 31, 1, 2, 3)
    first = swept(exported, chunk_rows=4, max_rows=6)
    assert (first.rows, first.stopped_early) == (8, True)
    assert swept(exported, chunk_rows=4).rows == ROWS - 8
    swept_rows = exported.sql("SELECT SUM(swept_rows) AS n FROM clickhouse_outbox_batch")[0].n
    assert int(str(swept_rows)) == ROWS


def test_a_sweep_waits_for_no_gap_and_no_gap_waits_for_it(exported: Stack) -> None:
    """A DELETE at REPEATABLE READ would lock where the application's next rows go."""
    age(exported, 31, 3)
    with exported.outbox.engine.connect() as sweeping:
        sweeping.execute(
            sa.text("DELETE FROM clickhouse_outbox WHERE pk BETWEEN 21 AND 30 AND deleted_at + 0 <= 2000000000000")
        )
        exported.sql("SET SESSION innodb_lock_wait_timeout = 1")
        exported.put(row(0))
        sweeping.rollback()


def test_old_batches_are_compacted_once_their_rows_and_entries_are_gone(exported: Stack) -> None:
    """Counts, times and digests stay for later questions; the pks do not. A compacted batch does not disturb a requeue."""
    age(exported, 500, 1)
    done = swept(exported)
    assert (done.rows, done.compacted) == (10, 1)
    (batch,) = exported.sql(
        "SELECT state, pks, row_count, digest, manifest FROM clickhouse_outbox_batch WHERE batch_id = 1"
    )
    assert (batch.state, batch.pks, batch.row_count) == ("compacted", "", 10)
    assert len(str(batch.digest)) == 32
    assert '"rows":10' in str(batch.manifest)
    requeued(exported, workspace_id="ws_0")
    run(exported)
    assert in_view(exported)[1] == ROWS


def test_a_ledger_that_would_forget_too_early_is_refused(stack: Stack) -> None:
    """Entries whose batch is forgotten look as if no batch had sent them."""
    with pytest.raises(InvalidConfig, match="raise ledger_days"):
        swept(stack, ledger_days=60)
    with pytest.raises(InvalidConfig, match="chunk_rows"):
        Retention(chunk_rows=0)


# ── crashes and zombies ──────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "crash",
    [
        "before record_action 1",
        "after record_action 1",
        "after delete 1",
        "before record_swept 1",
        "after record_swept 1",
        "after delete 4",
        "after record_swept 3",
        "after close_letters 1",
        "after compact 1",
    ],
)
def test_a_sweep_that_dies_anywhere_is_taken_up_and_every_row_counted_once(exported: Stack, crash: str) -> None:
    """Deleted rows are counted in the same transaction, so the record has the right number whichever sweep deleted them."""
    age(exported, 500, 1, 2, 3)
    point = CrashPoint(crash)
    with pytest.raises(Crash):
        sweep(exported.outbox, CrashingMaintenance(exported.upkeep, point), exported.log, Retention(chunk_rows=4), BY)
    swept(exported, chunk_rows=4)

    assert outbox_rows(exported) == 0
    ledger = exported.sql("SELECT state, swept_rows, swept_at_ms FROM clickhouse_outbox_batch WHERE batch_id > 0")
    assert [(row.state, row.swept_rows, row.swept_at_ms is not None) for row in ledger] == [("compacted", 10, True)] * 3
    recorded = exported.sql("SELECT SUM(row_count) AS n FROM clickhouse_outbox_action WHERE verb = 'sweep'")
    assert int(str(recorded[0].n)) == ROWS
    assert in_view(exported) == (ROWS, ROWS)


@pytest.mark.parametrize(
    "crash", ["before record_action 1", "after record_action 1", "after unmark 1", "after unmark 2"]
)
def test_a_requeue_that_dies_anywhere_is_repeated_and_exports_once(
    exported: Stack, monkeypatch: pytest.MonkeyPatch, crash: str
) -> None:
    """The second call finds the rows that are not pending yet."""
    monkeypatch.setattr("auditexport_pipeline.core.requeue.CHUNK_ROWS", 7)
    crashing = CrashingMaintenance(exported.upkeep, CrashPoint(crash))
    with pytest.raises(Crash):
        requeue(exported.outbox, crashing, exported.log, RowFilter(batch_ids=(1, 2)), BY)
    cleared = exported.pending()
    assert requeued(exported, batch_ids=(1, 2)).rows == 20 - cleared
    assert exported.pending() == 20
    run(exported)

    assert exported.pending() == 0
    assert in_view(exported) == (ROWS, ROWS)
    assert exported.clickhouse("SELECT count() FROM audit_logs_raw_v1") == [(ROWS + 20,)]
    recorded = exported.sql("SELECT SUM(row_count) AS n FROM clickhouse_outbox_action WHERE verb = 'requeue'")
    assert int(str(recorded[0].n)) == 20


@pytest.mark.parametrize("drained", [False, True])
def test_a_sweep_that_slept_leaves_what_was_requeued_meanwhile(exported: Stack, drained: bool) -> None:
    """It wakes with an old list: rows that are pending again, or were exported anew, are not past retention."""
    age(exported, 31, 1, 2, 3)

    def meanwhile() -> None:
        requeued(exported, batch_ids=(1,))
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
