"""dlt's reading half: `sql_database` with its pyarrow backend into local parquet files, in its own environment.

What belongs here: that one pipeline. What does not: imports of this project, which is not installed where this runs.
Its ClickHouse destination speaks the native protocol, which the embedded ClickHouse of this project has no port for.

    python -I peer_dlt.py MYSQL_URL DIRECTORY LAST_PK [--turns | --count]
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import dlt  # type: ignore[import-not-found]
import pyarrow.parquet
from dlt.destinations import filesystem  # type: ignore[import-not-found]
from dlt.sources.sql_database import sql_table  # type: ignore[import-not-found]

DIRECTORY = Path(sys.argv[2])
CHUNK_ROWS = 50_000


def drain() -> int:
    """What has a higher pk than the last run saw; returns 0, since the files are counted afterwards."""
    rows: Any = sql_table(
        credentials=sys.argv[1],
        table="clickhouse_outbox",
        backend="pyarrow",
        chunk_size=CHUNK_ROWS,
        included_columns=["pk", "version", "payload"],
        # Ranges are closed by default, and each last row is read and taken out again.
        incremental=dlt.sources.incremental("pk", initial_value=int(sys.argv[3]), range_start="open"),
    )
    PIPELINE.run(rows, loader_file_format="parquet", write_disposition="append")
    return 0


def count() -> int:
    """Rows in the files."""
    files = (DIRECTORY / "files").glob("outbox/clickhouse_outbox/*.parquet")
    return sum(pyarrow.parquet.ParquetFile(file).metadata.num_rows for file in files)


if __name__ == "__main__":
    if sys.argv[4:] == ["--count"]:
        print(count())
        sys.exit()
    PIPELINE = dlt.pipeline(
        pipeline_name="outbox",
        pipelines_dir=str(DIRECTORY / "pipelines"),
        destination=filesystem(bucket_url=(DIRECTORY / "files").as_uri()),
        dataset_name="outbox",
    )
    if sys.argv[4:] == ["--turns"]:
        for _ in sys.stdin:
            print("drained", drain(), flush=True)
    else:
        drain()
