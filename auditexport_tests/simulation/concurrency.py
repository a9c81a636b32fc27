"""`core.threads` on the scheduler: the core's threads, pools, futures, events and clock, in simulated order and time."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import Executor, Future
from typing import Any, TypeVar

from auditexport_pipeline.core.threads import Threads
from auditexport_tests.simulation.scheduler import Killed, Scheduler

T = TypeVar("T")


class SimulatedThreads(Threads):
    """Each thread, and each worker of a pool, is a task of the process that starts it."""

    def __init__(self, scheduler: Scheduler) -> None:
        self._scheduler = scheduler

    def monotonic(self) -> float:
        return self._scheduler.now_s

    def sleep(self, seconds: float) -> None:
        self._scheduler.sleep(seconds)

    def start(self, work: Callable[[], object], name: str) -> None:
        process = self._scheduler.current.process
        self._scheduler.spawn(f"{process.name}/{name}", work, process)

    def pool(self, workers: int, name: str) -> SimulatedPool:
        return SimulatedPool(self._scheduler, workers, name)

    def future(self) -> SimulatedFuture:
        return SimulatedFuture(self._scheduler)

    def event(self) -> SimulatedEvent:
        return SimulatedEvent(self._scheduler)

    def semaphore(self, value: int) -> SimulatedSemaphore:
        return SimulatedSemaphore(self._scheduler, value)


class SimulatedFuture(Future[Any]):
    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__()
        self._scheduler = scheduler

    def result(self, timeout: float | None = None) -> Any:
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


class SimulatedPool(Executor):
    """`ThreadPoolExecutor`: at most `workers` calls at once, begun in the order in which they were submitted."""

    def __init__(self, scheduler: Scheduler, workers: int, name: str) -> None:
        self._scheduler = scheduler
        self._process = scheduler.current.process
        self._most = workers
        self._name = name
        self._waiting: deque[Callable[[], None]] = deque()
        self._at_work = 0

    def submit(self, call: Callable[..., T], /, *arguments: Any, **named: Any) -> Future[T]:
        future = SimulatedFuture(self._scheduler)

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
            self._scheduler.spawn(f"{self._process.name}/{self._name}", self._run, self._process)
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        if wait:
            self._scheduler.wait(lambda: not self._at_work)

    def _run(self) -> None:
        try:
            while self._waiting:
                self._waiting.popleft()()
        finally:
            self._at_work -= 1
