"""Sets of pks: the arithmetic on runs against Python's own sets, on seeded random ones.

What belongs here: `PkSet` alone. What does not: anything that needs a database.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from random import Random
from typing import Any

import pytest

from auditexport_pipeline.core.pks import PkSet

LARGEST = 2**64 - 1  # bigint unsigned


def some(random: Random) -> set[int]:
    """Runs, holes and single pks, from empty to dense."""
    return {pk for pk in range(1, random.randrange(2, 60)) if random.random() < random.choice((0.1, 0.5, 0.9))}


def pk_set(pks: set[int]) -> PkSet:
    return PkSet.of(sorted(pks))


@pytest.mark.parametrize("operation", [operator.or_, operator.and_, operator.sub])
def test_union_intersection_and_difference_are_those_of_sets(operation: Callable[[Any, Any], Any]) -> None:
    """What a batch will mark is computed by these three; one pk too many is an event marked without being sent."""
    random = Random(1)
    for _ in range(300):
        one, other = some(random), some(random)
        assert operation(pk_set(one), pk_set(other)) == pk_set(operation(one, other))


def test_a_union_of_many_sets_is_that_of_their_members() -> None:
    """The rows that open batches hold are merged in one go; one that is left out goes into a second batch."""
    random = Random(4)
    for size in range(12):
        sets = [some(random) for _ in range(size)]
        assert PkSet.union(map(pk_set, sets)) == pk_set(set().union(*sets))


def test_the_ledgers_text_gives_back_the_same_set() -> None:
    """An adopted batch is rebuilt from this text alone."""
    random = Random(2)
    for _ in range(300):
        pks = pk_set(some(random))
        assert PkSet.parse(str(pks)) == pks
    assert str(PkSet.of([1, 2, 3, 7, 9, 10])) == "1-3,7,9-10"
    assert str(PkSet()) == ""
    assert PkSet.parse(str(PkSet.of([1, LARGEST - 1, LARGEST]))) == PkSet(((1, 1), (LARGEST - 1, LARGEST)))


def test_length_order_and_membership_are_those_of_the_pks() -> None:
    """A run stands for every integer in it, and for none beside it."""
    random = Random(3)
    for _ in range(300):
        pks = some(random)
        runs = pk_set(pks)
        assert (len(runs), list(runs), bool(runs)) == (len(pks), sorted(pks), bool(pks))
        assert {pk for pk in range(70) if pk in runs} == pks
        for pk in range(70):
            run = runs.run_of(pk)
            assert (run is not None) == (pk in pks)
            assert run is None or (run[0] <= pk <= run[1] and run[0] - 1 not in pks and run[1] + 1 not in pks)
        if pks:
            assert (runs.first, runs.last) == (min(pks), max(pks))
    assert "7" not in PkSet.of([7])


@pytest.mark.parametrize("rows", [1, 2, 7, 100])
def test_chunks_are_consecutive_full_and_complete(rows: int) -> None:
    """A pk that falls between two chunks is never marked; one in both is counted twice."""
    random = Random(4)
    for _ in range(100):
        pks = some(random)
        chunks = list(pk_set(pks).chunks(rows))
        assert [pk for chunk in chunks for pk in chunk] == sorted(pks)
        assert all(len(chunk) == rows for chunk in chunks[:-1])
        assert all(0 < len(chunk) <= rows for chunk in chunks[-1:])


@pytest.mark.parametrize("pks", [[2, 1], [1, 1], [1, 2, 2], [5, 6, 4]])
def test_pks_that_do_not_ascend_are_refused(pks: list[int]) -> None:
    """Out of order they would make overlapping runs, on which all arithmetic is silently wrong."""
    with pytest.raises(ValueError, match="must ascend"):
        PkSet.of(pks)


def test_spans_cover_the_set_and_leave_out_its_widest_gaps() -> None:
    """One old row among a million new ones must not make the planner ask for every batch between them."""
    pks = PkSet.of([3, 4, 1_000_000, 1_000_002, 1_000_005])
    assert pks.spans(1) == [(3, 1_000_005)]
    assert pks.spans(2) == [(3, 4), (1_000_000, 1_000_005)]
    assert pks.spans(3) == [(3, 4), (1_000_000, 1_000_002), (1_000_005, 1_000_005)]
    assert pks.spans(10) == [(3, 4), (1_000_000, 1_000_000), (1_000_002, 1_000_002), (1_000_005, 1_000_005)]
    assert PkSet().spans(4) == []
