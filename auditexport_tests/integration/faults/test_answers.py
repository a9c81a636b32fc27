"""Answers that are not ClickHouse's: pages, redirects, caches and proxies, where a decision rests on them.

What belongs here: what a run makes of somebody else's answer. What does not: no answer at all (`test_connection`), and
what ClickHouse itself refuses.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.http_proxy import (
    Answer,
    Forward,
    Habit,
    HttpProxy,
    Request,
    like_chproxy,
    pass_on,
    without_headers,
)

ROWS = 5


@pytest.fixture
def proxy(stack: Stack) -> Iterator[HttpProxy]:
    stack.put(*events(ROWS))
    with HttpProxy(stack.clickhouse_url) as proxy:
        yield proxy


def _drain(stack: Stack, proxy: HttpProxy, owner: str = "run") -> str:
    """One run through the proxy; what it fails with, or nothing."""
    try:
        drain(stack.outbox, ClickHouseAuditLog(proxy.url), Limits(), owner=owner, dead_owners=("run",))
    except AuditExportError as error:
        return f"{type(error).__name__}: {error}"
    return ""


def _instead(answer: Answer) -> Habit:
    return lambda request, forward: answer if request.inserts else forward(request)


def _beside(answer: Answer) -> Habit:
    """ClickHouse has the INSERT, and the client gets another answer."""

    def habit(request: Request, forward: Forward) -> Answer:
        own = forward(request)
        return answer if request.inserts else own

    return habit


@pytest.mark.parametrize(
    "answer",
    [Answer(), Answer(body=b""), Answer(status=204, body=b""), Answer(headers={"X-Cache": "HIT"}, body=b"Ok.\n")],
    ids=["page", "empty", "no content", "ok"],
)
def test_a_page_acknowledges_nothing(stack: Stack, proxy: HttpProxy, answer: Answer) -> None:
    """Rows that were marked on a maintenance page's word would be nowhere."""
    proxy.habit = _instead(answer)
    said = _drain(stack, proxy)
    assert (stack.pending(), stack.counts()) == (ROWS, (0, 0))
    assert f"HTTP {answer.status}" in said or "does not prove to be ClickHouse's" in said
    proxy.habit = pass_on
    assert _drain(stack, proxy, "next") == ""
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (301, "redirects, which is not followed"),
        (307, "redirects, which is not followed"),
        (401, "asks for a login"),
        (403, "forbids the request"),
        (404, "a web server without this path"),
        (407, "asks for a login"),
        (413, "takes no request of this size"),
        (429, "limits requests"),
        (502, "could not reach ClickHouse"),
        (503, "under maintenance"),
        (504, "gave up; ClickHouse may still be at work"),
    ],
)
def test_each_status_says_what_it_means(stack: Stack, proxy: HttpProxy, status: int, means: str) -> None:
    """'No answer came' sends people to the network when a proxy has said what is wrong; and a redirect loses the rows."""
    elsewhere = {"Location": proxy.url.replace("default@", ""), "Server": "nginx"}
    proxy.habit = _instead(Answer(status=status, headers=elsewhere))
    said = _drain(stack, proxy)
    assert f"HTTP {status}" in said
    assert means in said
    assert (stack.pending(), stack.counts()) == (ROWS, (0, 0))


def test_rows_that_arrived_behind_a_502_are_not_written_again(stack: Stack, proxy: HttpProxy) -> None:
    """A proxy that gives up says nothing about what it has passed on."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
    proxy.habit = _beside(Answer(status=502))
    assert _drain(stack, proxy) == ""  # looked for at once, and found
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))
    proxy.habit = pass_on
    assert _drain(stack, proxy, "next") == ""
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))


@pytest.mark.parametrize("again", [False, True], ids=["first export", "requeue"])
def test_where_a_proxy_keeps_the_headers_a_look_proves_the_insert(stack: Stack, proxy: HttpProxy, again: bool) -> None:
    """A proxy that strips X-ClickHouse-… must not stop the export for ever; and its 200 alone is still no proof."""
    if again:
        assert _drain(stack, proxy) == ""
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL")
    proxy.habit = lambda request, forward: (
        Answer(headers={}, body=b"") if request.inserts else without_headers(request, forward)
    )
    _drain(stack, proxy, "lost")
    assert stack.pending() == ROWS
    proxy.habit = without_headers
    drain(stack.outbox, ClickHouseAuditLog(proxy.url), Limits(), owner="next", dead_owners=("run", "lost"))
    assert stack.pending() == 0
    ((events_held,),) = stack.clickhouse("SELECT count() FROM audit_logs")
    assert events_held == ROWS


def test_an_error_after_a_200_is_an_error(stack: Stack, proxy: HttpProxy) -> None:
    """Where wait_end_of_query is stripped, ClickHouse's refusal can come when its status is long on the way."""
    late = Answer(
        headers={"X-ClickHouse-Query-Id": "q", "X-ClickHouse-Summary": "{}"},
        body=b"\r\n__exception__\r\nabc\r\nCode: 241. DB::Exception: too much. (MEMORY_LIMIT_EXCEEDED)\r\n58 abc\r\n__exception__\r\n",
    )
    proxy.habit = _instead(late)
    said = _drain(stack, proxy)
    assert stack.pending() == ROWS
    assert "MEMORY_LIMIT_EXCEEDED" in said


def test_a_cache_does_not_answer_a_look(stack: Stack, proxy: HttpProxy) -> None:
    """Chproxy's cache gives the same question the same answer for minutes: a loss would go unseen for as long."""
    cache: dict[bytes, Answer] = {}

    def caching(request: Request, forward: Forward) -> Answer:
        boundary = request.headers.get("Content-Type", "").rpartition("boundary=")[2].encode() or b"-"
        key = request.statement.replace(boundary, b"")
        if key not in cache:
            cache[key] = forward(request)
        return cache[key]

    assert _drain(stack, proxy) == ""
    proxy.habit = caching
    log = ClickHouseAuditLog(proxy.url)
    (at,) = {int(str(row[0])) for row in stack.clickhouse("SELECT inserted_at FROM audit_logs_raw_v1")}
    assert log.holdings([at])[at].rows == ROWS
    stack.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'evt_1'")
    assert log.holdings([at])[at].rows == ROWS - 1
    assert len(log.entries_at(at)) == ROWS - 1


def test_the_answer_to_another_question_is_refused(stack: Stack, proxy: HttpProxy) -> None:
    """A cache in front of POSTs goes by the URL, which is the same for all our questions."""
    assert _drain(stack, proxy) == ""
    log = ClickHouseAuditLog(proxy.url)
    (at,) = {int(str(row[0])) for row in stack.clickhouse("SELECT inserted_at FROM audit_logs_raw_v1")}
    answers = [Answer()]

    def remembering(request: Request, forward: Forward) -> Answer:
        answers.append(forward(request))
        return answers[-1]

    proxy.habit = remembering
    log.holdings([at])
    stack.clickhouse("TRUNCATE TABLE audit_logs_raw_v1")
    proxy.habit = lambda *_: answers[-1]
    try:
        found: object = log.holdings([at])
    except AuditExportError as error:
        found = type(error).__name__
    assert found == "ForeignAnswer"


def test_half_an_answer_is_none(stack: Stack, proxy: HttpProxy) -> None:
    """A look-up that ends early would call entries missing, and `--repair` would write them again."""
    assert _drain(stack, proxy) == ""
    log = ClickHouseAuditLog(proxy.url)
    (at,) = {int(str(row[0])) for row in stack.clickhouse("SELECT inserted_at FROM audit_logs_raw_v1")}
    log.holdings([at])

    def half(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        answer.body = answer.body[: len(answer.body) // 2]
        return answer

    proxy.habit = half
    try:
        found: object = len(log.entries_at(at))
    except AuditExportError as error:
        found = type(error).__name__
    assert found == "ForeignAnswer"


def test_an_insert_that_a_proxy_repeats_is_stored_once_behind_chproxy(stack: Stack, proxy: HttpProxy) -> None:
    """Chproxy drops the URL's settings, with them a token, and retries: every block would be there twice."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")

    def repeating(request: Request, forward: Forward) -> Answer:
        if request.inserts:
            like_chproxy(request, forward)
        return like_chproxy(request, forward)

    proxy.habit = repeating
    assert _drain(stack, proxy) == ""
    assert stack.counts() == (ROWS, ROWS)


def test_a_meta_keeps_its_meaning_behind_chproxy(stack: Stack) -> None:
    """Dates in metas stay text, keys keep their dots and booleans stay booleans, whatever becomes of a URL's settings."""
    meta = '{"a.b": 1, "at": "2024-01-01T10:00:00Z", "yes": [true, 1]}'
    payload = (
        '{"event_id": "evt_1", "time": 1, "workspace_id": "ws", "bucket": "b", "source": "s", "event": "e", "description": "d", '
        f'"actor": {{"type": "user", "id": "u"}}, "meta": {meta}}}'
    )
    stack.put(("ws", "evt_1", payload))
    with HttpProxy(stack.clickhouse_url, like_chproxy) as proxy:
        assert _drain(stack, proxy) == ""
        assert not [found for found in preflight.check(stack.outbox, ClickHouseAuditLog(proxy.url)) if found.fatal]
    ((text,),) = stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1")
    assert text == '{"a.b":1,"at":"2024-01-01T10:00:00Z","yes":[true,1]}'
