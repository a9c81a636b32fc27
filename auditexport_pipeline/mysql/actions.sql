-- The record of what operators did, `clickhouse_outbox_action`.

-- name: add
-- In the transaction of what it records.
INSERT INTO clickhouse_outbox_action (at_ms, verb, who, why, selection, row_count)
VALUES (CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED), :verb, :who, :why, :selection, :rows)

-- name: count
-- Primary key; in the transaction of the effect.
UPDATE clickhouse_outbox_action SET row_count = row_count + :rows WHERE action_id = :action_id

-- name: one
-- Primary key; no lock.
SELECT action_id, at_ms, verb, who, why, selection, row_count FROM clickhouse_outbox_action WHERE action_id = :action_id

-- name: last
-- Primary key, descending; no lock.
SELECT action_id, at_ms, verb, who, why, selection, row_count FROM clickhouse_outbox_action
ORDER BY action_id DESC LIMIT :row_limit

-- name: last_of_verb
-- verb_idx, from the end of one verb; no lock.
SELECT action_id, at_ms, verb, who, why, selection, row_count FROM clickhouse_outbox_action FORCE INDEX (verb_idx)
WHERE verb = :verb ORDER BY at_ms DESC, action_id DESC LIMIT :row_limit
