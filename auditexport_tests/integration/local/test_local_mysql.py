"""The private MySQL server: it starts, survives crashes, refuses a second user and leaves nothing behind.

Every test starts the server that `find_server` finds: MariaDB, or MySQL through AUDITEXPORT_MYSQLD.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from pathlib import Path

import psutil
import pymysql
import pytest

from auditexport_pipeline.core.errors import LocalServerFailed, LocalServerMissing
from auditexport_pipeline.local.mysql import LocalMySQL, find_server
from auditexport_tests.support.waiting import wait_until


def query(server: LocalMySQL, *statements: str) -> list[tuple[object, ...]]:
    """The rows of the last statement."""
    with (
        pymysql.connect(host="127.0.0.1", port=server.port, user="root", autocommit=True) as connection,
        connection.cursor() as cursor,
    ):
        for statement in statements:
            cursor.execute(statement)
        return list(cursor.fetchall())


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One directory, initialised once. Its path is longer than a unix socket's may be."""
    return tmp_path_factory.mktemp("local-mysql") / ("a-long-name-" * 10)


def test_it_is_private_durable_and_refuses_a_second_user(directory: Path, tmp_path: Path) -> None:
    """Root has no password, and a second server on the same directory or port must not touch it."""
    with LocalMySQL(directory) as server:
        assert server.url == f"mysql+pymysql://root@127.0.0.1:{server.port}/"
        ((version, *durable, bound_to),) = query(
            server,
            "SELECT VERSION(), @@log_bin, @@binlog_format, @@binlog_row_image, @@innodb_flush_log_at_trx_commit, "
            "@@bind_address",
        )
        assert str(version).startswith(server.version)
        assert ("MariaDB" in str(version)) == (server.family == "mariadb")
        assert durable == [1, "ROW", "FULL", 1], "a server that skips what production does makes each benchmark wrong"
        assert bound_to == "127.0.0.1"
        # Another loopback address is an address of this host, as its network addresses are.
        with pytest.raises((ConnectionRefusedError, TimeoutError)):
            socket.create_connection(("127.0.0.2", server.port), timeout=5).close()
        with pytest.raises(LocalServerFailed, match="in use by a live process"):
            LocalMySQL(directory).start()
        with pytest.raises(LocalServerFailed, match=f"port {server.port} is taken"):
            LocalMySQL(tmp_path / "second", port=server.port).start()
        assert query(server, "SELECT 1") == [(1,)]


def test_data_url_and_commits_survive_a_stop_and_a_sigkill(directory: Path) -> None:
    """`make dev` keeps its outbox, and crash tests expect the killed server under the same URL."""
    server = LocalMySQL(directory)
    server.start()
    pid, url = server.pid, server.url
    query(server, "CREATE DATABASE crash", "CREATE TABLE crash.t (a INT PRIMARY KEY)")
    for stop in (server.stop, server.kill):
        query(server, f"INSERT INTO crash.t VALUES ({server.pid})")
        stop()
        assert not psutil.pid_exists(pid)
        assert not server.running
        with pytest.raises(LocalServerFailed, match="is not running"):
            _ = server.pid
        server.stop()
        # After a power cut these files are still there, and the pid in them may be another program's.
        for name in ("mysqld.pid", "mysqld.sock", "mysqld.sock.lock"):
            (directory / "data" / name).unlink(missing_ok=True)
            (directory / "data" / name).write_text(f"{os.getpid()}\n" if name == "mysqld.pid" else "4194304\n")
        assert server.start() == url
        pid = server.pid
    assert query(server, "SELECT COUNT(*) FROM crash.t") == [(2,)]
    server.stop()


def test_a_half_initialised_directory_is_not_started(tmp_path: Path) -> None:
    """Ctrl-C during the first start must not spoil the directory for good."""
    (tmp_path / "data.new.interrupted").mkdir(parents=True)
    (tmp_path / "data.new.interrupted" / "ibdata1").write_bytes(b"half")
    with LocalMySQL(tmp_path) as server:
        assert query(server, "SELECT 1") == [(1,)]
    assert not list(tmp_path.glob("data.new.*"))


def test_no_server_survives_a_parent_that_was_killed(directory: Path) -> None:
    """A crashed test run must not leave servers behind, nor block the next start."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(directory)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
        parent.wait()
        # Started at once: the old server may still be stopping.
        with LocalMySQL(directory) as server:
            assert query(server, "SELECT 1") == [(1,)]
            wait_until(lambda: not psutil.pid_exists(pid), what="the end of the server")
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


_PARENT = textwrap.dedent("""
    import signal
    import sys
    from pathlib import Path
    from auditexport_pipeline.local.mysql import LocalMySQL

    server = LocalMySQL(Path(sys.argv[1]))
    server.start()
    print(server.pid, flush=True)
    signal.pause()
""")


def test_a_server_that_cannot_start_is_reported_with_its_log(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path
) -> None:
    """The error has the log's last lines; the host's own configuration is never the reason."""
    for place in (".my.cnf", "my.cnf"):
        (tmp_path / place).write_text("[mysqld]\nthis-option-does-not-exist=1\n[client]\nport=1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MYSQL_HOME", str(tmp_path))
    with pytest.raises(LocalServerFailed, match="this-option-does-not-exist"):
        LocalMySQL(directory, options=("--this-option-does-not-exist",)).start()
    with LocalMySQL(directory) as server:
        assert query(server, "SELECT 1") == [(1,)]


def test_a_missing_server_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is the first error that a new user meets: one line must be enough."""
    monkeypatch.delenv("AUDITEXPORT_MYSQLD", raising=False)
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("auditexport_pipeline.local.mysql.SERVER_DIRECTORIES", ())
    with pytest.raises(LocalServerMissing) as missing:
        find_server()
    message = str(missing.value)
    assert "\n" not in message
    for help_with in ("apt-get install mariadb-server", "brew install mariadb", "AUDITEXPORT_MYSQLD="):
        assert help_with in message


def test_the_variable_wins_and_a_wrong_one_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """To fall back silently would test MariaDB where MySQL was meant."""
    named = tmp_path / "mysqld"
    monkeypatch.setenv("AUDITEXPORT_MYSQLD", str(named))
    with pytest.raises(LocalServerMissing, match="AUDITEXPORT_MYSQLD"):
        find_server()
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    assert find_server() == named
