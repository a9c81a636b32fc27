"""What is drained: how many events, how large, arriving how, and what lies beside them.

What belongs here: one dataclass, its scenarios by name, and how each fills the outbox. What does not: who drains
(`contenders`) and how it is measured (`speed`).
"""

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
# One row in ten is set aside.
DEAD_ONE_IN = 10
EXPORTED_PER_PENDING = 10
MANY_EVENTS = 1_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """One outbox: `events` sound pending events and what is said of them.

    `drains` above one: the events arrive in so many parts, each drained before the next one is committed.
    """

    name: str
    title: str
    events: int
    dead: int = 0
    drains: int = 1
    payload_bytes: int | None = None
    exported_before: int = 0

    @property
    def rounds(self) -> int:
        """How often each contender runs unless the command says otherwise."""
        return 2 if self.events >= MANY_EVENTS else 3

    def seed(self, stack: LocalStack) -> None:
        """Fills the outbox and keeps a copy; the outbox of a scenario with many drains begins empty."""
        bench.clear(stack)
        if self.drains > 1:
            bench.keep(stack)
        elif self.payload_bytes == SMALL_BYTES:
            bench.put(stack, _small(self.events))
            bench.keep(stack)
        else:
            bench.seed(stack, self.events, malformed=self.dead, payload_bytes=self.payload_bytes)
        if self.exported_before:
            bench.age(stack, self.exported_before // self.events)

    def restore(self, stack: LocalStack) -> None:
        """As seeded, with nothing exported of what is pending."""
        bench.restore(stack, aged=bool(self.exported_before))

    def part(self, stack: LocalStack) -> Callable[[int], None]:
        """Commits the number-th part of the events; the same parts for every contender."""
        generator = Generator(bench.SEED)
        return lambda _number: bench.put(stack, generator.events(self.events // self.drains))


def _small(events: int) -> Iterator[OutboxRow]:
    """The required fields, short ids, and nothing else: about `SMALL_BYTES` each."""
    for number in range(events):
        workspace_id, event_id = f"ws_{number % 40}", f"evt_{number:08d}"
        event = {"event_id": event_id, "time": START_MS + number, "workspace_id": workspace_id, "event": "key.create"}
        yield OutboxRow(
            version=VERSION,
            workspace_id=workspace_id,
            event_id=event_id,
            payload=json.dumps(event),
            created_at_ms=START_MS + number,
        )


def _backlog(events: int) -> Scenario:
    return Scenario(name="backlog", title=f"{events:,} pending events of 600 bytes", events=events)


def _steady(events: int) -> Scenario:
    drains = max(2, events // STEADY_ROWS)
    return Scenario(
        name="steady",
        title=f"{drains} drains of {STEADY_ROWS} events each, the exporter already running",
        events=drains * STEADY_ROWS,
        drains=drains,
    )


def _sized(name: str, payload_bytes: int) -> Callable[[int], Scenario]:
    return lambda events: Scenario(
        name=name,
        title=f"{events:,} pending events of {payload_bytes:,} bytes",
        events=events,
        payload_bytes=payload_bytes,
    )


def _dead(rows: int) -> Scenario:
    dead = rows // DEAD_ONE_IN
    return Scenario(
        name="dead",
        title=f"{rows - dead:,} pending events and {dead:,} malformed rows among them",
        events=rows - dead,
        dead=dead,
    )


def _behind(events: int) -> Scenario:
    before = events * EXPORTED_PER_PENDING
    return Scenario(
        name="behind",
        title=f"{events:,} pending events behind {before:,} exported rows in the outbox",
        events=events,
        exported_before=before,
    )


MAKERS: dict[str, Callable[[int], Scenario]] = {
    "backlog": _backlog,
    "steady": _steady,
    "small": _sized("small", SMALL_BYTES),
    "large": _sized("large", LARGE_BYTES),
    "dead": _dead,
    "behind": _behind,
}
WARM_UP = _backlog(1_000)
# Rows of a scenario that is named without a number. `behind` at a tenth of what is asked of it: 1,000,000 behind
# 10,000,000 take an hour; `behind:1000000` does it. So does `backlog:10000000`.
ROWS: dict[str, tuple[int, ...]] = {
    "backlog": (10_000, 100_000, 1_000_000),
    "steady": (200 * STEADY_ROWS,),
    "small": (100_000,),
    "large": (5_000,),
    "dead": (100_000,),
    "behind": (100_000,),
}


def named(text: str) -> list[Scenario]:
    """`backlog`, or `backlog:100000`. Raises `ValueError` for a name that does not exist."""
    name, _, rows = text.partition(":")
    if name not in MAKERS:
        raise ValueError(f"{name!r} is no scenario; choose from {', '.join(MAKERS)}")
    return [MAKERS[name](number) for number in ((int(rows),) if rows else ROWS[name])]
