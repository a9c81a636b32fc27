"""Between us and MySQL a proxy that splits reads from writes: nothing is decided by what a replica has not heard of."""

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
from auditexport_tests.support.builders import events
from auditexport_tests.support.mysql_splitter import Splitter
from auditexport_tests.support.prompts import urls

pytestmark = pytest.mark.mysql_sensitive


@pytest.fixture(scope="module")
def replica_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalMySQL]:
    with LocalMySQL(tmp_path_factory.mktemp("replica"), options=("--server-id=2",)) as server:
        yield server


@pytest.fixture
def splitter(stack: Stack, replica_server: LocalMySQL) -> Iterator[Splitter]:
    """The stack's server and a replica that has heard of the tables and of nothing since."""
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
    """The stack as the program sees it: through the proxy."""
    outbox = MySQLOutbox(splitter.url)
    yield replace(stack, mysql_url=splitter.url, outbox=outbox)
    outbox.disconnect()


def said(stack: Stack, *words: str) -> str:
    """What the prompt prints, on one line: a table breaks its lines where a port has a digit more."""
    done = CliRunner().invoke(main, [*words], env=urls(stack))
    assert done.exit_code == 0, done.output
    return " ".join(done.output.split())


def test_the_proxy_of_these_tests_splits_reads(behind: Stack, stack: Stack, splitter: Splitter) -> None:
    """A control: whoever asks outside of a transaction gets the replica's answer."""
    stack.put(*events(3))
    plain = sa.create_engine(behind.mysql_url, isolation_level="AUTOCOMMIT")
    with plain.connect() as connection:
        assert connection.exec_driver_sql("SELECT COUNT(*) FROM clickhouse_outbox").scalar_one() == 0
    plain.dispose()
    assert splitter.read["clickhouse_outbox"] == 1


def test_nothing_is_decided_by_what_a_replica_says(behind: Stack, stack: Stack, splitter: Splitter) -> None:
    """Its outbox and its ledger are empty: whoever asked it would leave rows, or take batches for lost."""
    stack.put(*events(20))
    assert behind.outbox.backlog(tuple(VERSIONS), count_to=100).rows == 20
    said(behind, "drain")
    assert (stack.counts(), stack.pending()) == ((20, 20), 0)
    said(behind, "requeue", "--batch", "1", "--why", "a test")
    said(behind, "drain")
    assert (stack.counts()[1], stack.pending()) == (20, 0)
    said(behind, "reconcile")
    said(behind, "status")
    said(behind, "doctor")
    said(behind, "batches", "list")
    said(behind, "sweep", "--outbox-days", "0")
    assert stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n == 0
    assert splitter.read == {}


def test_a_proxy_that_splits_a_transaction_is_refused_before_anything_is_claimed(
    behind: Stack, stack: Stack, splitter: Splitter
) -> None:
    """Then not even a transaction helps, and the proxy has to be told."""
    splitter.persistent = False
    stack.put(*events(3))
    preflight.forget()
    done = CliRunner().invoke(main, ["drain"], env=urls(behind))
    assert (done.exit_code, stack.pending(), stack.sql("SELECT 1 FROM clickhouse_outbox_batch WHERE batch_id > 0")) == (
        2,
        3,
        [],
    )
    assert "transaction_persistent" in done.output
    preflight.forget()


def test_the_doctor_says_who_answers_outside_of_a_transaction(behind: Stack, splitter: Splitter) -> None:
    """Nothing to mend, but worth knowing for whoever looks into the tables by hand."""
    assert "outside of a transaction" in said(behind, "doctor")


@pytest.mark.parametrize("nth", [pytest.param(n, marks=[pytest.mark.slow] * (n > 6)) for n in range(1, 13)])
def test_a_cluster_that_refuses_a_commit_loses_and_doubles_nothing(
    behind: Stack, stack: Stack, splitter: Splitter, nth: int
) -> None:
    """Galera finds out at COMMIT that another node was first, and has rolled the transaction back."""
    stack.put(*events(5))
    splitter.deadlock_at_commit = nth
    ends = []
    for _ in range(3):
        done = CliRunner().invoke(main, ["drain"], env=urls(behind))
        ends.append(done.exit_code)
        assert "Traceback" not in done.output
        if done.exit_code == 0:
            break
    assert splitter.commits > nth
    assert ends[-1] == 0, done.output
    assert (stack.counts(), stack.pending()) == ((5, 5), 0)
    assert {row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")} == {
        "verified"
    }
