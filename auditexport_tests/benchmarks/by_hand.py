"""What a good engineer writes in an afternoon, to measure against: ClickHouse reads MySQL itself, range by range.

What belongs here: a loop of `INSERT … SELECT … FROM mysql(…)` over pk ranges, each followed by `UPDATE … BETWEEN`,
as fast as we could make it. What does not: any of our own code but the table names.

It promises less: rows that commit into a range between its two statements are marked and never exported, a range
that is tried again is there twice, an answer that was lost is a guess, one bad row is an empty event or the end of
the loop, and nobody knows afterwards what was exported when.

    python -m auditexport_tests.benchmarks.by_hand MYSQL_URL CLICKHOUSE_URL
"""

from __future__ import annotations

import sys
import time

import clickhouse_connect
import sqlalchemy as sa

RANGE_PKS = 50_000
SETTINGS = {"async_insert": 0, "log_queries": 0, "type_json_skip_duplicated_paths": 1}

INSERT = """
INSERT INTO audit_logs_raw_v1
  (event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name,
   actor_meta, remote_ip, user_agent, meta, `targets.type`, `targets.id`, `targets.name`, `targets.meta`, correlation_id)
SELECT e.event_id, e.time, {inserted_at}, e.workspace_id, e.bucket, if(e.source = '', 'platform', e.source), e.event,
       e.description, e.actor.type, e.actor.id, e.actor.name, e.actor.meta, e.remote_ip, e.user_agent, e.meta,
       e.targets.type, e.targets.id, e.targets.name, e.targets.meta, e.correlation_id
FROM (
  SELECT JSONExtract(payload, 'Tuple(event_id String, time Int64, workspace_id String, bucket String, source String,
    event String, description String, actor Tuple(type String, id String, name String, meta JSON), remote_ip String,
    user_agent String, meta JSON, targets Array(Tuple(type String, id String, name String, meta JSON)),
    correlation_id String)') AS e
  FROM mysql('{host}:{port}', '{database}', 'clickhouse_outbox', '{user}', '{password}')
  WHERE deleted_at IS NULL AND version = 'audit_log.v1' AND pk BETWEEN {first_pk} AND {last_pk}
)
"""
MARK = (
    "UPDATE clickhouse_outbox SET deleted_at = :now "
    "WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NULL AND version = 'audit_log.v1'"
)
PENDING = (
    "SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk FROM clickhouse_outbox "
    "WHERE deleted_at IS NULL AND version = 'audit_log.v1'"
)


def drain(mysql_url: str, clickhouse_url: str) -> int:
    """Goes once over what is pending now; returns the rows marked."""
    engine = sa.create_engine(mysql_url)
    client = clickhouse_connect.get_client(dsn=clickhouse_url, autogenerate_session_id=False)
    server = engine.url
    exported = 0
    try:
        with engine.begin() as connection:
            pending = connection.execute(sa.text(PENDING)).one()
        first_pk = pending.first_pk
        while first_pk is not None and first_pk <= pending.last_pk:
            now = time.time_ns() // 1_000_000
            last_pk = first_pk + RANGE_PKS - 1
            client.command(
                INSERT.format(
                    inserted_at=now,
                    host=server.host,
                    port=server.port or 3306,
                    database=server.database,
                    user=server.username,
                    password=server.password or "",
                    first_pk=first_pk,
                    last_pk=last_pk,
                ),
                settings=SETTINGS,
            )
            with engine.begin() as connection:
                marked = connection.execute(sa.text(MARK), {"now": now, "first_pk": first_pk, "last_pk": last_pk})
                exported += marked.rowcount
            first_pk = last_pk + 1
        return exported
    finally:
        engine.dispose()
        client.close_connections()


if __name__ == "__main__":
    print(drain(sys.argv[1], sys.argv[2]))
