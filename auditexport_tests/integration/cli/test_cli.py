"""`auditexport init`, `doctor` and `demo`, and how an error ends a command."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.support.prompts import Prompt, prompt_in, urls


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in({**urls(stack), "COLUMNS": "160"}, monkeypatch)


def _python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], env=os.environ, capture_output=True, text=True, timeout=240)


@pytest.mark.slow
def test_the_demo_ends_with_numbers_that_add_up(tmp_path: Path) -> None:
    """A newcomer sees it first, and a smoke test in CI takes its exit status and its JSON as a proof."""
    command = (
        "-m",
        "auditexport_pipeline.cli",
        "demo",
        "--events",
        "1000",
        "--json",
        "--directory",
        str(tmp_path / "x"),
    )
    done = _python(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    numbers = json.loads(done.stdout)
    assert (numbers["adds_up"], numbers["stored"], numbers["duplicated"], numbers["missing"]) == (True, 1000, 0, 0)
    assert "every event is in ClickHouse exactly once" in done.stderr
    assert "audit_log.v99" in done.stderr


@pytest.mark.slow
def test_the_demo_fails_when_an_event_was_lost(tmp_path: Path) -> None:
    """The negative control: a proof that cannot fail proves nothing."""
    program = (
        "import sys; from pathlib import Path; from auditexport_pipeline.local import demo\n"
        "count = demo._count\n"
        "def tampered(stack, seeded):\n"
        "    stack.log.client().command('ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id IN "
        "(SELECT min(event_id) FROM audit_logs_raw_v1) SETTINGS mutations_sync = 2')\n"
        "    return count(stack, seeded)\n"
        "demo._count = tampered\n"
        "sys.exit(demo.run(Path(sys.argv[1]), 1500, as_json=True))\n"
    )
    done = _python("-c", program, str(tmp_path / "stack"))
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the numbers do not add up" in done.stderr
    assert json.loads(done.stdout)["missing"] == 1


def test_init_creates_what_is_missing_and_reports_the_rest(prompt: Prompt, stack: Stack) -> None:
    """A deployment script runs it: its exit status and its JSON have to mean something."""
    assert prompt("init").stdout.strip() == "nothing to create"
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    stack.sql("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx")
    created = prompt("init", status=1)
    assert created.stdout.strip() == "created clickhouse_outbox_dead_letter"
    assert "ADD INDEX drainer_pending_idx" in created.stderr
    values = json.loads(prompt("init", "--json", status=1).stdout)
    assert values["created"] == []
    assert any("ADD INDEX drainer_pending_idx" in finding["fix"] for finding in values["findings"])
    assert json.loads(prompt("doctor", "--json", status=1).stdout)["fatal"] > 0


def test_an_error_is_one_line_and_no_secret(prompt: Prompt, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> None:
    """A traceback hides the one sentence that helps, and a password in it ends up in a ticket."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", "")
    assert prompt("init", status=2).stderr.splitlines() == [
        "auditexport: AUDITEXPORT_MYSQL_URL is not set; write mysql+pymysql://user:password@host:port/database"
    ]
    monkeypatch.setenv(
        "AUDITEXPORT_MYSQL_URL", stack.mysql_url.replace("root@", "nobody:hunter2@").replace("root:", "x:")
    )
    refused = prompt("init", status=2).stderr
    assert len(refused.splitlines()) == 1
    assert "hunter2" not in refused
