"""The prompt: what `make` and operators call, as a process of its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from auditexport_tests.conftest import Stack


def _auditexport(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "auditexport_pipeline.cli", *arguments]
    # A terminal as wide as a report, so that a line is a line.
    return subprocess.run(
        command, env={**os.environ, "COLUMNS": "160", **environment}, capture_output=True, text=True, timeout=240
    )


def test_the_demo_ends_with_numbers_that_add_up(tmp_path: Path) -> None:
    """It is the first thing a newcomer sees, and its exit status is a proof that others rely on."""
    done = _auditexport("demo", "--events", "3000", "--directory", str(tmp_path / "stack"))
    assert done.returncode == 0, done.stdout + done.stderr
    assert "every event is in ClickHouse exactly once" in done.stdout
    assert re.search(r"exported\s+3,000", done.stdout)
    assert re.search(r"duplicates\s+0", done.stdout)
    assert re.search(r"missing\s+0", done.stdout)
    assert re.search(r"unknown versions\s+25\s+audit_log\.v99", done.stdout)


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
        "sys.exit(demo.run(Path(sys.argv[1]), 1500))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "stack")],
        env={**os.environ, "COLUMNS": "160"},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "the numbers do not add up" in done.stdout
    assert re.search(r"missing\s+1", done.stdout)


def test_init_creates_reports_and_says_when_there_is_nothing_to_do(stack: Stack) -> None:
    """Operators run it from a deployment script: its exit status has to mean something."""
    urls = {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}
    again = _auditexport("init", **urls)
    assert (again.returncode, again.stdout.strip()) == (0, "nothing to create")
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    stack.sql("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx")
    mended = _auditexport("init", **urls)
    assert mended.returncode == 1
    assert mended.stdout.strip() == "created clickhouse_outbox_dead_letter"
    assert "ADD INDEX drainer_pending_idx" in mended.stderr


def test_an_error_is_one_line_and_no_secret(stack: Stack) -> None:
    """A traceback at 3 a.m. hides the one sentence that helps, and a password in it ends up in a ticket."""
    missing = _auditexport("init", AUDITEXPORT_MYSQL_URL="", AUDITEXPORT_CLICKHOUSE_URL=stack.clickhouse_url)
    assert missing.returncode == 2
    assert missing.stderr.strip().splitlines() == [
        "auditexport: AUDITEXPORT_MYSQL_URL is not set; write mysql+pymysql://user:password@host:port/database"
    ]
    wrong = stack.mysql_url.replace("root@", "root:hunter2@").replace("root:", "nobody:", 1)
    refused = _auditexport("init", AUDITEXPORT_MYSQL_URL=wrong, AUDITEXPORT_CLICKHOUSE_URL=stack.clickhouse_url)
    assert refused.returncode == 2
    assert len(refused.stderr.strip().splitlines()) == 1
    assert "hunter2" not in refused.stderr


def test_what_init_and_doctor_found_is_there_for_programs(stack: Stack) -> None:
    """A deployment script reads a field and not a sentence."""
    urls = {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    stack.sql("ALTER TABLE clickhouse_outbox DROP INDEX drainer_pending_idx")
    made = _auditexport("init", "--json", **urls)
    told = json.loads(made.stdout)
    assert (made.returncode, told["created"]) == (1, ["clickhouse_outbox_dead_letter"])
    assert any("ADD INDEX drainer_pending_idx" in finding["fix"] for finding in told["findings"])
    looked = _auditexport("doctor", "--json", **urls)
    assert (looked.returncode, json.loads(looked.stdout)["fatal"] > 0) == (1, True)


@pytest.mark.slow
def test_the_demo_tells_programs_what_it_shows_people(tmp_path: Path) -> None:
    """A smoke test in CI takes the numbers from here."""
    done = _auditexport("demo", "--events", "1000", "--json", "--directory", str(tmp_path / "stack"))
    assert done.returncode == 0, done.stdout + done.stderr
    told = json.loads(done.stdout)
    assert (told["adds_up"], told["stored"], told["duplicated"], told["missing"]) == (True, 1000, 0, 0)
    assert "every event is in ClickHouse exactly once" in done.stderr
