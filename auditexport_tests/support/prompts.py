"""The prompt as a process: what an operator types, what comes back, and being interrupted.

What belongs here: starting `auditexport …` and reading what it says. What does not: what any command does.
"""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest
from click.testing import CliRunner, Result

from auditexport_pipeline.cli import main
from auditexport_tests.support.stack import Stack
from auditexport_tests.support.waiting import wait_until

Prompt = Callable[..., Result]
_ARGV = [sys.executable, "-m", "auditexport_pipeline.cli"]


def urls(stack: Stack) -> dict[str, str]:
    return {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}


def prompt_in(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Prompt:
    """`auditexport …` in this process, with an environment; asserts the exit status, unless it is None."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)

    def run(*words: str, status: int | None = 0) -> Result:
        done = CliRunner().invoke(main, list(words), catch_exceptions=False)
        assert status is None or done.exit_code == status, f"{words}: {done.output}"
        return done

    return run


@contextmanager
def started(stack: Stack, *words: str, **environment: str) -> Iterator[subprocess.Popen[str]]:
    """`auditexport …` as a process of its own, killed at the end if it is still there."""
    process = subprocess.Popen(
        [*_ARGV, *words],
        env={**os.environ, **urls(stack), "COLUMNS": "200", "PYTHONUNBUFFERED": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.communicate()


class Terminal:
    """`auditexport …` at a terminal of 80 columns and 24 lines: `shown` is everything that was written to it."""

    def __init__(self, pid: int, master: int) -> None:
        self.pid = pid
        self._master = master
        self.shown = ""

    def wait_for(self, text: str) -> None:
        wait_until(lambda: self._read() and text in self.shown, what=f"{text!r} on the terminal", every_s=0.0)

    def press_ctrl_c(self) -> None:
        os.write(self._master, b"\x03")

    def exit_status(self) -> int:
        """Reads to the end and returns the exit status."""
        while self._read():
            pass
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])

    def _read(self) -> bool:
        with suppress(OSError):  # Linux's way to say that the other side is closed
            data = os.read(self._master, 65_536)
            self.shown += data.decode(errors="replace")
            return bool(data)
        return False


@contextmanager
def at_a_terminal(stack: Stack, *words: str, **environment: str) -> Iterator[Terminal]:
    # Not pty.fork(): the tests have threads. The child makes the terminal its controlling one, so that ^C reaches it.
    master, slave = pty.openpty()
    process = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import fcntl, os, sys, termios; os.setsid(); fcntl.ioctl(0, termios.TIOCSCTTY, 0); "
            "fcntl.ioctl(0, termios.TIOCSWINSZ, b'\\x18\\0\\x50\\0\\0\\0\\0\\0'); os.execv(sys.argv[1], sys.argv[1:])",
            *_ARGV,
            *words,
        ],
        env={**_without_size(), **urls(stack), "TERM": "xterm", **environment},
        stdin=slave,
        stdout=slave,
        stderr=slave,
    )
    os.close(slave)
    terminal = Terminal(process.pid, master)
    try:
        yield terminal
    finally:
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        os.close(master)
        with suppress(ChildProcessError):
            os.waitpid(process.pid, 0)
        process.returncode = 0  # reaped above


def _without_size() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
