"""How fast: each contender on the same servers and the same outbox, in turns, several rounds, one table a scenario.

    python -m auditexport_tests.benchmarks.speed [--rounds N] [--contenders a,b] [scenario[:events] …]

A round runs each contender once, and each round begins with another one. CPU seconds are those until the exporter ended.
Merges and purges that it leaves to the servers are waited for, and not counted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import pandas as pd

from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench, children, scenarios
from auditexport_tests.benchmarks.children import Child
from auditexport_tests.benchmarks.scenarios import Scenario

# CPU seconds per million events.
CPU = {"CPU: exporter": "cpu_s", "MySQL": "mysql_cpu_s", "ClickHouse": "clickhouse_cpu_s"}
NOTES = """
events/s, seconds, CPU and RSS are medians of the rounds. CPU: seconds per million events, of the exporter and of both servers
until it ended. RSS: the peak of the exporter's process tree, in 10^6 bytes. A Dagster run is a process from start to end; the
drain in it is from its plan to its verification. tuned: binlog_row_image=MINIMAL, which takes a grant, and batches of 150,000
rows. The ancestor exports a batch twice when ClickHouse's answer is lost, stops for good at a malformed row, verifies nothing,
and holds its rows locked while it waits for ClickHouse.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """An exporter. Ours is a Dagster run under `limits`; `options` are those of the outbox's URL."""

    key: str
    name: str
    module: str
    options: str = ""
    limits: Mapping[str, int] = field(default_factory=dict)

    @property
    def is_ours(self) -> bool:
        return self.module == "ours"

    def process(self, stack: LocalStack, *options: str) -> list[str]:
        """The command of the drain without Dagster."""
        module = f"auditexport_tests.benchmarks.{self.module}"
        return [sys.executable, "-m", module, stack.outbox.url + self.options, stack.log.url, *options]

    def dagster_run(self, stack: LocalStack, scenario: Scenario) -> list[str]:
        """A run as the sensor launches it, with as many batches as the scenario needs."""
        limits = Limits(**self.limits)
        payload_bytes = scenario.events * (scenario.payload_bytes or 0)
        batches = 1 + max(scenario.events // limits.batch_rows, payload_bytes // limits.batch_bytes)
        settings = {**self.limits, "max_batches": max(limits.max_batches, 2 * batches)}
        config = stack.directory / "config.yaml"
        config.write_text(json.dumps({"ops": {"audit_logs_raw_v1": {"config": settings}}}))  # which is YAML
        url = f"AUDITEXPORT_MYSQL_URL={stack.outbox.url}{self.options}"
        return ["env", url, *bench.DAGSTER_DRAIN, "--config", str(config)]


OURS = Contender(key="auditexport", name="auditexport", module="ours")
ANCESTOR = Contender(key="ancestor", name="ancestor's algorithm", module="ancestor")
CONTENDERS = {
    contender.key: contender
    for contender in (
        OURS,
        Contender(
            key="tuned",
            name="auditexport, tuned",
            module="ours",
            options="?binlog_row_image=MINIMAL",
            limits={"batch_rows": 150_000, "batch_bytes": 96 * 1024**2},
        ),
        ANCESTOR,
    )
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """One line of one round: `events` in `seconds`, in so many `drains`. `failure` is why a contender stopped."""

    contender: str
    events: int = 0
    drains: int = 1
    seconds: float = 0.0
    child: Child | None = None
    failure: str = ""


def main(selected: Sequence[Scenario], entrants: Sequence[Contender], rounds: int | None = None) -> None:
    for scenario in selected:
        with bench.benchmark_stack() as stack:
            if scenario is selected[0]:
                bench.print_machine(stack)
            number = rounds or scenario.rounds
            print(f"\n{scenario.name}: {scenario.title}; rounds: {number}", flush=True)
            # Not measured: the first to run reads all libraries from the disk, above all the engine's.
            scenarios.WARM_UP.seed(stack)
            list(_round(stack, scenarios.WARM_UP, entrants, set()))
            scenario.seed(stack)
            contents: set[int] = set()
            measured: list[Measured] = []
            for turn in range(number):
                first = turn % len(entrants)
                measured += _round(stack, scenario, [*entrants[first:], *entrants[:first]], contents)
        print(_table(measured), flush=True)
        ran = [line.child for line in measured if line.child]
        others = sum(child.others_cpu_s for child in ran) / max(sum(child.seconds for child in ran), 1e-9)
        print(f"Other processes used {others:.1f} of {os.cpu_count()} cores meanwhile.", flush=True)
    print(NOTES)


def _round(
    stack: LocalStack, scenario: Scenario, entrants: Sequence[Contender], contents: set[int]
) -> Iterator[Measured]:
    """Each contender once; `contents` are the checksums of the entries written so far, which have to be the same."""
    for contender in entrants:
        bench.restore(stack)
        put, ours = scenario.part(stack), contender.is_ours
        if scenario.drains > 1:
            command = contender.process(stack, "--turns")
            child = children.ask(stack, command, put, scenario.drains, may_fail=not ours)
        elif ours:
            child = children.run(stack, contender.dagster_run(stack, scenario))
        else:
            child = children.run(stack, contender.process(stack), may_fail=True)
        how = f", {'a Dagster run' if scenario.drains == 1 else 'without Dagster'}" * ours
        name = contender.name + how
        if child.failure:
            yield Measured(contender=name, failure=child.failure)
            continue
        _check(stack, scenario.events, scenario.dead, contents)
        yield Measured(
            contender=name, events=scenario.events, drains=scenario.drains, seconds=child.seconds, child=child
        )
        if ours:
            events = scenario.events
            if scenario.drains > 1:  # and one part more, by a Dagster run
                events = scenarios.STEADY_ROWS
                put(scenario.drains)
                child = children.run(stack, contender.dagster_run(stack, scenario))
                _check(stack, scenario.events + events, 0, set())
                run = f"{contender.name}, a Dagster run"
                yield Measured(contender=run, events=events, seconds=child.seconds, child=child)
            _, seconds = stack.last_drain()
            yield Measured(contender=f"{contender.name}, the drain in it", events=events, seconds=seconds)


def _check(stack: LocalStack, events: int, dead: int, contents: set[int]) -> None:
    """Each event is there once, each malformed row is a dead letter, and the entries are those of the contenders before."""
    found = bench.counts(stack)
    assert found == bench.Counts(entries=events, events=events, pending=dead, dead=dead), found
    contents.add(bench.content(stack))
    assert len(contents) == 1, "a contender wrote other entries"


def _table(measured: Sequence[Measured]) -> str:
    """Medians over the rounds."""

    def median(values: list[float], form: str) -> str:
        return format(float(pd.Series(values).median()), form) if values else ""

    def rates(name: str) -> list[float]:
        return [line.events / line.seconds for line in measured if line.contender == name and line.events]

    ancestor = rates(ANCESTOR.name)
    lines: dict[str, dict[str, str]] = {}
    for name in dict.fromkeys(line.contender for line in measured):
        its = [line for line in measured if line.contender == name]
        done = [line for line in its if line.events]
        ran = [(line.child, line.events) for line in done if line.child]
        rate = rates(name)
        lines[name] = {
            "events/s": median(rate, ",.0f"),
            "min–max": f"{min(rate):,.0f}–{max(rate):,.0f}" if rate else "",
            "× ancestor": f"{pd.Series(rate).median() / pd.Series(ancestor).median():.2f}" if rate and ancestor else "",
            "s a drain": median([line.seconds / line.drains for line in done], ",.3g"),
            **{
                title: median([getattr(child, figure) / events * 1e6 for child, events in ran], ",.0f")
                for title, figure in CPU.items()
            },
            "RSS MB": median([child.peak_rss_mb for child, _ in ran], ",.0f"),
            "": "" if done else f"stopped: {its[-1].failure}",
        }
    return pd.DataFrame.from_dict(lines, orient="index").to_string()


def parsed(arguments: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Speed of each contender, in one table a scenario.")
    parser.add_argument("--rounds", type=int, help="of each scenario; 3, or 2 from a million events on")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="by default all")
    parser.add_argument("scenarios", nargs="*", default=[*scenarios.SCENARIOS], help=", ".join(scenarios.SCENARIOS))
    options = parser.parse_args(arguments)
    try:
        selected = [scenario for text in options.scenarios for scenario in scenarios.named(text)]
        entrants = [CONTENDERS[key] for key in options.contenders.split(",")]
    except KeyError as error:
        parser.error(f"no contender {error}; choose from {', '.join(CONTENDERS)}")
    except ValueError as error:
        parser.error(str(error))
    main(selected, entrants, options.rounds)


if __name__ == "__main__":
    parsed()
