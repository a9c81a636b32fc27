"""The canary: made-up events through the parser, the SELECT and the column types of an INSERT, never into a table.

What comes out is compared with what went in, so a settings profile, a server version or a column that drops or rounds
something is found before a row is marked. The statement is a SELECT over `format()`: it needs no session, so it works
through a proxy that balances requests, and no view sees it.
"""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from auditexport_pipeline.clickhouse.connection import Connection, translated
from auditexport_pipeline.clickhouse.engine_checks import Table
from auditexport_pipeline.clickhouse.settings import INSERT_SETTINGS
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.findings import Finding, Look
from auditexport_pipeline.core.versions import VERSIONS, top_level_parts
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/checks.sql")
_CANARY = load("clickhouse/audit_log.sql")["canary"]
_OURS = next(iter(VERSIONS.values()))
_INSERTED_AT_MS = 1_760_000_000_123
_MIRRORS = ("meta_text", "targets_meta_text")
# Typed paths of one JSON column that get probes of their own; a column with more of them differs at the first anyway.
_TYPED_PATHS = 8
_TYPED_VALUES: tuple[object, ...] = (5, -5, 1.5, 2**53 + 1, 2**63, "text", "2024-01-02", True)

_META: dict[str, object] = {
    "text": 'a "quoted"\n\\ Zoë \U0001f600 \u2028',
    "": "an empty key",
    "Case": 1,
    "case": 2,
    "dotted.key": {"a.b": 1},
    "dotted": {"key": 2},
    "true": True,
    "false": False,
    "zero": 0,
    "empty": "",
    "int64": [2**53, -(2**53)],
    "largest": 2**63 - 1,
    "smallest": -(2**63),
    "unsigned": 2**64 - 1,
    "float": 0.1,
    "tiny": 5e-324,
    "huge": -1.7976931348623157e308,
    "date": "2024-01-02",
    "time": "2024-01-02T10:00:00Z",
    "seconds": "2024-01-02 10:00:00.123456789",
    "number": "0012",
    "mixed": [1, "a", True, None, 1.5, {"x": [1, "y"]}],
    "booleans": [True, 1, False],
    "nested": [[1], [2, 3], []],
    "objects": [{"a": 1}, {"b": "2024-01-02"}, {}],
    "dates": ["2024-01-02", "x"],
    "none": [None, "a"],
    "deep": {"a": {"b": {"c": {"d": {"e": [{"f": {"g": "end"}}]}}}}},
}
# A float, and in the next row an integer that a float cannot hold, at the same path.
_FLOAT_FIRST: tuple[dict[str, float], ...] = ({"n": 1.5}, {"n": 2**53 + 1})

_clean: dict[tuple[int, str, str], bool] = {}
_remembering = threading.Lock()


def sings(client: Connection, url: str, table: Table, *, again: bool) -> Iterator[Look]:
    """The canary's look; none when `table` is defined as it was at this process's last clean one, unless `again`."""
    key = (os.getpid(), url, table.created_by)
    with _remembering:
        if not again and _clean.get(key):
            return
    try:
        with translated("sending a canary event"):
            found = client.query(
                _SQL["columns"], parameters={"database": table.database, "table": table.name}
            ).result_rows
            columns = {str(name): (str(kind), str(default)) for name, kind, default in found}
            expressions = {
                str(name): str(text)
                for name, text in client.query(
                    _SQL["expressions"], parameters={"database": table.database, "table": table.name}
                ).result_rows
            }
            if any(_plain(columns.get(name, ("", ""))[0]) != _plain(kind) for name, kind in _OURS.columns.items()):
                return  # a column that is missing or of another type is a finding of its own
            findings = tuple(_findings(client, table, {n: k for n, (k, _) in columns.items()}, expressions))
    except AuditExportError as error:
        finding = Finding(
            what=f"a canary event is refused: {error}",
            breaks="rows would be refused or stored otherwise than they were written",
            fix=f"see what the message names in {table.name} or in the settings profile of our user",
        )
        yield Look(about="ClickHouse canary event", seen="refused", findings=(finding,))
        return
    if not any(finding.fatal for finding in findings):
        with _remembering:
            _clean[key] = True
    yield Look(
        about="ClickHouse canary event",
        seen="comes out changed" if findings else "comes out as sent",
        findings=findings,
    )


def _findings(
    client: Connection, table: Table, types: Mapping[str, str], expressions: Mapping[str, str]
) -> Iterator[Finding]:
    whole = _event("whole", meta=_META, targets=({"type": "user", "id": "1", "name": "n", "meta": _META}, {"id": "2"}))
    bare: dict[str, object] = {**_event("bare", meta=None, targets=()), "time": 0, "description": None, "source": ""}
    floats = [_event(f"float_{number}", meta=meta, targets=()) for number, meta in enumerate(_FLOAT_FIRST)]
    differing: dict[tuple[str, str], str] = {}
    entries = _entries(client, types, expressions, [whole, bare, *floats])
    for sent, got in zip((whole, bare), entries, strict=False):
        for column, path, what in _differences(sent, got):
            differing.setdefault((column, path), what)
    refused: list[str] = []
    for column, path, values in _probed_paths(types):
        for value in values:
            meta = _at(path, value)
            sent = _event("typed", **_placed(column, meta))
            try:
                with translated("sending a canary event"):
                    (got,) = _entries(client, types, expressions, [sent])
            except AuditExportError:
                refused.append(f"{column}.{path} takes no {type(value).__name__}")
                continue
            for _, where, what in _differences(sent, got):
                differing.setdefault((column, where), what)
    for column, kind in types.items():
        if "SKIP REGEXP" in kind:
            differing.setdefault((column, "what SKIP REGEXP matches"), "dropped")
    if differing:
        names = sorted({column for column, _ in differing})
        shown = ", ".join(
            f"{column}{'.' + path if path else ''} ({what})" for (column, path), what in sorted(differing.items())[:8]
        )
        yield Finding(
            what=f"a canary event comes out of {table.name} changed: {shown}",
            breaks="what is stored differs from what was sent, and nothing says so",
            fix=_cure(client, table, types, names),
        )
    if refused:
        yield Finding(
            what=f"{table.name} has typed paths: {'; '.join(dict.fromkeys(refused))}",
            breaks="rows with such values are refused",
            fix=f"ALTER TABLE {table.name} "
            + ", ".join(f"MODIFY COLUMN `{column}` {_OURS.columns[column]}" for column in _json_columns(types)),
            fatal=False,
        )
    held = [entry["meta"] for entry in entries[2:]]
    if any(
        isinstance(meta, dict) and meta.get("n") != sent["n"] for meta, sent in zip(held, _FLOAT_FIRST, strict=True)
    ):
        yield Finding(
            what="this server takes an integer above 2^53 in a meta for a float, where an earlier row of its block has a "
            "float at the same path",
            breaks="such integers are rounded (9007199254740993 becomes 9007199254740992)",
            fix="upgrade ClickHouse to 26.3 or later, or write such numbers as strings",
            fatal=False,
        )


def _event(event_id: str, *, meta: object = None, targets: object = (), actor_meta: object = None) -> dict[str, object]:
    """A payload of `audit_log.v1`, made up."""
    return {
        "event_id": f"canary_{event_id}",
        "time": 2**63 - 1,
        "workspace_id": "canary ws ✓",
        "bucket": "B",
        "source": "canary",
        "event": "canary.sings",
        "Description": "not the description",
        "description": "Zoë's \t canary",
        "actor": {"type": "key", "id": "1", "name": "", "meta": actor_meta},
        "remote_ip": "::1",
        "user_agent": "",
        "meta": meta,
        "targets": targets,
        "correlation_id": None,
        "unknown": {"a": [1]},
    }


def _expected(sent: Mapping[str, Any]) -> dict[str, object]:
    """What each column must hold, and each mirror."""
    actor, targets = sent["actor"], list(sent["targets"])
    metas = [_kept(target.get("meta") or {}) for target in targets]
    return {
        "event_id": sent["event_id"],
        "time": sent["time"],
        "inserted_at": _INSERTED_AT_MS,
        "workspace_id": sent["workspace_id"],
        "bucket": sent["bucket"],
        "source": sent["source"] or "platform",
        "event": sent["event"],
        "description": sent["description"] or "",
        "actor_type": actor["type"],
        "actor_id": actor["id"],
        "actor_name": actor["name"],
        "actor_meta": _kept(actor["meta"] or {}),
        "remote_ip": sent["remote_ip"],
        "user_agent": sent["user_agent"],
        "meta": _kept(sent["meta"] or {}),
        "targets.type": [target.get("type", "") for target in targets],
        "targets.id": [target.get("id", "") for target in targets],
        "targets.name": [target.get("name", "") for target in targets],
        "targets.meta": metas,
        "correlation_id": sent["correlation_id"] or "",
        "meta_text": _kept(sent["meta"] or {}),
        "targets_meta_text": metas,
    }


def _kept(value: object) -> object:
    """What ClickHouse's JSON type keeps: in an object, null and {} are absent."""
    if isinstance(value, dict):
        members = {key: _kept(child) for key, child in value.items()}
        return {key: child for key, child in members.items() if child is not None and child != {}}
    return [_kept(child) for child in value] if isinstance(value, list) else value


def _entries(
    client: Connection, types: Mapping[str, str], expressions: Mapping[str, str], sent: Sequence[Mapping[str, object]]
) -> list[dict[str, object]]:
    """What columns and mirrors would hold of these events, in their order."""
    names = [*_OURS.columns]
    typed = ", ".join(
        f"CAST({expression.strip()}, '{_quoted(types[column])}') AS `{column}`"
        for expression, column in zip(top_level_parts(_OURS.pieces["select"]), names, strict=True)
    )
    mirrors = [name for name in _MIRRORS if name in expressions]
    shown = [
        *(f"toJSONString(`{name}`)" for name in names),
        *(f"toJSONString(CAST({expressions[name]}, '{_quoted(types[name])}'))" for name in mirrors),
    ]
    statement = (
        _CANARY.replace("$shown", ", ".join(shown)).replace("$typed", typed).replace("$input", _OURS.pieces["input"])
    )
    rows = client.query(
        statement,
        parameters={
            "payloads": "\n".join(json.dumps(event, ensure_ascii=False) for event in sent),
            "inserted_at_ms": _INSERTED_AT_MS,
        },
        settings=INSERT_SETTINGS,
    ).result_rows
    found = []
    for row in rows:
        entry: dict[str, object] = dict(zip((*names, *mirrors), map(json.loads, row), strict=True))
        if "meta_text" in entry:
            entry["meta_text"] = _read(str(entry["meta_text"]))
        if "targets_meta_text" in entry:
            lines = str(entry["targets_meta_text"]).split("\n")
            entry["targets_meta_text"] = [_read(line) for line in lines if line]
        found.append(entry)
    return found


def _read(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _plain(kind: str) -> str:
    """A type without what is looked at here: what stands in the brackets of JSON, and LowCardinality."""
    if "JSON(" in kind:
        kind = kind.split("JSON(", 1)[0] + "JSON" + (")" if kind.startswith("Array(") else "")
    return re.sub(r"LowCardinality\((\w+)\)", r"\1", kind)


def _quoted(kind: str) -> str:
    return kind.replace("\\", "\\\\").replace("'", "\\'")


def _differences(sent: Mapping[str, Any], got: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Column, path and what became of it, for each column that differs."""
    for column, expected in _expected(sent).items():
        if column in got:
            for path, what in _paths(expected, _kept(got[column]), ""):
                yield column, path, what


def _paths(expected: object, got: object, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(expected, dict) and isinstance(got, dict):
        for key in sorted({*expected, *got}):
            at = f"{path}.{key}".lstrip(".")
            if key not in got:
                yield at, "dropped"
            elif key not in expected:
                yield at, "added"
            else:
                yield from _paths(expected[key], got[key], at)
    elif isinstance(expected, list) and isinstance(got, list) and len(expected) == len(got):
        for one, other in zip(expected, got, strict=True):
            yield from _paths(one, other, path)
    elif expected != got or isinstance(expected, bool) != isinstance(got, bool):
        yield path, "changed"


def _json_columns(types: Mapping[str, str]) -> Iterator[str]:
    return (name for name in ("actor_meta", "meta", "targets.meta") if name in types and "JSON(" in types[name])


def _probed_paths(types: Mapping[str, str]) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Column, path and the values to send there, for each typed or skipped path of the JSON columns."""
    for column in _json_columns(types):
        inside = types[column].split("JSON(", 1)[1].rsplit(")", 2 if types[column].startswith("Array(") else 1)[0]
        parts = [part.strip() for part in top_level_parts(inside)]
        named = [part for part in parts if not re.match(r"max_dynamic_(paths|types)\s*=|SKIP REGEXP", part)]
        for part in named[:_TYPED_PATHS]:
            skipped = part.startswith("SKIP ")
            path = part.removeprefix("SKIP ") if skipped else re.match(r"(`[^`]*`|\S+)", part)[0]  # type: ignore[index]
            yield column, path.replace("`", ""), ("kept",) if skipped else _TYPED_VALUES


def _at(path: str, value: object) -> dict[str, object]:
    """{"a": {"b": value}} for the path a.b, as types write it."""
    found = value
    for key in reversed(path.split(".")):
        found = {key.replace("%2E", "."): found}
    assert isinstance(found, dict)
    return found


def _placed(column: str, meta: object) -> dict[str, object]:
    if column == "targets.meta":
        return {"targets": ({"type": "t", "id": "1", "name": "n", "meta": meta},)}
    return {column: meta}


def _cure(client: Connection, table: Table, types: Mapping[str, str], differing: Sequence[str]) -> str:
    """The column's own type where the table differs from the declared one; else the settings that somebody changed."""
    source = {"meta_text": "meta", "targets_meta_text": "targets.meta"}
    typed = sorted({source.get(name, name) for name in differing} & {*_json_columns(types)})
    if typed:
        return f"ALTER TABLE {table.name} " + ", ".join(
            f"MODIFY COLUMN `{column}` {_OURS.columns[column]}" for column in typed
        )
    changed = [name for name, here in client.listed().items() if here.changed and name not in INSERT_SETTINGS]
    if changed:
        return f"take {', '.join(changed[:12])} out of the settings profile of our user, one after the other"
    return f"compare SHOW CREATE TABLE {table.name} with `auditexport init --print-ddl`, or upgrade the server"
