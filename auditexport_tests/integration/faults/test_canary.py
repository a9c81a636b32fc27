"""A canary event finds what would store events otherwise than they were written, before a row is marked."""

from __future__ import annotations

import pytest

from auditexport_pipeline import preflight
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events, states
from auditexport_tests.support.faults import findings
from auditexport_tests.support.prompts import Prompt

pytestmark = pytest.mark.clickhouse_sensitive

TABLE = "audit_logs_raw_v1"


def _alter(stack: Stack, declaration: str) -> None:
    stack.clickhouse(f"ALTER TABLE {TABLE} MODIFY COLUMN {declaration}")


def _found(stack: Stack) -> list[str]:
    return [f"{finding.what}: {finding.fix}" for finding in findings(stack) if "canary" in finding.what]


@pytest.mark.parametrize(
    ("declaration", "names"),
    [
        ("meta JSON(SKIP secret)", "meta.secret (dropped)"),
        ("meta JSON(SKIP a.b.c)", "meta.a (dropped)"),
        ("meta JSON(SKIP REGEXP 'pass.*')", "meta.what SKIP REGEXP matches (dropped)"),
        ("meta JSON(amount UInt32)", "meta.amount (added)"),
        ("actor_meta JSON(amount Nullable(Float32))", "actor_meta.amount (changed)"),
        ("`targets.meta` Array(JSON(SKIP secret))", "targets.meta.secret (dropped)"),
    ],
)
def test_a_column_that_drops_or_rounds_is_named_with_its_cure(stack: Stack, declaration: str, names: str) -> None:
    """Such a column drops parts of every event, and no count and no fingerprint ever sees it."""
    _alter(stack, declaration)
    (found,) = _found(stack)
    assert names in found
    assert f"ALTER TABLE {TABLE} MODIFY COLUMN" in found
    _alter(stack, "meta JSON, MODIFY COLUMN actor_meta JSON, MODIFY COLUMN `targets.meta` Array(JSON)")
    assert _found(stack) == []


def test_a_drain_claims_nothing_from_a_column_that_drops(stack: Stack, auditexport: Prompt) -> None:
    """Once a row is marked, what its column dropped is gone for good."""
    stack.put(*events(3))
    _alter(stack, "meta JSON(SKIP secret, amount UInt32)")
    assert "meta.secret (dropped)" in auditexport("drain", "--once", status=2).output
    assert (states(stack), stack.pending()) == ([], 3)


def test_a_change_of_the_table_is_seen_before_the_cache_ends(stack: Stack) -> None:
    """A run that stays for hours must notice within a plan that a column loses values."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    _alter(stack, "meta JSON(SKIP secret)")
    with pytest.raises(SetupIncomplete, match=r"meta\.secret \(dropped\)"):
        preflight.refuse_unless_ready(stack.outbox, stack.log)


def test_no_view_sees_the_canary(stack: Stack) -> None:
    """A made-up event in a customer's table would be a false entry of an audit log."""
    stack.clickhouse("CREATE TABLE seen (event_id String) ENGINE = MergeTree ORDER BY event_id")
    stack.clickhouse(f"CREATE MATERIALIZED VIEW onlooker TO seen AS SELECT event_id FROM {TABLE}")
    assert "ClickHouse canary event" in {check.about for check in preflight.examine(stack.outbox, stack.log)}
    assert stack.counts() == (0, 0)
    assert stack.clickhouse("SELECT count() FROM seen") == [(0,)]
