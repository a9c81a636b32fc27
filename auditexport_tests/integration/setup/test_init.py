"""Tables: created once, never altered, and checked before anything is claimed."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.local import generator
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack


def test_creating_twice_creates_nothing_the_second_time(stack: Stack) -> None:
    """`init` is for every deployment, so running it again must be nothing at all."""
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == []
    assert preflight.check(stack.outbox, stack.log) == []


def test_the_outbox_is_only_created_when_asked_for(stack: Stack) -> None:
    """The table is the application's: creating it by accident would hide a wrong database."""
    stack.sql("DROP TABLE clickhouse_outbox")
    assert setup.create(stack.outbox, stack.log) == []
    assert "clickhouse_outbox does not exist" in str(preflight.check(stack.outbox, stack.log)[0])
    assert setup.create(stack.outbox, stack.log, with_outbox=True) == ["clickhouse_outbox"]


def test_a_second_init_keeps_the_ledgers_counters(stack: Stack) -> None:
    """Row 0 carries the last inserted_at and the epoch; starting them over would undo every fence."""
    stack.sql("UPDATE clickhouse_outbox_batch SET epoch = 7, inserted_at_ms = 99 WHERE batch_id = 0")
    setup.create(stack.outbox, stack.log)
    (head,) = stack.sql("SELECT epoch, inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0")
    assert (head.epoch, head.inserted_at_ms) == (7, 99)


@pytest.mark.parametrize(
    ("statement", "finding"),
    [
        ("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx", "has no index drainer_pending_idx"),
        ("ALTER TABLE clickhouse_outbox DROP COLUMN created_at", "clickhouse_outbox lacks created_at"),
        ("ALTER TABLE clickhouse_outbox_batch DROP COLUMN digest", "clickhouse_outbox_batch lacks digest"),
        ("ALTER TABLE clickhouse_outbox_dead_letter DROP COLUMN detail", "dead_letter lacks detail"),
        ("DELETE FROM clickhouse_outbox_batch WHERE batch_id = 0", "lacks its row 0"),
        ("DROP TABLE clickhouse_outbox_dead_letter", "clickhouse_outbox_dead_letter does not exist"),
    ],
)
def test_what_is_wrong_in_mysql_is_reported_with_its_fix_and_left_alone(
    stack: Stack, statement: str, finding: str
) -> None:
    """A tool that alters a table by itself locks it for an hour on somebody's busiest day."""
    stack.sql(statement)
    (found,) = preflight.check(stack.outbox, stack.log)
    assert finding in found.what
    assert found.fix
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)
    assert [str(again) for again in preflight.check(stack.outbox, stack.log)] == [str(found)]


@pytest.mark.parametrize(
    ("table", "finding"),
    [
        ("ENGINE = ReplacingMergeTree {body} SETTINGS index_granularity = 8192", "has no deduplication window"),
        (
            "ENGINE = ReplacingMergeTree {body} SETTINGS non_replicated_deduplication_window = 0",
            "no deduplication window",
        ),
        ("ENGINE = MergeTree {body} SETTINGS non_replicated_deduplication_window = 100", "is a MergeTree"),
        (
            "ENGINE = ReplacingMergeTree ORDER BY event_id SETTINGS non_replicated_deduplication_window = 100",
            "sorted by event_id",
        ),
    ],
)
def test_what_is_wrong_in_clickhouse_is_reported_with_its_fix_and_left_alone(
    stack: Stack, table: str, finding: str
) -> None:
    """Each of these makes duplicates possible; an INSERT into such a table would still succeed."""
    ((ddl,),) = stack.clickhouse(
        "SELECT create_table_query FROM system.tables WHERE name = 'audit_logs_raw_v1' AND database = currentDatabase()"
    )
    columns = str(ddl)[str(ddl).index("(") : str(ddl).index(" ENGINE = ")]
    body = (
        "PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(inserted_at, 'UTC')) "
        "ORDER BY (workspace_id, bucket, time, event_id)"
    )
    client = stack.log.client()
    client.command("DROP TABLE audit_logs_raw_v1 SYNC")
    client.command(f"CREATE TABLE audit_logs_raw_v1 {columns} {table.format(body=body)}")
    assert setup.create(stack.outbox, stack.log) == []
    (found,) = preflight.check(stack.outbox, stack.log)
    assert finding in found.what
    assert found.fix
    with pytest.raises(SetupIncomplete, match="nothing was claimed"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)


def test_a_missing_column_in_clickhouse_is_named(stack: Stack) -> None:
    """A column that is named is added in a minute; a failing INSERT is looked into for an hour."""
    stack.log.client().command("ALTER TABLE audit_logs_raw_v1 DROP INDEX correlation_id_idx")
    stack.log.client().command("ALTER TABLE audit_logs_raw_v1 DROP COLUMN correlation_id")
    assert "lacks correlation_id" in preflight.check(stack.outbox, stack.log)[0].what


@pytest.fixture
def granted(stack: Stack) -> Iterator[Callable[..., Stack]]:
    """The same stack through a user that has only the given grants, one `PRIVILEGES ON table` each."""
    user = f"'least{os.getpid()}'@'127.0.0.1'"
    database = stack.mysql_url.rsplit("/", 1)[1]
    stack.sql(f"CREATE USER {user} IDENTIFIED BY 'least-privilege'")
    connected: list[MySQLOutbox] = []

    def through(*grants: str) -> Stack:
        for grant in grants:
            privileges, table = grant.split(" ON ")
            stack.sql(f"GRANT {privileges} ON {database}.{table} TO {user}")
        server = stack.mysql_url.split("@", 1)[1]
        outbox = MySQLOutbox(f"mysql+pymysql://least{os.getpid()}:least-privilege@{server}")
        connected.append(outbox)
        return replace(stack, mysql_url=outbox.url, outbox=outbox)

    yield through
    for outbox in connected:
        outbox.disconnect()
    stack.sql(f"DROP USER {user}")


def _readme_grants() -> list[tuple[str, str]]:
    readme = (Path(__file__).resolve().parents[3] / "README.md").read_text()
    return re.findall(r"GRANT (.+? ON )app\.(\w+) TO 'auditexport'", readme)


def test_the_grants_of_the_readme_are_enough_for_a_drain(stack: Stack, granted: Callable[..., Stack]) -> None:
    """A user that may do more than it needs is what an auditor asks about first."""
    grants = ["".join(grant) for grant in _readme_grants()]
    assert len(grants) == 3
    generator.seed_outbox(stack.mysql_url, seed=5, events=300, malformed=5)
    least = granted(*grants)
    assert preflight.check(least.outbox, least.log) == []
    limits = Limits()
    for claim in claiming.claim(least.outbox, owner="least", dead_owners=(), limits=limits):
        fetched = export.fetch(least.outbox, least.log, claim, limits)
        receipt = export.write(least.outbox, least.log, claim, fetched.bodies, limits)
        export.mark(least.outbox, least.log, receipt, limits)
    assert not any(verify.verify(least.outbox, least.log, least.outbox.unverified(10)).values())
    assert stack.counts() == (300, 300)
    assert stack.pending() == 5


def test_a_user_that_may_not_mark_is_refused_before_anything_is_written(granted: Callable[..., Stack]) -> None:
    """Otherwise a whole batch would be in ClickHouse before the first UPDATE is denied."""
    least = granted(
        "SELECT ON clickhouse_outbox",
        "SELECT, INSERT, UPDATE ON clickhouse_outbox_batch",
        "SELECT, INSERT, UPDATE ON clickhouse_outbox_dead_letter",
    )
    (found,) = preflight.check(least.outbox, least.log)
    assert "lacks UPDATE (deleted_at) on clickhouse_outbox" in found.what
    assert re.fullmatch(
        r"GRANT UPDATE \(deleted_at\) ON `\w+`\.clickhouse_outbox TO 'least\d+'@'127\.0\.0\.1'", found.fix
    )
