-- What the preflight reads from ClickHouse: catalogues, settings, clocks. No statement's cost grows with a table.

-- name: server
SELECT version() AS version, currentUser() AS granted_to, currentDatabase() AS database_name, getSetting('readonly') AS read_only

-- name: now
SELECT toUnixTimestamp64Milli(now64(3)) AS now_ms

-- name: tables
-- Of the connection's database unless another one is named.
SELECT name, database, engine, engine_full, partition_key, sorting_key, create_table_query FROM system.tables
WHERE database = if({database:String} = '', currentDatabase(), {database:String}) AND name IN {tables:Array(String)}

-- name: columns
SELECT name, type, default_kind, default_expression FROM system.columns
WHERE database = {database:String} AND table = {table:String}

-- name: table_defaults
-- The server's defaults for tables: its configuration can differ from ClickHouse's own.
SELECT name, toInt64(value) AS value FROM system.replicated_merge_tree_settings
WHERE name IN ('replicated_deduplication_window', 'replicated_deduplication_window_seconds')

-- name: replicas
-- ClickHouse asks Keeper for the two counts.
SELECT is_readonly, total_replicas, active_replicas FROM system.replicas
WHERE database = {database:String} AND table = {table:String}

-- name: cluster
SELECT count(DISTINCT shard_num) AS shards, max(replica_num) AS replicas, min(internal_replication) AS internally
FROM system.clusters WHERE cluster = {cluster:String}

-- name: stated
SELECT getSetting('log_comment') AS comment

-- name: filters
-- The plan of reading a table, for which SELECT is enough: a row policy on our user is a step of it. A table without
-- parts has an empty plan.
SELECT countIf(explain ILIKE '%filter%') AS filters
FROM (EXPLAIN actions = 1 SELECT event_id FROM audit_logs_raw_v1)

-- name: policies
SELECT short_name FROM system.row_policies
WHERE database = currentDatabase() AND table = 'audit_logs_raw_v1' AND NOT has(apply_to_except, currentUser())
  AND (apply_to_all OR hasAny(apply_to_list, arrayConcat([currentUser()], currentRoles())))
