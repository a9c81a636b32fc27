"""The retries of a transient error, in a drain and in Dagster's steps."""

from __future__ import annotations

import random

# With their waits, the retries outlast a restart or a failover of seconds, and end within one lease. After a longer
# outage the next run continues.
RETRIES = 4
FIRST_WAIT_S = 1.0


def wait_s(retry: int) -> float:
    """Seconds to wait before this retry, counted from 0; twice as long each time, with jitter."""
    return FIRST_WAIT_S * 2.0**retry * random.uniform(0.5, 1.5)
