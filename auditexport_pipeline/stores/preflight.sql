-- What the preflight asks: catalogues, settings, clocks and one row of the ledger. No lock, nothing is written,
-- and nothing grows with a table.

-- name: mysql_server
SELECT VERSION() AS version, CURRENT_USER() AS granted_to, DATABASE() AS database_name,
       CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms

-- name: mysql_identity
-- Which server answers; a proxy may ask another one for each statement.
SELECT CONCAT_WS(' ', @@hostname, @@port, @@server_id) AS name

-- name: mysql_identity_locked
-- As mysql_identity, of the server that takes locks, and so writes.
SELECT CONCAT_WS(' ', @@hostname, @@port, @@server_id) AS name FROM DUAL FOR UPDATE

-- name: mysql_now
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms

-- name: mysql_variables
-- The session's values: what our own statements meet.
SHOW SESSION VARIABLES

-- name: mysql_tls
SHOW SESSION STATUS LIKE 'Ssl_cipher'

-- name: mysql_grants
-- The user's own and those of its active roles.
SHOW GRANTS

-- name: mysql_tables
SELECT LOWER(table_name) AS table_name, engine AS engine, LOWER(table_collation) AS collation
FROM information_schema.tables
WHERE table_schema = DATABASE()
  AND table_name IN ('clickhouse_outbox', 'clickhouse_outbox_batch', 'clickhouse_outbox_dead_letter',
                     'clickhouse_outbox_action', 'clickhouse_outbox_erasure')

-- name: mysql_columns
SELECT LOWER(table_name) AS table_name, LOWER(column_name) AS column_name, LOWER(column_type) AS column_type,
       is_nullable AS nullable, LOWER(character_set_name) AS charset, LOWER(collation_name) AS collation
FROM information_schema.columns
WHERE table_schema = DATABASE()
  AND table_name IN ('clickhouse_outbox', 'clickhouse_outbox_batch', 'clickhouse_outbox_dead_letter',
                     'clickhouse_outbox_action', 'clickhouse_outbox_erasure')

-- name: mysql_indexes
-- All columns, because only MySQL has is_visible and only MariaDB has ignored.
SELECT statistics.* FROM information_schema.statistics AS statistics
WHERE table_schema = DATABASE()
  AND table_name IN ('clickhouse_outbox', 'clickhouse_outbox_batch', 'clickhouse_outbox_dead_letter',
                     'clickhouse_outbox_action', 'clickhouse_outbox_erasure')
ORDER BY table_name, index_name, seq_in_index

-- name: ledger_head
-- Primary key, and the last entry of inserted_idx but for row 0's own.
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms, inserted_at_ms,
       (SELECT inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id > 0 ORDER BY inserted_at_ms DESC LIMIT 1)
         AS stamped_ms
FROM clickhouse_outbox_batch WHERE batch_id = 0

-- name: mysql_next_pk
-- The catalogue as it is now: MySQL's information_schema may answer with what it was yesterday.
SHOW CREATE TABLE clickhouse_outbox

-- name: last_exported_pk
-- last_pk_idx, its last entry.
SELECT MAX(last_pk) AS last_pk FROM clickhouse_outbox_batch

-- name: largest_pending
-- drainer_pending_idx for the oldest few, whose payloads are then measured one by one. Beyond max_allowed_packet
-- MySQL reads a JSON as an empty text, with a warning and no error; MariaDB reads NULL through our CAST.
SELECT MAX(OCTET_LENGTH(payload)) AS bytes, SUM(OCTET_LENGTH(payload) = 0) AS empty_ones FROM
  (SELECT payload FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 500) AS oldest

-- name: odd_created
-- As `oldest_pending` of the backlog's probe, whatever the version and the letters.
SELECT COUNT(*) AS odd_rows, MIN(pk) AS odd_pk FROM
  (SELECT pk, created_at FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 500) AS oldest
WHERE created_at NOT BETWEEN 1262304000000 AND CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + 60000

-- name: clickhouse_server
SELECT version() AS version, currentUser() AS granted_to, currentDatabase() AS database_name,
       toUnixTimestamp64Milli(now64(3)) AS now_ms, getSetting('readonly') AS read_only

-- name: clickhouse_now
SELECT toUnixTimestamp64Milli(now64(3)) AS now_ms

-- name: clickhouse_tables
SELECT name, database, engine, engine_full, partition_key, sorting_key, create_table_query FROM system.tables
WHERE database = currentDatabase() AND name IN ('audit_logs_raw_v1', 'audit_logs')

-- name: clickhouse_table
-- The one under a Distributed table, where this server has it.
SELECT name, database, engine, engine_full, partition_key, sorting_key, create_table_query FROM system.tables
WHERE database = {database:String} AND name = {table:String}

-- name: clickhouse_columns
SELECT name, type, default_kind FROM system.columns WHERE database = {database:String} AND table = {table:String}

-- name: clickhouse_table_defaults
-- What a table has that does not say otherwise: the server's configuration may differ from ClickHouse's own.
SELECT name, toInt64(value) AS value FROM system.replicated_merge_tree_settings
WHERE name IN ('replicated_deduplication_window', 'replicated_deduplication_window_seconds')

-- name: clickhouse_replicas
-- Asks Keeper for the two counts.
SELECT is_readonly, total_replicas, active_replicas FROM system.replicas
WHERE database = {database:String} AND table = {table:String}

-- name: clickhouse_cluster
SELECT count(DISTINCT shard_num) AS shards, max(replica_num) AS replicas, min(internal_replication) AS internally
FROM system.clusters WHERE cluster = {cluster:String}

-- name: clickhouse_stated
SELECT getSetting('log_comment') AS comment

-- name: clickhouse_filters
-- The plan of reading a table, which needs no grant but SELECT: a row policy on our user is a step of it. With no part to
-- read, the plan is nothing.
SELECT countIf(explain ILIKE '%filter%') AS filters
FROM (EXPLAIN actions = 1 SELECT event_id FROM $table)

-- name: clickhouse_policies
SELECT short_name FROM system.row_policies
WHERE database = currentDatabase() AND table = {table:String} AND NOT has(apply_to_except, currentUser())
  AND (apply_to_all OR hasAny(apply_to_list, arrayConcat([currentUser()], currentRoles())))

-- name: version_tables
SELECT name, database, engine, engine_full, partition_key, sorting_key, create_table_query FROM system.tables
WHERE database = currentDatabase() AND name IN {tables:Array(String)}

-- name: mysql_update_triggers
-- The catalogue, of which a user sees the triggers of tables on which TRIGGER is granted; no lock. MariaDB 11.8 shows a name
-- without its statement to who may UPDATE only: it counts as one that names deleted_at.
SELECT trigger_name AS name, action_timing AS timing, COALESCE(action_statement, 'deleted_at') AS statement
FROM information_schema.triggers
WHERE event_object_schema = DATABASE() AND event_object_table = 'clickhouse_outbox' AND event_manipulation = 'UPDATE'
ORDER BY action_timing DESC, action_order

-- name: clickhouse_expressions
SELECT name, default_expression FROM system.columns
WHERE database = {database:String} AND table = {table:String} AND default_kind = 'MATERIALIZED'
