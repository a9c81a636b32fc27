"""The asset as Dagster sees and runs it, on real servers and a real Dagster instance."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import dagster as dg
import pytest
import yaml
from dagster._core.execution.api import create_execution_plan, execute_plan_iterator

from auditexport_pipeline.core import claiming, export, retries
from auditexport_pipeline.core.errors import IncompleteRun
from auditexport_pipeline.core.pipeline import VERBS
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.settings import Limits, bounds_of
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.definitions import build_defs, defs
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import (
    ASSET,
    FIRST_EVENT_MS,
    ROOT,
    Exporter,
    event,
    events,
    everything_once,
    launchpad,
    ledger,
    text_of,
)
from auditexport_tests.integration.dagster.location import CANARY, leaking_job, the_export_job
from auditexport_tests.integration.security.canaries import Search
from auditexport_tests.support.waiting import wait_until
from auditexport_tests.support.webhook import Webhook

STEPS = ("fetch_batch", "write_clickhouse", "mark_exported")


# ── the code location ────────────────────────────────────────────────────────────────────────────


def test_the_code_location_offers_the_names_of_the_contract() -> None:
    """Users configure these names: renaming one breaks them."""
    graph = defs.resolve_asset_graph()
    assert graph.get(ASSET).parent_keys == {dg.AssetKey("clickhouse_outbox")}
    assert graph.get(dg.AssetKey("clickhouse_outbox")).is_external
    job = defs.resolve_job_def("audit_log_export")
    assert [node.name for node in job.graph.nodes] == ["audit_logs_raw_v1"]
    # From failure, Dagster would skip mapped steps that had not started, and end green.
    assert job.tags["dagster/retry_strategy"] == "ALL_STEPS"
    # No check either: it would delay the next drain.
    ops = {node.name for node in job.all_node_defs if isinstance(node, dg.OpDefinition)}
    assert ops == {"plan_batches", "fetch_batch", "write_clickhouse", "mark_exported", "finish_export"}
    assert defs.resolve_sensor_def("outbox_backlog_sensor").job_name == "audit_log_export"
    assert defs.resolve_schedule_def("audit_log_export_schedule").job_name == "audit_log_export"
    assert {"mysql", "clickhouse", "heartbeat"} <= set(defs.resources or {})


def test_the_assets_have_owners_columns_and_a_freshness_policy() -> None:
    """On call looks there for an owner, a description and the meaning of each column."""
    for key in (ASSET, dg.AssetKey("clickhouse_outbox")):
        node = defs.resolve_asset_graph().get(key)
        assert node.owners
        assert node.kinds
        assert node.description
        columns = node.metadata["dagster/column_schema"].columns
        assert columns
        assert all(column.description for column in columns)
    assert defs.resolve_asset_graph().get(ASSET).freshness_policy is not None


def test_an_unknown_executor_is_refused_by_the_name_of_its_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    """A misspelt executor must not silently become the default one."""
    monkeypatch.setenv("AUDITEXPORT_EXECUTOR", "threads")
    with pytest.raises(Exception, match="AUDITEXPORT_EXECUTOR is 'threads'"):
        build_defs()
    monkeypatch.setenv("AUDITEXPORT_EXECUTOR", "")
    assert build_defs().executor is dg.in_process_executor


def test_the_pool_of_drains_is_on_the_op_and_in_the_instance() -> None:
    """Job tags do not apply to Materialize; the op's pool does, if the instance limits it by run."""
    for job in (the_export_job(), defs.get_repository_def().get_job("__ASSET_JOB")):
        plan = next(node for node in job.all_node_defs if node.name == "plan_batches")
        assert isinstance(plan, dg.OpDefinition)
        assert plan.pool == "audit_log_export"
    pools = yaml.safe_load((ROOT / "dagster.yaml").read_text())["concurrency"]["pools"]
    assert pools == {"default_limit": 1, "granularity": "run"}


# ── a drain and its report ───────────────────────────────────────────────────────────────────────


def test_a_drain_reports_every_number_and_every_number_is_right(exporter: Exporter, stack: Stack) -> None:
    """Operators read the materialization: a missing or wrong number misleads them."""
    rows = events(25)
    rows[7] = ("ws_1", "evt_7", '{"event_id": "evt_7", "workspace_id": "ws_1", "event": "key.create"}')
    rows.append(rows[24])  # the application wrote one event twice
    stack.put(*rows)
    stack.put(*events(3, "later"), version="audit_log.v9")
    result = exporter.drain(batch_rows=10)
    (materialization,) = result.asset_materializations_for_node("audit_logs_raw_v1")
    assert materialization.asset_key == ASSET
    shown = text_of(materialization.metadata)
    sent = sum(len(payload) for n, (_, _, payload) in enumerate(rows) if n not in (7, 24))
    assert shown["rows"] == 25
    assert shown["entries"] == 24
    assert shown["batches"] == 3
    assert shown["dead_letters"] == 1
    assert shown["folded_rows"] == 1
    assert shown["bytes"] == (sent if _keeps_text(stack) else shown["bytes"])
    assert shown["verified_batches"] == 3
    assert (shown["backlog_rows"], shown["lag_s"], shown["open_batches"]) == (0, 0.0, 0)
    assert (shown["unknown_rows"], shown["unknown_versions"], shown["dead_letters_standing"]) == (3, "audit_log.v9", 1)
    assert shown["oldest_event"] == FIRST_EVENT_MS / 1000
    assert shown["newest_event"] == FIRST_EVENT_MS / 1000 + 24
    seconds = shown["seconds"]
    assert isinstance(seconds, float)
    assert 0 < seconds < 60
    assert shown["rows_per_s"] == pytest.approx(25 / seconds, rel=0.02)
    table = str(shown["per_batch"]).splitlines()
    assert len(table) == 2 + 3
    assert [line.split("|")[1].strip() for line in table[2:]] == ["1", "2", "3"]
    assert [line.split("|")[4].strip() for line in table[2:]] == ["9", "10", "6"]
    assert all("verified" in line for line in table[2:])
    assert stack.counts() == (24, 24)
    recorded = exporter.instance.get_latest_materialization_event(ASSET)
    assert recorded is not None
    assert recorded.asset_materialization is not None
    assert text_of(recorded.asset_materialization.metadata) == shown


def _keeps_text(stack: Stack) -> bool:
    """MariaDB returns JSON as it was written, MySQL normalised, which changes its length."""
    return "mariadb" in str(stack.sql("SELECT VERSION() AS v")[0].v).lower()


def test_an_empty_outbox_still_materializes(exporter: Exporter) -> None:
    """An idle exporter must be distinguishable from a dead one."""
    result = exporter.drain()
    (materialization,) = result.asset_materializations_for_node("audit_logs_raw_v1")
    shown = text_of(materialization.metadata)
    assert (shown["rows"], shown["batches"], shown["rows_per_s"]) == (0, 0, 0.0)
    assert shown["per_batch"] == "nothing was pending"
    assert "oldest_event" not in shown


@pytest.mark.slow
def test_what_a_run_leaves_over_is_reported_and_taken_by_the_next(exporter: Exporter, stack: Stack) -> None:
    """A bounded run must say what waits, and must not lose it."""
    stack.put(*events(7))
    first = exporter.drain(batch_rows=2, max_batches=2)
    shown = text_of(first.asset_materializations_for_node("audit_logs_raw_v1")[0].metadata)
    assert (shown["rows"], shown["backlog_rows"]) == (4, 3)
    assert isinstance(shown["lag_s"], float)
    assert shown["lag_s"] > 0
    exporter.drain(batch_rows=2)
    everything_once(stack, 7)


@pytest.mark.slow
def test_a_run_that_stays_exports_what_arrives(exporter: Exporter, stack: Stack) -> None:
    """Until another drain waits in the queue for its place."""
    stack.put(*events(2))

    def arrive() -> None:
        for number in range(2):
            wait_until(lambda: stack.pending() == 0, what="an empty outbox")
            stack.put(*events(3, f"later_{number}"))
        wait_until(lambda: stack.pending() == 0, what="an empty outbox")
        exporter.put_run("audit_log_export", "QUEUED")

    with ThreadPoolExecutor(1) as pool:
        arrived = pool.submit(arrive)
        result = exporter.drain(linger_s=120, linger_poll_ms=20)
        arrived.result()
    (materialization,) = result.asset_materializations_for_node("audit_logs_raw_v1")
    shown = text_of(materialization.metadata)
    assert (shown["rows"], shown["batches"], shown["verified_batches"], shown["backlog_rows"]) == (8, 3, 3, 0)
    everything_once(stack, 8)


@pytest.mark.slow
def test_each_step_reports_what_ran_ahead_of_it(exporter: Exporter, stack: Stack) -> None:
    """Each batch is marked before the next is fetched. Where a thread did the work, log and metadata say so."""
    stack.put(*events(4))
    result = exporter.drain(batch_rows=1)
    ids = [batch.batch_id for batch in ledger(stack)]
    expected = [f"export_batch.{step}[batch_{batch_id}]" for batch_id in ids for step in STEPS]
    steps = exporter.steps(result.run_id, dg.DagsterEventType.STEP_START)
    assert steps == ["plan_batches", *expected, "finish_export"]
    outputs: dict[str, dict[str, object]] = {}
    for done in result.all_events:
        if done.is_successful_output and done.step_key and "export_batch" in done.step_key:
            outputs[done.step_key.removeprefix("audit_logs_raw_v1.export_batch.")] = text_of(
                done.step_output_data.metadata
            )
    assert outputs["fetch_batch[batch_1]"]["prefetched"] is False
    assert outputs["fetch_batch[batch_1]"]["fetch_ahead_s"] == 0
    assert outputs["fetch_batch[batch_3]"]["prefetched"] is True
    for step, verb in zip(STEPS, VERBS, strict=True):
        shown = outputs[f"{step}[batch_3]"]
        assert shown[f"{verb}_s"] > 0  # type: ignore[operator]
        assert shown[f"{verb}_ahead_s"] > 0  # type: ignore[operator]
    observed = [
        text_of(done.asset_observation_data.asset_observation.metadata)
        for done in result.all_events
        if done.event_type is dg.DagsterEventType.ASSET_OBSERVATION
    ]
    assert [shown["batch_id"] for shown in observed] == [1, 2, 3, 4]
    assert all(f"{verb}_s" in shown and f"{verb}_ahead_s" in shown for shown in observed for verb in VERBS)
    lines = [record.user_message for record in exporter.instance.all_logs(result.run_id)]
    fetched = [line for line in lines if line.startswith("fetched batch")]
    assert "ahead" not in fetched[0]
    assert re.search(r"; ahead: started \d+\.\d\d s before this step", fetched[2])


# ── a run that was killed ────────────────────────────────────────────────────────────────────────

KILLED_AT_ITS_SECOND_MARK = """
import os, signal, threading
import dagster as dg
from auditexport_pipeline.core import export
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_tests.integration.dagster.location import CANARY, leaking_job, the_export_job

real, marks = export.mark, []
real_step, steps = Pipeline.mark, []

def mark(*arguments):
    marks.append(arguments)
    if len(marks) == 2:
        threading.Event().wait()
    return real(*arguments)

def mark_step(*arguments):
    steps.append(arguments)
    if len(steps) == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    return real_step(*arguments)

export.mark, Pipeline.mark = mark, mark_step
config = {"ops": {"audit_logs_raw_v1": {"config": {"batch_rows": 2}}}}
with dg.DagsterInstance.get() as instance:
    dg.execute_job(dg.reconstructable(the_export_job), instance=instance, run_config=config)
"""


@pytest.fixture
def killed_run(exporter: Exporter, stack: Stack) -> dg.DagsterRun:
    """A run of four batches that was killed with the first exported and the second written; the daemon has noticed."""
    stack.put(*events(8))
    child = subprocess.run(
        [sys.executable, "-c", KILLED_AT_ITS_SECOND_MARK], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert child.returncode == -signal.SIGKILL, child.stderr
    states = [str(batch.state) for batch in ledger(stack)]
    assert states[:2] == ["exported", "written"]
    assert set(states[2:]) <= {"claimed", "sealed", "written"}  # prefetched, however far that got
    (run,) = exporter.instance.get_runs()
    assert run.status is dg.DagsterRunStatus.STARTED
    exporter.instance.report_run_failed(run)
    return exporter.instance.get_runs()[0]


@pytest.mark.slow
def test_a_killed_run_retried_from_failure_does_not_end_green(
    exporter: Exporter, stack: Stack, killed_run: dg.DagsterRun
) -> None:
    """Dagster skips the mapped steps that had not started: without the planned count the run would claim success."""
    options = dg.ReexecutionOptions.from_failure(killed_run.run_id, exporter.instance)
    with dg.execute_job(
        dg.reconstructable(the_export_job),
        instance=exporter.instance,
        reexecution_options=options,
        run_config=killed_run.run_config,
        raise_on_error=False,
    ) as again:
        assert not again.success
        (line,) = exporter.failures(again.run_id)
        assert re.match(r"4 batches were planned and \d arrived", line)
        assert "launch a new run" in line
        metadata = again.failure_data_for_node("audit_logs_raw_v1.finish_export")
        assert metadata is not None
        assert metadata.user_failure_data is not None
        assert text_of(metadata.user_failure_data.metadata)["error"] == IncompleteRun.__name__
        assert not exporter.instance.fetch_materializations(ASSET, limit=1).records
    # Retried whole, as ALL_STEPS makes the daemon do it, the plan adopts the batches at once.
    with dg.execute_job(
        dg.reconstructable(the_export_job),
        instance=exporter.instance,
        reexecution_options=dg.ReexecutionOptions(parent_run_id=killed_run.run_id),
        run_config=killed_run.run_config,
    ) as again:
        assert again.success
    everything_once(stack, 8)
    assert {str(batch.state) for batch in ledger(stack)} == {"verified"}


def test_a_queued_plan_of_an_ended_run_claims_nothing(exporter: Exporter, stack: Stack, heart: Webhook) -> None:
    """No run would export its claims; and it would take those of the run's own retry, which has the same root and owner."""
    stack.put(*events(4))
    ended = exporter.put_run("audit_log_export", "CANCELED")
    claiming.claim(stack.outbox, owner=ended.run_id, dead_owners=(), limits=Limits(batch_rows=2, max_batches=1))
    before = ledger(stack)
    happened = _as_a_worker_does(exporter, ended, "audit_logs_raw_v1.plan_batches")
    failure = happened[-1].step_failure_data.user_failure_data
    assert failure is not None
    assert str(failure.description).startswith(
        f"run {ended.run_id[:8]} has ended, and this step of it was still in a queue"
    )
    assert not [event for event in happened if event.event_type is dg.DagsterEventType.STEP_UP_FOR_RETRY]
    assert heart.paths == []
    assert ledger(stack) == before


def _as_a_worker_does(exporter: Exporter, run: dg.DagsterRun, step_key: str) -> list[dg.DagsterEvent]:
    """What a task of Celery does with the step, whenever it comes to it."""
    job = dg.reconstructable(the_export_job)
    plan = create_execution_plan(job, step_keys_to_execute=[step_key])
    return list(execute_plan_iterator(plan, job, run, exporter.instance))


# ── configuration ────────────────────────────────────────────────────────────────────────────────


def _jobs() -> Iterator[dg.JobDefinition]:
    yield the_export_job()
    yield defs.get_repository_def().get_job("__ASSET_JOB")


def test_the_launchpad_shows_each_limit_with_default_and_bounds() -> None:
    """Configuration has one place, `core.settings`; the launchpad must not drift from it."""
    for job in _jobs():
        node = job.graph.node_named("audit_logs_raw_v1").definition
        assert isinstance(node, dg.GraphDefinition)
        assert node.config_mapping is not None
        form = node.config_mapping.config_schema.config_type.fields
        assert set(form) == set(Limits.model_fields)
        for name, limit in Limits.model_fields.items():
            shown = form[name]
            default = list(VERSIONS) if name == "versions" else limit.default
            assert shown.default_value == default
            assert shown.description.startswith(limit.description)
            if name != "versions":
                low, high = bounds_of(limit)
                assert f"From {low:,} to {high:,}." in shown.description


def _out_of_bounds() -> Iterator[tuple[str, object]]:
    for name, limit in Limits.model_fields.items():
        if name != "versions":
            low, high = bounds_of(limit)
            yield name, low - 1
            yield name, high + 1
    yield "versions", []
    yield "versions", ["audit_log.v9"]


@pytest.fixture
def some_urls(monkeypatch: pytest.MonkeyPatch) -> None:
    """Connections that are set and never used: a launch without them is refused for that reason first."""
    monkeypatch.setenv("AUDITEXPORT_MYSQL_URL", "mysql+pymysql://nobody@127.0.0.1:1/none")
    monkeypatch.setenv("AUDITEXPORT_CLICKHOUSE_URL", "http://nobody@127.0.0.1:1/none")


@pytest.mark.usefixtures("some_urls")
@pytest.mark.parametrize(("name", "value"), list(_out_of_bounds()))
def test_a_value_out_of_bounds_is_refused_by_the_name_of_its_field(name: str, value: object) -> None:
    """The page refuses the launch with this message, so it has to say which field and what would do."""
    for job in _jobs():
        with pytest.raises(dg.DagsterInvalidConfigError, match=rf"{name} is .*(must be|choose from)"):
            dg.validate_run_config(job, launchpad({name: value}))


def test_refused_settings_start_nothing_and_claim_nothing(exporter: Exporter, stack: Stack) -> None:
    """Before anything runs means before a run exists and before the ledger knows of it."""
    stack.put(*events(2))
    for job in _jobs():
        with pytest.raises(dg.DagsterInvalidConfigError, match="batch_rows is 0"):
            job.execute_in_process(instance=exporter.instance, run_config=launchpad({"batch_rows": 0}))
    assert exporter.instance.get_runs() == []
    assert ledger(stack) == []
    assert stack.pending() == 2


@pytest.mark.slow
def test_the_implicit_asset_job_takes_the_same_settings(exporter: Exporter, stack: Stack) -> None:
    """Materialize with a configuration from the launchpad must reach every op."""
    stack.put(*events(5))
    job = defs.get_repository_def().get_job("__ASSET_JOB")
    result = job.execute_in_process(
        instance=exporter.instance, run_config=launchpad({"batch_rows": 2}), asset_selection=[ASSET]
    )
    assert result.success
    assert [batch.rows for batch in ledger(stack)] == [2, 2, 1]
    everything_once(stack, 5)


# ── the hand-over between fetch and write ────────────────────────────────────────────────────────


def _rows_read(stack: Stack) -> int:
    return sum(int(str(row[1])) for row in stack.sql("SHOW GLOBAL STATUS LIKE 'Handler_read_next'"))


@pytest.mark.slow
def test_in_one_process_the_rows_are_handed_over_in_memory(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Reading the outbox is a quarter of the work; doing it twice would show."""
    reads: list[int] = []
    real = MySQLOutbox.read

    def counted(self: MySQLOutbox, pks: PkSet, *, row_bytes: int, version: str | None = None) -> Iterator[object]:
        reads.extend(pks)
        return real(self, pks, row_bytes=row_bytes, version=version)

    monkeypatch.setattr(MySQLOutbox, "read", counted)
    pks = stack.put(*events(6))
    exporter.drain(batch_rows=2)
    assert sorted(reads) == pks
    everything_once(stack, 6)


@pytest.mark.slow
def test_between_processes_the_outbox_is_read_again(exporter: Exporter, stack: Stack) -> None:
    """A step in another process has no rows in memory; the sealed batch must give it the same ones."""
    count = 6_000
    stack.put(*events(count))
    before = _rows_read(stack)
    config = exporter.home / "run.yaml"
    config.write_text(yaml.safe_dump(launchpad({"batch_rows": count // 2})))
    answer = exporter.command(
        *("job", "execute", "-m", "auditexport_pipeline.definitions", "-j", "audit_log_export", "-c", str(config)),
        AUDITEXPORT_EXECUTOR="multiprocess",
    )
    assert answer.returncode == 0, answer.stderr
    everything_once(stack, count)
    # Claim, fetch, write, mark and the check of the marks read every row; the rest of a run reads a sample of a thousand.
    assert round((_rows_read(stack) - before) / count) == 5


# ── nothing audited in Dagster ───────────────────────────────────────────────────────────────────


def _stored_in(home: Path, needle: str) -> set[str]:
    """The files under `home` that hold `needle`, in the clear, in a database's cell or compressed in one."""
    search = Search({"payload": needle})
    search.look_at_files("DAGSTER_HOME", home)
    return search.hits("DAGSTER_HOME")


def _payloads_with_canaries() -> list[tuple[str, str, str]]:
    """Canaries wherever a payload has text: sound, undecodable, and refused or normalised for ClickHouse's sake."""
    rows = [
        event(
            f"evt_{n}",
            description=CANARY,
            meta={CANARY: CANARY},
            actor={"type": "user", "id": "user_1", "name": CANARY, "meta": {"x": CANARY}},
        )
        for n in range(3)
    ]
    rows.append(("ws_1", "evt_a", f'{{"event_id": "evt_a", "time": "{CANARY}", "workspace_id": "ws_1", "event": "e"}}'))
    rows.append(("ws_1", "evt_b", f'["{CANARY}"]'))
    twice = f'{{"a": "{CANARY}", "a": "{CANARY}"}}'
    rows.append((*event("evt_c")[:2], event("evt_c")[2][:-1] + f', "meta": {twice}}}'))
    rows.append(event("evt_d", description=f"{CANARY} refused"))
    return rows


@pytest.mark.slow
def test_dagster_stores_no_payload_of_a_run(exporter: Exporter, stack: Stack) -> None:
    """Audit payloads are personal data; Dagster's storage has many readers and a long retention."""
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT some_of_them CHECK description != '{CANARY} refused'"
    )
    stack.put(*_payloads_with_canaries())
    # On disk: what goes from step to step, and what steps print.
    with dg.execute_job(dg.reconstructable(the_export_job), instance=exporter.instance) as run:
        assert run.success
    assert stack.outbox.dead_by_reason() == {"not_an_object": 1, "wrong_type": 1}
    assert stack.sql("SELECT state FROM clickhouse_outbox_dead_letter WHERE event_id = 'evt_d'")[0].state == "held"
    assert stack.counts() == (4, 4)
    assert stack.clickhouse(f"SELECT count() > 0 FROM audit_logs_raw_v1 WHERE description = '{CANARY}'") == [(True,)]
    assert _stored_in(exporter.home, CANARY) == set()


def test_dagster_stores_no_payload_that_clickhouse_quotes(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ClickHouse's messages quote the value they dislike, and Dagster stores an exception with all its causes."""
    stack.log.client().command(
        "ALTER TABLE audit_logs_raw_v1 ADD COLUMN kind Enum8('none' = 1) MATERIALIZED CAST(description AS Enum8('none' = 1))"
    )
    stack.put(*_payloads_with_canaries()[:3])
    monkeypatch.setattr(retries, "FIRST_WAIT_S", 0.01)
    exporter.drain(raise_on_error=False)
    held = stack.sql("SELECT detail FROM clickhouse_outbox_dead_letter WHERE state = 'held'")
    assert held
    assert CANARY not in str(held)
    assert _stored_in(exporter.home, CANARY) == set()


def test_dagster_stores_no_payload_of_an_unforeseen_error(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An unforeseen exception may contain a payload; Dagster would store its text."""

    def broken(*_: object) -> None:
        raise KeyError(CANARY)

    monkeypatch.setattr(export, "write", broken)
    stack.put(*_payloads_with_canaries()[:1])
    run_id = exporter.drain(raise_on_error=False).run_id
    (line,) = exporter.failures(run_id)
    assert line.startswith("KeyError at test_asset.py:")
    assert _stored_in(exporter.home, CANARY) == set()


@pytest.mark.slow
def test_the_search_for_payloads_finds_what_is_planted(exporter: Exporter) -> None:
    """A search that can find nothing would make the tests above worthless."""
    with dg.execute_job(dg.reconstructable(leaking_job), instance=exporter.instance) as run:
        assert run.success
    found = _stored_in(exporter.home, CANARY)
    assert any(".db" in place for place in found)
    assert any("result" in place for place in found)
