"""`auditexport batches`: the ledger as a list, and one batch in full."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import Any

import pytest

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.requeue import requeue
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """Four verified batches of run-a and two claimed ones of run-b; the commands have no ClickHouse."""
    seed_outbox(stack.mysql_url, seed=1, events=60, malformed=2, writers=1)
    drain(stack.outbox, stack.log, Limits(batch_rows=10, max_batches=4), owner="run-a")
    claiming.claim(stack.outbox, owner="run-b", dead_owners=(), limits=Limits(batch_rows=10, max_batches=2))
    monkeypatch.delenv("AUDITEXPORT_CLICKHOUSE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return prompt_in({"AUDITEXPORT_MYSQL_URL": stack.mysql_url}, monkeypatch)


def listed(prompt: Prompt, *words: str) -> list[dict[str, Any]]:
    return list(json.loads(prompt("batches", "list", *words, "--json").output)["batches"])


def ids(prompt: Prompt, *words: str) -> list[int]:
    return [one["batch_id"] for one in listed(prompt, *words)]


def test_batches_are_listed_by_state_owner_and_time(prompt: Prompt, stack: Stack) -> None:
    """Each filter answers a question of the engineer on call: what is open, what did that run do, since when."""
    assert ids(prompt) == [6, 5, 4, 3, 2, 1]
    assert ids(prompt, "--open") == [6, 5]
    assert ids(prompt, "--state", "verified", "--state", "claimed", "--limit", "3") == [6, 5, 4]
    assert ids(prompt, "--state", "discrepant") == []
    assert ids(prompt, "--owner", "run-a") == [4, 3, 2, 1]
    assert ids(prompt, "--owner", "run-") == [6, 5, 4, 3, 2, 1]
    assert ids(prompt, "--owner", "nobody") == []
    assert ids(prompt, "--limit", "2", "--before", "4") == [3, 2]
    stack.sql("UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - 7200000 WHERE batch_id IN (1, 2)")
    assert ids(prompt, "--since", "1h") == [6, 5, 4, 3]
    assert ids(prompt, "--since", "3h") == [6, 5, 4, 3, 2, 1]
    assert ids(prompt, "--since", "2999-01-01") == []
    assert "is no time" in prompt("batches", "list", "--since", "yesterday", status=2).output


def test_the_list_is_paged_through_a_long_ledger(prompt: Prompt, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A year of batches is read page by page, and each batch is listed once."""
    monkeypatch.setattr("auditexport_pipeline.mysql.ledger.PAGE_ROWS", 2)
    assert ids(prompt) == [6, 5, 4, 3, 2, 1]
    assert ids(prompt, "--owner", "run-a", "--limit", "3") == [4, 3, 2]
    assert ids(prompt, "--state", "verified") == [4, 3, 2, 1]
    shown = prompt("batches", "list", "--limit", "2").output
    assert shown.splitlines()[-1] == "older: --before 5"


def test_the_table_has_state_owner_and_error(prompt: Prompt, stack: Stack) -> None:
    """The first question on call is which run has a batch, and why it is stuck."""
    stack.sql("UPDATE clickhouse_outbox_batch SET last_error = 'rows changed' WHERE batch_id = 6")
    shown = prompt("batches", "list").output
    (sixth,) = [line for line in shown.splitlines() if line.startswith("6 ")]
    assert all(text in sixth for text in ("claimed", "run-b", "rows changed"))
    assert "no such batches" in prompt("batches", "list", "--state", "stopped").output


def test_a_batch_is_shown_with_its_times_blocks_and_tokens(prompt: Prompt, stack: Stack) -> None:
    """The history of a batch is evidence: it is shown without SQL, and agrees with ClickHouse."""
    values = json.loads(prompt("batches", "show", "2", "--json").output)
    assert (values["state"], values["owner"], values["generation"]) == ("verified", "run-a", 0)
    steps = [(step["state"], step["at_ms"]) for step in values["steps"]]
    assert [name for name, _ in steps] == ["claimed", "sealed", "written", "verified"]
    assert all(earlier <= later for (_, earlier), (_, later) in pairwise(steps))
    (block,) = values["blocks"]
    ((stored,),) = stack.clickhouse(
        "SELECT count() FROM audit_logs_raw_v1 WHERE inserted_at = {at:Int64}", at=block["inserted_at_ms"]
    )
    assert stored == block["rows"] == block["observed_entries"] == values["entries"]
    assert block["token"] == f"auditexport-2-0-{block['digest']}-0"
    stamped = stack.sql(
        "SELECT COUNT(*) AS n FROM clickhouse_outbox WHERE deleted_at = :at", at=values["exported_at_ms"]
    )
    assert stamped[0].n == values["rows"]
    shown = prompt("batches", "show", "2").output
    assert all(
        text in shown for text in ("verified", "run-a", block["digest"], block["token"], "sealed", "seen in ClickHouse")
    )
    assert "lease for another" in prompt("batches", "show", "6").output
    assert "not sealed yet" in prompt("batches", "show", "6").output


def test_an_unknown_batch_is_exit_status_1(prompt: Prompt) -> None:
    """A script must see that the number was wrong; row 0 of the ledger is its lock, not a batch."""
    assert "no batch 99" in prompt("batches", "show", "99", status=1).output
    prompt("batches", "show", "99", "--json", status=1)
    prompt("batches", "show", "0", status=2)


def test_a_requeue_and_a_swept_batch_are_recognizable(prompt: Prompt, stack: Stack) -> None:
    """Months later it explains why two batches have the same rows, and where the rows went."""
    requeue(stack.outbox, stack.upkeep, stack.log, RowFilter(batch_ids=(1,)), Actor(who="me", why="again"))
    drain(stack.outbox, stack.log, Limits(), owner="run-c", dead_owners=("run-b",))
    again = [one for one in listed(prompt) if one["generation"] == 1]
    assert [one["rows"] for one in again] == [json.loads(prompt("batches", "show", "1", "--json").output)["rows"]]
    assert "generation 1, a requeue" in prompt("batches", "show", str(again[0]["batch_id"])).output
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 500 * 86400000 WHERE deleted_at IS NOT NULL")
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 500 * 86400000 WHERE batch_id > 0")
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(), Actor(who="me", why="retention"))
    values = json.loads(prompt("batches", "show", "2", "--json").output)
    assert (values["state"], values["swept_rows"], values["pks"]) == ("compacted", values["rows"], "")
    assert "compacted" in prompt("batches", "show", "2").output


def test_a_folded_and_a_dead_row_are_in_the_counts(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The counts explain why fewer rows are exported than were claimed."""
    seed_outbox(stack.mysql_url, seed=2, events=20, malformed=3, writers=1)
    (claim,) = claiming.claim(stack.outbox, owner="run-a", dead_owners=(), limits=Limits())
    export.fetch(stack.outbox, stack.log, claim, Limits())
    ask = prompt_in({"AUDITEXPORT_MYSQL_URL": stack.mysql_url}, monkeypatch)
    assert "20 of 23 claimed: 3 dead" in ask("batches", "show", "1").output
