"""No payload and no secret in logs, metadata, errors, Dagster's storage, temporary files or process lists.

What belongs here: real processes through success, failure and crash, and a search of everything that they left. What
does not: how to search (`canaries`).
"""

from __future__ import annotations

import json
import signal
import sqlite3
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, closing
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import dagster as dg
import pytest

from auditexport_pipeline.local.processes import Child, free_port
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter
from auditexport_tests.integration.dagster.test_launches import LOCATION, START_SENSOR, Page
from auditexport_tests.integration.security.canaries import Search, Watch, encodings, new_canary
from auditexport_tests.integration.security.conftest import Servers
from auditexport_tests.integration.security.gate import Gate, Mode
from auditexport_tests.integration.security.site import WITHIN_S, Site, new_site
from auditexport_tests.integration.security.test_loopback import listening, reachable_from_elsewhere
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.waiting import wait_until

MYSQL, CLICKHOUSE = "AUDITEXPORT_MYSQL_URL", "AUDITEXPORT_CLICKHOUSE_URL"
CLI = (
    ("doctor",),
    ("reconcile",),
    ("doctor", "--json", "--role", "reader"),
    ("reconcile", "--json"),
    ("dead-letters", "list"),
    ("dead-letters", "list", "--json"),
    ("requeue", "--workspace", "ws_1", "--why", "a look", "--dry-run"),
    ("requeue", "--workspace", "ws_1", "--why", "a look", "--dry-run", "--missing-only", "--json"),
    ("sweep", "--outbox-days", "0", "--dry-run"),
    ("status",),
    ("status", "--json"),
    ("batches", "list"),
    ("batches", "show", "1"),
    ("batches", "show", "1", "--json"),
    ("drain",),
)


@pytest.fixture
def site(own_stack: Stack, servers: Servers) -> Iterator[Site]:
    # A path of its own: pytest's is too long for the sockets that multiprocessing makes beneath TMPDIR.
    with tempfile.TemporaryDirectory(prefix="aex-") as directory:
        made = new_site(Path(directory), own_stack, servers)
        yield made
        made.record_statements(on=False)
        for user in ("exporter", "second"):
            made.expel(user)


@pytest.fixture
def heartbeat() -> Iterator[int]:
    """The port of a check that answers 500: a ping that fails is logged."""

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Broken) as server:
        thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server.server_port
        server.shutdown()
        thread.join()


class Steps:
    """Steps for `program`, with one environment that each may change in part."""

    def __init__(self, site: Site, heartbeat: int, gate: Gate) -> None:
        self.always = {
            MYSQL: site.mysql_url("exporter", "MySQL password"),
            CLICKHOUSE: site.clickhouse_url(gate),
            "AUDITEXPORT_HEARTBEAT_URL": f"http://127.0.0.1:{heartbeat}/{site.secrets['heartbeat URL']}",
        }
        config = site.directory / "run.json"
        config.write_text(json.dumps({"ops": {"audit_logs_raw_v1": {"config": {"batch_rows": 10}}}}))
        self._job = ["dagster", "job", "execute", "-m", "auditexport_pipeline.definitions", "-j"]
        self._drain = [*self._job, "audit_log_export", "-c", str(config)]

    def drain(self, name: str, *, fault: str = "", **environment: str) -> dict[str, object]:
        return self._step(name, self._drain, environment, fault)

    def reconcile(self, name: str, **environment: str) -> dict[str, object]:
        return self._step(name, [*self._job, "reconcile_audit_logs"], environment, "")

    def prompt(self, name: str, arguments: tuple[str, ...], **environment: str) -> dict[str, object]:
        return self._step(name, ["auditexport", *arguments], environment, "")

    def _step(self, name: str, command: list[str], environment: dict[str, str], fault: str) -> dict[str, object]:
        return {"name": name, "command": command, "fault": fault, "environment": {**self.always, **environment}}


@pytest.mark.slow
def test_nothing_of_events_and_secrets_is_found_after_success_failure_and_crash(site: Site, heartbeat: int) -> None:
    """Many people read logs, run records and temporary files who may not read the audited events."""
    site.admit("exporter", "MySQL password")
    site.admit("second", "second password")
    with ExitStack() as running:

        def gate(mode: Mode) -> Gate:
            password = site.password("ClickHouse password")
            return running.enter_context(Gate(site.servers.clickhouse.url, password, site.search, mode))

        passing, cutting, echoing, holding, expelling = map(gate, ("pass", "cut", "echo", "hold", "pass"))
        watch = running.enter_context(Watch(site.search, site.directory / "tmp"))
        passing.on_insert = watch.look
        expelling.on_insert = lambda: site.expel("second")
        steps = Steps(site, heartbeat, passing)

        rows = site.insert("one", 12)
        site.record_statements(on=True)
        came_to = site.run(
            "drains",
            [
                steps.drain("no answer", **{CLICKHOUSE: site.clickhouse_url(cutting)}),
                steps.drain("an error that quotes", **{CLICKHOUSE: site.clickhouse_url(echoing)}),
                steps.drain(
                    "refused in the middle",
                    **{CLICKHOUSE: site.clickhouse_url(expelling), MYSQL: site.mysql_url("second", "second password")},
                ),
                steps.drain("a defect that quotes", fault="defect"),
                *(steps.drain(name, **wrong_setups(site, passing)[name]) for name in DRAINED),
                steps.drain("success"),
            ],
            watch,
        )
        statuses = dict(came_to)
        assert statuses.pop("success") == "0", site.outputs[-1]
        assert set(statuses.values()) == {"1"}, site.outputs[-1]
        assert len(statuses) == 4 + len(DRAINED)
        assert (cutting.inserts, echoing.inserts, expelling.inserts) >= (1, 1, 1)
        letters = [row.pk for row in site.stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter")]
        # MySQL stores some of them in a form that is taken: a key that is given twice, a number of 70 bits.
        assert len(letters) in (12, 14)
        assert site.stack.counts() == (rows - len(letters), rows - len(letters))

        site.record_statements(on=False)
        site.insert("two", 3)
        site.record_statements(on=True)
        killed = [steps.drain("killed", **{CLICKHOUSE: site.clickhouse_url(holding)})]
        assert not site.run("crash", killed, watch, lambda: wait_until(lambda: holding.inserts, what="an INSERT"))

        # One entry differs from what was sent: now a comparison sends payloads of that batch to be parsed.
        site.stack.clickhouse(
            "ALTER TABLE audit_logs_raw_v1 UPDATE source = 'altered' WHERE event_id = 'one_3' SETTINGS mutations_sync = 2"
        )
        shown = [("dead-letters", "show", str(letter)) for letter in letters]
        came_to = site.run(
            "prompt",
            [
                *(steps.prompt(" ".join(words), words) for words in (*CLI, *shown)),
                steps.reconcile("the job"),
                steps.reconcile("the job, an error that quotes", **{CLICKHOUSE: site.clickhouse_url(echoing)}),
                steps.prompt("an error that quotes", ("reconcile",), **{CLICKHOUSE: site.clickhouse_url(echoing)}),
                *(
                    steps.prompt(f"{name}: {' '.join(words)}", words, **environment)
                    for name, environment in wrong_setups(site, passing).items()
                    for words in CLI[:2]
                ),
            ],
            watch,
        )
        assert came_to["doctor"] == "0", site.outputs[-1]
        assert came_to["reconcile"] == "1", site.outputs[-1]
        assert came_to["the job, an error that quotes"] == "1", site.outputs[-1]
        assert came_to["an error that quotes"] == "2", site.outputs[-1]
        assert "altered" in site.outputs[-1]
        assert "traceback" not in came_to.values(), site.outputs[-1]
        assert [came_to[" ".join(words)] for words in shown] == ["0"] * len(letters)
        site.record_statements(on=False)

    search = site.look_everywhere()
    print(f"\n{search.table()}")
    assert not search.all_hits(), "\n".join(search.all_hits())
    assert_it_was_all_there(site, search)


@pytest.mark.slow
def test_nothing_is_found_around_a_run_that_the_daemon_launches(site: Site, heartbeat: int) -> None:
    """Daemon, code server, run worker and steps pass settings on command lines and in records of their own."""
    site.admit("exporter", "MySQL password")
    rows = site.insert("launched", 3)
    site.record_statements(on=True)
    port = free_port()
    home = site.directory / "dagster_home"
    with (
        Gate(site.servers.clickhouse.url, site.password("ClickHouse password"), site.search, "pass") as passing,
        Watch(site.search, site.directory / "tmp") as watch,
    ):
        passing.on_insert = watch.look
        command = ["dev", "-w", str(ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
        server = Child(
            "Dagster",
            [sys.executable, "-m", "dagster", *command],
            log=site.directory / "output" / "dev",
            env={
                **site.environment(),
                **Steps(site, heartbeat, passing).always,
                "AUDITEXPORT_EXECUTOR": "multiprocess",
                "AUDITEXPORT_OUTBOXES": settings_file(site.directory, sensor_rows=1),
            },
            stop_signal=signal.SIGINT,
        )
        watch.pid = server.pid
        try:
            wait_until(lambda: ("127.0.0.1", port) in listening(server.pid), what="the page", within_s=WITHIN_S)
            with dg.DagsterInstance.from_config(str(home)) as instance:
                page = Page(url=f"http://127.0.0.1:{port}", exporter=Exporter(home=home, instance=instance))
                page.ask(START_SENSOR, selector={**LOCATION, "sensorName": "outbox_backlog_sensor"})
                (record, *_) = wait_until(page.runs, what="a run", within_s=WITHIN_S)
                assert page.wait_for(record.dagster_run.run_id).is_success
            assert not reachable_from_elsewhere(listening(server.pid))
        finally:
            server.stop()
    site.record_statements(on=False)
    dead = len(site.stack.sql("SELECT pk FROM clickhouse_outbox_dead_letter"))
    assert site.stack.counts() == (rows - dead, rows - dead)
    search = site.look_everywhere()
    print(f"\n{search.table()}")
    assert not search.all_hits(), "\n".join(search.all_hits())
    assert passing.inserts >= 1


def wrong_setups(site: Site, passing: Gate) -> dict[str, dict[str, str]]:
    """Typical mistakes in the two URLs, each with a secret in it."""
    unquoted = site.secrets["unquoted password"]
    return {
        "wrong MySQL password": {MYSQL: site.mysql_url("exporter", "wrong password")},
        "no MySQL": {MYSQL: site.mysql_url("exporter", "MySQL password", port=1)},
        "no MySQL URL": {MYSQL: f"exporter:{unquoted} at the usual place"},
        "unquoted in MySQL's URL": {MYSQL: f"mysql+pymysql://exporter:12@{unquoted}@127.0.0.1:1/app"},
        "wrong ClickHouse password": {CLICKHOUSE: site.clickhouse_url(passing, "wrong password")},
        "no ClickHouse": {CLICKHOUSE: f"http://default:{unquoted}@127.0.0.1:1/default"},
        "unquoted in ClickHouse's URL": {CLICKHOUSE: f"http://default:{unquoted}#@127.0.0.1:8123/audit"},
        "unquoted after digits": {CLICKHOUSE: f"http://default:12?{unquoted}=@127.0.0.1:8123/audit"},
        "unquoted with a slash": {CLICKHOUSE: f"http://default:12/{unquoted}@127.0.0.1:8123/audit"},
        "another ClickHouse URL": {CLICKHOUSE: f"clickhouse://default:{unquoted}@127.0.0.1/audit"},
    }


# With these a drain is run too: the databases refuse two, and the program two.
DRAINED = (
    *("wrong MySQL password", "wrong ClickHouse password"),
    *("unquoted in MySQL's URL", "unquoted with a slash"),
)


def assert_it_was_all_there(site: Site, search: Search) -> None:
    """A search without hits proves something only where something was read."""
    for place in (
        "DAGSTER_HOME",
        "DAGSTER_HOME: SQLite values",
        "standard output and error",
        "process lists, during",
        "MySQL: our tables",
        "MySQL: every statement received",
        "MySQL: the server's log",
        "ClickHouse: statements, URLs and headers received",
    ):
        assert search.places[place].bytes > 1_000, place
    with closing(sqlite3.connect(site.directory / "dagster_home" / "history" / "runs.db")) as runs:
        run_ids = [run_id for (run_id,) in runs.execute("SELECT run_id FROM runs")]
    assert len(run_ids) == 4 + len(DRAINED) + 1 + 1 + 2  # failures, success, crash, reconciliations
    found = Search(
        {"a run's id": run_ids[0], "a letter's reason": "identity_mismatch", "a log line": "the heartbeat/start"}
    )
    found.look_at_files("DAGSTER_HOME", site.directory / "dagster_home")
    assert "a run's id" in str(found.hits("DAGSTER_HOME: SQLite values"))
    assert "a log line" in str(found.hits("DAGSTER_HOME: SQLite values"))


@pytest.mark.slow
def test_the_search_finds_what_a_leaky_run_leaves_in_every_place(site: Site, heartbeat: int) -> None:
    """The negative control: the search can find something in each place."""
    site.admit("exporter", "MySQL password")
    site.insert("leaky", 2)
    site.record_statements(on=True)
    with (
        Gate(site.servers.clickhouse.url, site.password("ClickHouse password"), site.search, "pass") as passing,
        Watch(site.search, site.directory / "tmp") as watch,
    ):
        passing.on_insert = watch.look
        came_to = site.run("leaky", [Steps(site, heartbeat, passing).drain("leaky", fault="leak")], watch)
        assert came_to == {"leaky": "0"}, site.outputs[-1]
    site.record_statements(on=False)
    for log in (site.servers.mysql.log, site.servers.clickhouse.directory / "server.log"):
        with log.open("a") as appended:
            appended.write(f"planted {site.events['description']} {site.secrets['MySQL password']}\n")
    search = site.look_everywhere()
    print(f"\n{search.table()}")
    for place in (
        "DAGSTER_HOME",
        "DAGSTER_HOME: SQLite values",
        "standard output and error",
        "temporary files, during",
        "temporary files, after",
        "files without a name, during",
        "home directory",
        "process lists, during",
        "MySQL: our tables",
        "MySQL: every statement received",
        "MySQL: the server's log",
        "ClickHouse: statements, URLs and headers received",
        "ClickHouse: the server's log",
    ):
        hits = str(search.hits(place))
        assert "description" in hits, place
        assert "MySQL password" in hits, place
    kinds = ("leaked.gz", "compute_logs")
    assert all(any(kind in hit for hit in search.hits("DAGSTER_HOME")) for kind in kinds)


@pytest.mark.parametrize("before", range(3))
def test_an_encoded_canary_is_recognised(before: int) -> None:
    """Logs are often encoded: Basic authentication is base64, a driver shows bytes as hex."""
    import base64
    import zlib

    canary = new_canary()
    search = Search({"it": canary})
    text = b"x" * before + canary.encode() + b" and more"
    search.look("base64", "text", b"seen: " + base64.b64encode(text))
    search.look("hex", "text", text.hex().encode())
    search.look("zlib", "text", zlib.compress(text * 50))
    search.look("nothing", "text", new_canary().encode(), *encodings(new_canary()).values())
    assert [bool(search.hits(place)) for place in ("base64", "hex", "zlib", "nothing")] == [True, True, True, False]
