"""Runs real threads one at a time, on simulated time, in an order that a stream of choices gives.

Each task is a thread. It runs alone until its next step (a call to a store, a sleep, a wait, the start of another thread); there
the choices say which task goes on. Nothing runs between two steps, so that the same choices give the same history.

A `Process` is a group of tasks that can be killed (each of its tasks gets `Killed` at its next step) and paused. Time advances
a little with each step, and to the next alarm when every task waits: an hour costs nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from auditexport_tests.simulation.choices import Choices

STEP_S = 0.001


class Killed(BaseException):
    """Ends a task of a process that was killed."""


class Stuck(Exception):
    """Every task waits, and no alarm will wake one; or a history has more steps than it may."""


@dataclass(eq=False)
class Process:
    """What lives and dies together: a run, a drain at the prompt, an application's connection."""

    name: str
    dead: bool = False
    paused_until_s: float = 0.0
    plan: str | None = None  # the key of the plan under which a step works


NOBODY = Process("")


@dataclass(eq=False)
class Task:
    """A thread of a process. It may go on when `ready()` holds, or when its alarm is over."""

    name: str
    process: Process
    baton: threading.Lock = field(default_factory=threading.Lock)
    ready: Callable[[], bool] | None = None  # None: it is not waiting
    alarm_s: float | None = None
    done: bool = False


class Scheduler:
    """One history. `spawn` the first tasks, then `run`."""

    def __init__(self, choices: Choices, *, most_steps: int = 40_000) -> None:
        self.choices = choices
        self.now_s = 0.0
        self.steps = 0
        self.story: list[tuple[float, str, str]] = []
        self.errors: list[BaseException] = []
        self._most_steps = most_steps
        self._tasks: list[Task] = []
        self._current: Task | None = None
        self._over = threading.Lock()
        self._over.acquire()
        # Some histories change tasks at each step, some seldom: both find what the other does not.
        self._change = (1000, 300, 50)[choices.below(3)]

    # ── from outside ─────────────────────────────────────────────────────────────────────────────

    def spawn(self, name: str, work: Callable[[], object], process: Process) -> Task:
        """Adds a task. It begins when a choice gives it the baton."""
        task = Task(name=name, process=process)
        task.baton.acquire()
        self._tasks.append(task)
        _threads.run(lambda: self._life(task, work))
        return task

    def run(self) -> None:
        """Runs all tasks to their ends. Raises `Stuck`, or the first error that a task did not expect."""
        if self._tasks:
            self._hand_over(None)
            self._over.acquire()
        if self.errors:
            raise self.errors[0]

    @contextmanager
    def taking_part(self, name: str) -> Iterator[None]:
        """The calling thread is a task until the block ends; then all others run to their ends, as in `run`."""
        task = Task(name=name, process=Process(name))
        task.baton.acquire()
        self._tasks.append(task)
        self._current = task
        try:
            yield
        finally:
            task.done = True
            self._tasks.remove(task)
            self._hand_over(None)
            self._over.acquire()
        if self.errors:
            raise self.errors[0]

    def kill(self, process: Process) -> None:
        """Ends a process: its tasks get `Killed` where they stand, and what they would have sent is not sent."""
        process.dead = True

    # ── from a task ──────────────────────────────────────────────────────────────────────────────

    @property
    def current(self) -> Task:
        assert self._current is not None
        return self._current

    @property
    def acting(self) -> Task | None:
        """The task whose turn it is; None before the first one."""
        return self._current

    @property
    def process(self) -> Process:
        """The process at work; one without a name before the first task runs."""
        return self._current.process if self._current is not None else NOBODY

    def step(self, what: str) -> None:
        """A point where another task may go first. Raises `Killed` when this task's process is dead."""
        self.story.append((self.now_s, self.current.name, what))
        self.now_s += STEP_S
        self._pause(None, None)

    def tell(self, what: str) -> None:
        """A line of the story that is no step."""
        self.story.append((self.now_s, self.current.name, what))

    def sleep(self, seconds: float) -> None:
        self._pause(lambda: False, self.now_s + max(0.0, seconds))

    def wait(self, ready: Callable[[], bool], timeout_s: float | None = None) -> bool:
        """Waits until `ready()`; False when the time was over first."""
        if not ready():
            self._pause(ready, None if timeout_s is None else self.now_s + timeout_s)
        return ready()

    # ── the baton ────────────────────────────────────────────────────────────────────────────────

    def _pause(self, ready: Callable[[], bool] | None, alarm_s: float | None) -> None:
        task = self.current
        if task.process.dead:
            raise Killed(task.process.name)
        task.ready, task.alarm_s = ready, alarm_s
        self._hand_over(task)
        task.ready = task.alarm_s = None
        if task.process.dead:
            raise Killed(task.process.name)

    def _life(self, task: Task, work: Callable[[], object]) -> None:
        task.baton.acquire()
        try:
            if not task.process.dead:
                work()
        except Killed:
            pass
        except BaseException as error:
            self.errors.append(error)
            self._kill_all()
        task.done = True
        self._tasks.remove(task)
        self._hand_over(None)

    def _hand_over(self, task: Task | None) -> None:
        """Gives the baton to the next task, and returns when this one has it again."""
        chosen = self._choose(task)
        if chosen is task and task is not None:
            return
        self._current = chosen
        if chosen is None:
            self._over.release()
        else:
            chosen.baton.release()
        if task is not None:
            task.baton.acquire()
            self._current = task

    def _choose(self, task: Task | None) -> Task | None:
        self.steps += 1
        if self.steps > self._most_steps and not self.errors:
            self.errors.append(Stuck(f"more than {self._most_steps:,} steps: {self._waiting()}"))
            self._kill_all()
        while self._tasks:
            able = [one for one in self._tasks if self._able(one)]
            if able:
                if task in able and not self.choices.chance(self._change):
                    return task
                if task in able:
                    able.remove(task)
                    able.insert(0, task)  # type: ignore[arg-type]
                return self.choices.one_of(able)
            alarms = [at for one in self._tasks if (at := self._alarm(one)) is not None]
            if alarms:
                self.now_s = max(self.now_s, min(alarms))
            else:
                self.errors.append(Stuck(f"nothing will wake {self._waiting()}"))
                self._kill_all()
        return None

    def _able(self, task: Task) -> bool:
        if task.process.dead:
            return True
        if task.process.paused_until_s > self.now_s:
            return False
        return task.ready is None or task.ready() or (task.alarm_s is not None and task.alarm_s <= self.now_s)

    def _alarm(self, task: Task) -> float | None:
        paused = task.process.paused_until_s
        if task.ready is None or task.ready():
            return paused
        return None if task.alarm_s is None else max(task.alarm_s, paused)

    def _kill_all(self) -> None:
        for one in self._tasks:
            one.process.dead = True

    def _waiting(self) -> str:
        return ", ".join(one.name for one in self._tasks)


class _Threads:
    """Threads that are used again: a history has hundreds of tasks, and starting a thread costs more than a step."""

    def __init__(self) -> None:
        self._idle: list[_Worker] = []
        self._lock = threading.Lock()

    def run(self, work: Callable[[], object]) -> None:
        with self._lock:
            worker = self._idle.pop() if self._idle else _Worker(self._back)
        worker.give(work)

    def _back(self, worker: _Worker) -> None:
        with self._lock:
            self._idle.append(worker)


class _Worker:
    def __init__(self, back: Callable[[_Worker], None]) -> None:
        self._work: Callable[[], object] = lambda: None
        self._given = threading.Lock()
        self._given.acquire()
        self._back = back
        threading.Thread(target=self._run, name="simulation", daemon=True).start()

    def give(self, work: Callable[[], object]) -> None:
        self._work = work
        self._given.release()

    def _run(self) -> None:
        while True:
            self._given.acquire()
            self._work()
            self._back(self)


_threads = _Threads()
