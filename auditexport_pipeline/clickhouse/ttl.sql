-- What is asked of ClickHouse about a table's TTL. `$at` and `$where` are parts of the table's own clause, as ClickHouse shows it.
-- No table of entries is read: the expressions are evaluated over values that are given.

-- name: table
SELECT engine, engine_full FROM system.tables
WHERE database = if({database:String} = '', currentDatabase(), {database:String}) AND name = {table:String}

-- name: of_slots
-- Of an entry nothing but its inserted_at is known. ClickHouse compares with its own clock, as its merges do.
SELECT number, toUInt8(ifNull(($at) <= now() + toIntervalSecond({ahead_s:Int64}), 0))
FROM (
  SELECT slot.1 AS number, slot.2 AS inserted_at
  FROM (SELECT arrayJoin(arrayZip(arrayEnumerate({slots:Array(Int64)}), {slots:Array(Int64)})) AS slot)
)

-- name: of_slots_where
SELECT number, toUInt8(ifNull(($where) != 0, 0))
FROM (
  SELECT slot.1 AS number, slot.2 AS inserted_at
  FROM (SELECT arrayJoin(arrayZip(arrayEnumerate({slots:Array(Int64)}), {slots:Array(Int64)})) AS slot)
)

-- name: of_keys
-- As of_slots, for entries of which the sort key is known too.
SELECT number, toUInt8(ifNull(($at) <= now() + toIntervalSecond({ahead_s:Int64}), 0))
FROM (
  SELECT key.1 AS number, key.2 AS workspace_id, key.3 AS bucket, key.4 AS time, key.5 AS event_id,
         {inserted_at:Int64} AS inserted_at
  FROM (
    SELECT arrayJoin(arrayZip(arrayEnumerate({times:Array(Int64)}), {workspaces:Array(String)}, {buckets:Array(String)},
                              {times:Array(Int64)}, {events:Array(String)})) AS key
  )
)

-- name: of_keys_where
SELECT number, toUInt8(ifNull(($where) != 0, 0))
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
