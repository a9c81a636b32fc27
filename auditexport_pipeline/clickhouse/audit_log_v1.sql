-- The ClickHouse half of payload version `audit_log.v1`: the pieces that `core/versions.py` asks of every version.

-- name: table
audit_logs_raw_v1

-- name: columns
-- In the order of `select`; with their types, so that a probe can parse into the same ones.
event_id String, time Int64, inserted_at Int64, workspace_id String, bucket LowCardinality(String),
source LowCardinality(String), event LowCardinality(String), description String,
actor_type LowCardinality(String), actor_id String, actor_name String, actor_meta JSON,
remote_ip String, user_agent String, meta JSON,
`targets.type` Array(LowCardinality(String)), `targets.id` Array(String), `targets.name` Array(String),
`targets.meta` Array(JSON), correlation_id String

-- name: input
-- The payload's own fields only: an unknown field is skipped even if it has the name of a column of ours.
-- A field that may be null has a Nullable type, or a Variant of one type where Nullable is not possible. The setting
-- input_format_null_as_default would also apply inside the metas, where [null] could become [[]] or [{}].
event_id String, time Int64, workspace_id String, bucket Nullable(String), source Nullable(String), event String,
description Nullable(String),
actor Variant(Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON))),
remote_ip Nullable(String), user_agent Nullable(String), meta Nullable(JSON),
targets Variant(Array(Tuple(type Nullable(String), id Nullable(String), name Nullable(String), meta Nullable(JSON)))),
correlation_id Nullable(String)

-- name: select
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

-- name: fingerprint
-- The same bytes as `core/event.py` hashes for this version, from the stored columns.
xxHash64(concat(
  event_id, '\0', toString(time), '\0', workspace_id, '\0', bucket, '\0', source, '\0', event, '\0', description, '\0',
  actor_type, '\0', actor_id, '\0', actor_name, '\0', remote_ip, '\0', user_agent, '\0', correlation_id, '\0',
  arrayStringConcat(arrayMap(value -> toString(value), targets.type), '\x01'), '\0',
  arrayStringConcat(targets.id, '\x01'), '\0', arrayStringConcat(targets.name, '\x01')))

-- name: content
-- Over every column as it is stored. The metas go as text: the mirrors are computed from them at the INSERT and
-- at every later UPDATE, and text is read faster than JSON. Merges do not change it.
cityHash64(
  event_id, time, inserted_at, workspace_id, bucket, source, event, description, actor_type, actor_id, actor_name,
  toJSONString(actor_meta), remote_ip, user_agent, $meta_text, targets.type, targets.id, targets.name,
  $targets_meta_text, correlation_id)

-- name: ddl
-- A block arrives as a compact part: with some ninety subcolumns, a wide part costs a file pair for each and
-- 25,000 rows took 69 µs a row instead of 50, and a drain of a million in blocks of 150,000 2 % longer. Merges make parts
-- wide once they are large.
-- merge_selector_base: parts of a size are merged when there are ten of them, not five. Ours are large already, a merge
-- costs as much as an INSERT, and of 40 blocks of 20,000 rows half as many rows were written again (docs/clickhouse.md).
CREATE TABLE IF NOT EXISTS audit_logs_raw_v1 (
  event_id String,
  time Int64,
  inserted_at Int64,
  workspace_id String,
  bucket LowCardinality(String),
  source LowCardinality(String) DEFAULT 'platform',
  event LowCardinality(String),
  description String,
  actor_type LowCardinality(String),
  actor_id String,
  actor_name String,
  actor_meta JSON,
  remote_ip String,
  user_agent String,
  meta JSON,
  meta_text String MATERIALIZED toJSONString(meta),
  `targets.type` Array(LowCardinality(String)),
  `targets.id` Array(String),
  `targets.name` Array(String),
  `targets.meta` Array(JSON),
  targets_meta_text String MATERIALIZED arrayStringConcat(arrayMap(target -> toJSONString(target), `targets.meta`), '\n'),
  correlation_id String,
  INDEX event_idx event TYPE set(100),
  INDEX actor_id_idx actor_id TYPE bloom_filter(0.01),
  INDEX targets_id_idx `targets.id` TYPE bloom_filter(0.01),
  INDEX correlation_id_idx correlation_id TYPE bloom_filter(0.01),
  INDEX meta_text_idx meta_text TYPE tokenbf_v1(32768, 3, 0),
  INDEX targets_meta_text_idx targets_meta_text TYPE tokenbf_v1(32768, 3, 0),
  INDEX inserted_at_idx inserted_at TYPE minmax
)
ENGINE = $engine
PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(inserted_at, 'UTC'))
ORDER BY (workspace_id, bucket, time, event_id)
TTL toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC')) + INTERVAL 90 DAY
SETTINGS $table_settings, min_bytes_for_wide_part = 536870912, merge_selector_base = 10
