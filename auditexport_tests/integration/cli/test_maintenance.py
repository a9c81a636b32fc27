"""Requeue, sweep, reconcile and erasures at the prompt: what an operator types, and the status a script reads."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.core.requeue import Requeue
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.sweep import Sweep
from auditexport_pipeline.defs.report import reconcile_metadata, requeue_metadata, sweep_metadata
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

Prompt = Callable[..., Result]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """Thirty exported events, and the prompt pointed at them."""
    seed_outbox(stack.mysql_url, seed=2, events=30, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    return lambda *words: CliRunner().invoke(main, list(words), catch_exceptions=False)


def lose(stack: Stack) -> tuple[str, str]:
    """Deletes one event from ClickHouse; returns its workspace and id."""
    ((workspace_id, event_id),) = stack.clickhouse(
        "SELECT workspace_id, event_id FROM audit_logs_raw_v1 ORDER BY time LIMIT 1"
    )
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
    )
    return str(workspace_id), str(event_id)


def test_a_loss_is_mended_at_the_prompt(prompt: Prompt, stack: Stack) -> None:
    """Find, repair, drain, and see that it is gone, with statuses that a script can use."""
    assert prompt("reconcile").exit_code == 0
    _, event_id = lose(stack)
    found = prompt("reconcile", "--repair", "--why", "lost", "--who", "me")
    assert found.exit_code == 1
    assert "they differ: 1 missing" in found.output
    assert event_id in found.output
    assert "requeued 1 rows" in found.output
    drain(stack.outbox, stack.log, Limits(), owner="two")
    clean = prompt("reconcile", "--json")
    assert clean.exit_code == 0
    assert json.loads(clean.output)["missing"] == 0
    assert stack.counts() == (30, 30)


def test_a_requeue_is_told_before_it_is_done(prompt: Prompt, stack: Stack) -> None:
    """`--dry-run` says how many rows and from which batches."""
    told = prompt("requeue", "--batch", "1", "--why", "look", "--dry-run")
    assert (told.exit_code, stack.pending()) == (0, 0)
    assert "would requeue 30 rows of 1 batches" in told.output
    done = prompt("requeue", "--batch", "1", "--why", "wanted", "--json")
    assert json.loads(done.output)["by_batch"] == {"1": 30}
    assert stack.pending() == 30
    nothing = prompt("requeue", "--to-exported", "2020-01-01", "--why", "none")
    assert "requeued 0 rows" in nothing.output


def test_calls_that_make_no_sense_are_refused_in_one_line(prompt: Prompt) -> None:
    """Status 2: the call is wrong, nothing was done."""
    refused = prompt("requeue", "--why", "everything")
    assert (refused.exit_code, refused.output.count("\n")) == (2, 1)
    assert "a requeue names its rows" in refused.output
    assert prompt("requeue", "--batch", "1").exit_code == 2
    assert "is no time" in prompt("reconcile", "--from", "yesterday").output
    assert prompt("sweep", "--chunk-rows", "0").exit_code == 2


def test_a_sweep_says_what_it_left(prompt: Prompt, stack: Stack) -> None:
    """A batch that ClickHouse lost is left, and the status says so."""
    told = prompt("sweep", "--outbox-days", "0", "--dry-run")
    assert "would sweep 30 rows of 1 batches" in told.output
    lose(stack)
    left = prompt("sweep", "--outbox-days", "0")
    assert left.exit_code == 1
    assert "batch 1 was left: ClickHouse no longer holds it (1 missing)" in left.output
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 30


def test_an_erasure_is_recorded_and_listed(prompt: Prompt, stack: Stack) -> None:
    """Who, when, why, which: and reconciliation no longer calls it a loss."""
    workspace_id, event_id = lose(stack)
    added = prompt(
        "erasures", "add", "--workspace", workspace_id, "--event-id", event_id, "--why", "request 7", "--who", "me"
    )
    assert added.exit_code == 0
    told = json.loads(
        prompt(
            "erasures",
            "add",
            "--workspace",
            workspace_id,
            "--event-id",
            "none",
            "--why",
            "request 7",
            "--who",
            "me",
            "--json",
        ).output
    )
    assert told == {"erasures": 1, "action_id": 2}
    stack.sql("DELETE FROM clickhouse_outbox_erasure WHERE action_id = 2")
    listed = json.loads(prompt("erasures", "list", "--json").output)["erasures"]
    assert [(one["who"], one["why"], one["event_id"]) for one in listed] == [("me", "request 7", event_id)]
    assert "request 7" in prompt("erasures", "list").output
    clean = prompt("reconcile")
    assert clean.exit_code == 0
    assert "1 erased on record" in clean.output


def test_programs_find_the_names_of_the_page(prompt: Prompt) -> None:
    """Whoever reads a run's metadata in one place and the prompt's JSON in another must not have to translate."""
    told = json.loads(prompt("requeue", "--batch", "1", "--why", "look", "--dry-run", "--json").output)
    assert set(requeue_metadata(Requeue())) - {"per_batch"} <= set(told)
    assert (told["rows"], told["dry_run"], told["action_id"]) == (30, True, None)
    told = json.loads(prompt("sweep", "--outbox-days", "0", "--dry-run", "--json").output)
    assert set(sweep_metadata(Sweep())) <= set(told)
    told = json.loads(prompt("reconcile", "--json").output)
    assert set(reconcile_metadata(Report(from_ms=0, to_ms=1))) - {"report"} <= set(told)
    assert (told["entries_expected"], told["entries_stored"], told["blocks"]) == (30, 30, 1)
