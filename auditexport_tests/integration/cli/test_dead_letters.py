"""`auditexport dead-letters` at the prompt: what is printed, what is refused, and the exit statuses.

What belongs here: the commands as processes. What does not: what they do to the letters (`integration.maintenance.test_dead_letters`).
"""

from __future__ import annotations

import json

from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.cli.test_cli import _auditexport
from auditexport_tests.integration.maintenance.test_dead_letters import CANARY, bad, mend, recorded, states
from auditexport_tests.support.builders import small_event
from auditexport_tests.support.crashes import drain


def prompt(stack: Stack, *arguments: str, status: int = 0) -> str:
    """What the command prints, both streams; asserts its exit status."""
    done = _auditexport(
        "dead-letters",
        *arguments,
        AUDITEXPORT_MYSQL_URL=stack.mysql_url,
        AUDITEXPORT_CLICKHOUSE_URL=stack.clickhouse_url,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def set_aside(stack: Stack) -> list[int]:
    pks = stack.put(
        bad("evt_1", "ws_a"), bad("evt_2", "ws_b"), ("ws_b", "evt_3", '{"event_id": "evt_3"}'), small_event("evt_4")
    )
    drain(stack.outbox, stack.log, Limits(), owner="one")
    return pks[:3]


def test_letters_are_listed_by_filter_as_a_table_and_as_json(stack: Stack) -> None:
    """A person reads the table at night and a program the JSON; both must say the same, and no payload."""
    pks = set_aside(stack)
    table = prompt(stack, "list")
    assert "3 open dead letters" in table
    assert all(text in table for text in ("wrong_type", "missing_field", "ws_a", "evt_3", "$.time"))
    told = json.loads(prompt(stack, "list", "--workspace", "ws_b", "--newest", "--json"))
    assert [letter["pk"] for letter in told["letters"]] == [pks[2], pks[1]]
    assert told["counts"]["by_reason"] == {"wrong_type": 1, "missing_field": 1}
    assert "0 open dead letters" in prompt(stack, "list", "--older-than", "30d")
    assert f"more: --beyond {pks[0]}" in prompt(stack, "list", "--limit", "1")
    assert CANARY not in table + json.dumps(told)
    assert "is no age" in prompt(stack, "list", "--older-than", "30", status=2)


def test_one_letter_is_shown_and_its_payload_only_on_request(stack: Stack) -> None:
    """The one place where a payload is printed has to be asked for by name."""
    pk, *_ = set_aside(stack)
    told = prompt(stack, "show", str(pk))
    assert "pending" in told
    assert "wrong_type at $.time" in told
    assert CANARY not in told
    assert CANARY in prompt(stack, "show", str(pk), "--payload")
    assert json.loads(prompt(stack, "show", str(pk), "--json"))["payload"] is None
    assert "has no dead letter" in prompt(stack, "show", "999999", status=1)


def test_nothing_is_acted_on_without_a_filter_a_reason_or_a_word(stack: Stack) -> None:
    """The command that gives every tenant's evidence up must not be the shortest one."""
    pks = set_aside(stack)
    assert "--all" in prompt(stack, "retry", status=2)
    assert "--why" in prompt(stack, "discard", "--all", status=2)
    assert "why is empty" in prompt(stack, "discard", "--all", "--why", " ", status=2)
    assert "workspace_id is empty" in prompt(stack, "retry", "--workspace", "", status=2)
    assert "would be discarded: 3" in prompt(stack, "discard", "--all", "--why", "noise", "--dry-run")
    assert json.loads(prompt(stack, "retry", "--all", "--dry-run", "--json"))["counts"]["letters"] == 3
    assert (states(stack), recorded(stack)) == (dict.fromkeys(pks, "open"), [])


def test_letters_are_retried_and_discarded_and_the_record_says_who_and_why(stack: Stack) -> None:
    """Evidence about evidence: an auditor asks who gave an event up, and on what grounds."""
    pks = set_aside(stack)
    mend(stack, pks[0])
    assert "retried: 1 dead letters" in prompt(
        stack, "retry", "--workspace", "ws_a", "--who", "ada", "--why", "writer 2.1 is out"
    )
    told = json.loads(
        prompt(stack, "discard", "--pk", str(pks[1]), "--why", "a test account", "--who", "bob", "--json")
    )
    assert (told["changed"], told["gone"], len(told["action_ids"])) == (1, 0, 1)
    assert recorded(stack) == [("discard", "bob", "a test account", 1), ("retry", "ada", "writer 2.1 is out", 1)]
    assert states(stack) == dict(zip(pks, ("retried", "discarded", "open"), strict=True))
    assert "discard by bob" in prompt(stack, "show", str(pks[1]))
    drain(stack.outbox, stack.log, Limits(), owner="two")
    assert "exported since" in prompt(stack, "show", str(pks[0]))
