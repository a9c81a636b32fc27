"""How ClickHouse reads a payload of `audit_log.v1`: the entry that the table holds, or the code of the parser's error.

Written from what engines 25.8, 26.3 and 26.9 did (`contract/test_clickhouse.py`), not from `core.event`: ClickHouse takes
payloads that the core sets aside. Not modelled: an array or object in the place of a text, duplicate keys outside metas,
numbers that a meta cannot hold exactly, and escapes that hide a dot.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from typing import Any

import xxhash

from auditexport_pipeline.core.ports import Refusal, StoredEntry

NAMES = {
    26: "CANNOT_PARSE_QUOTED_STRING",
    27: "CANNOT_PARSE_INPUT_ASSERTION_FAILED",
    33: "CANNOT_READ_ALL_DATA",
    117: "INCORRECT_DATA",
}
TEXTS = ("event_id", "workspace_id", "event")
NULLABLE_TEXTS = ("bucket", "source", "description", "remote_ip", "user_agent", "correlation_id")


class Unparsable(Exception):
    """The parser's error."""

    def __init__(self, code: int) -> None:
        super().__init__(NAMES[code])
        self.refusal = Refusal(code=code, name=NAMES[code])


@dataclass(frozen=True)
class _Person:
    """An actor or a target."""

    type: str
    id: str
    name: str
    meta: object


def read_entry(payload: bytes, inserted_at_ms: int) -> StoredEntry | None:
    """None for an empty line, which is no row. Raises `Unparsable`."""
    if not payload.strip():
        return None
    fields = _object(payload)
    text = {name: _text(fields.get(name, ""), may_be_null=False) for name in TEXTS}
    text |= {name: _text(fields.get(name)) for name in NULLABLE_TEXTS}
    text["source"] = text["source"] or "platform"
    at_ms = _int64(fields.get("time", 0))
    actor = _person(fields.get("actor") if fields.get("actor") is not None else {})
    targets = fields.get("targets") if fields.get("targets") is not None else []
    if not isinstance(targets, list):
        raise Unparsable(117)
    people = [_person(target) for target in targets]
    hashed = (
        *(text["event_id"], str(at_ms), text["workspace_id"], text["bucket"], text["source"], text["event"]),
        *(text["description"], actor.type, actor.id, actor.name, text["remote_ip"], text["user_agent"]),
        text["correlation_id"],
        *("\x01".join(part) for part in zip(*((one.type, one.id, one.name) for one in people), strict=True)),
    )
    fingerprint = xxhash.xxh64_intdigest("\0".join(hashed if people else (*hashed, "", "", "")).encode())
    metas = [actor.meta, _meta(fields.get("meta")), *(one.meta for one in people)]
    whole = json.dumps([inserted_at_ms, fingerprint, metas], sort_keys=True)
    return StoredEntry(
        key=(text["workspace_id"], text["bucket"], at_ms, text["event_id"]),
        inserted_at_ms=inserted_at_ms,
        fingerprint=fingerprint,
        content=int.from_bytes(hashlib.blake2b(whole.encode(), digest_size=8).digest(), "big"),
    )


def _object(payload: bytes) -> dict[str, Any]:
    try:
        fields = json.loads(payload)
    except ValueError as error:
        at_its_end = isinstance(error, json.JSONDecodeError) and error.pos >= len(error.doc.rstrip())
        if not payload.lstrip().startswith(b"{") or b"Extra data" in str(error).encode():
            raise Unparsable(27) from error
        raise Unparsable(33 if at_its_end else 26) from error
    if not isinstance(fields, dict):
        raise Unparsable(27)
    try:
        json.loads(payload, object_pairs_hook=_unlike)
    except KeyError as error:
        raise Unparsable(117) from error
    return fields


def _unlike(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len(dict(pairs)) < len(pairs):
        raise KeyError
    return dict(pairs)


def _text(value: object, *, may_be_null: bool = True, code: int = 26) -> str:
    if value is None and may_be_null:
        return ""
    if not isinstance(value, str):
        raise Unparsable(code)
    return value


def _int64(value: object) -> int:
    """A null and an empty text are 0, and a number above 64 bits wraps, as on each engine."""
    if value is None or value == "":
        return 0
    if isinstance(value, bool | float) or not isinstance(value, int | str):
        raise Unparsable(27)
    try:
        return (int(value) + 2**63) % 2**64 - 2**63
    except ValueError as error:
        raise Unparsable(27) from error


def _person(value: object) -> _Person:
    if not isinstance(value, dict):
        raise Unparsable(117)
    type_, id_, name = (_text(value.get(field), code=117) for field in ("type", "id", "name"))
    return _Person(type_, id_, name, _meta(value.get("meta")))


def _meta(value: object) -> object:
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise Unparsable(117)
    return _as_stored(value)


def _as_stored(value: object) -> object:
    """As a JSON column shows it again: an object has no nulls and no empty objects, and 1.0 is 1. Arrays keep both."""
    if isinstance(value, dict):
        held = {name: _as_stored(one) for name, one in value.items()}
        return {name: one for name, one in held.items() if one is not None and one != {}}
    if isinstance(value, list):
        return [_as_stored(one) for one in value]
    if isinstance(value, float) and value.is_integer() and str(value) != "-0.0":
        return int(value)
    return value
