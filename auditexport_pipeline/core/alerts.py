"""Alerts: what somebody is told, once, and when it is over.

What belongs here: which failures and numbers are worth a notice, what a notice says, and the memory that keeps it from
being said twice. What does not: reading runs and numbers, and sending (`defs.alerts`); what is wrong with the numbers and
what mends it (`core.status.advice`).

A condition stands from its first notice until it is settled. While it stands it is told again only when its cause is a new
one, or after `repeat_hours`. A notice that could not be sent waits in the memory, in order, and is tried at the next look.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from enum import Enum

import msgspec

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.status import Advice, Severity, Status, Targets, advice, shown_s

# The environment variable of a field of `Policy` is this and its name in capitals.
POLICY_VARIABLES = "AUDITEXPORT_ALERT_"
# Variables of the same beginning that say where notices go, and not when (`defs.resources`).
NO_POLICY = ("AUDITEXPORT_ALERT_WEBHOOK_URL",)
# Notices that wait for a webhook that does not answer; older ones are dropped and counted.
UNSENT = 20
# Ended runs that are remembered: those of every look that can overlap with the next one.
SEEN = 500
# Dagster stores the end of a run first and whether it will retry it a moment later.
RETRY_TOLD_WITHIN_MS = 60_000
# Causes of one standing condition that are told one by one; then it is one condition with many.
CAUSES = 8
# A notice is read on a telephone; an error's line is cut here, and Slack refuses 3,000 characters.
LINE = 600


# ── when ─────────────────────────────────────────────────────────────────────────────────────────


def _setting(default: float, low: float, high: float, meaning: str) -> float:
    return field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When somebody is told; what is wrong is said by `Targets`. Raises `InvalidConfig`, naming the field.

    By the environment: AUDITEXPORT_ALERT_REPEAT_HOURS, AUDITEXPORT_ALERT_REPEAT_WARNING_HOURS,
    AUDITEXPORT_ALERT_NOT_SHRINKING_MINUTES, AUDITEXPORT_ALERT_UNREACHABLE_MINUTES, AUDITEXPORT_ALERT_RETRY_MINUTES.
    """

    repeat_hours: float = _setting(6, 0.1, 8_760, "What still fails is told again after this long.")
    repeat_warning_hours: float = _setting(24, 0.1, 8_760, "A warning that still stands is told again after this long.")
    not_shrinking_minutes: float = _setting(
        10, 1, 1_440, "The lag is above its target and rows have not fallen, this long."
    )
    unreachable_minutes: float = _setting(3, 0, 1_440, "MySQL may be away this long, as in a failover.")
    retry_minutes: float = _setting(5, 1, 1_440, "A run that Dagster said it would launch again is, within this long.")

    def __post_init__(self) -> None:
        for setting in fields(self):
            value = getattr(self, setting.name)
            low, high = setting.metadata["low"], setting.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
                raise InvalidConfig(f"{setting.name} is {value!r}; it must be a number from {low:,} to {high:,}")

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Policy:
        """By the variables AUDITEXPORT_ALERT_…; raises `InvalidConfig`, naming the variable."""
        variables = {f"{POLICY_VARIABLES}{setting.name.upper()}": setting.name for setting in fields(cls)}
        values: dict[str, float] = {}
        for name, text in environment.items():
            if not name.startswith(POLICY_VARIABLES) or name in NO_POLICY or not text:
                continue
            if name not in variables:
                raise InvalidConfig(f"{name} is no setting; there are {', '.join(sorted((*variables, *NO_POLICY)))}")
            try:
                values[variables[name]] = float(text)
            except ValueError:
                raise InvalidConfig(f"{name} is {text!r}; it must be a number") from None
        try:
            return cls(**values)
        except InvalidConfig as error:
            raise InvalidConfig(f"{POLICY_VARIABLES}…: {error}") from None

    def repeat_ms(self, severity: str) -> float:
        return 3_600_000 * (self.repeat_hours if severity == Severity.ERROR.value else self.repeat_warning_hours)


# ── what is told ─────────────────────────────────────────────────────────────────────────────────


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """One message. Ids, counts and an error's own line; never a payload."""

    kind: str  # alert, still, recovered
    severity: str  # error, warning; of a recovery, what it had been
    about: str  # a job, or the `about` of an advice: stable, for whoever routes notices
    outbox: str  # the name of the outbox in its code location, or empty
    headline: str
    what: str
    todo: str
    since_ms: int
    at_ms: int
    job: str = ""
    run_id: str = ""
    link: str = ""

    @property
    def text(self) -> str:
        """The message in lines, with what Slack would take for markup escaped."""
        lines = [f"*{_escaped(self.title)}*", _escaped(self.what)]
        if self.run_id:
            lines.append(f"Run: {self.run_id}" + (f" {self.link}" if self.link else ""))
        lines.append(f"Since: {_when(self.since_ms)} ({shown_s((self.at_ms - self.since_ms) / 1000)})")
        if self.todo:
            lines.append(f"Do: {_escaped(self.todo)}")
        return "\n".join(line for line in lines if line)

    @property
    def title(self) -> str:
        mark = "RECOVERED" if self.kind == "recovered" else self.severity.upper()
        return f"[{mark}] auditexport{f' {self.outbox}' if self.outbox else ''}: {self.headline}"

    @property
    def body(self) -> dict[str, object]:
        """What Slack's incoming webhooks take, and Mattermost's, Discord's (/slack) and most others: `text` says everything,
        `attachments` the same by fields, for colour and for programs.
        """
        told = {
            "kind": self.kind,
            "severity": self.severity,
            "about": self.about,
            "outbox": self.outbox,
            "job": self.job,
            "run": self.run_id,
            "since": _when(self.since_ms),
        }
        colour = "good" if self.kind == "recovered" else "danger" if self.severity == "error" else "warning"
        return {
            "text": self.text,
            "attachments": [
                {
                    "color": colour,
                    "fallback": _escaped(self.title),
                    "fields": [{"title": name, "value": value, "short": True} for name, value in told.items() if value],
                }
            ],
        }


def _escaped(text: str) -> str:
    """As Slack asks; what an application chose could otherwise mention everybody."""
    cut = text if len(text) <= LINE else text[: LINE - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _when(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_ms / 1000))


# ── what stands ──────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Condition:
    """Something that is wrong now. `cause` tells a new reason of it from the same one again."""

    about: str
    severity: Severity
    cause: str
    headline: str
    what: str
    todo: str
    at_ms: int
    job: str = ""
    run_id: str = ""
    link: str = ""


class Standing(msgspec.Struct, kw_only=True):
    """A condition that was told and is not over."""

    severity: str
    headline: str
    since_ms: int
    told_ms: int
    times: int = 1
    causes: list[str] = []
    # The last time, for whoever is reminded.
    what: str = ""
    todo: str = ""
    job: str = ""
    run_id: str = ""
    link: str = ""


class Board(msgspec.Struct, kw_only=True):
    """What stands, and what has yet to be sent: the part of a sensor's cursor that both sensors have."""

    standing: dict[str, Standing] = {}
    unsent: list[Notice] = []
    dropped: int = 0

    def raised(self, condition: Condition, policy: Policy, *, outbox: str, now_ms: int) -> None:
        """It is so (again). Told when it is new, when its cause is, or after a long time."""
        stands = self.standing.get(condition.about)
        severity = condition.severity.value
        if stands is None:
            self.standing[condition.about] = stands = Standing(
                severity=severity,
                headline=condition.headline,
                since_ms=condition.at_ms,
                told_ms=now_ms,
                causes=[condition.cause],
            )
            kind = "alert"
        else:
            stands.times += 1
            new = condition.cause not in stands.causes and len(stands.causes) < CAUSES
            if new:
                stands.causes.append(condition.cause)
            if severity == Severity.ERROR.value:
                stands.severity = severity
            stands.headline = condition.headline
            kind = "alert" if new else "still" if now_ms - stands.told_ms >= policy.repeat_ms(stands.severity) else ""
        for name in ("what", "todo", "job", "run_id", "link"):
            setattr(stands, name, getattr(condition, name))
        if kind:
            self._tell(condition.about, stands, kind, outbox, now_ms)

    def reminded(self, policy: Policy, *, outbox: str, now_ms: int) -> None:
        """What stands for long is told again, whether or not anything happened since."""
        for about, stands in self.standing.items():
            if now_ms - stands.told_ms >= policy.repeat_ms(stands.severity):
                self._tell(about, stands, "still", outbox, now_ms)

    def settled(self, about: str, how: str, *, outbox: str, now_ms: int, run_id: str = "", link: str = "") -> None:
        """It is over: told once, if it stood."""
        stands = self.standing.pop(about, None)
        if stands is None:
            return
        self._put(
            Notice(
                kind="recovered",
                severity=stands.severity,
                about=about,
                outbox=outbox,
                headline=stands.headline,
                what=how,
                todo="",
                since_ms=stands.since_ms,
                at_ms=now_ms,
                job=stands.job,
                run_id=run_id,
                link=link,
            )
        )

    def _tell(self, about: str, stands: Standing, kind: str, outbox: str, now_ms: int) -> None:
        stands.told_ms = now_ms
        still = f"still so, {stands.times} times by now: " if kind == "still" and stands.job else ""
        self._put(
            Notice(
                kind=kind,
                severity=stands.severity,
                about=about,
                outbox=outbox,
                headline=stands.headline,
                what=still + stands.what,
                todo=stands.todo,
                since_ms=stands.since_ms,
                at_ms=now_ms,
                job=stands.job,
                run_id=stands.run_id,
                link=stands.link,
            )
        )

    def _put(self, notice: Notice) -> None:
        self.unsent.append(notice)
        if len(self.unsent) > UNSENT:
            self.unsent.pop(0)
            self.dropped += 1


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


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


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


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
