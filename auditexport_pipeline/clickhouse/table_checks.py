"""The checks of the destination tables: that of `audit_log.v1`, those of further payload versions, and the view.

Each table's DDL says what it must be. What is asked here decides whether an event is kept once, whole and for long enough.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from auditexport_pipeline.clickhouse import canary
from auditexport_pipeline.clickhouse.audit_log import ttl_reader
from auditexport_pipeline.clickhouse.catalogue import Catalogue, FoundColumn, Table, compared_type
from auditexport_pipeline.clickhouse.engines import (
    DEDUPLICATION_WINDOW,
    DEDUPLICATION_WINDOW_S,
    TABLE,
    VIEW,
    Engine,
    family_of,
)
from auditexport_pipeline.clickhouse.ttl import Deletion, TableTtl, ttl_of
from auditexport_pipeline.core.findings import Check, Checking, Finding, warning
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import SORT_KEY, VERSIONS, PayloadVersion, columns_in
from auditexport_pipeline.roles import Role
from auditexport_pipeline.sql import Column, columns_of, load

# Fewer tokens than a run can have INSERTs on their way at once, several times over.
SMALLEST_WINDOW = 100
# For so long an INSERT that was given up can still arrive: the lease to its end, and the time it may take. A token that
# is forgotten sooner does not hold the two apart.
SHORTEST_WINDOW_S = 2 * Limits().inserts_s
# Two replicas that both INSERTs and look-ups go to in the same order, as long as they live.
_STICKY = ("in_order", "first_or_random")
_IN_A_QUORUM = "let AUDITEXPORT_CLICKHOUSE_URL end in ?insert_quorum=auto&select_sequential_consistency=1"
# On a cluster, with ON CLUSTER.
_NEW_VIEW = "CREATE OR REPLACE VIEW audit_logs AS " + load("clickhouse/schema.sql")["audit_logs"].partition(" AS\n")[2]


def table_checks(db: Catalogue, *, fully: bool = True) -> Iterator[Check]:
    """The checks of every destination table; without `fully` those of what a statement of somebody can change at any
    moment: engine, keys, sharding, window, and by the canary event the columns where the table was altered.
    """
    for version in VERSIONS.values():
        first, of_version = version.table == TABLE, "" if version.table == TABLE else f" of {version.name}"
        named = db.tables.get(version.table)
        if named is None:
            yield Check(f"ClickHouse table {version.table}{of_version}", _absent(db, version))
            continue
        if named.under is not None:
            yield Check(f"ClickHouse table {version.table}{of_version}", _distributed(db, named))
        about = f"ClickHouse table {named.under.table if named.under else version.table}{of_version}"
        held = db.held(named)
        yield Check(about, _table(db, version, named, held, fully))
        if not first or held is None:
            continue
        if db.role is Role.EXPORTER:
            yield Check("ClickHouse canary event", canary.canary(db, held, again=fully))
        if fully and (db.client.replica_settings or held.replicated):
            yield Check("ClickHouse replicas", _replicas(db, held))
        if fully:
            yield Check("ClickHouse retention", _retention(db, held))
    if fully and TABLE in db.tables and (db.role is Role.READER or VIEW in db.tables):
        yield Check("ClickHouse view audit_logs", _view(db.tables.get(VIEW)))


def _init(table: Table) -> str:
    """The `auditexport init` that creates a table on what this one stands on."""
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
        yield Finding(
            what=f"ClickHouse table {TABLE} does not exist or is not readable",
            breaks="nothing can be exported",
            fix="run `auditexport init`",
        )
    else:
        yield Finding(
            what=f"ClickHouse table {version.table} of payload version {version.name} does not exist or is not readable",
            breaks="rows of that version cannot be exported, and looking for blocks fails for every version",
            fix=f"run {_init(db.tables[TABLE]) if TABLE in db.tables else '`auditexport init`'}, or uninstall the package that "
            "registers the version",
        )
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
            over += ", not asked: GRANT SELECT ON system.clusters is missing"
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
    elif replicas > 1 and settings.get("load_balancing") not in _STICKY and "insert_quorum" not in settings:
        yield Finding(
            what=f"cluster {under.cluster} has shards of {replicas} replicas, and which one is asked is left to chance",
            breaks="a look-up that asks a replica which has not fetched the block yet finds nothing: what is exported counts as "
            "missing, and rows can be given back that are stored",
            fix="put ?load_balancing=in_order at the end of AUDITEXPORT_CLICKHOUSE_URL",
        )
    return f"Distributed over {over}, by {under.sharding_key or 'no sharding key'}"


def _table(db: Catalogue, version: PayloadVersion, named: Table, held: Table | None, fully: bool) -> Checking:
    """Copies of an event collapse, a block stays whole, a replayed one is known again, and with `fully` the columns and the
    retention are those that are declared. `named` is the table of the contract's name, `held` the one with the rows.
    """
    ours = db.tables.get(TABLE, named)
    copied = ", ".join(f"`{column}`" for column in version.columns)

    def anew(name: str) -> str:
        return (
            f"create it anew while no drain runs: RENAME TABLE {name} TO {name}_old; then {_init(ours)}; then "
            f"INSERT INTO {name} ({copied}) SELECT {copied} FROM {name}_old"
        )

    if family_of(named.engine) != family_of(ours.engine):
        yield Finding(
            what=f"{named.name} is a {named.engine}, and {ours.name} a {ours.engine}",
            breaks="it is not on every server that is asked, where drains of all versions then fail, and its entries are lost with "
            "the one that has it",
            fix=anew(named.name),
        )
    if held is None:
        return "not on this server; run doctor on a server of each shard"
    name, partition = held.name, columns_in(held.partition_key)
    if not held.engine.endswith("ReplacingMergeTree"):
        yield Finding(
            what=f"{name} is a {held.engine}", breaks="copies of one event would stay for ever", fix=anew(name)
        )
    if partition - {"inserted_at"} or held.sorting_key.replace(" ", "") != ",".join(SORT_KEY):
        yield Finding(
            what=f"{name} is partitioned by {held.partition_key or 'nothing'} and sorted by {held.sorting_key}",
            breaks="copies of one event do not collapse, or one INSERT becomes several parts",
            fix=anew(name),
        )
    elif not partition:
        yield warning(
            what=f"{name} is not partitioned by month of inserted_at",
            breaks="looking for a block reads far more, and retention cannot drop a month at once",
            fix=anew(name),
        )
    yield from _window(db, held)
    if fully:
        yield from _columns(version, name, db.columns(held), anew(name))
        if ours is not named and (ours_held := db.held(ours)) is not None:
            yield from _same_retention(name, ttl_of(held.engine_full), ttl_of(ours_held.engine_full))
    return f"{held.engine}, by {held.partition_key or 'no partition'}"


def _window(db: Catalogue, table: Table) -> Iterator[Finding]:
    """ClickHouse remembers a token for as long as a replay of its INSERT can come."""
    # Replicated and Shared tables have a window by default; a plain one has none unless it says so.
    defaults: dict[str, int] = {}
    if table.replicated:
        defaults = {"replicated_deduplication_window": DEDUPLICATION_WINDOW}
        defaults["replicated_deduplication_window_seconds"] = DEDUPLICATION_WINDOW_S
        defaults |= {name: int(value) for name, value in db.rows_if_granted("table_defaults") or ()}

    def remembered(setting: str) -> int:
        said = re.search(rf"\b{setting} = (\d+)", table.engine_full)
        return int(said[1]) if said else defaults.get(setting, 0)

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
            what=f"{table.name} remembers tokens for {seconds} s, and a lease and its INSERT can last {SHORTEST_WINDOW_S} s",
            breaks=twice,
            fix=f"ALTER TABLE {table.name} MODIFY SETTING {setting} = {DEDUPLICATION_WINDOW_S}",
        )


def _declared(version: PayloadVersion) -> dict[str, Column]:
    """What the version sends, and what its DDL computes of it: by column, with a declaration fit for an ALTER TABLE."""
    written = columns_of(version.pieces["ddl"])
    sent = {
        name: Column(name=name, type=kind, declaration=f"`{name}` {kind}", nullable=False)
        for name, kind in version.columns.items()
    }
    computed = {name: column for name, column in written.items() if "MATERIALIZED" in column.declaration}
    return {**sent, **{name: written[name] for name in sent if name in written}, **computed}


def _columns(version: PayloadVersion, table: str, found: dict[str, FoundColumn], anew: str) -> Iterator[Finding]:
    """The table has the columns of its version, of their types; those that are sent can be given, the others are computed."""
    declared, wanted = _declared(version), "should be" if version.table == TABLE else f"{version.name} sends"
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
                what=f"{table}.{name} is {kind} and {wanted} {column.type}",
                breaks="what is stored differs from what was sent, or INSERTs fail",
                fix=anew if name in (*SORT_KEY, "inserted_at") else modify,
            )
        elif computed != (default in ("MATERIALIZED", "ALIAS")):
            yield Finding(
                what=f"{table}.{name} is {default.lower() or 'a plain column'}",
                breaks="searches in the metas find nothing" if computed else "INSERTs fail, for it cannot be given",
                fix=modify if computed else f"ALTER TABLE {table} MODIFY COLUMN {name} REMOVE {default}",
                fatal=not computed,
            )


def _same_retention(table: str, ttl: TableTtl, first: TableTtl) -> Iterator[Finding]:
    def kept(ttl: TableTtl) -> str:
        return f"until {', '.join(map(str, ttl.deletions))}" if ttl.deletions else "for ever"

    if ttl.deletions != first.deletions:
        yield warning(
            what=f"{table} keeps entries {kept(ttl)} and the first version's table {kept(first)}",
            breaks="one retention cannot be right for both: the ledger keeps a batch as long as the longer one needs it",
            fix=f"give {table} the same TTL",
        )


def _replicas(db: Catalogue, table: Table) -> Checking:
    """A block that is acknowledged outlives a replica, and look-ups see it wherever they arrive."""
    settings, shared = db.client.replica_settings, table.engine.startswith("Shared")
    quorum, sequential = settings.get("insert_quorum"), settings.get("select_sequential_consistency") == "1"
    if quorum and (not sequential or settings["insert_quorum_parallel"] == "1"):
        yield Finding(
            what="AUDITEXPORT_CLICKHOUSE_URL asks for insert_quorum "
            + ("in parallel" if sequential else "without select_sequential_consistency=1"),
            breaks="a look-up sees a block that has no quorum yet and that ClickHouse takes back when it gets none: its rows would "
            "be marked and be nowhere",
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
        return "not asked: GRANT SELECT ON system.replicas is missing"
    read_only, total, active = (int(value) for value in rows[0])
    if read_only:
        yield warning(
            what=f"this replica of {table.name} is read-only",
            breaks="it takes no INSERT until its session with Keeper is back; drains fail until then and continue by themselves",
            fix=f"SELECT zookeeper_exception FROM system.replicas WHERE table = '{table.name}' says why",
        )
    if total > 1 and not quorum:
        yield warning(
            what=f"{table.name} has {total} replicas, and one of them acknowledges an INSERT alone",
            breaks="what it acknowledged last is lost with it, until a reconciliation repairs it; behind a balancer, look-ups miss "
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
    for deletion in ttl.deletions:
        finding = _wrong_deletion(db, table, deletion, fix)
        if finding is not None:
            yield finding
            break
    return ", ".join(map(str, ttl.deletions)) or "entries stay for ever"


def _wrong_deletion(db: Catalogue, table: Table, deletion: Deletion, fix: str) -> Finding | None:
    named = set(re.findall(r"\w+", deletion.at)) & columns_of(VERSIONS["audit_log.v1"].pieces["ddl"]).keys()
    kept_ms = ttl_reader(db.client).kept_by(deletion.at)
    days = kept_ms / DAY_MS if kept_ms is not None else None
    if not named or ("inserted_at" not in named and not deletion.where):
        return Finding(
            what=f"the TTL of {table.name} counts from {', '.join(sorted(named)) or 'no column of ours'}: {deletion}",
            breaks="an old event that is exported today is dropped as soon as it arrives",
            fix=fix,
        )
    if days is not None and days <= db.retention_days:
        return Finding(
            what=f"the TTL of {table.name} is {days:g} days and exported rows stay {db.retention_days} days in the outbox",
            breaks="a requeued entry keeps its inserted_at, so one older than the TTL is dropped as soon as it arrives"
            + (", and an entry can be gone before its batch is verified" if days <= 1 else ""),
            fix=fix,
            fatal=db.role is Role.OPERATOR or days <= 1,
        )
    if deletion.where:
        return _unknown(table, str(deletion), "it deletes some rows and not others", fix)
    return (
        _unknown(table, str(deletion), "it cannot be evaluated from inserted_at alone", fix) if days is None else None
    )


def _unknown(table: Table, text: str, why: str, fix: str) -> Finding:
    return warning(
        what=f"whether an entry of {table.name} is past its TTL cannot always be told: {why}: {text}",
        breaks="such an entry that is gone is reported as missing, and the sweep keeps its row",
        fix=f"{fix}; or say how long it keeps an entry: `auditexport sweep --ttl-days DAYS`",
    )


def _view(view: Table | None) -> Checking:
    """Readers see each event once, whatever their profile says."""
    once = r"\bdo_not_merge_across_partitions_select_final\s*=\s*(0|false)\b"
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
    if not re.search(once, view.created_by):
        yield warning(
            what="ClickHouse view audit_logs leaves do_not_merge_across_partitions_select_final to its reader's profile",
            breaks="where that is 1, an event that has copies under two months is shown twice, for good: they never merge",
            fix=_NEW_VIEW,
        )
        return "each event once within a month"
    return "each event once"
