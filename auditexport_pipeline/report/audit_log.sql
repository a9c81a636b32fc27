-- What a report asks ClickHouse. `$table` is the table of a registered payload version.

-- name: server
SELECT version() AS version, currentDatabase() AS database_name

-- name: entries_by_hour
-- inserted_at: partitions and parts by its range, then the minmax index; one pass over the sort key. An event counts once,
-- as the view audit_logs shows it, but not by way of the view: its FINAL looks for copies of an entry in all of the
-- table, whatever the window. Here the copies of the window are compared by key.
SELECT intDiv(least(greatest(time, {low_ms:Int64}), {high_ms:Int64}) - {low_ms:Int64}, {step_ms:Int64}) AS bin,
       uniqExact(workspace_id, bucket, time, event_id) AS n
FROM $table
WHERE inserted_at >= {from_ms:Int64} AND inserted_at < {to_ms:Int64} AND inserted_at NOT IN {excluded:Array(Int64)}
GROUP BY bin
