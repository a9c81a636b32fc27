"""Who is told of numbers: the sensor on the backlog, versions, letters and batches, on real servers and a real webhook."""

from __future__ import annotations

import dagster as dg
import pytest

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.defs import alerts
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import (
    DEAD_MYSQL,
    Clock,
    Sensor,
    failing,
)
from auditexport_tests.integration.dagster.conftest import Exporter, event, events, launchpad
from auditexport_tests.support.webhook import Webhook

pytestmark = [pytest.mark.usefixtures("no_waits"), pytest.mark.slow]


@pytest.fixture
def numbers(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    return Sensor(exporter, stack, "number_alerts")


def age(stack: Stack, seconds: float) -> None:
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - :ms", ms=int(seconds * 1000))


def test_a_backlog_that_does_not_shrink_is_told_with_numbers_and_reasons_and_its_recovery(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """An exporter that nobody starts fails no run: this is the alarm that tells it from an idle one."""
    stack.put(*events(30))
    age(stack, 400)
    for _ in range(10):
        numbers.tick()
        clock.ahead_s += 60
    assert hook.titles() == []
    numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: the backlog is not shrinking*")
    assert "30 rows are pending (30 10 min ago), the oldest for" in text
    assert "(target 5 min)" in text
    assert "no run is at work, and nothing starts one" in text
    assert "outbox_backlog_sensor and audit_log_export_schedule are off" in text
    clock.ahead_s += 60
    numbers.tick()
    assert hook.texts() == []
    exporter.drain()
    clock.ahead_s += 60
    assert numbers.tick() == "1 alerts sent, 0 stand: 0 pending rows, lag 0 s"
    (text,) = hook.texts()
    assert text.startswith(
        "*[RECOVERED] auditexport: the backlog is not shrinking*\nit is over: 0 rows pending, lag 0 s"
    )


def test_the_reasons_name_failed_runs_waiting_runs_and_a_throttle(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number of rows has five different remedies."""
    stack.put(*events(3))
    stack.put(event("evt_unknown"), version="audit_log.v9")
    age(stack, 4_000)
    failing(exporter, monkeypatch)

    def told() -> str:
        numbers.cursor = ""
        numbers.tick()
        clock.ahead_s += 601
        numbers.tick()
        return next(text for text in hook.texts() if "not shrinking" in text)

    text = told()
    assert "the last run failed (AuditLogUnavailable: ClickHouse " in text
    assert "no run is at work" in text
    assert "1 rows are of unknown versions" in text
    queued = exporter.put_run("audit_log_export", "QUEUED")
    assert f"run {queued.run_id[:8]} waits in the queue" in told()
    exporter.instance.delete_run(queued.run_id)
    run = exporter.put_run("audit_log_export", "STARTED")
    exporter.instance.delete_run(run.run_id)
    exporter.instance.add_run(run._replace(run_config=launchpad({"max_rows_per_second": 50})))
    text = told()
    assert f"run {run.run_id[:8]} is at work and has exported nothing lately" in text
    assert "throttled to 50 rows/s by max_rows_per_second" in text


def test_a_backlog_that_shrinks_or_is_within_its_target_alarms_nobody(
    numbers: Sensor, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """A long drain of a big backlog is what should happen; an alarm for it is one that people learn to ignore."""
    stack.put(*events(40))
    age(stack, 4_000)
    for _ in range(15):
        numbers.tick()
        clock.ahead_s += 60
        stack.sql("UPDATE clickhouse_outbox SET deleted_at = 1 WHERE deleted_at IS NULL ORDER BY pk LIMIT 2")
    assert hook.titles() == []
    stack.sql("UPDATE clickhouse_outbox SET created_at = UNIX_TIMESTAMP() * 1000")
    for _ in range(15):
        numbers.tick()
        clock.ahead_s += 60
    assert hook.titles() == []


def test_unknown_versions_and_dead_letters_are_told_once_and_when_they_are_gone(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook
) -> None:
    """No drain ever fails for them, and both wait for a person."""
    numbers.tick()
    stack.put(*events(2), version="audit_log.v9")
    stack.put(("ws_1", "evt_dead", '{"secret-payload": 1}'))
    exporter.drain()
    for _ in range(3):
        numbers.tick()
    texts = hook.texts()
    assert [text.splitlines()[0] for text in texts] == [
        "*[WARNING] auditexport: dead letters*",
        "*[WARNING] auditexport: unknown versions*",
    ]
    assert "audit_log.v9 2" in texts[1]
    assert "Do: upgrade auditexport" in texts[1]
    assert "secret-payload" not in str(texts)
    stack.sql("DELETE FROM clickhouse_outbox WHERE version = 'audit_log.v9'")
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: unknown versions"]


def test_a_batch_that_stays_open_is_told(
    numbers: Sensor, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It holds its rows: they are not pending, so no backlog shows them."""
    stack.put(*events(2))
    claiming.claim(stack.outbox, owner="a-dead-run", dead_owners=[], limits=Limits())
    numbers.tick()
    assert hook.titles() == []
    stack.sql(
        "UPDATE clickhouse_outbox_batch SET claimed_at_ms = claimed_at_ms - 1000000, lease_until_ms = 1 WHERE batch_id > 0"
    )
    numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: open batches*")
    assert "batch 1 (claimed, 2 rows," in text
    monkeypatch.setenv("AUDITEXPORT_TARGET_BATCH_OPEN_MINUTES", "30")
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: open batches"]


def test_mysql_away_is_told_after_a_while_and_a_refusal_at_once(
    numbers: Sensor, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """A failover takes seconds; an outage leaves every other number unknown, not fine."""
    stack.put(event("evt_1"), version="audit_log.v9")
    numbers.tick()
    assert hook.titles() == ["[WARNING] auditexport: unknown versions"]
    good, numbers.mysql_url = numbers.mysql_url, DEAD_MYSQL
    numbers.tick()
    clock.ahead_s += 60
    numbers.tick()
    assert hook.titles() == []
    clock.ahead_s += 121
    said = numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: the outbox cannot be read*\nMySQL failed while reading the status")
    assert "very-secret" not in text + said + str(numbers.cursor)
    numbers.mysql_url = good
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    numbers.tick()
    (text,) = hook.texts()
    assert "clickhouse_outbox_dead_letter" in text
    assert "Do: auditexport doctor" in text


def test_a_mysql_that_hangs_is_told_before_dagster_gives_the_tick_up(
    numbers: Sensor, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A firewall that drops packets lets a connection hang for minutes; a tick that is given up tells nobody."""
    monkeypatch.setattr(alerts, "READ_WITHIN_S", 0.3)
    numbers.tick()
    with stack.outbox.engine.connect() as holder:
        holder.exec_driver_sql("LOCK TABLES clickhouse_outbox_batch WRITE")
        try:
            assert numbers.tick() == "0 alerts sent, 0 stand: MySQL did not answer within 0 s; run again"
            clock.ahead_s += 200
            numbers.tick()
            assert hook.titles() == ["[ERROR] auditexport: the outbox cannot be read"]
        finally:
            holder.exec_driver_sql("UNLOCK TABLES")
    monkeypatch.setattr(alerts, "READ_WITHIN_S", 20)
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("AUDITEXPORT_ALERT_REPEAT_HOURS", "0"),
        ("AUDITEXPORT_ALERT_REPAET_HOURS", "6"),
        ("AUDITEXPORT_TARGET_LAG_S", "soon"),
    ],
)
def test_a_wrong_setting_fails_the_tick_with_its_name(
    numbers: Sensor, monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    """An alarm with a silently ignored setting is found out on the wrong day."""
    monkeypatch.setenv(variable, value)
    with pytest.raises(dg.Failure) as refused:
        numbers.tick()
    assert variable.rpartition("REPEAT_HOURS")[1].lower() in str(refused.value.description) or variable in str(
        refused.value.description
    )
