"""The two databases: `outbox` is MySQL, `audit_log` is ClickHouse, `setup` is the tables of both."""
