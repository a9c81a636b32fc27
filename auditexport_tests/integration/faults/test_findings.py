"""A finding of a reconciliation stands until somebody has looked at the same thing again."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS, HOUR_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

COLUMNS = (
    "event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name, "
    "actor_meta, remote_ip, user_agent, meta, `targets.type`, `targets.id`, `targets.name`, `targets.meta`, correlation_id"
)
Prompt = Callable[..., Result]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """Four exported events, of a ledger that begins ten days ago, and the prompt pointed at them."""
    event = {"time": 1_700_000_000_000, "workspace_id": "ws_1", "event": "a.b"}
    stack.put(*(("ws_1", f"evt_{n}", json.dumps({**event, "event_id": f"evt_{n}"})) for n in range(4)))
    drain(stack.outbox, stack.log, Limits(), owner="one")
    # A batch of no blocks, long ago: from then on, entries that no batch had are somebody's doing.
    stack.sql(
        "INSERT INTO clickhouse_outbox_batch (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, "
        "row_count, entry_count, bytes, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms) "
        "SELECT 1000, 0, 0, version, 'compacted', 'old', 0, 0, 0, 0, 0, '', '[]', '', '', inserted_at_ms - :ms, 0, '', "
        "claimed_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 1",
        ms=10 * DAY_MS,
    )
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    return lambda *words: CliRunner().invoke(main, list(words), catch_exceptions=False)


def invent(stack: Stack, days_ago: int) -> None:
    """An entry that no batch sent, stored some days ago."""
    columns = COLUMNS.replace("event_id", "'evt_invented'", 1).replace(
        "inserted_at", f"inserted_at - {days_ago * DAY_MS}"
    )
    stack.log.client().command(
        f"INSERT INTO audit_logs_raw_v1 ({COLUMNS}) SELECT {columns} FROM audit_logs_raw_v1 WHERE event_id = 'evt_0'"
    )


def verdict(prompt: Prompt) -> str:
    return str(json.loads(prompt("status", "--json").output)["verdict"])


def test_a_clean_look_at_a_day_hides_no_finding_of_the_week(prompt: Prompt, stack: Stack) -> None:
    """A check every hour looks at a day: the week's finding is still there when it says that all is well."""
    assert prompt("reconcile", "--days", "7").exit_code == 0
    assert verdict(prompt).startswith("healthy")
    invent(stack, 3)
    assert prompt("reconcile", "--days", "7").exit_code == 1
    assert verdict(prompt) == "needs an operator: 1 error"
    assert prompt("reconcile", "--days", "1").exit_code == 0
    assert verdict(prompt) == "needs an operator: 1 error"
    for _ in range(3):
        prompt("reconcile", "--days", "1")
    shown = prompt("status").output
    assert "1 unexpected" in shown

    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_invented'", settings={"mutations_sync": 2}
    )
    assert verdict(prompt) == "needs an operator: 1 error", "nobody has looked there yet"
    assert prompt("reconcile", "--days", "7").exit_code == 0
    assert verdict(prompt).startswith("healthy")


def test_looks_that_cover_a_finding_together_close_it(prompt: Prompt, stack: Stack) -> None:
    """Windows are chosen by people: two halves are as good as the whole."""
    invent(stack, 3)
    invent(stack, 5)
    assert prompt("reconcile", "--days", "7").exit_code == 1
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = 'evt_invented'", settings={"mutations_sync": 2}
    )
    now_ms = stack.upkeep.now_ms()
    halves = [now_ms - 8 * DAY_MS, now_ms - 4 * DAY_MS, now_ms]
    assert prompt("reconcile", "--from", str(halves[1]), "--to", str(halves[2])).exit_code == 0
    assert verdict(prompt) == "needs an operator: 1 error"
    assert prompt("reconcile", "--from", str(halves[0]), "--to", str(halves[1])).exit_code == 0
    assert verdict(prompt).startswith("healthy")


def test_a_finding_outlives_any_number_of_looks_elsewhere(prompt: Prompt, stack: Stack) -> None:
    """Checks run for weeks while an operator is on holiday."""
    invent(stack, 3)
    assert prompt("reconcile", "--days", "7").exit_code == 1
    # As sixty hourly checks would, which look at the last day.
    ((record,),) = stack.sql("SELECT selection FROM clickhouse_outbox_action WHERE verb = 'reconcile'")
    assert prompt("reconcile", "--days", "1").exit_code == 0
    for _ in range(6):
        stack.sql(
            "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
            "SELECT at_ms + 1, verb, who, why, selection, row_count FROM clickhouse_outbox_action "
            "WHERE verb = 'reconcile' AND selection != :record",
            record=record,
        )
    assert int(str(stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox_action")[0].n)) > 60
    assert verdict(prompt) == "needs an operator: 1 error"
    assert "1 unexpected" in prompt("status").output


def test_a_record_of_an_earlier_release_stands_too(prompt: Prompt, stack: Stack) -> None:
    """It says how much differed in which window, and not where: all of the window has to be looked at again."""
    now_ms = stack.upkeep.now_ms()
    record = {"from_ms": now_ms - 7 * DAY_MS, "to_ms": now_ms, "batches": 1, "missing": 2}
    stack.sql(
        "INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count) "
        "VALUES (:at, 'reconcile', 'old', 'x', :record, 0)",
        at=now_ms - HOUR_MS,
        record=json.dumps(record),
    )
    assert prompt("reconcile", "--days", "1").exit_code == 0
    assert verdict(prompt) == "needs an operator: 1 error"
    assert prompt("reconcile", "--days", "8").exit_code == 0
    assert verdict(prompt).startswith("healthy")


def test_the_metric_and_the_check_of_the_asset_say_the_same(prompt: Prompt, stack: Stack) -> None:
    """Who looks at a dashboard must not see another world than who looks at the prompt."""
    invent(stack, 3)
    prompt("reconcile", "--days", "7")
    prompt("reconcile", "--days", "1")
    told = json.loads(prompt("status", "--json").output)
    assert [one["about"] for one in told["todo"] if one["severity"] == "error"] == ["reconcile"]
    exported = prompt("metrics").output
    assert 'kind="unexpected"} 1' in exported.replace("1.0", "1")
