"""The child's side of `children.ask`: a drain for each line of standard input, so that start-up is not measured.

What belongs here: that loop. What does not: imports; whatever is imported here is start-up of every contender.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

ANSWER = "drained"


def answer(drain: Callable[[], int]) -> None:
    """Drains once for each line of standard input, and answers with the number of rows."""
    for _ in sys.stdin:
        print(ANSWER, drain(), flush=True)
