"""A world for each test: two fresh databases, made by `auditexport init`."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from auditexport_tests.acceptance.world import World

_numbers = itertools.count(1)


@pytest.fixture
def world(mysql_server: str, clickhouse_server: str, tmp_path: Path) -> Iterator[World]:
    """Both databases with all tables; `mysql_server` and `clickhouse_server` are URLs of servers, ending in a slash."""
    name = f"auditexport_black_box_{os.getpid()}_{next(_numbers)}"
    servers = World(mysql_url=mysql_server + "mysql", clickhouse_url=clickhouse_server + "default", home=tmp_path)
    servers.sql(f"CREATE DATABASE {name}")
    servers.clickhouse(f"CREATE DATABASE {name}")
    world = World(mysql_url=mysql_server + name, clickhouse_url=clickhouse_server + name, home=tmp_path)
    try:
        world.run("init", "--with-outbox")
        yield world
    finally:
        servers.sql(f"DROP DATABASE {name}")
        servers.clickhouse(f"DROP DATABASE {name}")
