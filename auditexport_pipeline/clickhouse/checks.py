"""Looking at ClickHouse before anything is claimed: version, grants, the table, its keys, window and TTL.

What belongs here: what is asked of the server, of `audit_logs_raw_v1` and of the view beside it, and what each answer breaks
and how it is mended. What does not: what any destination table stands on (`engine_checks`), other versions' tables
(`version_checks`), the statements (`checks.sql`), what the table should be (`audit_log_v1.sql`), and when to look
(`preflight`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from string import Template

from auditexport_pipeline.clickhouse import canary
from auditexport_pipeline.clickhouse.audit_log import ttl_reader
from auditexport_pipeline.clickhouse.connection import Connection, connection_arguments, translated
from auditexport_pipeline.clickhouse.engine_checks import (
    Table,
    distributed,
    engine,
    held_by,
    init_for,
    replicas,
    table_of,
    under_of,
    window,
)
from auditexport_pipeline.clickhouse.engines import TABLE
from auditexport_pipeline.clickhouse.settings import INSERT_SETTINGS, READ_SETTINGS, missing, refused
from auditexport_pipeline.clickhouse.ttl import ttl_of
from auditexport_pipeline.clickhouse.version_checks import look_at_other_versions
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.core.versions import SORT_KEY, VERSIONS
from auditexport_pipeline.hosts import is_local
from auditexport_pipeline.roles import Role, clickhouse_grants
from auditexport_pipeline.sql import columns_of, load

_SQL = load("clickhouse/checks.sql")
_OURS = next(iter(VERSIONS.values()))
_DECLARED = columns_of(_OURS.pieces["ddl"])
OLDEST = (25, 8)
_COPIED = ", ".join(f"`{name}`" for name, column in _DECLARED.items() if "MATERIALIZED" not in column.declaration)
# On a cluster, with ON CLUSTER.
_VIEW_ANEW = "CREATE OR REPLACE VIEW audit_logs AS " + load("clickhouse/schema.sql")["audit_logs"].partition(" AS\n")[2]


def clickhouse_version(text: str) -> tuple[int, int]:
    """Year and month of a version such as `25.8.3.66`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def look_at_clickhouse(client: Connection, url: str, role: Role, retention_days: int) -> Iterator[Look]:
    """All that can be asked over one client of ours. Source: system tables, CHECK GRANT; nothing is written."""
    version, user, database, _, read_only = client.query(_SQL["server"]).result_rows[0]
    yield _version(str(version))
    yield _transport(url)
    readable = True
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
        yield _proxy(client)
        tables = dict(clickhouse_grants(role))
        for table in map(table_of, client.query(_SQL["tables"]).result_rows):
            # A server that is a shard itself asks its own table as the same user.
            if (under := under_of(table)) is not None:
                name = under.table if under.database == database else f"{under.database}.{under.table}"
                tables = {**tables, name: tables[TABLE]}
        granted = _grants(client, str(user), str(database), role, tables)
        readable = not granted.findings
        yield granted
    there = {table_of(row).name for row in client.query(_SQL["tables"]).result_rows}
    if readable and role not in (Role.READER, Role.OWNER) and TABLE in there:
        yield _policies(client, str(user), [TABLE])
    yield from look_at_the_table(client, url, role, retention_days, fully=True)
    yield from look_at_other_versions(client, url, role)


def look_at_the_table(client: Connection, url: str, role: Role, retention_days: int, *, fully: bool) -> Iterator[Look]:
    """Engine, keys and window of audit_logs_raw_v1; with `fully` also columns, replicas, TTL and the view beside it."""
    rows = {table.name: table for table in map(table_of, client.query(_SQL["tables"]).result_rows)}
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
    table = held_by(client, rows[TABLE])
    if (under := under_of(rows[TABLE])) is not None:
        yield distributed(client, url, TABLE, under)
        about = f"ClickHouse table {under.table}"
        if table is None:
            yield Look(about=about, seen="not on this server; run doctor on a server of each shard")
    if table is not None:
        anew = _anew(table, rows[TABLE])
        findings = [*engine(table, anew), *window(client, table)]
        if fully:
            findings += _columns(client, table, anew)
        seen = f"{table.engine}, by {table.partition_key or 'no partition'}"
        yield Look(about=about, seen=seen, findings=tuple(findings))
        if role is Role.EXPORTER:
            yield from canary.sings(client, url, table, again=fully)
        if fully:
            yield from replicas(client, url, table)
            yield _ttl(client, table, role, retention_days)
    if fully and (role is Role.READER or "audit_logs" in rows):
        yield _view(rows.get("audit_logs"))


def _anew(table: Table, named: Table) -> str:
    """How to begin again with a table; `named` is the one of the contract's name, which may be a Distributed one over it."""
    name = table.name
    return (
        f"create it anew while no drain runs: RENAME TABLE {name} TO {name}_old; then {init_for(named)}; then "
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


def _profile(client: Connection, user: str, role: Role) -> Look:
    """Settings that we state in every statement: whether our user may, and what a server without one does differently."""
    about = "ClickHouse profile"
    listed = client.listed()
    wanted = {**READ_SETTINGS, **(INSERT_SETTINGS if role is Role.EXPORTER else {})}
    pinned = refused(wanted, listed)
    findings = []
    if pinned:
        shown = ", ".join(f"{name} = {stands}" for name, (_, stands) in pinned.items())
        needed = ", ".join(f"{name} = {value or repr('')}" for name, (value, _) in pinned.items())
        findings.append(
            Finding(
                what=f"the settings profile of {user} pins {shown}",
                breaks=f"our statements say {needed} and are refused; without saying so, an INSERT would be acknowledged before it "
                "is stored, stored twice or changed, and a look-up would see half",
                fix=f"take the constraint on {', '.join(pinned)} out of the profile of {user}",
            )
        )
    absent = missing(wanted, listed)
    seen = "; ".join(f"no {name}: {instead}" for name, instead in absent.items())
    seen = f"this server has {seen}" if seen else "leaves our statements their settings"
    return Look(about=about, seen=shown if pinned else seen, findings=tuple(findings))


def _proxy(client: Connection) -> Look:
    """Whether ClickHouse's own headers arrive, and the settings that a statement carries."""
    about = "ClickHouse answers"
    ((comment,),) = client.query(_SQL["stated"], settings={"log_comment": "auditexport"}).result_rows
    if comment != "auditexport":
        finding = Finding(
            what="settings in the SETTINGS clause of a statement do not reach ClickHouse",
            breaks="tokens and limits of INSERTs get lost on the way",
            fix="name ClickHouse itself in AUDITEXPORT_CLICKHOUSE_URL, or take what rewrites statements off the way",
        )
        return Look(about=about, seen="statements are rewritten", findings=(finding,))
    if client.headers_arrive:
        return Look(about=about, seen="with ClickHouse's own headers")
    finding = Finding(
        what="a proxy keeps the X-ClickHouse-… headers to itself",
        breaks="no answer proves an INSERT; each costs a look-up by inserted_at beside it",
        fix="let the proxy pass X-ClickHouse-Summary and X-ClickHouse-Query-Id on",
        fatal=False,
    )
    return Look(about=about, seen="without ClickHouse's headers", findings=(finding,))


def _policies(client: Connection, user: str, tables: Sequence[str]) -> Look:
    """Rows that a row policy hides from our user: verification would call them lost, and each repair store them again."""
    about = "ClickHouse row policies"
    findings = []
    for table in tables:
        ((filters,),) = client.query(Template(_SQL["filters"]).substitute(table=table)).result_rows
        try:
            with translated("looking at row policies"):
                rows = client.query(_SQL["policies"], parameters={"table": table}).result_rows
        except SetupIncomplete:
            rows = []
        names = ", ".join(str(row[0]) for row in rows)
        if int(filters) or names:
            policy = f"row policy {names}" if names else "a row policy"
            findings.append(
                Finding(
                    what=f"{policy} on {table} hides rows from {user}",
                    breaks="what it hides is called missing, and every `reconcile --repair` stores one more copy of it",
                    fix=f"take {user} out of the policy: ALTER ROW POLICY {names.split(', ')[0] or 'NAME'} ON {table} TO ALL EXCEPT "
                    f"{user}, or CREATE ROW POLICY auditexport ON {table} USING 1 TO {user} where there are no restrictive ones",
                )
            )
    return Look(about=about, seen="some rows are hidden" if findings else "none on our user", findings=tuple(findings))


def _grants(client: Connection, user: str, database: str, role: Role, tables: Mapping[str, tuple[str, ...]]) -> Look:
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


def _columns(client: Connection, table: Table, anew: str) -> Iterator[Finding]:
    parameters = {"database": table.database, "table": table.name}
    there: Mapping[str, Sequence[str]] = {
        name: (kind, default)
        for name, kind, default in client.query(_SQL["columns"], parameters=parameters).result_rows
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
                fix=anew
                if name in (*SORT_KEY, "inserted_at")
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


def _ttl(client: Connection, table: Table, role: Role, retention_days: int) -> Look:
    about = "ClickHouse retention"
    ttl = ttl_of(table.engine_full)
    if not ttl.deletions and not ttl.unreadable:
        return Look(about=about, seen="entries stay for ever")
    mend = f"ALTER TABLE {table.name} MODIFY TTL toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC')) + INTERVAL {max(90, 3 * retention_days)} DAY"
    if ttl.unreadable:
        return Look(about=about, seen=ttl.text, findings=(_ttl_unknown(table, ttl.text, ttl.unreadable, mend),))
    seen = ", ".join(map(str, ttl.deletions))
    for deletion in ttl.deletions:
        named = set(re.findall(r"\w+", deletion.at)) & set(_DECLARED)
        kept_ms = ttl_reader(client).kept_by(deletion.at)
        days = kept_ms / 86_400_000 if kept_ms is not None else None
        if not named or ("inserted_at" not in named and not deletion.where):
            finding = Finding(
                what=f"the TTL of {table.name} counts from {', '.join(sorted(named)) or 'no column of ours'}: {deletion}",
                breaks="an old event that is exported today is dropped as soon as it arrives",
                fix=mend,
            )
        elif days is not None and days <= retention_days:
            finding = Finding(
                what=f"the TTL of {table.name} is {days:g} days and exported rows stay {retention_days} days in the outbox",
                breaks="a requeued entry keeps its inserted_at, so one older than the TTL is dropped as soon as it arrives"
                + (", and an entry can be gone before its batch is verified" if days <= 1 else ""),
                fix=mend,
                fatal=role is Role.OPERATOR or days <= 1,
            )
        elif deletion.where or days is None:
            finding = _ttl_unknown(
                table,
                str(deletion),
                "it deletes some rows and not others"
                if deletion.where
                else "it cannot be evaluated from inserted_at alone",
                mend,
            )
        else:
            continue
        return Look(about=about, seen=seen, findings=(finding,))
    return Look(about=about, seen=seen)


def _ttl_unknown(table: Table, text: str, why: str, mend: str) -> Finding:
    return Finding(
        what=f"whether an entry of {table.name} is past its TTL cannot always be told: {why}: {text}",
        breaks="of entries that are gone, those are called missing, and the sweep keeps their rows",
        fix=f"{mend}; or say how long it keeps an entry: `auditexport sweep --ttl-days DAYS`",
        fatal=False,
    )


def _view(view: Table | None) -> Look:
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
    if not re.search(r"\bdo_not_merge_across_partitions_select_final\s*=\s*(0|false)\b", view.created_by):
        finding = Finding(
            what="ClickHouse view audit_logs leaves do_not_merge_across_partitions_select_final to its reader's profile",
            breaks="where that is 1, an event that has copies under two months is shown twice, for good: they never merge",
            fix=_VIEW_ANEW,
            fatal=False,
        )
        return Look(about=about, seen="each event once within a month", findings=(finding,))
    return Look(about=about, seen="each event once")
