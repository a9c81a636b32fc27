"""An HTTP proxy on loopback before ClickHouse, with the habits of others: chproxy's, a cache's, a maintenance page's.

What belongs here: what stands between two HTTP speakers and changes requests and answers as a whole. What does not: what
happens to bytes on a wire (`chaos.proxy`).
"""

from __future__ import annotations

import http.client
import ssl
import threading
import uuid
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import parse_qsl, urlencode, urlsplit

# What chproxy passes on of a URL (its documentation, "Proxying": everything else is dropped), but for `param_…`.
PASSED = {
    *("query", "database", "default_format", "buffer_size", "wait_end_of_query", "compress", "decompress"),
    *("enable_http_compression", "session_id", "session_timeout", "client_protocol_version"),
}
PAGE = b"<html><head><title>Down for maintenance</title></head><body>Back soon.</body></html>"


@dataclass(kw_only=True)
class Request:
    """A request on its way; `statement` is the body, of which an INSERT's data is a part."""

    target: str
    headers: dict[str, str]
    statement: bytes

    @property
    def inserts(self) -> bool:
        return self.statement.lstrip().startswith(b"INSERT INTO audit_logs_raw_v1")


@dataclass(kw_only=True)
class Answer:
    """What goes back to the client."""

    status: int = 200
    headers: dict[str, str] = field(default_factory=lambda: {"Content-Type": "text/html", "Server": "nginx/1.24.0"})
    body: bytes = PAGE


class NoAnswer(Exception):
    """A habit raises this to close the connection without an answer."""


Forward = Callable[[Request], Answer]
Habit = Callable[[Request, Forward], Answer]


def pass_on(request: Request, forward: Forward) -> Answer:
    return forward(request)


def like_chproxy(request: Request, forward: Forward) -> Answer:
    """Drops the settings of the URL and gives the query another id."""
    parts = urlsplit(request.target)
    kept = [
        (name, value)
        for name, value in parse_qsl(parts.query, keep_blank_values=True)
        if name in PASSED or name.startswith("param_")
    ]
    request.target = f"{parts.path}?{urlencode([*kept, ('query_id', str(uuid.uuid4()))])}"
    return forward(request)


def without_headers(request: Request, forward: Forward) -> Answer:
    """Keeps ClickHouse's headers to itself."""
    answer = forward(request)
    answer.headers = {
        name: value for name, value in answer.headers.items() if not name.lower().startswith("x-clickhouse")
    }
    return answer


class HttpProxy:
    """Forwards to the port of a ClickHouse by `habit`, which may be changed at any time. A context manager.

    With `tls` it speaks TLS to its clients; `requests` then has those whose handshake succeeded.
    """

    def __init__(self, url: str, habit: Habit = pass_on, *, tls: ssl.SSLContext | None = None) -> None:
        parts = urlsplit(url)
        assert parts.port is not None
        self.habit = habit
        self.requests: list[Request] = []
        proxy, target = self, parts.port

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                request = Request(target=self.path, headers=dict(self.headers.items()), statement=self._body())
                proxy.requests.append(request)
                try:
                    answer = proxy.habit(request, forward)
                except NoAnswer:
                    self.close_connection = True
                    return
                self.send_response_only(answer.status)
                for name, value in answer.headers.items():
                    if name.lower() not in ("content-length", "transfer-encoding", "connection", "date"):
                        self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            do_GET = do_POST  # noqa: N815 - the name is the protocol's

            def _body(self) -> bytes:
                if self.headers.get("Transfer-Encoding", "") != "chunked":
                    return self.rfile.read(int(self.headers.get("Content-Length", "0")))
                parts = []
                while size := int(self.rfile.readline().split(b";")[0], 16):
                    parts.append(self.rfile.read(size))
                    self.rfile.readline()
                self.rfile.readline()
                return b"".join(parts)

            def log_message(self, *_: object) -> None:
                pass

        def forward(request: Request) -> Answer:
            connection = http.client.HTTPConnection("127.0.0.1", target, timeout=60)
            headers = {
                name: value
                for name, value in request.headers.items()
                if name.lower() not in ("host", "transfer-encoding", "content-length", "accept-encoding", "connection")
            }
            try:
                connection.request("POST", request.target, request.statement, headers)
                answer = connection.getresponse()
                return Answer(status=answer.status, headers=dict(answer.getheaders()), body=answer.read())
            finally:
                connection.close()

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        if tls is not None:
            self._server.socket = tls.wrap_socket(self._server.socket, server_side=True)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True)
        self.port = int(self._server.server_address[1])
        self.url = url.replace(f":{parts.port}", f":{self.port}", 1)

    def __enter__(self) -> HttpProxy:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
