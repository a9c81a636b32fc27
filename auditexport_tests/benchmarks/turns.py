"""The child's side of `children.ask`. It imports nothing else: imports would count as the start-up time of each contender."""

from __future__ import annotations

import sys
from collections.abc import Callable

ANSWER = "drained"


def answer(drain: Callable[[], int]) -> None:
    """Drains once for each line of standard input, and prints the number of rows."""
    for _ in sys.stdin:
        print(ANSWER, drain(), flush=True)
