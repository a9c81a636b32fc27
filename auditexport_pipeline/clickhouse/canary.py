"""The canary event: made-up events go through the parser, the SELECT and the column types of an INSERT.

Nothing is written. The result is compared with the events, so a settings profile, a server version or a column that
drops or rounds values is found before a row is marked. The statement is a SELECT over `format()`: it needs no session,
so it works through a proxy that balances requests, and no view sees it.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from auditexport_pipeline.clickhouse.catalogue import Catalogue, FoundColumn, Table, compared_type
from auditexport_pipeline.clickhouse.settings import INSERT_SETTINGS, literal
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.findings import Checking, Finding, warning
from auditexport_pipeline.core.versions import VERSIONS, top_level_parts
from auditexport_pipeline.sql import load

_CANARY = load("clickhouse/audit_log.sql")["canary"]
_OURS = next(iter(VERSIONS.values()))
_INSERTED_AT_MS = 1_760_000_000_123
# The text mirrors, and the column that each is computed from.
_MIRRORS = {"meta_text": "meta", "targets_meta_text": "targets.meta"}
# At most this many typed paths of one JSON column are tested.
_TYPED_PATHS = 8
_TYPED_VALUES: tuple[object, ...] = (5, -5, 1.5, 2**53 + 1, 2**63, "text", "2024-01-02", True)

_META: dict[str, object] = json.loads(r"""{
  "text": "a \"quoted\"\n\\ Zoë \ud83d\ude00 \u2028", "": "an empty key", "Case": 1, "case": 2,
  "dotted.key": {"a.b": 1}, "dotted": {"key": 2}, "true": true, "false": false, "zero": 0, "empty": "",
  "int64": [9007199254740992, -9007199254740992], "largest": 9223372036854775807, "smallest": -9223372036854775808,
  "unsigned": 18446744073709551615, "float": 0.1, "tiny": 5e-324, "huge": -1.7976931348623157e308,
  "date": "2024-01-02", "time": "2024-01-02T10:00:00Z", "seconds": "2024-01-02 10:00:00.123456789", "number": "0012",
  "mixed": [1, "a", true, null, 1.5, {"x": [1, "y"]}], "booleans": [true, 1, false], "nested": [[1], [2, 3], []],
  "objects": [{"a": 1}, {"b": "2024-01-02"}, {}], "dates": ["2024-01-02", "x"], "none": [null, "a"],
  "deep": {"a": {"b": {"c": {"d": {"e": [{"f": {"g": "end"}}]}}}}}
}""")
# A float, and in the next row an integer that a float cannot hold, at the same path.
_FLOAT_FIRST: tuple[dict[str, float], ...] = ({"n": 1.5}, {"n": 2**53 + 1})

# By process, URL and definition: tables whose canary event came out unchanged.
_clean: set[tuple[int, str, str]] = set()

Columns = Mapping[str, FoundColumn]


def canary(db: Catalogue, table: Table, *, again: bool) -> Checking:
    """A canary event comes out of the table's columns unchanged. Without `again`, nothing is sent if this process has
    checked the same table definition without a fatal finding.
    """
    key = (os.getpid(), db.url, table.created_by)
    if key in _clean and not again:
        return "came out unchanged, and the table has not changed since"
    try:
        with db.client.translated("sending a canary event"):
            columns = db.columns(table)
            for name, kind in _OURS.columns.items():
                if name not in columns or compared_type(columns[name].type, _OURS) != compared_type(kind, _OURS):
                    return f"not sent: {name} is missing or of another type"  # which is a finding of its own
            findings = [*_findings(db, table, columns)]
    except AuditExportError as error:
        yield Finding(
            what=f"a canary event is refused: {error}",
            breaks="rows would be refused, or stored with other values",
            fix=f"check what the message names in {table.name} or in the settings profile of our user",
        )
        return "refused"
    if not any(finding.fatal for finding in findings):
        _clean.add(key)
    yield from findings
    return "comes out changed" if findings else "comes out unchanged"


def _findings(db: Catalogue, table: Table, columns: Columns) -> Iterator[Finding]:
    target = {"type": "user", "id": "1", "name": "n", "meta": _META}
    whole = _event("whole", meta=_META, targets=(target, {"id": "2"}))
    bare: dict[str, object] = {**_event("bare"), "time": 0, "description": None, "source": ""}
    floats = [_event(f"float_{number}", meta=meta) for number, meta in enumerate(_FLOAT_FIRST)]
    whole_got, bare_got, *floats_got = _entries(db, columns, [whole, bare, *floats])
    differing = {**_differences(bare, bare_got), **_differences(whole, whole_got)}
    refused: list[str] = []
    for column, path, values in _probed_paths(columns):
        for value in values:
            sent = _event("typed", **_in_column(column, _at(path, value)))
            try:
                with db.client.translated("sending a canary event"):
                    (got,) = _entries(db, columns, [sent])
            except AuditExportError:
                refused.append(f"{column}.{path} takes no {type(value).__name__}")
            else:
                differing = {**_differences(sent, got), **differing}
    for name, column_found in columns.items():
        if "SKIP REGEXP" in column_found.type:
            differing.setdefault((name, "what SKIP REGEXP matches"), "dropped")
    if differing:
        shown = ", ".join(f"{'.'.join(filter(None, where))} ({what})" for where, what in sorted(differing.items())[:8])
        yield Finding(
            what=f"a canary event comes out of {table.name} changed: {shown}",
            breaks="what is stored differs from what was sent, without an error",
            fix=_fix(db, table, columns, {column for column, _ in differing}),
        )
    if refused:
        yield warning(
            what=f"{table.name} has typed paths: {'; '.join(dict.fromkeys(refused))}",
            breaks="rows with such values are refused",
            fix=_declare_again(table, _json_columns(columns)),
        )
    metas = [entry["meta"] for entry in floats_got]
    if any(isinstance(got, dict) and got.get("n") != sent["n"] for got, sent in zip(metas, _FLOAT_FIRST, strict=True)):
        yield warning(
            what="this server takes an integer above 2^53 in a meta for a float, where an earlier row of its block has a "
            "float at the same path",
            breaks="such integers are rounded (9007199254740993 becomes 9007199254740992)",
            fix="upgrade ClickHouse to 26.3 or later, or write such numbers as strings",
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
    """The value of each column and each mirror."""
    actor, targets, meta = sent["actor"], list(sent["targets"]), _without_empty(sent["meta"] or {})
    metas = [_without_empty(target.get("meta") or {}) for target in targets]
    as_sent = ("event_id", "time", "workspace_id", "bucket", "event", "remote_ip", "user_agent")
    return {
        **{name: sent[name] for name in as_sent},
        "inserted_at": _INSERTED_AT_MS,
        "source": sent["source"] or "platform",
        "description": sent["description"] or "",
        "correlation_id": sent["correlation_id"] or "",
        **{f"actor_{name}": actor[name] for name in ("type", "id", "name")},
        "actor_meta": _without_empty(actor["meta"] or {}),
        "meta": meta,
        "meta_text": meta,
        **{f"targets.{name}": [target.get(name, "") for target in targets] for name in ("type", "id", "name")},
        "targets.meta": metas,
        "targets_meta_text": metas,
    }


def _without_empty(value: object) -> object:
    """As ClickHouse's JSON type stores it: in an object, null and {} are absent."""
    if isinstance(value, dict):
        members = {key: _without_empty(child) for key, child in value.items()}
        return {key: child for key, child in members.items() if child is not None and child != {}}
    return [_without_empty(child) for child in value] if isinstance(value, list) else value


def _entries(db: Catalogue, columns: Columns, sent: Sequence[Mapping[str, object]]) -> list[dict[str, Any]]:
    """The values of columns and mirrors for these events, in their order."""

    def cast(expression: str, column: str) -> str:
        return f"CAST({expression.strip()}, {literal(columns[column].type)})"

    selected = zip(top_level_parts(_OURS.pieces["select"]), _OURS.columns, strict=True)
    shown = {name: f"`{name}`" for name in _OURS.columns}
    for mirror in _MIRRORS:
        if mirror in columns and columns[mirror].kind == "MATERIALIZED":
            shown[mirror] = cast(columns[mirror].expression, mirror)
    statement = (
        _CANARY.replace("$shown", ", ".join(f"toJSONString({expression})" for expression in shown.values()))
        .replace("$typed", ", ".join(f"{cast(expression, column)} AS `{column}`" for expression, column in selected))
        .replace("$input", _OURS.pieces["input"])
    )
    payloads = "\n".join(json.dumps(event, ensure_ascii=False) for event in sent)
    parameters = {"payloads": payloads, "inserted_at_ms": _INSERTED_AT_MS}
    found = []
    for row in db.client.query(statement, parameters=parameters, settings=INSERT_SETTINGS):
        entry = dict(zip(shown, map(json.loads, row), strict=True))
        if "meta_text" in entry:
            entry["meta_text"] = _json_or_none(str(entry["meta_text"]))
        if "targets_meta_text" in entry:
            lines = str(entry["targets_meta_text"]).split("\n")
            entry["targets_meta_text"] = [_json_or_none(line) for line in lines if line]
        found.append(entry)
    return found


def _json_or_none(text: str) -> object:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _differences(sent: Mapping[str, Any], got: Mapping[str, object]) -> dict[tuple[str, str], str]:
    """By column and path, what happened to each value that differs."""
    return {
        (column, path): what
        for column, expected in _expected(sent).items()
        if column in got
        for path, what in _paths(expected, _without_empty(got[column]), "")
    }


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


def _json_columns(columns: Columns) -> list[str]:
    """The metas' columns whose JSON type has parameters."""
    return [name for name in ("actor_meta", "meta", "targets.meta") if "JSON(" in columns[name].type]


def _probed_paths(columns: Columns) -> Iterator[tuple[str, str, tuple[object, ...]]]:
    """Column, path and the values to send there, for each typed or skipped path of the JSON columns."""
    for column in _json_columns(columns):
        kind = columns[column].type
        inside = kind.split("JSON(", 1)[1].rsplit(")", 2 if kind.startswith("Array(") else 1)[0]
        parts = [part.strip() for part in top_level_parts(inside)]
        named = [part for part in parts if not re.match(r"max_dynamic_(paths|types)\s*=|SKIP REGEXP", part)]
        for part in named[:_TYPED_PATHS]:
            skipped = part.startswith("SKIP ")
            path = part.removeprefix("SKIP ") if skipped else re.match(r"(`[^`]*`|\S+)", part)[0]  # type: ignore[index]
            yield column, path.replace("`", ""), ("kept",) if skipped else _TYPED_VALUES


def _at(path: str, value: object) -> object:
    """{"a": {"b": value}} for the path a.b, as types write it."""
    for key in reversed(path.split(".")):
        value = {key.replace("%2E", "."): value}
    return value


def _in_column(column: str, meta: object) -> dict[str, object]:
    if column == "targets.meta":
        return {"targets": ({"type": "t", "id": "1", "name": "n", "meta": meta},)}
    return {column: meta}


def _fix(db: Catalogue, table: Table, columns: Columns, differing: set[str]) -> str:
    """To declare the columns again where their types have parameters; else the settings that the profile changed."""
    typed = {_MIRRORS.get(name, name) for name in differing} & {*_json_columns(columns)}
    if typed:
        return _declare_again(table, sorted(typed))
    changed = [name for name, here in db.client.listed().items() if here.changed and name not in INSERT_SETTINGS]
    if changed:
        return f"remove {', '.join(changed[:12])} from the settings profile of our user, one after the other"
    return f"compare SHOW CREATE TABLE {table.name} with `auditexport init --print-ddl`, or upgrade the server"


def _declare_again(table: Table, columns: Sequence[str]) -> str:
    return f"ALTER TABLE {table.name} " + ", ".join(f"MODIFY COLUMN `{name}` {_OURS.columns[name]}" for name in columns)
