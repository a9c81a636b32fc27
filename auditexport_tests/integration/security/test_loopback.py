"""The servers of the local stack listen on this machine's loopback only, by the sockets that the kernel lists."""

from __future__ import annotations

import ipaddress
import os
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest

from auditexport_pipeline.local import dev
from auditexport_tests.integration.security.conftest import Servers


def listening(pid: int) -> set[tuple[str, int]]:
    """(address, port) of every TCP socket on which this process, or one that it started, takes connections."""
    process = psutil.Process(pid)
    found = set()
    for one in (process, *process.children(recursive=True)):
        with suppress(psutil.NoSuchProcess):  # one that has just ended does not listen
            for connection in one.net_connections(kind="tcp"):
                if connection.status == psutil.CONN_LISTEN:
                    found.add((str(connection.laddr.ip), int(connection.laddr.port)))
    return found


def reachable_from_elsewhere(sockets: set[tuple[str, int]]) -> set[tuple[str, int]]:
    return {(address, port) for address, port in sockets if not ipaddress.ip_address(address).is_loopback}


def test_both_servers_listen_on_loopback_only(servers: Servers) -> None:
    """They need no password, so no other machine may reach them; nor MySQL's X plugin."""
    clickhouse_port = int(servers.clickhouse.url.rsplit(":", 1)[1].split("/")[0])
    assert listening(servers.mysql.pid) == {("127.0.0.1", servers.mysql.port)}
    assert listening(servers.clickhouse.pid) == {("127.0.0.1", clickhouse_port)}


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")])
def test_a_socket_that_others_can_reach_is_found(family: socket.AddressFamily, address: str) -> None:
    """The negative control, over both protocols."""
    with socket.socket(family, socket.SOCK_STREAM) as everywhere:
        try:
            everywhere.bind((address, 0))
        except OSError:
            pytest.skip(f"this machine has no {family.name}")
        everywhere.listen(1)
        port = everywhere.getsockname()[1]
        assert (address, port) in reachable_from_elsewhere(listening(os.getpid()))


def test_the_page_of_make_dev_is_started_on_loopback(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The Dagster UI launches runs and asks for no password."""
    started: list[list[str]] = []

    class NoStack:
        def __init__(self, directory: Path) -> None:
            self.directory = directory

        def __enter__(self) -> NoStack:
            return self

        def __exit__(self, *_: object) -> None:
            pass

        def environment(self) -> dict[str, str]:
            return {}

    def child(_: str, argv: list[str], **__: Any) -> object:
        started.append(argv)
        raise KeyboardInterrupt

    monkeypatch.setattr(dev, "LocalStack", NoStack)
    monkeypatch.setattr(dev, "Child", child)
    with pytest.raises(KeyboardInterrupt):
        dev.run(tmp_path, port=0, events_per_s=1)
    ((*_, host_option, host, _, _),) = started
    assert (host_option, host) == ("-h", "127.0.0.1")
