"""Settings profiles, constraints and row policies in ClickHouse that are not ours.

What belongs here: the effect of inherited settings on a run. What does not: what a proxy drops (`test_answers`).
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.clickhouse.settings import INSERT_SETTINGS, READ_SETTINGS, STANDS_IN
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import event, run
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.engines import NEWEST, chosen
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request
from auditexport_tests.support.own_clickhouse import OwnClickHouse
from auditexport_tests.support.prompts import urls

ROWS = 4
CLICKHOUSE_MD = Path(preflight.__file__).parent / "docs" / "clickhouse.md"

# Each alone changes a number on which a decision rests, or the text of a meta, or refuses our statements.
HOSTILE = {
    "quoted integers": "<output_format_json_quote_64bit_integers>1</output_format_json_quote_64bit_integers>",
    "an old default": "<compatibility>23.3</compatibility>",
    "limit": "<limit>1</limit>",
    "offset": "<offset>1</offset>",
    "rows to read": "<max_rows_to_read>1</max_rows_to_read>",
    "rows of a result": "<max_result_rows>1</max_result_rows><result_overflow_mode>break</result_overflow_mode>",
    "groups": "<max_rows_to_group_by>1</max_rows_to_group_by><group_by_overflow_mode>any</group_by_overflow_mode>",
    "primary key": "<force_primary_key>1</force_primary_key>",
    "index by date": "<force_index_by_date>1</force_index_by_date>",
    "an index": "<force_data_skipping_indices>event_idx</force_data_skipping_indices>",
    "final": "<final>1</final>",
    "filters": "<additional_table_filters>{'audit_logs_raw_v1': 'event_id != \\'evt_1\\''}</additional_table_filters>",
    "result filter": "<additional_result_filter>1 = 0</additional_result_filter>",
    "aliases": "<prefer_column_name_to_alias>1</prefer_column_name_to_alias>",
    "inference": "<input_format_try_infer_dates>1</input_format_try_infer_dates>"
    "<input_format_json_read_bools_as_strings>1</input_format_json_read_bools_as_strings>"
    "<json_type_escape_dots_in_keys>0</json_type_escape_dots_in_keys>",
    "slashes": "<output_format_json_escape_forward_slashes>0</output_format_json_escape_forward_slashes>",
    "asynchronous": "<async_insert>1</async_insert><wait_for_async_insert>0</wait_for_async_insert>",
    "cache": "<use_query_cache>1</use_query_cache><query_cache_ttl>600</query_cache_ttl>",
}
# An embedded server of an old release does not start with these.
CUTTING = {"limit", "offset", "result filter"}
# The cache is refused beside some of the others.
TOGETHER = "".join(HOSTILE[name] for name in HOSTILE if name != "cache" and (chosen() == NEWEST or name not in CUTTING))
META_TEXT = '{"a.b":1,"at":"2024-01-01","n":9007199254740993,"path":"a\\/b","yes":[true,1]}'


@pytest.fixture(scope="module")
def own(mysql_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[OwnClickHouse]:
    with OwnClickHouse(mysql_server, tmp_path_factory.mktemp("own")).running() as own:
        yield own


@pytest.fixture(scope="module")
def profiled(own: OwnClickHouse) -> Stack:
    """Databases for all tests of profiles: a test finds its rows by the prefix of their ids."""
    return own.new_stack()


def insert(stack: Stack, prefix: str) -> None:
    meta = {"n": 9007199254740993, "a.b": 1, "at": "2024-01-01", "yes": [True, 1], "path": "a/b"}
    stack.put(*(event(f"{prefix}_{n}", time=1_760_000_000_000 + n, meta=meta) for n in range(ROWS)))


def exported(stack: Stack, prefix: str) -> list[str]:
    """The metas of the entries with this prefix."""
    found = stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1 WHERE startsWith(event_id, {p:String})", p=prefix)
    return [str(row[0]) for row in found]


@pytest.mark.parametrize("hostile", ["together", "cache"])
def test_a_profile_changes_nothing_of_an_export(own: OwnClickHouse, profiled: Stack, hostile: str) -> None:
    """Under an inherited profile, rows, look-ups and the texts of metas are those of the defaults."""
    stack = profiled
    own.restart()
    insert(stack, hostile)
    payloads = [
        str(row.payload).encode()
        for row in stack.sql("SELECT CAST(payload AS CHAR) AS payload FROM clickhouse_outbox WHERE deleted_at IS NULL")
    ]
    own.restart(profile=TOGETHER if hostile == "together" else HOSTILE["cache"])
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    run(stack)
    (batch,) = stack.sql(
        "SELECT state, inserted_at_ms AS at FROM clickhouse_outbox_batch ORDER BY batch_id DESC LIMIT 1"
    )
    at = int(str(batch.at))
    contents = sorted(entry.content for entry in stack.log.entries_at(at))
    assert contents == sorted(stack.log.contents("audit_log.v1", payloads, at))
    assert stack.log.holdings([at])[at].rows == stack.log.count_by_inserted_at(0, 2**62)[at] == ROWS
    own.restart()
    assert (stack.pending(), batch.state) == (0, "verified")
    assert exported(stack, hostile) == [META_TEXT] * ROWS


PINNED = {
    "output_format_json_quote_64bit_integers": (1, "<readonly/>"),
    "input_format_try_infer_dates": (1, "<const/>"),
    "min_insert_block_size_rows": (1000, "<max>1000</max>"),
    "insert_deduplicate": (0, "<readonly/>"),
}
REFUSING = {
    "settings": (
        "".join(f"<{name}>{value}</{name}>" for name, (value, _) in PINNED.items())
        + f"<constraints>{''.join(f'<{name}>{constraint}</{name}>' for name, (_, constraint) in PINNED.items())}</constraints>",
        list(PINNED),
    ),
    "readonly": ("<readonly>2</readonly>", ["readonly = 2"]),
    "compatibility": (
        "<compatibility>23.3</compatibility><constraints><compatibility><readonly/></compatibility></constraints>",
        ["compatibility = 23.3"],
    ),
}


@pytest.mark.parametrize("profile", REFUSING)
def test_a_profile_that_refuses_our_settings_is_named_before_a_claim(
    own: OwnClickHouse, profiled: Stack, monkeypatch: pytest.MonkeyPatch, profile: str
) -> None:
    """Else every INSERT would be refused, or what the setting changes would be stored."""
    xml, names = REFUSING[profile]
    own.restart(profile=xml)
    (what,) = [
        found.what
        for found in preflight.check(profiled.outbox, profiled.log)
        if found.fatal and not found.what.startswith("a canary event")
    ]
    shown = doctor(profiled.clickhouse_url, profiled, monkeypatch)
    refused = CliRunner().invoke(main, ["drain"]).output
    assert "nothing was claimed. " in refused
    for text in (what, *shown, refused):
        assert [name for name in names if name not in text] == []


def test_a_fixed_setting_that_only_costs_is_accepted(own: OwnClickHouse, profiled: Stack) -> None:
    """The server's administrator decides about threads and seconds: that must not stop an export."""
    own.restart(
        profile="<max_execution_time>20</max_execution_time><max_insert_threads>2</max_insert_threads>"
        "<constraints><max_execution_time><max>20</max></max_execution_time><max_insert_threads><readonly/></max_insert_threads>"
        "</constraints>"
    )
    insert(profiled, "cost")
    assert [found for found in preflight.check(profiled.outbox, profiled.log) if found.fatal] == []
    run(profiled)
    assert (profiled.pending(), len(exported(profiled, "cost"))) == (0, ROWS)


def test_a_row_policy_on_our_user_is_found(own: OwnClickHouse, profiled: Stack) -> None:
    """Hidden entries read as lost, and each repair would store one more copy of them."""
    own.restart()
    insert(profiled, "policy")
    run(profiled)
    database = profiled.clickhouse_url.rsplit("/", 1)[1]
    policy = f"<{database}><audit_logs_raw_v1><filter>event_id != 'policy_1'</filter></audit_logs_raw_v1></{database}>"
    own.restart(policy=policy)
    (found,) = [found.what for found in preflight.check(profiled.outbox, profiled.log) if found.fatal]
    assert "row policy" in found


def test_a_setting_that_a_server_does_not_know_is_left_out(stack: Stack) -> None:
    """A balancer has servers of several versions: one refuses with code 115 what another lists."""
    insert(stack, "evt")
    older: list[bytes] = []

    def refusing(request: Request, forward: Forward) -> Answer:
        if request.inserts and b"optimize_on_insert" in request.statement + request.target.encode():
            older.append(request.statement)
            return unknown("optimize_on_insert")
        answer = forward(request)
        if older and b"FROM system.settings" in request.statement:
            answer.body = answer.body.replace(b"optimize_on_insert", b"known_to_no_server")
        return answer

    with HttpProxy(stack.clickhouse_url, refusing) as proxy:
        drain(stack.outbox, type(stack.log)(proxy.url), Limits(), owner="run")
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))
    assert older


def unknown(name: str) -> Answer:
    """The answer of a server that does not know a setting."""
    text = f"Code: 115. DB::Exception: Unknown setting '{name}'. (UNKNOWN_SETTING) (version 25.8.2.1)"
    return Answer(status=404, headers={"X-ClickHouse-Exception-Code": "115"}, body=text.encode())


def lacking(names: Iterable[str]) -> Callable[[Request, Forward], Answer]:
    """A server of an older release: it lists none of these settings and refuses each with code 115."""

    def older(request: Request, forward: Forward) -> Answer:
        for name in names:
            if re.search(rf"\b{name}\s*=".encode(), request.statement + request.target.encode()):
                return unknown(name)
        answer = forward(request)
        if b"FROM system.settings" in request.statement:
            for name in names:
                answer.body = answer.body.replace(f'"{name}"'.encode(), b'"known_to_no_server"')
        return answer

    return older


def doctor(url: str, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """The output of doctor for this ClickHouse, as text and as JSON."""
    for name, value in {**urls(stack), "AUDITEXPORT_CLICKHOUSE_URL": url, "COLUMNS": "4000"}.items():
        monkeypatch.setenv(name, value)
    shown, listed = (CliRunner().invoke(main, ["doctor", *more]).output for more in ([], ["--json"]))
    return " ".join(shown.split()), json.dumps(json.loads(listed)["looks"], ensure_ascii=False)


def test_doctor_and_the_docs_say_what_a_server_without_a_setting_does(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is not an error, but the operator of an old server must be able to read of it; others get no such line."""
    listed = stack.log.connection.listed()
    for text in doctor(stack.clickhouse_url, stack, monkeypatch):
        assert {name for name in STANDS_IN if f"no {name}: " in text} == STANDS_IN.keys() - listed.keys()
    with HttpProxy(stack.clickhouse_url, lacking(STANDS_IN)) as proxy:
        for text in doctor(proxy.url, stack, monkeypatch):
            assert [name for name, instead in STANDS_IN.items() if f"no {name}: {instead}" not in text] == []
    docs = CLICKHOUSE_MD.read_text()
    for name in STANDS_IN:
        row = re.compile(rf"^\| [^|]*`{name}`[^|]* \| before [0-9.]+ \| [^|]{{10,}} \|$", re.MULTILINE)
        assert len(row.findall(docs)) == 1, name


def test_each_setting_that_this_server_lacks_has_a_stand_in(stack: Stack) -> None:
    """Run on each engine: a setting that is left out and explained nowhere may mean another payload there."""
    lacks = {name for name in {**INSERT_SETTINGS, **READ_SETTINGS} if name not in stack.log.connection.listed()}
    what_they_turn_off_is_new_too = {
        *("select", "filter", "order", "sort", "page", "discard_query_data", "run_query_in_background"),
        *("use_strict_insert_block_limits", "max_insert_block_size_bytes"),
    }
    assert lacks - what_they_turn_off_is_new_too <= STANDS_IN.keys()
