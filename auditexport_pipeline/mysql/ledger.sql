-- The ledger for `auditexport batches`: in pages, newest first. Plain SELECTs lock nothing.

-- name: $line
batch_id, epoch, generation, version, state, owner, claimed_rows, row_count AS `rows`, entry_count AS entries, bytes,
       attempts, digest, counts, first_pk, last_pk, claimed_at_ms, sealed_at_ms, written_at_ms, exported_at_ms,
       verified_at_ms, swept_at_ms, swept_rows, last_error, lease_until_ms - $now_ms AS lease_left_ms

-- name: page
-- Primary key, from its end.
SELECT $line FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY)
WHERE batch_id > 0 AND batch_id < :before_id
ORDER BY batch_id DESC LIMIT :row_limit

-- name: page_in_state
-- state_idx, from the end of one state.
SELECT $line FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state = :state AND batch_id > 0 AND batch_id < :before_id
ORDER BY batch_id DESC LIMIT :row_limit

-- name: one
-- Primary key.
SELECT $line FROM clickhouse_outbox_batch WHERE batch_id = :batch_id AND batch_id > 0
