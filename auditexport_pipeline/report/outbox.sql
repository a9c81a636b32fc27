-- Counts by hour, by batch and by day over a window of exports, for a report.
-- Plain SELECTs at READ COMMITTED: no lock. Their cost grows with the window up to a limit.

-- name: server
SELECT VERSION() AS version, DATABASE() AS database_name

-- name: blocks
-- inserted_idx backwards, in its own order; no lock. First exports only: a requeue goes out under the same inserted_at.
SELECT batch_id, state, manifest, entry_count, swept_rows, swept_at_ms, inserted_at_ms
FROM clickhouse_outbox_batch FORCE INDEX (inserted_idx)
WHERE inserted_at_ms >= :from_ms AND inserted_at_ms < :before_ms AND batch_id > 0 AND generation = 0
ORDER BY inserted_at_ms DESC LIMIT :row_limit

-- name: hours_between
-- Primary key range, from the ledger; no lock. The outbox has no index on a time, so the pks of the window's batches say
-- where to look. The time is the event's own, which ClickHouse has too; any 64-bit integer, hence LEAST and GREATEST.
SELECT (LEAST(GREATEST(CAST(JSON_UNQUOTE(JSON_EXTRACT(payload, '$.time')) AS SIGNED), :low_ms), :high_ms) - :low_ms)
         DIV :step_ms AS bin, COUNT(*) AS n
FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk BETWEEN :first_pk AND :last_pk GROUP BY bin

-- name: hours_in
-- Primary key, point by point; otherwise as hours_between.
SELECT (LEAST(GREATEST(CAST(JSON_UNQUOTE(JSON_EXTRACT(payload, '$.time')) AS SIGNED), :low_ms), :high_ms) - :low_ms)
         DIV :step_ms AS bin, COUNT(*) AS n
FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk IN :pks GROUP BY bin

-- name: lag
-- exported_idx for the window, then one row of the outbox by primary key for each batch; no lock. A batch's lag is the age
-- of its first row when it was stamped; a swept one's, of its oldest event. Both are what an application wrote, any
-- 64-bit integer: what is not within longest_ms before the stamp and ahead_ms after it counts as undated.
SELECT :from_ms + bin * :step_ms AS at_ms, COUNT(*) AS batches, SUM(row_count) AS row_count,
       MAX(lag_ms) / 1000 AS worst_s, AVG(lag_ms) / 1000 AS mean_s, SUM(lag_ms IS NULL) AS undated
FROM (
  SELECT (batch.exported_at_ms - :from_ms) DIV :step_ms AS bin, batch.row_count,
         CASE WHEN COALESCE(outbox.created_at, batch.oldest_event_ms)
                   BETWEEN batch.exported_at_ms - :longest_ms AND batch.exported_at_ms + :ahead_ms
              THEN GREATEST(0, batch.exported_at_ms - COALESCE(outbox.created_at, batch.oldest_event_ms)) END AS lag_ms
  FROM clickhouse_outbox_batch AS batch FORCE INDEX (exported_idx)
  LEFT JOIN clickhouse_outbox AS outbox ON outbox.pk = batch.first_pk
  WHERE batch.exported_at_ms >= :from_ms AND batch.exported_at_ms < :to_ms AND batch.generation = 0
    AND batch.state IN ('exported', 'verified', 'discrepant', 'compacted')
) AS lags
GROUP BY bin

-- name: batches
-- inserted_idx backwards, in its own order; no lock. The newest of the window, requeues too.
SELECT batch_id, generation, state, row_count, entry_count, bytes, attempts, claimed_at_ms, sealed_at_ms, written_at_ms,
       verified_at_ms
FROM clickhouse_outbox_batch FORCE INDEX (inserted_idx)
WHERE inserted_at_ms >= :from_ms AND inserted_at_ms < :to_ms AND batch_id > 0
ORDER BY inserted_at_ms DESC LIMIT :row_limit

-- name: letters
-- Primary key backwards, at most row_limit letters: pks grow with time. No lock.
SELECT day_number, state, reason, COUNT(*) AS letters
FROM (SELECT created_at_ms DIV 86400000 AS day_number, state, reason FROM clickhouse_outbox_dead_letter FORCE INDEX (PRIMARY)
      ORDER BY pk DESC LIMIT :row_limit) AS newest
GROUP BY day_number, state, reason
