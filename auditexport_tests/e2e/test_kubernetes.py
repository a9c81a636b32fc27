"""A drain whose steps are Jobs of Kubernetes, carried out here: a stand-in for the API server starts what each Job says.

What belongs here: what the executor asks Kubernetes for, and that each Job, with its command and its variables alone, does its
step. What does not: a cluster. Scheduling, images, volumes, access and Kubernetes' own checks are not in this test, and nothing
of this has run on one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
import yaml

from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events, everything_once, launchpad
from auditexport_tests.unit.test_deploy import KUBERNETES

pytestmark = pytest.mark.timeout(900)
LAUNCHER: dict[str, Any] = yaml.safe_load((KUBERNETES / "dagster.yaml").read_text())["run_launcher"]


class Cluster:
    """Jobs by name, and the process of each."""

    def __init__(self, variables: dict[str, str], log: Path) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.namespaces: set[str] = set()
        self._variables = variables  # what the ConfigMaps and Secrets hold
        self.log = log
        self.kill_first = ""  # the pod of the first step that is called so dies as soon as it is there
        self._pods: dict[str, subprocess.Popen[bytes]] = {}

    def create(self, namespace: str, job: dict[str, Any]) -> None:
        name = job["metadata"]["name"]
        (container,) = job["spec"]["template"]["spec"]["containers"]
        environment = {
            "PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin",
            "PYTHONPATH": str(ROOT),
            **self._variables,
            **{variable["name"]: variable["value"] for variable in container["env"]},
        }
        self.jobs[name] = job
        self.namespaces.add(namespace)
        with self.log.open("ab") as log:
            self._pods[name] = subprocess.Popen(container["args"], env=environment, stdout=log, stderr=log)
        if self.kill_first and self.kill_first in job["metadata"]["labels"]["dagster/op"]:
            self._pods[name].kill()
            self.kill_first = ""

    def status(self, name: str) -> dict[str, int] | None:
        pod = self._pods.get(name)
        if pod is None:
            return None
        code = pod.poll()
        return {"active": 1} if code is None else {"succeeded": 1} if code == 0 else {"failed": 1}

    def end(self) -> None:
        for pod in self._pods.values():
            pod.kill()
            pod.wait()


@contextmanager
def _served(cluster: Cluster) -> Iterator[int]:
    """The two requests of Kubernetes' API that the executor makes, on loopback; yields the port."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            _, apis, group, version, namespaces, namespace, jobs = self.path.split("?")[0].split("/")
            assert (apis, group, version, namespaces, jobs) == ("apis", "batch", "v1", "namespaces", "jobs")
            cluster.create(namespace, job)
            self._answer(201, job)

        def do_GET(self) -> None:
            status = cluster.status(self.path.split("/jobs/")[1].split("/")[0])
            kind = {"apiVersion": "batch/v1", "kind": "Job"}
            self._answer(200 if status else 404, {**kind, "metadata": {}, "status": status})

        def _answer(self, code: int, body: dict[str, Any]) -> None:
            content = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@dataclass(frozen=True, slots=True, kw_only=True)
class Kubernetes:
    """The stand-in, and a Dagster instance whose runs ask it for Jobs."""

    home: Path
    cluster: Cluster
    variables: dict[str, str]

    def drain(self) -> subprocess.CompletedProcess[str]:
        """A run in a process of its own."""
        settings = self.home / "run.yaml"
        settings.write_text(yaml.safe_dump(launchpad({"batch_rows": 100})))
        command = [
            "-m",
            "dagster",
            "job",
            "execute",
            "-m",
            "auditexport_pipeline.definitions",
            "-j",
            "audit_log_export",
        ]
        return subprocess.run(
            [sys.executable, *command, "-c", str(settings)],
            cwd=ROOT,
            env={**os.environ, **self.variables, "DAGSTER_HOME": str(self.home), "NO_PROXY": "127.0.0.1"},
            capture_output=True,
            text=True,
            timeout=600,
        )

    def runs(self) -> dict[str, list[str]]:
        """The steps that succeeded, by the status of their run."""
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            exporter = Exporter(home=self.home, instance=instance)
            return {
                run.status.value: exporter.steps(run.run_id, dg.DagsterEventType.STEP_SUCCESS)
                for run in instance.get_runs()
            }


@pytest.fixture
def kubernetes(stack: Stack, tmp_path: Path) -> Iterator[Kubernetes]:
    """The shipped run launcher, but for where the API server and DAGSTER_HOME are."""
    variables = {
        "AUDITEXPORT_EXECUTOR": "k8s",
        "AUDITEXPORT_MYSQL_URL": stack.mysql_url,
        "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url,
    }
    home = tmp_path / "home"
    home.mkdir()
    cluster = Cluster(variables, tmp_path / "pods.log")
    with _served(cluster) as port:
        kubeconfig = {
            "apiVersion": "v1",
            "kind": "Config",
            "current-context": "here",
            "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
            "contexts": [{"name": "here", "context": {"cluster": "here", "user": "us"}}],
            "users": [{"name": "us", "user": {}}],
        }
        (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig))
        here = {
            "load_incluster_config": False,
            "kubeconfig_file": str(tmp_path / "kubeconfig"),
            "dagster_home": str(home),
        }
        settings = yaml.safe_load((ROOT / "dagster.yaml").read_text())
        settings["run_launcher"] = {**LAUNCHER, "config": {**LAUNCHER["config"], **here}}
        (home / "dagster.yaml").write_text(yaml.safe_dump(settings))
        try:
            yield Kubernetes(home=home, cluster=cluster, variables=variables)
        finally:
            cluster.end()


def test_each_step_is_a_job_with_its_own_command_and_variables(kubernetes: Kubernetes, stack: Stack) -> None:
    """A Job is complete: no step needs anything of the process that created it."""
    stack.put(*events(200))
    done = kubernetes.drain()
    assert done.returncode == 0, done.stderr[-3000:] + kubernetes.cluster.log.read_text()[-3000:]
    everything_once(stack, 200)
    (steps,) = kubernetes.runs().values()
    assert len(steps) == 2 + 2 * 3 == len(kubernetes.cluster.jobs)

    assert kubernetes.cluster.namespaces == {"auditexport"}
    for job in kubernetes.cluster.jobs.values():
        pod = job["spec"]["template"]["spec"]
        (container,) = pod["containers"]
        assert container["args"][:3] == ["dagster", "api", "execute_step"]
        assert container["image"] == LAUNCHER["config"]["job_image"]
        assert pod["serviceAccountName"] == "auditexport"
        assert pod["securityContext"] == {"runAsNonRoot": True, "runAsUser": 10001, "fsGroup": 10001}
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        named = {source.get("secretRef", source.get("configMapRef"))["name"] for source in container["envFrom"]}
        assert named == {"auditexport-databases", "auditexport-dagster", "auditexport-settings"}
        assert {mount["mountPath"] for mount in container["volumeMounts"]} >= {"/var/lib/auditexport/storage"}
        assert job["spec"]["ttlSecondsAfterFinished"] == 86_400
        assert stack.mysql_url not in json.dumps(job)


def test_a_dead_pod_fails_its_run_and_the_next_one_continues(kubernetes: Kubernetes, stack: Stack) -> None:
    """A node that goes away is Kubernetes' everyday; what its pod had begun is done by the next run, once."""
    stack.put(*events(200))
    kubernetes.cluster.kill_first = "write_clickhouse"
    assert kubernetes.drain().returncode != 0
    assert stack.pending() > 0
    (steps,) = kubernetes.runs().values()
    assert not any(step.startswith("finish_export") for step in steps)

    done = kubernetes.drain()
    assert done.returncode == 0, done.stderr[-3000:] + kubernetes.cluster.log.read_text()[-3000:]
    everything_once(stack, 200)
    assert set(kubernetes.runs()) == {"FAILURE", "SUCCESS"}
