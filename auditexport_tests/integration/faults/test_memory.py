"""A drain's settings bound its memory, for every mix of row sizes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from auditexport_tests.conftest import Stack
from auditexport_tests.support.builders import event, events, everything_once, insert
from auditexport_tests.support.prompts import urls

MB = 1024**2
# As large as rows get where an application puts a document into them, and between two of those that a sample of 64 measures.
SMALL_ROWS = 3_300
BURST_ROWS, BURST_ROW_BYTES = 40, 2 * MB
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
    insert(stack, small[:7])
    for number in range(BURST_ROWS):
        *ids, payload = event(f"large_{number}", description="@")
        before, after = payload.split("@")
        stack.sql(
            "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
            "VALUES ('audit_log.v1', :workspace_id, :event_id, CONCAT(:before, REPEAT('x', :bytes), :after), "
            "UNIX_TIMESTAMP(NOW(3)) * 1000)",
            workspace_id=ids[0],
            event_id=ids[1],
            before=before,
            after=after,
            bytes=BURST_ROW_BYTES,
        )
    insert(stack, small[7:])
    return SMALL_ROWS + BURST_ROWS


@pytest.mark.slow
def test_a_burst_of_large_rows_stays_within_the_bytes_of_a_batch(stack: Stack, burst: int) -> None:
    """The sample can miss the large rows: then a batch of 64 MB used 855 MB."""
    done = subprocess.run(
        [sys.executable, "-c", _PROGRAM, "drain", "--batch-bytes", str(BATCH_BYTES)],
        env={**os.environ, **urls(stack)},
        capture_output=True,
        text=True,
        check=False,
    )
    peak_mb = int(done.stderr.rsplit("peak ", 1)[1].split()[0])
    print(f"peak RSS {peak_mb} MB")
    assert done.returncode == 0, done.stderr
    everything_once(stack, burst)
    assert peak_mb < MOST_MB
