"""Starting and stopping the embedded ClickHouse, a server process of its own on loopback.

What belongs here: the process's life, from a free port to a kill, and the URL under which clients find
it. What does not: the server itself (`clickhouse_server.py`, which needs chdb and starlette; this
module needs neither) and the tables in it.
"""

from __future__ import annotations

import http.client
import os
import secrets
import sys
from pathlib import Path
from types import TracebackType

from auditexport_pipeline.core.errors import LocalServerFailed
from auditexport_pipeline.local.processes import Child, free_port

# The package is imported from where this file lies, whatever the working directory and whether or not
# it is installed.
SOURCE_ROOT = Path(__file__).resolve().parents[2]
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from auditexport_pipeline.local.clickhouse_server import main; main()"
)
PASSWORD_VARIABLE = "AUDITEXPORT_EMBEDDED_CLICKHOUSE_PASSWORD"
# A ping is answered by the event loop, whatever the engine is busy with.
PING_WITHIN_S = 2.0


class LocalClickHouse:
    """An embedded ClickHouse on `directory`, which keeps its data over stops, kills and starts.

    The port is chosen at the first `start()` unless given, and kept from then on. `config` is a configuration file
    of ClickHouse's for the next `start()`; without, its one user may do everything. `python` is the interpreter whose
    environment has the engine, by default this one. `password` is that of its one user, made at random unless given; an empty
    one lets every program of this machine in. As a context manager it is started on entry and stopped on exit.
    Not thread-safe.
    """

    def __init__(
        self,
        directory: Path,
        *,
        port: int | None = None,
        config: Path | None = None,
        python: Path | None = None,
        password: str | None = None,
    ) -> None:
        self.directory = directory
        self.config = config
        self.python = python
        self._password = secrets.token_urlsafe(24) if password is None else password
        self._port = port
        self._child: Child | None = None

    def start(self) -> str:
        """Starts the server, waits until it answers, and returns `url`; just that if it runs already.

        Raises `LocalServerFailed` when it ends or does not answer.
        """
        if self.running:
            return self.url
        if self._port is None:
            self._port = free_port()
        self.stop()
        child = Child(
            "ClickHouse (embedded)",
            [
                *(str(self.python or sys.executable), "-c", START, str(SOURCE_ROOT)),
                *("--directory", str(self.directory), "--port", str(self._port)),
                *(("--config", str(self.config)) if self.config is not None else ()),
            ],
            log=self.directory / "server.log",
            env={**os.environ, PASSWORD_VARIABLE: self._password},  # not an argument, which every user can list
        )
        self._child = child
        try:
            child.wait_until(self._answers)
        except BaseException:
            child.stop()
            raise
        return self.url

    def stop(self) -> None:
        """Ends the server; running statements get a few seconds. A second call does nothing."""
        if self._child is not None:
            self._child.stop()

    def kill(self) -> None:
        """SIGKILL, as a crash."""
        if self._child is not None:
            self._child.kill()

    @property
    def running(self) -> bool:
        return self._child is not None and self._child.running

    @property
    def pid(self) -> int:
        """The server's process id, also after its end. Raises `LocalServerFailed` before `start()`."""
        if self._child is None:
            raise LocalServerFailed("the embedded ClickHouse has not been started; call start() first")
        return self._child.pid

    @property
    def url(self) -> str:
        """For `clickhouse_connect.get_client(dsn=…)`. Raises `LocalServerFailed` before `start()`."""
        if self._port is None:
            raise LocalServerFailed("the embedded ClickHouse has no port yet; call start() first")
        password = f":{self._password}" if self._password else ""
        return f"http://default{password}@127.0.0.1:{self._port}/default"

    def __enter__(self) -> LocalClickHouse:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _answers(self) -> bool:
        """Whether *this* server answers: another one on the same port has another process id."""
        assert self._port is not None
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=PING_WITHIN_S)
        try:
            connection.request("GET", "/ping")
            answer = connection.getresponse()
            answer.read()
        except (OSError, http.client.HTTPException):
            return False
        finally:
            connection.close()
        return answer.getheader("X-ClickHouse-Server-Display-Name") == f"embedded-{self.pid}"
