"""A failover that loses commits: MySQL goes on from an earlier moment, and batch ids, epochs and pks recur.

A batch with two owners and no lost commit is in `integration.export.test_exactly_once`, a restored backup in
`integration.maintenance.test_restore`.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress

import pytest

from auditexport_pipeline.core import claiming, export, verify
from auditexport_pipeline.core.batch import Claim
from auditexport_pipeline.core.errors import LeaseLost
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.maintenance.test_restore import back_up, restore
from auditexport_tests.support.builders import events
from auditexport_tests.support.crashes import CrashingOutbox, CrashPoint, drain

pytestmark = pytest.mark.mysql_sensitive

LIMITS = Limits()


def _claim(stack: Stack) -> Claim:
    (claim,) = claiming.claim(stack.outbox, owner="new", dead_owners=(), limits=LIMITS)
    return claim


def _sealed(stack: Stack) -> Claim:
    claim = _claim(stack)
    Pipeline().fetch(stack.outbox, stack.log, claim, LIMITS)
    return claim


def _written(stack: Stack) -> Claim:
    claim = _sealed(stack)
    export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    return claim


def _facts(stack: Stack) -> dict[str, object]:
    """What an old run could change: the marks, ClickHouse, and the new run's batch."""
    return {
        "marked": [row.event_id for row in stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at > 0")],
        "entries": sorted(stack.clickhouse("SELECT event_id, inserted_at FROM audit_logs_raw_v1")),
        "batches": stack.sql(
            "SELECT batch_id, epoch, state, owner, digest, attempts, lease_until_ms FROM clickhouse_outbox_batch ORDER BY batch_id"
        ),
    }


@pytest.mark.parametrize(
    ("paused", "meanwhile"),
    [
        ("before renew 1", _claim),
        ("before seal 1", _claim),
        ("before begin_write 1", _sealed),
        ("before finish_mark 1", _written),
    ],
)
def test_a_run_from_before_a_failover_changes_nothing_after_it(
    stack: Stack, paused: str, meanwhile: Callable[[Stack], Claim]
) -> None:
    """Its rows are lost with their commit; written or marked under the new run's batch, they would replace its events."""
    stack.put(*events(3, "kept"))
    drain(stack.outbox, stack.log, LIMITS, owner="old")
    back_up(stack)
    lost = stack.put(*events(4, "lost"))
    new: list[Claim] = []
    facts: dict[str, object] = {}

    def fail_over() -> None:
        restore(stack)
        assert stack.put(*events(4, "new")) == lost
        new.append(meanwhile(stack))
        facts.update(_facts(stack))

    old: list[Claim] = []
    with suppress(LeaseLost):
        old += drain(CrashingOutbox(stack.outbox, CrashPoint(paused, then=fail_over)), stack.log, LIMITS, owner="old")
    assert _facts(stack) == facts, "the old run changed what is the new one's"

    (claim,) = new
    Pipeline().fetch(stack.outbox, stack.log, claim, LIMITS)
    receipt = export.write(stack.outbox, stack.log, claim, {}, LIMITS)
    export.mark(stack.outbox, stack.log, receipt, LIMITS)
    assert not any(verify.verify(stack.outbox, stack.log, stack.outbox.unverified(10)).values())
    assert stack.pending() == 0
    assert stack.clickhouse("SELECT count() FROM audit_logs_raw_v1 WHERE event_id LIKE 'new%'") == [(4,)]
