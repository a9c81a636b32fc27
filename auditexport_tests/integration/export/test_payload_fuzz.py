"""What `core.event` takes and fingerprints, compared with what ClickHouse stores, on payloads that Hypothesis makes up.

AUDITEXPORT_TEST_FUZZ_PAYLOADS is how many; a long run: 100,000 on each engine. A failing batch is shrunk to its shortest.
"""

from __future__ import annotations

import itertools
import json
import os
import time
from collections.abc import Callable
from typing import Any

import msgspec
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from auditexport_pipeline.core.batch import Batch, Block, State
from auditexport_pipeline.core.event import Event, OutboxRow, Undecodable, explain, normal_form
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.export.test_payloads import (
    as_stored,
    means_the_same,
    parts,
    rounds_integers,
    too_long,
)

pytestmark = pytest.mark.clickhouse_sensitive

VERSION = "audit_log.v1"
PAYLOADS = int(os.environ.get("AUDITEXPORT_TEST_FUZZ_PAYLOADS", "2000"))
AT_ONCE = 40
AT_MS = itertools.count(time.time_ns() // 10**6)  # of today, or the TTL takes the entries at once


Decode = Callable[[OutboxRow], "Event | Undecodable"]


class Pairs(list[tuple[str, Any]]):
    """A JSON object whose keys may repeat."""


class Written(str):
    """JSON text that is written as it is: a number in an odd form, a string with escapes."""


TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
ESCAPED = TEXT.map(
    lambda text: Written('"' + "".join(f"\\u{ord(one):04x}" for one in text if ord(one) < 0x10000) + '"')
)
KEYS = st.one_of(TEXT, st.sampled_from(["", ".", "a.b", "a", "b", "%2E", "a%2Eb", "\\", '"', "\0", "é", "k"]))
NUMBERS = st.one_of(
    st.integers(-(2**70), 2**70),
    st.integers(-1_000, 1_000),
    st.sampled_from([2**53 - 1, 2**53, 2**53 + 1, 2**63 - 1, 2**63, 2**64 - 1, 2**64, -(2**63), -(2**63) - 1]),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from(["1e5", "1E+2", "-0", "0.10", "1e-400", "123456789012345678901234567890", "1e308"]).map(Written),
)
VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), NUMBERS, TEXT, ESCAPED),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.lists(st.tuples(KEYS, inner), max_size=4).map(Pairs)),
    max_leaves=8,
)
OBJECTS = st.lists(st.tuples(KEYS, VALUES), max_size=5).map(Pairs)
ODD = st.one_of(st.none(), TEXT, ESCAPED, VALUES)
PEOPLE = st.fixed_dictionaries({}, optional={"type": ODD, "id": ODD, "name": ODD, "meta": st.one_of(OBJECTS, ODD)})
EVENTS = st.fixed_dictionaries(
    {"time": st.one_of(st.integers(0, 2**53), st.integers(-(2**64), 2**64), VALUES), "event": st.one_of(TEXT, ODD)},
    optional={
        **dict.fromkeys(("bucket", "source", "description", "remote_ip", "user_agent", "correlation_id"), ODD),
        "actor": st.one_of(PEOPLE, ODD),
        "targets": st.one_of(st.lists(PEOPLE, max_size=3), ODD),
        "meta": st.one_of(OBJECTS, ODD),
        "unknown": VALUES,
    },
)


def text_of(value: Any) -> str:
    """The JSON text of a value."""
    if isinstance(value, Written):
        return str(value)
    if isinstance(value, dict):
        value = Pairs(value.items())
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{json.dumps(key, ensure_ascii=False)}:{text_of(one)}" for key, one in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(text_of, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


def rows_of(events: list[dict[str, Any]]) -> list[OutboxRow]:
    rows = []
    for pk, event in enumerate(events, start=1):
        text = text_of({"event_id": f"evt_{pk}", "workspace_id": "ws", **event})
        rows.append(OutboxRow(pk=pk, event_id=f"evt_{pk}", workspace_id="ws", payload=text.encode()))
    return rows


def taken_by_clickhouse(stack: Stack, rows: list[OutboxRow]) -> list[OutboxRow]:
    """Those of these rows that the parser takes, found by halving, as the exporter finds them."""
    if not rows or stack.log.probe(VERSION, [row.payload for row in rows], timeout_s=60) is None:
        return rows
    if len(rows) == 1:
        return []
    half = len(rows) // 2
    return taken_by_clickhouse(stack, rows[:half]) + taken_by_clickhouse(stack, rows[half:])


def insert(stack: Stack, rows: list[OutboxRow], at_ms: int) -> None:
    pks = PkSet.of([row.pk for row in rows])
    block = Block(number=0, inserted_at_ms=at_ms, pks=pks, digest=str(at_ms))
    batch = Batch(
        batch_id=at_ms,
        epoch=1,
        generation=0,
        version=VERSION,
        state=State.SEALED,
        owner="fuzz",
        pks=pks,
        blocks=(block,),
    )
    payloads = [row.payload for row in rows]
    refusal = stack.log.insert(batch, block, payloads, deadline_ms=stack.log.deadline_ms(60), timeout_s=60)
    assert refusal is None, refusal


def metas(rows: list[OutboxRow]) -> dict[str, object]:
    """The meta of each payload that has one without repeated keys."""
    found = {}
    for row in rows:
        event = json.loads(
            row.payload, object_pairs_hook=lambda pairs: dict(pairs) if len(dict(pairs)) == len(pairs) else None
        )
        if isinstance(event, dict) and isinstance(event.get("meta"), dict) and None not in parts(event["meta"]):
            found[row.event_id] = event["meta"]
    return found


def compare(stack: Stack, events: list[dict[str, Any]], decode: Decode) -> int:
    """Compares what `decode` makes of these payloads with what ClickHouse stores; returns how many it stores."""
    at_ms = next(AT_MS)
    rows = rows_of(events)
    sound = {row.event_id: event for row in rows if isinstance(event := decode(row), Event)}
    sent = [row for row in rows if row.event_id in sound]
    taken = taken_by_clickhouse(stack, sent)
    for row in sent:
        if row not in taken and explain(row.payload) is None:
            # Without a reason of its own it becomes refused_by_clickhouse; in normal form it may still be taken.
            assert taken_by_clickhouse(stack, [row]) == [], row.payload
        if row not in taken and (problem := explain(row.payload)) is not None and problem.reason == "duplicate_key":
            normal = OutboxRow(pk=row.pk, event_id=row.event_id, workspace_id="ws", payload=normal_form(row.payload))
            assert explain(normal.payload) is not None or taken_by_clickhouse(stack, [normal]), row.payload
    if not taken:
        return 0
    insert(stack, taken, at_ms)

    entries = {entry.key[3]: entry for entry in stack.log.entries_at(at_ms)}
    assert entries.keys() == {row.event_id for row in taken}
    for event_id, entry in entries.items():
        assert (entry.key, entry.fingerprint) == (sound[event_id].key, sound[event_id].fingerprint), event_id
    rounds = rounds_integers(stack)
    shown = stack.clickhouse(
        "SELECT event_id, meta_text FROM audit_logs_raw_v1 WHERE inserted_at = {at:Int64}", at=at_ms
    )
    stored = {str(event_id): json.loads(str(text)) for event_id, text in shown}
    for event_id, meta in metas(taken).items():
        if not (rounds and any(map(too_long, parts(meta)))):
            assert means_the_same(stored[event_id], as_stored(meta)), (event_id, meta, stored[event_id])
    return len(taken)


@settings(
    max_examples=max(1, PAYLOADS // AT_ONCE),
    deadline=None,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)
@given(events=st.lists(EVENTS, min_size=1, max_size=AT_ONCE))
def test_clickhouse_stores_what_python_read(module_stack: Stack, events: list[dict[str, Any]]) -> None:
    """Key and fingerprint of each payload that core takes, and the meaning of its meta; a refusal has a reason."""
    compare(module_stack, events, VERSIONS[VERSION].decode)


def test_a_decoder_that_reads_one_field_otherwise_is_found(module_stack: Stack) -> None:
    """The control: the comparison can fail."""
    sound = VERSIONS[VERSION].decode

    def forgetful(row: OutboxRow) -> Event | Undecodable:
        return sound(msgspec.structs.replace(row, payload=row.payload.replace(b"correlation_id", b"correlation")))

    events = [{"time": 1, "event": "e", "correlation_id": "c"}]
    assert compare(module_stack, events, sound) == 1
    with pytest.raises(AssertionError, match="evt_1"):
        compare(module_stack, events, forgetful)
