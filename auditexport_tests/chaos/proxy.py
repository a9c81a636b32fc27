"""A TCP proxy on loopback between the exporter and one server, with faults that are switched at run time.

What belongs here: what a network and an overloaded server do to bytes, aimed at any request, at INSERTs or at
COMMITs. What does not: when that happens (`actions`), and killing processes. It runs in a thread of its own.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import threading
from collections import Counter
from collections.abc import Coroutine
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Literal

Kind = Literal[
    "stall",  # the request is held for a while, then delivered
    "unsent",  # the request is dropped and the connection cut: the server never sees it
    "answer lost",  # the server has answered, and the connection is cut before the client reads it
    "answer cut",  # half of the answer arrives
    "late",  # the request is held until the client has given up, and then delivered
    "drip",  # the answer arrives in small pieces
    "unavailable",  # HTTP 503, and the server is not asked
    "bad gateway",  # HTTP 502 with a page, whether or not the server has done what it was asked
    "page",  # HTTP 200 with a page, and the server is not asked
    "refuse",  # for a while every connection is reset, those that are open included
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
# A client that has not given up by then never will: the fault passes as a long stall.
GIVES_UP_WITHIN_S = 15.0
PIECES = 20
PAGE = b"<html><body>This site is being looked after. Please come back soon.</body></html>"
# What an answer of ClickHouse's tells of faults that are not the wire's.
TOLD_BY_ANSWERS = {b"while pushing to view": "view fails", b"MEMORY_LIMIT_EXCEEDED": "memory limit"}
RESET = struct.pack("ii", 1, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """One fault, for the next request that it is aimed at; `seconds` is how long it lasts, where it lasts."""

    kind: Kind
    aimed: bool = False  # at INSERTs or COMMITs only
    seconds: float = 0.0
    forwarded: bool = False  # a bad gateway may have passed the request on


class Proxy:
    """Listens on `port` and forwards to the port `target`; a context manager. Its methods may be called by any thread."""

    def __init__(self, target: int, *, speaks: Literal["http", "mysql"]) -> None:
        self.target = target
        self.speaks = speaks
        self.hits: Counter[str] = Counter()
        self.held = 0  # requests that are delivered later than their clients believe
        self.largest_insert_bytes: int | None = None  # a larger INSERT is answered with HTTP 413
        self.insert_memory_bytes: int | None = None  # the server gets it with the INSERT, as a profile would give it
        self._armed: list[Fault] = []
        self._refusing_until = 0.0
        self._writers: dict[asyncio.StreamWriter, asyncio.StreamWriter] = {}  # of clients, to those of the server
        self._loop = asyncio.new_event_loop()
        self._tasks: set[asyncio.Task[None]] = set()
        self._thread = threading.Thread(target=self._loop.run_forever, name=f"{speaks}_proxy", daemon=True)

    def __enter__(self) -> Proxy:
        self._thread.start()
        self._server = self._do(asyncio.start_server(self._accept, "127.0.0.1", 0))
        self.port = int(self._server.sockets[0].getsockname()[1])
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._do(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def arm(self, fault: Fault) -> None:
        """Has the fault happen to the next request that it fits, or at once where it is not about one."""
        self._loop.call_soon_threadsafe(self._arm, fault)

    @property
    def armed(self) -> bool:
        """Whether a fault still waits for its request."""
        return bool(self._armed)

    def lift(self) -> None:
        """Takes back what has not happened yet; what is held stays held until it is delivered."""
        self._do(self._lift())

    def cut(self) -> None:
        """Resets every open connection."""
        self._loop.call_soon_threadsafe(self._cut)

    def server_side_ports(self) -> set[int]:
        """The local ports of our connections to the server: by them the server's own list shows who is who."""

        async def ports() -> set[int]:
            names = [server.get_extra_info("sockname") for server in self._writers.values()]
            return {name[1] for name in names if name}

        return self._do(ports())

    # ── in the loop's thread ─────────────────────────────────────────────────────────────────────

    def _do(self, work: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def _arm(self, fault: Fault) -> None:
        if fault.kind == "cut":
            self._cut()
        elif fault.kind == "refuse":
            self._refusing_until = self._loop.time() + fault.seconds
            for client in [*self._writers]:
                self._reset(client)
        else:
            self._armed.append(fault)

    async def _lift(self) -> None:
        self.largest_insert_bytes = self.insert_memory_bytes = None
        self._armed.clear()
        self._refusing_until = 0.0

    async def _close(self) -> None:
        self._server.close()
        # What the server has accepted already becomes one of ours meanwhile.
        while others := asyncio.all_tasks() - {asyncio.current_task()}:
            for task in self._tasks:
                task.cancel()
            await asyncio.wait(others)

    def _cut(self) -> None:
        for client in [*self._writers]:
            self.hits["cut"] += 1
            self._reset(client)

    def _reset(self, client: asyncio.StreamWriter) -> None:
        server = self._writers.pop(client, None)
        for writer in (client, server):
            if writer is not None:
                _abort(writer)

    def _take(self, request: bytes) -> Fault | None:
        """The first armed fault that this request fits, which thereby happens."""
        aimed = AIMS[self.speaks] in request
        for fault in self._armed:
            if aimed or not fault.aimed:
                self._armed.remove(fault)
                self.hits[fault.kind] += 1
                return fault
        return None

    def _accept(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        task = self._loop.create_task(self._serve(reader, client))

        def ended(_: asyncio.Task[None]) -> None:
            self._tasks.discard(task)
            self._reset(client)
            _abort(client)

        self._tasks.add(task)
        task.add_done_callback(ended)  # also of a task that is cancelled before its first step

    async def _serve(self, reader: asyncio.StreamReader, client: asyncio.StreamWriter) -> None:
        try:
            if self._loop.time() < self._refusing_until:
                self.hits["refuse"] += 1
                return
            from_server, server = await asyncio.open_connection("127.0.0.1", self.target)
            self._writers[client] = server
            if self.speaks == "http":
                await self._serve_http(reader, client, from_server, server)
            else:
                await self._serve_mysql(reader, client, from_server, server)
        except (OSError, EOFError, asyncio.LimitOverrunError, ValueError, asyncio.CancelledError):
            pass

    async def _serve_http(
        self,
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        server: asyncio.StreamWriter,
    ) -> None:
        """Request by request, each read whole before a byte of it goes on."""
        while True:
            request = await _http_message(reader)
            fault = self._take(request)
            kind = fault.kind if fault else None
            if kind == "unsent":
                return
            if kind == "unavailable":
                client.write(_page(b"503 Service Unavailable", b""))
                continue
            if kind == "page":
                client.write(_page(b"200 OK"))
                continue
            if AIMS["http"] in request:
                if self.largest_insert_bytes is not None and len(request) > self.largest_insert_bytes:
                    self.hits["too large"] += 1
                    client.write(_page(b"413 Request Entity Too Large"))
                    continue
                if self.insert_memory_bytes is not None:
                    request = _with_setting(request, f"max_memory_usage={self.insert_memory_bytes}")
            if fault and kind == "bad gateway" and not fault.forwarded:
                client.write(_page(b"502 Bad Gateway"))
                continue
            if fault and kind == "stall":
                await asyncio.sleep(fault.seconds)
            if fault and kind == "late":
                await self._until_given_up(reader, fault.seconds)
                try:
                    server.write(request)
                    await _http_message(from_server, answer=True)
                finally:
                    self.held -= 1
                return
            server.write(request)
            answer = await _http_message(from_server, answer=True)
            for text, told in TOLD_BY_ANSWERS.items():
                self.hits[told] += text in answer
            if kind == "bad gateway":
                answer = _page(b"502 Bad Gateway")
            if await _answered(client, answer, fault):
                return

    async def _serve_mysql(
        self,
        reader: asyncio.StreamReader,
        client: asyncio.StreamWriter,
        from_server: asyncio.StreamReader,
        server: asyncio.StreamWriter,
    ) -> None:
        """Both directions at once; a fault of the answer waits for what the server says next."""
        answer_to: list[Fault] = []

        async def forward_answers() -> None:
            while answer := await from_server.read(1 << 16):
                if await _answered(client, answer, answer_to.pop() if answer_to else None):
                    return

        answering = asyncio.ensure_future(forward_answers())
        answering.add_done_callback(lambda _: _abort(client))
        try:
            while request := await reader.read(1 << 16):
                fault = self._take(request)
                kind = fault.kind if fault else None
                if kind == "unsent":
                    return
                if fault and kind == "stall":
                    await asyncio.sleep(fault.seconds)
                elif fault and kind == "late":
                    answering.cancel()
                    await self._until_given_up(reader, fault.seconds)
                    try:
                        server.write(request)
                        await from_server.read(1 << 16)
                    finally:
                        self.held -= 1
                    return
                elif fault:
                    answer_to.append(fault)
                server.write(request)
        finally:
            answering.cancel()
            with contextlib.suppress(asyncio.CancelledError, OSError):
                await answering

    async def _until_given_up(self, reader: asyncio.StreamReader, seconds: float) -> None:
        self.held += 1
        with contextlib.suppress(asyncio.TimeoutError, OSError):
            await asyncio.wait_for(reader.read(1), GIVES_UP_WITHIN_S)
        await asyncio.sleep(seconds)


async def _answered(client: asyncio.StreamWriter, answer: bytes, fault: Fault | None) -> bool:
    """Sends the answer as the fault lets it; True when the connection ends with it."""
    kind = fault.kind if fault else None
    if kind == "answer lost":
        return True
    if kind == "answer cut":
        client.write(answer[: len(answer) // 2])
        await client.drain()
        return True
    if fault and kind == "drip":
        size = -(-len(answer) // PIECES)
        for start in range(0, len(answer), size):
            client.write(answer[start : start + size])
            await client.drain()
            await asyncio.sleep(fault.seconds / PIECES)
    else:
        client.write(answer)
        await client.drain()
    return False


def _abort(writer: asyncio.StreamWriter) -> None:
    """Closes with a reset, as a crashed machine's network does."""
    sock = writer.get_extra_info("socket")
    if sock is not None and sock.fileno() >= 0:
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
    writer.transport.abort()


def _page(status: bytes, body: bytes = PAGE) -> bytes:
    """What a proxy says for itself."""
    head = b"HTTP/1.1 %b\r\nContent-Type: text/html\r\nContent-Length: %d\r\n\r\n"
    return head % (status, len(body)) + body


def _with_setting(request: bytes, setting: str) -> bytes:
    """The request with one more setting in its URL."""
    line, rest = request.split(b"\r\n", 1)
    method, target, version = line.split(b" ")
    mark = b"&" if b"?" in target else b"?"
    return b" ".join((method, target + mark + setting.encode(), version)) + b"\r\n" + rest


async def _http_message(reader: asyncio.StreamReader, *, answer: bool = False) -> bytes:
    """One whole request or answer; raises `EOFError` when the other side is done."""
    head = await reader.readuntil(b"\r\n\r\n")
    lines = head.lower().split(b"\r\n")
    headers = dict(line.split(b": ", 1) for line in lines[1:] if b": " in line)
    if headers.get(b"transfer-encoding") == b"chunked":
        body = b""
        while True:
            line = await reader.readuntil(b"\r\n")
            part = await reader.readexactly(int(line.split(b";")[0], 16) + 2)
            body += line + part
            if part == b"\r\n":
                return head + body
    if b"content-length" in headers:
        return head + await reader.readexactly(int(headers[b"content-length"]))
    return head + await reader.read() if answer and lines[0].split()[1] not in (b"204", b"304") else head
