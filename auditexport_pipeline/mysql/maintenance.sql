-- MySQL for requeue, sweep and reconcile, and for erasures.
-- READ COMMITTED on every connection: no gap is locked, and plain SELECTs lock nothing. Times are the server's.
-- A statement that says $pks is two: `…_between` for a range of pks, `…_in` for a list (`mysql/statements.py`).

-- ── the ledger over a window ────────────────────────────────────────────────────────────────────

-- name: inserted_between
-- inserted_idx, by pages of batch_id; no lock. A batch, also a requeue, is listed by the latest inserted_at of its blocks.
SELECT $batch_columns, swept_at_ms
FROM clickhouse_outbox_batch
WHERE inserted_at_ms >= :from_ms AND inserted_at_ms < :to_ms AND batch_id > :after_id
  AND state IN ('claimed', 'sealed', 'written', 'stopped', 'exported', 'verified', 'discrepant')
ORDER BY batch_id LIMIT :row_limit

-- name: held_between
-- last_pk_idx; no lock. Every batch, open or closed, that has rows in this range.
SELECT batch_id, state, pks FROM clickhouse_outbox_batch
WHERE last_pk >= :first_pk AND first_pk <= :last_pk AND batch_id > 0
  AND state IN ('claimed', 'sealed', 'written', 'stopped', 'exported', 'verified', 'discrepant')

-- name: batch_with
-- inserted_idx from this inserted_at on: another block of the batch can have a later one. For unknown entries only.
SELECT batch_id FROM clickhouse_outbox_batch
WHERE inserted_at_ms >= :inserted_at_ms AND manifest LIKE :in_manifest LIMIT 1

-- name: first_inserted
-- inserted_idx, first entry after the ledger's head.
SELECT MIN(inserted_at_ms) AS first_ms FROM clickhouse_outbox_batch WHERE batch_id > 0 AND inserted_at_ms > 0

-- name: ledger_stamps
-- exported_idx, covering.
SELECT DISTINCT exported_at_ms AS stamp_ms FROM clickhouse_outbox_batch WHERE exported_at_ms IS NOT NULL

-- name: reconciled
-- Primary key. A closed batch only; the next comparison starts from what was observed.
UPDATE clickhouse_outbox_batch
SET state = :state, last_error = :error, observed = :observed,
    verified_at_ms = COALESCE(verified_at_ms, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED))
WHERE batch_id = :batch_id AND state IN ('verified', 'discrepant')

-- ── the outbox's marks ──────────────────────────────────────────────────────────────────────────

-- name: outbox_stamps
-- drainer_pending_idx, one step per distinct deleted_at (loose scan).
SELECT DISTINCT deleted_at AS stamp_ms FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at >= :first_ms AND deleted_at <= :last_ms

-- name: marks_between
-- drainer_pending_idx, covering, in its own order.
SELECT pk, deleted_at AS stamp_ms FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at >= :first_ms AND deleted_at <= :last_ms AND version IN :versions
  AND CAST(CONVERT(version USING utf8mb4) AS BINARY) IN :exact_versions

-- name: count_stamped
-- drainer_pending_idx, covering.
SELECT COUNT(*) AS n FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx) WHERE deleted_at = :stamp_ms

-- name: stamped
-- drainer_pending_idx, covering; sorted.
SELECT pk FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at = :stamp_ms AND version IN :versions
  AND CAST(CONVERT(version USING utf8mb4) AS BINARY) IN :exact_versions ORDER BY pk

-- name: stamped_between
-- drainer_pending_idx, covering; sorted.
SELECT pk FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at >= :from_ms AND deleted_at < :to_ms ORDER BY pk

-- name: dead_among
-- Primary key, point by point; no lock.
SELECT letter.pk FROM clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
  ON $row_of_letter
WHERE letter.pk IN :pks AND letter.state != 'retried' ORDER BY letter.pk

-- name: outbox_ends
-- Primary key, both ends.
SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk FROM clickhouse_outbox

-- name: next_pk
-- Primary key, one step.
SELECT MIN(pk) AS pk FROM clickhouse_outbox WHERE pk >= :pk

-- name: marked_between
-- Primary key range; no lock. A condition that is not given is a constant. Ids compare by bytes: a collation may
-- call another tenant's id equal.
SELECT pk FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NOT NULL
  AND (:workspace_id IS NULL OR CAST(CONVERT(workspace_id USING utf8mb4) AS BINARY) = CAST(:workspace_id AS BINARY))
  AND (:any_event = 1 OR CAST(CONVERT(event_id USING utf8mb4) AS BINARY) IN :event_ids)
  AND (:from_event_ms IS NULL OR CAST(JSON_UNQUOTE(JSON_EXTRACT(payload, '$.time')) AS SIGNED) >= :from_event_ms)
  AND (:to_event_ms IS NULL OR CAST(JSON_UNQUOTE(JSON_EXTRACT(payload, '$.time')) AS SIGNED) < :to_event_ms)
ORDER BY pk

-- name: workspaces
-- Primary key; no lock.
SELECT workspace_id, COUNT(*) AS n FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks GROUP BY workspace_id

-- name: unmark
-- Primary key. Locks exactly the rows that it clears, for one short transaction.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = NULL WHERE $pks AND deleted_at IS NOT NULL

-- ── sweep ───────────────────────────────────────────────────────────────────────────────────────

-- name: sweepable
-- sweep_idx; no lock. swept_at_ms is set once all rows of a batch are gone, so a sweep that was interrupted goes on here.
SELECT $batch_columns, swept_at_ms
FROM clickhouse_outbox_batch FORCE INDEX (sweep_idx)
WHERE state = 'verified' AND swept_at_ms IS NULL AND exported_at_ms <= :before_ms AND batch_id > :after_id
ORDER BY batch_id LIMIT :row_limit

-- name: held_back
-- sweep_idx, covering. Due by age, and not verified.
SELECT COUNT(*) AS n FROM clickhouse_outbox_batch FORCE INDEX (sweep_idx)
WHERE state IN ('exported', 'discrepant') AND swept_at_ms IS NULL AND exported_at_ms <= :before_ms

-- name: discrepant_due
-- sweep_idx, then the primary key. Due by age, and discrepant.
SELECT batch_id, last_error FROM clickhouse_outbox_batch FORCE INDEX (sweep_idx)
WHERE state = 'discrepant' AND swept_at_ms IS NULL AND exported_at_ms <= :before_ms
ORDER BY exported_at_ms LIMIT 100

-- name: count_due
-- Primary key; no lock.
SELECT COUNT(*) AS n FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks AND deleted_at <= :before_ms

-- name: delete
-- Primary key: a DELETE takes no index hint, so the mark is compared as an expression that no index has.
-- READ COMMITTED: locks the rows that it deletes and no gap; a row that was requeued meanwhile is pending and stays.
DELETE FROM clickhouse_outbox WHERE $pks AND deleted_at + 0 <= :before_ms

-- name: count_swept
-- Primary key; in the transaction of the DELETE.
UPDATE clickhouse_outbox_batch SET swept_rows = swept_rows + :rows WHERE batch_id = :batch_id

-- name: record_swept
-- Primary key.
UPDATE clickhouse_outbox_batch SET swept_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)
WHERE batch_id = :batch_id AND swept_at_ms IS NULL

-- name: compactable
-- sweep_idx; no lock.
SELECT $batch_columns, swept_at_ms
FROM clickhouse_outbox_batch
WHERE state = 'verified' AND swept_at_ms IS NOT NULL AND exported_at_ms <= :before_ms ORDER BY batch_id LIMIT :row_limit

-- name: compact
-- Primary key. Ids, counts, times and digests stay; the pks go.
UPDATE clickhouse_outbox_batch SET state = 'compacted', pks = '', manifest = :manifest
WHERE batch_id = :batch_id AND state = 'verified' AND swept_at_ms IS NOT NULL

-- ── rows and erasures ────────────────────────────────────────────────────────────────────────

-- name: times
-- Primary key, point by point; no lock.
SELECT pk, created_at, deleted_at FROM clickhouse_outbox WHERE pk IN :pks

-- name: add_erasure
INSERT INTO clickhouse_outbox_erasure (action_id, workspace_id, event_id, from_ms, to_ms)
VALUES (:action_id, :workspace_id, :event_id, :from_ms, :to_ms)

-- name: erasures
-- Primary key; all of them: there are as many as requests to erase.
SELECT erasure.workspace_id, erasure.event_id, erasure.from_ms, erasure.to_ms, action.at_ms, action.who, action.why,
       action.selection
FROM clickhouse_outbox_erasure AS erasure
JOIN clickhouse_outbox_action AS action ON action.action_id = erasure.action_id
ORDER BY erasure.erasure_id
