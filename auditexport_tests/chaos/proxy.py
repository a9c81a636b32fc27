"""A TCP proxy on loopback between the exporter and one server, whose faults are switched at run time.

A fault happens to any request, or only to INSERTs and COMMITs. The proxy runs an event loop in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from asyncio import StreamReader as Reader
from asyncio import StreamWriter as Writer
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal[
    "stall",  # the request is delayed
    "unsent",  # the request is dropped and the connection cut: the server never sees it
    "answer lost",  # the server has answered, and the connection is cut before the client reads it
    "answer cut",  # half of the answer arrives
    "late",  # the request is delivered only after the client has given up
    "drip",  # the answer arrives in small pieces
    "unavailable",  # HTTP 503; the server gets no request
    "bad gateway",  # HTTP 502 with a page; the server may have executed the request
    "page",  # HTTP 200 with a page; the server gets no request
    "refuse",  # for a while every connection is reset, also those that are open
    "cut",  # every open connection is reset, now
]
WIRE_KINDS: dict[str, tuple[Kind, ...]] = {
    "http": (
        *("stall", "unsent", "answer lost", "answer cut", "late", "drip"),
        *("unavailable", "bad gateway", "page", "refuse", "cut"),
    ),
    "mysql": ("stall", "unsent", "answer lost", "answer cut", "late", "drip", "refuse", "cut"),
}
AIMS = {"http": b"INSERT INTO audit_logs_raw_v1", "mysql": b"\x03COMMIT"}
# A client that has not given up by then never will; the fault is then a long stall.
GIVES_UP_WITHIN_S = 15.0
PIECES = 20
PAGE = b"<html><body>This site is being looked after. Please come back soon.</body></html>"
# Answers of ClickHouse that show faults other than the wire's.
FAULTS_IN_ANSWERS = {b"while pushing to view": "view fails", b"MEMORY_LIMIT_EXCEEDED": "memory limit"}
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, for the next request that fits."""

    kind: Kind
    aimed: bool = False  # at INSERTs or COMMITs only
    seconds: float = 0.0
    forwarded: bool = False  # whether a bad gateway passes the request on


# The fault of a request without one.
NONE = Fault(kind="stall")


class Proxy:
    """Listens on `port` and forwards to the port `target`; a context manager. Thread-safe."""

    def __init__(self, target: int, *, speaks: Literal["http", "mysql"]) -> None:
        self.target = target
        self.speaks = speaks
        self.hits: Counter[str] = Counter()
        self.held = 0  # requests that are delivered after their clients gave up
        self.largest_insert_bytes: int | None = None  # a larger INSERT gets HTTP 413
        self.insert_memory_bytes: int | None = None  # the max_memory_usage of each INSERT, as a profile would set it
        self._armed: list[Fault] = []
        self._refusing_until = 0.0
        self._servers: dict[Writer, Writer] = {}  # the connection to the server, by that of the client
        self._tasks: set[asyncio.Task[None]] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{speaks}_proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        starting = asyncio.start_server(self._accept, "127.0.0.1", 0)
        self._listener = asyncio.run_coroutine_threadsafe(starting, self._loop).result(60)
        self.port = int(self._listener.sockets[0].getsockname()[1])
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result(60)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def arm(self, fault: Fault) -> None:
        """The fault happens to the next request that it fits; "cut" and "refuse" happen at once."""
        if fault.kind not in ("cut", "refuse"):
            self._armed.append(fault)
            return
        if fault.kind == "refuse":
            self._refusing_until = self._loop.time() + fault.seconds
        self._loop.call_soon_threadsafe(self._reset_all, fault.kind)

    @property
    def armed(self) -> bool:
        """Whether a fault still waits for its request."""
        return bool(self._armed)

    def lift(self) -> None:
        """Removes faults that have not happened yet. A request that is held stays so until it is delivered."""
        self.largest_insert_bytes = self.insert_memory_bytes = None
        self._armed.clear()
        self._refusing_until = 0.0

    def server_side_ports(self) -> set[int]:
        """The local ports of the connections to the server, by which its process list shows the exporter's."""
        names = [server.get_extra_info("sockname") for server in [*self._servers.values()]]
        return {name[1] for name in names if name}

    # ── in the loop's thread ─────────────────────────────────────────────────────────────────────

    async def _close(self) -> None:
        self._listener.close()
        # A connection that the listener has just accepted becomes a task meanwhile.
        while tasks := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    def _reset_all(self, kind: Kind) -> None:
        for client in [*self._servers]:
            self.hits[kind] += kind == "cut"
            self._reset(client)

    def _reset(self, client: Writer) -> None:
        for writer in (client, self._servers.pop(client, None)):
            if writer is not None:
                _abort(writer)

    def _take(self, request: bytes) -> Fault | None:
        """The first armed fault that fits this request; it is armed no more."""
        aimed = AIMS[self.speaks] in request
        for fault in self._armed:
            if aimed or not fault.aimed:
                self._armed.remove(fault)
                self.hits[fault.kind] += 1
                return fault
        return None

    def _accept(self, reader: Reader, client: Writer) -> None:
        task = self._loop.create_task(self._serve(reader, client))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        task.add_done_callback(lambda _: self._reset(client))  # also of a task that is cancelled before its first step

    async def _serve(self, reader: Reader, client: Writer) -> None:
        try:
            if self._loop.time() < self._refusing_until:
                self.hits["refuse"] += 1
                return
            from_server, server = await asyncio.open_connection("127.0.0.1", self.target)
            self._servers[client] = server
            serve = self._serve_http if self.speaks == "http" else self._serve_mysql
            await serve(reader, client, from_server, server)
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError):
            pass

    async def _serve_http(self, reader: Reader, client: Writer, from_server: Reader, server: Writer) -> None:
        """Request by request; each is read whole before a byte of it is forwarded."""
        while True:
            request = await _http_message(reader)
            fault = self._take(request) or NONE
            if fault.kind == "unsent":
                return
            if page := self._page_instead(request, fault):
                client.write(page)
                continue
            if AIMS["http"] in request and self.insert_memory_bytes is not None:
                request = _with_setting(request, f"max_memory_usage={self.insert_memory_bytes}")
            if fault.kind == "stall":
                await asyncio.sleep(fault.seconds)
            if fault.kind == "late":
                async with self._given_up(reader, fault.seconds):
                    server.write(request)
                    await _http_message(from_server, answer=True)
                return
            server.write(request)
            answer = await _http_message(from_server, answer=True)
            for text, name in FAULTS_IN_ANSWERS.items():
                self.hits[name] += text in answer
            if fault.kind == "bad gateway":
                answer = _page(b"502 Bad Gateway")
            if await _answered(client, answer, fault):
                return

    def _page_instead(self, request: bytes, fault: Fault) -> bytes | None:
        """What the client gets instead of the server's answer, where the server gets no request."""
        largest = self.largest_insert_bytes
        if fault.kind == "unavailable":
            return _page(b"503 Service Unavailable", b"")
        if fault.kind == "page":
            return _page(b"200 OK")
        if AIMS["http"] in request and largest is not None and len(request) > largest:
            self.hits["too large"] += 1
            return _page(b"413 Request Entity Too Large")
        if fault.kind == "bad gateway" and not fault.forwarded:
            return _page(b"502 Bad Gateway")
        return None

    async def _serve_mysql(self, reader: Reader, client: Writer, from_server: Reader, server: Writer) -> None:
        """Both directions at once; a fault of the answer waits for the server's next answer."""
        answer_to: list[Fault] = []

        async def forward_answers() -> None:
            while answer := await from_server.read(1 << 16):
                if await _answered(client, answer, answer_to.pop() if answer_to else NONE):
                    return

        answering = asyncio.ensure_future(forward_answers())
        answering.add_done_callback(lambda _: _abort(client))
        try:
            while request := await reader.read(1 << 16):
                fault = self._take(request)
                if fault and fault.kind == "unsent":
                    return
                if fault and fault.kind == "late":
                    answering.cancel()
                    async with self._given_up(reader, fault.seconds):
                        server.write(request)
                        await from_server.read(1 << 16)
                    return
                if fault and fault.kind == "stall":
                    await asyncio.sleep(fault.seconds)
                elif fault:
                    answer_to.append(fault)
                server.write(request)
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await answering

    @contextlib.asynccontextmanager
    async def _given_up(self, reader: Reader, seconds: float) -> AsyncIterator[None]:
        """Waits until the client has given up, and `seconds` more; the body delivers the request."""
        self.held += 1
        try:
            with contextlib.suppress(asyncio.TimeoutError, OSError):
                await asyncio.wait_for(reader.read(1), GIVES_UP_WITHIN_S)
            await asyncio.sleep(seconds)
            yield
        finally:
            self.held -= 1


async def _answered(client: Writer, answer: bytes, fault: Fault) -> bool:
    """Sends the answer as the fault allows; True when the connection ends with it."""
    if fault.kind == "answer lost":
        return True
    size = len(answer)
    if fault.kind == "answer cut":
        answer = answer[: size // 2]
    elif fault.kind == "drip":
        size = -(-size // PIECES)
    for start in range(0, len(answer), max(1, size)):
        client.write(answer[start : start + size])
        await client.drain()
        if fault.kind == "drip":
            await asyncio.sleep(fault.seconds / PIECES)
    return fault.kind == "answer cut"


def _abort(writer: Writer) -> None:
    """Closes with a reset, as the network of a crashed machine does."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _page(status: bytes, body: bytes = PAGE) -> bytes:
    """The answer of a proxy, not of the server."""
    head = b"HTTP/1.1 %b\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _with_setting(request: bytes, setting: str) -> bytes:
    """The request with one more setting in its URL."""
    line, rest = request.split(b"\r\n", 1)
    method, target, version = line.split(b" ")
    mark = b"&" if b"?" in target else b"?"
    return b" ".join((method, target + mark + setting.encode(), version)) + b"\r\n" + rest


async def _http_message(reader: Reader, *, answer: bool = False) -> bytes:
    """One whole request or answer; raises `EOFError` when the other side has closed."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    if headers.get(b"transfer-encoding") == b"chunked":
        body = part = b""
        while part != b"\r\n":
            line = await reader.readuntil(b"\r\n")
            part = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
            body += line + part
        return head + body
    if b"content-length" in headers:
        return head + await reader.readexactly(int(headers[b"content-length"]))
    return head + await reader.read() if answer and lines[0].split()[1] not in (b"204", b"304") else head
