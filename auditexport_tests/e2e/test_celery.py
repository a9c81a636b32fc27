"""A drain on Celery: Redis or RabbitMQ, PostgreSQL for Dagster's storage, three workers as processes, and one of them killed.

What belongs here: what only workers in other processes can show. What does not: how the executor is put together
(`integration/dagster/test_executors.py`). RabbitMQ tells a lost worker by its connection, Redis by a time.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil
import pytest
import yaml

from auditexport_pipeline.core.batch import State
from auditexport_pipeline.local.processes import Child
from auditexport_tests.chaos.proxy import Fault, Proxy
from auditexport_tests.conftest import Stack
from auditexport_tests.e2e.install import find_postgres
from auditexport_tests.e2e.servers import UP_WITHIN_S, postgres, rabbitmq, redis
from auditexport_tests.integration.dagster.conftest import events, everything_once, launchpad, ledger
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.unit.test_deploy import DEPLOY

pytestmark = pytest.mark.timeout(900)
ROOT = Path(__file__).resolve().parents[2]
WORKERS = ("one", "two", "three")
BATCHES = 13
BATCH_ROWS = 100
# A step here takes a second or two; what a dead worker had is given to another after this.
VISIBILITY_TIMEOUT_S = 15
# The INSERT of the killed worker arrives when another one has long sent it again.
INSERT_LATE_S = 40
PASSWORD = "not_for_any_log"
CANARY = "canary_of_an_audit_event"


@dataclass(slots=True, kw_only=True)
class Cluster:
    """Broker, Dagster's storage, workers, and a proxy between all of them and ClickHouse."""

    home: Path
    storage_url: str
    broker_url: str
    stack: Stack
    proxy: Proxy
    instance: dg.DagsterInstance
    workers: dict[str, Child] = field(default_factory=dict)

    @property
    def environment(self) -> dict[str, str]:
        port = re.search(r":(\d+)/", self.stack.clickhouse_url)
        assert port
        return {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "DAGSTER_HOME": str(self.home),
            "DAGSTER_POSTGRES_URL": self.storage_url,
            "AUDITEXPORT_MYSQL_URL": self.stack.mysql_url,
            "AUDITEXPORT_CLICKHOUSE_URL": self.stack.clickhouse_url.replace(port[0], f":{self.proxy.port}/"),
            "AUDITEXPORT_EXECUTOR": "celery",
            "CELERY_BROKER_URL": self.broker_url,
            "AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S": str(VISIBILITY_TIMEOUT_S),
        }

    def start_worker(self, name: str) -> None:
        words = ["worker", "start", "-A", "auditexport_pipeline.celery_worker", "-n", name, "-q", "dagster"]
        self.workers[name] = Child(
            f"worker {name}",
            [str(Path(sys.executable).parent / "dagster-celery"), *words, "--", "--concurrency=1"],
            log=self.home.parent / f"worker-{name}.log",
            env=self.environment,
        )

    def kill_worker(self, name: str) -> None:
        """SIGKILL to all its processes at once, as when its machine goes."""
        worker = self.workers[name]
        os.killpg(os.getpgid(worker.pid), signal.SIGKILL)
        worker.stop()

    def kill_child(self, name: str) -> None:
        """SIGKILL to the process that does the worker's steps, as the kernel's when memory is short."""
        (main,) = psutil.Process(self.workers[name].pid).children()
        (child,) = main.children()
        child.kill()

    @contextlib.contextmanager
    def launched(self) -> Iterator[subprocess.Popen[bytes]]:
        """A run in a process of its own, as a run launcher starts it."""
        settings = self.home / "run.yaml"
        settings.write_text(yaml.safe_dump(launchpad({"batch_rows": BATCH_ROWS})))
        command = ["job", "execute", "-m", "auditexport_pipeline.definitions", "-j", "audit_log_export"]
        with (self.home.parent / "run.log").open("wb") as log:
            run = subprocess.Popen(
                [str(Path(sys.executable).parent / "dagster"), *command, "-c", str(settings)],
                cwd=ROOT,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        try:
            yield run
        finally:
            run.kill()
            run.wait()

    def executions(self, run_id: str) -> list[tuple[str, str]]:
        """(step, worker) each time that a worker began a step, in order."""
        found = []
        for record in self.instance.all_logs(run_id, of_type=dg.DagsterEventType.ENGINE_EVENT):
            assert record.dagster_event is not None
            metadata = record.dagster_event.engine_event_data.metadata
            if "Celery worker" in metadata:
                worker = str(metadata["Celery worker"].value).split("@")[0]
                found.append((str(record.dagster_event.step_key).removeprefix("audit_logs_raw_v1."), worker))
        return found

    def running(self, run_id: str) -> dict[str, str]:
        """The worker of each step that was begun and has not succeeded."""
        done = {
            str(record.dagster_event.step_key).removeprefix("audit_logs_raw_v1.")
            for record in self.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_SUCCESS)
            if record.dagster_event
        }
        return {step: worker for step, worker in self.executions(run_id) if step not in done}


BROKERS = {"redis": redis, "rabbitmq": rabbitmq}


@pytest.fixture
def cluster(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    start_broker = BROKERS[request.param]
    home, broker = tmp_path / "home", tmp_path / "broker"
    home.mkdir()
    broker.mkdir()
    shutil.copy(DEPLOY / "dagster.yaml", home)
    port = int(stack.clickhouse_url.rsplit(":", 1)[1].split("/")[0])
    with postgres() as storage_url, start_broker(PASSWORD, broker) as broker_url, Proxy(port, speaks="http") as proxy:
        monkeypatch.setenv("DAGSTER_POSTGRES_URL", storage_url)
        with dg.DagsterInstance.from_config(str(home)) as instance:
            cluster = Cluster(
                home=home,
                storage_url=storage_url,
                broker_url=broker_url,
                stack=stack,
                proxy=proxy,
                instance=instance,
            )
            try:
                for name in WORKERS:
                    cluster.start_worker(name)
                for worker in cluster.workers.values():
                    worker.wait_until(lambda log=worker.log: " ready." in log.read_text(), within_s=UP_WITHIN_S)
                yield cluster
            finally:
                for worker in cluster.workers.values():
                    worker.stop()


def _tail(cluster: Cluster) -> str:
    return (cluster.home.parent / "run.log").read_text()[-3000:]


def _batches(cluster: Cluster, state: State) -> int:
    return sum(1 for batch in ledger(cluster.stack) if batch.state is state)


def _hold_an_insert(cluster: Cluster, run: subprocess.Popen[bytes]) -> tuple[str, str, str]:
    """Waits for the first batches, holds the next INSERT on the wire; returns run id, the step that sent it, its worker."""

    def begun() -> bool:
        assert run.poll() is None, _tail(cluster)
        return _batches(cluster, State.EXPORTED) >= 3

    wait_until(begun, what="the first batches", within_s=UP_WITHIN_S)
    cluster.proxy.arm(Fault(kind="late", aimed=True, seconds=INSERT_LATE_S))
    wait_until(lambda: cluster.proxy.hits["late"], what="an INSERT under way", within_s=UP_WITHIN_S)
    run_id = cluster.instance.get_runs(limit=1)[0].run_id
    # The others' INSERTs end by themselves; the one that is left is held by the proxy.
    suspects = {step for step in cluster.running(run_id) if "write_clickhouse" in step}

    def held() -> tuple[str, str] | None:
        running = cluster.running(run_id)
        left = [(step, running[step]) for step in suspects if step in running]
        assert left, "the INSERT that was held has been answered"
        return left[0] if len(left) == 1 else None

    return (run_id, *wait_until(held, what="the worker whose INSERT is held", every_s=0.2))


@pytest.mark.parametrize("cluster", BROKERS, indirect=True)
def test_a_worker_killed_in_a_batch_loses_and_doubles_no_event(
    cluster: Cluster, stack: Stack, capsys: pytest.CaptureFixture[str]
) -> None:
    """The promise of one machine holds on several: the step goes to another worker, and its INSERT is sent twice."""
    count = BATCHES * BATCH_ROWS
    stack.put(*events(count, description=CANARY))
    with cluster.launched() as run:
        run_id, step, victim = _hold_an_insert(cluster, run)
        cluster.kill_worker(victim)
        exported_at_kill = _batches(cluster, State.EXPORTED)
        code = run.wait(UP_WITHIN_S * 2)
    assert code == 0, _tail(cluster)
    assert exported_at_kill < BATCHES

    again = [worker for executed, worker in cluster.executions(run_id) if executed == step]
    assert len(again) == 2
    assert again[0] == victim != again[1]
    wait_until(lambda: cluster.proxy.held == 0, what="the dead worker's INSERT to arrive", within_s=UP_WITHIN_S)

    everything_once(stack, count)
    found = ledger(stack)
    assert len(found) == BATCHES
    assert {batch.state for batch in found} == {State.VERIFIED}
    assert sorted({batch.attempts for batch in found}) == [1, 2]
    finished = cluster.instance.get_run_by_id(run_id)
    assert finished is not None
    assert finished.is_success

    shares = Counter(
        worker for executed, worker in cluster.executions(run_id) if executed.startswith("export_batch.mark_exported")
    )
    assert set(shares) >= set(WORKERS) - {victim}
    assert sum(shares.values()) >= BATCHES
    _nothing_leaked(cluster)
    with capsys.disabled():
        entries, distinct = stack.counts()
        print(
            f"\nCelery over {cluster.broker_url.partition('://')[0]}: {len(WORKERS)} workers; batches marked by each: "
            + ", ".join(f"{name} {shares[name]}" for name in WORKERS)
            + f"; worker {victim} killed in {step} after {exported_at_kill} of {BATCHES} batches; "
            f"the step done again by worker {again[1]}; lost {count - distinct}, duplicated {entries - distinct}"
        )


@pytest.mark.parametrize("cluster", ["redis"], indirect=True)
def test_a_killed_child_of_a_worker_fails_the_run_and_the_next_continues(cluster: Cluster, stack: Stack) -> None:
    """What the kernel kills for its memory must not go to one worker after the other; and the run must end, and say why."""
    count = BATCHES * BATCH_ROWS
    stack.put(*events(count))
    with cluster.launched() as run:
        run_id, step, victim = _hold_an_insert(cluster, run)
        cluster.kill_child(victim)
        code = run.wait(UP_WITHIN_S * 2)
    assert code != 0
    assert [executed for executed, _ in cluster.executions(run_id)].count(step) == 1
    (failure,) = cluster.instance.all_logs(run_id, of_type=dg.DagsterEventType.STEP_FAILURE)
    assert failure.dagster_event is not None
    assert str(failure.dagster_event.step_key).endswith(step)
    assert "WorkerLostError" in str(failure.dagster_event.step_failure_data.error)
    ended = cluster.instance.get_run_by_id(run_id)
    assert ended is not None
    assert ended.status is dg.DagsterRunStatus.FAILURE

    with cluster.launched() as run:
        assert run.wait(UP_WITHIN_S * 2) == 0, _tail(cluster)
    wait_until(lambda: cluster.proxy.held == 0, what="the dead child's INSERT to arrive", within_s=UP_WITHIN_S)
    everything_once(stack, count)
    assert {batch.state for batch in ledger(stack)} == {State.VERIFIED}


# Tasks that fail at their first line, which is enough here; printed with the queue of each.
SEND = """
from auditexport_pipeline.celery_worker import app

for queue in ("eu", "us", "dagster"):
    for _ in range({tasks}):
        print(app.send_task("execute_plan", ({{}}, {{}}), queue=queue, routing_key=queue + ".execute_plan", priority=5).id, queue)
"""


@pytest.mark.parametrize("broker", BROKERS)
def test_a_queue_has_its_own_worker_and_shared_ones_take_turns(broker: str, tmp_path: Path) -> None:
    """A guaranteed share that another outbox can take is none; and one full queue must not stop the others."""
    tasks = 6
    with BROKERS[broker](PASSWORD, tmp_path) as broker_url:
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            "DAGSTER_HOME": str(tmp_path),
            "AUDITEXPORT_EXECUTOR": "celery",
            "CELERY_BROKER_URL": broker_url,
        }
        program = [sys.executable, "-c", SEND.format(tasks=tasks)]
        printed = subprocess.run(
            program, env=environment, check=True, capture_output=True, text=True, cwd=tmp_path
        ).stdout
        sent = dict(line.split() for line in printed.splitlines())
        one = _taken_by("one", ["us"], environment, sent)
        two = _taken_by("two", ["eu", "dagster"], environment, sent)
    assert one == ["us"] * tasks
    assert sorted(two) == sorted(["eu", "dagster"] * tasks)
    assert set(two[:tasks]) == {"eu", "dagster"}, "one queue waited for the whole of the other"


def _taken_by(name: str, queues: list[str], environment: dict[str, str], sent: dict[str, str]) -> list[str]:
    """The queues of the tasks that a worker of these queues takes, in order, until they are empty."""
    words = ["worker", "start", "-A", "auditexport_pipeline.celery_worker", "-n", name]
    words += ["-q", ",".join(queues)]
    worker = Child(
        f"worker {name}",
        [str(Path(sys.executable).parent / "dagster-celery"), *words, "--", "--concurrency=1"],
        log=Path(environment["DAGSTER_HOME"]) / f"{name}.log",
        env=environment,
    )

    def taken() -> list[str]:
        return [sent[task] for task in re.findall(r"execute_plan\[([0-9a-f-]+)\] received", worker.log.read_text())]

    expected = sum(queue in queues for queue in sent.values())
    try:
        worker.wait_until(lambda: len(taken()) >= expected, within_s=60)
        return taken()
    finally:
        worker.stop()


def _nothing_leaked(cluster: Cluster) -> None:
    """No payload with the broker or in Dagster's storage, and the broker's password in no log and no row."""
    programs = find_postgres()
    assert programs
    dump = [str(programs / "pg_dump"), cluster.storage_url.replace("+psycopg2", "")]
    storage = subprocess.run(dump, check=True, capture_output=True).stdout
    kept = [path for path in cluster.home.rglob("*") if path.is_file()]
    # Of Redis each command that it was sent; of RabbitMQ what its queues have on disk.
    sent = b"".join(path.read_bytes() for path in (cluster.home.parent / "broker").rglob("*") if path.is_file())
    logs = b"".join(path.read_bytes() for path in cluster.home.parent.glob("*.log"))
    assert b"execute_plan" in sent or "redis" not in cluster.broker_url
    assert b"mark_exported" in storage
    for text in (storage, logs, sent, *(path.read_bytes() for path in kept)):
        assert CANARY.encode() not in text
    for text in (storage, logs, *(path.read_bytes() for path in kept)):
        assert PASSWORD.encode() not in text
