"""What an error of MySQL's says to its reader, and which of them are worth another run.

What belongs here: the CLI's answers to real errors of real servers, to URLs and to hosts. What does not: what a session
states (`test_sessions`).
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events

pytestmark = pytest.mark.mysql_sensitive

LEDGER = "clickhouse_outbox_batch"
LETTERS = "clickhouse_outbox_dead_letter"


@pytest.fixture
def command(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Result]:
    """`auditexport …` with a URL of MySQL's; a traceback is a failure of its own."""

    def run(*words: str, url: str = stack.mysql_url) -> Result:
        monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", url)
        monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
        done = CliRunner().invoke(main, list(words))
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        return done

    return run


@contextmanager
def user(stack: Stack, password: str, *after: str) -> Iterator[str]:
    """A URL of a user of its own, with every right on the database."""
    from sqlalchemy.engine import make_url

    parts = make_url(stack.mysql_url)
    name = str(parts.database)
    stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY '{password}'")
    stack.sql(f"GRANT ALL ON {name}.* TO '{name}'@'127.0.0.1'")
    for statement in after:
        stack.sql(statement.format(user=f"'{name}'@'127.0.0.1'"))
    try:
        yield parts.set(username=name, password=password).render_as_string(hide_password=False)
    finally:
        stack.sql(f"DROP USER '{name}'@'127.0.0.1'")


# ── errors that stay until somebody changes something ───────────────────────────────────────────


@pytest.mark.parametrize("trigger", ["signals", "undefined"])
def test_a_trigger_that_refuses_is_named_in_the_servers_words(
    stack: Stack, command: Callable[..., Result], trigger: str
) -> None:
    """A rerun meets the same trigger: "run again" would keep an operator from it."""
    stack.put(*events(3))
    definer, body, words = {
        "signals": ("", "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no batches today'", "no batches today"),
        "undefined": ("DEFINER = 'gone'@'nowhere'", "SET @seen = NEW.batch_id", "gone"),
    }[trigger]
    stack.sql(f"CREATE {definer} TRIGGER refuse BEFORE INSERT ON {LEDGER} FOR EACH ROW {body}")
    done = command("drain")
    assert (done.exit_code != 0, words in done.output, "run again" in done.output) == (True, True, False), done.output


@pytest.mark.parametrize("account", ["ACCOUNT LOCK", "PASSWORD EXPIRE"])
def test_an_account_that_is_closed_is_no_outage(stack: Stack, command: Callable[..., Result], account: str) -> None:
    """A locked account answers at once and for ever."""
    with user(stack, "x", f"ALTER USER {{user}} {account}") as url:
        done = command("status", url=url)
    assert (done.exit_code != 0, "MySQL refuses" in done.output, "run again" in done.output) == (True, True, False)


def test_words_that_quote_a_value_stay_out_of_messages(stack: Stack, command: Callable[..., Result]) -> None:
    """A server's error can repeat what it was given: ids here, payloads elsewhere."""
    stack.put(("ws", "evt_secret_1", '{"a": 1}'), ("ws", "evt_secret_1", '{"a": 2}'))
    stack.sql("CREATE TABLE twice (event_id VARCHAR(99) PRIMARY KEY) ENGINE = InnoDB")
    stack.sql(f"CREATE TRIGGER twice BEFORE INSERT ON {LETTERS} FOR EACH ROW INSERT INTO twice VALUES (NEW.event_id)")
    done = command("drain")
    assert ("1062" in done.output, "evt_secret_1" in done.output) == (True, False), done.output


# ── the URL ─────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("password", ["zażółć€", "pässwörd", "пароль😀", "a%b@c:d/e?f#g"])
def test_a_password_of_any_script_works(stack: Stack, command: Callable[..., Result], password: str) -> None:
    """The driver knows Latin-1 alone: other passwords were a traceback, or access denied."""
    with user(stack, password) as url:
        done = command("status", url=url)
    assert (done.exit_code, "refuses" in done.output) == (0, False), done.output


@pytest.mark.parametrize(
    "wrong",
    [
        "mysql+pymysql://u:hidden@127.0.0.1/db?foo=bar",
        "mysql+pymysql://u:hidden@127.0.0.1/db?charset=nonsense",
        "mysql+pymysql://u:hidden@127.0.0.1/db?charset=utf8mb4&charset=utf8mb4",
        "mysql+pymysql://u:hidden@127.0.0.1/db?connect_timeout=abc",
        "mysql+pymysql://u:hidden@127.0.0.1/db?connect_timeout=0",
        "mysql+pymysql://u:hidden@127.0.0.1/db?read_timeout=",
        "mysql+pymysql://u:hidden@127.0.0.1/db?read_timeout=-1",
        "mysql+pymysql://u:hidden@127.0.0.1/db?port=3307",
        "mysql+pymysql://u:hidden@127.0.0.1/db?host=elsewhere",
        "mysql+pymysql://u:hidden@127.0.0.1/db?unix_socket=%00",
        "mysql+pymysql://u:hidden@127.0.0.1/db?cursorclass=x",
        "mysql+pymysql://u:hidden@127.0.0.1/db?read_default_file=/etc/hostname",
        "mysql+pymysql://u:hidden@127.0.0.1/db?ssl_ca=/nowhere&ssl_ca=/nowhere",
        "mysql+pymysql://u:hidden@127.0.0.1:99999/db",
        "mysql+pymysql://u:hidden@127.0.0.1:0/db",
        "mysql+pymysql://u:hidden@127.0.0.1:abc/db",
        "mysql+pymysql://u:hidden@a..b/db",
        "mysql+pymysql://u:hidden@%00/db",
        "mysql+pymysql://u:hidden@[::1/db",
        "mysql+pymysql://u:hidden%00@127.0.0.1/db",
        "mysql+pymysql://?hidden=1",
        "mysql+pymysql:///?hidden=1",
        "hidden",
        "",
    ],
)
def test_a_wrong_url_is_one_line_that_does_not_repeat_it(command: Callable[..., Result], wrong: str) -> None:
    """A traceback shows the URL, and with it the password."""
    done = command("status", url=wrong)
    said = done.output.strip()
    assert (done.exit_code != 0, "AUDITEXPORT_MYSQL_URL" in said, said.count("\n")) == (True, True, 0), said
    assert "u:hidden" not in said


# ── a server that is not there ──────────────────────────────────────────────────────────────────


def _closed_port() -> int:
    with closing(socket.socket()) as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


def test_a_port_where_nobody_listens_is_named_with_the_reason(command: Callable[..., Result]) -> None:
    """The host alone does not tell a wrong port from a server that is down."""
    port = _closed_port()
    said = command("status", url=f"mysql+pymysql://u:hidden@127.0.0.1:{port}/db").output
    assert (f"127.0.0.1:{port}" in said, "refused" in said, "check host and port" in said) == (True, True, True), said


def test_a_name_that_does_not_resolve_is_called_that(command: Callable[..., Result]) -> None:
    """A typo in a host is no outage."""
    said = command("status", url="mysql+pymysql://u:hidden@no-such-host.invalid:3306/db").output
    assert ("no-such-host.invalid:3306" in said, "does not resolve" in said) == (True, True), said


@pytest.mark.parametrize(
    "greeting", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"SSH-2.0-OpenSSH_9.6\r\n", b"", b"\x05\x00\x00\x00abcde"]
)
def test_a_service_that_is_not_mysql_is_called_that(command: Callable[..., Result], greeting: bytes) -> None:
    """A wrong port usually has something else behind it."""
    with closing(socket.create_server(("127.0.0.1", 0))) as server:

        def answer() -> None:
            connection, _ = server.accept()
            with closing(connection):
                connection.sendall(greeting)

        threading.Thread(target=answer, daemon=True).start()
        port = server.getsockname()[1]
        said = command("status", url=f"mysql+pymysql://u:hidden@127.0.0.1:{port}/db").output
    assert (f"127.0.0.1:{port}" in said, "MySQL" in said) == (True, True), said
