"""Blocks that ClickHouse or a proxy never takes: too much memory, too many bytes, too long.

The limits are real: a profile's `max_memory_usage`, and a proxy in front of ClickHouse that answers 413 by itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from urllib.parse import urlsplit

import pytest

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import AuditLogUnavailable
from auditexport_pipeline.core.ports import AuditLog
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

LIMITS = Limits(batch_rows=40)


@pytest.fixture(autouse=True)
def no_merges(stack: Stack) -> None:
    """A merge would take a duplicate away before it is counted."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")


def put(stack: Stack, *, rows: int, row_bytes: int, large: dict[int, int] | None = None, at: int = 0) -> None:
    """Events with descriptions of this size; `large` are others by their number."""
    events = []
    for number in range(at, at + rows):
        event = {
            "event_id": f"evt_{number}",
            "time": 1_700_000_000_000 + number,
            "workspace_id": "ws_1",
            "event": "key.create",
            "description": "d" * (large or {}).get(number, row_bytes),
        }
        events.append(("ws_1", f"evt_{number}", json.dumps(event)))
    stack.put(*events)


class _Proxy(BaseHTTPRequestHandler):
    """Passes requests on, and answers those with a body above the limit as nginx does."""

    protocol_version = "HTTP/1.1"
    upstream = ("", 0)
    most_bytes = 0
    settings = ""

    def do_POST(self) -> None:
        body = self._body()
        if len(body) > self.most_bytes:
            self._answer(413, b"<html><h1>Request Entity Too Large</h1></html>", {"Server": "nginx"})
            return
        upstream = HTTPConnection(*self.upstream, timeout=60)
        headers = {
            name: value for name, value in self.headers.items() if name.lower() not in ("transfer-encoding", "host")
        }
        headers["Content-Length"] = str(len(body))
        settings = self.settings if body.lstrip().startswith(b"INSERT") else ""
        upstream.request("POST", self.path + settings, body, headers)
        response = upstream.getresponse()
        given = response.read()
        kept = {
            name: value
            for name, value in response.getheaders()
            if name.lower() not in ("transfer-encoding", "content-length", "connection")
        }
        self._answer(response.status, given, kept)
        upstream.close()

    def do_GET(self) -> None:
        self.do_POST()

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Silent."""


@contextmanager
def proxied(stack: Stack, most_bytes: int = 10**9, *, settings: str = "") -> Iterator[ClickHouseAuditLog]:
    """ClickHouse through a proxy that takes requests of this size at most, and sets for INSERTs what a profile could set."""
    parts = urlsplit(stack.clickhouse_url)
    handler = type(
        "Proxy",
        (_Proxy,),
        {"upstream": (parts.hostname, parts.port), "most_bytes": most_bytes, "settings": settings},
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    who, at, _ = parts.netloc.rpartition("@")
    log = ClickHouseAuditLog(f"http://{who}{at}127.0.0.1:{server.server_port}{parts.path}")
    try:
        yield log
        log.client().close_connections()
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def drained(stack: Stack, log: AuditLog, drains: int, owner: str = "one", limits: Limits = LIMITS) -> list[str]:
    """Several drains, each long after the one before by ClickHouse's clock; the names of the errors they ended with."""
    errors = []
    for _ in range(drains):
        try:
            drain(stack.outbox, log, limits, owner=owner)
        except Exception as error:
            errors.append(type(error).__name__)
        stack.sql("UPDATE clickhouse_outbox_batch SET inserts_until_ms = 0")
    return errors


def letters(stack: Stack) -> list[tuple[str, str]]:
    found = stack.sql("SELECT event_id, reason FROM clickhouse_outbox_dead_letter ORDER BY pk")
    return [(str(row.event_id), str(row.reason)) for row in found]


def test_a_block_that_a_proxy_never_takes_goes_out_in_parts(stack: Stack) -> None:
    """Sealed for good, it would fail every run for ever: batch_rows changes nothing any more."""
    put(stack, rows=16, row_bytes=2_000)
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 6)

    assert (stack.counts(), stack.pending(), letters(stack)) == ((16, 16), 0, []), errors
    ((slots,),) = stack.clickhouse("SELECT uniqExact(inserted_at) FROM audit_logs_raw_v1")
    assert int(str(slots)) > 1
    assert {str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id")} == {
        "verified"
    }


def test_a_row_too_large_for_a_proxy_is_set_aside_where_others_pass(stack: Stack) -> None:
    """One row of a tenant's that nothing takes must not hold its neighbours."""
    put(stack, rows=16, row_bytes=500, large={7: 60_000})
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 12)

    assert (stack.counts(), stack.pending()) == ((15, 15), 1), errors
    assert letters(stack) == [("evt_7", "too_large_for_clickhouse")]


def test_a_row_too_large_that_is_alone_in_its_batch_is_set_aside(stack: Stack) -> None:
    """Rows above batch_bytes are alone; without a neighbour to compare with, a small made-up row is."""
    put(stack, rows=1, row_bytes=60_000)
    with proxied(stack, 20_000) as log:
        errors = drained(stack, log, 4)
        put(stack, rows=3, row_bytes=100, at=10)
        errors += drained(stack, log, 1)

    assert (stack.counts(), stack.pending()) == ((3, 3), 1), errors
    assert letters(stack) == [("evt_0", "too_large_for_clickhouse")]


def test_a_proxy_that_takes_nothing_sets_nothing_aside(stack: Stack) -> None:
    """A limit that no ordinary row passes is the limit's fault: dead letters would empty the backlog for nothing."""
    put(stack, rows=4, row_bytes=500)
    with proxied(stack, 1_000) as log:
        errors = drained(stack, log, 6)
    assert (stack.counts(), stack.pending(), letters(stack)) == ((0, 0), 4, [])
    assert len(errors) == 6

    drained(stack, stack.log, 2)
    assert (stack.counts(), stack.pending(), letters(stack)) == ((4, 4), 0, [])


def test_nothing_is_split_while_an_insert_of_it_can_be_at_work(stack: Stack) -> None:
    """The first INSERT may commit until then: its parts beside it would be duplicates."""
    put(stack, rows=16, row_bytes=2_000)
    with proxied(stack, 20_000) as log:
        for _ in range(3):
            with pytest.raises(AuditLogUnavailable):
                drain(stack.outbox, log, LIMITS, owner="one")
        ((manifest,),) = stack.sql("SELECT manifest FROM clickhouse_outbox_batch WHERE batch_id > 0")
    assert len(json.loads(str(manifest))) == 1
    # The proxy had passed the first one on all the same, and it arrives only now.
    (batch,) = stack.outbox.batches([1])
    (block,) = batch.blocks
    payloads = [row.payload for row in stack.outbox.read(block.pks, row_bytes=1)]
    stack.log.insert(batch, block, payloads, deadline_ms=stack.log.deadline_ms(60), timeout_s=30)
    stack.sql("UPDATE clickhouse_outbox_batch SET inserts_until_ms = 0")
    assert drained(stack, stack.log, 1) == []
    assert (stack.counts(), stack.pending()) == ((16, 16), 0)


@pytest.mark.parametrize("generation", ["first export", "requeue"])
@pytest.mark.parametrize("what", ["deleted", "changed", "all deleted", "swapped"])
def test_a_block_that_waits_to_be_split_and_is_altered_is_given_back(stack: Stack, what: str, generation: str) -> None:
    """Nobody can split what is not as it was sealed: it was tried again for ever, and its other rows were stuck with it."""
    put(stack, rows=16, row_bytes=2_000)
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
            put(stack, rows=16, row_bytes=2_000, at=100)
        errors = drained(stack, log, 8)

    assert stack.pending() == 0, errors
    left = {"deleted": 15, "changed": 16, "all deleted": 0, "swapped": 16}[what]
    before = {"deleted": 1, "changed": 1, "all deleted": 16, "swapped": 16}[what] if generation == "requeue" else 0
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert stack.counts() == (left + before, left + before)
    assert {str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id")} == {
        "verified"
    }


def test_a_block_above_a_memory_limit_goes_out_in_parts(stack: Stack) -> None:
    """A profile's max_memory_usage below what a sealed block needs is no reason to stand still."""
    put(stack, rows=40, row_bytes=200_000)
    with proxied(stack, settings="&max_memory_usage=8000000&max_untracked_memory=0") as log:
        errors = drained(stack, log, 10)

    assert (stack.counts(), stack.pending(), letters(stack)) == ((40, 40), 0, []), errors
    assert errors, "the limit had no effect"


def test_a_block_that_takes_too_long_every_time_goes_out_in_parts(stack: Stack) -> None:
    """A time-out that always strikes (159) was met again by every drain, and the batch stayed for ever."""
    stack.clickhouse("ALTER TABLE audit_logs_raw_v1 ADD COLUMN slow UInt8 MATERIALIZED sleepEachRow(0.06)")
    put(stack, rows=24, row_bytes=10)
    errors = drained(stack, stack.log, 6, limits=Limits(insert_timeout_s=1))
    assert (stack.counts(), stack.pending(), letters(stack)) == ((24, 24), 0, []), errors
    assert errors[0] == "AuditLogUnavailable", errors


def test_a_server_without_memory_sets_nothing_aside(stack: Stack) -> None:
    """Pressure on the whole server is over some time; the dead letters that it made would not be."""
    put(stack, rows=4, row_bytes=500)
    with proxied(stack, settings="&max_memory_usage=100000&max_untracked_memory=0") as log:
        errors = drained(stack, log, 8)
    assert (stack.counts(), stack.pending(), letters(stack)) == ((0, 0), 4, [])
    assert len(errors) == 8

    drained(stack, stack.log, 2)
    assert (stack.counts(), stack.pending(), letters(stack)) == ((4, 4), 0, [])


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["first export", "requeue"])
@pytest.mark.parametrize(
    "place",
    ["before replace_cut 1", "after replace_cut 1", "before replace_cut 2", "after replace_cut 2", "after insert 2"],
)
def test_a_crash_while_a_block_is_split_costs_nothing(stack: Stack, place: str, generation: str) -> None:
    """The mark on the block and the new cut are durable effects, and each crash between them must be harmless."""
    put(stack, rows=16, row_bytes=2_000)
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
        stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
        stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    assert (stack.counts(), stack.pending(), letters(stack)) == ((16, 16), 0, [])
    assert {str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id")} == {
        "verified"
    }
