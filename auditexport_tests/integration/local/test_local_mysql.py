"""The private MySQL server: it starts, survives crashes, refuses company and leaves nothing behind.

Every test starts the server that `find_server` finds: MariaDB, or MySQL through AUDITEXPORT_MYSQLD.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import textwrap
from collections.abc import Iterator
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
    """One directory, initialised once: its path is longer than a unix socket's may be."""
    return tmp_path_factory.mktemp("local-mysql") / ("a-long-name-" * 10)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMySQL]:
    """One that stays up, for tests that only look at it or try to get in its way."""
    with LocalMySQL(tmp_path_factory.mktemp("shared-mysql")) as running:
        yield running


def test_it_answers_under_its_url_and_says_what_it_is(server: LocalMySQL) -> None:
    """Everything else is built on this URL; the family decides collations and lock syntax."""
    assert server.running
    assert server.url == f"mysql+pymysql://root@127.0.0.1:{server.port}/"
    assert psutil.pid_exists(server.pid)
    ((version,),) = query(server, "SELECT VERSION()")
    assert str(version).startswith(server.version)
    assert ("MariaDB" in str(version)) == (server.family == "mariadb")


def test_it_writes_full_row_images_and_flushes_every_commit(server: LocalMySQL) -> None:
    """A local server that skips what production does would make every measurement here a lie."""
    ((log_bin, row_format, image, flush),) = query(
        server, "SELECT @@log_bin, @@binlog_format, @@binlog_row_image, @@innodb_flush_log_at_trx_commit"
    )
    assert (log_bin, row_format, image, flush) == (1, "ROW", "FULL", 1)


def test_it_listens_on_loopback_only(server: LocalMySQL) -> None:
    """Root has no password: nobody else on the network may get as far as being asked for one."""
    ((address,),) = query(server, "SELECT @@bind_address")
    assert address == "127.0.0.1"
    # Another loopback address belongs to this host as much as its network addresses do.
    with pytest.raises((ConnectionRefusedError, TimeoutError)):
        socket.create_connection(("127.0.0.2", server.port), timeout=5).close()


def test_stop_is_clean_and_the_data_is_there_at_the_next_start(directory: Path) -> None:
    """`make dev` keeps its outbox from one day to the next."""
    server = LocalMySQL(directory)
    server.start()
    pid, url = server.pid, server.url
    query(server, "CREATE DATABASE IF NOT EXISTS kept")
    server.stop()
    assert not psutil.pid_exists(pid)
    assert not server.running
    server.stop()
    assert server.start() == url, "a URL that was handed out stays valid"
    assert query(server, "SHOW DATABASES LIKE 'kept'") == [("kept",)]
    server.stop()


def test_a_commit_survives_sigkill_and_the_port_stays(directory: Path) -> None:
    """Crash tests kill the server in the middle and expect to meet it again under the same URL."""
    with LocalMySQL(directory) as server:
        port, pid = server.port, server.pid
        query(
            server,
            "CREATE DATABASE IF NOT EXISTS crash",
            "CREATE TABLE IF NOT EXISTS crash.t (a INT PRIMARY KEY)",
            "REPLACE INTO crash.t VALUES (1)",
        )
        server.kill()
        assert not psutil.pid_exists(pid)
        assert not server.running
        with pytest.raises(LocalServerFailed, match="is not running"):
            _ = server.pid
    with LocalMySQL(directory, port=port) as again:
        assert again.port == port
        assert query(again, "SELECT a FROM crash.t") == [(1,)]


def test_a_directory_in_use_is_refused_at_once_and_its_server_lives_on(server: LocalMySQL) -> None:
    """Left to themselves the servers retry for 30 to 100 seconds and then blame a storage engine."""
    with pytest.raises(LocalServerFailed, match="in use by a live process"):
        LocalMySQL(server.directory).start()
    assert query(server, "SELECT 1") == [(1,)]


def test_a_port_in_use_is_named_and_not_mistaken_for_ours(server: LocalMySQL, tmp_path: Path) -> None:
    """The other server answers on that port: taking it for ours would write into somebody's data."""
    with pytest.raises(LocalServerFailed, match=f"port {server.port} is taken"):
        LocalMySQL(tmp_path / "second", port=server.port).start()
    assert query(server, "SELECT 1") == [(1,)]


def test_lock_and_pid_files_of_a_dead_server_do_not_stop_the_next(directory: Path) -> None:
    """After a power cut the files are all there, and the pid in them may be anybody's."""
    with LocalMySQL(directory) as server:
        server.kill()
    for name in ("mysqld.pid", "mysqld.sock", "mysqld.sock.lock"):
        (directory / "data" / name).unlink(missing_ok=True)
        (directory / "data" / name).write_text(f"{os.getpid()}\n" if name == "mysqld.pid" else "4194304\n")
    with LocalMySQL(directory) as server:
        assert query(server, "SELECT 1") == [(1,)]


def test_a_half_initialised_directory_is_not_started(tmp_path: Path) -> None:
    """Ctrl-C during the very first start must not poison the directory for good."""
    (tmp_path / "data.new.interrupted").mkdir(parents=True)
    (tmp_path / "data.new.interrupted" / "ibdata1").write_bytes(b"half")
    with LocalMySQL(tmp_path) as server:
        assert query(server, "SELECT 1") == [(1,)]
    assert not list(tmp_path.glob("data.new.*"))


def test_no_server_outlives_a_parent_that_was_killed(directory: Path) -> None:
    """A crashed test run must not leave servers behind, and the next start must not find one in its way."""
    parent = subprocess.Popen([sys.executable, "-c", _PARENT, str(directory)], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    try:
        pid = int(parent.stdout.readline())
        assert psutil.pid_exists(pid)
        parent.kill()
        parent.wait()
        # The server is not waited for: a start that comes at once may meet it while it is being stopped.
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


def test_the_host_configuration_has_no_say(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, directory: Path) -> None:
    """A developer's own ~/.my.cnf must neither break nor redirect the private server."""
    (tmp_path / ".my.cnf").write_text("[mysqld]\nthis-option-does-not-exist=1\n[client]\nport=1\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("MYSQL_HOME", str(tmp_path))
    (tmp_path / "my.cnf").write_text("[mysqld]\nthis-option-does-not-exist=1\n")
    with LocalMySQL(directory) as server:
        assert query(server, "SELECT 1") == [(1,)]


def test_a_missing_server_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first thing that somebody new meets: one line must be enough to go on."""
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
    """Falling back in silence would test MariaDB where somebody asked for MySQL."""
    named = tmp_path / "mysqld"
    monkeypatch.setenv("AUDITEXPORT_MYSQLD", str(named))
    with pytest.raises(LocalServerMissing, match="AUDITEXPORT_MYSQLD"):
        find_server()
    named.write_text("#!/bin/sh\n")
    named.chmod(0o755)
    assert find_server() == named


def test_a_server_that_refuses_to_start_is_reported_with_its_own_words(directory: Path) -> None:
    """The log is in a directory nobody knows: its last lines belong into the message."""
    broken = LocalMySQL(directory, options=("--this-option-does-not-exist",))
    with pytest.raises(LocalServerFailed, match="this-option-does-not-exist"):
        broken.start()
    with LocalMySQL(directory) as server:
        assert query(server, "SELECT 1") == [(1,)]
