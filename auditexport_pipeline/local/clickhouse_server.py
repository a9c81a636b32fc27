"""The embedded ClickHouse: the chDB engine behind ClickHouse's HTTP interface, on loopback only.

One HTTP request becomes one statement of the engine, and the outcome becomes the answer of a ClickHouse server.
`clickhouse.py` starts and stops this program.

* Each request has an engine connection of its own: opening one costs 0.2 ms, its settings end with it, and requests run in
  parallel.
* A body is complete before its statement starts, so that an upload that breaks off never becomes a shorter INSERT. The data
  of an INSERT goes into a file without a name, which not even SIGKILL leaves behind.
* `split_insert` finds the data of an INSERT by the server's own rule: a byte too many or too few is silent damage.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import contextlib
import email
import gzip
import hmac
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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
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

# Statements that run at once. The engine spreads each over all cores, so more would only queue.
MAX_STATEMENTS: Final = 16
# A server's http_max_field_value_size: what it would refuse must not pass here.
FIELD_LIMIT_BYTES: Final = 131_072
# The data of an INSERT begins within its first bytes, or the INSERT has none.
INSERT_TEXT_LIMIT_BYTES: Final = 1 << 20
# Running statements get this long after SIGTERM, and then end with the process, as in a crash.
SHUTDOWN_GRACE_S: Final = 3

# URL parameters that are not settings (ClickHouse, HTTPHandler). Those without an effect here are ignored: each client sends some.
RESERVED_PARAMETERS: Final = frozenset(
    """query database default_format user password quota_key query_id session_id session_timeout
    session_check close_session stacktrace role buffer_size wait_end_of_query compress decompress
    client_protocol_version""".split()  # noqa: SIM905 - a list of quoted words hides the words
)
# chDB's own defaults that a server does not share.
SERVER_SETTINGS: Final = {"implicit_select": "0"}

# The answer is complete whatever the profile of a test's user says.
ABOUT: Final = (
    "SELECT version(), timezone(), arrayStringConcat(groupArray(name), ' ') FROM system.table_functions "
    "SETTINGS limit = 0, offset = 0, additional_result_filter = '', use_query_cache = 0, max_result_rows = 0, max_rows_to_read = 0"
)

# ClickHouse's codes of the errors that this server raises itself.
CODES: Final = {
    "BAD_ARGUMENTS": 36,
    "NOT_IMPLEMENTED": 48,
    "SYNTAX_ERROR": 62,
    "CANNOT_DECOMPRESS": 271,
    "ACCESS_DENIED": 497,
    "AUTHENTICATION_FAILED": 516,
    "POCO_EXCEPTION": 1000,
    "UNKNOWN_EXCEPTION": 1002,
}
# ClickHouse, exceptionCodeToHTTPStatus.cpp; a code that is not listed there gives 500.
STATUS_OF_CODE: Final = {
    **dict.fromkeys((6, 15, 25, 26, 27, 36, 38, 41, 44, 53, 62, 72, 117, 321, 376, 427, 441), 400),
    **dict.fromkeys((192, 193, 497, 516), 403),
    **dict.fromkeys((46, 47, 50, 56, 60, 63, 73, 81, 115), 404),
    **dict.fromkeys((76, 209, 439), 503),
    159: 408,
    48: 501,
}


class Refused(RuntimeError):
    """A request that this server refuses, as ClickHouse words it. The engine raises `RuntimeError` itself."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"Code: {CODES[name]}. DB::Exception: {reason}. ({name})")


# --- The text of a request ------------------------------------------------------------------------

# As ClickHouse's Lexer reads: all that is not ASCII is blank except typographic quotes, and `//` begins a comment.
BLANK: Final = (
    rb"(?: [\x00-\x20\x7f] | (?!\xe2\x80[\x98-\x9f])[\x80-\xff] | (?:--|//|\#[\ !])[^\n]*(?:\n|\Z) "
    rb"| /\*(?:[^*/]|\*(?!/)|/(?!\*))*\*/ )"
)
TOKEN = re.compile(
    rb"""
    (?P<blank>   (?:BLANK)+ )
  | (?P<name>    [A-Za-z_][\w$]* )
  | (?P<quoted>  "(?:[^"\\]|\\.|"")*" | `(?:[^`\\]|\\.|``)*` )
  | (?P<text>    '(?:[^'\\]|\\.|'')*' | \$(?P<tag>\w*)\$.*?\$(?P=tag)\$ )
  | (?P<number>  [0-9][\w$]* )
  | (?P<unclear> /\* | \xe2\x80[\x98-\x9f] )
  | (?P<sign>    . )
    """.replace(b"BLANK", BLANK),
    re.VERBOSE | re.DOTALL,
)
FORMAT_NAME = re.compile(BLANK + rb"+ ([A-Za-z]\w*)", re.VERBOSE)
# ParserInsertQuery: after the format's name blanks, then at most one line end, then data. A Native block of ten columns
# begins with a line feed of its own.
DATA_START = re.compile(rb"[ \t\f]*(?:\r?\n)?")
LAST_FORMAT = re.compile(rb"\bFORMAT\s+([A-Za-z]\w*)\s*(?:SETTINGS\b[^()]*)?;?\s*\Z", re.IGNORECASE)
ASSIGNMENT = re.compile(rb"\s*[A-Za-z_]\w*\s*=")
# Statements whose answer is rows; a client tells an empty result from no result by the format header.
ROWS_FOLLOW = re.compile(
    b"(?:" + BLANK + rb"| \( )* (?:SELECT|WITH|SHOW|DESC|DESCRIBE|EXISTS|EXPLAIN|CHECK|VALUES)\b",
    re.IGNORECASE | re.VERBOSE,
)
DROP_SYNC = re.compile(rb"\A(\s*DROP\b.*\S)\s+SYNC\s*\Z", re.IGNORECASE | re.DOTALL)
# What may follow a *column* called format; a format of that name does not exist.
NOT_A_FORMAT = frozenset(b"FROM AS ASC DESC AND OR IN IS LIKE NOT UNION WHERE GROUP ORDER LIMIT SETTINGS".split())
DEPTH: Final = {b"(": 1, b"[": 1, b"{": 1, b")": -1, b"]": -1, b"}": -1}


def tokens(text: bytes) -> Iterator[tuple[str, bytes, int, int]]:
    """Kind, text in capitals, start and end of each token that is not blank."""
    for token in TOKEN.finditer(text):
        if token.lastgroup != "blank":
            yield token.lastgroup or "", token[0].upper(), token.start(), token.end()


@dataclass(frozen=True, slots=True, kw_only=True)
class Insert:
    """An INSERT whose data follows its text.

    `sql` ends before FORMAT; `data_at` is the offset of the first data byte; `inputs` are the spans of `input(` in `sql`, empty
    when the data goes straight into the table; `target_end` is the offset at which table and columns end.
    """

    sql: bytes
    format: bytes
    data_at: int
    inputs: tuple[tuple[int, int], ...]
    target_end: int

    def reading(self, descriptor: int) -> bytes:
        """The statement that reads the same rows from a file descriptor."""
        sql = self.sql
        if not self.inputs:
            # FROM INFILE takes no descriptor; this path leads to the file without a name.
            source = b" FROM INFILE '/proc/self/fd/%d' COMPRESSION 'none' " % descriptor
            return sql[: self.target_end] + source + sql[self.target_end :] + b" FORMAT " + self.format
        # input() reads nothing from data in the text, and raises no error: the rows have to come from a file.
        for start, end in reversed(self.inputs):
            comma = b"" if sql[end:].lstrip().startswith(b")") else b", "
            sql = sql[:start] + b"file(%d, '%s'%s" % (descriptor, self.format, comma) + sql[end:]
        return sql


def split_insert(text: bytes) -> Insert | None:
    """Where the data of an INSERT begins in `text`; None when all of it is statement."""
    depth = 0
    insert = select = False
    inputs: list[tuple[int, int]] = []
    settings_at: int | None = None
    before, before_at = b"", 0
    for kind, word, start, end in tokens(text):
        # Another statement follows, or a quote has no end: the engine says so.
        if word in (b";", b"'", b'"', b"`") or (not before and word not in (b"INSERT", b"WITH")):
            return None
        depth += DEPTH.get(word, 0)
        if word == b"(" and insert and before == b"INPUT":
            inputs.append((before_at, end))
        before, before_at = word, start
        if kind != "name" or depth > 0:
            continue
        if not insert:
            insert = word == b"INSERT"
            if word == b"SELECT":
                return None
        elif word in (b"SELECT", b"WITH"):
            select = True
        elif word == b"VALUES" and not select:
            return None
        elif word == b"SETTINGS" and ASSIGNMENT.match(text, end):
            settings_at = settings_at or start
        elif word == b"FORMAT" and (inputs or not select):
            name = FORMAT_NAME.match(text, end)
            if name is None or name[1].upper() in NOT_A_FORMAT:
                continue
            data = DATA_START.match(text, name.end())
            assert data is not None  # it matches nothing, too
            return Insert(
                sql=text[:start],
                format=name[1],
                data_at=data.end(),
                inputs=tuple(inputs),
                target_end=settings_at or start,
            )
    return None


def quoted(text: str, quote: str = "'") -> str:
    return quote + text.replace("\\", "\\\\").replace(quote, "\\" + quote) + quote


# --- What a request may not reach -----------------------------------------------------------------

# Table functions that stay inside this server. All others reach files, programs or networks. `remote` has a rule of its own.
SAFE_FUNCTIONS: Final = frozenset(
    """clusterless dictionary format fuzzjson fuzzquery generate_series generateseries generaterandom input loop merge
    mergetreeanalyzeindexes mergetreeindex mergetreeparts mergetreeprojection mergetreetextindex null numbers numbers_mt
    primes remote remotesecure timeseriesdata timeseriesmetrics timeseriesselector timeseriestags values view viewexplain
    viewifpermitted zeros zeros_mt""".split()  # noqa: SIM905 - a list of quoted words hides the words
)
# Functions that are no table functions, and reach files, programs or networks.
READING_FUNCTIONS: Final = frozenset(("file", "catboostevaluate", "python", "filesystem", "executable", "disk"))
LOOPBACK = re.compile(rb"\s*'(?:(?:127\.0\.0\.\d{1,3}|localhost)(?::\d+)?[,|]?)+'")
SAFE_ENGINES: Final = (
    rb"(?:REPLICATED|SHARED)?(?:REPLACING|SUMMING|AGGREGATING|COLLAPSING|VERSIONEDCOLLAPSING|COALESCING|GRAPHITE)?MERGETREE|"
    rb"MEMORY|NULL|SET|JOIN|BUFFER|DISTRIBUTED|DICTIONARY|MERGE|VIEW|MATERIALIZEDVIEW|GENERATERANDOM|EMBEDDEDROCKSDB|KEEPERMAP|"
    rb"LOG|TINYLOG|STRIPELOG|ATOMIC|ORDINARY|LAZY|REPLICATED|REMOTE"
)
# In a statement of capitals, one blank between two words, all texts empty.
FORBIDDEN = re.compile(
    rb"\A(?:BACKUP|RESTORE)\b"
    rb"|\b(?:INTO OUTFILE|FROM INFILE|NAMED COLLECTION|SYSTEM SHUTDOWN|SYSTEM KILL)\b|: IDENTIFIER\b"
    rb"|\bSOURCE \( (?!(?:CLICKHOUSE|NULL) )\w+"
    rb"|\A(?:CREATE|ATTACH|REPLACE|EXECUTE) .*\bENGINE (?:= )?(?!(?:" + SAFE_ENGINES + rb")(?: |\Z))[A-Z_]\w*",
    re.DOTALL,
)
TABLES_FOLLOW: Final = frozenset(b"FROM JOIN INTO TABLE DESCRIBE DESC EXISTS".split())
TABLES_END: Final = frozenset(
    b"SELECT WITH WHERE PREWHERE ON USING GROUP ORDER LIMIT SETTINGS VALUES HAVING UNION WINDOW QUALIFY FORMAT".split()
)


def one_statement(sql: bytes, reaching: frozenset[bytes]) -> bytes:
    """`sql` without its final semicolon.

    Raises `Refused` when there is no statement, or a second one (the engine would run both), or when the statement reaches
    files, programs or networks: the engine has the rights of the user who started it. `reaching` has the names, in
    capitals, of all functions that do. Names are compared as ClickHouse reads them: without comments, in any case, and
    quoted ones too.
    """
    statement_end: int | None = None
    words = [b"", b""]
    # For each open bracket, whether names of tables are read there: this engine reads a table's name as a path, too.
    tables = [False]
    for kind, word, start, end in tokens(sql):
        if word == b";":
            statement_end = start if statement_end is None else statement_end
            continue
        if statement_end is not None:
            raise Refused("SYNTAX_ERROR", "Syntax error (Multi-statements are not allowed)")
        if kind == "unclear":
            _refuse(b"comment in a comment and no typographic quote")
        if (kind == "quoted" or (kind == "text" and tables[-1])) and re.search(rb"[/\\]", word):
            _refuse(b"path as a table")
        if kind == "name":
            tables[-1] = word in TABLES_FOLLOW or (tables[-1] and word not in TABLES_END)
        elif kind == "quoted":
            word = word[1:-1]
        elif kind == "text":
            word = b"''"
        elif word == b"(":
            if words[-1] in reaching and words[-2] != b"INDEX":
                _refuse(words[-1])
            if words[-1] in (b"REMOTE", b"REMOTESECURE") and not LOOPBACK.match(sql, end):
                _refuse(words[-1])
        if kind == "sign" and DEPTH.get(word) == 1:
            tables.append(word == b"(" and tables[-1] and words[-1] in (*TABLES_FOLLOW, b",", b"("))
        elif kind == "sign" and word in DEPTH and len(tables) > 1:
            tables.pop()
        words.append(word)
    if len(words) == 2:
        raise Refused("SYNTAX_ERROR", "Syntax error: Empty query")
    if found := FORBIDDEN.search(b" ".join(words[2:])):
        _refuse(found[0][-60:])
    return sql[:statement_end]


def _refuse(what: bytes) -> None:
    name = what.decode(errors="replace")
    raise Refused("ACCESS_DENIED", f"the embedded ClickHouse takes no {name} from a request: it reaches outside of it")


# --- Bodies ---------------------------------------------------------------------------------------

DECODERS: Final[dict[str, Any]] = {
    "lz4": lz4.frame.LZ4FrameDecompressor,
    "zstd": lambda: zstandard.ZstdDecompressor().decompressobj(),
    "gzip": lambda: zlib.decompressobj(wbits=31),
}
# The first that the client accepts: on loopback the cheapest wins.
ENCODERS: Final[dict[str, Any]] = {
    "lz4": lz4.frame.compress,
    "zstd": lambda data: zstandard.ZstdCompressor(level=1).compress(data),
    "gzip": lambda data: gzip.compress(data, compresslevel=1),
}
PIECE_BYTES: Final = 1 << 17


def decompressed(body: bytes, encoding: str) -> Iterator[bytes]:
    """The plain body in pieces. Clients send a frame for each block, so the end of a frame is not the end of the body."""
    if encoding and encoding not in DECODERS:
        names = ", ".join(DECODERS)
        raise Refused("NOT_IMPLEMENTED", f"Content-Encoding {encoding!r} is not supported here; send one of {names}")
    frame: Any = None
    try:
        for start in range(0, len(body), PIECE_BYTES):
            piece = body[start : start + PIECE_BYTES]
            if not encoding:
                yield piece
                continue
            while piece:
                frame = frame or DECODERS[encoding]()
                yield frame.decompress(piece)
                if not frame.eof:
                    break
                piece, frame = frame.unused_data or b"", None
    except (RuntimeError, zstandard.ZstdError, zlib.error, EOFError) as error:
        raise Refused("CANNOT_DECOMPRESS", f"the request body cannot be decompressed: {error}") from error
    if frame is not None:
        raise Refused("CANNOT_DECOMPRESS", "the request body ends inside a compressed frame")


def read_form(content_type: str, body: bytes) -> dict[str, str]:
    """The fields of a multipart form: clickhouse-connect sends long query parameters in one."""
    # Not by a newer policy, which parses each header by a grammar: that took most of a short statement's time.
    message = email.message_from_bytes(f"Content-Type: {content_type}\r\n\r\n".encode("latin-1") + body)
    fields: dict[str, str] = {}
    parts: Any = message.get_payload() if message.is_multipart() else ()
    for part in parts:
        if part.get_filename() is not None:
            raise Refused("NOT_IMPLEMENTED", "External tables are not supported here")
        fields[str(part.get_param("name", header="content-disposition"))] = part.get_payload(decode=True).decode()
    return fields


# --- The engine -----------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True, kw_only=True)
class Scope:
    """Everything that holds for one statement only: database, settings and query parameters."""

    database: str
    settings: dict[str, str]
    default_format: str

    @classmethod
    def of(cls, request: Request, form: dict[str, str]) -> Scope:
        headers, parameters = request.headers, {**request.query_params, **form}
        for name, value in parameters.items():
            if len(value.encode()) > FIELD_LIMIT_BYTES:
                reason = f"HTML Form Exception: Field value too long: {name}, over {FIELD_LIMIT_BYTES} bytes"
                raise Refused("POCO_EXCEPTION", reason)
            if name in ("compress", "decompress") and value not in ("0", "false"):
                reason = f"{name}=1 (ClickHouse's own block compression) is not supported here; use HTTP compression"
                raise Refused("NOT_IMPLEMENTED", reason)
            if name not in RESERVED_PARAMETERS and not re.fullmatch(r"[A-Za-z_]\w*", name):
                raise Refused("BAD_ARGUMENTS", f"Bad setting name {name!r}")
        settings = {name: value for name, value in parameters.items() if name not in RESERVED_PARAMETERS}
        if request.method == "GET":
            settings.setdefault("readonly", "2")
        return cls(
            database=parameters.get("database") or headers.get("x-clickhouse-database", ""),
            settings={**SERVER_SETTINGS, **settings},
            default_format=parameters.get("default_format") or headers.get("x-clickhouse-format", "TabSeparated"),
        )

    def statements(self) -> list[str]:
        """What a new connection executes first. Parameters are settings named `param_…`."""
        # A parameter can be long, and two long ones in a statement would exceed max_query_size. `readonly` comes last,
        # because it forbids every setting after it.
        alone = [name for name in self.settings if name.startswith("param_")]
        alone += [name for name in self.settings if name == "readonly"]
        together = [name for name in self.settings if name not in alone]
        use = [f"USE {quoted(self.database, '`')}"] if self.database else []
        return use + [
            "SET " + ", ".join(f"{name} = {quoted(self.settings[name])}" for name in names)
            for names in (together, *([name] for name in alone))
        ]


class Engine:
    """The chDB engine on `directory`/data. Thread-safe: each statement runs on a connection of its own."""

    def __init__(self, directory: Path, config: Path | None = None) -> None:
        from chdb import _chdb  # half a second, and only this process

        self._connect: Any = _chdb.connect  # type: ignore[attr-defined]  # an extension module
        self._path = f"{directory / 'data'}" + (f"?config-file={config}" if config else "")
        # The engine stops with its last connection; this one keeps it running between requests.
        self._anchor = self._connect(self._path)
        about = self._anchor.query(ABOUT, "TabSeparated")
        self.version, self.timezone, functions = about.bytes().decode().strip().split("\t")
        names = {*functions.lower().split()} - SAFE_FUNCTIONS | READING_FUNCTIONS
        self._reaching = frozenset(name.upper().encode() for name in names)
        # chDB before 26.9 counts what an INSERT writes only where the data follows, and never runs the task for which
        # DROP … SYNC waits.
        self._is_recent = hasattr(about, "rows_written")
        # Emptied only now: the engine's lock on its directory says that no other server uses this one.
        self._spool = directory / "tmp"
        shutil.rmtree(self._spool, ignore_errors=True)
        self._spool.mkdir(mode=0o700)
        os.chdir(self._spool)  # the engine reads the name of a table that does not exist as a path relative to this

    def run(self, query: str, body: Iterator[bytes], scope: Scope) -> tuple[bytes, dict[str, str]]:
        """Runs the statement of a complete request; returns the rows and the answer's headers.

        Raises `RuntimeError` with the text of ClickHouse's error.
        """
        # The file is closed after the connection: an INSERT whose file is closed too early ends in the middle of its data.
        with contextlib.ExitStack() as closing:
            statement = self._statement(query, body, closing)
            connection = self._connect(self._path)
            closing.callback(connection.close)
            for sql in scope.statements():
                connection.query(sql, "TabSeparated")
            answer = connection.query(statement, scope.default_format)
            if answer.has_error():
                raise RuntimeError(answer.error_message())
            data = answer.bytes() or b""
            rows_follow = ROWS_FOLLOW.match(statement) is not None
            if self._is_recent:
                written_rows, written_bytes = answer.rows_written(), answer.bytes_written()
            else:
                written_rows, written_bytes = (0, 0) if rows_follow else (answer.rows_read(), answer.bytes_read())
            summary = {
                "read_rows": answer.storage_rows_read(),
                "read_bytes": answer.storage_bytes_read(),
                "written_rows": written_rows,
                "written_bytes": written_bytes,
                "result_rows": answer.rows_read() if rows_follow else 0,
                "result_bytes": len(data),
                "elapsed_ns": int(answer.elapsed() * 1e9),
            }
        headers = {"X-ClickHouse-Summary": json.dumps({name: str(figure) for name, figure in summary.items()})}
        if rows_follow:
            named = LAST_FORMAT.search(statement)
            headers["X-ClickHouse-Format"] = named[1].decode() if named else scope.default_format
        return data, headers

    def _statement(self, query: str, body: Iterator[bytes], files: contextlib.ExitStack) -> bytes:
        """What the engine executes; the data of an INSERT is in one of `files` then. Raises `Refused`."""
        # The server joins URL and body in the same way, so that `?query=INSERT … FORMAT CSV` has data.
        text = query.encode() + b"\n" if query else b""
        for piece in body:
            text += piece
            if len(text) >= INSERT_TEXT_LIMIT_BYTES:
                break
        insert = split_insert(text[:INSERT_TEXT_LIMIT_BYTES])
        if insert is None:
            statement = one_statement(text + b"".join(body), self._reaching)
            return statement if self._is_recent else DROP_SYNC.sub(rb"\1", statement)
        one_statement(insert.sql, self._reaching)
        # No name, mode 0600: private, and gone with the last descriptor.
        data = files.enter_context(tempfile.TemporaryFile(dir=self._spool))  # noqa: SIM115 - closed with `files`
        data.write(memoryview(text)[insert.data_at :])
        data.writelines(body)
        data.seek(0)  # flushes
        return insert.reading(data.fileno())

    def close(self) -> None:
        self._anchor.close()


# --- HTTP -----------------------------------------------------------------------------------------

# No DNS server can lead one of these here.
ADDRESS = re.compile(r"localhost | \d+\.\d+\.\d+\.\d+ | [\da-f:.]*:[\da-f:.]*", re.VERBOSE)


def refuse_other_sites(request: Request) -> None:
    """Refuses the requests of web pages, also those that reach this server by DNS rebinding."""
    host = urlsplit("//" + request.headers.get("host", "")).hostname or ""
    site = request.headers.get("sec-fetch-site", "none")
    if not ADDRESS.fullmatch(host) or "origin" in request.headers or site != "none":
        raise Refused(
            "ACCESS_DENIED",
            "requests come from programs of this machine, not from web pages: Host must be an address, without Origin",
        )


def authenticate(request: Request, expected: str) -> None:
    """Admits the only user, `default`, with the password of this start."""
    user, password = "default", ""
    _, _, token = request.headers.get("authorization", "").partition(" ")
    with contextlib.suppress(ValueError):
        if token:
            user = ""
            user, _, password = base64.b64decode(token, validate=True).decode().partition(":")
    user = request.query_params.get("user", request.headers.get("x-clickhouse-user", user))
    password = request.query_params.get("password", request.headers.get("x-clickhouse-key", password))
    if user != "default" or not hmac.compare_digest(password.encode(), expected.encode()):
        reason = f"{user}: Authentication failed: password is incorrect, or there is no user with such name"
        raise Refused("AUTHENTICATION_FAILED", reason)


class Server:
    """The HTTP application over one engine."""

    def __init__(self, engine: Engine, password: str) -> None:
        self._engine = engine
        self._password = password
        self._statements = ThreadPoolExecutor(MAX_STATEMENTS, thread_name_prefix="statement")
        # By the process id the starter knows this server from another one on the same port.
        self._name = {"X-ClickHouse-Server-Display-Name": f"embedded-{os.getpid()}"}
        self.app = Starlette(
            routes=[
                Route("/ping", self.ping),
                Route("/replicas_status", self.ping),
                Route("/", self.query, methods=["GET", "POST"]),
            ]
        )

    async def ping(self, _: Request) -> Response:
        return PlainTextResponse("Ok.\n", headers=self._name)

    async def query(self, request: Request) -> Response:
        if request.method == "GET" and not request.query_params.get("query"):
            return await self.ping(request)
        headers = {
            "X-ClickHouse-Query-Id": request.query_params.get("query_id") or str(uuid.uuid4()),
            "X-ClickHouse-Timezone": self._engine.timezone,
            **self._name,
        }
        try:
            refuse_other_sites(request)
            authenticate(request, self._password)
            body = await request.body()
            answering = asyncio.get_running_loop().run_in_executor(self._statements, self._answer, request, body)
            data, more = await answering
        except RuntimeError as error:
            text = str(error)
            found = re.search(r"Code: (\d+)\..*", text, re.DOTALL)
            code = int(found[1]) if found else CODES["UNKNOWN_EXCEPTION"]
            text = found[0] if found else f"Code: {code}. DB::Exception: {text}"
            headers["X-ClickHouse-Exception-Code"] = str(code)
            text = f"{text} (version {self._engine.version} (embedded))\n"
            return PlainTextResponse(text, STATUS_OF_CODE.get(code, 500), headers)
        except ClientDisconnect:
            return Response(status_code=499)  # the client is gone, and the statement was not started
        return Response(data, headers={**headers, **more}, media_type="application/octet-stream")

    def _answer(self, request: Request, body: bytes) -> tuple[bytes, dict[str, str]]:
        plain = decompressed(body, request.headers.get("content-encoding", "").strip().lower())
        query = request.query_params.get("query", "")
        form: dict[str, str] = {}
        content_type = request.headers.get("content-type", "")
        if content_type.startswith("multipart/form-data"):
            form, plain = read_form(content_type, b"".join(plain)), iter(())
            query += form.pop("query", "")
        scope = Scope.of(request, form)
        data, headers = self._engine.run(query, plain, scope)
        if data and scope.settings.get("enable_http_compression", "0") not in ("0", "false"):
            accepted = {name.split(";")[0].strip() for name in request.headers.get("accept-encoding", "").split(",")}
            for encoding, encode in ENCODERS.items():
                if encoding in accepted:
                    return encode(data), {**headers, "Content-Encoding": encoding}
        return data, headers


def serve(directory: Path, port: int, password: str, config: Path | None = None) -> None:
    """Serves `directory` until SIGTERM or SIGINT. Acknowledged inserts survive SIGKILL."""
    directory.mkdir(parents=True, exist_ok=True)
    # Bound first: a port in use is found at once.
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind((HOST, port))
    engine = Engine(directory, config)
    serving = uvicorn.Config(
        Server(engine, password).app,
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
    # Neither the engine nor the interpreter may wait for a statement that still runs.
    closing = threading.Thread(target=engine.close, daemon=True)
    closing.start()
    closing.join(SHUTDOWN_GRACE_S)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def main() -> None:
    parser = argparse.ArgumentParser(description="An embedded ClickHouse on 127.0.0.1, for development and tests.")
    parser.add_argument("--directory", type=Path, required=True, help="where the data is; one server each")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--config", type=Path, help="a ClickHouse configuration file, such as for its user's grants")
    options = parser.parse_args()
    # A part of JSON columns is some ten files a path; the usual soft limit of 1,024 is soon reached in a merge.
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # macOS calls the hard limit unlimited and then refuses that
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    password = os.environ.pop(PASSWORD_VARIABLE, None)
    if password is None:
        parser.error(f"{PASSWORD_VARIABLE} must be the password of the user default; it may be empty")
    serve(options.directory.resolve(), options.port, password, options.config and options.config.resolve())


if __name__ == "__main__":
    main()
