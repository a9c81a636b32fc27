"""Payloads: the JSON text of an outbox row becomes an event, or a named reason why it cannot.

What belongs here: the typed shape of `audit_log.v1`, its fingerprint, and the reasons. What does not: the ClickHouse
part of a version (`clickhouse/audit_log_v1.sql`), and the registry of versions (`core.versions`).

Python and ClickHouse must never read one text as two different events. Every payload that they read differently is
normalised or refused here (see `explain`).
"""

from __future__ import annotations

import json
import math
import re
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import msgspec
import xxhash

Text = str | None
Required = Annotated[str, msgspec.Meta(min_length=1)]
Int64 = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]


class _Object(msgspec.Struct, gc=False):
    """Any JSON object: it is checked, but not built."""


class _Actor(msgspec.Struct, gc=False):
    type: Text = None
    id: Text = None
    name: Text = None
    meta: _Object | None = None


class _Target(msgspec.Struct, gc=False):
    type: Text = None
    id: Text = None
    name: Text = None
    meta: _Object | None = None


class _AuditLogV1(msgspec.Struct, gc=False):
    event_id: Required
    time: Int64
    workspace_id: Required
    event: Required
    bucket: Text = None
    source: Text = None
    description: Text = None
    actor: _Actor | None = None
    remote_ip: Text = None
    user_agent: Text = None
    meta: _Object | None = None
    targets: list[_Target] | None = None
    correlation_id: Text = None


class OutboxRow(msgspec.Struct, gc=False, frozen=True):
    """One row of `clickhouse_outbox`, with the columns that a decoder needs."""

    pk: int
    event_id: str
    workspace_id: str
    payload: bytes


def id_hash(event_id: str) -> int:
    """A hash of an event id, as the statement `marked` computes it: its sum identifies the rows of a batch."""
    return zlib.crc32(event_id.encode())


# workspace_id, bucket, time, event_id: the sort key of every version's table.
Key = tuple[str, str, int, str]


class Event(msgspec.Struct, gc=False, frozen=True):
    """A decoded payload: its sort key in ClickHouse and its fingerprint."""

    key: Key
    fingerprint: int


@dataclass(frozen=True, slots=True)
class Undecodable:
    """Why a payload is no event: a reason and the place in the JSON, never its text."""

    reason: str
    json_path: str = "$"
    detail: str = ""


def decode_audit_log_v1(row: OutboxRow) -> Event | Undecodable:
    """Decodes a row of version `audit_log.v1`."""
    payload = row.payload
    try:
        event = _decoder.decode(payload)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        return undecodable(payload, error)
    if event.event_id != row.event_id or event.workspace_id != row.workspace_id:
        return other_identity(row, event_id=event.event_id, workspace_id=event.workspace_id)  # type: ignore[return-value]
    shape = payload.translate(_NUMBER_SHAPES, _BETWEEN_NUMBERS)
    if (
        # The first test of each line is cheap, and few payloads pass it.
        (_LONG in shape and (_LONG_VALUE in shape or _LONG_ELEMENT in shape))
        or (_PERCENT in payload and b"%2E" in payload)
        or (_BACKSLASH in payload and _HIDDEN_DOT.search(payload))
    ):
        problem = explain(payload)
        if problem is not None and problem.reason == "duplicate_key":
            problem = explain(normal_form(payload))  # which is sent after ClickHouse has refused the payload
        if problem is not None:
            return problem
    actor = event.actor or _NOBODY
    targets = event.targets or ()
    fingerprint = xxhash.xxh64_intdigest(
        "\0".join(
            (
                event.event_id,
                str(event.time),
                event.workspace_id,
                event.bucket or "",
                event.source or "platform",
                event.event,
                event.description or "",
                actor.type or "",
                actor.id or "",
                actor.name or "",
                event.remote_ip or "",
                event.user_agent or "",
                event.correlation_id or "",
                "\1".join([target.type or "" for target in targets]),
                "\1".join([target.id or "" for target in targets]),
                "\1".join([target.name or "" for target in targets]),
            )
        ).encode()
    )
    return Event((event.workspace_id, event.bucket or "", event.time, event.event_id), fingerprint)


_decoder = msgspec.json.Decoder(_AuditLogV1)
_NOBODY = _Actor()
# The shape of a payload's numbers: each digit is a 0, and nothing is between a number and the ':' or ',' before it. An
# integer is safe below 19 digits as a value of an object, and below 16 as an element of an array (see `_problems`).
_NUMBER_SHAPES = bytes(ord("0") if c in b"0123456789" else ord(",") if c == ord("[") else c for c in range(256))
_BETWEEN_NUMBERS = b" \n\r\t-"
_LONG = b"0" * 16
_LONG_VALUE = b":" + b"0" * 19
_LONG_ELEMENT = b"," + _LONG
_PERCENT, _BACKSLASH = b"%\\"
# A letter of %2E as an escape, which MariaDB leaves as it is.
_HIDDEN_DOT = re.compile(rb"\\u00(?:25|32|45)")


def other_identity(row: OutboxRow, *, event_id: str, workspace_id: str) -> Undecodable | None:
    """The id in the payload that differs from the row's; None when both are the same."""
    for name, value in (("event_id", event_id), ("workspace_id", workspace_id)):
        if value != getattr(row, name):
            return Undecodable(
                reason="identity_mismatch", json_path=f"$.{name}", detail=f"differs from the row's {name}"
            )
    return None


def undecodable(payload: bytes, error: Exception) -> Undecodable:
    """The reason for a decoder's error, from the form of its message, which has paths and types only."""
    if not payload:  # no JSON value is empty: a server returns this for a payload that is too large to send
        return Undecodable("payload_unreadable", detail="read as empty: larger than max_allowed_packet?")
    if isinstance(error, RecursionError):
        return Undecodable("too_deep", detail="nested deeper than any decoder follows")
    message, _, path = str(error).partition(" - at `")
    path = path.rstrip("`") or "$"
    if not isinstance(error, msgspec.ValidationError):
        return explain(payload) or Undecodable("invalid_json", detail="not JSON text in UTF-8")
    if message.startswith("Object missing required field"):
        name = message.rsplit("`", 2)[1]
        return Undecodable("missing_field", f"{path}.{name}")
    if "of length >= 1" in message:
        return Undecodable("missing_field", path, detail="empty")
    if path == "$":
        return Undecodable("not_an_object", detail=message)
    if message == "Number out of range":
        return Undecodable("number_out_of_range", path, detail="beyond a 64-bit float")
    if message.startswith(("Expected `int` >=", "Expected `int` <=")):
        return Undecodable("number_out_of_range", path, detail="outside 64 bits")
    return Undecodable("wrong_type", path, detail=message)


class _Pairs(list):  # type: ignore[type-arg]
    """A JSON object as its pairs, so that repeated keys are not lost."""


def explain(payload: bytes) -> Undecodable | None:
    """The first thing that ClickHouse refuses or reads differently in this JSON text, or None; a repeated key comes
    first.

    This check is slow and complete: it is for payloads that a cheap test found, and for rows that ClickHouse
    refused. Reasons: duplicate_key, invalid_json, too_deep, lone_surrogate, number_out_of_range,
    integer_precision, null_among_arrays, escaped_dot_in_key.
    """
    try:
        document = json.loads(payload, object_pairs_hook=_Pairs, parse_int=_integer, parse_constant=_refuse_constant)
        problems = list(_problems(document, "$"))
    except RecursionError:
        return Undecodable("too_deep", detail="nested deeper than any decoder follows")
    except (ValueError, UnicodeDecodeError):
        return Undecodable("invalid_json", detail="not JSON text in UTF-8")
    return min(problems, key=lambda problem: problem.reason != "duplicate_key", default=None)


def _integer(digits: str) -> int:
    """The integer. For a very long one (Python refuses 4,300 digits) another one that is out of range too."""
    return int(digits) if len(digits) < 40 else 10**40


def _refuse_constant(name: str) -> float:
    raise ValueError(f"{name} is not JSON")


# The names of the contract, by the path of their object; other names are skipped.
_FIELDS = {
    "$": _AuditLogV1.__struct_fields__,
    "$.actor": _Actor.__struct_fields__,
    "$.targets[…]": _Target.__struct_fields__,
}


def _problems(value: object, path: str, *, skipped: bool = False) -> Iterator[Undecodable]:
    """Every problem in `value`. Paths name the fields of the contract; `[…]` stands for all other keys.

    ClickHouse skips the values of other fields (`skipped`): there, only what is no JSON for it is a problem.
    """
    if isinstance(value, _Pairs):
        seen: set[str] = set()
        for key, child in value:
            named = not skipped and key in _FIELDS.get(path, ())
            child_path = f"{path}.{key}" if named else f"{path}[…]"
            child_skipped = skipped or (path in _FIELDS and not named)
            if _is_lone(key):
                yield Undecodable("lone_surrogate", child_path, detail="in a key")
            if not child_skipped:
                if key in seen:
                    yield Undecodable("duplicate_key", child_path, detail="the same key twice in one object")
                seen.add(key)
                if "%2E" in key:
                    yield Undecodable(
                        "escaped_dot_in_key", child_path, detail="ClickHouse would read %2E in a key as a dot"
                    )
            yield from _problems(child, child_path, skipped=child_skipped)
    elif isinstance(value, list):
        kinds = {"null" if child is None else "array" if _is_array(child) else "other" for child in value}
        if kinds == {"null", "array"} and not skipped:
            yield Undecodable(
                "null_among_arrays", f"{path}[…]", detail="ClickHouse has no null where the other elements are arrays"
            )
        for child in value:
            # ClickHouse does so beside a float, or where another row of the block has floats in an array at this path.
            if type(child) is int and 2**53 < abs(child) < 2**64 and not skipped:
                yield Undecodable(
                    "integer_precision",
                    f"{path}[…]",
                    detail="ClickHouse can take an integer above 2^53 in an array for a float",
                )
            yield from _problems(child, f"{path}[…]", skipped=skipped)
    elif isinstance(value, str):
        if _is_lone(value):
            yield Undecodable("lone_surrogate", path)
    elif skipped:
        return
    elif isinstance(value, float):
        if math.isinf(value):
            yield Undecodable("number_out_of_range", path, detail="beyond a 64-bit float")
    elif isinstance(value, int) and not -(2**63) <= value < 2**64:
        yield Undecodable("number_out_of_range", path, detail="beyond 64 bits")


def _is_array(value: object) -> bool:
    return isinstance(value, list) and not isinstance(value, _Pairs)


def _is_lone(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def normal_form(payload: bytes) -> bytes:
    """The same JSON with each repeated key once, with its last value.

    MySQL stores the text in this form, and every common parser reads it so. MariaDB stores both values, and
    ClickHouse refuses them. With this form, both MySQL families export the same event.
    """
    return json.dumps(json.loads(payload, parse_int=_integer), ensure_ascii=False, separators=(",", ":")).encode()
