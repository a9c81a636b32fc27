"""`auditexport dev` as a process of its own, and a headless Chromium that looks at its page.

What belongs here: starting both and taking both down by process id, however a test ends. What does not: what is
looked at. Only `make test-e2e` collects this directory.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
from playwright.sync_api import Page, expect, sync_playwright

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.local.processes import free_port
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.e2e.install import find_browser
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.waiting import wait_until

ROOT = Path(__file__).resolve().parents[2]
# Pictures of the last run; `make test-e2e` overwrites them.
PICTURES = ROOT / ".auditexport" / "e2e"
# MySQL initialised, the page, the daemon and the code location started: 20 s alone, a minute beside a benchmark.
UP_WITHIN_S = 240.0
# What a person would wait for before giving up; a run takes seconds, a loaded machine ten times that.
SEEN_WITHIN_MS = 120_000
# The sensor's threshold here: above what the launchpad's tests leave pending, below what the sensor's test writes.
SENSOR_ROWS = 1_000
# Without a display, without root's sandbox, and without calls home: this browser talks to 127.0.0.1 alone.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Dev:
    """The page's URL, and the two databases behind it."""

    url: str
    stack: Stack


@pytest.fixture(scope="module")
def dev(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Dev]:
    """`auditexport dev` on an empty directory, with a silent application and the sensor off."""
    directory = tmp_path_factory.mktemp("dev")
    port = free_port()
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUDITEXPORT_")}
    if os.environ.get("AUDITEXPORT_MYSQLD"):
        environment["AUDITEXPORT_MYSQLD"] = os.environ["AUDITEXPORT_MYSQLD"]
    environment |= {
        "COLUMNS": "300",  # it prints the URLs we look for, each on one line
        "AUDITEXPORT_OUTBOXES": settings_file(directory, sensor_rows=SENSOR_ROWS, sensor_lag_s=3600),
    }
    arguments = ["dev", "--directory", str(directory / "state"), "--port", str(port), "--events-per-s", "0"]
    log = directory / "dev.log"
    with log.open("wb") as output:
        server = subprocess.Popen(
            [sys.executable, "-m", "auditexport_pipeline.cli", *arguments, "--no-automation"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=output,
            start_new_session=True,
        )
    try:

        def up() -> bool:
            said = log.read_text()
            assert server.poll() is None, f"`auditexport dev` ended: {said}"
            return "Ctrl-C stops everything" in said

        wait_until(up, what="auditexport dev", within_s=UP_WITHIN_S, every_s=0.2)
        said = log.read_text()
        outbox = MySQLOutbox(_url(said, "MySQL"))
        audit_log = ClickHouseAuditLog(_url(said, "ClickHouse"))
        try:
            yield Dev(
                url=f"http://127.0.0.1:{port}",
                stack=Stack(mysql_url=outbox.url, clickhouse_url=audit_log.url, outbox=outbox, log=audit_log),
            )
        finally:
            outbox.disconnect()
            audit_log.client().close_connections()
    finally:
        left = _stop(server)
    assert not left, f"`auditexport dev` ended and left behind: {left}"


def _url(said: str, what: str) -> str:
    found = re.search(rf"^\s*{what}\s+(\S+://\S+)\s*$", said, re.MULTILINE)
    assert found, said
    return found[1]


def _stop(server: subprocess.Popen[bytes]) -> list[str]:
    """Ends it as `kill` would; returns, and kills, what it should have ended itself and did not."""
    try:
        family = psutil.Process(server.pid).children(recursive=True)
    except psutil.NoSuchProcess:
        family = []
    server.terminate()
    try:
        server.wait(60)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()
    _, alive = psutil.wait_procs(family, timeout=10)
    left = []
    for process in alive:
        try:
            left.append(" ".join(process.cmdline())[:200])
            process.kill()
        except psutil.NoSuchProcess:
            continue
    return left


@pytest.fixture(scope="module")
def browser_page(dev: Dev, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A window of a Chromium with an empty profile."""
    executable = find_browser()
    assert executable, "no Chromium on this machine: `make test-e2e` installs it, or says how"
    expect.set_options(timeout=SEEN_WITHIN_MS)
    PICTURES.mkdir(parents=True, exist_ok=True)
    with sync_playwright() as playwright:
        context = playwright.chromium.launch_persistent_context(
            tmp_path_factory.mktemp("profile"),
            executable_path=executable,
            headless=True,
            args=FLAGS,
            base_url=dev.url,
            viewport={"width": 1440, "height": 1080},
        )
        try:
            context.set_default_timeout(SEEN_WITHIN_MS)
            context.set_default_navigation_timeout(SEEN_WITHIN_MS)
            yield context.pages[0]
        finally:
            context.close()


@pytest.fixture
def page(browser_page: Page, request: pytest.FixtureRequest) -> Iterator[Page]:
    """That window; of a test that fails, a picture of what it saw last."""
    failed = request.session.testsfailed
    yield browser_page
    if request.session.testsfailed > failed:
        browser_page.screenshot(path=PICTURES / f"failed-{request.node.name}.png")
