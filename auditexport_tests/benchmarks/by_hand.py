"""What a good engineer writes in an afternoon, to measure against: ClickHouse reads MySQL itself, range by range.

What belongs here: a loop of `INSERT … SELECT … FROM mysql(…)` over pk ranges, each followed by `UPDATE … BETWEEN`,
as fast as we could make it. What does not: any of our own code but the table names.

It promises less: rows that commit into a range between its two statements are marked and never exported, a range
that is tried again is there twice, an answer that was lost is a guess, one bad row is an empty event or the end of
the loop, and nobody knows afterwards what was exported when.

    python -m auditexport_tests.benchmarks.by_hand MYSQL_URL CLICKHOUSE_URL [--turns]
"""

from __future__ import annotations

import sys
import time
from typing import Any

import clickhouse_connect
import sqlalchemy as sa

from auditexport_tests.benchmarks.turns import answer

RANGE_PKS = 50_000
SETTINGS = {"async_insert": 0, "log_queries": 0, "type_json_skip_duplicated_paths": 1}

# From rows with a payload to entries; a peer's copy is decoded by the same statement (`contenders`).
ENTRIES = """
SELECT e.event_id AS event_id, e.time AS time, {inserted_at} AS inserted_at, e.workspace_id AS workspace_id,
       e.bucket AS bucket, if(e.source = '', 'platform', e.source) AS source, e.event AS event,
       e.description AS description, e.actor.type AS actor_type, e.actor.id AS actor_id, e.actor.name AS actor_name,
       e.actor.meta AS actor_meta, e.remote_ip AS remote_ip, e.user_agent AS user_agent, e.meta AS meta,
       e.targets.type AS `targets.type`, e.targets.id AS `targets.id`, e.targets.name AS `targets.name`,
       e.targets.meta AS `targets.meta`, e.correlation_id AS correlation_id
FROM (
  SELECT JSONExtract(payload, 'Tuple(event_id String, time Int64, workspace_id String, bucket String, source String,
    event String, description String, actor Tuple(type String, id String, name String, meta JSON), remote_ip String,
    user_agent String, meta JSON, targets Array(Tuple(type String, id String, name String, meta JSON)),
    correlation_id String)') AS e
  FROM {rows}
)
"""
INSERT = """
INSERT INTO audit_logs_raw_v1
  (event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name,
   actor_meta, remote_ip, user_agent, meta, `targets.type`, `targets.id`, `targets.name`, `targets.meta`, correlation_id)
"""
ROWS = """mysql('{host}:{port}', '{database}', 'clickhouse_outbox', '{user}', '{password}')
  WHERE deleted_at IS NULL AND version = 'audit_log.v1' AND pk BETWEEN {first_pk} AND {last_pk}"""
MARK = (
    "UPDATE clickhouse_outbox SET deleted_at = :now "
    "WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NULL AND version = 'audit_log.v1'"
)
PENDING = (
    "SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk FROM clickhouse_outbox "
    "WHERE deleted_at IS NULL AND version = 'audit_log.v1'"
)


def drain(engine: sa.Engine, client: Any) -> int:
    """Goes once over what is pending now; returns the rows marked."""
    server = engine.url
    exported = 0
    with engine.begin() as connection:
        pending = connection.execute(sa.text(PENDING)).one()
    first_pk = pending.first_pk
    while first_pk is not None and first_pk <= pending.last_pk:
        now = time.time_ns() // 1_000_000
        last_pk = first_pk + RANGE_PKS - 1
        rows = ROWS.format(
            host=server.host,
            port=server.port or 3306,
            database=server.database,
            user=server.username,
            password=server.password or "",
            first_pk=first_pk,
            last_pk=last_pk,
        )
        client.command(INSERT + ENTRIES.format(inserted_at=now, rows=rows), settings=SETTINGS)
        with engine.begin() as connection:
            marked = connection.execute(sa.text(MARK), {"now": now, "first_pk": first_pk, "last_pk": last_pk})
            exported += marked.rowcount
        first_pk = last_pk + 1
    return exported


if __name__ == "__main__":
    mysql = sa.create_engine(sys.argv[1])
    clickhouse = clickhouse_connect.get_client(dsn=sys.argv[2], autogenerate_session_id=False)
    if sys.argv[3:] == ["--turns"]:
        answer(lambda: drain(mysql, clickhouse))
    else:
        print(drain(mysql, clickhouse))
