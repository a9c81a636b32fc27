-- Statements about a table's TTL. `$at` and `$condition` come from the table's own clause, as ClickHouse formats it.
-- No entry is read: the expressions are evaluated over values that are given.

-- name: table
SELECT engine, engine_full FROM system.tables
WHERE database = if({database:String} = '', currentDatabase(), {database:String}) AND name = {table:String}

-- name: over_stamps
-- For entries of which only inserted_at is known. ClickHouse compares with its own clock, as its merges do.
SELECT number, toUInt8(ifNull($condition, 0))
FROM (
  SELECT stamp.1 AS number, stamp.2 AS inserted_at
  FROM (SELECT arrayJoin(arrayZip(arrayEnumerate({stamps:Array(Int64)}), {stamps:Array(Int64)})) AS stamp)
)

-- name: over_keys
-- As over_stamps, for entries of which the sort key is known too.
SELECT number, toUInt8(ifNull($condition, 0))
FROM (
  SELECT key.1 AS number, key.2 AS workspace_id, key.3 AS bucket, key.4 AS time, key.5 AS event_id,
         {inserted_at:Int64} AS inserted_at
  FROM (
    SELECT arrayJoin(arrayZip(arrayEnumerate({times:Array(Int64)}), {workspaces:Array(String)}, {buckets:Array(String)},
                              {times:Array(Int64)}, {events:Array(String)})) AS key
  )
)

-- name: kept
-- The longest that an entry is kept, over a year of exports up to now: months and days differ in length.
SELECT max(toInt64(toUnixTimestamp(toDateTime($at))) * 1000 - inserted_at)
FROM (SELECT (toInt64(toUnixTimestamp(now())) - 86400 * arrayJoin(range(367))) * 1000 AS inserted_at)
