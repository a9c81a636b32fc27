"""A row's identity is its event, never its pk: pks that begin again, pk 0, and texts that a collation calls equal.

Requeues of rows that are what they were are in `integration.maintenance.test_requeue` and `integration.export.test_exactly_once`.
"""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.dead_letters import DeadLetterFilter
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql import dead_letters
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import Row, put_with_meta, run, small_event
from auditexport_tests.support.maintenance import (
    BY,
    batch_states,
    clear_marks,
    lose_events,
    move_back,
    outbox_rows,
    pending_events,
    reconciled,
    requeued,
    swept,
)

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

LIMITS = Limits()


def put(stack: Stack, prefix: str, rows: int) -> list[int]:
    return stack.put(*(event(f"{prefix}_{number}", number) for number in range(rows)))


def event(event_id: str, at_ms: int = 1, workspace_id: str = "ws") -> Row:
    return small_event(event_id, workspace_id, time=at_ms)


def insert_at(stack: Stack, events: dict[int, Row]) -> None:
    """Rows under pks that we choose, as a restored dump has them: also pk 0."""
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql("SET SESSION sql_mode = 'NO_AUTO_VALUE_ON_ZERO'")
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
            "VALUES (%s, 'audit_log.v1', %s, %s, %s, 1)",
            [(pk, *row) for pk, row in events.items()],
        )
        connection.exec_driver_sql("SET SESSION sql_mode = 'STRICT_ALL_TABLES'")


def times(stack: Stack) -> dict[str, list[int]]:
    """The `inserted_at` of each event's entries."""
    found: dict[str, list[int]] = {}
    for event_id, at_ms in stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1 ORDER BY inserted_at"):
        found.setdefault(str(event_id), []).append(int(str(at_ms)))
    return found


def begin_again(stack: Stack, how: str = "truncate") -> None:
    """Lets the outbox give out pks a second time."""
    if how == "truncate":
        stack.sql("TRUNCATE TABLE clickhouse_outbox")
    elif how == "new table":
        stack.sql("RENAME TABLE clickhouse_outbox TO clickhouse_outbox_old")
        stack.sql("CREATE TABLE clickhouse_outbox LIKE clickhouse_outbox_old")
    else:
        stack.sql("DELETE FROM clickhouse_outbox")
        stack.sql("ALTER TABLE clickhouse_outbox AUTO_INCREMENT = 1")


def replace_rows(stack: Stack, rows: int) -> None:
    """Exports old events; then there are as many new ones under their pks."""
    pks = put(stack, "old", rows)
    run(stack)
    begin_again(stack)
    assert put(stack, "new", rows) == pks


def expire(stack: Stack) -> None:
    """Makes batch 1 a hundred days old; ClickHouse has deleted its entries."""
    move_back(stack, 100, "batch_id = 1")
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - :ms WHERE batch_id = 1", ms=100 * DAY_MS
    )
    stack.clickhouse("TRUNCATE TABLE audit_logs_raw_v1")


# ── pks that begin again ─────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["truncate", "new table", "auto increment"])
def test_new_events_under_old_pks_get_a_time_of_their_own(stack: Stack, how: str) -> None:
    """Under the old `inserted_at` the TTL would delete them together with the old events."""
    old = put(stack, "old", 5)
    run(stack)
    (first_ms,) = {at for found in times(stack).values() for at in found}
    issues = [finding.what for finding in preflight.check(stack.outbox, stack.log)]
    begin_again(stack, how)
    assert put(stack, "new", 3) == old[:3]
    repeat = [finding.what for finding in preflight.check(stack.outbox, stack.log) if finding.what not in issues]
    assert "pks repeat" in repeat[0], "doctor says it"
    run(stack)
    assert stack.pending() == 0
    assert all(at_ms > first_ms for number in range(3) for at_ms in times(stack)[f"new_{number}"])
    assert {row.generation for row in stack.sql("SELECT generation FROM clickhouse_outbox_batch")} == {0}
    assert stack.counts() == (8, 8)
    assert reconciled(stack).clean
    assert batch_states(stack) == ["verified", "verified"]


@pytest.mark.parametrize("meta", ['{"k": 1, "k": 2}', '{"k": 1e999}'])
def test_a_reconciliation_ends_beside_rows_that_clickhouse_does_not_parse(stack: Stack, meta: str) -> None:
    """Such a row can stand under the pk of an event that has expired (simulation, seed 6130)."""
    put(stack, "old", 2)
    run(stack)
    begin_again(stack)
    expire(stack)
    put(stack, "new", 1)
    put_with_meta(stack, "odd", meta)  # the JSON type of MySQL refuses the second one, and then nothing stands beside

    report = reconciled(stack)
    assert not report.found.missing, report


@pytest.mark.parametrize(
    ("how", "size"), [("truncate", 10), ("truncate", 2_000_000), ("new table", 10), ("UPDATE", 10)]
)
def test_a_claimed_row_that_gets_an_unknown_version_is_not_touched(stack: Stack, how: str, size: int) -> None:
    """Until its seal a batch is a list of pks. The row under such a pk can be replaced by one of an unknown version."""
    pks = put(stack, "old", 3)
    (claim,) = claiming.claim(stack.outbox, owner="one", dead_owners=(), limits=LIMITS)
    if how == "UPDATE":
        stack.sql("UPDATE clickhouse_outbox SET version = 'AUDIT_LOG.v1' WHERE pk = :pk", pk=pks[1])
    else:
        begin_again(stack, how)
        assert put(stack, "new", 1) == pks[:1]
        stack.put(small_event("unknown", "ws", description="x" * size), version="audit_log.v9")
        assert put(stack, "later", 1) == pks[2:]
    fetched = export.fetch(stack.outbox, stack.log, claim, LIMITS)
    receipt = export.write(stack.outbox, stack.log, claim, fetched.bodies, LIMITS)
    batch = export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert (batch.rows, batch.counts.vanished) == (2, 1)
    assert stack.sql("SELECT pk FROM clickhouse_outbox WHERE deleted_at IS NULL")[0].pk == pks[1]
    assert sorted(times(stack)) == (["old_0", "old_2"] if how == "UPDATE" else ["later_0", "new_0"])


@pytest.mark.parametrize("stamp", ["5", "UNIX_TIMESTAMP(NOW(3)) * 1000"], ids=["no time", "now"])
def test_a_mark_by_hand_under_an_old_pk_is_found(stack: Stack, stamp: str) -> None:
    """No batch has exported this event, although a batch had another one under its pk."""
    replace_rows(stack, 5)
    stack.sql(f"UPDATE clickhouse_outbox SET deleted_at = {stamp} WHERE event_id IN ('new_1', 'new_3')")
    run(stack)
    assert str(reconciled(stack, repair=BY).found) == "2 missing"
    assert stack.pending() == 2
    run(stack)
    assert reconciled(stack).clean
    assert stack.counts() == (10, 10)


def test_a_requeue_of_what_is_missing_goes_by_the_event(stack: Stack) -> None:
    """The batch that had the pk has lost nothing, and the new event was never sent; nor is it as old as that batch."""
    replace_rows(stack, 5)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = UNIX_TIMESTAMP(NOW(3)) * 1000")
    assert requeued(stack, missing_only=True, event_ids=("new_1",)).rows == 1
    assert stack.pending() == 1
    expire(stack)
    week = {"from_ms": stack.upkeep.now_ms() - 7 * DAY_MS}
    assert reconciled(stack, repair=BY, **week).found.missing == 4
    assert stack.pending() == 5
    run(stack)
    assert sorted(times(stack)) == [f"new_{number}" for number in range(5)]
    assert reconciled(stack, **week).found.missing == 0


def test_a_row_that_others_mark_while_its_batch_is_at_work_is_no_loss(stack: Stack) -> None:
    """The batch has sent it. If ClickHouse loses it, that is reported once, with the batch."""
    pks = put(stack, "old", 5)
    run(stack)
    stack.sql(
        "UPDATE clickhouse_outbox SET deleted_at = UNIX_TIMESTAMP(NOW(3)) * 1000 + 1000 WHERE pk = :pk", pk=pks[2]
    )
    assert reconciled(stack).clean
    lose_events(stack, "old_2")
    assert str(reconciled(stack).found) == "1 missing"


def test_one_batch_holds_proven_requeues_and_new_events(stack: Stack) -> None:
    """After an AUTO_INCREMENT that was set back, requeued rows and new ones are side by side."""
    pks = put(stack, "old", 4)
    run(stack)
    before = times(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[2])
    insert_at(stack, {pks[2]: event("new_2", 7)})
    clear_marks(stack, f"pk IN ({pks[0]}, {pks[1]})")
    run(stack)
    after = times(stack)
    assert set(after["old_0"]) == set(before["old_0"])
    assert set(after["old_1"]) == set(before["old_1"])
    assert after["new_2"][0] > before["old_2"][0]
    assert reconciled(stack).clean
    assert batch_states(stack) == ["verified", "verified"]
    # The new row's own loss is seen, although its batch requeued others.
    lose_events(stack, "new_2")
    assert str(reconciled(stack).found) == "1 missing"


def test_what_clickhouse_lost_goes_out_under_its_first_time(stack: Stack) -> None:
    """The seal proves what ClickHouse cannot: the whole block still reads as it was sealed."""
    put(stack, "old", 4)
    run(stack)
    before = times(stack)
    lose_events(stack, "old_1")
    reconciled(stack, repair=BY)
    run(stack)
    assert times(stack) == before
    assert batch_states(stack) == ["discrepant", "verified"]
    reconciled(stack)
    assert batch_states(stack) == ["verified", "verified"]


def test_a_repair_that_nothing_proves_goes_out_as_new_and_ends(stack: Stack) -> None:
    """Another row of the block is gone, so no digest proves the lost one; without an end it would be repaired for ever."""
    pks = put(stack, "old", 4)
    run(stack)
    before = times(stack)
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk = :pk", pk=pks[3])
    lose_events(stack, "old_1")
    reconciled(stack, repair=BY)
    run(stack)
    assert times(stack)["old_1"][0] > before["old_1"][0]
    for _ in range(2):
        assert reconciled(stack, repair=BY).clean
    assert stack.pending() == 0
    assert batch_states(stack) == ["verified", "verified"]


@pytest.mark.parametrize("drained", [False, True])
def test_losses_of_an_old_batch_are_told_apart_from_its_successors(stack: Stack, drained: bool) -> None:
    """Rows under its pks that are other events are neither its missing entries nor a reason for them."""
    replace_rows(stack, 6)
    if drained:
        run(stack)
    assert reconciled(stack).found.unexpected == 0
    lose_events(stack, "old_1", "old_4")
    found = reconciled(stack).found
    assert (found.unexpected, found.altered, found.duplicated) == (0, 0, 0)
    if drained:
        assert found.missing == 2


def test_a_batch_is_not_requeued_over_its_successors(stack: Stack) -> None:
    """An old batch names its events, not those that have its pks now."""
    replace_rows(stack, 3)
    run(stack)
    requeued(stack, batch_ids=(1,))
    assert stack.pending() == 0


def test_a_sweep_deletes_no_row_on_behalf_of_a_batch_that_had_its_pk(stack: Stack) -> None:
    """Another exporter marked the new rows, and no check has found them in ClickHouse."""
    replace_rows(stack, 3)
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = 1000 WHERE batch_id = 1")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1001")
    assert swept(stack).batches == 1
    assert outbox_rows(stack) == 3


def test_a_dead_letter_does_not_hide_the_next_row_of_its_pk(stack: Stack) -> None:
    """A good row would stay in the outbox for ever, and no number would show it; a bad one would be claimed by every drain."""
    pks = stack.put(("ws", "bad", "{}"), ("ws", "worse", "[]"), ("ws", "worst", "[]"))
    run(stack)
    dead_letters.discard(stack.outbox, DeadLetterFilter(pks=PkSet.of([pks[1]])), BY)
    begin_again(stack)
    assert [*put(stack, "new", 2), *stack.put(("ws_2", "bad again", "{}"))] == pks
    assert stack.outbox.backlog(tuple(VERSIONS), count_to=100).rows == 3
    run(stack)
    assert pending_events(stack) == ["bad again"]
    assert stack.counts() == (2, 2)
    (letter,) = stack.sql("SELECT workspace_id, event_id, state FROM clickhouse_outbox_dead_letter WHERE pk = 3")
    assert (letter.workspace_id, letter.event_id, letter.state) == ("ws_2", "bad again", "open")
    assert run(stack) == 0


# ── pk 0, and the last one ───────────────────────────────────────────────────────────────────────


def test_the_first_and_the_last_pk_are_exported(stack: Stack) -> None:
    """NO_AUTO_VALUE_ON_ZERO lets an application write pk 0. Its dead letter can be retried too."""
    names = {1: "one", 2**64 - 2: "last but one", 2**64 - 1: "last"}
    insert_at(stack, {0: ("ws", "zero", "{}")} | {pk: event(event_id) for pk, event_id in names.items()})
    run(stack)
    assert set(times(stack)) == set(names.values())
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(), BY).changed == 1
    stack.sql("UPDATE clickhouse_outbox SET payload = :payload WHERE pk = 0", payload=event("zero")[2])
    run(stack)
    assert set(times(stack)) == {"zero", *names.values()}
    assert stack.pending() == 0
    assert reconciled(stack).clean


# ── texts that a collation calls equal ───────────────────────────────────────────────────────────

LOOKALIKES = ("audit_log.v1 ", "audit_log.v1\t", "audit_log.v1\0", "AUDIT_LOG.V1", "audit_log.v1\u200b")


@pytest.mark.parametrize("collation", ["utf8mb4_bin", "utf8mb4_general_ci", "utf8mb4_unicode_ci"])
def test_versions_that_only_look_known_stay_untouched_and_counted(stack: Stack, collation: str) -> None:
    """A row of another version is not ours to read, whatever the column's collation makes of its name."""
    stack.sql(
        f"ALTER TABLE clickhouse_outbox MODIFY COLUMN version VARCHAR(64) CHARACTER SET utf8mb4 COLLATE {collation} NOT NULL"
    )
    for number, version in enumerate(LOOKALIKES):
        stack.put(event(f"other_{number}"), version=version)
    put(stack, "known", 2)
    run(stack)
    backlog = stack.outbox.backlog(tuple(VERSIONS), count_to=100)
    assert set(times(stack)) == {"known_0", "known_1"}
    assert stack.pending() == len(LOOKALIKES)
    assert (backlog.rows, backlog.unknown_rows) == (0, len(LOOKALIKES))


def test_a_requeue_takes_exactly_the_ids_that_were_named(stack: Stack) -> None:
    """`acme` and `acme ` are two tenants."""
    column = "VARCHAR(48) CHARACTER SET utf8mb4 COLLATE utf8mb4_general_ci NOT NULL"
    stack.sql(f"ALTER TABLE clickhouse_outbox MODIFY COLUMN workspace_id {column}, MODIFY COLUMN event_id {column}")
    stack.put(event("a", workspace_id="acme"), event("b", workspace_id="acme "), event("c", workspace_id="ACME"))
    stack.put(event("x"), event("x "), event("X"))
    run(stack)
    requeued(stack, workspace_id="acme")
    assert pending_events(stack) == ["a"]
    requeued(stack, event_ids=("x ",))
    assert pending_events(stack) == ["a", "x "]


# ── selections of any length ─────────────────────────────────────────────────────────────────────


def test_a_requeue_or_a_retry_of_thousands_of_named_rows_is_recorded(stack: Stack) -> None:
    """The record is a column of 64 KB; an incident's list of ids is longer."""
    ids = [f"evt_{number:044}" for number in range(2_200)]
    *_, bad_pk = stack.put(event(ids[0]), event(ids[-1]), event("other"), ("ws", "bad", "{}"))
    run(stack)
    assert requeued(stack, event_ids=tuple(ids)).rows == 2
    (action,) = stack.sql("SELECT selection, row_count FROM clickhouse_outbox_action")
    selection = json.loads(str(action.selection))
    assert (selection["event_ids"][0], selection["event_ids_count"], action.row_count) == (ids[0], 2_200, 2)
    assert len(selection["event_ids_sha256"]) == 64

    pks = PkSet.of([bad_pk, *(2**63 + 2 * number for number in range(4_000))])
    assert dead_letters.retry(stack.outbox, DeadLetterFilter(pks=pks), BY).changed == 1
