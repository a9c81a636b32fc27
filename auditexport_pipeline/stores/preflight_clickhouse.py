"""Looking at ClickHouse before anything is claimed: version, grants, the table, its keys, window and TTL.

What belongs here: what is asked of ClickHouse, and what each answer breaks and how it is mended. What does not:
the statements (`preflight.sql`), what the table should be (`audit_log_v1.sql`), and when to look (`stores.preflight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.stores.audit_log import connection_arguments, translated
from auditexport_pipeline.stores.declared import columns_of
from auditexport_pipeline.stores.engines import DEDUPLICATION_WINDOW, DEDUPLICATION_WINDOW_S, TABLE
from auditexport_pipeline.stores.findings import Finding, Look
from auditexport_pipeline.stores.mysql import is_local
from auditexport_pipeline.stores.preflight_versions import look_at_other_versions
from auditexport_pipeline.stores.roles import Role, clickhouse_grants
from auditexport_pipeline.stores.statements import load

if TYPE_CHECKING:
    from clickhouse_connect.driver.client import Client

_SQL = load("preflight.sql")
_OURS = next(iter(VERSIONS.values()))
_DECLARED = columns_of(_OURS.pieces["ddl"])
OLDEST = (25, 8)
# Fewer tokens than a run can have INSERTs on their way at once, several times over.
SMALLEST_WINDOW = 100
_KEY = "workspace_id,bucket,time,event_id"
_COPIED = ", ".join(f"`{name}`" for name, column in _DECLARED.items() if "MATERIALIZED" not in column.declaration)
# For so long an INSERT that was given up can still arrive: the lease to its end, and the time it may take. A token that
# is forgotten sooner does not hold the two apart.
SHORTEST_WINDOW_S = Limits().lease_s + Limits().insert_timeout_s
# Two replicas that both INSERTs and look-ups go to in the same order, as long as they live.
_STICKY = ("in_order", "first_or_random")
_DAYS = {
    "Second": 1 / 86_400,
    "Minute": 1 / 1_440,
    "Hour": 1 / 24,
    "Day": 1,
    "Week": 7,
    "Month": 28,
    "Quarter": 89,
    "Year": 365,
}
_TTL = re.compile(r"\bTTL (?P<what>.+?)(?= SETTINGS | COMMENT |$)", re.DOTALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Table:
    name: str
    database: str
    engine: str
    engine_full: str
    partition_key: str
    sorting_key: str
    created_by: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Under:
    """What a Distributed table says of itself: over which cluster and table, and what chooses the shard."""

    cluster: str
    database: str
    table: str
    sharding_key: str


def clickhouse_version(text: str) -> tuple[int, int]:
    """Year and month of a version such as `25.8.3.66`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def look_at_clickhouse(client: Client, url: str, role: Role, retention_days: int) -> Iterator[Look]:
    """All that can be asked over one client of ours. Source: system tables, CHECK GRANT; nothing is written."""
    version, user, database, _, read_only = client.query(_SQL["clickhouse_server"]).result_rows[0]
    yield _version(str(version))
    yield _transport(url)
    if int(read_only) and role in (Role.EXPORTER, Role.OWNER):
        finding = Finding(
            what=f"the settings profile of {user} has readonly = {int(read_only)}",
            breaks="no INSERT is taken, and none of the settings that keep an event as it was written",
            fix=f"ALTER USER {user} SETTINGS readonly = 0, or give it another profile",
        )
        yield Look(about="ClickHouse profile", seen=f"readonly = {int(read_only)}", findings=(finding,))
        # Under it CHECK GRANT denies what was granted, and no GRANT would mend that.
    else:
        yield _profile(client, str(user), role)
        tables = dict(clickhouse_grants(role))
        for table in map(_table, client.query(_SQL["clickhouse_tables"]).result_rows):
            # A server that is a shard itself asks its own table as the same user.
            if (under := _under(table)) is not None:
                name = under.table if under.database == database else f"{under.database}.{under.table}"
                tables = {**tables, name: tables[TABLE]}
        yield _grants(client, str(user), str(database), role, tables)
    yield from look_at_the_table(client, url, role, retention_days, fully=True)
    yield from look_at_other_versions(client, role)


def look_at_the_table(client: Client, url: str, role: Role, retention_days: int, *, fully: bool) -> Iterator[Look]:
    """Engine, keys and window of audit_logs_raw_v1; with `fully` also columns, replicas, TTL and the view beside it."""
    rows = {table.name: table for table in map(_table, client.query(_SQL["clickhouse_tables"]).result_rows)}
    about = f"ClickHouse table {TABLE}"
    if TABLE not in rows and role is Role.OWNER:
        yield Look(about=about, seen="not there; `auditexport init` creates it")
        return
    if TABLE not in rows:
        finding = Finding(
            what=f"ClickHouse table {TABLE} does not exist or is not readable",
            breaks="nothing can be exported",
            fix="run `auditexport init`",
        )
        yield Look(about=about, seen="not there", findings=(finding,))
        return
    table: _Table | None = rows[TABLE]
    under = _under(rows[TABLE])
    if under is not None:
        yield _distributed(client, url, under)
        found = client.query(
            _SQL["clickhouse_table"], parameters={"database": under.database, "table": under.table}
        ).result_rows
        table = _table(found[0]) if found else None
        about = f"ClickHouse table {under.table}"
        if table is None:
            yield Look(about=about, seen="not on this server; run doctor on a server of each shard")
    if table is not None:
        findings = [*_engine(table), *_window(client, table)]
        if fully:
            findings += _columns(client, table)
        seen = f"{table.engine}, by {table.partition_key or 'no partition'}"
        yield Look(about=about, seen=seen, findings=tuple(findings))
        if fully:
            yield from _replicas(client, url, table)
            yield _ttl(table, role, retention_days)
    if fully and (role is Role.READER or "audit_logs" in rows):
        yield _view(rows.get("audit_logs"))


def _table(row: Sequence[str]) -> _Table:
    return _Table(**dict(zip(_Table.__slots__, row, strict=True)))


def _anew(table: _Table) -> str:
    name = table.name
    return (
        f"create it anew while no drain runs: RENAME TABLE {name} TO {name}_old; then `auditexport init`; then "
        f"INSERT INTO {name} ({_COPIED}) SELECT {_COPIED} FROM {name}_old"
    )


def _version(text: str) -> Look:
    if clickhouse_version(text) >= OLDEST:
        return Look(about="ClickHouse version", seen=text)
    finding = Finding(
        what=f"the server is ClickHouse {text}",
        breaks="its JSON type is not the one that metas are stored in, and none was ever tried there",
        fix=f"upgrade it to {OLDEST[0]}.{OLDEST[1]} or later",
    )
    return Look(about="ClickHouse version", seen=text, findings=(finding,))


def _transport(url: str) -> Look:
    arguments = connection_arguments(url)
    tls, verified = arguments["interface"] == "https", arguments["verify"]
    seen = ("TLS, certificate and name verified" if verified else "TLS, certificate not verified") if tls else "no TLS"
    if is_local(arguments["host"]) or (tls and verified):
        return Look(about="ClickHouse transport", seen=seen)
    finding = Finding(
        what=f"the connection to {arguments['host']} has {seen}",
        breaks="whoever sits between can read events and the password",
        fix="take verify=false out of AUDITEXPORT_CLICKHOUSE_URL; ?ca_cert=/path.pem names an authority of your own"
        if tls
        else "let AUDITEXPORT_CLICKHOUSE_URL begin with https:// and name the server's https_port (8443)",
        fatal=False,
    )
    return Look(about="ClickHouse transport", seen=seen, findings=(finding,))


def _profile(client: Client, user: str, role: Role) -> Look:
    about = "ClickHouse profile"
    pinned = client.query(_SQL["clickhouse_pinned"]).result_rows if role is Role.EXPORTER else []
    if not pinned:
        return Look(about=about, seen="leaves an INSERT its settings")
    shown = ", ".join(f"{name} = {value}" for name, value in pinned)
    finding = Finding(
        what=f"the settings profile of {user} pins {shown}",
        breaks="an INSERT of ours says otherwise and is refused; without saying so it would be acknowledged before it is "
        "stored, or stored twice",
        fix=f"take the constraint on {', '.join(str(name) for name, _ in pinned)} out of the profile of {user}",
    )
    return Look(about=about, seen=shown, findings=(finding,))


def _grants(client: Client, user: str, database: str, role: Role, tables: Mapping[str, tuple[str, ...]]) -> Look:
    about = f"ClickHouse grants of the {role.value}"
    findings = []
    for table, privileges in tables.items():
        lacking = []
        for privilege in privileges:
            try:
                with translated("checking a grant"):
                    if not int(str(client.command(f"CHECK GRANT {privilege} ON {table}"))):
                        lacking.append(privilege)
            except SetupIncomplete:
                return Look(about=about, seen="not asked: this server has no CHECK GRANT")
        if lacking:
            on = table if "." in table else f"{database}.{table}"
            findings.append(
                Finding(
                    what=f"{user}, as {role.value}, lacks {', '.join(lacking)} on {on} in ClickHouse",
                    breaks=f"what the {role.value} does there is refused",
                    fix=f"GRANT {', '.join(lacking)} ON {on} TO {user}",
                )
            )
    seen = f"{user} lacks some" if findings else f"{user} has what the {role.value} needs"
    return Look(about=about, seen=seen, findings=tuple(findings))


def _under(table: _Table) -> _Under | None:
    """Engines Remote and RemoteSecure are Distributed ones that name addresses in the cluster's place."""
    found = re.match(r"(Distributed|Remote|RemoteSecure)\((.*?)\)(?: SETTINGS |$)", table.engine_full, re.DOTALL)
    if table.engine != "Distributed" or found is None:
        return None
    arguments = [part.strip("'") for part in _parts(found[2])]
    cluster = arguments[0] if found[1] == "Distributed" else ""
    key = arguments[3] if found[1] == "Distributed" and len(arguments) > 3 else ""
    if found[1] != "Distributed" and len(arguments) > 3 and not found[2].rstrip().endswith("'"):
        key = arguments[-1]
    return _Under(cluster=cluster, database=arguments[1] or table.database, table=arguments[2], sharding_key=key)


def _distributed(client: Client, url: str, under: _Under) -> Look:
    """A block has to reach one shard whole, and what reads it back has to ask a replica that has it."""
    shards, replicas, internally = 0, 0, 1
    asked = f"cluster {under.cluster}"
    if under.cluster:
        try:
            with translated("looking at the cluster"):
                ((shards, replicas, internally),) = client.query(
                    _SQL["clickhouse_cluster"], parameters={"cluster": under.cluster}
                ).result_rows
        except SetupIncomplete:
            asked = f"cluster {under.cluster}, not asked: GRANT SELECT ON system.clusters is missing"
    findings = []
    if under.sharding_key != "inserted_at" and shards != 1 and (under.sharding_key or shards > 1):
        findings.append(
            Finding(
                what=f"{TABLE} is sharded by {under.sharding_key or 'nothing'}",
                breaks="one INSERT becomes parts on several shards, and a crash between them leaves half a block",
                fix=f"DROP TABLE {TABLE}, which holds nothing itself; then `auditexport init --engine distributed "
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
    return Look(about=f"ClickHouse table {TABLE}", seen=seen, findings=tuple(findings))


def _replicas(client: Client, url: str, table: _Table) -> Iterator[Look]:
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
                _SQL["clickhouse_replicas"], parameters={"database": table.database, "table": table.name}
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


def _engine(table: _Table) -> Iterator[Finding]:
    if not table.engine.endswith("ReplacingMergeTree"):
        yield Finding(
            what=f"{table.name} is a {table.engine}", breaks="copies of one event would stay for ever", fix=_anew(table)
        )
    partition = set(re.findall(r"\w+", table.partition_key)) & set(_DECLARED)
    if partition - {"inserted_at"} or table.sorting_key.replace(" ", "") != _KEY:
        yield Finding(
            what=f"{table.name} is partitioned by {table.partition_key or 'nothing'} and sorted by {table.sorting_key}",
            breaks="copies of one event do not collapse, or one INSERT becomes several parts",
            fix=_anew(table),
        )
    elif not partition:
        yield Finding(
            what=f"{table.name} is not partitioned by month of inserted_at",
            breaks="looking for a block reads far more, and retention cannot drop a month at once",
            fix=_anew(table),
            fatal=False,
        )


def _window(client: Client, table: _Table) -> Iterator[Finding]:
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


def _defaults(client: Client) -> dict[str, int]:
    try:
        with translated("reading defaults of tables"):
            return {name: int(value) for name, value in client.query(_SQL["clickhouse_table_defaults"]).result_rows}
    except SetupIncomplete:
        return {}


def _columns(client: Client, table: _Table) -> Iterator[Finding]:
    parameters = {"database": table.database, "table": table.name}
    there: Mapping[str, Sequence[str]] = {
        name: (kind, default)
        for name, kind, default in client.query(_SQL["clickhouse_columns"], parameters=parameters).result_rows
    }
    lacking = [column for name, column in _DECLARED.items() if name not in there]
    if lacking:
        yield Finding(
            what=f"{table.name} lacks {', '.join(column.name for column in lacking)}",
            breaks="INSERTs fail",
            fix=f"ALTER TABLE {table.name} " + ", ".join(f"ADD COLUMN {column.declaration}" for column in lacking),
        )
    for name, column in _DECLARED.items():
        kind, default = there.get(name, (column.type, ""))
        if _plain(kind) != _plain(column.type):
            yield Finding(
                what=f"{table.name}.{name} is {kind} and should be {column.type}",
                breaks="what is stored differs from what was sent, or INSERTs fail",
                fix=_anew(table)
                if name in (*_KEY.split(","), "inserted_at")
                else f"ALTER TABLE {table.name} MODIFY COLUMN {column.declaration}"
                # Out of a Nullable only with a word on what becomes of NULL.
                + (
                    f" DEFAULT defaultValueOfTypeName('{column.type}')"
                    if re.match(r"(LowCardinality\()?Nullable", kind) and column.declaration.endswith(column.type)
                    else ""
                ),
            )
        elif name in there and ("MATERIALIZED" in column.declaration) != (default in ("MATERIALIZED", "ALIAS")):
            yield Finding(
                what=f"{table.name}.{name} is {default.lower() or 'a plain column'}",
                breaks="searches in the metas find nothing"
                if "MATERIALIZED" in column.declaration
                else "INSERTs fail, for it cannot be given",
                fix=f"ALTER TABLE {table.name} MODIFY COLUMN "
                + (column.declaration if "MATERIALIZED" in column.declaration else f"{name} REMOVE {default}"),
                fatal="MATERIALIZED" not in column.declaration,
            )


def _plain(kind: str) -> str:
    """A type without what changes how it is stored and not what: LowCardinality, and the limits of JSON."""
    return re.sub(r"JSON\([^()]*\)", "JSON", re.sub(r"LowCardinality\((\w+)\)", r"\1", kind))


def _ttl(table: _Table, role: Role, retention_days: int) -> Look:
    about = "ClickHouse retention"
    found = _TTL.search(table.engine_full)
    expiring = (
        []
        if found is None
        else [part for part in _parts(found["what"]) if not re.search(r" TO (DISK|VOLUME) | RECOMPRESS ", part + " ")]
    )
    if not expiring:
        return Look(about=about, seen="entries stay for ever")
    seen = ", ".join(expiring)
    mend = f"ALTER TABLE {table.name} MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC')) + INTERVAL {max(90, 3 * retention_days)} DAY"
    for part in expiring:
        named = set(re.findall(r"\w+", part)) & set(_DECLARED)
        days = sum(
            int(count) * _DAYS[unit] for unit, count in re.findall(r"toInterval(\w+?)\((\d+)\)", part) if unit in _DAYS
        )
        if "inserted_at" not in named:
            finding = Finding(
                what=f"the TTL of {table.name} counts from {', '.join(sorted(named)) or 'no column of ours'}: {part}",
                breaks="an old event that is exported today is dropped as soon as it arrives",
                fix=mend,
            )
        elif days <= retention_days:
            finding = Finding(
                what=f"the TTL of {table.name} is {days:g} days and exported rows stay {retention_days} days in the outbox",
                breaks="a requeued entry keeps its inserted_at, so one older than the TTL is dropped as soon as it arrives"
                + (", and an entry can be gone before its batch is verified" if days <= 1 else ""),
                fix=mend,
                fatal=role is Role.OPERATOR or days <= 1,
            )
        else:
            continue
        return Look(about=about, seen=seen, findings=(finding,))
    return Look(about=about, seen=seen)


def _parts(expressions: str) -> list[str]:
    """Comma-separated expressions, commas inside parentheses not counted."""
    parts, depth = [""], 0
    for letter in expressions:
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return [part.strip() for part in parts]


def _view(view: _Table | None) -> Look:
    about = "ClickHouse view audit_logs"
    if view is None:
        finding = Finding(
            what="ClickHouse view audit_logs does not exist or is not readable",
            breaks="readers would have to know about FINAL themselves",
            fix="run `auditexport init`",
            fatal=False,
        )
        return Look(about=about, seen="not there", findings=(finding,))
    if " FINAL" not in view.created_by:
        finding = Finding(
            what="ClickHouse view audit_logs reads without FINAL",
            breaks="an event that has two copies is shown twice until they merge",
            fix="DROP VIEW audit_logs, then `auditexport init`",
            fatal=False,
        )
        return Look(about=about, seen="without FINAL", findings=(finding,))
    return Look(about=about, seen="each event once")
