"""Starting and stopping the embedded ClickHouse, a server process of its own on loopback.

The server itself is `clickhouse_server.py`, which needs chdb and starlette; this module needs neither.
"""

from __future__ import annotations

import os
import secrets
import sys
from pathlib import Path

from auditexport_pipeline.local.processes import LocalServer, headers_of

# The child imports the package from this file's directory, whether or not it is installed.
SOURCE_ROOT = Path(__file__).resolve().parents[2]
START = (
    "import sys; sys.path.insert(0, sys.argv.pop(1)); "
    "from auditexport_pipeline.local.clickhouse_server import main; main()"
)
PASSWORD_VARIABLE = "AUDITEXPORT_EMBEDDED_CLICKHOUSE_PASSWORD"


class LocalClickHouse(LocalServer):
    """An embedded ClickHouse on `directory`.

    `config` is a ClickHouse configuration file for the next `start()`; without one, the only user has all rights. `python` is
    the interpreter whose environment has the engine, by default this one. `password` is the only user's, random unless given;
    an empty one admits every program of this machine.
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
        super().__init__(port)
        self.name = f"the embedded ClickHouse in {directory}"
        self.directory = directory
        self.log = directory / "server.log"
        self.config = config
        self.python = python
        self._password = secrets.token_urlsafe(24) if password is None else password

    @property
    def url(self) -> str:
        """For `clickhouse_connect.get_client(dsn=…)`. Raises `LocalServerFailed` before `start()`."""
        password = f":{self._password}" if self._password else ""
        return f"http://default{password}@127.0.0.1:{self.port}/default"

    def _argv(self) -> list[str]:
        return [
            *(str(self.python or sys.executable), "-c", START, str(SOURCE_ROOT)),
            *("--directory", str(self.directory), "--port", str(self.port)),
            *(("--config", str(self.config)) if self.config is not None else ()),
        ]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, PASSWORD_VARIABLE: self._password}  # not an argument, which every user can list

    def _answers(self) -> bool:
        # The event loop answers a ping, whatever the engine is busy with.
        headers = headers_of(self.port, "/ping")
        return (
            headers is not None
            and self._child is not None
            and headers["X-ClickHouse-Server-Display-Name"] == f"embedded-{self._child.pid}"
        )
