"""Threads, pools, events and the clock of a simulated process, with the interfaces of Python's own.

A program that takes these instead of `threading`, `time` and `concurrent.futures` runs on the scheduler.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import CancelledError, Future, InvalidStateError
from typing import Any, TypeVar

from auditexport_tests.simulation.scheduler import Killed, Scheduler

T = TypeVar("T")


class SimulatedFuture(Future[T]):
    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def result(self, timeout: float | None = None) -> T:
        self._scheduler.wait(self.done, timeout)
        return super().result(0)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._scheduler.wait(self.done, timeout)
        return super().exception(0)


class SimulatedEvent:
    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler
        self._set = False

    def is_set(self) -> bool:
        return self._set

    def set(self) -> None:
        self._set = True

    def wait(self, timeout: float | None = None) -> bool:
        return self._scheduler.wait(self.is_set, timeout)


class SimulatedSemaphore:
    def __init__(self, scheduler: Scheduler, value: int = 1) -> None:
        self._scheduler = scheduler
        self._value = value

    def acquire(self) -> bool:
        self._scheduler.wait(lambda: self._value > 0)
        self._value -= 1
        return True

    def release(self) -> None:
        self._value += 1


class SimulatedPool:
    """`ThreadPoolExecutor`: at most `max_workers` calls at once, in the order in which they were submitted."""

    def __init__(self, scheduler: Scheduler, max_workers: int, thread_name_prefix: str = "pool") -> None:
        self._scheduler = scheduler
        self._process = scheduler.current.process
        self._most = max_workers
        self._name = thread_name_prefix
        self._waiting: deque[Callable[[], None]] = deque()
        self._at_work = 0

    def __enter__(self) -> SimulatedPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()

    def submit(self, call: Callable[..., T], *arguments: Any, **named: Any) -> SimulatedFuture[T]:
        future: SimulatedFuture[T] = SimulatedFuture(self._scheduler)

        def work() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                future.set_result(call(*arguments, **named))
            except Killed:
                raise
            except BaseException as error:
                future.set_exception(error)

        self._waiting.append(work)
        if self._at_work < self._most:
            self._at_work += 1
            self._scheduler.spawn(f"{self._scheduler.current.process.name}/{self._name}", self._run, self._process)
        return future

    def map(self, call: Callable[[Any], T], items: Iterable[Any]) -> Iterator[T]:
        futures = [self.submit(call, item) for item in items]
        return (future.result() for future in futures)

    def shutdown(self, wait: bool = True) -> None:
        if wait:
            self._scheduler.wait(lambda: not self._at_work)

    def _run(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft()()
        finally:
            self._at_work -= 1


__all__ = [
    "CancelledError",
    "InvalidStateError",
    "SimulatedEvent",
    "SimulatedFuture",
    "SimulatedPool",
    "SimulatedSemaphore",
]
