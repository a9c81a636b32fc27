-- What `mysql/totals.py` asks the ledger. READ COMMITTED; plain SELECTs lock nothing.

-- name: first_open
-- state_idx, covering; the few that are open. Every batch below the lowest of them is closed, and a closed one stays so.
SELECT MIN(batch_id) AS batch_id FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state IN ('claimed', 'sealed', 'written', 'stopped')

-- name: totals
-- Primary key, a range of a bounded number of batches, in order. `counts` holds rows that a batch sent and could not mark.
SELECT COUNT(*) AS seen, MAX(batch_id) AS last_id, COALESCE(SUM(closed), 0) AS batches,
       COALESCE(SUM(closed * row_count), 0) AS sent_rows, COALESCE(SUM(closed * unmarked), 0) AS unmarked_rows,
       COALESCE(SUM(closed * entry_count), 0) AS entries, COALESCE(SUM(closed * bytes), 0) AS payload_bytes
FROM (
  SELECT batch_id, state NOT IN ('claimed', 'sealed', 'written', 'stopped') AS closed, row_count, entry_count, bytes,
         CAST(COALESCE(JSON_EXTRACT(NULLIF(counts, ''), '$.unmarked'), '0') AS UNSIGNED) AS unmarked
  FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY)
  WHERE batch_id > :after_id AND batch_id <= :to_id ORDER BY batch_id LIMIT :row_limit
) page

-- name: last_verified
-- exported_idx, from its end: batches are verified in about the order in which they were exported.
SELECT MAX(verified_at_ms) AS at_ms FROM (
  SELECT verified_at_ms FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
  WHERE exported_at_ms > 0 ORDER BY exported_at_ms DESC LIMIT :row_limit
) latest
