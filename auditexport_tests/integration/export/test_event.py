"""Payload text becomes an event or a named reason, decided without any database.

The last test alone asks ClickHouse: whether both sides take the same fingerprint of one event.
"""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline.core.event import Event, OutboxRow, Undecodable, explain, normal_form
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

VERSION = "audit_log.v1"
BIG = 2**53 + 1
REQUIRED: dict[str, object] = {"event_id": "e1", "workspace_id": "ws", "event": "user.login", "time": 1}


def decode(payload: object, *, event_id: str = "e1", workspace_id: str = "ws") -> Event | Undecodable:
    """Decodes a payload given as JSON text, as bytes, or as fields beside the required ones."""
    text = json.dumps({**REQUIRED, **payload}) if isinstance(payload, dict) else payload
    raw = text if isinstance(text, bytes) else str(text).encode()
    return VERSIONS[VERSION].decode(OutboxRow(pk=1, event_id=event_id, workspace_id=workspace_id, payload=raw))


def with_meta(text: str) -> str:
    return f'{{"event_id":"e1","workspace_id":"ws","event":"e","time":1,"meta":{text}}}'


def problem(decoded: Event | Undecodable | None) -> tuple[str, str] | None:
    return (decoded.reason, decoded.json_path) if isinstance(decoded, Undecodable) else None


def test_the_registry_names_each_version_after_itself() -> None:
    """The outbox column holds the name, and the SQL of a version is found by it."""
    assert [*VERSIONS] == [VERSION]
    assert all(name == version.name for name, version in VERSIONS.items())


def test_an_event_is_its_sort_key_and_its_fingerprint() -> None:
    """The sort key is what ReplacingMergeTree collapses by, so a wrong part of it is a duplicate."""
    event = decode({"bucket": "b", "time": 5})
    assert isinstance(event, Event)
    assert event.key == ("ws", "b", 5, "e1")
    assert 0 <= event.fingerprint < 2**64


@pytest.mark.parametrize(
    ("payload", "reason", "json_path"),
    [
        ("", "payload_unreadable", "$"),
        ("{", "invalid_json", "$"),
        (json.dumps(REQUIRED) + "{}", "invalid_json", "$"),
        (b'{"event_id":"\xff"}', "invalid_json", "$"),
        (with_meta('{"a":NaN}'), "invalid_json", "$"),
        (with_meta('{"a":Infinity}'), "invalid_json", "$"),
        (with_meta('{"a":01}'), "invalid_json", "$"),
        (with_meta('{"a":"\x01"}'), "invalid_json", "$"),
        ("[]", "not_an_object", "$"),
        ("null", "not_an_object", "$"),
        ('"x"', "not_an_object", "$"),
        ("{}", "missing_field", "$.event_id"),
        ('{"event_id":"e1","event":"e","time":1}', "missing_field", "$.workspace_id"),
        ({"event": ""}, "missing_field", "$.event"),
        ({"event": None}, "wrong_type", "$.event"),
        ({"time": "5"}, "wrong_type", "$.time"),
        ({"time": 1.0}, "wrong_type", "$.time"),
        ({"time": True}, "wrong_type", "$.time"),
        ({"time": 2**63}, "number_out_of_range", "$.time"),
        ({"time": -(2**63) - 1}, "number_out_of_range", "$.time"),
        ('{"event_id":"e1","workspace_id":"ws","event":"e","time":1e400}', "number_out_of_range", "$.time"),
        ({"actor": {"meta": "x"}}, "wrong_type", "$.actor.meta"),
        ({"targets": [{}, {"id": 5}]}, "wrong_type", "$.targets[1].id"),
        ({"targets": [None]}, "wrong_type", "$.targets[0]"),
        ({"event_id": "other"}, "identity_mismatch", "$.event_id"),
        ({"workspace_id": "other"}, "identity_mismatch", "$.workspace_id"),
        ({"description": "\ud800"}, "lone_surrogate", "$.description"),
        ({"meta": {"a": ["\udc00\ud800"]}}, "lone_surrogate", "$.meta[…][…]"),
        ({"meta": {"\ud800": 1}}, "lone_surrogate", "$.meta[…]"),
        ({"unknown": {"\ud800": "\ud800"}}, "lone_surrogate", "$[…][…]"),
        ({"meta": {"a%2Eb": 1}}, "escaped_dot_in_key", "$.meta[…]"),
        (with_meta('{"a\\u00252Eb":1}'), "escaped_dot_in_key", "$.meta[…]"),
        (with_meta('{"a%\\u0032Eb":1}'), "escaped_dot_in_key", "$.meta[…]"),
        (with_meta('{"a%2\\u0045b":1}'), "escaped_dot_in_key", "$.meta[…]"),
        ({"meta": {"a": 2**64}}, "number_out_of_range", "$.meta[…]"),
        ({"meta": {"a": [{"b": -(2**63) - 1}]}}, "number_out_of_range", "$.meta[…][…][…]"),
        (with_meta(f'{{"a":{"9" * 5000}}}'), "number_out_of_range", "$.meta[…]"),
        ({"meta": {"a": [BIG]}}, "integer_precision", "$.meta[…][…]"),
        ({"actor": {"meta": {"a": [1.5, -BIG]}}}, "integer_precision", "$.actor.meta[…][…]"),
        ({"targets": [{"meta": {"a": [BIG]}}]}, "integer_precision", "$.targets[…].meta[…][…]"),
        (with_meta("[" * 100_000 + "]" * 100_000), "wrong_type", "$.meta"),
        (with_meta('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too_deep", "$"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_is_no_event_gets_a_reason_and_a_path(payload: object, reason: str, json_path: str) -> None:
    """Whoever mends a dead letter has these two words to go by, since the payload is not copied there."""
    assert problem(decode(payload)) == (reason, json_path)


@pytest.mark.parametrize(
    "fields",
    [
        {"meta": {"a": 2**63 - 1, "b": 2**64 - 1, "c": -(2**63), "d": [{"e": BIG}]}},
        {"meta": {"a": [2**53, 1.5], "b": "12345678901234567890", "c": [" 12345678901234567890"]}},
        {"meta": {"a": "x%2Ey", "b%2e": 1, "c": "\u0025"}},
        {"meta": {"a": [1, None, [2]], "b": [None], "c": [[1], [None]]}},
        {"unknown": [BIG, 1.5, {"a%2Eb": 2**64}]},
        {"actor": {"unknown": [BIG]}, "targets": [{"unknown": {"a%2Eb": [BIG]}}]},
        {"description": None, "actor": None, "targets": None, "meta": None, "source": None},
        {"actor": {"type": None, "meta": None}, "targets": [{}, {"meta": None}]},
        {"Description": 5, "EVENT": 5},
        {"time": -(2**63)},
        {"time": 2**63 - 1},
    ],
    ids=repr,
)
def test_what_only_looks_suspicious_is_an_event(fields: dict[str, object]) -> None:
    """A dead letter for a payload that ClickHouse reads right would hold back an audit event for nothing."""
    assert isinstance(decode(fields), Event)


def test_a_repeated_key_is_judged_by_its_last_value() -> None:
    """MySQL keeps the last one, MariaDB the text, and both must come to the same outcome."""
    assert isinstance(decode(with_meta(f'{{"id":{BIG},"a":1,"a":2}}')), Event)
    assert isinstance(decode(with_meta(f'{{"a":[{BIG}],"a":2}}')), Event)
    assert problem(decode(with_meta(f'{{"a":2,"a":[{BIG}]}}'))) == ("integer_precision", "$.meta[…][…]")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ('{"meta":{"a":1,"b":[{"c":null}]}}', None),
        ('{"meta":{"a":1,"\\u0061":2}}', ("duplicate_key", "$.meta[…]")),
        ('{"meta":{},"meta":{}}', ("duplicate_key", "$.meta")),
        ('{"actor":{"id":"a","id":"b"}}', ("duplicate_key", "$.actor.id")),
        ('{"targets":[{"meta":{"a":1,"a":1}}]}', ("duplicate_key", "$.targets[…].meta[…]")),
        ('{"unknown":1,"unknown":{"a":1,"a":2}}', None),
        (f'{{"meta":{{"a":[{BIG}],"b":1,"b":2}}}}', ("duplicate_key", "$.meta[…]")),
        ('{"meta":{"a":1e400}}', ("number_out_of_range", "$.meta[…]")),
        ('{"unknown":1e400}', None),
        ('{"meta":{"a":[[1],null]}}', ("null_among_arrays", "$.meta[…][…]")),
        ('{"meta":{"a":[[1],null,2],"b":[{},null],"c":[null]}}', None),
        ('{"unknown":[[1],null]}', None),
        ("{", ("invalid_json", "$")),
        ('{"a":NaN}', ("invalid_json", "$")),
        ("[" * 100_000, ("too_deep", "$")),
    ],
    ids=lambda value: str(value)[:50],
)
def test_the_slow_look_finds_what_clickhouse_would_refuse(text: str, expected: tuple[str, str] | None) -> None:
    """ClickHouse's own refusal names no reason that could be shown: its message quotes the payload."""
    assert problem(explain(text.encode())) == expected


def test_no_reason_holds_text_of_the_payload() -> None:
    """Reasons are stored and logged; audited content must be in neither."""
    secret = "s3cr3t"
    payloads: list[object] = [
        f'"{secret}"',
        f'{{"{secret}',
        {"time": secret},
        {"event_id": secret},
        {"meta": secret},
        {"targets": [{"id": {secret: secret}}]},
        {"meta": {f"{secret}%2E": 1, secret: [BIG]}},
        {"meta": {secret: {secret: 2**64}}},
        {"description": f"{secret}\ud800"},
    ]
    for payload in payloads:
        decoded = decode(payload)
        assert isinstance(decoded, Undecodable)
        assert secret not in repr(decoded)


def test_the_normal_form_gives_every_key_once_and_changes_nothing_else() -> None:
    """It is sent in place of the text, so whatever else it changed would be a change of the event."""
    text = '{ "a": 1, "b": {"x": 1, "x": [1, 1.0, 1e3, true, null, "é😀\\u0000\\n"]}, "a": {"c": -0.0}, "n": 18446744073709551615 }'
    once = normal_form(text.encode())
    assert once.decode() == (
        '{"a":{"c":-0.0},"b":{"x":[1,1.0,1000.0,true,null,"é😀\\u0000\\n"]},"n":18446744073709551615}'
    )
    assert normal_form(once) == once
    assert explain(once) is None


def test_the_fingerprint_takes_absent_null_and_default_for_one() -> None:
    """ClickHouse stores the same row for all three."""
    absent = decode({})
    null = decode({"source": None, "description": None, "actor": None, "targets": None, "meta": None})
    default = decode({"source": "platform", "bucket": "", "actor": {"type": None}, "targets": [], "meta": {"a": 1}})
    assert isinstance(absent, Event)
    assert absent == null == default


def test_the_fingerprint_tells_apart_what_stands_in_another_place() -> None:
    """Without separators, ('ab', '') and ('a', 'b') would hash alike and an altered row would verify."""
    events = [
        decode(fields)
        for fields in (
            {},
            {"description": "x"},
            {"user_agent": "x"},
            {"actor": {"id": "x"}},
            {"actor": {"name": "x"}},
            {"targets": [{"id": "x"}]},
            {"targets": [{"name": "x"}]},
            {"targets": [{"id": "x"}, {}]},
            {"targets": [{}, {"id": "x"}]},
            {"time": 2},
        )
    ]
    assert len({event.fingerprint for event in events if isinstance(event, Event)}) == len(events)


def test_python_and_clickhouse_agree_on_fingerprints_of_awkward_strings(stack: Stack) -> None:
    """Verification compares the two sums; a string that they read differently would be a false alarm."""
    awkward = ["", "\0", "a\0b", "\x01", "é😀", "\u2028", "\\", '"', "\n\t\r", "\ufeff", "\uffff", " ", "x" * 70_000]
    rows = []
    expected = {}
    for number, text in enumerate(awkward):
        event_id = f"e{number}"
        fields = {
            **REQUIRED,
            **dict.fromkeys(
                ("event", "bucket", "source", "description", "remote_ip", "user_agent", "correlation_id"), text
            ),
            "event": text or "e",
            "event_id": event_id,
            "time": -number,
            "actor": {"type": text, "id": text, "name": text},
            "targets": [{"type": text, "id": text, "name": text}, {}, {"type": text, "id": text, "name": text}],
        }
        payload = json.dumps(fields, ensure_ascii=bool(number % 2))
        rows.append(("ws", event_id, payload))
        event = decode(payload, event_id=event_id)
        assert isinstance(event, Event)
        expected[event_id] = event.fingerprint
    stack.put(*rows)
    drain(stack.outbox, stack.log, Limits(), owner="test_event")

    (batch,) = stack.outbox.batches([1])
    stored = {entry.key[3]: entry.fingerprint for entry in stack.log.entries_at(batch.blocks[0].inserted_at_ms)}
    assert stored == expected
    assert str(batch.state) == "verified"
