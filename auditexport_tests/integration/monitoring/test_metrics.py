"""Metrics: their values over a real ledger, printed, in a file and served, and the dashboard and rules that use them."""

from __future__ import annotations

import dataclasses
import http.client
import json
import os
import re
import signal
import socket
import threading
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from auditexport_pipeline.cli import metrics as cli_metrics
from auditexport_pipeline.cli.metrics import OutboxCollector, OutboxReader, server_for
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.metrics import NAMES
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits, Retention, Targets
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.mysql import status, totals
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.totals import read_totals
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import event, events
from auditexport_tests.integration.docs.test_docs import RUNBOOK, _anchors
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, prompt_in, started
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.unit.test_architecture import PACKAGE

DEAD_MYSQL = "mysql+pymysql://nobody:very-secret@127.0.0.1:1/app"
BY = Actor(who="ada", why="test")
LABELS = {name: set(labels) for name, _, labels in NAMES}

Values = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def values(text: str) -> Values:
    """(name, labels) → value, by prometheus-client's own parser, which refuses malformed text."""
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def one(found: Values | str, name: str, **labels: str) -> float:
    found = values(found) if isinstance(found, str) else found
    return found[(f"auditexport_{name}", tuple(sorted(labels.items())))]


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """`auditexport …` with the URL of MySQL only."""
    monkeypatch.delenv("AUDITEXPORT_CLICKHOUSE_URL", raising=False)
    return prompt_in({"AUDITEXPORT_MYSQL_URL": stack.mysql_url}, monkeypatch)


def reader(stack: Stack, **labels: str) -> OutboxReader:
    return OutboxReader(open_outbox=lambda: stack.outbox, targets=Targets(), labels=labels)


def registry_of(*readers: OutboxReader) -> CollectorRegistry:
    registry = CollectorRegistry()
    registry.register(OutboxCollector(readers, within_s=cli_metrics.ANSWER_WITHIN_S))
    return registry


def text_of(*readers: OutboxReader) -> str:
    return generate_latest(registry_of(*readers)).decode()


# ── values ───────────────────────────────────────────────────────────────────────────────────────


def test_every_number_of_the_ledger_has_its_documented_name(stack: Stack, prompt: Prompt) -> None:
    """Dashboards use these names for years."""
    stack.put(*events(30), ("ws_1", "evt_dead", "[]"))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    stack.put(*events(4, "more"))
    stack.put(event("evt_unknown"), version='audit "log"\\v9\n')
    now_ms = stack.upkeep.now_ms()
    reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=now_ms + DAY_MS, by=BY)
    text = prompt("metrics").stdout
    found = values(text)
    expected = {
        "up": 1,
        "backlog_rows": 4,
        "backlog_capped": 0,
        "exported_rows_total": 30,
        "exported_entries_total": 30,
        "drains_at_work": 0,
        "oldest_open_batch_seconds": 0,
    }
    assert {name: one(found, name) for name in expected} == expected
    assert one(found, "dead_letters", reason="not_an_object") == 1
    assert one(found, "unknown_rows", version='audit "log"\\v9\n') == 1
    assert one(found, "batches", state="sealed") == 0
    assert one(found, "advice", about="dead_letters", severity="warning") == 1
    assert one(found, "exported_bytes_total") > 30 * 100
    for name in ("last_export", "last_verified", "last_reconcile", "read"):
        assert now_ms / 1000 - 60 < one(found, f"{name}_timestamp_seconds") <= now_ms / 1000 + 60
    assert one(found, "last_reconcile_entries", kind="missing") == 0
    assert 0 <= one(found, "lag_seconds") < 60
    assert ("auditexport_last_sweep_timestamp_seconds", ()) not in found
    assert "evt_" not in text


def test_metrics_have_help_type_and_the_documented_labels(stack: Stack, prompt: Prompt) -> None:
    """An idle system has the names too; an id as a label would be a new series for every batch."""
    text = prompt("metrics").stdout
    for name, meaning, _ in NAMES:
        assert f"# HELP {name} {meaning}\n# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}\n" in text
    stack.put(*events(3), ("ws_1", "evt_dead", "[]"))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    stack.put(event("evt_unknown"), version="v9")
    for name, labels in values(prompt("metrics", "--label", "outbox=eu").stdout):
        assert {key for key, _ in labels} == {*LABELS[name], "outbox"}
        assert ("outbox", "eu") in labels


def test_the_targets_are_metrics_too(prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rule with a number of its own would alert on a target that has been changed."""
    settings = settings_file(tmp_path, targets={"lag_s": 45, "batch_open_minutes": 2})
    monkeypatch.setenv("AUDITEXPORT_OUTBOXES", settings)
    found = values(prompt("metrics").stdout)
    assert (one(found, "lag_target_seconds"), one(found, "open_batch_target_seconds")) == (45, 120)


def test_counters_never_fall_when_batches_are_swept_or_requeued(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Prometheus takes a counter that falls for a restart, and shows a rate of millions."""
    monkeypatch.setattr(cli_metrics, "CACHE_S", 0.0)
    long_lived = reader(stack)

    def exported() -> tuple[float, float]:
        fresh, later = (values(text_of(each)) for each in (reader(stack), long_lived))
        for name in ("rows", "entries", "bytes", "batches"):
            assert one(fresh, f"exported_{name}_total") == one(later, f"exported_{name}_total")
        return one(fresh, "exported_rows_total"), one(fresh, "exported_batches_total")

    assert exported() == (0, 0)
    stack.put(*events(10))
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    assert exported() == (10, 1)
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = NULL WHERE event_id IN ('evt_1', 'evt_2')")
    assert exported() == (10, 1)
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    assert exported() == (12, 2)
    # Long ago, so that a sweep deletes the rows and compacts the batches.
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 86400000 * 400 WHERE deleted_at IS NOT NULL")
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 86400000 * 400, "
        "claimed_at_ms = claimed_at_ms - 86400000 * 400, verified_at_ms = verified_at_ms - 86400000 * 400 WHERE batch_id > 0"
    )
    retention = Retention(outbox_days=30, ledger_days=100)
    assert sweep(stack.outbox, stack.upkeep, stack.log, retention, BY).rows == 10
    stack.sql("UPDATE clickhouse_outbox_batch SET swept_at_ms = 1 WHERE swept_at_ms IS NOT NULL")
    sweep(stack.outbox, stack.upkeep, stack.log, retention, BY)
    assert stack.sql("SELECT 1 FROM clickhouse_outbox_batch WHERE state = 'compacted'")
    assert exported() == (12, 2)


def test_totals_read_only_later_batches_and_miss_none(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A ledger of years is read once, and a batch that closes late is not missed."""
    monkeypatch.setattr(totals, "PAGE_BATCHES", 2)
    for number in range(5):
        stack.put(*events(number + 1, f"evt{number}"))
        drain(stack.outbox, stack.log, Limits(), owner="run-1")
    known, total = read_totals(stack.outbox)
    assert (total.batches, total.rows, total.batch_id) == (5, 15, 5)
    assert known == total
    # Batch 3 is open now: what is below it is final, what is beyond it is read again each time.
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'sealed' WHERE batch_id = 3")
    known, total = read_totals(stack.outbox)
    assert (known.batches, known.rows, known.batch_id) == (2, 3, 2)
    assert (total.batches, total.rows) == (4, 12)
    stack.sql("UPDATE clickhouse_outbox_batch SET state = 'exported' WHERE batch_id = 3")
    known, total = read_totals(stack.outbox, known)
    assert known == total == read_totals(stack.outbox)[0]
    assert read_totals(stack.outbox, known) == (known, known)
    # A control: what is known is not read again.
    assert read_totals(stack.outbox, dataclasses.replace(known, rows=1_015))[1].rows == 1_015
    # Rows that another writer marked were not exported by this batch.
    stack.sql("UPDATE clickhouse_outbox_batch SET counts = '{\"unmarked\": 2}' WHERE batch_id = 5")
    assert read_totals(stack.outbox)[1].rows == 13


def test_an_outbox_that_is_down_does_not_affect_another(stack: Stack) -> None:
    """One scrape has both, with each family once."""
    away = OutboxReader(open_outbox=lambda: MySQLOutbox(DEAD_MYSQL), targets=Targets(lag_s=5), labels={"outbox": "us"})
    stack.put(*events(2))
    text = text_of(reader(stack, outbox="eu"), away)
    assert text.count("# TYPE auditexport_up gauge") == 1
    assert (one(text, "up", outbox="eu"), one(text, "up", outbox="us")) == (1, 0)
    assert one(text, "lag_target_seconds", outbox="us") == 5
    assert [labels for name, labels in values(text) if name == "auditexport_backlog_rows"] == [(("outbox", "eu"),)]


# ── printed, and in a file ───────────────────────────────────────────────────────────────────────


def test_without_mysql_up_is_0_and_the_rest_is_absent(prompt: Prompt, monkeypatch: pytest.MonkeyPatch) -> None:
    """An old number looks as healthy as a new one."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", DEAD_MYSQL)
    result = prompt("metrics", status=1)
    found = values(result.stdout)
    assert one(found, "up") == 0
    assert ("auditexport_backlog_rows", ()) not in found
    assert "MySQL failed while reading the status" in result.stderr
    # It names the server, the cause and the fix, and not the password.
    assert "can't connect to MySQL at 127.0.0.1:1: connection refused" in result.stderr
    assert "AUDITEXPORT_MYSQL_URL names it, then run again" in result.stderr
    assert "very-secret" not in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--every", "5"), "--every needs --file"),
        (("--file", "x.txt"), "must end in .prom"),
        (("--file", "nowhere/x.prom"), "cannot be written (No such file or directory)"),
        (("--file", "x.prom", "--listen", "127.0.0.1:1"), "give one of them"),
        (("--listen", "9469"), "must read HOST:PORT"),
        (("--listen", "127.0.0.1:http"), "must read HOST:PORT"),
        (("--listen", "192.0.2.1:9469"), "cannot be bound (Cannot assign requested address)"),
        (("--label", "outbox"), "must read NAME=VALUE"),
        (("--label", "out-box=eu"), "must read NAME=VALUE"),
        (("--every", "0", "--file", "x.prom"), "is not in the range"),
    ],
)
def test_a_wrong_call_is_refused(prompt: Prompt, arguments: tuple[str, ...], message: str) -> None:
    """A timer with a wrong call must fail with one line that says why."""
    assert message in prompt("metrics", *arguments, status=2).stderr


def test_the_file_is_replaced_whole_for_the_node_exporter(
    prompt: Prompt, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The node exporter may read at any time, as another user, and reads every *.prom in the directory."""
    path = tmp_path / "auditexport.prom"
    path.write_text("old")
    before = path.stat().st_ino
    umask = os.umask(0o077)
    try:
        prompt("metrics", "--file", str(path))
    finally:
        os.umask(umask)
    assert one(path.read_text(), "up") == 1
    assert path.stat().st_ino != before
    assert path.stat().st_mode & 0o777 == 0o644
    assert list(tmp_path.iterdir()) == [path]
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", DEAD_MYSQL)
    prompt("metrics", "--file", str(path), status=1)
    assert one(path.read_text(), "up") == 0


def test_the_file_is_written_again_until_sigterm(stack: Stack, tmp_path: Path) -> None:
    """As a service beside the node exporter, for weeks."""
    path = tmp_path / "auditexport.prom"

    def shows(rows: int) -> bool:
        return path.exists() and one(path.read_text(), "backlog_rows") == rows

    with started(stack, "metrics", "--file", str(path), "--every", "1") as process:
        wait_until(lambda: shows(0), what="the first file")
        stack.put(*events(2))
        wait_until(lambda: shows(2), what="the next one")
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0
    assert list(tmp_path.iterdir()) == [path]


# ── served ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def serving(*readers: OutboxReader) -> Iterator[str]:
    with server_for(registry_of(*readers), "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
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
    """Prometheus scrapes one path, a supervisor asks the other, and nothing else is served."""
    stack.put(*events(2))
    with serving(reader(stack)) as address:
        status, kind, text = get(address)
        assert (status, kind.split(";")[0]) == (200, "text/plain")
        assert one(text, "backlog_rows") == 2
        status, kind, text = get(address, Accept="application/openmetrics-text;version=1.0.0,text/plain;q=0.5")
        assert kind.startswith("application/openmetrics-text")
        assert any(family.name == "auditexport_exported_rows" for family in openmetrics(text))
        assert [name for name, _ in values(get(address, "/metrics?name[]=auditexport_up")[2])] == ["auditexport_up"]
        assert get(address, "/healthz")[0::2] == (200, "ok\n")
        assert get(address, "/healthz", "HEAD")[0::2] == get(address, "/metrics", "HEAD")[0::2] == (200, "")
        assert get(address, "/etc/passwd")[0] == get(address, "/etc/passwd", "HEAD")[0] == 404
        assert get(address, "/metrics", "DELETE")[0] == 501


def test_scrapes_share_one_reading_of_mysql(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two Prometheus servers and a dashboard must not be three loads."""
    readings: list[int] = []
    real = status.read_status
    monkeypatch.setattr(status, "read_status", lambda outbox: (readings.append(1), real(outbox))[1])
    begun = threading.Barrier(8)
    with serving(reader(stack)) as address, ThreadPoolExecutor(8) as threads:
        assert list(threads.map(lambda _: (begun.wait(), get(address)[0])[1], range(8))) == [200] * 8
        assert get(address)[0] == 200
    assert readings == [1]


def test_a_mysql_that_hangs_is_answered_in_time_and_asked_once(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scrape that times out has no numbers at all, and no scrape may open another connection that hangs."""
    monkeypatch.setattr(cli_metrics, "ANSWER_WITHIN_S", 0.3)
    with serving(reader(stack)) as address:
        with stack.outbox.engine.connect() as holder:
            holder.exec_driver_sql("LOCK TABLES clickhouse_outbox_batch WRITE")
            try:
                for _ in range(3):
                    assert one(get(address)[2], "up") == 0
                (reading,) = [thread for thread in threading.enumerate() if thread.name == "auditexport-metrics"]
                assert get(address, "/healthz")[0] == 200
            finally:
                holder.exec_driver_sql("UNLOCK TABLES")
        reading.join(30)
        assert one(get(address)[2], "up") == 1


def test_a_silent_client_delays_nobody_and_is_cut_off(
    stack: Stack, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Networks leave connections half open: none may keep a thread or fill the log."""
    monkeypatch.setattr(cli_metrics, "CLIENT_TIMEOUT_S", 0.5)
    with serving(reader(stack)) as address:
        host, _, port = address.partition(":")
        with socket.create_connection((host, int(port)), timeout=30) as silent:
            assert get(address)[0] == 200
            assert silent.recv(1) == b""
    assert capfd.readouterr().err == ""


def test_the_command_serves_until_sigterm(stack: Stack) -> None:
    """As a service: it serves metrics, and logs nothing."""
    with started(stack, "metrics", "--listen", "127.0.0.1:0") as process:
        assert process.stderr is not None
        found = re.fullmatch(r"serving (http://127\.0\.0\.1:\d+/metrics)\n", process.stderr.readline())
        assert found
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        with opener.open(found[1], timeout=30) as answer:
            assert one(answer.read().decode(), "up") == 1
        process.send_signal(signal.SIGTERM)
        assert process.communicate(timeout=30) == ("", "")
    assert process.returncode == 0


# ── dashboard and rules ──────────────────────────────────────────────────────────────────────────

DEPLOY = PACKAGE / "deploy"
DASHBOARD: dict[str, Any] = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
RULES: list[dict[str, Any]] = [
    rule for group in yaml.safe_load((DEPLOY / "prometheus-rules.yml").read_text())["groups"] for rule in group["rules"]
]


def named(text: str) -> set[str]:
    return set(re.findall(r"\bauditexport_(?!pipeline)\w+", text))


def labels_of(expression: str) -> set[str]:
    """Labels that the series of an expression have."""
    return {"instance", "job"}.union(*(LABELS[name] for name in named(expression)))


def expressions(value: Any) -> Iterator[str]:
    """Every PromQL text of the dashboard: targets and variables."""
    for key, each in value.items() if isinstance(value, dict) else enumerate(value):
        if key in ("expr", "definition", "query") and isinstance(each, str) and "auditexport" in each:
            yield each
        elif isinstance(each, (dict, list)):
            yield from expressions(each)


def test_dashboard_and_rules_use_metrics_and_labels_that_exist() -> None:
    """A panel without a metric is empty, and an alert on one never fires: both look like health."""
    used = [*expressions(DASHBOARD), *(rule["expr"] for rule in RULES)]
    assert len(used) > 30
    for expression in used:
        assert named(expression) <= LABELS.keys()
        for name, matchers in re.findall(r"(auditexport_\w+)\{([^}]*)\}", expression):
            assert set(re.findall(r"(\w+)\s*(?:=~|!~|!=|=)", matchers)) <= labels_of(name)
    assert not named("rate(auditexport_no_such_metric[5m])") <= LABELS.keys()  # a control
    for rule in RULES:
        assert set(re.findall(r"\$labels\.(\w+)", str(rule["annotations"]))) <= labels_of(rule["expr"])
    for target in (target for panel in DASHBOARD["panels"] for target in panel.get("targets", [])):
        assert set(re.findall(r"\{\{(\w+)\}\}", target["legendFormat"])) <= labels_of(target["expr"])


def test_every_rule_says_how_bad_what_and_where_to_read_on() -> None:
    """An engineer who is called at night has the alert's text and nothing else."""
    anchors = _anchors(RUNBOOK)
    assert "no-such-heading" not in anchors
    assert len({rule["alert"] for rule in RULES}) == len(RULES)
    for rule in RULES:
        assert rule["labels"]["severity"] in ("critical", "warning")
        assert rule["for"]
        assert len(rule["annotations"]["summary"]) > 20
        assert rule["annotations"]["description"].endswith((".", "?"))
        page, _, heading = rule["annotations"]["runbook"].partition("#")
        assert (page, heading in anchors) == ("auditexport_pipeline/docs/runbook.md", True)


def test_the_dashboard_can_be_imported_into_any_grafana() -> None:
    """Its data source is a variable, and the ids of its panels are unique."""
    variables = {variable["name"]: variable for variable in DASHBOARD["templating"]["list"]}
    assert (variables["datasource"]["type"], variables["datasource"]["query"]) == ("datasource", "prometheus")
    assert DASHBOARD["id"] is None
    panels = DASHBOARD["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    for panel in panels:
        if panel["type"] != "row":
            assert panel["title"]
            assert panel["description"]
            assert {each["datasource"]["uid"] for each in (panel, *panel["targets"])} == {"${datasource}"}
    assert set(re.findall(r"\$\{?(\w+)\}?", json.dumps(DASHBOARD))) <= {*variables, "__rate_interval", "__all"}


def test_the_page_documents_every_metric_and_every_setting() -> None:
    """The names are a contract; `auditexport metrics` prints their meaning."""
    page = " ".join((PACKAGE / "docs" / "alerts.md").read_text().split())
    for name, _, labels in NAMES:
        by = " and ".join(f"`{label}`" for label in labels)
        assert (f"`{name}` by {by}" if by else f"`{name}`") in page
    assert named(page) == LABELS.keys()
