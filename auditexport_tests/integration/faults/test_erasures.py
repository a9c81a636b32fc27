"""A recorded erasure explains what it names and what existed when it was recorded, and nothing else."""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline.core.actions import Actor, Erasure, RowFilter
from auditexport_pipeline.core.reconcile import Report, reconcile
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

BY = Actor(who="auditor", why="a test")
ROWS = 50


@pytest.fixture
def exported(stack: Stack) -> Stack:
    """Fifty events of workspace ws_1, exported and verified."""
    put(stack, *(f"evt_{n}" for n in range(ROWS)))
    drain(stack.outbox, stack.log, Limits(), owner="drain")
    return stack


def put(stack: Stack, *event_ids: str) -> None:
    event = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "event": "a.b"}
    stack.put(*(("ws_1", event_id, json.dumps({**event, "event_id": event_id})) for event_id in event_ids))


def record(stack: Stack, *, days_ago: float = 0, workspace_id: str = "ws_1", event_id: str = "") -> None:
    """Records an erasure, some days ago by the record's account."""
    action_id = stack.upkeep.add_erasures(BY, [Erasure(workspace_id=workspace_id, event_id=event_id)])
    stack.sql(
        "UPDATE clickhouse_outbox_action SET at_ms = at_ms - :ms WHERE action_id = :id",
        ms=int(days_ago * DAY_MS),
        id=action_id,
    )


def lose(stack: Stack, condition: str = "1") -> None:
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {condition}", settings={"mutations_sync": 2}
    )


def look(stack: Stack, *, dry_run: bool = False) -> Report:
    return reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62, dry_run=dry_run)


def in_outbox(stack: Stack) -> int:
    return int(str(stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n))


def sweep_all(stack: Stack) -> None:
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=0), BY)


def forget_rows(stack: Stack) -> None:
    """As after a sweep: the ledger is the only witness."""
    stack.sql("DELETE FROM clickhouse_outbox")
    stack.sql("UPDATE clickhouse_outbox_batch SET swept_at_ms = 1 WHERE batch_id > 0")


def test_an_erasure_recorded_before_the_export_excuses_nothing(exported: Stack) -> None:
    """It is 200 days old, and the loss is of today: the outbox's copies are the last ones."""
    record(exported, days_ago=200)
    lose(exported)
    sweep_all(exported)
    assert in_outbox(exported) == ROWS
    assert str(look(exported).found) == f"{ROWS} missing"


def test_what_was_exported_when_it_was_recorded_is_erased(exported: Stack) -> None:
    """That is what it is for; the outbox's copies go with it, and nobody is alarmed then or later."""
    record(exported)
    lose(exported)
    seen = look(exported, dry_run=True)
    assert (str(seen.found), seen.explained) == ("none", {"erased on record": ROWS})
    sweep_all(exported)
    assert in_outbox(exported) == 0
    assert look(exported).clean


def test_what_waited_in_the_outbox_when_it_was_recorded_is_erased_too(exported: Stack) -> None:
    """It existed; that a drain came later does not make it another event."""
    put(exported, "evt_waiting")
    record(exported, event_id="evt_waiting")
    drain(exported.outbox, exported.log, Limits(), owner="later")
    lose(exported, "event_id = 'evt_waiting'")
    report = look(exported)
    assert (str(report.found), report.explained) == ("none", {"erased on record": 1})


def test_what_came_into_the_outbox_later_is_not_erased(exported: Stack) -> None:
    """An application that writes old times into created_at must not make a new event an old one."""
    record(exported)
    put(exported, "evt_new")
    exported.sql("UPDATE clickhouse_outbox SET created_at = 1 WHERE event_id = 'evt_new'")
    drain(exported.outbox, exported.log, Limits(), owner="later")
    lose(exported, "event_id = 'evt_new'")
    assert str(look(exported).found) == "1 missing"


def test_what_was_exported_again_after_it_was_recorded_is_not_erased(exported: Stack) -> None:
    """A requeue keeps its inserted_at and is an export of its own: somebody wanted the event back."""
    record(exported, days_ago=0)
    lose(exported)
    requeue(exported.outbox, exported.upkeep, exported.log, RowFilter(event_ids=("evt_7",)), BY)
    drain(exported.outbox, exported.log, Limits(), owner="again")
    lose(exported)
    report = look(exported)
    assert (str(report.found), report.found.event_ids) == ("1 missing", ("evt_7",))
    assert report.explained == {"erased on record": ROWS - 1}


def test_an_erasure_of_one_event_excuses_one_entry(exported: Stack) -> None:
    """Its rows are gone, so nobody can say which entries these were; fifty are not one."""
    record(exported, event_id="evt_7")
    forget_rows(exported)
    lose(exported)
    report = look(exported)
    assert str(report.found) == f"{ROWS - 1} missing"
    assert report.explained == {"gone since an erasure, unprovable": 1}
    assert str(look(exported).found) == f"{ROWS - 1} missing", (
        "what was excused once is not expected to be excused again"
    )


def test_an_erasure_of_one_event_excuses_one_entry_of_all_batches(exported: Stack) -> None:
    """Two batches that lost one each cannot both have lost the same event."""
    put(exported, "evt_other")
    drain(exported.outbox, exported.log, Limits(), owner="other")
    record(exported, event_id="evt_7")
    forget_rows(exported)
    lose(exported, "event_id IN ('evt_7', 'evt_other')")
    assert str(look(exported).found) == "1 missing"


def test_an_erasure_that_is_not_carried_out_excuses_nothing(exported: Stack) -> None:
    """ClickHouse holds what it names, so what is gone is something else."""
    record(exported, event_id="evt_7")
    forget_rows(exported)
    lose(exported, "event_id = 'evt_8'")
    assert str(look(exported).found) == "1 missing"


def test_a_year_old_erasure_of_another_workspace_excuses_nothing(exported: Stack) -> None:
    """One request of last year must not hide every loss from then on."""
    record(exported, days_ago=365, workspace_id="ws_other", event_id="evt_1")
    forget_rows(exported)
    lose(exported)
    assert str(look(exported).found) == f"{ROWS} missing"


def test_swept_rows_leave_the_names_of_their_workspaces(exported: Stack) -> None:
    """So an erasure of another workspace, however recent, explains none of what is lost later."""
    sweep_all(exported)
    assert in_outbox(exported) == 0
    record(exported, workspace_id="ws_other")
    lose(exported, "event_id = 'evt_8'")
    assert str(look(exported).found) == "1 missing"
    record(exported, workspace_id="ws_1", event_id="evt_8")
    report = look(exported)
    assert (str(report.found), report.explained) == ("none", {"gone since an erasure, unprovable": 1})
