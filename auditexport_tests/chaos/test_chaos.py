"""Chaos, the fast profile: one history a theme, each of whose faults must really have hit, and two controls that must fail.

The long, random histories are `make chaos`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from auditexport_tests.chaos.actions import ACTIONS
from auditexport_tests.chaos.history import BROUGHT_ABOUT_BY, play
from auditexport_tests.chaos.proxy import WIRE_KINDS
from auditexport_tests.chaos.rig import Rig
from auditexport_tests.chaos.world import Plan

# For one theme, at most, until each of its faults has hit.
HISTORIES = 4
THEMES: dict[str, Plan] = {
    "the_wire_to_clickhouse": Plan(seed=1, theme=tuple(f"clickhouse {kind}" for kind in WIRE_KINDS["http"])),
    "the_wire_to_mysql": Plan(seed=2, theme=tuple(f"mysql {kind}" for kind in WIRE_KINDS["mysql"])),
    "inside_mysql": Plan(seed=3, theme=("deadlock", "lock wait", "kill connection")),
    "kills": Plan(seed=4, theme=("kill run", "kill mysql", "kill clickhouse")),
    "zombies": Plan(seed=5, theme=("zombie", "declare dead", "concurrent drain")),
    "runs_that_nobody_watches": Plan(seed=12, theme=("kill run unseen", "hold rows")),
    "views": Plan(seed=13, theme=("clickhouse view fails", "kill run", "requeue")),
    "limits": Plan(seed=14, theme=("clickhouse too large", "clickhouse memory limit")),
    "tables_that_begin_again": Plan(seed=15, theme=("swap the outbox", "kill run", "sweep", "reconcile")),
    "other_hands": Plan(seed=6, theme=("delete rows", "mark rows", "requeue by hand")),
    "operators": Plan(
        seed=11, theme=("requeue", "sweep", "reconcile", "retry letters", "discard letters", "mark rows", "kill run")
    ),
    "clocks": Plan(seed=7, theme=("month changes", "clock steps back"), clock=True),
    "window_overflowed": Plan(
        seed=8,
        theme=("kill run", "clickhouse answer lost", "clickhouse unsent", "requeue by hand", "window overflowed"),
        overflow=True,
    ),
}


@pytest.fixture(scope="module")
def rig(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Rig]:
    with Rig(tmp_path_factory.mktemp("chaos")) as running:
        yield running


@pytest.mark.slow
@pytest.mark.parametrize("theme", THEMES)
def test_whatever_happens_every_committed_event_is_there_once(rig: Rig, theme: str) -> None:
    """The promise, under each kind of real fault: no loss, no copy, nothing stuck."""
    plan = THEMES[theme]
    hits: Counter[str] = Counter()
    for again in range(HISTORIES):  # a moment that is missed, such as a month's end, comes again in the next one
        outcome = play(rig, replace(plan, seed=plan.seed + 100 * again))
        assert outcome.verdict.violations == []
        assert outcome.verdict.events > 0
        hits += outcome.hits
        if all(hits[name] for name in plan.theme):
            break
    assert [name for name in plan.theme if not hits[name]] == []


def test_the_themes_leave_no_action_out() -> None:
    """A fault that only the long profile has would be found broken only before a release."""
    themed = {BROUGHT_ABOUT_BY.get(name, name) for plan in THEMES.values() for name in plan.theme}
    assert ACTIONS.keys() - themed == {"drain", "wait for a run", "wake"}


def test_without_token_and_look_first_the_suite_sees_duplicates(rig: Rig) -> None:
    """The control: a writer that only sends again is caught."""
    outcome = play(rig, Plan(seed=9, theme=("clickhouse answer lost",), mutation="no token, no check"))

    assert outcome.verdict.duplicated > 0
    assert any("too often" in line for line in outcome.verdict.violations)


@pytest.mark.slow
def test_with_marks_before_the_write_the_suite_sees_losses(rig: Rig) -> None:
    """The control: an exporter that marks what it has not written is caught."""
    outcome = play(rig, Plan(seed=10, theme=("clickhouse unsent", "clickhouse refuse"), mutation="mark first"))

    assert outcome.verdict.lost > 0
    assert any("lost" in line for line in outcome.verdict.violations)
