-- Our tables in MySQL, and the application's outbox for tests and the demo.

-- name: ledger
CREATE TABLE IF NOT EXISTS clickhouse_outbox_batch (
  batch_id BIGINT UNSIGNED NOT NULL COMMENT 'counted up under the lock of row 0, which is not a batch',
  epoch BIGINT UNSIGNED NOT NULL COMMENT 'the plan that holds the batch; a higher one fences its predecessor off; 0 for a stopped one',
  generation INT UNSIGNED NOT NULL COMMENT '0 for a first export, more for a requeue',
  version VARCHAR(64) NOT NULL,
  state VARCHAR(16) NOT NULL COMMENT 'claimed, sealed, written, stopped, exported, verified, discrepant, compacted; head for row 0',
  owner VARCHAR(128) NOT NULL COMMENT 'root run id, or the process that drains',
  lease_until_ms BIGINT NOT NULL,
  claimed_rows INT UNSIGNED NOT NULL,
  row_count INT UNSIGNED NOT NULL COMMENT 'outbox rows to mark',
  entry_count INT UNSIGNED NOT NULL COMMENT 'entries sent to ClickHouse',
  bytes BIGINT UNSIGNED NOT NULL COMMENT 'payload bytes',
  first_pk BIGINT UNSIGNED NULL,
  last_pk BIGINT UNSIGNED NULL,
  pks MEDIUMTEXT NOT NULL COMMENT 'runs of pks: 1-9,11',
  manifest MEDIUMTEXT NOT NULL COMMENT 'blocks: number, inserted_at, pks, digest, fingerprint',
  counts VARCHAR(255) NOT NULL COMMENT 'rows that were dead, folded, vanished, marked elsewhere, released',
  digest VARCHAR(64) NOT NULL COMMENT 'seal of the content',
  previous_digest VARCHAR(64) NULL COMMENT 'kept free for a chain of seals',
  inserted_at_ms BIGINT NOT NULL COMMENT 'latest of the blocks; in row 0 the last one reserved',
  oldest_event_ms BIGINT NULL,
  newest_event_ms BIGINT NULL,
  attempts INT UNSIGNED NOT NULL COMMENT 'of writing',
  inserts_until_ms BIGINT NOT NULL DEFAULT 0 COMMENT 'by the clock of ClickHouse: until then an INSERT of it can be at work',
  last_error VARCHAR(1000) NOT NULL,
  claimed_at_ms BIGINT NOT NULL,
  sealed_at_ms BIGINT NULL,
  written_at_ms BIGINT NULL,
  exported_at_ms BIGINT NULL COMMENT 'the deleted_at of its rows',
  verified_at_ms BIGINT NULL,
  observed MEDIUMTEXT NULL COMMENT 'by inserted_at, what ClickHouse held when the batch was verified: entries and content, metas included',
  swept_at_ms BIGINT NULL COMMENT 'since when none of its rows is in the outbox any more',
  swept_rows INT UNSIGNED NOT NULL DEFAULT 0,
  claim_key VARCHAR(32) NOT NULL DEFAULT '' COMMENT 'random, of the plan that holds the batch: an epoch can recur when a failover loses commits',
  process VARCHAR(160) NOT NULL DEFAULT '' COMMENT 'host:pid:boot-start of the process that holds the batch; empty where several do the steps',
  PRIMARY KEY (batch_id),
  KEY state_idx (state, batch_id),
  KEY last_pk_idx (last_pk, first_pk),
  KEY exported_idx (exported_at_ms),
  KEY inserted_idx (inserted_at_ms),
  KEY sweep_idx (state, swept_at_ms, exported_at_ms)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin

-- name: ledger_head
INSERT IGNORE INTO clickhouse_outbox_batch
  (batch_id, epoch, generation, version, state, owner, lease_until_ms, claimed_rows, row_count, entry_count, bytes,
   pks, manifest, counts, digest, inserted_at_ms, attempts, last_error, claimed_at_ms)
VALUES (0, 0, 0, '', 'head', '', 0, 0, 0, 0, 0, '', '[]', '', '', 0, 0, '', 0)

-- name: dead_letters
CREATE TABLE IF NOT EXISTS clickhouse_outbox_dead_letter (
  pk BIGINT UNSIGNED NOT NULL COMMENT 'of the outbox row, which stays where it is, unmarked',
  state VARCHAR(16) NOT NULL COMMENT 'open, discarded and held keep the row out of batches; retried and gone do not',
  version VARCHAR(64) NOT NULL,
  workspace_id VARCHAR(48) NOT NULL,
  event_id VARCHAR(48) NOT NULL,
  reason VARCHAR(64) NOT NULL,
  json_path VARCHAR(255) NOT NULL,
  detail VARCHAR(255) NOT NULL COMMENT 'types and codes, never payload text',
  batch_id BIGINT UNSIGNED NOT NULL,
  created_at_ms BIGINT NOT NULL,
  updated_at_ms BIGINT NOT NULL,
  action_id BIGINT UNSIGNED NULL COMMENT 'what an operator did with it last',
  PRIMARY KEY (pk),
  KEY letter_version_idx (state, version),
  KEY letter_pk_idx (state, pk),
  KEY letter_reason_idx (state, reason),
  KEY letter_workspace_idx (state, workspace_id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin

-- name: actions
CREATE TABLE IF NOT EXISTS clickhouse_outbox_action (
  action_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  at_ms BIGINT NOT NULL,
  verb VARCHAR(32) NOT NULL COMMENT 'requeue, repair, reconcile, retry, discard, sweep, compact, erasure',
  who VARCHAR(128) NOT NULL,
  why VARCHAR(1000) NOT NULL,
  selection TEXT NOT NULL COMMENT 'which: the filters as JSON; ids and times, never payload text',
  row_count BIGINT UNSIGNED NOT NULL,
  PRIMARY KEY (action_id),
  KEY at_idx (at_ms),
  KEY verb_idx (verb, at_ms)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin

-- name: erasures
CREATE TABLE IF NOT EXISTS clickhouse_outbox_erasure (
  erasure_id BIGINT UNSIGNED NOT NULL AUTO_INCREMENT,
  action_id BIGINT UNSIGNED NOT NULL COMMENT 'who, when, why',
  workspace_id VARCHAR(48) NOT NULL,
  event_id VARCHAR(48) NOT NULL COMMENT 'empty: every event of the workspace in the range',
  from_ms BIGINT NULL COMMENT 'event time, inclusive',
  to_ms BIGINT NULL COMMENT 'event time, exclusive',
  PRIMARY KEY (erasure_id),
  KEY workspace_idx (workspace_id, event_id)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = utf8mb4_bin

-- name: outbox
-- The application's table, by the contract; for the demo and the tests.
CREATE TABLE IF NOT EXISTS clickhouse_outbox (
  pk BIGINT UNSIGNED NOT NULL AUTO_INCREMENT PRIMARY KEY,
  version VARCHAR(64) NOT NULL,
  workspace_id VARCHAR(48) NOT NULL,
  event_id VARCHAR(48) NOT NULL,
  payload JSON NOT NULL,
  created_at BIGINT NOT NULL,
  deleted_at BIGINT UNSIGNED NULL,
  KEY drainer_pending_idx (deleted_at, version, pk)
) ENGINE = InnoDB DEFAULT CHARSET = utf8mb4 COLLATE = $collation

-- name: tables
SELECT LOWER(table_name) AS table_name FROM information_schema.tables WHERE table_schema = DATABASE()
