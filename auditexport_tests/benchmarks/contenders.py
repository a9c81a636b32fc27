"""Who drains: how each exporter is started, what has to be there before, what it leaves behind, and what it lacks.

What belongs here: one `Contender` each. What does not: the exporters themselves (`ours`, `ancestor`, `by_hand`,
`peer_*`), scenarios, and measuring (`speed`).
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench, by_hand, peers
from auditexport_tests.benchmarks.scenarios import Scenario

HERE = Path(__file__).parent
MODULES = "auditexport_tests.benchmarks"


class Wrong(AssertionError):
    """What is there is not what was moved."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Contender:
    """One exporter. `command` drains once, `turns` whenever it is asked (`children.ask`). `prepare` puts its own things
    back to nothing, and raises `peers.NotInstalled`; `arrived` says in words what is there, and raises `Wrong`. All that
    write entries have to write the same ones. Ours is a Dagster run, under `limits` where they are not the shipped ones.
    """

    key: str
    name: str
    lacks: str
    command: Callable[[LocalStack], list[str]]
    turns: Callable[[LocalStack], list[str]]
    arrived: Callable[[LocalStack, Scenario], str]
    prepare: Callable[[LocalStack], None] = lambda _stack: None
    writes_entries: bool = True
    ours: bool = False
    limits: Mapping[str, int] = field(default_factory=dict)


def _python(module: str, *options: str, outbox: str = "") -> Callable[[LocalStack], list[str]]:
    """A module of the benchmarks; `outbox` goes to the end of the outbox's URL."""
    return lambda stack: [
        *(sys.executable, "-m", f"{MODULES}.{module}"),
        *(stack.outbox.url + outbox, stack.log.url, *options),
    ]


def _dagster(outbox: str = "") -> Callable[[LocalStack], list[str]]:
    return lambda stack: ["env", f"AUDITEXPORT_MYSQL_URL={stack.outbox.url}{outbox}", *bench.DAGSTER_DRAIN]


# ── what is there afterwards ────────────────────────────────────────────────────────────────────


def _all_of_it(stack: LocalStack, scenario: Scenario) -> str:
    """Every sound event once, every malformed row set aside, everything else marked."""
    found = bench.counts(stack)
    wanted = bench.Counts(entries=scenario.events, events=scenario.events, pending=scenario.dead, dead=scenario.dead)
    if found != wanted:
        raise Wrong(f"{found}, not {wanted}")
    return f"all, {found.dead:,} set aside" if scenario.dead else "all"


def _marked(stack: LocalStack, scenario: Scenario) -> str:
    """As many entries as rows were marked."""
    found = bench.counts(stack)
    return _entries(found, scenario) + (f"; {found.pending:,} rows unmarked" if found.pending else "")


def _unmarked(stack: LocalStack, scenario: Scenario) -> str:
    return _entries(bench.counts(stack), scenario)


def _entries(found: bench.Counts, scenario: Scenario) -> str:
    if not scenario.dead:
        if (found.entries, found.events) != (scenario.events, scenario.events):
            raise Wrong(f"{found.entries:,} entries of {found.events:,} events, not {scenario.events:,}")
        return "all"
    return f"{found.entries:,} entries of {scenario.events:,} sound events"


# ── peers ───────────────────────────────────────────────────────────────────────────────────────


def _prepare_quickhouse(stack: LocalStack) -> None:
    """A table that stores nothing, and a view on it that decodes what arrives: the least that it can cost."""
    peers.python("quickhouse")
    client = stack.log.client()
    for name in ("outbox_copy_decoded", "outbox_copy", "_quickhouse_state"):
        client.command(f"DROP TABLE IF EXISTS {name}")
    client.command("CREATE TABLE outbox_copy (pk UInt64, version String, payload String) ENGINE = Null")
    rows = f"outbox_copy WHERE version = '{Limits().versions[0]}'"
    decoded = by_hand.ENTRIES.format(inserted_at="toUnixTimestamp64Milli(now64(3))", rows=rows)
    client.command(f"CREATE MATERIALIZED VIEW outbox_copy_decoded TO audit_logs_raw_v1 AS {decoded}")


def _quickhouse(*options: str) -> Callable[[LocalStack], list[str]]:
    return lambda stack: [
        peers.python("quickhouse"),
        *("-I", str(HERE / "peer_quickhouse.py")),
        *(stack.outbox.url, stack.log.url, str(bench.last_marked_pk(stack)), *options),
    ]


def _dlt_files(stack: LocalStack) -> Path:
    return stack.directory / "dlt"


def _prepare_dlt(stack: LocalStack) -> None:
    peers.python("dlt")
    shutil.rmtree(_dlt_files(stack), ignore_errors=True)


def _dlt(*options: str) -> Callable[[LocalStack], list[str]]:
    return lambda stack: [
        peers.python("dlt"),
        *("-I", str(HERE / "peer_dlt.py")),
        *(stack.outbox.url, str(_dlt_files(stack)), str(bench.last_marked_pk(stack)), *options),
    ]


def _in_files(stack: LocalStack, scenario: Scenario) -> str:
    rows = int(subprocess.run(_dlt("--count")(stack), check=True, capture_output=True, text=True).stdout)
    if rows != scenario.events + scenario.dead:
        raise Wrong(f"{rows:,} rows in files, not {scenario.events + scenario.dead:,}")
    return "all rows, into files"


# ── all of them ─────────────────────────────────────────────────────────────────────────────────


def dagster_run(contender: Contender, stack: LocalStack, scenario: Scenario) -> list[str]:
    """A run as the sensor launches it, allowed as many batches as the scenario needs."""
    limits = Limits(**contender.limits)
    payload_bytes = scenario.events * (scenario.payload_bytes or 0)
    batches = 1 + max(scenario.events // limits.batch_rows, payload_bytes // limits.batch_bytes)
    settings = {**contender.limits, **({"max_batches": 2 * batches} if batches > limits.max_batches else {})}
    if not settings:
        return contender.command(stack)
    config = stack.directory / "config.yaml"
    lines = "".join(f"      {name}: {value}\n" for name, value in settings.items())
    config.write_text(f"ops:\n  audit_logs_raw_v1:\n    config:\n{lines}")
    return [*contender.command(stack), "--config", str(config)]


# For whoever may: marks without the payloads in the binary log.
MINIMAL_IMAGES = "?binlog_row_image=MINIMAL"
ANCESTOR = "ancestor"
CONTENDERS: Sequence[Contender] = (
    Contender(
        key="auditexport",
        name="auditexport",
        lacks="nothing that is promised in the README; the other rows are measured against that",
        command=_dagster(),
        turns=_python("ours"),
        arrived=_all_of_it,
        ours=True,
    ),
    Contender(
        key="tuned",
        name="auditexport, tuned",
        lacks="the same as shipped, but for full images of marked rows in the binary log (binlog_row_image=MINIMAL, which "
        "takes a grant), and a seventh more memory (batches of 150,000 rows)",
        command=_dagster(MINIMAL_IMAGES),
        turns=_python("ours", outbox=MINIMAL_IMAGES),
        arrived=_all_of_it,
        ours=True,
        limits={"batch_rows": 150_000, "batch_bytes": 96 * 1024**2},
    ),
    Contender(
        key=ANCESTOR,
        name="ancestor's algorithm",
        lacks="exactly once (a lost answer of ClickHouse exports a batch twice), quarantine (a bad row stops it for good), "
        "verification, a ledger; its transaction is open, and its rows locked, while ClickHouse is asked",
        command=_python("ancestor"),
        turns=_python("ancestor", "--turns"),
        arrived=_marked,
    ),
    Contender(
        key="by_hand",
        name="by hand, through mysql()",
        lacks="exactly once (a range that is tried again is there twice; rows that commit late into a range are marked and "
        "never exported), quarantine (a bad row is an empty entry or the end), verification, a ledger",
        command=_python("by_hand"),
        turns=_python("by_hand", "--turns"),
        arrived=_marked,
    ),
    Contender(
        key="quickhouse",
        name="quickhouse 0.21.0 and a view",
        lacks="marking, rows that commit late (it goes by the highest pk it saw), exactly once (a sync that is tried again "
        "inserts again), quarantine (a bad row is an empty entry or the end), verification, a ledger; decoding is done by a "
        "view of ours in ClickHouse",
        command=_quickhouse(),
        turns=_quickhouse("--turns"),
        arrived=_unmarked,
        prepare=_prepare_quickhouse,
    ),
    Contender(
        key="dlt",
        name="dlt 1.31.0, into files only",
        lacks="here the whole writing half (its ClickHouse destination needs the native port, which the embedded ClickHouse "
        "has not) and decoding; also marking, rows that commit late (it goes by the highest pk it saw), verification",
        command=_dlt(),
        turns=_dlt("--turns"),
        arrived=_in_files,
        prepare=_prepare_dlt,
        writes_entries=False,
    ),
)


def named(keys: str) -> list[Contender]:
    """Contenders by keys with commas between. Raises `ValueError` for one that does not exist."""
    known = {contender.key: contender for contender in CONTENDERS}
    unknown = [key for key in keys.split(",") if key not in known]
    if unknown:
        raise ValueError(f"{', '.join(unknown)}: no such contender; choose from {', '.join(known)}")
    return [known[key] for key in keys.split(",")]
