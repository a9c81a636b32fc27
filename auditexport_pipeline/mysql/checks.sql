-- What the preflight reads from MySQL: catalogues, settings, clocks and one row of the ledger. No statement's cost
-- grows with a table; only identity_locked takes locks, of no table.

-- name: server
SELECT VERSION() AS version, CURRENT_USER() AS granted_to, DATABASE() AS database_name

-- name: identity
-- The server that answers; a proxy may choose another one for each statement.
SELECT CONCAT_WS(' ', @@hostname, @@port, @@server_id) AS name

-- name: identity_locked
-- As identity, for the server that takes locks, and so writes.
SELECT CONCAT_WS(' ', @@hostname, @@port, @@server_id) AS name FROM DUAL FOR UPDATE

-- name: now
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms

-- name: variables
-- The session's values, which apply to our statements.
SHOW SESSION VARIABLES

-- name: tls
SHOW SESSION STATUS LIKE 'Ssl_cipher'

-- name: grants
-- The user's own and those of its active roles.
SHOW GRANTS

-- name: tables
SELECT LOWER(table_name) AS table_name, engine AS engine
FROM information_schema.tables
WHERE table_schema = DATABASE()
  AND table_name IN ('clickhouse_outbox', 'clickhouse_outbox_batch', 'clickhouse_outbox_dead_letter',
                     'clickhouse_outbox_action', 'clickhouse_outbox_erasure')

-- name: columns
SELECT LOWER(table_name) AS table_name, LOWER(column_name) AS column_name, LOWER(column_type) AS column_type,
       is_nullable AS nullable, LOWER(character_set_name) AS charset, LOWER(collation_name) AS collation
FROM information_schema.columns
WHERE table_schema = DATABASE()
  AND table_name IN ('clickhouse_outbox', 'clickhouse_outbox_batch', 'clickhouse_outbox_dead_letter',
                     'clickhouse_outbox_action', 'clickhouse_outbox_erasure')

-- name: indexes
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

-- name: next_pk
-- The next pk: MySQL's information_schema can show a cached one.
SHOW CREATE TABLE clickhouse_outbox

-- name: last_exported_pk
-- last_pk_idx, its last entry.
SELECT MAX(last_pk) AS last_pk FROM clickhouse_outbox_batch

-- name: largest_pending
-- drainer_pending_idx for the oldest few, whose payloads are then measured one by one. Beyond max_allowed_packet
-- MySQL reads a JSON value as an empty text, with a warning; MariaDB reads NULL through our CAST.
SELECT MAX(OCTET_LENGTH(payload)) AS bytes, SUM(OCTET_LENGTH(payload) = 0) AS empty_ones FROM
  (SELECT payload FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 500) AS oldest

-- name: odd_created
-- As `oldest_pending` of the backlog's probe, for all versions and with dead letters.
SELECT COUNT(*) AS odd_rows, MIN(pk) AS odd_pk FROM
  (SELECT pk, created_at FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx) WHERE deleted_at IS NULL LIMIT 500) AS oldest
WHERE created_at NOT BETWEEN 1262304000000 AND CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + 60000

-- name: update_triggers
-- A user sees the triggers of tables on which TRIGGER is granted. MariaDB 11.8 shows users with only UPDATE the name
-- without the statement: it counts as one that names deleted_at.
SELECT trigger_name AS name, action_timing AS timing, COALESCE(action_statement, 'deleted_at') AS statement
FROM information_schema.triggers
WHERE event_object_schema = DATABASE() AND event_object_table = 'clickhouse_outbox' AND event_manipulation = 'UPDATE'
ORDER BY action_timing DESC, action_order
