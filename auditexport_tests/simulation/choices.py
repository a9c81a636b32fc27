"""The stream of choices that decides a whole history: who goes next, what fails, what an application writes.

Every choice is a small number below a bound, and 0 is always the plain one: go on, no fault, the first of a list. A seed makes
such a stream, a list of numbers replays one, and `shortest` shrinks a list while the history that it makes still fails.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")


class Choices:
    """Numbers by a seed, or given numbers and then zeros. `taken` are all numbers so far: given again, they replay the history."""

    def __init__(self, seed: int | str | None = None, given: Sequence[int] = ()) -> None:
        self._random = None if seed is None else random.Random(seed)
        self._given = given
        self.taken: list[int] = []

    def below(self, bound: int) -> int:
        """A number from 0 to `bound` - 1."""
        if bound <= 1:
            return 0
        if self._random is not None:
            number = self._random.randrange(bound)
        else:
            place = len(self.taken)
            number = min(self._given[place], bound - 1) if place < len(self._given) else 0
        self.taken.append(number)
        return number

    def chance(self, per_mille: int) -> bool:
        """True in so many of a thousand cases."""
        return per_mille > 0 and self.below(1000) >= 1000 - per_mille

    def one_of(self, items: Sequence[T]) -> T:
        return items[self.below(len(items))]


def shortest(numbers: Sequence[int], fails: Callable[[Sequence[int]], bool], *, most_tries: int = 2_000) -> list[int]:
    """A short list for which `fails` still holds: parts are cut out, then set to zero, then single numbers are made smaller.

    `numbers` must fail. Tries at most `most_tries` lists, so the result is short, not the shortest of all.
    """
    best = _without_zeros_at_the_end(numbers)
    tries = 0

    def better(candidate: list[int]) -> bool:
        nonlocal best, tries
        candidate = _without_zeros_at_the_end(candidate)
        if candidate == best or tries >= most_tries:
            return False
        tries += 1
        if not fails(candidate):
            return False
        best = candidate
        return True

    smaller = True
    while smaller and tries < most_tries:
        smaller = False
        size = max(1, len(best) // 2)
        while size:
            place = 0
            while place < len(best):
                if better(best[:place] + best[place + size :]) or (
                    any(best[place : place + size])
                    and better(best[:place] + [0] * len(best[place : place + size]) + best[place + size :])
                ):
                    smaller = True
                else:
                    place += size
            size //= 2
        for place in range(len(best)):
            while place < len(best) and best[place] and better([*best[:place], best[place] // 2, *best[place + 1 :]]):
                smaller = True
    return best


def _without_zeros_at_the_end(numbers: Sequence[int]) -> list[int]:
    end = len(numbers)
    while end and not numbers[end - 1]:
        end -= 1
    return list(numbers[:end])
