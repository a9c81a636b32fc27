"""`make chaos`: histories, one after the other, for CHAOS_SECONDS (600), and a report; ends with 1 on any violation.

What belongs here: the loop, a line a minute, and the table at the end. What does not: what a history is (`history`).
CHAOS_SEED is the first history's seed, each next one is one more: a failed history is replayed by its own seed,
printed with it, and CHAOS_SECONDS=1.
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
                print(_line(outcomes, line_at - started), flush=True)
    print(_report(outcomes, time.monotonic() - started), flush=True)
    return int(any(outcome.verdict.violations for outcome in outcomes))


def _total(outcomes: list[Outcome], what: str) -> Counter[str]:
    total: Counter[str] = Counter()
    for outcome in outcomes:
        total.update(getattr(outcome, what))
    return total


def _line(outcomes: list[Outcome], seconds: float) -> str:
    verdicts = [outcome.verdict for outcome in outcomes]
    return (
        f"{seconds:6.0f} s: {len(outcomes)} histories, {sum(outcome.runs for outcome in outcomes)} runs, "
        f"{sum(_total(outcomes, 'kills').values())} kills, {sum(_total(outcomes, 'hits').values())} faults, "
        f"{sum(verdict.events for verdict in verdicts):,} events, {sum(verdict.lost for verdict in verdicts)} lost, "
        f"{sum(verdict.duplicated for verdict in verdicts)} duplicated, "
        f"{sum(bool(verdict.violations) for verdict in verdicts)} histories with violations"
    )


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


def _report(outcomes: list[Outcome], seconds: float) -> str:
    verdicts = [outcome.verdict for outcome in outcomes]
    rows = {
        "histories": len(outcomes),
        "runs": sum(outcome.runs for outcome in outcomes),
        **{f"kills of {target}": count for target, count in sorted(_total(outcomes, "kills").items())},
        "zombies refused": sum(outcome.refused_zombies for outcome in outcomes),
        "batches": sum(verdict.batches for verdict in verdicts),
        "batches replayed": sum(verdict.replayed for verdict in verdicts),
        "replayed in another month": sum(verdict.month_changed for verdict in verdicts),
        "events": sum(verdict.events for verdict in verdicts),
        "entries": sum(verdict.entries for verdict in verdicts),
        "dead letters": sum(verdict.dead for verdict in verdicts),
        "lost": sum(verdict.lost for verdict in verdicts),
        "duplicated": sum(verdict.duplicated for verdict in verdicts),
        "histories with violations": sum(bool(verdict.violations) for verdict in verdicts),
    }
    faults = {name: n for name, n in sorted(_total(outcomes, "hits").items()) if not name.startswith("kill ") and n}
    errors = _total(outcomes, "errors")
    lines = [f"── {seconds:.0f} s of chaos, CHAOS_SEED={outcomes[0].plan.seed}"]
    for title, counts in (("", rows), ("faults that hit", faults), ("errors that runs met", dict(errors))):
        lines += [title, *(f"  {name:<28}{count:>10,}" for name, count in counts.items())]
    return "\n".join(lines)


if __name__ == "__main__":
    raise SystemExit(main())
