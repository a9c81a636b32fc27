"""A deployment as the units start it: PostgreSQL, code server over gRPC, webserver and daemon, and a drain through them.

What belongs here: the commands, environments and settings of `auditexport_pipeline/deploy`, run for real with other ports
and paths. What does not: containers, which are not started by any test, and systemd's sandbox.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
import sqlalchemy as sa

from auditexport_pipeline.local.processes import Child, free_port
from auditexport_tests.conftest import Stack
from auditexport_tests.e2e.servers import UP_WITHIN_S, postgres
from auditexport_tests.integration.dagster.conftest import events, everything_once
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.unit.test_deploy import DEPLOY, started, unit, variables

pytestmark = pytest.mark.timeout(900)


@dataclass(slots=True, kw_only=True)
class Deployment:
    """The three services on loopback, each with the command and the environment files of its unit."""

    home: Path
    storage_url: str
    stack: Stack
    code_port: int = field(default_factory=free_port)
    page_port: int = field(default_factory=free_port)
    services: dict[str, Child] = field(default_factory=dict)

    def environment(self, name: str) -> dict[str, str]:
        """What systemd would give the service: the variables of its files, and a PATH."""
        values = {
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_POSTGRES_URL": self.storage_url,
            "AUDITEXPORT_MYSQL_URL": self.stack.mysql_url,
            "AUDITEXPORT_CLICKHOUSE_URL": self.stack.clickhouse_url,
            "AUDITEXPORT_OUTBOXES": settings_file(self.home, sensor_rows=1, drain={"batch_rows": 50}),
        }
        environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin"}
        for path in unit(DEPLOY / "systemd" / f"auditexport-{name}.service")["EnvironmentFile"]:
            named = variables(f"{Path(path).name}.example")
            environment |= {variable: value for variable, value in values.items() if variable in named}
        return environment

    def start(self, name: str) -> None:
        command = started(DEPLOY / "systemd" / f"auditexport-{name}.service")
        places = {
            "/opt/auditexport/bin/": f"{Path(sys.executable).parent}/",
            "/var/lib/auditexport/": f"{self.home}/",
        }
        for shipped, here in places.items():
            command = [word.replace(shipped, here) for word in command]
        ports = {"4266": str(self.code_port), "3000": str(self.page_port)}
        command = [ports.get(word, word) for word in command]
        self.services[name] = Child(
            name, command, log=self.home.parent / f"{name}.log", env={**self.environment(name), **self._ours()}
        )

    def stop(self) -> None:
        for service in reversed(self.services.values()):
            service.stop()

    def dagster(self, *words: str) -> str:
        """`dagster …` on the command line, with the environment of the daemon; returns what it printed."""
        done = subprocess.run(
            [str(Path(sys.executable).parent / "dagster"), *words],
            env={**self.environment("daemon"), **self._ours()},
            cwd=self.home,
            capture_output=True,
            text=True,
            timeout=180,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    def ask(self, query: str) -> dict[str, Any]:
        answer = httpx.post(
            f"http://127.0.0.1:{self.page_port}/graphql", json={"query": query}, timeout=60, trust_env=False
        ).json()
        assert "errors" not in answer, answer
        data: dict[str, Any] = answer["data"]
        return data

    def runs(self) -> list[dict[str, str]]:
        found = self.ask("{ runsOrError { ... on Runs { results { runId status jobName } } } }")
        results: list[dict[str, str]] = found["runsOrError"]["results"]
        return results

    def up(self) -> None:
        """Returns once the Dagster UI shows the code location."""

        def shown() -> bool:
            for service in self.services.values():
                assert service.running, f"{service.name} ended: {service.log_tail(20)}"
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.page_port}/server_info", timeout=5):
                    pass
                found = self.ask(
                    "{ repositoriesOrError { ... on RepositoryConnection { nodes { location { name } } } } }"
                )
            except (OSError, httpx.TransportError):
                return False
            nodes = found["repositoriesOrError"].get("nodes", [])
            return [node["location"]["name"] for node in nodes] == ["auditexport"]

        wait_until(shown, what="the code location on the page", within_s=UP_WITHIN_S, every_s=0.3)

    def _ours(self) -> dict[str, str]:
        """Where the tests' own checkout is, for an environment in which another one is installed."""
        return {name: os.environ[name] for name in ("PYTHONPATH",) if name in os.environ}


@pytest.fixture
def deployment(stack: Stack, tmp_path: Path) -> Iterator[Deployment]:
    """The directory as operations.md describes it, the storage created, the services not started."""
    home = tmp_path / "var"
    home.mkdir()
    with postgres() as storage_url:
        deployment = Deployment(home=home, storage_url=storage_url, stack=stack)
        shutil.copy(DEPLOY / "dagster.yaml", home)
        workspace = (DEPLOY / "workspace.yaml").read_text().replace("4266", str(deployment.code_port))
        (home / "workspace.yaml").write_text(workspace)
        try:
            yield deployment
        finally:
            deployment.stop()


def test_the_services_drain_and_survive_a_restart_of_the_code_server(deployment: Deployment, stack: Stack) -> None:
    """What an administrator copies starts, stores in PostgreSQL, drains by itself, and survives a new version of the code."""
    assert "AUDITEXPORT_MYSQL_URL" in deployment.environment("code")
    assert "AUDITEXPORT_MYSQL_URL" not in deployment.environment("daemon")
    deployment.dagster("instance", "migrate")
    deployment.dagster("instance", "concurrency", "set", "audit_log_export", "1")
    for name in ("code", "webserver", "daemon"):
        deployment.start(name)
    deployment.up()
    assert deployment.runs() == []

    deployment.dagster("sensor", "start", "outbox_backlog_sensor", "-w", "workspace.yaml")
    stack.put(*events(1_000, "first"))
    wait_until(lambda: stack.pending() == 0, what="a drain that the sensor starts", within_s=UP_WITHIN_S, every_s=0.3)

    # A new version: the code server is restarted in the middle of a run.
    stack.put(*events(3_000, "second"))
    wait_until(
        lambda: any(run["status"] == "STARTED" for run in deployment.runs()),
        what="a run at work",
        within_s=UP_WITHIN_S,
    )
    deployment.services["code"].stop()
    deployment.start("code")
    deployment.up()
    wait_until(lambda: stack.pending() == 0, what="the rest of the drain", within_s=2 * UP_WITHIN_S, every_s=0.3)
    everything_once(stack, 4_000)

    runs = deployment.runs()
    assert {run["jobName"] for run in runs} == {"audit_log_export"}
    assert {run["status"] for run in runs} > {"SUCCESS"}, "the restart has cut no run off, and so shown nothing"
    engine = sa.create_engine(deployment.storage_url)
    with engine.connect() as connection:
        assert connection.execute(sa.text("SELECT count(*) FROM runs")).scalar_one() == len(runs)
        assert connection.execute(sa.text("SELECT count(*) FROM event_logs")).scalar_one() > 100
    engine.dispose()
    assert not list(deployment.home.rglob("*.db")), "Dagster fell back to SQLite"
    assert "audit_log_export" in deployment.dagster("instance", "concurrency", "get", "--all")
