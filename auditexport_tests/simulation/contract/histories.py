"""Random operations on two servers at once: after each of them every read method says the same of both.

`python -m auditexport_tests.simulation.contract.histories --seconds 60 --seed 7` compares the simulation with a real server for
as long, and prints the shortest story that it can find of a difference.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from auditexport_tests.simulation.choices import Choices, shortest
from auditexport_tests.simulation.contract.clickhouse import (
    BAD,
    DAY_MS,
    Known,
    ServerUnderTest,
    SimulatedServer,
    outcome,
    payload,
    put,
    real_server,
    rows,
    simulated_server,
)
from auditexport_tests.support.engines import chosen, local_clickhouse

# Two of one partition, one of an earlier one, one past the TTL.
AGES_MS = (0, -1, 40 * DAY_MS, 91 * DAY_MS)
BEFORE, AFTER = payload("evt_5", description="before"), payload("evt_5", description="after")
# Some have one sort key and different contents, some are of another workspace.
POOL = [
    *(payload(f"evt_{number}") for number in (1, 2, 3)),
    *BAD[:2],
    payload("evt_1", meta={"n": 1}),
    payload("evt_3", workspace_id="ws_2"),
    payload("evt_4", workspace_id="ws_2", time=2000, bucket="b"),
    BEFORE,
]
UNPARSABLE = payload("evt_2", time="x")

Servers = tuple[ServerUnderTest, ServerUnderTest]
Pair = Callable[[int], AbstractContextManager[Servers]]


class Different(AssertionError):
    """The two servers do not agree after the operation `step`, counted from 1; the story has all of them."""

    step = 0


@dataclass
class Sent:
    """A block that was sent: its batch, its `inserted_at`, its rows, and the generation of its token."""

    batch_id: int
    at_ms: int
    payloads: list[bytes]
    generation: int = 0


@dataclass
class History:
    """One sequence of operations, each on both servers. `servers` are the one that leads, and the simulation that follows."""

    servers: Servers
    choices: Choices
    now_ms: int
    story: list[str] = field(default_factory=list)
    _sent: list[Sent] = field(default_factory=list)
    _failing: bool = False
    _deleted: bool = False

    def __post_init__(self) -> None:
        self._times = [self.now_ms - age_ms for age_ms in AGES_MS]
        self._known = Known(self._times, [*POOL, AFTER])

    def run(self, steps: int) -> None:
        operations = [
            *(self._new, self._new, self._again, self._under_another_token, self._requeue, self._one_bad_row),
            *(self._late, self._lost, self._refused_by_a_proxy, self._merge, self._delete, self._erase, self._alter),
            *(self._expire, self._drop_partition, self._remember, self._view, self._keep, self._constrain),
        ]
        for step in range(steps):
            try:
                self.choices.one_of(operations)()
                self._compare("answers", self._known.answers)
            except Different as found:
                found.step = step + 1
                raise

    def _compare(self, what: str, ask: Callable[[ServerUnderTest], object]) -> object:
        leads, follows = (ask(server) for server in self.servers)
        if leads != follows:
            if isinstance(leads, dict) and isinstance(follows, dict):
                leads, follows = (
                    {name: one[name] for name in leads if leads[name] != follows[name]} for one in (leads, follows)
                )
            raise Different("\n".join([*self.story, f"{what} differ:", f"  {leads}", f"  {follows}"]))
        return leads

    def _do(self, what: str, act: Callable[[ServerUnderTest], object]) -> None:
        self.story.append(what)
        for server in self.servers:
            act(server)

    # ── blocks ───────────────────────────────────────────────────────────────────────────────────

    def _new_block(self) -> Sent:
        count = 1 + self.choices.below(4)
        chosen_rows = [self.choices.one_of(POOL) for _ in range(count)]
        return Sent(len(self.story) + 1, self.choices.one_of(self._times), chosen_rows)

    def _insert(
        self, why: str, block: Sent, *, within_s: float = 600, fault: Callable[[ServerUnderTest], None] | None = None
    ) -> None:
        """One INSERT on both. A fault stands in front of the servers while it is sent, and no longer."""
        leads, follows = self.servers
        self.story.append(f"{why}: {block}")
        before, results = rows(leads, block.at_ms), []
        for server in self.servers:
            deadline_ms = server.log.deadline_ms(within_s)
            if server is follows and isinstance(server, SimulatedServer):
                # Which of the two happens is a race on older engines: the simulation has both, and takes the same one.
                first = self._failing and rows(leads, block.at_ms) == before
                server.server.conditions.view_fails_first = lambda first=first: first
            if fault is not None:
                fault(server)
            results.append(
                outcome(
                    *(put, server, block.batch_id, block.at_ms, block.payloads),
                    generation=block.generation,
                    deadline_ms=deadline_ms,
                )
            )
            server.recover()
        if results[0] != results[1]:
            raise Different("\n".join([*self.story, "outcomes differ:", *(f"  {one}" for one in results)]))

    def _new(self) -> None:
        self._sent.append(self._new_block())
        self._insert("a block", self._sent[-1])

    def _earlier(self) -> Sent:
        return self.choices.one_of(self._sent[::-1]) if self._sent else Sent(1, self._times[0], POOL[:1])

    def _again(self) -> None:
        self._insert("again under its token", self._earlier())

    def _under_another_token(self) -> None:
        one = self._earlier()
        self._sent.append(Sent(one.batch_id, one.at_ms, one.payloads, one.generation + 1))
        self._insert("under another token", self._sent[-1])

    def _requeue(self) -> None:
        one = self._earlier()
        some = one.payloads[self.choices.below(len(one.payloads)) :]
        self._sent.append(Sent(len(self.story) + 1, one.at_ms, some, 1))
        self._insert("requeued under its first inserted_at", self._sent[-1])

    def _one_bad_row(self) -> None:
        block = self._new_block()
        block.payloads[self.choices.below(len(block.payloads))] = UNPARSABLE
        self._insert("with a row that cannot be parsed", block)

    def _late(self) -> None:
        self._insert("after its deadline", self._earlier(), within_s=-1)

    def _lost(self) -> None:
        passes_on = not self.choices.chance(500)
        self._sent.append(self._new_block())
        why = f"the connection closes, passed on: {passes_on}"
        self._insert(why, self._sent[-1], fault=lambda server: server.lose_answers(passes_on=passes_on))

    def _refused_by_a_proxy(self) -> None:
        passes_on, status = not self.choices.chance(500), self.choices.one_of((413, 504, 502))
        self._sent.append(self._new_block())
        why = f"a proxy answers {status}, passed on: {passes_on}"
        self._insert(why, self._sent[-1], fault=lambda server: server.answer_instead(status, passes_on=passes_on))

    # ── the table ────────────────────────────────────────────────────────────────────────────────

    def _merge(self) -> None:
        self._do("merge", lambda server: server.merge())

    def _delete(self) -> None:
        event_id = f"evt_{1 + self.choices.below(5)}"
        self._deleted = True
        self._do(f"delete {event_id}", lambda server: server.delete(event_id))

    def _erase(self) -> None:
        workspace_id = f"ws_{2 - self.choices.below(2)}"
        self._deleted = True
        self._do(f"erase {workspace_id}", lambda server: server.erase(workspace_id))

    def _alter(self) -> None:
        self._do("alter evt_5", lambda server: server.alter(BEFORE, AFTER))

    def _expire(self) -> None:
        self._deleted = True
        self._do("expire", lambda server: server.expire())

    def _drop_partition(self) -> None:
        # An engine drops a part without rows some time after what emptied it. Until then the partition's end is the end of its
        # tokens too, and afterwards it is not: a race. A merge can empty parts of the last time.
        if not self._deleted:
            at_ms = self.choices.one_of(self._times[:-1])
            self._do(f"drop the partition of {at_ms}", lambda server: server.drop_partition(at_ms))

    def _remember(self) -> None:
        window = self.choices.one_of((10_000, 0, 1, 2, 3, 5))
        self._do(f"a window of {window}", lambda server: server.remember(window))

    def _view(self) -> None:
        self._failing = not self._failing
        kind = "fails" if self._failing else ""
        self._do(f"a view that fails: {self._failing}", lambda server: server.view(kind))

    def _keep(self) -> None:
        self._deleted = True
        days, by, workspace_id = self.choices.one_of(
            ((90, "inserted_at", ""), (None, "inserted_at", ""), (30, "inserted_at", "ws_2"), (30, "time", ""))
        )
        self._do(
            f"a TTL of {days} days, {by}, {workspace_id}", lambda s: s.keep(days, by=by, workspace_id=workspace_id)
        )
        # What it deletes is deleted at once: a server has parts that know an earlier TTL, the simulation has not.
        self._expire()

    def _constrain(self) -> None:
        self._do("a constraint for the next block", lambda server: server.constrain(1500))
        self._insert("a block", self._new_block())
        self._do("no constraint", lambda server: server.constrain(None))


# ── many histories ───────────────────────────────────────────────────────────────────────────────


def compare(pair: Pair, seed: int | str, steps: int, *, most_tries: int = 60) -> None:
    """One history by a seed. Raises `Different` with the story of the shortest history that was found to differ."""
    choices = Choices(seed)
    found = difference(pair, choices, steps)
    if found is None:
        return
    print(f"seed {seed} differs; looking for a shorter history of it\n{found}", flush=True)
    most = found.step

    def fails(given: Sequence[int]) -> bool:
        return difference(pair, Choices(given=given), most) is not None

    short = shortest(choices.taken, fails, most_tries=most_tries)
    shortened = difference(pair, Choices(given=short), most) or found
    again = Different(f"seed {seed}, choices {short}\n{shortened}")
    again.step = shortened.step
    raise again


def difference(pair: Pair, choices: Choices, steps: int) -> Different | None:
    now_ms = int(time.time() * 1000)
    with pair(now_ms) as servers:
        try:
            History(servers, choices, now_ms).run(steps)
        except Different as found:
            return found
    return None


@contextmanager
def real_and_simulated(clickhouse_server: str, now_ms: int) -> Iterator[Servers]:
    with real_server(clickhouse_server) as real, simulated_server(real.engine, now_ms) as simulated:
        yield real, simulated


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--steps", type=int, default=25, help="of each history")
    options = parser.parse_args()
    began, seed = time.monotonic(), options.seed
    with tempfile.TemporaryDirectory() as directory, local_clickhouse(Path(directory)) as server:
        url = server.url.removesuffix("default")
        while time.monotonic() < began + options.seconds:
            compare(lambda now_ms: real_and_simulated(url, now_ms), seed, options.steps)
            seed += 1
    print(
        f"engine {chosen()}: {seed - options.seed} histories of {options.steps} steps from seed {options.seed}, no difference"
    )


if __name__ == "__main__":
    main()
