"""What limits a drain, second by second: who has the cores while a Dagster run drains a backlog, and how much stays idle.

What belongs here: one run, watched. What does not: comparing anything (`speed`), and what a stage costs alone (`stages`).

    python -m auditexport_tests.benchmarks.timeline [events] [auditexport|tuned]
"""

from __future__ import annotations

import os
import subprocess
import sys
import time

import pandas as pd
import psutil

from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench, contenders, scenarios

SAMPLED_EVERY_S = 0.1
WHO = ("exporter", "MySQL", "ClickHouse", "others", "idle")


def main(events: int = 1_000_000, key: str = "auditexport") -> None:
    """Prints cores by second; a first run, which reads everybody's libraries from the disk, is not watched."""
    (scenario,) = scenarios.named(f"backlog:{events}")
    (contender,) = contenders.named(key)
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        scenarios.WARM_UP.seed(stack)
        _watched(stack, contenders.dagster_run(contender, stack, scenarios.WARM_UP))
        scenario.seed(stack)
        scenario.restore(stack)
        samples = _watched(stack, contenders.dagster_run(contender, stack, scenario))
        contender.arrived(stack, scenario)
    print(f"\n{contender.name}: {scenario.title}. Of {os.cpu_count()} cores, second by second:\n{_table(samples)}")
    spent = samples.drop(columns="second").sum()
    print("\nCPU seconds: " + ", ".join(f"{who} {spent[who]:.1f}" for who in WHO))


def _watched(stack: LocalStack, command: list[str]) -> pd.DataFrame:
    """Runs the command; CPU seconds of each, one row a sample, with the second in which it was taken."""
    servers = [psutil.Process(stack.mysql.pid), psutil.Process(stack.clickhouse.pid)]
    rows: list[list[float]] = []
    with subprocess.Popen(
        command, env=stack.environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        watched = [psutil.Process(process.pid), *servers]
        started = time.monotonic()
        before = _spent(watched)
        while process.poll() is None:
            time.sleep(SAMPLED_EVERY_S)
            try:
                now = _spent(watched)
            except psutil.Error:
                break  # it has just ended
            rows.append([time.monotonic() - started, *(b - a for a, b in zip(before, now, strict=True))])
            before = now
    if process.wait():
        raise RuntimeError(f"the run ended with {process.returncode}; run {' '.join(command)} by hand to see why")
    samples = pd.DataFrame(rows, columns=["second", "exporter", "MySQL", "ClickHouse", "busy", "idle"])
    samples["others"] = (samples["busy"] - samples[["exporter", "MySQL", "ClickHouse"]].sum(axis=1)).clip(lower=0)
    return samples[["second", *WHO]]


def _spent(watched: list[psutil.Process]) -> list[float]:
    """CPU seconds so far: of each process, then of the whole machine busy and idle (waiting for a disk is idle)."""
    machine = psutil.cpu_times()
    idle = machine.idle + getattr(machine, "iowait", 0.0)
    # The first eight are everything: a guest's time is counted in user and again in guest.
    return [sum(process.cpu_times()[:2]) for process in watched] + [sum(machine[:8]) - idle, idle]


def _table(samples: pd.DataFrame) -> str:
    by_second = samples.groupby(samples["second"].astype(int))
    # A second's samples cover a little more or less than one.
    covered = by_second.apply(lambda group: group[list(WHO)].to_numpy().sum() / (os.cpu_count() or 1))
    cores = by_second[list(WHO)].sum().div(covered, axis=0)
    return cores.round(2).to_string()


if __name__ == "__main__":
    main(*(kind(given) for kind, given in zip((int, str), sys.argv[1:], strict=False)))
