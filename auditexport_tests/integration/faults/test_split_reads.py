"""Behind a proxy that splits reads from writes, no decision rests on the answer of a replica that lags."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import sqlalchemy as sa
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_pipeline.cli import main
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import count, events, everything_once, states
from auditexport_tests.support.mysql_splitter import Splitter
from auditexport_tests.support.prompts import urls

pytestmark = pytest.mark.mysql_sensitive


@pytest.fixture(scope="module")
def replica_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMySQL]:
    with LocalMySQL(tmp_path_factory.mktemp("replica"), options=("--server-id=2",)) as server:
        yield server


@pytest.fixture
def splitter(stack: Stack, replica_server: LocalMySQL) -> Iterator[Splitter]:
    """The stack's server and a replica that stopped after the tables were created."""
    writer = sa.make_url(stack.mysql_url)
    reader = writer.set(host="127.0.0.1", port=replica_server.port)
    admin = sa.create_engine(reader.set(database="mysql"), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.exec_driver_sql(f"CREATE DATABASE {writer.database}")
    stale = MySQLOutbox(reader.render_as_string(hide_password=False))
    try:
        setup.create(stale, stack.log, with_outbox=True)
        with Splitter(writer=stack.mysql_url, reader=stale.url) as splitter:
            yield splitter
    finally:
        stale.disconnect()
        with admin.connect() as connection:
            connection.exec_driver_sql(f"DROP DATABASE {writer.database}")
        admin.dispose()


@pytest.fixture
def behind(stack: Stack, splitter: Splitter) -> Iterator[Stack]:
    """The stack behind the proxy, as the program sees it."""
    outbox = MySQLOutbox(splitter.url)
    yield replace(stack, mysql_url=splitter.url, outbox=outbox)
    outbox.disconnect()


def printed(stack: Stack, *words: str, status: int = 0) -> str:
    """What the command prints, on one line: a table breaks its lines where a port has a digit more."""
    done = CliRunner().invoke(main, [*words], env=urls(stack))
    assert done.exit_code == status, done.output
    return " ".join(done.output.split())


def test_the_proxy_of_these_tests_splits_reads(behind: Stack, stack: Stack, splitter: Splitter) -> None:
    """A control: outside of a transaction, the replica answers."""
    stack.put(*events(3))
    plain = sa.create_engine(behind.mysql_url, isolation_level="AUTOCOMMIT")
    with plain.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM clickhouse_outbox").scalar_one() == 0
    plain.dispose()
    assert splitter.read["clickhouse_outbox"] == 1


def test_no_decision_rests_on_what_a_replica_answers(behind: Stack, stack: Stack, splitter: Splitter) -> None:
    """Its outbox and its ledger are empty: by its answers, rows would be left and batches taken for lost."""
    stack.put(*events(20))
    assert behind.outbox.backlog(tuple(VERSIONS), count_to=100).rows == 20
    printed(behind, "drain")
    everything_once(stack, 20)
    printed(behind, "requeue", "--batch", "1", "--why", "a test")
    printed(behind, "drain")
    assert (stack.counts()[1], stack.pending()) == (20, 0)
    for words in (["reconcile"], ["status"], ["batches", "list"], ["sweep", "--outbox-days", "0"]):
        printed(behind, *words)
    # Nothing to repair, but worth knowing for an operator who reads the tables by hand.
    assert "outside of a transaction" in printed(behind, "doctor")
    assert count(stack) == 0
    assert splitter.read == {}


def test_a_proxy_that_splits_a_transaction_is_refused_before_a_claim(
    behind: Stack, stack: Stack, splitter: Splitter
) -> None:
    """Then not even a transaction helps, and the proxy has to be configured otherwise."""
    splitter.persistent = False
    stack.put(*events(3))
    preflight.forget()
    assert "transaction_persistent" in printed(behind, "drain", status=2)
    assert (states(stack), stack.pending()) == ([], 3)
    preflight.forget()


@pytest.mark.parametrize("nth", [pytest.param(n, marks=[pytest.mark.slow] * (n > 4)) for n in range(1, 13)])
def test_a_cluster_that_refuses_a_commit_loses_and_duplicates_nothing(
    behind: Stack, stack: Stack, splitter: Splitter, nth: int
) -> None:
    """Galera finds out at COMMIT that another node was first, and has rolled the transaction back."""
    stack.put(*events(5))
    splitter.deadlock_at_commit = nth
    for _ in range(3):
        done = CliRunner().invoke(main, ["drain"], env=urls(behind))
        assert "Traceback" not in done.output
        if done.exit_code == 0:
            break
    assert done.exit_code == 0, done.output
    assert splitter.commits > nth
    everything_once(stack, 5)
    assert set(states(stack)) == {"verified"}
