"""Databases that do not answer: host, port, reason and what to check, in every message.

What belongs here: connections that fail and URLs that are wrong. What does not: answers of other programs
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
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.processes import free_port
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import Sensor as AlertSensor
from auditexport_tests.integration.dagster.conftest import Exporter, events
from auditexport_tests.support.builders import everything_once
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request
from auditexport_tests.support.webhook import Webhook

SECRET = "hunter2"


@contextlib.contextmanager
def _answering(text: bytes, *, at_once: bool = False) -> Iterator[int]:
    """A port that answers every connection with this, after its first bytes or at once, and closes it."""
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
GATEWAY = b"HTTP/1.1 502 Bad Gateway\r\nServer: haproxy\r\nContent-Length: 4\r\n\r\noops"
# By server and kind of failure: what answers there (None: nothing), and words of the message.
FAILURES: dict[tuple[str, str], tuple[bytes | None, str]] = {
    ("clickhouse", "refused"): (None, "connection refused"),
    ("clickhouse", "unknown name"): (None, "the name does not resolve"),
    ("clickhouse", "native port"): (NATIVE, "http_port (8123"),
    ("clickhouse", "mysql"): (None, "does not speak HTTP"),
    ("clickhouse", "tls on a plain port"): (None, "does not speak TLS"),
    ("clickhouse", "closed"): (b"", "was closed before the answer"),
    ("clickhouse", "gateway"): (GATEWAY, "could not reach ClickHouse"),
    ("mysql", "refused"): (None, "connection refused"),
    ("mysql", "unknown name"): (None, "the name does not resolve"),
    ("mysql", "not mysql"): (b"SSH-2.0-OpenSSH_9.6\r\n", "is not MySQL"),
    ("mysql", "closed"): (b"", "the connection was closed"),
}


def failing(server: str, kind: str, stack: Stack, stop: contextlib.ExitStack) -> tuple[str, str]:
    """A URL that fails in this way, and its host and port."""
    answer, _ = FAILURES[server, kind]
    if answer is not None:
        place = f"127.0.0.1:{stop.enter_context(_answering(answer, at_once=server == 'mysql'))}"
    elif kind == "unknown name":
        place = "nowhere.invalid:1234"
    elif kind == "refused":
        place = f"127.0.0.1:{free_port()}"
    else:
        place = (stack.mysql_url if kind == "mysql" else stack.clickhouse_url).split("@")[1].split("/")[0]
    scheme = "mysql+pymysql" if server == "mysql" else "https" if kind.startswith("tls") else "http"
    return f"{scheme}://u:{SECRET}@{place}/d", place


@pytest.mark.parametrize(("server", "kind"), FAILURES)
def test_a_failed_connection_says_where_why_and_what_to_check(stack: Stack, server: str, kind: str) -> None:
    """'ClickHouse failed (no code); run again' would name nothing that a person could check."""
    with contextlib.ExitStack() as stop:
        url, place = failing(server, kind, stack, stop)
        outbox, log = (MySQLOutbox(url), stack.log) if server == "mysql" else (stack.outbox, ClickHouseAuditLog(url))
        (result,) = [one for one in preflight.examine(outbox, log) if one.about.lower() == f"{server} connection"]
        with pytest.raises(AuditExportError) as refused:
            preflight.refuse_unless_ready(outbox, log)
    for text in (result.findings[0].what, str(refused.value)):
        assert place in text
        assert FAILURES[server, kind][1] in text
        assert re.search("[Cc]heck|See that|Let AUDITEXPORT|let the port", text)
        assert SECRET not in text


@pytest.mark.usefixtures("no_waits")
@pytest.mark.parametrize(("server", "kind"), [("clickhouse", "gateway"), ("mysql", "refused")])
def test_runs_notices_and_doctor_say_the_same(
    exporter: Exporter, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch, server: str, kind: str
) -> None:
    """An operator reads one of them, and must not have to find the others to know which host it is."""
    alerts = AlertSensor(exporter, stack, "run_alerts")
    alerts.tick()
    hook.bodies.clear()
    with contextlib.ExitStack() as stop:
        url, place = failing(server, kind, stack, stop)
        monkeypatch.setenv(f"AUDITEXPORT_{server.upper()}_URL", url)
        monkeypatch.setenv("COLUMNS", "1000")
        run_id = exporter.drain(raise_on_error=False).run_id
        doctor, shown, drain = (
            CliRunner().invoke(main, words).output for words in (["doctor", "--json"], ["doctor"], ["drain"])
        )
        monkeypatch.setenv(f"AUDITEXPORT_{server.upper()}_URL", getattr(stack, f"{server}_url"))
    (line,) = exporter.failures(run_id)
    alerts.tick()
    (notice,) = hook.texts()
    (what,) = [
        found["what"]
        for check in json.loads(doctor)["looks"]
        if check["about"].lower() == f"{server} connection"
        for found in check["findings"]
    ]
    assert what == line
    for text in (line, notice, shown, drain):
        assert place in text
        assert FAILURES[server, kind][1] in text
    stored = str([record.dagster_event or record.user_message for record in exporter.instance.all_logs(run_id)])
    for text in (notice, doctor, shown, drain, stored):
        assert SECRET not in text
        assert "Traceback" not in text


@pytest.mark.parametrize(
    "password", ["zażółć€", "pässwörd", "🔑", "a:b@c/d?e#f%"], ids=["latin2", "latin1", "emoji", "signs"]
)
def test_any_password_reaches_clickhouse_as_utf8(stack: Stack, password: str) -> None:
    """A password is bytes to ClickHouse, whatever encoding an HTTP library uses for headers."""
    stack.put(*events(2))
    url = stack.clickhouse_url.replace("default@", f"default:{quote(password, safe='')}@")
    seen: set[bytes] = set()

    def watching(request: Request, forward: Forward) -> Answer:
        # The embedded server has one user, without a password.
        seen.add(base64.b64decode(request.headers.pop("Authorization").removeprefix("Basic ")))
        return forward(request)

    with HttpProxy(url, watching) as proxy:
        drain(stack.outbox, ClickHouseAuditLog(proxy.url), Limits(), owner="run")
    assert seen == {f"default:{password}".encode()}
    everything_once(stack, 2)


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
def test_no_url_ends_in_a_traceback(module_stack: Stack, url: str) -> None:
    """A typing error in an environment is one line, not forty of a library's."""
    with pytest.raises(InvalidConfig):
        preflight.check(module_stack.outbox, ClickHouseAuditLog(url))
