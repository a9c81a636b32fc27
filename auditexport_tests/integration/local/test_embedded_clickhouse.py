"""The embedded ClickHouse answers as a server would, on the wire and over its own crashes."""

from __future__ import annotations

import base64
import gzip
import json
import multiprocessing
import socket
import threading
import uuid
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path

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
DEDUPLICATED = "ENGINE = MergeTree ORDER BY pk SETTINGS non_replicated_deduplication_window = 100"


def connect(server: LocalClickHouse) -> Client:
    return clickhouse_connect.get_client(dsn=server.url, autogenerate_session_id=False)


def address(server: LocalClickHouse) -> str:
    return f"http://127.0.0.1:{httpx.URL(server.url).port}/"


def json_rows(count: int, *, first: int = 0) -> list[bytes]:
    """One JSON document a row, with what breaks naive splitting: quotes, line feeds, semicolons, unicode."""
    rows = ({"pk": first + n, "note": f'row {first + n}: it\'s a "Zoë";\nFORMAT x'} for n in range(count))
    return [json.dumps(row, ensure_ascii=False).encode() + b"\n" for row in rows]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalClickHouse]:
    with local_clickhouse(tmp_path_factory.mktemp("clickhouse"), password=None) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: LocalClickHouse) -> Iterator[Client]:
    with connect(server) as connected:
        yield connected


@pytest.fixture
def http(server: LocalClickHouse) -> Iterator[httpx.Client]:
    login = ("default", httpx.URL(server.url).password)
    with httpx.Client(base_url=address(server), auth=login, timeout=60, trust_env=False) as connected:
        yield connected


@pytest.fixture
def table(client: Client) -> Iterator[str]:
    """A name of its own for the test's table, which is dropped afterwards."""
    name = f"t_{uuid.uuid4().hex}"
    yield name
    client.command(f"DROP TABLE IF EXISTS {name} SYNC")


def number(client: Client, sql: str, **parameters: str) -> int:
    """The one number that `sql` gives."""
    [(value,)] = client.query(sql, parameters=parameters).result_rows
    return int(value)


def count(client: Client, table: str) -> int:
    return number(client, f"SELECT count() FROM {table}")


def running(client: Client, like: str) -> int:
    """How many statements like this one run at this moment."""
    return number(client, "SELECT count() FROM system.processes WHERE query LIKE {like:String}", like=like)


def parts(client: Client, table: str) -> list[int]:
    """Rows of each active part, as they were written."""
    sql = "SELECT rows FROM system.parts WHERE active AND database = 'default' AND table = {t:String}"
    return [rows for (rows,) in client.query(sql, parameters={"t": table}).result_rows]


class TestBodies:
    @pytest.mark.parametrize("encoding", COMPRESSORS)
    def test_every_frame_of_a_compressed_body_is_read(
        self, http: httpx.Client, client: Client, table: str, encoding: str
    ) -> None:
        """Reading only the first frame loses rows without an error."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) ENGINE = MergeTree ORDER BY pk")
        frames = [b"".join(json_rows(700, first=700 * frame)) for frame in range(5)]
        body = b"".join(COMPRESSORS[encoding](frame) for frame in frames)
        answer = http.post(
            "/",
            params={"query": f"INSERT INTO {table} FORMAT JSONEachRow"},
            content=body,
            headers={"Content-Encoding": encoding},
        )
        assert answer.status_code == 200, answer.text
        found = client.query(f"SELECT pk, note FROM {table} ORDER BY pk").result_rows
        expected = [json.loads(row) for row in b"".join(frames).split(b"\n")[:-1]]
        assert found == [(row["pk"], row["note"]) for row in expected]

    @pytest.mark.parametrize("encoding", COMPRESSORS)
    def test_a_body_cut_inside_a_frame_is_refused_whole(
        self, http: httpx.Client, client: Client, table: str, encoding: str
    ) -> None:
        """A shorter body that parses would be a shorter INSERT that was acknowledged."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) ENGINE = MergeTree ORDER BY pk")
        frame = COMPRESSORS[encoding](b"".join(json_rows(500)))
        answer = http.post(
            "/",
            params={"query": f"INSERT INTO {table} FORMAT JSONEachRow"},
            content=frame + frame[: len(frame) // 2],
            headers={"Content-Encoding": encoding},
        )
        assert answer.headers["X-ClickHouse-Exception-Code"] == "271"
        assert count(client, table) == 0

    def test_an_upload_that_breaks_off_writes_nothing(
        self, server: LocalClickHouse, client: Client, table: str
    ) -> None:
        """The rows that did arrive are whole lines, so nothing but the missing end tells."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) ENGINE = MergeTree ORDER BY pk")
        body = b"".join(json_rows(1000))
        login = base64.b64encode(f"default:{httpx.URL(server.url).password}".encode()).decode()
        head = (
            f"POST /?query=INSERT%20INTO%20{table}%20FORMAT%20JSONEachRow HTTP/1.1\r\n"
            f"Host: 127.0.0.1\r\nAuthorization: Basic {login}\r\nContent-Length: {len(body) + 1}\r\n\r\n"
        )
        port = httpx.URL(server.url).port
        assert port is not None
        with socket.create_connection(("127.0.0.1", port)) as broken:
            broken.sendall(head.encode() + body)
            own_port = broken.getsockname()[1]
        process = psutil.Process(server.pid)
        wait_until(
            lambda: all(c.raddr.port != own_port for c in process.net_connections() if c.raddr),
            what="the end of the connection",
        )
        assert count(client, table) == 0

    @pytest.mark.parametrize("compress", ["lz4", "zstd", "gzip", False])
    def test_a_native_insert_of_ten_columns_arrives_byte_for_byte(
        self, server: LocalClickHouse, table: str, compress: str | bool
    ) -> None:
        """The Native block of ten columns begins with a line feed, which is data and not layout."""
        names = [f"c{n}" for n in range(10)]
        rows = [[f"{row}.{n}\n" for n in range(10)] for row in range(3000)]
        with clickhouse_connect.get_client(dsn=server.url, compress=compress) as client:
            columns = ", ".join(f"{name} String" for name in names)
            client.command(f"CREATE TABLE {table} ({columns}) ENGINE = MergeTree ORDER BY c0")
            summary = client.insert(table, rows, column_names=names)
            found = client.query(f"SELECT * FROM {table} ORDER BY toUInt32(splitByChar('.', c0)[1])")
        assert summary.written_rows == 3000
        assert [list(row) for row in found.result_rows] == rows

    def test_types_of_all_kinds_come_back_as_they_were_inserted(self, client: Client, table: str) -> None:
        """Native carries each type in its own way, in both directions."""
        client.command(
            f"CREATE TABLE {table} (u UInt64, s LowCardinality(String), n Nullable(Int32),"
            " d DateTime64(3, 'UTC'), a Array(String), t Tuple(x Int8, y String), m Map(String, UInt8),"
            " f Float64, b Bool, i UUID,"
            " e Enum8('a' = 1)) ENGINE = MergeTree ORDER BY u"
        )
        row = (
            *(
                2**64 - 1,
                "Zoë\n'",
                None,
                datetime(2025, 3, 1, 2, 3, 4, 567000),
                ["", "x"],
                {"x": -1, "y": "q"},
            ),
            *({"k": 7}, 0.1, True, uuid.UUID(int=5), "a"),
        )
        client.insert(table, [row])
        assert client.query(f"SELECT * FROM {table}").result_rows == [row]

    @pytest.mark.parametrize("encoding", [None, *COMPRESSORS])
    def test_rows_through_input_come_by_command_and_by_raw_insert(
        self, client: Client, table: str, encoding: str | None
    ) -> None:
        """The export's own statement looks so; the text before the data holds quotes and brackets."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String, kind String) {DEDUPLICATED}")
        sql = (
            f"INSERT INTO {table} (pk, note, kind) SELECT pk, note, ')FORMAT CSV' /* input('x') */"
            " FROM input('pk UInt64, note String') SETTINGS max_threads = 1 FORMAT JSONEachRow"
        )
        data = b"".join(json_rows(2500))
        if encoding is None:
            summary = client.command(sql, data=data)
            assert summary.written_rows == 2500  # type: ignore[union-attr]
        else:
            body = COMPRESSORS[encoding](sql.encode() + b"\n" + data)
            summary = client.raw_insert("", insert_block=body, compression=encoding)
            assert summary.written_rows == 2500
        expected = [(row["pk"], row["note"], ")FORMAT CSV") for row in map(json.loads, json_rows(2500))]
        assert client.query(f"SELECT pk, note, kind FROM {table} ORDER BY pk").result_rows == expected

    def test_one_insert_of_100_megabytes_is_one_part_and_leaves_no_file(
        self, server: LocalClickHouse, client: Client, table: str
    ) -> None:
        """Blocks must not depend on how the body arrived, and a body must not stay on the disk."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) {DEDUPLICATED}")
        pad = "x" * 2000
        data = b"".join(b'{"pk": %d, "note": "%s"}\n' % (pk, pad.encode()) for pk in range(50_000))
        settings = {
            "insert_deduplication_token": "hundred",
            "min_insert_block_size_bytes": 0,
            "async_insert": 0,
        }
        for sql in (
            f"INSERT INTO {table} SELECT pk, note FROM input('pk UInt64, note String') FORMAT JSONEachRow",
            f"INSERT INTO {table} (pk, note) FORMAT JSONEachRow",
        ):
            client.command(f"TRUNCATE TABLE {table}")
            for _ in range(2):
                client.command(sql, data=data, settings=settings)
            assert parts(client, table) == [50_000]
        assert list((server.directory / "tmp").iterdir()) == []
        assert (server.directory / "tmp").stat().st_mode & 0o777 == 0o700

    def test_values_written_into_the_statement_are_inserted(
        self, http: httpx.Client, client: Client, table: str
    ) -> None:
        """VALUES is statement and data in one, in the URL or in the body."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) ENGINE = MergeTree ORDER BY pk")
        client.command(f"INSERT INTO {table} VALUES (1, 'a;b'), (2, 'FORMAT CSV');")
        answer = http.post("/", params={"query": f"INSERT INTO {table} VALUES"}, content=b"(3, 'c'), (4, '\\'')")
        assert answer.status_code == 200, answer.text
        assert client.query(f"SELECT note FROM {table} ORDER BY pk").result_columns == [["a;b", "FORMAT CSV", "c", "'"]]

    def test_data_may_sit_in_the_url_in_the_body_or_in_both(
        self, http: httpx.Client, client: Client, table: str
    ) -> None:
        """A server joins both with one line feed; clients rely on either form."""
        client.command(f"CREATE TABLE {table} (pk UInt64) ENGINE = MergeTree ORDER BY pk")
        sql = f"INSERT INTO {table} FORMAT CSV"
        for query, body in (
            (sql, b"1\n"),
            ("", f"{sql}\n2\n".encode()),
            ("", f"{sql} 3".encode()),
            (f"{sql}\n4", b"5"),
        ):
            answer = http.post("/", params={"query": query} if query else {}, content=body)
            assert answer.status_code == 200, answer.text
        assert client.query(f"SELECT groupArray(pk) FROM (SELECT pk FROM {table} ORDER BY pk)").result_rows == [
            ([1, 2, 3, 4, 5],)
        ]

    @pytest.mark.parametrize("encoding", [*COMPRESSORS, ""])
    def test_the_answer_is_compressed_as_the_client_asks(self, http: httpx.Client, encoding: str) -> None:
        """A client that did not ask, or cannot, must get plain bytes."""
        decompress: dict[str, Callable[[bytes], bytes]] = {
            "lz4": lz4.frame.decompress,
            "zstd": zstandard.ZstdDecompressor().decompress,
            "gzip": gzip.decompress,
            "": bytes,
        }
        with http.stream(
            "POST",
            "/",
            params={"enable_http_compression": "1"},
            content=b"SELECT number FROM numbers(3) FORMAT CSV",
            headers={"Accept-Encoding": encoding},
        ) as answer:
            raw = b"".join(answer.iter_raw())
        assert answer.headers.get("Content-Encoding", "") == encoding
        assert decompress[encoding](raw) == b"0\n1\n2\n"


class TestStatements:
    def test_query_parameters_keep_every_character(self, client: Client) -> None:
        """A parameter that changes on the way selects other rows."""
        text = "Zoë\t\n\\ '\"`; -- {x:String} %2B+&"
        sql = "SELECT {text:String}, {numbers:Array(UInt64)}, {day:Date}, {nothing:Nullable(String)}"
        values = {"text": text, "numbers": [1, 2**63], "day": "2025-03-01", "nothing": None}
        [row] = client.query(sql, parameters=values).result_rows
        assert row == (text, [1, 2**63], datetime(2025, 3, 1).date(), None)

    def test_parameters_too_long_for_a_url_arrive_up_to_the_limit_of_a_server(self, client: Client) -> None:
        """Long parameters silently become a form, which a server refuses past 128 KiB a field."""
        sql = "SELECT sum(p), count() FROM (SELECT arrayJoin({pks:Array(UInt64)}) AS p)"
        pks = list(range(20_000))
        assert client.query(sql, parameters={"pks": pks}).result_rows == [(sum(pks), len(pks))]
        with pytest.raises(DatabaseError) as raised:
            client.query(sql, parameters={"pks": list(range(40_000))})
        assert raised.value.code == 1000

    def test_settings_parameters_and_databases_end_with_their_request(self, http: httpx.Client, client: Client) -> None:
        """A token or a limit that leaks into the next INSERT loses its rows."""
        name = f"d_{uuid.uuid4().hex}"
        client.command(f"CREATE DATABASE {name}")
        ask = "SELECT getSetting('max_block_size'), getSetting('insert_deduplication_token'), currentDatabase()"
        before = http.post("/", content=ask).text
        settings = {
            "max_block_size": "17",
            "insert_deduplication_token": "t'1",
            "database": name,
            "param_x": "1",
        }
        assert http.post("/", params=settings, content=ask).text == f"17\tt\\'1\t{name}\n"
        assert [http.post("/", content=ask).text for _ in range(20)] == [before] * 20
        assert http.post("/", content="SET max_block_size = 18").status_code == 200
        assert http.post("/", content=ask).text == before
        assert http.post("/", content="SELECT {x:String}").headers["X-ClickHouse-Exception-Code"] == "456"
        client.command(f"DROP DATABASE {name}")

    def test_settings_of_concurrent_requests_do_not_mix(self, server: LocalClickHouse) -> None:
        """Two blocks of a batch are written at once, each under its own token."""
        wrong: list[tuple[int, str]] = []

        def ask(number: int) -> None:
            login = ("default", httpx.URL(server.url).password)
            with httpx.Client(base_url=address(server), auth=login, timeout=60, trust_env=False) as http:
                for turn in range(40):
                    value = 1 + number * 1000 + turn
                    answer = http.post(
                        "/", params={"max_block_size": value}, content="SELECT getSetting('max_block_size')"
                    )
                    if answer.text != f"{value}\n":
                        wrong.append((value, answer.text))

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert wrong == []

    def test_the_answer_names_query_format_zone_and_figures(self, http: httpx.Client) -> None:
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

    def test_a_get_request_cannot_write(self, http: httpx.Client, client: Client, table: str) -> None:
        """A server makes GET read-only; code that writes by GET works nowhere else."""
        answer = http.get("/", params={"query": f"CREATE TABLE {table} (pk UInt8) ENGINE = Memory"})
        assert answer.headers["X-ClickHouse-Exception-Code"] == "164"
        assert client.command(f"EXISTS TABLE {table}") == 0
        assert http.get("/", params={"query": "SELECT 5"}).text == "5\n"


class TestErrors:
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
        ],
    )
    def test_an_error_has_the_status_code_and_name_of_the_server(
        self, http: httpx.Client, sql: str, status: int, code: int, name: str
    ) -> None:
        """Transient and permanent errors are told apart by these."""
        answer = http.post("/", content=sql)
        assert answer.status_code == status
        assert answer.headers["X-ClickHouse-Exception-Code"] == str(code)
        assert answer.text.startswith(f"Code: {code}. DB::Exception: ")
        assert f"({name})" in answer.text

    def test_an_unknown_setting_is_refused(self, http: httpx.Client) -> None:
        """A misspelt async_insert must not be ignored."""
        answer = http.post("/", params={"async_insrt": "0"}, content="SELECT 1")
        assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (404, "115")

    def test_a_statement_past_its_time_ends_with_code_159(self, client: Client) -> None:
        """The exporter bounds its statements by max_execution_time, request by request."""
        with pytest.raises(DatabaseError) as raised:
            client.query(
                "SELECT sleepEachRow(0.1) FROM numbers(100) SETTINGS max_block_size = 1",
                settings={"max_execution_time": 1},
            )
        assert raised.value.code == 159
        assert number(client, "SELECT getSetting('max_execution_time')") == 0

    def test_a_bad_row_refuses_the_whole_block(self, client: Client, table: str) -> None:
        """An INSERT of one block is all or nothing; the export sets bad rows aside by bisecting."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) ENGINE = MergeTree ORDER BY pk")
        data = b"".join(json_rows(500)) + b'{"pk": "x"}\n'
        for sql in (
            f"INSERT INTO {table} SELECT pk, note FROM input('pk UInt64, note String') FORMAT JSONEachRow",
            f"INSERT INTO {table} FORMAT JSONEachRow",
        ):
            with pytest.raises(DatabaseError) as raised:
                client.command(sql, data=data)
            assert raised.value.code in (27, 117)
        assert count(client, table) == 0

    def test_a_form_may_hold_the_statement_alone(self, http: httpx.Client) -> None:
        """A client that sends its parameters as a form does so also where there are none."""
        answer = http.post("/", files={"query": (None, "SELECT 1 + 1")})
        assert (answer.status_code, answer.text) == (200, "2\n")

    def test_only_the_password_of_this_start_is_let_in(self, server: LocalClickHouse, tmp_path: Path) -> None:
        """Whatever runs on this machine finds the port; the password is in the URL that the starter has, and nowhere else."""
        password = httpx.URL(server.url).password or ""
        assert len(password) >= 16, "a password that nobody guesses"
        given = [None, ("default", ""), ("default", "secret"), ("other", password), ("default", password)]
        answers = [httpx.post(address(server), content="SELECT 1", auth=login, trust_env=False) for login in given]
        assert [answer.status_code for answer in answers] == [403, 403, 403, 403, 200]
        assert answers[0].headers["X-ClickHouse-Exception-Code"] == "516"
        assert password not in (server.directory / "server.log").read_text()
        with LocalClickHouse(tmp_path, python=server.python) as another:
            assert httpx.URL(another.url).password != password

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
    @pytest.mark.parametrize("method", ["GET", "POST"])
    def test_a_web_page_gets_nothing(self, http: httpx.Client, method: str, headers: dict[str, str]) -> None:
        """A page that is open on the same machine can send requests here, by address or by DNS rebinding."""
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
            "CREATE VIEW reaching AS SELECT * FROM url('http://127.0.0.1:1/', LineAsString)",
            "INSERT INTO FUNCTION file('{path}', LineAsString) SELECT 'x'",
            "INSERT INTO FUNCTION file('{path}', LineAsString) FORMAT CSV\nx",
            "SELECT 'x' INTO OUTFILE '{path}' TRUNCATE FORMAT CSV",
            "INSERT INTO reaching FROM INFILE '{path}' FORMAT CSV",
            "BACKUP DATABASE default TO File('{path}')",
            "SELECT * FROM remote('192.0.2.1', system.one)",
            "SELECT * FROM mysql('127.0.0.1:1', 'd', 't', 'u', 'p')",
            "SELECT * FROM s3('http://127.0.0.1:1/x', 'CSV', 'a String')",
            "SELECT * FROM executable('cat', CSV, 'a String')",
        ],
    )
    def test_files_and_networks_are_out_of_a_requests_reach(
        self, http: httpx.Client, tmp_path: Path, reaching: str
    ) -> None:
        """The engine runs with the rights of whoever started it; a statement must not."""
        path = tmp_path / "kept.csv"
        path.write_text("kept")
        answer = http.post("/", params={"param_t": str(path)}, content=reaching.replace("{path}", str(path)))
        assert (answer.status_code, answer.headers.get("X-ClickHouse-Exception-Code")) == (403, "497")
        assert path.read_text() == "kept"

    def test_names_that_only_look_like_reaching_out_are_let_in(self, http: httpx.Client) -> None:
        """Columns and texts are called file and url everywhere."""
        harmless = "SELECT number AS file, '/a' AS url, 'file(' AS `a.b` FROM numbers(1) WHERE url IN ('/a', 'url(')"
        assert http.post("/", content=harmless).text == "0\t/a\tfile(\n"

    def test_what_is_not_supported_is_refused_and_not_guessed(self, http: httpx.Client) -> None:
        """A body read under the wrong encoding would be rubbish in the table."""
        for params, headers in (({"decompress": "1"}, {}), ({}, {"Content-Encoding": "br"})):
            answer = http.post("/", params=params, headers=headers, content=b"SELECT 1")
            assert (answer.status_code, answer.headers["X-ClickHouse-Exception-Code"]) == (501, "48")


class TestEngine:
    @pytest.mark.parametrize("through", ["input", "format", "native"])
    def test_the_same_token_twice_is_written_once(self, client: Client, table: str, through: str) -> None:
        """Exactly-once rests on this, and on the token: without it a replay through input() duplicates."""
        client.command(f"CREATE TABLE {table} (pk UInt64, note String) {DEDUPLICATED}")

        def insert(first: int, **settings: str) -> None:
            data = b"".join(json_rows(10, first=first))
            given: dict[str, object] = {"async_insert": 0, "wait_end_of_query": 1, **settings}
            if through == "native":
                client.insert(table, [(pk, "n") for pk in range(first, first + 10)], settings=given)
                return
            source = " SELECT pk, note FROM input('pk UInt64, note String')" if through == "input" else ""
            client.command(f"INSERT INTO {table} (pk, note){source} FORMAT JSONEachRow", data=data, settings=given)

        insert(0, insert_deduplication_token="a")
        insert(100, insert_deduplication_token="a")
        assert count(client, table) == 10
        # The negative controls: without the token both blocks stay, and content alone identifies a
        # block of plain data, but not one that a SELECT made (deduplicate_insert_select).
        insert(200)
        insert(300)
        assert count(client, table) == 30
        insert(300)
        assert count(client, table) == (40 if through == "input" else 30)

    def test_without_a_window_a_token_protects_nothing(self, client: Client, table: str) -> None:
        """The negative control, and the reason why set-up must check the table's setting."""
        client.command(f"CREATE TABLE {table} (pk UInt64) ENGINE = MergeTree ORDER BY pk")
        for _ in range(2):
            client.insert(table, [[1]], settings={"insert_deduplication_token": "a"})
        assert count(client, table) == 2

    def test_two_inserts_at_once_overlap(self, server: LocalClickHouse, client: Client, table: str) -> None:
        """The writer sends blocks in parallel; a server that queued them would hide races."""
        client.command(f"CREATE TABLE {table} (pk UInt64, started DateTime64(6), ended DateTime64(6)) {DEDUPLICATED}")
        sql = (
            f"INSERT INTO {table} SELECT pk, now64(6), now64(6) + sleepEachRow(0.02) * 0"
            " FROM input('pk UInt64') FORMAT JSONEachRow"
        )

        def insert(first: int) -> None:
            data = "".join(f'{{"pk": {pk}}}\n' for pk in range(first, first + 100))
            with connect(server) as own:
                own.command(sql, data=data)

        threads = [threading.Thread(target=insert, args=(first,)) for first in (0, 100)]
        for thread in threads:
            thread.start()
        wait_until(lambda: running(client, f"INSERT INTO {table}%") == 2, what="both INSERTs")
        for thread in threads:
            thread.join()
        assert count(client, table) == 200


def insert_from_elsewhere(dsn: str, table: str, number: int) -> None:
    with clickhouse_connect.get_client(dsn=dsn) as client:
        for block in range(5):
            first = number * 1000 + block * 100
            client.insert(table, [[pk] for pk in range(first, first + 100)], column_names=["pk"])


class TestProcess:
    def test_several_processes_write_at_once(self, server: LocalClickHouse, client: Client, table: str) -> None:
        """A chDB directory serves one process; the server in front of it is there for this."""
        client.command(f"CREATE TABLE {table} (pk UInt64) ENGINE = MergeTree ORDER BY pk")
        spawn = multiprocessing.get_context("spawn")
        writers = [spawn.Process(target=insert_from_elsewhere, args=(server.url, table, number)) for number in range(3)]
        for writer in writers:
            writer.start()
        for writer in writers:
            writer.join()
        assert [writer.exitcode for writer in writers] == [0, 0, 0]
        assert client.query(f"SELECT count(), uniqExact(pk) FROM {table}").result_rows == [(1500, 1500)]

    def test_it_listens_on_loopback_only(self, server: LocalClickHouse) -> None:
        """Nobody outside this machine may even try a password."""
        listening = [
            connection.laddr
            for connection in psutil.Process(server.pid).net_connections(kind="inet")
            if connection.status == psutil.CONN_LISTEN
        ]
        assert [(at.ip, at.port) for at in listening] == [("127.0.0.1", httpx.URL(server.url).port)]

    @pytest.mark.parametrize("end", ["kill", "stop"])
    def test_acknowledged_rows_survive_and_the_port_is_used_again(self, tmp_path: Path, end: str) -> None:
        """A crash test proves nothing on a server that forgets or cannot come back."""
        server = local_clickhouse(tmp_path)
        try:
            url = server.start()
            with connect(server) as client:
                client.command(f"CREATE TABLE t (pk UInt64) {DEDUPLICATED}")
                for pk in range(20):
                    client.insert("t", [[pk]], settings={"insert_deduplication_token": f"t{pk}"})
                first_pid = server.pid
                getattr(server, end)()
                assert not psutil.pid_exists(first_pid)
                assert not server.running
                assert server.start() == url
                assert server.pid != first_pid
            with connect(server) as client:
                client.insert("t", [[19]], settings={"insert_deduplication_token": "t19"})
                assert client.query("SELECT count(), sum(pk) FROM t").result_rows == [(20, 190)]
        finally:
            server.stop()

    def test_a_kill_inside_an_insert_leaves_nothing_and_a_replay_completes_it(self, tmp_path: Path) -> None:
        """An INSERT without an answer is replayed under its token; half of it must never be there."""
        data = "".join(f'{{"pk": {pk}}}\n' for pk in range(100))
        settings = {"insert_deduplication_token": "t", "async_insert": 0}

        def insert(client: Client, delay_s: float) -> None:
            source = "FROM input('pk UInt64') SETTINGS max_block_size = 10"
            sql = f"INSERT INTO t SELECT pk + sleepEachRow({delay_s}) {source} FORMAT JSONEachRow"
            client.command(sql, data=data, settings=settings)

        with local_clickhouse(tmp_path) as server:
            with connect(server) as client:
                client.command(f"CREATE TABLE t (pk UInt64) {DEDUPLICATED}")

            def insert_without_an_answer() -> None:
                with connect(server) as own, pytest.raises((OperationalError, DatabaseError)):
                    insert(own, 0.1)

            thread = threading.Thread(target=insert_without_an_answer)
            thread.start()
            with connect(server) as client:
                wait_until(lambda: running(client, "INSERT INTO t %") == 1, what="the INSERT")
            server.kill()
            thread.join()
            server.start()
            with connect(server) as client:
                assert count(client, "t") == 0
                for _ in range(2):
                    insert(client, 0)
                assert parts(client, "t") == [100]

    def test_a_running_statement_does_not_hold_up_the_stop(self, tmp_path: Path) -> None:
        """Whoever stops the local stack waits for it; an endless statement must not make that endless."""
        server = local_clickhouse(tmp_path)
        with server:
            address_, pid = address(server), server.pid

            def run() -> None:
                with pytest.raises(httpx.HTTPError):
                    httpx.post(
                        address_,
                        content="SELECT sleepEachRow(1) FROM numbers(600) SETTINGS max_block_size = 1",
                        timeout=60,
                        trust_env=False,
                    ).raise_for_status()

            thread = threading.Thread(target=run)
            thread.start()
            with connect(server) as client:
                wait_until(lambda: running(client, "SELECT sleepEachRow%") == 1, what="the SELECT")
            server.stop()
            thread.join()
        assert not psutil.pid_exists(pid)

    def test_a_second_server_on_the_same_directory_says_so(self, server: LocalClickHouse) -> None:
        """One process per data directory: the second fails at once and harms nothing."""
        second = local_clickhouse(server.directory)
        with pytest.raises(LocalServerFailed, match="ended while starting"):
            second.start()
        with connect(server) as client:
            assert client.query("SELECT 1").first_row == (1,)

    def test_an_unstarted_server_has_neither_url_nor_process(self, tmp_path: Path) -> None:
        """A made-up address would fail later and elsewhere."""
        unstarted = local_clickhouse(tmp_path)
        unstarted.stop()
        with pytest.raises(LocalServerFailed):
            _ = unstarted.url
        with pytest.raises(LocalServerFailed):
            _ = unstarted.pid


class TestWhereDataBegins:
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
        ],
    )
    def test_after_the_format_and_one_line_end(self, text: bytes, data: bytes) -> None:
        """A byte too many or too few is silent damage."""
        found = split_insert(text)
        assert found is not None
        assert text[found.data_at :] == data

    @pytest.mark.parametrize(
        "text",
        [
            b"SELECT 1 FORMAT CSV",
            b"INSERT INTO t VALUES (1) FORMAT CSV",
            b"INSERT INTO t SELECT 1 FORMAT CSV",
            b"WITH 1 AS x SELECT x FORMAT CSV",
            b"(SELECT 1) FORMAT CSV",
            b"INSERT INTO t SELECT 'input(' FORMAT CSV",
            b"EXPLAIN INSERT INTO t FORMAT CSV",
            b"INSERT INTO t SELECT '",
            b"INSERT INTO t ' FORMAT CSV\n1",
            b"INSERT INTO t; DROP TABLE t FORMAT CSV\n1",
        ],
    )
    def test_statements_without_data_are_left_alone(self, text: bytes) -> None:
        """Cutting a statement at a word it only mentions would run another one."""
        assert split_insert(text) is None

    def test_only_one_statement_is_run(self) -> None:
        """The engine would run all of them; production would refuse."""
        assert one_statement(b"SELECT ';' -- ;\n ; ; -- x", frozenset()) == b"SELECT ';' -- ;\n "
        with pytest.raises(Refused):
            one_statement(b"SELECT 1; DROP TABLE t", frozenset())
