"""Servers of this package's own, so that their logs and sockets hold nothing but what these tests did."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.engines import local_clickhouse


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """Both servers, as objects that know their processes and directories."""

    mysql: LocalMySQL
    clickhouse: LocalClickHouse


@pytest.fixture(scope="package")
def servers(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Servers]:
    directory = tmp_path_factory.mktemp("security")
    with LocalMySQL(directory / "mysql") as mysql, local_clickhouse(directory / "clickhouse") as clickhouse:
        yield Servers(mysql=mysql, clickhouse=clickhouse)


@pytest.fixture
def own_stack(servers: Servers) -> Iterator[Stack]:
    with fresh_stack(servers.mysql.url, servers.clickhouse.url.removesuffix("default")) as stack:
        yield stack
