-- Who holds a lock that one of ours waits for. Both take PROCESS, and the first one SELECT on performance_schema too.
-- No lock. Start times are in the server's own time zone.

-- name: mysql
SELECT held.trx_mysql_thread_id AS process, process.user, process.host, held.trx_id,
       TIMESTAMPDIFF(SECOND, held.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s
FROM performance_schema.data_lock_waits AS waits
JOIN information_schema.innodb_trx AS held ON held.trx_id = waits.blocking_engine_transaction_id
JOIN information_schema.innodb_trx AS ours ON ours.trx_id = waits.requesting_engine_transaction_id
LEFT JOIN information_schema.processlist AS process ON process.id = held.trx_mysql_thread_id
WHERE ours.trx_mysql_thread_id = :waiting

-- name: mariadb
SELECT held.trx_mysql_thread_id AS process, process.user, process.host, held.trx_id,
       TIMESTAMPDIFF(SECOND, held.trx_started, CONVERT_TZ(NOW(), @@session.time_zone, 'SYSTEM')) AS open_s
FROM information_schema.innodb_lock_waits AS waits
JOIN information_schema.innodb_trx AS held ON held.trx_id = waits.blocking_trx_id
JOIN information_schema.innodb_trx AS ours ON ours.trx_id = waits.requesting_trx_id
LEFT JOIN information_schema.processlist AS process ON process.id = held.trx_mysql_thread_id
WHERE ours.trx_mysql_thread_id = :waiting
