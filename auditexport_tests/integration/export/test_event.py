"""Payload text becomes an event or a named reason, decided without any database.

The last test alone asks ClickHouse: whether both sides take the same fingerprint of one event.
"""

from __future__ import annotations

import json

import pytest

from auditexport_pipeline.core.event import Event, OutboxRow, Undecodable, explain, normal_form
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import ledger, run

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
        ('{"event_id":"e1","event":"e","time":1}', "missing_field", "$.workspace_id"),
        ({"event": None}, "wrong_type", "$.event"),
        ({"description": "\ud800"}, "lone_surrogate", "$.description"),
        ({"meta": {"a": ["\udc00\ud800"]}}, "lone_surrogate", "$.meta[…][…]"),
        ({"meta": {"\ud800": 1}}, "lone_surrogate", "$.meta[…]"),
        ({"unknown": {"\ud800": "\ud800"}}, "lone_surrogate", "$[…][…]"),
        ({"meta": {"a": [{"b": -(2**63) - 1}]}}, "number_out_of_range", "$.meta[…][…][…]"),
        (with_meta(f'{{"a":{"9" * 5000}}}'), "number_out_of_range", "$.meta[…]"),
        ({"targets": [{"meta": {"a": [BIG]}}]}, "integer_precision", "$.targets[…].meta[…][…]"),
        (with_meta("[" * 100_000 + "]" * 100_000), "wrong_type", "$.meta"),
        (with_meta('{"a":' + "[" * 100_000 + "]" * 100_000 + "}"), "too_deep", "$"),
    ],
    ids=lambda value: repr(value)[:50],
)
def test_what_is_no_event_gets_a_reason_and_a_path(payload: object, reason: str, json_path: str) -> None:
    """An operator repairs a dead letter by these two words, since the payload is not copied there.

    These are texts that no server stores, or not every one; `integration.export.test_payloads` has the others.
    """
    assert problem(decode(payload)) == (reason, json_path)


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
def test_explain_finds_what_clickhouse_would_refuse(text: str, expected: tuple[str, str] | None) -> None:
    """ClickHouse's own refusal names no reason that could be shown: its message quotes the payload."""
    assert problem(explain(text.encode())) == expected


def test_the_normal_form_gives_every_key_once_and_changes_nothing_else() -> None:
    """It is sent in place of the text, so any other change would change the event."""
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
        one = {"type": text, "id": text, "name": text}
        fields = {
            **REQUIRED,
            **dict.fromkeys(("bucket", "source", "description", "remote_ip", "user_agent", "correlation_id"), text),
            "event_id": event_id,
            "event": text or "e",
            "time": -number,
            "actor": one,
            "targets": [one, {}, one],
        }
        payload = json.dumps(fields, ensure_ascii=bool(number % 2))
        rows.append(("ws", event_id, payload))
        event = decode(payload, event_id=event_id)
        assert isinstance(event, Event)
        expected[event_id] = event.fingerprint
    stack.put(*rows)
    run(stack)

    (batch,) = ledger(stack)
    stored = {entry.key[3]: entry.fingerprint for entry in stack.log.entries_at(batch.blocks[0].inserted_at_ms)}
    assert stored == expected
    assert str(batch.state) == "verified"
