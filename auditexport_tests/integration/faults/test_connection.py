"""No answer from ClickHouse: host, port, reason and what to check, wherever somebody reads of it.

What belongs here: connections that fail and URLs that are wrong. What does not: answers that are somebody else's
(`test_answers`), and certificates in full (`integration.setup.test_tls`).
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
import socket
import threading
from collections.abc import Iterator
from urllib.parse import quote

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.processes import free_port
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import Sensor as AlertSensor
from auditexport_tests.integration.dagster.conftest import Exporter, events
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request
from auditexport_tests.support.prompts import prompt_in, urls
from auditexport_tests.support.webhook import Webhook

SECRET = "hunter2"


@contextlib.contextmanager
def _answering(text: bytes, *, at_once: bool = False) -> Iterator[int]:
    """A port that answers every connection with this, once it was asked something or at once, and closes it."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()

    def serve() -> None:
        while not ended.is_set():
            with contextlib.suppress(OSError):
                client, _ = listener.accept()
                with client:
                    client.settimeout(5)
                    if not at_once:
                        client.recv(65_536)
                    client.sendall(text)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()
    try:
        yield listener.getsockname()[1]
    finally:
        ended.set()
        with contextlib.suppress(OSError):
            socket.create_connection(listener.getsockname(), timeout=1).close()
        listener.close()
        thread.join()


NATIVE = b"HTTP/1.0 400 Bad Request\r\n\r\nPort 9000 is for clickhouse-client program\r\nYou must use port 8123 for HTTP.\r\n"


def _trouble(kind: str, stack: Stack, stop: contextlib.ExitStack) -> tuple[str, str, str]:
    """A URL that fails in this way, its host and port, and what the message has to say."""
    if kind == "refused":
        port = free_port()
        return f"http://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "connection refused"
    if kind == "unknown name":
        return f"http://u:{SECRET}@nowhere.invalid:8123/d", "nowhere.invalid:8123", "the name does not resolve"
    if kind == "native port":
        port = stop.enter_context(_answering(NATIVE))
        return f"http://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "http_port (8123"
    if kind == "mysql":
        match = re.search(r"@([^/:]+):(\d+)/", stack.mysql_url)
        assert match is not None
        return f"http://u:{SECRET}@127.0.0.1:{match[2]}/d", f"127.0.0.1:{match[2]}", "does not speak HTTP"
    if kind == "tls on a plain port":
        place = stack.clickhouse_url.split("@")[1].split("/")[0]
        return f"https://u:{SECRET}@{place}/d", place, "does not speak TLS"
    if kind == "closed":
        port = stop.enter_context(_answering(b""))
        return f"http://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "was closed before the answer"
    port = stop.enter_context(
        _answering(b"HTTP/1.1 502 Bad Gateway\r\nServer: haproxy\r\nContent-Length: 4\r\n\r\noops")
    )
    return f"http://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "could not reach ClickHouse"


KINDS = ("refused", "unknown name", "native port", "mysql", "tls on a plain port", "closed", "gateway")


@pytest.mark.parametrize("kind", KINDS)
def test_a_failed_connection_says_where_why_and_what_to_check(stack: Stack, kind: str) -> None:
    """'ClickHouse failed (no code); run again' names nothing that a person could look at."""
    with contextlib.ExitStack() as stop:
        url, place, reason = _trouble(kind, stack, stop)
        log = ClickHouseAuditLog(url)
        (found,) = [found for found in preflight.check(stack.outbox, log) if "ClickHouse" in found.what]
        said = ""
        try:
            preflight.refuse_unless_ready(stack.outbox, log)
        except AuditExportError as error:
            said = str(error)
    for text in (found.what, said):
        assert place in text
        assert reason in text
        assert SECRET not in text


def test_the_prompt_says_it_too(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a drain prints is all that its operator sees."""
    port = free_port()
    elsewhere = {**urls(stack), "AUDITEXPORT_CLICKHOUSE_URL": f"http://u:{SECRET}@127.0.0.1:{port}/d"}
    done = prompt_in(elsewhere, monkeypatch)("drain", status=2)
    assert f"127.0.0.1:{port}" in done.output
    assert "connection refused" in done.output
    assert SECRET not in done.output
    assert "Traceback" not in done.output


def _mysql_trouble(kind: str, stack: Stack, stop: contextlib.ExitStack) -> tuple[str, str, str]:
    """The same of MySQL."""
    if kind == "refused":
        port = free_port()
        return f"mysql+pymysql://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "connection refused"
    if kind == "unknown name":
        return f"mysql+pymysql://u:{SECRET}@nowhere.invalid:3306/d", "nowhere.invalid:3306", "the name does not resolve"
    if kind == "not mysql":
        port = stop.enter_context(_answering(b"SSH-2.0-OpenSSH_9.6\r\n", at_once=True))
        return f"mysql+pymysql://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "is not MySQL"
    port = stop.enter_context(_answering(b"", at_once=True))
    return f"mysql+pymysql://u:{SECRET}@127.0.0.1:{port}/d", f"127.0.0.1:{port}", "the connection was closed"


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(
    ("server", "kind"),
    [
        *(("clickhouse", kind) for kind in KINDS),
        *(("mysql", kind) for kind in ("refused", "unknown name", "not mysql", "closed")),
    ],
)
def test_runs_notices_and_doctor_say_the_same(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch, server: str, kind: str
) -> None:
    """Whoever is called reads one of them, and must not have to find the others to know which host it is."""
    alerts = AlertSensor(exporter, stack, "run_alerts")
    alerts.tick()
    hook.bodies.clear()
    with contextlib.ExitStack() as stop:
        url, place, reason = (_trouble if server == "clickhouse" else _mysql_trouble)(kind, stack, stop)
        monkeypatch.setenv(f"AUDITEXPORT_{server.upper()}_URL", url)
        monkeypatch.setenv("COLUMNS", "1000")
        run_id = exporter.drain(raise_on_error=False).run_id
        doctor = CliRunner().invoke(main, ["doctor", "--json"])
        shown = CliRunner().invoke(main, ["doctor"]).output
        monkeypatch.setenv(f"AUDITEXPORT_{server.upper()}_URL", getattr(stack, f"{server}_url"))
    (line,) = exporter.failures(run_id)
    alerts.tick()
    (notice,) = hook.texts()
    (finding,) = [
        found
        for look in json.loads(doctor.output)["looks"]
        if look["about"].lower() == f"{server} connection"
        for found in look["findings"]
    ]
    assert finding["what"] == line
    for said in (line, notice, finding["what"], shown):
        assert place in said
        assert reason in said
        assert "heck" in said or "See that" in said or "Let AUDITEXPORT" in said or "let the port" in said, said
    stored = str([record.dagster_event or record.user_message for record in exporter.instance.all_logs(run_id)])
    for said in (notice, doctor.output, shown, stored):
        assert SECRET not in said


@pytest.mark.parametrize(
    "password", ["zażółć€", "pässwörd", "🔑", "a:b@c/d?e#f%"], ids=["latin2", "latin1", "emoji", "signs"]
)
def test_any_password_reaches_clickhouse_as_utf8(stack: Stack, password: str) -> None:
    """A password is bytes to ClickHouse, whatever an HTTP library takes headers for."""
    stack.put(*events(2))
    shown = stack.clickhouse_url.replace("default@", f"default:{quote(password, safe='')}@")
    with HttpProxy(shown) as proxy:
        seen: set[bytes] = set()

        def watching(request: Request, forward: Forward) -> Answer:
            # The embedded server has one user, without a password.
            seen.add(base64.b64decode(request.headers.pop("Authorization").removeprefix("Basic ")))
            return forward(request)

        proxy.habit = watching
        drain(stack.outbox, ClickHouseAuditLog(proxy.url), Limits(), owner="run")
    assert seen == {f"default:{password}".encode()}
    assert stack.counts() == (2, 2)


@pytest.mark.parametrize(
    "url",
    [
        "http://h:0/d",
        "http://h:99999/d",
        "http://[::1/d",
        f"http://{'a' * 70}/d",
        "http://h/d?ca_cert=",
        "https://h/d?ca_cert=%00",
        "https://h/d?client_cert_key=/dev/null",
        "https://h/d?client_cert=/",
        "https://h/d?ca_cert=/",
        "https://h/d?ca_cert=/dev/null",
        "http://h/d?insert_quorum=many",
        "http://h/d?" + "&".join(f"o{n}=1" for n in range(99)),
        "http://h x/d",
    ],
)
def test_no_url_ends_in_a_traceback(stack: Stack, url: str) -> None:
    """A typing error in an environment is said in one line, not in forty of a library's."""
    try:
        found = preflight.check(stack.outbox, ClickHouseAuditLog(url))
        raised = "none" if not found else "finding"
    except Exception as error:
        raised = type(error).__name__
    assert raised == "InvalidConfig"
