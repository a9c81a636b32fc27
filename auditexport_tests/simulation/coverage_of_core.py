"""`make simulate-coverage`: what of `core` the simulated histories ran, by lines and branches, and what they never reached.

HISTORIES (2,000) from SEED, in one process, because a history's threads are counted together.
"""

from __future__ import annotations

import os
import sys

import coverage


def main() -> None:
    # Before core is imported: its module level counts too.
    measured = coverage.Coverage(
        branch=True, source_pkgs=["auditexport_pipeline.core"], data_file=None, concurrency=["thread"]
    )
    measured.start()
    from auditexport_tests.simulation.choices import Choices
    from auditexport_tests.simulation.history import play

    first, histories = int(os.environ.get("SEED") or 1), int(os.environ.get("HISTORIES") or 2_000)
    for seed in range(first, first + histories):
        play(Choices(seed))
    measured.stop()
    print(f"{histories:,} histories from seed {first}")
    measured.report(show_missing=True, file=sys.stdout)


if __name__ == "__main__":
    main()
