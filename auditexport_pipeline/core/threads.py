"""Threads, waits and elapsed time, for all of `core`. One place, so that tests can run the same code on simulated time.

What does not belong here: what time it is, which the databases tell.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, Protocol


class Event(Protocol):
    def is_set(self) -> bool: ...

    def set(self) -> None: ...

    def wait(self, timeout: float | None = None) -> bool: ...


class Semaphore(Protocol):
    def acquire(self) -> bool: ...

    def release(self) -> None: ...


class Threads:
    """Python's own threads and clock."""

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def start(self, work: Callable[[], object], name: str) -> None:
        threading.Thread(target=work, name=name, daemon=True).start()

    def pool(self, workers: int, name: str) -> Executor:
        return ThreadPoolExecutor(workers, thread_name_prefix=name)

    def future(self) -> Future[Any]:
        return Future()

    def event(self) -> Event:
        return threading.Event()

    def semaphore(self, value: int) -> Semaphore:
        return threading.Semaphore(value)


_current = Threads()


def monotonic() -> float:
    """Seconds since some moment, as `time.monotonic`."""
    return _current.monotonic()


def sleep(seconds: float) -> None:
    _current.sleep(seconds)


def start(work: Callable[[], object], name: str) -> None:
    """Runs `work` in a thread that does not keep the process alive."""
    _current.start(work, name)


def pool(workers: int, name: str) -> Executor:
    return _current.pool(workers, name)


def future() -> Future[Any]:
    return _current.future()


def event() -> Event:
    return _current.event()


def semaphore(value: int) -> Semaphore:
    return _current.semaphore(value)


@contextmanager
def replaced(threads: Threads) -> Iterator[None]:
    """Within the block, all of `core` runs on other threads and another clock."""
    global _current
    before, _current = _current, threads
    try:
        yield
    finally:
        _current = before
