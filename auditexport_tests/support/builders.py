"""What most tests need: rows to export, a drain of them, and what both databases hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from auditexport_pipeline.core.batch import Batch
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.conftest import Stack
from auditexport_tests.support.crashes import drain

FIRST_EVENT_MS = 1_760_000_000_000
Row = tuple[str, str, str]  # workspace_id, event_id, payload


def settings_file(directory: Path, **settings: object) -> str:
    """A file of one outbox with these settings, for AUDITEXPORT_OUTBOXES."""
    path = directory / "outboxes.yaml"
    path.write_text(json.dumps({"outboxes": [settings]}))  # YAML, as all JSON is
    return str(path)


# ── rows ─────────────────────────────────────────────────────────────────────────────────────────


def event(event_id: str, workspace_id: str = "ws_1", **fields: object) -> Row:
    """A row whose event has the usual fields."""
    usual = {
        "bucket": "unkey_mutations",
        "source": "platform",
        "description": "Created a key",
        "actor": {"type": "user", "id": "user_1", "meta": {"via": "dashboard"}},
        "targets": [{"type": "key", "id": f"key_{event_id}", "meta": {}}],
    }
    return small_event(event_id, workspace_id, **{"time": FIRST_EVENT_MS, **usual, **fields})


def events(count: int, prefix: str = "evt", **fields: object) -> list[Row]:
    """Rows whose times are one second apart, from `FIRST_EVENT_MS`."""
    return [event(f"{prefix}_{n}", time=FIRST_EVENT_MS + 1000 * n, **fields) for n in range(count)]


def small_event(event_id: str, workspace_id: str = "ws_1", **fields: object) -> Row:
    """A row whose event has the required fields only, and these."""
    required = {"event_id": event_id, "time": 1, "workspace_id": workspace_id, "event": "key.create"}
    return workspace_id, event_id, json.dumps({**required, **fields})


def insert(stack: Stack, rows: Sequence[Row]) -> list[int]:
    """As `Stack.put`, of many rows; returns their pks."""
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
            "VALUES ('audit_log.v1', %s, %s, %s, 1)",
            list(rows),
        )
        found = connection.exec_driver_sql(f"SELECT pk FROM clickhouse_outbox ORDER BY pk DESC LIMIT {len(rows)}")
        return sorted(row.pk for row in found)


# ── exporting ────────────────────────────────────────────────────────────────────────────────────


def runner(limits: Limits, owner: str = "run") -> Callable[..., int]:
    """A function `run(stack, owner, limits, **options)` with these defaults: one run over the whole stack; returns how many
    batches it claimed. The options are those of `drain`.
    """

    def run(stack: Stack, owner: str = owner, limits: Limits = limits, **options: Any) -> int:
        return len(drain(stack.outbox, stack.log, limits, owner=owner, **options))

    return run


run = runner(Limits())


def stop_merges(stack: Stack) -> None:
    """ReplacingMergeTree takes copies away within moments: a duplicate would be gone before it is counted."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")


def merge(stack: Stack) -> None:
    """Merges everything, and nothing afterwards."""
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    stop_merges(stack)


# ── what there is ────────────────────────────────────────────────────────────────────────────────


def everything_once(stack: Stack, count: int) -> None:
    """Asserts that ClickHouse holds `count` events, each once without FINAL, and nothing is pending."""
    assert stack.counts() == (count, count)
    assert stack.pending() == 0


def ledger(stack: Stack) -> list[Batch]:
    """Every batch of the ledger, oldest first."""
    ids = stack.sql("SELECT batch_id FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id")
    return stack.outbox.batches(int(str(row.batch_id)) for row in ids)
