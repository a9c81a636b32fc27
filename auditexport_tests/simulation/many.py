"""Many simulated histories, on every core, and the shortest story of one that breaks a promise."""

from __future__ import annotations

import multiprocessing
import os
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import count

from auditexport_tests.simulation.choices import Choices, shortest
from auditexport_tests.simulation.history import Outcome, play

REPORT_EVERY_S = 30.0
# Histories that a worker plays between two reports to the main process.
AT_ONCE = 10
MOST_SHRINKING_TRIES = 400


@dataclass(kw_only=True)
class Totals:
    """What some histories came to, added up."""

    histories: int = 0
    steps: int = 0
    simulated_s: float = 0.0
    happened: Counter[str] = field(default_factory=Counter)
    events: int = 0
    entries: int = 0
    broken: dict[int, list[str]] = field(default_factory=dict)  # violations by seed

    def add(self, seed: int, outcome: Outcome) -> None:
        self.histories += 1
        self.steps += outcome.steps
        self.simulated_s += outcome.simulated_s
        self.happened += outcome.happened
        self.events += outcome.verdict.events
        self.entries += outcome.verdict.entries
        if outcome.violations:
            self.broken[seed] = outcome.violations

    def merge(self, other: Totals) -> None:
        self.histories += other.histories
        self.steps += other.steps
        self.simulated_s += other.simulated_s
        self.happened += other.happened
        self.events += other.events
        self.entries += other.entries
        self.broken |= other.broken

    def __str__(self) -> str:
        days = self.simulated_s / 86_400
        return (
            f"{self.histories:,} histories, {self.steps:,} steps, {days:,.0f} simulated days, {self.events:,} events, "
            f"{self.entries:,} entries, {len(self.broken)} with violations"
        )


def _seeds(first: int, worker: int, workers: int, histories: int | None) -> Iterator[int]:
    numbers = count(worker, workers)
    return (
        (first + number for number in numbers)
        if histories is None
        else iter(range(first + worker, first + histories, workers))
    )


def _work(
    first: int,
    worker: int,
    workers: int,
    histories: int | None,
    until_s: float,
    results: multiprocessing.SimpleQueue[Totals | None],
) -> None:
    totals = Totals()
    for seed in _seeds(first, worker, workers, histories):
        if time.monotonic() > until_s:
            break
        totals.add(seed, play(Choices(seed)))
        if totals.histories == AT_ONCE:
            results.put(totals)
            totals = Totals()
    results.put(totals)
    results.put(None)


def simulate(first: int, seconds: float, histories: int | None = None, workers: int | None = None) -> Totals:
    """Plays histories from this seed on until the time is over, or so many. Prints how far it is."""
    workers = workers or os.cpu_count() or 1
    context = multiprocessing.get_context("spawn")
    results: multiprocessing.SimpleQueue[Totals | None] = context.SimpleQueue()
    began = reported = time.monotonic()
    processes = [
        context.Process(target=_work, args=(first, worker, workers, histories, began + seconds, results), daemon=True)
        for worker in range(workers)
    ]
    for process in processes:
        process.start()
    totals, at_work = Totals(), workers
    while at_work:
        some = results.get()
        if some is None:
            at_work -= 1
            continue
        for seed, violations in some.broken.items():
            print(f"seed {seed}: {'; '.join(line.splitlines()[-1] for line in violations)}", flush=True)
        totals.merge(some)
        if time.monotonic() - reported > REPORT_EVERY_S:
            reported = time.monotonic()
            print(f"{reported - began:5.0f} s: {totals}", flush=True)
    return totals


def first_broken(first: int, most: int) -> tuple[int, str] | None:
    """After how many histories from this seed on a promise was broken, and which; None if none was."""
    for number in range(most):
        violations = play(Choices(first + number)).violations
        if violations:
            return number + 1, violations[0].splitlines()[-1]
    return None


def story_of(outcome: Outcome) -> str:
    """The history as one can read it: time, who, what; then what was wrong, and the ledger."""
    lines = [f"{at_s:12.3f}  {who:28}  {what}" for at_s, who, what in outcome.story]
    return "\n".join([*lines, "", *outcome.violations, "", *outcome.verdict.ledger, ""])


def shrunk(seed: int) -> Outcome:
    """The shortest history that was found and that breaks the same promise as that of the seed."""
    outcome = play(Choices(seed))
    kind = _kind(outcome)
    best = shortest(
        outcome.choices, lambda given: _kind(play(Choices(given=given))) == kind, most_tries=MOST_SHRINKING_TRIES
    )
    return play(Choices(given=best))


def _kind(outcome: Outcome) -> str:
    """A violation without its numbers."""
    first = outcome.violations[0].splitlines()[-1] if outcome.violations else ""
    return "".join(letter for letter in first if not letter.isdigit())[:40]
