"""Waiting for something to become true, with a deadline; a test never sleeps for a fixed time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def wait_until(condition: Callable[[], T], *, what: str, within_s: float = 60.0, every_s: float = 0.05) -> T:
    """Returns the first true value of `condition()`; raises `AssertionError` naming `what` after `within_s`."""
    deadline = time.monotonic() + within_s
    pause = threading.Event()
    while True:
        value = condition()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"waited {within_s:.0f} s in vain for {what}")
        pause.wait(every_s)
