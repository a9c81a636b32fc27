"""A web server on loopback that keeps what it is sent, and can be told to misbehave."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

SECRET = "secret-hook-id"


@dataclass(slots=True)
class Webhook:
    """Where notices arrive; `answer` is its status, and `released` lets go of those that it holds without an answer."""

    url: str = ""
    answer: int = 200
    holds: bool = False
    drips: bool = False
    paths: list[str] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    released: threading.Event = field(default_factory=threading.Event)

    def texts(self) -> list[str]:
        """What arrived since the last call."""
        taken, self.bodies[:] = list(self.bodies), []
        return [str(body["text"]) for body in taken]

    def titles(self) -> list[str]:
        """The first lines of what arrived since the last call, without the markup."""
        return [text.splitlines()[0].strip("*") for text in self.texts()]


@contextmanager
def webhook() -> Iterator[Webhook]:
    """A server that runs until the block ends."""
    seen = Webhook()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if not self._misbehaved():
                self._answer()

        def do_POST(self) -> None:
            body = self.rfile.read(int(self.headers["Content-Length"]))
            assert self.headers["Content-Type"] == "application/json"
            if self._misbehaved():
                return
            if seen.answer < 300:
                seen.bodies.append(json.loads(body))
            self._answer()

        def _misbehaved(self) -> bool:
            misbehaves = seen.holds or seen.drips
            if seen.holds:
                seen.released.wait(60)
            if seen.drips:
                # A byte of the header now and then: each read of the client's succeeds.
                while not seen.released.wait(0.05):
                    self.wfile.write(b"H")
                    self.wfile.flush()
            return misbehaves

        def _answer(self) -> None:
            seen.paths.append(self.path)
            self.send_response(seen.answer)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def handle(self) -> None:
            with suppress(OSError):  # the client has given up
                super().handle()

        def log_message(self, *_: object) -> None:
            """Says nothing on stderr."""

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        seen.url = f"http://127.0.0.1:{server.server_port}/{SECRET}"
        try:
            yield seen
        finally:
            seen.released.set()
            server.shutdown()
            thread.join()
