"""The files of `auditexport_pipeline/deploy` fit each other, the programs they start and the instance's settings.

`e2e/test_deployment.py` starts the three services as the units do.
"""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from auditexport_tests.integration.docs.test_docs import _trees, _unknown_to

ROOT = Path(__file__).resolve().parents[2]
DEPLOY = ROOT / "auditexport_pipeline" / "deploy"
KUBERNETES = DEPLOY / "kubernetes"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))
COMPOSE: dict[str, Any] = yaml.safe_load((DEPLOY / "container" / "compose.yaml").read_text())
OURS = ("code", "webserver", "daemon")


def unit(path: Path) -> dict[str, list[str]]:
    """The settings of a unit's [Service], each with its values in order."""
    settings: dict[str, list[str]] = {}
    section = ""
    for line in path.read_text().splitlines():
        if line.startswith("["):
            section = line
        elif section == "[Service]" and "=" in line and not line.startswith("#"):
            name, _, value = line.partition("=")
            settings.setdefault(name, []).append(value)
    return settings


def started(path: Path) -> list[str]:
    """The command line of a unit."""
    (line,) = unit(path)["ExecStart"]
    return shlex.split(line)


def exists(command: list[str]) -> bool:
    """Whether a program has this command and these options."""
    program, *words = command
    return not _unknown_to(_trees()[Path(program).name], words)


def variables(example: str) -> set[str]:
    """What an environment file sets, with the lines that are commented out."""
    text = (DEPLOY / "systemd" / example).read_text()
    return set(re.findall(r"^#?([A-Z_]+)=", text, re.MULTILINE))


def instance(directory: Path) -> dict[str, Any]:
    """A dagster.yaml."""
    return dict(yaml.safe_load((directory / "dagster.yaml").read_text()))


def test_the_shipped_instances_keep_what_the_guarantees_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pools, retries, monitoring and retention are the same on PostgreSQL and in Kubernetes as on a laptop."""
    from dagster._core.instance.config import dagster_instance_config

    ours, shipped, kubernetes = instance(ROOT), instance(DEPLOY), instance(KUBERNETES)
    assert {"concurrency", "run_coordinator", "run_retries", "run_monitoring", "retention", "telemetry"} <= set(ours)
    assert {**ours, "storage": {"postgres": {"postgres_url": {"env": "DAGSTER_POSTGRES_URL"}}}} == shipped
    assert {**shipped, "run_launcher": kubernetes["run_launcher"]} == kubernetes
    # Dagster itself accepts it; a misspelt setting would be refused on the day of the deployment.
    monkeypatch.setenv("DAGSTER_POSTGRES_URL", "postgresql+psycopg2://dagster:x@127.0.0.1:1/dagster")
    shutil.copy(DEPLOY / "dagster.yaml", tmp_path)
    config, _ = dagster_instance_config(str(tmp_path))
    assert config["run_monitoring"]["enabled"] is True
    (tmp_path / "dagster.yaml").write_text((DEPLOY / "dagster.yaml").read_text() + "\nrun_retrys: {enabled: true}\n")
    with pytest.raises(Exception, match="run_retrys"):
        dagster_instance_config(str(tmp_path))


@pytest.mark.parametrize("path", UNITS, ids=lambda path: path.stem)
def test_a_unit_starts_a_command_that_exists_and_gives_it_no_privileges(path: Path) -> None:
    """A service that reads audit events needs a network and one directory, and nothing else of its host."""
    assert exists(started(path))
    expected = {
        "User": ["auditexport"],
        "NoNewPrivileges": ["yes"],
        "CapabilityBoundingSet": [""],
        "ProtectSystem": ["strict"],
        "StateDirectory": ["auditexport"],
        "Restart": ["always"],
        "UMask": ["0077"],
    }
    settings = unit(path)
    assert {name: settings[name] for name in expected} == expected


def test_only_the_code_server_knows_the_databases() -> None:
    """A secret that a process does not need is one that it cannot lose."""
    files = {path.stem.removeprefix("auditexport-"): unit(path)["EnvironmentFile"] for path in UNITS}
    assert files == {
        "code": ["/etc/auditexport/dagster.env", "/etc/auditexport/auditexport.env"],
        "webserver": ["/etc/auditexport/dagster.env"],
        "daemon": ["/etc/auditexport/dagster.env"],
    }
    assert variables("dagster.env.example") == {"DAGSTER_HOME", "DAGSTER_POSTGRES_URL"}
    assert "AUDITEXPORT_MYSQL_URL" in variables("auditexport.env.example")
    for name in OURS:
        given = set(COMPOSE["services"][name]["environment"])
        assert ("AUDITEXPORT_MYSQL_URL" in given) == (name == "code"), name


def test_the_workspaces_name_the_address_of_the_code_server() -> None:
    """Two files that name one port can differ."""
    (location,) = yaml.safe_load((DEPLOY / "workspace.yaml").read_text())["load_from"]
    command = " ".join(started(DEPLOY / "systemd" / "auditexport-code.service"))
    server = location["grpc_server"]
    assert f"-h {server['host']} -p {server['port']} " in command
    assert f"--location-name {server['location_name']}" in command
    (location,) = yaml.safe_load((DEPLOY / "container" / "workspace.yaml").read_text())["load_from"]
    server = location["grpc_server"]
    assert server["host"] in COMPOSE["services"]
    assert str(server["port"]) in COMPOSE["services"][server["host"]]["command"]


@pytest.mark.skipif(
    not shutil.which("systemd-analyze"), reason="systemd is not on this machine; the others read the units"
)
def test_systemd_finds_nothing_wrong_with_the_units(tmp_path: Path) -> None:
    """The units as systemd itself reads them, with the programs where this environment has them."""
    for path in UNITS:
        text = path.read_text().replace("/opt/auditexport/bin", str(Path(sys.executable).parent))
        (tmp_path / path.name).write_text(text)
    paths = [str(tmp_path / path.name) for path in UNITS]
    done = subprocess.run(["systemd-analyze", "verify", "--man=no", *paths], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for path in paths:
        check = ["systemd-analyze", "security", "--offline=yes", "--threshold=20", "--no-pager", path]
        done = subprocess.run(check, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-300:]
    (tmp_path / UNITS[0].name).write_text(UNITS[0].read_text().replace("/opt/auditexport/bin", "/nowhere"))
    assert subprocess.run(["systemd-analyze", "verify", "--man=no", paths[0]], capture_output=True).returncode != 0


@pytest.mark.parametrize("name", [*OURS, "init"])
def test_a_container_starts_a_command_that_exists_and_is_hardened(name: str) -> None:
    """What the units forbid, the containers forbid; and the Dagster UI, which has no log-in, stays on the machine."""
    service = COMPOSE["services"][name]
    assert exists(service["command"])
    assert (service["image"], service["read_only"], service["cap_drop"]) == ("auditexport", True, ["ALL"])
    if "healthcheck" in service:
        assert exists(service["healthcheck"]["test"][1:])
    assert service.get("ports", []) == ["127.0.0.1:3000:3000"] * (name == "webserver")


def test_the_files_that_the_image_and_the_containers_take_exist() -> None:
    """An image that names a file that was moved fails only on the machine that builds it."""
    containerfile = (DEPLOY / "container" / "Containerfile").read_text()
    copied = re.findall(r"^COPY (?!--from)(?:--chown=\S+ )?(.+) \S+$", containerfile, re.MULTILINE)
    sources = [source for line in copied for source in line.split()]
    assert "constraints.txt" in sources
    assert all((ROOT / source).exists() for source in sources), sources
    for name in OURS:
        for volume in COMPOSE["services"][name]["volumes"]:
            source = volume.split(":")[0]
            assert source in COMPOSE["volumes"] or (DEPLOY / "container" / source).exists(), volume
        build = COMPOSE["services"][name]["build"]
        assert (DEPLOY / "container" / build["context"] / build["dockerfile"]).exists()


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────

NOT_MANIFESTS = ("dagster.yaml", "workspace.yaml", "kustomization.yaml")
MANIFESTS: list[dict[str, Any]] = [
    document
    for path in sorted(KUBERNETES.glob("*.yaml"))
    if path.name not in NOT_MANIFESTS
    for document in yaml.safe_load_all(path.read_text())
]
KUSTOMIZATION: dict[str, Any] = yaml.safe_load((KUBERNETES / "kustomization.yaml").read_text())


def _deployments() -> dict[str, dict[str, Any]]:
    return {found["metadata"]["name"]: found for found in MANIFESTS if found["kind"] == "Deployment"}


def _containers() -> list[dict[str, Any]]:
    specs = [found["spec"]["template"]["spec"] for found in _deployments().values()]
    return [container for spec in specs for container in (*spec.get("initContainers", ()), *spec["containers"])]


def _unknown_fields(value: Any, kind: str, at: str) -> list[str]:
    """Where a manifest has a field that Kubernetes' own model of this kind does not know, or lacks one it must have."""
    from kubernetes import client

    if kind.startswith("list["):
        return [found for n, item in enumerate(value) for found in _unknown_fields(item, kind[5:-1], f"{at}[{n}]")]
    if kind.startswith("dict("):
        return [] if isinstance(value, dict) else [at]
    model = getattr(client, kind, None)
    if model is None:  # a plain value
        expected = {"str": str, "bool": bool, "int": int}.get(kind, object)
        return [] if isinstance(value, expected) else [at]
    names = {theirs: ours for ours, theirs in model.attribute_map.items()}
    unknown = [f"{at}.{name}" for name in value if name not in names]
    for name in set(value) & set(names):
        unknown += _unknown_fields(value[name], model.openapi_types[names[name]], f"{at}.{name}")
    return unknown


@pytest.mark.parametrize("manifest", MANIFESTS, ids=lambda found: f"{found['kind']}-{found['metadata']['name']}")
def test_kubernetes_knows_every_field_of_the_manifests(manifest: dict[str, Any]) -> None:
    """A misspelt field is ignored by some clients and refused by others; here it is found."""
    kind = {"Role": "V1Role", "RoleBinding": "V1RoleBinding"}.get(manifest["kind"], f"V1{manifest['kind']}")
    if kind == "V1RoleBinding":  # its subjects are of a kind whose name changed between versions of the client
        assert manifest["roleRef"]["name"] == "auditexport"
        return
    assert not _unknown_fields(manifest, kind, manifest["kind"])
    broken = {**manifest, "metadata": {**manifest["metadata"], "nmae": "x"}}
    assert _unknown_fields(broken, kind, "x") == ["x.metadata.nmae"]


def test_dagster_accepts_the_run_launcher() -> None:
    """A misspelt setting would be refused when the daemon starts the first run."""
    from dagster._config import process_config
    from dagster_k8s import K8sRunLauncher

    config = instance(KUBERNETES)["run_launcher"]["config"]
    assert {config["job_image"]} == {container["image"] for container in _containers()}
    assert process_config(K8sRunLauncher.config_type(), config).success
    assert not process_config(K8sRunLauncher.config_type(), {**config, "job_nmaespace": "x"}).success


def test_everything_that_the_manifests_name_exists() -> None:
    """A pod that names a claim, a Secret or a ConfigMap that does not exist never starts."""
    there = {(found["kind"], found["metadata"]["name"]) for found in MANIFESTS}
    there |= {("ConfigMap", generated["name"]) for generated in KUSTOMIZATION["configMapGenerator"]}
    launcher = instance(KUBERNETES)["run_launcher"]["config"]
    named = {("ConfigMap", name) for name in (*launcher["env_config_maps"], launcher["instance_config_map"])}
    named |= {("Secret", name) for name in launcher["env_secrets"]}
    named |= {("ServiceAccount", launcher["service_account_name"])}
    specs = [found["spec"]["template"]["spec"] for found in _deployments().values()]
    for volume in [*launcher["volumes"], *(volume for spec in specs for volume in spec["volumes"])]:
        if "configMap" in volume:
            named.add(("ConfigMap", volume["configMap"]["name"]))
        else:
            named.add(("PersistentVolumeClaim", volume["persistentVolumeClaim"]["claimName"]))
    for container in _containers():
        for source in container["envFrom"]:
            (reference,) = source.values()
            named.add(("Secret" if "secretRef" in source else "ConfigMap", reference["name"]))
    named |= {("ServiceAccount", spec["serviceAccountName"]) for spec in specs}
    assert len(named) > 5
    assert named <= there
    for name in KUSTOMIZATION["resources"]:
        assert (KUBERNETES / name).exists(), name
    generated = [name for found in KUSTOMIZATION["configMapGenerator"] for name in found.get("files", ())]
    assert all((KUBERNETES / name).exists() for name in generated)


def test_the_variables_of_the_manifests_are_those_that_we_read() -> None:
    """A variable under another name has no effect."""
    pages = (ROOT / "auditexport_pipeline" / "docs" / "operations.md").read_text()
    literals = [text for found in KUSTOMIZATION["configMapGenerator"] for text in found.get("literals", ())]
    set_here = {text.partition("=")[0] for text in literals}
    set_here |= {name for found in MANIFESTS if found["kind"] == "Secret" for name in found["stringData"]}
    assert {"AUDITEXPORT_EXECUTOR", "AUDITEXPORT_MYSQL_URL", "DAGSTER_POSTGRES_URL"} <= set_here
    assert not [name for name in set_here if f"`{name}`" not in pages]


def test_a_pod_starts_a_command_that_exists_and_is_hardened() -> None:
    """What the units and the containers forbid, the pods forbid."""
    for container in _containers():
        assert container["args"][0] == "celery" or exists(container["args"])
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    for found in _deployments().values():
        assert found["spec"]["template"]["spec"]["securityContext"]["runAsNonRoot"] is True
        databases = found["spec"]["template"]["spec"]["containers"][0]["envFrom"]
        knows = {"secretRef": {"name": "auditexport-databases"}} in databases
        assert knows == (found["metadata"]["name"] in ("auditexport-code", "auditexport-worker"))
