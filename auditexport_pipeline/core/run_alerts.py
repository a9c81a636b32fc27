"""Alerts of runs: which failed runs are worth a notice, and what ends it.

What belongs here: what Dagster says of retries, and the memory of what was heard. What does not: reading runs
(`defs.alerts`), and what a notice is (`core.notices`).
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

import msgspec

from auditexport_pipeline.core.advice import Severity
from auditexport_pipeline.core.notices import Board, Condition, Policy

# Ended runs that are remembered: those of every look that can overlap with the next one.
SEEN = 500
# Dagster stores the end of a run first and whether it will retry it a moment later.
RETRY_TOLD_WITHIN_MS = 60_000


class Retry(str, Enum):
    """What Dagster says about launching a failed run again."""

    NO = "no"
    WILL = "will"  # and has not yet
    LAUNCHED = "launched"
    UNTOLD = "untold"  # not said yet, or never


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a run failed, in one line. `error` is the name of the error's class, or of what happened to the worker."""

    error: str
    step: str
    line: str
    rerun_helps: bool | None  # None: it was not one of our errors
    told: bool = False  # the step told of it itself, the heartbeat too


@dataclass(frozen=True, slots=True, kw_only=True)
class Ended:
    """A run of ours that has ended. `subject` is what failed or works again: all ways to launch a drain are one."""

    run_id: str
    job: str
    subject: str
    ended_ms: int
    retry: Retry = Retry.NO
    failure: Failure | None = None  # None: it succeeded
    link: str = ""


class Waiting(msgspec.Struct, frozen=True, kw_only=True):
    """A failure that nobody was told of, because Dagster said that it would launch the run again."""

    subject: str
    job: str
    ended_ms: int
    error: str
    step: str
    line: str
    link: str


class RunAlerts(msgspec.Struct, kw_only=True):
    """What the sensor on runs remembers: the cursor, as JSON."""

    from_ms: int  # nothing that ended before is told
    looked_ms: int
    board: Board = msgspec.field(default_factory=Board)
    seen: dict[str, int] = {}
    waiting: dict[str, Waiting] = {}
    good_ms: dict[str, int] = {}
    fail_owed: bool = False  # the heartbeat's /fail that could not be sent

    def is_new(self, run_id: str, ended_ms: int) -> bool:
        """Whether an ended run has to be looked into: once, and once more while its retry is awaited."""
        return run_id in self.waiting or (ended_ms >= self.from_ms and run_id not in self.seen)

    def is_news(self, run: Ended) -> bool:
        """Whether no run of its subject has succeeded since this one ended."""
        return run.ended_ms >= self.good_ms.get(run.subject, 0)

    def heard(self, run: Ended, policy: Policy, *, outbox: str, now_ms: int) -> None:
        """A run has ended; in the order of their ends."""
        if run.failure is None:
            self._succeeded(run, outbox, now_ms)
        elif run.retry is Retry.UNTOLD and now_ms - run.ended_ms < RETRY_TOLD_WITHIN_MS:
            return  # the next look sees it again
        elif run.retry is Retry.LAUNCHED:
            self.waiting.pop(run.run_id, None)
        elif run.retry is Retry.WILL:
            waits = Waiting(
                subject=run.subject,
                job=run.job,
                ended_ms=run.ended_ms,
                error=run.failure.error,
                step=run.failure.step,
                line=run.failure.line,
                link=run.link,
            )
            self.waiting.setdefault(run.run_id, waits)
        else:
            self.waiting.pop(run.run_id, None)
            if self.is_news(run):
                self.board.raised(_failed(run, run.failure), policy, outbox=outbox, now_ms=now_ms)
        self.seen[run.run_id] = run.ended_ms
        for run_id in sorted(self.seen, key=lambda one: self.seen[one])[:-SEEN]:
            del self.seen[run_id]

    def overdue(self, policy: Policy, *, outbox: str, now_ms: int) -> list[Ended]:
        """Runs whose retry Dagster promised and that did not come: a daemon can lose one."""
        given_up = []
        for run_id, waits in list(self.waiting.items()):
            if now_ms - waits.ended_ms < policy.retry_minutes * 60_000:
                continue
            del self.waiting[run_id]
            failure = Failure(
                error=waits.error,
                step=waits.step,
                line=f"{waits.line} — Dagster said that it would launch it again, and has not",
                rerun_helps=None,
            )
            run = Ended(
                run_id=run_id,
                job=waits.job,
                subject=waits.subject,
                ended_ms=waits.ended_ms,
                failure=failure,
                link=waits.link,
            )
            self.board.raised(_failed(run, failure), policy, outbox=outbox, now_ms=now_ms)
            given_up.append(run)
        return given_up

    def _succeeded(self, run: Ended, outbox: str, now_ms: int) -> None:
        self.good_ms[run.subject] = max(run.ended_ms, self.good_ms.get(run.subject, 0))
        for run_id in [one for one, waits in self.waiting.items() if waits.subject == run.subject]:
            if self.waiting[run_id].ended_ms <= run.ended_ms:
                del self.waiting[run_id]
        stands = self.board.standing.get(run.subject)
        failed = f"; {stands.times} runs had failed" if stands is not None and stands.times > 1 else ""
        self.board.settled(
            run.subject,
            f"a run of {run.job} has succeeded{failed}",
            outbox=outbox,
            now_ms=now_ms,
            run_id=run.run_id,
            link=run.link,
        )


def _failed(run: Ended, failure: Failure) -> Condition:
    at = f" at {failure.step}" if failure.step else ""
    return Condition(
        about=run.subject,
        severity=Severity.ERROR,
        cause=f"{failure.error}{at}",
        headline=f"{run.job} failed",
        what=f"{failure.error}{at}: {failure.line}",
        todo=_todo(failure),
        at_ms=run.ended_ms,
        job=run.job,
        run_id=run.run_id,
        link=run.link,
    )


_TODO = {
    "SetupIncomplete": "auditexport doctor: it prints the statement that mends it",
    "InvalidConfig": "correct the setting that the line names, then launch again",
    "VerificationFailed": "auditexport reconcile --repair; then a drain, and reconcile again",
    "BatchAltered": "auditexport batches list; somebody changes outbox rows after they were written",
    "IncompleteRun": "launch a new run: it adopts what this one left",
}


def _todo(failure: Failure) -> str:
    if failure.error in _TODO:
        return _TODO[failure.error]
    if failure.rerun_helps:
        return (
            "nothing is lost and the next run continues; if it fails too: auditexport status, then auditexport doctor"
        )
    if failure.rerun_helps is None:
        return (
            "nothing is lost and the next run continues; look at the run's log, and for a worker that ended at its "
            "host: memory, deployment, node"
        )
    return "the run's log; then auditexport doctor"
