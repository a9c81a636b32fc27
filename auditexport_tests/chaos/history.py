"""One history: databases, writers, runs and faults in a random order, then quiet, then the verdict.

A seed replays every decision. Processes and servers decide at which moments they happen.
"""

from __future__ import annotations

from dataclasses import replace
from random import Random
from time import monotonic

from auditexport_pipeline.clickhouse.engines import DEDUPLICATION_WINDOW
from auditexport_tests.chaos.actions import ACTIONS, WEIGHTS
from auditexport_tests.chaos.application import Writer
from auditexport_tests.chaos.check import judge
from auditexport_tests.chaos.rig import Rig
from auditexport_tests.chaos.worker import Worker
from auditexport_tests.chaos.world import Outcome, Plan, World

STEPS = (20, 60)
# Of blocks: a few INSERTs later ClickHouse has forgotten a token.
SMALL_WINDOW = 2
# A themed history repeats its faults until each has hit.
THEME_WITHIN_S = 60.0
# Hits that have another name than the action that brings them about.
BROUGHT_ABOUT_BY = {
    "kill run unseen": "die unseen",
    "clickhouse view fails": "view fails",
    "clickhouse too large": "too large",
    "clickhouse memory limit": "memory limit",
    "deadlock": "lock rows",
    "lock wait": "lock ledger",
    "window overflowed": "kill run",
}
EXPECTED_ERRORS = {
    *("OutboxUnavailable", "AuditLogUnavailable", "ForeignAnswer", "InsertOutcomeUnknown"),
    *("LeaseLost", "BatchAltered", "BatchWaits", "BatchLocked"),
}


def play(rig: Rig, plan: Plan) -> Outcome:
    """Plays one history to its end and judges it."""
    if plan.overflow is None:
        plan = replace(plan, overflow=Random(f"window {plan.seed}").random() < 0.15)
    outcome = Outcome(plan=plan)
    with rig.databases(window=SMALL_WINDOW if plan.overflow else DEDUPLICATION_WINDOW) as databases:
        world = World(rig, databases, plan, outcome)
        try:
            _live(world)
            stuck = world.settle()
            outcome.verdict = judge(databases, world.book, overflow=world.overflow, swept=world.swept)
            outcome.verdict.violations += [f"stuck: {line}" for line in stuck]
            outcome.runs = len(world.workers)
            outcome.hits += world.found_hits()
            outcome.hits["month changes"] = outcome.verdict.month_changed
            if world.overflow:
                outcome.hits["window overflowed"] = outcome.verdict.replayed
            for worker in world.workers:
                outcome.verdict.violations += _violations(worker, outcome)
        finally:
            world.close()
    return outcome


def _live(world: World) -> None:
    """Everything at once: writers in threads, runs in processes, and one action after the other."""
    mariadb = world.rig.mysql.family == "mariadb"
    world.writers = [
        Writer(world.databases, world.book, Random(f"{world.plan.seed}-{n}"), name=f"w{n}", repeated_keys=mariadb)
        for n in range(world.random.choice((2, 3)))
    ]
    for writer in world.writers:
        writer.start()
    try:
        if world.plan.theme:
            _repeat_theme(world)
        else:
            for name in world.random.choices([*WEIGHTS], [*WEIGHTS.values()], k=world.random.randint(*STEPS)):
                _act(world, name)
    finally:
        for writer in world.writers:
            writer.end()


def _repeat_theme(world: World) -> None:
    deadline = monotonic() + THEME_WITHIN_S
    while missing := [name for name in world.plan.theme if not world.has_hit(name)]:
        if monotonic() > deadline:
            break
        _act(world, "drain")
        name = world.random.choice(missing)
        _act(world, BROUGHT_ABOUT_BY.get(name, name))
        if world.random.random() < 0.3:
            _act(world, "wake")


def _act(world: World, name: str) -> None:
    ACTIONS[name](world)
    world.pause(0.0, 0.25)


def _violations(worker: Worker, outcome: Outcome) -> list[str]:
    """What a run itself reports: no error outside the tree, none that needs a person, no discrepancy."""
    owner, result = worker.run.owner, worker.result()
    if result is None:
        return [] if worker.killed else [f"{owner} ended without a result"]
    outcome.errors += result.errors
    outcome.refused_zombies += worker.declared_dead and bool(result.refusals)
    found = [f"{owner} met an error outside the tree:\n{text}" for text in result.unforeseen]
    found += [f"{owner} met {name}, which no fault here explains" for name in {*result.errors} - EXPECTED_ERRORS]
    found += [f"{owner} saw {line}" for line in result.discrepancies]
    found += [f"{owner} was refused in more than one line" for line in result.refusals if "\n" in line]
    if result.report:
        seen = result.report.found
        forgetful = outcome.plan.overflow or outcome.verdict.forgetful
        if seen.altered or seen.unexpected or (seen.duplicated and not forgetful):
            found.append(f"{owner} reconciled and found {seen}: {', '.join(seen.event_ids)}")
    return found
