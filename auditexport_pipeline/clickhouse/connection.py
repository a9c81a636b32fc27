"""One request to ClickHouse and what came of it: acknowledged, refused, not answered, or answered by something else.

What belongs here: the URL, the HTTP request, and the proof that an answer is ClickHouse's. What does not: statements
(`audit_log.sql`), what they say about settings (`settings.py`), and what to do about a refusal.

An INSERT is acknowledged by a 200 with ClickHouse's own headers, no error code and an empty body. A read is answered by one
whole JSON document whose first column bears the name that this request made up: no cache and no page can know it.
Redirects are never followed, and an INSERT is never sent twice by this module.
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
from dataclasses import dataclass
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
# The socket waits this much longer than ClickHouse may work: its own answer is worth more than our giving up.
ANSWER_GRACE_S = 15
LOOK_UP_TIMEOUT_S = 60
# What the URL may name beside the server: files, as the driver calls them.
TLS_FILES = ("ca_cert", "client_cert", "client_cert_key")
# And settings of ClickHouse's for replicas, with the values that make sense here; every statement carries them. Which to
# choose, and why, is in docs/clickhouse.md.
REPLICA_SETTINGS = {
    "insert_quorum": r"auto|[2-9]|[1-9]\d",
    "insert_quorum_parallel": r"[01]",
    "select_sequential_consistency": r"[01]",
    "load_balancing": r"random|nearest_hostname|hostname_levenshtein_distance|in_order|first_or_random|round_robin",
}

UNKNOWN_SETTING = 115
_ACCESS_DENIED = 497
_TIMEOUT_EXCEEDED = 159
# Answers that say that rows may be stored all the same: a quorum that was not seen, a shard or Keeper that was not heard.
_UNKNOWN_OUTCOMES = {_TIMEOUT_EXCEEDED, 209, 210, 279, 319, 999}

_CODE_HEADER = "X-ClickHouse-Exception-Code"
# Headers that only ClickHouse sends. A proxy may take them away; none makes them up.
_OWN_HEADERS = ("X-ClickHouse-Summary", "X-ClickHouse-Query-Id", "X-ClickHouse-Server-Display-Name")
_EXCEPTION = re.compile(rb"Code: (\d+)\. DB::Exception: ")
_NAME = re.compile(r"\(([A-Z][A-Z0-9_]+)\)")
_TAIL_BYTES = 65_536
_FIRST_SELECT = re.compile(r"\A((?:\s|--[^\n]*\n)*SELECT\b(?:\s+DISTINCT\b)?)", re.IGNORECASE)

# What the answer of something else says about the rows of a request, and what to do; by its status.
FOREIGN: dict[int, str] = {
    401: "a proxy asks for a login of its own, and passed nothing on; name ClickHouse itself in AUDITEXPORT_CLICKHOUSE_URL, "
    "or let the proxy pass",
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
# Which of these a rerun does not change.
_FOR_GOOD = {401, 404, 405, 407, 411}


class Trouble(Exception):
    """What `translated` makes an error of this project from; `where` is host and port."""

    where = ""


class ServerError(Trouble):
    """ClickHouse's own refusal; `text` can quote a payload and is shown to nobody."""

    def __init__(self, code: int, text: str) -> None:
        names = _NAME.findall(text)
        self.code = code
        self.name: str = names[-1] if names else "no name"
        self.text = text
        super().__init__(f"code {code}, {self.name}")


class NoAnswer(Trouble):
    """No answer came; `sent` says whether the request can have arrived."""

    def __init__(self, reason: str, advice: str, *, sent: bool, for_good: bool = False) -> None:
        super().__init__(reason)
        self.reason = reason
        self.advice = advice
        self.sent = sent
        self.for_good = for_good


class NotClickHouse(Trouble):
    """An answer came and is not ClickHouse's."""

    def __init__(self, status: int, what: str) -> None:
        super().__init__(what)
        self.status = status
        self.what = what


@dataclass(frozen=True, slots=True)
class Rows:
    """The rows of a read, in order."""

    result_rows: list[tuple[Any, ...]]


class _Document(msgspec.Struct):
    """FORMAT JSONCompact: whole or no JSON at all."""

    meta: list[dict[str, str]]
    data: list[list[Any]]
    rows: int
    exception: str | None = None


_decode = msgspec.json.Decoder(_Document).decode


def connection_arguments(url: str) -> dict[str, Any]:
    """What a connection needs, named as `clickhouse_connect.get_client` does, from `http[s]://user:password@host:port/database`.

    Query parameters `ca_cert`, `client_cert`, `client_cert_key` and `verify=false` set up TLS; certificates
    are verified by default. A client's certificate stands in for a password; with one, both are shown. Those of
    `REPLICA_SETTINGS` go along with every statement. Raises
    `InvalidConfig`, which repeats nothing of the URL, for anything else: of a password that is not percent-encoded,
    any part can look like a port, a database or an option.
    """
    try:
        parts, port = urlsplit(url), urlsplit(url).port
        given = parse_qs(parts.query, keep_blank_values=True, max_num_fields=50)
        (parts.hostname or "").encode("idna")
    except ValueError:
        parts, port, given = urlsplit(""), None, {}
    control = re.search(r"[\x00-\x20\x7f]", parts.hostname or "")
    if (
        parts.scheme not in ("http", "https")
        or not parts.hostname
        or control
        or port == 0
        or "@" in parts.path
        or "#" in url
    ):
        raise InvalidConfig(
            "AUDITEXPORT_CLICKHOUSE_URL must read http[s]://user:password@host:port/database, with the password "
            "percent-encoded (/ is %2F, # is %23, ? is %3F)"
        )
    options = {name: values[-1] for name, values in given.items()}
    arguments: dict[str, Any] = {
        "interface": parts.scheme,
        "host": parts.hostname,
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
                raise InvalidConfig(f"AUDITEXPORT_CLICKHOUSE_URL has a {name} that names no file")
    if "client_cert_key" in arguments and "client_cert" not in arguments:
        raise InvalidConfig("AUDITEXPORT_CLICKHOUSE_URL has a client_cert_key and no client_cert that it belongs to")
    if "client_cert" in arguments and arguments["password"]:
        arguments["tls_mode"] = "strict"  # or the driver would keep the password to itself
    settings: dict[str, Any] = {name: options.pop(name) for name in REPLICA_SETTINGS if name in options}
    for name, value in settings.items():
        if not re.fullmatch(REPLICA_SETTINGS[name], value):
            raise InvalidConfig(f"AUDITEXPORT_CLICKHOUSE_URL has a {name} that is not one of {REPLICA_SETTINGS[name]}")
    if "insert_quorum" in settings:
        settings.setdefault("insert_quorum_parallel", "0")  # or no look-up could be promised to see the last INSERT
    if settings.get("load_balancing") == "in_order":
        settings["prefer_localhost_replica"] = "0"  # or each server that a balancer chooses would begin with itself
    if settings:
        arguments["settings"] = settings
    if options:
        raise InvalidConfig(
            f"AUDITEXPORT_CLICKHOUSE_URL has an option beside {', '.join((*TLS_FILES, 'verify', *REPLICA_SETTINGS))}; "
            "a ? in its password is written %3F"
        )
    return arguments


def check_certificates(arguments: Mapping[str, Any]) -> None:
    """Loads the files that the URL names, because the driver calls one that it cannot read a connection that failed."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    name = "ca_cert"
    try:
        if arguments.get(name, "certifi") != "certifi":  # a word of the driver's, for the package of that name
            context.load_verify_locations(arguments[name])
        name = "client_cert"
        if name in arguments:
            # With a password, or OpenSSL would ask the terminal for the one of a key that has one.
            context.load_cert_chain(arguments[name], arguments.get("client_cert_key"), password="")
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "not PEM, or a key with a passphrase"
        raise InvalidConfig(
            f"AUDITEXPORT_CLICKHOUSE_URL names a {name} that cannot be read as one: {arguments[name]} ({reason})"
        ) from error


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
            shown = f"{arguments['username']}:{arguments['password']}".encode()
            self._headers["Authorization"] = "Basic " + b64encode(shown).decode()
        self._listed: Mapping[str, Listed] | None = None
        self._listing = threading.Lock()
        self._strict = True
        # Whether the last answer had ClickHouse's headers: without them, every INSERT costs a look.
        self.headers_arrive = True
        # Ids of queries that answers named and that are not ours: chproxy gives each its own, a cache repeats one.
        self._ids_seen: deque[str] = deque(maxlen=1000)

    # ── settings ─────────────────────────────────────────────────────────────────────────────────

    def listed(self) -> Mapping[str, Listed]:
        """The settings that the server knows, as they are for our user. Asked for once, and again after code 115."""
        with self._listing:
            if self._listed is None:
                self._listed = self._list()
            return self._listed

    def lenient(self) -> Connection:
        """The same connection with a list of its own, which leaves out the settings that our user may not set: for the
        preflight, which names them. Everybody else is refused by the server.
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
        wanted = dict(READ_SETTINGS)
        while True:
            clause = "SETTINGS " + ", ".join(f"{name} = {literal(value)}" for name, value in wanted.items())
            try:
                rows = self._rows(
                    "SELECT name, value, changed, readonly, min, max FROM system.settings",
                    {},
                    clause,
                    LOOK_UP_TIMEOUT_S,
                )
            except ServerError as error:
                named = next((name for name in _settings_named(error) if name in wanted), None)
                if named is None:
                    raise
                del wanted[named]
                continue
            return {
                name: Listed(
                    value=value, changed=bool(changed) and name not in wanted, fixed=bool(fixed), least=least, most=most
                )
                for name, value, changed, fixed, least, most in rows
            }

    @contextmanager
    def _placed(self) -> Iterator[None]:
        try:
            yield
        except Trouble as error:
            error.where = self.where
            raise

    # ── requests ─────────────────────────────────────────────────────────────────────────────────

    def query(
        self,
        statement: str,
        parameters: Mapping[str, Any] | None = None,
        settings: Mapping[str, Value] | None = None,
        *,
        timeout_s: int = LOOK_UP_TIMEOUT_S,
    ) -> Rows:
        """The rows of a SELECT, proven to be ClickHouse's answer to this very request. Integers are exact.

        `settings` are stated beside `READ_SETTINGS`. The statement begins with SELECT and has no SETTINGS and no FORMAT.
        """
        from clickhouse_connect.driver.binding import bind_query

        wanted = {**READ_SETTINGS, **self.replica_settings, **(settings or {})}
        bound, fields = bind_query(statement, dict(parameters or {}))
        for last in (False, True):
            try:
                with self._placed():
                    return Rows(
                        self._rows(str(bound), fields, stated(wanted, self.listed(), strict=self._strict), timeout_s)
                    )
            except ServerError as error:
                if error.code != UNKNOWN_SETTING or last:
                    raise
                self.read_settings_again()
        raise AssertionError

    def command(self, statement: str, settings: Mapping[str, Value] | None = None) -> str:
        """Runs a statement that is no SELECT and returns what it answered. `settings` travel beside it."""
        with self._placed():
            known = self.listed() if settings else {}
            parameters = {name: str(value) for name, value in (settings or {}).items() if name in known}
            return self._request(statement.encode(), parameters, LOOK_UP_TIMEOUT_S).decode().strip()

    def insert(self, body: Iterable[bytes], *, timeout_s: int) -> bool:
        """Sends an INSERT with its data. True when ClickHouse acknowledged it; False for a 200 that does not prove to be its.

        Raises `ServerError` when ClickHouse refused it.
        """
        query_id = f"auditexport-{secrets.token_hex(16)}"
        with self._placed():
            answer = self._send(body, {}, timeout_s, query_id=query_id)
            if _checked(answer).strip():
                raise NotClickHouse(answer.status, "a 200 with a page where an INSERT has an empty answer")
        self.headers_arrive = _is_own(answer)
        named = answer.headers.get("X-ClickHouse-Query-Id", query_id)
        repeated = named != query_id and named in self._ids_seen
        self._ids_seen.append(named)
        return self.headers_arrive and not repeated

    def _rows(
        self, statement: str, parameters: Mapping[str, Any], settings: str, timeout_s: int
    ) -> list[tuple[Any, ...]]:
        nonce = f"auditexport_{secrets.token_hex(8)}"
        asked, times = _FIRST_SELECT.subn(rf"\1 0 AS {nonce}, ", statement)
        if not times:
            raise ValueError("a read begins with SELECT")
        asked = f"{asked.rstrip().rstrip(';')}\n{settings}\nFORMAT JSONCompact"
        answer = self._request(asked.encode(), parameters, timeout_s)
        try:
            found = _decode(answer)
        except msgspec.DecodeError as error:
            if (late := _EXCEPTION.search(answer[-_TAIL_BYTES:])) is not None:
                raise ServerError(
                    int(late[1]), answer[-_TAIL_BYTES:][late.start() :].decode(errors="replace")
                ) from None
            what = (
                "a page"
                if answer.lstrip()[:1] == b"<"
                else "half an answer"
                if answer[:1] == b"{"
                else "something else"
            )
            raise NotClickHouse(200, f"a 200 with {what} where rows were asked for") from error
        if found.exception is not None:
            late = _EXCEPTION.search(found.exception.encode())
            raise ServerError(int(late[1]) if late else 0, found.exception)
        if not found.meta or found.meta[0].get("name") != nonce or found.rows != len(found.data):
            raise NotClickHouse(200, "the answer to another question, as a cache gives it")
        return [tuple(row[1:]) for row in found.data]

    def _request(self, statement: bytes, parameters: Mapping[str, Any], timeout_s: int) -> bytes:
        """One statement that changes nothing, or that may run twice: asked again once if the connection is lost."""
        try:
            answer = self._send(statement, parameters, timeout_s)
        except NoAnswer as error:
            if not error.sent or error.reason.startswith("no answer within"):
                raise
            answer = self._send(statement, parameters, timeout_s)
        self.headers_arrive = _is_own(answer)
        return _checked(answer)

    def _send(
        self, statement: bytes | Iterable[bytes], parameters: Mapping[str, Any], timeout_s: int, *, query_id: str = ""
    ) -> BaseHTTPResponse:
        from urllib3 import Timeout
        from urllib3.exceptions import HTTPError

        wait_s = timeout_s + ANSWER_GRACE_S
        # The answer's status stands for all of it. No proxy needs to pass this on: what comes late is seen as well.
        options = {"database": self.database, "wait_end_of_query": "1", **({"query_id": query_id} if query_id else {})}
        url = f"{self._base}?{urlencode(options)}"
        given: dict[str, Any] = {
            "body": statement,
            "headers": {**self._headers, "Content-Type": "text/plain; charset=utf-8"},
        }
        if parameters:
            # In a form: parameters can be payloads, and URLs are logged on every way.
            given = {"fields": {"query": statement, **parameters}, "headers": self._headers}
        try:
            return self.pool.request(
                "POST",
                url,
                timeout=Timeout(connect=CONNECT_TIMEOUT_S, read=wait_s),
                retries=False,
                redirect=False,
                **given,
            )
        except (HTTPError, OSError, http.client.HTTPException, UnicodeError) as error:
            raise _no_answer(error, self._base.startswith("https"), wait_s, self._proxy) from error


def _is_own(answer: BaseHTTPResponse) -> bool:
    return any(name in answer.headers for name in _OWN_HEADERS)


def _checked(answer: BaseHTTPResponse) -> bytes:
    """The body of an answer that is no error. Raises `ServerError` or `NotClickHouse`."""
    body = answer.data or b""
    code = answer.headers.get(_CODE_HEADER, "")
    found = _EXCEPTION.search(body[-_TAIL_BYTES:])
    if code.isdigit() and int(code):
        raise ServerError(int(code), body.decode(errors="replace"))
    # Without the header: a proxy took it away, or the error came after the status had been sent.
    if found is not None and (answer.status != 200 or found.start() == 0 or b"__exception__" in body[-_TAIL_BYTES:]):
        raise ServerError(int(found[1]), body[-_TAIL_BYTES:][found.start() :].decode(errors="replace"))
    if answer.status != 200:
        raise NotClickHouse(answer.status, _title(answer, body))
    return body


def _title(answer: BaseHTTPResponse, body: bytes) -> str:
    """What answered, as far as it says: never the body, which is somebody else's text."""
    if b"clickhouse-client program" in body:
        return "ClickHouse's native port"
    server = re.sub(r"[^\w./ ()-]", "", answer.headers.get("Server", ""))[:40]
    return f"something else than ClickHouse ({server})" if server else "something else than ClickHouse"


def _settings_named(error: ServerError) -> list[str]:
    """The settings that ClickHouse's refusal of a setting is about. Nothing else of that text is ever used."""
    if error.code not in (UNKNOWN_SETTING, 164, 452):
        return []
    return re.findall(r"(?:[Uu]nknown setting|Setting|Cannot modify) '?(\w+)'?", error.text)


# ── what went wrong, in words ────────────────────────────────────────────────────────────────────


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error and all that lies under it, outermost first."""
    pending, seen = [error], set[int]()
    while pending:
        found = pending.pop(0)
        if found is None or id(found) in seen:
            continue
        seen.add(id(found))
        yield found
        reason = getattr(found, "reason", None)
        within = [argument for argument in found.args if isinstance(argument, BaseException)]
        pending += [
            found.__cause__,
            *([reason] if isinstance(reason, BaseException) else []),
            *within,
            found.__context__,
        ]


def _no_answer(error: BaseException, tls: bool, wait_s: float, proxy: str | None) -> NoAnswer:
    """Why no answer came, and what to check."""
    from urllib3 import exceptions

    causes = [*_causes(error)]

    def among(*kinds: type[BaseException]) -> Any:
        return next((cause for cause in causes if isinstance(cause, kinds)), None)

    port = "that the port is its http_port (8123), not the native one (9000)"
    tls_port = "that the URL begins with https:// only for its https_port (8443)"
    started = among(exceptions.NewConnectionError, exceptions.ConnectTimeoutError) is None
    through = ""
    if proxy:
        through = f" through the proxy {urlsplit(proxy).hostname} that http_proxy or https_proxy names"
    if (refused := among(ssl.SSLCertVerificationError)) is not None:
        return NoAnswer(
            f"its certificate was refused ({refused.verify_message})",
            "Nothing was sent. Let ca_cert in AUDITEXPORT_CLICKHOUSE_URL name the authority that signed it, and the URL a host "
            "name that stands in it",
            sent=False,
            for_good=True,
        )
    if among(socket.gaierror, exceptions.NameResolutionError) is not None:
        return NoAnswer(f"the name does not resolve{through}", "Check the host name and DNS", sent=False)
    if among(ConnectionRefusedError) is not None:
        return NoAnswer(f"connection refused{through}", f"Check that ClickHouse runs and {port}", sent=False)
    if among(exceptions.ConnectTimeoutError) is not None:
        return NoAnswer(
            f"no connection within {CONNECT_TIMEOUT_S} s{through}", "Check the host, and firewalls between", sent=False
        )
    if (broken := among(ssl.SSLError)) is not None:
        reason = str(broken.reason or broken.strerror or "failed").replace("_", " ").lower()
        if any(word in reason for word in ("wrong version number", "record layer", "http request", "packet length")):
            return NoAnswer("the port does not speak TLS", f"Check {tls_port}", sent=False, for_good=True)
        if "certificate" in reason or "handshake failure" in reason:
            return NoAnswer(
                f"TLS: {reason}", "Check client_cert and client_cert_key in AUDITEXPORT_CLICKHOUSE_URL", sent=True
            )
        return NoAnswer(f"TLS: {reason}", f"Check {tls_port}", sent=True)
    if (spoken := among(http.client.BadStatusLine)) is not None and not isinstance(spoken, ConnectionResetError):
        if "\x15\x03" in str(spoken) or r"\x15\x03" in str(spoken):
            return NoAnswer(
                "the port speaks TLS", "Let AUDITEXPORT_CLICKHOUSE_URL begin with https://", sent=False, for_good=True
            )
        return NoAnswer("the port does not speak HTTP", f"Check {port}", sent=False, for_good=True)
    if among(exceptions.ReadTimeoutError, TimeoutError) is not None and started:
        return NoAnswer(
            f"no answer within {wait_s:.0f} s{through}",
            "Check what keeps ClickHouse busy (system.processes), and proxies",
            sent=True,
        )
    if (tunnel := re.search(r"Tunnel connection failed: (\d+)", " ".join(map(str, causes)))) is not None:
        return NoAnswer(
            f"the proxy refused the way{through} (HTTP {tunnel[1]})",
            "Check http_proxy and https_proxy in the environment",
            sent=False,
        )
    if among(ConnectionResetError, BrokenPipeError, http.client.HTTPException, exceptions.ProtocolError) is not None:
        also = "" if tls else ", and, where the port is its https_port (8443), let the URL begin with https://"
        return NoAnswer(
            f"the connection was closed before the answer was whole{through}",
            f"Check that ClickHouse runs{also}",
            sent=True,
        )
    named = among(OSError)
    strerror = (named.strerror if named is not None else None) or type(error).__name__
    return NoAnswer(
        f"{strerror}{through}", "Check host and port in AUDITEXPORT_CLICKHOUSE_URL, and the way there", sent=started
    )


@contextmanager
def translated(what: str, *, sending: bool = False) -> Iterator[None]:
    """The one place where ClickHouse's and HTTP's errors become this project's.

    With `sending`, an error may leave the rows of an INSERT stored; what ClickHouse refused, and what never reached it, is not.
    """
    try:
        yield
    except ServerError as error:
        raise _of_server(error, what, f"ClickHouse at {error.where}", sending) from error
    except NotClickHouse as error:
        raise _of_another(error, what, f"ClickHouse at {error.where}") from error
    except NoAnswer as error:
        place = f"ClickHouse at {error.where}"
        message = f"{place} gave no answer to {what}: {error.reason}. {error.advice}"
        if error.for_good:
            raise SetupIncomplete(message) from error
        if sending and error.sent:
            raise InsertOutcomeUnknown(
                f"{message}; it may or may not be written, the next attempt looks first"
            ) from error
        raise AuditLogUnavailable(f"{message}; run again" + ("; nothing was written" if sending else "")) from error


def _of_server(error: ServerError, what: str, place: str, sending: bool) -> AuditExportError:
    if is_fence(error.code, error.text):
        return LeaseLost(f"ClickHouse refused {what}: the lease of this run had ended; nothing was written")
    if error.code == UNKNOWN_SETTING:
        return SettingsOutdated(
            f"{place} does not know a setting that it listed ({', '.join(_settings_named(error)[:3])}) at {what}; servers of several "
            "versions answer there. Nothing was written; run again"
        )
    if error.code in SETUP_CODES:
        # All that is repeated of its text: what a parser says can quote a payload, a grant and a setting cannot.
        missing = re.search(r"have the grant (.+?)\. \(", error.text) if error.code == _ACCESS_DENIED else None
        lacks = f": the user lacks {missing[1]}" if missing else ""
        if named := _settings_named(error):
            lacks = f": the user may not set {', '.join(named[:3])}"
        return SetupIncomplete(
            f"{place} refuses {what} (code {error.code}, {error.name}{lacks}); check AUDITEXPORT_CLICKHOUSE_URL and the grants, "
            "or run `auditexport init`"
        )
    if sending and error.code in _UNKNOWN_OUTCOMES:
        return InsertOutcomeUnknown(
            f"no answer from {place} to {what} ({error.name}); it may or may not be written, the next attempt looks first"
        )
    return AuditLogUnavailable(f"{place} failed at {what} (code {error.code}, {error.name}); run again")


def _of_another(error: NotClickHouse, what: str, place: str) -> AuditExportError:
    status = error.status
    begin = f"what answered {what} in the place of {place} is not ClickHouse (HTTP {status}, {error.what})"
    if error.what == "ClickHouse's native port":
        return WrongAddress(
            f"{begin}: let the port in AUDITEXPORT_CLICKHOUSE_URL be ClickHouse's http_port (8123, or 8443 for https)",
            status,
        )
    if 300 <= status < 400:
        return WrongAddress(
            f"{begin}: it redirects, which is not followed, for a redirected INSERT loses its rows; nothing was passed on. Let "
            "AUDITEXPORT_CLICKHOUSE_URL name where it leads to",
            status,
        )
    meaning = FOREIGN.get(status)
    if meaning is None:
        meaning = (
            "a maintenance page, a cache or a login; the request may or may not have reached ClickHouse, the next attempt looks first"
            if status < 400
            else "the next attempt looks first; check host and port in AUDITEXPORT_CLICKHOUSE_URL, and the proxies on the way"
        )
    kind = WrongAddress if status in _FOR_GOOD else ForeignAnswer
    return kind(f"{begin}: {meaning}", status)
