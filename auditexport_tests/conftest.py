"""Real servers for the whole run, one database of its own for each test.

A missing server fails the run. AUDITEXPORT_TEST_MYSQL_URL and AUDITEXPORT_TEST_CLICKHOUSE_URL point the
suite at servers of yours (it creates and drops databases there); otherwise a private MySQL or MariaDB
(AUDITEXPORT_MYSQLD chooses) and the embedded ClickHouse (AUDITEXPORT_TEST_CLICKHOUSE_ENGINE chooses, see
`auditexport_tests.support.engines`) are started and stopped here.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_tests.support import engines
from auditexport_tests.support.engines import local_clickhouse
from auditexport_tests.support.prompts import Prompt, prompt_in, urls
from auditexport_tests.support.stack import Stack as Stack
from auditexport_tests.support.stack import fresh_stack as fresh_stack

pytest.register_assert_rewrite("auditexport_tests.support.builders")


def pytest_report_header() -> list[str]:
    return [
        f"mysql: {os.environ.get('AUDITEXPORT_TEST_MYSQL_URL') or os.environ.get('AUDITEXPORT_MYSQLD') or 'private, from PATH'}",
        f"clickhouse: {os.environ.get('AUDITEXPORT_TEST_CLICKHOUSE_URL') or f'embedded, engine {engines.chosen()}'}",
    ]


# The files with the tests that take longest. A worker that began one of those last would work alone at the end.
FIRST = (
    *("test_secrets.py", "test_chaos.py", "test_asset.py", "test_launches.py"),
    *("test_table_faults.py", "test_failures.py", "test_cli.py", "test_memory.py"),
    *("test_histories.py", "test_payload_fuzz.py"),
)


@pytest.hookimpl(trylast=True)  # after the deselection of slow tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deals the files of `FIRST` out to the workers, each of which gets an equal part of the list from xdist."""
    workers = int(getattr(config, "workerinput", {}).get("workercount", 1))
    others = iter([item for item in items if item.path.name not in FIRST])
    dealt: list[pytest.Item] = []
    for worker in range(workers):
        begin = len(dealt)
        dealt += [item for name in FIRST[worker::workers] for item in items if item.path.name == name]
        part = (len(items) - begin) // (workers - worker)
        dealt += itertools.islice(others, max(0, begin + part - len(dealt)))
    items[:] = [*dealt, *others]


@pytest.fixture(scope="session")
def mysql_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a MySQL-family server, without a database and ending in a slash."""
    given = os.environ.get("AUDITEXPORT_TEST_MYSQL_URL")
    if given:
        yield given.rstrip("/") + "/"
        return
    # No test takes the machine's power away: what the operating system was given is durable enough.
    options = ("--innodb-flush-method=nosync", "--sync-binlog=0")
    with LocalMySQL(tmp_path_factory.mktemp("mysql"), options=options) as server:
        yield server.url


@pytest.fixture(scope="session")
def clickhouse_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a ClickHouse server, without a database and ending in a slash."""
    given = os.environ.get("AUDITEXPORT_TEST_CLICKHOUSE_URL")
    if given:
        yield given.rstrip("/") + "/"
        return
    with local_clickhouse(tmp_path_factory.mktemp("clickhouse")) as server:
        yield server.url.removesuffix("default")


@pytest.fixture
def stack(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Two fresh databases with all tables, for one test."""
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


@pytest.fixture(scope="module")
def module_stack(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """As `stack`, shared by a module whose tests only read what one drain left."""
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


@pytest.fixture
def auditexport(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """`auditexport("drain", "--once", status=1)` runs the command in this process, on the databases of `stack`."""
    return prompt_in({**urls(stack), "COLUMNS": "160"}, monkeypatch)


@pytest.fixture
def scratch(tmp_path: Path) -> Path:
    """An empty directory for a Dagster instance."""
    home = tmp_path / "dagster_home"
    home.mkdir()
    return home
