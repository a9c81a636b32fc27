"""Random operations leave the simulated and the real ClickHouse with the same answers, and a wrong simulation is found."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import pytest

from auditexport_pipeline.core.ports import Refusal, StoredEntry
from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.clickhouse_server import Part, SimulatedClickHouse, month_of
from auditexport_tests.simulation.contract.clickhouse import simulated_server
from auditexport_tests.simulation.contract.histories import (
    Different,
    Pair,
    Servers,
    compare,
    difference,
    real_and_simulated,
)
from auditexport_tests.support import engines


@pytest.mark.clickhouse_sensitive
@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(2, 4))])
def test_both_say_the_same_after_each_of_some_random_steps(clickhouse_server: str, seed: int) -> None:
    """What nobody thought of. The module `histories` compares for as long as one likes."""
    compare(lambda now_ms: real_and_simulated(clickhouse_server, now_ms), seed, 8 if seed == 1 else 25)


# ── controls: a simulation that is wrong in one thing ────────────────────────────────────────────


def forgets_every_token(server: SimulatedClickHouse) -> None:
    server.tokens = deque(maxlen=0)


def remembers_every_token(server: SimulatedClickHouse) -> None:
    server.remember = lambda window: None  # type: ignore[method-assign]


def never_merges(server: SimulatedClickHouse) -> None:
    server.merge = lambda month: None  # type: ignore[method-assign]


def merges_the_first_entry(server: SimulatedClickHouse) -> None:
    merge = server.merge

    def wrong(month: int) -> None:
        for part in server.parts:
            part.entries.reverse()
        server.parts.reverse()
        merge(month)

    server.merge = wrong  # type: ignore[method-assign]


def keeps_what_is_past_the_ttl(server: SimulatedClickHouse) -> None:
    server.expire = lambda: None  # type: ignore[method-assign]


def stores_each_row_by_itself(server: SimulatedClickHouse) -> None:
    server.parse = lambda payloads, at_ms: SimulatedClickHouse.parse(  # type: ignore[method-assign]
        server, [one for one in payloads if b'"x"' not in one], at_ms
    )


def stores_what_a_constraint_refuses(server: SimulatedClickHouse) -> None:
    store = server.store

    def wrong(
        entries: list[StoredEntry], token: str, timeout_s: float = 0, payloads: Sequence[bytes] = ()
    ) -> Refusal | None:
        refusal = store(entries, token, timeout_s, payloads)
        if refusal is not None and refusal.constraint:
            server.parts.append(Part(month_of(entries[0].inserted_at_ms), entries[:1]))
        return refusal

    server.store = wrong  # type: ignore[method-assign]


WRONG: list[Callable[[SimulatedClickHouse], None]] = [
    *(forgets_every_token, remembers_every_token, never_merges, merges_the_first_entry, keeps_what_is_past_the_ttl),
    *(stores_each_row_by_itself, stores_what_a_constraint_refuses),
]


def beside(wrong: Callable[[SimulatedClickHouse], None] | None) -> Pair:
    """Two simulations, the second one wrong."""

    @contextmanager
    def pair(now_ms: int) -> Iterator[Servers]:
        with simulated_server(engines.chosen(), now_ms) as one, simulated_server(engines.chosen(), now_ms) as other:
            if wrong is not None:
                wrong(other.server)
            yield one, other

    return pair


@pytest.mark.parametrize("wrong", WRONG, ids=lambda wrong: wrong.__name__)
def test_random_steps_find_a_simulation_that(wrong: Callable[[SimulatedClickHouse], None]) -> None:
    """A comparison that finds nothing must be able to find something."""
    assert any(difference(beside(wrong), Choices(seed), 25) is not None for seed in range(40))


def test_random_steps_find_no_difference_where_there_is_none() -> None:
    """Two right simulations agree after each step."""
    assert [difference(beside(None), Choices(seed), 25) for seed in range(4)] == [None] * 4


def test_a_difference_is_told_in_its_shortest_story() -> None:
    """A history of twenty-five steps says little about what is wrong."""
    seed = next(seed for seed in range(40) if difference(beside(forgets_every_token), Choices(seed), 25) is not None)
    with pytest.raises(Different, match="again under its token") as found:
        compare(beside(forgets_every_token), seed, 25)
    assert found.value.step <= 3
