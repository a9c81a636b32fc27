-- Who has a lock that one of our connections waits for. All take PROCESS, and MySQL's SELECT on performance_schema too.
-- No lock. Start times are in the server's own time zone. `info` is cut to its first word: what follows can be a payload.

-- name: mysql
SELECT blocking.trx_mysql_thread_id AS process, process.user, process.host, process.info, blocking.trx_id,
       TIMESTAMPDIFF(SECOND, blocking.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s
FROM performance_schema.data_lock_waits AS waits
JOIN information_schema.innodb_trx AS blocking ON blocking.trx_id = waits.blocking_engine_transaction_id
JOIN information_schema.innodb_trx AS ours ON ours.trx_id = waits.requesting_engine_transaction_id
LEFT JOIN information_schema.processlist AS process ON process.id = blocking.trx_mysql_thread_id
WHERE ours.trx_mysql_thread_id = :waiting

-- name: mariadb
SELECT blocking.trx_mysql_thread_id AS process, process.user, process.host, process.info, blocking.trx_id,
       TIMESTAMPDIFF(SECOND, blocking.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s
FROM information_schema.innodb_lock_waits AS waits
JOIN information_schema.innodb_trx AS blocking ON blocking.trx_id = waits.blocking_trx_id
JOIN information_schema.innodb_trx AS ours ON ours.trx_id = waits.requesting_trx_id
LEFT JOIN information_schema.processlist AS process ON process.id = blocking.trx_mysql_thread_id
WHERE ours.trx_mysql_thread_id = :waiting

-- name: mysql_table
-- LOCK TABLES, FLUSH TABLES WITH READ LOCK, a statement of DDL that waits before us, and whom that one waits for.
SELECT threads.processlist_id AS process, process.user, process.host, process.info, blocking.trx_id,
       TIMESTAMPDIFF(SECOND, blocking.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s,
       process.time AS since_s, MAX(other.lock_status = 'GRANTED') AS granted
FROM performance_schema.metadata_locks AS waits
JOIN performance_schema.threads AS ours ON ours.thread_id = waits.owner_thread_id AND ours.processlist_id = :waiting
JOIN performance_schema.metadata_locks AS other
  ON other.object_type = waits.object_type AND other.object_schema <=> waits.object_schema
  AND other.object_name <=> waits.object_name AND other.owner_thread_id <> waits.owner_thread_id
  AND (other.lock_status = 'GRANTED' OR other.lock_type = 'EXCLUSIVE')
  AND NOT (other.object_type IN ('GLOBAL', 'COMMIT', 'BACKUP LOCK') AND other.lock_type LIKE 'INTENTION%')
JOIN performance_schema.threads AS threads ON threads.thread_id = other.owner_thread_id
JOIN information_schema.processlist AS process ON process.id = threads.processlist_id
LEFT JOIN information_schema.innodb_trx AS blocking ON blocking.trx_mysql_thread_id = threads.processlist_id
WHERE waits.lock_status = 'PENDING'
GROUP BY 1, 2, 3, 4, 5, 6, 7
ORDER BY since_s DESC
LIMIT 3

-- name: mariadb_table
-- The plugin metadata_lock_info, where it is installed, knows who has a lock and not who waits for one.
SELECT other.thread_id AS process, process.user, process.host, process.info, blocking.trx_id,
       TIMESTAMPDIFF(SECOND, blocking.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s,
       process.time AS since_s, 1 AS granted
FROM information_schema.metadata_lock_info AS other
JOIN information_schema.processlist AS process ON process.id = other.thread_id
LEFT JOIN information_schema.innodb_trx AS blocking ON blocking.trx_mysql_thread_id = other.thread_id
WHERE other.thread_id <> :waiting AND other.lock_mode NOT LIKE '%INTENTION%'
  AND (other.table_schema = DATABASE() OR other.table_name = '')
GROUP BY 1, 2, 3, 4, 5, 6, 7
ORDER BY since_s DESC
LIMIT 3

-- name: state
-- A user sees its own connections without any grant. What ours waits for, in the server's words.
SELECT state FROM information_schema.processlist WHERE id = :waiting
