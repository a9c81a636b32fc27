"""What tests of requeue, sweep and reconcile share: the three verbs, losses in ClickHouse, and batches of long ago."""

from __future__ import annotations

import json
from typing import Any

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.reconcile import Report, reconcile
from auditexport_pipeline.core.requeue import Requeue, requeue
from auditexport_pipeline.core.settings import Retention
from auditexport_pipeline.core.sweep import Sweep, sweep
from auditexport_pipeline.core.units import DAY_MS
from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import stop_merges

BY = Actor(who="auditor", why="a test")
# The columns of `audit_logs_raw_v1` that an INSERT names.
COLUMNS = (
    "event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name, "
    "actor_meta, remote_ip, user_agent, meta, `targets.type`, `targets.id`, `targets.name`, `targets.meta`, correlation_id"
)


# ── the verbs ────────────────────────────────────────────────────────────────────────────────────


def reconciled(stack: Stack, **options: Any) -> Report:
    """A reconciliation, of everything up to now unless told otherwise."""
    return reconcile(stack.outbox, stack.upkeep, stack.log, **{"from_ms": 0, "to_ms": 2**62, **options})


def requeued(stack: Stack, *, missing_only: bool = False, dry_run: bool = False, **conditions: Any) -> Requeue:
    wanted = RowFilter(**conditions)
    return requeue(stack.outbox, stack.upkeep, stack.log, wanted, BY, missing_only=missing_only, dry_run=dry_run)


def swept(stack: Stack, *, dry_run: bool = False, **retention: Any) -> Sweep:
    return sweep(stack.outbox, stack.upkeep, stack.log, Retention(**retention), BY, dry_run=dry_run)


# ── what others do to the databases ──────────────────────────────────────────────────────────────


def clear_marks(stack: Stack, condition: str) -> None:
    """What an operator does in SQL instead of a requeue."""
    stack.sql(f"UPDATE clickhouse_outbox SET deleted_at = NULL WHERE {condition}")


def mutate(stack: Stack, change: str) -> None:
    """An ALTER TABLE of ClickHouse's table, such as DELETE or UPDATE, which needs merges; nothing merges afterwards."""
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    settings = {"mutations_sync": 2, "json_type_escape_dots_in_keys": 1}
    stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 {change}", settings=settings)
    stop_merges(stack)


def lose(stack: Stack, condition: str = "1") -> None:
    """ClickHouse loses entries."""
    mutate(stack, f"DELETE WHERE {condition}")


def lose_events(stack: Stack, *event_ids: str) -> None:
    lose(stack, f"event_id IN ({', '.join(map(repr, event_ids))})")


def store_again(stack: Stack, condition: str, **columns: str) -> None:
    """Stores entries once more, with other expressions for some columns."""
    changed = ", ".join(columns.get(column, column) for column in COLUMNS.split(", "))
    stack.log.client().command(
        f"INSERT INTO audit_logs_raw_v1 ({COLUMNS}) SELECT {changed} FROM audit_logs_raw_v1 WHERE {condition}",
        settings={"insert_deduplicate": 0, "json_type_escape_dots_in_keys": 1},
    )


def move_back(stack: Stack, days: int, condition: str = "batch_id > 0") -> None:
    """Moves the `inserted_at`s of batches into the past in the ledger; ClickHouse's entries stay where they are."""
    for row in stack.sql(f"SELECT batch_id, manifest FROM clickhouse_outbox_batch WHERE {condition}"):
        blocks = [{**block, "at": block["at"] - days * DAY_MS} for block in json.loads(str(row.manifest))]
        stack.sql(
            "UPDATE clickhouse_outbox_batch SET manifest = :text, inserted_at_ms = inserted_at_ms - :ms, observed = NULL "
            "WHERE batch_id = :id",
            text=json.dumps(blocks, separators=(",", ":")),
            ms=days * DAY_MS,
            id=row.batch_id,
        )


def forget_rows(stack: Stack) -> None:
    """As after a sweep long ago: only the ledger knows what was exported."""
    stack.sql("DELETE FROM clickhouse_outbox")
    stack.sql("UPDATE clickhouse_outbox_batch SET swept_at_ms = 1 WHERE batch_id > 0")


# ── what there is ────────────────────────────────────────────────────────────────────────────────


def outbox_rows(stack: Stack) -> int:
    return int(str(stack.sql("SELECT COUNT(*) AS n FROM clickhouse_outbox")[0].n))


def pending_events(stack: Stack) -> list[str]:
    rows = stack.sql("SELECT event_id FROM clickhouse_outbox WHERE deleted_at IS NULL ORDER BY pk")
    return [str(row.event_id) for row in rows]


def batch_states(stack: Stack) -> list[str]:
    rows = stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id")
    return [str(row.state) for row in rows]
