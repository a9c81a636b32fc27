"""Runs that die where nobody watches: how soon the next one has their rows, and what a run says of rows that others hold.

What belongs here: processes that are killed, leases, and the last words of a run. What does not: crash points inside one
process (`test_exactly_once`), and what Dagster's daemon does about dead workers.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import dagster as dg
import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.limits import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.crashes import CrashingAuditLog, CrashPoint, drain
from auditexport_tests.dagster_glue.conftest import ROOT, Exporter, events, everything_once, ledger, text_of
from auditexport_tests.prompts import Prompt, prompt_in, urls
from auditexport_tests.waiting import wait_until

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


@pytest.mark.parametrize(
    "words",
    [
        ("asset", "materialize", "--select", "audit_logs_raw_v1"),
        ("job", "execute", "-j", "audit_log_export"),
    ],
    ids=lambda words: words[1],
)
def test_the_run_after_one_that_was_killed_exports_everything(
    exporter: Exporter, stack: Stack, words: tuple[str, ...]
) -> None:
    """Nobody reports such a run as dead: its process, on the same machine, is seen to be gone."""
    pks = stack.put(*events(30))
    command = [sys.executable, "-m", "dagster", *words, "-m", "auditexport_pipeline.definitions"]
    environment = {**os.environ, "DAGSTER_HOME": str(exporter.home)}
    with locked(stack, pks[-1]):
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

    assert exporter.drain().success
    assert stack.pending() == 0, "the next run left the dead one's rows"
    everything_once(stack, 30)


def test_whoever_dies_on_another_machine_holds_its_rows_for_a_minute_at_most(stack: Stack) -> None:
    """Its process cannot be looked for: the lease is all there is."""
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


def test_a_dagster_run_says_who_holds_the_rows_that_it_leaves(exporter: Exporter, stack: Stack) -> None:
    """Run after run ended green, and tens of thousands of rows stayed pending without a word."""
    stack.put(*events(7))
    claiming.claim(stack.outbox, owner="elsewhere", dead_owners=(), limits=Limits())
    result = exporter.drain()
    said = last_line(exporter, result.run_id)
    assert "7 rows are held by elsewhere" in said
    assert "UTC, in " in said
    metadata = metadata_of(result)
    assert (metadata["held_by_others_rows"], str(metadata["held_by"])[:9]) == (7, "elsewhere")


def test_a_drain_says_who_holds_the_rows_that_it_leaves(prompt: Prompt, stack: Stack) -> None:
    """And ends with a status of its own: it has not exported what was pending."""
    stack.put(*events(7))
    claiming.claim(stack.outbox, owner="elsewhere", dead_owners=(), limits=Limits())
    done = prompt("drain", status=3)
    assert "7 rows are held by elsewhere" in done.output.splitlines()[-1]


@pytest.fixture
def taken(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> Stack:
    """Another run takes a batch over as soon as it is claimed."""
    real = claiming.claim

    def take_over(*arguments: object, **named: object) -> object:
        claims = real(*arguments, **named)  # type: ignore[arg-type]
        monkeypatch.setattr(claiming, "claim", real)
        real(stack.outbox, owner="other", dead_owners=(named["owner"],), limits=Limits())  # type: ignore[arg-type]
        return claims

    monkeypatch.setattr(claiming, "claim", take_over)
    return stack


def test_a_single_plan_that_lost_its_batch_does_not_end_as_if_it_had_drained(prompt: Prompt, taken: Stack) -> None:
    """A script that goes on after status 0 would go on without the rows."""
    taken.put(*events(5))
    done = prompt("drain", "--once", status=3)
    assert "taken over by another run" in done.output
    assert taken.pending() == 5
