"""The poison-row search: what it finds, in which order it probes, and that it stays in its budget."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from auditexport_pipeline.core.poison import Group, ProbeBudget, search


def _groups(sizes: dict[str, int]) -> dict[int, str]:
    names: Iterator[str] = (name for name, size in sizes.items() for _ in range(size))
    return dict(enumerate(names, start=1))


def test_a_search_with_a_large_budget_finds_exactly_the_poison_rows() -> None:
    """The rest is what goes out, so a row too many is a loss and a row too few a refused block."""
    where = _groups({"ws_a": 40, "ws_b": 3, "ws_c": 100})
    bad = {1, 40, 41, 100, 143}
    found = search(Group.of(where), lambda pks: "no" if bad & set(pks) else None, ProbeBudget(left=1_000))
    assert (set(found.refused), found.unresolved) == (bad, [])


@pytest.mark.parametrize("questions", [1, 2, 3, 20, 100])
def test_a_search_stays_in_its_budget_and_clears_only_probed_rows(
    questions: int,
) -> None:
    """A row that is sent unasked makes the next block refused again, for nothing."""
    where = _groups({"ws_a": 50, "ws_flood": 500, "ws_z": 50})
    asked: list[set[int]] = []

    def ask(pks: list[int]) -> str | None:
        asked.append(set(pks))
        return "no" if any(where[pk] == "ws_flood" for pk in pks) else None

    found = search(Group.of(where), ask, ProbeBudget(left=questions, for_single_rows=questions // 2))
    assert len(asked) <= questions
    cleared = set(where) - set(found.refused) - set(found.unresolved)
    assert all(where[pk] != "ws_flood" for pk in cleared)
    if questions >= 20:
        assert len(cleared) == 100
    if questions >= 100:
        assert found.refused, "no progress: the next drain would begin where this one did"


def test_groups_are_cut_between_workspaces() -> None:
    """A half that shares a workspace with the other tells nothing about either's neighbours."""
    group = Group.of(_groups({"ws_a": 1, "ws_flood": 50, "ws_z": 1}))
    assert [[len(half.rows), half.mixed] for half in group.halves()] in (
        [[1, False], [51, True]],
        [[51, True], [1, False]],
    )
    alone = Group.of(_groups({"ws_a": 5}))
    assert [len(half.rows) for half in alone.halves()] == [2, 3]
