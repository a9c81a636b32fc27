"""A drain uses the connections of its definitions: no launch changes one, and Dagster's storage has none."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.definitions import build_defs
from auditexport_pipeline.defs.build import build_audit_export_defs
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import Exporter, events, launchpad

PASSWORD = "not-in-the-storage-5d1e"
NEEDED = {"requeue_events": {"ops": {"requeue_rows": {"config": {"why": "a test"}}}}}


@pytest.fixture
def elsewhere(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


def jobs(defs: dg.Definitions) -> Iterator[dg.JobDefinition]:
    yield defs.resolve_implicit_global_asset_job_def()
    for job in defs.jobs or ():
        yield defs.resolve_job_def(job.name)


def accepts(job: dg.JobDefinition, run_config: dict[str, Any]) -> bool:
    try:
        dg.validate_run_config(job, run_config)
    except dg.DagsterInvalidConfigError:
        return False
    return True


def test_a_launch_cannot_send_the_events_to_another_clickhouse(
    exporter: Exporter, stack: Stack, elsewhere: Stack
) -> None:
    """Else rows would be marked here, in a green run, and the events be in the other one."""
    stack.put(*events(3))
    launch = {"resources": {"clickhouse": {"config": {"url": elsewhere.clickhouse_url}}}}
    with suppress(dg.DagsterInvalidConfigError):
        build_defs().resolve_job_def("audit_log_export").execute_in_process(
            instance=exporter.instance, run_config={**launchpad({}), **launch}
        )
    assert elsewhere.counts() == (0, 0)
    assert stack.pending() == 3
    assert exporter.drain().success
    assert stack.counts() == (3, 3)


@pytest.mark.parametrize("name", ["", "eu"])
@pytest.mark.usefixtures("home")
def test_no_job_takes_a_connection_from_its_launch(name: str) -> None:
    """Nor do jobs of maintenance, the UI's Materialize, and an outbox in a host's code location."""
    prefix = f"{name}_" if name else ""
    defs = build_audit_export_defs(name)
    taking = [
        f"{job.name}: {key}"
        for job in jobs(defs)
        for key in ("mysql", "clickhouse", "heartbeat", "alerts", "pipeline")
        if prefix + key in job.resource_defs
        and accepts(
            job,
            {
                **NEEDED.get(job.name.removeprefix(prefix), {}),
                "resources": {prefix + key: {"config": {"url": "http://127.0.0.1:1/elsewhere"}}},
            },
        )
    ]
    assert taking == []


@pytest.mark.usefixtures("home")
def test_a_password_in_the_definitions_is_in_no_snapshot_of_a_job() -> None:
    """Dagster stores one of each job with every run, and many people may read its storage."""
    url = f"mysql+pymysql://user:{PASSWORD}@127.0.0.1:1/somewhere"
    showing = [
        job.name
        for job in jobs(build_audit_export_defs(mysql_url=url))
        if PASSWORD in dg.serialize_value(job.get_job_snapshot())
    ]
    assert showing == []
