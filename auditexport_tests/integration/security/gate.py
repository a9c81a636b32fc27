"""A gate before the embedded ClickHouse: it asks for a password, sees every request, and can misbehave.

What belongs here: authentication, which the embedded server does not have, and faults that are aimed at INSERTs.
What does not: a network's faults, which `chaos.proxy` has.
"""

from __future__ import annotations

import base64
import http.client
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Literal

from auditexport_tests.integration.security.canaries import Search

Mode = Literal[
    "pass",
    "cut",  # an INSERT's connection is closed without an answer
    "echo",  # an INSERT, or a comparison, is answered with an error that quotes all that was sent
    "hold",  # an INSERT is never answered
]
NOT_SENT_ON = {"authorization", "host", "content-length", "transfer-encoding", "connection"}
DATA_BEGINS = b"FORMAT JSONEachRow\n"
NOT_LOGGED = b"log_queries = 0"


class Gate:
    """One port with one mode. `on_insert` is called when a whole INSERT has arrived, before anything is done."""

    def __init__(self, upstream_port: int, password: str, search: Search, mode: Mode = "pass") -> None:
        self.password = password
        self.mode = mode
        self.on_insert: Callable[[], object] = lambda: None
        self.inserts = 0
        self.ended = threading.Event()
        gate = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                gate.handle(self, upstream_port, search)

            do_POST = do_GET  # noqa: N815 - the name is the protocol's

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> Gate:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.ended.set()
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def handle(self, request: BaseHTTPRequestHandler, upstream_port: int, search: Search) -> None:
        body = _body_of(request)
        headers = {name: value for name, value in request.headers.items() if name.lower() not in NOT_SENT_ON}
        search.look(
            "ClickHouse: statements, URLs and headers received",
            body[:20].decode(errors="replace"),
            request.path.encode(),
            repr(headers).encode(),
            _what_a_server_logs(body),
        )
        given = request.headers.get("Authorization", "")
        if given != "Basic " + base64.b64encode(f"default:{self.password}".encode()).decode():
            _answer(request, 403, {"X-ClickHouse-Exception-Code": "516"}, _error(516, "default: wrong password"))
            return
        inserting = body.startswith(b"INSERT INTO audit_logs_raw_v1")
        if inserting:
            self.inserts += 1
            self.on_insert()
        if inserting and self.mode == "hold":
            self.ended.wait()
        if inserting and self.mode in ("cut", "hold"):
            request.close_connection = True
            return
        if self.mode == "echo" and (inserting or NOT_LOGGED in body):
            quoted = f"{given} {request.path} {body.decode(errors='replace')}"
            _answer(request, 500, {"X-ClickHouse-Exception-Code": "1002"}, _error(1002, quoted))
            return
        upstream = http.client.HTTPConnection("127.0.0.1", upstream_port, timeout=60)
        upstream.request(request.command, request.path, body, headers)
        answer = upstream.getresponse()
        data = answer.read()
        kept = {name: value for name, value in answer.getheaders() if name.lower() not in NOT_SENT_ON}
        upstream.close()
        _answer(request, answer.status, kept, data)


def _what_a_server_logs(body: bytes) -> bytes:
    """The part of a body that is statement: a server's query log keeps that, unless it is told not to (`test_query_log`)."""
    if DATA_BEGINS in body:
        return body.partition(DATA_BEGINS)[0]
    return b"" if NOT_LOGGED in body else body


def _body_of(request: BaseHTTPRequestHandler) -> bytes:
    if request.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return request.rfile.read(int(request.headers.get("Content-Length", 0)))
    parts = []
    while size := int(request.rfile.readline().split(b";")[0], 16):
        parts.append(request.rfile.read(size))
        request.rfile.readline()
    request.rfile.readline()
    return b"".join(parts)


def _error(code: int, text: str) -> bytes:
    return f"Code: {code}. DB::Exception: {text}. (UNKNOWN_EXCEPTION)\n".encode()


def _answer(request: BaseHTTPRequestHandler, status: int, headers: dict[str, str], data: bytes) -> None:
    request.send_response(status)
    for name, value in headers.items():
        request.send_header(name, value)
    request.send_header("Content-Length", str(len(data)))
    request.end_headers()
    request.wfile.write(data)
