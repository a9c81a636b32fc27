"""TLS to both databases: verified whenever it is asked for, and refused in one line that says what to change.

Real certificates of a real authority; a MySQL server of its own that takes nothing but TLS, and a proxy that ends
TLS in front of the ClickHouse that all tests share.
"""

from __future__ import annotations

import select
import socket
import socketserver
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest
import sqlalchemy as sa

from auditexport_pipeline import preflight
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import InvalidConfig, SetupIncomplete
from auditexport_pipeline.core.findings import CheckResult, Finding, all_findings
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local import generator
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.certificates import Authority, Certificate
from auditexport_tests.support.crashes import drain

# 0.0.0.0 reaches this machine and is no loopback address by name: a host beyond it, as far as we can tell.
HERE = ("127.0.0.1", "localhost", "0.0.0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """What the servers show and the clients trust."""

    ours: Path
    others: Path
    server: Certificate
    elsewhere: Certificate
    client: Certificate


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Certificates:
    directory = tmp_path_factory.mktemp("certificates")
    ours, others = Authority(directory, "ours"), Authority(directory, "others")
    return Certificates(
        ours=ours.cert,
        others=others.cert,
        server=ours.issue(*HERE),
        elsewhere=ours.issue("elsewhere.example"),
        client=ours.issue("client"),
    )


# ── MySQL ────────────────────────────────────────────────────────────────────────────────────────


class TLSServer:
    """A MySQL-family server that shows a certificate and logs who got as far as sending a name."""

    def __init__(self, directory: Path, shown: Path, ours: Path) -> None:
        self._shown = shown
        self._log = directory / "general.log"
        self.server = LocalMySQL(
            directory / "mysql",
            options=(
                *(f"--ssl-ca={ours}", f"--ssl-cert={shown / 'shown.crt'}", f"--ssl-key={shown / 'shown.key'}"),
                *("--require-secure-transport=ON", "--general-log=ON", f"--general-log-file={self._log}"),
            ),
        )

    @staticmethod
    def put(shown: Path, certificate: Certificate) -> None:
        (shown / "shown.crt").write_bytes(certificate.cert.read_bytes())
        (shown / "shown.key").write_bytes(certificate.key.read_bytes())

    @contextmanager
    def showing(self, certificate: Certificate, back: Certificate) -> Iterator[None]:
        """Shows another certificate to new connections."""
        self._reload(certificate)
        try:
            yield
        finally:
            self._reload(back)

    def _reload(self, certificate: Certificate) -> None:
        self.put(self._shown, certificate)
        engine = sa.create_engine(self.server.url)
        with engine.connect() as connection:
            connection.exec_driver_sql("FLUSH SSL" if self.server.family == "mariadb" else "ALTER INSTANCE RELOAD TLS")
        engine.dispose()

    def has_heard_of(self, name: str) -> bool:
        return name in self._log.read_text(errors="replace")


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[TLSServer]:
    directory = tmp_path_factory.mktemp("tls")
    TLSServer.put(directory, certificates.server)
    server = TLSServer(directory, directory, certificates.ours)
    with server.server:
        yield server


@pytest.fixture(scope="module")
def tls_stack(tls_server: TLSServer, clickhouse_server: str) -> Iterator[Stack]:
    """Both databases, MySQL's on the server that takes nothing but TLS."""
    with fresh_stack(tls_server.server.url, clickhouse_server) as fresh:
        yield fresh


Connect = Callable[..., MySQLOutbox]


@pytest.fixture
def connect(tls_stack: Stack) -> Iterator[Connect]:
    """The outbox through a URL with these TLS options, on a new connection."""
    opened: list[MySQLOutbox] = []

    def through(host: str = "127.0.0.1", user: str = "root", **options: object) -> MySQLOutbox:
        url = sa.make_url(tls_stack.mysql_url).set(
            host=host, username=user, query={name: str(value) for name, value in options.items()}
        )
        outbox = MySQLOutbox(url.render_as_string(hide_password=False))
        outbox.disconnect()
        opened.append(outbox)
        return outbox

    yield through
    for outbox in opened:
        outbox.disconnect()


def _transport(results: list[CheckResult], server: str) -> tuple[str, tuple[Finding, ...]]:
    (result,) = (result for result in results if result.about == f"{server} transport")
    return result.seen, result.findings


def test_a_drain_runs_to_its_end_over_verified_tls(
    tls_stack: Stack, connect: Connect, certificates: Certificates, clickhouse_server: str
) -> None:
    """The whole way of an event, with both connections as production has them."""
    generator.seed_outbox(tls_stack.mysql_url, seed=7, events=200)
    outbox = connect("0.0.0.0", ssl_ca=certificates.ours)
    with outbox.transaction("asking for the cipher") as connection:
        assert connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Ssl_cipher'").one()[1]
    with TLSProxy(clickhouse_server, certificates.server) as proxy:
        log = proxy.log(tls_stack, "0.0.0.0", ca_cert=certificates.ours)
        results = preflight.examine(outbox, log)
        assert all_findings(results) == []
        assert "certificate and name verified" in _transport(results, "MySQL")[0]
        assert "certificate and name verified" in _transport(results, "ClickHouse")[0]
        drain(outbox, log, Limits(), owner="tls")
        log.client().close_connections()
    assert tls_stack.counts() == (200, 200)
    assert tls_stack.pending() == 0


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_mysqls_certificate_is_refused_before_anything_is_sent(
    tls_stack: Stack, tls_server: TLSServer, connect: Connect, certificates: Certificates, wrong: str
) -> None:
    """Whoever answers in the server's place gets neither the user nor its password, and the operator one line."""
    user = f"refused_{wrong}"
    shown = certificates.elsewhere if wrong == "name" else certificates.server
    with tls_server.showing(shown, back=certificates.server):
        outbox = connect(user=user, ssl_ca=certificates.others if wrong == "authority" else certificates.ours)
        with pytest.raises(SetupIncomplete, match="ssl_ca") as refused:
            preflight.refuse_unless_ready(outbox, tls_stack.log)
        (found,) = preflight.check(outbox, tls_stack.log)
    assert "certificate was refused" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert found.fatal
    assert "ssl_ca" in found.what
    assert not tls_server.has_heard_of(user)


def test_a_user_that_must_show_a_certificate_is_let_in_only_with_it(
    tls_stack: Stack, connect: Connect, certificates: Certificates
) -> None:
    """Mutual TLS: the options for the client's side reach the driver."""
    tls_stack.sql("CREATE USER 'certified'@'127.0.0.1' REQUIRE X509")
    tls_stack.sql(f"GRANT ALL PRIVILEGES ON `{sa.make_url(tls_stack.mysql_url).database}`.* TO 'certified'@'127.0.0.1'")
    shown = {"ssl_cert": certificates.client.cert, "ssl_key": certificates.client.key}
    outbox = connect(user="certified", ssl_ca=certificates.ours, **shown)
    assert preflight.check(outbox, tls_stack.log) == []
    (found,) = preflight.check(connect(user="certified", ssl_ca=certificates.ours), tls_stack.log)
    assert found.fatal
    assert "1045" in found.what


def test_an_unverified_connection_beyond_this_machine_is_a_warning(
    tls_stack: Stack, connect: Connect, certificates: Certificates
) -> None:
    """Each of them works, and lets whoever sits between read events; doctor says so."""
    tls_stack.sql("SET GLOBAL require_secure_transport = OFF")
    try:
        for options, seen, fix in (
            (
                {"ssl_ca": certificates.ours, "ssl_check_hostname": "false"},
                "certificate not verified",
                "remove ssl_check_hostname",
            ),
            ({"ssl_disabled": "true"}, "no TLS", "say ssl_ca="),
        ):
            results = preflight.examine(connect("0.0.0.0", **options), tls_stack.log)
            assert seen in _transport(results, "MySQL")[0]
            (found,) = _transport(results, "MySQL")[1]
            assert not found.fatal
            assert fix in found.fix
    finally:
        tls_stack.sql("SET GLOBAL require_secure_transport = ON")


def test_a_url_without_tls_options_verifies_by_this_machines_authorities(
    tls_stack: Stack, connect: Connect, certificates: Certificates, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The driver by itself would take any certificate; whoever wants that has to say it."""
    with pytest.raises(SetupIncomplete, match="certificate was refused"):
        preflight.refuse_unless_ready(connect("0.0.0.0"), tls_stack.log)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ours))
    # A URL of its own: engines are kept by theirs, and the authorities are read when one is made.
    outbox = connect("0.0.0.0", charset="utf8mb4")
    seen, findings = _transport(preflight.examine(outbox, tls_stack.log), "MySQL")
    assert "name verified" in seen
    assert findings == ()


def test_a_server_that_wants_tls_says_so_in_one_line(tls_stack: Stack, connect: Connect) -> None:
    """No rerun fixes it, so it must not read as a server that is down."""
    with pytest.raises(SetupIncomplete, match="AUDITEXPORT_MYSQL_URL"):
        preflight.refuse_unless_ready(connect(ssl_disabled="true"), tls_stack.log)


def test_a_server_without_tls_is_refused_when_tls_is_asked_for(
    tmp_path: Path, stack: Stack, certificates: Certificates
) -> None:
    """Falling back to plain text is what an attacker would arrange; no rerun fixes it either."""
    server = LocalMySQL(tmp_path / "plain", options=("--skip-ssl",))
    if server.family == "mysql":
        server = LocalMySQL(tmp_path / "plain", options=("--tls-version=",))
    with server:
        beyond = server.url.replace("127.0.0.1", "0.0.0.0")
        for url in (f"{server.url}mysql?ssl_ca={certificates.ours}", f"{beyond}mysql"):
            outbox = MySQLOutbox(url)
            with pytest.raises(SetupIncomplete, match="no TLS"):
                preflight.refuse_unless_ready(outbox, stack.log)
            outbox.disconnect()


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ("ssl_cert=/a.pem&ssl_key=/b.pem", "ssl_ca"),
        ("ssl_ca=/a.pem&ssl_verify_cert=false", "ssl_verify_cert"),
        ("ssl_ca=/a.pem&ssl_verify_identity=true", "ssl_verify_identity"),
        ("ssl_ca=/a.pem&ssl_mode=REQUIRED", "ssl_mode"),
        ("ssl_ca=/a.pem&ssl_disabled=true", "ssl_disabled"),
        ("ssl_disabled=false", "ssl_disabled"),
        ("ssl_ca=/a.pem&ssl_check_hostname=perhaps", "ssl_check_hostname"),
        ("sslca=/a.pem", "sslca"),
        ("ssl_ca=", "ssl_ca without a value"),
    ],
)
def test_an_option_that_would_quietly_turn_verification_off_is_refused(options: str, named: str) -> None:
    """PyMySQL drops the ssl_ca beside ssl_verify_cert and takes ssl_disabled=false for true: seen, both."""
    with pytest.raises(InvalidConfig, match=named) as refused:
        MySQLOutbox(f"mysql+pymysql://u:hunter2@db/app?{options}")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_an_authority_file_that_is_none_is_named(tls_stack: Stack, tmp_path: Path, content: str | None) -> None:
    """A wrong path in a deployment is found by its name in the message, not by a traceback."""
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidConfig, match="ssl_ca"):
        preflight.check(MySQLOutbox(f"{tls_stack.mysql_url}?ssl_ca={path}"), tls_stack.log)
    https = tls_stack.clickhouse_url.replace("http://", "https://", 1)
    with pytest.raises(InvalidConfig, match="ca_cert"):
        preflight.check(tls_stack.outbox, ClickHouseAuditLog(f"{https}?ca_cert={path}"))


# ── ClickHouse ───────────────────────────────────────────────────────────────────────────────────


class TLSProxy:
    """Ends TLS before a ClickHouse and counts the connections whose handshake the client completed.

    A thread for each connection, which all end with the proxy.
    """

    def __init__(self, server_url: str, shown: Certificate, *, clients_of: Path | None = None) -> None:
        self._behind = urlsplit(server_url)
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(shown.cert, shown.key)
        if clients_of is not None:
            self._context.load_verify_locations(clients_of)
            self._context.verify_mode = ssl.CERT_REQUIRED
        self.connections = 0
        self.received = bytearray()
        self._open: set[socket.socket] = set()

        class Server(socketserver.ThreadingTCPServer):
            def get_request(server) -> tuple[ssl.SSLSocket, object]:  # noqa: N805
                # In the accepting thread: once that has ended, every connection is known.
                accepted, address = super().get_request()
                client = self._context.wrap_socket(accepted, server_side=True, do_handshake_on_connect=False)
                self._open.add(client)
                return client, address

        class Connection(socketserver.BaseRequestHandler):
            def handle(connection) -> None:  # noqa: N805
                # A handshake that a client breaks off is what is being tested, not an error.
                with suppress(OSError):
                    self._serve(connection.request)

        self._server = Server(("127.0.0.1", 0), Connection)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,))

    def log(self, stack: Stack, host: str = "127.0.0.1", **options: object) -> ClickHouseAuditLog:
        """The stack's ClickHouse database, through this proxy."""
        parts = urlsplit(stack.clickhouse_url)
        login = parts.netloc.rpartition("@")[0] or "default"
        query = "&".join(f"{name}={value}" for name, value in options.items())
        port = self._server.server_address[1]
        return ClickHouseAuditLog(f"https://{login}@{host}:{port}{parts.path}?{query}")

    def __enter__(self) -> TLSProxy:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._thread.join()
        for one in list(self._open):
            with suppress(OSError):
                socket.socket.shutdown(one, socket.SHUT_RDWR)
        self._server.server_close()  # waits for every connection's thread

    def _serve(self, client: ssl.SSLSocket) -> None:
        try:
            client.do_handshake()
            self.connections += 1
            with self._connection_behind() as behind:
                self._forward(client, behind)
        finally:
            self._open.discard(client)
            client.close()

    def _connection_behind(self) -> socket.socket:
        assert self._behind.hostname is not None
        plain = socket.create_connection((self._behind.hostname, self._behind.port or 0))
        if self._behind.scheme != "https":
            return plain
        return ssl.create_default_context().wrap_socket(plain, server_hostname=self._behind.hostname)

    def _forward(self, client: ssl.SSLSocket, behind: socket.socket) -> None:
        while True:
            for source in [client] if client.pending() else select.select([client, behind], [], [])[0]:
                data = source.recv(65536)
                if not data:
                    return
                if source is client:
                    self.received += data
                (behind if source is client else client).sendall(data)


@pytest.mark.parametrize("wrong", ["no authority", "authority", "name"])
def test_clickhouses_certificate_is_refused_before_anything_is_sent(
    stack: Stack, clickhouse_server: str, certificates: Certificates, wrong: str
) -> None:
    """Verified by default: https:// without another word trusts the machine's authorities and nobody else."""
    shown = certificates.elsewhere if wrong == "name" else certificates.server
    trusted = {"no authority": None, "authority": certificates.others, "name": certificates.ours}[wrong]
    stack.put(("ws_1", "evt_1", "{}"))
    with TLSProxy(clickhouse_server, shown) as proxy:
        log = proxy.log(stack, **({"ca_cert": trusted} if trusted else {}))
        with pytest.raises(SetupIncomplete, match="ca_cert") as refused:
            preflight.refuse_unless_ready(stack.outbox, log)
        (found,) = preflight.check(stack.outbox, log)
        assert proxy.connections == 0
    assert "certificate was refused" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert found.fatal
    assert "ca_cert" in found.what
    assert stack.pending() == 1


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # urllib3 says so too, at every request
def test_verification_that_is_turned_off_is_a_warning(
    stack: Stack, clickhouse_server: str, certificates: Certificates
) -> None:
    """It is how somebody gets a trial going, and how it then stays."""
    with TLSProxy(clickhouse_server, certificates.elsewhere) as proxy:
        log = proxy.log(stack, "0.0.0.0", verify="false")
        (found,) = preflight.check(stack.outbox, log)
        assert "certificate not verified" in found.what
        assert "verify=false" in found.fix
        assert not found.fatal
        log.client().close_connections()


def test_a_clients_certificate_and_the_password_both_reach_clickhouse(
    stack: Stack, clickhouse_server: str, certificates: Certificates
) -> None:
    """Beside a certificate the driver drops the password, unless told that both are meant."""
    with TLSProxy(clickhouse_server, certificates.server, clients_of=certificates.ours) as proxy:
        shown = {"client_cert": certificates.client.cert, "client_cert_key": certificates.client.key}
        log = proxy.log(stack, ca_cert=certificates.ours, **shown)
        assert preflight.check(stack.outbox, log) == []
        assert proxy.connections > 0
        assert b"X-ClickHouse-SSL-Certificate-Auth: on" in proxy.received
        log.client().close_connections()
        proxy.received.clear()
        both = ClickHouseAuditLog(log.url.replace("default@", "default:hunter2@"))
        (found,) = preflight.check(stack.outbox, both)
        assert "516" in found.what
        assert b"Authorization: Basic" in proxy.received
        assert b"X-ClickHouse-SSL-Certificate-Auth" not in proxy.received
        (found,) = preflight.check(stack.outbox, proxy.log(stack, ca_cert=certificates.ours))
        assert found.fatal
