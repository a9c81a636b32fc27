"""A place to run the exporter in: its own directories, a user with a password, canaries in events and secrets.

What belongs here: planting canaries, running `program` under watch, and the places to search afterwards. What does not:
what is run, and what must not be found.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pymysql

from auditexport_pipeline.roles import MYSQL_GRANTS, Role
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, event
from auditexport_tests.integration.security.canaries import Place, Search, Watch, as_bytes, new_canary
from auditexport_tests.integration.security.conftest import Servers
from auditexport_tests.integration.security.gate import Gate

OURS = (
    "clickhouse_outbox_batch",
    "clickhouse_outbox_dead_letter",
    "clickhouse_outbox_action",
    "clickhouse_outbox_erasure",
)
WITHIN_S = 240.0
# Around every canary: quotes, a line break and letters beyond ASCII, as in real events.
ODD = '"\n\\ ünï %s {x} '
REFUSED = "refused: "


@dataclass(kw_only=True)
class Site:
    """`secrets` and `events` are the canaries, by the place in which they are planted."""

    directory: Path
    stack: Stack
    servers: Servers
    secrets: dict[str, str]
    events: dict[str, str]
    search: Search = field(init=False)
    outputs: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.search = Search({**self.secrets, **self.events})
        for name in ("dagster_home", "tmp", "home", "output"):
            (self.directory / name).mkdir(exist_ok=True)

    # ── planting ─────────────────────────────────────────────────────────────────────────────────

    def password(self, name: str) -> str:
        """A secret as a password that a URL must quote."""
        return f"{self.secrets[name]}@/:%#?+"

    def admit(self, user: str, secret: str) -> None:
        """Creates a user with the grants of exporter and reader."""
        database = self.stack.outbox.engine.url.database
        with closing(self._root()) as root, root.cursor() as cursor:
            cursor.execute(f"CREATE USER '{user}'@'127.0.0.1' IDENTIFIED BY %s", (self.password(secret),))
            for role in (Role.EXPORTER, Role.READER):
                for table, privileges in MYSQL_GRANTS[role].items():
                    cursor.execute(f"GRANT {', '.join(privileges)} ON {database}.{table} TO '{user}'@'127.0.0.1'")

    def expel(self, user: str) -> None:
        """Drops a user and cuts its connections, as an administrator does with a stolen account."""
        with closing(self._root()) as root, root.cursor() as cursor:
            cursor.execute(f"DROP USER IF EXISTS '{user}'@'127.0.0.1'")
            cursor.execute("SELECT id FROM information_schema.processlist WHERE user = %s", (user,))
            for (connection_id,) in cursor.fetchall():
                cursor.execute(f"KILL {int(connection_id)}")

    def _root(self) -> Any:
        connection = pymysql.connect(host="127.0.0.1", port=self.servers.mysql.port, user="root", autocommit=True)
        with connection.cursor() as cursor:
            # The administrator's statements do not belong into the log of the exporter's.
            cursor.execute("SET SESSION sql_log_off = 1")
        return connection

    def insert(self, prefix: str, count: int) -> int:
        """Good rows, rows that cannot be decoded, and rows that ClickHouse refuses; all with canaries.

        Returns how many there are of a known version.
        """
        planted = {name: ODD + text + ODD for name, text in self.events.items()}
        rows = [
            event(
                f"{prefix}_{number}",
                description=planted["description"],
                remote_ip=planted["remote_ip"],
                actor={
                    "type": "user",
                    "id": planted["actor"],
                    "meta": {self.events["meta key"]: planted["meta value"]},
                },
                targets=[{"type": "key", "id": "k", "name": planted["target"], "meta": {"list": [planted["target"]]}}],
                unknown_field=planted["unknown field"],
            )
            for number in range(count)
        ]
        rows += [event(f"{prefix}_refused_{number}", description=REFUSED + planted["refused"]) for number in range(2)]
        malformed = planted["malformed"]
        rows += [
            ("ws_1", f"{prefix}_array", json.dumps([malformed])),
            ("ws_1", f"{prefix}_string", json.dumps(malformed)),
            ("ws_1", f"{prefix}_missing", json.dumps({"event_id": f"{prefix}_missing", "description": malformed})),
            event(f"{prefix}_time", time=malformed),
            event(f"{prefix}_meta", meta=malformed),
            event(f"{prefix}_actor", actor={"id": {malformed: malformed}}),
            event(f"{prefix}_dot", meta={f"{malformed}%2E": malformed}),
            event(f"{prefix}_precision", meta={malformed: [2**60]}),
            event(f"{prefix}_range", meta={malformed: {malformed: 2**70}}),
            ("ws_1", f"{prefix}_identity", event(malformed[:40] + self.events["malformed"])[2]),
            ("ws_1", f"{prefix}_tenant", event(f"{prefix}_tenant", workspace_id=self.events["malformed"])[2]),
            ("ws_1", f"{prefix}_twice", event("x")[2].replace('"x"', f'"{prefix}_twice"')[:-1] + self._twice()),
        ]
        self.stack.put(*rows)
        invalid = 0
        if self.servers.mysql.family == "mariadb":  # MySQL's JSON type takes no such text
            with self.stack.outbox.engine.begin() as connection:
                connection.exec_driver_sql("SET SESSION check_constraint_checks = 0")
                connection.exec_driver_sql(
                    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                    "VALUES ('audit_log.v1', 'ws_1', %s, %s, 1)",
                    (f"{prefix}_text", '{"description": "' + self.events["malformed"]),
                )
                connection.exec_driver_sql("SET SESSION check_constraint_checks = 1")
            invalid = 1
        self.stack.put(event(f"{prefix}_v99", description=planted["description"]), version="audit_log.v99")
        return len(rows) + invalid

    def _twice(self) -> str:
        key = json.dumps(self.events["malformed"])
        return f', "meta": {{{key}: 1, {key}: {{"a": {key}}}}}}}'

    # ── running ──────────────────────────────────────────────────────────────────────────────────

    def mysql_url(self, user: str, secret: str, port: int | None = None) -> str:
        database = self.stack.outbox.engine.url.database
        where = f"127.0.0.1:{port or self.servers.mysql.port}/{database}"
        return f"mysql+pymysql://{user}:{quote(self.password(secret), safe='')}@{where}"

    def clickhouse_url(self, gate: Gate, secret: str = "ClickHouse password") -> str:
        return f"http://default:{quote(self.password(secret), safe='')}@127.0.0.1:{gate.port}/{self.database}"

    @property
    def database(self) -> str:
        return self.stack.clickhouse_url.rpartition("/")[2]

    def environment(self) -> dict[str, str]:
        mine = {name: value for name, value in os.environ.items() if not name.startswith("AUDITEXPORT_")}
        return {
            **mine,
            "PYTHONPATH": str(ROOT),
            "DAGSTER_HOME": str(self.directory / "dagster_home"),
            "TMPDIR": str(self.directory / "tmp"),
            "HOME": str(self.directory / "home"),
            "COLUMNS": "200",
        }

    def run(
        self, name: str, steps: list[dict[str, object]], watch: Watch, until: Callable[[], object] | None = None
    ) -> dict[str, str]:
        """Runs the steps in one process and returns the result of each, by name.

        With `until`, which is called after the start, the process is killed (SIGKILL) when it returns.
        """
        output = self.directory / "output" / name
        with output.open("wb") as out, Path(f"{output}.err").open("wb") as err:
            process = subprocess.Popen(
                [sys.executable, "-m", "auditexport_tests.integration.security.program"],
                cwd=ROOT,
                env=self.environment(),
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
            )
            watch.pid = process.pid
            assert process.stdin is not None
            process.stdin.write(json.dumps(steps).encode())
            process.stdin.close()
            try:
                if until is not None:
                    until()
                    watch.look()
                    process.kill()
                process.wait(WITHIN_S)
            finally:
                process.kill()
                process.wait()
        text = output.read_text() + Path(f"{output}.err").read_text()
        self.outputs.append(text)
        return dict(line[3:].rsplit(": ", 1) for line in text.splitlines() if line.startswith("== "))

    # ── looking ──────────────────────────────────────────────────────────────────────────────────

    def record_statements(self, *, on: bool) -> None:
        """MySQL's general log: every statement as the server gets it. Off while the application writes."""
        with closing(self._root()) as root, root.cursor() as cursor:
            cursor.execute("SET GLOBAL general_log_file = %s", (str(self.servers.mysql.directory / "general.log"),))
            cursor.execute(f"SET GLOBAL general_log = {int(on)}")

    def look_everywhere(self) -> Search:
        """Searches everything that remains after the processes have ended."""
        search = self.search
        search.look_at_files("DAGSTER_HOME", self.directory / "dagster_home")
        search.look_at_files("temporary files, after", self.directory / "tmp")
        search.look_at_files("home directory", self.directory / "home")
        search.look_at_files("standard output and error", self.directory / "output")
        for table in OURS:
            for row in self.stack.sql(f"SELECT * FROM {table}"):
                search.look("MySQL: our tables", table, *as_bytes(row))
        mysql = self.servers.mysql
        search.look("MySQL: every statement received", "general.log", (mysql.directory / "general.log").read_bytes())
        search.look("MySQL: the server's log", mysql.log.name, mysql.log.read_bytes())
        search.look("ClickHouse: the server's log", "server.log", self._clickhouse_log().read_bytes())
        search.places.setdefault("ClickHouse: system log tables", Place())  # an embedded engine keeps next to none
        for (table,) in self.stack.clickhouse("SELECT name FROM system.tables WHERE database = 'system'"):
            if str(table).endswith("_log"):
                for row in self.stack.clickhouse(f"SELECT * FROM system.{table}"):
                    search.look("ClickHouse: system log tables", str(table), *as_bytes(row))
        return search

    def _clickhouse_log(self) -> Path:
        return self.servers.clickhouse.directory / "server.log"


SECRETS = (
    "MySQL password",
    "wrong password",
    "second password",
    "ClickHouse password",
    "heartbeat URL",
    "unquoted password",
)
EVENTS = (
    *("description", "remote_ip", "actor", "meta key", "meta value", "target"),
    *("unknown field", "refused", "malformed"),
)


def new_site(directory: Path, stack: Stack, servers: Servers) -> Site:
    """A site with the repository's dagster.yaml, fresh canaries, and a table that refuses some descriptions."""
    site = Site(
        directory=directory,
        stack=stack,
        servers=servers,
        secrets={name: new_canary() for name in SECRETS},
        events={name: new_canary() for name in EVENTS},
    )
    (directory / "dagster_home" / "dagster.yaml").write_bytes((ROOT / "dagster.yaml").read_bytes())
    stack.clickhouse(
        f"ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT no_x CHECK NOT startsWith(description, '{REFUSED}')"
    )
    return site
