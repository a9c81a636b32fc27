"""Answers that are not ClickHouse's, from pages, redirects, caches and proxies, where a decision rests on them.

What does not belong here: no answer at all (`test_connection`), and what ClickHouse itself refuses.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import AuditExportError, ForeignAnswer
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, small_event, stop_merges
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
    [Answer(), Answer(body=b""), Answer(status=204, body=b"")],
    ids=["page", "empty", "no content"],
)
def test_a_page_acknowledges_nothing(stack: Stack, proxy: HttpProxy, answer: Answer) -> None:
    """Rows that were marked after a maintenance page would be lost."""
    proxy.habit = _instead(answer)
    error = _drain(stack, proxy)
    assert (stack.pending(), stack.counts()) == (ROWS, (0, 0))
    assert f"HTTP {answer.status}" in error or "does not prove to be ClickHouse's" in error
    proxy.habit = pass_on
    assert _drain(stack, proxy, "next") == ""
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))


@pytest.mark.parametrize(
    ("status", "means"),
    [
        (307, "redirects, which is not followed"),
        (401, "asks for a login"),
        (403, "forbids the request"),
        (404, "a web server without this path"),
        (413, "takes no request of this size"),
        (502, "could not reach ClickHouse"),
        (503, "under maintenance"),
        (504, "gave up; ClickHouse may still be at work"),
    ],
)
def test_each_status_says_what_it_means(stack: Stack, proxy: HttpProxy, status: int, means: str) -> None:
    """'No answer' would mislead where a proxy names the fault; and a redirected INSERT loses its rows."""
    elsewhere = {"Location": proxy.url.replace("default@", ""), "Server": "nginx"}
    proxy.habit = _instead(Answer(status=status, headers=elsewhere))
    error = _drain(stack, proxy)
    assert f"HTTP {status}" in error
    assert means in error
    assert (stack.pending(), stack.counts()) == (ROWS, (0, 0))


def test_rows_that_arrived_behind_a_502_are_not_written_again(stack: Stack, proxy: HttpProxy) -> None:
    """A proxy that gives up may have passed the rows on."""
    stop_merges(stack)
    proxy.habit = _beside(Answer(status=502))
    assert _drain(stack, proxy) == ""  # looked for at once, and found
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))
    proxy.habit = pass_on
    assert _drain(stack, proxy, "next") == ""
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))


@pytest.mark.parametrize("again", [False, True], ids=["first export", "requeue"])
def test_where_a_proxy_drops_the_headers_a_look_up_proves_the_insert(
    stack: Stack, proxy: HttpProxy, again: bool
) -> None:
    """A proxy that strips X-ClickHouse-… must not stop the export for ever, and its 200 alone is no proof."""
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
    """Without wait_end_of_query, ClickHouse's refusal can follow a status of 200."""
    late = Answer(
        headers={"X-ClickHouse-Query-Id": "q", "X-ClickHouse-Summary": "{}"},
        body=b"\r\n__exception__\r\nabc\r\nCode: 241. DB::Exception: too much. (MEMORY_LIMIT_EXCEEDED)\r\n58 abc\r\n__exception__\r\n",
    )
    proxy.habit = _instead(late)
    error = _drain(stack, proxy)
    assert stack.pending() == ROWS
    assert "MEMORY_LIMIT_EXCEEDED" in error


@pytest.fixture
def at(stack: Stack, proxy: HttpProxy) -> int:
    """The `inserted_at` of a block that is exported."""
    assert _drain(stack, proxy) == ""
    ((at,),) = stack.clickhouse("SELECT DISTINCT inserted_at FROM audit_logs_raw_v1")
    return int(str(at))


def test_a_cache_does_not_answer_a_look(stack: Stack, proxy: HttpProxy, at: int) -> None:
    """Chproxy's cache repeats the answer to a statement for minutes: a loss would be invisible for as long."""
    cache: dict[bytes, Answer] = {}

    def caching(request: Request, forward: Forward) -> Answer:
        boundary = request.headers.get("Content-Type", "").rpartition("boundary=")[2].encode() or b"-"
        key = request.statement.replace(boundary, b"")
        if key not in cache:
            cache[key] = forward(request)
        return cache[key]

    proxy.habit = caching
    log = ClickHouseAuditLog(proxy.url)
    assert log.holdings([at])[at].rows == ROWS
    stack.clickhouse("DELETE FROM audit_logs_raw_v1 WHERE event_id = 'evt_1'")
    assert log.holdings([at])[at].rows == ROWS - 1
    assert len(log.entries_at(at)) == ROWS - 1


def test_the_answer_to_another_question_is_refused(stack: Stack, proxy: HttpProxy, at: int) -> None:
    """A cache in front of POSTs goes by the URL, which is the same for all our statements."""
    log = ClickHouseAuditLog(proxy.url)
    answers = [Answer()]

    def remembering(request: Request, forward: Forward) -> Answer:
        answers.append(forward(request))
        return answers[-1]

    proxy.habit = remembering
    log.holdings([at])
    stack.clickhouse("TRUNCATE TABLE audit_logs_raw_v1")
    proxy.habit = lambda *_: answers[-1]
    with pytest.raises(ForeignAnswer):
        log.holdings([at])


def test_half_an_answer_is_none(proxy: HttpProxy, at: int) -> None:
    """A look-up that ends early would call entries missing, and `--repair` would write them again."""
    log = ClickHouseAuditLog(proxy.url)
    log.holdings([at])

    def half(request: Request, forward: Forward) -> Answer:
        answer = forward(request)
        answer.body = answer.body[: len(answer.body) // 2]
        return answer

    proxy.habit = half
    with pytest.raises(ForeignAnswer):
        log.entries_at(at)


def test_an_insert_that_a_proxy_repeats_is_stored_once_behind_chproxy(stack: Stack, proxy: HttpProxy) -> None:
    """Chproxy drops the URL's settings and retries: with a token in the URL, every block would be stored twice."""
    stop_merges(stack)

    def repeating(request: Request, forward: Forward) -> Answer:
        if request.inserts:
            like_chproxy(request, forward)
        return like_chproxy(request, forward)

    proxy.habit = repeating
    assert _drain(stack, proxy) == ""
    assert stack.counts() == (ROWS, ROWS)


def test_a_meta_keeps_its_meaning_behind_chproxy(stack: Stack) -> None:
    """Dates in metas stay text, keys keep their dots and booleans stay booleans without the settings of a URL."""
    stack.put(small_event("evt_1", meta={"a.b": 1, "at": "2024-01-01T10:00:00Z", "yes": [True, 1]}))
    with HttpProxy(stack.clickhouse_url, like_chproxy) as proxy:
        assert _drain(stack, proxy) == ""
        assert not [found for found in preflight.check(stack.outbox, ClickHouseAuditLog(proxy.url)) if found.fatal]
    ((text,),) = stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1")
    assert text == '{"a.b":1,"at":"2024-01-01T10:00:00Z","yes":[true,1]}'
