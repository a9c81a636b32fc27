"""Shared by the tests of alerts: the sensors as the daemon ticks them, and runs that fail."""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_pipeline.defs.resources import AlertsResource, HeartbeatResource, MySQLResource
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import Exporter

DEAD_PORT = "http://default@127.0.0.1:1/default"
DEAD_MYSQL = "mysql+pymysql://nobody:very-secret@127.0.0.1:1/app"


class Sensor:
    """An alert sensor as the daemon ticks it, its cursor carried from tick to tick."""

    def __init__(self, exporter: Exporter, stack: Stack, name: str, definitions: dg.Definitions = defs) -> None:
        self._instance = exporter.instance
        self.definitions = definitions
        self.name = name
        self.mysql_url = stack.mysql_url
        self.resources: dict[str, object] = {}  # in place of the usual ones
        self.cursor: str | None = None

    def tick(self) -> str:
        """One evaluation; what it says."""
        sensor = self.definitions.resolve_sensor_def(self.name)
        prefix = self.name.removesuffix("run_alerts").removesuffix("number_alerts")
        every = {
            "mysql": MySQLResource(url=self.mysql_url),
            "alerts": AlertsResource(page_url="https://dagster.example.com/"),
            "heartbeat": HeartbeatResource(),
            **self.resources,
        }
        with dg.build_sensor_context(
            instance=self._instance,
            cursor=self.cursor,
            resources={
                f"{prefix}{key}": each
                for key, each in every.items()
                if f"{prefix}{key}" in sensor.required_resource_keys
            },
        ) as context:
            result = sensor._raw_fn(context)
        assert isinstance(result, dg.SensorResult)
        assert not result.run_requests
        self.cursor = result.cursor
        assert result.skip_reason is not None
        return str(result.skip_reason.skip_message)


def failing(exporter: Exporter, monkeypatch: pytest.MonkeyPatch, **settings: object) -> str:
    """The id of a drain that failed because ClickHouse is away."""
    with monkeypatch.context() as away:
        away.setenv("AUDITEXPORT_CLICKHOUSE_URL", DEAD_PORT)
        return exporter.drain(raise_on_error=False, **settings).run_id


def died(
    exporter: Exporter, job: str = "audit_log_export", selection: frozenset[dg.AssetKey] | None = None
) -> dg.DagsterRun:
    """A run that failed from outside, as when its worker was killed, and that Dagster does not launch again."""
    run = exporter.put_run(job, "STARTED", selection)
    exporter.instance.report_run_failed(run, "Run worker process unexpectedly exited")
    exporter.instance.add_run_tags(run.run_id, {"dagster/will_retry": "false"})
    return run


def succeeded(exporter: Exporter, job: str = "audit_log_export") -> dg.DagsterRun:
    """A run that succeeded, without doing anything."""
    run = exporter.put_run(job, "STARTED")
    exporter.instance.report_dagster_event(
        dg.DagsterEvent(event_type_value="PIPELINE_SUCCESS", job_name=job), run.run_id
    )
    return run


class Broken(dg.ConfigurableResource):  # type: ignore[type-arg]
    """A database resource that cannot be set up."""

    url: str = ""

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        raise ValueError("very-secret-payload")


def cannot_begin(exporter: Exporter) -> None:
    """A drain that fails before its first step, so that no step sends anything."""
    broken = dg.Definitions.merge(
        build_audit_export_defs(mysql=Broken()), dg.Definitions(executor=dg.in_process_executor)
    )
    result = broken.resolve_job_def("audit_log_export").execute_in_process(
        instance=exporter.instance, raise_on_error=False
    )
    assert not result.success
    exporter.instance.add_run_tags(result.run_id, {"dagster/will_retry": "false"})
