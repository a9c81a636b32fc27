"""One simulated history: actions and faults in an order that choices give; then quiet, then the oracle."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

from auditexport_pipeline.core import claiming, reading, reconcile, requeue, retries, sweep, threads
from auditexport_pipeline.sql import load
from auditexport_tests.chaos.check import Verdict, verdict_of
from auditexport_tests.simulation import actors as actors
from auditexport_tests.simulation.actions import ACTIONS, weighted
from auditexport_tests.simulation.application import OUTBOX
from auditexport_tests.simulation.bounds import Bounds
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.concurrency import SimulatedThreads
from auditexport_tests.simulation.failovers import unexplained
from auditexport_tests.simulation.mysql_engine import outbox_on
from auditexport_tests.simulation.report_truth import false_report
from auditexport_tests.simulation.scheduler import Process, Stuck
from auditexport_tests.simulation.statements import run as statement
from auditexport_tests.simulation.status_truth import false_status
from auditexport_tests.simulation.truth import Truth
from auditexport_tests.simulation.world import LEDGER, World

# Blocks of a few rows, and chunks of a few batches.
SHORTENED: tuple[tuple[Any, str, int], ...] = (
    *((module, "SMALLEST_BLOCK_ROWS", 2) for module in (claiming, reading)),
    (claiming, "FIRST_BATCH_ROWS", 5),
    (requeue, "CHUNK_ROWS", 3),
    (sweep, "BATCHES_AT_ONCE", 2),
    (reconcile, "BATCHES_AT_ONCE", 2),
)
# How long a pause of the director, or of a process, can be.
PAUSES_S = (0.0, 0.05, 1.0, 20.0, 100.0)
# Quiet drains at the end. A batch that is stopped or split needs those after its INSERTs.
LAST_DRAINS = 20
# Simulated time within which everything that is at work ends once there are no faults.
QUIET_WITHIN_S = 7_200.0


class _Jitter:
    """In the place of the module `random`."""

    def __init__(self, choices: Choices) -> None:
        self._choices = choices

    def uniform(self, low: float, high: float) -> float:
        return low + (high - low) * self._choices.below(11) / 10


@dataclass(kw_only=True)
class Outcome:
    """What a history came to."""

    choices: list[int]
    steps: int = 0
    simulated_s: float = 0.0
    happened: Counter[str] = field(default_factory=Counter)
    verdict: Verdict = field(default_factory=Verdict)
    story: list[tuple[float, str, str]] = field(default_factory=list)

    @property
    def violations(self) -> list[str]:
        return self.verdict.violations


def play(choices: Choices, *, most_actions: int = 25) -> Outcome:
    """Plays one history to its end and judges it."""
    world = World(choices)
    outcome = Outcome(choices=choices.taken, happened=world.happened, story=world.scheduler.story)
    with ExitStack() as shortened:
        shortened.enter_context(threads.replaced(SimulatedThreads(world.scheduler)))
        shortened.enter_context(patch.object(retries, "random", _Jitter(choices)))
        for module, name, value in SHORTENED:
            shortened.enter_context(patch.object(module, name, value))
        verdicts: list[Verdict] = []
        world.scheduler.spawn("director", lambda: verdicts.append(_direct(world, most_actions)), Process("director"))
        try:
            world.scheduler.run()
            (outcome.verdict,) = verdicts
        except Stuck as error:
            outcome.verdict.violations.append(f"stuck: {error}")
        except Exception:
            outcome.verdict.violations.append(traceback.format_exc())
    outcome.verdict.violations += world.violations + world.invariants.broken
    outcome.steps, outcome.simulated_s = world.scheduler.steps, world.scheduler.now_s
    return outcome


def _direct(world: World, most_actions: int) -> Verdict:
    """The whole history: actions and pauses, then quiet, then the verdict."""
    transaction = world.mysql.begin(1.0)
    statement(transaction, load("mysql/schema.sql")["ledger_head"], {})
    transaction.commit()
    world.mysql.log.clear()  # no failover loses this
    names = weighted(world.choices)
    for _ in range(1 + world.choices.below(most_actions)):
        name = world.choices.one_of(names)
        world.happened[name] += 1
        world.scheduler.tell(f"── {name}")
        ACTIONS[name](world)
        world.scheduler.sleep(world.choices.one_of(PAUSES_S))
    world.scheduler.tell("── quiet")
    return _judged(world) if _settled(world) else Verdict()


def _settled(world: World) -> bool:
    """Ends all faults, and drains until nothing is open."""
    world.storm = 0
    world.mysql.down = False
    world.invariants.armed.clear()
    world.calm_clickhouse()
    for run in world.runs:
        run.process.paused_until_s = min(run.process.paused_until_s, world.scheduler.now_s)
    if not world.scheduler.wait(lambda: not world.at_work() and not world.others_at_work, QUIET_WITHIN_S):
        names = ", ".join(run.owner for run in world.at_work())
        return _violated(world, f"{names} did not end within {QUIET_WITHIN_S:.0f} s without faults")
    # The application goes on: until the table has taken a row, one that refuses all rows is taken for a table that is wrong.
    world.applications[0].write(plain=True)
    return _drained_quietly(world) and _reconciled_quietly(world)


def _violated(world: World, what: str) -> bool:
    world.violations.append(what)
    return False


def _drained_quietly(world: World) -> bool:
    for _ in range(LAST_DRAINS):
        run = world.drain(quiet=True)
        if not world.scheduler.wait(lambda run=run: run.ended, QUIET_WITHIN_S):  # type: ignore[misc]
            return _violated(world, "a quiet drain does not end")
        if run.error is not None:
            world.scheduler.sleep(30)
            continue
        if not world.open_batches(unverified=True) and not world.pending_rows():
            return True
        world.scheduler.sleep(30)
    return _violated(
        world,
        f"after {LAST_DRAINS} quiet drains, open: {world.open_batches(unverified=True)}, pending: {world.pending_rows()}",
    )


def _reconciled_quietly(world: World) -> bool:
    """A reconciliation names exactly the rows that other hands marked before they were exported."""
    # After a clock was set back, what was written and exported "later" than now is not in a reconciliation's window.
    times_ms = [row["created_at"] for row in world.mysql.tables[OUTBOX].rows.values()]
    last_ms = max(world.mysql.tables[LEDGER].rows[0]["inserted_at_ms"], *times_ms, 0)
    world.scheduler.sleep(max(0, last_ms + 1_000 - world.mysql.now_ms()) / 1000)
    for repaired in (False, True):
        absent, unsure = world.absent_rows(), world.named(world.unsure_rows())
        run = world.reconcile(repair=True)
        if not world.scheduler.wait(lambda run=run: run.ended, QUIET_WITHIN_S) or run.report is None:  # type: ignore[misc]
            return _violated(world, f"a quiet reconciliation did not end: {run.error}")
        world.violations += false_report(world, run.report)
        repaired_pks = set(run.report.missing_pks)
        found, lacking = world.named(repaired_pks) - unsure, world.named(absent) - unsure
        if found != lacking or (repaired and lacking):
            line = f"reconcile finds {sorted(found)} missing, the book {sorted(lacking)}, repaired {repaired}"
            return _violated(world, line)
        if not _drained_quietly(world):
            return False
    return True


def _judged(world: World) -> Verdict:
    """What the oracle says, and whether each run told the truth."""
    facts = world.facts()
    verdict = verdict_of(facts)
    truth = Truth(world)
    world.violations += [*false_status(world, outbox_on(world.mysql)), *truth.lies(), *Bounds(world, truth).broken()]
    if world.forgot:
        verdict.violations = list(unexplained(world, facts, verdict.violations))
    altered = world.altered()
    for run in world.runs:
        if run.report is not None:
            seen = run.report.found
            named = set(seen.event_ids) if seen.altered == seen.total else set()
            false = seen.altered > len(altered) or not named <= altered
            if false or ((seen.unexpected or (seen.duplicated and not verdict.forgetful)) and not world.forgot):
                world.violations.append(f"{run.owner} reconciled and found {seen}: {', '.join(seen.event_ids)}")
        true = {f"{n + 1} altered" for n in range(len(altered))}
        found = [] if run.done is None else list(run.done.discrepant.values())
        explained = world.gone["lost"] or world.forgot or world.unexplained()
        if not true.issuperset(found) and not explained:
            world.violations.append(f"{run.owner} found {found}")
    return verdict
