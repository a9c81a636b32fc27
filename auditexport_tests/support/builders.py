"""What most tests need: rows to export, drains that end well or crash, and what both databases hold afterwards."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy.exc import DBAPIError

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.batch import Batch, Bodies, Claim
from auditexport_pipeline.core.ports import AuditLog, Outbox
from auditexport_pipeline.core.settings import Limits
from auditexport_tests.support.crashes import Crash, CrashingAuditLog, CrashingOutbox, CrashPoint, drain
from auditexport_tests.support.stack import Stack

FIRST_EVENT_MS = 1_760_000_000_000
INVALID_JSON = 3140  # the code of MySQL, which checks JSON
NEVER = "before nothing 1"  # a crash point that no run reaches
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


def events(count: int, prefix: str = "evt", *, first: int = 0, **fields: object) -> list[Row]:
    """Rows `evt_0`, `evt_1`, … whose times are one second apart, from `FIRST_EVENT_MS`."""
    return [
        event(f"{prefix}_{n}", **{"time": FIRST_EVENT_MS + 1000 * n, **fields}) for n in range(first, first + count)
    ]


def small_event(event_id: str, workspace_id: str = "ws_1", **fields: object) -> Row:
    """A row whose event has the required fields only, and these."""
    required = {"event_id": event_id, "time": 1, "workspace_id": workspace_id, "event": "key.create"}
    return workspace_id, event_id, json.dumps({**required, **fields})


def put_with_meta(stack: Stack, event_id: str, meta: str) -> int | None:
    """One row with this text as its meta; None if the server's JSON type refuses it."""
    *ids, payload = small_event(event_id, meta=0)
    try:
        return stack.put((*ids, payload.replace('"meta": 0', f'"meta": {meta}')))[0]
    except DBAPIError as error:
        if error.orig is None or error.orig.args[0] != INVALID_JSON:
            raise
        return None


def insert(stack: Stack, rows: Sequence[Row]) -> list[int]:
    """As `Stack.put`, of many rows; returns their pks."""
    with stack.outbox.engine.begin() as connection:
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
            "VALUES ('audit_log.v1', %s, %s, %s, UNIX_TIMESTAMP(NOW(3)) * 1000)",
            list(rows),
        )
        found = connection.exec_driver_sql(f"SELECT pk FROM clickhouse_outbox ORDER BY pk DESC LIMIT {len(rows)}")
        return sorted(row.pk for row in found)


def insert_batch(stack: Stack, batch_id: int = 1, *, claimed_s_ago: int = 0, **columns: object) -> None:
    """A row of the ledger as a test makes it up: a verified batch of one row and no blocks, but for these columns."""
    usual = {
        **dict.fromkeys(("epoch", "generation", "lease_until_ms"), 0),
        **dict.fromkeys(("claimed_rows", "row_count", "entry_count", "bytes", "inserted_at_ms", "attempts"), 1),
        **dict.fromkeys(("pks", "counts", "digest", "last_error"), ""),
        "batch_id": batch_id,
        "version": "audit_log.v1",
        "state": "verified",
        "owner": "another run",
        "manifest": "[]",
        "claimed_at_ms": stack.upkeep.now_ms() - 1000 * claimed_s_ago,
    }
    row = {**usual, **columns}
    values = ", ".join(f":{name}" for name in row)
    stack.sql(f"INSERT INTO clickhouse_outbox_batch ({', '.join(row)}) VALUES ({values})", **row)


# ── exporting ────────────────────────────────────────────────────────────────────────────────────


def claim(stack: Stack, owner: str = "one", *, dead_owners: Sequence[str] = (), **limits: Any) -> list[Claim]:
    """Plans batches for this owner, and does nothing with them."""
    return claiming.claim(stack.outbox, owner=owner, dead_owners=dead_owners, limits=Limits(**limits))


def write_and_mark(
    stack: Stack, claim: Claim, limits: Limits, bodies: Bodies | None = None, *, log: AuditLog | None = None
) -> Batch:
    """What follows the fetch of one batch: without bodies its rows are read again."""
    receipt = export.write(stack.outbox, log or stack.log, claim, bodies or {}, limits)
    return export.mark(stack.outbox, stack.log, receipt, limits)


def runner(limits: Limits | None = None, owner: str = "run") -> Callable[..., int]:
    """A function `run(stack, owner, limits, crash_at=…, log=…, **options)` with these defaults: one plan, from claim to
    verification. Returns how many batches it claimed. The options are those of `drain`.
    """

    def run(
        stack: Stack,
        owner: str = owner,
        limits: Limits | None = limits,
        *,
        crash_at: CrashPoint | None = None,
        log: AuditLog | None = None,
        **options: Any,
    ) -> int:
        outbox, log = crashing(stack, crash_at, log) if crash_at else (stack.outbox, log or stack.log)
        return len(drain(outbox, log, limits or Limits(), owner=owner, **options))

    return run


run = runner()


def crashing(stack: Stack, crash_at: CrashPoint, log: AuditLog | None = None) -> tuple[Outbox, AuditLog]:
    """Both stores, with this crash point in them."""
    return CrashingOutbox(stack.outbox, crash_at), CrashingAuditLog(log or stack.log, crash_at)


def crash(stack: Stack, place: str, owner: str = "first", limits: Limits | None = None, **options: Any) -> None:
    """A run that dies at this crash point."""
    with pytest.raises(Crash):
        run(stack, owner, limits, crash_at=CrashPoint(place), **options)


def end_leases(stack: Stack) -> None:
    """As if their time had passed, on both servers' clocks."""
    stack.sql("UPDATE clickhouse_outbox_batch SET lease_until_ms = 0, inserts_until_ms = 0")


def clear_marks(stack: Stack, pks: Sequence[int] | None = None) -> None:
    """Makes these rows pending again, or all of them, as an operator does by hand."""
    among = "" if pks is None else f" WHERE pk IN ({', '.join(map(str, pks))})"
    stack.sql(f"UPDATE clickhouse_outbox SET deleted_at = NULL{among}")


def delete_rows(stack: Stack, *pks: int) -> None:
    """Deletes these rows from the outbox."""
    stack.sql(f"DELETE FROM clickhouse_outbox WHERE pk IN ({', '.join(map(str, pks))})")


def lose(stack: Stack, *event_ids: str) -> None:
    """Deletes these events' entries from ClickHouse, or all entries, as a fault would. Hangs if merges are stopped."""
    which = f"event_id IN ({', '.join(map(repr, event_ids))})" if event_ids else "TRUE"
    stack.clickhouse(f"ALTER TABLE audit_logs_raw_v1 DELETE WHERE {which} SETTINGS mutations_sync = 2")


def stop_merges(stack: Stack) -> None:
    """ReplacingMergeTree takes copies away within moments: a duplicate would be gone before it is counted."""
    stack.clickhouse("SYSTEM STOP MERGES audit_logs_raw_v1")


def merge(stack: Stack) -> None:
    """Merges everything, and nothing afterwards."""
    stack.clickhouse("SYSTEM START MERGES audit_logs_raw_v1")
    stack.clickhouse("OPTIMIZE TABLE audit_logs_raw_v1 FINAL")
    stop_merges(stack)


@contextmanager
def open_transaction(stack: Stack, statement: str) -> Iterator[int]:
    """A connection of the application that has executed this statement and not committed; yields its process id."""
    with stack.outbox.engine.connect() as connection:
        process = int(connection.exec_driver_sql("SELECT CONNECTION_ID()").scalar_one())
        connection.exec_driver_sql(statement)
        try:
            yield process
        finally:
            connection.exec_driver_sql("UNLOCK TABLES")
            connection.rollback()


# ── what there is ────────────────────────────────────────────────────────────────────────────────


def everything_once(stack: Stack, count: int, *, pending: int = 0) -> None:
    """Asserts that ClickHouse holds `count` events, each once without FINAL, and that no other row is pending."""
    assert stack.counts() == (count, count)
    assert stack.pending() == pending


def count(stack: Stack, table: str = "clickhouse_outbox", where: str = "TRUE") -> int:
    """Rows of a MySQL table."""
    return int(str(stack.sql(f"SELECT COUNT(*) AS n FROM {table} WHERE {where}")[0].n))


def ledger(stack: Stack) -> list[Batch]:
    """Every batch of the ledger, oldest first."""
    ids = stack.sql("SELECT batch_id FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id")
    return stack.outbox.batches(int(str(row.batch_id)) for row in ids)


def states(stack: Stack) -> list[str]:
    """The state of every batch, oldest first."""
    found = stack.sql("SELECT state FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY batch_id")
    return [str(row.state) for row in found]


def dead_letters(stack: Stack, *columns: str) -> list[Any]:
    """These columns of every dead letter, by pk: a value each for one column, a tuple for several."""
    found = stack.sql(f"SELECT {', '.join(columns)} FROM clickhouse_outbox_dead_letter ORDER BY pk")
    return [row[0] if len(columns) == 1 else tuple(row) for row in found]
