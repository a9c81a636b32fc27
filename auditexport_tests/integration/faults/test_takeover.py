"""Runs that die without Dagster's daemon: how soon the next run takes their rows, and what a run reports of rows that others hold.

Crash points inside one process are in `integration.export.test_exactly_once`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import dagster as dg
import pytest
import sqlalchemy as sa

from auditexport_pipeline import processes
from auditexport_pipeline.core import claiming, small
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.core.small import SmallBatches
from auditexport_pipeline.defs import assets, drains
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events, everything_once, ledger, text_of
from auditexport_tests.integration.dagster.test_automation import Sensor, age, reason, requests, schedule
from auditexport_tests.support.crashes import CrashingAuditLog, CrashPoint, drain
from auditexport_tests.support.prompts import Prompt, prompt_in, started, urls
from auditexport_tests.support.waiting import wait_until

SHORTEST_LEASE_S = 10


@pytest.fixture
def prompt(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Prompt:
    return prompt_in(urls(stack), monkeypatch)


@contextmanager
def locked(stack: Stack, pk: int) -> Iterator[None]:
    """A row that the application holds: a batch with it stays unmarked meanwhile."""
    with stack.outbox.engine.begin() as connection:
        connection.execute(sa.text("SELECT pk FROM clickhouse_outbox WHERE pk = :pk FOR UPDATE"), {"pk": pk})
        yield


def states(stack: Stack) -> list[str]:
    return [str(batch.state) for batch in ledger(stack)]


def lease_left_s(stack: Stack) -> float:
    (row,) = stack.sql(
        "SELECT MAX(lease_until_ms) - UNIX_TIMESTAMP(NOW(3)) * 1000 AS left_ms FROM clickhouse_outbox_batch "
        "WHERE state IN ('claimed', 'sealed', 'written')"
    )
    return float(str(row.left_ms)) / 1000


def last_line(exporter: Exporter, run_id: str) -> str:
    """What the run's own log says last."""
    lines = [
        record.user_message
        for record in exporter.instance.all_logs(run_id)
        if record.step_key and not record.is_dagster_event
    ]
    return lines[-1]


def metadata_of(result: dg.ExecuteInProcessResult) -> dict[str, object]:
    (event,) = [event for event in result.all_events if event.is_step_materialization]
    return text_of(event.step_materialization_data.materialization.metadata)


def killed_outside_the_daemon(exporter: Exporter, stack: Stack, *words: str) -> dg.DagsterRun:
    """A run of `dagster …` that was killed while it marked, and that Dagster takes for started."""
    command = [sys.executable, "-m", "dagster", *words, "-m", "auditexport_pipeline.definitions"]
    environment = {**os.environ, "DAGSTER_HOME": str(exporter.home)}
    (last,) = stack.sql("SELECT MAX(pk) AS pk FROM clickhouse_outbox")
    with locked(stack, int(str(last.pk))):
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        try:
            wait_until(lambda: states(stack) == ["written"], what="a batch that is not marked yet")
        finally:
            process.kill()
            process.wait()
    (run,) = exporter.instance.get_runs()
    assert run.status is dg.DagsterRunStatus.STARTED, "Dagster does not know"
    return run


def status_of(exporter: Exporter, run: dg.DagsterRun) -> dg.DagsterRunStatus:
    stored = exporter.instance.get_run_by_id(run.run_id)
    assert stored is not None
    return stored.status


@pytest.fixture
def sensor(exporter: Exporter, stack: Stack) -> Sensor:
    return Sensor(exporter, stack)


def silent_for(exporter: Exporter, run: dg.DagsterRun, seconds: float) -> None:
    """Moves the run's last update into the past."""
    with exporter.instance.run_storage.connect() as connection:  # type: ignore[attr-defined]
        connection.execute(
            sa.text("UPDATE runs SET update_timestamp = datetime(update_timestamp, :ago) WHERE run_id = :run_id"),
            {"ago": f"-{seconds} seconds", "run_id": run.run_id},
        )
    assert not exporter.instance.all_logs(run.run_id)


@pytest.mark.parametrize(
    "words",
    [
        pytest.param(("asset", "materialize", "--select", "audit_logs_raw_v1"), marks=pytest.mark.slow),
        ("job", "execute", "-j", "audit_log_export"),
    ],
    ids=lambda words: words[1],
)
def test_the_run_after_one_that_was_killed_exports_everything(
    exporter: Exporter, stack: Stack, sensor: Sensor, words: tuple[str, ...]
) -> None:
    """Nobody reports such a run as dead: its process, on the same machine, is seen to be gone."""
    stack.put(*events(30))
    run = killed_outside_the_daemon(exporter, stack, *words)
    assert exporter.drain().success
    assert stack.pending() == 0, "the next run left the dead one's rows"
    everything_once(stack, 30)
    sensor.tick()
    assert_ended(exporter, run)


def dead_process() -> str:
    """The name of a process of this machine that is gone."""
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    return processes.this_process().replace(f":{os.getpid()}:", f":{child.pid}:")


def assert_ended(exporter: Exporter, run: dg.DagsterRun) -> None:
    """The run is failed in Dagster's storage, so that it does not hold the pool."""
    assert status_of(exporter, run) is dg.DagsterRunStatus.FAILURE
    (failure,) = exporter.instance.all_logs(run.run_id, of_type=dg.DagsterEventType.RUN_FAILURE)
    assert failure.dagster_event is not None
    assert " is gone, and its end was not reported" in str(failure.dagster_event.message)


@pytest.mark.parametrize("job", ["audit_log_export", "__ASSET_JOB"])
def test_the_sensor_does_not_wait_for_a_run_that_was_killed(
    exporter: Exporter, stack: Stack, sensor: Sensor, job: str
) -> None:
    """Dagster takes it for started until `max_runtime_seconds`: for two hours nothing would be launched."""
    stack.put(*events(3))
    age(stack, 3600)
    run = exporter.put_run(job, "STARTED", frozenset([dg.AssetKey("audit_logs_raw_v1")]))
    drains.say_alive(exporter.instance, run.run_id, dead_process())
    result = sensor.tick()
    assert len(requests(result)) == 1, reason(result)
    assert_ended(exporter, run)


def test_the_schedule_does_not_queue_runs_behind_one_that_was_killed(exporter: Exporter) -> None:
    """The sensor may be off: then the schedule's runs would wait in the queue for the dead one's pool."""
    run = exporter.put_run("audit_log_export", "STARTED")
    drains.say_alive(exporter.instance, run.run_id, dead_process())
    with dg.build_schedule_context(instance=exporter.instance) as context:
        assert schedule().evaluate_tick(context).run_requests
    assert_ended(exporter, run)


def test_the_sensor_does_not_wait_for_a_drain_that_was_killed(stack: Stack, sensor: Sensor) -> None:
    """`auditexport drain` is in no storage of Dagster's; its process was on this machine and is gone."""
    pks = stack.put(*events(30))
    with locked(stack, pks[-1]), started(stack, "drain") as process:
        wait_until(lambda: states(stack) == ["written"], what="a batch that is not marked yet")
        waiting = reason(sensor.tick())
        process.kill()
        process.wait()
    assert f":{process.pid}:" in waiting
    assert " is at work, waiting until " in waiting
    assert lease_left_s(stack) > 0
    result = sensor.tick()
    assert len(requests(result)) == 1, reason(result)


def test_a_run_elsewhere_counts_as_alive_while_it_renews_its_lease(
    exporter: Exporter, stack: Stack, sensor: Sensor
) -> None:
    """Its process cannot be looked for; a run in the middle of a long INSERT says nothing to Dagster, and renews."""
    stack.put(*events(3))
    run = exporter.put_run("audit_log_export", "STARTED")
    claiming.claim(stack.outbox, owner=run.run_id, dead_owners=(), limits=Limits())
    silent_for(exporter, run, 3600)
    waiting = sensor.tick()
    assert requests(waiting) == []
    assert reason(waiting).startswith(f"run {run.run_id[:8]} is at work, waiting until ")
    assert " UTC, when its lease ends unless it renews it: " in reason(waiting)
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 1 WHERE batch_id > 0")
    assert len(requests(sensor.tick())) == 1
    assert status_of(exporter, run) is dg.DagsterRunStatus.FAILURE


def test_a_run_elsewhere_without_a_batch_counts_as_alive_by_its_events(
    exporter: Exporter, stack: Stack, sensor: Sensor
) -> None:
    """One that stays, or verifies, holds no lease: it is not doubled, and one that was killed there stops nothing for long."""
    stack.put(*events(3))
    age(stack, 3600)
    run = exporter.put_run("audit_log_export", "STARTED")
    silent_for(exporter, run, 200)
    waiting = reason(sensor.tick())
    assert waiting.startswith(f"run {run.run_id[:8]} is at work, waiting until ")
    assert " UTC, unless it gives a sign of life before: " in waiting
    silent_for(exporter, run, 200)
    assert len(requests(sensor.tick())) == 1
    assert status_of(exporter, run) is dg.DagsterRunStatus.FAILURE


def test_a_run_that_stays_gives_signs_of_life(
    exporter: Exporter, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For hours it may have nothing to export, and writes no event."""
    monkeypatch.setattr(assets, "HEARTBEAT_EVERY_S", 0.0)
    given: list[str] = []
    monkeypatch.setattr(assets, "say_alive", lambda _, run_id, process: given.append(f"{run_id} {process}"))
    run_id = exporter.drain(linger_s=1).run_id
    assert len(given) > 1
    assert set(given) == {f"{run_id} {processes.this_process()}"}


def test_a_retry_is_not_taken_for_its_dead_parent(exporter: Exporter, stack: Stack, sensor: Sensor) -> None:
    """Dagster copies the parent's tags, the one that names its process among them."""
    stack.put(*events(3))
    age(stack, 3600)
    mine, gone = processes.this_process(), dead_process()
    assert processes.dead([mine, gone]) == {gone}
    parent, retry = (exporter.put_run("audit_log_export", "STARTED") for _ in range(2))
    for run in (parent, retry):
        drains.say_alive(exporter.instance, parent.run_id, gone)
        stored = exporter.instance.get_run_by_id(parent.run_id)
        assert stored is not None
        exporter.instance.add_run_tags(run.run_id, {drains.PROCESS_TAG: stored.tags[drains.PROCESS_TAG]})
    assert reason(sensor.tick()).startswith(f"run {retry.run_id[:8]} is at work, waiting until ")
    assert status_of(exporter, parent) is dg.DagsterRunStatus.FAILURE
    drains.say_alive(exporter.instance, retry.run_id, mine)
    assert f"is at work in the process {mine}, waiting until it ends: " in reason(sensor.tick())


def test_another_job_with_the_asset_is_not_failed_for_its_silence(
    exporter: Exporter, stack: Stack, sensor: Sensor
) -> None:
    """Our asset may be done while the rest of the job works for hours."""
    stack.put(*events(3))
    age(stack, 3600)
    both = frozenset([dg.AssetKey("audit_logs_raw_v1"), dg.AssetKey("something_else")])
    run = exporter.put_run("__ASSET_JOB", "STARTED", both)
    silent_for(exporter, run, 3600)
    assert len(requests(sensor.tick())) == 1
    assert status_of(exporter, run) is dg.DagsterRunStatus.STARTED


def test_a_dead_owner_elsewhere_holds_its_rows_for_a_minute_at_most(stack: Stack) -> None:
    """Its process cannot be checked: only the lease ends its claim."""
    stack.put(*events(3))
    claiming.claim(stack.outbox, owner="elsewhere", dead_owners=(), limits=Limits())
    assert lease_left_s(stack) <= 60


def test_a_lease_is_renewed_while_a_long_insert_is_at_work(stack: Stack) -> None:
    """A short lease must not take a batch away from a run whose ClickHouse is slow, or a long INSERT could never end."""
    stack.put(*events(3))
    until_ms: list[object] = []

    def lease() -> object:
        return stack.sql("SELECT lease_until_ms FROM clickhouse_outbox_batch WHERE batch_id = 1")[0].lease_until_ms

    def wait_for_a_renewal() -> None:
        until_ms.append(lease())
        with suppress(AssertionError):
            wait_until(lambda: lease() != until_ms[0], what="a renewal", within_s=SHORTEST_LEASE_S / 2)
        until_ms.append(lease())

    log = CrashingAuditLog(stack.log, CrashPoint("before insert 1", then=wait_for_a_renewal))
    with suppress(LeaseLost):
        drain(stack.outbox, log, Limits(lease_s=SHORTEST_LEASE_S, insert_timeout_s=5), owner="slow")
    before, after = until_ms
    assert int(str(after)) > int(str(before)), "the lease runs out while the INSERT is at work"
    everything_once(stack, 3)


def test_an_insert_may_take_longer_than_a_lease(prompt: Prompt, stack: Stack) -> None:
    """The two are not one value: a slow ClickHouse must not mean that a dead run holds its rows for hours."""
    stack.put(*events(3))
    done = prompt("drain", "--lease-s", "10", "--insert-timeout-s", "3600", status=0)
    assert "exported 3 rows" in done.output


def test_a_dagster_run_reports_who_holds_the_rows_that_it_leaves(exporter: Exporter, stack: Stack) -> None:
    """A run that succeeds and leaves rows pending must say why."""
    stack.put(*events(7))
    claiming.claim(stack.outbox, owner="elsewhere", dead_owners=(), limits=Limits())
    result = exporter.drain()
    line = last_line(exporter, result.run_id)
    assert "7 rows are leased by elsewhere" in line
    assert "UTC, in " in line
    metadata = metadata_of(result)
    assert (metadata["held_by_others_rows"], str(metadata["held_by"])[:9]) == (7, "elsewhere")


def test_a_drain_reports_who_holds_the_rows_that_it_leaves(prompt: Prompt, stack: Stack) -> None:
    """And ends with a status of its own: it has not exported what was pending."""
    stack.put(*events(7))
    claiming.claim(stack.outbox, owner="elsewhere", dead_owners=(), limits=Limits())
    done = prompt("drain", status=3)
    assert "7 rows are leased by elsewhere" in done.output.splitlines()[-1]


@pytest.fixture
def taken(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Another run takes a batch over as soon as its claim is committed."""
    real = SmallBatches.claim

    def take_over(batches: SmallBatches, claim: Callable[[], list[Claim]]) -> list[Claim]:
        claims = real(batches, claim)
        monkeypatch.setattr(SmallBatches, "claim", real)
        (batch,) = stack.outbox.batches(one.batch_id for one in claims)
        claiming.claim(stack.outbox, owner="other", dead_owners=(batch.owner,), limits=Limits())
        return claims

    monkeypatch.setattr(SmallBatches, "claim", take_over)
    return stack


@pytest.mark.parametrize("most_rows", [0, small.MOST_ROWS], ids=["by the separate steps", "a small batch"])
def test_a_single_plan_that_lost_its_batch_exits_with_3(
    prompt: Prompt, taken: Stack, most_rows: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A script that goes on after status 0 would go on without the rows."""
    monkeypatch.setattr(small, "MOST_ROWS", most_rows)
    taken.put(*events(5))
    done = prompt("drain", "--once", status=3)
    assert "taken over by another run" in done.output
    assert taken.pending() == 5
