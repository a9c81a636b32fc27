"""What the CLI says about an error of MySQL's and about a URL, and which errors are worth another run.

What a session states is in `test_sessions`, and what is said of a host that does not answer in `test_connection`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
from click.testing import CliRunner
from sqlalchemy.engine import make_url

from auditexport_pipeline.cli import main
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events

pytestmark = pytest.mark.mysql_sensitive

LEDGER = "clickhouse_outbox_batch"
LETTERS = "clickhouse_outbox_dead_letter"
Command = Callable[..., tuple[bool, str]]


@pytest.fixture
def command(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Command:
    """`auditexport …` with a URL of MySQL's: whether it succeeded, and its output. A traceback fails the test."""

    def run(verb: str, url: str = stack.mysql_url) -> tuple[bool, str]:
        monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", url)
        monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
        done = CliRunner().invoke(main, [verb])
        assert done.exception is None or isinstance(done.exception, SystemExit), repr(done.exception)
        return done.exit_code == 0, done.output

    return run


@contextmanager
def user(stack: Stack, password: str, *after: str) -> Iterator[str]:
    """A URL of a user of its own, with every right on the database."""
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


# ── permanent errors ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("definer", "body", "words"),
    [
        ("", "SIGNAL SQLSTATE '45000' SET MESSAGE_TEXT = 'no batches today'", "no batches today"),
        ("DEFINER = 'gone'@'nowhere'", "SET @seen = NEW.batch_id", "gone"),
    ],
)
def test_a_trigger_that_refuses_is_named_in_the_servers_words(
    stack: Stack, command: Command, definer: str, body: str, words: str
) -> None:
    """Another run meets the same trigger: "run again" would be wrong."""
    stack.put(*events(3))
    stack.sql(f"CREATE {definer} TRIGGER refuse BEFORE INSERT ON {LEDGER} FOR EACH ROW {body}")
    succeeded, output = command("drain")
    assert (succeeded, words in output, "run again" in output) == (False, True, False), output


@pytest.mark.parametrize("account", ["ACCOUNT LOCK", "PASSWORD EXPIRE"])
def test_an_account_that_is_closed_is_no_outage(stack: Stack, command: Command, account: str) -> None:
    """A locked account gives the same answer until an administrator changes it."""
    with user(stack, "x", f"ALTER USER {{user}} {account}") as url:
        succeeded, output = command("status", url)
    assert (succeeded, "MySQL refuses" in output, "run again" in output) == (False, True, False), output


def test_words_that_quote_a_value_stay_out_of_messages(stack: Stack, command: Command) -> None:
    """A server's error can repeat a value of the row: ids here, payloads elsewhere."""
    stack.put(("ws", "evt_secret_1", '{"a": 1}'), ("ws", "evt_secret_1", '{"a": 2}'))
    stack.sql("CREATE TABLE twice (event_id VARCHAR(99) PRIMARY KEY) ENGINE = InnoDB")
    stack.sql(f"CREATE TRIGGER twice BEFORE INSERT ON {LETTERS} FOR EACH ROW INSERT INTO twice VALUES (NEW.event_id)")
    _, output = command("drain")
    assert ("1062" in output, "evt_secret_1" in output) == (True, False), output


# ── the URL ──────────────────────────────────────────────────────────────────────────────────────


def test_a_password_of_any_script_works(stack: Stack, command: Command) -> None:
    """The driver knows Latin-1 alone: it fails on other passwords, or sends another one."""
    for password in ("zażółć€", "pässwörd", "пароль😀", "a%b@c:d/e?f#g"):
        with user(stack, password) as url:
            succeeded, output = command("status", url)
        assert (succeeded, "refuses" in output) == (True, False), output


@pytest.mark.parametrize(
    "wrong",
    [
        "u:hidden@127.0.0.1/db?foo=bar",
        "u:hidden@127.0.0.1/db?charset=nonsense",
        "u:hidden@127.0.0.1/db?charset=utf8mb4&charset=utf8mb4",
        "u:hidden@127.0.0.1/db?connect_timeout=abc",
        "u:hidden@127.0.0.1/db?connect_timeout=0",
        "u:hidden@127.0.0.1/db?read_timeout=",
        "u:hidden@127.0.0.1/db?read_timeout=-1",
        "u:hidden@127.0.0.1/db?port=3307",
        "u:hidden@127.0.0.1/db?host=elsewhere",
        "u:hidden@127.0.0.1/db?unix_socket=%00",
        "u:hidden@127.0.0.1/db?cursorclass=x",
        "u:hidden@127.0.0.1/db?read_default_file=/etc/hostname",
        "u:hidden@127.0.0.1/db?ssl_ca=/nowhere&ssl_ca=/nowhere",
        "u:hidden@127.0.0.1:99999/db",
        "u:hidden@127.0.0.1:0/db",
        "u:hidden@127.0.0.1:abc/db",
        "u:hidden@a..b/db",
        "u:hidden@[::1/db",
        "u:hidden%00@127.0.0.1/db",
        "?hidden=1",
        "/?hidden=1",
        "",
    ],
)
def test_a_wrong_url_is_one_line_that_does_not_repeat_it(wrong: str) -> None:
    """A message that repeats the URL shows the password."""
    with pytest.raises(InvalidConfig, match="AUDITEXPORT_MYSQL_URL") as error:
        MySQLOutbox(f"mysql+pymysql://{wrong}")
    assert "hidden" not in str(error.value)
    assert "\n" not in str(error.value)
