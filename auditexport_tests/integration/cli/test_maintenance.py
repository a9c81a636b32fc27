"""`auditexport requeue`, `sweep`, `reconcile` and `erasures`: what they print, and the status that a script reads."""

from __future__ import annotations

import json
from typing import Any

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in, urls


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """The commands over thirty exported events."""
    seed_outbox(stack.mysql_url, seed=2, events=30, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    return prompt_in(urls(stack), monkeypatch)


def values(prompt: Prompt, *words: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(prompt(*words, "--json").output)
    return found


def lose(stack: Stack) -> tuple[str, str]:
    """Deletes one event from ClickHouse; returns its workspace and id."""
    ((workspace_id, event_id),) = stack.clickhouse(
        "SELECT workspace_id, event_id FROM audit_logs_raw_v1 ORDER BY time LIMIT 1"
    )
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
    )
    return str(workspace_id), str(event_id)


def test_a_loss_is_found_repaired_and_gone_after_a_drain(prompt: Prompt, stack: Stack) -> None:
    """The way out of a loss, with statuses that a script can use."""
    prompt("reconcile")
    _, event_id = lose(stack)
    found = prompt("reconcile", "--repair", "--why", "lost", "--who", "me", status=1).output
    for text in ("they differ: 1 missing", event_id, "requeued 1 row,"):
        assert text in found
    drain(stack.outbox, stack.log, Limits(), owner="two")
    assert values(prompt, "reconcile")["missing"] == 0
    assert stack.counts() == (30, 30)


def test_a_dry_run_of_a_requeue_says_what_would_be_done(prompt: Prompt, stack: Stack) -> None:
    """How many rows, and of which batches; nothing is changed."""
    assert "would requeue 30 rows of 1 batch" in prompt("requeue", "--batch", "1", "--why", "x", "--dry-run").output
    planned = values(prompt, "requeue", "--batch", "1", "--why", "x", "--dry-run")
    assert (planned["rows"], planned["dry_run"], planned["action_id"], stack.pending()) == (30, True, None, 0)
    assert values(prompt, "requeue", "--batch", "1", "--why", "x")["by_batch"] == {"1": 30}
    assert stack.pending() == 30
    assert "requeued 0 rows" in prompt("requeue", "--to-exported", "2020-01-01", "--why", "none").output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("requeue --why everything", "a requeue names its rows"),
        ("requeue --batch 1", "--why"),
        ("reconcile --from yesterday", "is no time"),
        ("sweep --chunk-rows 0", "--chunk-rows"),
    ],
)
def test_a_wrong_call_is_refused(stack: Stack, monkeypatch: pytest.MonkeyPatch, words: str, message: str) -> None:
    """Status 2: the call is wrong, and nothing was done."""
    assert message in prompt_in(urls(stack), monkeypatch)(*words.split(), status=2).output


def test_a_sweep_leaves_a_batch_that_clickhouse_lost_and_says_so(prompt: Prompt, stack: Stack) -> None:
    """The outbox has the last copy."""
    assert "would sweep 30 rows of 1 batch" in prompt("sweep", "--outbox-days", "0", "--dry-run").output
    lose(stack)
    left = prompt("sweep", "--outbox-days", "0", status=1).output
    assert "batch 1 was left: ClickHouse no longer holds it (1 missing)" in left
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 30


def test_an_erasure_is_recorded_and_listed(prompt: Prompt, stack: Stack) -> None:
    """Who, when, why, which: and a reconciliation no longer calls it a loss."""
    workspace_id, event_id = lose(stack)
    add = ("erasures", "add", "--workspace", workspace_id, "--event-id", event_id, "--why", "request 7", "--who", "me")
    assert values(prompt, *add) == {"erasures": 1, "action_id": 1}
    listed = values(prompt, "erasures", "list")["erasures"]
    assert [(one["who"], one["why"], one["event_id"]) for one in listed] == [("me", "request 7", event_id)]
    assert "request 7" in prompt("erasures", "list").output
    assert "1 erased on record" in prompt("reconcile").output
