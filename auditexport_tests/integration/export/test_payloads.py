"""Awkward payloads, each exported true in meaning or set aside with the right reason, per MySQL family.

All cases go out in one drain, good rows between them; each is then one assertion on what ClickHouse, the
dead letters and the outbox hold. Where a server itself refuses a text at INSERT, that is the expectation.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from random import Random
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from auditexport_pipeline import preflight
from auditexport_pipeline.core.compare import compare, insert_groups_of
from auditexport_pipeline.core.event import Event, OutboxRow
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import dead_letters, ledger, run, states
from auditexport_tests.support.faults import mariadb

pytestmark = pytest.mark.clickhouse_sensitive

VERSION = "audit_log.v1"
TIME_MS = 1_700_000_000_000
# In every payload, in an unknown field: a table of ours that shows it has leaked payload text.
CANARY = "canary5f1e"
BIG = 2**53 + 1
GOOD_ROWS = 40
INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1


@dataclass(frozen=True, slots=True)
class Stored:
    """The event is exported; columns not named here hold what an event without optional fields holds."""

    columns: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Dead:
    """The row is a dead letter and stays pending."""

    reason: str
    json_path: str = "$"


@dataclass(frozen=True, slots=True)
class Refused:
    """The server itself refuses the text: the application's INSERT fails."""


Outcome = Stored | Dead | Refused


@dataclass(frozen=True, slots=True)
class Case:
    """`text` is the payload, `@id` standing for its event id; the outcome can differ between the families."""

    name: str
    text: str
    mariadb: Outcome
    mysql: Outcome
    event_id: str = ""


def stored(**columns: object) -> Stored:
    return Stored({name.replace("targets_", "targets."): value for name, value in columns.items()})


def payload(rest: str = "", *, time: str = str(TIME_MS), event_id: str = "@id", workspace_id: str = "ws") -> str:
    """A payload with everything required, then `rest`, then an unknown field with the canary."""
    parts = [
        f'"event_id":"{event_id}","workspace_id":"{workspace_id}","event":"e","time":{time}',
        *([rest] if rest else []),
        f'"unknown":"{CANARY}"',
    ]
    return "{" + ",".join(parts) + "}"


def same(name: str, text: str, outcome: Outcome, *, event_id: str = "") -> Case:
    return Case(name, text, outcome, outcome, event_id)


def rest(name: str, text: str, outcome: Outcome, *, mysql: Outcome | None = None) -> Case:
    return Case(name, payload(text), outcome, mysql or outcome)


def meta(text: str, *, mysql: Outcome | None = None, outcome: Outcome | None = None, name: str = "") -> Case:
    """A meta that must come back as it is, unless another outcome is given."""
    return rest(f"meta {name or text[:60]}", f'"meta":{text}', outcome or stored(meta=json.loads(text)), mysql=mysql)


def timed(text: str, outcome: Outcome, *, mysql: Outcome | None = None) -> Case:
    return Case(f"time {text}", payload(time=text), outcome, mysql or outcome)


NOTHING = stored()
WRONG = "wrong_type"
PRETTY = f"""{{
  "event_id" : "@id",
  "workspace_id" : "ws",
\t"event": "e",\r
  "time":
    {TIME_MS},
  "meta": {{
    "a": [
      1,

      2
    ], "text": "one\\ntwo"
  }},
  "unknown": "{CANARY}"
}}
"""
TARGETS_500 = [{"type": "t", "id": f"i{n}", "name": f"n{n}", "meta": {"n": n}} for n in range(500)]
ID_48 = "evt_" + "x" * 44


def nested(depth: int) -> str:
    return "[" * depth + "1" + "]" * depth


CASES = [
    # ── not an event at all ──
    same("an empty object", "{}", Dead("missing_field", "$.event_id")),
    same("an array", f'["{CANARY}"]', Dead("not_an_object")),
    same("a string", f'"{CANARY}"', Dead("not_an_object")),
    same("a number", "5", Dead("not_an_object")),
    same("null", "null", Dead("not_an_object")),
    same("no time", '{"event_id":"@id","workspace_id":"ws","event":"e"}', Dead("missing_field", "$.time")),
    same("no event", '{"event_id":"@id","workspace_id":"ws","time":0}', Dead("missing_field", "$.event")),
    # ── identity ──
    same("an id of 48 characters", payload(event_id=ID_48), NOTHING, event_id=ID_48),
    same("another event_id", payload(event_id=CANARY), Dead("identity_mismatch", "$.event_id")),
    same("an event_id of another case", payload(event_id="@ID"), Dead("identity_mismatch", "$.event_id")),
    same("another workspace_id", payload(workspace_id=CANARY), Dead("identity_mismatch", "$.workspace_id")),
    same("an empty event_id", payload(event_id=""), Dead("missing_field", "$.event_id")),
    same("an empty workspace_id", payload(workspace_id=""), Dead("missing_field", "$.workspace_id")),
    same("a null event_id", payload().replace('"@id"', "null"), Dead(WRONG, "$.event_id")),
    same("an empty event", payload().replace('"e"', '""'), Dead("missing_field", "$.event")),
    # ── null and empty ──
    rest(
        "null for every optional field",
        '"bucket":null,"source":null,"description":null,"actor":null,"remote_ip":null,"user_agent":null,"meta":null,'
        '"targets":null,"correlation_id":null',
        NOTHING,
    ),
    rest(
        "every field",
        '"bucket":"b","source":"api","description":"d","actor":{"type":"user","id":"u1","name":"n","meta":{"a":1}},'
        '"remote_ip":"::1","user_agent":"curl","meta":{"m":[1]},"targets":[{"type":"key","id":"k1","name":"n","meta":{"t":2}},'
        '{"type":"api","id":"a1"}],"correlation_id":"c"',
        stored(
            bucket="b", source="api", description="d", actor_type="user", actor_id="u1", actor_name="n", actor_meta={"a": 1},
            remote_ip="::1", user_agent="curl", meta={"m": [1]}, correlation_id="c",
            targets_type=["key", "api"], targets_id=["k1", "a1"], targets_name=["n", ""], targets_meta=[{"t": 2}, {}],
        ),
    ),
    rest("an empty source", '"source":""', stored(source="platform")),
    rest("an actor of nulls", '"actor":{"type":null,"id":null,"name":null,"meta":null}', NOTHING),
    rest("an actor without meta", '"actor":{"type":"user","id":"u1"}', stored(actor_type="user", actor_id="u1")),
    rest("an empty actor", '"actor":{}', NOTHING),
    rest("no targets", '"targets":[]', NOTHING),
    rest(
        "targets of nulls",
        '"targets":[{},{"type":null,"id":null,"name":null,"meta":null},{"type":"t"}]',
        stored(
            targets_type=["", "", "t"], targets_id=["", "", ""], targets_name=["", "", ""], targets_meta=[{}, {}, {}]
        ),
    ),
    # ── wrong types ──
    rest("a string as meta", f'"meta":"{CANARY}"', Dead(WRONG, "$.meta")),
    rest("an array as meta", f'"meta":["{CANARY}"]', Dead(WRONG, "$.meta")),
    rest("a number as meta", '"meta":5', Dead(WRONG, "$.meta")),
    rest("an object as remote_ip", '"remote_ip":{}', Dead(WRONG, "$.remote_ip")),
    rest("a number as description", '"description":5', Dead(WRONG, "$.description")),
    rest("a string as actor", f'"actor":"{CANARY}"', Dead(WRONG, "$.actor")),
    rest("an array as actor", '"actor":[]', Dead(WRONG, "$.actor")),
    rest("a string as actor.meta", f'"actor":{{"meta":"{CANARY}"}}', Dead(WRONG, "$.actor.meta")),
    rest("an object as targets", '"targets":{}', Dead(WRONG, "$.targets")),
    rest("null as a target", '"targets":[null]', Dead(WRONG, "$.targets[0]")),
    rest("a number as target id", '"targets":[{"id":"a"},{"id":5}]', Dead(WRONG, "$.targets[1].id")),
    # ── names ──
    rest("Description is not description", '"Description":"X","META":{"a":1}', NOTHING),
    rest("Description after description", '"description":"x","Description":"X"', stored(description="x")),
    rest(
        "unknown fields named like our columns",
        '"inserted_at":5,"actor_type":"x","actor_id":7,"actor_name":"x","actor_meta":{"a":1},"meta_text":"x",'
        '"targets.type":["x"],"targets.id":["x"],"targets.name":["x"],"targets.meta":[{"a":1}],'
        '"targets_meta_text":"x","actor.type":"x","meta.a":1,"fingerprint":1',
        NOTHING,
    ),
    rest("unknown fields inside actor and target", '"actor":{"x":[1],"type":"u"},"targets":[{"x":{"y":1},"id":"t"}]',
         stored(actor_type="u", targets_type=[""], targets_id=["t"], targets_name=[""], targets_meta=[{}])),
    rest("what a meta may not hold, in unknown fields", f'"x":[{BIG},"y"],"y":{{"a%2Eb":{2**64}}},"z":[[1],null]', NOTHING),
    # ── repeated keys: MySQL keeps the last one, MariaDB all of them ──
    rest("description twice", '"description":"x","description":"y"', stored(description="y")),
    rest("description, then null", '"description":"x","description":null', NOTHING),
    rest("an unknown field twice", '"x":1,"x":2,"y":{"a":1,"a":{"b":2}}', NOTHING),
    rest("meta twice", '"meta":{"a":1},"meta":{"b":2}', stored(meta={"b": 2})),
    rest("actor twice", '"actor":{"type":"a"},"actor":{"id":"b"}', stored(actor_id="b")),
    rest("a key twice in actor", '"actor":{"type":"a","type":"b"}', stored(actor_type="b")),
    rest("actor.meta twice", '"actor":{"meta":{"a":1},"meta":{"b":2}}', stored(actor_meta={"b": 2})),
    rest("a key twice in a target's meta", '"targets":[{"meta":{"a":1,"a":{"b":2}}}]',
         stored(targets_type=[""], targets_id=[""], targets_name=[""], targets_meta=[{"a": {"b": 2}}])),
    meta('{"twice":1,"twice":2}'),
    meta('{"twice":1,"twice":{"b":2}}'),
    meta('{"twice":{"b":2},"twice":1}'),
    meta('{"twice":{"b":1},"twice":{"c":2}}'),
    meta('{"twice":[1],"twice":{"c":2}}'),
    meta('{"twice":[{"b":1,"b":{"c":2}}]}'),
    meta('{"twice":1,"\\u0074wice":{"b":2}}'),
    meta('{"twice":1,"twice":null}', outcome=NOTHING),
    meta('{"twice":{"c":2},"twice":null}', outcome=NOTHING),
    meta('{"twice":1,"twice":{}}', outcome=NOTHING),
    meta('{"twice":null,"twice":1}'),
    meta(f'{{"id":{INT64_MAX},"twice":1,"twice":2}}'),
    meta(f'{{"ids":[{BIG}],"ids":1}}'),
    meta(f'{{"ids":1,"ids":[{BIG}]}}', outcome=Dead("integer_precision", "$.meta[…][…]")),
    # ── odd keys ──
    meta('{"a.b":1}'),
    meta('{"a.b":1,"a":{"b":2}}'),
    meta('{"a.b":{"c":1},"a":{"b.c":2},"a.b.c":3}'),
    meta('{"list":[{"x.y":1},{"x":{"y":2}}]}'),
    meta('{"a\\u002eb":1,"a":{"b":3}}'),
    meta('{".":1,"..":2,"a.":3,".a":4}'),
    meta('{"":1,"a":{"":2},"b":{"":{"":3}}}'),
    meta('{"a%b":1,"%":2,"%25":3,"a%2eb":4}'),
    meta('{"a":"x%2Ey"}'),
    meta('{"a%2Eb":1}', outcome=Dead("escaped_dot_in_key", "$.meta[…]")),
    meta('{"a\\u00252Eb":1}', outcome=Dead("escaped_dot_in_key", "$.meta[…]")),
    meta('{"a%\\u0032Eb":1}', outcome=Dead("escaped_dot_in_key", "$.meta[…]")),
    meta('{"a%2\\u0045b":1}', outcome=Dead("escaped_dot_in_key", "$.meta[…]")),
    meta('{"a`b":1,"a\\"b":2,"a\\\\b":3,"a\\nb":4,"a/b":5,"a b":6,"1":7,"-":8,"[0]":9,"a[]":10,"^a":11}'),
    meta('{"\\u0000":1,"a\\u0000b":2,"😀":3}'),
    meta(json.dumps({"k" * 3000: 1}), name="of a long key"),
    # ── strings ──
    meta('{"s":"a\\"b\\\\c\\nd\\/e/\\t\\u0001\\u007f\\u2028"}'),
    meta('{"s":"a\\u0000b","t":"\\u0000"}'),
    meta('{"s":"😀\\ud83d\\ude00"}'),
    meta('{"s":"NaN","t":"inf","u":"null","v":"","w":"true","x":"5","y":"{\\"a\\":1}","z":"[1]"}'),
    meta('{"at":"2024-01-01","at2":"2024-01-01T10:00:00Z","at3":"2024-01-01 10:00:00","at4":"2024-01-01 10:00:00.123456"}'),
    meta('{"at":["2024-01-01","2024-01-01 10:00:00"],"at2":["2024-01-01",5],"at3":[["2024-01-01T10:00:00+02:00"]]}'),
    rest(
        "awkward strings in columns",
        '"description":"a\\"b\\\\c\\nd\\/e\\t\\u0001","bucket":"b\\u0000c","user_agent":"\\ud83d\\ude00","actor":{"name":"é\\u0000"}',
        stored(description='a"b\\c\nd/e\t\x01', bucket="b\0c", user_agent="😀", actor_name="é\0"),
    ),
    # Both servers refuse half a character anywhere; `integration.export.test_event` has what the decoder makes of it.
    *(
        rest(f"a lone surrogate {where}", text, Refused())
        for where, text in {
            "in a meta": '"meta":{"a":"\\ud800"}',
            "in a key": '"meta":{"\\udc00":1}',
            "in a column": '"description":"\\ud800\\u0041"',
            "in an unknown field": '"x":"\\udc00\\ud800"',
            "in an unknown key": '"x":{"\\ud800":1}',
        }.items()
    ),
    # ── numbers ──
    meta(f'{{"a":{INT64_MAX},"b":{2**63},"c":{2**64 - 1},"d":{INT64_MIN},"e":{BIG}}}'),
    meta(f'{{"list":[{{"a":{BIG}}},{{"a":1.5}}]}}'),
    meta(f'{{"ok":[{2**53},-{2**53},1.5]}}'),
    # MySQL itself takes an integer beyond 64 bits for a float, before we can see it.
    meta(f'{{"a":{2**64}}}', outcome=Dead("number_out_of_range", "$.meta[…]"), mysql=stored(meta={"a": float(2**64)})),
    meta(f'{{"a":{INT64_MIN - 1}}}', outcome=Dead("number_out_of_range", "$.meta[…]"), mysql=stored(meta={"a": float(INT64_MIN)})),
    meta(f'{{"a":{"9" * 5000}}}', outcome=Dead("number_out_of_range", "$.meta[…]"), mysql=Refused()),
    *(
        meta(text, outcome=Dead("integer_precision", path))
        for text, path in {
            f'{{"big":[{BIG}]}}': "$.meta[…][…]",
            f'{{"big":[1,{-BIG}]}}': "$.meta[…][…]",
            f'{{"big":[{BIG},1.5]}}': "$.meta[…][…]",
            f'{{"big":[{2**64 - 1},null]}}': "$.meta[…][…]",
            f'{{"big":[[1.5],[{BIG}]]}}': "$.meta[…][…][…]",
            f'{{"big":[{{"x":[{BIG}]}}]}}': "$.meta[…][…][…][…]",
        }.items()
    ),
    rest("a big integer in an array of actor.meta", f'"actor":{{"meta":{{"a":[{BIG}]}}}}', Dead("integer_precision", "$.actor.meta[…][…]")),
    meta('{"a":1.0,"b":-0.0,"c":1e3,"d":0.1,"e":1.7976931348623157e308,"f":5e-324,"g":123456.789e-3,"h":1E22}'),
    meta('{"a":1e-400}', outcome=stored(meta={"a": 0})),
    meta('{"a":1e400}', outcome=Dead("number_out_of_range", "$.meta[…]"), mysql=Refused()),
    meta('{"a":[-1e400]}', outcome=Dead("number_out_of_range", "$.meta[…][…]"), mysql=Refused()),
    rest("1e400 in an unknown field", '"x":1e400', NOTHING, mysql=Refused()),
    # ── arrays; a key of its own each, since ClickHouse's choice depends on the types of earlier rows there ──
    meta('{"m1":[true,"x"],"m2":[1,true],"m3":[1,"a"],"m4":[1.5,"a",null,{}],"m5":[1,null,true,"s",1.5,[1],{"k":1}]}'),
    meta('{"n1":[[1,2],["a",null],[[]],[],{}],"n2":[],"n3":[[]],"n4":[{}],"n5":[null],"n6":[null,1],"n7":[1,2.5]}'),
    meta('{"o1":["5",5],"o2":["true",true],"o3":[{"x":1},{"x":"y"}],"o4":[[1,[2,["x"]]],{"k":[1,"a"]}],"o5":[{"x":1},null]}'),
    meta('{"p":[{"x":{}},{"x":{"y":null}},{"z":null,"w":1}]}', outcome=stored(meta={"p": [{}, {}, {"w": 1}]})),
    meta('{"a":true,"b":false}'),
    meta('{"a":null,"b":{},"c":{"d":{}},"d":{"e":null},"f":1}', outcome=stored(meta={"f": 1})),
    meta('{"q1":[[1],null]}', outcome=Dead("null_among_arrays", "$.meta[…][…]")),
    meta('{"q2":[null,[]]}', outcome=Dead("null_among_arrays", "$.meta[…][…]")),
    meta('{"q3":[[[1]],[null]]}', outcome=Dead("refused_by_clickhouse")),
    meta('{"q4":[[1],null,2],"q5":[[1],[null]],"q6":[{"a":1},null]}'),
    # What an earlier row has at the same path must not change a later one: in [[1]] a null could be [], and so on.
    meta('{"r1":[[1]],"r2":[{"a":1}],"r3":[1.5],"r4":["x"],"r5":[true],"r6":[[1.5]]}', name="that others follow"),
    meta('{"r1":[null],"r2":[null],"r3":[1],"r4":[1],"r5":[1],"r6":[[1]]}'),
    meta('{"r1":[],"r2":[{"a":2},null],"r3":[null],"r4":["2024-01-01"],"r5":[null],"r6":[]}'),
    meta(f'{{"r3":[{BIG}]}}', outcome=Dead("integer_precision", "$.meta[…][…]")),
    meta(f'{{"r6":[[{BIG}]]}}', outcome=Dead("integer_precision", "$.meta[…][…][…]")),
    # ── time ──
    timed("-5", stored(time=-5)),
    timed("0", stored(time=0)),
    timed("-0", stored(time=0)),
    timed(str(INT64_MAX), stored(time=INT64_MAX)),
    timed(str(INT64_MIN), stored(time=INT64_MIN)),
    timed(str(2**63), Dead("number_out_of_range", "$.time")),
    timed(str(INT64_MIN - 1), Dead("number_out_of_range", "$.time"), mysql=Dead(WRONG, "$.time")),
    timed(str(2**64), Dead("number_out_of_range", "$.time"), mysql=Dead(WRONG, "$.time")),
    timed("1e400", Dead("number_out_of_range", "$.time"), mysql=Refused()),
    *(timed(text, Dead(WRONG, "$.time")) for text in ('"5"', f'"{CANARY}"', "1.5", "1.0", "1e3", "true", "null", "[]")),
    # ── size and shape ──
    same("pretty-printed", PRETTY, stored(meta={"a": [1, 2], "text": "one\ntwo"})),
    meta('{"text":"' + "x" * 1_000_000 + '"}', name="of 1 MB"),
    rest(
        "500 targets",
        f'"targets":{json.dumps(TARGETS_500)}',
        stored(
            targets_type=["t"] * 500,
            targets_id=[f"i{n}" for n in range(500)],
            targets_name=[f"n{n}" for n in range(500)],
            targets_meta=[{"n": n} for n in range(500)],
        ),
    ),
    meta(f'{{"deep":{nested(28)}}}', name="28 levels deep"),
    # MariaDB's json_valid stops at 32 levels, MySQL at 100.
    meta(f'{{"deeper":{nested(90)}}}', name="90 levels deep", outcome=Refused(), mysql=stored(meta={"deeper": json.loads(nested(90))})),
    meta(f'{{"deepest":{nested(100)}}}', name="more than 100 levels deep", outcome=Refused()),
    meta(f'{{"deepest":{nested(3000)}}}', name="thousands of levels deep", outcome=Refused()),
]  # fmt: skip

WITHOUT_OPTIONAL: dict[str, object] = {
    "time": TIME_MS,
    "workspace_id": "ws",
    "source": "platform",
    "event": "e",
    "actor_meta": {},
    "meta": {},
    **dict.fromkeys(("bucket", "description", "actor_type", "actor_id", "actor_name", "remote_ip", "user_agent"), ""),
    **{name: [] for name in ("targets.type", "targets.id", "targets.name", "targets.meta")},
    "correlation_id": "",
}
COLUMNS = ["event_id", *WITHOUT_OPTIONAL, "meta_text", "targets_meta_text"]
AS_TEXT = {
    "actor_meta": "toJSONString(actor_meta)",
    "meta": "toJSONString(meta)",
    "targets.meta": "arrayMap(target -> toJSONString(target), `targets.meta`)",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Drained:
    """What one drain of all cases left, by event id."""

    stack: Stack
    family: str
    refused: set[str]
    entries: Mapping[str, list[dict[str, Any]]]
    dead: Mapping[str, tuple[str, str]]


def event_id_of(case: Case) -> str:
    return case.event_id or f"evt_{CASES.index(case)}"


def read(text: object) -> Any:
    """JSON as ClickHouse printed it; a key given twice shows, which `json.loads` would hide."""

    def members(pairs: list[tuple[str, object]]) -> dict[str, object]:
        return dict(pairs) if len(dict(pairs)) == len(pairs) else {"given twice": pairs}

    return json.loads(str(text), object_pairs_hook=members)


def entries_of(stack: Stack, workspace_id: str) -> dict[str, list[dict[str, Any]]]:
    shown = ", ".join(AS_TEXT.get(name, f"`{name}`") for name in COLUMNS)
    found: dict[str, list[dict[str, Any]]] = {}
    for row in stack.clickhouse(
        f"SELECT {shown} FROM audit_logs_raw_v1 WHERE workspace_id = {{workspace:String}}", workspace=workspace_id
    ):
        entry: dict[str, Any] = dict(zip(COLUMNS, row, strict=True))
        entry["actor_meta"] = read(entry["actor_meta"])
        entry["meta"] = read(entry["meta"])
        entry["targets.meta"] = [read(text) for text in entry["targets.meta"]]
        found.setdefault(str(entry["event_id"]), []).append(entry)
    return found


@pytest.fixture(scope="module")
def drained(module_stack: Stack) -> Drained:
    stack = module_stack
    family = "mariadb" if mariadb(stack) else "mysql"
    refused: set[str] = set()
    pks: dict[str, int] = {}
    good = iter(range(GOOD_ROWS))
    for number, case in enumerate(CASES):
        if number % (len(CASES) // GOOD_ROWS) == 0 and (n := next(good, None)) is not None:
            stack.put(("ws", f"good_{n}", payload(f'"meta":{{"good":{n},"a":"{n}"}}', event_id=f"good_{n}")))
        event_id = event_id_of(case)
        row_id = "" if case.name == "an empty event_id" else event_id
        text = case.text.replace("@id", event_id).replace("@ID", event_id.upper())
        try:
            (pks[event_id],) = stack.put(("" if case.name == "an empty workspace_id" else "ws", row_id, text))
        except DBAPIError:
            refused.add(event_id)
    run(stack)
    names = {pk: event_id for event_id, pk in pks.items()}
    dead = {names[pk]: (reason, path) for pk, reason, path in dead_letters(stack, "pk", "reason", "json_path")}
    return Drained(stack=stack, family=family, refused=refused, entries=entries_of(stack, "ws"), dead=dead)


def means_the_same(got: object, expected: object) -> bool:
    """Equality of JSON values: 1 and 1.0 are one number, true is not 1; a float is compared as a float."""
    if isinstance(got, bool) or isinstance(expected, bool):
        return got is expected
    if isinstance(got, (int, float)) and isinstance(expected, (int, float)):
        return float(got) == expected if isinstance(expected, float) else got == expected
    if isinstance(got, dict) and isinstance(expected, dict):
        return got.keys() == expected.keys() and all(means_the_same(got[key], expected[key]) for key in got)
    if isinstance(got, (list, tuple)) and isinstance(expected, (list, tuple)):
        return len(got) == len(expected) and all(map(means_the_same, got, expected))
    return type(got) is type(expected) and got == expected


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_a_payload_arrives_true_or_is_set_aside_with_the_right_reason(case: Case, drained: Drained) -> None:
    """An audit event that changes its meaning on the way, or vanishes without a reason, is worse than none."""
    event_id = event_id_of(case)
    expected = case.mariadb if drained.family == "mariadb" else case.mysql
    found: Outcome
    if event_id in drained.refused:
        found = Refused()
    elif event_id in drained.dead:
        found = Dead(*drained.dead[event_id])
        assert event_id not in drained.entries
    else:
        (entry,) = drained.entries[event_id]
        if isinstance(expected, Stored):
            for column, content in {**WITHOUT_OPTIONAL, **expected.columns}.items():
                assert means_the_same(entry[column], content), column
            assert means_the_same(read(entry["meta_text"]), entry["meta"])
            lines = str(entry["targets_meta_text"]).split("\n")
            assert means_the_same([read(line) for line in lines if line], entry["targets.meta"])
            return
        found = Stored(entry)
    assert found == expected


def test_every_case_has_its_own_event() -> None:
    """Two cases under one id would hide each other."""
    assert len({event_id_of(case) for case in CASES}) == len({case.name for case in CASES}) == len(CASES)


def test_the_neighbours_of_bad_rows_are_exported_once_and_unchanged(drained: Drained) -> None:
    """One tenant's malformed event must not hold up, repeat or alter anybody else's; only dead letters stay pending."""
    for number in range(GOOD_ROWS):
        (entry,) = drained.entries[f"good_{number}"]
        assert entry["meta"] == read(entry["meta_text"]) == {"good": number, "a": str(number)}
    assert all(len(copies) == 1 for copies in drained.entries.values())
    assert len(drained.entries) == GOOD_ROWS + len(CASES) - len(drained.refused) - len(drained.dead)
    assert drained.stack.pending() == len(drained.dead)
    assert [(str(batch.state), batch.last_error) for batch in ledger(drained.stack)] == [("verified", "")]


def test_neither_dead_letters_nor_the_ledger_hold_payload_text(drained: Drained) -> None:
    """Payloads are audited data; copies of them in our tables would outlive retention and erasure."""
    assert len(drained.dead) > 50
    tables = ("clickhouse_outbox_dead_letter", "clickhouse_outbox_batch")
    assert CANARY not in str([drained.stack.sql(f"SELECT * FROM {table}") for table in tables])


def test_dots_in_keys_stay_apart_from_nesting_in_the_text_mirrors(drained: Drained) -> None:
    """Searches run on the mirrors: %2E there, or a.b for both of two events, would find the wrong ones."""
    texts = {case.name: drained.entries[event_id_of(case)][0]["meta_text"] for case in CASES if "a.b" in case.name}
    assert texts['meta {"a.b":1}'] == '{"a.b":1}'
    assert read(texts['meta {"a.b":1,"a":{"b":2}}']) == {"a.b": 1, "a": {"b": 2}}


def test_what_some_servers_refuse_is_settled_too(module_stack: Stack) -> None:
    """Limits of depth differ between servers and versions; past them our own reading decides."""
    decode = VERSIONS[VERSION].decode

    def row(text: str) -> OutboxRow:
        return OutboxRow(pk=1, event_id="x", workspace_id="ws", payload=text.encode())

    deep = payload(f'"meta":{{"a":{nested(100)}}}', event_id="x")
    assert isinstance(decode(row(deep)), Event)
    assert module_stack.log.probe(VERSION, [deep.encode()], timeout_s=60) is None
    assert "too_deep" in str(decode(row(payload(f'"meta":{{"a":{nested(3000)}}}', event_id="x"))))


# ── random metas ─────────────────────────────────────────────────────────────────────────────────

KEYS = """a b a.b a.b.c . .. a. .a a%b % %25 %2 %2e é 😀 'quoted' `x` UPPER upper Upper 1 0 -1 true null id type meta time
event_id [0] a[] a:b a:`Int64` $ @t ^a a/b { } , ﬀ""".split()  # noqa: SIM905 - a list of quoted words hides the words
KEYS += ["", "a b", "a\nb", 'q"q', "b\\s", "\0", "\u2028", "\x7f", "\ufeff", "e\u0301", "\uffff", "  ", "\t", "k" * 200]
STRINGS = """x true null NULL 1 1.5 +1 1e5 -0 0x10 1_000 1,2 nan inf {} [] [1,2] {"a":1} é 😀 " ' \\ / </script> 2024-01-01 20240101
2024-01-01T10:00:00Z 2024-01-01T10:00:00+02:00 10:00:00 1700000000 1700000000.123 12345678901234567890 192.168.0.1
550e8400-e29b-41d4-a716-446655440000""".split()  # noqa: SIM905
STRINGS += ["", "\0", "a\0b", "\n\t\r\b\f", "\u2028", "\x1f", "\x7f", "\ufeff", "\uffff", "a" * 300]
STRINGS += ["2024-01-01 10:00:00.123"]
INTEGERS = [0, 1, -1, 255, 256, -128, 2**31, 2**32, -(2**31), 2**53, -(2**53), 2**53 - 1]
LONG_INTEGERS = [INT64_MAX, INT64_MIN, 2**64 - 1, 2**63, BIG]
FLOATS = [
    0.0,
    -0.0,
    1.0,
    0.1,
    1.5,
    1e-7,
    1e15,
    1e16,
    1e21,
    1e22,
    1e300,
    5e-324,
    -1.7976931348623157e308,
    123456789012345.6,
]


class Metas(Random):
    """Random metas, the same ones for the same seed."""

    def meta(self, depth: int = 0) -> dict[str, object]:
        return {self.text(KEYS, 0.9): self.item(depth + 1) for _ in range(self.randrange(6))}

    def text(self, known: Sequence[str], share: float) -> str:
        if self.random() < share:
            return self.choice(known)
        planes = ((0, 0x80), (0x80, 0xD800), (0xE000, 0x110000))
        return "".join(chr(self.randrange(*self.choice(planes))) for _ in range(self.randrange(5)))

    def array(self, depth: int) -> list[object]:
        kinds: list[Callable[[], object]] = [
            *[lambda: self.item(depth + 1, in_array=True)] * 14,
            # all of one kind, as arrays mostly are
            *(lambda: self.randrange(9), self.random, lambda: self.choice(STRINGS), lambda: self.random() < 0.5),
            *(lambda: None, lambda: self.meta(4), lambda: self.array(5)),
        ]
        kind = self.choice(kinds)
        values = [kind() for _ in range(self.randrange(5))]
        if None in values and all(value is None or isinstance(value, list) for value in values):
            values = [value for value in values if value is not None] or [None]  # null_among_arrays has its own cases
        return values

    def item(self, depth: int, *, in_array: bool = False) -> object:
        if depth < 5 and self.random() < 0.4:
            return self.choice((self.meta, self.array))(depth)
        # A long integer in an array makes a dead letter: few of those.
        long = [self.randrange(100)] if in_array and self.random() < 0.9 else LONG_INTEGERS
        kinds: list[Sequence[object]] = [
            *((None,), (True, False), (*INTEGERS, self.randrange(-(10**6), 10**6)), long),
            (*FLOATS, self.random() * 10.0 ** self.randrange(-300, 300)),
            *[(self.text(STRINGS, 0.8),)] * 4,
        ]
        return self.choice(self.choice(kinds))


def as_stored(value: object) -> object:
    """What ClickHouse's JSON type stores: in an object, null and {} are absent; in an array they are not."""
    if isinstance(value, dict):
        members = {key: as_stored(child) for key, child in value.items()}
        return {key: child for key, child in members.items() if child is not None and child != {}}
    return [as_stored(child) for child in value] if isinstance(value, list) else value


def parts(value: object) -> Iterator[object]:
    """The value and everything in it."""
    yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from parts(child)


def too_long(value: object) -> bool:
    """Whether this is an integer that a float does not hold."""
    return type(value) is int and abs(value) > 2**53


def rounds_integers(stack: Stack) -> bool:
    """Whether this server takes an integer for a float where a neighbour has a float, as 25.8 does."""
    two = '{"j":{"n":1.5}}\n{"j":{"n":9007199254740993}}'
    stored_as = stack.clickhouse("SELECT toJSONString(j) FROM format(JSONEachRow, 'j JSON', {two:String})", two=two)
    return "9007199254740993" not in str(stored_as)


def test_an_old_server_that_rounds_integers_is_named(module_stack: Stack) -> None:
    """Nothing else would ever tell: count and fingerprint agree."""
    named = [f.what for f in preflight.check(module_stack.outbox, module_stack.log) if "integer above 2^53" in f.what]
    assert bool(named) == rounds_integers(module_stack)


def test_two_thousand_random_metas_keep_their_meaning(module_stack: Stack, drained: Drained) -> None:
    """No list has every shape that applications put into a meta; each must survive beside all the others."""
    stack = module_stack
    source = Metas(20_240_607)
    metas = {f"random_{n}": source.meta() for n in range(2_000)}
    if rounds_integers(stack):  # docs/clickhouse.md says so, and doctor of such a server
        metas = {event_id: content for event_id, content in metas.items() if not any(map(too_long, parts(content)))}
    rows = []
    for event_id, content in metas.items():
        text = json.dumps(content, ensure_ascii=source.random() < 0.5)
        fields = f'"event_id":"{event_id}","workspace_id":"random","event":"e","time":{TIME_MS}'
        rows.append(("random", event_id, f'{{{fields},"meta":{text}}}'))
    stack.put(*rows)
    run(stack)

    assert set(states(stack)) == {"verified"}
    dead = {
        event_id: reason
        for workspace, event_id, reason in dead_letters(stack, "workspace_id", "event_id", "reason")
        if workspace == "random"
    }
    with_long_integers = {
        event_id
        for event_id, content in metas.items()
        if any(isinstance(part, list) and any(map(too_long, part)) for part in parts(content))
    }
    assert {event_id for event_id, reason in dead.items() if reason == "integer_precision"} == with_long_integers
    # A null in one array and an array at its place in the next: ClickHouse says no, and rarely.
    assert Counter(dead.values())["refused_by_clickhouse"] <= 5
    assert set(dead.values()) <= {"integer_precision", "refused_by_clickhouse"}

    entries = entries_of(stack, "random")
    assert entries.keys() == metas.keys() - dead.keys()
    for event_id, (entry,) in entries.items():
        expected = as_stored(metas[event_id])
        assert means_the_same(entry["meta"], expected), event_id
        assert means_the_same(read(entry["meta_text"]), expected), event_id


def test_a_comparison_by_content_takes_no_awkward_payload_for_altered(module_stack: Stack, drained: Drained) -> None:
    """What ClickHouse would make of a payload by itself must be what it made of it among its neighbours."""
    compared = 0
    for group in insert_groups_of(ledger(module_stack)):
        found = compare(module_stack.outbox, module_stack.log, group)
        assert str(found.discrepancy) == "none", (group.inserted_at_ms, found.discrepancy)
        compared += len(group.pks)
    assert compared > GOOD_ROWS
