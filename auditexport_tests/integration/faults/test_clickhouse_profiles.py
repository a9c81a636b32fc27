"""Settings profiles, constraints and row policies that somebody else has set in ClickHouse.

What belongs here: what a run makes of what its user inherits. What does not: what a proxy drops (`test_answers`), and other
versions of ClickHouse.
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
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.builders import event
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.engines import local_clickhouse
from auditexport_tests.support.http_proxy import Answer, Forward, HttpProxy, Request
from auditexport_tests.support.prompts import urls
from auditexport_tests.support.users import users_xml

ALL = ("GRANT ALL ON *.* WITH GRANT OPTION",)
CONFIG = "<clickhouse><users_config>{users}</users_config></clickhouse>"
ROWS = 4
CLICKHOUSE_MD = Path(preflight.__file__).parent / "docs" / "clickhouse.md"

# Each alone changes a number that a decision rests on, or the text of a meta, or refuses what we ask.
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


class Profiled:
    """A ClickHouse of its own, whose user's profile a test chooses."""

    def __init__(self, server: LocalClickHouse, directory: Path, stack: Stack) -> None:
        self.server, self.directory, self.stack = server, directory, stack

    def restart(self, profile: str = "", *, policy: str = "") -> None:
        self.stack.log.client().close_connections()
        self.server.stop()
        write_users(self.directory, profile, policy)
        self.server.start()


def write_users(directory: Path, profile: str = "", policy: str = "") -> Path:
    users = users_xml(ALL, profile)
    if policy:
        users = users.replace("<grants>", f"<databases>{policy}</databases><grants>")
    (directory / "users.xml").write_text(users)
    config = directory / "config.xml"
    config.write_text(CONFIG.format(users=directory / "users.xml"))
    return config


@pytest.fixture
def profiled(mysql_server: str, tmp_path: Path) -> Iterator[Profiled]:
    server = local_clickhouse(tmp_path / "clickhouse", config=write_users(tmp_path))
    with server, fresh_stack(mysql_server, server.url.removesuffix("default")) as stack:
        profiled = Profiled(server, tmp_path, stack)
        yield profiled
        profiled.restart()


def _put(stack: Stack, count: int = ROWS) -> None:
    meta = {"n": 9007199254740993, "a.b": 1, "at": "2024-01-01", "yes": [True, 1], "path": "a/b"}
    stack.put(*(event(f"evt_{number}", time=1_760_000_000_000 + number, meta=meta) for number in range(count)))


# Under these not even the embedded server of an old release starts: without them a test shows what such a release exports.
CUTTING = ("cache", "limit", "offset", "result filter")
MEANT = '{"a.b":1,"at":"2024-01-01","n":9007199254740993,"path":"a\\/b","yes":[true,1]}'


@pytest.mark.parametrize(
    "profile",
    [
        [name for name in HOSTILE if name != "cache"],  # it is refused beside some of the others
        [name for name in HOSTILE if name not in CUTTING],
        ["quoted integers"],
        ["cache"],
    ],
    ids=["all", "all but cutting ones", "quoted integers", "cache"],
)
def test_a_profile_changes_nothing_of_an_export(profiled: Profiled, profile: list[str]) -> None:
    """What is inherited from a profile is nobody's decision: rows, look-ups and the text of metas are what they always are."""
    stack = profiled.stack
    _put(stack)
    profiled.restart("".join(HOSTILE[name] for name in profile))
    said = ""
    try:
        preflight.refuse_unless_ready(stack.outbox, stack.log)
        drain(stack.outbox, stack.log, Limits(), owner="run")
    except AuditExportError as error:
        said = f"{type(error).__name__}: {error}"
    profiled.restart()
    texts = [row[0] for row in stack.clickhouse("SELECT meta_text FROM audit_logs_raw_v1")]
    states = [row.state for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")]
    assert (said, stack.pending(), texts, states) == ("", 0, [MEANT] * ROWS, ["verified"])


@pytest.mark.parametrize("left_out", [("cache",), CUTTING], ids=["all", "all but cutting ones"])
def test_a_profile_accuses_nothing_at_a_reconciliation(profiled: Profiled, left_out: tuple[str, ...]) -> None:
    """'Altered' and 'missing' for entries that nobody touched end in a repair that writes them again."""
    stack = profiled.stack
    _put(stack)
    drain(stack.outbox, stack.log, Limits(), owner="run")
    profiled.restart("".join(HOSTILE[name] for name in HOSTILE if name not in left_out))
    (at,) = {row.at for row in stack.sql("SELECT inserted_at_ms AS at FROM clickhouse_outbox_batch WHERE batch_id > 0")}
    log = stack.log
    payloads = [
        bytes(row.payload, "utf-8") if isinstance(row.payload, str) else bytes(row.payload)
        for row in stack.sql("SELECT CAST(payload AS CHAR) AS payload FROM clickhouse_outbox ORDER BY pk")
    ]
    found: object
    try:
        entries = log.entries_at(int(at))
        found = (
            log.holdings([int(at)])[int(at)].rows,
            list(log.count_by_inserted_at(0, 2**62)),
            sorted(entry.content for entry in entries) == sorted(log.contents("audit_log.v1", payloads, int(at))),
        )
    except AuditExportError as error:
        found = str(error)
    assert found == (ROWS, [int(at)], True)


@pytest.mark.parametrize(
    ("setting", "constraint"),
    [
        ("output_format_json_quote_64bit_integers", "<readonly/>"),
        ("input_format_try_infer_dates", "<const/>"),
        ("min_insert_block_size_rows", "<max>1000</max>"),
        ("insert_deduplicate", "<readonly/>"),
    ],
)
def test_a_setting_that_we_may_not_state_is_named_before_a_claim(
    profiled: Profiled, setting: str, constraint: str
) -> None:
    """A statement that is refused at every INSERT says less than the one line that names the constraint."""
    value = {"insert_deduplicate": 0, "min_insert_block_size_rows": 1000}.get(setting, 1)
    profiled.restart(f"<{setting}>{value}</{setting}><constraints><{setting}>{constraint}</{setting}></constraints>")
    _put(profiled.stack)
    said = [found.what for found in preflight.check(profiled.stack.outbox, profiled.stack.log) if found.fatal]
    # The canary event says beside it what the setting does to an event.
    assert [setting in what for what in said if not what.startswith("a canary event")] == [True]
    with pytest.raises(AuditExportError, match=setting):
        preflight.refuse_unless_ready(profiled.stack.outbox, profiled.stack.log)


@pytest.mark.parametrize(
    ("profile", "named"),
    [
        ("<readonly>2</readonly>", "readonly = 2"),
        (
            "<compatibility>23.3</compatibility><constraints><compatibility><readonly/></compatibility></constraints>",
            "compatibility = 23.3",
        ),
        (
            "<compatibility>23.3</compatibility><constraints><compatibility><const/></compatibility></constraints>",
            "compatibility = 23.3",
        ),
    ],
    ids=["readonly 2", "compatibility", "compatibility const"],
)
def test_what_no_statement_can_state_is_named_before_a_claim(
    profiled: Profiled, monkeypatch: pytest.MonkeyPatch, profile: str, named: str
) -> None:
    """No SETTINGS clause gets past these: what they change must be known by name before a row is claimed."""
    stack = profiled.stack
    _put(stack)
    profiled.restart(profile)
    shown_by_doctor = doctor_of(stack.clickhouse_url, stack, monkeypatch)
    said = CliRunner().invoke(main, ["drain"]).output
    assert "nothing was claimed. " in said, said
    assert named in said
    assert (stack.pending(), len(stack.sql("SELECT * FROM clickhouse_outbox_batch WHERE batch_id > 0"))) == (ROWS, 0)
    for shown in shown_by_doctor:
        assert named in shown
    profiled.restart()
    CliRunner().invoke(main, ["drain"])
    assert (stack.pending(), stack.counts()) == (0, (ROWS, ROWS))


def test_a_fixed_setting_that_only_costs_is_left_as_it_is(profiled: Profiled) -> None:
    """Whoever runs the server decides about threads and seconds; that is no reason to export nothing."""
    profiled.restart(
        "<max_execution_time>20</max_execution_time><max_insert_threads>2</max_insert_threads>"
        "<constraints><max_execution_time><max>20</max></max_execution_time><max_insert_threads><readonly/></max_insert_threads>"
        "</constraints>"
    )
    _put(profiled.stack)
    found = [finding.what for finding in preflight.check(profiled.stack.outbox, profiled.stack.log) if finding.fatal]
    try:
        drain(profiled.stack.outbox, profiled.stack.log, Limits(), owner="run")
    except AuditExportError as error:
        found.append(str(error))
    assert (found, profiled.stack.pending(), profiled.stack.counts()) == ([], 0, (ROWS, ROWS))


def test_a_row_policy_on_our_user_is_found(profiled: Profiled) -> None:
    """What it hides reads as lost, and each repair would store one more copy of it."""
    stack = profiled.stack
    _put(stack)
    drain(stack.outbox, stack.log, Limits(), owner="run")
    database = stack.clickhouse_url.rsplit("/", 1)[1]
    policy = f"<{database}><audit_logs_raw_v1><filter>event_id != 'evt_1'</filter></audit_logs_raw_v1></{database}>"
    profiled.restart(policy=policy)
    said = [found.what for found in preflight.check(stack.outbox, stack.log) if found.fatal]
    assert ["row policy" in what for what in said] == [True]


def test_a_setting_that_a_server_does_not_know_is_left_out(stack: Stack) -> None:
    """A balancer fronts servers of several versions: what one lists, the next refuses with code 115, before it writes."""
    _put(stack)
    older: list[bytes] = []

    def refusing(request: Request, forward: Forward) -> Answer:
        if request.inserts and b"optimize_on_insert" in request.statement + request.target.encode():
            older.append(request.statement)
            text = (
                b"Code: 115. DB::Exception: Unknown setting 'optimize_on_insert'. (UNKNOWN_SETTING) (version 25.8.2.1)"
            )
            return Answer(status=404, headers={"X-ClickHouse-Exception-Code": "115"}, body=text)
        if older and b"FROM system.settings" in request.statement:
            answer = forward(request)
            answer.body = answer.body.replace(b"optimize_on_insert", b"known_to_no_server")
            return answer
        return forward(request)

    said = ""
    with HttpProxy(stack.clickhouse_url, refusing) as proxy:
        try:
            drain(stack.outbox, type(stack.log)(proxy.url), Limits(), owner="run")
        except AuditExportError as error:
            said = str(error)
    assert (said, stack.pending(), stack.counts()) == ("", 0, (ROWS, ROWS))


def lacking(names: Iterable[str]) -> Callable[[Request, Forward], Answer]:
    """A server of an older release: it lists none of these settings and refuses each with code 115."""
    lacked = [name.encode() for name in names]

    def older(request: Request, forward: Forward) -> Answer:
        asked = request.statement + request.target.encode()
        for name in lacked:
            if re.search(rb"\b" + name + rb"\s*=", asked):
                text = (
                    b"Code: 115. DB::Exception: Unknown setting '" + name + b"'. (UNKNOWN_SETTING) (version 25.8.2.1)"
                )
                return Answer(status=404, headers={"X-ClickHouse-Exception-Code": "115"}, body=text)
        answer = forward(request)
        if b"FROM system.settings" in request.statement:
            for name in lacked:
                answer.body = answer.body.replace(b'"' + name + b'"', b'"known_to_no_server"')
        return answer

    return older


def doctor_of(url: str, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> tuple[str, str]:
    """What doctor says of this ClickHouse, as text and as JSON, whatever else it finds there."""
    for name, value in {**urls(stack), "AUDITEXPORT_CLICKHOUSE_URL": url, "COLUMNS": "4000"}.items():
        monkeypatch.setenv(name, value)
    shown, listed = (CliRunner().invoke(main, ["doctor", *more]).output for more in ([], ["--json"]))
    return " ".join(shown.split()), json.dumps(json.loads(listed)["looks"], ensure_ascii=False)


@pytest.mark.parametrize("name", sorted(STANDS_IN))
def test_what_stands_in_for_a_setting_is_said_by_doctor_and_the_docs(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """What such a server does differently is not an error, and nobody reads our source for it."""
    with HttpProxy(stack.clickhouse_url, lacking([name])) as proxy:
        for said in doctor_of(proxy.url, stack, monkeypatch):
            assert f"no {name}: {STANDS_IN[name]}" in said
    row = re.compile(rf"^\| [^|]*`{name}`[^|]* \| before [0-9.]+ \| [^|]{{10,}} \|$", re.MULTILINE)
    assert len(row.findall(CLICKHOUSE_MD.read_text())) == 1


def test_doctor_names_all_that_a_server_lacks_and_nothing_that_it_has(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An old server lacks several at once; one that has them all gets no such line."""
    listed = stack.log.connection.listed()
    for said in doctor_of(stack.clickhouse_url, stack, monkeypatch):
        assert {name for name in STANDS_IN if f"no {name}: " in said} == STANDS_IN.keys() - listed.keys()
    with HttpProxy(stack.clickhouse_url, lacking(STANDS_IN)) as proxy:
        for said in doctor_of(proxy.url, stack, monkeypatch):
            assert [name for name in STANDS_IN if f"no {name}: " not in said] == []


def test_each_setting_that_this_server_lacks_has_a_stand_in(stack: Stack) -> None:
    """Run on each engine: a setting that is left out and explained nowhere may mean another payload there."""
    lacks = {name for name in {**INSERT_SETTINGS, **READ_SETTINGS} if name not in stack.log.connection.listed()}
    came_with_what_they_turn_off = {
        *("select", "filter", "order", "sort", "page", "discard_query_data", "run_query_in_background"),
        *("use_strict_insert_block_limits", "max_insert_block_size_bytes"),
    }
    assert lacks - came_with_what_they_turn_off <= STANDS_IN.keys()
