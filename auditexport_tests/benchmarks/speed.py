"""How fast: every contender on the same servers and the same outbox, in turns, several rounds, one table a scenario.

What belongs here: the rounds and the table. What does not: scenarios (`scenarios`), contenders (`contenders`), and how
a process is measured (`children`).

    python -m auditexport_tests.benchmarks.speed [--rounds N] [--contenders a,b] [scenario[:events] …]

A round runs each contender once, and each round begins with another one. CPU seconds are those until the exporter
ended; merges and purges that it leaves to the servers for later are waited for, and not counted.
"""

from __future__ import annotations

import argparse
import os
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import pandas as pd

from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench, children, contenders, peers, scenarios
from auditexport_tests.benchmarks.children import Child
from auditexport_tests.benchmarks.contenders import ANCESTOR, CONTENDERS, Contender, Wrong
from auditexport_tests.benchmarks.scenarios import Scenario

# Of ours: each adds a line of its own.
DAGSTER = "a Dagster run"
DRAIN = "the drain in it"
IN_PROCESS = "without Dagster"
# CPU seconds per million events.
CPU = {"CPU: exporter": "cpu_s", "MySQL": "mysql_cpu_s", "ClickHouse": "clickhouse_cpu_s"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of one round: `events` in `seconds`, in so many `drains`, and what arrived; without events, why not."""

    contender: str
    events: int
    drains: int
    seconds: float
    child: Child | None
    arrived: str


def main(selected: Sequence[Scenario], entrants: Sequence[Contender] = CONTENDERS, rounds: int | None = None) -> None:
    for scenario in selected:
        with bench.benchmark_stack() as stack:
            if scenario is selected[0]:
                bench.print_machine(stack)
            number = rounds or scenario.rounds
            print(f"\n{scenario.name}: {scenario.title}; {number} rounds", flush=True)
            # Once for nothing: the first to run would read everybody's libraries from the disk, the engine's above all.
            scenarios.WARM_UP.seed(stack)
            list(_round(stack, scenarios.WARM_UP, entrants, set()))
            scenario.seed(stack)
            contents: set[int] = set()
            measured = [
                line for turn in range(number) for line in _round(stack, scenario, _rotated(entrants, turn), contents)
            ]
        print(_table(measured, entrants), flush=True)
        print(f"Others kept {_others(measured):.1f} of {os.cpu_count()} cores busy meanwhile.", flush=True)
    print(
        "\nevents/s, seconds, CPU and RSS are medians of the rounds. CPU: seconds per million events, of the exporter and "
        "of both servers until it ended.\nRSS: the peak of the exporter's process tree, in 10^6 bytes. A Dagster run is a "
        "process from start to end; the drain in it is from its plan to its verification."
    )
    print("\nWhat each lacks:")
    for contender in entrants:
        print(
            textwrap.fill(f"{contender.name}: {contender.lacks}.", 118, initial_indent="  ", subsequent_indent="    ")
        )


def _rotated(entrants: Sequence[Contender], turn: int) -> list[Contender]:
    first = turn % len(entrants)
    return [*entrants[first:], *entrants[:first]]


def _round(
    stack: LocalStack, scenario: Scenario, entrants: Sequence[Contender], contents: set[int]
) -> Iterator[Measured]:
    """Every contender once; `contents` are the sums of the entries that were written so far."""
    for contender in entrants:
        try:
            contender.prepare(stack)
        except peers.NotInstalled as error:
            yield _nothing(contender, str(error))
            continue
        scenario.restore(stack)
        yield from (_steady if scenario.drains > 1 else _once)(stack, scenario, contender, contents)


def _once(stack: LocalStack, scenario: Scenario, contender: Contender, contents: set[int]) -> Iterator[Measured]:
    """All there is, by a process of its own."""
    ours = contender.ours
    command = contenders.dagster_run(contender, stack, scenario) if ours else contender.command(stack)
    child = children.run(stack, command, may_fail=not ours)
    yield _judged(stack, scenario, contender, contents, child, DAGSTER)
    if ours:
        yield _drain_alone(stack, contender, scenario.events)


def _steady(stack: LocalStack, scenario: Scenario, contender: Contender, contents: set[int]) -> Iterator[Measured]:
    """Part by part, by a process that runs already; ours once more as one Dagster run of one part."""
    put = scenario.part(stack)
    child = children.ask(stack, contender.turns(stack), put, scenario.drains, may_fail=not contender.ours)
    yield _judged(stack, scenario, contender, contents, child, IN_PROCESS)
    if contender.ours:
        part = scenarios.STEADY_ROWS
        put(scenario.drains)
        child = children.run(stack, contender.command(stack))
        found = bench.counts(stack)
        if (found.entries, found.pending) != (scenario.events + part, 0):
            raise Wrong(f"{found} after one more part of {part}")
        name = _named(contender, DAGSTER)
        yield Measured(contender=name, events=part, drains=1, seconds=child.seconds, child=child, arrived="all")
        yield _drain_alone(stack, contender, part)


def _judged(
    stack: LocalStack, scenario: Scenario, contender: Contender, contents: set[int], child: Child, how: str
) -> Measured:
    """The line of a contender that is done, or that stopped, or whose counts are wrong; ours may have no such counts."""
    if child.failure:
        return _nothing(contender, f"stopped, {bench.counts(stack).entries:,} entries: {child.failure}")
    try:
        arrived = contender.arrived(stack, scenario)
        if contender.writes_entries and not scenario.dead:
            contents.add(bench.content(stack))
            if len(contents) > 1:
                raise Wrong("other entries than those of the contenders before")
    except Wrong as wrong:
        if contender.ours:
            raise
        return _nothing(contender, f"wrong: {wrong}")
    return Measured(
        contender=_named(contender, how),
        events=scenario.events,
        drains=scenario.drains,
        seconds=child.seconds,
        child=child,
        arrived=arrived,
    )


def _named(contender: Contender, how: str) -> str:
    return f"{contender.name}, {how}" if contender.ours else contender.name


def _drain_alone(stack: LocalStack, contender: Contender, events: int) -> Measured:
    """From plan to verification in the Dagster run that has just ended; CPU and memory are in the line of the run."""
    return Measured(
        contender=_named(contender, DRAIN),
        events=events,
        drains=1,
        seconds=bench.drain_seconds(stack),
        child=None,
        arrived="all",
    )


def _nothing(contender: Contender, why: str) -> Measured:
    return Measured(contender=contender.name, events=0, drains=0, seconds=0.0, child=None, arrived=why)


def _table(measured: Sequence[Measured], entrants: Sequence[Contender]) -> str:
    """Medians over the rounds."""
    names = {contender.key: contender.name for contender in entrants}
    rates = {
        name: pd.Series([line.events / line.seconds for line in measured if line.contender == name and line.events])
        for name in dict.fromkeys(line.contender for line in measured)
    }
    ancestor = rates.get(names.get(ANCESTOR, ""), pd.Series(dtype=float))
    lines: dict[str, dict[str, str]] = {}
    for name, rate in rates.items():
        its = [line for line in measured if line.contender == name]
        done = [line for line in its if line.events]
        lines[name] = cells = {"events/s": "", "min–max": "", "× ancestor": "", "s a drain": ""}
        if done:
            cells["events/s"] = f"{rate.median():,.0f}"
            cells["min–max"] = f"{rate.min():,.0f}–{rate.max():,.0f}"
            cells["× ancestor"] = f"{rate.median() / ancestor.median():.2f}" if len(ancestor) else ""
            cells["s a drain"] = f"{pd.Series([line.seconds / line.drains for line in done]).median():,.3g}"
        for title, figure in CPU.items():
            spent = [getattr(line.child, figure) / line.events * 1e6 for line in done if line.child]
            cells[title] = f"{pd.Series(spent).median():,.0f}" if spent else ""
        peaks = [line.child.peak_rss_mb for line in done if line.child]
        cells["RSS MB"] = f"{pd.Series(peaks).median():,.0f}" if peaks else ""
        cells["arrived"] = its[-1].arrived + (
            f" ({len(done)} of {len(its)} rounds)" if 0 < len(done) < len(its) else ""
        )
    width = max(len(cells["arrived"]) for cells in lines.values())
    frame = pd.DataFrame.from_dict(lines, orient="index")
    frame["arrived"] = frame["arrived"].str.ljust(width)
    return frame.rename(columns={"arrived": "arrived".ljust(width)}).to_string()


def _others(measured: Sequence[Measured]) -> float:
    """Cores that the rest of the machine used while contenders ran: much of it, and the figures are worth little."""
    ran = [line.child for line in measured if line.child]
    return sum(child.others_cpu_s for child in ran) / max(sum(child.seconds for child in ran), 1e-9)


def parsed(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of every contender, in one table a scenario.")
    parser.add_argument("--rounds", type=int, help="of every scenario; 3, or 2 from a million events on")
    parser.add_argument("--contenders", default=",".join(contender.key for contender in CONTENDERS))
    parser.add_argument("scenarios", nargs="*", default=list(scenarios.MAKERS), help=", ".join(scenarios.MAKERS))
    options = parser.parse_args(arguments)
    try:
        selected = [scenario for text in options.scenarios for scenario in scenarios.named(text)]
        entrants = contenders.named(options.contenders)
    except ValueError as error:
        parser.error(str(error))
    main(selected, entrants, options.rounds)


if __name__ == "__main__":
    parsed()
