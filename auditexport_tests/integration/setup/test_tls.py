"""TLS to both databases: verified by default, and refused in one line that says what to change.

Certificates and authority are real; MySQL is a server that takes only TLS, and a proxy ends TLS in front of the
ClickHouse that all tests share.
"""

from __future__ import annotations

import ssl
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
from auditexport_tests.support.http_proxy import HttpProxy

# 0.0.0.0 reaches this machine and is no loopback address by name: a host beyond it, as far as we can tell.
HERE = ("127.0.0.1", "localhost", "0.0.0.0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Certificates:
    """Those of the servers and of a client, and the authorities."""

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
    """A MySQL-family server with a certificate, and a log of the user names that it received."""

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
    def install(shown: Path, certificate: Certificate) -> None:
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
        self.install(self._shown, certificate)
        engine = sa.create_engine(self.server.url)
        with engine.connect() as connection:
            connection.exec_driver_sql("FLUSH SSL" if self.server.family == "mariadb" else "ALTER INSTANCE RELOAD TLS")
        engine.dispose()

    def received(self, name: str) -> bool:
        return name in self._log.read_text(errors="replace")


@pytest.fixture(scope="module")
def tls_server(tmp_path_factory: pytest.TempPathFactory, certificates: Certificates) -> Iterator[TLSServer]:
    directory = tmp_path_factory.mktemp("tls")
    TLSServer.install(directory, certificates.server)
    server = TLSServer(directory, directory, certificates.ours)
    with server.server:
        yield server


@pytest.fixture(scope="module")
def tls_stack(tls_server: TLSServer, clickhouse_server: str) -> Iterator[Stack]:
    """Both databases, MySQL's on the server that takes only TLS."""
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
    """With both connections as in production."""
    generator.seed_outbox(tls_stack.mysql_url, seed=7, events=200)
    outbox = connect("0.0.0.0", ssl_ca=certificates.ours)
    with outbox.transaction("asking for the cipher") as connection:
        assert connection.exec_driver_sql("SHOW SESSION STATUS LIKE 'Ssl_cipher'").one()[1]
    with tls_proxy(clickhouse_server, certificates.server) as proxy:
        log = through(proxy, tls_stack, "0.0.0.0", ca_cert=certificates.ours)
        results = preflight.examine(outbox, log)
        assert all_findings(results) == []
        assert "certificate and name verified" in _transport(results, "MySQL")[0]
        assert "certificate and name verified" in _transport(results, "ClickHouse")[0]
        drain(outbox, log, Limits(), owner="tls")
    assert tls_stack.counts() == (200, 200)
    assert tls_stack.pending() == 0


@pytest.mark.parametrize("wrong", ["authority", "name"])
def test_mysqls_certificate_is_refused_before_anything_is_sent(
    tls_stack: Stack, tls_server: TLSServer, connect: Connect, certificates: Certificates, wrong: str
) -> None:
    """A false server gets neither the user nor its password, and the operator one line."""
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
    assert not tls_server.received(user)


def test_a_user_with_a_required_certificate_connects_only_with_it(
    tls_stack: Stack, connect: Connect, certificates: Certificates
) -> None:
    """Mutual TLS: the client's options reach the driver."""
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
    """Each of them works, and a proxy in between could read events."""
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
    """The driver's default takes any certificate."""
    with pytest.raises(SetupIncomplete, match="certificate was refused"):
        preflight.refuse_unless_ready(connect("0.0.0.0"), tls_stack.log)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificates.ours))
    # A URL of its own: engines are kept by theirs, and the authorities are read when one is made.
    outbox = connect("0.0.0.0", charset="utf8mb4")
    seen, findings = _transport(preflight.examine(outbox, tls_stack.log), "MySQL")
    assert "name verified" in seen
    assert findings == ()


def test_a_server_that_wants_tls_says_so_in_one_line(tls_stack: Stack, connect: Connect) -> None:
    """A rerun does not help, so it must not read like a server that is down."""
    with pytest.raises(SetupIncomplete, match="AUDITEXPORT_MYSQL_URL"):
        preflight.refuse_unless_ready(connect(ssl_disabled="true"), tls_stack.log)


def test_a_server_without_tls_is_refused_when_tls_is_asked_for(
    tmp_path: Path, stack: Stack, certificates: Certificates
) -> None:
    """An attacker could make a client fall back to plain text; a rerun does not help either."""
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
    """PyMySQL ignores ssl_ca beside ssl_verify_cert, and takes ssl_disabled=false for true."""
    with pytest.raises(InvalidConfig, match=named) as refused:
        MySQLOutbox(f"mysql+pymysql://u:hunter2@db/app?{options}")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize("content", [None, "not a certificate"])
def test_an_authority_file_that_is_none_is_named(tls_stack: Stack, tmp_path: Path, content: str | None) -> None:
    """The message names the file of a wrong path, instead of a traceback."""
    path = tmp_path / "authority.pem"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InvalidConfig, match="ssl_ca"):
        preflight.check(MySQLOutbox(f"{tls_stack.mysql_url}?ssl_ca={path}"), tls_stack.log)
    https = tls_stack.clickhouse_url.replace("http://", "https://", 1)
    with pytest.raises(InvalidConfig, match="ca_cert"):
        preflight.check(tls_stack.outbox, ClickHouseAuditLog(f"{https}?ca_cert={path}"))


# ── ClickHouse ───────────────────────────────────────────────────────────────────────────────────


def tls_proxy(url: str, certificate: Certificate, *, clients_of: Path | None = None) -> HttpProxy:
    """Ends TLS before a ClickHouse; with `clients_of`, only for clients with a certificate of that authority."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate.cert, certificate.key)
    if clients_of is not None:
        context.load_verify_locations(clients_of)
        context.verify_mode = ssl.CERT_REQUIRED
    return HttpProxy(url, tls=context)


def through(proxy: HttpProxy, stack: Stack, host: str = "127.0.0.1", **options: object) -> ClickHouseAuditLog:
    """The stack's ClickHouse database, through this proxy."""
    parts = urlsplit(stack.clickhouse_url)
    login = parts.netloc.rpartition("@")[0] or "default"
    query = "&".join(f"{name}={value}" for name, value in options.items())
    return ClickHouseAuditLog(f"https://{login}@{host}:{proxy.port}{parts.path}?{query}")


@pytest.mark.parametrize("wrong", ["no authority", "authority", "name"])
def test_clickhouses_certificate_is_refused_before_anything_is_sent(
    stack: Stack, clickhouse_server: str, certificates: Certificates, wrong: str
) -> None:
    """Verified by default: https:// without options trusts only the machine's authorities."""
    shown = certificates.elsewhere if wrong == "name" else certificates.server
    trusted = {"no authority": None, "authority": certificates.others, "name": certificates.ours}[wrong]
    stack.put(("ws_1", "evt_1", "{}"))
    with tls_proxy(clickhouse_server, shown) as proxy:
        log = through(proxy, stack, **({"ca_cert": trusted} if trusted else {}))
        with pytest.raises(SetupIncomplete, match="ca_cert") as refused:
            preflight.refuse_unless_ready(stack.outbox, log)
        (found,) = preflight.check(stack.outbox, log)
        assert proxy.requests == []
    assert "certificate was refused" in str(refused.value)
    assert "\n" not in str(refused.value)
    assert found.fatal
    assert "ca_cert" in found.what
    assert stack.pending() == 1


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")  # urllib3 says so too, at every request
def test_verification_that_is_turned_off_is_a_warning(
    stack: Stack, clickhouse_server: str, certificates: Certificates
) -> None:
    """Settings of a trial often reach production."""
    with tls_proxy(clickhouse_server, certificates.elsewhere) as proxy:
        log = through(proxy, stack, "0.0.0.0", verify="false")
        (found,) = preflight.check(stack.outbox, log)
        assert "certificate not verified" in found.what
        assert "verify=false" in found.fix
        assert not found.fatal


def test_a_clients_certificate_and_the_password_both_reach_clickhouse(
    stack: Stack, clickhouse_server: str, certificates: Certificates
) -> None:
    """Beside a certificate the driver sends no password by default."""
    with tls_proxy(clickhouse_server, certificates.server, clients_of=certificates.ours) as proxy:
        shown = {"client_cert": certificates.client.cert, "client_cert_key": certificates.client.key}
        log = through(proxy, stack, ca_cert=certificates.ours, **shown)
        assert preflight.check(stack.outbox, log) == []
        assert {request.headers.get("X-ClickHouse-SSL-Certificate-Auth") for request in proxy.requests} == {"on"}
        proxy.requests.clear()
        both = ClickHouseAuditLog(log.url.replace("default@", "default:hunter2@"))
        (found,) = preflight.check(stack.outbox, both)
        assert "516" in found.what
        for request in proxy.requests:
            assert request.headers["Authorization"].startswith("Basic")
            assert "X-ClickHouse-SSL-Certificate-Auth" not in request.headers
        (found,) = preflight.check(stack.outbox, through(proxy, stack, ca_cert=certificates.ours))
        assert found.fatal
