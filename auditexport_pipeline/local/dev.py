"""`make dev`: the local stack, the Dagster UI on it, and an application that keeps writing events."""

from __future__ import annotations

import contextlib
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from rich.console import Console

from auditexport_pipeline.core.errors import LocalServerFailed
from auditexport_pipeline.local.generator import trickle
from auditexport_pipeline.local.processes import Child, free_port, headers_of, is_free
from auditexport_pipeline.local.stack import PROJECT, LocalStack

# A backlog worth a run within seconds, so that one sees the sensor work.
SENSOR_ROWS = 2_000
SENSOR_LAG_S = 20
PAGE_WITHIN_S = 90.0


def run(directory: Path, *, port: int, events_per_s: float, automation: bool = True) -> int:
    """Runs until Ctrl-C; the stack keeps what a demo or an earlier dev left in it.

    `events_per_s` 0 is an application that is silent. Without `automation` the sensor and the schedule stay as
    they are: off, on a fresh stack.
    """
    console = Console()
    stop = threading.Event()
    with contextlib.ExitStack() as running:
        with console.status("starting MySQL and ClickHouse"):
            stack = running.enter_context(LocalStack(directory))
        port = port if is_free(port) else free_port()
        url = f"http://127.0.0.1:{port}"
        settings = directory / "outboxes.yaml"
        settings.write_text(f"outboxes:\n  - sensor_rows: {SENSOR_ROWS}\n    sensor_lag_s: {SENSOR_LAG_S}\n")
        environment = {"AUDITEXPORT_OUTBOXES": str(settings), **stack.environment()}
        dagster = start_dagster(stack, environment, port)
        running.callback(dagster.stop)
        running.callback(stop.set)
        with console.status("starting Dagster: page, daemon and code location"):
            dagster.wait_until(lambda: headers_of(port, "/server_info") is not None, within_s=PAGE_WITHIN_S)
        if events_per_s:
            seed = int(time.time())
            threading.Thread(
                target=lambda: trickle(stack.outbox.url, seed=seed, events_per_s=events_per_s, stop=stop), daemon=True
            ).start()
        with console.status("setting the pool of drains" + (", switching the sensor and the schedule on" * automation)):
            switch_on(environment, automation=automation)
        console.print(
            f"\n  Dagster       [bold]{url}[/bold]\n"
            f"  the asset     {url}/assets/audit_logs_raw_v1\n"
            f"  the sensor    {url}/locations/auditexport/sensors/outbox_backlog_sensor\n"
            f"  MySQL         {stack.outbox.url}\n"
            f"  ClickHouse    {stack.log.url}\n\n"
            f"  An application commits about {events_per_s:g} events a second; the sensor"
            f"{'' if automation else ', once you turn it on,'} starts a drain at "
            f"the thresholds of {environment['AUDITEXPORT_OUTBOXES']}.\n"
            "  Ctrl-C stops everything.\n"
        )
        while dagster.running:
            time.sleep(0.5)
        raise LocalServerFailed(f"Dagster ended by itself: {dagster.log_tail()}")


def start_dagster(stack: LocalStack, environment: dict[str, str], port: int) -> Child:
    """Starts the Dagster UI and daemon on the stack, on loopback, and does not wait for them."""
    arguments = ["dev", "-w", str(PROJECT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
    return Child(
        "Dagster",
        [sys.executable, "-m", "dagster", *arguments],
        log=stack.directory / "dagster-dev.log",
        env=environment,
        stop_signal=signal.SIGINT,  # at SIGTERM `dagster dev` ends and leaves its page and daemon behind
    )


def switch_on(environment: dict[str, str], *, automation: bool = True) -> None:
    """Sets the pool that admits one drain; starts the sensor and the schedule. Raises `LocalServerFailed`."""
    workspace = ["-w", str(PROJECT / "workspace.yaml")]
    commands = [["instance", "concurrency", "set", "audit_log_export", "1"]]  # before the first runs are queued: README
    if automation:
        commands += [
            ["sensor", "start", "outbox_backlog_sensor", *workspace],
            ["schedule", "start", "audit_log_export_schedule", *workspace],
            ["schedule", "start", "checks_schedule", *workspace],
        ]
    for what in commands:
        done = subprocess.run([sys.executable, "-m", "dagster", *what], env=environment, capture_output=True, text=True)
        # One that an earlier dev switched on stays on.
        if done.returncode != 0 and "already running" not in done.stdout + done.stderr:
            raise LocalServerFailed(f"`dagster {' '.join(what[:4])}` failed: {done.stderr.strip().splitlines()[-1:]}")
