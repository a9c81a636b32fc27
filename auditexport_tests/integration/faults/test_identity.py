"""A row's identity is its event, never its pk: pks that begin again, pk 0, and texts that a collation calls equal.

What belongs here: what is exported, under which `inserted_at`, and what reconciliation and the sweep make of it. What does
not: requeues of rows that are what they were (`integration.maintenance.test_requeue`, `integration.export.test_exactly_once`).
"""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import urls

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

LIMITS = Limits()


Prompt = Callable[..., Result]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """`auditexport …` in this process, pointed at the stack."""
    for name, value in urls(stack).items():
        monkeypatch.setenv(name, value)
    return lambda *words: CliRunner().invoke(main, list(words))


def put(stack: Stack, prefix: str, rows: int, *, version: str = "audit_log.v1") -> list[int]:
    return stack.put(*(event(f"{prefix}_{number}", number) for number in range(rows)), version=version)


def event(event_id: str, at_ms: int = 1, workspace_id: str = "ws") -> tuple[str, str, str]:
    body = {"event_id": event_id, "time": at_ms, "workspace_id": workspace_id, "event": "a.b"}
    return workspace_id, event_id, json.dumps(body)


def slots(stack: Stack) -> dict[str, list[int]]:
    """The `inserted_at` of each event's entries."""
    found: dict[str, list[int]] = {}
    for event_id, at_ms in stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1 ORDER BY inserted_at"):
        found.setdefault(str(event_id), []).append(int(str(at_ms)))
    return found


def lose(stack: Stack, *event_ids: str) -> None:
    ids = ", ".join(f"'{event_id}'" for event_id in event_ids)
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id IN ({ids})", settings={"mutations_sync": 2}
    )


def generations(stack: Stack) -> list[int]:
    return [
        int(str(row.generation))
        for row in stack.sql("SELECT generation FROM clickhouse_outbox_batch WHERE batch_id > 0")
    ]


def states(stack: Stack) -> list[str]:
    return [str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")]


def begin_again(stack: Stack, how: str) -> None:
    """Lets the outbox hand out pks a second time."""
    if how == "truncate":
        stack.sql("TRUNCATE TABLE clickhouse_outbox")
    elif how == "new table":
        stack.sql("RENAME TABLE clickhouse_outbox TO clickhouse_outbox_old")
        stack.sql("CREATE TABLE clickhouse_outbox LIKE clickhouse_outbox_old")
    else:
        stack.sql("DELETE FROM clickhouse_outbox")
        stack.sql("ALTER TABLE clickhouse_outbox AUTO_INCREMENT = 1")


def expire(stack: Stack) -> None:
    """Makes batch 1 a hundred days old; ClickHouse holds nothing any more."""
    old_ms = 100 * 86_400_000
    for column in ("inserted_at_ms", "exported_at_ms"):
        stack.sql(f"UPDATE clickhouse_outbox_batch SET {column} = {column} - :ms WHERE batch_id = 1", ms=old_ms)
    (row,) = stack.sql("SELECT manifest FROM clickhouse_outbox_batch WHERE batch_id = 1")
    manifest = json.loads(str(row.manifest))
    for block in manifest:
        block["at"] -= old_ms
    stack.sql("UPDATE clickhouse_outbox_batch SET manifest = :text WHERE batch_id = 1", text=json.dumps(manifest))
    stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")


# ── pks that begin again ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["truncate", "new table", "auto increment"])
def test_new_events_under_old_pks_get_a_time_of_their_own(stack: Stack, prompt: Prompt, how: str) -> None:
    """Under the old `inserted_at` they would be dropped by the TTL as soon as their predecessors are."""
    old = put(stack, "old", 5)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    (first_ms,) = {at for times in slots(stack).values() for at in times}
    begin_again(stack, how)
    assert put(stack, "new", 3) == old[:3]
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert stack.pending() == 0
    assert all(at_ms > first_ms for number in range(3) for at_ms in slots(stack)[f"new_{number}"])
    assert generations(stack) == [0, 0]
    assert stack.counts() == (8, 8)
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0
    assert states(stack) == ["verified", "verified"]


@pytest.mark.parametrize("size", [10, 2_000_000], ids=["small", "large"])
@pytest.mark.parametrize("how", ["truncate", "new table", "auto increment", "UPDATE"])
def test_a_claimed_row_that_becomes_one_of_an_unknown_version_is_not_touched(stack: Stack, how: str, size: int) -> None:
    """Until its seal a batch is a list of pks. The row under such a pk can be replaced by one of an unknown version."""
    pks = put(stack, "old", 3)
    (claim,) = claiming.claim(stack.outbox, owner="one", dead_owners=(), limits=LIMITS)
    if how == "UPDATE":
        stack.sql("UPDATE clickhouse_outbox SET version = 'AUDIT_LOG.v1' WHERE pk = :pk", pk=pks[1])
    else:
        begin_again(stack, how)
        assert put(stack, "new", 1) == pks[:1]
        workspace_id, event_id, payload = event("unknown")
        payload = json.dumps({**json.loads(payload), "description": "x" * size})
        stack.put((workspace_id, event_id, payload), version="audit_log.v9")
        assert put(stack, "later", 1) == pks[2:]
    receipt = export.write(
        stack.outbox, stack.log, claim, export.fetch(stack.outbox, stack.log, claim, LIMITS).bodies, LIMITS
    )
    batch = export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert (batch.rows, batch.counts.vanished) == (2, 1)
    assert stack.sql("SELECT pk FROM clickhouse_outbox WHERE deleted_at IS NULL")[0].pk == pks[1]
    assert sorted(slots(stack)) == (["old_0", "old_2"] if how == "UPDATE" else ["later_0", "new_0"])


@pytest.mark.parametrize("stamp", ["5", "UNIX_TIMESTAMP(NOW(3)) * 1000"], ids=["no time", "now"])
@pytest.mark.parametrize("how", ["truncate", "new table", "auto increment"])
def test_a_mark_by_hand_under_an_old_pk_is_found(stack: Stack, prompt: Prompt, how: str, stamp: str) -> None:
    """Nobody has exported this event; that a batch had another one under its pk says nothing about it."""
    put(stack, "old", 5)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    begin_again(stack, how)
    put(stack, "new", 5)
    stack.sql(f"UPDATE clickhouse_outbox SET deleted_at = {stamp} WHERE event_id IN ('new_1', 'new_3')")
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    found = prompt("reconcile", "--repair", "--why", "lost", "--who", "me", "--json")
    told = json.loads(found.output)
    assert (told["missing"], told["unexpected"], told["altered"], told["duplicated"]) == (2, 0, 0, 0)
    assert stack.pending() == 2
    drain(stack.outbox, stack.log, LIMITS, owner="three")
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0
    assert stack.counts() == (10, 10)


def test_a_requeue_of_what_is_missing_goes_by_the_event(stack: Stack, prompt: Prompt) -> None:
    """The batch that had the pk has lost nothing, and the new event was never sent; nor is it as old as that batch."""
    put(stack, "old", 5)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    begin_again(stack, "truncate")
    put(stack, "new", 5)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = UNIX_TIMESTAMP(NOW(3)) * 1000")
    told = json.loads(prompt("requeue", "--missing-only", "--event-id", "new_1", "--why", "lost", "--json").output)
    assert (told["rows"], stack.pending()) == (1, 1)
    expire(stack)
    told = json.loads(prompt("reconcile", "--repair", "--why", "lost", "--who", "me", "--json").output)
    assert (told["missing"], stack.pending()) == (4, 5)
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert sorted(slots(stack)) == [f"new_{number}" for number in range(5)]
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0


def test_a_row_that_others_mark_while_its_batch_is_at_work_is_no_loss(stack: Stack, prompt: Prompt) -> None:
    """The batch has sent it; its own loss is named once, with the batch."""
    pks = put(stack, "old", 5)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    stack.sql(
        "UPDATE clickhouse_outbox SET deleted_at = UNIX_TIMESTAMP(NOW(3)) * 1000 + 1000 WHERE pk = :pk", pk=pks[2]
    )
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0
    lose(stack, "old_2")
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 1


def test_one_batch_holds_proven_requeues_and_new_events(stack: Stack, prompt: Prompt) -> None:
    """After an AUTO_INCREMENT that was set back, requeued rows and new ones lie side by side."""
    pks = put(stack, "old", 4)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    before = slots(stack)
    workspace_id, event_id, payload = event("new_2", 7)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[2])
    stack.sql(
        "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
        "VALUES (:pk, 'audit_log.v1', :ws, :id, :payload, 1)",
        pk=pks[2],
        ws=workspace_id,
        id=event_id,
        payload=payload,
    )
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE pk IN (:a, :b)", a=pks[0], b=pks[1])
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    after = slots(stack)
    assert set(after["old_0"]) == set(before["old_0"])
    assert set(after["old_1"]) == set(before["old_1"])
    assert after["new_2"][0] > before["old_2"][0]
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0
    assert states(stack) == ["verified", "verified"]
    # The new row's own loss is seen, although its batch requeued others.
    lose(stack, "new_2")
    found = json.loads(prompt("reconcile", "--json").output)
    assert (found["missing"], found["unexpected"], found["altered"]) == (1, 0, 0)


def test_what_clickhouse_lost_goes_out_under_its_first_time(stack: Stack, prompt: Prompt) -> None:
    """The sealed record proves what ClickHouse cannot: the whole block still reads as it was sealed."""
    put(stack, "old", 4)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    before = slots(stack)
    lose(stack, "old_1")
    prompt("reconcile", "--repair", "--why", "lost", "--who", "me")
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert slots(stack) == before
    assert states(stack) == ["discrepant", "verified"]
    prompt("reconcile")
    assert states(stack) == ["verified", "verified"]


def test_a_repair_that_nothing_proves_goes_out_as_new_and_ends(stack: Stack, prompt: Prompt) -> None:
    """A row of the block is gone, so that no digest speaks for the lost one; repairing it again and again would not end."""
    pks = put(stack, "old", 4)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    before = slots(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[3])
    lose(stack, "old_1")
    prompt("reconcile", "--repair", "--why", "lost", "--who", "me")
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert slots(stack)["old_1"][0] > before["old_1"][0]
    for _ in range(2):
        found = json.loads(prompt("reconcile", "--repair", "--why", "lost", "--who", "me", "--json").output)
        assert (found["missing"], found["unexpected"], found["altered"]) == (0, 0, 0)
    assert stack.pending() == 0
    assert states(stack) == ["verified", "verified"]


@pytest.mark.parametrize("drained", [False, True])
def test_losses_of_an_old_batch_are_told_apart_from_its_successors(stack: Stack, prompt: Prompt, drained: bool) -> None:
    """Rows under its pks that are other events are neither its missing entries nor an excuse for them."""
    put(stack, "old", 6)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    begin_again(stack, "truncate")
    put(stack, "new", 6)
    if drained:
        drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert json.loads(prompt("reconcile", "--json").output)["unexpected"] == 0
    lose(stack, "old_1", "old_4")
    found = json.loads(prompt("reconcile", "--json").output)
    assert (found["unexpected"], found["altered"], found["duplicated"]) == (0, 0, 0)
    if drained:
        assert found["missing"] == 2


def test_a_batch_is_not_requeued_over_its_successors(stack: Stack, prompt: Prompt) -> None:
    """`--batch` of an old batch names its events, not those that have its pks now."""
    put(stack, "old", 3)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    begin_again(stack, "truncate")
    put(stack, "new", 3)
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    prompt("requeue", "--batch", "1", "--why", "a test", "--who", "me")
    assert stack.pending() == 0


def test_a_sweep_deletes_no_row_on_behalf_of_a_batch_that_had_its_pk(stack: Stack, prompt: Prompt) -> None:
    """Another exporter marked the new rows, and nobody has seen them in ClickHouse."""
    put(stack, "old", 3)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = 1000 WHERE batch_id = 1")
    begin_again(stack, "truncate")
    put(stack, "new", 3)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1001")
    prompt("sweep", "--who", "me")
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 3


def test_an_unproven_row_lives_its_own_retention(stack: Stack) -> None:
    """A requeue under an `inserted_at` past the TTL is marked and dropped on arrival: lost."""
    pks = put(stack, "old", 2)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    expire(stack)
    begin_again(stack, "truncate")
    assert put(stack, "new", 2) == pks
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    stack.log.client().command("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert stack.counts() == (2, 2)


def test_a_dead_letter_does_not_hide_the_next_row_of_its_pk(stack: Stack, prompt: Prompt) -> None:
    """Held by pk alone, a good row would stay in the outbox for ever, and no number would show it."""
    pks = stack.put(("ws", "bad", "{}"), ("ws", "worse", "[]"))
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    prompt("dead-letters", "discard", "--pk", str(pks[1]), "--why", "a test", "--who", "me")
    begin_again(stack, "truncate")
    assert put(stack, "new", 2) == pks
    shown = json.loads(prompt("status", "--json").output)
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    assert stack.pending() == 0
    assert stack.counts() == (2, 2)
    assert shown["backlog_rows"] == 2


def test_a_new_dead_letter_takes_the_place_of_an_old_one(stack: Stack, prompt: Prompt) -> None:
    """A letter with the old row's ids would not hold the new row: it would be claimed and refused by every drain."""
    pks = stack.put(("ws", "bad", "{}"))
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    begin_again(stack, "truncate")
    assert stack.put(("ws_2", "worse", "[]")) == pks
    drain(stack.outbox, stack.log, LIMITS, owner="two")
    (letter,) = stack.sql("SELECT workspace_id, event_id, state FROM clickhouse_outbox_dead_letter")
    assert (letter.workspace_id, letter.event_id, letter.state) == ("ws_2", "worse", "open")
    assert drain(stack.outbox, stack.log, LIMITS, owner="three") == []


def test_the_doctor_says_that_pks_repeat(stack: Stack, prompt: Prompt) -> None:
    """Nothing is lost by it, but whoever did it should know what becomes of requeues and dead letters."""
    put(stack, "old", 5)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    assert "pks repeat" not in prompt("doctor").output
    begin_again(stack, "truncate")
    put(stack, "new", 1)
    assert "pks repeat" in prompt("doctor").output


# ── pk 0, and the last one ───────────────────────────────────────────────────────────────────────


def test_the_first_and_the_last_pk_are_exported(stack: Stack, prompt: Prompt) -> None:
    """NO_AUTO_VALUE_ON_ZERO lets an application write pk 0, and a restored dump does."""
    at = {0: "zero", 1: "one", 2**64 - 2: "last but one", 2**64 - 1: "last"}
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql("SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO'")
        for pk, event_id in at.items():
            _, _, payload = event(event_id)
            connection.exec_driver_sql(
                "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
                "VALUES (%s, 'audit_log.v1', 'ws', %s, %s, 1)",
                (pk, event_id, payload),
            )
        connection.exec_driver_sql("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    assert set(slots(stack)) == set(at.values())
    assert stack.pending() == 0
    assert json.loads(prompt("reconcile", "--json").output)["missing"] == 0


def test_a_dead_letter_of_pk_0_can_be_retried(stack: Stack, prompt: Prompt) -> None:
    """An operator's page that begins above 0 would never come to it."""
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql("SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO'")
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
            "VALUES (0, 'audit_log.v1', 'ws', 'bad', '{}', 1)"
        )
        connection.exec_driver_sql("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    prompt("dead-letters", "retry", "--all", "--why", "a test", "--who", "me")
    assert [row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_dead_letter")] == ["retried"]


# ── texts that a collation calls equal ───────────────────────────────────────────────────────────

LOOKALIKES = ("audit_log.v1 ", "audit_log.v1\t", "audit_log.v1\0", "AUDIT_LOG.V1", "audit_log.v1\u200b")


@pytest.mark.parametrize("collation", ["utf8mb4_bin", "utf8mb4_general_ci", "utf8mb4_unicode_ci"])
def test_versions_that_only_look_known_stay_untouched_and_counted(stack: Stack, prompt: Prompt, collation: str) -> None:
    """A row of another version is not ours to read, whatever the column's collation makes of its name."""
    stack.sql(
        f"ALTER TABLE clickhouse_outbox MODIFY COLUMN version VARCHAR(64) CHARACTER SET utf8mb4 COLLATE {collation} NOT NULL"
    )
    for number, version in enumerate(LOOKALIKES):
        stack.put(event(f"other_{number}"), version=version)
    put(stack, "known", 2)
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    shown = json.loads(prompt("status", "--json").output)
    assert set(slots(stack)) == {"known_0", "known_1"}
    assert stack.pending() == len(LOOKALIKES)
    assert (shown["backlog_rows"], shown["unknown_rows"]) == (0, len(LOOKALIKES))


def test_a_requeue_takes_exactly_the_ids_that_were_named(stack: Stack, prompt: Prompt) -> None:
    """`acme` and `acme ` are two tenants; one requeued for the other is an incident."""
    column = "VARCHAR(48) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL"
    stack.sql(f"ALTER TABLE clickhouse_outbox MODIFY COLUMN workspace_id {column}, MODIFY COLUMN event_id {column}")
    stack.put(event("a", workspace_id="acme"), event("b", workspace_id="acme "), event("c", workspace_id="ACME"))
    stack.put(event("x"), event("x "), event("X"))
    drain(stack.outbox, stack.log, LIMITS, owner="one")

    def pending() -> list[str]:
        return [
            str(row.event_id) for row in stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at IS NULL")
        ]

    prompt("requeue", "--workspace", "acme", "--why", "a test", "--who", "me")
    assert pending() == ["a"]
    prompt("requeue", "--event-id", "x ", "--why", "a test", "--who", "me")
    assert pending() == ["a", "x "]


# ── selections of any length ─────────────────────────────────────────────────────────────────────


def test_a_requeue_of_thousands_of_named_events_is_recorded(stack: Stack, prompt: Prompt) -> None:
    """The record of it is a column of 64 KB; an incident's list of ids is longer."""
    ids = [f"evt_{number:044}" for number in range(2_200)]
    stack.put(event(ids[0]), event(ids[-1]), event("other"))
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    done = prompt(
        "requeue", *(word for one in ids for word in ("--event-id", one)), "--why", "a test", "--who", "me", "--json"
    )
    assert done.exit_code == 0, done.output
    assert json.loads(done.output)["rows"] == 2
    (action,) = stack.sql("SELECT selection, row_count FROM clickhouse_outbox_action")
    selection = json.loads(str(action.selection))
    assert (selection["event_ids"][0], selection["event_ids_count"], action.row_count) == (ids[0], 2_200, 2)


def test_a_retry_of_thousands_of_named_letters_is_recorded(stack: Stack, prompt: Prompt) -> None:
    """Whoever names them one by one has them from a script."""
    (pk,) = stack.put(("ws", "bad", "{}"))
    drain(stack.outbox, stack.log, LIMITS, owner="one")
    pks = [str(pk), *(str(2**63 + 2 * number) for number in range(4_000))]
    done = prompt(
        "dead-letters", "retry", *(word for one in pks for word in ("--pk", one)), "--why", "a test", "--who", "me"
    )
    assert done.exit_code == 0
    assert [row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_dead_letter")] == ["retried"]
