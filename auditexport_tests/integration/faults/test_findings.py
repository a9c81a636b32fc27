"""A finding of a reconciliation stays open until its window was reconciled again."""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import count, events, insert_batch, lose, run
from auditexport_tests.support.prompts import Prompt


@pytest.fixture(autouse=True)
def exported(stack: Stack) -> None:
    """Four exported events, of a ledger that begins ten days ago: since then, an entry that no batch had is a finding."""
    stack.put(*events(4))
    run(stack)
    nothing = dict.fromkeys(("claimed_rows", "row_count", "entry_count", "bytes", "attempts"), 0)
    insert_batch(stack, 1000, state="compacted", inserted_at_ms=stack.upkeep.now_ms() - 10 * DAY_MS, **nothing)


def invent(stack: Stack, days_ago: int) -> None:
    """An entry that no batch sent, stored some days ago."""
    stack.clickhouse(
        "INSERT INTO audit_logs_raw_v1 SELECT * REPLACE ('evt_invented' AS event_id, "
        f"inserted_at - {days_ago * DAY_MS} AS inserted_at) FROM (SELECT * FROM audit_logs_raw_v1 WHERE event_id = 'evt_0')"
    )


def reconcile(auditexport: Prompt, days: int, *, finds: bool = False) -> None:
    auditexport("reconcile", "--days", str(days), status=int(finds))


def healthy(auditexport: Prompt) -> bool:
    verdict = str(json.loads(auditexport("status", "--json", status=None).output)["verdict"])
    assert verdict.startswith("healthy") or verdict == "needs an operator: 1 error"
    return verdict.startswith("healthy")


def test_a_clean_check_of_a_day_hides_no_finding_of_the_week(auditexport: Prompt, stack: Stack) -> None:
    """A check every hour covers a day: the week's finding is still there when that check is clean."""
    reconcile(auditexport, 7)
    assert healthy(auditexport)
    invent(stack, 3)
    reconcile(auditexport, 7, finds=True)
    for _ in range(3):
        assert not healthy(auditexport)
        reconcile(auditexport, 1)
    assert "1 unexpected" in auditexport("status", status=None).output
    errors = [one["about"] for one in json.loads(auditexport("status", "--json", status=None).output)["todo"]]
    assert "reconcile" in errors
    assert 'kind="unexpected"} 1' in auditexport("metrics").output

    lose(stack, "evt_invented")
    assert not healthy(auditexport), "nobody has checked again"
    reconcile(auditexport, 7)
    assert healthy(auditexport)


def test_reconciliations_that_cover_a_finding_together_close_it(auditexport: Prompt, stack: Stack) -> None:
    """People choose the windows: two halves are as good as the whole."""
    invent(stack, 3)
    invent(stack, 5)
    reconcile(auditexport, 7, finds=True)
    lose(stack, "evt_invented")
    now_ms = stack.upkeep.now_ms()
    old, middle, now = (str(now_ms - days * DAY_MS) for days in (8, 4, 0))
    auditexport("reconcile", "--from", middle, "--to", now)
    assert not healthy(auditexport)
    auditexport("reconcile", "--from", old, "--to", middle)
    assert healthy(auditexport)


def test_a_finding_outlives_any_number_of_reconciliations_elsewhere(auditexport: Prompt, stack: Stack) -> None:
    """Checks run for weeks while an operator is on holiday."""
    invent(stack, 3)
    reconcile(auditexport, 7, finds=True)
    reconcile(auditexport, 1)
    for _ in range(6):  # as sixty hourly checks of the last day would
        stack.sql(
            "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
            "SELECT at_ms + 1, verb, who, why, selection, row_count FROM clickhouse_outbox_action WHERE action_id > 1"
        )
    assert count(stack, "clickhouse_outbox_action") > 60
    assert not healthy(auditexport)
    assert "1 unexpected" in auditexport("status", status=None).output


def test_a_record_of_an_earlier_release_stands_too(auditexport: Prompt, stack: Stack) -> None:
    """It says how much differed in which window, and not where: all of the window has to be reconciled again."""
    now_ms = stack.upkeep.now_ms()
    record = {"from_ms": now_ms - 7 * DAY_MS, "to_ms": now_ms, "batches": 1, "missing": 2}
    stack.sql(
        "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
        "VALUES (:at, 'reconcile', 'old', 'x', :record, 0)",
        at=now_ms - HOUR_MS,
        record=json.dumps(record),
    )
    reconcile(auditexport, 1)
    assert not healthy(auditexport)
    reconcile(auditexport, 8)
    assert healthy(auditexport)
