"""What doctor finds in ClickHouse: the table, its view and the server. As `test_doctor_mysql`."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_pipeline.clickhouse import catalogue
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import columns_of
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.faults import Fault, claims_nothing, findings, the_finding

pytestmark = pytest.mark.clickhouse_sensitive

TABLE = "audit_logs_raw_v1"
NOW = {"mutations_sync": 2, "alter_sync": 2}
KEY = ("workspace_id", "bucket", "time", "event_id", "inserted_at")
STAMP = "MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at))"
# Each after ALTER TABLE.
FAULTS = (
    Fault("RESET SETTING non_replicated_deduplication_window", "no deduplication window"),
    Fault("MODIFY SETTING non_replicated_deduplication_window = 0", "no deduplication window"),
    Fault("MODIFY SETTING non_replicated_deduplication_window = 5", "a deduplication window of 5 blocks", False),
    Fault("MODIFY COLUMN description Nullable(String)", "description is Nullable(String)"),
    Fault(
        "DROP INDEX event_idx, MODIFY COLUMN event LowCardinality(Nullable(String))",
        "event is LowCardinality(Nullable(String))",
    ),
    Fault("MODIFY COLUMN `targets.name` Array(Nullable(String))", "targets.name is Array(Nullable(String))"),
    Fault("MODIFY COLUMN actor_meta String", "actor_meta is String"),
    Fault("MODIFY COLUMN meta_text REMOVE MATERIALIZED", "meta_text is a plain column", False),
    Fault("MODIFY COLUMN user_agent String ALIAS ''", "user_agent is alias"),
    Fault("MODIFY COLUMN remote_ip String MATERIALIZED ''", "remote_ip is materialized"),
    Fault(f"{STAMP} + INTERVAL 30 DAY", "is 30 days", False),
    Fault(f"{STAMP} + INTERVAL 1 HOUR", "the TTL"),
    Fault("MODIFY TTL toDateTime(fromUnixTimestamp64Milli(time)) + INTERVAL 90 DAY", "counts from time"),
)


@pytest.fixture(scope="module")
def healed(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Databases for all faults: each test repairs its fault, and sees that nothing is left."""
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        export(stack, seed=8)
        yield stack


def export(stack: Stack, *, seed: int, events: int = 5) -> None:
    seed_outbox(stack.mysql_url, seed=seed, events=events, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner=f"drain {seed}")
    assert stack.pending() == 0


@pytest.mark.parametrize(("number", "fault"), [*enumerate(FAULTS)], ids=lambda value: getattr(value, "words", None))
def test_a_fault_in_the_clickhouse_table_is_found_and_its_fix_heals_it(
    healed: Stack, number: int, fault: Fault
) -> None:
    """An INSERT into such a table succeeds; entries are lost or doubled later. Afterwards INSERTs still succeed."""
    client = healed.log.client()
    # An old engine alters no column together with its index.
    for change in re.split(", (?=MODIFY COLUMN)", fault.statement):
        client.command(f"ALTER TABLE {TABLE} {change}", settings=NOW)
    client.command(the_finding(healed, fault.words, fatal=fault.fatal).fix, settings=NOW)
    assert findings(healed) == []
    export(healed, seed=100 + number, events=1)


def test_a_short_ttl_is_fatal_to_the_operator(healed: Stack) -> None:
    """A requeued entry keeps its inserted_at and would be dropped on arrival, without an error."""
    stack = healed
    stack.log.client().command(f"ALTER TABLE {TABLE} {STAMP} + INTERVAL 4 WEEK")
    fix = the_finding(stack, "is 28 days", role=Role.OPERATOR).fix
    assert preflight.check(stack.outbox, stack.log, role=Role.OPERATOR, retention_days=20) == []
    stack.log.client().command(fix, settings=NOW)


def test_a_view_without_final_is_found_for_readers(healed: Stack) -> None:
    """Readers trust the view to show each event once."""
    stack = healed
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    assert "does not exist" in findings(stack, Role.READER)[0].what
    client.command("CREATE VIEW audit_logs AS SELECT * FROM audit_logs_raw_v1")
    drop, init = the_finding(stack, "without FINAL", fatal=False, role=Role.READER).fix.split(", then ")
    client.command(drop)
    assert init == "`auditexport init`"
    setup.create(stack.outbox, stack.log)
    assert findings(stack, Role.READER) == []


@pytest.mark.slow
def test_the_printed_statement_adds_any_column(stack: Stack) -> None:
    """A declaration is printed only when its column is missing, and ClickHouse must accept each."""
    client = stack.log.client()
    ((indexes,),) = client.query(
        "SELECT groupArray(name) FROM system.data_skipping_indices WHERE database = currentDatabase()"
    ).result_rows
    for index in indexes:
        client.command(f"ALTER TABLE {TABLE} DROP INDEX {index}")
    mirrors = {"meta": "meta_text", "targets.meta": "targets_meta_text"}
    for column in columns_of(VERSIONS["audit_log.v1"].pieces["ddl"]):
        if column not in KEY:
            for dropped in (mirrors.get(column), column):
                if dropped:
                    client.command(f"ALTER TABLE {TABLE} DROP COLUMN `{dropped}`", settings=NOW)
            (found,) = findings(stack)
            assert found.fatal
            client.command(found.fix, settings=NOW)
            assert findings(stack) == []


MONTH = "PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(inserted_at, 'UTC'))"


@pytest.mark.parametrize(
    ("right", "wrong", "words", "fatal"),
    [
        ("ReplacingMergeTree", "MergeTree", "is a MergeTree", True),
        (MONTH, "", "is not partitioned by month", False),
        (MONTH, "PARTITION BY bucket", "is partitioned by bucket", True),
        (f"ORDER BY ({', '.join(KEY[:4])})", "ORDER BY (workspace_id, event_id)", "sorted by work", True),
        ("`time` Int64", "`time` UInt64", "time is UInt64", True),
        ("`inserted_at` Int64", "`inserted_at` UInt64", "inserted_at is UInt64", True),
    ],
)
def test_a_table_of_another_kind_is_created_anew_as_printed(
    stack: Stack, right: str, wrong: str, words: str, fatal: bool
) -> None:
    """ClickHouse alters none of these in place: three steps, each printed as it is typed."""
    export(stack, seed=8, events=20)
    client = stack.log.client()
    ((ddl,),) = stack.clickhouse(
        f"SELECT create_table_query FROM system.tables WHERE name = '{TABLE}' AND database = currentDatabase()"
    )
    without_ttl = re.sub(r" TTL .+? SETTINGS", " SETTINGS", str(ddl)) if "inserted_at" in right else str(ddl)
    assert right in without_ttl
    client.command(f"RENAME TABLE {TABLE} TO before")
    client.command(without_ttl.replace(right, wrong))
    client.command(f"INSERT INTO {TABLE} SELECT * FROM before")
    assert setup.create(stack.outbox, stack.log) == []  # `init` alters nothing
    found = findings(stack)[0]
    assert words in found.what
    assert found.fatal is fatal
    if fatal:
        claims_nothing(stack)
    rename, init, copy = found.fix.removeprefix("create it anew while no drain runs: ").split("; then ")
    client.command(rename)
    assert "auditexport init" in init
    setup.create(stack.outbox, stack.log)
    client.command(copy)
    assert findings(stack) == []
    assert stack.counts() == (20, 20)
    assert not drain(stack.outbox, stack.log, Limits(), owner="after")
    assert stack.clickhouse(f"SELECT * FROM {TABLE} ORDER BY event_id") == stack.clickhouse(
        f"SELECT * FROM {TABLE}_old ORDER BY event_id"
    )


def test_a_missing_table_is_fatal_to_every_role_but_the_owner(stack: Stack) -> None:
    """The owner creates it."""
    client = stack.log.client()
    client.command("DROP VIEW audit_logs")
    client.command(f"DROP TABLE {TABLE} SYNC")
    assert findings(stack, Role.OWNER) == []
    for role in set(Role) - {Role.OWNER}:
        found = the_finding(stack, f"ClickHouse table {TABLE} does not exist or is not readable", role=role)
        assert "auditexport init" in found.fix
    setup.create(stack.outbox, stack.log)
    assert [findings(stack, role) for role in Role] == [[]] * len(Role)


def test_a_clickhouse_that_is_too_old_is_fatal(healed: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its JSON type stores metas differently. Only the result of version() is faked."""
    statement = catalogue._SQL["server"]
    monkeypatch.setitem(catalogue._SQL, "server", re.sub(r"\bversion\(\)", "'24.8.14.39'", statement))
    the_finding(healed, "24.8.14.39")
