"""A ClickHouse of the test's own, with a configuration, and with grants, a profile and a row policy for its only user.

A restart costs a second of CPU: a module shares one server, and nothing is restarted for a configuration that it has.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from auditexport_pipeline import preflight
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.engines import local_clickhouse

ALL = ("GRANT ALL ON *.* WITH GRANT OPTION",)
_USERS = """
<clickhouse>
  <profiles><default>{profile}</default></profiles>
  <quotas><default/></quotas>
  <users><default>
    <password/> <networks><ip>::/0</ip></networks> <profile>default</profile> <quota>default</quota>
    <databases>{policy}</databases>
    <grants>{grants}</grants>
  </default></users>
</clickhouse>
"""


class OwnClickHouse:
    """`extra` and `profile` are XML; `grants` are GRANT statements without a user; `policy` is XML of the user's
    databases.
    """

    def __init__(self, mysql_server: str, directory: Path, extra: str = "") -> None:
        self._mysql_server = mysql_server
        self._directory = directory
        self._extra = extra
        self._stacks: list[Stack] = []
        self._exits = ExitStack()
        self.server = local_clickhouse(directory / "clickhouse", config=directory / "config.xml")
        self._now = self._write()

    def _write(
        self, profile: str = "", grants: Iterable[str] = ALL, policy: str = "", extra: str = ""
    ) -> tuple[str, ...]:
        queries = "".join(f"<query>{grant}</query>" for grant in grants)
        users = self._directory / "users.xml"
        users.write_text(_USERS.format(profile=profile, grants=queries, policy=policy))
        config = f"<clickhouse><users_config>{users}</users_config>{self._extra}{extra}</clickhouse>"
        (self._directory / "config.xml").write_text(config)
        return profile, queries, policy, extra

    def restart(self, *, profile: str = "", grants: Iterable[str] = ALL, policy: str = "", extra: str = "") -> None:
        """Without arguments: the user may do everything, with ClickHouse's defaults."""
        written = self._write(profile, grants, policy, extra)
        preflight.forget()
        if written == self._now:
            return
        for stack in self._stacks:
            stack.log.client().close_connections()
        self.server.stop()
        self.server.start()
        self._now = written
        for stack in self._stacks:
            stack.log.connection.read_settings_again()

    def new_stack(self) -> Stack:
        """Two databases, the ClickHouse one on this server. They are dropped when the server stops."""
        self.restart()
        stack = self._exits.enter_context(fresh_stack(self._mysql_server, self.server.url.removesuffix("default")))
        self._stacks.append(stack)
        return stack

    @contextmanager
    def running(self) -> Iterator[OwnClickHouse]:
        with self.server, self._exits:
            yield self
            self.restart()
