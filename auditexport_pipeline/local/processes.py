"""Server processes that live no longer than the process that started them.

Each server runs under a small supervisor (`supervisor.py`), which holds one end of a pipe. When the process that started it
ends, even by SIGKILL, the pipe closes and the supervisor stops the server.
"""

from __future__ import annotations

import contextlib
import fcntl
import http.client
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from email.message import Message
from pathlib import Path
from typing import IO, TypeVar

from auditexport_pipeline.core.errors import LocalServerFailed

# A first start on a loaded two-core machine, with a data directory to recover, took up to 20 s.
READY_WITHIN_S = 90.0
ANSWER_WITHIN_S = 2.0
SUPERVISOR = Path(__file__).with_name("supervisor.py")

AnyServer = TypeVar("AnyServer", bound="LocalServer")


def free_port() -> int:
    """A TCP port on 127.0.0.1 on which nothing listens at this moment."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def headers_of(port: int, path: str) -> Message | None:
    """The headers of the answer to a GET on 127.0.0.1; None without an answer, or when its status is not 200."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=ANSWER_WITHIN_S)
    with contextlib.closing(connection), contextlib.suppress(OSError, http.client.HTTPException):
        connection.request("GET", path)
        answer = connection.getresponse()
        if answer.status == 200:
            return answer.headers
    return None


def lock_directory(directory: Path, in_use: str) -> IO[bytes]:
    """Locks a directory until the returned file is closed or this process ends; makes it when it is missing.

    Raises `LocalServerFailed` with the text `in_use` when another process holds the lock.
    """
    directory.mkdir(parents=True, exist_ok=True)
    lock = (directory / "lock").open("ab")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise LocalServerFailed(in_use) from error
    return lock


def tail(text: str, lines: int = 5) -> str:
    """The last lines of a log, in one line."""
    return " | ".join(text.strip().splitlines()[-lines:])


class Child:
    """One supervised server process.

    Starts `argv` at once and appends its output to `log`. `pid` is the server's own process id. Raises `LocalServerFailed`
    when it cannot be started.
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
        report_end, child_end = os.pipe()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", str(SUPERVISOR), str(child_end), str(int(stop_signal)), *argv],
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                pass_fds=(child_end,),
                env=env,
                start_new_session=True,  # Ctrl-C reaches this process only, which decides in which order servers stop
            )
        os.close(child_end)
        with os.fdopen(report_end, "r") as report:
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
        """Stops the server by `stop_signal`, and kills it after a grace period. A second call does nothing."""
        if self._supervisor.stdin is not None:
            with contextlib.suppress(BrokenPipeError):
                self._supervisor.stdin.close()
        self._supervisor.wait()

    def kill(self) -> None:
        """SIGKILL, as in a crash."""
        # Once the supervisor has reaped the server, its process id may be another process's.
        if self.running:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, signal.SIGKILL)
        self.stop()

    def log_tail(self, lines: int = 5) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return tail(text, lines) or f"nothing in {self.log}"


class LocalServer:
    """A private server on loopback, whose data survives stops, kills and starts. A context manager. Not thread-safe.

    Without a given port the first `start()` chooses one; later starts use the same.
    """

    name: str
    log: Path

    def __init__(self, port: int | None) -> None:
        self._port = port
        self._child: Child | None = None

    def start(self) -> str:
        """Starts the server, waits until it answers, and returns its `url`; a second call only returns it.

        Raises `LocalServerFailed` when its directory or port is in use, when it ends early or when it does not answer.
        """
        if self.running:
            return self.url
        self.stop()
        try:
            self._prepare()
            if self._port is None:
                self._port = free_port()
            elif not is_free(self._port):
                raise LocalServerFailed(f"{self.name}: port {self._port} is taken")
            self._child = Child(self.name, self._argv(), log=self.log, env=self._environment())
            self._child.wait_until(self._answers)
        except BaseException:
            self.stop()
            raise
        return self.url

    def stop(self) -> None:
        """A clean stop. A second call does nothing."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL of the server, as in a crash."""
        if self._child is not None:
            self._child.kill()
        self.stop()

    def __enter__(self: AnyServer) -> AnyServer:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def pid(self) -> int:
        """The server's own process id. Raises `LocalServerFailed` when it is not running."""
        if self._child is None or not self._child.running:
            raise LocalServerFailed(f"{self.name} is not running")
        return self._child.pid

    @property
    def port(self) -> int:
        """Raises `LocalServerFailed` before the first `start()`, unless it was given."""
        if self._port is None:
            raise LocalServerFailed(f"{self.name} has no port before its first start")
        return self._port

    @property
    def url(self) -> str:
        raise NotImplementedError

    def _prepare(self) -> None:
        """Prepares the server's directory."""

    def _argv(self) -> list[str]:
        raise NotImplementedError

    def _environment(self) -> dict[str, str] | None:
        return None

    def _answers(self) -> bool:
        """Whether this server answers, and not another one on the same port."""
        raise NotImplementedError
