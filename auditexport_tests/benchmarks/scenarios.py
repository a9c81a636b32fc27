"""What is drained: how many events, of which size, with what beside them, and how they arrive."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from auditexport_pipeline.local.generator import START_MS, VERSION, Generator, OutboxRow
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench

# A small application's drain: what came in since the last one.
STEADY_ROWS = 50
SMALL_BYTES = 100
LARGE_BYTES = 20_000
# One row in ten becomes a dead letter.
DEAD_ONE_IN = 10
MANY_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One outbox of `events` pending events and `dead` malformed rows.

    With `drains` above one, the events arrive in so many parts, and each is drained before the next is committed.
    """

    name: str
    title: str
    events: int
    dead: int = 0
    drains: int = 1
    payload_bytes: int | None = None

    @property
    def rounds(self) -> int:
        """How often each contender runs by default."""
        return 2 if self.events >= MANY_EVENTS else 3

    def seed(self, stack: LocalStack) -> None:
        """Fills the outbox and saves it for `bench.restore`; with many drains it begins empty."""
        bench.clear(stack)
        if self.payload_bytes == SMALL_BYTES:
            bench.put(stack, _small(self.events))
            bench.save(stack)
        else:
            events = self.events if self.drains == 1 else 0
            bench.seed(stack, events, malformed=self.dead, payload_bytes=self.payload_bytes)

    def part(self, stack: LocalStack) -> Callable[[int], None]:
        """Commits the number-th part of the events; the same parts for every contender."""
        generator = Generator(bench.SEED)
        return lambda _number: bench.put(stack, generator.events(self.events // self.drains))


def _small(events: int) -> Iterator[OutboxRow]:
    """The required fields and short ids: about `SMALL_BYTES` each."""
    for number in range(events):
        workspace_id, event_id, at_ms = f"ws_{number % 40}", f"evt_{number:08d}", START_MS + number
        event = {"event_id": event_id, "time": at_ms, "workspace_id": workspace_id, "event": "key.create"}
        yield OutboxRow(
            version=VERSION,
            workspace_id=workspace_id,
            event_id=event_id,
            payload=json.dumps(event),
            created_at_ms=at_ms,
        )


def backlog(events: int) -> Scenario:
    return Scenario(name="backlog", title=f"{events:,} pending events of 600 bytes", events=events)


def _steady(events: int) -> Scenario:
    drains = max(2, events // STEADY_ROWS)
    title = f"{drains} drains of {STEADY_ROWS} events each, by an exporter that runs already"
    return Scenario(name="steady", title=title, events=drains * STEADY_ROWS, drains=drains)


def _sized(name: str, payload_bytes: int) -> Callable[[int], Scenario]:
    def scenario(events: int) -> Scenario:
        title = f"{events:,} pending events of {payload_bytes:,} bytes"
        return Scenario(name=name, title=title, events=events, payload_bytes=payload_bytes)

    return scenario


def _dead(rows: int) -> Scenario:
    dead = rows // DEAD_ONE_IN
    title = f"{rows - dead:,} pending events and {dead:,} malformed rows among them"
    return Scenario(name="dead", title=title, events=rows - dead, dead=dead)


# How each scenario is made, and of how many rows without a number.
SCENARIOS: dict[str, tuple[Callable[[int], Scenario], tuple[int, ...]]] = {
    "backlog": (backlog, (10_000, 100_000, 1_000_000)),
    "steady": (_steady, (200 * STEADY_ROWS,)),
    "small": (_sized("small", SMALL_BYTES), (100_000,)),
    "large": (_sized("large", LARGE_BYTES), (5_000,)),
    "dead": (_dead, (100_000,)),
}
WARM_UP = backlog(1_000)


def named(text: str) -> list[Scenario]:
    """`backlog`, or `backlog:100000`. Raises `ValueError` for a name that does not exist."""
    name, _, rows = text.partition(":")
    if name not in SCENARIOS:
        raise ValueError(f"no scenario {name!r}; choose from {', '.join(SCENARIOS)}")
    make, default_rows = SCENARIOS[name]
    return [make(number) for number in ((int(rows),) if rows else default_rows)]
