"""Engines beyond one server: what `init` creates for each, what the exporter asks of them, and what doctor finds.

The embedded ClickHouse has a Keeper in its own memory, which takes a replicated table and keeps it read-only, for no replica
can reach it; and engine `Remote`, which is Distributed over addresses, and runs over itself. It has neither Distributed over
a cluster, nor ON CLUSTER, nor SharedMergeTree: of those, only the statements are tested.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator
from pathlib import Path

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
from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.roles import Role
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain
from auditexport_tests.support.engines import local_clickhouse
from auditexport_tests.support.faults import findings, the_finding
from auditexport_tests.support.users import users_xml

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
    """A token is worth what the window of the engine remembers of it, and each engine has a window of its own."""
    printed = _printed(*shlex.split(options))
    window = "replicated_deduplication_window = 10000, replicated_deduplication_window_seconds = 604800,"
    assert f"\nENGINE = {engine}\n" in printed
    assert f"\nSETTINGS {window if options else 'non_replicated_deduplication_window = 10000,'}" in printed
    assert printed.count(" ON CLUSTER 'all'") == (2 if "--cluster" in options else 0)
    assert not re.search(r"\$\w", printed)


def test_a_distributed_table_lies_over_the_shards_and_goes_by_block() -> None:
    """By any other key one INSERT would be several parts on several servers, and half of them could be missing."""
    made = DISTRIBUTED.statements("audit")
    assert list(made) == [LOCAL_TABLE, TABLE, "audit_logs"]
    assert (
        "ReplicatedReplacingMergeTree('/clickhouse/tables/{shard}/{database}/{table}', '{replica}')"
        in made[LOCAL_TABLE]
    )
    assert made[TABLE].endswith(f"ENGINE = Distributed('audit', 'audit', '{LOCAL_TABLE}', inserted_at)")
    assert all(" ON CLUSTER 'audit'" in statement for statement in made.values())
    assert f" AS {LOCAL_TABLE}" in made[TABLE]


def test_the_engine_parses_every_statement(stack: Stack) -> None:
    """What cannot be run here is at least the language that ClickHouse speaks."""
    for layout in (Layout(), DISTRIBUTED, Layout(engine=Engine.SHARED), Layout(engine=Engine.REPLICATED, cluster="a")):
        for name, statement in layout.statements("audit").items():
            ((formatted,),) = stack.clickhouse("SELECT formatQuerySingleLine({sql:String})", sql=statement)
            assert f" {name}" in str(formatted)
    with pytest.raises(Exception, match=r"SYNTAX_ERROR|Syntax error"):
        stack.clickhouse("SELECT formatQuerySingleLine('CREATE TABLE a ON CLUSTER ENGINE = Memory')")


def test_printing_needs_no_server_and_says_all_that_init_does(stack: Stack) -> None:
    """Where a team of its own runs DDL, the statements are the hand-over, and init has nothing left to do."""
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
    """One path in Keeper for all shards makes replicas of them, and that shows when they hold each other's events."""
    done = CliRunner().invoke(main, ["init", "--print-ddl", *options])
    assert done.exit_code == 2
    assert why in done.output


# ── the settings that a URL gives ────────────────────────────────────────────────────────────────


def test_a_url_gives_settings_for_replicas_to_every_statement(stack: Stack) -> None:
    """A look-up without them can ask a replica that has not got what an INSERT with them acknowledged."""
    log = ClickHouseAuditLog(
        stack.clickhouse_url + "?insert_quorum=auto&select_sequential_consistency=1&load_balancing=in_order"
    )
    names = (
        *("insert_quorum", "insert_quorum_parallel", "select_sequential_consistency", "load_balancing"),
        *("prefer_localhost_replica", "skip_unavailable_shards", "optimize_skip_unused_shards"),
    )
    asked = log.rows("asking", "SELECT " + ", ".join(f"toString(getSetting('{name}'))" for name in names))
    assert asked == [("auto", "false", "1", "in_order", "false", "false", "false")]
    plain = stack.log.client().query("SELECT toString(getSetting('insert_quorum'))").result_rows
    assert plain == [("0",)]
    log.client().close_connections()


@pytest.mark.parametrize(
    "query",
    ["insert_quorum=some", "insert_quorum=1", "load_balancing=best", "select_sequential_consistency=yes", "x=1"],
)
def test_a_setting_that_is_none_of_them_is_refused(query: str) -> None:
    """A typing error there would be a promise that nobody keeps; and it is no way around INSERT_SETTINGS."""
    with pytest.raises(InvalidConfig) as refused:
        connection_arguments(f"http://u:hunter2@h/d?{query}")
    assert "hunter2" not in str(refused.value)


def test_an_insert_says_what_it_needs_of_a_distributed_or_replicated_table() -> None:
    """Each of these is off by default, or can be turned off in a profile."""
    assert INSERT_SETTINGS["distributed_foreground_insert"] == 1
    assert INSERT_SETTINGS["async_insert"] == 0
    assert INSERT_SETTINGS["insert_deduplicate"] == 1


# ── Distributed, over this server itself ─────────────────────────────────────────────────────────


def _lay_over(stack: Stack, *, shards: int = 1, key: str = "inserted_at") -> None:
    """The table goes under a Distributed one, as `init --engine distributed` has it, by addresses instead of a cluster."""
    client = stack.log.client()
    client.command(f"RENAME TABLE {TABLE} TO {LOCAL_TABLE}")
    addresses = ",".join(["127.0.0.1"] * shards)
    database = stack.clickhouse_url.rsplit("/", 1)[1]
    client.command(
        f"CREATE TABLE {TABLE} AS {LOCAL_TABLE} "
        f"ENGINE = Remote('{addresses}', '{database}', '{LOCAL_TABLE}', 'default', '', {key})"
    )


def _parts(stack: Stack) -> int:
    ((parts,),) = stack.clickhouse(
        f"SELECT uniqExact(name) FROM system.parts WHERE database = currentDatabase() AND table = '{LOCAL_TABLE}' "
        "AND level = 0"
    )
    return int(str(parts))


def test_a_drain_through_a_distributed_table_is_exact(stack: Stack) -> None:
    """Claim to verification, reconciliation and view, with the table one level below."""
    _lay_over(stack)
    assert findings(stack) == []
    assert findings(stack, Role.READER) == []
    seed_outbox(stack.mysql_url, seed=6, events=300)
    drain(stack.outbox, stack.log, Limits(batch_rows=100), owner="run_1")
    assert stack.counts() == (300, 300)
    assert stack.pending() == 0
    ((seen,),) = stack.clickhouse("SELECT count() FROM audit_logs")
    assert seen == 300
    assert stack.log.kept_ms() == 90 * 86_400_000
    seeing = reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62)
    assert seeing.clean
    assert {row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")} == {
        "verified"
    }
    assert _parts(stack) == 3


@pytest.mark.parametrize("point", ["after insert 1", "after insert 3", "before record_written 1", "after mark 1"])
def test_a_crash_beside_a_distributed_insert_costs_and_doubles_nothing(stack: Stack, point: str) -> None:
    """The look-up goes through the same table, and the token must mean the same on the shard."""
    _lay_over(stack, shards=2)
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    seed_outbox(stack.mysql_url, seed=6, events=200)
    limits = Limits(batch_rows=60, mark_rows=20)
    crash_at = CrashPoint(point)
    with pytest.raises(Crash):
        drain(CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(stack.log, crash_at), limits, owner="first")
    drain(stack.outbox, stack.log, limits, owner="second", dead_owners=("first",))
    ((stored, events),) = stack.clickhouse(f"SELECT count(), uniqExact(workspace_id, event_id) FROM {LOCAL_TABLE}")
    assert (stored, events) == (200, 200)
    assert stack.pending() == 0


BLOCK = (
    f"INSERT INTO {TABLE} (event_id, time, inserted_at, workspace_id, event) "
    "SELECT toString(number), number, 1760000000000, concat('ws_', toString(number % 7)), 'e' FROM numbers(100)"
)


def _stored(stack: Stack) -> object:
    return stack.clickhouse(f"SELECT count() FROM {LOCAL_TABLE}")[0][0]


def test_a_token_means_the_same_on_a_shard_and_above(stack: Stack) -> None:
    """ClickHouse's documentation does not say so (its issue 76405 asks), so it is tried, and once without."""
    _lay_over(stack, shards=2)
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    client = stack.log.client()
    for _ in range(2):
        client.command(BLOCK, settings={**INSERT_SETTINGS, "insert_deduplication_token": "batch-1-block-1"})
    assert (_stored(stack), _parts(stack)) == (100, 1)
    client.command(f"TRUNCATE TABLE {LOCAL_TABLE} SYNC")
    for at in (1, 2):
        client.command(
            f"INSERT INTO {TABLE} (event_id, time, inserted_at, workspace_id, event) VALUES ('a', {at}, 1760000000000, 'w', 'e')",
            settings={**INSERT_SETTINGS, "deduplicate_insert": "disable", "insert_deduplicate": 0},
        )
    assert _stored(stack) == 2


def test_by_workspace_one_insert_becomes_several_parts(stack: Stack) -> None:
    """The negative control of the sharding key: what is usual elsewhere takes a block apart."""
    _lay_over(stack, shards=2, key="cityHash64(workspace_id)")
    stack.clickhouse(f"SYSTEM STOP MERGES {LOCAL_TABLE}")
    stack.log.client().command(BLOCK, settings=INSERT_SETTINGS)
    assert _parts(stack) == 2
    the_finding(stack, "is sharded by cityHash64(workspace_id)")


def test_a_fault_of_a_shards_table_is_found_through_the_distributed_one(stack: Stack) -> None:
    """Whoever asks the table on top would see no window, no key and no TTL at all."""
    _lay_over(stack)
    client = stack.log.client()
    client.command(f"ALTER TABLE {LOCAL_TABLE} MODIFY SETTING non_replicated_deduplication_window = 0")
    client.command(the_finding(stack, f"{LOCAL_TABLE} has no deduplication window").fix)
    assert findings(stack) == []


# ── clusters, replicas, profiles and grants, on a server with a configuration of its own ─────────

CONFIG = """
<clickhouse>
  <users_config>{users}</users_config>
  <zookeeper><implementation>testkeeper</implementation></zookeeper>
  <macros><shard>01</shard><replica>r1</replica></macros>
  {extra}
  <remote_servers>
    <audit><shard><internal_replication>true</internal_replication>
      <replica><host>127.0.0.1</host><port>1</port></replica><replica><host>127.0.0.2</host><port>1</port></replica>
    </shard></audit>
    <torn><shard>
      <replica><host>127.0.0.1</host><port>1</port></replica><replica><host>127.0.0.2</host><port>1</port></replica>
    </shard></torn>
  </remote_servers>
</clickhouse>
"""
SHORT_DEFAULT = (
    "<replicated_merge_tree><replicated_deduplication_window_seconds>100</replicated_deduplication_window_seconds>"
    "</replicated_merge_tree>"
)
ALL = ("GRANT ALL ON *.* WITH GRANT OPTION",)


class Configured:
    """A ClickHouse whose configuration a test writes, and a stack on it."""

    def __init__(self, server: LocalClickHouse, stack: Stack, directory: Path) -> None:
        self.server = server
        self.stack = stack
        self._directory = directory

    def restart(self, *, profile: str = "", grants: tuple[str, ...] = ALL, extra: str = "") -> None:
        self.stack.log.client().close_connections()
        self.server.stop()
        configure(self.server, self._directory, profile=profile, grants=grants, extra=extra)
        self.server.start()
        preflight.forget()


def configure(
    server: LocalClickHouse, directory: Path, *, profile: str = "", grants: tuple[str, ...] = ALL, extra: str = ""
) -> None:
    users, config = directory / "users.xml", directory / "config.xml"
    users.write_text(users_xml(grants, profile))
    config.write_text(CONFIG.format(users=users, extra=extra))
    server.config = config


@pytest.fixture
def configured(mysql_server: str, tmp_path: Path) -> Iterator[Configured]:
    server = local_clickhouse(tmp_path / "clickhouse")
    configure(server, tmp_path)
    with server, fresh_stack(mysql_server, server.url.removesuffix("default")) as stack:
        configured = Configured(server, stack, tmp_path)
        yield configured
        configured.restart()


def test_a_replicated_table_is_created_and_its_replica_checked(configured: Configured) -> None:
    """The statement of `init --engine replicated` meets an engine and a Keeper, and what is wrong then has a name."""
    stack = configured.stack
    client = stack.log.client()
    for name in ("audit_logs", TABLE):
        client.command(f"DROP TABLE {name} SYNC")
    assert setup.create(stack.outbox, stack.log, layout=Layout(engine=Engine.REPLICATED)) == [TABLE, "audit_logs"]
    ((engine, path),) = stack.clickhouse(f"SELECT engine, zookeeper_path FROM system.replicas WHERE table = '{TABLE}'")
    database = stack.clickhouse_url.rsplit("/", 1)[1]
    assert (engine, path) == ("ReplicatedReplacingMergeTree", f"/clickhouse/tables/01/{database}/{TABLE}")
    the_finding(stack, f"this replica of {TABLE} is read-only", fatal=False)
    seed_outbox(stack.mysql_url, seed=6, events=5, writers=1)
    with pytest.raises(AuditLogUnavailable):
        drain(stack.outbox, stack.log, Limits(insert_timeout_s=1), owner="run_1")
    assert stack.pending() == 5


@pytest.mark.parametrize(("said", "defaults"), [(True, ""), (False, SHORT_DEFAULT)], ids=["the table", "the server"])
def test_a_replicated_table_that_forgets_tokens_within_a_lease_is_found(
    configured: Configured, said: bool, defaults: str
) -> None:
    """Whether the table says so or the server's configuration for tables that say nothing."""
    stack = configured.stack
    configured.restart(extra=defaults)
    ddl = Layout(engine=Engine.REPLICATED).statements("audit")[TABLE]
    client = stack.log.client()
    client.command(f"DROP TABLE {TABLE} SYNC")
    short = "replicated_deduplication_window_seconds = 100, " if said else ""
    client.command(ddl.replace("replicated_deduplication_window_seconds = 604800, ", short))
    found = findings(stack)[0]
    assert "remembers tokens for 100 s, and a lease and its INSERT can last 360 s" in found.what
    assert found.fatal
    assert found.fix == f"ALTER TABLE {TABLE} MODIFY SETTING replicated_deduplication_window_seconds = 604800"
    client.command(f"DROP TABLE {TABLE} SYNC")
    client.command(ddl.replace("/{table}", "/again"))
    assert ["read-only" in finding.what for finding in findings(stack)] == [True]


def test_a_distributed_table_without_a_shard_here_says_so(
    configured: Configured,
) -> None:
    """A server that holds no shard says so, instead of calling a table wrong that it cannot see."""
    stack = configured.stack
    client = stack.log.client()
    client.command(f"RENAME TABLE {TABLE} TO kept")
    client.command(
        f"CREATE TABLE {TABLE} AS kept ENGINE = Distributed('audit', 'elsewhere', '{LOCAL_TABLE}', inserted_at)"
    )
    seen = {result.about: result.seen for result in preflight.examine(stack.outbox, stack.log)}
    assert seen[f"ClickHouse table {TABLE}"] == "Distributed over cluster audit, by inserted_at"
    assert "run doctor on a server of each shard" in seen[f"ClickHouse table {LOCAL_TABLE}"]


@pytest.mark.parametrize(
    ("query", "found", "fatal"),
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
def test_settings_for_replicas_that_promise_nothing_are_found(
    stack: Stack, query: str, found: str, fatal: bool
) -> None:
    """A quorum that look-ups do not wait for lets a row be marked whose block ClickHouse takes back."""
    log = ClickHouseAuditLog(f"{stack.clickhouse_url}?{query}")
    seen = preflight.check(stack.outbox, log)
    assert found in seen[0].what
    assert seen[0].fatal is fatal
    log.client().close_connections()


def test_a_cluster_of_replicas_is_compared_with_the_url(configured: Configured) -> None:
    """Whether a look-up asks the replica that has the block is decided in two places that nobody reads together."""
    stack = configured.stack
    client = stack.log.client()
    client.command(f"RENAME TABLE {TABLE} TO {LOCAL_TABLE}")
    database = stack.clickhouse_url.rsplit("/", 1)[1]

    def over(cluster: str, key: str = "inserted_at") -> None:
        client.command(f"DROP TABLE IF EXISTS {TABLE} SYNC")
        client.command(
            f"CREATE TABLE {TABLE} AS {LOCAL_TABLE} ENGINE = Distributed('{cluster}', '{database}', '{LOCAL_TABLE}', {key})"
        )

    over("audit")
    the_finding(stack, "and a look-up asks any of them")
    log = ClickHouseAuditLog(stack.clickhouse_url + "?load_balancing=in_order")
    assert preflight.check(stack.outbox, log) == []
    log.client().close_connections()
    over("torn")
    the_finding(stack, "without internal_replication")
    over("audit", "cityHash64(workspace_id)")  # one shard: whatever the key is, a block goes there whole
    the_finding(stack, "and a look-up asks any of them")


def test_a_profile_that_pins_the_way_of_an_insert_is_found(configured: Configured) -> None:
    """Every INSERT of ours would be refused, and one without the setting acknowledged before a shard has it."""
    configured.restart(
        profile="<constraints><distributed_foreground_insert><const/></distributed_foreground_insert></constraints>"
    )
    the_finding(configured.stack, "pins distributed_foreground_insert = 0")
    configured.restart()
    assert findings(configured.stack) == []


def test_the_grants_of_a_shards_own_table_are_asked_for(configured: Configured) -> None:
    """A server that is a shard itself writes to its own table as the same user; a refusal there comes at the first INSERT."""
    stack = configured.stack
    _lay_over(stack)
    database = stack.clickhouse_url.rsplit("/", 1)[1]
    on_top = (
        f"GRANT SELECT, INSERT ON {database}.{TABLE}",
        "GRANT CREATE TEMPORARY TABLE ON *.*",
        "GRANT READ ON FILE",
        "GRANT READ ON REMOTE",
        f"GRANT SHOW TABLES, SHOW COLUMNS ON {database}.*",
    )
    configured.restart(grants=on_top)
    the_finding(stack, f"lacks SELECT, INSERT on {database}.{LOCAL_TABLE}")
    configured.restart(grants=(*on_top, f"GRANT SELECT, INSERT ON {database}.{LOCAL_TABLE}"))
    assert findings(stack) == []
    seed_outbox(stack.mysql_url, seed=6, events=20, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="run_1")
    assert stack.counts() == (20, 20)
