"""Alerts of numbers: what is worth a notice although no run failed, and what ends it.

What belongs here: a backlog that does not shrink, with its likely reasons, and what `core.advice` says of the rest. What
does not: reading the numbers (`defs.alerts`), and what a notice is (`core.notices`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import msgspec

from auditexport_pipeline.core.advice import Advice, Severity, advice
from auditexport_pipeline.core.notices import Board, Condition, Policy
from auditexport_pipeline.core.status import Status, shown_s
from auditexport_pipeline.core.targets import Targets


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The backlog at one look."""

    at_ms: int
    rows: int
    capped: bool  # counting had stopped
    lag_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Around:
    """What Dagster knows about drains of this outbox, for the likely reasons."""

    starters_on: Sequence[str] = ()  # the sensor and the schedule, where they are turned on
    starters_off: Sequence[str] = ()
    running: Sequence[str] = ()  # run ids
    queued: Sequence[str] = ()
    failed_in_a_row: int = 0
    last_failure: str = ""
    throttled_rows_per_s: float = 0


class NumberAlerts(msgspec.Struct, kw_only=True):
    """What the sensor on numbers remembers: the cursor, as JSON."""

    board: Board = msgspec.field(default_factory=Board)
    samples: list[Sample] = []
    away_since_ms: int | None = None

    def looked(
        self,
        status: Status,
        targets: Targets,
        policy: Policy,
        around: Callable[[], Around],
        *,
        outbox: str,
        now_ms: int,
    ) -> None:
        """MySQL has answered: what is wrong is raised, what no longer is is settled. `around` is asked only for reasons."""
        self.away_since_ms = None
        self._sample(status, policy, now_ms)
        wrong = [one for one in advice(status, targets) if one.severity is not Severity.NOTE and one.about != "lag"]
        conditions = {one.about: _advised(one, now_ms) for one in wrong}
        if self.stuck(targets, policy):
            conditions["lag"] = _not_shrinking(status, targets, around(), self.samples, now_ms)
        for condition in conditions.values():
            self.board.raised(condition, policy, outbox=outbox, now_ms=now_ms)
        backlog = status.backlog
        now = f"{backlog.shown_rows} rows pending, lag {shown_s(backlog.lag_s)}"
        for about in set(self.board.standing) - set(conditions):
            if about == "lag" and backlog.lag_s > targets.lag_s:
                continue  # shrinking, and not there yet: no second alarm, and no all-clear
            self.board.settled(about, f"it is over: {now}", outbox=outbox, now_ms=now_ms)

    def unanswered(self, line: str, policy: Policy, *, permanent: bool, outbox: str, now_ms: int) -> None:
        """MySQL could not be asked. Nothing is known of the rest: what stands stands."""
        if self.away_since_ms is None:
            self.away_since_ms = now_ms
        if permanent or now_ms - self.away_since_ms >= policy.unreachable_minutes * 60_000:
            condition = Condition(
                about="mysql",
                severity=Severity.ERROR,
                cause="refused" if permanent else "away",
                headline="the outbox cannot be read",
                what=line,
                todo="auditexport doctor"
                if permanent
                else "is MySQL up, and can this host reach it? auditexport doctor",
                at_ms=self.away_since_ms,
            )
            self.board.raised(condition, policy, outbox=outbox, now_ms=now_ms)

    def stuck(self, targets: Targets, policy: Policy) -> bool:
        """The lag was above its target at every look of the last `not_shrinking_minutes`, and rows have not fallen.

        Where counting had stopped at both ends, the lag tells: it grows while the oldest row stays.
        """
        if not self.samples:
            return False
        first, last = self.samples[0], self.samples[-1]
        if last.at_ms - first.at_ms < policy.not_shrinking_minutes * 60_000:
            return False
        if any(sample.lag_s <= targets.lag_s for sample in self.samples):
            return False
        return last.lag_s >= first.lag_s if first.capped and last.capped else last.rows >= first.rows

    def _sample(self, status: Status, policy: Policy, now_ms: int) -> None:
        backlog = status.backlog
        self.samples.append(
            Sample(at_ms=now_ms, rows=backlog.rows, capped=backlog.rows_at_least, lag_s=round(backlog.lag_s, 1))
        )
        # The newest one that is old enough is the first; a clock that was set back begins anew.
        from_ms = now_ms - policy.not_shrinking_minutes * 60_000
        while len(self.samples) > 1 and (self.samples[1].at_ms <= from_ms or self.samples[0].at_ms > now_ms):
            self.samples.pop(0)


def _advised(one: Advice, now_ms: int) -> Condition:
    return Condition(
        about=one.about,
        severity=one.severity,
        cause=one.severity.value,
        headline=one.about.replace("_", " "),
        what=one.what,
        todo=one.todo,
        at_ms=now_ms,
    )


def _not_shrinking(
    status: Status, targets: Targets, around: Around, samples: Sequence[Sample], now_ms: int
) -> Condition:
    backlog = status.backlog
    first = samples[0]
    minutes = shown_s((now_ms - first.at_ms) / 1000)
    was = f"{first.rows:,}+" if first.capped else f"{first.rows:,}"
    why = "; ".join(reasons(status, around))
    return Condition(
        about="lag",
        severity=Severity.ERROR,
        cause="not shrinking",
        headline="the backlog is not shrinking",
        what=f"{backlog.shown_rows} rows are pending ({was} {minutes} ago), the oldest for {shown_s(backlog.lag_s)} "
        f"(target {shown_s(targets.lag_s)}). Likely: {why}",
        todo="auditexport status; auditexport drain exports from a prompt, without Dagster",
        at_ms=now_ms - int(backlog.lag_s * 1000),
    )


def reasons(status: Status, around: Around) -> list[str]:
    """Why a backlog may not shrink, the likeliest first; never empty."""
    found = []
    if around.failed_in_a_row:
        runs = "the last run" if around.failed_in_a_row == 1 else f"the last {around.failed_in_a_row} runs"
        found.append(f"{runs} failed" + (f" ({around.last_failure})" if around.last_failure else ""))
    at_work = bool(around.running or status.at_work)
    if not at_work and around.queued:
        found.append(f"run {_named(around.queued)} waits in the queue: is another run holding the pool?")
    elif not at_work:
        found.append("no run is at work" + ("" if around.starters_on else ", and nothing starts one"))
    if not at_work and around.starters_off and not around.starters_on:
        found.append(f"{' and '.join(around.starters_off)} are off")
    if at_work:
        who = f"run {_named(around.running)}" if around.running else ", ".join(status.at_work)
        if not status.rows_per_s:
            found.append(f"{who} is at work and has exported nothing lately")
        else:
            found.append(f"{who} exports {status.rows_per_s:,.0f} rows/s, and more than that arrives")
    if around.throttled_rows_per_s:
        found.append(f"it is throttled to {around.throttled_rows_per_s:,.0f} rows/s by max_rows_per_second")
    waiting = status.backlog.waiting_batches
    if waiting:
        found.append(f"{waiting:,} batches are stopped until their lease ends")
    if status.backlog.unknown_rows:
        found.append(f"besides, {status.backlog.unknown_rows:,} rows are of unknown versions, which no drain takes")
    return found


def _named(run_ids: Iterable[str]) -> str:
    return ", ".join(run_id[:8] for run_id in run_ids)
