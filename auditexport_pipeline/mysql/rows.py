"""Reading many rows: PyMySQL's connection, with another loop for the rows of a result.

Handshake, TLS, errors, columns and conversions stay PyMySQL's. PyMySQL makes two calls for the packet of each row and
two for each column. This loop reads what the socket has and cuts rows out of it: 2.5 instead of 4.3 µs of CPU for a row
of the outbox (`benchmarks/README.md`), while other threads wait for Python's lock.
"""

from __future__ import annotations

import ssl
import struct
from functools import lru_cache
from typing import Any

from pymysql import err
from pymysql.connections import MAX_PACKET_LEN, Connection, MySQLResult
from pymysql.constants import CR, SERVER_STATUS
from pymysql.protocol import MysqlPacket

# The stubs lack the names with an underscore, which this module needs.
_Connection: Any = Connection
_MySQLResult: Any = MySQLResult

READ_BYTES = 256 * 1024
HEADER_BYTES = 4
_header = struct.Struct("<I").unpack_from
# The first byte of a packet that is no row: the end of the rows (if the packet is short), or an error.
_END, _ERROR = 0xFE, 0xFF
_END_BYTES = 9
# The first byte of a column: up to 250 the length, otherwise NULL, or the number of bytes of the length that follows.
_LONGEST_SHORT, _NULL = 250, 251
_LENGTH_BYTES = {252: 2, 253: 3, 254: 8}


@lru_cache(maxsize=1)
def _offered_tls() -> ssl.SSLContext:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE
    return context


class RowsConnection(_Connection):  # type: ignore[misc]
    """A PyMySQL connection whose buffered results are read by `_Rows`. Raises what PyMySQL raises."""

    _read_timeout: Any
    _committed = False  # the last command was a COMMIT, after which the server has no transaction of this connection

    def _create_ssl_ctx(self, sslp: Any) -> Any:
        # If the URL has no TLS option, PyMySQL reads this machine's authorities for each connection, to offer TLS
        # without verification: 20 ms of CPU each time, and a run opens ten connections.
        return _offered_tls() if sslp == {} else super()._create_ssl_ctx(sslp)

    def ping(self, reconnect: bool = False) -> None:
        """The pool's check before each use. It is the statement that begins the transaction: that saves a round trip,
        and a proxy that separates reads from writes sends the whole transaction to the writer. Any error means another
        connection.
        """
        try:
            self.begin()
        except err.MySQLError as error:
            self._force_close()
            raise err.OperationalError(CR.CR_SERVER_GONE_ERROR, "the connection cannot be used any more") from error

    def commit(self) -> None:
        super().commit()
        self._committed = not self.server_status & SERVER_STATUS.SERVER_STATUS_IN_TRANS

    def rollback(self) -> None:
        """The pool rolls back each connection that comes back to it: a round trip for nothing after a COMMIT."""
        if not self._committed:
            super().rollback()

    def _execute_command(self, command: int, sql: Any) -> None:
        self._committed = False
        super()._execute_command(command, sql)

    def connect(self, sock: Any = None) -> None:
        # A server that accepts the connection and then sends nothing (another service, a stopped host) is given the
        # same time as one that does not accept it.
        read_timeout, self._read_timeout = self._read_timeout, self.connect_timeout
        try:
            super().connect(sock)
        finally:
            self._read_timeout = read_timeout

    def _read_query_result(self, unbuffered: bool = False) -> Any:
        if unbuffered:
            return super()._read_query_result(unbuffered=True)
        self._result = None
        result = _Rows(self)
        result.read()
        self._result = result
        if result.server_status is not None:
            self.server_status = result.server_status
        return result.affected_rows


class _Rows(_MySQLResult):  # type: ignore[misc]
    connection: Any
    affected_rows: int | None

    def _read_rowdata_packet(self) -> None:
        packets = _Packets(self.connection)
        columns = self.converters
        rows: list[tuple[Any, ...]] = []
        while True:
            data, at, end = packets.next()
            first = data[at]
            if first == _ERROR or (first == _END and end - at < _END_BYTES):
                packets.finish()
                packet = MysqlPacket(data[at:end], self.connection.encoding)
                if first == _ERROR:
                    packet.raise_for_error()
                self._check_packet_is_eof(packet)
                break
            row: list[Any] = []
            for encoding, converter in columns:
                length = data[at]
                at += 1
                if length > _LONGEST_SHORT:
                    if length == _NULL:
                        row.append(None)
                        continue
                    width = _LENGTH_BYTES[length]
                    length = int.from_bytes(data[at : at + width], "little")
                    at += width
                value: Any = data[at : at + length]
                at += length
                if encoding is not None:
                    value = value.decode(encoding)
                if converter is not None:
                    value = converter(value)
                row.append(value)
            rows.append(tuple(row))
        self.connection = None  # as PyMySQL does, to break the reference cycle
        self.affected_rows = len(rows)
        self.rows = tuple(rows)


class _Packets:
    """The packets of one result, cut out of the bytes from the socket."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection
        self._data = b""
        self._at = 0
        self._sequence: int = connection._next_seq_id

    def next(self) -> tuple[bytes, int, int]:
        """The bytes that contain the next packet, with its start and end."""
        at, end = self._one()
        if end - at < MAX_PACKET_LEN:
            return self._data, at, end
        parts = []  # a row of 16 MB and more continues in the next packet
        while end - at == MAX_PACKET_LEN:
            parts.append(self._data[at:end])
            at, end = self._one()
        parts.append(self._data[at:end])
        return (whole := b"".join(parts)), 0, len(whole)

    def _one(self) -> tuple[int, int]:
        missing = HEADER_BYTES
        while True:
            there = len(self._data) - self._at
            if there >= HEADER_BYTES:
                (word,) = _header(self._data, self._at)
                missing = HEADER_BYTES + (word & MAX_PACKET_LEN)
                if there >= missing:
                    break
            self._more(missing - there)
        if word >> 24 != self._sequence:
            self._give_up(f"packet {word >> 24} came, not {self._sequence}")
        self._sequence = (self._sequence + 1) % 256
        at = self._at + HEADER_BYTES
        self._at += missing
        return at, self._at

    def _more(self, missing_bytes: int) -> None:
        """Reads the bytes that have arrived. Of a long packet it reads all: pieces would be copied repeatedly."""
        file = self._connection._rfile
        try:
            found = file.read(missing_bytes) if missing_bytes > READ_BYTES else file.read1(READ_BYTES)
        except OSError as error:
            self._give_up(str(error))
        if not found:
            self._give_up("the server closed it")
        self._data = self._data[self._at :] + found
        self._at = 0

    def finish(self) -> None:
        """Ends the result, with nothing unread: a server sends nothing unasked."""
        if self._at != len(self._data):
            self._give_up("the server sent more than the result")
        self._connection._next_seq_id = self._sequence

    def _give_up(self, why: str) -> None:
        self._connection._force_close()
        raise err.OperationalError(CR.CR_SERVER_LOST, f"Lost connection to MySQL server during query ({why})")
