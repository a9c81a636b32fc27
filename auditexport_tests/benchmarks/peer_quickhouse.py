"""quickhouse, as its manual would have it: an incremental sync of the outbox by its pk, in its own environment.

What belongs here: that one call. What does not: imports of this project, which is not installed where this runs;
the table that is synced into, and its decoding, are made by `contenders`.

    python -I peer_quickhouse.py MYSQL_URL CLICKHOUSE_URL LAST_PK [--turns]
"""

from __future__ import annotations

import sys
from typing import Any
from urllib.parse import unquote, urlsplit

import quickhouse  # type: ignore[import-not-found]

mysql, clickhouse = urlsplit(sys.argv[1]), urlsplit(sys.argv[2])
SOURCE = quickhouse.MySQL(
    host=mysql.hostname,
    port=mysql.port or 3306,
    user=unquote(mysql.username or ""),
    password=unquote(mysql.password or ""),
    database=mysql.path.strip("/"),
)
# lz4: on loopback the processor is what is short.
TARGET = quickhouse.ClickHouse(
    f"http://{clickhouse.hostname}:{clickhouse.port}",
    database=clickhouse.path.strip("/") or "default",
    compression="lz4",
)


def drain() -> int:
    """What has a higher pk than the last sync saw; returns the rows written."""
    done: Any = quickhouse.sync(
        SOURCE,
        TARGET,
        dest_table="outbox_copy",
        source_table="clickhouse_outbox",
        include=["pk", "version", "payload"],
        mode="incremental",
        watermark="pk",
        key=["pk"],
        seed_watermark=sys.argv[3],
    )
    return int(done.rows_written)


if __name__ == "__main__":
    if sys.argv[4:] == ["--turns"]:
        for _ in sys.stdin:
            print("drained", drain(), flush=True)
    else:
        print(drain())
