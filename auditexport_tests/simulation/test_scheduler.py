"""The scheduler and the choices: the same seed is the same history, and a failing one is shrunk."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from auditexport_tests.simulation.choices import Choices, shortest
from auditexport_tests.simulation.concurrency import SimulatedPool
from auditexport_tests.simulation.scheduler import Killed, Process, Scheduler, Stuck

SEEDS = range(30)


def two_counters(choices: Choices) -> tuple[int, Scheduler]:
    """Two processes that read a number, let others go first, and write it back: an update can be lost."""
    scheduler = Scheduler(choices)
    number = [0]

    def count() -> None:
        for _ in range(5):
            read = number[0]
            scheduler.step("reads")
            number[0] = read + 1

    for name in ("one", "two"):
        scheduler.spawn(name, count, Process(name))
    scheduler.run()
    return number[0], scheduler


def test_the_numbers_that_were_taken_replay_a_history_exactly() -> None:
    """Without that, a failure that was found once is lost."""
    for seed in SEEDS:
        choices = Choices(seed)
        found, scheduler = two_counters(choices)
        again, replayed = two_counters(Choices(given=choices.taken))
        assert (again, replayed.story, replayed.now_s) == (found, scheduler.story, scheduler.now_s)


def test_some_seeds_lose_an_update_and_a_short_list_shows_it() -> None:
    """The control: if no order loses one, the scheduler changes tasks nowhere."""

    def loses(numbers: Sequence[int]) -> bool:
        return two_counters(Choices(given=numbers))[0] < 10

    losing = [choices.taken for seed in SEEDS if two_counters(choices := Choices(seed))[0] < 10]
    assert len(losing) > 5
    assert not loses([]), "zeros are the plain choices"
    short = shortest(losing[0], loses)
    assert loses(short)
    assert len(short) < 8


def test_an_hour_costs_nothing_and_alarms_come_in_order() -> None:
    """Leases, retries and pauses are minutes long."""
    scheduler = Scheduler(Choices(1))
    woken: list[tuple[float, str]] = []

    def sleep(seconds: float, name: str) -> None:
        scheduler.sleep(seconds)
        woken.append((scheduler.now_s, name))

    scheduler.spawn("long", lambda: sleep(3_600, "long"), Process("long"))
    scheduler.spawn("short", lambda: sleep(60, "short"), Process("short"))
    scheduler.run()
    assert [name for _, name in woken] == ["short", "long"]
    assert 3_600 <= scheduler.now_s < 3_601


def test_a_killed_process_takes_no_further_step() -> None:
    """All of its tasks end where they stand, those that wait too."""
    scheduler = Scheduler(Choices(2))
    run = Process("run")
    steps: list[str] = []
    ended: list[str] = []

    def work(name: str) -> None:
        try:
            for _ in range(100):
                scheduler.step("works")
                steps.append(name)
        except Killed:
            ended.append(name)
            raise

    def wait() -> None:
        try:
            scheduler.wait(lambda: False)
        except Killed:
            ended.append("waiting")
            raise

    def kill() -> None:
        scheduler.sleep(0.02)
        scheduler.kill(run)

    scheduler.spawn("working", lambda: work("working"), run)
    scheduler.spawn("waiting", wait, run)
    scheduler.spawn("killer", kill, Process("killer"))
    scheduler.run()
    assert sorted(ended) == ["waiting", "working"]
    assert len(steps) < 100


def test_a_pool_runs_as_many_calls_at_once_as_it_has_threads() -> None:
    """The real pipeline runs on it: its order and its bound are those of Python's pool."""
    scheduler = Scheduler(Choices(3))
    at_work = most = 0
    results: list[int] = []

    def call(number: int) -> int:
        nonlocal at_work, most
        at_work += 1
        most = max(most, at_work)
        scheduler.sleep(1)
        at_work -= 1
        return number * 2

    def work() -> None:
        with SimulatedPool(scheduler, 2, "pool") as pool:
            results.extend(pool.map(call, range(6)))

    scheduler.spawn("work", work, Process("work"))
    scheduler.run()
    assert results == [0, 2, 4, 6, 8, 10]
    assert most == 2


def test_tasks_that_wait_for_each_other_are_named() -> None:
    """A history that hangs must end, and say who waits."""
    scheduler = Scheduler(Choices(4))
    scheduler.spawn("one", lambda: scheduler.wait(lambda: False), Process("one"))
    with pytest.raises(Stuck, match="nothing will wake one"):
        scheduler.run()
