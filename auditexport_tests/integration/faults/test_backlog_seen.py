"""The backlog is what a drain would take, and a row whose created_at says nothing is seen all the same."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.backlog import NO_FAILURES, Backlog, decide
from auditexport_pipeline.core.settings import Thresholds
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, everything_once, insert_batch, run, small_event
from auditexport_tests.support.prompts import Prompt


def _backlog(stack: Stack) -> Backlog:
    return stack.outbox.backlog(tuple(VERSIONS), count_to=100_000)


def test_letters_whose_rows_were_deleted_hide_no_row(stack: Stack) -> None:
    """Otherwise 500 such letters hide 450 rows: no run starts, and no error is shown."""
    stack.put(*(("ws_1", f"bad_{number}", "{}") for number in range(30)))
    run(stack)
    assert _backlog(stack).rows == 0
    stack.sql("DELETE FROM clickhouse_outbox WHERE pk > 10")
    stack.put(*events(15))
    assert (_backlog(stack).rows, _backlog(stack).dead_rows) == (15, 30)


def test_a_stopped_batch_has_no_owner_at_work(stack: Stack) -> None:
    """No run works on it until its lease ends, so it must not keep the next run from starting."""
    stack.put(*events(10))
    insert_batch(stack, state="stopped", lease_until_ms=stack.upkeep.now_ms() + 250_000)
    assert _backlog(stack).leasing_owners == ()


@pytest.mark.parametrize(
    "created_at",
    [
        "UNIX_TIMESTAMP(NOW(3)) * 1000000",
        "UNIX_TIMESTAMP(NOW(3)) * 1000000000",
        "UNIX_TIMESTAMP(NOW(3))",
        "UNIX_TIMESTAMP(NOW(3)) * 1000 + 86400000",
        "0",
        "-5",
    ],
)
def test_a_created_at_that_is_no_epoch_milliseconds_hides_no_lag(
    stack: Stack, auditexport: Prompt, created_at: str
) -> None:
    """In microseconds or in the future the lag was always 0; in seconds it made it half a century."""
    pks = stack.put(*events(10))
    hour_ago = "UNIX_TIMESTAMP(NOW(3)) * 1000 - 3600000"
    stack.sql(f"UPDATE clickhouse_outbox SET created_at = CASE pk WHEN {pks[-1]} THEN {hour_ago} ELSE {created_at} END")
    backlog = _backlog(stack)
    assert 3_600 <= backlog.lag_s < 7_200
    assert decide(backlog, Thresholds(), at_work=None, failures=NO_FAILURES).launch
    assert "have a created_at that" in " ".join(auditexport("doctor").output.split())
    assert f"pk {pks[0]}" in auditexport("status", status=1).output


def test_where_no_created_at_is_sound_the_last_claim_counts(stack: Stack) -> None:
    """Rows that are all dated in the future are old all the same."""
    stack.put(*events(3))
    stack.sql("UPDATE clickhouse_outbox SET created_at = created_at + 864000000")
    insert_batch(stack, claimed_s_ago=600)
    assert 600 <= _backlog(stack).lag_s < 1_200


def test_a_drain_ends_only_without_the_rows_that_it_gave_back(
    stack: Stack, auditexport: Prompt, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without a sound created_at, rows that a batch gave back seem to have arrived after the last claim."""
    monkeypatch.setattr(claiming, "SAMPLED_ROWS", 1)
    stack.put(*events(1), *(small_event(f"evt_large_{number}", description="d" * 5_000) for number in range(20)))
    stack.sql("UPDATE clickhouse_outbox SET created_at = 1")
    auditexport("drain", "--batch-bytes", "20000")
    everything_once(stack, 21)
