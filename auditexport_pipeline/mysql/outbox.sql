-- Everything that is said to MySQL about exporting: the outbox, the ledger, the dead letters.
-- Isolation is READ COMMITTED on every connection; plain SELECTs lock nothing. Times are the server's.
-- The ledger's row 0 is not a batch: it is the ledger's lock, its plan counter and its last inserted_at.

-- name: now_ms
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms

-- ── planning ────────────────────────────────────────────────────────────────────────────────────

-- name: lock_ledger
-- Primary key. Locks the ledger's row 0 until commit, so planners take turns; nobody else waits for it.
SELECT epoch, inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE

-- name: count_plan
-- Primary key; under lock_ledger.
UPDATE clickhouse_outbox_batch SET epoch = :epoch WHERE batch_id = 0

-- name: reserve_inserted_at
-- Primary key; under lock_ledger. Keeps inserted_at strictly increasing even when the clock steps back.
UPDATE clickhouse_outbox_batch SET inserted_at_ms = :last_ms WHERE batch_id = 0

-- name: open_batches
-- state_idx; no lock. Read before the candidates: a batch that closes in between has marked its rows by then.
SELECT $batch_columns,
       IF(claim_key LIKE CONCAT(LOWER(HEX(epoch)), '-%'), process, '') AS at_work, -- as batch_holders
       lease_until_ms <= CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS lease_expired,
       lease_until_ms - CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS lease_left_ms
FROM clickhouse_outbox_batch
WHERE state IN ('claimed', 'sealed', 'written', 'stopped')
ORDER BY batch_id

-- name: states
-- state_idx, one step per state (loose scan); no lock.
SELECT state FROM clickhouse_outbox_batch GROUP BY state

-- name: in_state
-- state_idx; no lock. Asked for states only that this release does not know.
SELECT batch_id, pks FROM clickhouse_outbox_batch WHERE state = :state ORDER BY batch_id

-- name: candidates
-- drainer_pending_idx (deleted_at, version, pk) in its own order: `version = ?` keeps pk order, `IN` would
-- sort. No lock on the outbox, no watermark: a lower pk that commits late is simply there next time.
-- Covered by the index: measuring payloads here read every row twice and took a tenth of a drain.
-- The answer is runs of consecutive pks, made here: reading pks one by one took three times as long.
-- The index compares versions by the column's collation, which may pad, fold case or ignore letters: so once more by bytes.
SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
FROM (
  SELECT pk, pk - (ROW_NUMBER() OVER (ORDER BY pk) - 1) AS run
  FROM (
    SELECT pk FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
    WHERE deleted_at IS NULL AND version = :version AND pk >= :from_pk
      AND CAST(CONVERT(version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)
    ORDER BY pk
    LIMIT :row_limit
  ) AS page
) AS numbered
GROUP BY run
ORDER BY first_pk

-- name: holding_letters
-- letter_pk_idx, both ends of each state. Open and discarded letters and held rows stay out of batches; retried ones and those whose row
-- was gone do not.
SELECT MIN(first_pk) AS first_pk, MAX(last_pk) AS last_pk
FROM (
  SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
  FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'open'
  UNION ALL
  SELECT MIN(pk), MAX(pk)
  FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'discarded'
  UNION ALL
  SELECT MIN(pk), MAX(pk)
  FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'held'
) AS ends

-- name: candidates_beside_letters
-- The same where dead letters may lie among the rows: they do not count for the limit. Asking for each row's letter takes
-- half as long again, so not otherwise. By their primary key: NOT EXISTS would begin with all letters there ever were.
-- A letter holds the row that it was made of and no other of the same pk, so a row that has a letter is read itself.
SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
FROM (
  SELECT pk, pk - (ROW_NUMBER() OVER (ORDER BY pk) - 1) AS run
  FROM (
    SELECT outbox.pk
    FROM clickhouse_outbox AS outbox FORCE INDEX (drainer_pending_idx)
    LEFT JOIN clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
      ON letter.pk = outbox.pk AND letter.state IN ('open', 'discarded', 'held')
    LEFT JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
      ON held.pk = letter.pk
      AND CAST(CONVERT(held.version USING utf8mb4) AS BINARY) = CAST(letter.version AS BINARY)
      AND CAST(CONVERT(held.workspace_id USING utf8mb4) AS BINARY) = CAST(letter.workspace_id AS BINARY)
      AND CAST(CONVERT(held.event_id USING utf8mb4) AS BINARY) = CAST(letter.event_id AS BINARY)
    WHERE outbox.deleted_at IS NULL AND outbox.version = :version AND outbox.pk >= :from_pk AND held.pk IS NULL
      AND CAST(CONVERT(outbox.version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)
    ORDER BY outbox.pk
    LIMIT :row_limit
  ) AS page
) AS numbered
GROUP BY run
ORDER BY first_pk

-- name: payload_bytes
-- Primary key, point by point, for a sample and for the large rows of a read; no lock.
SELECT pk, OCTET_LENGTH(payload) AS bytes FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk IN :pks

-- name: last_batch_id
-- Primary key, last entry; under lock_ledger.
SELECT MAX(batch_id) AS batch_id FROM clickhouse_outbox_batch

-- name: add_batch
-- Under lock_ledger, which makes the new batch_id ours.
INSERT INTO clickhouse_outbox_batch
  (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count, entry_count, bytes,
   first_pk, last_pk, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms, claim_key, process)
VALUES
  (:batch_id, :epoch, :generation, :version, 'claimed', :owner,
   CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :lease_ms, :rows, :rows, 0, :bytes,
   :first_pk, :last_pk, :pks, :manifest, '', '', :inserted_at_ms, 0, '', CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED),
   :claim_key, :process)

-- name: adopt
-- Primary key; under lock_ledger. Epoch and key are the fence: whatever the old owner does is refused.
UPDATE clickhouse_outbox_batch
SET epoch = :epoch, claim_key = :claim_key, owner = :owner, process = :process,
    lease_until_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :lease_ms
WHERE batch_id = :batch_id

-- name: begin_lease_again
-- Primary key; under lock_ledger. Nothing else of the batch changes: its owner, if it lives, goes on.
UPDATE clickhouse_outbox_batch SET lease_until_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :lease_ms
WHERE batch_id = :batch_id

-- name: batch_holders
-- state_idx; no lock. A process is named by the release that wrote the key; one that writes none adopts and leaves it there.
SELECT owner, IF(claim_key LIKE CONCAT(LOWER(HEX(epoch)), '-%'), process, '') AS at_work,
       COUNT(*) AS batches, CAST(SUM(row_count) AS SIGNED) AS row_count, MAX(lease_until_ms) AS lease_until_ms,
       CAST(MAX(lease_until_ms) AS SIGNED) - CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS lease_left_ms
FROM clickhouse_outbox_batch WHERE state IN ('claimed', 'sealed', 'written', 'stopped')
GROUP BY owner, at_work ORDER BY owner, at_work

-- ── a batch's life ──────────────────────────────────────────────────────────────────────────────

-- name: leased
-- state_idx; no lock. All open batches of the plan: the last one of a long run must not expire while the first is written.
SELECT batch_id FROM clickhouse_outbox_batch WHERE epoch = :epoch AND claim_key = :claim_key AND state IN ('claimed', 'sealed', 'written')

-- name: renew
-- Primary key, ascending; locks those rows for one statement. Not by state_idx: a batch that changes its state at the
-- same time holds its row and wants its entry there, and the two would deadlock.
UPDATE clickhouse_outbox_batch FORCE INDEX (PRIMARY)
SET lease_until_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :lease_ms
WHERE batch_id IN :batch_ids AND epoch = :epoch AND claim_key = :claim_key AND state IN ('claimed', 'sealed', 'written')

-- name: unlocked
-- Primary key; locks those of these rows that nobody else holds, and leaves out the others.
SELECT batch_id FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY) WHERE batch_id IN :batch_ids ORDER BY batch_id FOR UPDATE SKIP LOCKED

-- name: batch
-- Primary key; no lock.
SELECT $batch_columns
FROM clickhouse_outbox_batch WHERE batch_id = :batch_id

-- name: fence
-- Primary key. Locks the batch's ledger row until commit, so that no planner adopts it in between.
SELECT epoch, claim_key, state, owner, digest FROM clickhouse_outbox_batch WHERE batch_id = :batch_id FOR UPDATE

-- name: fence_shared
-- Primary key. As `fence`, but chunks of one batch are marked at the same time under it.
SELECT epoch, claim_key, state, owner, digest FROM clickhouse_outbox_batch WHERE batch_id = :batch_id LOCK IN SHARE MODE

-- name: rows_between
-- Primary key range; no lock. Every integer of the range is the batch's own; a row that took its pk since can be of another
-- version, which is not read where one is asked for. Of a payload no more than `most_bytes`:
-- what one SELECT brings is bounded, and asking for lengths first would cost an ordinary row half as much again.
SELECT pk, event_id, workspace_id, deleted_at, LEFT(CAST(payload AS BINARY), :most_bytes) AS payload
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk BETWEEN :first_pk AND :last_pk
  AND (:version IS NULL OR CAST(CONVERT(version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY))
ORDER BY pk

-- name: rows_in
-- Primary key, point by point, for scattered pks (interleaved servers or versions); no lock.
SELECT pk, event_id, workspace_id, deleted_at, LEFT(CAST(payload AS BINARY), :most_bytes) AS payload
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk IN :pks
  AND (:version IS NULL OR CAST(CONVERT(version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY))
ORDER BY pk

-- name: cut
-- Primary key; under fence. A stopped batch that is cut again is a sealed one again: what its new owner has sent
-- can be running, so rows that change from here on stop it once more.
UPDATE clickhouse_outbox_batch
SET state = 'sealed', generation = COALESCE(:generation, generation),
    sealed_at_ms = COALESCE(sealed_at_ms, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)),
    row_count = :rows, entry_count = :entries, bytes = :bytes, first_pk = :first_pk, last_pk = :last_pk,
    pks = :pks, manifest = :manifest, counts = :counts, digest = :digest,
    inserted_at_ms = GREATEST(inserted_at_ms, :inserted_at_ms),
    oldest_event_ms = COALESCE(:oldest_ms, oldest_event_ms), newest_event_ms = COALESCE(:newest_ms, newest_event_ms),
    last_error = COALESCE(:note, last_error)
WHERE batch_id = :batch_id

-- name: begin_write
-- Primary key; under fence.
UPDATE clickhouse_outbox_batch
SET attempts = attempts + 1, lease_until_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :lease_ms
WHERE batch_id = :batch_id

-- name: stop
-- Primary key; under fence. The claim ends here, its own retries included, and the lease is set to when no INSERT of it can
-- run any more: until then nobody works on the batch.
UPDATE clickhouse_outbox_batch
SET state = 'stopped', epoch = 0, last_error = :error,
    lease_until_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + :wait_ms
WHERE batch_id = :batch_id

-- name: allow_inserts
-- Primary key; after renew, in its transaction. The longest that any run was allowed stands.
UPDATE clickhouse_outbox_batch SET inserts_until_ms = GREATEST(inserts_until_ms, :until_ms)
WHERE batch_id = :batch_id AND epoch = :epoch AND claim_key = :claim_key

-- name: record_written
-- Primary key; under fence. Fixes the stamp once, so that every row of the batch carries the same one. What is said of a
-- view stays with the batch: the view lacks its rows for good.
UPDATE clickhouse_outbox_batch
SET state = 'written', written_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED),
    exported_at_ms = COALESCE(exported_at_ms, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)),
    last_error = IF(last_error LIKE 'view %', last_error, '')
WHERE batch_id = :batch_id

-- name: mark_between
-- Primary key range. Locks exactly the rows it stamps (READ COMMITTED, no gaps), for one short transaction.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY)
SET deleted_at = :exported_at_ms
WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at IS NULL

-- name: mark_in
-- Primary key, point by point; otherwise as mark_between.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY)
SET deleted_at = :exported_at_ms
WHERE pk IN :pks AND deleted_at IS NULL

-- name: outbox_checks
-- MariaDB's catalogue; no lock. The CHECKs that an UPDATE of a row evaluates.
SELECT check_clause FROM information_schema.check_constraints
WHERE constraint_schema = DATABASE() AND table_name = 'clickhouse_outbox'

-- name: update_triggers
-- The catalogue, of which a user sees the triggers of tables on which TRIGGER is granted; no lock.
SELECT trigger_name AS name, action_timing AS timing, action_statement AS statement FROM information_schema.triggers
WHERE event_object_schema = DATABASE() AND event_object_table = 'clickhouse_outbox' AND event_manipulation = 'UPDATE'
ORDER BY action_timing DESC, action_order

-- name: marked_between
-- Primary key range, rows that this transaction has just changed; no lock. `ids` tells them from rows that came under the
-- same pks since the seal.
SELECT COUNT(*) AS n, COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at = :exported_at_ms

-- name: marked_in
-- Primary key, point by point; otherwise as marked_between.
SELECT COUNT(*) AS n, COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk IN :pks AND deleted_at = :exported_at_ms

-- name: own_between
-- Primary key range; no lock. As marked_between, of rows that are to be marked too: before the first chunk of a batch that
-- another run wrote.
SELECT COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk BETWEEN :first_pk AND :last_pk AND (deleted_at IS NULL OR deleted_at = :exported_at_ms)

-- name: own_in
-- Primary key, point by point; otherwise as own_between.
SELECT COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk IN :pks AND (deleted_at IS NULL OR deleted_at = :exported_at_ms)

-- name: take_back_between
-- Primary key range; under fence_shared. Rows of another event that came under the batch's pks and got its stamp.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = NULL
WHERE pk BETWEEN :first_pk AND :last_pk AND deleted_at = :exported_at_ms

-- name: take_back_in
-- Primary key, point by point; otherwise as take_back_between.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = NULL WHERE pk IN :pks AND deleted_at = :exported_at_ms

-- name: lock_between
-- Primary key range. Locks the rows that nobody else holds, and leaves out the others. Asked only when a chunk could not be
-- marked as usual.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY)
WHERE pk BETWEEN :first_pk AND :last_pk ORDER BY pk FOR UPDATE SKIP LOCKED

-- name: lock_in
-- Primary key, point by point; otherwise as lock_between.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk IN :pks ORDER BY pk FOR UPDATE SKIP LOCKED

-- name: stamps_between
-- Primary key range; no lock. Of the rows that lock_between left out, those that there are.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk BETWEEN :first_pk AND :last_pk ORDER BY pk

-- name: stamps_in
-- Primary key, point by point; otherwise as stamps_between.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk IN :pks ORDER BY pk

-- name: record_exported
-- Primary key; under fence, in the transaction of the last chunk.
UPDATE clickhouse_outbox_batch SET state = 'exported', counts = :counts, lease_until_ms = 0, last_error = IF(last_error LIKE 'view %', last_error, '')
WHERE batch_id = :batch_id

-- name: leave_written
-- Primary key; under fence. Why its rows are not marked: the batch stays as it is, held by the ledger.
UPDATE clickhouse_outbox_batch SET last_error = :error WHERE batch_id = :batch_id AND state = 'written'

-- name: unverified
-- state_idx; no lock.
SELECT $batch_columns
FROM clickhouse_outbox_batch WHERE state = 'exported' ORDER BY batch_id LIMIT :row_limit

-- name: written_within
-- exported_idx, from its end: what was written is stamped then. A batch of nothing but dead letters says nothing.
SELECT 1 FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
WHERE exported_at_ms > CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - 1000 * :age_s AND version = :version AND entry_count > 0
LIMIT 1

-- name: moment
-- Primary key, last entry; no lock.
SELECT MAX(batch_id) AS batch_id, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms FROM clickhouse_outbox_batch

-- name: claimed_since
-- Primary key, from its end; no lock.
SELECT $batch_columns
FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY) WHERE batch_id > :after_id AND owner = :owner ORDER BY batch_id

-- name: discrepant_since
-- state_idx; no lock. Reconciliation keeps the time of the first verification.
SELECT batch_id, last_error FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state = 'discrepant' AND verified_at_ms >= :since_ms ORDER BY batch_id

-- name: sent_over
-- last_pk_idx; no lock. Batches with rows in this range of pks that may have sent something. New rows lie above every batch, so
-- a plan reads the few that overlap a late commit.
SELECT $batch_columns
FROM clickhouse_outbox_batch
WHERE last_pk >= :first_pk AND first_pk <= :last_pk
  AND state IN ('sealed', 'written', 'stopped', 'exported', 'verified', 'discrepant')
ORDER BY batch_id

-- name: record_verified
-- Primary key. The state guard lets two verifiers meet: the second changes nothing. The digest is that of what was compared.
UPDATE clickhouse_outbox_batch
SET state = :state, last_error = IF(:error = '' AND last_error LIKE 'view %', last_error, :error), observed = :observed,
    verified_at_ms = CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)
WHERE batch_id = :batch_id AND state = 'exported' AND digest = :digest

-- ── the backlog probe: O(1) in the size of the table ────────────────────────────────────────────

-- name: count_pending
-- drainer_pending_idx, covering; stops at row_limit. By bytes too, as `candidates`.
SELECT COUNT(*) AS n FROM
  (SELECT 1 FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
   WHERE deleted_at IS NULL AND version = :version
     AND CAST(CONVERT(version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)
   LIMIT :row_limit) AS pending

-- name: count_beside_letters
-- The same without the rows that dead letters hold, as `candidates_beside_letters`.
SELECT COUNT(*) AS n FROM
  (SELECT 1 FROM clickhouse_outbox AS outbox FORCE INDEX (drainer_pending_idx)
   LEFT JOIN clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
     ON letter.pk = outbox.pk AND letter.state IN ('open', 'discarded', 'held')
   LEFT JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
     ON held.pk = letter.pk
     AND CAST(CONVERT(held.version USING utf8mb4) AS BINARY) = CAST(letter.version AS BINARY)
     AND CAST(CONVERT(held.workspace_id USING utf8mb4) AS BINARY) = CAST(letter.workspace_id AS BINARY)
     AND CAST(CONVERT(held.event_id USING utf8mb4) AS BINARY) = CAST(letter.event_id AS BINARY)
   WHERE outbox.deleted_at IS NULL AND outbox.version = :version AND held.pk IS NULL
     AND CAST(CONVERT(outbox.version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)
   LIMIT :row_limit) AS pending

-- name: oldest_pending
-- drainer_pending_idx in order, the first rows that no dead letter holds. An age is taken from a created_at that can be
-- epoch milliseconds: after 2009, and no more than a clock's skew in the future. The others are counted.
SELECT now_ms - MIN(CASE WHEN sound THEN created_at END) AS lag_ms,
       SUM(CASE WHEN sound THEN 0 ELSE 1 END) AS odd_rows, MIN(CASE WHEN sound THEN NULL ELSE pk END) AS odd_pk
FROM (
  SELECT outbox.pk, outbox.created_at, CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) AS now_ms,
         COALESCE(outbox.created_at BETWEEN 1262304000000 AND CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) + 60000, 0) AS sound
  FROM clickhouse_outbox AS outbox FORCE INDEX (drainer_pending_idx)
  LEFT JOIN clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
    ON letter.pk = outbox.pk AND letter.state IN ('open', 'discarded', 'held')
  LEFT JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
    ON held.pk = letter.pk
    AND CAST(CONVERT(held.version USING utf8mb4) AS BINARY) = CAST(letter.version AS BINARY)
    AND CAST(CONVERT(held.workspace_id USING utf8mb4) AS BINARY) = CAST(letter.workspace_id AS BINARY)
    AND CAST(CONVERT(held.event_id USING utf8mb4) AS BINARY) = CAST(letter.event_id AS BINARY)
  WHERE outbox.deleted_at IS NULL AND outbox.version = :version AND held.pk IS NULL
    AND CAST(CONVERT(outbox.version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)
  ORDER BY outbox.pk LIMIT :row_limit
) AS oldest
GROUP BY now_ms

-- name: last_claim_ago
-- Primary key, last entry; before the first claim, when the ledger was created.
SELECT CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED) - COALESCE(
  (SELECT NULLIF(claimed_at_ms, 0) FROM clickhouse_outbox_batch ORDER BY batch_id DESC LIMIT 1),
  (SELECT UNIX_TIMESTAMP(create_time) * 1000 FROM information_schema.tables
   WHERE table_schema = DATABASE() AND table_name = 'clickhouse_outbox_batch')) AS ago_ms

-- name: pending_version_to_empty
-- drainer_pending_idx, the range before all versions that anybody means to use.
SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at IS NULL AND version <= '' ORDER BY version LIMIT 1

-- name: next_pending_version
-- drainer_pending_idx, one step per version present.
SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at IS NULL AND version > :version ORDER BY version LIMIT 1

-- name: versions_like
-- drainer_pending_idx, covering; stops after row_limit rows. What the column's collation takes for one version, by bytes.
SELECT CAST(CONVERT(version USING utf8mb4) AS BINARY) AS exact, COUNT(*) AS n FROM
  (SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
   WHERE deleted_at IS NULL AND version = :version LIMIT :row_limit) AS pending
GROUP BY exact

-- name: count_dead
-- letter_version_idx in its own order, covering.
SELECT state, version, COUNT(*) AS n FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_version_idx)
WHERE state IN ('open', 'discarded', 'held') GROUP BY state, version

-- name: dead_by_reason
-- letter_reason_idx, covering.
SELECT reason, COUNT(*) AS n FROM clickhouse_outbox_dead_letter WHERE state = 'open' GROUP BY reason ORDER BY n DESC, reason
