"""A drain's memory is bounded by what its settings say, whatever the mix of row sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import sqlalchemy as sa

from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import events
from auditexport_tests.support.prompts import urls

MB = 1024**2
# As large as rows get where somebody puts a document into them: between two of those that a sample of 64 looks at.
SMALL_ROWS = 6_500
BURST_ROWS, BURST_ROW_BYTES = 80, 2 * MB
BATCH_BYTES = 8 * MB
# The interpreter with its libraries takes 100 MB, and each stage holds a batch with its copies.
MOST_MB = 180
# Not getrusage's maximum: that begins with what the parent had before exec.
_PROGRAM = """
import sys
from pathlib import Path
from auditexport_pipeline.cli import main
try:
    main(sys.argv[1:])
finally:
    (peak,) = (line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    print("peak", int(peak.split()[1]) // 1024, file=sys.stderr)
"""


@pytest.fixture
def burst(stack: Stack) -> int:
    """A few rows, the burst, and the other rows behind it; the number of all."""
    small = events(SMALL_ROWS)
    stack.put(*small[:7])
    payload = (
        """CONCAT('{"event_id":"large_', :n, '","time": 1700000000000,"workspace_id":"ws_1","bucket":"b","source":"s",', """
        """'"event":"e","description":"', REPEAT('x', :bytes), '","actor":{"type":"user","id":"u"}}')"""
    )
    with stack.outbox.engine.begin() as connection:
        for number in range(BURST_ROWS):
            connection.execute(
                sa.text(
                    "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) VALUES "
                    f"('audit_log.v1', 'ws_1', CONCAT('large_', :n), {payload}, UNIX_TIMESTAMP(NOW(3)) * 1000)"
                ),
                {"n": str(number), "bytes": BURST_ROW_BYTES},
            )
    with stack.outbox.engine.begin() as connection:
        connection.execute(
            sa.text(
                "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) VALUES "
                "('audit_log.v1', :workspace_id, :event_id, :payload, 1700000000000)"
            ),
            [dict(zip(("workspace_id", "event_id", "payload"), row, strict=True)) for row in small[7:]],
        )
    return SMALL_ROWS + BURST_ROWS


def test_a_burst_of_large_rows_stays_within_the_bytes_of_a_batch(stack: Stack, burst: int) -> None:
    """A sample that misses them says nothing about them: 855 MB were taken for a batch of 64."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "drain", "--batch-bytes", str(BATCH_BYTES)],
        env={**os.environ, **urls(stack)},
        capture_output=True,
        text=True,
        check=False,
    )
    peak_mb = int(done.stderr.rsplit("peak ", 1)[1].split()[0])
    print(f"peak RSS {peak_mb} MB")
    assert (done.returncode, stack.counts(), stack.pending()) == (0, (burst, burst), 0), done.stderr
    assert peak_mb < MOST_MB
