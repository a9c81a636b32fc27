"""A private PostgreSQL, Redis and RabbitMQ on loopback, for as long as a test needs them.

What belongs here: starting them from Debian's programs, without Debian's services, and taking them down. What does not:
installing them (`install`).
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from auditexport_pipeline.local.processes import Child, free_port
from auditexport_tests.e2e.install import find_postgres, find_rabbitmq

UP_WITHIN_S = 180.0
# Root may not run PostgreSQL; Debian's package brings this user.
POSTGRES_USER = "postgres"


@contextlib.contextmanager
def postgres() -> Iterator[str]:
    """A private PostgreSQL on loopback, with an empty database; yields its URL."""
    programs = find_postgres()
    assert programs, "no PostgreSQL on this machine: `make test-e2e` installs it, or says how"
    as_user = ["setpriv", f"--reuid={POSTGRES_USER}", f"--regid={POSTGRES_USER}", "--init-groups"]
    as_user = as_user if os.geteuid() == 0 else []
    directory = Path(tempfile.mkdtemp(prefix="auditexport-postgres-"))
    try:
        if as_user:
            shutil.chown(directory, POSTGRES_USER, POSTGRES_USER)
        data = directory / "data"
        made = [str(programs / "initdb"), "-D", str(data), "-U", "dagster", "--auth=trust", "--no-sync", "-E", "UTF8"]
        subprocess.run([*as_user, *made], check=True, capture_output=True, cwd="/")
        port = free_port()
        server = [str(programs / "postgres"), "-D", str(data), "-p", str(port)]
        server += ["-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        child = Child("PostgreSQL", [*as_user, *server], log=directory / "postgres.log")
        try:
            url = f"postgresql+psycopg2://dagster:none@127.0.0.1:{port}/postgres"
            engine = sa.create_engine(url)

            def answers() -> bool:
                try:
                    with engine.connect():
                        return True
                except sa.exc.OperationalError:
                    return False

            child.wait_until(answers, within_s=UP_WITHIN_S)
            engine.dispose()
            yield url
        finally:
            child.stop()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


@contextlib.contextmanager
def redis(password: str, directory: Path) -> Iterator[str]:
    """A private Redis on loopback that wants this password; yields its URL.

    `directory` keeps each command that it was sent, in the clear, in `appendonlydir`.
    """
    program = shutil.which("redis-server")
    assert program, "no Redis on this machine: `make test-e2e` installs it, or says how"
    port = free_port()
    settings = directory / "redis.conf"  # a command line would show the password to every user
    settings.write_text(f'bind 127.0.0.1\nport {port}\nrequirepass {password}\nappendonly yes\nsave ""\n')
    settings.chmod(0o600)
    child = Child("Redis", [program, str(settings), "--dir", str(directory)], log=directory / "redis.log")

    def answers() -> bool:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5) as connection:
            connection.sendall(f"AUTH {password}\r\nPING\r\n".encode())
            return b"+OK" in connection.recv(100)
        return False

    try:
        child.wait_until(answers, within_s=UP_WITHIN_S)
        yield f"redis://:{password}@127.0.0.1:{port}/0"
    finally:
        child.stop()


@contextlib.contextmanager
def rabbitmq(password: str, directory: Path) -> Iterator[str]:
    """A private RabbitMQ on loopback whose user `exporter` has this password; yields its URL."""
    programs = find_rabbitmq()
    assert programs, "no RabbitMQ on this machine: `make test-e2e` installs it, or says how"
    port, epmd_port = free_port(), free_port()
    home = directory / "home"  # of the cookie by which its nodes know each other
    home.mkdir()
    environment = {
        "PATH": "/usr/sbin:/usr/bin:/sbin:/bin",
        "HOME": str(home),
        "LANG": "C.UTF-8",
        "ERL_EPMD_ADDRESS": "127.0.0.1",
        "ERL_EPMD_PORT": str(epmd_port),
        "RABBITMQ_NODENAME": f"test{port}@localhost",
        "RABBITMQ_NODE_IP_ADDRESS": "127.0.0.1",
        "RABBITMQ_NODE_PORT": str(port),
        "RABBITMQ_DIST_PORT": str(free_port()),
        "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1}",
        "RABBITMQ_MNESIA_BASE": str(directory / "data"),
        "RABBITMQ_LOG_BASE": str(directory / "log"),
        "RABBITMQ_PID_FILE": str(directory / "pid"),
        "RABBITMQ_ENABLED_PLUGINS_FILE": str(directory / "no_plugins"),
        "RABBITMQ_CONFIG_FILE": str(directory / "rabbitmq"),
    }
    (directory / "rabbitmq.conf").write_text(f"default_user = exporter\ndefault_pass = {password}\n")
    # Erlang would start this one itself, as a daemon that stays.
    names = Child("epmd", ["epmd"], log=directory / "epmd.log", env=environment)
    server = None
    try:
        names.wait_until(lambda: _listens(epmd_port), within_s=UP_WITHIN_S)
        server = Child("RabbitMQ", [str(programs / "rabbitmq-server")], log=directory / "rabbitmq.log", env=environment)
        server.wait_until(lambda: _listens(port), within_s=UP_WITHIN_S)
        yield f"pyamqp://exporter:{password}@127.0.0.1:{port}//"
    finally:
        if server is not None:
            server.stop()
        names.stop()


def _listens(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=5):
        return True
    return False
