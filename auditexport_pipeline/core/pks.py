"""Sets of outbox primary keys, as runs of consecutive integers.

The ledger stores the text form: `1000-1999,2001` is a thousand and one rows. Every integer
in a run is a member, so `pk BETWEEN first AND last` never touches a row that committed later.
"""

from __future__ import annotations

import itertools
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from operator import itemgetter


@dataclass(frozen=True, slots=True)
class PkSet:
    """An immutable, ordered set of pks; `runs` are disjoint inclusive (first, last) pairs, ascending."""

    runs: tuple[tuple[int, int], ...] = ()

    @classmethod
    def of(cls, ascending: Iterable[int]) -> PkSet:
        """The set of these pks, which must ascend strictly; raises `ValueError` otherwise."""
        runs: list[tuple[int, int]] = []
        first: int | None = None
        last = 0
        for pk in ascending:
            if first is None:
                first = pk
            elif pk <= last:
                raise ValueError(f"pks must ascend: {pk} after {last}")
            elif pk > last + 1:
                runs.append((first, last))
                first = pk
            last = pk
        if first is not None:
            runs.append((first, last))
        return cls(tuple(runs))

    @classmethod
    def parse(cls, text: str) -> PkSet:
        """The set from its text form, as `str()` writes it."""
        runs = []
        for part in text.split(",") if text else ():
            first, _, last = part.partition("-")
            runs.append((int(first), int(last or first)))
        return cls(tuple(runs))

    def __str__(self) -> str:
        return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in self.runs)

    def __len__(self) -> int:
        return sum(b - a + 1 for a, b in self.runs)

    def __iter__(self) -> Iterator[int]:
        for a, b in self.runs:
            yield from range(a, b + 1)

    def __contains__(self, pk: object) -> bool:
        return isinstance(pk, int) and self.run_of(pk) is not None

    def run_of(self, pk: int) -> tuple[int, int] | None:
        """The run that holds `pk`, or None."""
        index = bisect_right(self.runs, (pk, float("inf"))) - 1
        if index >= 0 and self.runs[index][1] >= pk:
            return self.runs[index]
        return None

    @property
    def first(self) -> int:
        return self.runs[0][0]

    @property
    def last(self) -> int:
        return self.runs[-1][1]

    def __sub__(self, other: PkSet) -> PkSet:
        left: list[tuple[int, int]] = []
        for a, b in self.runs:
            for c, d in other._overlapping(a, b):
                if a < c:
                    left.append((a, c - 1))
                a = d + 1
            if a <= b:
                left.append((a, b))
        return PkSet(tuple(left))

    def __and__(self, other: PkSet) -> PkSet:
        return PkSet(tuple((max(a, c), min(b, d)) for a, b in self.runs for c, d in other._overlapping(a, b)))

    def _overlapping(self, first: int, last: int) -> Iterator[tuple[int, int]]:
        """The runs that have a pk in common with this range, ascending."""
        for index in range(max(0, bisect_right(self.runs, (first, float("inf"))) - 1), len(self.runs)):
            a, b = self.runs[index]
            if a > last:
                return
            if b >= first:
                yield a, b

    def __or__(self, other: PkSet) -> PkSet:
        return PkSet.union((self, other))

    @classmethod
    def union(cls, sets: Iterable[PkSet]) -> PkSet:
        """The pks of all these sets, merged in one pass: 64 scattered sets, one by one, would take 64 passes."""
        merged: list[tuple[int, int]] = []
        for a, b in sorted(itertools.chain.from_iterable(one.runs for one in sets), key=itemgetter(0)):
            if merged and a <= merged[-1][1] + 1:
                merged[-1] = (merged[-1][0], max(merged[-1][1], b))
            else:
                merged.append((a, b))
        return cls(tuple(merged))

    def spans(self, most: int) -> list[tuple[int, int]]:
        """At most `most` inclusive ranges that cover the set, ascending; between them are the widest gaps."""
        gaps = sorted(range(1, len(self.runs)), key=lambda i: self.runs[i][0] - self.runs[i - 1][1], reverse=True)
        cuts = [0, *sorted(gaps[: most - 1]), len(self.runs)]
        return [(self.runs[a][0], self.runs[b - 1][1]) for a, b in itertools.pairwise(cuts) if a < b]

    def chunks(self, rows: int) -> Iterator[PkSet]:
        """Consecutive subsets of at most `rows` pks each, ascending."""
        chunk: list[tuple[int, int]] = []
        room = rows
        for a, b in self.runs:
            while a <= b:
                end = min(b, a + room - 1)
                chunk.append((a, end))
                room -= end - a + 1
                a = end + 1
                if room == 0:
                    yield PkSet(tuple(chunk))
                    chunk, room = [], rows
        if chunk:
            yield PkSet(tuple(chunk))
