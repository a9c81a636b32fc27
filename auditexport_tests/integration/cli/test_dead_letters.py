"""`auditexport dead-letters`: what is printed, what is refused, and the exit statuses.

`integration.maintenance.test_dead_letters` has what the commands do to the letters.
"""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.maintenance.test_dead_letters import CANARY, bad, mend, recorded, states
from auditexport_tests.support.builders import small_event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    run = prompt_in({"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "COLUMNS": "160"}, monkeypatch)
    return lambda *words, **options: run("dead-letters", *words, **options)


@pytest.fixture
def pks(stack: Stack) -> list[int]:
    """Three dead letters: wrong_type of ws_a and of ws_b, missing_field of ws_b."""
    rows = bad("evt_1", "ws_a"), bad("evt_2", "ws_b"), ("ws_b", "evt_3", '{"event_id": "evt_3"}'), small_event("evt_4")
    *dead, _ = stack.put(*rows)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    return dead


def test_letters_are_listed_by_filter_as_a_table_and_as_json(prompt: Prompt, pks: list[int]) -> None:
    """A person reads the table and a program the JSON; both must have the same, and no payload."""
    table = prompt("list").output
    for text in ("3 open dead letters", "wrong_type", "missing_field", "ws_a", "evt_3", "$.time"):
        assert text in table
    values = json.loads(prompt("list", "--workspace", "ws_b", "--newest", "--json").output)
    assert [letter["pk"] for letter in values["letters"]] == [pks[2], pks[1]]
    assert values["counts"]["by_reason"] == {"wrong_type": 1, "missing_field": 1}
    assert "0 open dead letters" in prompt("list", "--older-than", "30d").output
    assert f"more: --beyond {pks[0]}" in prompt("list", "--limit", "1").output
    assert CANARY not in table + json.dumps(values)


def test_one_letter_is_shown_and_its_payload_only_on_request(prompt: Prompt, pks: list[int]) -> None:
    """No other command prints a payload, and this one only with an option."""
    pk = str(pks[0])
    shown = prompt("show", pk).output
    assert "pending" in shown
    assert "wrong_type at $.time" in shown
    assert CANARY not in shown
    assert CANARY in prompt("show", pk, "--payload").output
    assert json.loads(prompt("show", pk, "--json").output)["payload"] is None
    assert "has no dead letter" in prompt("show", "999999", status=1).output


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("retry", "--all"),
        ("discard --all", "--why"),
        ("discard --all --why=", "why is empty"),
        ("retry --workspace=", "workspace_id is empty"),
        ("list --older-than 30", "is no age"),
    ],
)
def test_nothing_is_done_without_a_filter_or_a_reason(
    prompt: Prompt, pks: list[int], stack: Stack, words: str, message: str
) -> None:
    """The command that gives up every tenant's evidence must not be the shortest one."""
    assert message in prompt(*words.split(), status=2).output
    assert (states(stack), recorded(stack)) == (dict.fromkeys(pks, "open"), [])


def test_letters_are_retried_and_discarded_and_the_record_says_who_and_why(
    prompt: Prompt, pks: list[int], stack: Stack
) -> None:
    """An auditor asks who gave an event up, and why."""
    assert "would be discarded: 3" in prompt("discard", "--all", "--why", "noise", "--dry-run").output
    assert json.loads(prompt("retry", "--all", "--dry-run", "--json").output)["counts"]["letters"] == 3
    assert (states(stack), recorded(stack)) == (dict.fromkeys(pks, "open"), [])
    mend(stack, pks[0])
    retried = prompt("retry", "--workspace", "ws_a", "--who", "ada", "--why", "writer 2.1 is out").output
    assert "retried: 1 dead letter (" in retried
    discard = ("discard", "--pk", str(pks[1]), "--why", "a test account", "--who", "bob", "--json")
    done = json.loads(prompt(*discard).output)
    assert (done["changed"], done["gone"], len(done["action_ids"])) == (1, 0, 1)
    assert recorded(stack) == [("discard", "bob", "a test account", 1), ("retry", "ada", "writer 2.1 is out", 1)]
    assert states(stack) == dict(zip(pks, ("retried", "discarded", "open"), strict=True))
    assert "discard by bob" in prompt("show", str(pks[1])).output
    drain(stack.outbox, stack.log, Limits(), owner="two")
    assert "exported since" in prompt("show", str(pks[0])).output
