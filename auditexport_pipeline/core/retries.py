"""How often a transient error is retried, and how long the wait before it is: in a drain and in Dagster's steps alike."""

from __future__ import annotations

import random

# With the waits between them, the retries outlast a restart or a failover of seconds, and stay within one lease. The next
# run handles longer ones.
RETRIES = 4
FIRST_WAIT_S = 1.0


def wait_s(retry: int) -> float:
    """Seconds to wait before this retry, counted from 0; twice as long each time, with jitter."""
    return FIRST_WAIT_S * 2.0**retry * random.uniform(0.5, 1.5)
