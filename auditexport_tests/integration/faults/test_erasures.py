"""A recorded erasure explains what it names and what existed when it was recorded, and nothing else."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.verify import verify
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import crash, run, small_event
from auditexport_tests.support.maintenance import (
    BY,
    forget_rows,
    lose,
    lose_events,
    outbox_rows,
    reconciled,
    requeued,
    swept,
)

ROWS = 50


@pytest.fixture
def exported(stack: Stack) -> Stack:
    """Fifty events of workspace ws_1, exported and verified."""
    stack.put(*(small_event(f"evt_{n}") for n in range(ROWS)))
    run(stack)
    return stack


def erase(stack: Stack, *, days_ago: float = 0, workspace_id: str = "ws_1", event_id: str = "") -> None:
    """Records an erasure, with a record that is some days old."""
    action_id = stack.upkeep.add_erasures(BY, [Erasure(workspace_id=workspace_id, event_id=event_id)])
    stack.sql(
        "UPDATE clickhouse_outbox_action SET at_ms = at_ms - :ms WHERE action_id = :id",
        ms=int(days_ago * DAY_MS),
        id=action_id,
    )


def test_an_erasure_recorded_before_the_export_excuses_nothing(exported: Stack) -> None:
    """It is 200 days old, and the loss is of today: the outbox has the last copies."""
    erase(exported, days_ago=200)
    lose(exported)
    swept(exported, outbox_days=0)
    assert outbox_rows(exported) == ROWS
    assert str(reconciled(exported).found) == f"{ROWS} missing"


def test_what_was_exported_when_it_was_recorded_is_erased(exported: Stack) -> None:
    """A sweep then deletes the outbox's copies, without an alarm now or later."""
    erase(exported)
    lose(exported)
    report = reconciled(exported, dry_run=True)
    assert (str(report.found), report.explained) == ("none", {"erased on record": ROWS})
    swept(exported, outbox_days=0)
    assert outbox_rows(exported) == 0
    assert reconciled(exported).clean


def test_what_was_pending_when_it_was_recorded_is_erased_too(exported: Stack) -> None:
    """A row that came later is another event, even if the application wrote an old time into created_at."""
    exported.put(small_event("evt_waiting"))
    erase(exported, event_id="evt_waiting")
    erase(exported)
    exported.put(small_event("evt_new"))
    exported.sql("UPDATE clickhouse_outbox SET created_at = 1 WHERE event_id = 'evt_new'")
    run(exported)
    lose_events(exported, "evt_waiting", "evt_new")
    report = reconciled(exported)
    assert (str(report.found), report.found.event_ids) == ("1 missing", ("evt_new",))
    assert report.explained == {"erased on record": 1}


def test_what_was_exported_again_after_it_was_recorded_is_not_erased(exported: Stack) -> None:
    """A requeue has the same inserted_at and is an export of its own: somebody wanted the event back."""
    erase(exported)
    lose(exported)
    requeued(exported, event_ids=("evt_7",))
    run(exported)
    lose(exported)
    report = reconciled(exported)
    assert (str(report.found), report.found.event_ids) == ("1 missing", ("evt_7",))
    assert report.explained == {"erased on record": ROWS - 1}


def test_an_erasure_of_one_event_excuses_one_entry(exported: Stack) -> None:
    """Without rows nobody can tell which entries these were. It excuses one entry of all batches together, once."""
    exported.put(small_event("evt_other"))
    run(exported)
    erase(exported, event_id="evt_7")
    forget_rows(exported)
    lose_events(exported, "evt_7", "evt_other")
    assert str(reconciled(exported, dry_run=True).found) == "1 missing"
    lose(exported)
    for _ in range(2):
        report = reconciled(exported)
        assert str(report.found) == f"{ROWS} missing"
        assert report.explained == {"gone since an erasure, unprovable": 1}


@pytest.mark.parametrize(
    "erasure",
    [
        {"event_id": "evt_7"},  # not carried out: ClickHouse has evt_7
        {"workspace_id": "ws_other", "event_id": "evt_1", "days_ago": 365},
    ],
)
def test_an_erasure_that_names_nothing_lost_excuses_nothing(exported: Stack, erasure: dict[str, object]) -> None:
    """One request to be forgotten must not hide every later loss."""
    erase(exported, **erasure)  # type: ignore[arg-type]
    forget_rows(exported)
    lose_events(exported, "evt_8")
    assert str(reconciled(exported).found) == "1 missing"


def test_the_ledger_has_the_workspaces_of_swept_rows(exported: Stack) -> None:
    """So an erasure of another workspace, however recent, explains none of what is lost later."""
    swept(exported, outbox_days=0)
    assert outbox_rows(exported) == 0
    erase(exported, workspace_id="ws_other")
    lose_events(exported, "evt_8")
    assert str(reconciled(exported).found) == "1 missing"
    erase(exported, event_id="evt_8")
    report = reconciled(exported)
    assert (str(report.found), report.explained) == ("none", {"gone since an erasure, unprovable": 1})


def test_a_late_verification_knows_what_was_erased(stack: Stack) -> None:
    """A run died before it verified; the next one must not call the erased event missing (simulation, seed 238)."""
    stack.put(*(small_event(f"evt_{n}") for n in range(ROWS)))
    crash(stack, "before record_verified 1", "dead", Limits())
    erase(stack, event_id="evt_7")
    lose_events(stack, "evt_7")
    assert stack.counts() == (ROWS - 1, ROWS - 1)

    outcome = verify(stack.outbox, stack.log, stack.outbox.unverified(10), upkeep=stack.upkeep)

    assert outcome
    assert not any(outcome.values())
    assert [row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")] == [
        "verified"
    ]


def bring_back(stack: Stack, event_id: str) -> None:
    """The event is erased, which a reconciliation explains, and sent again."""
    erase(stack, event_id=event_id)
    lose_events(stack, event_id)
    assert reconciled(stack).clean
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE event_id = :event_id", event_id=event_id)
    run(stack)


def test_an_erased_event_that_was_requeued_alters_nothing(exported: Stack) -> None:
    """One entry came back and another one went: there are as many as before, and not the same ones (simulation, seed 1019644)."""
    bring_back(exported, "evt_7")
    erase(exported, event_id="evt_8")
    lose_events(exported, "evt_8")
    assert str(reconciled(exported).found) == "none"


def test_an_erased_event_that_came_back_and_is_lost_is_missing(exported: Stack) -> None:
    """ClickHouse holds what it held when the erasure explained it, which explains no later loss (simulation, seed 1733)."""
    bring_back(exported, "evt_7")
    lose_events(exported, "evt_7")
    assert reconciled(exported).found.missing == 1
