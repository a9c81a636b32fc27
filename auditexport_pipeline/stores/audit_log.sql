-- Everything that is said to ClickHouse about exporting. A payload version `v` brings five pieces, named
-- `v.table`, `v.columns`, `v.input`, `v.select` and `v.fingerprint`; `stores/audit_log.py` puts them together.
-- Statements that look for one export go by `inserted_at`: it is unique per block and has a minmax index.

-- name: audit_log.v1.table
audit_logs_raw_v1

-- name: audit_log.v1.columns
-- In the order of `select`; with their types, so that a probe can parse into the same ones.
event_id String, time Int64, inserted_at Int64, workspace_id String, bucket LowCardinality(String),
source LowCardinality(String), event LowCardinality(String), description String,
actor_type LowCardinality(String), actor_id String, actor_name String, actor_meta JSON,
remote_ip String, user_agent String, meta JSON,
`targets.type` Array(LowCardinality(String)), `targets.id` Array(String), `targets.name` Array(String),
`targets.meta` Array(JSON), correlation_id String

-- name: audit_log.v1.input
-- The payload's own fields and nothing else: an unknown one is skipped even if it is named like a column of ours.
-- Whatever may be null says so in its type, a Variant of one type where Nullable cannot: null read as a default
-- (input_format_null_as_default) would be read so inside the metas too, where [null] could become [[]] or [{}].
event_id String, time Int64, workspace_id String, bucket Nullable(String), source Nullable(String), event String,
description Nullable(String),
actor Variant(Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON))),
remote_ip Nullable(String), user_agent Nullable(String), meta Nullable(JSON),
targets Variant(Array(Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON)))),
correlation_id Nullable(String)

-- name: audit_log.v1.select
-- assumeNotNull() of a null meta is {}; variantElement() of null targets is [].
event_id, time, {inserted_at_ms:Int64}, workspace_id, ifNull(bucket, ''),
if(ifNull(source, '') = '', 'platform', assumeNotNull(source)), event, ifNull(description, ''),
ifNull((variantElement(actor,
  'Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON))') AS who).type, ''),
ifNull(who.id, ''), ifNull(who.name, ''), assumeNotNull(who.meta),
ifNull(remote_ip, ''), ifNull(user_agent, ''), assumeNotNull(meta),
arrayMap(value -> ifNull(value, ''), (variantElement(targets,
  'Array(Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON)))') AS whom).type),
arrayMap(value -> ifNull(value, ''), whom.id), arrayMap(value -> ifNull(value, ''), whom.name),
arrayMap(value -> assumeNotNull(value), whom.meta), ifNull(correlation_id, '')

-- name: audit_log.v1.fingerprint
-- The same bytes as `core/event.py` hashes for this version, from the stored columns.
xxHash64(concat(
  event_id, '\0', toString(time), '\0', workspace_id, '\0', bucket, '\0', source, '\0', event, '\0', description, '\0',
  actor_type, '\0', actor_id, '\0', actor_name, '\0', remote_ip, '\0', user_agent, '\0', correlation_id, '\0',
  arrayStringConcat(arrayMap(value -> toString(value), targets.type), '\x01'), '\0',
  arrayStringConcat(targets.id, '\x01'), '\0', arrayStringConcat(targets.name, '\x01')))

-- name: audit_log.v1.content
-- Over every column as it is stored. The metas go as text: the mirrors are computed from them at the INSERT and
-- at every later UPDATE, and text is read faster than JSON. Merges do not change it.
cityHash64(
  event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name,
  toJSONString(actor_meta), remote_ip, user_agent, $meta_text, targets.type, targets.id, targets.name,
  $targets_meta_text, correlation_id)

-- name: insert
-- One block, one part: the squash limits are above any block. The WHERE is the fence: an INSERT that starts
-- after the lease of its run has ended is refused by ClickHouse itself (code 395), whoever sends it.
INSERT INTO $table ($column_names)
SELECT $select FROM input('$input')
WHERE NOT throwIf(now64(3) > fromUnixTimestamp64Milli({deadline_ms:Int64}), 'auditexport: the lease of this batch has ended')
FORMAT JSONEachRow

-- name: probe
-- Parses exactly as `insert` does and writes nothing.
INSERT INTO FUNCTION null('$columns')
SELECT $select FROM input('$input')
FORMAT JSONEachRow

-- name: now_ms
SELECT toUnixTimestamp64Milli(now64(3)) AS now_ms

-- name: holdings
-- minmax index on inserted_at, pruned to the partitions of these months. sum() of UInt64 wraps at 2^64.
SELECT inserted_at, count() AS rows, sum($fingerprint) AS fingerprint, sum($content AS content) AS content_sum,
       rows - uniqExact(content) AS copies
FROM $table
WHERE inserted_at IN {inserted_at_ms:Array(Int64)}
GROUP BY inserted_at

-- name: entries_at
-- As holdings, entry by entry.
SELECT workspace_id, bucket, time, event_id, inserted_at, $fingerprint AS fingerprint, $content AS content
FROM $table
WHERE inserted_at = {inserted_at_ms:Int64}

-- name: entries_of
-- Primary key: the four arrays are the sort key's columns, zipped.
SELECT workspace_id, bucket, time, event_id, inserted_at, $fingerprint AS fingerprint, $content AS content
FROM $table
WHERE (workspace_id, bucket, time, event_id) IN
  arrayZip({workspaces:Array(String)}, {buckets:Array(String)}, {times:Array(Int64)}, {events:Array(String)})

-- name: ids_held
-- Primary key by workspace, which is the sort key's first column. For rows of which nothing but these two ids is known.
SELECT DISTINCT workspace_id, event_id
FROM $table
WHERE workspace_id IN {workspaces:Array(String)}
  AND (workspace_id, event_id) IN arrayZip({workspaces:Array(String)}, {events:Array(String)})

-- name: contents
-- The payloads through the same parser and the same SELECT as an INSERT, into the columns' types, and hashed as
-- they would be stored; nothing is written. One line a payload, in order.
SELECT $content_of_columns AS content
FROM (
  SELECT $typed_select
  FROM format('JSONEachRow', '$input', {payloads:String})
)

-- name: slots_between
-- minmax index on inserted_at, pruned to the partitions in between.
SELECT DISTINCT inserted_at
FROM $table
WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
ORDER BY inserted_at

-- name: by_workspace
-- As slots_between; one pass over three columns.
SELECT workspace_id, intDiv(inserted_at, 86400000) * 86400000 AS day_ms, count() AS entries
FROM $table
WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
GROUP BY workspace_id, day_ms

-- name: surplus
-- As slots_between; groups by the sort key, so memory grows with the window's events. `same_slot` are copies under one
-- inserted_at, which only a requeue or a second INSERT makes; the others an event that the outbox holds twice.
SELECT sum(n) AS entries, sum(n - 1) AS copies, sum(n - slots) AS same_slot
FROM (
  SELECT count() AS n, uniqExact(inserted_at) AS slots
  FROM $table
  WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64}
  GROUP BY workspace_id, bucket, time, event_id
)

-- name: ttl
-- The table's definition: the server has no column for its TTL alone. A Distributed one has none; that under it has.
SELECT engine_full FROM system.tables
WHERE database = currentDatabase() AND name IN ({table:String}, concat({table:String}, '_local'))
