-- The ClickHouse half of payload version `billing_event.v1`.

-- name: table
billing_events_v1

-- name: columns
event_id String, time Int64, inserted_at Int64, workspace_id String, bucket LowCardinality(String),
invoice_id String, amount_cents Int64, currency LowCardinality(String),
`lines.sku` Array(String), `lines.quantity` Array(Int64), note String

-- name: input
event_id String, time Int64, workspace_id String, invoice_id String, amount_cents Int64, currency String,
lines Array(Tuple(sku String, quantity Int64)), note Nullable(String)

-- name: select
event_id, time, {inserted_at_ms:Int64}, workspace_id, 'billing', invoice_id, amount_cents, currency,
arrayMap(line -> line.sku, lines), arrayMap(line -> line.quantity, lines), ifNull(note, '')

-- name: fingerprint
-- The texts of `_content` in billing.py, in its order.
xxHash64(concat(
  event_id, '\0', toString(time), '\0', workspace_id, '\0', invoice_id, '\0', toString(amount_cents), '\0', currency,
  '\0', note, '\0', arrayStringConcat(`lines.sku`, '\x01'), '\0',
  arrayStringConcat(arrayMap(quantity -> toString(quantity), `lines.quantity`), '\x01')))

-- name: content
cityHash64(
  event_id, time, inserted_at, workspace_id, bucket, invoice_id, amount_cents, currency, `lines.sku`, `lines.quantity`,
  note)

-- name: ddl
CREATE TABLE IF NOT EXISTS billing_events_v1 (
  event_id String,
  time Int64,
  inserted_at Int64,
  workspace_id String,
  bucket LowCardinality(String),
  invoice_id String,
  amount_cents Int64,
  currency LowCardinality(String),
  `lines.sku` Array(String),
  `lines.quantity` Array(Int64),
  note String,
  INDEX inserted_at_idx inserted_at TYPE minmax
)
ENGINE = $engine
PARTITION BY toYYYYMM(fromUnixTimestamp64Milli(inserted_at, 'UTC'))
ORDER BY (workspace_id, bucket, time, event_id)
TTL toDateTime(fromUnixTimestamp64Milli(inserted_at, 'UTC')) + INTERVAL 90 DAY
SETTINGS $table_settings
