"""`auditexport_pipeline.AuditExport` in a user's project, by Dagster's own command `dg`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events

PYPROJECT = """
[project]
name = "theirs"
version = "0.1"
requires-python = ">=3.10"
[tool.dg]
directory_type = "project"
[tool.dg.project]
root_module = "theirs"
[tool.dg.cli]
suppress_warnings = ["project_and_activated_venv_mismatch"]
"""
DEFINITIONS = """
from pathlib import Path
import dagster as dg

@dg.definitions
def defs():
    return dg.load_from_defs_folder(path_within_project=Path(__file__).parent)
"""
COMPONENT = """
type: auditexport_pipeline.AuditExport
attributes:
  name: {name}
  mysql_url_env: {variable}_MYSQL_URL
  clickhouse_url_env: {variable}_CLICKHOUSE_URL
  owners: [team:audit]
  drain:
    batch_rows: 2
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A user's project, with two outboxes as components."""
    for name in ("eu", "us"):
        folder = tmp_path / "theirs" / "theirs" / "defs" / name
        folder.mkdir(parents=True)
        (folder / "defs.yaml").write_text(COMPONENT.format(name=name, variable=name.upper()))
    root = tmp_path / "theirs"
    (root / "pyproject.toml").write_text(PYPROJECT)
    (root / "theirs" / "__init__.py").touch()
    (root / "theirs" / "defs" / "__init__.py").touch()
    (root / "theirs" / "definitions.py").write_text(DEFINITIONS)
    return root


def dg(project: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """`dg …` in the project, on a wide terminal."""
    command = Path(sys.executable).with_name("dg")
    return subprocess.run(
        [str(command), *arguments],
        cwd=project,
        env={**os.environ, "PYTHONPATH": f"{project}:{ROOT}", "COLUMNS": "200", **environment},
        capture_output=True,
        text=True,
        timeout=300,  # `dg` starts several processes that import Dagster
    )


@pytest.mark.slow
def test_the_component_is_found_and_both_outboxes_load(project: Path) -> None:
    """Dagster lists the component, and a YAML file is enough to use it."""
    assert "auditexport_pipeline.AuditExport" in dg(project, "list", "components").stdout
    checked = dg(project, "check", "defs")
    assert checked.returncode == 0, checked.stdout + checked.stderr
    found = json.loads(dg(project, "list", "defs", "--json").stdout)
    assert {asset["asset_key"] for asset in found["assets"]} == {
        f"{name}/{asset}" for name in ("eu", "us") for asset in ("audit_logs_raw_v1", "clickhouse_outbox")
    }
    assert {"eu_audit_log_export", "us_audit_log_export"} <= {job["name"] for job in found["jobs"]}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("  batch_rows: 5", "batch_rows"),
        ("  drain: {batch_rows: 0}", "batch_rows is 0"),
    ],
)
def test_a_wrong_attribute_is_refused_by_its_name(project: Path, wrong: str, message: str) -> None:
    """A typing error in YAML must not become a default."""
    (project / "theirs" / "defs" / "us" / "defs.yaml").write_text(
        f"type: auditexport_pipeline.AuditExport\nattributes:\n{wrong}\n"
    )
    checked = dg(project, "check", "defs")
    assert checked.returncode != 0
    assert message in checked.stdout + checked.stderr


@pytest.mark.slow
def test_a_launch_of_one_outbox_drains_it(project: Path, exporter: Exporter, stack: Stack) -> None:
    """The URLs come from the variables that the YAML names, and nothing else."""
    stack.put(*events(3))
    urls = {"EU_MYSQL_URL": stack.mysql_url, "EU_CLICKHOUSE_URL": stack.clickhouse_url}
    nowhere = {"AUDITEXPORT_MYSQL_URL": "mysql+pymysql://nobody@127.0.0.1:1/none"}
    launched = dg(project, "launch", "--job", "eu_audit_log_export", DAGSTER_HOME=str(exporter.home), **urls, **nowhere)
    assert launched.returncode == 0, launched.stdout + launched.stderr
    assert (stack.counts(), stack.pending()) == ((3, 3), 0)
