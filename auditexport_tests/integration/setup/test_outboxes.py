"""The file of outboxes and `--outbox`: which files are refused, and that a command uses the named outbox only."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from auditexport_pipeline.component import AuditExport
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.outboxes import OutboxSettings, parse, read_outboxes
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import events
from auditexport_tests.support.prompts import Prompt, prompt_in

TWO = """
outboxes:
  - name: eu
    mysql_url_env: EU_MYSQL_URL
    clickhouse_url_env: EU_CLICKHOUSE_URL
    targets: {lag_s: 60}
  - name: us
    mysql_url_env: US_MYSQL_URL
    clickhouse_url_env: US_CLICKHOUSE_URL
    drain: {batch_rows: 2}
"""


@pytest.fixture
def other(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """A second outbox, in databases of its own."""
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "outboxes.yaml"
    path.write_text(TWO)
    return path


@pytest.fixture
def prompt(file: Path, stack: Stack, other: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """The prompt with both outboxes and neither's URL in the usual variables."""
    for name in ("AUDITEXPORT_MYSQL_URL", "AUDITEXPORT_CLICKHOUSE_URL", "AUDITEXPORT_OUTBOX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return prompt_in(
        {
            "AUDITEXPORT_OUTBOXES": str(file),
            "EU_MYSQL_URL": stack.mysql_url,
            "EU_CLICKHOUSE_URL": stack.clickhouse_url,
            "US_MYSQL_URL": other.mysql_url,
            "US_CLICKHOUSE_URL": other.clickhouse_url,
        },
        monkeypatch,
    )


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ("mysql_url: x", "outbox us: mysql_url: no such key; there are name, mysql_url_env"),
        ("sensor_rows: 0", "outbox us: sensor_rows: rows is 0; it must be an integer from 1"),
        ("sensor_lag_s: .inf", "outbox us: sensor_lag_s: lag_s is inf; it must be a number above 0"),
        ("sensor_rows: many", "outbox us: sensor_rows: "),
        ("drain: {batch_rows: 0}", "outbox us: drain: batch_rows is 0; it must be"),
        ("drain: {batch_row: 5}", "outbox us: drain: batch_row is not a setting of a drain"),
        ("targets: {lag_s: 0}", "outbox us: targets: lag_s is 0"),
        ("targets: {lag: 5}", "outbox us: targets: lag is not a target; choose from batch_open_minutes"),
        ("celery_queue: a queue", "outbox us: celery_queue: celery_queue must be letters, digits"),
        ("name: EU", "outbox EU: name: the outbox's name is 'EU'"),
        ("name: eu", "outbox eu: name: there are two outboxes of this name"),
        ("name: ''", "entry 2: name: each of several outboxes needs one"),
        ("alert_policy: {repeat_hours: 0}", "outbox us: alert_policy: repeat_hours is 0"),
        ("mysql_url_env: EU_MYSQL_URL", "outbox us: mysql_url_env: EU_MYSQL_URL is outbox eu's"),
        ("clickhouse_url_env: EU_CLICKHOUSE_URL", "outbox us: clickhouse_url_env: EU_CLICKHOUSE_URL is outbox eu's"),
    ],
)
def test_a_fault_in_an_entry_is_named_by_file_entry_and_key(file: Path, wrong: str, words: str) -> None:
    """A typing error in one of forty entries must not become a default, and must be easy to find."""
    content = yaml.safe_load(TWO)
    content["outboxes"][1] |= yaml.safe_load(wrong)
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(InvalidConfig) as refused:
        parse(file)
    assert str(refused.value).startswith(f"{file}: {words}")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("outboxes: [", "line 1: this is not YAML"),
        ("outboxes: []", "outboxes: it must be a list of at least one outbox"),
        ("outbox: []", "must hold one key, outboxes"),
        ("outboxes: [eu]", "entry 1 is not a mapping"),
        ("outboxes:\n  - name: eu\n    sensor_rows: 1\n    sensor_rows: 2\n", "the key sensor_rows is given twice"),
    ],
)
def test_a_file_of_another_form_is_refused(file: Path, text: str, words: str) -> None:
    """YAML takes almost anything, and silently the last of two values."""
    file.write_text(text)
    with pytest.raises(InvalidConfig, match=words):
        parse(file)


def test_a_url_in_the_place_of_a_variable_is_refused_and_not_repeated(file: Path) -> None:
    """It has a password, and messages go to logs."""
    file.write_text(TWO.replace("US_MYSQL_URL", "mysql+pymysql://u:s3cret@db/app"))
    with pytest.raises(InvalidConfig, match="outbox us: mysql_url_env: this is not the name of an env") as refused:
        parse(file)
    assert "s3cret" not in str(refused.value)


def test_an_unset_variable_and_a_shared_database_are_refused(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two ledgers on one outbox would each take its rows; the definitions are not even loaded."""
    monkeypatch.setenv("AUDITEXPORT_OUTBOXES", str(file))
    for name in ("EU_MYSQL_URL", "EU_CLICKHOUSE_URL", "US_CLICKHOUSE_URL"):
        monkeypatch.setenv(name, f"url://:s3cret@host/{name}")
    monkeypatch.delenv("US_MYSQL_URL", raising=False)
    found = read_outboxes()
    assert found is not None
    with pytest.raises(InvalidConfig, match="outbox us: mysql_url_env: US_MYSQL_URL is not set"):
        found.check_variables()
    monkeypatch.setenv("US_MYSQL_URL", "url://:s3cret@host/EU_MYSQL_URL")
    with pytest.raises(InvalidConfig, match="US_MYSQL_URL names the database of outbox eu") as refused:
        found.check_variables()
    assert "s3cret" not in str(refused.value)
    monkeypatch.setenv("US_MYSQL_URL", "url://host/us")
    found.check_variables()


@pytest.mark.parametrize(
    ("variable", "eu", "us", "shared"),
    [
        ("CLICKHOUSE", "https://eu:one@ch.internal:8443/audit", "http://us:two@CH.internal/audit?verify=false", True),
        ("CLICKHOUSE", "https://eu:one@ch.internal:8443/audit", "https://eu:one@ch.internal:9443/audit", False),
        ("CLICKHOUSE", "https://eu:one@ch.internal/audit", "https://eu:one@ch.internal/audit_us", False),
        ("CLICKHOUSE", "https://eu:one@ch.internal", "https://us:two@ch.internal/default", True),
        ("MYSQL", "mysql+pymysql://eu:one@db/app", "mysql+pymysql://us:two@DB:3306/app?ssl_disabled=true", True),
        ("MYSQL", "mysql+pymysql://eu:o#1@db/app", "mysql+pymysql://us:t/2@db/app", True),
        ("MYSQL", "mysql+pymysql://eu:one@db/app", "mysql+pymysql://eu:one@db:3307/app", False),
        ("MYSQL", "mysql+pymysql://a@/app?unix_socket=/one", "mysql+pymysql://a@/app?unix_socket=/two", False),
    ],
)
def test_two_users_of_one_database_are_one_database(
    file: Path, monkeypatch: pytest.MonkeyPatch, variable: str, eu: str, us: str, shared: bool
) -> None:
    """Outboxes often have a user each; the same database must be recognised all the same."""
    for name in ("EU_MYSQL_URL", "EU_CLICKHOUSE_URL", "US_MYSQL_URL", "US_CLICKHOUSE_URL"):
        monkeypatch.setenv(name, f"url://host/{name}")
    monkeypatch.setenv(f"EU_{variable}_URL", eu)
    monkeypatch.setenv(f"US_{variable}_URL", us)
    found = parse(file)
    if not shared:
        found.check_variables()
        return
    with pytest.raises(InvalidConfig, match=f"US_{variable}_URL names the database of outbox eu"):
        found.check_variables()


def test_the_component_and_the_file_have_the_same_attributes() -> None:
    """A key of one of them must work in the other."""
    assert set(AuditExport.model_fields) == set(OutboxSettings.model_fields)


def test_a_command_uses_the_named_outbox_and_no_other(
    prompt: Prompt, stack: Stack, other: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A discard or a sweep in the wrong region does harm. The variable names an outbox as the option does."""
    stack.put(*events(3))
    other.put(*events(5, "other"))
    assert "say which with --outbox: eu, us" in prompt("drain", status=2).output
    assert "has no outbox 'asia'; choose from eu, us" in prompt("--outbox", "asia", "drain", status=2).output
    drained = json.loads(prompt("--outbox", "us", "drain", "--json").output)
    assert drained["rows"] == 5
    assert (stack.pending(), stack.counts()) == (3, (0, 0))
    assert (other.pending(), other.counts()) == (0, (5, 5))
    other.put(*events(2, "more"))
    monkeypatch.setenv("AUDITEXPORT_OUTBOX", "us")
    assert json.loads(prompt("drain", "--json").output)["rows"] == 2
    monkeypatch.delenv("AUDITEXPORT_OUTBOXES")
    assert "there is no list of outboxes" in prompt("--outbox", "eu", "status", status=2).output


def test_status_of_all_has_a_line_each_and_the_worst_exit_status(
    prompt: Prompt, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One command shows all outboxes; a server that does not answer hides no other."""
    shown = prompt("status", "--all").output.splitlines()
    assert [line.split()[:2] for line in shown[1:3]] == [["eu", "healthy"], ["us", "healthy"]]
    stack.put(*events(1))
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - 120000")
    worse = prompt("status", "--all", status=1).output
    assert "eu      needs an operator" in worse
    assert "auditexport --outbox eu " in worse
    report = json.loads(prompt("status", "--all", "--json", status=1).output)
    assert [(one["outbox"], one["healthy"]) for one in report["outboxes"]] == [("eu", False), ("us", True)]
    assert report["outboxes"][0]["todo"][0]["about"] == "lag"

    monkeypatch.setenv("US_MYSQL_URL", "mysql+pymysql://u:s3cret@127.0.0.1:1/nowhere")
    away = prompt("status", "--all", status=2).output
    assert "us      not known" in away
    assert "eu      needs an operator" in away
    assert "s3cret" not in away
    report = json.loads(prompt("status", "--all", "--json", status=2).output)
    assert report["outboxes"][1]["verdict"] == "not known"
    monkeypatch.delenv("US_MYSQL_URL")
    assert "us_mysql_url is not set" in prompt("status", "--all", status=2).output.lower()


def test_metrics_of_all_have_the_outbox_as_a_label(
    prompt: Prompt, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One scrape and one alert rule serve all, and the alert names the outbox."""
    stack.put(*events(4))
    output = prompt("metrics", "--all", "--label", "site=a").output
    assert 'auditexport_backlog_rows{outbox="eu",site="a"} 4.0' in output
    assert 'auditexport_backlog_rows{outbox="us",site="a"} 0.0' in output
    assert output.count("# TYPE auditexport_backlog_rows gauge") == 1
    assert 'auditexport_lag_target_seconds{outbox="eu",site="a"} 60.0' in output
    assert 'auditexport_lag_target_seconds{outbox="us",site="a"} 300.0' in output
    assert 'auditexport_up{outbox="us"} 1.0' in prompt("--outbox", "us", "metrics").output
    prompt("metrics", "--all", "--label", "outbox=x", status=2)
    monkeypatch.setenv("US_MYSQL_URL", "mysql+pymysql://u:s3cret@127.0.0.1:1/nowhere")
    away = prompt("metrics", "--all", status=1).output
    assert 'auditexport_up{outbox="us"} 0.0' in away
    assert 'auditexport_up{outbox="eu"} 1.0' in away
    assert "outbox us: " in away
