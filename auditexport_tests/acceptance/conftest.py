"""A world for each test: two fresh databases, and a directory for what the programs write."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from auditexport_tests.acceptance.world import World
from auditexport_tests.conftest import Stack, fresh_stack


@pytest.fixture
def world(stack: Stack, tmp_path: Path) -> World:
    """Both databases with all tables."""
    return World(mysql_url=stack.mysql_url, clickhouse_url=stack.clickhouse_url, home=tmp_path)


@pytest.fixture
def empty_world(mysql_server: str, clickhouse_server: str, tmp_path: Path) -> Iterator[World]:
    """Both databases without a table."""
    with fresh_stack(mysql_server, clickhouse_server, create=False) as empty:
        yield World(mysql_url=empty.mysql_url, clickhouse_url=empty.clickhouse_url, home=tmp_path)
