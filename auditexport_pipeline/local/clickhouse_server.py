"""The embedded ClickHouse: the chDB engine behind ClickHouse's HTTP interface, on loopback only.

What belongs here: turning one HTTP request into one statement of the engine and its outcome into the
answer a ClickHouse server would give. What does not: who starts and stops this program
(`clickhouse.py`), or any knowledge of the audit log.

Three decisions carry it. *One engine connection per request*: opening one costs 0.2 ms, its settings
die with it, so nothing can leak into the next request, and requests run side by side. *A body is
spooled before its statement starts*, decompressed, into a file without a name: an upload that breaks
off never becomes a short INSERT, the blocks do not depend on how the network cut the data, and not
even SIGKILL leaves a file behind. *The data part of an INSERT is found with the server's own rule*
(`split_insert`), because a byte too many or too few is silent damage.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import binascii
import contextlib
import email
import gzip
import hmac
import ipaddress
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import tempfile
import threading
import uuid
import zlib
from collections.abc import AsyncIterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Final, Protocol
from urllib.parse import urlsplit

import lz4.frame  # type: ignore[import-untyped]
import uvicorn
import zstandard
from starlette.applications import Starlette
from starlette.requests import ClientDisconnect, Request
from starlette.responses import PlainTextResponse, Response
from starlette.routing import Route

from auditexport_pipeline.local.clickhouse import PASSWORD_VARIABLE

HOST: Final = "127.0.0.1"

# Statements that run at once; the engine itself spreads each over all cores, so more only queue.
MAX_STATEMENTS: Final = 16
# A part of a body that is decoded at once, beside the other requests.
SMALL_PART_BYTES: Final = 16_384
# What the event loop collects before a thread decompresses and spools it: smaller costs hand-overs, larger costs memory.
PART_BYTES: Final = 1 << 20
# A server's http_max_field_value_size: what it would refuse must not pass here.
FIELD_LIMIT_BYTES: Final = 131_072
# An INSERT whose data has not begun by then has none that we can tell from its text.
INSERT_TEXT_LIMIT_BYTES: Final = 1 << 20
# Statements are held in memory, data is not; `INSERT … VALUES` counts as statement.
STATEMENT_LIMIT_BYTES: Final = 64 << 20
# Running statements get this long after SIGTERM, and then end with the process, as in a crash.
SHUTDOWN_GRACE_S: Final = 3

# URL parameters that are not settings (ClickHouse, HTTPHandler); those that change nothing here are
# accepted and ignored, since each client sends some of them.
RESERVED_PARAMETERS: Final = frozenset(
    """query database default_format user password quota_key query_id session_id session_timeout
    session_check close_session stacktrace role buffer_size wait_end_of_query compress decompress
    client_protocol_version""".split()  # noqa: SIM905 - a list of quoted words hides the words
)
# chDB's own defaults that a server does not share.
SERVER_SETTINGS: Final = {"implicit_select": "0"}

# Our own questions are answered in full whatever the profile of a test's user says.
PLAINLY: Final = (
    " SETTINGS limit = 0, offset = 0, additional_result_filter = '', use_query_cache = 0, max_result_rows = 0, "
    "max_rows_to_read = 0"
)
ABOUT: Final = f"SELECT version(), timezone(){PLAINLY}"
FUNCTIONS: Final = f"SELECT name FROM system.table_functions{PLAINLY}"

BAD_ARGUMENTS: Final = 36
NOT_IMPLEMENTED: Final = 48
SYNTAX_ERROR: Final = 62
QUERY_IS_TOO_LARGE: Final = 307
CANNOT_DECOMPRESS: Final = 271
ACCESS_DENIED: Final = 497
AUTHENTICATION_FAILED: Final = 516
POCO_EXCEPTION: Final = 1000
UNKNOWN_EXCEPTION: Final = 1002
# ClickHouse, exceptionCodeToHTTPStatus.cpp; whatever is not listed there is 500.
STATUS_OF_CODE: Final = {
    **dict.fromkeys((6, 15, 25, 26, 27, 36, 38, 41, 44, 53, 62, 72, 117, 321, 376, 427, 441), 400),
    **dict.fromkeys((192, 193, ACCESS_DENIED, AUTHENTICATION_FAILED), 403),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 81, 115), 404),
    159: 408,
    QUERY_IS_TOO_LARGE: 413,
    NOT_IMPLEMENTED: 501,
    **dict.fromkeys((76, 209, 439), 503),
}


class Refused(Exception):
    """A request that ends with a ClickHouse error; `str()` is the whole text of the answer."""

    def __init__(self, code: int, text: str) -> None:
        super().__init__(text)
        self.code = code

    @classmethod
    def because(cls, code: int, name: str, reason: str) -> Refused:
        return cls(code, f"Code: {code}. DB::Exception: {reason}. ({name})")

    @classmethod
    def by_engine(cls, error: Exception) -> Refused:
        text = str(error)
        found = re.search(r"Code: (\d+)\.", text)
        code = int(found[1]) if found else UNKNOWN_EXCEPTION
        return cls(code, text[found.start() :] if found else f"Code: {code}. DB::Exception: {text}")


# --- The text of a request: statement, and where its data begins ---------------------------------

TOKEN = re.compile(
    rb"""
    (?P<blank>   \s+ | --[^\n]*(?:\n|\Z) | \#[\ !][^\n]*(?:\n|\Z) | /\*.*?\*/ )
  | (?P<quoted>  '(?:[^'\\]|\\.|'')*' | "(?:[^"\\]|\\.|"")*" | `(?:[^`\\]|\\.|``)*` )
  | (?P<heredoc> \$(?P<tag>\w*)\$.*?\$(?P=tag)\$ )
  | (?P<open>    '|"|`|/\*|\$\w*\$ )
  | (?P<word>    [A-Za-z_]\w* )
  | (?P<number>  [0-9]\w* )
  | (?P<sign>    . )
    """,
    re.VERBOSE | re.DOTALL,
)
FORMAT_NAME = re.compile(rb"(?:\s|--[^\n]*\n|/\*.*?\*/)+([A-Za-z]\w*)", re.DOTALL)
LAST_FORMAT = re.compile(rb"\bFORMAT\s+([A-Za-z]\w*)\s*(?:SETTINGS\b[^()]*)?;?\s*\Z", re.IGNORECASE)
# ParserInsertQuery: after the format's name blanks, then at most one line end, then data. A Native block
# of ten columns begins with a line feed of its own.
DATA_START = re.compile(rb"[ \t\f]*(\r?\n)?")
CALL = re.compile(rb"\s*\(")
CALL_AFTER_BLANKS = re.compile(rb"(?:\s|--[^\n]*(?:\n|\Z)|\#[ !][^\n]*(?:\n|\Z)|/\*.*?\*/)*\(", re.DOTALL)
# What holds no name at all, skipped at once: data of an INSERT … VALUES, mostly.
UNREACHING = re.compile(rb"\s+|'[^'\\]*'(?!')")
ASSIGNMENT = re.compile(rb"\s*[A-Za-z_]\w*\s*=")
# Statements whose answer is rows; a client tells an empty result from no result by the format header.
ROWS_FOLLOW = re.compile(
    rb"(?:\s|--[^\n]*\n|/\*.*?\*/|\()*(?:SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK|VALUES)\b",
    re.IGNORECASE | re.DOTALL,
)
DROP_SYNC = re.compile(rb"\A(\s*DROP\b.*\S)\s+SYNC\s*\Z", re.IGNORECASE | re.DOTALL)
UNREMARKABLE = re.compile(rb"[^;'\"`$/#-]+")
# What may follow a *column* called format; a format of that name does not exist.
NOT_A_FORMAT = frozenset(b"FROM AS ASC DESC AND OR IN IS LIKE NOT UNION WHERE GROUP ORDER LIMIT SETTINGS".split())
OPENING, CLOSING = (b"(", b"[", b"{"), (b")", b"]", b"}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Insert:
    """An INSERT whose data follows its text.

    `sql` ends before FORMAT; `data_at` is the offset of the first data byte; `inputs` are the spans of
    `input(` in `sql`, empty when the data goes straight into the table; then `target_end` is the offset at which
    table and columns end.
    """

    sql: bytes
    format: str
    data_at: int
    inputs: tuple[tuple[int, int], ...]
    target_end: int

    def reading(self, descriptor: int) -> bytes:
        """The statement that reads the same rows from a file descriptor."""
        if not self.inputs:
            # By a path, for FROM INFILE knows no descriptors; the path leads to the file without a name.
            source = b" FROM INFILE '/proc/self/fd/%d' COMPRESSION 'none' " % descriptor
            form = b" FORMAT " + self.format.encode()
            return self.sql[: self.target_end] + source + self.sql[self.target_end :] + form
        sql = bytearray(self.sql)
        for start, end in reversed(self.inputs):
            follows = self.sql[end:].lstrip()[:1]
            comma = b"" if follows == b")" else b", "
            sql[start:end] = b"file(%d, '%s'%s" % (descriptor, self.format.encode(), comma)
        return bytes(sql)


def split_insert(text: bytes, *, complete: bool) -> Insert | bool | None:
    """Where the data of an INSERT begins in `text`, the start of a request.

    Returns the `Insert`; False when this is a statement to its end; None when more of the request
    must be seen first (never if `complete`).
    """
    depth = position = 0
    first: bytes | None = None
    insert = select = False
    inputs: list[tuple[int, int]] = []
    settings_at: int | None = None
    undecided = False if complete else None
    while token := TOKEN.match(text, position):
        position, kind = token.end(), token.lastgroup
        if kind == "blank":
            continue
        if kind == "open" or (position == len(text) and not complete):
            return undecided
        word = token[0].upper()
        if first is None:
            first = word
            if first not in (b"INSERT", b"WITH"):
                return False
        if kind == "sign":
            depth += (word in OPENING) - (word in CLOSING)
        if kind != "word":
            continue
        if insert and word == b"INPUT" and (call := CALL.match(text, position)):
            inputs.append((token.start(), call.end()))
        if depth > 0:
            continue
        if not insert:
            insert = word == b"INSERT"
            if word == b"SELECT":
                return False
        elif word == b"SELECT" or word == b"WITH":
            select = True
        elif word == b"VALUES" and not select:
            return False
        elif word == b"SETTINGS" and ASSIGNMENT.match(text, position):
            settings_at = settings_at or token.start()
        elif word == b"FORMAT" and (inputs or not select):
            name = FORMAT_NAME.match(text, position)
            if name is None or name[1].upper() in NOT_A_FORMAT:
                continue
            data = DATA_START.match(text, name.end())
            assert data is not None  # it matches nothing, too
            # Of a name, or of a line end, there may be more to come.
            if not complete and data.end() >= len(text) - 1:
                return undecided
            return Insert(
                sql=text[: token.start()],
                format=name[1].decode(),
                data_at=data.end(),
                inputs=tuple(inputs),
                target_end=settings_at or token.start(),
            )
    return undecided


def one_statement(sql: bytes) -> bytes:
    """`sql` without its final semicolon. The engine would run several statements; a server refuses."""
    end: int | None = None
    position = 0
    while token := (end is None and UNREMARKABLE.match(sql, position)) or TOKEN.match(sql, position):
        position = token.end()
        if end is None and token[0] == b";":
            end = token.start()
        elif end is not None and token.lastgroup != "blank" and token[0] != b";":
            reason = "Syntax error (Multi-statements are not allowed)"
            raise Refused.because(SYNTAX_ERROR, "SYNTAX_ERROR", reason)
    statement = sql if end is None else sql[:end]
    if not statement.strip():
        raise Refused.because(SYNTAX_ERROR, "SYNTAX_ERROR", "Syntax error: Empty query")
    return statement


def literal(text: str) -> str:
    return "'" + text.replace("\\", "\\\\").replace("'", "\\'") + "'"


# --- What a request may not reach -----------------------------------------------------------------

# Table functions and engines that stay inside this server. Whatever else the engine has reaches files, programs or
# networks, and a request gets none of it. Remote has a rule of its own, for it can be this server itself.
SAFE_FUNCTIONS: Final = frozenset(
    """clusterless dictionary format fuzzjson fuzzquery generate_series generateseries generaterandom input loop merge
    mergetreeanalyzeindexes mergetreeindex mergetreeparts mergetreeprojection mergetreetextindex null numbers numbers_mt
    primes timeseriesdata timeseriesmetrics timeseriesselector timeseriestags values view viewexplain viewifpermitted
    zeros zeros_mt""".split()  # noqa: SIM905 - a list of quoted words hides the words
)
SAFE_ENGINES = re.compile(
    rb"(?:Replicated|Shared)?(?:(?:Replacing|Summing|Aggregating|Collapsing|VersionedCollapsing|Coalescing|Graphite)?"
    rb"MergeTree)|Memory|Null|Set|Join|Buffer|Distributed|Dictionary|Merge|View|MaterializedView|GenerateRandom|"
    rb"EmbeddedRocksDB|KeeperMap|Log|TinyLog|StripeLog|Atomic|Ordinary|Lazy|Replicated|Remote",
    re.IGNORECASE,
)
SAFE_SOURCES: Final = frozenset((b"CLICKHOUSE", b"NULL"))
# Regular functions and statements that reach further than the data.
READING_FUNCTIONS: Final = frozenset(("file", "catboostevaluate", "python", "filesystem", "executable"))
REMOTE: Final = frozenset((b"REMOTE", b"REMOTESECURE"))
LOOPBACK = re.compile(rb"\s*\(\s*'(?:(?:127\.0\.0\.\d{1,3}|localhost)(?::\d+)?[,|]?)+'")
# Pairs of words, and first words of statements, that move data out or in by a way of their own.
FORBIDDEN_PAIRS: Final = frozenset(
    (
        (b"INTO", b"OUTFILE"),
        (b"FROM", b"INFILE"),
        (b"NAMED", b"COLLECTION"),
        (b"SYSTEM", b"SHUTDOWN"),
        (b"SYSTEM", b"KILL"),
    )
)
TABLES_FOLLOW: Final = frozenset((b"FROM", b"JOIN", b"INTO", b"TABLE", b"DESCRIBE", b"DESC", b"EXISTS"))
TABLES_END: Final = frozenset(
    b"SELECT WITH WHERE PREWHERE ON USING GROUP ORDER LIMIT SETTINGS VALUES HAVING UNION WINDOW QUALIFY FORMAT".split()
)
DEFINING: Final = frozenset((b"CREATE", b"ATTACH", b"REPLACE"))
FORBIDDEN_STATEMENTS: Final = frozenset((b"BACKUP", b"RESTORE"))


def refuse_reaching_out(sql: bytes, reaching: frozenset[bytes]) -> None:
    """Raises `Refused` (497) when a statement names what reaches files, programs or networks.

    `reaching` has the names, in capitals, of all functions that do. Names are compared as ClickHouse reads them:
    without comments, in any case, and quoted ones too.
    """
    position = 0
    before = first = b""
    # For each open bracket, whether names of tables are read there: this engine reads a table's name as a path, too.
    tables = [False]
    while token := UNREACHING.match(sql, position) or TOKEN.match(sql, position):
        position, kind = token.end(), token.lastgroup
        if kind in ("blank", "number"):
            continue
        if kind is None:
            if b"'" in token[0] and tables[-1] and b"/" in token[0]:
                raise _reaches_out(b"path as a table")
            continue
        word = token[0].upper()
        quoted = kind == "quoted" and word[:1] in b'"`'
        if quoted:
            word = word[1:-1]
        if b"/" in word and (quoted or (kind == "quoted" and tables[-1])):
            raise _reaches_out(b"path as a table")
        if word in OPENING:
            tables.append(word == b"(" and tables[-1] and before in (*TABLES_FOLLOW, b",", b"("))
        elif word in CLOSING and len(tables) > 1:
            tables.pop()
        if kind == "word":
            tables[-1] = word in TABLES_FOLLOW or (tables[-1] and word not in TABLES_END)
        if kind == "word" or quoted:
            if not first and kind == "word":
                first = word
                if word in FORBIDDEN_STATEMENTS:
                    raise _reaches_out(word)
            if quoted and b"\\" in word:
                raise _reaches_out(b"a quoted name with a backslash")
            if (before, word) in FORBIDDEN_PAIRS:
                raise _reaches_out(word)
            if before == b"ENGINE" and first in DEFINING and not SAFE_ENGINES.fullmatch(word):
                raise _reaches_out(b"ENGINE = " + word)
            if before == b"SOURCE(" and word not in SAFE_SOURCES:
                raise _reaches_out(b"SOURCE " + word)
            follows = CALL_AFTER_BLANKS.match(sql, position)
            if word in REMOTE and follows and not LOOPBACK.match(sql, position):
                raise _reaches_out(word)
            if follows and word in reaching and before != b"INDEX":
                raise _reaches_out(word)
        if word == b"=" and before == b"ENGINE":
            continue
        before = b"SOURCE(" if word == b"(" and before == b"SOURCE" else word


def _reaches_out(name: bytes) -> Refused:
    reason = (
        f"the embedded ClickHouse takes no {name.decode(errors='replace')} from a request: it reaches outside of it"
    )
    return Refused.because(ACCESS_DENIED, "ACCESS_DENIED", reason)


# --- Bodies: decompressed part by part, spooled without a name ------------------------------------


class Decoder(Protocol):
    """Turns compressed bytes into plain ones, over any number of frames."""

    def decode(self, part: bytes) -> bytes: ...

    def finished(self) -> bool: ...


class Plain:
    def decode(self, part: bytes) -> bytes:
        return part

    def finished(self) -> bool:
        return True


class Framed:
    """lz4, zstd and gzip alike: clients send one frame per block, so a frame's end is not the end."""

    def __init__(self, new_frame: Any) -> None:
        self._new_frame = new_frame
        self._frame: Any = None

    def decode(self, part: bytes) -> bytes:
        plain = []
        while part:
            if self._frame is None:
                self._frame = self._new_frame()
            plain.append(self._frame.decompress(part))
            if not self._frame.eof:
                break
            part = self._frame.unused_data or b""
            self._frame = None
        return b"".join(plain)

    def finished(self) -> bool:
        return self._frame is None


DECODERS: Final[Mapping[str, Any]] = {
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "gzip": lambda: zlib.decompressobj(wbits=31),
    "deflate": zlib.decompressobj,
}
# The first that the client accepts: on loopback the cheapest wins.
ENCODERS: Final[Mapping[str, Any]] = {
    "lz4": lz4.frame.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "gzip": lambda data: gzip.compress(data, compresslevel=1),
}


def decoder_for(encoding: str) -> Decoder:
    if encoding in ("", "identity"):
        return Plain()
    if encoding not in DECODERS:
        reason = f"Content-Encoding {encoding!r} is not supported here; send one of {', '.join(DECODERS)}"
        raise Refused.because(NOT_IMPLEMENTED, "NOT_IMPLEMENTED", reason)
    return Framed(DECODERS[encoding])


class Body:
    """What a request says: its statement in memory, and the data of an INSERT in a file without a name.

    Used by one thread at a time. `close()` frees the file; so does the end of the process.
    """

    def __init__(self, decoder: Decoder, spool: Path, *, query: bytes) -> None:
        self._decoder = decoder
        self._spool = spool
        # The server joins URL and body the same way, so that `?query=INSERT … FORMAT CSV` has data.
        self._text = bytearray(query + b"\n" if query else b"")
        self._looked_at_bytes = 0
        self._is_statement = False
        self.insert: Insert | None = None
        self.data: IO[bytes] | None = None

    def add(self, part: bytes) -> None:
        try:
            plain = self._decoder.decode(part)
        except (RuntimeError, zstandard.ZstdError, zlib.error, EOFError) as error:
            reason = f"the request body cannot be decompressed: {error}"
            raise Refused.because(CANNOT_DECOMPRESS, "CANNOT_DECOMPRESS", reason) from error
        if self.data is not None:
            self.data.write(plain)
            return
        self._text += plain
        # Looking again only at double the length keeps long statements linear.
        if not self._is_statement and len(self._text) >= 2 * self._looked_at_bytes:
            self._look(complete=False)
        if self.data is None and len(self._text) > STATEMENT_LIMIT_BYTES:
            reason = f"a statement may have {STATEMENT_LIMIT_BYTES} bytes; send data with FORMAT"
            raise Refused.because(QUERY_IS_TOO_LARGE, "QUERY_IS_TOO_LARGE", reason)

    def end(self) -> bytes:
        """The whole request has been seen; returns the statement when there is no `insert`."""
        if not self._decoder.finished():
            reason = "the request body ends inside a compressed frame"
            raise Refused.because(CANNOT_DECOMPRESS, "CANNOT_DECOMPRESS", reason)
        if self.data is None and not self._is_statement:
            self._look(complete=True)
        if self.data is not None:
            self.data.flush()
            self.data.seek(0)
        return bytes(self._text)

    def close(self) -> None:
        if self.data is not None:
            self.data.close()

    def _look(self, *, complete: bool) -> None:
        text = bytes(self._text[:INSERT_TEXT_LIMIT_BYTES])
        self._looked_at_bytes = len(self._text)
        found = split_insert(text, complete=complete or len(self._text) > len(text))
        if isinstance(found, Insert):
            self.insert = found
            # No name, mode 0600: private, and gone with the last descriptor.
            self.data = tempfile.TemporaryFile(dir=self._spool)  # noqa: SIM115 - closed by close()
            self.data.write(memoryview(self._text)[found.data_at :])
            self._text = bytearray()
        self._is_statement = found is False


# --- The engine --------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Result:
    """What a statement gave: `data` in `format` (None: no rows by nature), and X-ClickHouse-Summary."""

    data: bytes = b""
    format: str | None = None
    read_rows: int
    read_bytes: int
    written_rows: int
    written_bytes: int
    result_rows: int = 0
    elapsed_s: float

    @property
    def summary(self) -> str:
        figures = {
            "read_rows": self.read_rows,
            "read_bytes": self.read_bytes,
            "written_rows": self.written_rows,
            "written_bytes": self.written_bytes,
            "result_rows": self.result_rows,
            "result_bytes": len(self.data),
            "elapsed_ns": int(self.elapsed_s * 1e9),
        }
        return json.dumps({name: str(figure) for name, figure in figures.items()})


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Everything that holds for one statement only: database, settings and query parameters."""

    database: str
    settings: tuple[tuple[str, str], ...]
    default_format: str
    read_only: bool

    @classmethod
    def of(cls, request: Request, form: Mapping[str, str]) -> Scope:
        parameters = {**dict(request.query_params), **form}
        for name, value in parameters.items():
            if len(value.encode()) > FIELD_LIMIT_BYTES:
                reason = f"HTML Form Exception: Field value too long: {name}, over {FIELD_LIMIT_BYTES} bytes"
                raise Refused.because(POCO_EXCEPTION, "POCO_EXCEPTION", reason)
        for name in ("compress", "decompress"):
            if parameters.get(name, "0") not in ("0", "false"):
                reason = f"{name}=1 (ClickHouse's own block compression); use HTTP compression"
                raise Refused.because(NOT_IMPLEMENTED, "NOT_IMPLEMENTED", reason)
        settings = [(k, v) for k, v in parameters.items() if k not in RESERVED_PARAMETERS]
        for name, _ in settings:
            if not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise Refused.because(BAD_ARGUMENTS, "BAD_ARGUMENTS", f"Bad setting name {name!r}")
        headers = request.headers
        return cls(
            database=parameters.get("database") or headers.get("x-clickhouse-database", ""),
            settings=tuple(settings),
            default_format=parameters.get("default_format") or headers.get("x-clickhouse-format", "TabSeparated"),
            read_only=request.method == "GET",
        )

    def statements(self) -> list[str]:
        """What a fresh connection has to be told first. Parameters are settings named `param_…`."""
        settings = {**SERVER_SETTINGS, **dict(self.settings)}
        if self.read_only:
            settings.setdefault("readonly", "2")
        # `readonly` comes last, for it forbids setting anything after it. A parameter can be long, and two long ones in a
        # statement would exceed max_query_size.
        parameters = [name for name in settings if name.startswith("param_")]
        short = [name for name in settings if name != "readonly" and name not in parameters]
        alone = [*parameters, *(name for name in settings if name == "readonly")]
        told = [
            "SET " + ", ".join(f"{name} = {literal(settings[name])}" for name in group)
            for group in (short, *([name] for name in alone))
        ]
        if self.database:
            told.insert(0, "USE `" + self.database.replace("\\", "\\\\").replace("`", "\\`") + "`")
        return told


class Engine:
    """The chDB engine on one directory. Thread-safe: each statement runs on a connection of its own."""

    def __init__(self, directory: Path, config: Path | None = None) -> None:
        from chdb import _chdb  # half a second, and only this process

        self._connect: Any = _chdb.connect  # type: ignore[attr-defined]  # an extension module
        self._path = f"{directory}?config-file={config}" if config is not None else str(directory)
        # The engine stops with its last connection; this one keeps it running between requests.
        self._anchor = self._connect(self._path)
        about = self._anchor.query(ABOUT, "TabSeparated")
        self.version, self.timezone = about.bytes().decode().strip().split("\t")
        # chDB before 26.9 counts what an INSERT writes only where the data follows, and never runs the task for which
        # DROP … SYNC waits.
        functions = self._anchor.query(FUNCTIONS, "TabSeparated").bytes().decode()
        names = ({*functions.lower().split()} - SAFE_FUNCTIONS - {"remote", "remotesecure"}) | READING_FUNCTIONS
        self._reaching = frozenset(name.upper().encode() for name in names)
        self._counts_written = self._drops_sync = hasattr(about, "rows_written")

    def run(self, body: Body, scope: Scope) -> Result:
        """Runs the statement of a complete request and closes `body`. Raises `Refused`.

        `body` is closed here, not by whoever waits: the engine reads it by its descriptor, and a
        descriptor closed too early ends an INSERT in the middle as if that were its end.
        """
        connection = self._connect(self._path)
        try:
            statement = body.end()
            for sql in scope.statements():
                connection.query(sql, "TabSeparated")
            refuse_reaching_out(body.insert.sql if body.insert is not None else statement, self._reaching)
            if body.insert is not None:
                # input() with data in the text inserts nothing without an error: the rows have to come from a file.
                assert body.data is not None
                statement = body.insert.reading(body.data.fileno())
            return self._statement(connection, one_statement(statement), scope)
        except RuntimeError as error:
            raise Refused.by_engine(error) from error
        finally:
            connection.close()
            body.close()

    def close(self) -> None:
        self._anchor.close()

    def _statement(self, connection: Any, sql: bytes, scope: Scope) -> Result:
        if not self._drops_sync:
            sql = DROP_SYNC.sub(rb"\1", sql)
        answer = connection.query(sql, scope.default_format)
        if answer.has_error():
            raise RuntimeError(answer.error_message())
        named = LAST_FORMAT.search(sql)
        rows_follow = ROWS_FOLLOW.match(sql) is not None
        if self._counts_written:
            written_rows, written_bytes = answer.rows_written(), answer.bytes_written()
        else:
            written_rows, written_bytes = (0, 0) if rows_follow else (answer.rows_read(), answer.bytes_read())
        return Result(
            data=answer.bytes() or b"",
            format=(named[1].decode() if named else scope.default_format) if rows_follow else None,
            read_rows=answer.storage_rows_read(),
            read_bytes=answer.storage_bytes_read(),
            result_rows=answer.rows_read() if rows_follow else 0,
            written_rows=written_rows,
            written_bytes=written_bytes,
            elapsed_s=answer.elapsed(),
        )


# --- HTTP --------------------------------------------------------------------------------------


async def parts(request: Request) -> AsyncIterator[bytes]:
    """The body in parts of about PART_BYTES. Raises `ClientDisconnect` when it breaks off."""
    collected: list[bytes] = []
    size_bytes = 0
    async for piece in request.stream():
        collected.append(piece)
        size_bytes += len(piece)
        if size_bytes >= PART_BYTES:
            yield b"".join(collected)
            collected, size_bytes = [], 0
    if collected:
        yield b"".join(collected)


def read_form(content_type: str, body: bytes) -> dict[str, str]:
    """The fields of a multipart form: clickhouse-connect moves long query parameters into one."""
    head = f"Content-Type: {content_type}\r\n\r\n".encode("latin-1")
    # Not by a newer policy, which parses each header by a grammar: that took most of a short statement's time.
    message = email.message_from_bytes(head + body)
    fields: dict[str, str] = {}
    parts_of_it: Any = message.get_payload() if message.is_multipart() else ()
    for part in parts_of_it:
        if part.get_filename() is not None:
            raise Refused.because(NOT_IMPLEMENTED, "NOT_IMPLEMENTED", "External tables are not supported here")
        value = part.get_payload(decode=True)
        name = part.get_param("name", header="content-disposition")
        fields[str(name)] = value.decode() if isinstance(value, bytes) else str(value)
    return fields


def refuse_other_sites(request: Request) -> None:
    """Refuses what a browser sends for somebody's page, and names that only lead here by DNS rebinding."""
    host = urlsplit("//" + request.headers.get("host", "")).hostname or ""
    site = request.headers.get("sec-fetch-site", "none")
    if not _is_local_name(host) or "origin" in request.headers or site != "none":
        reason = (
            "requests come from programs of this machine, not from web pages: Host must be an address, without Origin"
        )
        raise Refused.because(ACCESS_DENIED, "ACCESS_DENIED", reason)


def _is_local_name(host: str) -> bool:
    """An address, or localhost: no DNS server of anybody's can lead either of them here."""
    with contextlib.suppress(ValueError):
        return bool(ipaddress.ip_address(host))
    return host == "localhost"


def authenticate(request: Request, wanted: str) -> None:
    """Lets in `default` with the password of this start, the one user there is."""
    user, password = "default", ""
    scheme, _, token = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "basic":
        try:
            user, _, password = base64.b64decode(token, validate=True).decode().partition(":")
        except (binascii.Error, UnicodeDecodeError):
            user = ""
    elif scheme:
        user = scheme
    user = request.query_params.get("user", request.headers.get("x-clickhouse-user", user))
    password = request.query_params.get("password", request.headers.get("x-clickhouse-key", password))
    if user != "default" or not hmac.compare_digest(password.encode(), wanted.encode()):
        reason = f"{user}: Authentication failed: password is incorrect, or there is no user with such name"
        raise Refused.because(AUTHENTICATION_FAILED, "AUTHENTICATION_FAILED", reason)


class Server:
    """The HTTP application over one engine; `spool` is a private directory for request bodies."""

    def __init__(self, engine: Engine, spool: Path, password: str) -> None:
        self._engine = engine
        self._spool = spool
        self._password = password
        self._statements = ThreadPoolExecutor(MAX_STATEMENTS, thread_name_prefix="statement")
        # The process id lets the starter tell this server from another one on the same port.
        self._display_name = f"embedded-{os.getpid()}"
        self.app = Starlette(
            routes=[
                Route("/ping", self.ping),
                Route("/replicas_status", self.ping),
                Route("/", self.query, methods=["GET", "POST"]),
            ]
        )

    async def ping(self, _: Request) -> Response:
        return PlainTextResponse("Ok.\n", headers={"X-ClickHouse-Server-Display-Name": self._display_name})

    async def query(self, request: Request) -> Response:
        if request.method == "GET" and not request.query_params.get("query"):
            return await self.ping(request)
        headers = {
            "X-ClickHouse-Query-Id": request.query_params.get("query_id") or str(uuid.uuid4()),
            "X-ClickHouse-Server-Display-Name": self._display_name,
            "X-ClickHouse-Timezone": self._engine.timezone,
        }
        try:
            result, encoding, data = await self._answer(request)
        except Refused as refused:
            headers["X-ClickHouse-Exception-Code"] = str(refused.code)
            text = f"{refused} (version {self._engine.version} (embedded))\n"
            return PlainTextResponse(text, STATUS_OF_CODE.get(refused.code, 500), headers)
        except ClientDisconnect:
            return Response(status_code=499)  # nobody reads it; the statement has not been started
        if result.format is not None:
            headers["X-ClickHouse-Format"] = result.format
        headers["X-ClickHouse-Summary"] = result.summary
        if encoding:
            headers["Content-Encoding"] = encoding
        return Response(data, headers=headers, media_type="application/octet-stream")

    async def _answer(self, request: Request) -> tuple[Result, str, bytes]:
        refuse_other_sites(request)
        authenticate(request, self._password)
        loop = asyncio.get_running_loop()
        query = request.query_params.get("query", "").encode()
        decoder = decoder_for(request.headers.get("content-encoding", "").strip().lower())
        form: dict[str, str] = {}
        multipart = request.headers.get("content-type", "").startswith("multipart/form-data")
        if multipart:
            raw = await request.body()
            form = read_form(request.headers["content-type"], decoder.decode(raw))
            query += form.pop("query", "").encode()
        scope = Scope.of(request, form)
        body = Body(decoder, self._spool, query=query)
        try:
            if not multipart and request.method == "POST":
                async for part in parts(request):
                    if len(part) < SMALL_PART_BYTES:  # no thread is worth it
                        body.add(part)
                    else:
                        await loop.run_in_executor(None, body.add, part)
        except BaseException:
            body.close()
            raise
        result = await loop.run_in_executor(self._statements, self._engine.run, body, scope)
        encoding = ""
        if dict(scope.settings).get("enable_http_compression", "0") not in ("0", "false"):
            accepted = {name.split(";")[0].strip() for name in request.headers.get("accept-encoding", "").split(",")}
            encoding = next((name for name in ENCODERS if name in accepted), "")
        if not encoding or not result.data:
            return result, "", result.data
        return result, encoding, await loop.run_in_executor(None, ENCODERS[encoding], result.data)


def serve(directory: Path, port: int, password: str, config: Path | None = None) -> None:
    """Serves `directory` until SIGTERM or SIGINT. Acknowledged inserts survive SIGKILL."""
    directory.mkdir(parents=True, exist_ok=True)
    # Bound first: a port in use is found at once.
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    engine = Engine(directory / "data", config)
    # Swept only now: the engine's lock on its directory says that no other server uses this one.
    spool = directory / "tmp"
    shutil.rmtree(spool, ignore_errors=True)
    spool.mkdir(mode=0o700)
    os.chdir(spool)  # the engine reads the name of a table that does not exist as a file's, from here
    serving = uvicorn.Config(
        Server(engine, spool, password).app,
        log_level="warning",
        access_log=False,
        lifespan="off",
        timeout_graceful_shutdown=SHUTDOWN_GRACE_S,
        timeout_keep_alive=600,  # pooled clients come back late; a closed connection would look like a fault
    )
    server = uvicorn.Server(serving)
    # uvicorn raises the signal once more when it is done, which must not end us before the engine.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: setattr(server, "should_exit", True))
    server.run(sockets=[listener])
    # Neither the engine nor the interpreter may wait for a statement that runs on, however long.
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(SHUTDOWN_GRACE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="An embedded ClickHouse on 127.0.0.1, for development and tests.")
    parser.add_argument("--directory", type=Path, required=True, help="where the data lives; one server each")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument(
        "--config", type=Path, help="a configuration file of ClickHouse's, such as for its user's grants"
    )
    options = parser.parse_args(arguments)
    # A part of JSON columns is some ten files a path; the usual soft limit of 1,024 is soon reached in a merge.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls the hard limit unlimited and then refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    password = os.environ.pop(PASSWORD_VARIABLE, None)
    if password is None:
        parser.error(f"{PASSWORD_VARIABLE} must hold the password of the user default; it may be empty")
    serve(options.directory.resolve(), options.port, password, options.config and options.config.resolve())


if __name__ == "__main__":
    main()
