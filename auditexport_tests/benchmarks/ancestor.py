"""The ancestor's algorithm, as a baseline: batches of 1,000 rows, each in one transaction.

It is unkey's `RunExport` in Python: `SELECT … FOR UPDATE SKIP LOCKED` in pk order at MySQL's default isolation, decode,
INSERT, `UPDATE deleted_at`, COMMIT, until a short batch. It decodes with msgspec and inserts native columns, as its Go
original does with structs. It uses none of our code.

    python -m auditexport_tests.benchmarks.ancestor MYSQL_URL CLICKHOUSE_URL [--turns | seconds to keep going]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import clickhouse_connect
import msgspec
import sqlalchemy as sa

from auditexport_tests.benchmarks.turns import answer

BATCH_ROWS = 1_000
COLUMNS = [
    *("event_id", "time", "inserted_at", "workspace_id", "bucket", "source", "event", "description"),
    *("actor_type", "actor_id", "actor_name", "actor_meta", "remote_ip", "user_agent", "meta"),
    *("targets.type", "targets.id", "targets.name", "targets.meta", "correlation_id"),
]


class _Actor(msgspec.Struct, gc=False):
    type: str = ""
    id: str = ""
    name: str | None = None
    meta: dict[str, Any] | None = None


class _Event(msgspec.Struct, gc=False):
    event_id: str
    time: int
    workspace_id: str
    event: str
    bucket: str = ""
    source: str | None = None
    description: str | None = None
    actor: _Actor | None = None
    remote_ip: str | None = None
    user_agent: str | None = None
    meta: dict[str, Any] | None = None
    targets: list[_Actor] | None = None
    correlation_id: str | None = None


_decode = msgspec.json.Decoder(_Event).decode
_NOBODY = _Actor()


def drain(engine: sa.Engine, client: Any, *, seconds: float = 0.0) -> int:
    """Drains until a short batch, then again and again for `seconds`; returns the rows exported."""
    until = time.monotonic() + seconds
    exported = 0
    while True:
        rows = _batch(engine, client)
        exported += rows
        if rows < BATCH_ROWS and time.monotonic() >= until:
            return exported


def _batch(engine: sa.Engine, client: Any) -> int:
    with engine.begin() as transaction:
        found = transaction.execute(
            sa.text(
                "SELECT pk, payload FROM clickhouse_outbox WHERE deleted_at IS NULL AND version = 'audit_log.v1' "
                f"ORDER BY pk LIMIT {BATCH_ROWS} FOR UPDATE SKIP LOCKED"
            )
        ).all()
        if not found:
            return 0
        inserted_at = time.time_ns() // 1_000_000
        data = [_entry(_decode(row.payload), inserted_at) for row in found]
        client.insert("audit_logs_raw_v1", data, column_names=COLUMNS, settings={"async_insert": 0})
        transaction.execute(
            sa.text("UPDATE clickhouse_outbox SET deleted_at = :now WHERE pk IN :pks").bindparams(
                sa.bindparam("pks", [row.pk for row in found], expanding=True)
            ),
            {"now": inserted_at},
        )
    return len(found)


def _entry(event: _Event, inserted_at: int) -> list[Any]:
    actor = event.actor or _NOBODY
    targets = event.targets or []
    return [
        event.event_id,
        event.time,
        inserted_at,
        event.workspace_id,
        event.bucket,
        event.source or "platform",
        event.event,
        event.description or "",
        actor.type,
        actor.id,
        actor.name or "",
        actor.meta or {},
        event.remote_ip or "",
        event.user_agent or "",
        event.meta or {},
        [target.type for target in targets],
        [target.id for target in targets],
        [target.name or "" for target in targets],
        [target.meta or {} for target in targets],
        event.correlation_id or "",
    ]


if __name__ == "__main__":
    mysql = sa.create_engine(sys.argv[1])
    clickhouse = clickhouse_connect.get_client(dsn=sys.argv[2], autogenerate_session_id=False)
    if sys.argv[3:] == ["--turns"]:
        answer(lambda: drain(mysql, clickhouse))
    else:
        print(drain(mysql, clickhouse, seconds=float(sys.argv[3]) if len(sys.argv) > 3 else 0.0))
