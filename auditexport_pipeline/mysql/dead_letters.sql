-- Dead letters: adding them, listing them, and what operators do with them.
-- Every secondary index of the table begins with the state and ends, as all of InnoDB's do, with the pk: one state
-- and one other column give pk order without sorting. Plain SELECTs lock nothing; times are the server's.
-- $index, $conditions, $column and $direction stand for names and for pieces of this file, never for data (`mysql/dead_letters.py`).

-- name: add
-- Primary key. A row whose retry failed again reopens its letter; another row of the same pk takes its place. Nothing but parameters between the parentheses:
-- only then does PyMySQL send many rows as one statement: a batch of 100,000 bad rows was fetched in 3.5 s instead of 8.
INSERT INTO clickhouse_outbox_dead_letter
  (pk, state, version, workspace_id, event_id, reason, json_path, detail, batch_id, created_at_ms, updated_at_ms)
VALUES
  (:pk, :state, :version, :workspace_id, :event_id, :reason, :json_path, :detail, :batch_id, :now_ms, :now_ms)
ON DUPLICATE KEY UPDATE
  created_at_ms = IF(version = VALUES(version) AND workspace_id = VALUES(workspace_id) AND event_id = VALUES(event_id),
                     created_at_ms, VALUES(created_at_ms)),
  version = VALUES(version), workspace_id = VALUES(workspace_id), event_id = VALUES(event_id),
  state = VALUES(state), reason = VALUES(reason), json_path = VALUES(json_path), detail = VALUES(detail),
  batch_id = VALUES(batch_id), updated_at_ms = VALUES(updated_at_ms)

-- ── reading ─────────────────────────────────────────────────────────────────────────────────────

-- name: page
-- The index of the narrowest condition, in its own order (see above), from the end of the page before; no lock.
SELECT letter.pk, letter.state, letter.version, letter.workspace_id, letter.event_id, letter.reason, letter.json_path,
       letter.detail, letter.batch_id, letter.created_at_ms, letter.updated_at_ms, letter.action_id
FROM clickhouse_outbox_dead_letter AS letter FORCE INDEX ($index)
WHERE $conditions AND letter.pk BETWEEN :first_pk AND :last_pk ORDER BY letter.pk $direction LIMIT :row_limit

-- name: page_pks
-- As page; covered by the index when state and one other condition are given.
SELECT letter.pk FROM clickhouse_outbox_dead_letter AS letter FORCE INDEX ($index)
WHERE $conditions AND letter.pk BETWEEN :first_pk AND :last_pk ORDER BY letter.pk LIMIT :row_limit

-- name: count
-- As page; one pass over what the index gives, covering when it groups by its own column. No lock.
SELECT letter.$column AS name, COUNT(*) AS n FROM clickhouse_outbox_dead_letter AS letter FORCE INDEX ($index)
WHERE $conditions GROUP BY letter.$column ORDER BY n DESC, name LIMIT :row_limit

-- name: one
-- Primary keys; no lock.
SELECT letter.pk, letter.state, letter.version, letter.workspace_id, letter.event_id, letter.reason, letter.json_path,
       letter.detail, letter.batch_id, letter.created_at_ms, letter.updated_at_ms, letter.action_id,
       held.pk AS outbox_pk, held.deleted_at
FROM clickhouse_outbox_dead_letter AS letter
LEFT JOIN clickhouse_outbox AS held
  ON $row_of_letter
WHERE letter.pk = :pk

-- name: payload
-- Primary key; no lock. The only statement about letters that reads a payload.
SELECT CAST(payload AS BINARY) AS payload FROM clickhouse_outbox WHERE pk = :pk

-- ── acting ──────────────────────────────────────────────────────────────────────────────────────

-- name: lock
-- Primary key, ascending; locks a chunk of letters until commit, so that two operators take turns. Not by an index
-- that has the state: a transaction that changes a state holds the letter and waits for its index entry; the two would deadlock.
SELECT pk FROM clickhouse_outbox_dead_letter FORCE INDEX (PRIMARY)
WHERE pk IN :pks AND state IN :states ORDER BY pk FOR UPDATE

-- name: pending
-- Primary keys, point by point; no lock on the outbox. If the row is deleted meanwhile, its letter becomes `retried` all the same.
SELECT letter.pk FROM clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
  ON $row_of_letter
  AND held.deleted_at IS NULL
WHERE letter.pk IN :pks ORDER BY letter.pk

-- name: change
-- Primary key; under lock, in the transaction of the action.
UPDATE clickhouse_outbox_dead_letter FORCE INDEX (PRIMARY)
SET state = :state, action_id = :action_id, updated_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)
WHERE pk IN :pks

-- name: gone
-- Primary key; under lock. Their last action, if any, stays.
UPDATE clickhouse_outbox_dead_letter FORCE INDEX (PRIMARY)
SET state = 'gone', updated_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)
WHERE pk IN :pks

-- ── rows that the table refuses, held until its definition changes ──────────────────────────────

-- name: held_versions
-- letter_version_idx, covering, the entries of one state; no lock.
SELECT DISTINCT version FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_version_idx) WHERE state = 'held'

-- name: release_held
-- letter_version_idx, the entries of one state and version; locks the rows that it changes, for one statement. Their
-- json_path holds the definition that refused them.
UPDATE clickhouse_outbox_dead_letter
SET state = 'retried', updated_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)
WHERE state = 'held' AND version = :version AND json_path != :definition

-- name: held_by_detail
-- letter_pk_idx, the entries of one state, at most as many as `looked_at`; no lock.
SELECT detail, COUNT(*) AS n
FROM (SELECT detail FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'held' LIMIT :looked_at) AS held
GROUP BY detail ORDER BY n DESC, detail LIMIT :row_limit
