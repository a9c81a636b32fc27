"""A proxy before the embedded ClickHouse: it asks for a password, searches every request, and can misbehave."""

from __future__ import annotations

import base64
import threading
from collections.abc import Callable
from typing import Literal

from auditexport_tests.integration.security.canaries import Search
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, NoAnswer, Request

Mode = Literal[
    "pass",
    "cut",  # an INSERT's connection is closed without an answer
    "echo",  # an INSERT, or a comparison, is answered with an error that quotes the request
    "hold",  # an INSERT is never answered
]
DATA_BEGINS = b"FORMAT JSONEachRow\n"
NOT_LOGGED = b"log_queries = 0"


class Gate(HttpProxy):
    """`on_insert` is called when a whole INSERT has arrived, before anything is done."""

    def __init__(self, url: str, password: str, search: Search, mode: Mode) -> None:
        super().__init__(url, self._handle)
        self._login = "Basic " + base64.b64encode(f"default:{password}".encode()).decode()
        self._search = search
        self._mode = mode
        self._ended = threading.Event()
        self.on_insert: Callable[[], object] = lambda: None
        self.inserts = 0

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        super().__exit__(*error)  # type: ignore[arg-type]

    def _handle(self, request: Request, forward: Forward) -> Answer:
        body = request.statement
        login = request.headers.pop("Authorization", "")
        self._search.look(
            "ClickHouse: statements, URLs and headers received",
            body[:20].decode(errors="replace"),
            request.target.encode(),
            repr(request.headers).encode(),
            _logged(body),
        )
        if login != self._login:
            return _error(403, 516, "default: wrong password")
        if request.inserts:
            self.inserts += 1
            self.on_insert()
            if self._mode == "hold":
                self._ended.wait()
            if self._mode in ("cut", "hold"):
                raise NoAnswer
        if self._mode == "echo" and (request.inserts or NOT_LOGGED in body):
            return _error(500, 1002, f"{login} {request.target} {body.decode(errors='replace')}")
        return forward(request)


def _logged(body: bytes) -> bytes:
    """The part that a server's query log keeps: the statement, unless the log is off for it (`test_query_log`)."""
    if DATA_BEGINS in body:
        return body.partition(DATA_BEGINS)[0]
    return b"" if NOT_LOGGED in body else body


def _error(status: int, code: int, text: str) -> Answer:
    body = f"Code: {code}. DB::Exception: {text}. (UNKNOWN_EXCEPTION)\n".encode()
    return Answer(status=status, headers={"X-ClickHouse-Exception-Code": str(code)}, body=body)
