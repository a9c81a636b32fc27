"""The checks of ClickHouse: version, transport, profile, proxy, grants and row policies. Those of the tables are in
`clickhouse.table_checks`.

`preflight` runs them. Each only reads, through `clickhouse.catalogue`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

from auditexport_pipeline.clickhouse.catalogue import Catalogue
from auditexport_pipeline.clickhouse.connection import connection_arguments
from auditexport_pipeline.clickhouse.engines import TABLE, VIEW
from auditexport_pipeline.clickhouse.settings import INSERT_SETTINGS, READ_SETTINGS, STANDS_IN, refused
from auditexport_pipeline.clickhouse.table_checks import table_checks
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.core.findings import Check, Checking, Finding, warning
from auditexport_pipeline.hosts import is_local
from auditexport_pipeline.roles import Role, clickhouse_grants
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/checks.sql")
OLDEST = (25, 8)


def clickhouse_checks(db: Catalogue) -> Iterator[Check]:
    """Every check of ClickHouse for the role of `db`, in the order in which doctor shows them."""
    yield Check("ClickHouse version", _version(db))
    yield Check("ClickHouse transport", _transport(db))
    lacking: dict[str, list[str]] | None = {}
    if db.server.read_only and db.role in (Role.EXPORTER, Role.OWNER):
        # With such a profile CHECK GRANT denies what was granted, and no GRANT would fix that.
        yield Check("ClickHouse profile", _read_only(db))
    else:
        lacking = _lacking(db)
        yield Check("ClickHouse profile", _profile(db))
        yield Check("ClickHouse answers", _proxy(db))
        yield Check(f"ClickHouse grants of the {db.role.value}", _grants(db, lacking))
    if not lacking and db.role not in (Role.READER, Role.OWNER) and TABLE in db.tables:
        yield Check("ClickHouse row policies", _policies(db))
    yield from table_checks(db)


def clickhouse_version(text: str) -> tuple[int, int]:
    """Year and month of a version such as `25.8.3.66`."""
    found = re.match(r"(\d+)\.(\d+)", text)
    return (int(found[1]), int(found[2])) if found else (0, 0)


def _version(db: Catalogue) -> Checking:
    if clickhouse_version(db.server.version) < OLDEST:
        yield Finding(
            what=f"the server is ClickHouse {db.server.version}",
            breaks="its JSON type stores metas differently, and this program was not tested with it",
            fix=f"upgrade it to {OLDEST[0]}.{OLDEST[1]} or later",
        )
    return db.server.version


def _transport(db: Catalogue) -> Checking:
    """A connection that leaves this host is encrypted, and the server's certificate and name are verified."""
    url = connection_arguments(db.url)
    tls, verified = url["interface"] == "https", url["verify"]
    seen = f"TLS, certificate {'and name' if verified else 'not'} verified" if tls else "no TLS"
    if not is_local(url["host"]) and not (tls and verified):
        yield warning(
            what=f"the connection to {url['host']} has {seen}",
            breaks="anyone on the way can read events and the password",
            fix="remove verify=false from AUDITEXPORT_CLICKHOUSE_URL; ?ca_cert=/path.pem names an authority of your own"
            if tls
            else "let AUDITEXPORT_CLICKHOUSE_URL begin with https:// and name the server's https_port (8443)",
        )
    return seen


def _read_only(db: Catalogue) -> Checking:
    user, read_only = db.server.user, db.server.read_only
    yield Finding(
        what=f"the settings profile of {user} has readonly = {read_only}",
        breaks="every INSERT is refused, and so are the settings that keep an event as it was written",
        fix=f"ALTER USER {user} SETTINGS readonly = 0, or give it another profile",
    )
    return f"readonly = {read_only}"


def _profile(db: Catalogue) -> Checking:
    """Our user may set what our statements set. Settings that a server lacks are shown with what it does instead."""
    listed = db.client.listed()
    ours = {**READ_SETTINGS, **(INSERT_SETTINGS if db.role is Role.EXPORTER else {})}
    if pinned := refused(ours, listed):
        shown = ", ".join(f"{name} = {found}" for name, (_, found) in pinned.items())
        needed = ", ".join(f"{name} = {value or repr('')}" for name, (value, _) in pinned.items())
        yield Finding(
            what=f"the settings profile of {db.server.user} pins {shown}",
            breaks=f"our statements set {needed} and are refused; without these settings, an INSERT could be acknowledged "
            "before it is stored, stored twice or changed, and a look-up could miss rows",
            fix=f"remove the constraint on {', '.join(pinned)} from the settings profile of {db.server.user}",
        )
        return shown
    absent = "; ".join(f"no {name}: {STANDS_IN[name]}" for name in ours if name in STANDS_IN and name not in listed)
    return f"this server has {absent}" if absent else "leaves our statements their settings"


def _proxy(db: Catalogue) -> Checking:
    """The settings that a statement carries reach ClickHouse, and ClickHouse's own headers reach us."""
    ((comment,),) = db.client.query(_SQL["stated"], settings={"log_comment": "auditexport"})
    if comment != "auditexport":
        yield Finding(
            what="settings in the SETTINGS clause of a statement do not reach ClickHouse",
            breaks="the tokens and limits of INSERTs are lost",
            fix="name ClickHouse itself in AUDITEXPORT_CLICKHOUSE_URL, or remove what rewrites statements on the way",
        )
        return "statements are rewritten"
    if not db.client.headers_arrive:
        yield warning(
            what="a proxy removes the X-ClickHouse-… headers",
            breaks="no answer proves that an INSERT is stored: each costs a look-up by inserted_at",
            fix="configure the proxy to pass X-ClickHouse-Summary and X-ClickHouse-Query-Id",
        )
        return "without ClickHouse's headers"
    return "with ClickHouse's own headers"


def _lacking(db: Catalogue) -> dict[str, list[str]] | None:
    """By table, the privileges that our user lacks for its role; None where the server has no CHECK GRANT."""
    needed = dict(clickhouse_grants(db.role))
    for table in db.tables.values():
        # A server that is a shard itself reads its own table as the same user. The view can be a Distributed table too.
        if under := table.under:
            local = under.table if under.database == db.server.database else f"{under.database}.{under.table}"
            needed[local] = needed[TABLE if table.name == VIEW else table.name]
    lacking: dict[str, list[str]] = {}
    try:
        with db.client.translated("checking a grant"):
            for name, privileges in needed.items():
                for privilege in privileges:
                    if not int(db.client.command(f"CHECK GRANT {privilege} ON {name}")):
                        lacking.setdefault(name, []).append(privilege)
    except SetupIncomplete:
        return None
    return lacking


def _grants(db: Catalogue, lacking: dict[str, list[str]] | None) -> Checking:
    if lacking is None:
        return "not checked: this server has no CHECK GRANT"
    user, role = db.server.user, db.role.value
    for table, privileges in lacking.items():
        some, on = ", ".join(privileges), table if "." in table else f"{db.server.database}.{table}"
        yield Finding(
            what=f"{user}, as {role}, lacks {some} on {on} in ClickHouse",
            breaks=f"what the {role} does there is refused",
            fix=f"GRANT {some} ON {on} TO {user}",
        )
    return f"{user} lacks some" if lacking else f"{user} has what the {role} needs"


def _policies(db: Catalogue) -> Checking:
    """No row policy hides rows from our user."""
    names = [str(row[0]) for row in db.rows_if_granted("policies") or ()]
    if not names and not int(db.rows("filters")[0][0]):
        return "none on our user"
    user, name = db.server.user, names[0] if names else "NAME"
    yield Finding(
        what=f"{'row policy ' + ', '.join(names) if names else 'a row policy'} on {TABLE} hides rows from {user}",
        breaks="hidden entries are reported as missing, and every `reconcile --repair` stores one more copy of them",
        fix=f"exempt {user} from the policy: ALTER ROW POLICY {name} ON {TABLE} TO ALL EXCEPT {user}, or CREATE ROW POLICY "
        f"auditexport ON {TABLE} USING 1 TO {user} where there are no restrictive ones",
    )
    return "some rows are hidden"
