"""One history: databases, writers, runs and faults in a random order, then quiet, then the truth.

What belongs here: the order of things. What does not: the actions, the world they act on (`world`), and what must hold
(`check`). A seed replays every decision; the moments at which processes and servers come to them are the machine's.
"""

from __future__ import annotations

import time
from dataclasses import replace
from random import Random

from auditexport_pipeline.clickhouse.engines import DEDUPLICATION_WINDOW
from auditexport_tests.chaos.actions import ACTIONS, WEIGHTS
from auditexport_tests.chaos.application import Writer
from auditexport_tests.chaos.check import judge
from auditexport_tests.chaos.rig import Rig
from auditexport_tests.chaos.world import Outcome, Plan, World

STEPS = (20, 60)
# Of blocks: a few INSERTs later ClickHouse has forgotten a token.
SMALL_WINDOW = 2
# Themed histories go round their faults until each has hit.
THEME_WITHIN_S = 60.0
# Hits that are told by their victims, and the action that brings them about.
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
    "OutboxUnavailable",
    "AuditLogUnavailable",
    "ForeignAnswer",
    "InsertOutcomeUnknown",
    "LeaseLost",
    "BatchAltered",
    "BatchWaits",
    "BatchLocked",
}


def play(rig: Rig, plan: Plan) -> Outcome:
    """Plays one history to its end and judges it."""
    started = time.monotonic()
    if plan.overflow is None:
        plan = replace(plan, overflow=Random(f"window {plan.seed}").random() < 0.15)
    outcome = Outcome(plan=plan)
    with rig.databases(window=SMALL_WINDOW if plan.overflow else DEDUPLICATION_WINDOW) as databases:
        world = World(rig, databases, plan, outcome)
        try:
            live(world)
            stuck = world.settle()
            outcome.verdict = judge(databases, world.book, overflow=world.overflow, swept=world.swept)
            outcome.verdict.violations.extend(f"stuck: {line}" for line in stuck)
            _listen(world, outcome)
        finally:
            world.close()
    outcome.seconds = time.monotonic() - started
    return outcome


def live(world: World) -> None:
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
            _go_round(world)
        else:
            names, weights = [*WEIGHTS], [*WEIGHTS.values()]
            for name in world.random.choices(names, weights, k=world.random.randint(*STEPS)):
                _act(world, name)
    finally:
        for writer in world.writers:
            writer.end()


def _go_round(world: World) -> None:
    deadline = time.monotonic() + THEME_WITHIN_S
    while missing := [name for name in world.plan.theme if not world.has_hit(name)]:
        if time.monotonic() > deadline:
            break
        _act(world, "drain")
        name = world.random.choice(missing)
        _act(world, BROUGHT_ABOUT_BY.get(name, name))
        if world.random.random() < 0.3:
            _act(world, "wake")


def _act(world: World, name: str) -> None:
    ACTIONS[name](world)
    world.pause(0.0, 0.25)


def _listen(world: World, outcome: Outcome) -> None:
    """What the runs themselves said: no error outside the tree, none that asks for a person, no discrepancy."""
    outcome.runs = len(world.workers)
    outcome.hits += world.wire_hits() + world.told_hits() - world.seen
    outcome.hits["month changes"] = outcome.verdict.month_changed
    if world.overflow:
        outcome.hits["window overflowed"] = outcome.verdict.replayed
    for worker in world.workers:
        told = worker.told()
        if told is None:
            if not worker.killed:
                outcome.verdict.violations.append(f"{worker.run.owner} ended without a word")
            continue
        outcome.errors += told.errors
        if worker.declared_dead:
            outcome.refused_zombies += bool(told.refusals)
        for text in told.unforeseen:
            outcome.verdict.violations.append(f"{worker.run.owner} met an error outside the tree:\n{text}")
        for name in set(told.errors) - EXPECTED_ERRORS:
            outcome.verdict.violations.append(f"{worker.run.owner} met {name}, which no fault here explains")
        if told.report:
            found = told.report.found
            forgetful = world.overflow or outcome.verdict.forgetful
            if found.altered or found.unexpected or (found.duplicated and not forgetful):
                outcome.verdict.violations.append(
                    f"{worker.run.owner} reconciled and found {found}: {', '.join(found.event_ids)}"
                )
        outcome.verdict.violations.extend(f"{worker.run.owner} saw {line}" for line in told.discrepancies)
        outcome.verdict.violations.extend(
            f"{worker.run.owner} was refused in more than one line" for line in told.refusals if "\n" in line
        )
