"""A proxy before two MySQL servers that splits reads from writes, as ProxySQL and MaxScale do.

What belongs here: which server answers a statement, and a cluster's refusal at COMMIT. What does not: a network's faults,
which `chaos.proxy` has. It goes by what it sees on the wire: the text of a statement, and the writer's word on whether a
transaction is open. `autocommit = OFF` alone is none, as in ProxySQL by default.
"""

from __future__ import annotations

import re
import socket
import socketserver
import threading
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

import pymysql
from sqlalchemy.engine import make_url

COM_QUERY = 3
CLIENT_SSL = 0x800
IN_TRANSACTION = 1
OK, EOF, ERROR = 0x00, 0xFE, 0xFF
LOCKS = re.compile(rb"FOR UPDATE|LOCK IN SHARE MODE|FOR SHARE", re.IGNORECASE)
TABLE = re.compile(rb"\bclickhouse_outbox\w*")


@dataclass(kw_only=True)
class Splitter:
    """One port. SELECTs outside of a transaction go to `reader`, everything else to `writer`."""

    writer: str
    reader: str
    persistent: bool = True  # whether a transaction stays on the writer; without, its SELECTs are split as well
    deadlock_at_commit: int = 0  # the COMMIT, counted from 1, that is answered by Galera's 1213
    commits: int = 0
    read: Counter[str] = field(default_factory=Counter)  # statements that the reader answered, by table

    def __enter__(self) -> Splitter:
        splitter = self

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                with suppress(OSError, EOFError, pymysql.err.MySQLError):
                    _Session(splitter, self.request).serve()

        class Server(socketserver.ThreadingTCPServer):
            daemon_threads = True
            allow_reuse_address = True

        self._server = Server(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def url(self) -> str:
        port = self._server.server_address[1]
        return make_url(self.writer).set(host="127.0.0.1", port=port).render_as_string(hide_password=False)


class _Session:
    """One client's connection, with one to each server behind it."""

    def __init__(self, splitter: Splitter, client: socket.socket) -> None:
        self._splitter = splitter
        self._client = client
        self._database = make_url(splitter.writer).database
        self._writer = socket.create_connection(_address(splitter.writer))
        self._reader: Any = None
        self._status = 0

    def serve(self) -> None:
        try:
            self._log_in()
            while True:
                packets = self._command()
                statement = packets[5:] if packets[4] == COM_QUERY else b""
                if statement.upper() == b"COMMIT" and self._refuses_commit():
                    self._status = self._answer(
                        self._writer, _packet(0, bytes([COM_QUERY]) + b"ROLLBACK"), forward=False
                    )
                    message = (
                        b"\xff" + (1213).to_bytes(2, "little") + b"#40001Deadlock found; try restarting transaction"
                    )
                    self._client.sendall(_packet(1, message))
                elif self._is_read(statement):
                    for name in TABLE.findall(statement):
                        self._splitter.read[name.decode()] += 1
                    self._answer(self._reading(), packets)
                else:
                    self._status = self._answer(self._writer, packets)
        finally:
            self._writer.close()
            if self._reader is not None:
                self._reader._force_close()

    def _refuses_commit(self) -> bool:
        if self._status & IN_TRANSACTION:
            self._splitter.commits += 1
            return self._splitter.commits == self._splitter.deadlock_at_commit
        return False

    def _is_read(self, statement: bytes) -> bool:
        split = not self._splitter.persistent or not self._status & IN_TRANSACTION
        return split and statement.lstrip().upper().startswith(b"SELECT") and not LOCKS.search(statement)

    def _reading(self) -> socket.socket:
        if self._reader is None:
            host, port = _address(self._splitter.reader)
            self._reader = pymysql.connect(
                host=host, port=port, user="root", password="", database=self._database, charset="utf8mb4"
            )
        sock: socket.socket = self._reader._sock
        return sock

    def _log_in(self) -> None:
        """Hands packets through until the writer has let the client in; without TLS, or there would be nothing to read."""
        greeting = bytearray(_take(self._writer))
        capabilities = greeting.index(0, 5) + 1 + 4 + 8 + 1  # behind the version: thread, half a scramble, a zero
        greeting[capabilities + 1] &= ~(CLIENT_SSL >> 8)
        self._client.sendall(greeting)
        while True:
            self._writer.sendall(_take(self._client))
            answer = _take(self._writer)
            self._client.sendall(answer)
            if answer[4] in (OK, ERROR):
                return

    def _command(self) -> bytes:
        packet = _take(self._client)
        if len(packet) - 4 == 2**24 - 1:
            raise EOFError("statements of 16 MB are not for this proxy")
        return packet

    def _answer(self, server: socket.socket, command: bytes, *, forward: bool = True) -> int:
        """Asks, hands the whole answer on, and returns the server's status flags."""
        server.sendall(command)
        answer = [_take(server)]
        first = answer[0][4]
        if first == OK:
            status = _status_of_ok(answer[0][4:])
        elif first == ERROR:
            status = self._status
        else:
            ends = 0
            while ends < 2:
                answer.append(_take(server))
                if answer[-1][4] == ERROR:
                    break
                ends += answer[-1][4] == EOF and len(answer[-1]) < 4 + 9
            status = int.from_bytes(answer[-1][7:9], "little") if answer[-1][4] == EOF else self._status
        if forward:
            self._client.sendall(b"".join(answer))
        return status


def _address(url: str) -> tuple[str, int]:
    parts = make_url(url)
    return parts.host or "127.0.0.1", parts.port or 3306


def _packet(number: int, body: bytes) -> bytes:
    return len(body).to_bytes(3, "little") + bytes([number]) + body


def _take(sock: socket.socket) -> bytes:
    head = _exactly(sock, 4)
    return head + _exactly(sock, int.from_bytes(head[:3], "little"))


def _exactly(sock: socket.socket, size: int) -> bytes:
    parts = []
    while size:
        part = sock.recv(min(size, 2**16))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def _status_of_ok(body: bytes) -> int:
    """Behind two numbers of varying length: rows, and the last id."""
    at = 1
    for _ in range(2):
        at += {0xFC: 3, 0xFD: 4, 0xFE: 9}.get(body[at], 1)
    return int.from_bytes(body[at : at + 2], "little")
