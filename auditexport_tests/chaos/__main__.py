"""`make chaos`: one history after the other for CHAOS_SECONDS (600), and a report; ends with 1 on any violation.

CHAOS_SEED is the seed of the first history; each next history adds 1. A failed history is printed with its seed: that and
CHAOS_SECONDS=1 replay it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections import Counter
from pathlib import Path
from random import SystemRandom

from auditexport_tests.chaos.history import play
from auditexport_tests.chaos.rig import Rig
from auditexport_tests.chaos.world import Outcome, Plan


def main() -> int:
    """Plays histories until the time is over; returns the exit status."""
    for_s = float(os.environ.get("CHAOS_SECONDS") or 600)
    seed = int(os.environ.get("CHAOS_SEED") or SystemRandom().randrange(1_000_000) * 1_000)
    print(f"CHAOS_SEED={seed}", flush=True)
    outcomes: list[Outcome] = []
    with tempfile.TemporaryDirectory(prefix="auditexport_chaos_") as directory, Rig(Path(directory)) as rig:
        print(f"{rig.mysql.family} {rig.mysql.version}, embedded ClickHouse", flush=True)
        started = line_at = time.monotonic()
        while not outcomes or time.monotonic() - started < for_s:
            outcome = play(rig, Plan(seed=seed + len(outcomes)))
            outcomes.append(outcome)
            if outcome.verdict.violations:
                print(_failure(outcome), flush=True)
            if time.monotonic() - line_at >= 60:
                line_at = time.monotonic()
                counts = ", ".join(f"{name} {count:,}" for name, count in _counts(outcomes).items() if count)
                print(f"{line_at - started:6.0f} s: {counts}", flush=True)
    print(f"── {time.monotonic() - started:.0f} s of chaos, CHAOS_SEED={seed}")
    faults, errors = Counter[str](), Counter[str]()
    for outcome in outcomes:
        faults += outcome.hits
        errors += outcome.errors
    for title, counted in (("", _counts(outcomes)), ("faults that hit", faults), ("errors that runs met", errors)):
        print(title, *(f"  {name:<28}{count:>10,}" for name, count in sorted(counted.items())), sep="\n")
    return int(any(outcome.verdict.violations for outcome in outcomes))


def _counts(outcomes: list[Outcome]) -> dict[str, int]:
    verdicts = [outcome.verdict for outcome in outcomes]
    summed = ("batches", "replayed", "events", "entries", "dead", "lost", "duplicated")
    return {
        "histories": len(outcomes),
        "histories with violations": sum(bool(verdict.violations) for verdict in verdicts),
        "runs": sum(outcome.runs for outcome in outcomes),
        "kills": sum(outcome.kills.total() for outcome in outcomes),
        "zombies refused": sum(outcome.refused_zombies for outcome in outcomes),
        **{name: sum(getattr(verdict, name) for verdict in verdicts) for name in summed},
    }


def _failure(outcome: Outcome) -> str:
    verdict = outcome.verdict
    return "\n".join(
        (
            f"VIOLATED in the history of CHAOS_SEED={outcome.plan.seed}:",
            *(f"  {line}" for line in verdict.violations[:30]),
            *(f"    {line}" for line in verdict.ledger),
            f"    faults {dict(outcome.hits)}, errors {dict(outcome.errors)}",
        )
    )


if __name__ == "__main__":
    raise SystemExit(main())
