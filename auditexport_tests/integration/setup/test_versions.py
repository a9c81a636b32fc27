"""A second payload version, through the public API only: routed, decoded, exported, verified, reconciled, requeued."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from auditexport_pipeline import PayloadVersion, preflight, register_version
from auditexport_pipeline.clickhouse import audit_log
from auditexport_pipeline.clickhouse.engines import LOCAL, Engine, Layout
from auditexport_pipeline.core import versions
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.core.versions import PIECES, VERSIONS, statements_of
from auditexport_pipeline.report.figures import gather
from auditexport_pipeline.roles import Role, clickhouse_grants
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import (
    ROOT,
    Exporter,
    empty_home,
    event,
    events,
    exporter,
    home,
    ledger,
)
from auditexport_tests.integration.dagster.test_automation import Sensor, requests
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.producers import billing
from auditexport_tests.support.prompts import Prompt, prompt_in, urls

NAME = "billing_event.v1"
SQL = Path(billing.__file__).with_name("billing_event_v1.sql")


def invoice(number: int, **fields: object) -> tuple[str, str, str]:
    """A row for `Stack.put(…, version=NAME)`."""
    payload = {
        "event_id": f"bill_{number}",
        "time": 1_760_000_000_000 + number,
        "workspace_id": "ws_1",
        "invoice_id": f"inv_{number}",
        "amount_cents": 100 * number,
        "currency": "EUR",
        "lines": [{"sku": "seat", "quantity": number}, {"sku": "größe", "quantity": -1}],
        "unknown to us": {"is": ["skipped"]},
        **fields,
    }
    return "ws_1", f"bill_{number}", json.dumps(payload)


def invoices(count: int) -> list[tuple[str, str, str]]:
    return [invoice(number) for number in range(count)]


__all__ = ["empty_home", "exporter", "home"]


@pytest.fixture
def registry() -> Iterator[None]:
    """Removes a test's registrations."""
    known = dict(VERSIONS)
    try:
        yield
    finally:
        VERSIONS._known = known
        audit_log._sql.cache_clear()
        preflight.forget()


@pytest.fixture
def stack(registry: None, mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """Two fresh databases, with the table that the second version brings."""
    billing.register()
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in({**urls(stack), "COLUMNS": "160"}, monkeypatch)


def stored(stack: Stack) -> tuple[int, int]:
    """(entries, distinct events) of the second table, without FINAL."""
    ((entries, distinct),) = stack.clickhouse(
        "SELECT count(), uniqExact(workspace_id, event_id) FROM billing_events_v1"
    )
    return int(str(entries)), int(str(distinct))


def alter(stack: Stack, change: str) -> None:
    stack.log.client().command(f"ALTER TABLE billing_events_v1 {change}", settings={"mutations_sync": 2})


def distribute(stack: Stack, table: str, over: str, key: str = "inserted_at") -> None:
    """Makes `table` a Distributed table over `over`, on one server."""
    database = stack.clickhouse_url.rsplit("/", 1)[1]
    stack.log.client().command(
        f"CREATE TABLE {table} AS {over} ENGINE = Remote('127.0.0.1', '{database}', '{over}', 'default', '', {key})"
    )


def test_the_sensor_counts_only_the_versions_that_its_drains_take(stack: Stack, exporter: Exporter) -> None:
    """Else it would start a run at every tick for rows that the run does not take."""
    sensor = Sensor(exporter, stack, sensor_rows=1, drain={"versions": ["audit_log.v1"]})
    stack.put(*invoices(2), version=NAME)
    assert requests(sensor.tick()) == []
    stack.put(*events(1))
    assert len(requests(sensor.tick())) == 1


def test_a_mixed_outbox_goes_into_both_tables_and_bad_rows_are_set_aside(stack: Stack) -> None:
    """A row's version decides its table, its shape and the reasons of dead letters; a batch has rows of one version."""
    stack.put(*events(5))
    stack.put(*invoices(4), version=NAME)
    (wrong_type,) = stack.put(invoice(90, amount_cents="12"), version=NAME)
    (lacking,) = stack.put(invoice(91, currency=""), version=NAME)
    (other_id,) = stack.put(("ws_1", "bill_92", invoice(93)[2]), version=NAME)
    (not_its_shape,) = stack.put(event("evt_94"), version=NAME)
    stack.put(*invoices(1), version="billing_event.v2")
    drain(stack.outbox, stack.log, Limits(batch_rows=3), owner="run_1")

    assert stack.counts() == (5, 5)
    assert stored(stack) == (4, 4)
    rows = stack.clickhouse(
        "SELECT event_id, bucket, invoice_id, amount_cents, currency, lines.sku, lines.quantity, note "
        "FROM billing_events_v1 ORDER BY time LIMIT 2 OFFSET 2"
    )
    assert rows == [
        (f"bill_{n}", "billing", f"inv_{n}", 100 * n, "EUR", ["seat", "größe"], [n, -1], "") for n in (2, 3)
    ]
    letters = stack.sql("SELECT pk, reason, json_path FROM clickhouse_outbox_dead_letter ORDER BY pk")
    assert [(row.pk, row.reason, row.json_path) for row in letters] == [
        (wrong_type, "wrong_type", "$.amount_cents"),
        (lacking, "missing_field", "$.currency"),
        (other_id, "identity_mismatch", "$.event_id"),
        (not_its_shape, "missing_field", "$.invoice_id"),
    ]
    batches = ledger(stack)
    assert {(batch.version, str(batch.state)) for batch in batches} == {
        (version, "verified") for version in ("audit_log.v1", NAME)
    }
    backlog = stack.outbox.backlog(tuple(VERSIONS), count_to=100)
    assert (backlog.rows, backlog.unknown_by_version) == (0, {"billing_event.v2": 1})


def test_a_fingerprint_that_clickhouse_computes_otherwise_is_found(
    registry: None, tmp_path: Path, mysql_server: str, clickhouse_server: str
) -> None:
    """The negative control: the first drain compares a version's Python half with its SQL half."""
    file = tmp_path / "wrong.sql"
    file.write_text(SQL.read_text().replace("toString(amount_cents), '\\0', currency", "currency"))
    register_version(PayloadVersion(name=NAME, decode=billing.BILLING.decode, sql=file))
    with fresh_stack(mysql_server, clickhouse_server) as stack:
        stack.put(*invoices(2), version=NAME)
        drain(stack.outbox, stack.log, Limits(), owner="run_1")
        assert {str(batch.state) for batch in ledger(stack)} == {"discrepant"}


def test_reconcile_and_requeue_cover_the_second_table(stack: Stack, prompt: Prompt) -> None:
    """A proof is needed for the rows of every producer."""
    stack.put(*events(3))
    stack.put(*invoices(5), version=NAME)
    prompt("drain")
    assert json.loads(prompt("reconcile", "--json").output)["entries_stored"] == 8
    now_ms = stack.upkeep.now_ms()
    figures = gather(stack.outbox, stack.log, now_ms - DAY_MS, now_ms + 1_000)
    assert (figures.total("rows"), figures.total("entries")) == (8, 8)
    alter(stack, "DELETE WHERE event_id = 'bill_2'")
    found = json.loads(prompt("reconcile", "--json", "--repair", "--why", "a loss", status=1).output)
    assert found["missing"] == 1
    prompt("drain")
    assert stored(stack) == (5, 5)
    assert json.loads(prompt("reconcile", "--json").output)["entries_stored"] == 8
    alter(stack, "UPDATE amount_cents = 1 WHERE event_id = 'bill_3'")
    found = json.loads(prompt("reconcile", "--json", status=1).output)
    assert (found["altered"], found["event_ids"]) == (1, ["bill_3"])
    prompt("requeue", "--event-id", "bill_3", "--why", "it was altered")
    prompt("drain")
    stack.clickhouse("OPTIMIZE TABLE billing_events_v1 FINAL")
    assert stored(stack) == (5, 5)
    assert stack.clickhouse("SELECT amount_cents FROM billing_events_v1 WHERE event_id = 'bill_3'") == [(300,)]
    assert json.loads(prompt("reconcile", "--json").output)["entries_stored"] == 8
    assert stack.counts() == (3, 3)


def test_doctor_checks_its_table_and_init_creates_it(stack: Stack, prompt: Prompt) -> None:
    """Without its table, a version's rows are not claimed."""
    assert "ClickHouse table billing_events_v1 of billing_event.v1" in prompt("doctor").output
    alter(stack, "MODIFY COLUMN amount_cents Int32")
    assert (
        "billing_events_v1.amount_cents is Int32 and billing_event.v1 sends Int64" in prompt("doctor", status=1).output
    )
    alter(stack, "MODIFY COLUMN amount_cents Int64")
    alter(stack, "RESET SETTING non_replicated_deduplication_window")
    assert "billing_events_v1 has no deduplication window" in prompt("doctor", status=1).output
    stack.log.client().command("DROP TABLE billing_events_v1")
    stack.put(*invoices(1), version=NAME)
    assert "billing_events_v1 of payload version billing_event.v1 does not exist" in prompt("drain", status=2).output
    assert not ledger(stack)
    assert "created billing_events_v1" in prompt("init").output
    prompt("drain")
    assert stored(stack) == (1, 1)
    assert clickhouse_grants(Role.EXPORTER)["billing_events_v1"] == ("SELECT", "INSERT")


def test_its_table_is_sharded_as_ours_is(stack: Stack) -> None:
    """One engine is for all versions: else the table of one would be on one server of many."""
    layout = Layout(engine=Engine.DISTRIBUTED, cluster="audit")
    tables = [f"{version.table}{level}" for version in VERSIONS.values() for level in (LOCAL, "")]
    assert list(layout.statements("audit")) == [*tables, "audit_logs"]
    client = stack.log.client()
    for version in VERSIONS.values():
        client.command(f"RENAME TABLE {version.table} TO {version.table}{LOCAL}")
        distribute(stack, version.table, over=f"{version.table}{LOCAL}")
    assert preflight.check(stack.outbox, stack.log) == []
    stack.put(*events(5))
    stack.put(*invoices(4), version=NAME)
    drain(stack.outbox, stack.log, Limits(), owner="run_1")
    assert (stack.counts(), stored(stack)) == ((5, 5), (4, 4))
    client.command(f"ALTER TABLE billing_events_v1{LOCAL} MODIFY SETTING non_replicated_deduplication_window = 0")
    (found,) = preflight.check(stack.outbox, stack.log)
    assert f"billing_events_v1{LOCAL} has no deduplication window" in found.what
    client.command(found.fix)
    assert preflight.check(stack.outbox, stack.log) == []
    client.command("DROP TABLE billing_events_v1")
    distribute(stack, "billing_events_v1", over=f"billing_events_v1{LOCAL}", key="cityHash64(workspace_id)")
    (found,) = preflight.check(stack.outbox, stack.log)
    assert found.what == "billing_events_v1 is sharded by cityHash64(workspace_id)"


def test_its_table_is_not_created_beside_ours_on_another_engine(stack: Stack, prompt: Prompt) -> None:
    """`init` after an upgrade, without the options of the first one, would leave it on one server of many."""
    client = stack.log.client()
    client.command("DROP TABLE billing_events_v1")
    client.command(f"RENAME TABLE audit_logs_raw_v1 TO audit_logs_raw_v1{LOCAL}")
    distribute(stack, "audit_logs_raw_v1", over=f"audit_logs_raw_v1{LOCAL}")
    refused = prompt("init", status=2).output
    assert "audit_logs_raw_v1 is distributed, and billing_events_v1 would be created on one server" in refused
    assert "auditexport init --engine distributed --cluster NAME" in refused
    assert "billing_events_v1" not in {row[0] for row in stack.clickhouse("SHOW TABLES")}
    assert "would be created on one server" in prompt("init", "--cluster", "audit", status=2).output
    # With an explicit engine it is created, and reported by init and before a drain.
    assert (
        "billing_events_v1 is a ReplacingMergeTree, and audit_logs_raw_v1 a Distributed"
        in prompt("init", "--engine", "merge_tree", status=1).output
    )
    assert "billing_events_v1 is a ReplacingMergeTree, and audit_logs_raw_v1" in prompt("drain", status=2).output


def test_a_partition_that_splits_an_insert_is_found(stack: Stack, prompt: Prompt) -> None:
    """By day of the event, one INSERT makes several parts: after a crash between them, part of the block is lost."""
    client = stack.log.client()
    ((declared,),) = stack.clickhouse("SHOW CREATE TABLE billing_events_v1")
    text = str(declared).replace("\\n", "\n").replace("\\'", "'")
    by = "PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(inserted_at, 'UTC'))"
    assert by in text
    client.command("DROP TABLE billing_events_v1")
    client.command(text.replace(by, "PARTITION BY toDate(fromUnixTimestamp64Milli(time, 'UTC'))"))
    output = prompt("doctor", status=1).output
    assert "one INSERT becomes several parts" in output
    assert "billing_events_v1 is partitioned by toDate" in output
    # Also under a Distributed table, with any name of the local table.
    client.command("RENAME TABLE billing_events_v1 TO invoices")
    distribute(stack, "billing_events_v1", over="invoices")
    assert "invoices is partitioned by toDate" in prompt("doctor", status=1).output


def test_a_version_is_registered_once_and_has_a_table_of_its_own(registry: None) -> None:
    """Of two packages with the same version, the last one would decode the rows."""
    billing.register()
    with pytest.raises(InvalidConfig, match=r"'billing_event.v1' is registered already"):
        billing.register()
    with pytest.raises(InvalidConfig, match=r"table: billing_events_v1 is billing_event.v1's"):
        register_version(replace(billing.BILLING, name="billing_event.v2"))


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("-- name: content", "-- name: contents", "content"),
        ("-- name: input\n", "-- name: notes\nx\n-- name: input\n", "notes: there is no such piece"),
        (
            "workspace_id String, bucket LowCardinality(String),\ninvoice",
            "workspace_id String,\ninvoice",
            "columns: they must include buc",
        ),
        ("note Nullable(String)", "note Enum('a')", "input: it must contain no quotes"),
        (", ifNull(note, '')", "", "select: it has 10 expressions for 11 columns"),
        ("{inserted_at_ms:Int64}", "1", "select: it must contain {inserted_at_ms:Int64}"),
        ("$engine", "MergeTree", "ddl: it must contain $engine"),
        ("EXISTS billing_events_v1", "EXISTS billing", "ddl: it must begin with CREATE TABLE IF NOT EXISTS billing_e"),
        ("billing_events_v1\n\n-- name: columns", "a.b\n\n-- name: columns", "table: it must be the name of one table"),
    ],
)
def test_a_wrong_piece_is_refused_by_name(tmp_path: Path, old: str, new: str, words: str) -> None:
    """When it is registered, by its author, and not at the first INSERT."""
    text = SQL.read_text()
    assert text.count(old) == 1
    file = tmp_path / "wrong.sql"
    file.write_text(text.replace(old, new))
    with pytest.raises(InvalidConfig) as refused:
        PayloadVersion(name=NAME, decode=billing.BILLING.decode, sql=file)
    assert str(refused.value).startswith(f"payload version 'billing_event.v1': {words}")


def test_a_wrong_name_and_a_missing_file_are_refused(tmp_path: Path) -> None:
    """The outbox's column is 64 characters wide."""
    for name in ("", "x" * 65, "a b", "1st"):
        with pytest.raises(InvalidConfig, match="name: it must have 64"):
            PayloadVersion(name=name, decode=billing.BILLING.decode, sql=SQL)
    with pytest.raises(InvalidConfig, match=r"sql: .* cannot be read"):
        PayloadVersion(name=NAME, decode=billing.BILLING.decode, sql=tmp_path / "none.sql")
    with pytest.raises(InvalidConfig, match="decode: it must be a function"):
        PayloadVersion(name=NAME, decode=None, sql=SQL)  # type: ignore[arg-type]
    assert set(statements_of(SQL.read_text(), "here")) == set(PIECES)


# ── as an installed package ──────────────────────────────────────────────────────────────────────


def installed(directory: Path, value: str) -> dict[str, str]:
    """An environment in which a package with this entry point is installed: only the files that pip leaves behind."""
    info = directory / "billing-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: billing\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[{versions.ENTRY_POINTS}]\nbilling = {value}\n")
    return {**os.environ, "PYTHONPATH": f"{directory}:{ROOT}", "COLUMNS": "160"}


def run(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", *words], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.slow
def test_an_installed_package_adds_a_version_to_the_cli_and_to_dagster(
    stack: Stack, scratch: Path, tmp_path: Path
) -> None:
    """Without a fork: the entry point is enough, in every process."""
    shutil.copy(ROOT / "dagster.yaml", scratch)
    environment = installed(tmp_path, "auditexport_tests.support.producers.billing:register")
    environment |= {"DAGSTER_HOME": str(scratch), **urls(stack)}
    stack.log.client().command("DROP TABLE billing_events_v1")
    created = run(environment, "auditexport_pipeline.cli", "init")
    assert created.returncode == 0, created.stderr
    assert "billing_events_v1" in created.stdout
    stack.put(*events(2))
    stack.put(*invoices(3), version=NAME)
    done = run(
        environment,
        *("dagster", "asset", "materialize", "--select", "audit_logs_raw_v1", "-m", "auditexport_pipeline.definitions"),
    )
    assert done.returncode == 0, done.stderr
    assert (stack.counts(), stored(stack), stack.pending()) == ((2, 2), (3, 3), 0)
    stack.put(invoice(7), version=NAME)
    drained = run(environment, "auditexport_pipeline.cli", "drain", "--json", "--versions", NAME)
    assert json.loads(drained.stdout)["rows"] == 1
    assert stored(stack) == (4, 4)


def test_a_package_that_cannot_register_is_named(
    registry: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The message must name the package, and nothing may run without the expected version."""
    value = "auditexport_tests.support.producers.billing:no_such_function"
    installed(tmp_path, value)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(VERSIONS, "_loaded", False)
    with pytest.raises(InvalidConfig, match=re.escape(f"the entry point billing ({value})")):
        len(VERSIONS)
