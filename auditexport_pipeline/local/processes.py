"""Server processes that live no longer than the process that started them.

What belongs here: starting a server under a tiny supervisor, waiting until it is ready, stopping and
killing it by its process id. What does not: anything about MySQL or ClickHouse.

The supervisor holds one end of a pipe. When the starting process ends in whatever way, SIGKILL
included, the pipe closes and the supervisor stops the server, so a crash leaves nothing behind.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from auditexport_pipeline.core.errors import LocalServerFailed

# A first start on a loaded two-core machine, with a data directory to recover, took up to 20 s.
READY_WITHIN_S = 90.0
SUPERVISOR = Path(__file__).with_name("supervisor.py")


def free_port() -> int:
    """A TCP port on 127.0.0.1 that nothing listens on at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


class Child:
    """One supervised server process.

    `argv` is started at once, its output appended to `log`. `pid` is the server's own process id.
    Raises `LocalServerFailed` when it cannot be started.
    """

    def __init__(
        self,
        name: str,
        argv: Sequence[str],
        *,
        log: Path,
        env: Mapping[str, str] | None = None,
        stop_signal: signal.Signals = signal.SIGTERM,
    ) -> None:
        self.name = name
        self.log = log
        self._read_end, child_end = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(child_end), str(int(stop_signal)), *argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(child_end,),
                env=env,
                start_new_session=True,  # Ctrl-C is for us; we decide the order in which servers stop
            )
        os.close(child_end)
        with os.fdopen(self._read_end, "r") as report:
            answer = report.readline().strip()
        if not answer.isdigit():
            self.stop()
            raise LocalServerFailed(f"{name} could not be started: {answer or 'no process id'}")
        self.pid = int(answer)

    @property
    def running(self) -> bool:
        return self._supervisor.poll() is None

    def wait_until(self, ready: Callable[[], bool], *, within_s: float = READY_WITHIN_S) -> None:
        """Returns when `ready()` is true; raises `LocalServerFailed` with the log's tail otherwise."""
        deadline = time.monotonic() + within_s
        while time.monotonic() < deadline:
            if not self.running:
                self.stop()
                raise LocalServerFailed(f"{self.name} ended while starting: {self.log_tail()}")
            if ready():
                return
            time.sleep(0.02)
        self.kill()
        raise LocalServerFailed(f"{self.name} was not ready within {within_s:.0f} s: {self.log_tail()}")

    def stop(self) -> None:
        """Asks the server to stop (`stop_signal`); it is killed past a grace period. A second call does nothing."""
        if self._supervisor.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()
        self._supervisor.wait()

    def kill(self) -> None:
        """SIGKILL, as a crash: the server gets no chance to tidy up."""
        # Once the supervisor has reaped the server, its process id may be somebody else's.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def log_tail(self, lines: int = 5) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return " | ".join(text.splitlines()[-lines:]) or f"nothing in {self.log}"
