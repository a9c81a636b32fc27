"""What starts a drain: the sensor's ticks and the schedule's, on a real Dagster instance and a real outbox."""

from __future__ import annotations

from datetime import datetime, timezone
from typing import Any

import dagster as dg
import pytest

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.format import counted
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.definitions import defs
from auditexport_pipeline.defs import sensors
from auditexport_pipeline.defs.build import build_audit_export_defs, defs_of
from auditexport_pipeline.defs.resources import MySQLResource
from auditexport_pipeline.outboxes import OutboxSettings
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ASSET, Exporter, event, events, everything_once, launchpad

OUTBOX = dg.AssetKey("clickhouse_outbox")
BACKLOG = defs.resolve_sensor_def("outbox_backlog_sensor")


class Sensor:
    """The sensor as the daemon ticks it, its cursor carried from tick to tick."""

    def __init__(self, exporter: Exporter, stack: Stack, **settings: object) -> None:
        self._instance = exporter.instance
        self._sensor = outbox_defs(**settings).resolve_sensor_def("outbox_backlog_sensor") if settings else BACKLOG
        self.mysql = MySQLResource(url=stack.mysql_url)
        self.cursor: str | None = None

    def tick(self) -> dg.SensorResult:
        with dg.build_sensor_context(
            instance=self._instance, cursor=self.cursor, resources={"mysql": self.mysql}
        ) as context:
            # Calling the definition would pass resources by name, as it does to functions with such parameters.
            result = self._sensor._raw_fn(context)
        assert isinstance(result, dg.SensorResult)
        self.cursor = result.cursor
        return result


@pytest.fixture
def sensor(exporter: Exporter, stack: Stack) -> Sensor:
    return Sensor(exporter, stack)


def outbox_defs(**settings: Any) -> dg.Definitions:
    """The definitions of the only outbox of a file with these settings."""
    return defs_of(OutboxSettings(**settings))


def requests(result: dg.SensorResult) -> list[dg.RunRequest]:
    return list(result.run_requests or [])


def reason(result: dg.SensorResult) -> str:
    """Why the tick skipped, or why it launched."""
    if requests(result):
        return requests(result)[0].tags["auditexport/why"]
    assert result.skip_reason is not None
    return str(result.skip_reason.skip_message)


def schedule() -> dg.ScheduleDefinition:
    return defs.resolve_schedule_def("audit_log_export_schedule")


def age(stack: Stack, seconds: int) -> None:
    """Makes every pending row this much older."""
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - :ms", ms=seconds * 1000)


# ── thresholds ───────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("rows", "age_s", "settings", "why"),
    [
        (3, 100, {"sensor_rows": 4, "sensor_lag_s": 3600}, ""),
        (4, 0, {"sensor_rows": 4}, "backlog: 4 pending rows (a run starts at 4), lag "),
        (1, 3500, {"sensor_lag_s": 3600}, ""),
        (1, 3601, {"sensor_lag_s": 3600}, "lag: 1 pending row (a run starts at 10,000)"),
    ],
)
def test_the_sensor_launches_at_either_threshold(
    exporter: Exporter, stack: Stack, rows: int, age_s: int, settings: dict[str, object], why: str
) -> None:
    """Rows are the threshold of a burst, lag that of a trickle. The reason of a tick has the numbers."""
    stack.put(*events(rows))
    age(stack, age_s)
    sensor = Sensor(exporter, stack, **settings)
    for _ in range(2):  # a run key would be remembered for ever, also that of a run that failed
        result = sensor.tick()
        assert [request.run_key for request in requests(result)] == [None] * bool(why)
    assert f"{counted(rows, 'pending row')} (a run starts at {settings.get('sensor_rows', 10_000):,})" in reason(result)
    assert f"(at {settings.get('sensor_lag_s', 60)} s)" in reason(result)
    assert reason(result).startswith(why)


def test_a_tick_without_mysql_fails_with_one_line(sensor: Sensor) -> None:
    """The Dagster UI shows the tick's error, and the next tick tries again."""
    sensor.mysql = MySQLResource(url="mysql+pymysql://nobody@127.0.0.1:1/none")
    with pytest.raises(dg.Failure) as failure:
        sensor.tick()
    assert str(failure.value.description).startswith("MySQL failed while probing the backlog")


# ── another drain is at work ──────────────────────────────────────────────────────────────────────────


@pytest.fixture
def overdue(stack: Stack) -> Stack:
    """A stack with one row that is overdue, so that only another drain prevents a launch."""
    stack.put(event("evt_1"))
    age(stack, 3600)
    return stack


UNFINISHED = ["QUEUED", "NOT_STARTED", "STARTING", "STARTED", "CANCELING"]


@pytest.mark.usefixtures("overdue")
@pytest.mark.parametrize("launched_as", ["the job", "materialize"])
def test_the_sensor_skips_while_a_run_is_in_flight(sensor: Sensor, exporter: Exporter, launched_as: str) -> None:
    """The pool would hold the second run back, but a queue of idle runs hides the one at work."""
    for status in UNFINISHED:
        if launched_as == "the job":
            run = exporter.put_run("audit_log_export", status)
        else:
            run = exporter.put_run("__ASSET_JOB", status, frozenset([ASSET]))
        result = sensor.tick()
        assert requests(result) == []
        doing = "at work" if status in ("STARTED", "CANCELING") else "queued" if status == "QUEUED" else "being started"
        assert reason(result).startswith(f"run {run.run_id[:8]} is {doing}, waiting until ")
        assert ": 1 pending row (" in reason(result)
        exporter.instance.delete_run(run.run_id)
    assert len(requests(sensor.tick())) == 1


@pytest.mark.usefixtures("overdue")
def test_runs_that_have_ended_and_runs_of_others_hold_nothing_back(sensor: Sensor, exporter: Exporter) -> None:
    """Else one failed run, or a neighbour's long one, would stop the export."""
    for status in ("SUCCESS", "FAILURE", "CANCELED"):
        exporter.put_run("audit_log_export", status)
    exporter.put_run("sweep_exported_rows", "STARTED")
    exporter.put_run("__ASSET_JOB", "STARTED", frozenset([dg.AssetKey("something_else")]))
    assert len(requests(sensor.tick())) == 1


def test_the_sensor_sees_a_drain_by_its_pool_whatever_job_it_is_part_of(
    sensor: Sensor, exporter: Exporter, overdue: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A user's own job with the asset has neither our name nor an asset selection."""
    ticks: list[dg.SensorResult] = []
    real = export.fetch

    def fetch_while_the_sensor_ticks(*arguments: object) -> object:
        ticks.append(sensor.tick())
        return real(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(export, "fetch", fetch_while_the_sensor_ticks)
    somebody_elses = dg.define_asset_job("somebody_elses", selection=dg.AssetSelection.assets(ASSET).without_checks())
    everything = dg.Definitions.merge(defs, dg.Definitions(jobs=[somebody_elses]))
    everything.resolve_job_def("somebody_elses").execute_in_process(instance=exporter.instance)
    (run,) = exporter.instance.get_runs()
    assert not run.asset_selection
    assert [reason(tick).startswith(f"run {run.run_id[:8]} is at work") for tick in ticks] == [True]
    everything_once(overdue, 1)


def test_the_sensor_skips_while_another_process_holds_a_lease(sensor: Sensor, overdue: Stack) -> None:
    """`auditexport drain` on a terminal is not a Dagster run; only the ledger knows of it."""
    claiming.claim(overdue.outbox, owner="cli-host-4711", dead_owners=[], limits=Limits())
    overdue.put(*events(3, "later"))
    age(overdue, 3600)
    result = sensor.tick()
    assert requests(result) == []
    assert reason(result).startswith("the process cli-host-4711 is at work, waiting until ")
    assert " UTC, when its lease ends unless it renews it: " in reason(result)
    overdue.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 1 WHERE batch_id > 0")
    assert reason(sensor.tick()).startswith("1 batch was left open: ")


def test_the_sensor_launches_at_once_when_a_run_left_batches_open(
    sensor: Sensor, exporter: Exporter, stack: Stack
) -> None:
    """The run is over, so the sensor need not wait for its lease."""
    run = exporter.put_run("audit_log_export", "FAILURE")
    stack.put(*events(2))
    claiming.claim(stack.outbox, owner=run.run_id, dead_owners=[], limits=Limits())
    result = sensor.tick()
    assert len(requests(result)) == 1
    assert reason(result).startswith("1 batch was left open: ")


# ── what the tick says ───────────────────────────────────────────────────────────────────────────


def test_rows_of_unknown_versions_and_dead_letters_are_in_the_reason(
    sensor: Sensor, exporter: Exporter, stack: Stack
) -> None:
    """Neither launches a run, so the reason shows that they wait for a person."""
    stack.put(*events(2), version="audit_log.v9")
    stack.put(("ws_1", "evt_dead", "[]"))
    exporter.drain()
    age(stack, 3600)
    result = sensor.tick()
    assert requests(result) == []
    assert reason(result).endswith("2 rows of unknown versions audit_log.v9, 1 dead letter")


def test_the_outbox_is_observed_now_and_then_or_when_it_needs_a_person(
    sensor: Sensor, stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event log grows without bound: an observation at every tick would be most of it."""

    def observed() -> list[dict[str, object]]:
        events_ = sensor.tick().asset_events or []
        assert all(isinstance(each, dg.AssetObservation) and each.asset_key == OUTBOX for each in events_)
        return [{name: value.value for name, value in each.metadata.items()} for each in events_]

    stack.put(*events(2))
    (first,) = observed()
    lag_s = first.pop("lag_s")
    assert isinstance(lag_s, float)
    assert lag_s >= 0
    assert first == {
        "backlog_rows": 2,
        "unknown_rows": 0,
        "unknown_versions": "none",
        "dead_letters_standing": 0,
        "open_batches": 0,
    }
    age(stack, 10)
    assert observed() == []
    stack.put(event("evt_more"))
    assert observed() == []
    stack.put(event("evt_unknown"), version="audit_log.v9")
    assert [(each["backlog_rows"], each["unknown_rows"]) for each in observed()] == [(3, 1)]
    stack.put(event("evt_yet_more"))
    monkeypatch.setattr(sensors, "OBSERVE_CHANGES_EVERY_S", 0)
    assert [each["backlog_rows"] for each in observed()] == [4]
    assert observed() == []
    monkeypatch.setattr(sensors, "OBSERVE_EVERY_S", 0)
    assert [each["backlog_rows"] for each in observed()] == [4]


def test_a_cursor_that_was_set_by_hand_does_not_stop_the_sensor(sensor: Sensor) -> None:
    """The Dagster UI lets people edit it; an unreadable one counts as none."""
    for cursor in ("", "12345", "nonsense", '{"numbers": 1}'):
        sensor.cursor = cursor
        assert len(sensor.tick().asset_events or []) == 1


# ── the schedule ─────────────────────────────────────────────────────────────────────────────────


def test_the_schedule_requests_a_run_for_an_empty_outbox_too(exporter: Exporter) -> None:
    """It keeps the heartbeat and the asset fresh when nothing happens."""
    for minute in (0, 15):
        at = datetime(2026, 1, 1, 12, minute, tzinfo=timezone.utc)
        with dg.build_schedule_context(instance=exporter.instance, scheduled_execution_time=at) as context:
            tick = schedule().evaluate_tick(context)
        assert tick.skip_message is None
        assert len(tick.run_requests or []) == 1
    assert schedule().cron_schedule == "*/15 * * * *"


def test_runs_of_sensor_and_schedule_have_the_settings_of_the_outbox(exporter: Exporter, stack: Stack) -> None:
    """A sensor cannot use the launchpad: `drain` has its settings, and a wrong one keeps the code location from loading."""
    stack.put(*events(1))
    settings: dict[str, Any] = {"sensor_rows": 1, "drain": {"linger_s": 900, "max_rows_per_second": 5000}}
    (by_sensor,) = requests(Sensor(exporter, stack, **settings).tick())
    with dg.build_schedule_context(instance=exporter.instance) as context:
        tick = outbox_defs(**settings).resolve_schedule_def("audit_log_export_schedule").evaluate_tick(context)
    (by_schedule,) = tick.run_requests or []
    assert by_sensor.run_config == by_schedule.run_config == launchpad(settings["drain"])
    with pytest.raises(InvalidConfig, match="linger is not a setting"):
        build_audit_export_defs(drain={"linger": 1})


# ── the schedule of the checks ───────────────────────────────────────────────────────────────────


def checked_at(hour: int, minute: int) -> set[str]:
    """The checks that the tick of this time asks for by name; none means all."""
    context = dg.build_schedule_context(
        scheduled_execution_time=datetime(2026, 1, 2, hour, minute, tzinfo=timezone.utc)
    )
    request = defs.resolve_schedule_def("checks_schedule")(context)
    assert isinstance(request, dg.RunRequest)
    return {key.name for key in request.asset_check_keys or ()}


def test_the_checks_schedule_reads_entries_four_times_a_day() -> None:
    """Every quarter of an hour it runs the checks that read MySQL only."""
    every = {key.name for key in defs.resolve_job_def("audit_log_checks").asset_layer.asset_graph.asset_check_keys}
    ticks = {(hour, minute): checked_at(hour, minute) for hour in range(24) for minute in (8, 23, 38, 53)}

    assert {at for at, names in ticks.items() if not names} == {(0, 8), (6, 8), (12, 8), (18, 8)}
    assert {frozenset(names) for names in ticks.values() if names} == {
        frozenset(every - {"no_duplicates_recently", "recent_exports_reconcile"})
    }
