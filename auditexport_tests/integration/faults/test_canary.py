"""A canary event finds what would store events otherwise than they were written, before a row is marked."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from auditexport_pipeline import preflight
from auditexport_pipeline.cli import main
from auditexport_pipeline.core.errors import SetupIncomplete
from auditexport_pipeline.local.generator import seed_outbox
from auditexport_tests.conftest import Stack
from auditexport_tests.support.faults import findings

pytestmark = pytest.mark.clickhouse_sensitive

TABLE = "audit_logs_raw_v1"


def _alter(stack: Stack, declaration: str) -> None:
    stack.log.client().command(f"ALTER TABLE {TABLE} MODIFY COLUMN {declaration}")


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
    found = _found(stack)
    assert len(found) == 1
    assert names in found[0]
    assert f"ALTER TABLE {TABLE} MODIFY COLUMN" in found[0]
    _alter(stack, "meta JSON, MODIFY COLUMN actor_meta JSON, MODIFY COLUMN `targets.meta` Array(JSON)")
    assert _found(stack) == []


def test_a_drain_claims_nothing_from_a_column_that_drops(stack: Stack) -> None:
    """Once a row is marked, what its column dropped is gone for good."""
    seed_outbox(stack.mysql_url, seed=6, events=20, writers=1)
    _alter(stack, "meta JSON(SKIP secret, amount UInt32)")
    preflight.forget()
    environment = {"AUDITEXPORT_MYSQL_URL": stack.mysql_url, "AUDITEXPORT_CLICKHOUSE_URL": stack.clickhouse_url}
    done = CliRunner().invoke(main, ["drain", "--once"], env=environment)
    assert (done.exit_code, stack.pending(), stack.counts()) == (2, 20, (0, 0)), done.output
    assert "meta.secret (dropped)" in done.output


def test_a_change_of_the_table_is_seen_before_the_cache_ends(stack: Stack) -> None:
    """A run that stays for hours must not fill a column that drops for the rest of them."""
    preflight.forget()
    preflight.refuse_unless_ready(stack.outbox, stack.log)
    _alter(stack, "meta JSON(SKIP secret)")
    said = ""
    try:
        preflight.refuse_unless_ready(stack.outbox, stack.log)
    except SetupIncomplete as refused:
        said = str(refused)
    assert "meta.secret (dropped)" in said


def test_no_view_sees_the_canary(stack: Stack) -> None:
    """A made-up event in a customer's table would be a false entry of an audit log."""
    client = stack.log.client()
    client.command("CREATE TABLE seen (event_id String) ENGINE = MergeTree ORDER BY event_id")
    client.command(f"CREATE MATERIALIZED VIEW onlooker TO seen AS SELECT event_id FROM {TABLE}")
    looks = {look.about: look for look in preflight.examine(stack.outbox, stack.log)}
    assert "ClickHouse canary event" in looks
    assert stack.counts() == (0, 0)
    assert stack.clickhouse("SELECT count() FROM seen") == [(0,)]
