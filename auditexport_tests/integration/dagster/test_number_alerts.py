"""Alerts of numbers: the sensor on the backlog, versions, dead letters and MySQL, on real servers and a real webhook."""

from __future__ import annotations

import pytest

from auditexport_pipeline.definitions import build_audit_export_defs
from auditexport_pipeline.defs import alerts
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.alerting import (
    DEAD_MYSQL,
    Sensor,
    failing,
)
from auditexport_tests.integration.dagster.conftest import Clock, Exporter, event, events
from auditexport_tests.support.webhook import Webhook

pytestmark = [pytest.mark.usefixtures("no_waits"), pytest.mark.slow]


@pytest.fixture
def numbers(exporter: Exporter, stack: Stack, hook: Webhook) -> Sensor:
    return Sensor(exporter, stack, "number_alerts")


def age(stack: Stack, seconds: float) -> None:
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at - :ms", ms=int(seconds * 1000))


def test_a_backlog_that_does_not_shrink_fires_with_numbers_and_reasons(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock
) -> None:
    """An exporter that is never started fails no run: only this alert tells it from an idle one."""
    stack.put(*events(30))
    age(stack, 400)
    for _ in range(10):
        numbers.tick()
        clock.ahead_s += 60
    assert hook.titles() == []
    numbers.tick()
    (text,) = hook.texts()
    assert text.startswith(
        "*[ERROR] auditexport: the backlog is not shrinking*\n30 rows are pending (30 10 min ago), the oldest for"
    )
    assert "(target 5 min). Likely: no run is at work" in text
    assert "outbox_backlog_sensor and audit_log_export_schedule are off, so nothing starts a run" in text
    numbers.tick()
    assert hook.texts() == []
    exporter.drain()
    assert numbers.tick() == "alerts: 1 sent, 0 active: 0 rows pending, lag 0 s"
    (text,) = hook.texts()
    assert text.startswith(
        "*[RECOVERED] auditexport: the backlog is not shrinking*\nit is over: 0 rows pending, lag 0 s"
    )


def test_the_reasons_name_failed_waiting_and_working_runs(
    numbers: Sensor, exporter: Exporter, stack: Stack, hook: Webhook, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same number of rows has several remedies."""
    stack.put(*events(3))
    age(stack, 4_000)
    failing(exporter, monkeypatch)

    def text() -> str:
        numbers.cursor = ""
        numbers.tick()
        clock.ahead_s += 601
        numbers.tick()
        return hook.texts()[0]

    assert "the last run failed (AuditLogUnavailable: ClickHouse " in text()
    queued = exporter.put_run("audit_log_export", "QUEUED")
    assert f"run {queued.run_id[:8]} waits in the queue" in text()
    run = exporter.put_run("audit_log_export", "STARTED")
    assert f"run {run.run_id[:8]} is at work and has exported nothing lately" in text()


def test_dead_letters_and_unknown_versions_fire_once_and_resolve(
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
    numbers.definitions = build_audit_export_defs(targets={"dead_letters": 5})
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: dead letters"]


def test_mysql_away_fires_after_a_while_and_a_refusal_at_once(
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
    reason = numbers.tick()
    (text,) = hook.texts()
    assert text.startswith("*[ERROR] auditexport: the outbox cannot be read*\nMySQL failed while reading the status")
    assert "very-secret" not in text + reason + str(numbers.cursor)
    numbers.mysql_url = good
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]
    stack.sql("DROP TABLE clickhouse_outbox_dead_letter")
    numbers.tick()
    (text,) = hook.texts()
    assert "clickhouse_outbox_dead_letter" in text
    assert "Do: auditexport doctor" in text


def test_a_mysql_that_hangs_fires_before_dagster_ends_the_tick(
    numbers: Sensor, stack: Stack, hook: Webhook, monkeypatch: pytest.MonkeyPatch, clock: Clock
) -> None:
    """A firewall that drops packets lets a connection hang for minutes; a tick that Dagster ends sends nothing."""
    numbers.tick()
    with monkeypatch.context() as impatient, stack.outbox.engine.connect() as holder:
        impatient.setattr(alerts, "READ_WITHIN_S", 0.3)
        holder.exec_driver_sql("LOCK TABLES clickhouse_outbox_batch WRITE")
        try:
            assert numbers.tick() == "alerts: 0 sent, 0 active: MySQL did not answer within 0 s; run again"
            clock.ahead_s += 200
            numbers.tick()
            assert hook.titles() == ["[ERROR] auditexport: the outbox cannot be read"]
        finally:
            holder.exec_driver_sql("UNLOCK TABLES")
    numbers.tick()
    assert hook.titles() == ["[RECOVERED] auditexport: the outbox cannot be read"]
