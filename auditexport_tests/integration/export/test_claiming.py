"""Claiming: which rows a plan takes, in which order and size, beside which other planners and writers.

What belongs here: what the ledger holds after a claim, and what the application notices of it: nothing.
What does not: what becomes of the batches (`integration.export.test_exactly_once`), and the plans of the statements
(`integration.mysql.test_query_plans`).
"""

from __future__ import annotations

import itertools
import pickle
import random
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier, Event
from unittest.mock import Mock

import pytest

from auditexport_pipeline.core import claiming, export, reading
from auditexport_pipeline.core.batch import Batch, Claim, State
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.mysql.outbox import MySQLPlanning
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import (
    claim,
    clear_marks,
    crash,
    delete_rows,
    end_leases,
    everything_once,
    ledger,
    run,
    small_event,
    stop_merges,
    write_and_mark,
)
from auditexport_tests.support.crashes import CrashingOutbox, CrashPoint

pytestmark = pytest.mark.mysql_sensitive

_numbers = itertools.count(1)


def put(stack: Stack, rows: int, *, version: str = "audit_log.v1", padding: int = 0) -> list[int]:
    """Small sound events of one workspace, each with an id of its own; returns their pks."""
    events = (small_event(f"evt_{next(_numbers)}", description="x" * padding) for _ in range(rows))
    return stack.put(*events, version=version)


def batches(stack: Stack, claims: list[Claim]) -> list[Batch]:
    return stack.outbox.batches(claim.batch_id for claim in claims)


def pks(stack: Stack, claims: list[Claim]) -> list[list[int]]:
    return [list(batch.pks) for batch in batches(stack, claims)]


def test_the_oldest_rows_are_claimed_first(stack: Stack) -> None:
    """Under a backlog the lag is that of the oldest row, so every run has to shorten it."""
    rows = put(stack, 25)
    assert pks(stack, claim(stack, batch_rows=10, max_batches=2)) == [rows[:10], rows[10:20]]
    assert pks(stack, claim(stack, "two", batch_rows=10)) == [rows[20:]]
    assert claim(stack, "three", batch_rows=10) == []


def test_rows_that_arrive_during_a_claim_wait_for_the_next_plan(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy application made dozens of batches of a row or two in each plan, each with an INSERT of its own."""
    real = MySQLPlanning.payload_bytes

    def while_another_row_commits(planning: MySQLPlanning, pks: Sequence[int]) -> dict[int, int]:
        put(stack, 1)
        return real(planning, pks)

    monkeypatch.setattr(MySQLPlanning, "payload_bytes", while_another_row_commits)
    put(stack, 3)
    assert [batch.rows for batch in batches(stack, claim(stack))] == [3]
    assert [batch.rows for batch in batches(stack, claim(stack, "two"))] == [1]


def test_a_lower_pk_that_commits_later_is_found(stack: Stack) -> None:
    """A watermark would have passed it, and the event would be lost without an error."""
    insert = (
        "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
        "VALUES ('audit_log.v1', %s, %s, %s, 1)"
    )
    with stack.outbox.engine.connect() as early, stack.outbox.engine.connect() as late:
        first = early.exec_driver_sql(insert, small_event("evt_early")).lastrowid
        second = late.exec_driver_sql(insert, small_event("evt_late")).lastrowid
        late.commit()
        assert first < second
        assert run(stack) == 1
        assert stack.counts() == (1, 1)
        early.commit()
    assert run(stack) == 1
    assert list(ledger(stack)[1].pks) == [first]
    everything_once(stack, 2)


def test_batches_are_cut_by_rows_and_by_bytes(stack: Stack) -> None:
    """Memory follows bytes and not rows: a few large payloads fill a batch, and one too large still goes, alone."""
    small, large, more = put(stack, 5), put(stack, 3, padding=1_750), put(stack, 5)
    found = pks(stack, claim(stack, batch_rows=4, batch_bytes=2_000))
    assert found == [small[:4], [small[4], large[0]], [large[1]], [large[2], more[0]], more[1:]]
    (alone,) = put(stack, 1, padding=9_000)
    assert pks(stack, claim(stack, "two", batch_bytes=2_000)) == [[alone]]
    ((alone,), after) = put(stack, 1, padding=9_000), put(stack, 3)
    assert pks(stack, claim(stack, "three", batch_bytes=2_000)) == [[alone], after]


def test_the_first_batches_of_a_plan_are_small_and_grow(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """With full batches from the start, ClickHouse and the marking would wait for the first one to be read."""
    monkeypatch.setattr(claiming, "FIRST_BATCH_ROWS", 4)
    rows = put(stack, 40)
    found = pks(stack, claim(stack, batch_rows=10))
    assert [len(batch) for batch in found] == [4, 6, 9, 10, 10, 1]
    assert [pk for batch in found for pk in batch] == rows


def test_no_run_gets_more_batches_than_it_may(stack: Stack) -> None:
    """Dagster's cost grows with the steps of a run; the next run takes the other rows."""
    put(stack, 50)
    assert len(claim(stack, "one", batch_rows=10, max_batches=2)) == 2
    assert len(claim(stack, "two", dead_owners=("one",), batch_rows=10, max_batches=3)) == 3
    assert len(claim(stack, "three", dead_owners=("two",), batch_rows=10, max_batches=1)) == 1
    adopted = claim(stack, "four", dead_owners=("two", "three"), batch_rows=10)
    assert [one.adopted for one in adopted] == [True, True, True, False, False]


def test_rows_pending_again_beside_new_ones_stay_within_the_limit(stack: Stack) -> None:
    """One span of rows can make two batches, a first export and a requeue: both count."""
    rows = put(stack, 10)
    run(stack)
    put(stack, 10)
    clear_marks(stack, [rows[3]])
    assert len(claim(stack, "two", max_batches=1)) == 1
    assert [(one.generation, one.rows) for one in claim(stack, "three", max_batches=2)] == [(1, 1)]


def test_two_planners_at_once_never_claim_the_same_row(stack: Stack) -> None:
    """A row in two batches is two INSERTs with two tokens, which nothing afterwards can tell apart."""
    rounds = 12
    rows = put(stack, 20 * rounds)
    together = Barrier(2)

    def plan(planner: str) -> list[Claim]:
        claims = []
        for number in range(rounds):
            together.wait(30)
            claims += claim(stack, f"{planner} {number}", batch_rows=5, max_batches=2)
        return claims

    with ThreadPoolExecutor(2) as pool:
        claims = [one for found in pool.map(plan, ["left", "right"]) for one in found]
    taken = [pk for batch in pks(stack, claims) for pk in batch]
    assert len(taken) == len(set(taken))
    assert sorted(taken) == rows
    at_ms = [block.inserted_at_ms for batch in batches(stack, claims) for block in batch.blocks]
    assert len(at_ms) == len(set(at_ms))


def test_drains_and_writers_at_once_export_everything_once(stack: Stack) -> None:
    """A batch that closes while another plan is made must not offer its rows again."""
    put(stack, 60)
    together = Barrier(3)

    def export_all(owner: str) -> None:
        together.wait(30)
        for number in range(6):
            run(stack, f"{owner} {number}", Limits(batch_rows=8, mark_rows=3, max_batches=3))

    def write() -> None:
        together.wait(30)
        for _ in range(30):
            put(stack, 2)

    stop_merges(stack)
    with ThreadPoolExecutor(3) as pool:
        for done in [pool.submit(export_all, "left"), pool.submit(export_all, "right"), pool.submit(write)]:
            done.result()
    run(stack, "last")
    everything_once(stack, 120)


def test_unknown_versions_are_left_alone_and_counted(stack: Stack) -> None:
    """A newer application may write what this program cannot read: it waits, visibly, for a newer program."""
    unknown = put(stack, 3, version="audit_log.v9") + put(stack, 2, version="zebra.v1")
    known = put(stack, 4)
    run(stack)
    assert [list(batch.pks) for batch in ledger(stack)] == [known]
    backlog = stack.outbox.backlog(tuple(VERSIONS), count_to=100)
    assert (backlog.rows, backlog.unknown_rows) == (0, len(unknown))
    assert backlog.unknown_versions == ("audit_log.v9", "zebra.v1")
    assert stack.pending() == len(unknown)


def test_the_application_writes_while_a_plan_is_open(stack: Stack) -> None:
    """The ancestor's row locks stalled the application; a claim holds none, on no row and no gap."""
    rows = put(stack, 30)

    def write() -> None:
        with stack.outbox.engine.begin() as connection:
            connection.exec_driver_sql(f"UPDATE clickhouse_outbox SET created_at = 7 WHERE pk = {rows[5]}")
            connection.exec_driver_sql(f"DELETE FROM clickhouse_outbox WHERE pk = {rows[6]}")
        put(stack, 1)

    point = CrashPoint("before claim 1", then=write)
    claims = claiming.claim(
        CrashingOutbox(stack.outbox, point), owner="one", dead_owners=(), limits=Limits(batch_rows=10)
    )
    assert point.reached
    assert sum(one.rows for one in claims) == 30


def test_a_sample_of_payloads_is_measured(stack: Stack) -> None:
    """A claim of a million rows must not read a million payloads only to measure and forget them."""
    rows = put(stack, 3, padding=100)
    with stack.outbox.planning("one", 60) as ledger:
        measured = ledger.payload_bytes(rows[1:])
    sizes = stack.sql("SELECT pk, OCTET_LENGTH(payload) AS n FROM clickhouse_outbox ORDER BY pk")
    assert measured == {row.pk: row.n for row in sizes[1:]}


@pytest.mark.parametrize("seed", range(3))
def test_candidates_are_the_pending_rows_whatever_lies_between_them(stack: Stack, seed: int) -> None:
    """Dead letters are read only where some may be, and every kind of gap can be where a page of pks ends."""
    chance = random.Random(seed)
    rows = put(stack, 120)
    other = set(put(stack, 30, version="audit_log.v9"))
    rows += put(stack, 50)
    gone, marked, letters = (set(chance.sample(rows, k=chance.choice((0, 1, 5, 20)))) for _ in range(3))
    retried = set(chance.sample(rows, k=20)) - letters
    delete_rows(stack, 0, *gone)
    for pk in marked:
        stack.sql(f"UPDATE clickhouse_outbox SET deleted_at = 1 WHERE pk = {pk}")
    for pk in letters | retried:
        state = "retried" if pk in retried else chance.choice(("open", "discarded"))
        stack.sql(
            "INSERT INTO clickhouse_outbox_dead_letter SELECT pk, "
            f"'{state}', version, workspace_id, event_id, 'wrong_type', '$', '', 1, 1, 1, NULL FROM clickhouse_outbox "
            f"WHERE pk = {pk}"
        )
    pending = sorted({*rows} - gone - marked - letters - other)
    with stack.outbox.planning("one", 60) as ledger:
        for limit in (1, 7, 8, 9, 50, 1_000):
            for from_pk in (0, *chance.sample(rows, k=4), rows[-1] + 1):
                above = [pk for pk in pending if pk >= from_pk][:limit]
                assert list(ledger.candidates("audit_log.v1", from_pk, limit)) == above, (limit, from_pk)


def test_a_batch_that_turns_out_too_large_gives_the_rest_back(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """The sample may miss the large rows; memory is bounded all the same, and no row is forgotten."""
    monkeypatch.setattr(claiming, "SAMPLED_ROWS", 1)
    put(stack, 1)
    put(stack, 11, padding=5_000)
    limits = Limits(batch_bytes=20_000)
    (one,) = claim(stack, batch_bytes=limits.batch_bytes)
    assert one.rows == 12
    fetched = export.fetch(stack.outbox, stack.log, one, limits)
    assert 1 < fetched.rows < 12
    fetched_bytes = sum(len(payload) for payloads in fetched.bodies.values() for payload in payloads)
    assert fetched_bytes <= limits.batch_bytes * reading.BYTES_TOLERANCE
    batch = write_and_mark(stack, one, limits, fetched.bodies)
    assert (batch.rows, batch.counts.released, batch.counts.vanished) == (fetched.rows, 12 - fetched.rows, 0)
    assert stack.pending() == 12 - fetched.rows
    (two,) = claim(stack, "two")
    assert two.rows == 12 - fetched.rows


def test_a_live_owners_batches_are_left_to_it(stack: Stack) -> None:
    """Two runs at work on one batch waste each other's effort, even where they cannot harm it."""
    put(stack, 10)
    (first,) = claim(stack, "one")
    assert claim(stack, "two") == []
    (again,) = claim(stack, "one")
    assert (again.batch_id, again.adopted) == (first.batch_id, True)
    assert again.epoch > first.epoch


@pytest.mark.parametrize("known_to_be_dead", [True, False])
def test_a_dead_owners_batches_are_adopted_as_they_are(stack: Stack, known_to_be_dead: bool) -> None:
    """A batch that was cut again on adoption would get another token, and its lost INSERT would double."""
    put(stack, 20)
    claims = claim(stack, "one", batch_rows=10)
    before = [(batch.batch_id, batch.pks, batch.blocks) for batch in batches(stack, claims)]
    if not known_to_be_dead:
        end_leases(stack)
    adopted = claim(stack, "two", dead_owners=("one",) if known_to_be_dead else (), batch_rows=3)
    assert all(one.adopted for one in adopted)
    assert [(batch.batch_id, batch.pks, batch.blocks) for batch in batches(stack, adopted)] == before
    assert {batch.owner for batch in batches(stack, adopted)} == {"two"}


@pytest.mark.parametrize("state", ["claimed", "stopped"])
def test_a_lease_from_before_the_clock_was_set_back_ends_within_one_lease(stack: Stack, state: str) -> None:
    """It would hold its batch for as long as the clock went back; ended at once, it might free one that is at work."""
    put(stack, 10)
    claims = claim(stack, "one")
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET state = :state, lease_until_ms = lease_until_ms + 86400000 * 90 WHERE batch_id > 0",
        state=state,
    )
    assert claim(stack, "two", lease_s=120) == []

    left_ms = "SELECT lease_until_ms - CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS ms FROM clickhouse_outbox_batch"
    assert 0 < stack.sql(f"{left_ms} WHERE batch_id > 0")[0].ms <= 120_000
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = lease_until_ms - 120000 WHERE batch_id > 0")
    assert [one.batch_id for one in claim(stack, "two")] == [one.batch_id for one in claims]


def test_one_renewal_keeps_every_batch_of_the_plan(stack: Stack) -> None:
    """The last batch of a long run waits its turn for longer than a lease."""
    put(stack, 30)
    claims = claim(stack, "one", batch_rows=10)
    end_leases(stack)
    stack.outbox.renew(claims[0], 60)
    assert claim(stack, "two") == []


def with_history(stack: Stack) -> None:
    """512 closed batches, so that the ledger's statements run by their indexes, as they do after a day."""
    put(stack, 1)
    run(stack)
    with stack.outbox.engine.begin() as connection:
        for power in range(9):
            for statement in (
                "CREATE TEMPORARY TABLE history SELECT * FROM clickhouse_outbox_batch WHERE batch_id > 0",
                f"UPDATE history SET batch_id = batch_id + {2**power}",
                "INSERT INTO clickhouse_outbox_batch SELECT * FROM history",
                "DROP TEMPORARY TABLE history",
            ):
                connection.exec_driver_sql(statement)
    stack.sql("ANALYZE TABLE clickhouse_outbox_batch")


def test_renewing_never_deadlocks_with_batches_that_change_their_state(stack: Stack) -> None:
    """One plan's batches are at work at once in several processes, and each renews the leases of all of them."""
    with_history(stack)
    put(stack, 120)
    claims = claim(stack, "one", batch_rows=2)
    together = Barrier(3)
    at_work = Event()

    def renew() -> None:
        together.wait(30)
        while not at_work.is_set():
            stack.outbox.renew(claims[0], 60)

    with ThreadPoolExecutor(2) as pool:
        renewing = [pool.submit(renew) for _ in range(2)]
        together.wait(30)
        try:
            for one in claims[1:]:
                export.fetch(stack.outbox, stack.log, one, Limits())
        finally:
            at_work.set()
        for done in renewing:
            done.result()
    assert {batch.state for batch in batches(stack, claims[1:])} == {State.SEALED}


def test_a_plan_that_dies_before_its_commit_leaves_nothing(stack: Stack) -> None:
    """Half a plan would hold rows until a lease ends, and no run would work on them."""
    rows = put(stack, 10)
    crash(stack, "before claim 1")
    assert claiming.open_owners(stack.outbox) == []
    assert pks(stack, claim(stack, "two")) == [rows]


def test_a_claim_that_an_older_release_pickled_has_no_key() -> None:
    """Dagster keeps a step's output for the next one, which may run after an upgrade."""
    pickled = (
        b"\x80\x04\x95M\x00\x00\x00\x00\x00\x00\x00\x8c\x1fauditexport_pipeline.core.batch\x94\x8c\x05Claim\x94\x93\x94)\x81\x94]\x94"
        b"(K\x03K\x07\x8c\x0caudit_log.v1\x94K\x00K\x0c\x88eb."
    )
    older = pickle.loads(pickled)
    assert older == Claim(batch_id=3, epoch=7, version="audit_log.v1", generation=0, rows=12, adopted=True)
    assert older.key == ""
    keyed = replace(older, key="7-ab")
    assert pickle.loads(pickle.dumps(keyed)) == keyed


def test_inserted_at_increases_even_when_the_clock_steps_back(stack: Stack) -> None:
    """It is the address of a block: two blocks with one address would prove each other written."""
    put(stack, 20)
    stack.sql("UPDATE clickhouse_outbox_batch SET inserted_at_ms = 9000000000000 WHERE batch_id = 0")
    claims = claim(stack, batch_rows=10)
    at_ms = [block.inserted_at_ms for batch in batches(stack, claims) for block in batch.blocks]
    assert at_ms == [9_000_000_000_001, 9_000_000_000_002]
    assert stack.outbox.reserve_inserted_at(2) == [9_000_000_000_003, 9_000_000_000_004]


def test_plans_for_two_outboxes_do_not_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """One process plans for both. A property of the class, with one lock for all plans, held it up (simulated seed 1434)."""
    first, second = (MySQLPlanning(Mock(), Mock(), last_ms=0) for _ in range(2))
    asked, answered = Event(), Event()

    def read(plan: MySQLPlanning, statement: str, values: object) -> list[tuple[object, ...]]:
        if statement != "holding_letters":
            return []
        if plan is first:
            asked.set()
            answered.wait(30)
        return [(None, None)]

    monkeypatch.setattr(MySQLPlanning, "_read", read)
    with ThreadPoolExecutor(2) as pool:
        waiting = pool.submit(first.candidates, "audit_log.v1", 0, 10)
        try:
            assert asked.wait(30)
            assert not pool.submit(second.candidates, "audit_log.v1", 0, 10).result(timeout=20)
        finally:
            answered.set()
        assert not waiting.result()
