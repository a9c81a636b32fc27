"""`make simulate`: random histories on simulated databases, for SECONDS from SEED, on every core.

A history that breaks a promise is written to two files, step by step: the whole of it, and the shortest that was found.
Its seed replays it: `make simulate SEED=… HISTORIES=1`.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from auditexport_tests.simulation.choices import Choices
from auditexport_tests.simulation.history import play
from auditexport_tests.simulation.many import shrunk, simulate, story_of

FOUND = Path(".auditexport/simulation")
# Broken histories that are written to files.
MOST_TOLD = 3


def main() -> None:
    first = int(os.environ.get("SEED", "1"))
    seconds = float(os.environ.get("SECONDS", "600"))
    histories = int(os.environ["HISTORIES"]) if os.environ.get("HISTORIES") else None
    totals = simulate(first, seconds, histories)
    for seed in list(totals.broken)[:MOST_TOLD]:
        FOUND.mkdir(parents=True, exist_ok=True)
        (FOUND / f"seed-{seed}.txt").write_text(story_of(play(Choices(seed))))
        (FOUND / f"seed-{seed}-shrunk.txt").write_text(story_of(shrunk(seed)))
        print(f"seed {seed}: {FOUND}/seed-{seed}.txt, and shrunk beside it")
    for name, number in sorted(totals.happened.items()):
        print(f"  {number:9,}  {name}")
    print(totals)
    sys.exit(bool(totals.broken))


if __name__ == "__main__":
    main()
