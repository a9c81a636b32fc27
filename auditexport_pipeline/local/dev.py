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

# Low limits, so that the sensor starts a run within seconds.
SENSOR_ROWS, SENSOR_LAG_S = 2_000, 20
UI_WITHIN_S = 90.0


def run(directory: Path, *, port: int, events_per_s: float, automation: bool = True) -> int:
    """Runs until Ctrl-C; the stack keeps the data of a demo or an earlier dev.

    With `events_per_s` 0 no events are written. Without `automation` the sensor and the schedules stay as they are: off,
    on a fresh stack.
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
        with console.status("starting Dagster: the UI, the daemon and the code location"):
            dagster.wait_until(lambda: headers_of(port, "/server_info") is not None, within_s=UI_WITHIN_S)
        if events_per_s:
            seed = int(time.time())
            threading.Thread(
                target=lambda: trickle(stack.outbox.url, seed=seed, events_per_s=events_per_s, stop=stop), daemon=True
            ).start()
        with console.status("setting the pool" + ", starting the sensor and the schedules" * automation):
            switch_on(environment, automation=automation)
        console.print(
            f"\n  Dagster       [bold]{url}[/bold]\n"
            f"  the asset     {url}/assets/audit_logs_raw_v1\n"
            f"  the sensor    {url}/locations/auditexport/sensors/outbox_backlog_sensor\n"
            f"  MySQL         {stack.outbox.url}\n"
            f"  ClickHouse    {stack.log.url}\n\n"
            f"  An application commits about {events_per_s:g} events a second. The sensor"
            f"{'' if automation else ', once you start it,'} starts a drain at {SENSOR_ROWS:,} pending rows, or when the "
            f"oldest is {SENSOR_LAG_S} s old ({settings}).\n"
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
        stop_signal=signal.SIGINT,  # at SIGTERM `dagster dev` ends and leaves its web server and daemon running
    )


def switch_on(environment: dict[str, str], *, automation: bool = True) -> None:
    """Sets the pool to one drain at a time; starts the sensor and the schedules. Raises `LocalServerFailed`."""
    workspace = ["-w", str(PROJECT / "workspace.yaml")]
    commands = [["instance", "concurrency", "set", "audit_log_export", "1"]]  # else the first two runs can overlap
    if automation:
        commands += [
            ["sensor", "start", "outbox_backlog_sensor", *workspace],
            ["schedule", "start", "audit_log_export_schedule", *workspace],
            ["schedule", "start", "checks_schedule", *workspace],
        ]
    for command in commands:
        done = subprocess.run(
            [sys.executable, "-m", "dagster", *command], env=environment, capture_output=True, text=True
        )
        # A sensor that an earlier dev started is still on.
        if done.returncode != 0 and "already running" not in done.stdout + done.stderr:
            why = done.stderr.strip().splitlines()[-1:]
            raise LocalServerFailed(f"`dagster {' '.join(command[:4])}` failed: {why}")
