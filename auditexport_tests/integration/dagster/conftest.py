"""A real Dagster instance for one test, with the repository's own dagster.yaml, and events to export."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.remote_origin import RegisteredCodeLocationOrigin, RemoteRepositoryOrigin
from dagster._core.test_utils import create_run_for_test

from auditexport_pipeline.core import retries
from auditexport_pipeline.definitions import defs
from auditexport_pipeline.defs import alerts
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import FIRST_EVENT_MS as FIRST_EVENT_MS
from auditexport_tests.support.builders import event as event
from auditexport_tests.support.builders import events as events
from auditexport_tests.support.builders import everything_once as everything_once
from auditexport_tests.support.builders import ledger as ledger
from auditexport_tests.support.webhook import Webhook, webhook

ROOT = Path(__file__).resolve().parents[3]
ASSET = dg.AssetKey("audit_logs_raw_v1")


def launchpad(settings: Mapping[str, object]) -> dict[str, object]:
    """The run configuration that the launchpad would send for these settings."""
    return {"ops": {"audit_logs_raw_v1": {"config": dict(settings)}}} if settings else {}


class Clock:
    """The sensors' clock, which a test sets forward."""

    def __init__(self) -> None:
        self.ahead_s = 0.0

    def time(self) -> float:
        return time.time() + self.ahead_s

    def monotonic(self) -> float:
        return time.monotonic()


@dataclass(frozen=True, slots=True, kw_only=True)
class Exporter:
    """A Dagster instance under `home`, and the export job on it."""

    home: Path
    instance: dg.DagsterInstance

    def drain(self, *, raise_on_error: bool = True, **settings: object) -> dg.ExecuteInProcessResult:
        return defs.resolve_job_def("audit_log_export").execute_in_process(
            instance=self.instance, run_config=launchpad(settings), raise_on_error=raise_on_error
        )

    def put_run(
        self, job_name: str, status: str, asset_selection: frozenset[dg.AssetKey] | None = None
    ) -> dg.DagsterRun:
        """A run in this state, as the Dagster UI or the daemon records it."""
        location = RemoteRepositoryOrigin(RegisteredCodeLocationOrigin("auditexport"), "__repository__")
        return create_run_for_test(
            self.instance,
            job_name=job_name,
            status=dg.DagsterRunStatus[status],
            asset_selection=asset_selection,
            remote_job_origin=location.get_job_origin(job_name),
        )

    def command(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        """`python -m dagster …` in the repository's root, as a person would type it."""
        return subprocess.run(
            [sys.executable, "-m", "dagster", *arguments],
            cwd=ROOT,
            env={**os.environ, "DAGSTER_HOME": str(self.home), **environment},
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def steps(self, run_id: str, kind: dg.DagsterEventType) -> list[str]:
        """Keys of the steps that had an event of this kind, in order, without the asset's own name."""
        records = self.instance.all_logs(run_id, of_type=kind)
        keys = [record.dagster_event.step_key for record in records if record.dagster_event]
        return [str(key).removeprefix("audit_logs_raw_v1.") for key in keys]

    def failures(self, run_id: str) -> list[str]:
        """The line with which each failed step says why."""
        lines = []
        for record in self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE):
            assert record.dagster_event is not None
            failure = record.dagster_event.step_failure_data.user_failure_data
            assert failure is not None, "a step failed with an exception that is not translated"
            assert failure.description is not None
            lines.append(failure.description)
        return lines


def text_of(metadata: Mapping[str, dg.MetadataValue]) -> dict[str, object]:
    """Plain values of an event's metadata."""
    return {name: value.value for name, value in metadata.items()}


@pytest.fixture(scope="session")
def empty_home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DAGSTER_HOME whose databases exist: creating them takes a second, copying them none."""
    home = tmp_path_factory.mktemp("empty_home")
    shutil.copy(ROOT / "dagster.yaml", home)
    with dg.DagsterInstance.from_config(str(home)) as instance:
        instance.get_runs(limit=1)
        instance.all_instigator_state()
    return home


@pytest.fixture
def home(scratch: Path, empty_home: Path, stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A DAGSTER_HOME with the repository's dagster.yaml; the environment points at the test's databases."""
    shutil.copytree(empty_home, scratch, dirs_exist_ok=True)
    for name in [name for name in os.environ if name.startswith("AUDITEXPORT_") and "TEST" not in name]:
        if name != "AUDITEXPORT_MYSQLD":
            monkeypatch.delenv(name)
    monkeypatch.setenv("DAGSTER_HOME", str(scratch))
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", stack.mysql_url)
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", stack.clickhouse_url)
    return scratch


@pytest.fixture
def exporter(home: Path) -> Iterator[Exporter]:
    with dg.DagsterInstance.from_config(str(home)) as instance:
        yield Exporter(home=home, instance=instance)


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step that fails is not tried again."""
    monkeypatch.setattr(retries, "RETRIES", 0)


@pytest.fixture
def hook(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as listening:
        monkeypatch.setenv("AUDITEXPORT_ALERT_WEBHOOK_URL", listening.url)
        yield listening


@pytest.fixture
def heart(home: object, monkeypatch: pytest.MonkeyPatch) -> Iterator[Webhook]:
    with webhook() as listening:
        monkeypatch.setenv("AUDITEXPORT_HEARTBEAT_URL", listening.url)
        yield listening


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    forward = Clock()
    monkeypatch.setattr(alerts, "time", forward)
    return forward
