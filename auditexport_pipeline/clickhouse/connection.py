"""Requests to ClickHouse over HTTP, and their outcome: acknowledged, refused, no answer, or another server's answer.

What belongs here: the URL, the HTTP request, and the proof that an answer is ClickHouse's. What does not: statements
(`audit_log.sql`), their settings (`settings.py`), and what to do about a refusal.

An INSERT is acknowledged by a 200 with ClickHouse's own headers, no error code and an empty body. A read is answered by
one whole JSON document whose first column has the random name of this request: no cache and no page can know it.
Redirects are never followed, and this module never sends an INSERT twice.
"""

from __future__ import annotations

import http.client
import re
import secrets
import socket
import ssl
import threading
from base64 import b64encode
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from functools import lru_cache
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs, unquote, urlencode, urlsplit

import msgspec

from auditexport_pipeline.clickhouse.refusals import SETUP_CODES, is_fence
from auditexport_pipeline.clickhouse.settings import READ_SETTINGS, Listed, Value, literal, stated
from auditexport_pipeline.core.errors import (
    AuditExportError,
    AuditLogUnavailable,
    ForeignAnswer,
    InsertOutcomeUnknown,
    InvalidConfig,
    LeaseLost,
    SettingsOutdated,
    SetupIncomplete,
    WrongAddress,
)

if TYPE_CHECKING:
    from urllib3 import BaseHTTPResponse, PoolManager

CONNECT_TIMEOUT_S = 10
# The socket waits this much longer than ClickHouse may work: ClickHouse's own time-out error explains more than ours.
ANSWER_GRACE_S = 15
LOOK_UP_TIMEOUT_S = 60
# Options of the URL: files, with the driver's names.
TLS_FILES = ("ca_cert", "client_cert", "client_cert_key")
# And settings for replicas with their allowed values; every statement has them. How to choose: docs/clickhouse.md.
REPLICA_SETTINGS = {
    "insert_quorum": r"auto|[2-9]|[1-9]\d",
    "insert_quorum_parallel": r"[01]",
    "select_sequential_consistency": r"[01]",
    "load_balancing": r"random|nearest_hostname|hostname_levenshtein_distance|in_order|first_or_random|round_robin",
}

UNKNOWN_SETTING = 115
_ACCESS_DENIED = 497
_TIMEOUT_EXCEEDED = 159
# Errors after which the rows may be stored: no quorum, or no answer from a shard or from Keeper.
_UNKNOWN_OUTCOMES = {_TIMEOUT_EXCEEDED, 209, 210, 279, 319, 999}

_CODE_HEADER = "X-ClickHouse-Exception-Code"
# Headers that only ClickHouse sends. A proxy may take them away; none makes them up.
_OWN_HEADERS = ("X-ClickHouse-Summary", "X-ClickHouse-Query-Id", "X-ClickHouse-Server-Display-Name")
_EXCEPTION = re.compile(rb"Code: (\d+)\. DB::Exception: ")
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)")
_TAIL_BYTES = 65_536
_NATIVE_PORT = "ClickHouse's native port"
_HTTP_PORT = "that the port is its http_port (8123), not the native one (9000)"
_HTTPS_PORT = "that the URL begins with https:// only for its https_port (8443)"
_AUTHORITY = (
    "Nothing was sent. Let ca_cert in AUDITEXPORT_CLICKHOUSE_URL name the authority that signed it, and the URL a host name "
    "that is in it"
)
_FIRST_SELECT = re.compile(r"\A((?:\s|--[^\n]*\n)*SELECT\b(?:\s+DISTINCT\b)?)", re.IGNORECASE)

# What the answer of a proxy or another server means for the rows, and what to do; by HTTP status.
FOREIGN: dict[int, str] = {
    401: "a proxy asks for a login of its own, and passed nothing on; name ClickHouse itself in AUDITEXPORT_CLICKHOUSE_URL",
    403: "a proxy or firewall forbids the request, and passed nothing on; allow this host there",
    404: "a web server without this path answers, and passed nothing on; check host and port in AUDITEXPORT_CLICKHOUSE_URL",
    405: "a web server that takes no POST answers; check host and port in AUDITEXPORT_CLICKHOUSE_URL",
    407: "a proxy asks for a login, and passed nothing on; check http_proxy and https_proxy in the environment",
    411: "a proxy takes no streamed request; turn its request buffering off, or name ClickHouse itself",
    413: "a proxy takes no request of this size, and passed nothing on; raise its limit (client_max_body_size in nginx) or lower "
    "batch_bytes",
    429: "a proxy limits requests, and passed nothing on; run again later, or raise its limit",
    499: "a proxy gave up; run again",
    500: "a proxy failed; the request may or may not have reached ClickHouse, the next attempt looks first",
    502: "a proxy could not reach ClickHouse, or lost it on the way; the next attempt looks first. Check that ClickHouse runs",
    503: "a proxy has no ClickHouse to give the request to, or is under maintenance; run again when it is back",
    504: "a proxy waited for ClickHouse and gave up; ClickHouse may still be at work, the next attempt looks first. Raise the "
    "proxy's time-out above insert_timeout_s",
}
# A rerun gets the same answer.
_PERMANENT = {401, 404, 405, 407, 411}
_LOOKS_FIRST = "it may or may not be written, the next attempt looks first"


class ServerError(Exception):
    """ClickHouse's own refusal. `text` can quote a payload: it is never shown."""

    def __init__(self, code: int, text: str) -> None:
        names = _NAME.findall(text)
        self.code = code
        self.name: str = names[-1] if names else "no name"
        self.text = text
        super().__init__(f"code {code}, {self.name}")

    @property
    def settings(self) -> list[str]:
        """The names of the settings that were refused. Nothing else of that text is used."""
        if self.code not in (UNKNOWN_SETTING, 164, 452):
            return []
        return re.findall(r"(?:[Uu]nknown setting|Setting|Cannot modify) '?(\w+)'?", self.text)


class NoAnswer(Exception):
    """No answer came. `sent`: the request can have arrived. `permanent`: a rerun ends the same way."""

    def __init__(self, reason: str, advice: str, *, sent: bool = False, permanent: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.sent = sent
        self.permanent = permanent


class NotClickHouse(Exception):
    """An answer came and is not ClickHouse's."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status
        self.what = what


class _Document(msgspec.Struct):
    """FORMAT JSONCompact: whole or no JSON at all."""

    meta: list[dict[str, str]]
    data: list[list[Any]]
    rows: int
    exception: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def connection_arguments(url: str) -> dict[str, Any]:
    """The arguments of `clickhouse_connect.get_client`, from `http[s]://user:password@host:port/database`.

    Query parameters `ca_cert`, `client_cert`, `client_cert_key` and `verify=false` set up TLS; certificates are
    verified by default. A client's certificate replaces the password; if both are given, both are sent.
    `REPLICA_SETTINGS` go along with every statement. Raises `InvalidConfig` for anything else. The message repeats
    nothing of the URL: in a password that is not percent-encoded, any part can look like a port, a database or an
    option.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
        options = {name: values[-1] for name, values in parse_qs(parts.query, True, max_num_fields=50).items()}
        valid = parts.scheme in ("http", "https") and host.encode("idna") and port != 0
        valid = valid and not re.search(r"[\x00-\x20\x7f]", host) and "@" not in parts.path and "#" not in url
    except ValueError:
        valid = False
    if not valid:
        raise _wrong_url(
            "must read http[s]://user:password@host:port/database, with the password percent-encoded (/ is %2F, # is %23, "
            "? is %3F)"
        )
    arguments: dict[str, Any] = {
        "interface": parts.scheme,
        "host": host,
        "port": port or (8443 if parts.scheme == "https" else 8123),
        "username": unquote(parts.username or "default"),
        "password": unquote(parts.password or ""),
        "database": parts.path.strip("/") or "default",
        "verify": options.pop("verify", "true").lower() != "false",
    }
    for name in TLS_FILES:
        if name in options:
            arguments[name] = options.pop(name)
            if not arguments[name] or "\0" in arguments[name]:
                raise _wrong_url(f"has a {name} that names no file")
    if "client_cert_key" in arguments and "client_cert" not in arguments:
        raise _wrong_url("has a client_cert_key and no client_cert that it belongs to")
    if "client_cert" in arguments and arguments["password"]:
        arguments["tls_mode"] = "strict"  # else the driver does not send the password
    settings = {name: options.pop(name) for name in REPLICA_SETTINGS if name in options}
    for name, value in settings.items():
        if not re.fullmatch(REPLICA_SETTINGS[name], value):
            raise _wrong_url(f"has a {name} that is not one of {REPLICA_SETTINGS[name]}")
    if "insert_quorum" in settings:
        settings.setdefault("insert_quorum_parallel", "0")  # else a look-up could miss the last INSERT
    if settings.get("load_balancing") == "in_order":
        settings["prefer_localhost_replica"] = "0"  # else each server behind a balancer prefers its own replica
    if settings:
        arguments["settings"] = settings
    if options:
        known = ", ".join((*TLS_FILES, "verify", *REPLICA_SETTINGS))
        raise _wrong_url(f"has an option beside {known}; a ? in its password is written %3F")
    return arguments


def _wrong_url(what: str) -> InvalidConfig:
    return InvalidConfig(f"AUDITEXPORT_CLICKHOUSE_URL {what}")


def check_certificates(arguments: Mapping[str, Any]) -> None:
    """Loads the files that the URL names: the driver reports an unreadable file as a failed connection."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "ca_cert"
    try:
        if arguments.get(name, "certifi") != "certifi":  # the driver's word for the package of that name
            context.load_verify_locations(arguments[name])
        name = "client_cert"
        if name in arguments:
            # An empty password: for a key with a passphrase, OpenSSL would else ask the terminal.
            context.load_cert_chain(arguments[name], arguments.get("client_cert_key"), password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not PEM, or a key with a passphrase"
        raise _wrong_url(f"names a {name} that cannot be read as one: {arguments[name]} ({reason})") from error


@lru_cache(maxsize=256)  # several of each of many outboxes
def connection(url: str, pid: int) -> Connection:
    """The connection of this process to that URL."""
    return Connection(url)


class Connection:
    """One ClickHouse over HTTP. Thread-safe; sockets are kept between requests and belong to the process."""

    def __init__(self, url: str) -> None:
        from clickhouse_connect.driver.httputil import check_env_proxy, get_pool_manager

        arguments = connection_arguments(url)
        check_certificates(arguments)
        scheme, host, port = arguments["interface"], arguments["host"], arguments["port"]
        self.where = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        self.database: str = arguments["database"]
        self.replica_settings: dict[str, Value] = arguments.get("settings", {})
        self._base = f"{scheme}://{self.where}/"
        self._proxy = check_env_proxy(scheme, host, port)
        files: dict[str, Any] = {name: arguments[name] for name in TLS_FILES if name in arguments}
        proxy: dict[str, Any] = {f"{scheme}_proxy": self._proxy} if self._proxy else {}
        self.pool: PoolManager = get_pool_manager(verify=arguments["verify"], **files, **proxy)
        self._headers = {"User-Agent": "auditexport"}
        if "client_cert" in arguments and not arguments["password"]:
            self._headers |= {
                "X-ClickHouse-User": arguments["username"],
                "X-ClickHouse-SSL-Certificate-Auth": "on",
            }
        else:
            login = f"{arguments['username']}:{arguments['password']}".encode()
            self._headers["Authorization"] = "Basic " + b64encode(login).decode()
        self._listed: Mapping[str, Listed] | None = None
        self._listing = threading.Lock()
        self._strict = True
        # Whether the last answer had ClickHouse's headers: without them, every INSERT costs a look-up.
        self.headers_arrive = True
        # Query ids in answers that are not ours: chproxy makes one for each request, a cache repeats one.
        self._ids_seen: deque[str] = deque(maxlen=1000)

    # ── settings ─────────────────────────────────────────────────────────────────────────────────

    def listed(self) -> Mapping[str, Listed]:
        """The settings that the server knows, with our user's values. Read once, and again after code 115."""
        with self._listing:
            if self._listed is None:
                self._listed = self._list()
            return self._listed

    def lenient(self) -> Connection:
        """For the preflight: the same connection, without the settings that our user may not set. The preflight reports
        them; on any other connection the server refuses them.
        """
        other = copy(self)
        other._strict = False
        other._listed = None
        return other

    def read_settings_again(self) -> None:
        with self._listing:
            self._listed = None

    def _list(self) -> Mapping[str, Listed]:
        # Nothing is known about the server yet: what it does not know, or our user may not set, is left out one by one.
        settings = dict(READ_SETTINGS)
        while True:
            clause = "SETTINGS " + ", ".join(f"{name} = {literal(value)}" for name, value in settings.items())
            try:
                rows = self._rows("SELECT name, value, changed, readonly, min, max FROM system.settings", {}, clause)
            except ServerError as error:
                named = next((name for name in error.settings if name in settings), None)
                if named is None:
                    raise
                del settings[named]
                continue
            return {
                name: Listed(value, bool(changed) and name not in settings, bool(fixed), least, most)
                for name, value, changed, fixed, least, most in rows
            }

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def query(
        self,
        statement: str,
        parameters: Mapping[str, Any] | None = None,
        settings: Mapping[str, Value] | None = None,
    ) -> list[tuple[Any, ...]]:
        """The rows of a SELECT, proven to be ClickHouse's answer to this very request. Integers are exact.

        `settings` are stated beside `READ_SETTINGS`. The statement begins with SELECT and has no SETTINGS and no
        FORMAT.
        """
        from clickhouse_connect.driver.binding import bind_query

        bound, fields = bind_query(statement, dict(parameters or {}))
        settings = {**READ_SETTINGS, **self.replica_settings, **(settings or {})}
        try:
            return self._rows(str(bound), fields, stated(settings, self.listed(), strict=self._strict))
        except ServerError as error:
            if error.code != UNKNOWN_SETTING:
                raise
        self.read_settings_again()
        return self._rows(str(bound), fields, stated(settings, self.listed(), strict=self._strict))

    def command(self, statement: str, settings: Mapping[str, Value] | None = None) -> str:
        """Runs a statement that is no SELECT and returns its answer. `settings` travel beside it."""
        known = self.listed() if settings else {}
        parameters = {name: str(value) for name, value in (settings or {}).items() if name in known}
        return self._request(statement.encode(), parameters).decode().strip()

    def insert(self, body: Iterable[bytes], *, timeout_s: int) -> bool:
        """Sends an INSERT with its data. True when ClickHouse acknowledged it; False when a 200 does not prove that.

        Raises `ServerError` when ClickHouse refused it.
        """
        query_id = f"auditexport-{secrets.token_hex(16)}"
        answer = self._send(body, {}, timeout_s, query_id=query_id)
        if _checked(answer).strip():
            raise NotClickHouse(answer.status, "a 200 with a page where an INSERT has an empty answer")
        self.headers_arrive = _is_own(answer)
        named = answer.headers.get("X-ClickHouse-Query-Id", query_id)
        repeated = named != query_id and named in self._ids_seen
        self._ids_seen.append(named)
        return self.headers_arrive and not repeated

    def _rows(self, statement: str, parameters: Mapping[str, Any], settings: str) -> list[tuple[Any, ...]]:
        nonce = f"auditexport_{secrets.token_hex(8)}"
        named, times = _FIRST_SELECT.subn(rf"\1 0 AS {nonce}, ", statement)
        if not times:
            raise ValueError("a read begins with SELECT")
        answer = self._request(f"{named.rstrip().rstrip(';')}\n{settings}\nFORMAT JSONCompact".encode(), parameters)
        try:
            found = _decode(answer)
        except msgspec.DecodeError as error:
            half = "half an answer" if answer[:1] == b"{" else "something else"
            late = _error_in(answer) or NotClickHouse(200, f"a 200 with {half} in the place of rows")
            raise late from error
        if found.exception is not None:
            raise _error_in(found.exception.encode()) or ServerError(0, found.exception)
        if not found.meta or found.meta[0].get("name") != nonce or found.rows != len(found.data):
            raise NotClickHouse(200, "the answer to another question, as a cache gives it")
        return [tuple(row[1:]) for row in found.data]

    def _request(self, statement: bytes, parameters: Mapping[str, Any]) -> bytes:
        """One statement that changes nothing, or that may run twice: sent again once if the connection is lost."""
        try:
            answer = self._send(statement, parameters, LOOK_UP_TIMEOUT_S)
        except NoAnswer as error:
            if not error.sent or error.reason.startswith("no answer within"):
                raise
            answer = self._send(statement, parameters, LOOK_UP_TIMEOUT_S)
        self.headers_arrive = _is_own(answer)
        return _checked(answer)

    def _send(
        self, statement: bytes | Iterable[bytes], parameters: Mapping[str, Any], timeout_s: int, *, query_id: str = ""
    ) -> BaseHTTPResponse:
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        wait_s = timeout_s + ANSWER_GRACE_S
        # The status is that of the whole answer. Where a proxy drops this option, a late error is still recognised.
        options = {"database": self.database, "wait_end_of_query": "1", **({"query_id": query_id} if query_id else {})}
        url = f"{self._base}?{urlencode(options)}"
        given: dict[str, Any] = {
            "body": statement,
            "headers": {**self._headers, "Content-Type": "text/plain; charset=utf-8"},
        }
        if parameters:
            # In a form: parameters can be payloads, and proxies log URLs.
            given = {"fields": {"query": statement, **parameters}, "headers": self._headers}
        try:
            timeout = Timeout(connect=CONNECT_TIMEOUT_S, read=wait_s)
            return self.pool.request("POST", url, timeout=timeout, retries=False, redirect=False, **given)
        except (HTTPError, OSError, http.client.HTTPException, UnicodeError) as error:
            raise _no_answer(error, self._base.startswith("https"), wait_s, self._proxy) from error

    @contextmanager
    def translated(self, what: str, *, sending: bool = False) -> Iterator[None]:
        """The one place where ClickHouse's and HTTP's errors become this project's.

        With `sending`, an error may leave the rows of an INSERT stored, unless ClickHouse refused it or nothing was
        sent.
        """
        place = f"ClickHouse at {self.where}"
        try:
            yield
        except ServerError as error:
            raise _from_server(error, what, place, sending) from error
        except NotClickHouse as error:
            raise _from_another(error, what, place) from error
        except NoAnswer as error:
            message = f"{place} gave no answer to {what}: {error.reason}. {error.advice}"
            if error.permanent:
                raise SetupIncomplete(message) from error
            if sending and error.sent:
                raise InsertOutcomeUnknown(f"{message}; {_LOOKS_FIRST}") from error
            raise AuditLogUnavailable(f"{message}; run again" + ("; nothing was written" if sending else "")) from error


def _is_own(answer: BaseHTTPResponse) -> bool:
    return any(name in answer.headers for name in _OWN_HEADERS)


def _checked(answer: BaseHTTPResponse) -> bytes:
    """The body of an answer that is no error. Raises `ServerError` or `NotClickHouse`."""
    body = answer.data or b""
    code = answer.headers.get(_CODE_HEADER, "")
    if code.isdigit() and int(code):
        raise ServerError(int(code), body.decode(errors="replace"))
    # Without the header: a proxy took it away, or the error came after the status had been sent.
    found = _error_in(body)
    if found and (answer.status != 200 or _EXCEPTION.match(body) or b"__exception__" in body[-_TAIL_BYTES:]):
        raise found
    if answer.status != 200:
        raise NotClickHouse(answer.status, _title(answer, body))
    return body


def _error_in(body: bytes) -> ServerError | None:
    """ClickHouse's error at the end of an answer."""
    tail = body[-_TAIL_BYTES:]
    found = _EXCEPTION.search(tail)
    return ServerError(int(found[1]), tail[found.start() :].decode(errors="replace")) if found else None


def _title(answer: BaseHTTPResponse, body: bytes) -> str:
    """The name of the server that answered, if it gives one: never the body, which can hold anything."""
    if b"clickhouse-client program" in body:
        return _NATIVE_PORT
    server = re.sub(r"[^\w./ ()-]", "", answer.headers.get("Server", ""))[:40]
    return f"something else than ClickHouse ({server})" if server else "something else than ClickHouse"


# ── errors ───────────────────────────────────────────────────────────────────────────────────────


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The error and everything that caused it, outermost first."""
    pending: list[object] = [error]
    seen = set[int]()
    for found in pending:
        if isinstance(found, BaseException) and id(found) not in seen:
            seen.add(id(found))
            yield found
            pending += [found.__cause__, getattr(found, "reason", None), *found.args, found.__context__]


def _no_answer(error: BaseException, tls: bool, wait_s: float, proxy: str | None) -> NoAnswer:
    """Why no answer came, and what to check."""
    from urllib3 import exceptions

    causes = [*_causes(error)]

    def among(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    connected = not among(exceptions.NewConnectionError, exceptions.ConnectTimeoutError)
    through = f" through the proxy {urlsplit(proxy).hostname} of http_proxy or https_proxy" if proxy else ""
    if refused := among(ssl.SSLCertVerificationError):
        return NoAnswer(f"its certificate was refused ({refused.verify_message})", _AUTHORITY, permanent=True)
    if among(socket.gaierror, exceptions.NameResolutionError):
        return NoAnswer(f"the name does not resolve{through}", "Check the host name and DNS")
    if among(ConnectionRefusedError):
        return NoAnswer(f"connection refused{through}", f"Check that ClickHouse runs and {_HTTP_PORT}")
    if among(exceptions.ConnectTimeoutError):
        return NoAnswer(f"no connection within {CONNECT_TIMEOUT_S} s{through}", "Check the host, and firewalls between")
    if broken := among(ssl.SSLError):
        reason = str(broken.reason or broken.strerror or "failed").replace("_", " ").lower()
        if re.search("wrong version number|record layer|http request|packet length", reason):
            return NoAnswer("the port does not speak TLS", f"Check {_HTTPS_PORT}", permanent=True)
        client = "certificate" in reason or "handshake failure" in reason
        files = "client_cert and client_cert_key in AUDITEXPORT_CLICKHOUSE_URL"
        return NoAnswer(f"TLS: {reason}", f"Check {files if client else _HTTPS_PORT}", sent=True)
    if (spoken := among(http.client.BadStatusLine)) and not isinstance(spoken, ConnectionResetError):
        if "\x15\x03" in str(spoken) or r"\x15\x03" in str(spoken):
            return NoAnswer("the port speaks TLS", "Let AUDITEXPORT_CLICKHOUSE_URL begin with https://", permanent=True)
        return NoAnswer("the port does not speak HTTP", f"Check {_HTTP_PORT}", permanent=True)
    if connected and among(exceptions.ReadTimeoutError, TimeoutError):
        advice = "Check what keeps ClickHouse busy (system.processes), and proxies"
        return NoAnswer(f"no answer within {wait_s:.0f} s{through}", advice, sent=True)
    if tunnel := re.search(r"Tunnel connection failed: (\d+)", " ".join(map(str, causes))):
        advice = "Check http_proxy and https_proxy in the environment"
        return NoAnswer(f"the proxy refused the connection{through} (HTTP {tunnel[1]})", advice)
    if among(ConnectionResetError, BrokenPipeError, http.client.HTTPException, exceptions.ProtocolError):
        also = "" if tls else ", and, where the port is its https_port (8443), let the URL begin with https://"
        reason = f"the connection was closed before the answer was whole{through}"
        return NoAnswer(reason, f"Check that ClickHouse runs{also}", sent=True)
    found = among(OSError)
    reason = (found.strerror if found else None) or type(error).__name__
    advice = "Check host and port in AUDITEXPORT_CLICKHOUSE_URL, and the network between"
    return NoAnswer(f"{reason}{through}", advice, sent=connected)


def _from_server(error: ServerError, what: str, place: str, sending: bool) -> AuditExportError:
    if is_fence(error.code, error.text):
        return LeaseLost(f"ClickHouse refused {what}: the lease of this run had ended; nothing was written")
    settings = ", ".join(error.settings[:3])
    if error.code == UNKNOWN_SETTING:
        return SettingsOutdated(
            f"{place} does not know a setting that it listed ({settings}) at {what}; servers of several versions answer there. "
            "Nothing was written; run again"
        )
    if error.code in SETUP_CODES:
        # Only this much of its text is repeated: a parser's error can quote a payload, a grant or a setting cannot.
        missing = re.search(r"have the grant (.+?)\. \(", error.text) if error.code == _ACCESS_DENIED else None
        lacks = f": the user lacks {missing[1]}" if missing else ""
        lacks = f": the user may not set {settings}" if settings else lacks
        return SetupIncomplete(
            f"{place} refuses {what} (code {error.code}, {error.name}{lacks}); check AUDITEXPORT_CLICKHOUSE_URL and the grants, "
            "or run `auditexport init`"
        )
    if sending and error.code in _UNKNOWN_OUTCOMES:
        return InsertOutcomeUnknown(f"no answer from {place} to {what} ({error.name}); {_LOOKS_FIRST}")
    return AuditLogUnavailable(f"{place} failed at {what} (code {error.code}, {error.name}); run again")


def _from_another(error: NotClickHouse, what: str, place: str) -> AuditExportError:
    status = error.status
    if error.what == _NATIVE_PORT:
        meaning = "let the port in AUDITEXPORT_CLICKHOUSE_URL be ClickHouse's http_port (8123, or 8443 for https)"
    elif 300 <= status < 400:
        meaning = (
            "it redirects, which is not followed, for a redirected INSERT loses its rows; nothing was passed on. Let "
            "AUDITEXPORT_CLICKHOUSE_URL name the place that it redirects to"
        )
    elif status < 300:
        meaning = "a maintenance page, a cache or a login; the request may or may not have reached ClickHouse, the next attempt looks first"
    else:
        meaning = FOREIGN.get(status) or (
            "the next attempt looks first; check host and port in AUDITEXPORT_CLICKHOUSE_URL, and the proxies between"
        )
    permanent = error.what == _NATIVE_PORT or 300 <= status < 400 or status in _PERMANENT
    kind = WrongAddress if permanent else ForeignAnswer
    begin = f"the answer to {what} from {place} is not ClickHouse's (HTTP {status}, {error.what})"
    return kind(f"{begin}: {meaning}", status)
