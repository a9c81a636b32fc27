-- Statements of `mysql/status.py`, beside the probe of the backlog. Every statement is bounded by an index that it reads in
-- order, and by a limit. READ COMMITTED on every connection; plain SELECTs lock nothing. Times are the server's.

-- name: now_ms
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms

-- name: open_batches
-- state_idx; the few that are open are sorted. No pks and no manifest, which are kilobytes each.
SELECT batch_id, state, version, row_count, owner, attempts, last_error, claimed_at_ms, lease_until_ms
FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state IN ('claimed', 'sealed', 'written', 'stopped')
ORDER BY batch_id LIMIT :row_limit

-- name: last_batches
-- Primary key, from its end; row 0 is not a batch.
SELECT batch_id, epoch, owner, state, row_count, counts, claimed_at_ms, sealed_at_ms, written_at_ms, exported_at_ms,
       verified_at_ms, lease_until_ms
FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY)
WHERE batch_id > 0 ORDER BY batch_id DESC LIMIT :row_limit

-- name: exported_since
-- exported_idx, from its end.
SELECT batch_id, epoch, owner, state, row_count, counts, claimed_at_ms, sealed_at_ms, written_at_ms, exported_at_ms,
       verified_at_ms, lease_until_ms
FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
WHERE exported_at_ms >= :from_ms ORDER BY exported_at_ms DESC LIMIT :row_limit

-- name: last_exported
-- exported_idx, its last entry.
SELECT exported_at_ms FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
WHERE exported_at_ms > 0 ORDER BY exported_at_ms DESC LIMIT 1

-- name: first_claimed
-- Primary key, first entry after the ledger's head.
SELECT claimed_at_ms FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY) WHERE batch_id > 0 ORDER BY batch_id LIMIT 1

-- name: not_swept
-- sweep_idx in its own order, covering: batches in one state whose rows are still in the outbox, oldest export first.
SELECT exported_at_ms FROM clickhouse_outbox_batch FORCE INDEX (sweep_idx)
WHERE state = :state AND swept_at_ms IS NULL AND exported_at_ms > 0
ORDER BY exported_at_ms LIMIT :row_limit

-- name: discrepant
-- state_idx in its own order.
SELECT batch_id, last_error FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state = 'discrepant' ORDER BY batch_id LIMIT :row_limit

-- name: view_failures
-- exported_idx, from its end, `searched` entries at most: the batches with a note on a view.
SELECT batch_id, last_error
FROM (
  SELECT batch_id, last_error FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
  WHERE exported_at_ms >= :from_ms ORDER BY exported_at_ms DESC LIMIT :searched
) AS recent
WHERE last_error LIKE 'view %' LIMIT :row_limit

-- name: cleared_often
-- exported_idx, from its end, `searched` entries at most. The batch of the last day whose rows were exported most often, and how
-- many batches of that day exported rows of its range again.
SELECT often.batch_id, often.row_count, often.generation,
       SUM(recent.first_pk <= often.last_pk AND recent.last_pk >= often.first_pk) AS again
FROM (
  SELECT batch_id, row_count, generation, first_pk, last_pk
  FROM (
    SELECT batch_id, row_count, generation, first_pk, last_pk FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
    WHERE exported_at_ms >= :from_ms ORDER BY exported_at_ms DESC LIMIT :searched
  ) AS day
  WHERE generation > :often ORDER BY generation DESC LIMIT 1
) AS often
JOIN (
  SELECT generation, first_pk, last_pk FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
  WHERE exported_at_ms >= :from_ms ORDER BY exported_at_ms DESC LIMIT :searched
) AS recent ON recent.generation > 0
GROUP BY 1, 2, 3

-- name: cleared_by_us
-- verb_idx. Requeues and repairs of the last day.
SELECT COUNT(*) AS n FROM clickhouse_outbox_action FORCE INDEX (verb_idx)
WHERE verb IN ('requeue', 'repair') AND at_ms >= :from_ms
