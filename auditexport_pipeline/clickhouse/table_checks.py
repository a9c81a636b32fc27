"""The checks of the destination tables: that of `audit_log.v1`, those of further payload versions, and the view.

A table is compared with its DDL. The checks decide whether an event is kept once, whole and for long enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from auditexport_pipeline.clickhouse import canary
from auditexport_pipeline.clickhouse.catalogue import Catalogue, FoundColumn, Table, compared_type
from auditexport_pipeline.clickhouse.engines import (
    DEDUPLICATION_WINDOW,
    DEDUPLICATION_WINDOW_S,
    TABLE,
    VIEW,
    Engine,
    family_of,
)
from auditexport_pipeline.clickhouse.ttl import Deletion, TtlReader, ttl_of
from auditexport_pipeline.core.findings import Check, Checking, Finding, warning
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import SORT_KEY, VERSIONS, PayloadVersion, columns_in
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import Column, columns_of, load

# Several times the number of INSERTs that a run can have at work.
SMALLEST_WINDOW = 100
# Twice the time for which an INSERT that was given up can still arrive. ClickHouse must remember its token until then.
SHORTEST_WINDOW_S = 2 * Limits().inserts_s
# With these, INSERTs and look-ups try two replicas in the same order.
_SAME_ORDER = ("in_order", "first_or_random")
_IN_A_QUORUM = "let AUDITEXPORT_CLICKHOUSE_URL end in ?insert_quorum=auto&select_sequential_consistency=1"
# On a cluster, with ON CLUSTER.
_NEW_VIEW = "CREATE OR REPLACE VIEW audit_logs AS " + load("clickhouse/schema.sql")["audit_logs"].partition(" AS\n")[2]


def table_checks(db: Catalogue, *, fully: bool = True) -> Iterator[Check]:
    """The checks of every destination table. Without `fully`, those of what one statement can change at any moment:
    engine, keys, sharding, window, and, by the canary event, the columns of a table that was altered.
    """
    for version in VERSIONS.values():
        of_version = "" if version.table == TABLE else f" of {version.name}"
        about = f"ClickHouse table {version.table}{of_version}"
        named = db.tables.get(version.table)
        if named is None:
            yield Check(about, _absent(db, version))
            continue
        if named.under is not None:
            yield Check(about, _distributed(db, named))
            about = f"ClickHouse table {named.under.table}{of_version}"
        local = db.local(named)
        yield Check(about, _table(db, version, named, local, fully))
        if version.table != TABLE or local is None:
            continue
        if db.role is Role.EXPORTER:
            yield Check("ClickHouse canary event", canary.canary(db, local, again=fully))
        if fully and (db.client.replica_settings or local.replicated):
            yield Check("ClickHouse replicas", _replicas(db, local))
        if fully:
            yield Check("ClickHouse retention", _retention(db, local))
    if fully and TABLE in db.tables and (db.role is Role.READER or VIEW in db.tables):
        yield Check("ClickHouse view audit_logs", _view(db.tables.get(VIEW)))


def _init(table: Table) -> str:
    """The `auditexport init` that creates a table on the same engine."""
    family = family_of(table.engine)
    if under := table.under:
        return f"`auditexport init --engine distributed --cluster {under.cluster or 'NAME'}`"
    if family is Engine.REPLICATED:
        return "`auditexport init --engine replicated`, with --cluster NAME where tables are created on a cluster"
    return "`auditexport init`" if family is Engine.MERGE_TREE else f"`auditexport init --engine {family.value}`"


def _absent(db: Catalogue, version: PayloadVersion) -> Checking:
    if db.role is Role.OWNER:
        return "not there; `auditexport init` creates it"
    if version.table == TABLE:
        of_version, breaks, fix = "", "nothing can be exported", "run `auditexport init`"
    else:
        of_version = f" of payload version {version.name}"
        breaks = "rows of that version cannot be exported, and looking for blocks fails for every version"
        init = _init(db.tables[TABLE]) if TABLE in db.tables else "`auditexport init`"
        fix = f"run {init}, or uninstall the package that registers the version"
    what = f"ClickHouse table {version.table}{of_version} does not exist or is not readable"
    yield Finding(what=what, breaks=breaks, fix=fix)
    return "not there"


def _distributed(db: Catalogue, table: Table) -> Checking:
    """A block reaches one shard whole, and a look-up asks a replica that has it."""
    under = table.under
    assert under is not None
    shards, replicas, internally = 0, 0, 1
    over = f"cluster {under.cluster}" if under.cluster else "addresses"
    if under.cluster:
        rows = db.rows_if_granted("cluster", cluster=under.cluster)
        if rows is None:
            over += ", not read: GRANT SELECT ON system.clusters is missing"
        else:
            ((shards, replicas, internally),) = rows
    if under.sharding_key != "inserted_at" and shards != 1 and (under.sharding_key or shards > 1):
        yield Finding(
            what=f"{table.name} is sharded by {under.sharding_key or 'nothing'}",
            breaks="one INSERT becomes parts on several shards, and a crash between them leaves half a block",
            fix=f"DROP TABLE {table.name}, which holds nothing itself; then {_init(table)}",
        )
    settings = db.client.replica_settings
    if replicas > 1 and not internally:
        yield Finding(
            what=f"cluster {under.cluster} has shards of {replicas} replicas without internal_replication",
            breaks="each INSERT is sent to every replica by itself, and one that fails leaves them different",
            fix=f"in remote_servers, internal_replication = true for each shard of {under.cluster}",
        )
    elif replicas > 1 and settings.get("load_balancing") not in _SAME_ORDER and "insert_quorum" not in settings:
        yield Finding(
            what=f"cluster {under.cluster} has shards of {replicas} replicas, and a look-up asks any of them",
            breaks="a replica that has not fetched the block yet finds nothing: exported entries count as missing, and rows can "
            "be released that are stored",
            fix="put ?load_balancing=in_order at the end of AUDITEXPORT_CLICKHOUSE_URL",
        )
    return f"Distributed over {over}, by {under.sharding_key or 'no sharding key'}"


def _table(db: Catalogue, version: PayloadVersion, named: Table, local: Table | None, fully: bool) -> Checking:
    """Copies of an event collapse, a block stays whole, and a replayed block is recognised. With `fully`, columns and
    retention are as declared. `named` is the table of the contract's name, `local` the one with the rows.
    """
    first = db.tables.get(TABLE, named)
    copied = ", ".join(f"`{column}`" for column in version.columns)

    def again(name: str) -> str:
        return (
            f"create it anew while no drain runs: RENAME TABLE {name} TO {name}_old; then {_init(first)}; then "
            f"INSERT INTO {name} ({copied}) SELECT {copied} FROM {name}_old"
        )

    if family_of(named.engine) != family_of(first.engine):
        yield Finding(
            what=f"{named.name} is a {named.engine}, and {first.name} a {first.engine}",
            breaks="it is not on every server, and drains of all versions fail on those without it; its entries are lost with its "
            "server",
            fix=again(named.name),
        )
    if local is None:
        return "not on this server; run doctor on a server of each shard"
    name, partition = local.name, columns_in(local.partition_key)
    if not local.engine.endswith("ReplacingMergeTree"):
        breaks = "copies of one event would stay for ever"
        yield Finding(what=f"{name} is a {local.engine}", breaks=breaks, fix=again(name))
    if partition - {"inserted_at"} or local.sorting_key.replace(" ", "") != ",".join(SORT_KEY):
        yield Finding(
            what=f"{name} is partitioned by {local.partition_key or 'nothing'} and sorted by {local.sorting_key}",
            breaks="copies of one event do not collapse, or one INSERT becomes several parts",
            fix=again(name),
        )
    elif not partition:
        yield warning(
            what=f"{name} is not partitioned by month of inserted_at",
            breaks="looking for a block reads far more, and retention cannot drop a month at once",
            fix=again(name),
        )
    yield from _window(db, local)
    if fully:
        yield from _columns(version, name, db.columns(local), again(name))
        if first is not named and (first_local := db.local(first)) is not None:
            yield from _same_retention(local, first_local)
    return f"{local.engine}, by {local.partition_key or 'no partition'}"


def _window(db: Catalogue, table: Table) -> Iterator[Finding]:
    """ClickHouse remembers a token for as long as its INSERT can be replayed."""
    # Replicated and Shared tables have a window by default; a plain one has none unless it is declared.
    defaults: dict[str, int] = {}
    if table.replicated:
        defaults = {
            "replicated_deduplication_window": DEDUPLICATION_WINDOW,
            "replicated_deduplication_window_seconds": DEDUPLICATION_WINDOW_S,
            **{name: int(value) for name, value in db.rows_if_granted("table_defaults") or ()},
        }

    def remembered(setting: str) -> int:
        declared = re.search(rf"\b{setting} = (\d+)", table.engine_full)
        return int(declared[1]) if declared else defaults.get(setting, 0)

    twice = "an INSERT that is replayed while its first attempt still runs is stored twice"
    setting = f"{'' if table.replicated else 'non_'}replicated_deduplication_window"
    if (blocks := remembered(setting)) < SMALLEST_WINDOW:
        yield Finding(
            what=f"{table.name} has {f'a deduplication window of {blocks} blocks' if blocks else 'no deduplication window'}",
            breaks=twice,
            fix=f"ALTER TABLE {table.name} MODIFY SETTING {setting} = {DEDUPLICATION_WINDOW}",
            fatal=not blocks,
        )
    setting += "_seconds"
    if table.replicated and (seconds := remembered(setting)) < SHORTEST_WINDOW_S:
        yield Finding(
            what=f"{table.name} remembers tokens for {seconds} s, and an INSERT can arrive again for {SHORTEST_WINDOW_S} s",
            breaks=twice,
            fix=f"ALTER TABLE {table.name} MODIFY SETTING {setting} = {DEDUPLICATION_WINDOW_S}",
        )


def _declared(version: PayloadVersion) -> dict[str, Column]:
    """The columns that a version sends, and those that its DDL computes, with declarations fit for an ALTER TABLE."""
    declared = columns_of(version.pieces["ddl"])
    sent = {
        name: declared.get(name) or Column(name=name, type=kind, declaration=f"`{name}` {kind}", nullable=False)
        for name, kind in version.columns.items()
    }
    return sent | {name: column for name, column in declared.items() if "MATERIALIZED" in column.declaration}


def _columns(version: PayloadVersion, table: str, found: dict[str, FoundColumn], again: str) -> Iterator[Finding]:
    """The table has the columns of its version, of their types; those that are sent can be given, the others are
    computed.
    """
    declared, right = _declared(version), "should be" if version.table == TABLE else f"{version.name} sends"
    if lacking := [column for name, column in declared.items() if name not in found]:
        yield Finding(
            what=f"{table} lacks {', '.join(column.name for column in lacking)}",
            breaks="INSERTs fail",
            fix=f"ALTER TABLE {table} " + ", ".join(f"ADD COLUMN {column.declaration}" for column in lacking),
        )
    for name, column in declared.items():
        if name not in found:
            continue
        computed = "MATERIALIZED" in column.declaration
        kind, default = found[name].type, found[name].kind
        modify = f"ALTER TABLE {table} MODIFY COLUMN {column.declaration}"
        if compared_type(kind, version) != compared_type(column.type, version):
            # Removing Nullable needs a default for NULL.
            if re.match(r"(LowCardinality\()?Nullable", kind) and column.declaration.endswith(column.type):
                modify += f" DEFAULT defaultValueOfTypeName('{column.type}')"
            yield Finding(
                what=f"{table}.{name} is {kind} and {right} {column.type}",
                breaks="what is stored differs from what was sent, or INSERTs fail",
                fix=again if name in (*SORT_KEY, "inserted_at") else modify,
            )
        elif computed != (default in ("MATERIALIZED", "ALIAS")):
            yield Finding(
                what=f"{table}.{name} is {default.lower() or 'a plain column'}",
                breaks="searches in the metas find nothing" if computed else "INSERTs fail, for they give it a value",
                fix=modify if computed else f"ALTER TABLE {table} MODIFY COLUMN {name} REMOVE {default}",
                fatal=not computed,
            )


def _same_retention(table: Table, first: Table) -> Iterator[Finding]:
    ttl, first_ttl = (ttl_of(one.engine_full).deletions for one in (table, first))
    if ttl != first_ttl:
        ends, first_ends = (f"until {', '.join(map(str, one))}" if one else "for ever" for one in (ttl, first_ttl))
        yield warning(
            what=f"{table.name} keeps entries {ends} and the first version's table {first_ends}",
            breaks="one retention cannot be right for both: the ledger keeps a batch as long as the longer one needs it",
            fix=f"give {table.name} the same TTL",
        )


def _replicas(db: Catalogue, table: Table) -> Checking:
    """An acknowledged block survives the loss of a replica, and look-ups on any replica see it."""
    settings, shared = db.client.replica_settings, table.engine.startswith("Shared")
    quorum, sequential = settings.get("insert_quorum"), settings.get("select_sequential_consistency") == "1"
    if quorum and (not sequential or settings["insert_quorum_parallel"] == "1"):
        yield Finding(
            what="AUDITEXPORT_CLICKHOUSE_URL asks for insert_quorum "
            + ("in parallel" if sequential else "without select_sequential_consistency=1"),
            breaks="a look-up sees a block without a quorum, which ClickHouse removes if it gets none: its rows would be marked and "
            "lost",
            fix=_IN_A_QUORUM,
        )
    if not table.engine.startswith("Replicated"):
        if quorum or (sequential and not shared):
            yield warning(
                what=f"AUDITEXPORT_CLICKHOUSE_URL has settings for replicas and {table.name} is a {table.engine}",
                breaks="they do nothing there",
                fix=f"remove insert_quorum{'' if shared else ' and select_sequential_consistency'} from the URL",
            )
        return table.engine
    rows = db.rows_if_granted("replicas", database=table.database, table=table.name)
    if not rows:
        return "not read: GRANT SELECT ON system.replicas is missing"
    read_only, total, active = (int(value) for value in rows[0])
    if read_only:
        yield warning(
            what=f"this replica of {table.name} is read-only",
            breaks="it takes no INSERT until its session with Keeper is back; drains fail until then and continue by themselves",
            fix=f"SELECT zookeeper_exception FROM system.replicas WHERE table = '{table.name}' shows the reason",
        )
    if total > 1 and not quorum:
        yield warning(
            what=f"{table.name} has {total} replicas, and one of them acknowledges an INSERT alone",
            breaks="if it is lost, so are its last blocks, until a reconciliation repairs that; behind a balancer, look-ups miss "
            "blocks that other replicas have",
            fix=_IN_A_QUORUM,
        )
    return f"{active} of {total} active"


def _retention(db: Catalogue, table: Table) -> Checking:
    """The TTL counts from `inserted_at`, is longer than the outbox keeps rows, and can be evaluated for every entry."""
    ttl, days = ttl_of(table.engine_full), max(90, 3 * db.retention_days)
    fix = f"ALTER TABLE {table.name} MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC')) + INTERVAL {days} DAY"
    if ttl.unreadable:
        yield _unknown(table, ttl.text, ttl.unreadable, fix)
        return ttl.text
    yield from [finding for deletion in ttl.deletions if (finding := _wrong_deletion(db, table, deletion, fix))][:1]
    return ", ".join(map(str, ttl.deletions)) or "entries stay for ever"


def _wrong_deletion(db: Catalogue, table: Table, deletion: Deletion, fix: str) -> Finding | None:
    named = set(re.findall(r"\w+", deletion.at)) & columns_of(VERSIONS["audit_log.v1"].pieces["ddl"]).keys()
    if not named or ("inserted_at" not in named and not deletion.where):
        return Finding(
            what=f"the TTL of {table.name} counts from {', '.join(sorted(named)) or 'no column of ours'}: {deletion}",
            breaks="an old event that is exported today is dropped on arrival",
            fix=fix,
        )
    kept_ms = TtlReader(db.client).kept_by(deletion.at)
    days = kept_ms / DAY_MS if kept_ms is not None else None
    if days is not None and days <= db.retention_days:
        return Finding(
            what=f"the TTL of {table.name} is {days:g} days and exported rows stay {db.retention_days} days in the outbox",
            breaks="a requeued entry keeps its inserted_at, so one older than the TTL is dropped on arrival"
            + (", and an entry can be gone before its batch is verified" if days <= 1 else ""),
            fix=fix,
            fatal=db.role is Role.OPERATOR or days <= 1,
        )
    if deletion.where:
        return _unknown(table, str(deletion), "it deletes some rows and not others", fix)
    if days is None:
        return _unknown(table, str(deletion), "it cannot be evaluated from inserted_at alone", fix)
    return None


def _unknown(table: Table, text: str, why: str, fix: str) -> Finding:
    return warning(
        what=f"whether an entry of {table.name} is past its TTL cannot always be told: {why}: {text}",
        breaks="such an entry that is gone is reported as missing, and the sweep keeps its row",
        fix=f"{fix}; or name the days that it keeps an entry: `auditexport sweep --ttl-days DAYS`",
    )


def _view(view: Table | None) -> Checking:
    """Readers see each event once, whatever their profile sets."""
    if view is None:
        yield warning(
            what="ClickHouse view audit_logs does not exist or is not readable",
            breaks="readers have to write FINAL themselves",
            fix="run `auditexport init`",
        )
        return "not there"
    if " FINAL" not in view.created_by:
        yield warning(
            what="ClickHouse view audit_logs reads without FINAL",
            breaks="an event that has two copies is shown twice until they merge",
            fix="DROP VIEW audit_logs, then `auditexport init`",
        )
        return "without FINAL"
    if not re.search(r"\bdo_not_merge_across_partitions_select_final\s*=\s*(0|false)\b", view.created_by):
        yield warning(
            what="ClickHouse view audit_logs leaves do_not_merge_across_partitions_select_final to its reader's profile",
            breaks="where that is 1, an event that has copies under two months is shown twice, for good: they never merge",
            fix=_NEW_VIEW,
        )
        return "each event once within a month"
    return "each event once"
