-- What is created beside the tables of the payload versions (such as audit_log_v1.sql).

-- name: distributed
-- Over the tables of the shards. The sharding key is inserted_at, which is the same for all rows of a block and for no
-- other block: a block goes whole to one shard, as one part under one token. A replay goes to the same shard, and so
-- does a requeue, whose copies can collapse only there.
CREATE TABLE IF NOT EXISTS $table$on_cluster AS $local
ENGINE = Distributed('$cluster', '$database', '$local', inserted_at)

-- name: audit_logs
-- The read side: each event once, also while two copies of it have not merged yet. Copies under different months are in
-- different partitions and never merge: FINAL shows one of them unless a profile sets
-- do_not_merge_across_partitions_select_final, so the view states it. A reader's filter still goes by the primary key.
CREATE VIEW IF NOT EXISTS audit_logs$on_cluster AS
SELECT *, meta_text, targets_meta_text FROM audit_logs_raw_v1 FINAL SETTINGS do_not_merge_across_partitions_select_final = 0

-- name: tables
SELECT name, engine FROM system.tables WHERE database = currentDatabase()
