"""The embedded ClickHouse answers as a server does, and survives its own crashes."""

from __future__ import annotations

import base64
import gzip
import json
import socket
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import clickhouse_connect
import httpx
import lz4.frame  # type: ignore[import-untyped]
import psutil  # type: ignore[import-untyped]
import pytest
import zstandard
from clickhouse_connect.driver.client import Client
from clickhouse_connect.driver.exceptions import DatabaseError, OperationalError

from auditexport_pipeline.core.errors import LocalServerFailed
from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_pipeline.local.clickhouse_server import Refused, one_statement, split_insert
from auditexport_tests.support.engines import local_clickhouse
from auditexport_tests.support.waiting import wait_until

COMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lz4.frame.compress,
    "zstd": zstandard.ZstdCompressor().compress,
    "gzip": gzip.compress,
}
DECOMPRESSORS: dict[str, Callable[[bytes], bytes]] = {
    "lz4": lz4.frame.decompress,
    "zstd": zstandard.ZstdDecompressor().decompress,
    "gzip": gzip.decompress,
    "": bytes,
}
DEDUPLICATED = "ENGINE = MergeTree ORDER BY pk SETTINGS non_replicated_deduplication_window = 100"


def connect(server: LocalClickHouse) -> Client:
    return clickhouse_connect.get_client(dsn=server.url, autogenerate_session_id=False)


def address(server: LocalClickHouse) -> str:
    return f"http://127.0.0.1:{server.port}/"


def json_rows(count: int, *, first: int = 0) -> bytes:
    """One JSON document a row, with what breaks naive splitting: quotes, line feeds, semicolons, unicode."""
    rows = ({"pk": first + n, "note": f'row {first + n}: it\'s a "Zoë";\nFORMAT x'} for n in range(count))
    return b"".join(json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows)


def decoded(rows: bytes) -> list[tuple[int, str]]:
    return [(row["pk"], row["note"]) for row in map(json.loads, rows.split(b"\n")[:-1])]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClickHouse]:
    with local_clickhouse(tmp_path_factory.mktemp("clickhouse"), password=None) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LocalClickHouse) -> Iterator[Client]:
    with connect(server) as connected:
        yield connected


@pytest.fixture(scope="module")
def http(server: LocalClickHouse) -> Iterator[httpx.Client]:
    login = ("default", httpx.URL(server.url).password)
    with httpx.Client(base_url=address(server), auth=login, timeout=60, trust_env=False) as connected:
        yield connected


@pytest.fixture
def table(client: Client) -> Iterator[str]:
    """An empty table of two columns, which remembers tokens; dropped afterwards."""
    name = f"t_{uuid.uuid4().hex}"
    client.command(f"CREATE TABLE {name} (pk UInt64, note String) {DEDUPLICATED}")
    yield name
    client.command(f"DROP TABLE {name} SYNC")


def stored(client: Client, table: str) -> list[tuple[Any, ...]]:
    return list(client.query(f"SELECT pk, note FROM {table} ORDER BY pk").result_rows)


def running(client: Client, like: str) -> int:
    """How many statements like this one run now."""
    sql = "SELECT count() FROM system.processes WHERE query LIKE {like:String}"
    return int(client.query(sql, parameters={"like": like}).first_row[0])


def parts(client: Client, table: str) -> list[int]:
    """Rows of each active part, as they were written."""
    sql = "SELECT rows FROM system.parts WHERE active AND database = 'default' AND table = {t:String}"
    return [rows for (rows,) in client.query(sql, parameters={"t": table}).result_rows]


# --- bodies ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", COMPRESSORS)
def test_all_frames_of_a_body_are_read_and_a_cut_one_is_refused(
    http: httpx.Client, client: Client, table: str, encoding: str
) -> None:
    """To read only the first frame, or what is there of a cut one, would lose rows without an error."""
    frames = [json_rows(700, first=700 * frame) for frame in range(5)]
    compressed = [COMPRESSORS[encoding](frame) for frame in frames]
    params, headers = {"query": f"INSERT INTO {table} FORMAT JSONEachRow"}, {"Content-Encoding": encoding}
    cut = http.post("/", params=params, content=compressed[0] + compressed[1][:-9], headers=headers)
    assert cut.headers["X-ClickHouse-Exception-Code"] == "271"
    assert stored(client, table) == []
    whole = http.post("/", params=params, content=b"".join(compressed), headers=headers)
    assert whole.status_code == 200, whole.text
    assert stored(client, table) == decoded(b"".join(frames))


def test_an_upload_that_breaks_off_writes_nothing(server: LocalClickHouse, client: Client, table: str) -> None:
    """The rows that did arrive are whole lines; only the missing end shows it."""
    body = json_rows(1000)
    login = base64.b64encode(f"default:{httpx.URL(server.url).password}".encode()).decode()
    head = (
        f"POST /?query=INSERT%20INTO%20{table}%20FORMAT%20JSONEachRow HTTP/1.1\r\n"
        f"Host: 127.0.0.1\r\nAuthorization: Basic {login}\r\nContent-Length: {len(body) + 1}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port)) as broken:
        broken.sendall(head.encode() + body)
        own_port = broken.getsockname()[1]
    process = psutil.Process(server.pid)
    wait_until(
        lambda: all(c.raddr.port != own_port for c in process.net_connections() if c.raddr),
        what="the end of the connection",
    )
    assert stored(client, table) == []


@pytest.mark.parametrize("compress", ["lz4", False])
def test_a_native_insert_of_ten_columns_arrives_byte_for_byte(
    server: LocalClickHouse, table: str, compress: str | bool
) -> None:
    """The Native block of ten columns begins with a line feed, which is data and not layout."""
    names = [f"c{n}" for n in range(10)]
    rows = [[f"{row}.{n}\n" for n in range(10)] for row in range(3000)]
    with clickhouse_connect.get_client(dsn=server.url, compress=compress) as client:
        columns = ", ".join(f"{name} String" for name in names)
        client.command(f"CREATE OR REPLACE TABLE {table} ({columns}) ENGINE = MergeTree ORDER BY c0")
        summary = client.insert(table, rows, column_names=names)
        found = client.query(f"SELECT * FROM {table} ORDER BY toUInt32(splitByChar('.', c0)[1])")
    assert summary.written_rows == 3000
    assert [list(row) for row in found.result_rows] == rows


def test_types_of_all_kinds_come_back_as_they_were_inserted(client: Client, table: str) -> None:
    """Native transports each type in its own way, in both directions."""
    columns: dict[str, object] = {
        "UInt64": 2**64 - 1,
        "LowCardinality(String)": "Zoë\n'",
        "Nullable(Int32)": None,
        "DateTime64(3, 'UTC')": datetime(2025, 3, 1, 2, 3, 4, 567000),
        "Array(String)": ["", "x"],
        "Tuple(x Int8, y String)": {"x": -1, "y": "q"},
        "Map(String, UInt8)": {"k": 7},
        "Float64": 0.1,
        "Bool": True,
        "UUID": uuid.UUID(int=5),
        "Enum8('a' = 1)": "a",
    }
    types = ", ".join(f"c{number} {type_}" for number, type_ in enumerate(columns))
    client.command(f"CREATE OR REPLACE TABLE {table} ({types}) ENGINE = MergeTree ORDER BY c0")
    client.insert(table, [[*columns.values()]])
    assert client.query(f"SELECT * FROM {table}").result_rows == [tuple(columns.values())]


@pytest.mark.parametrize("encoding", [None, "lz4"])
def test_rows_through_input_come_by_command_and_by_raw_insert(client: Client, table: str, encoding: str | None) -> None:
    """The export's own statement is like this one; the text before the data has quotes and brackets."""
    sql = (
        f"INSERT INTO {table} (pk, note) SELECT pk, concat(note, ')FORMAT CSV') /* input('x') */"
        " FROM input('pk UInt64, note String') SETTINGS max_threads = 1 FORMAT JSONEachRow"
    )
    data = json_rows(2500)
    if encoding is None:
        summary = client.command(sql, data=data)
    else:
        body = COMPRESSORS[encoding](sql.encode() + b"\n" + data)
        summary = client.raw_insert("", insert_block=body, compression=encoding)
    assert summary.written_rows == 2500  # type: ignore[union-attr]
    assert stored(client, table) == [(pk, note + ")FORMAT CSV") for pk, note in decoded(data)]


@pytest.mark.parametrize("source", ["SELECT pk, note FROM input('pk UInt64, note String')", ""])
def test_one_large_insert_is_one_part_and_leaves_no_file(
    server: LocalClickHouse, client: Client, table: str, source: str
) -> None:
    """Blocks must not depend on how the body arrived, and a body must not stay on the disk."""
    data = b"".join(b'{"pk": %d, "note": "%s"}\n' % (pk, b"x" * 2000) for pk in range(10_000))
    settings = {"insert_deduplication_token": "t", "min_insert_block_size_bytes": 0, "async_insert": 0}
    for _ in range(2):
        client.command(f"INSERT INTO {table} (pk, note) {source} FORMAT JSONEachRow", data=data, settings=settings)
    assert parts(client, table) == [10_000]
    spool = server.directory / "tmp"
    assert list(spool.iterdir()) == []
    assert spool.stat().st_mode & 0o777 == 0o700


def test_data_may_be_in_the_url_in_the_body_or_in_both(http: httpx.Client, client: Client, table: str) -> None:
    """A server joins both with one line feed; clients rely on each form, also for VALUES."""
    sql = f"INSERT INTO {table} (pk) FORMAT CSV"
    for query, body in (
        (sql, b"1\n"),
        ("", f"{sql}\n2\n".encode()),
        ("", f"{sql} 3".encode()),
        (f"{sql}\n4", b"5"),
        (f"INSERT INTO {table} VALUES", b"(6, 'c'), (7, '\\'')"),
        ("", f"INSERT INTO {table} VALUES (8, 'a;b'), (9, 'FORMAT CSV');".encode()),
    ):
        answer = http.post("/", params={"query": query} if query else {}, content=body)
        assert answer.status_code == 200, answer.text
    notes = [""] * 5 + ["c", "'", "a;b", "FORMAT CSV"]
    assert stored(client, table) == list(enumerate(notes, start=1))


@pytest.mark.parametrize("encoding", DECOMPRESSORS)
def test_the_answer_is_compressed_as_the_client_asks(http: httpx.Client, encoding: str) -> None:
    """A client that did not ask, or cannot decompress, must get plain bytes."""
    with http.stream(
        "POST",
        "/",
        params={"enable_http_compression": "1"},
        content=b"SELECT number FROM numbers(3) FORMAT CSV",
        headers={"Accept-Encoding": encoding},
    ) as answer:
        raw = b"".join(answer.iter_raw())
    assert answer.headers.get("Content-Encoding", "") == encoding
    assert DECOMPRESSORS[encoding](raw) == b"0\n1\n2\n"


# --- parameters and settings ----------------------------------------------------------------------


def test_query_parameters_keep_every_character(client: Client) -> None:
    """A parameter that changes on the way selects other rows."""
    text = "Zoë\t\n\\ '\"`; -- {x:String} %2B+&"
    sql = "SELECT {text:String}, {numbers:Array(UInt64)}, {day:Date}, {nothing:Nullable(String)}"
    values = {"text": text, "numbers": [1, 2**63], "day": "2025-03-01", "nothing": None}
    assert client.query(sql, parameters=values).first_row == (text, [1, 2**63], datetime(2025, 3, 1).date(), None)


def test_long_parameters_come_in_a_form_up_to_the_limit_of_a_server(http: httpx.Client, client: Client) -> None:
    """A client sends long parameters as a form, which a server refuses past 128 KiB a field."""
    sql = "SELECT sum(p), count() FROM (SELECT arrayJoin({pks:Array(UInt64)}) AS p)"
    pks = list(range(20_000))
    assert client.query(sql, parameters={"pks": pks}).first_row == (sum(pks), len(pks))
    with pytest.raises(DatabaseError) as raised:
        client.query(sql, parameters={"pks": list(range(40_000))})
    assert raised.value.code == 1000
    assert http.post("/", files={"query": (None, "SELECT 1 + 1")}).text == "2\n"


def test_settings_parameters_and_databases_end_with_their_request(http: httpx.Client, client: Client) -> None:
    """A token or a limit that leaks into the next INSERT loses its rows."""
    name = f"d_{uuid.uuid4().hex}"
    client.command(f"CREATE DATABASE {name}")
    sql = "SELECT getSetting('max_block_size'), getSetting('insert_deduplication_token'), currentDatabase()"
    before = http.post("/", content=sql).text
    settings = {"max_block_size": "17", "insert_deduplication_token": "t'1", "database": name, "param_x": "1"}
    assert http.post("/", params=settings, content=sql).text == f"17\tt\\'1\t{name}\n"
    assert [http.post("/", content=sql).text for _ in range(20)] == [before] * 20
    assert http.post("/", content="SET max_block_size = 18").status_code == 200
    assert http.post("/", content=sql).text == before
    assert http.post("/", content="SELECT {x:String}").headers["X-ClickHouse-Exception-Code"] == "456"
    client.command(f"DROP DATABASE {name}")


def test_settings_of_concurrent_requests_do_not_mix(http: httpx.Client) -> None:
    """Two blocks of a batch are written at once, each under its own token."""

    def setting(value: int) -> int:
        answer = http.post("/", params={"max_block_size": value}, content="SELECT getSetting('max_block_size')")
        return int(answer.text)

    with ThreadPoolExecutor(6) as threads:
        assert list(threads.map(setting, range(1, 121))) == list(range(1, 121))


def test_the_answer_names_query_format_zone_and_figures(http: httpx.Client) -> None:
    """Clients read these headers before the body."""
    answer = http.post("/", params={"query_id": "q-1", "default_format": "JSONEachRow"}, content="SELECT 1 AS a")
    assert answer.json() == {"a": 1}
    assert answer.headers["X-ClickHouse-Query-Id"] == "q-1"
    assert answer.headers["X-ClickHouse-Format"] == "JSONEachRow"
    assert answer.headers["X-ClickHouse-Timezone"]
    assert answer.headers["X-ClickHouse-Server-Display-Name"]
    assert json.loads(answer.headers["X-ClickHouse-Summary"])["result_rows"] == "1"
    for path in ("/ping", "/replicas_status", "/"):
        assert http.get(path).text == "Ok.\n"


# --- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sql", "status", "code", "name"),
    [
        ("SELECT * FROM absent", 404, 60, "UNKNOWN_TABLE"),
        ("SELECT * FROM absent.t", 404, 81, "UNKNOWN_DATABASE"),
        ("SELECT absent", 404, 47, "UNKNOWN_IDENTIFIER"),
        ("absent", 400, 62, "SYNTAX_ERROR"),
        ("", 400, 62, "SYNTAX_ERROR"),
        ("SELECT 1; SELECT 2", 400, 62, "SYNTAX_ERROR"),
        ("SELECT throwIf(1)", 500, 395, "FUNCTION_THROW_IF_VALUE_IS_NON_ZERO"),
        ("INSERT INTO absent FORMAT CSV\n1", 404, 60, "UNKNOWN_TABLE"),
        ("SELECT sleepEachRow(0.1) FROM numbers(100) SETTINGS max_block_size = 1", 408, 159, "TIMEOUT_EXCEEDED"),
    ],
)
def test_an_error_has_the_status_code_and_name_of_the_server(
    http: httpx.Client, sql: str, status: int, code: int, name: str
) -> None:
    """By these, transient and permanent errors are told apart."""
    answer = http.post("/", params={"max_execution_time": "1"}, content=sql)
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (status, str(code))
    assert answer.text.startswith(f"Code: {code}. DB::Exception: ")
    assert f"({name})" in answer.text


@pytest.mark.parametrize(
    ("params", "headers", "expected"),
    [
        ({"async_insrt": "0"}, {}, (404, "115")),
        ({"decompress": "1"}, {}, (501, "48")),
        ({}, {"Content-Encoding": "br"}, (501, "48")),
    ],
)
def test_an_unknown_setting_or_encoding_is_refused(
    http: httpx.Client, params: dict[str, str], headers: dict[str, str], expected: tuple[int, str]
) -> None:
    """A misspelt async_insert must not be ignored, nor a body be read under the wrong encoding."""
    answer = http.post("/", params=params, headers=headers, content=b"SELECT 1")
    assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == expected


def test_a_get_request_cannot_write(http: httpx.Client, client: Client) -> None:
    """A server makes GET read-only; code that writes by GET works nowhere else."""
    answer = http.get("/", params={"query": "CREATE TABLE by_get (pk UInt8) ENGINE = Memory"})
    assert answer.headers["X-ClickHouse-Exception-Code"] == "164"
    assert client.command("EXISTS TABLE by_get") == 0
    assert http.get("/", params={"query": "SELECT 5"}).text == "5\n"


@pytest.mark.parametrize("source", ["SELECT pk, note FROM input('pk UInt64, note String')", ""])
def test_a_bad_row_refuses_the_whole_block(client: Client, table: str, source: str) -> None:
    """An INSERT of one block is all or nothing; the search for poison rows relies on it."""
    data = json_rows(500) + b'{"pk": "x"}\n'
    with pytest.raises(DatabaseError) as raised:
        client.command(f"INSERT INTO {table} (pk, note) {source} FORMAT JSONEachRow", data=data)
    assert raised.value.code in (27, 117)
    assert stored(client, table) == []


# --- who is let in, and how far -------------------------------------------------------------------


def test_only_the_password_of_this_start_is_let_in(server: LocalClickHouse, tmp_path: Path) -> None:
    """Every program of this machine finds the port; only the starter's URL has the password."""
    password = httpx.URL(server.url).password or ""
    assert len(password) >= 16
    assert httpx.URL(LocalClickHouse(tmp_path, port=1).url).password != password
    given = [None, ("default", ""), ("default", "secret"), ("other", password), ("default", password)]
    answers = [httpx.post(address(server), content="SELECT 1", auth=login, trust_env=False) for login in given]
    assert [answer.status_code for answer in answers] == [403, 403, 403, 403, 200]
    assert answers[0].headers["X-ClickHouse-Exception-Code"] == "516"
    assert password not in (server.directory / "server.log").read_text()


@pytest.mark.parametrize(
    "headers",
    [
        {"Origin": "https://example.com"},
        {"Origin": "null"},
        {"Host": "rebound.example.com"},
        {"Host": "127.0.0.1.example.com:8123"},
        {"Host": "cafe"},
        {"Sec-Fetch-Site": "cross-site"},
        {"Sec-Fetch-Site": "same-site"},
    ],
    ids=str,
)
def test_a_web_page_gets_nothing(http: httpx.Client, headers: dict[str, str]) -> None:
    """A page in a browser of this machine can send requests here, by address or by DNS rebinding."""
    for method in ("GET", "POST"):
        answer = http.request(method, "/", params={"query": "SELECT 1"}, headers=headers)
        assert (answer.status_code, answer.headers.get("X-ClickHouse-Exception-Code")) == (403, "497")


@pytest.mark.parametrize(
    "reaching",
    [
        "SELECT * FROM file('{path}', LineAsString)",
        "SELECT * FROM FILE /* a comment */ ('{path}', LineAsString)",
        "SELECT * FROM `file`('{path}', LineAsString)",
        "SELECT * FROM \"fi\\x6ce\"('{path}', LineAsString)",
        "SELECT file('{path}')",
        "SELECT * FROM '{path}'",
        "SELECT * FROM '{hidden}'",
        "SELECT * FROM `{path}`",
        "SELECT * FROM default.`{path}`",
        "SELECT 1 FROM numbers(1), '{path}'",
        "SELECT * FROM $${path}$$",
        "SELECT * FROM “{path}”",
        "SELECT * FROM {t:Identifier}",
        "SELECT * FROM file\u00a0('{path}', LineAsString)",
        "SELECT * FROM file\x00('{path}', LineAsString)",
        "SELECT * FROM file // '\n('{path}', LineAsString) -- '",
        "SELECT /* /* */ ' */ * FROM file('{path}', LineAsString) -- '",
        "SELECT 1 AS a$b$, * FROM file('{path}', LineAsString) ORDER BY 'c$b$'",
        "CREATE TABLE reaching (a String) ENGINE = MergeTree ORDER BY a SETTINGS disk = disk(type = web)",
        "EXECUTE AS default CREATE TABLE reaching (a String) ENGINE = Kafka",
        "CREATE TABLE reaching (a String) ENGINE = File(LineAsString, '{path}')",
        "CREATE TABLE reaching (a String) ENGINE URL('http://127.0.0.1:1/', LineAsString)",
        "CREATE DATABASE reaching ENGINE = Filesystem('/tmp')",
        "CREATE DICTIONARY reaching (a String) PRIMARY KEY a SOURCE(FILE(path '{path}' format 'CSV')) "
        "LAYOUT(HASHED()) LIFETIME(0)",
        "CREATE DICTIONARY reaching (a String) PRIMARY KEY a SOURCE(MYSQL(port 1)) LAYOUT(HASHED()) LIFETIME(0)",
        "CREATE VIEW reaching AS SELECT * FROM url('http://127.0.0.1:1/', LineAsString)",
        "INSERT INTO FUNCTION file('{path}', LineAsString) SELECT 'x'",
        "INSERT INTO FUNCTION file('{path}', LineAsString) FORMAT CSV\nx",
        "SELECT 'x' INTO OUTFILE '{path}' TRUNCATE FORMAT CSV",
        "INSERT INTO reaching FROM INFILE '{path}' FORMAT CSV",
        "BACKUP DATABASE default TO File('{path}')",
        "BACKUP DATABASE default TO Disk('default', 'x')",
        "SYSTEM SHUTDOWN",
        "SELECT * FROM remote('192.0.2.1', system.one)",
        "SELECT * FROM mysql('127.0.0.1:1', 'd', 't', 'u', 'p')",
        "SELECT * FROM s3('http://127.0.0.1:1/x', 'CSV', 'a String')",
        "SELECT * FROM executable('cat', CSV, 'a String')",
    ],
)
def test_files_and_networks_are_out_of_a_requests_reach(http: httpx.Client, tmp_path: Path, reaching: str) -> None:
    """The engine runs with the rights of the user who started it; a statement must not."""
    path = tmp_path / "kept.csv"
    path.write_text("kept")
    sql = reaching.replace("{path}", str(path)).replace("{hidden}", str(path).replace("/", "\\x2f"))
    answer = http.post("/", params={"param_t": str(path)}, content=sql)
    assert (answer.status_code, answer.headers.get("X-ClickHouse-Exception-Code")) == (403, "497")
    assert path.read_text() == "kept"


def test_names_that_only_look_like_reaching_out_are_let_in(http: httpx.Client) -> None:
    """Columns and texts are often called file and url."""
    harmless = "SELECT number AS file, '/a' AS url, 'file(' AS `a.b` FROM numbers(1) WHERE url IN ('/a', 'url(')"
    assert http.post("/", content=harmless).text == "0\t/a\tfile(\n"
    engines = "SELECT count() FROM system.tables WHERE engine = 'SystemOne' AND database = 'system'"
    assert http.post("/", content=engines).text == "1\n"


# --- the engine -----------------------------------------------------------------------------------


@pytest.mark.parametrize("through", ["input", "format", "native"])
def test_the_same_token_twice_is_written_once(client: Client, table: str, through: str) -> None:
    """Exactly-once needs this, and needs the token: without it a replay through input() duplicates."""

    def insert(first: int, **settings: str) -> None:
        given: dict[str, object] = {"async_insert": 0, "wait_end_of_query": 1, **settings}
        if through == "native":
            client.insert(table, [(pk, "n") for pk in range(first, first + 10)], settings=given)
            return
        source = " SELECT pk, note FROM input('pk UInt64, note String')" if through == "input" else ""
        sql = f"INSERT INTO {table} (pk, note){source} FORMAT JSONEachRow"
        client.command(sql, data=json_rows(10, first=first), settings=given)

    insert(0, insert_deduplication_token="a")
    insert(100, insert_deduplication_token="a")
    assert len(stored(client, table)) == 10
    # The controls: without the token both blocks stay, and content alone identifies a block of plain data, but not one
    # that a SELECT made (deduplicate_insert_select).
    insert(200)
    insert(300)
    assert len(stored(client, table)) == 30
    insert(300)
    assert len(stored(client, table)) == (40 if through == "input" else 30)
    # Without a window a token protects nothing, which is why set-up checks the table's setting.
    client.command(f"ALTER TABLE {table} MODIFY SETTING non_replicated_deduplication_window = 0")
    insert(400, insert_deduplication_token="b")
    insert(400, insert_deduplication_token="b")
    assert len(stored(client, table)) == (60 if through == "input" else 50)


def test_two_inserts_at_once_overlap(server: LocalClickHouse, client: Client, table: str) -> None:
    """The writer sends blocks in parallel; a server that queued them would hide races."""
    sql = f"INSERT INTO {table} (pk) SELECT pk + sleepEachRow(0.02) FROM input('pk UInt64') FORMAT JSONEachRow"

    def insert(first: int) -> None:
        with connect(server) as own:
            own.command(sql, data="".join(f'{{"pk": {pk}}}\n' for pk in range(first, first + 50)))

    with ThreadPoolExecutor(2) as threads:
        inserting = [threads.submit(insert, first) for first in (0, 50)]
        wait_until(lambda: running(client, f"INSERT INTO {table}%") == 2, what="both INSERTs")
        for done in inserting:
            done.result()
    assert len(stored(client, table)) == 100


# --- the process ----------------------------------------------------------------------------------


def test_it_listens_on_loopback_only(server: LocalClickHouse) -> None:
    """Nobody outside this machine may even try a password."""
    connections = psutil.Process(server.pid).net_connections(kind="inet")
    listening = [one.laddr for one in connections if one.status == psutil.CONN_LISTEN]
    assert [(at.ip, at.port) for at in listening] == [("127.0.0.1", server.port)]


def test_it_survives_a_kill_inside_an_insert_and_stops_beside_a_statement(tmp_path: Path) -> None:
    """Crash tests need a server that keeps what it acknowledged, nothing of the rest, and its port."""
    data = "".join(f'{{"pk": {pk}}}\n' for pk in range(100, 200))

    def insert(client: Client, delay_s: float) -> None:
        source = "FROM input('pk UInt64') SETTINGS max_block_size = 10"
        sql = f"INSERT INTO t SELECT pk + sleepEachRow({delay_s}) {source} FORMAT JSONEachRow"
        client.command(sql, data=data, settings={"insert_deduplication_token": "t", "async_insert": 0})

    def fail(sql: str, delay_s: float = 0.0) -> None:
        with connect(server) as own, pytest.raises((OperationalError, DatabaseError)):
            insert(own, delay_s) if delay_s else own.command(sql)

    with local_clickhouse(tmp_path) as server, ThreadPoolExecutor(1) as thread:
        url, killed = server.url, server.pid
        with connect(server) as client:
            client.command(f"CREATE TABLE t (pk UInt64) {DEDUPLICATED}")
            for pk in range(5):
                client.insert("t", [[pk]], settings={"insert_deduplication_token": f"t{pk}"})
            unanswered = thread.submit(fail, "", 0.1)
            wait_until(lambda: running(client, "INSERT INTO t SELECT%") == 1, what="the INSERT")
        server.kill()
        unanswered.result()
        assert not server.running
        assert not psutil.pid_exists(killed)
        assert server.start() == url, "a URL stays valid"
        with connect(server) as client:
            client.insert("t", [[4]], settings={"insert_deduplication_token": "t4"})
            assert sum(parts(client, "t")) == 5, "half of an INSERT, or a token that was forgotten"
            for _ in range(2):
                insert(client, 0)
            assert sum(parts(client, "t")) == 105
            endless = thread.submit(fail, "SELECT sleepEachRow(1) FROM numbers(600) SETTINGS max_block_size = 1")
            wait_until(lambda: running(client, "SELECT sleepEachRow%") == 1, what="the SELECT")
        stopped = server.pid
        server.stop()
        endless.result()
        assert not psutil.pid_exists(stopped)


def test_a_second_server_on_the_same_directory_fails(server: LocalClickHouse, client: Client) -> None:
    """One process per data directory: the second fails at once and harms nothing."""
    with pytest.raises(LocalServerFailed, match="ended while starting"):
        local_clickhouse(server.directory).start()
    assert client.query("SELECT 1").first_row == (1,)


def test_an_unstarted_server_has_neither_url_nor_process(tmp_path: Path) -> None:
    """A made-up address would fail later and elsewhere."""
    unstarted = local_clickhouse(tmp_path)
    unstarted.stop()
    with pytest.raises(LocalServerFailed):
        _ = unstarted.url
    with pytest.raises(LocalServerFailed):
        _ = unstarted.pid


# --- where the data of an INSERT begins -----------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "data"),
    [
        (b"INSERT INTO t FORMAT Native\n\n\x01", b"\n\x01"),
        (b"INSERT INTO t FORMAT CSV \t\r\n1", b"1"),
        (b"insert into t format CSV 1", b"1"),
        (b"INSERT INTO t (`format`, \"a'b\") SETTINGS x = 'FORMAT y' -- FORMAT z\n FORMAT CSV\n1", b"1"),
        (b"WITH 1 AS x INSERT INTO t SELECT format('{}', a) FROM input('a Int8') FORMAT CSV\n1", b"1"),
        (b"INSERT INTO t SELECT format FROM input('format Int8') FORMAT CSV\n1", b"1"),
        (b"INSERT INTO FUNCTION file('f', CSV, 'a Int8') FORMAT CSV\n1", b"1"),
        (b"INSERT INTO t FORMAT /* CSV */ TSV\n1", b"1"),
        (b"SELECT 1 FORMAT CSV", None),
        (b"INSERT INTO t VALUES (1) FORMAT CSV", None),
        (b"INSERT INTO t SELECT 1 FORMAT CSV", None),
        (b"WITH 1 AS x SELECT x FORMAT CSV", None),
        (b"(SELECT 1) FORMAT CSV", None),
        (b"INSERT INTO t SELECT 'input(' FORMAT CSV", None),
        (b"EXPLAIN INSERT INTO t FORMAT CSV", None),
        (b"INSERT INTO t SELECT '", None),
        (b"INSERT INTO t ' FORMAT CSV\n1", None),
        (b"INSERT INTO t; DROP TABLE t FORMAT CSV\n1", None),
    ],
)
def test_data_begins_after_the_format_and_one_line_end(text: bytes, data: bytes | None) -> None:
    """A byte too many or too few is silent damage; without data, a cut statement would be another one."""
    found = split_insert(text)
    assert (text[found.data_at :] if found else None) == data


def test_only_one_statement_is_run() -> None:
    """The engine would run all of them; production would refuse."""
    assert one_statement(b"SELECT ';' -- ;\n ; ; -- x", frozenset()) == b"SELECT ';' -- ;\n "
    with pytest.raises(Refused):
        one_statement(b"SELECT 1; DROP TABLE t", frozenset())
