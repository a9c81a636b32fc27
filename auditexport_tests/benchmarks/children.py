"""Exporters as child processes, measured by the kernel: wall and CPU seconds, and the memory of the process tree.

`run` measures a process from start to end. `ask` measures the drains of a process that runs already.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

import psutil

from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks.turns import ANSWER

SAMPLED_EVERY_S = 0.05
# To find the tree is to read the whole process table: less often.
TREE_EVERY_SAMPLES = 10
FAILURE_CHARACTERS = 120


class ChildFailed(RuntimeError):
    """A child ended with an error; the text is the end of its output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Child:
    """A finished process: wall seconds, CPU seconds of it and of the servers until it ended, and the peak of the
    resident memory of its tree in megabytes (10^6 bytes), sampled twenty times a second.

    `others_cpu_s` is what the rest of the machine used meanwhile, the kernel and the benchmark included. `failure` is
    the last line of the process's output, when it ended with an error.
    """

    seconds: float
    cpu_s: float
    mysql_cpu_s: float
    clickhouse_cpu_s: float
    others_cpu_s: float
    peak_rss_mb: float
    failure: str = ""


def run(stack: LocalStack, command: list[str], *, may_fail: bool = False) -> Child:
    """Runs the command against the stack. Raises `ChildFailed` when it fails and may not."""
    with tempfile.TemporaryFile() as output:
        before = _cpu_s_of(stack)
        started = time.monotonic()
        process = subprocess.Popen(command, env=stack.environment(), stdout=output, stderr=output)
        with _sampled(process.pid) as peak:
            cpu_s = _reap(process)
        seconds = time.monotonic() - started
        spent = [cpu_s, *_since(before, _cpu_s_of(stack))]
        return _finished(process.returncode, output, seconds, spent, peak, may_fail=may_fail)


def ask(
    stack: LocalStack, command: list[str], put: Callable[[int], None], drains: int, *, may_fail: bool = False
) -> Child:
    """Asks one child for so many drains, each after `put(number)` has committed some rows.

    The first drain finds nothing and opens connections; it is not measured, nor are start-up and `put`.
    """
    seconds, spent = 0.0, [0.0] * 4
    with tempfile.TemporaryFile() as errors:
        process = subprocess.Popen(
            command, env=stack.environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True
        )
        assert process.stdin is not None
        with _sampled(process.pid) as peak:
            try:
                exporter = psutil.Process(process.pid)
                alive = _drained(process)
                for number in range(drains):
                    put(number)
                    before = [_cpu_s(exporter), *_cpu_s_of(stack)]
                    started = time.monotonic()
                    alive = alive and _drained(process)
                    if not alive:
                        break
                    seconds += time.monotonic() - started
                    once = _since(before, [_cpu_s(exporter), *_cpu_s_of(stack)])
                    spent = [sum(pair) for pair in zip(spent, once, strict=True)]
            finally:
                with contextlib.suppress(BrokenPipeError):
                    process.stdin.close()
                _reap(process)
        return _finished(process.returncode, errors, seconds, spent, peak, may_fail=may_fail)


def _finished(
    status: int, output: IO[bytes], seconds: float, spent: list[float], peak: _Peak, *, may_fail: bool
) -> Child:
    failure = ""
    if status:
        output.seek(0)
        text = output.read().decode(errors="replace").strip() or f"exit status {status}"
        if not may_fail:
            raise ChildFailed(text[-3_000:])
        failure = text.splitlines()[-1][:FAILURE_CHARACTERS]
    cpu_s, mysql_cpu_s, clickhouse_cpu_s, machine_cpu_s = spent
    return Child(
        seconds=seconds,
        cpu_s=cpu_s,
        mysql_cpu_s=mysql_cpu_s,
        clickhouse_cpu_s=clickhouse_cpu_s,
        others_cpu_s=max(0.0, machine_cpu_s - cpu_s - mysql_cpu_s - clickhouse_cpu_s),
        peak_rss_mb=peak.rss_bytes / 1e6,
        failure=failure,
    )


def _drained(process: subprocess.Popen[str]) -> bool:
    """Asks for one drain and waits for it; False when the child has ended instead."""
    assert process.stdin is not None
    assert process.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        process.stdin.write("\n")
        process.stdin.flush()
        return any(line.startswith(ANSWER) for line in process.stdout)
    return False


def _reap(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> float:
    """Waits; returns the CPU seconds of the process and of the children that it waited for.

    Its `ru_maxrss` is of no use: Linux includes the memory of the parent that forked it.
    """
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    return usage.ru_utime + usage.ru_stime


@dataclass(slots=True)
class _Peak:
    rss_bytes: int = 0
    stopped: threading.Event = field(default_factory=threading.Event)


@contextlib.contextmanager
def _sampled(pid: int) -> Iterator[_Peak]:
    """The peak memory of the process and its descendants while the body runs."""
    peak = _Peak()
    sampling = threading.Thread(target=_sample, args=(pid, peak), daemon=True)
    sampling.start()
    try:
        yield peak
    finally:
        peak.stopped.set()
        sampling.join()


def _sample(pid: int, peak: _Peak) -> None:
    tree: list[psutil.Process] = []
    for number in itertools.count():
        if number % TREE_EVERY_SAMPLES == 0:
            with contextlib.suppress(psutil.Error):
                root = psutil.Process(pid)
                tree = [root, *root.children(recursive=True)]
        rss_bytes = 0
        for process in tree:
            with contextlib.suppress(psutil.Error):
                rss_bytes += process.memory_info().rss
        peak.rss_bytes = max(peak.rss_bytes, rss_bytes, _peak_of_one(pid))
        if peak.stopped.wait(SAMPLED_EVERY_S):
            return


def _peak_of_one(pid: int) -> int:
    """Bytes of the process's own peak since its start, on Linux: samples miss short peaks."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def _cpu_s_of(stack: LocalStack) -> list[float]:
    """CPU seconds of MySQL, of ClickHouse, and of the whole machine, until now."""
    machine = psutil.cpu_times()
    # `user` includes the time of guests already, and other machines used the stolen time.
    not_ours = ("idle", "iowait", "guest", "guest_nice", "steal")
    machine_s = sum(machine) - sum(getattr(machine, name, 0.0) for name in not_ours)
    return [*(_cpu_s(psutil.Process(pid)) for pid in (stack.mysql.pid, stack.clickhouse.pid)), machine_s]


def _cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _since(before: list[float], now: list[float]) -> list[float]:
    return [later - earlier for earlier, later in zip(before, now, strict=True)]
