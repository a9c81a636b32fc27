"""Everything that one page shows, as values.

What belongs here: what `gather` brings and `page` draws. What does not: asking a database, and drawing.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from auditexport_pipeline.core.advice import Advice
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.series import BatchLine, Compared, Grid, Hour, LagBin, LetterCount, Servers


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """The numbers of a window of exports, [from_ms, to_ms), and of now."""

    at_ms: int
    from_ms: int
    to_ms: int
    servers: Servers
    backlog: Backlog
    said: str  # how it stands now, in a line, as `auditexport status` says it
    advice: Sequence[Advice]  # what an operator is needed for
    compared: Compared
    grid: Grid
    hours: Sequence[Hour]  # one for each step of the grid
    before: Hour  # everything whose event time lies before the grid, or after it
    after: Hour
    pending_cut_short: bool  # more rows are pending than were counted by hour
    lag: Sequence[LagBin]
    batches: Sequence[BatchLine]
    letters: Sequence[LetterCount]
    discrepant: Mapping[int, str] = field(default_factory=dict)

    @property
    def everywhen(self) -> Sequence[Hour]:
        """All bins of the grid, those at both ends included."""
        return [self.before, *self.hours, self.after]

    @property
    def rows(self) -> int:
        return sum(hour.rows for hour in self.everywhen)

    @property
    def entries(self) -> int:
        return sum(hour.entries for hour in self.everywhen)

    @property
    def pending(self) -> int:
        return sum(hour.pending for hour in self.everywhen)

    @property
    def open_letters(self) -> int:
        return self.backlog.dead_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """The page's first sentence, what stands under it, and what to do; `mood` is good, waiting or bad."""

    mood: str
    headline: str
    facts: Sequence[str]
    todo: Sequence[str]
