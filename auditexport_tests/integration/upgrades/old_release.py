"""The old release in a process of its own: unpacked beside the new one, with the same installed packages.

What belongs here: the process and what is asked of it. What does not: what must hold afterwards (`test_upgrades`).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path
from types import TracebackType
from typing import Any

HERE = Path(__file__).parent
ARCHIVE = HERE / "release_7233b52.tar.xz"


class OldRelease:
    """A context manager; `ask` and `begin`/`end` speak to the process, one request at a time."""

    def __init__(self, directory: Path) -> None:
        with tarfile.open(ARCHIVE) as archive:
            archive.extractall(directory, filter="data")
        self._directory = directory

    def __enter__(self) -> OldRelease:
        self._start()
        return self

    def _start(self) -> None:
        self._unanswered = 0
        self._child = subprocess.Popen(
            [sys.executable, str(HERE / "child.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            cwd=self._directory,
            env={**os.environ, "PYTHONPATH": str(self._directory), "PYTHONWARNINGS": "ignore"},
            text=True,
        )

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end()

    def _end(self) -> None:
        self._child.kill()
        self._child.communicate()

    def settle(self) -> None:
        """Ends what a failed test left under way: its locks would outlive the test."""
        if self._unanswered:
            self._end()
            self._start()

    def ask(self, verb: str, **arguments: Any) -> dict[str, Any]:
        """What the old release answers; fails when it ended with an error that it does not know."""
        self.begin(verb, **arguments)
        return self.end()

    def begin(self, verb: str, **arguments: Any) -> None:
        self._unanswered += 1
        self._say(json.dumps({"verb": verb, **arguments}))

    def end(self) -> dict[str, Any]:
        assert self._child.stdout is not None
        answer = json.loads(self._child.stdout.readline())
        self._unanswered -= "paused" not in answer
        assert "unforeseen" not in answer, answer["unforeseen"]
        return dict(answer)

    def wake(self) -> dict[str, Any]:
        """Lets a paused drain go on to its end."""
        self._say("")
        return self.end()

    def _say(self, line: str) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(line + "\n")
        self._child.stdin.flush()
