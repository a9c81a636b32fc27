"""Blocks that ClickHouse or a proxy never takes: they need too much memory, too many bytes or too much time.

The limits are real: a profile's `max_memory_usage`, and a proxy in front of ClickHouse that answers 413.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import AuditLogUnavailable
from auditexport_pipeline.core.ports import AuditLog
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import ledger, merge, small_event, stop_merges
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request

LIMITS = Limits(batch_rows=40)


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    """A merge would take a duplicate away before it is counted."""
    stop_merges(stack)


def insert(stack: Stack, *, rows: int, row_bytes: int, large: dict[int, int] | None = None, at: int = 0) -> None:
    """Events with descriptions of this size; `large` has the sizes of others by their number."""
    stack.put(
        *(
            small_event(f"evt_{number}", time=number, description="d" * (large or {}).get(number, row_bytes))
            for number in range(at, at + rows)
        )
    )


@contextmanager
def proxied(stack: Stack, most_bytes: int = 10**9, *, settings: str = "") -> Iterator[ClickHouseAuditLog]:
    """ClickHouse behind a proxy that takes requests of this size at most, and adds settings to INSERTs as a profile
    could.
    """

    def limited(request: Request, forward: Forward) -> Answer:
        if len(request.statement) > most_bytes:
            return Answer(
                status=413, headers={"Server": "nginx"}, body=b"<html><h1>Request Entity Too Large</h1></html>"
            )
        if request.statement.lstrip().startswith(b"INSERT"):
            request.target += settings
        return forward(request)

    with HttpProxy(stack.clickhouse_url, limited) as proxy:
        yield ClickHouseAuditLog(proxy.url)


def drained(stack: Stack, log: AuditLog, drains: int, owner: str = "one", limits: Limits = LIMITS) -> list[str]:
    """Several drains, each long after the one before by ClickHouse's clock; the names of the errors that ended them."""
    errors = []
    for _ in range(drains):
        try:
            drain(stack.outbox, log, limits, owner=owner)
        except Exception as error:
            errors.append(type(error).__name__)
        stack.sql("UPDATE clickhouse_outbox_batch SET inserts_until_ms = 0")
    return errors


def dead_letters(stack: Stack) -> list[tuple[str, str]]:
    found = stack.sql("SELECT event_id, reason FROM clickhouse_outbox_dead_letter ORDER BY pk")
    return [(str(row.event_id), str(row.reason)) for row in found]


def test_a_block_that_a_proxy_never_takes_goes_out_in_parts(stack: Stack) -> None:
    """The batch is sealed, so a smaller batch_rows would not help: it would fail every run."""
    insert(stack, rows=16, row_bytes=2_000)
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 6)

    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((16, 16), 0, []), errors
    ((slots,),) = stack.clickhouse("SELECT uniqExact(inserted_at) FROM audit_logs_raw_v1")
    assert int(str(slots)) > 1
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}


def test_a_row_too_large_for_a_proxy_is_set_aside_where_others_pass(stack: Stack) -> None:
    """One row of a tenant that nothing takes must not block its neighbours."""
    insert(stack, rows=16, row_bytes=500, large={7: 60_000})
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 12)

    assert (stack.counts(), stack.pending()) == ((15, 15), 1), errors
    assert dead_letters(stack) == [("evt_7", "too_large_for_clickhouse")]


def test_a_row_too_large_that_is_alone_in_its_batch_is_set_aside(stack: Stack) -> None:
    """Rows above batch_bytes are alone; instead of a neighbour, a small made-up row shows what the proxy takes."""
    insert(stack, rows=1, row_bytes=60_000)
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 4)
        insert(stack, rows=3, row_bytes=100, at=10)
        errors += drained(stack, log, 1)

    assert (stack.counts(), stack.pending()) == ((3, 3), 1), errors
    assert dead_letters(stack) == [("evt_0", "too_large_for_clickhouse")]


def test_a_proxy_that_takes_nothing_sets_nothing_aside(stack: Stack) -> None:
    """A limit that no ordinary row passes is wrong: dead letters would empty the backlog for nothing."""
    insert(stack, rows=4, row_bytes=500)
    with proxied(stack, 1_000) as log:
        errors = drained(stack, log, 4)
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((0, 0), 4, [])
    assert len(errors) == 4

    drained(stack, stack.log, 2)
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((4, 4), 0, [])


def test_nothing_is_split_while_an_insert_of_it_can_be_at_work(stack: Stack) -> None:
    """The first INSERT may commit until then: its parts beside it would be duplicates."""
    insert(stack, rows=16, row_bytes=2_000)
    with proxied(stack, 20_000) as log:
        for _ in range(3):
            with pytest.raises(AuditLogUnavailable):
                drain(stack.outbox, log, LIMITS, owner="one")
        ((manifest,),) = stack.sql("SELECT manifest FROM clickhouse_outbox_batch WHERE batch_id > 0")
    assert len(json.loads(str(manifest))) == 1
    # The proxy has passed the first INSERT on all the same, and it arrives only now.
    (batch,) = stack.outbox.batches([1])
    (block,) = batch.blocks
    payloads = [row.payload for row in stack.outbox.read(block.pks, row_bytes=1)]
    stack.log.insert(batch, block, payloads, deadline_ms=stack.log.deadline_ms(60), timeout_s=30)
    stack.sql("UPDATE clickhouse_outbox_batch SET inserts_until_ms = 0")
    assert drained(stack, stack.log, 1) == []
    assert (stack.counts(), stack.pending()) == ((16, 16), 0)


@pytest.mark.parametrize(
    ("what", "generation"),
    [
        ("deleted", "first export"),
        ("changed", "requeue"),
        *(
            pytest.param(what, generation, marks=pytest.mark.slow)
            for generation in ("first export", "requeue")
            for what in ("deleted", "changed", "all deleted", "swapped")
            if (what, generation) not in (("deleted", "first export"), ("changed", "requeue"))
        ),
    ],
)
def test_a_block_that_waits_to_be_split_and_is_altered_is_given_back(stack: Stack, what: str, generation: str) -> None:
    """Only a block as it was sealed can be split; its other rows must not wait for ever."""
    insert(stack, rows=16, row_bytes=2_000)
    if generation == "requeue":
        drained(stack, stack.log, 1)
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    with proxied(stack, 20_000) as log:
        drained(stack, log, 1)
        (block,) = stack.outbox.batches([1 + (generation == "requeue")])[0].blocks
        assert block.limit
        if what == "deleted":
            stack.sql("DELETE FROM clickhouse_outbox WHERE event_id = 'evt_3'")
        elif what == "changed":
            stack.sql(
                "UPDATE clickhouse_outbox SET payload = REPLACE(payload, 'evt_3', 'evt_x'), event_id = 'evt_x' WHERE event_id = 'evt_3'"
            )
        else:
            stack.sql("TRUNCATE TABLE clickhouse_outbox")
        if what == "swapped":
            insert(stack, rows=16, row_bytes=2_000, at=100)
        errors = drained(stack, log, 8)

    assert stack.pending() == 0, errors
    left = {"deleted": 15, "changed": 16, "all deleted": 0, "swapped": 16}[what]
    before = {"deleted": 1, "changed": 1, "all deleted": 16, "swapped": 16}[what] if generation == "requeue" else 0
    merge(stack)
    assert stack.counts() == (left + before, left + before)
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}


def test_a_block_above_a_memory_limit_goes_out_in_parts(stack: Stack) -> None:
    """A profile's max_memory_usage can be below what a sealed block needs."""
    insert(stack, rows=40, row_bytes=200_000)
    with proxied(stack, settings="&max_memory_usage=8000000&max_untracked_memory=0") as log:
        errors = drained(stack, log, 10)

    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((40, 40), 0, []), errors
    assert errors, "the limit had no effect"


def test_a_block_that_takes_too_long_every_time_goes_out_in_parts(stack: Stack) -> None:
    """Else every drain would run into the same time-out (159), and the batch would stay for ever."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD COLUMN slow UInt8 MATERIALIZED sleepEachRow(0.06)")
    insert(stack, rows=24, row_bytes=10)
    errors = drained(stack, stack.log, 6, limits=Limits(insert_timeout_s=1))
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((24, 24), 0, []), errors
    assert errors[0] == "AuditLogUnavailable", errors


def test_a_server_without_memory_sets_nothing_aside(stack: Stack) -> None:
    """A server's lack of memory ends; dead letters stay."""
    insert(stack, rows=4, row_bytes=500)
    with proxied(stack, settings="&max_memory_usage=100000&max_untracked_memory=0") as log:
        errors = drained(stack, log, 4)
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((0, 0), 4, [])
    assert len(errors) == 4

    drained(stack, stack.log, 2)
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((4, 4), 0, [])


def test_a_busy_proxy_sets_no_ordinary_row_aside(stack: Stack) -> None:
    """A row is not too large because the server is slow while it is sent (simulation, seed 2062)."""
    insert(stack, rows=4, row_bytes=100)
    refused = 0

    def busy(request: Request, forward: Forward) -> Answer:
        nonlocal refused
        if request.statement.lstrip().startswith(b"INSERT") and b"evt_1" in request.statement and refused < 6:
            refused += 1
            return Answer(status=504, headers={"Server": "nginx"}, body=b"<html><h1>Gateway Time-out</h1></html>")
        return forward(request)

    with HttpProxy(stack.clickhouse_url, busy) as proxy:
        errors = drained(stack, ClickHouseAuditLog(proxy.url), 12)

    assert (refused, stack.counts(), stack.pending(), dead_letters(stack)) == (6, (4, 4), 0, []), errors


def test_a_busy_proxy_sets_no_row_aside_while_rows_are_probed(stack: Stack) -> None:
    """One row that ClickHouse refuses lets the others be probed; a busy proxy then says nothing about them (simulation, seed 675)."""
    insert(stack, rows=4, row_bytes=100)
    stack.put(small_event("evt_refused", time=9, meta={"q": [[[1]], [None]]}))
    answered = 0

    def busy(request: Request, forward: Forward) -> Answer:
        nonlocal answered
        if b"INSERT INTO FUNCTION null" in request.statement and answered < 20:
            answered += 1
            return Answer(status=504, headers={"Server": "nginx"}, body=b"<html><h1>Gateway Time-out</h1></html>")
        return forward(request)

    with HttpProxy(stack.clickhouse_url, busy) as proxy:
        errors = drained(stack, ClickHouseAuditLog(proxy.url), 12)

    assert dead_letters(stack) == [("evt_refused", "refused_by_clickhouse")], errors
    assert (answered, stack.counts(), stack.pending()) == (20, (4, 4), 1)


def test_a_requeue_with_one_block_too_large_is_split_beside_the_others(stack: Stack) -> None:
    """Each attempt sends the blocks of a requeue again; that must not put the split off for ever (simulation, seed 61914)."""
    limits = Limits(batch_rows=10_000, blocks_per_batch=2)
    insert(stack, rows=5_000, row_bytes=10)
    insert(stack, rows=50, row_bytes=40_000, at=6_000)
    drain(stack.outbox, stack.log, limits, owner="first")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")

    with proxied(stack, 1_500_000) as log:
        errors = drained(stack, log, 4, limits=limits)

    assert (stack.pending(), dead_letters(stack)) == (0, []), errors
    assert stack.clickhouse("SELECT uniqExact(event_id) FROM audit_logs_raw_v1") == [(5_050,)]


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["first export", "requeue"])
@pytest.mark.parametrize(
    "place",
    ["before replace_cut 1", "after replace_cut 1", "before replace_cut 2", "after replace_cut 2", "after insert 2"],
)
def test_a_crash_while_a_block_is_split_costs_nothing(stack: Stack, place: str, generation: str) -> None:
    """The flag on the block and the new cut are durable effects; each crash between them must be harmless."""
    insert(stack, rows=16, row_bytes=2_000)
    if generation == "requeue":
        drained(stack, stack.log, 1)
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    crash_at = CrashPoint(place)
    with proxied(stack, 20_000) as log:
        for _ in range(6):
            try:
                drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(log, crash_at), LIMITS, owner="one")
            except Crash:
                crash_at.revive()
            except Exception:
                pass  # it waits for the end of an INSERT that can be at work
            stack.sql("UPDATE clickhouse_outbox_batch SET inserts_until_ms = 0")

    if generation == "requeue":
        merge(stack)
    assert (stack.counts(), stack.pending(), dead_letters(stack)) == ((16, 16), 0, [])
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}
