"""From one release to the next, and once back: batches that are open, runs that are at work, both at the same time.

What belongs here: the release of `release_7233b52.tar.xz` and this one, on the same databases. What does not: crashes
within one release (`integration.export.test_exactly_once`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.core import claiming
from auditexport_pipeline.core.batch import State
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.schema import create
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.integration.export.test_exactly_once import assert_everything_once, fill, ledger
from auditexport_tests.integration.upgrades.old_release import OldRelease
from auditexport_tests.support.crashes import CRASH_POINTS, Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain

ROWS = 40
SETTINGS = {"batch_rows": 20, "blocks_per_batch": 2, "mark_rows": 5, "mark_connections": 1}
LIMITS = Limits(**SETTINGS)  # type: ignore[arg-type]
# The first time of each effect. A split happens only where rows are refused; the matrix of one release has it, and each
# later time (`integration.export.test_exactly_once`).
POINTS = [point for point in CRASH_POINTS if point.endswith(" 1") and not re.search("replace_cut|reserve", point)]
# Paused before its claim is committed, a run holds the ledger's lock, and no other run plans.
PAUSES = [point for point in POINTS if point != "before claim 1"]


@pytest.fixture(scope="module")
def old(tmp_path_factory: pytest.TempPathFactory) -> Iterator[OldRelease]:
    with OldRelease(tmp_path_factory.mktemp("old")) as release:
        yield release


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of ten rows, so that small batches have two."""
    monkeypatch.setattr(claiming, "SMALLEST_BLOCK_ROWS", 10)


@pytest.fixture
def upgraded(mysql_server: str, clickhouse_server: str, old: OldRelease) -> Iterator[Stack]:
    """Databases that the old release created, after the statement that `doctor` prints."""
    with fresh_stack(mysql_server, clickhouse_server, create=False) as stack:
        old.ask("create", **urls(stack))
        stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")
        upgrade(stack)
        try:
            yield stack
        finally:
            old.settle()


def urls(stack: Stack) -> dict[str, str]:
    return {"mysql_url": stack.mysql_url, "clickhouse_url": stack.clickhouse_url}


def upgrade(stack: Stack) -> list[str]:
    """Carries out what the preflight prints for the ledger; returns the statements."""
    preflight.forget()
    fixes = [finding.fix for finding in preflight.check(stack.outbox, stack.log) if finding.fatal]
    statements = [
        found[0] for fix in fixes for found in re.finditer(r"ALTER TABLE clickhouse_outbox\w+ (?:[^;']|'[^']*')+", fix)
    ]
    for statement in statements:
        stack.sql(statement.replace(":", r"\:"))
    return statements


def begin_old(
    old: OldRelease, stack: Stack, owner: str = "old", crash_at: str = "before nothing 1", **more: object
) -> None:
    old.begin("drain", **{**urls(stack), "owner": owner, "crash_at": crash_at, "limits": SETTINGS, **more})


def new_drain(stack: Stack, owner: str, *dead_owners: str, limits: Limits = LIMITS) -> None:
    drain(stack.outbox, stack.log, limits, owner=owner, dead_owners=dead_owners)


def test_the_ledger_changes_by_one_statement_that_doctor_prints(
    mysql_server: str, clickhouse_server: str, old: OldRelease
) -> None:
    """The upgrade is one statement: before it nothing is claimed, after it nothing is left to do."""
    with fresh_stack(mysql_server, clickhouse_server, create=False) as stack:
        old.ask("create", **urls(stack))

        statements = upgrade(stack)

        assert [statement.split(" ADD ")[0] for statement in statements] == ["ALTER TABLE clickhouse_outbox_batch"]
        assert upgrade(stack) == []
        assert create(stack.outbox, stack.log) == []
        assert old.ask("check", **urls(stack))["fatal"] == []


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_what_the_old_release_left_open_is_finished(upgraded: Stack, old: OldRelease, point: str) -> None:
    """An upgrade kills the old run at any instant; the new release reads its ledger and its seals."""
    fill(upgraded)
    begin_old(old, upgraded, crash_at=point)
    assert old.end() == {"crashed": True}

    new_drain(upgraded, "new", "old")

    assert_everything_once(upgraded)


@pytest.mark.slow
@pytest.mark.parametrize("point", PAUSES)
def test_an_old_run_that_wakes_beside_the_new_release_harms_nothing(
    upgraded: Stack, old: OldRelease, point: str
) -> None:
    """A paused old process goes on where it was; the ledger refuses it, and ClickHouse knows its tokens."""
    fill(upgraded)
    begin_old(old, upgraded, crash_at=point, pause=True)
    assert old.end() == {"paused": True}

    new_drain(upgraded, "new", "old")
    outcome = old.wake()

    assert "claimed" in outcome or "LeaseLost" in str(outcome.get("error")), outcome
    new_drain(upgraded, "new", "old")
    assert_everything_once(upgraded)


@pytest.mark.slow
@pytest.mark.parametrize("point", POINTS)
def test_a_roll_back_finishes_what_the_new_release_left_open(upgraded: Stack, old: OldRelease, point: str) -> None:
    """A release that disappoints is taken back; the old one reads what the new one left, the added columns included."""
    fill(upgraded)
    crash_at = CrashPoint(point)
    with pytest.raises(Crash):
        drain(CrashingOutbox(upgraded.outbox, crash_at), CrashingAuditLog(upgraded.log, crash_at), LIMITS, owner="new")

    begin_old(old, upgraded, "old", dead_owners=["new"])
    assert "claimed" in old.end()

    assert_everything_once(upgraded)


@pytest.mark.slow
def test_both_releases_drain_one_backlog_at_the_same_time(upgraded: Stack, old: OldRelease) -> None:
    """Hosts are upgraded one after the other: for minutes both claim, write and mark beside each other."""
    rows = 600
    fill(upgraded, rows)
    few = {**SETTINGS, "max_batches": 3}

    while upgraded.pending():
        begin_old(old, upgraded, "old", limits=few)
        new_drain(upgraded, "new", limits=Limits(**few))  # type: ignore[arg-type]
        assert "claimed" in old.end()

    batches = ledger(upgraded)
    assert upgraded.counts() == (rows, rows)
    assert {batch.state for batch in batches} == {State.VERIFIED}
    assert {batch.owner for batch in batches} == {"old", "new"}
