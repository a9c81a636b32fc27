"""Status: what is read from a real ledger, by whom, and by which targets."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import sqlalchemy as sa

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.advice import advice
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.ledger import BatchFilter
from auditexport_pipeline.core.reconcile import reconcile
from auditexport_pipeline.core.settings import Limits, Retention, Targets
from auditexport_pipeline.core.status import LastReconcile
from auditexport_pipeline.core.sweep import sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_pipeline.mysql import ledger
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import read_status
from auditexport_pipeline.roles import MYSQL_GRANTS, Role
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

BY = Actor(who="ada", why="test")


def test_an_empty_installation_is_healthy(stack: Stack) -> None:
    """The first thing an operator types after `init` must not be an alarm."""
    status = read_status(stack.outbox)
    assert advice(status, Targets()) == []
    assert (status.runs, status.open_batches, status.eta_s, status.first_claimed_at_ms) == ((), (), 0.0, None)


def test_what_a_drain_did_is_in_the_status(stack: Stack) -> None:
    """Backlog, rate, runs, letters and versions come from one ledger, and must agree with what was put in."""
    seed_outbox(stack.mysql_url, seed=5, events=120, malformed=4, unknown=6, writers=1)
    before = read_status(stack.outbox)
    assert (before.backlog.rows, before.eta_s, before.rows_per_s) == (124, None, 0.0)
    drain(stack.outbox, stack.log, Limits(batch_rows=50), owner="one")
    status = read_status(stack.outbox)
    assert (status.backlog.rows, status.eta_s) == (0, 0.0)
    assert sum(status.backlog.unknown_by_version.values()) == 6
    assert sum(status.dead_by_reason.values()) == status.backlog.dead_rows == 4
    (run,) = status.runs
    assert (run.owner, run.rows, run.batches, run.worst, run.at_work) == ("one", 120, 3, State.VERIFIED, False)
    assert status.recent_rows == 120
    assert status.rows_per_s > 0
    assert status.last_exported_at_ms is not None
    assert [one.about for one in advice(status, Targets())] == ["dead_letters", "unknown_versions"]


def test_open_batches_have_owner_lease_and_state(stack: Stack) -> None:
    """The first question on call is whether a run is at work, and which."""
    seed_outbox(stack.mysql_url, seed=6, events=60, writers=1)
    (claim,) = claiming.claim(stack.outbox, owner="web-1:77", dead_owners=(), limits=Limits(lease_s=600))
    (batch,) = read_status(stack.outbox).open_batches
    assert (batch.batch_id, batch.state, batch.rows, batch.owner) == (claim.batch_id, State.CLAIMED, 60, "web-1:77")
    assert 0 < batch.lease_left_s <= 600
    fetched = export.fetch(stack.outbox, stack.log, claim, Limits())
    export.mark(
        stack.outbox, stack.log, export.write(stack.outbox, stack.log, claim, fetched.bodies, Limits()), Limits()
    )
    status = read_status(stack.outbox)
    assert (status.open_batches, status.unverified_batches) == ((), 1)
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 3600000 WHERE batch_id > 0")
    (one,) = advice(read_status(stack.outbox), Targets())
    assert one.about == "unverified"


def test_a_reconciliation_leaves_when_who_and_what_it_found(stack: Stack) -> None:
    """Otherwise nobody can tell when both stores were last compared."""
    seed_outbox(stack.mysql_url, seed=7, events=40, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    now_ms = stack.upkeep.now_ms()

    def compared(**options: object) -> LastReconcile | None:
        reconcile(
            stack.outbox,
            stack.upkeep,
            stack.log,
            from_ms=now_ms - DAY_MS,
            to_ms=now_ms + DAY_MS,
            **options,  # type: ignore[arg-type]
        )
        return read_status(stack.outbox).last_reconcile

    assert compared() is None
    assert compared(by=BY, dry_run=True) is None
    clean = compared(by=BY)
    assert clean is not None
    assert (clean.who, clean.batches, clean.clean, clean.from_ms) == ("ada", 1, True, now_ms - DAY_MS)
    assert advice(read_status(stack.outbox), Targets()) == []
    ((event_id,),) = stack.clickhouse("SELECT event_id FROM audit_logs_raw_v1 ORDER BY time LIMIT 1")
    stack.log.client().command(
        f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE event_id = '{event_id}'", settings={"mutations_sync": 2}
    )
    found = compared(by=BY)
    assert found is not None
    assert found.found.missing == 1
    status = read_status(stack.outbox)
    assert list(status.discrepant.values()) == ["in ClickHouse: 1 missing"]
    assert [one.about for one in advice(status, Targets())] == ["discrepant", "reconcile"]


def test_the_last_sweep_and_a_late_sweep_are_in_the_status(stack: Stack) -> None:
    """An outbox that grows for ever fills the application's disk."""
    seed_outbox(stack.mysql_url, seed=8, events=40, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    stack.sql("UPDATE clickhouse_outbox SET deleted_at = deleted_at - 33 * 86400000")
    stack.sql("UPDATE clickhouse_outbox_batch SET exported_at_ms = exported_at_ms - 33 * 86400000 WHERE batch_id > 0")
    (one,) = [one for one in advice(read_status(stack.outbox), Targets()) if one.about == "sweep"]
    assert "33.0 days" in one.what
    sweep(stack.outbox, stack.upkeep, stack.log, Retention(), BY)
    status = read_status(stack.outbox)
    assert status.last_sweep is not None
    assert (status.last_sweep.rows, status.last_sweep.who, status.oldest_unswept_age_s) == (40, "ada", 0.0)
    assert advice(status, Targets()) == []


@pytest.fixture
def as_role(stack: Stack) -> Iterator[Callable[[Role], MySQLOutbox]]:
    """The stack's MySQL through a user that has one role's grants and no others."""
    url = sa.make_url(stack.mysql_url)
    made: list[MySQLOutbox] = []

    def user(role: Role) -> MySQLOutbox:
        name = f"status_{role.value}_{len(made)}"
        stack.sql(f"CREATE USER '{name}'@'127.0.0.1' IDENTIFIED BY 'role'")
        for table, privileges in MYSQL_GRANTS[role].items():
            stack.sql(f"GRANT {', '.join(privileges)} ON `{url.database}`.{table} TO '{name}'@'127.0.0.1'")
        made.append(MySQLOutbox(url.set(username=name, password="role").render_as_string(hide_password=False)))
        return made[-1]

    yield user
    for outbox in made:
        outbox.disconnect()
        stack.sql(f"DROP USER '{sa.make_url(outbox.url).username}'@'127.0.0.1'")


def test_an_exporter_reads_all_but_the_actions(stack: Stack, as_role: Callable[[Role], MySQLOutbox]) -> None:
    """A dashboard's user has SELECT and nothing else, and an asset check has the exporter's grants."""
    seed_outbox(stack.mysql_url, seed=9, events=20, malformed=2, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    reader = as_role(Role.READER)
    assert read_status(reader).actions_read
    assert [line.owner for line in ledger.list_batches(reader, BatchFilter(), 10)] == ["one"]
    assert ledger.show(reader, 1) is not None
    status = read_status(as_role(Role.EXPORTER))
    assert (status.actions_read, status.backlog.dead_rows) == (False, 2)
    assert [one.about for one in advice(status, Targets())] == ["dead_letters", "actions"]


def test_a_reconciliation_that_cannot_be_recorded_is_made(stack: Stack, as_role: Callable[[Role], MySQLOutbox]) -> None:
    """What was found must not be lost over a grant on the table of records."""
    seed_outbox(stack.mysql_url, seed=10, events=20, writers=1)
    drain(stack.outbox, stack.log, Limits(), owner="one")
    sweeper = as_role(Role.SWEEPER)
    stack.sql(f"REVOKE INSERT ON clickhouse_outbox_action FROM '{sa.make_url(sweeper.url).username}'@'127.0.0.1'")
    report = reconcile(sweeper, MySQLMaintenance(sweeper), stack.log, from_ms=0, to_ms=2**62, by=BY)
    assert report.clean
    assert "INSERT command denied" in report.unrecorded
    assert not reconcile(stack.outbox, stack.upkeep, stack.log, from_ms=0, to_ms=2**62, by=BY).unrecorded
