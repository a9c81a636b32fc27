"""Engines beyond one server: what `init` creates, which settings a URL gives, and what doctor finds.

The embedded ClickHouse has a Keeper in memory, which takes a replicated table and keeps it read-only; and engine
`Remote`, which is Distributed over addresses, here over itself. It has neither ON CLUSTER nor SharedMergeTree: of
those, only the statements are tested.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline import schema as setup
from auditexport_pipeline.cli import main
from auditexport_pipeline.clickhouse.audit_log import INSERT_SETTINGS, ClickHouseAuditLog, connection_arguments
from auditexport_pipeline.clickhouse.engines import LOCAL_TABLE, TABLE, Engine, Layout
from auditexport_pipeline.core.errors import AuditLogUnavailable, InvalidConfig
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.roles import Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import everything_once, ledger
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain
from auditexport_tests.support.faults import findings, the_finding
from auditexport_tests.support.own_clickhouse import OwnClickHouse

DISTRIBUTED = Layout(engine=Engine.DISTRIBUTED, cluster="audit")


def _printed(*options: str) -> str:
    done = CliRunner().invoke(main, ["init", "--print-ddl", *options], env={"AUDITEXPORT_CLICKHOUSE_URL": ""})
    assert done.exit_code == 0, done.output
    return done.output


# ── statements ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("options", "engine"),
    [
        ("", "ReplacingMergeTree"),
        (
            "--replicated",
            "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/{table}', '{replica}')",
        ),
        (
            "--engine replicated --keeper-path /k/{shard}/a --replica r-1 --cluster all",
            "ReplicatedReplacingMergeTree('/k/{shard}/a', 'r-1')",
        ),
        ("--engine replicated --keeper-path ''", "ReplicatedReplacingMergeTree"),
        ("--engine shared", "SharedReplacingMergeTree"),
    ],
)
def test_each_engine_has_its_statement(options: str, engine: str) -> None:
    """Each engine remembers tokens by a setting of its own."""
    printed = _printed(*shlex.split(options))
    window = "replicated_deduplication_window = 10000, replicated_deduplication_window_seconds = 604800,"
    assert f"\nENGINE = {engine}\n" in printed
    assert f"\nSETTINGS {window if options else 'non_replicated_deduplication_window = 10000,'}" in printed
    assert printed.count(" ON CLUSTER 'all'") == (2 if "--cluster" in options else 0)
    assert not re.search(r"\$\w", printed)


def test_a_distributed_table_is_sharded_by_block() -> None:
    """With any other key one INSERT would be parts on several servers, and half of them could be missing."""
    statements = DISTRIBUTED.statements("audit")
    assert list(statements) == [LOCAL_TABLE, TABLE, "audit_logs"]
    engine = "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/{table}', '{replica}')"
    assert engine in statements[LOCAL_TABLE]
    assert statements[TABLE].endswith(f"ENGINE = Distributed('audit', 'audit', '{LOCAL_TABLE}', inserted_at)")
    assert all(" ON CLUSTER 'audit'" in statement for statement in statements.values())
    assert f" AS {LOCAL_TABLE}" in statements[TABLE]


def test_clickhouse_parses_every_statement(stack: Stack) -> None:
    """Statements that the embedded server cannot run are at least valid."""
    for layout in (Layout(), DISTRIBUTED, Layout(engine=Engine.SHARED), Layout(engine=Engine.REPLICATED, cluster="a")):
        for name, statement in layout.statements("audit").items():
            ((formatted,),) = stack.clickhouse("SELECT formatQuerySingleLine({sql:String})", sql=statement)
            assert f" {name}" in str(formatted)
    with pytest.raises(Exception, match=r"SYNTAX_ERROR|Syntax error"):
        stack.clickhouse("SELECT formatQuerySingleLine('CREATE TABLE a ON CLUSTER ENGINE = Memory')")


def test_after_the_printed_statements_init_has_nothing_to_do(stack: Stack) -> None:
    """In some companies another team runs DDL, from what is printed without a server."""
    printed = _printed()
    assert "-- mysql" in printed
    names = re.findall(r"CREATE (?:TABLE|VIEW) IF NOT EXISTS (\w+)", printed)
    stack.sql("DROP TABLE " + ", ".join(name for name in names if name.startswith("clickhouse_outbox_")))
    for name in ("audit_logs", TABLE):
        stack.log.client().command(f"DROP TABLE {name} SYNC")
    mysql, clickhouse = printed.split("-- clickhouse\n")
    for statement in mysql.removeprefix("-- mysql\n").split(";\n"):
        if statement.strip():
            stack.sql(statement.replace(":", r"\:"))
    for statement in clickhouse.split(";\n"):
        if statement.strip():
            stack.log.client().command(statement)
    assert setup.create(stack.outbox, stack.log) == []
    assert preflight.check(stack.outbox, stack.log) == []


@pytest.mark.parametrize(
    ("options", "why"),
    [
        (("--engine", "distributed"), "needs --cluster"),
        (("--engine", "distributed", "--cluster", "a", "--keeper-path", "/one/for/all"), "has no {shard}"),
        (("--engine", "shared", "--cluster", "a"), "has no --cluster"),
        (("--replicated", "--engine", "shared"), "contradict"),
        (("--with-outbox",), "needs a server to ask"),
        (("--cluster", "a' ENGINE = Memory --"), "is no name of a cluster"),
        (("--replicated", "--keeper-path", "/k', 'r') --"), "is no path"),
        (("--replicated", "--replica", "r')"), "is no name of a replica"),
    ],
)
def test_arguments_that_do_not_go_together_are_refused(options: tuple[str, ...], why: str) -> None:
    """One path in Keeper for all shards would make them replicas of each other."""
    done = CliRunner().invoke(main, ["init", "--print-ddl", *options])
    assert done.exit_code == 2
    assert why in done.output


# ── the settings that a URL gives ────────────────────────────────────────────────────────────────


def test_a_url_gives_settings_for_replicas_to_every_statement(stack: Stack) -> None:
    """A look-up without them can ask a replica that does not have a block that was acknowledged with them."""
    log = ClickHouseAuditLog(
        stack.clickhouse_url + "?insert_quorum=auto&select_sequential_consistency=1&load_balancing=in_order"
    )
    names = (
        *("insert_quorum", "insert_quorum_parallel", "select_sequential_consistency", "load_balancing"),
        *("prefer_localhost_replica", "skip_unavailable_shards", "optimize_skip_unused_shards"),
    )
    settings = log.rows("reading settings", "SELECT " + ", ".join(f"toString(getSetting('{name}'))" for name in names))
    assert settings == [("auto", "false", "1", "in_order", "false", "false", "false")]
    assert stack.clickhouse("SELECT toString(getSetting('insert_quorum'))") == [("0",)]


@pytest.mark.parametrize(
    "query",
    ["insert_quorum=some", "insert_quorum=1", "load_balancing=best", "select_sequential_consistency=yes", "x=1"],
)
def test_another_setting_in_a_url_is_refused(query: str) -> None:
    """A typing error there would be a promise that is not kept; and the URL must not change INSERT_SETTINGS."""
    with pytest.raises(InvalidConfig) as refused:
        connection_arguments(f"http://u:hunter2@h/d?{query}")
    assert "hunter2" not in str(refused.value)


@pytest.mark.parametrize(
    ("query", "words", "fatal"),
    [
        ("insert_quorum=auto", "insert_quorum without select_sequential_consistency=1", True),
        (
            "insert_quorum=2&insert_quorum_parallel=1&select_sequential_consistency=1",
            "insert_quorum in parallel",
            True,
        ),
        ("select_sequential_consistency=1", "settings for replicas and audit_logs_raw_v1 is a ReplacingMerge", False),
    ],
)
def test_settings_for_replicas_without_effect_are_found(stack: Stack, query: str, words: str, fatal: bool) -> None:
    """With a quorum that look-ups do not wait for, a row can be marked whose block ClickHouse removes."""
    found = preflight.check(stack.outbox, ClickHouseAuditLog(f"{stack.clickhouse_url}?{query}"))[0]
    assert words in found.what
    assert found.fatal is fatal


# ── Distributed, over this server itself ─────────────────────────────────────────────────────────


def distribute(stack: Stack, engine: str) -> None:
    """Puts the table under a Distributed one, as `init --engine distributed` creates it."""
    client = stack.log.client()
    client.command(
        f"DROP TABLE {TABLE}"
        if (LOCAL_TABLE,) in stack.clickhouse("SHOW TABLES")
        else f"RENAME TABLE {TABLE} TO {LOCAL_TABLE}"
    )
    client.command(f"CREATE TABLE {TABLE} AS {LOCAL_TABLE} ENGINE = {engine}")


def over_itself(stack: Stack, *, shards: int = 1, key: str = "inserted_at") -> None:
    addresses = ",".join(["127.0.0.1"] * shards)
    distribute(stack, f"Remote('{addresses}', '{database(stack)}', '{LOCAL_TABLE}', 'default', '', {key})")


def database(stack: Stack) -> str:
    return stack.clickhouse_url.rsplit("/", 1)[1]


def parts(stack: Stack) -> int:
    ((found,),) = stack.clickhouse(
        f"SELECT uniqExact(name) FROM system.parts WHERE database = currentDatabase() AND table = '{LOCAL_TABLE}' "
        "AND level = 0"
    )
    return int(str(found))


def test_a_drain_through_a_distributed_table_is_exact(stack: Stack) -> None:
    """Claim to verification, reconciliation and view, with the table one level below."""
    over_itself(stack)
    assert findings(stack) == []
    assert findings(stack, Role.READER) == []
    seed_outbox(stack.mysql_url, seed=6, events=300)
    drain(stack.outbox, stack.log, Limits(batch_rows=100), owner="run_1")
    everything_once(stack, 300)
    assert stack.clickhouse("SELECT count() FROM audit_logs") == [(300,)]
    assert stack.log.kept_ms() == 90 * 86_400_000
    assert reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62).clean
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}
    assert parts(stack) == 3
    client = stack.log.client()
    client.command(f"ALTER TABLE {LOCAL_TABLE} MODIFY SETTING non_replicated_deduplication_window = 0")
    client.command(the_finding(stack, f"{LOCAL_TABLE} has no deduplication window").fix)
    assert findings(stack) == []


@pytest.mark.parametrize("point", ["after insert 1", "before record_written 1"])
def test_a_crash_beside_a_distributed_insert_costs_and_doubles_nothing(stack: Stack, point: str) -> None:
    """The look-up goes through the same table, and the token must mean the same on the shard."""
    over_itself(stack, shards=2)
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    seed_outbox(stack.mysql_url, seed=6, events=200)
    limits = Limits(batch_rows=60, mark_rows=20)
    crash_at = CrashPoint(point)
    with pytest.raises(Crash):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), limits, owner="first")
    drain(stack.outbox, stack.log, limits, owner="second", dead_owners=("first",))
    found = stack.clickhouse(f"SELECT count(), uniqExact(workspace_id, event_id) FROM {LOCAL_TABLE}")
    assert (found, stack.pending()) == ([(200, 200)], 0)


BLOCK = (
    f"INSERT INTO {TABLE} (event_id, time, inserted_at, workspace_id, event) "
    "SELECT toString(number), number, 1760000000000, concat('ws_', toString(number % 7)), 'e' FROM numbers(100)"
)


def stored(stack: Stack) -> object:
    return stack.clickhouse(f"SELECT count() FROM {LOCAL_TABLE}")[0][0]


def test_a_token_means_the_same_on_a_shard_and_above(stack: Stack) -> None:
    """ClickHouse's documentation does not say so (its issue 76405 asks). Without the token, both are stored."""
    over_itself(stack, shards=2)
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    client = stack.log.client()
    for _ in range(2):
        client.command(BLOCK, settings={**INSERT_SETTINGS, "insert_deduplication_token": "batch-1-block-1"})
    assert (stored(stack), parts(stack)) == (100, 1)
    client.command(f"TRUNCATE TABLE {LOCAL_TABLE} SYNC")
    for at in (1, 2):
        client.command(
            f"INSERT INTO {TABLE} (event_id, time, inserted_at, workspace_id, event) VALUES ('a', {at}, 1760000000000, 'w', 'e')",
            settings={**INSERT_SETTINGS, "deduplicate_insert": "disable", "insert_deduplicate": 0},
        )
    assert stored(stack) == 2


def test_sharded_by_workspace_one_insert_becomes_several_parts(stack: Stack) -> None:
    """The negative control of the sharding key: the usual one takes a block apart."""
    over_itself(stack, shards=2, key="cityHash64(workspace_id)")
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    stack.log.client().command(BLOCK, settings=INSERT_SETTINGS)
    assert parts(stack) == 2
    the_finding(stack, "is sharded by cityHash64(workspace_id)")


# ── clusters, replicas, profiles and grants, on a server with a configuration of its own ─────────

CONFIG = """
  <zookeeper><implementation>testkeeper</implementation></zookeeper>
  <macros><shard>01</shard><replica>r1</replica></macros>
  <remote_servers>
    <audit><shard><internal_replication>true</internal_replication>
      <replica><host>127.0.0.1</host><port>1</port></replica><replica><host>127.0.0.2</host><port>1</port></replica>
    </shard></audit>
    <torn><shard>
      <replica><host>127.0.0.1</host><port>1</port></replica><replica><host>127.0.0.2</host><port>1</port></replica>
    </shard></torn>
  </remote_servers>
"""
SHORT_DEFAULT = (
    "<replicated_merge_tree><replicated_deduplication_window_seconds>100</replicated_deduplication_window_seconds>"
    "</replicated_merge_tree>"
)


@pytest.fixture(scope="module")
def own(mysql_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnClickHouse]:
    with OwnClickHouse(mysql_server, tmp_path_factory.mktemp("own"), CONFIG).running() as own:
        yield own


def test_a_replicated_table_is_created_and_its_replica_checked(own: OwnClickHouse) -> None:
    """The statement of `init --engine replicated` is valid for an engine and a Keeper, and doctor names what is wrong."""
    stack = own.new_stack()
    client = stack.log.client()
    for name in ("audit_logs", TABLE):
        client.command(f"DROP TABLE {name} SYNC")
    assert setup.create(stack.outbox, stack.log, layout=Layout(engine=Engine.REPLICATED)) == [TABLE, "audit_logs"]
    ((engine, path),) = stack.clickhouse(f"SELECT engine, zookeeper_path FROM system.replicas WHERE table = '{TABLE}'")
    assert (engine, path) == ("ReplicatedReplacingMergeTree", f"/clickhouse/tables/01/{database(stack)}/{TABLE}")
    the_finding(stack, f"this replica of {TABLE} is read-only", fatal=False)
    seed_outbox(stack.mysql_url, seed=6, events=5, writers=1)
    with pytest.raises(AuditLogUnavailable):
        drain(stack.outbox, stack.log, Limits(insert_timeout_s=1), owner="run_1")
    assert stack.pending() == 5


def test_a_replicated_table_that_forgets_tokens_too_soon_is_found(own: OwnClickHouse) -> None:
    """Its own setting can be too short, or the server's default for tables without one."""
    stack = own.new_stack()
    ddl = Layout(engine=Engine.REPLICATED).statements("audit")[TABLE]
    for number, (setting, defaults) in enumerate(
        [("replicated_deduplication_window_seconds = 100, ", ""), ("", SHORT_DEFAULT)]
    ):
        own.restart(extra=defaults)
        client = stack.log.client()
        client.command(f"DROP TABLE {TABLE} SYNC")
        short = ddl.replace("replicated_deduplication_window_seconds = 604800, ", setting)
        client.command(short.replace("/{table}", f"/{number}"))
        found = findings(stack)[0]
        assert "remembers tokens for 100 s, and an INSERT can arrive again for 360 s" in found.what
        assert found.fatal
        assert found.fix == f"ALTER TABLE {TABLE} MODIFY SETTING replicated_deduplication_window_seconds = 604800"
    client.command(f"DROP TABLE {TABLE} SYNC")
    client.command(ddl.replace("/{table}", "/right"))
    assert ["read-only" in finding.what for finding in findings(stack)] == [True]


def test_a_cluster_is_compared_with_the_url(own: OwnClickHouse) -> None:
    """Cluster and URL together decide whether a look-up asks a replica that has the block."""
    stack = own.new_stack()

    def over(cluster: str, key: str = "inserted_at", place: str = database(stack)) -> None:
        distribute(stack, f"Distributed('{cluster}', '{place}', '{LOCAL_TABLE}', {key})")

    over("audit")
    the_finding(stack, "and a look-up asks any of them")
    assert preflight.check(stack.outbox, ClickHouseAuditLog(stack.clickhouse_url + "?load_balancing=in_order")) == []
    over("torn")
    the_finding(stack, "without internal_replication")
    over("audit", "cityHash64(workspace_id)")  # one shard: with any key a block goes there whole
    the_finding(stack, "and a look-up asks any of them")
    over("audit", place="elsewhere")  # as on a server without a shard
    seen = {result.about: result.seen for result in preflight.examine(stack.outbox, stack.log)}
    assert seen[f"ClickHouse table {TABLE}"] == "Distributed over cluster audit, by inserted_at"
    assert "run doctor on a server of each shard" in seen[f"ClickHouse table {LOCAL_TABLE}"]


def test_grants_on_a_shards_own_table_and_a_pinned_setting_are_found(own: OwnClickHouse) -> None:
    """A server that is a shard writes to its own table as the same user: each would refuse the first INSERT."""
    stack = own.new_stack()
    over_itself(stack)
    grants = (
        f"GRANT SELECT, INSERT ON {database(stack)}.{TABLE}",
        "GRANT CREATE TEMPORARY TABLE ON *.*",
        "GRANT READ ON FILE",
        "GRANT READ ON REMOTE",
        f"GRANT SHOW TABLES, SHOW COLUMNS ON {database(stack)}.*",
    )
    pinned = "<constraints><distributed_foreground_insert><const/></distributed_foreground_insert></constraints>"
    own.restart(grants=grants, profile=pinned)
    whats = sorted(found.what for found in findings(stack) if found.fatal)
    assert len(whats) == 2
    assert f"lacks SELECT, INSERT on {database(stack)}.{LOCAL_TABLE}" in whats[0]
    assert "pins distributed_foreground_insert = 0" in whats[1]
    own.restart(grants=(*grants, f"GRANT SELECT, INSERT ON {database(stack)}.{LOCAL_TABLE}"))
    assert findings(stack) == []
    seed_outbox(stack.mysql_url, seed=6, events=20, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="run_1")
    everything_once(stack, 20)
