-- The statements of an export. A payload version brings its pieces in a file of its own, such as `audit_log_v1.sql`;
-- `clickhouse/audit_log.py` inserts them here.
-- Statements that look for one export go by `inserted_at`: it is unique per block and has a minmax index.

-- name: insert
-- One block, one part: the squash limits are above any block. The WHERE is the fence: ClickHouse refuses an INSERT that
-- starts after its deadline (code 395).
INSERT INTO $table ($column_names) {settings}
SELECT $select FROM input('$input')
WHERE NOT throwIf(now64(3) > fromUnixTimestamp64Milli({deadline_ms:Int64}), 'auditexport: the deadline of this INSERT has passed')
FORMAT JSONEachRow

-- name: probe
-- Parses exactly as `insert` does and writes nothing.
INSERT INTO FUNCTION null('$columns') {settings}
SELECT $select FROM input('$input')
FORMAT JSONEachRow

-- name: now_ms
SELECT toUnixTimestamp64Milli(now64(3)) AS now_ms

-- name: holdings
-- minmax index on inserted_at, pruned to the partitions of these months. sum() of UInt64 wraps at 2^64. The time is of this
-- query; of several shards, the earliest.
SELECT inserted_at, count() AS rows, sum($fingerprint) AS fingerprint, sum($content AS content) AS content_sum,
       rows - uniqExact(content) AS copies, toUnixTimestamp64Milli(min(now64(3))) AS now_ms
FROM $table
WHERE inserted_at IN (SELECT arrayJoin({inserted_at_ms:Array(Int64)}))
GROUP BY inserted_at

-- name: entries_at
-- As holdings, entry by entry.
SELECT $entry
FROM $table
WHERE inserted_at = {inserted_at_ms:Int64}
LIMIT {most:UInt64}

-- name: entries_of
-- Primary key: the set is built before the table is read.
SELECT $entry
FROM $table
WHERE (workspace_id, bucket, time, event_id) IN (SELECT arrayJoin({keys:Array(Tuple(String, String, Int64, String))}))

-- name: keys_held
-- Primary key, and the minmax index on inserted_at. Reads no column but these five.
SELECT DISTINCT workspace_id, bucket, time, event_id, inserted_at
FROM $table
WHERE (workspace_id, bucket, time, event_id) IN (SELECT arrayJoin({keys:Array(Tuple(String, String, Int64, String))}))
  AND inserted_at IN (SELECT arrayJoin({inserted_at_ms:Array(Int64)}))

-- name: ids_held
-- Primary key by workspace, which is the sort key's first column. For rows of which nothing but these two ids is known.
SELECT DISTINCT workspace_id, event_id
FROM $table
WHERE workspace_id IN (SELECT arrayJoin({workspaces:Array(String)}))
  AND (workspace_id, event_id) IN (SELECT arrayJoin({ids:Array(Tuple(String, String))}))

-- name: named_by
-- Primary key by workspace. Entries that an erasure names and that had been exported when it was recorded.
SELECT count() AS entries
FROM $table
WHERE workspace_id = {workspace:String} AND ({event:String} = '' OR event_id = {event:String})
  AND time >= {from_ms:Int64} AND time < {to_ms:Int64} AND inserted_at <= {until_ms:Int64}

-- name: contents
-- The payloads through the same parser and the same SELECT as an INSERT, into the columns' types, and hashed as
-- they would be stored; nothing is written. One line a payload, in order.
SELECT $content_of_columns AS content
FROM (
  SELECT $typed_select
  FROM format('JSONEachRow', '$input', {payloads:String})
)

-- name: count_by_inserted_at
-- minmax index on inserted_at, pruned to the partitions in between; one column.
SELECT inserted_at, count() AS entries
FROM $table
WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
GROUP BY inserted_at

-- name: count_by_workspace
-- As count_by_inserted_at; two columns.
SELECT workspace_id, intDiv(inserted_at, 86400000) * 86400000 AS day_ms, count() AS entries
FROM $table
WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
GROUP BY workspace_id, day_ms

-- name: surplus
-- As count_by_inserted_at; groups by the sort key, so memory grows with the window's events. `same_slot` are copies under one
-- inserted_at, which only a requeue or a second INSERT makes; the others an event that the outbox holds twice.
SELECT sum(n) AS entries, sum(n - 1) AS copies, sum(n - slots) AS same_slot
FROM (
  SELECT count() AS n, uniqExact(inserted_at) AS slots
  FROM $table
  WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
  GROUP BY workspace_id, bucket, time, event_id
)

-- name: definition
-- With its columns and constraints; of a Distributed table also its local table.
SELECT create_table_query FROM system.tables
WHERE database = currentDatabase() AND name IN ({table:String}, concat({table:String}, '_local')) ORDER BY name

-- name: definition_age
-- How long the definition has been in force, by ClickHouse's clock; of a Distributed table also its local table.
SELECT min(dateDiff('second', metadata_modification_time, now())) AS age_s FROM system.tables
WHERE database = currentDatabase() AND name IN ({table:String}, concat({table:String}, '_local'))

-- name: canary
-- Made-up payloads through the parser, the SELECT and the column types of an INSERT; reads and writes no table. The types
-- are the table's own, and so are the expressions of its mirrors.
SELECT $shown FROM (SELECT $typed FROM format(JSONEachRow, '$input', {payloads:String}))
