"""Several outboxes in one code location: names that do not clash, and drains that keep to their own databases."""

from __future__ import annotations

from collections.abc import Iterator

import dagster as dg
import pytest

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Thresholds
from auditexport_pipeline.definitions import build_audit_export_defs, defs
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.dagster.conftest import Exporter, events

JOBS = ("audit_log_export", "requeue_events", "sweep_exported_rows", "reconcile_audit_logs", "retry_dead_letters")


@pytest.fixture
def other(mysql_server: str, clickhouse_server: str) -> Iterator[Stack]:
    """A second outbox, in databases of its own."""
    with fresh_stack(mysql_server, clickhouse_server) as fresh:
        yield fresh


@pytest.fixture
def both(stack: Stack, other: Stack) -> dg.Definitions:
    """Somebody's own definitions, with two outboxes merged in."""

    @dg.asset
    def theirs() -> None: ...

    return dg.Definitions.merge(
        dg.Definitions(assets=[theirs], executor=dg.in_process_executor),
        build_audit_export_defs("eu", mysql_url=stack.mysql_url, clickhouse_url=stack.clickhouse_url),
        build_audit_export_defs(
            "us",
            mysql_url=other.mysql_url,
            clickhouse_url=other.clickhouse_url,
            drain={"batch_rows": 2},
            sensor_thresholds=Thresholds(rows=4, lag_s=3_600),
            owners=["team:audit"],
            links={"runbook": "https://example.com/runbook"},
        ),
    )


def drain(both: dg.Definitions, exporter: Exporter, name: str, **settings: object) -> dg.ExecuteInProcessResult:
    config = {"ops": {f"{name}__audit_logs_raw_v1": {"config": settings}}} if settings else {}
    return both.resolve_job_def(f"{name}_audit_log_export").execute_in_process(
        instance=exporter.instance, run_config=config
    )


def test_each_outbox_has_every_definition_under_its_own_name(both: dg.Definitions) -> None:
    """Two shards that share a name would share a queue, a sensor's cursor or, worse, a database."""
    repository = dg.Definitions.merge(defs, both).get_repository_def()
    jobs = {job.name for job in repository.get_all_jobs()}
    assert {*JOBS, *(f"eu_{job}" for job in JOBS), *(f"us_{job}" for job in JOBS)} <= jobs
    graph = repository.asset_graph
    for name in ("eu", "us"):
        node = graph.get(dg.AssetKey([name, "audit_logs_raw_v1"]))
        assert node.parent_keys == {dg.AssetKey([name, "clickhouse_outbox"])}
        (pool,) = {
            op.pool for op in repository.get_job(f"{name}_audit_log_export").all_node_defs if getattr(op, "pool", 0)
        }
        assert pool == f"{name}_audit_log_export"
        assert {f"{name}_mysql", f"{name}_clickhouse", f"{name}_heartbeat"} <= set(both.resources or {})
    assert graph.get(dg.AssetKey(["us", "audit_logs_raw_v1"])).owners == ["team:audit"]
    assert "runbook" in graph.get(dg.AssetKey(["us", "clickhouse_outbox"])).metadata
    eu = graph.get(dg.AssetKey(["eu", "audit_logs_raw_v1"]))
    assert not eu.owners
    assert "`auditexport --outbox eu requeue`" in (eu.description or "")
    dg.Definitions.validate_loadable(both)


@pytest.mark.slow
def test_a_drain_takes_its_own_outbox_and_leaves_the_other(
    both: dg.Definitions, exporter: Exporter, stack: Stack, other: Stack
) -> None:
    """An event in the wrong region's table is a breach, not a bug."""
    stack.put(*events(5))
    other.put(*events(7, "other"))
    assert drain(both, exporter, "eu").success
    assert (stack.counts(), stack.pending()) == ((5, 5), 0)
    assert (other.counts(), other.pending()) == ((0, 0), 7)
    result = drain(both, exporter, "us", batch_rows=3)
    assert (other.counts(), other.pending()) == ((7, 7), 0)
    (materialization,) = result.asset_materializations_for_node("us__audit_logs_raw_v1")
    assert materialization.asset_key == dg.AssetKey(["us", "audit_logs_raw_v1"])
    assert materialization.metadata["batches"].value == 3
    observed = exporter.instance.fetch_observations(dg.AssetKey(["us", "audit_logs_raw_v1"]), limit=10).records
    metadata = [record.asset_observation.metadata for record in observed if record.asset_observation]
    assert sorted(int(str(each["rows"].value)) for each in metadata) == [1, 3, 3]
    assert {str(each["in_the_ledger"].value) for each in metadata} == {
        f"auditexport --outbox us batches show {batch_id}" for batch_id in (1, 2, 3)
    }


def test_a_sensor_has_its_own_outbox_thresholds_and_settings(
    both: dg.Definitions, exporter: Exporter, stack: Stack, other: Stack
) -> None:
    """A drain of one outbox, however long, must not keep the other one's from starting."""
    stack.put(*events(5))
    other.put(*events(5, "other"))
    exporter.put_run("eu_audit_log_export", "STARTED")
    requests = {}
    for name in ("eu", "us"):
        resources = {key: (both.resources or {})[key] for key in (f"{name}_mysql",)}
        with dg.build_sensor_context(instance=exporter.instance, resources=resources) as context:
            result = both.resolve_sensor_def(f"{name}_outbox_backlog_sensor")._raw_fn(context)
        requests[name] = list(result.run_requests or [])
        assert [event.asset_key.path for event in result.asset_events] == [[name, "clickhouse_outbox"]]
    assert requests["eu"] == []
    (request,) = requests["us"]
    assert request.run_config == {"ops": {"us__audit_logs_raw_v1": {"config": {"batch_rows": 2}}}}


@pytest.mark.parametrize("name", ["EU", "1st", "eu-west", "a" * 32, "é"])
def test_a_name_that_dagster_would_not_take_is_refused(name: str) -> None:
    """Dagster's own message would name one of a dozen definitions, and not what to change."""
    with pytest.raises(InvalidConfig, match="the outbox's name is"):
        build_audit_export_defs(name)


def test_a_misspelt_resource_is_refused() -> None:
    """It would otherwise be merged in under a name that nothing asks for, and the default would be used."""
    with pytest.raises(InvalidConfig, match="mysq: no such"):
        build_audit_export_defs(mysq=None)
