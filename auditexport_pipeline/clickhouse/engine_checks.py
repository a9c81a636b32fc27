"""Looking at a destination table: what it stands on, from one server to shards of replicas, and whether that keeps an
event once. The same questions for the table of every payload version.

What belongs here: engine, keys, sharding, replicas and the deduplication window, what each answer breaks and how it is
mended. What does not: columns, TTL and grants (`checks`, `version_checks`), the statements
(`checks.sql`), and what `init` creates (`support.engines`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from auditexport_pipeline.clickhouse.connection import Connection, connection_arguments, translated
from auditexport_pipeline.clickhouse.engines import DEDUPLICATION_WINDOW, DEDUPLICATION_WINDOW_S, Engine, family_of
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.versions import SORT_KEY, columns_in, top_level_parts
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/checks.sql")
# Fewer tokens than a run can have INSERTs on their way at once, several times over.
SMALLEST_WINDOW = 100
# For so long an INSERT that was given up can still arrive: the lease to its end, and the time it may take. A token that
# is forgotten sooner does not hold the two apart.
SHORTEST_WINDOW_S = 2 * Limits().inserts_s
# Two replicas that both INSERTs and look-ups go to in the same order, as long as they live.
_STICKY = ("in_order", "first_or_random")


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table as `system.tables` has it."""

    name: str
    database: str
    engine: str
    engine_full: str
    partition_key: str
    sorting_key: str
    created_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Under:
    """What a Distributed table says of itself: over which cluster and table, and what chooses the shard."""

    cluster: str
    database: str
    table: str
    sharding_key: str


def table_of(row: Sequence[str]) -> Table:
    """A row of `clickhouse_tables`, `clickhouse_table` or `version_tables`."""
    return Table(**dict(zip(Table.__slots__, row, strict=True)))


def under_of(table: Table) -> Under | None:
    """Engines Remote and RemoteSecure are Distributed ones that name addresses in the cluster's place."""
    found = re.match(r"(Distributed|Remote|RemoteSecure)\((.*?)\)(?: SETTINGS |$)", table.engine_full, re.DOTALL)
    if table.engine != "Distributed" or found is None:
        return None
    arguments = [part.strip().strip("'") for part in top_level_parts(found[2])]
    cluster = arguments[0] if found[1] == "Distributed" else ""
    key = arguments[3] if found[1] == "Distributed" and len(arguments) > 3 else ""
    if found[1] != "Distributed" and len(arguments) > 3 and not found[2].rstrip().endswith("'"):
        key = arguments[-1]
    return Under(cluster=cluster, database=arguments[1] or table.database, table=arguments[2], sharding_key=key)


def held_by(client: Connection, table: Table) -> Table | None:
    """The table with keys, window and TTL: under a Distributed one, that of this server, or None where it has none."""
    under = under_of(table)
    if under is None:
        return table
    parameters = {"database": under.database, "table": under.table}
    found = client.query(_SQL["table"], parameters=parameters).result_rows
    return table_of(found[0]) if found else None


def init_for(table: Table) -> str:
    """The `auditexport init` that creates a table beside this one, on what this one stands on."""
    under = under_of(table)
    family = family_of(table.engine)
    if under is not None:
        return f"`auditexport init --engine distributed --cluster {under.cluster or 'NAME'}`"
    if family is Engine.REPLICATED:
        return "`auditexport init --engine replicated`, with --cluster NAME where tables are created on a cluster"
    return "`auditexport init`" if family is Engine.MERGE_TREE else f"`auditexport init --engine {family.value}`"


def distributed(client: Connection, url: str, name: str, under: Under) -> Look:
    """A block has to reach one shard whole, and what reads it back has to ask a replica that has it."""
    shards, replicas, internally = 0, 0, 1
    asked = f"cluster {under.cluster}"
    if under.cluster:
        try:
            with translated("looking at the cluster"):
                ((shards, replicas, internally),) = client.query(
                    _SQL["cluster"], parameters={"cluster": under.cluster}
                ).result_rows
        except SetupIncomplete:
            asked = f"cluster {under.cluster}, not asked: GRANT SELECT ON system.clusters is missing"
    findings = []
    if under.sharding_key != "inserted_at" and shards != 1 and (under.sharding_key or shards > 1):
        findings.append(
            Finding(
                what=f"{name} is sharded by {under.sharding_key or 'nothing'}",
                breaks="one INSERT becomes parts on several shards, and a crash between them leaves half a block",
                fix=f"DROP TABLE {name}, which holds nothing itself; then `auditexport init --engine distributed "
                f"--cluster {under.cluster or 'NAME'}`",
            )
        )
    settings = connection_arguments(url).get("settings", {})
    if replicas > 1 and not internally:
        findings.append(
            Finding(
                what=f"cluster {under.cluster} has shards of {replicas} replicas without internal_replication",
                breaks="each INSERT is sent to every replica by itself, and one that fails leaves them different",
                fix=f"in remote_servers, internal_replication = true for each shard of {under.cluster}",
            )
        )
    elif replicas > 1 and settings.get("load_balancing") not in _STICKY and "insert_quorum" not in settings:
        findings.append(
            Finding(
                what=f"cluster {under.cluster} has shards of {replicas} replicas, and which one is asked is left to chance",
                breaks="a look-up that asks a replica which has not fetched the block yet finds nothing: what is exported "
                "counts as missing, and rows can be given back that are stored",
                fix="put ?load_balancing=in_order at the end of AUDITEXPORT_CLICKHOUSE_URL",
            )
        )
    seen = f"Distributed over {asked if under.cluster else 'addresses'}, by {under.sharding_key or 'no sharding key'}"
    return Look(about=f"ClickHouse table {name}", seen=seen, findings=tuple(findings))


def replicas(client: Connection, url: str, table: Table) -> Iterator[Look]:
    """Whether an acknowledged block outlives a replica, and whether look-ups see it wherever they arrive."""
    about = "ClickHouse replicas"
    settings = connection_arguments(url).get("settings", {})
    quorum, sequential = settings.get("insert_quorum"), settings.get("select_sequential_consistency") == "1"
    findings = []
    if quorum and (not sequential or settings["insert_quorum_parallel"] == "1"):
        findings.append(
            Finding(
                what="AUDITEXPORT_CLICKHOUSE_URL asks for insert_quorum "
                + ("in parallel" if sequential else "without select_sequential_consistency=1"),
                breaks="a look-up sees a block that has no quorum yet and that ClickHouse takes back when it gets none: its "
                "rows would be marked and be nowhere",
                fix="let the URL end in ?insert_quorum=auto&select_sequential_consistency=1",
            )
        )
    if not table.engine.startswith("Replicated"):
        if quorum or (sequential and not table.engine.startswith("Shared")):
            findings.append(
                Finding(
                    what=f"AUDITEXPORT_CLICKHOUSE_URL has settings for replicas and {table.name} is a {table.engine}",
                    breaks="they do nothing there",
                    fix="take insert_quorum out of the URL"
                    + ("" if table.engine.startswith("Shared") else ", and select_sequential_consistency"),
                    fatal=False,
                )
            )
        if findings or table.engine.startswith("Shared"):
            yield Look(about=about, seen=f"{table.engine}", findings=tuple(findings))
        return
    try:
        with translated("looking at the replicas"):
            rows = client.query(
                _SQL["replicas"], parameters={"database": table.database, "table": table.name}
            ).result_rows
    except SetupIncomplete:
        rows = []
    if not rows:
        seen = "not asked: GRANT SELECT ON system.replicas is missing"
        yield Look(about=about, seen=seen, findings=tuple(findings))
        return
    read_only, total, active = (int(value) for value in rows[0])
    if read_only:
        findings.append(
            Finding(
                what=f"this replica of {table.name} is read-only",
                breaks="it takes no INSERT until it has its session with Keeper back; drains fail and go on by themselves then",
                fix=f"SELECT zookeeper_exception FROM system.replicas WHERE table = '{table.name}' says why",
                fatal=False,
            )
        )
    if total > 1 and not quorum:
        findings.append(
            Finding(
                what=f"{table.name} has {total} replicas, and one of them acknowledges an INSERT alone",
                breaks="what it acknowledged last is lost with it, until a reconciliation repairs it; behind a balancer, "
                "look-ups miss blocks that other replicas have",
                fix="let AUDITEXPORT_CLICKHOUSE_URL end in ?insert_quorum=auto&select_sequential_consistency=1",
                fatal=False,
            )
        )
    yield Look(about=about, seen=f"{active} of {total} active", findings=tuple(findings))


def engine(table: Table, anew: str) -> Iterator[Finding]:
    """Whether copies collapse and a block stays whole; `anew` says how to begin again."""
    if not table.engine.endswith("ReplacingMergeTree"):
        yield Finding(
            what=f"{table.name} is a {table.engine}", breaks="copies of one event would stay for ever", fix=anew
        )
    partition = columns_in(table.partition_key)
    if partition - {"inserted_at"} or table.sorting_key.replace(" ", "") != ",".join(SORT_KEY):
        yield Finding(
            what=f"{table.name} is partitioned by {table.partition_key or 'nothing'} and sorted by {table.sorting_key}",
            breaks="copies of one event do not collapse, or one INSERT becomes several parts",
            fix=anew,
        )
    elif not partition:
        yield Finding(
            what=f"{table.name} is not partitioned by month of inserted_at",
            breaks="looking for a block reads far more, and retention cannot drop a month at once",
            fix=anew,
            fatal=False,
        )


def window(client: Connection, table: Table) -> Iterator[Finding]:
    """Whether ClickHouse remembers a token for as long as a replay of its INSERT can come."""
    # Replicated and Shared tables have a window by default; a plain one has none unless it says so.
    replicated = table.engine.startswith(("Replicated", "Shared"))
    defaults = _defaults(client) if replicated else {}
    setting = "replicated_deduplication_window" if replicated else "non_replicated_deduplication_window"
    said = re.search(rf"\b{setting} = (\d+)", table.engine_full)
    window = int(said[1]) if said else defaults.get(setting, DEDUPLICATION_WINDOW) if replicated else 0
    if window < SMALLEST_WINDOW:
        yield Finding(
            what=f"{table.name} has {'a deduplication window of ' + str(window) + ' blocks' if window else 'no deduplication window'}",
            breaks="an INSERT that is replayed while its first attempt still runs is stored twice",
            fix=f"ALTER TABLE {table.name} MODIFY SETTING {setting} = {DEDUPLICATION_WINDOW}",
            fatal=not window,
        )
    if not replicated:
        return
    setting = "replicated_deduplication_window_seconds"
    said = re.search(rf"\b{setting} = (\d+)", table.engine_full)
    window_s = int(said[1]) if said else defaults.get(setting, DEDUPLICATION_WINDOW_S)
    if window_s < SHORTEST_WINDOW_S:
        yield Finding(
            what=f"{table.name} remembers tokens for {window_s} s, and a lease and its INSERT can last {SHORTEST_WINDOW_S} s",
            breaks="an INSERT that is replayed while its first attempt still runs is stored twice",
            fix=f"ALTER TABLE {table.name} MODIFY SETTING {setting} = {DEDUPLICATION_WINDOW_S}",
        )


def _defaults(client: Connection) -> dict[str, int]:
    try:
        with translated("reading defaults of tables"):
            return {name: int(value) for name, value in client.query(_SQL["table_defaults"]).result_rows}
    except SetupIncomplete:
        return {}
