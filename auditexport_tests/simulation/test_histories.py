"""Histories on simulated databases: a few here, and as many as one likes by `make simulate`."""

from __future__ import annotations

import pytest

from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.controls import CONTROLS, Control, found
from auditexport_tests.simulation.history import play
from auditexport_tests.simulation.many import shrunk, story_of

# Two minutes of histories on one core.
SHARDS = 6
HISTORIES_OF_A_SHARD = 200
# Taken away, these are missed within a few histories; others take longer.
FOUND_SOON = ("a later attempt looks first, and a block has one token", "rows are marked after ClickHouse has them")


@pytest.mark.parametrize("shard", range(SHARDS))
def test_no_history_breaks_a_promise(shard: int) -> None:
    """Whoever dies, waits, lies or acts at the same time: each event is there once, and every report is true."""
    first = 1 + shard * HISTORIES_OF_A_SHARD
    for seed in range(first, first + HISTORIES_OF_A_SHARD):
        outcome = play(Choices(seed))
        if outcome.violations:
            pytest.fail(f"seed {seed}: {outcome.violations}\n\n{story_of(shrunk(seed))}")


def test_a_seed_replays_its_history_and_so_do_its_choices() -> None:
    """A violation that cannot be played again cannot be understood."""
    one, again = play(Choices(7)), play(Choices(7))
    by_choices = play(Choices(given=one.choices))

    assert one.story == again.story == by_choices.story
    assert len(one.story) > 50


def test_histories_are_full_of_events_and_faults() -> None:
    """A simulation in which nothing happens finds nothing."""
    outcomes = [play(Choices(seed)) for seed in range(40)]
    happened = {name for outcome in outcomes for name in outcome.happened}

    assert sum(outcome.verdict.entries for outcome in outcomes) > 100
    assert sum(outcome.verdict.replayed for outcome in outcomes) > 5
    assert {"kill", "pause", "mysql: connection lost", "OutboxUnavailable", "AuditLogUnavailable"} <= happened


@pytest.mark.parametrize(
    "control",
    [pytest.param(one, marks=[] if one.rule in FOUND_SOON else pytest.mark.slow, id=one.rule) for one in CONTROLS],
)
def test_a_rule_that_is_taken_away_is_missed(control: Control) -> None:
    """A simulation that passes without the rule would not notice a change that breaks it.

    Each change of the exporter or of the actions gives other histories, so that the seed of the table may not miss it any more.
    """
    assert found(control, control.seed, 1) or found(control)
