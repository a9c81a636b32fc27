"""Finding the rows that ClickHouse refuses, with a bounded number of questions and fairly between workspaces.

What belongs here: which refused group of rows is cut next, where, and when to stop. What does not: what a
question is (a probe or an INSERT), and what becomes of the rows that are found (`core.recut`).

A flood of refused rows is usually one workspace's. So a group's rows are ordered by workspace, and the first half
of the questions parts the workspaces, largest group first: the others' rows are cleared early. The second half goes
for the smallest group, down to single rows: each attempt finds some culprits, however many there are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Generic, TypeVar

# For one attempt to write one batch. A bad row among 100,000 that nothing explains is found with 34; of a flood of
# such rows one attempt finds some hundred, and the rest waits in the backlog for the next drain.
QUESTIONS = 256

Answer = TypeVar("Answer")


@dataclass(slots=True)
class Questions:
    """How many questions an attempt has left, and how many of these are kept for single rows."""

    left: int = field(default_factory=lambda: QUESTIONS)
    for_single_rows: int = field(default_factory=lambda: QUESTIONS // 2)


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that were refused together, as (workspace_id, pk) in that order."""

    rows: Sequence[tuple[str, int]]

    @classmethod
    def of(cls, workspaces: Mapping[int, str]) -> Group:
        return cls(sorted((workspace_id, pk) for pk, workspace_id in workspaces.items()))

    @property
    def pks(self) -> list[int]:
        return sorted(pk for _, pk in self.rows)

    @property
    def mixed(self) -> bool:
        return self.rows[0][0] != self.rows[-1][0]

    def halves(self) -> tuple[Group, Group]:
        """Two groups, cut in the middle or, while there are several workspaces, between two of them near it."""
        middle = len(self.rows) // 2
        if self.mixed:
            borders = (n for n in range(1, len(self.rows)) if self.rows[n - 1][0] != self.rows[n][0])
            middle = min(borders, key=lambda n: abs(n - middle))
        return Group(self.rows[:middle]), Group(self.rows[middle:])


def take_next(groups: list[Group], questions: Questions) -> Group:
    """Takes the group that is to be cut next out of the list."""
    parting = questions.left > questions.for_single_rows
    mixed = [group for group in groups if group.mixed] if parting else []
    chosen = max(mixed, key=_size) if mixed else min(groups, key=_size)
    groups.remove(chosen)
    return chosen


def _size(group: Group) -> int:
    return len(group.rows)


@dataclass(frozen=True, slots=True)
class Found(Generic[Answer]):
    """What a search came to, by pk: single rows that are refused, with the answer, and rows nobody asked about alone."""

    refused: dict[int, Answer]
    unresolved: list[int]


def search(everything: Group, ask: Callable[[list[int]], Answer | None], questions: Questions) -> Found[Answer]:
    """Asks about ever smaller groups until every row is cleared or refused by itself, or no question is left.

    `ask` gets the pks of a group and answers None when all of them are taken.
    """
    refused: dict[int, Answer] = {}
    groups: list[Group] = []

    def look_at(group: Group) -> None:
        questions.left -= 1
        answer = ask(group.pks)
        if answer is None:
            return
        if len(group.rows) == 1:
            refused[group.rows[0][1]] = answer
        else:
            groups.append(group)

    look_at(everything)
    while groups and questions.left >= 2:
        for half in take_next(groups, questions).halves():
            look_at(half)
    return Found(refused, sorted(pk for group in groups for pk in group.pks))
