"""Launches through a real Dagster UI, a real daemon and real run workers."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import httpx
import pytest
import sqlalchemy as sa
import yaml

from auditexport_pipeline.local.processes import Child, free_port
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events, everything_once, launchpad, ledger
from auditexport_tests.support.builders import settings_file
from auditexport_tests.support.prompts import urls
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.support.webhook import Webhook, webhook

pytestmark = pytest.mark.slow  # a daemon, a code server and run workers; `security.test_secrets` has them in every run

LOCATION = {"repositoryLocationName": "auditexport", "repositoryName": "__repository__"}
# A worker starts in two seconds alone and in twenty beside a benchmark; a launch that needs this long is lost.
WITHIN_S = 120.0

LAUNCH = """
mutation Launch($params: ExecutionParams!) {
  launchPipelineExecution(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on RunConfigValidationInvalid { errors { message } }
    ... on PythonError { message }
  }
}
"""
STOP_SENSOR = """
mutation Stop($id: String!) { stopSensor(id: $id) { __typename } }
"""
START_SENSOR = """
mutation Start($selector: SensorSelector!) {
  startSensor(sensorSelector: $selector) { __typename ... on Sensor { sensorState { id status } } }
}
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Page:
    """`dagster dev` on loopback: the UI's GraphQL, and the instance behind it."""

    url: str
    exporter: Exporter

    def ask(self, query: str, **variables: Any) -> dict[str, Any]:
        answer = httpx.post(
            f"{self.url}/graphql", json={"query": query, "variables": variables}, timeout=60, trust_env=False
        ).json()
        assert "errors" not in answer, answer
        (value,) = answer["data"].values()
        assert isinstance(value, dict)
        return value

    def launch(self, job: str = "__ASSET_JOB", **settings: object) -> dict[str, Any]:
        """What the button Materialize sends, or with a job's name, what Launch run on that job sends."""
        selector: dict[str, object] = {**LOCATION, "pipelineName": job}
        if job == "__ASSET_JOB":
            selector |= {"assetSelection": [{"path": ["audit_logs_raw_v1"]}], "assetCheckSelection": []}
        return self.ask(
            LAUNCH,
            params={
                "mode": "default",
                "selector": selector,
                "runConfigData": launchpad(settings),
                "executionMetadata": {"tags": []},
            },
        )

    def runs(self) -> list[dg.RunRecord]:
        """Every run, oldest first."""
        return list(reversed(self.exporter.instance.get_run_records()))

    def wait_for(self, run_id: str) -> dg.DagsterRun:
        """The run once it has ended."""

        def ended() -> dg.DagsterRun | None:
            run = self.exporter.instance.get_run_by_id(run_id)
            return run if run is not None and run.is_finished else None

        return wait_until(ended, what=f"the end of run {run_id}", within_s=WITHIN_S)


@pytest.fixture
def stack(module_stack: Stack) -> Stack:
    """The databases of the module, emptied: starting Dagster on others costs more than a test."""
    for table in ("clickhouse_outbox", "clickhouse_outbox_dead_letter"):
        module_stack.sql(f"TRUNCATE TABLE {table}")
    module_stack.sql("DELETE FROM clickhouse_outbox_batch WHERE batch_id > 0")
    module_stack.log.client().command("TRUNCATE TABLE audit_logs_raw_v1")
    return module_stack


@pytest.fixture(scope="module")
def hook() -> Iterator[Webhook]:
    """Where alerts go."""
    with webhook() as listening:
        yield listening


@pytest.fixture(scope="module")
def dev(
    module_stack: Stack, hook: Webhook, empty_home: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Page]:
    """The page and the daemon on the repository's dagster.yaml, its slow look for dead workers made quick."""
    home = tmp_path_factory.mktemp("launches") / "dagster_home"
    shutil.copytree(empty_home, home)
    configured = yaml.safe_load((home / "dagster.yaml").read_text())
    configured["run_monitoring"]["poll_interval_seconds"] = 1
    (home / "dagster.yaml").write_text(yaml.safe_dump(configured))
    environment = {name: value for name, value in os.environ.items() if not name.startswith("AUDITEXPORT_")}
    environment |= {
        "DAGSTER_HOME": str(home),
        "AUDITEXPORT_MYSQL_URL": module_stack.mysql_url,
        "AUDITEXPORT_CLICKHOUSE_URL": module_stack.clickhouse_url,
        "AUDITEXPORT_OUTBOXES": settings_file(home.parent, sensor_rows=1),
        "AUDITEXPORT_ALERT_WEBHOOK_URL": hook.url,
    }
    # Without this, Dagster applies the limit only after it has seen the pool once: the first two runs could overlap.
    pool = [sys.executable, "-m", "dagster", "instance", "concurrency", "set", "audit_log_export", "1"]
    subprocess.run(pool, env=environment, check=True, capture_output=True, timeout=60)
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    command = ["dev", "-w", str(ROOT / "workspace.yaml"), "-h", "127.0.0.1", "-p", str(port)]
    server = Child(
        "Dagster",
        [sys.executable, "-m", "dagster", *command],
        log=home.parent / "dev.log",
        env=environment,
        stop_signal=signal.SIGINT,
    )

    def up() -> bool:
        try:
            return httpx.get(f"{url}/server_info", timeout=5, trust_env=False).status_code == 200
        except httpx.TransportError:
            return False

    try:
        server.wait_until(up, within_s=WITHIN_S)
        with dg.DagsterInstance.from_config(str(home)) as instance:
            yield Page(url=url, exporter=Exporter(home=home, instance=instance))
    finally:
        server.stop()


@pytest.fixture
def page(dev: Page) -> Page:
    """The page without the runs of other tests."""
    for record in dev.runs():
        dev.exporter.instance.delete_run(record.dagster_run.run_id)
    return dev


def test_two_materializations_launched_at_once_run_one_after_the_other(page: Page, stack: Stack) -> None:
    """One drain at a time for every way to launch it: job tags would not hold for Materialize, the op's pool does."""
    stack.put(*events(6))
    launched = [page.launch(batch_rows=2) for _ in range(2)]
    assert [answer["__typename"] for answer in launched] == ["LaunchRunSuccess"] * 2
    for answer in launched:
        assert page.wait_for(answer["run"]["runId"]).is_success
    first, second = sorted(page.runs(), key=lambda record: record.start_time or 0)
    assert first.end_time is not None
    assert second.start_time is not None
    assert first.end_time <= second.start_time
    assert [record.dagster_run.job_name for record in (first, second)] == ["__ASSET_JOB"] * 2
    assert [batch.rows for batch in ledger(stack)] == [2, 2, 2]
    everything_once(stack, 6)

    refused = page.launch(batch_rows=0)
    assert "batch_rows is 0; it must be an integer" in str(refused)
    assert refused["__typename"] != "LaunchRunSuccess"
    assert len(page.runs()) == 2


def test_the_sensor_starts_a_run_by_itself_once_it_is_turned_on(page: Page, stack: Stack) -> None:
    """The everyday case: no person launches anything."""
    stack.put(*events(5))
    state = page.ask(START_SENSOR, selector={**LOCATION, "sensorName": "outbox_backlog_sensor"})
    assert state["sensorState"]["status"] == "RUNNING"
    (record,) = wait_until(page.runs, what="a run launched by the sensor", within_s=WITHIN_S)
    run = page.wait_for(record.dagster_run.run_id)
    assert run.is_success
    assert run.tags["dagster/sensor_name"] == "outbox_backlog_sensor"
    assert run.tags["auditexport/why"].startswith("backlog: 5 pending rows (a run starts at 1)")
    everything_once(stack, 5)
    assert page.ask(STOP_SENSOR, id=state["sensorState"]["id"])["__typename"] == "StopSensorMutationResult"


def test_a_run_killed_outside_the_daemon_blocks_neither_sensor_nor_pool(page: Page, stack: Stack) -> None:
    """Dagster takes it for started for two hours, and its pool admits no run meanwhile: the sensor ends it."""
    pks = stack.put(*events(5))
    words = ["job", "execute", "-j", "audit_log_export", "-m", "auditexport_pipeline.definitions"]
    words += ["--tags", '{"killed": "here"}']  # a retry of another test's run can begin meanwhile
    environment = {**os.environ, "DAGSTER_HOME": str(page.exporter.home), **urls(stack)}
    with stack.outbox.engine.connect() as application, application.begin():
        application.execute(sa.text("SELECT pk FROM clickhouse_outbox WHERE pk = :pk FOR UPDATE"), {"pk": pks[0]})
        process = subprocess.Popen([sys.executable, "-m", "dagster", *words], cwd=ROOT, env=environment)
        try:
            wait_until(
                lambda: [str(batch.state) for batch in ledger(stack)] == ["written"], what="a batch to be marked"
            )
        finally:
            process.kill()
            process.wait()
    (dead,) = page.exporter.instance.get_run_records(dg.RunsFilter(tags={"killed": "here"}))
    assert dead.dagster_run.status is dg.DagsterRunStatus.STARTED, "Dagster does not know"
    state = page.ask(START_SENSOR, selector={**LOCATION, "sensorName": "outbox_backlog_sensor"})["sensorState"]
    try:
        wait_until(lambda: stack.pending() == 0, what="a run that the sensor starts", within_s=WITHIN_S)
        for record in page.runs():
            page.wait_for(record.dagster_run.run_id)
    finally:
        page.ask(STOP_SENSOR, id=state["id"])
    assert page.wait_for(dead.dagster_run.run_id).status is dg.DagsterRunStatus.FAILURE
    everything_once(stack, 5)


def test_a_run_whose_worker_is_killed_is_launched_again(page: Page, stack: Stack) -> None:
    """Machines die in the middle of things; the daemon's retry of all steps has to finish what was begun.

    Dagster itself can lose a retry: it stores the failure's event before the run's status, and a daemon that looks
    between the two sees a failure of a run still running, and never looks again. What the sensor is for. The test
    therefore kills a second and a third worker before it believes that no retry comes.
    """
    everything = 0
    for _ in range(3):
        everything += 8
        killed = _killed_while_it_marks(page, stack, stack.put(*events(8))[2])
        retry = _retry_of(page, killed)
        if retry is not None:
            break
    else:
        raise AssertionError(f"no retry of {killed}: {_engine_events(page, killed)}")
    assert page.wait_for(retry.run_id).is_success
    assert retry.tags["dagster/retry_strategy"] == "ALL_STEPS"
    everything_once(stack, everything)
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}


def test_the_webhook_gets_failures_and_no_run_that_is_retried(page: Page, stack: Stack, hook: Webhook) -> None:
    """A killed and retried worker sends no alert; a failed launch sends one, and one for its recovery."""

    def of_runs() -> list[str]:
        """Where the index has another name, the sensor's next tick reports the outbox too."""
        return [body["text"] for body in hook.bodies if "audit_log_export failed" in body["text"]]

    killed = _killed_while_it_marks(page, stack, stack.put(*events(8))[2])
    wait_until(lambda: _tag(page, killed, "dagster/will_retry"), what="Dagster's word on a retry")
    assert _tag(page, killed, "dagster/will_retry") == "true"
    retry = _retry_of(page, killed)
    if retry is not None:  # the daemon can lose it; see above
        assert page.wait_for(retry.run_id).is_success
    assert page.wait_for(page.launch()["run"]["runId"]).is_success

    stack.sql("ALTER TABLE clickhouse_outbox RENAME INDEX drainer_pending_idx TO elsewhere_idx")
    try:
        failed = page.launch()["run"]["runId"]
        assert page.wait_for(failed).status is dg.DagsterRunStatus.FAILURE
    finally:
        stack.sql("ALTER TABLE clickhouse_outbox RENAME INDEX elsewhere_idx TO drainer_pending_idx")
    wait_until(of_runs, what="the alert", within_s=WITHIN_S)
    (text,) = of_runs()
    assert text.startswith("*[ERROR] auditexport: audit_log_export failed*\nSetupIncomplete at plan_batches: ")
    assert failed in text
    assert killed not in text
    assert page.wait_for(page.launch()["run"]["runId"]).is_success
    wait_until(lambda: len(of_runs()) > 1, what="the recovery", within_s=WITHIN_S)
    assert [text.splitlines()[0] for text in of_runs()] == [
        "*[ERROR] auditexport: audit_log_export failed*",
        "*[RECOVERED] auditexport: audit_log_export failed*",
    ]


def _tag(page: Page, run_id: str, name: str) -> str | None:
    run = page.exporter.instance.get_run_by_id(run_id)
    return run.tags.get(name) if run is not None else None


def _killed_while_it_marks(page: Page, stack: Stack, held_pk: int) -> str:
    """The id of a run whose worker was killed between its second batch's write and its mark, and that failed for it."""
    with stack.outbox.engine.connect() as application, application.begin():
        # The application holds a row of the second batch, so the worker waits there, written and not yet marked.
        application.execute(sa.text("SELECT pk FROM clickhouse_outbox WHERE pk = :pk FOR UPDATE"), {"pk": held_pk})
        run_id: str = page.launch("audit_log_export", batch_rows=2)["run"]["runId"]

        def waiting() -> bool:
            return any(str(batch.state) == "written" and held_pk in batch.pks for batch in ledger(stack))

        wait_until(waiting, what="a batch to wait for its mark", within_s=WITHIN_S)
        os.kill(_worker(page, run_id), signal.SIGKILL)
        assert page.wait_for(run_id).status is dg.DagsterRunStatus.FAILURE
    return run_id


def _retry_of(page: Page, run_id: str) -> dg.DagsterRun | None:
    """The run that the daemon launched in place of that one; None when there is none after five of its looks."""

    def again() -> dg.DagsterRun | None:
        runs = [record.dagster_run for record in page.runs()]
        return next((run for run in runs if run.parent_run_id == run_id), None)

    try:
        return wait_until(again, what="the retry", within_s=30)
    except AssertionError:
        return None


def _engine_events(page: Page, run_id: str) -> list[str]:
    return [entry.user_message or entry.message for entry in page.exporter.instance.all_logs(run_id)]


def _worker(page: Page, run_id: str) -> int:
    """The process id of the run's worker, as its first event tells it."""
    for message in _engine_events(page, run_id):
        found = re.search(r"process for run \(pid: (\d+)\)", message)
        if found:
            return int(found.group(1))
    raise AssertionError("no event names the worker's process")
