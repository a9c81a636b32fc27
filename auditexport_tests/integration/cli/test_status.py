"""`auditexport status`: what it shows, how much room it takes, its JSON and its exit statuses."""

from __future__ import annotations

import json
import signal
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.cli.shared import console
from auditexport_pipeline.cli.status import layout
from auditexport_pipeline.core.advice import advice
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.settings import Limits, Targets
from auditexport_pipeline.core.status import RunStatus
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.monitoring.test_status import as_role  # noqa: F401
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.crashes import drain
from auditexport_tests.support.prompts import Prompt, at_a_terminal, prompt_in, started
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.unit.core.test_advice import OPEN, QUIET, TROUBLES

RUN = RunStatus(
    owner="3f6c1a52-7d0b-4a52-9c0e-2f4b5c6d7e8f",
    batches=64,
    open_batches=0,
    rows=6_400_000,
    started_at_ms=QUIET.at_ms - 400_000,
    ended_at_ms=QUIET.at_ms,
    at_work=False,
    worst=State.VERIFIED,
    partial=True,
)


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """Without a ClickHouse: a status must not need one."""
    monkeypatch.delenv("AUDITEXPORT_CLICKHOUSE_URL", raising=False)
    monkeypatch.setenv("COLUMNS", "160")
    return prompt_in({"AUDITEXPORT_MYSQL_URL": stack.mysql_url}, monkeypatch)


def test_an_idle_export_is_healthy_and_the_exit_status_is_0(prompt: Prompt, stack: Stack) -> None:
    """An alarm that is on from the first minute is switched off in the second."""
    shown = prompt("status").output
    assert shown.startswith("healthy: 0 rows pending, lag 0 s")
    assert "nothing exported yet" in shown
    seed_outbox(stack.mysql_url, seed=1, events=40, writers=1)
    drain(stack.outbox, stack.log, Limits(batch_rows=20), owner="run-1")
    shown = prompt("status").output
    assert all(
        text in shown for text in ("healthy", "40 rows in 15 min", "run-1", "all exported batches were read back")
    )


def test_trouble_is_shown_with_its_fix_and_the_exit_status_is_1(prompt: Prompt, stack: Stack) -> None:
    """The wrong number, and the command that fixes it, on the first screen."""
    seed_outbox(stack.mysql_url, seed=2, events=40, malformed=3, unknown=2, writers=1)
    shown = prompt("status", status=1).output  # the generator's events are an hour old
    assert "needs an operator: 1 error, 1 warning" in shown
    assert "no drain is at work" in shown
    drain(stack.outbox, stack.log, Limits(), owner="run-1")
    shown = prompt("status", status=1).output
    assert "needs an operator: 2 warnings" in shown
    assert "→ auditexport dead-letters list" in shown
    assert "3 dead letters (" in shown
    assert "audit_log.v99 2" in shown
    values = json.loads(prompt("status", "--json", status=1).output)
    assert [(one["severity"], one["about"]) for one in values["todo"]] == [
        ("warning", "dead_letters"),
        ("warning", "unknown_versions"),
    ]
    assert (values["healthy"], values["dead_letters_standing"], values["unknown_by_version"]) == (
        False,
        3,
        {"audit_log.v99": 2},
    )
    assert [(run["owner"], run["rows"], run["worst"]) for run in values["runs"]] == [("run-1", 40, "verified")]


def test_the_targets_of_the_file_decide_and_a_wrong_one_is_refused(
    prompt: Prompt, stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same installation is healthy for one team and late for another."""
    seed_outbox(stack.mysql_url, seed=4, events=10, writers=1)
    assert "target 5 min" in prompt("status", status=1).output
    monkeypatch.setenv("AUDITEXPORT_OUTBOXES", settings_file(tmp_path, targets={"lag_s": 600_000}))
    assert prompt("status").output.startswith("healthy")
    settings_file(tmp_path, targets={"lag_s": "often"})
    refused = prompt("status", status=2).output
    assert (refused.count("\n"), "targets.lag_s" in refused) == (1, True)


def test_a_busy_status_fits_a_small_terminal() -> None:
    """A serial console has 24 lines, and --watch shows no more than the screen."""
    busy = replace(
        QUIET,
        backlog=replace(QUIET.backlog, rows=5_000, open_batches=64, leasing_owners=(RUN.owner,), dead_rows=2),
        rows_per_s=9_000.0,
        dead_by_reason={"wrong_type": 2},
        open_batches=tuple(replace(OPEN, batch_id=number, age_s=5.0, lease_left_s=200.0) for number in range(64)),
        runs=(RUN,) * 5,
    )
    screen = console()
    for width, height in ((80, 24), (200, 60)):
        found = advice(busy, Targets())
        with screen.capture() as captured:
            screen.width = width
            screen.print(layout(busy, found, width=width, height=height))
        lines = captured.get().splitlines()
        assert len(lines) < height
        assert max(map(len, lines)) <= width
        assert "needs an operator: 1 warning" in lines[0]
        assert any("last run" in line for line in lines)
        assert sum("6,400,000" in line for line in lines) >= 2
        assert any("open batch (+" in line for line in lines)
    # A file has no height, and gets everything.
    with screen.capture() as captured:
        screen.print(layout(busy, [], width=80, height=None))
    assert captured.get().count("6,400,000") == 5


@pytest.mark.parametrize("name", TROUBLES)
def test_every_trouble_is_laid_out_within_the_width(name: str) -> None:
    """A sentence that runs off the screen is half a sentence."""
    trouble, *_ = TROUBLES[name]
    screen = console()
    screen.width = 80
    with screen.capture() as captured:
        screen.print(layout(trouble, advice(trouble, Targets()), width=80, height=24))
    lines = captured.get().splitlines()
    assert max(map(len, lines)) <= 80
    assert len(lines) < 24


def test_watching_survives_a_mysql_that_is_down(stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An operator watches a failover, and sees its end."""
    with LocalMySQL(tmp_path / "own") as server:
        with sa.create_engine(server.url, isolation_level="AUTOCOMMIT").connect() as connection:
            connection.exec_driver_sql("CREATE DATABASE own")
        own = MySQLOutbox(f"{server.url}own")
        setup.create(own, stack.log, with_outbox=True)
        with started(stack, "status", "--watch", "0.2", "--json", AUDITEXPORT_MYSQL_URL=own.url) as process:
            assert process.stdout is not None
            assert process.stderr is not None
            assert json.loads(process.stdout.readline())["healthy"]
            own.disconnect()
            server.stop()
            assert "MySQL failed while reading the status" in process.stderr.readline()
            ask = prompt_in({"AUDITEXPORT_MYSQL_URL": own.url}, monkeypatch)
            down = ask("status", status=2).output
            assert (down.count("\n"), down.startswith("auditexport: MySQL failed")) == (1, True)
            server.start()
            assert server.url in own.url, "the server came back at another port"
            wait_until(lambda: json.loads(process.stdout.readline())["healthy"], what="a status after the outage")
            process.send_signal(signal.SIGINT)
            process.communicate(timeout=60)
            assert process.returncode == 0
        own.disconnect()


@pytest.mark.skipif(sys.platform != "linux", reason="terminals of other systems differ")
def test_watching_refreshes_in_place_until_ctrl_c(stack: Stack) -> None:
    """The screen shows a change by itself, and the terminal comes back as it was."""
    with at_a_terminal(stack, "status", "--watch", "0.2") as terminal:
        terminal.wait_for("healthy: 0 rows pending")
        stack.put(("ws_1", "evt_1", "{}"), version="audit_log.v99")
        terminal.wait_for("needs an operator: 1 warning")
        terminal.press_ctrl_c()
        assert terminal.exit_status() == 1
    assert terminal.shown.index("\x1b[?1049h") < terminal.shown.index("\x1b[?1049l")  # the other screen, and back
    assert "Traceback" not in terminal.shown
