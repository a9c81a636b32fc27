"""The poison-row search: finds the rows that ClickHouse refuses, with a bounded number of probes, fairly between
workspaces.

A flood of refused rows usually comes from one workspace. So the rows of a group are sorted by workspace. The first half
of the budget separates the workspaces, largest group first: this clears the rows of the other workspaces early. The
second half goes to the smallest group, down to single rows: every attempt finds some poison rows, however many there
are. What does not belong here: the probes (a parse or an INSERT), and what happens to the rows that are found
(`core.split`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# For one attempt to write one batch. 34 probes find one poison row among 100,000. Of a flood of poison rows one attempt
# finds about a hundred; the others stay in the backlog for the next drain.
PROBES = 256

Answer = TypeVar("Answer")


@dataclass(slots=True)
class ProbeBudget:
    """The number of probes that an attempt has left; the last ones are for single rows."""

    left: int = field(default_factory=lambda: PROBES)
    for_single_rows: int = field(default_factory=lambda: PROBES // 2)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that were refused together, as (workspace_id, pk), sorted."""

    rows: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, workspaces: Mapping[int, str]) -> Group:
        """The rows with these pks; the mapping gives each row's workspace."""
        return cls(sorted((workspace_id, pk) for pk, workspace_id in workspaces.items()))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def pks(self) -> list[int]:
        return sorted(pk for _, pk in self.rows)

    @property
    def mixed(self) -> bool:
        """Whether the rows belong to more than one workspace."""
        return self.rows[0][0] != self.rows[-1][0]

    def halves(self) -> tuple[Group, Group]:
        """Cuts the group in the middle, a mixed group at the nearest border between two workspaces."""
        middle = len(self) // 2
        if self.mixed:
            borders = (n for n in range(1, len(self)) if self.rows[n - 1][0] != self.rows[n][0])
            middle = min(borders, key=lambda n: abs(n - middle))
        return Group(self.rows[:middle]), Group(self.rows[middle:])


def next_to_halve(groups: Sequence[Group], budget: ProbeBudget) -> int:
    """The index of the group to halve next."""
    separating = budget.left > budget.for_single_rows
    mixed = [index for index, group in enumerate(groups) if group.mixed] if separating else []
    if mixed:
        return max(mixed, key=lambda index: len(groups[index]))
    return min(range(len(groups)), key=lambda index: len(groups[index]))


@dataclass(frozen=True, slots=True)
class Found(Generic[Answer]):
    """The result of a search, by pk: rows that were refused alone, with the answer; rows not probed alone."""

    refused: dict[int, Answer]
    unresolved: list[int]


def search(everything: Group, probe: Callable[[list[int]], Answer | None], budget: ProbeBudget) -> Found[Answer]:
    """Probes ever smaller groups until every row is cleared or refused alone, or the budget is spent.

    `probe` gets the pks of a group and returns None when ClickHouse takes all of them.
    """
    refused: dict[int, Answer] = {}
    groups: list[Group] = []

    def check(group: Group) -> None:
        budget.left -= 1
        answer = probe(group.pks)
        if answer is not None and len(group) == 1:
            refused[group.pks[0]] = answer
        elif answer is not None:
            groups.append(group)

    check(everything)
    while groups and budget.left >= 2:
        for half in groups.pop(next_to_halve(groups, budget)).halves():
            check(half)
    return Found(refused, sorted(pk for group in groups for pk in group.pks))
