"""Reconciliation: the discrepancies that it finds, the differences that it explains, and what a repair exports again.

How a batch is verified right after its export is in `integration.export.test_exactly_once`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.actions import Erasure
from auditexport_pipeline.core.ports import AuditLog, StoredEntry
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits, Retention
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.verify import verify
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import merge, runner, small_event, stop_merges
from auditexport_tests.support.maintenance import (
    BY,
    batch_states,
    clear_marks,
    forget_rows,
    lose_events,
    mutate,
    reconciled,
    store_again,
)

pytestmark = [pytest.mark.mysql_sensitive, pytest.mark.clickhouse_sensitive]

LIMITS = Limits(batch_rows=20, blocks_per_batch=2, mark_rows=5, mark_connections=1)
ROWS = 60
run = runner(LIMITS)


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows, so that a batch has two insert groups."""
    monkeypatch.setattr(claiming, "SMALLEST_BLOCK_ROWS", 10)


@pytest.fixture
def exported(stack: Stack) -> Stack:
    """Sixty events of two writers, exported and verified; nothing merges until a test calls `merge`."""
    stop_merges(stack)
    seed_outbox(stack.mysql_url, seed=11, events=ROWS, writers=2)
    run(stack)
    return stack


def exported_row(stack: Stack, number: int) -> tuple[int, str, str]:
    """(pk, workspace_id, event_id) of an exported row."""
    row = stack.sql(
        "SELECT pk, workspace_id, event_id FROM clickhouse_outbox WHERE deleted_at IS NOT NULL ORDER BY pk"
    )[number]
    return int(str(row.pk)), str(row.workspace_id), str(row.event_id)


def alter(stack: Stack, event_id: str, update: str) -> None:
    mutate(stack, f"UPDATE {update} WHERE event_id = '{event_id}'")


# ── discrepancies ────────────────────────────────────────────────────────────────────────────────


def test_an_untouched_export_is_clean_and_nothing_is_read_twice(exported: Stack) -> None:
    """A check that reads every entry every time would be switched off."""
    report = reconciled(exported)
    assert report.clean
    assert (len(report.batches), report.slots, report.slots_read) == (3, 6, 0)
    assert sum(line.stored for line in report.batches) == ROWS
    assert sum(place.rows for place in report.places.values()) == ROWS
    assert sum(place.entries for place in report.places.values()) == ROWS
    assert report.missing_pks.runs == ()


def test_all_four_discrepancies_at_once_are_told_apart_and_repaired(exported: Stack) -> None:
    """An auditor reads each corruption under its own name, the repair, and the clean report after it."""
    deleted, altered, doubled = (exported_row(exported, number) for number in (1, 21, 41))
    lose_events(exported, deleted[2])
    alter(exported, altered[2], "meta = '{\"x\":1}'")
    store_again(exported, f"event_id = '{doubled[2]}'")
    # Rows that were never exported, with a mark that is no time, and with the mark of a batch.
    hidden = exported.put(small_event("evt_hidden"), small_event("evt_stamped"))
    stamp = exported.sql("SELECT MAX(deleted_at) AS at FROM clickhouse_outbox")[0].at
    for pk, at_ms in zip(hidden, (12345, stamp), strict=True):
        exported.sql("UPDATE clickhouse_outbox SET deleted_at = :at WHERE pk = :pk", at=at_ms, pk=pk)

    report = reconciled(exported, repair=BY)
    assert str(report.found) == "3 missing, 1 duplicated, 1 altered"
    assert set(report.found.event_ids) == {deleted[2], altered[2], doubled[2], "evt_hidden", "evt_stamped"}
    assert set(report.missing_pks) == {deleted[0], *hidden}
    day = report.batches[0].inserted_at_ms // DAY_MS * DAY_MS
    assert {place for place, numbers in report.places.items() if numbers.missing} == {(deleted[1], day), ("ws_1", day)}
    assert (report.repaired and report.repaired.rows, exported.pending()) == (3, 3)
    (action,) = exported.upkeep.actions(1)
    assert (action.verb, action.by, action.rows) == ("repair", BY, 3)
    assert batch_states(exported) == ["discrepant"] * 3
    assert reconciled(exported).explained == {"requeued and pending": 1}

    clear_marks(exported, f"pk = {altered[0]}")
    run(exported)
    merge(exported)
    assert reconciled(exported).clean
    assert set(batch_states(exported)) == {"verified"}
    assert exported.counts() == (ROWS + 2, ROWS + 2)


def test_an_entry_altered_in_clickhouse_is_found_each_time(exported: Stack) -> None:
    """Changing what an auditor will read is worse than losing it, metas included; a report does not accept the change."""
    updates = (
        "description = 'nothing happened'",
        "meta = '{\"innocent\":true}'",
        "actor_meta = '{\"innocent\":true}'",
        "actor_id = 'somebody_else'",
    )
    ids = [exported_row(exported, 12 * number)[2] for number in range(len(updates))]
    for event_id, update in zip(ids, updates, strict=True):
        alter(exported, event_id, update)
    for _ in range(2):
        report = reconciled(exported)
        assert (str(report.found), set(report.found.event_ids)) == ("4 altered", set(ids))
        assert report.missing_pks.runs == ()


def test_an_altered_entry_is_repaired_by_exporting_its_row_again(
    exported: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The outbox has the original; ReplacingMergeTree keeps what was inserted last.

    Until copies merge, ClickHouse returns them in any order: both are tried.
    """
    times = exported.log.count_by_inserted_at(0, 2**62)
    expected = {(entry.key, entry.content) for at_ms in times for entry in exported.log.entries_at(at_ms)}
    pk, _, event_id = exported_row(exported, 3)
    alter(exported, event_id, "description = 'x'")
    assert not reconciled(exported).clean
    clear_marks(exported, f"pk = {pk}")
    run(exported)
    read = type(exported.log).entries_at
    for altered_first in (True, False):

        def in_this_order(log: Any, inserted_at_ms: int, first: bool = altered_first) -> list[StoredEntry]:
            entries = read(log, inserted_at_ms)
            return sorted(entries, key=lambda entry: ((entry.key, entry.content) in expected) == first)

        monkeypatch.setattr(type(exported.log), "entries_at", in_this_order)
        assert reconciled(exported, dry_run=True).clean
    assert reconciled(exported).clean
    merge(exported)
    assert reconciled(exported).clean
    assert exported.counts() == (ROWS, ROWS)
    assert exported.clickhouse(
        f"SELECT count() FROM audit_logs WHERE event_id = '{event_id}' AND description = 'x'"
    ) == [(0,)]


def test_entries_that_no_batch_sent_are_found(exported: Stack) -> None:
    """A copy is found under its own `inserted_at` and under one that no batch had; so is an invented event."""
    ids = [exported_row(exported, number)[2] for number in (5, 25, 45)]
    store_again(exported, f"event_id = '{ids[0]}'")
    store_again(exported, f"event_id = '{ids[1]}'", inserted_at="inserted_at + 1000000")
    store_again(exported, f"event_id = '{ids[2]}'", event_id="'invented'")

    class Later(type(exported.upkeep)):  # type: ignore[misc]
        """A window that reaches past now, where one of the copies is."""

        def now_ms(self) -> int:
            return int(super().now_ms()) + 10_000_000

    report = reconcile(exported.outbox, Later(exported.outbox), exported.log, from_ms=0, to_ms=2**62)
    assert str(report.found) == "2 duplicated, 1 unexpected"
    assert set(report.found.event_ids) == {*ids[:2], "invented"}


def test_a_marked_row_that_does_not_decode_is_missing_or_a_dead_letter(exported: Stack) -> None:
    """A dead letter has a reason, and no repair can export it. Without one, the row would be lost without notice."""
    exported.put(("ws_1", "evt_letter", '{"event_id": "evt_letter"}'))
    run(exported)
    exported.put(("ws_1", "evt_unread", '{"event_id": "evt_unread"}'))
    exported.sql("UPDATE clickhouse_outbox SET deleted_at = 5 WHERE deleted_at IS NULL")

    report = reconciled(exported, repair=BY)
    assert (report.found.missing, report.found.event_ids) == (1, ("evt_unread",))
    run(exported)
    assert reconciled(exported).clean
    assert exported.outbox.dead_by_reason() == {"missing_field": 2}
    assert exported.upkeep.close_letters() == 1
    assert reconciled(exported).clean


def test_swept_rows_leave_counts_and_sums_to_compare(exported: Stack) -> None:
    """After retention only the ledger can tell that something is gone or was changed."""
    forget_rows(exported)
    assert reconciled(exported).clean
    first, second = (
        str(row[0])
        for row in exported.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY inserted_at, time LIMIT 2")
    )
    alter(exported, first, "meta = '{\"x\":1}'")
    assert str(reconciled(exported).found) == "1 altered"
    lose_events(exported, second)
    assert str(reconciled(exported).found) == "1 missing"


def test_a_loss_in_an_insert_group_that_was_requeued_since_is_not_hidden(exported: Stack) -> None:
    """A requeue compares its own rows; what it saw of the others must not become what is expected."""
    pk, _, event_id = exported_row(exported, 2)
    lose_events(exported, event_id)
    clear_marks(exported, f"pk = {pk + 1}")
    run(exported)
    report = reconciled(exported)
    assert (str(report.found), report.found.event_ids) == ("1 missing", (event_id,))


def test_entries_are_compared_one_by_one_whatever_their_size(stack: Stack) -> None:
    """ClickHouse takes 128 KB in one field of a form, and an audited payload can be a megabyte."""
    big = {
        **json.loads(small_event("evt_big")[2]),
        "meta": {"text": "ä😀\\'\"\n\t" * 120_000, "deep": [{"a": [1, 2.5, None, "x"]}]},
    }
    rows = [small_event(f"evt_{n}") for n in range(40)]
    stack.put(("ws_1", "evt_big", json.dumps(big, ensure_ascii=False)), *rows)
    run(stack, "one", Limits())
    lose_events(stack, "evt_7")
    report = reconciled(stack)
    assert (str(report.found), report.found.event_ids) == ("1 missing", ("evt_7",))


# ── differences that are explained ───────────────────────────────────────────────────────────────


def test_a_requeue_is_no_discrepancy_before_or_after_its_copies_merge(exported: Stack) -> None:
    """Each export leaves a copy until they merge; the batch that exported first need not be verified by then."""
    exported.sql("UPDATE clickhouse_outbox_batch SET state = 'exported', observed = NULL WHERE batch_id = 1")
    for times in (1, 2, 3):
        clear_marks(exported, "pk <= 5")
        assert reconciled(exported, dry_run=True).clean
        run(exported)
        assert exported.counts() == (ROWS + 5 * times, ROWS)
    report = reconciled(exported)
    assert report.clean
    assert report.explained == {"copies of a requeue": 15}
    merge(exported)
    assert exported.counts() == (ROWS, ROWS)
    assert reconciled(exported).clean
    assert set(batch_states(exported)) == {"verified"}


def test_one_event_in_two_batches_is_no_discrepancy_merged_or_not(exported: Stack) -> None:
    """The outbox had it twice, so for a while ClickHouse has."""
    exported.sql(
        "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
        "SELECT version, workspace_id, event_id, payload, created_at FROM clickhouse_outbox ORDER BY pk LIMIT 3"
    )
    run(exported)
    assert exported.counts() == (ROWS + 3, ROWS)
    assert reconciled(exported).clean
    merge(exported)
    report = reconciled(exported)
    assert report.clean
    assert report.explained == {"merged into another copy": 3}
    assert reconciled(exported).slots_read == 0, "the next comparison starts from what was explained"


@pytest.mark.parametrize("merged", [False, True])
def test_a_requeued_row_may_replace_the_other_row_of_its_event(stack: Stack, merged: bool) -> None:
    """Two rows of one event need not have the same description. Whichever rows are left, that is no discrepancy."""
    stop_merges(stack)
    first = [f"evt_{n}" for n in range(18)] + ["evt_2", "evt_19"]
    second = [f"other_{n}" for n in range(18)] + ["other_12", "other_19"]
    pks = stack.put(*(small_event(id_, description=str(n % 20 // 18)) for n, id_ in enumerate(first + second)))
    run(stack)
    assert (stack.counts(), reconciled(stack).clean) == ((38, 38), True)
    requeue = [pks[2], pks[32]]
    clear_marks(stack, f"pk IN ({requeue[0]}, {requeue[1]})")
    run(stack)
    assert stack.counts() == (40, 38)
    if merged:
        merge(stack)
        replaced = "SELECT description FROM audit_logs WHERE event_id IN ('evt_2', 'other_12')"
        assert stack.clickhouse(replaced) == [("0",), ("0",)]
    stack.sql("CREATE TABLE all_rows AS SELECT * FROM clickhouse_outbox")
    for left in (pks, pks[16:20] + pks[36:], requeue, [0]):
        stack.sql("DELETE FROM clickhouse_outbox")
        stack.sql(f"INSERT INTO clickhouse_outbox SELECT * FROM all_rows WHERE pk IN ({', '.join(map(str, left))})")
        assert reconciled(stack, dry_run=True).clean, left
    assert reconciled(stack).clean
    assert set(batch_states(stack)) == {"verified"}


def test_a_recorded_erasure_is_no_discrepancy_and_an_unrecorded_one_is(exported: Stack) -> None:
    """An alarm for each request to be forgotten would be ignored."""
    _, workspace_id, event_id = exported_row(exported, 9)
    lose_events(exported, event_id)
    assert str(reconciled(exported).found) == "1 missing"
    exported.upkeep.add_erasures(BY, [Erasure(workspace_id=workspace_id, event_id=event_id)])
    report = reconciled(exported)
    assert report.clean
    assert report.explained == {"erased on record": 1}
    assert set(batch_states(exported)) == {"verified"}
    (recorded,) = exported.upkeep.erasures()
    assert (recorded.by, recorded.erasure.event_id) == (BY, event_id)


def test_an_open_batch_is_left_alone_and_an_unverified_one_is_verified(exported: Stack) -> None:
    """Half of a batch written is not half of it lost; a run that died before it verified leaves a batch unchecked."""
    exported.sql("UPDATE clickhouse_outbox_batch SET state = 'exported', observed = NULL WHERE batch_id = 1")
    exported.put(small_event("evt_1"))
    claiming.claim(exported.outbox, owner="at work", dead_owners=(), limits=LIMITS)
    report = reconciled(exported)
    assert report.clean
    assert report.open_batches == 1
    assert batch_states(exported) == ["verified", "verified", "verified", "claimed"]


class _Busy:
    """`core.ports.AuditLog` over a real one; while entries are read for the first time, `meanwhile` happens."""

    def __init__(self, real: AuditLog, meanwhile: Callable[[], None]) -> None:
        self.real = real
        self.meanwhile = [meanwhile]

    def entries_at(self, inserted_at_ms: int) -> list[StoredEntry]:
        if self.meanwhile:
            self.meanwhile.pop()()
        return self.real.entries_at(inserted_at_ms)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.real, name)


def _verify(stack: Stack, log: AuditLog) -> bool:
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 1")
    return not any(verify(stack.outbox, log, stack.outbox.batches([1])).values())


def _reconcile(stack: Stack, log: AuditLog) -> bool:
    return reconcile(stack.outbox, stack.upkeep, log, from_ms=0, to_ms=2**62).clean


def _sweep(stack: Stack, log: AuditLog) -> bool:
    return not sweep(stack.outbox, stack.upkeep, log, Retention(outbox_days=0), BY).discrepant


@pytest.mark.parametrize("check", [_verify, _reconcile, _sweep])
def test_a_requeue_that_arrives_while_entries_are_read_is_no_discrepancy(
    exported: Stack, check: Callable[[Stack, AuditLog], bool]
) -> None:
    """Its entries would be called unexpected, and the batch discrepant."""

    def requeue_some() -> None:
        clear_marks(exported, "pk <= 5")
        run(exported)

    requeue_some()
    exported.sql("UPDATE clickhouse_outbox_batch SET observed = NULL WHERE batch_id = 1")
    busy: Any = _Busy(exported.log, requeue_some)
    assert check(exported, busy)
    assert busy.meanwhile == []
    assert set(batch_states(exported)) == {"verified"}
