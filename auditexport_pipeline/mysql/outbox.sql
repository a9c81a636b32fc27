-- The statements about exporting: the outbox, the ledger, the dead letters.
-- Every connection is READ COMMITTED; plain SELECTs lock nothing. Times are the server's.
-- Row 0 of the ledger is not a batch: it is the ledger's lock, the plan counter and the last inserted_at.
--
-- Names with a $ are fragments, for the statements of all files (`mysql/statements.py`). A statement with $pks exists
-- twice: NAME_between for a range of pks, NAME_in for a list of them.

-- name: $now_ms
CAST(UNIX_TIMESTAMP(NOW(3)) * 1000 AS SIGNED)

-- name: $batch_columns
-- What `outbox.batch_of` reads.
batch_id, epoch, generation, version, state, owner, claim_key, process, pks, manifest, bytes, counts, digest, attempts,
       inserts_until_ms, exported_at_ms, oldest_event_ms AS oldest_ms, newest_event_ms AS newest_ms, last_error, observed

-- name: $same_version
-- By bytes: the column's collation may pad, fold case or ignore letters.
CAST(CONVERT(version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)

-- name: $pending_without_letter
-- Pending rows of one version that no dead letter holds. A dead letter holds the row that it was made of, and no other
-- row that has the same pk. Letters are found by their primary key: NOT EXISTS would begin with all letters that ever
-- were.
clickhouse_outbox AS outbox FORCE INDEX (drainer_pending_idx)
  LEFT JOIN clickhouse_outbox_dead_letter AS letter FORCE INDEX (PRIMARY)
    ON letter.pk = outbox.pk AND letter.state IN ('open', 'discarded', 'held')
  LEFT JOIN clickhouse_outbox AS held FORCE INDEX (PRIMARY)
    ON $row_of_letter
  WHERE outbox.deleted_at IS NULL AND outbox.version = :version AND held.pk IS NULL
    AND CAST(CONVERT(outbox.version USING utf8mb4) AS BINARY) = CAST(:version AS BINARY)

-- name: $row_of_letter
-- Whether a row of the outbox, `held`, is the row of a dead letter, `letter`. A pk can begin again, and ids compare by bytes.
held.pk = letter.pk
    AND CAST(CONVERT(held.version USING utf8mb4) AS BINARY) = CAST(letter.version AS BINARY)
    AND CAST(CONVERT(held.workspace_id USING utf8mb4) AS BINARY) = CAST(letter.workspace_id AS BINARY)
    AND CAST(CONVERT(held.event_id USING utf8mb4) AS BINARY) = CAST(letter.event_id AS BINARY)

-- name: $view_note
-- A note on a failed view stays with the batch: the view lacks the batch's rows for good.
IF(last_error LIKE 'view %', SUBSTRING_INDEX(last_error, '; not marked: ', 1), '')

-- name: now_ms
SELECT $now_ms AS now_ms

-- ── planning ────────────────────────────────────────────────────────────────────────────────────

-- name: lock_ledger
-- Primary key. Locks the ledger's row 0 until the commit, so one plan is made at a time. Only plans wait for it.
SELECT epoch, inserted_at_ms FROM clickhouse_outbox_batch WHERE batch_id = 0 FOR UPDATE

-- name: count_plan
-- Primary key; under lock_ledger.
UPDATE clickhouse_outbox_batch SET epoch = :epoch WHERE batch_id = 0

-- name: reserve_inserted_at
-- Primary key; under lock_ledger. inserted_at increases strictly, also when the clock is set back.
UPDATE clickhouse_outbox_batch SET inserted_at_ms = :last_ms WHERE batch_id = 0

-- name: open_batches
-- state_idx; no lock. Read before the candidates: a batch that closes in between has marked its rows by then.
SELECT $batch_columns,
       IF(claim_key LIKE CONCAT(LOWER(HEX(epoch)), '-%'), process, '') AS at_work, -- as in batch_holders
       lease_until_ms <= $now_ms AS lease_expired, lease_until_ms - $now_ms AS lease_left_ms
FROM clickhouse_outbox_batch WHERE state IN ('claimed', 'sealed', 'written', 'stopped') ORDER BY batch_id

-- name: states
-- state_idx, one step per state (loose scan); no lock.
SELECT state FROM clickhouse_outbox_batch GROUP BY state

-- name: in_state
-- state_idx; no lock. Used only for states that this release does not know.
SELECT batch_id, pks FROM clickhouse_outbox_batch WHERE state = :state ORDER BY batch_id

-- name: candidates
-- drainer_pending_idx (deleted_at, version, pk) in its own order: `version = ?` keeps the order of pks, `IN` would
-- sort. No lock on the outbox and no watermark: a row that commits late with a lower pk is found by the next plan. The
-- index covers the statement: measuring payloads here would read every row twice, a tenth of a drain's time. The result
-- is runs of consecutive pks, because reading pks one by one took three times as long.
SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
FROM (
  SELECT pk, pk - (ROW_NUMBER() OVER (ORDER BY pk) - 1) AS run
  FROM (
    SELECT pk FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
    WHERE deleted_at IS NULL AND version = :version AND pk >= :from_pk AND $same_version
    ORDER BY pk
    LIMIT :row_limit
  ) AS page
) AS numbered
GROUP BY run
ORDER BY first_pk

-- name: holding_letters
-- letter_pk_idx, both ends of each state that holds rows.
SELECT MIN(first_pk) AS first_pk, MAX(last_pk) AS last_pk
FROM (
  SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
  FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'open'
  UNION ALL
  SELECT MIN(pk), MAX(pk) FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'discarded'
  UNION ALL
  SELECT MIN(pk), MAX(pk) FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_pk_idx) WHERE state = 'held'
) AS ends

-- name: candidates_beside_letters
-- As candidates, where dead letters can lie among the rows; rows that they hold do not count for the limit. Looking up
-- each row's letter takes half as long again, so this is used only where there are letters.
SELECT MIN(pk) AS first_pk, MAX(pk) AS last_pk
FROM (
  SELECT pk, pk - (ROW_NUMBER() OVER (ORDER BY pk) - 1) AS run
  FROM (
    SELECT outbox.pk FROM $pending_without_letter AND outbox.pk >= :from_pk
    ORDER BY outbox.pk
    LIMIT :row_limit
  ) AS page
) AS numbered
GROUP BY run
ORDER BY first_pk

-- name: payload_bytes
-- Primary key, point by point, for a sample and for the large rows of a read; no lock.
SELECT pk, OCTET_LENGTH(payload) AS bytes FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE pk IN :pks

-- name: add_batch
-- Under lock_ledger, so no other plan takes the batch_id.
INSERT INTO clickhouse_outbox_batch
  (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count, entry_count, bytes,
   first_pk, last_pk, pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms, claim_key, process)
VALUES
  (:batch_id, :epoch, :generation, :version, 'claimed', :owner, $now_ms + :lease_ms, :rows, :rows, 0, :bytes,
   :first_pk, :last_pk, :pks, :manifest, '', '', :inserted_at_ms, 0, '', $now_ms, :claim_key, :process)

-- name: adopt
-- Primary key; under lock_ledger. Epoch and key are the fence: effects of the old owner are refused from now on.
UPDATE clickhouse_outbox_batch
SET epoch = :epoch, claim_key = :claim_key, owner = :owner, process = :process, lease_until_ms = $now_ms + :lease_ms
WHERE batch_id = :batch_id

-- name: begin_lease_again
-- Primary key; under lock_ledger. Nothing else of the batch changes: if its owner is alive, it continues.
UPDATE clickhouse_outbox_batch SET lease_until_ms = $now_ms + :lease_ms WHERE batch_id = :batch_id

-- name: batch_holders
-- state_idx; no lock. The key's beginning shows that the process is of this epoch: a release that writes no key adopts
-- a batch and leaves the earlier process there.
SELECT owner, IF(claim_key LIKE CONCAT(LOWER(HEX(epoch)), '-%'), process, '') AS at_work,
       COUNT(*) AS batches, CAST(SUM(row_count) AS SIGNED) AS row_count, MAX(lease_until_ms) AS lease_until_ms,
       CAST(MAX(lease_until_ms) AS SIGNED) - $now_ms AS lease_left_ms
FROM clickhouse_outbox_batch WHERE state IN ('claimed', 'sealed', 'written', 'stopped')
GROUP BY owner, at_work ORDER BY owner, at_work

-- ── a batch's life ──────────────────────────────────────────────────────────────────────────────

-- name: leased
-- state_idx; no lock. All open batches of the plan: the last one must not expire while the first one is written.
SELECT batch_id FROM clickhouse_outbox_batch
WHERE epoch = :epoch AND claim_key = :claim_key AND state IN ('claimed', 'sealed', 'written')

-- name: renew
-- Primary key, ascending; locks the rows for one statement. Not by state_idx: a batch that changes its state at the
-- same time has locked its row and needs its entry in that index, and the two would deadlock.
UPDATE clickhouse_outbox_batch FORCE INDEX (PRIMARY) SET lease_until_ms = $now_ms + :lease_ms
WHERE batch_id IN :batch_ids AND epoch = :epoch AND claim_key = :claim_key AND state IN ('claimed', 'sealed', 'written')

-- name: unlocked
-- Primary key; locks those of these rows that nobody has locked, and leaves out the others.
SELECT batch_id FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY) WHERE batch_id IN :batch_ids
ORDER BY batch_id FOR UPDATE SKIP LOCKED

-- name: batch
-- Primary key; no lock.
SELECT $batch_columns FROM clickhouse_outbox_batch WHERE batch_id = :batch_id

-- name: fence
-- Primary key. Locks the batch's row of the ledger until the commit, so that no plan adopts it in between.
SELECT epoch, claim_key, state, owner, digest FROM clickhouse_outbox_batch WHERE batch_id = :batch_id FOR UPDATE

-- name: fence_batch
-- Primary key. As fence, for a step that needs the whole batch: that saves a second statement.
SELECT $batch_columns FROM clickhouse_outbox_batch WHERE batch_id = :batch_id FOR UPDATE

-- name: fence_shared
-- Primary key. As fence, for the chunks of one batch, which are marked at the same time.
SELECT epoch, claim_key, state, owner, digest FROM clickhouse_outbox_batch WHERE batch_id = :batch_id LOCK IN SHARE MODE

-- name: rows
-- Primary key; no lock. All pks of a range belong to the batch. A row that got such a pk since can have another
-- version, and is left out if :version is given. At most :most_bytes of each payload, so the result is bounded. Asking
-- for lengths first would make an ordinary row half as expensive again.
SELECT pk, event_id, workspace_id, deleted_at, LEFT(CAST(payload AS BINARY), :most_bytes) AS payload
FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks AND (:version IS NULL OR $same_version) ORDER BY pk

-- name: cut
-- Primary key; under fence. A stopped batch that is cut again is sealed again: INSERTs of its new owner can be at work,
-- so rows that change from now on stop it once more.
UPDATE clickhouse_outbox_batch
SET state = 'sealed', generation = COALESCE(:generation, generation), sealed_at_ms = COALESCE(sealed_at_ms, $now_ms),
    row_count = :rows, entry_count = :entries, bytes = :bytes, first_pk = :first_pk, last_pk = :last_pk,
    pks = :pks, manifest = :manifest, counts = :counts, digest = :digest,
    inserted_at_ms = GREATEST(inserted_at_ms, :inserted_at_ms),
    oldest_event_ms = COALESCE(:oldest_ms, oldest_event_ms), newest_event_ms = COALESCE(:newest_ms, newest_event_ms),
    last_error = COALESCE(:note, last_error)
WHERE batch_id = :batch_id

-- name: begin_write
-- Primary key; under fence.
UPDATE clickhouse_outbox_batch
SET attempts = attempts + 1, lease_until_ms = $now_ms + :lease_ms, inserts_until_ms = GREATEST(inserts_until_ms, :until_ms)
WHERE batch_id = :batch_id

-- name: stop
-- Primary key; under fence. Epoch 0 ends the claim, also for its own retries. The lease ends when no INSERT of the
-- batch can be at work any more; until then no plan adopts it.
UPDATE clickhouse_outbox_batch
SET state = 'stopped', epoch = 0, last_error = :error, lease_until_ms = $now_ms + :wait_ms
WHERE batch_id = :batch_id

-- name: allow_inserts
-- Primary key; after renew, in its transaction. The longest time that any run was allowed counts.
UPDATE clickhouse_outbox_batch SET inserts_until_ms = GREATEST(inserts_until_ms, :until_ms)
WHERE batch_id = :batch_id AND epoch = :epoch AND claim_key = :claim_key

-- name: record_written
-- Primary key; under fence. Fixes the stamp once, so that all rows of the batch get the same one.
UPDATE clickhouse_outbox_batch
SET state = 'written', written_at_ms = $now_ms, exported_at_ms = COALESCE(exported_at_ms, $now_ms), last_error = $view_note
WHERE batch_id = :batch_id

-- name: mark
-- Primary key. Locks only the rows that it stamps (READ COMMITTED, no gaps), for one short transaction.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY)
SET deleted_at = :exported_at_ms
WHERE $pks AND deleted_at IS NULL

-- name: outbox_checks
-- MariaDB's catalogue; no lock. The CHECKs that an UPDATE of a row evaluates.
SELECT check_clause FROM information_schema.check_constraints
WHERE constraint_schema = DATABASE() AND table_name = 'clickhouse_outbox'

-- name: update_triggers
-- The catalogue; no lock. A user sees the triggers of tables on which the user has the TRIGGER privilege.
SELECT trigger_name AS name, action_timing AS timing, action_statement AS statement FROM information_schema.triggers
WHERE event_object_schema = DATABASE() AND event_object_table = 'clickhouse_outbox' AND event_manipulation = 'UPDATE'
ORDER BY action_timing DESC, action_order

-- name: marked
-- Primary key; no lock. Rows that this transaction has just changed. `ids` shows whether they are the sealed rows, or
-- others that got the same pks since.
SELECT COUNT(*) AS n, COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks AND deleted_at = :exported_at_ms

-- name: own
-- Primary key; no lock. As marked, with the rows that are not marked yet: for a batch that another run wrote.
SELECT COALESCE(SUM(CRC32(CONVERT(event_id USING utf8mb4))), 0) AS ids
FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks AND (deleted_at IS NULL OR deleted_at = :exported_at_ms)

-- name: take_back
-- Primary key; under fence_shared. Rows of other events that came under the batch's pks and got its stamp.
UPDATE clickhouse_outbox FORCE INDEX (PRIMARY) SET deleted_at = NULL WHERE $pks AND deleted_at = :exported_at_ms

-- name: lock
-- Primary key. Locks the rows that nobody has locked, and leaves out the others. Used only when a chunk could not be
-- marked by one UPDATE.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks ORDER BY pk FOR UPDATE SKIP LOCKED

-- name: stamps
-- Primary key; no lock. The rows that lock left out, if they exist.
SELECT pk, deleted_at FROM clickhouse_outbox FORCE INDEX (PRIMARY) WHERE $pks ORDER BY pk

-- name: record_exported
-- Primary key; under fence, in the transaction of the last chunk.
UPDATE clickhouse_outbox_batch SET state = 'exported', counts = :counts, lease_until_ms = 0, last_error = $view_note
WHERE batch_id = :batch_id

-- name: leave_written
-- Primary key; under fence. Why rows of the batch are not marked, after the note on a failed view. The batch stays open and holds
-- its rows.
UPDATE clickhouse_outbox_batch
SET last_error = IF(last_error LIKE 'view %', LEFT(CONCAT(LEFT($view_note, 600), '; not marked: ', :error), 1000), :error)
WHERE batch_id = :batch_id AND state = 'written'

-- name: unverified
-- state_idx; no lock.
SELECT $batch_columns FROM clickhouse_outbox_batch WHERE state = 'exported' ORDER BY batch_id LIMIT :row_limit

-- name: written_within
-- exported_idx, from its end: a written batch has this stamp. A batch of nothing but dead letters does not count.
SELECT 1 FROM clickhouse_outbox_batch FORCE INDEX (exported_idx)
WHERE exported_at_ms > $now_ms - 1000 * :age_s AND version = :version AND entry_count > 0
LIMIT 1

-- name: moment
-- Primary key, last entry; no lock. Also for the next batch_id and inserted_at, under lock_ledger.
SELECT MAX(batch_id) AS batch_id, $now_ms AS now_ms FROM clickhouse_outbox_batch

-- name: claimed_since
-- Primary key, from its end; no lock.
SELECT $batch_columns
FROM clickhouse_outbox_batch FORCE INDEX (PRIMARY) WHERE batch_id > :after_id AND owner = :owner ORDER BY batch_id

-- name: discrepant_since
-- state_idx; no lock. Reconciliation does not change the time of the first verification.
SELECT batch_id, last_error FROM clickhouse_outbox_batch FORCE INDEX (state_idx)
WHERE state = 'discrepant' AND verified_at_ms >= :since_ms ORDER BY batch_id

-- name: sent_over
-- last_pk_idx; no lock. New rows lie above every batch, so a plan reads only the few batches around a late commit.
SELECT $batch_columns
FROM clickhouse_outbox_batch
WHERE last_pk >= :first_pk AND first_pk <= :last_pk
  AND state IN ('sealed', 'written', 'stopped', 'exported', 'verified', 'discrepant')
ORDER BY batch_id

-- name: record_verified
-- Primary key. Of two verifications at the same time, the second changes nothing, by the state. The digest is that of
-- the cut that was compared.
UPDATE clickhouse_outbox_batch
SET state = :state, last_error = IF(:error = '', $view_note, :error), observed = :observed, verified_at_ms = $now_ms
WHERE batch_id = :batch_id AND state = 'exported' AND digest = :digest

-- ── the backlog probe: O(1) in the size of the table ────────────────────────────────────────────

-- name: count_pending
-- drainer_pending_idx, covering; stops at row_limit.
SELECT COUNT(*) AS n FROM
  (SELECT 1 FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
   WHERE deleted_at IS NULL AND version = :version AND $same_version
   LIMIT :row_limit) AS pending

-- name: count_beside_letters
-- As count_pending, without the rows that dead letters hold.
SELECT COUNT(*) AS n FROM (SELECT 1 FROM $pending_without_letter LIMIT :row_limit) AS pending

-- name: oldest_pending
-- drainer_pending_idx in its order: the first rows that no dead letter holds. Only a created_at that can be epoch
-- milliseconds gives an age: after 2009, and not further in the future than clocks differ. The others are counted.
SELECT now_ms - MIN(CASE WHEN sound THEN created_at END) AS lag_ms,
       SUM(CASE WHEN sound THEN 0 ELSE 1 END) AS odd_rows, MIN(CASE WHEN sound THEN NULL ELSE pk END) AS odd_pk
FROM (
  SELECT outbox.pk, outbox.created_at, $now_ms AS now_ms,
         COALESCE(outbox.created_at BETWEEN 1262304000000 AND $now_ms + 60000, 0) AS sound
  FROM $pending_without_letter
  ORDER BY outbox.pk LIMIT :row_limit
) AS oldest
GROUP BY now_ms

-- name: last_claim_ago
-- Primary key, last entry; before the first claim, the time since the ledger was created.
SELECT $now_ms - COALESCE(
  (SELECT NULLIF(claimed_at_ms, 0) FROM clickhouse_outbox_batch ORDER BY batch_id DESC LIMIT 1),
  (SELECT UNIX_TIMESTAMP(create_time) * 1000 FROM information_schema.tables
   WHERE table_schema = DATABASE() AND table_name = 'clickhouse_outbox_batch')) AS ago_ms

-- name: pending_version_to_empty
-- drainer_pending_idx, the range before all versions with a name.
SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at IS NULL AND version <= '' ORDER BY version LIMIT 1

-- name: next_pending_version
-- drainer_pending_idx, one step per version.
SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
WHERE deleted_at IS NULL AND version > :version ORDER BY version LIMIT 1

-- name: versions_like
-- drainer_pending_idx, covering; stops after row_limit rows. The versions, by bytes, that the column's collation treats
-- as one.
SELECT CAST(CONVERT(version USING utf8mb4) AS BINARY) AS exact, COUNT(*) AS n FROM
  (SELECT version FROM clickhouse_outbox FORCE INDEX (drainer_pending_idx)
   WHERE deleted_at IS NULL AND version = :version LIMIT :row_limit) AS pending
GROUP BY exact

-- name: count_dead
-- letter_version_idx in its order, covering.
SELECT state, version, COUNT(*) AS n FROM clickhouse_outbox_dead_letter FORCE INDEX (letter_version_idx)
WHERE state IN ('open', 'discarded', 'held') GROUP BY state, version

-- name: dead_by_reason
-- letter_reason_idx, covering.
SELECT reason, COUNT(*) AS n FROM clickhouse_outbox_dead_letter WHERE state = 'open' GROUP BY reason ORDER BY n DESC, reason
