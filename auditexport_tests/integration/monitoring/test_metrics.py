"""Metrics: what they say of a real ledger, how they are handed out, and that dashboards and rules name only what exists."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from auditexport_pipeline.cli import main
from auditexport_pipeline.cli import metrics as cli_metrics
from auditexport_pipeline.cli.metrics import Reader, server_for
from auditexport_pipeline.core.actions import By
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.metrics import NAMES, Totals
from auditexport_pipeline.core.notices import POLICY_VARIABLES, Policy
from auditexport_pipeline.core.reconcile import DAY_MS, reconcile
from auditexport_pipeline.core.sweep import Retention, sweep
from auditexport_pipeline.core.targets import Targets
from auditexport_pipeline.mysql import totals
from auditexport_pipeline.mysql.totals import read_totals
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import event, events
from auditexport_tests.integration.docs.test_docs import RUNBOOK, _anchors
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.unit.test_architecture import PACKAGE

DEAD_MYSQL = "mysql+pymysql://nobody:very-secret@127.0.0.1:1/app"
DEPLOY = PACKAGE / "deploy"
KNOWN = {name for name, _, _ in NAMES}

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def values(text: str) -> Values:
    """(name, labels) → value, by prometheus-client's own parser, which refuses what is malformed."""
    found = {}
    for family in text_string_to_metric_families(text):
        assert family.documentation, f"{family.name} has no HELP"
        assert family.type in ("gauge", "counter"), f"{family.name} has no TYPE"
        for sample in family.samples:
            found[(sample.name, tuple(sorted(sample.labels.items())))] = sample.value
    return found


def one(found: Values, name: str, **labels: str) -> float:
    return found[(name, tuple(sorted(labels.items())))]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Types `auditexport metrics …` against this test's MySQL."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.delenv("AUDITEXPORT_CLICKHOUSE_URL", raising=False)

    def typed(*arguments: str) -> Result:
        return CliRunner().invoke(main, ["metrics", *arguments])

    return typed


def reader(stack: Stack, **labels: str) -> Reader:
    return Reader(lambda: stack.outbox, Targets(), labels)


# ── what they say ────────────────────────────────────────────────────────────────────────────────


def test_every_number_of_the_ledger_is_told_under_its_documented_name(stack: Stack, prompt: Any) -> None:
    """Dashboards hold these names for years; each is checked against what was really done."""
    stack.put(*events(30))
    stack.put(("ws_1", "evt_dead", "[]"))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    stack.put(*events(4, "more"))
    stack.put(event("evt_unknown"), version='audit "log"\\v9\n')
    reconcile(
        stack.outbox,
        stack.upkeep,
        stack.log,
        from_ms=0,
        to_ms=stack.upkeep.now_ms() + DAY_MS,
        by=By(who="ada", why="test"),
    )
    result = prompt()
    assert result.exit_code == 0, result.output
    found = values(result.stdout)
    assert {name for name, _ in found} <= KNOWN
    expected = {
        "auditexport_up": 1,
        "auditexport_backlog_rows": 4,
        "auditexport_backlog_capped": 0,
        "auditexport_exported_rows_total": 30,
        "auditexport_exported_entries_total": 30,
        "auditexport_drains_at_work": 0,
        "auditexport_lag_target_seconds": 300,
        "auditexport_oldest_open_batch_seconds": 0,
    }
    assert {name: one(found, name) for name in expected} == expected
    assert one(found, "auditexport_dead_letters", reason="not_an_object") == 1
    assert one(found, "auditexport_unknown_rows", version='audit "log"\\v9\n') == 1
    assert one(found, "auditexport_batches", state="sealed") == 0
    assert one(found, "auditexport_advice", about="dead_letters", severity="warning") == 1
    assert one(found, "auditexport_exported_bytes_total") > 30 * 100
    now_s = stack.upkeep.now_ms() / 1000
    for name in ("last_export", "last_verified", "last_reconcile", "read"):
        assert now_s - 60 < one(found, f"auditexport_{name}_timestamp_seconds") <= now_s + 1
    assert one(found, "auditexport_last_reconcile_entries", kind="missing") == 0
    assert 0 <= one(found, "auditexport_lag_seconds") < 60
    assert ("auditexport_last_sweep_timestamp_seconds", ()) not in found
    assert "evt_" not in result.stdout


def test_every_metric_has_help_and_type_also_when_there_is_no_sample(prompt: Any) -> None:
    """Whoever builds a dashboard on an idle system finds the names all the same."""
    text = prompt().stdout
    for name, meaning, _ in NAMES:
        assert f"# HELP {name} {meaning}\n" in text
        assert f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text


def test_labels_are_the_documented_ones(stack: Stack, prompt: Any) -> None:
    """An id as a label would be a new series a batch."""
    stack.put(*events(3), ("ws_1", "evt_dead", "[]"))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    stack.put(event("evt_unknown"), version="v9")
    documented = {name: set(labels) for name, _, labels in NAMES}
    for name, labels in values(prompt("--label", "outbox=eu").stdout):
        assert {key for key, _ in labels} == {*documented[name], "outbox"}
        assert ("outbox", "eu") in labels


def test_targets_are_told_for_the_rules_to_compare_with(prompt: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a number of its own would page for a target that nobody has any more."""
    monkeypatch.setenv("AUDITEXPORT_TARGET_LAG_S", "45")
    monkeypatch.setenv("AUDITEXPORT_TARGET_BATCH_OPEN_MINUTES", "2")
    found = values(prompt().stdout)
    assert one(found, "auditexport_lag_target_seconds") == 45
    assert one(found, "auditexport_open_batch_target_seconds") == 120


def test_counters_never_go_back_when_batches_are_swept_compacted_or_requeued(stack: Stack) -> None:
    """A counter that falls reads as a restart, and a rate of millions."""
    asked = reader(stack)

    def exported() -> tuple[float, float]:
        fresh = values(reader(stack).exposition().decode())
        asked._at_s = -100.0
        kept = values(asked.exposition().decode())
        for name in ("rows", "entries", "bytes", "batches"):
            assert one(fresh, f"auditexport_exported_{name}_total") == one(kept, f"auditexport_exported_{name}_total")
        return one(fresh, "auditexport_exported_rows_total"), one(fresh, "auditexport_exported_batches_total")

    assert exported() == (0, 0)
    stack.put(*events(10))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    assert exported() == (10, 1)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE event_id IN ('evt_1', 'evt_2')")
    assert exported() == (10, 1)
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    assert exported() == (12, 2)
    # Long ago, so that a sweep takes the rows and the compaction their pks.
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 86400000 * 400 WHERE deleted_at IS NOT NULL")
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 86400000 * 400, "
        "claimed_at_ms = claimed_at_ms - 86400000 * 400, verified_at_ms = verified_at_ms - 86400000 * 400 WHERE batch_id > 0"
    )
    by = By(who="ada", why="test")
    done = sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=30, ledger_days=100), by)
    assert done.rows == 10
    stack.sql("UPDATE clickhouse_outbox_batch SET swept_at_ms = 1 WHERE swept_at_ms IS NOT NULL")
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(outbox_days=30, ledger_days=100), by)
    states = {str(row.state) for row in stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0")}
    assert "compacted" in states
    assert exported() == (12, 2)


def test_rows_that_somebody_else_marked_are_not_counted_as_exported(stack: Stack) -> None:
    """The counter is of rows that we marked; what others took is another's."""
    stack.put(*events(5))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    stack.sql("UPDATE clickhouse_outbox_batch SET counts = '{\"unmarked\": 2}' WHERE batch_id > 0")
    _, total = read_totals(stack.outbox)
    assert (total.batches, total.rows) == (1, 3)


def test_only_what_is_new_is_added_up_and_nothing_is_missed_around_open_batches(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A ledger of years is read once; and a batch that closes late must not fall between two looks."""
    monkeypatch.setattr(totals, "PAGE_BATCHES", 2)
    for number in range(5):
        stack.put(*events(number + 1, f"evt{number}"))
        drain(stack.outbox, stack.log, Limits(), owner="run-1")
    known, total = read_totals(stack.outbox)
    assert (total.batches, total.rows, total.batch_id) == (5, 15, 5)
    assert known == total
    # Batch 3 turns out to be open: below it is for good, beyond it is counted anew each time.
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'sealed' WHERE batch_id = 3")
    known, total = read_totals(stack.outbox)
    assert (known.batches, known.rows, known.batch_id) == (2, 3, 2)
    assert (total.batches, total.rows) == (4, 12)
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 3")
    known, total = read_totals(stack.outbox, known)
    assert known == total == read_totals(stack.outbox)[0]
    assert (total.batches, total.rows, total.batch_id) == (5, 15, 5)
    assert read_totals(stack.outbox, known) == (known, known)
    # A control: what is known is really not read again.
    assert read_totals(stack.outbox, known + Totals(rows=1_000))[1].rows == 1_015


# ── printed ──────────────────────────────────────────────────────────────────────────────────────


def test_without_mysql_up_is_zero_and_the_rest_absent_rather_than_old(
    prompt: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A number that nobody has read looks as healthy as one that somebody has."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", DEAD_MYSQL)
    result = prompt()
    assert result.exit_code == 1
    found = values(result.stdout)
    assert one(found, "auditexport_up") == 0
    assert ("auditexport_backlog_rows", ()) not in found
    assert "MySQL failed while reading the status" in result.stderr
    # To which server, why, and what to do; not with which password.
    assert "can't connect to MySQL at 127.0.0.1:1: connection refused" in result.stderr
    assert "AUDITEXPORT_MYSQL_URL names it, then run again" in result.stderr
    assert "very-secret" not in result.output


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--every", "5"), "--every needs --file"),
        (("--file", "x.txt"), "must end in .prom"),
        (("--file", "nowhere/x.prom"), "nowhere is no directory"),
        (("--file", "x.prom", "--listen", "127.0.0.1:1"), "give one of them"),
        (("--listen", "9469"), "must read HOST:PORT"),
        (("--listen", "127.0.0.1:http"), "must read HOST:PORT"),
        (("--label", "outbox"), "must read NAME=VALUE"),
        (("--label", "out-box=eu"), "must read NAME=VALUE"),
        (("--every", "0", "--file", "x.prom"), "is not in the range"),
    ],
)
def test_a_wrong_call_is_refused(prompt: Any, arguments: tuple[str, ...], told: str) -> None:
    """A timer that calls it wrongly must fail, not write nothing for a year."""
    result = prompt(*arguments)
    assert result.exit_code == 2
    assert told in result.stderr


# ── in a file ────────────────────────────────────────────────────────────────────────────────────


def test_the_file_is_replaced_whole_and_readable_by_the_node_exporter(
    stack: Stack, prompt: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector may read at any instant, as another user, and takes every *.prom in the directory."""
    path = tmp_path / "auditexport.prom"
    path.write_text("old")
    before = path.stat().st_ino
    stack.put(*events(3))
    assert prompt("--file", str(path)).exit_code == 0
    assert one(values(path.read_text()), "auditexport_backlog_rows") == 3
    assert path.stat().st_ino != before
    assert path.stat().st_mode & 0o777 == 0o644
    assert [each.name for each in tmp_path.iterdir()] == ["auditexport.prom"]
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", DEAD_MYSQL)
    assert prompt("--file", str(path)).exit_code == 1
    assert one(values(path.read_text()), "auditexport_up") == 0


def test_every_so_often_it_is_written_again_until_it_is_stopped(stack: Stack, tmp_path: Path) -> None:
    """As a service beside the node exporter, for weeks."""
    path = tmp_path / "auditexport.prom"
    process = subprocess.Popen(
        [sys.executable, "-m", "auditexport_pipeline.cli", "metrics", "--file", str(path), "--every", "1"],
        env={**os.environ, "AUDITEXPORT_MYSQL_URL": stack.mysql_url},
        stderr=subprocess.PIPE,
    )

    def shows(rows: int) -> bool:
        return path.exists() and one(values(path.read_text()), "auditexport_backlog_rows") == rows

    try:
        wait_until(lambda: shows(0), what="the first file")
        stack.put(*events(2))
        wait_until(lambda: shows(2), what="the next one")
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 0
    assert errors == b""
    assert [each.name for each in tmp_path.iterdir()] == ["auditexport.prom"]


# ── served ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def serving(asked: Reader) -> Iterator[str]:
    server = server_for(asked, "127.0.0.1", 0)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield f"127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def get(address: str, path: str = "/metrics", method: str = "GET", **headers: str) -> tuple[int, str, str]:
    connection = http.client.HTTPConnection(address, timeout=30)
    try:
        connection.request(method, path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.headers["Content-Type"], answer.read().decode()
    finally:
        connection.close()


def test_the_endpoint_serves_metrics_and_health_and_nothing_else(stack: Stack) -> None:
    """What Prometheus scrapes and what a supervisor asks; a metrics port is no place for more."""
    stack.put(*events(2))
    with serving(reader(stack)) as address:
        status, kind, text = get(address)
        assert (status, kind.split(";")[0]) == (200, "text/plain")
        assert one(values(text), "auditexport_backlog_rows") == 2
        asked = "application/openmetrics-text;version=1.0.0,text/plain;q=0.5"
        status, kind, text = get(address, Accept=asked)
        assert kind.startswith("application/openmetrics-text")
        assert any(family.name == "auditexport_exported_rows" for family in openmetrics(text))
        assert get(address, "/healthz")[0::2] == (200, "ok\n")
        assert get(address, "/metrics", "HEAD")[0::2] == (200, "")
        assert get(address, "/etc/passwd")[0] == 404
        assert get(address, "/metrics", "DELETE")[0] == 501


def test_scrapes_share_one_look_at_mysql(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Prometheus servers and a dashboard must not be three loads, and never two at once."""
    looks: list[int] = []
    at_once: list[int] = []
    begun = threading.Barrier(9)
    real = cli_metrics.metrics_of
    under_way = threading.Semaphore(1)

    def counted(*arguments: Any, **named: Any) -> object:
        at_once.append(under_way.acquire(blocking=False))
        looks.append(1)
        try:
            return real(*arguments, **named)
        finally:
            under_way.release()

    monkeypatch.setattr(cli_metrics, "metrics_of", counted)
    with serving(reader(stack)) as address:
        answers: list[int] = []

        def scrape() -> None:
            begun.wait()
            answers.append(get(address)[0])

        threads = [threading.Thread(target=scrape) for _ in range(8)]
        for thread in threads:
            thread.start()
        begun.wait()
        for thread in threads:
            thread.join()
        assert answers == [200] * 8
        assert get(address)[0] == 200
    assert looks == [1]
    assert at_once == [True]


def test_a_mysql_that_hangs_is_answered_in_time_and_asked_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape that times out is no number at all; and each one must not leave another hanging connection."""
    monkeypatch.setattr(cli_metrics, "ANSWER_WITHIN_S", 0.3)
    asked = reader(stack)
    with serving(asked) as address:
        with stack.outbox.engine.connect() as holder:
            holder.exec_driver_sql("LOCK TABLES clickhouse_outbox_batch WRITE")
            try:
                for _ in range(3):
                    assert one(values(get(address)[2]), "auditexport_up") == 0
                looking = [thread for thread in threading.enumerate() if thread.name == "auditexport-metrics"]
                assert len(looking) == 1
                assert get(address, "/healthz")[0] == 200
            finally:
                holder.exec_driver_sql("UNLOCK TABLES")
        for thread in looking:
            thread.join(30)
        assert one(values(get(address)[2]), "auditexport_up") == 1


def test_mysql_may_go_and_come_back_under_a_running_endpoint(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A restart of MySQL must not need one of ours."""
    monkeypatch.setattr(cli_metrics, "CACHE_S", 0.0)
    with serving(reader(stack)) as address:
        assert one(values(get(address)[2]), "auditexport_up") == 1
        stack.sql("RENAME TABLE clickhouse_outbox_batch TO elsewhere")
        assert one(values(get(address)[2]), "auditexport_up") == 0
        stack.sql("RENAME TABLE elsewhere TO clickhouse_outbox_batch")
        assert one(values(get(address)[2]), "auditexport_up") == 1


def test_a_client_that_says_nothing_holds_nobody_up(stack: Stack) -> None:
    """One half-open connection is an everyday thing of a network."""
    with serving(reader(stack)) as address:
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port))):
            assert get(address)[0] == 200


def test_the_command_serves_until_it_is_stopped(stack: Stack) -> None:
    """As a service: an address in, metrics out, SIGTERM ends it without a trace."""
    process = subprocess.Popen(
        [sys.executable, "-m", "auditexport_pipeline.cli", "metrics", "--listen", "127.0.0.1:0"],
        env={**os.environ, "AUDITEXPORT_MYSQL_URL": stack.mysql_url},
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        found = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/metrics)\n", line)
        assert found, line
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(found[1], timeout=30) as answer:
            assert one(values(answer.read().decode()), "auditexport_up") == 1
    finally:
        process.send_signal(signal.SIGTERM)
        _, errors = process.communicate(timeout=30)
    assert (process.returncode, errors) == (0, "")


def test_a_port_that_is_taken_is_one_line(stack: Stack, prompt: Any) -> None:
    """A traceback in a service's log sends people the wrong way."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        result = prompt("--listen", f"127.0.0.1:{taken.getsockname()[1]}")
    assert result.exit_code == 2
    assert "cannot be bound (Address already in use)" in result.stderr


# ── dashboard and rules ──────────────────────────────────────────────────────────────────────────


def dashboard() -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    return loaded


def rules() -> list[dict[str, Any]]:
    loaded = yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())
    return [rule for group in loaded["groups"] for rule in group["rules"]]


def named(text: str) -> set[str]:
    return set(re.findall(r"\bauditexport_(?!pipeline)\w+", text))


def expressions(value: Any) -> Iterator[str]:
    """Every PromQL text of the dashboard: targets and variables."""
    if isinstance(value, dict):
        for key, each in value.items():
            if key in ("expr", "definition", "query") and isinstance(each, str) and "auditexport" in each:
                yield each
            yield from expressions(each)
    elif isinstance(value, list):
        for each in value:
            yield from expressions(each)


def test_the_dashboard_and_the_rules_name_only_metrics_that_we_export() -> None:
    """A panel of a metric that does not exist is empty, and an alert of one never fires: both look like health."""
    shown = {name for text in expressions(dashboard()) for name in named(text)}
    alarmed = {name for rule in rules() for name in named(rule["expr"])}
    assert shown - KNOWN == set()
    assert alarmed - KNOWN == set()
    # And nothing that is measured is left out of the picture, but what others stand for.
    assert KNOWN - shown == {
        "auditexport_backlog_capped",
        "auditexport_exported_entries_total",
        "auditexport_exported_batches_total",
        "auditexport_held_rows",
        "auditexport_last_sweep_rows",
        "auditexport_last_sweep_timestamp_seconds",
        "auditexport_rows_per_second",
        "auditexport_view_failures",
    }
    assert named("rate(auditexport_no_such_metric[5m])") - KNOWN  # the check can fail


def test_labels_in_rules_and_dashboard_exist(stack: Stack) -> None:
    """A label that a metric does not have matches nothing."""
    labels = {name: set(names) for name, _, names in NAMES}
    target = {"instance", "job"}
    for rule in rules():
        for name, matchers in re.findall(r"(auditexport_\w+)\{([^}]*)\}", rule["expr"]):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels[name] | target
        told = set(re.findall(r"\$labels\.(\w+)", " ".join(rule["annotations"].values())))
        assert told <= set().union(*(labels[name] for name in named(rule["expr"]))) | target
    for text in expressions(dashboard()):
        for name, matchers in re.findall(r"(auditexport_\w+)\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels[name] | target
    for panel in dashboard()["panels"]:
        for each in panel.get("targets", []):
            known = set().union(*(labels[name] for name in named(each["expr"]))) | target
            assert set(re.findall(r"\{\{(\w+)\}\}", each["legendFormat"])) <= known


def test_every_rule_says_how_bad_what_and_where_to_read_on() -> None:
    """Whoever is called at night has the alert's text and nothing else."""
    names = [rule["alert"] for rule in rules()]
    anchors = _anchors(RUNBOOK)
    assert "no-such-heading" not in anchors
    assert len(names) == len(set(names))
    for rule in rules():
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["for"]
        assert len(rule["annotations"]["summary"]) > 20
        assert rule["annotations"]["description"].endswith((".", "?"))
        page, _, heading = rule["annotations"]["runbook"].partition("#")
        assert page == "auditexport_pipeline/docs/runbook.md"
        assert heading in anchors


def test_the_dashboard_can_be_imported_into_any_grafana() -> None:
    """Its data source is a variable; ids of panels are unique, and no panel lies upon another."""
    board = dashboard()
    variables = {variable["name"]: variable for variable in board["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    assert variables["datasource"]["query"] == "prometheus"
    assert board["id"] is None
    panels = board["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    cells = set()
    for panel in panels:
        at = panel["gridPos"]
        assert at["x"] + at["w"] <= 24
        covered = {(x, y) for x in range(at["x"], at["x"] + at["w"]) for y in range(at["y"], at["y"] + at["h"])}
        assert not cells & covered, panel["title"]
        cells |= covered
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}"
            assert panel["title"]
            assert panel["description"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(board))) <= {*variables, "__rate_interval", "__all"}


def test_the_page_documents_every_metric_and_every_setting_as_it_is() -> None:
    """The names are a contract, and the page is where it is read."""
    page = (PACKAGE / "docs" / "alerts.md").read_text()
    for name, meaning, labels in NAMES:
        assert f"| `{name}` | {', '.join(f'`{label}`' for label in labels)} | {meaning} |" in page
    assert set(re.findall(r"\bauditexport_(?!pipeline)\w+", page)) == KNOWN
    for setting in dataclasses.fields(Policy):
        assert f"| `{POLICY_VARIABLES}{setting.name.upper()}` | {setting.default:g} |" in page
        assert f"{POLICY_VARIABLES}{setting.name.upper()}" in str(Policy.__doc__)


def test_both_are_in_the_package() -> None:
    """`pip install` has to bring what the operations page tells people to copy."""
    data = re.search(
        r"^auditexport_pipeline = \[([^]]*)\]", (PACKAGE.parent / "pyproject.toml").read_text(), re.MULTILINE
    )
    assert data
    patterns = re.findall(r'"([^"]+)"', data[1])
    for name in ("deploy/grafana-dashboard.json", "deploy/prometheus-rules.yml", "mysql/totals.sql"):
        assert any(Path(name).match(pattern) for pattern in patterns), name
