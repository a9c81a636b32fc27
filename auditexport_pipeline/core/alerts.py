"""Alerts: fire, repeat, resolve.

An alert fires when something is wrong, and again for each new cause. While it is active it is repeated after hours. When it
is over, one recovery is sent. A notice that cannot be sent waits, in order, for the next tick.

`RunAlerts` and `NumberAlerts` are the cursors of two sensors, as JSON; a field's `name=` is what stored cursors call it.
`core.advice` has the sentences; `defs.alerts` reads runs and numbers, and sends.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from enum import Enum
from typing import Any, ClassVar

import msgspec
from pydantic import Field

from auditexport_pipeline.core.advice import (
    Advice,
    Drains,
    Failure,
    Severity,
    advice,
    not_shrinking,
    run_failed,
    unreachable,
)
from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.format import counted, format_duration, format_time
from auditexport_pipeline.core.settings import Settings, Targets
from auditexport_pipeline.core.status import Status

# Notices that wait while the webhook does not answer; older ones are dropped and counted.
UNSENT = 20
# Causes of one alert that are each notified; a further cause is not.
CAUSES = 8
# Characters of a line: notices are read on telephones, and Slack refuses 3,000.
LINE = 600
# Ended runs that are remembered, more than two overlapping ticks read.
SEEN = 500
# Dagster stores the end of a run first, and a moment later whether it will retry the run.
RETRY_KNOWN_WITHIN_MS = 60_000


class Policy(Settings):
    """When alerts are sent. `Targets` say what is wrong."""

    a_setting: ClassVar[str] = "a setting of alert_policy"

    repeat_hours: float = Field(
        default=6.0, ge=0.1, le=8_760, description="An error that is still active is repeated after this long."
    )
    repeat_warning_hours: float = Field(
        default=24.0, ge=0.1, le=8_760, description="A warning that is still active is repeated after this long."
    )
    not_shrinking_minutes: float = Field(
        default=10.0,
        ge=1,
        le=1_440,
        description="An alert fires when the lag is above its target and the rows have not fallen for this long.",
    )
    unreachable_minutes: float = Field(
        default=3.0, ge=0, le=1_440, description="An alert fires when MySQL is away for longer; a failover is shorter."
    )
    retry_minutes: float = Field(
        default=5.0,
        ge=1,
        le=1_440,
        description="An alert fires when a retry that Dagster promised has not started within this long.",
    )

    def repeat_ms(self, severity: Severity) -> float:
        return 3_600_000 * (self.repeat_hours if severity is Severity.ERROR else self.repeat_warning_hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One evaluation of a sensor: its time, its policy, the outbox and its drain job."""

    policy: Policy
    now_ms: int
    outbox: str = ""
    drain_job: str = ""


# ── the state of alerts ──────────────────────────────────────────────────────────────────────────


class _Content(msgspec.Struct, kw_only=True):
    """The content of an alert: ids, counts and an error's own line; never a payload."""

    severity: Severity
    headline: str = ""
    what: str = ""
    todo: str = ""
    job: str = ""
    run_id: str = ""
    link: str = ""


class Notice(_Content, kw_only=True):
    """One message."""

    kind: str  # alert, still, recovered
    about: str  # a job, or the `about` of an advice: a stable name, by which notices can be routed
    outbox: str  # its name in the code location, or empty
    since_ms: int
    at_ms: int

    @property
    def title(self) -> str:
        mark = "RECOVERED" if self.kind == "recovered" else self.severity.value.upper()
        return f"[{mark}] auditexport{f' {self.outbox}' if self.outbox else ''}: {self.headline}"

    @property
    def _since(self) -> str:
        return f"{format_time(self.since_ms)} UTC"

    @property
    def text(self) -> str:
        """The message in lines; Slack's markup is escaped."""
        lines = [
            f"*{_escape(self.title)}*",
            _escape(self.what),
            f"Run: {self.run_id} {self.link}".rstrip() if self.run_id else "",
            f"Since: {self._since} ({format_duration((self.at_ms - self.since_ms) / 1000)})",
            f"Do: {_escape(self.todo)}" if self.todo else "",
        ]
        return "\n".join(line for line in lines if line)

    @property
    def body(self) -> dict[str, object]:
        """For the incoming webhooks of Slack, Mattermost, Discord (/slack) and most others: `text` is the whole notice,
        `attachments` has the same as fields, with a colour.
        """
        fields = {
            "kind": self.kind,
            "severity": self.severity.value,
            "about": self.about,
            "outbox": self.outbox,
            "job": self.job,
            "run": self.run_id,
            "since": self._since,
        }
        failing = "danger" if self.severity is Severity.ERROR else "warning"
        return {
            "text": self.text,
            "attachments": [
                {
                    "color": "good" if self.kind == "recovered" else failing,
                    "fallback": _escape(self.title),
                    "fields": [
                        {"title": name, "value": value, "short": True} for name, value in fields.items() if value
                    ],
                }
            ],
        }


def _escape(text: str) -> str:
    """Slack's rule: otherwise a name that an application chose could mention a whole channel."""
    cut = text if len(text) <= LINE else text[: LINE - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


class ActiveAlert(_Content, kw_only=True):
    """An alert that was notified and is not over, with its latest content."""

    since_ms: int
    notified_ms: int = msgspec.field(name="told_ms")
    times: int = 0
    causes: list[str] = []


class AlertState(msgspec.Struct, kw_only=True):
    """The active alerts, and the notices that wait to be sent."""

    active: dict[str, ActiveAlert] = msgspec.field(default_factory=dict, name="standing")
    unsent: list[Notice] = []
    dropped: int = 0

    def fire(
        self, one: Advice, tick: Tick, *, cause: str = "", since_ms: int | None = None, run: EndedRun | None = None
    ) -> None:
        """Something is wrong, or still wrong: notifies if the alert or its cause is new."""
        since_ms = tick.now_ms if since_ms is None else since_ms
        alert = self.active.setdefault(
            one.about, ActiveAlert(severity=one.severity, since_ms=since_ms, notified_ms=tick.now_ms)
        )
        alert.times += 1
        if one.severity is Severity.ERROR:
            alert.severity = one.severity
        one = one.for_outbox(tick.outbox)
        alert.headline = one.headline or one.about.replace("_", " ")
        alert.what, alert.todo = one.what, one.todo
        if run is not None:
            alert.job, alert.run_id, alert.link = run.subject, run.run_id, run.link
        cause = cause or str(one.severity)
        if cause not in alert.causes and len(alert.causes) < CAUSES:
            alert.causes.append(cause)
            self._notify("alert", one.about, alert, tick)

    def repeat(self, tick: Tick, abouts: Collection[str] | None = None) -> None:
        """Notifies again of alerts that are active for long: of all, or of these."""
        for about, alert in self.active.items():
            due = tick.now_ms - alert.notified_ms >= tick.policy.repeat_ms(alert.severity)
            if due and (abouts is None or about in abouts):
                self._notify("still", about, alert, tick)

    def resolve(self, about: str, how: str, tick: Tick, run: EndedRun | None = None) -> None:
        """Ends an active alert, with one notice."""
        alert = self.active.pop(about, None)
        if alert is not None:
            alert.what, alert.todo = how, ""
            if run is not None:
                alert.run_id, alert.link = run.run_id, run.link
            self._notify("recovered", about, alert, tick)

    def _notify(self, kind: str, about: str, alert: ActiveAlert, tick: Tick) -> None:
        alert.notified_ms = tick.now_ms
        content: dict[str, Any] = {name: getattr(alert, name) for name in _Content.__struct_fields__}
        notice = Notice(
            kind=kind, about=about, outbox=tick.outbox, since_ms=alert.since_ms, at_ms=tick.now_ms, **content
        )
        if kind == "still" and alert.job:
            notice.what = f"still failing, {alert.times} failed so far: {alert.what}"
        self.unsent.append(notice)
        if len(self.unsent) > UNSENT:
            self.unsent.pop(0)
            self.dropped += 1


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────


class Retry(str, Enum):
    """Whether Dagster launches a failed run again."""

    NO = "no"
    WILL = "will"  # it has not yet
    LAUNCHED = "launched"
    UNKNOWN = "unknown"  # Dagster has not decided yet, or never does


class EndedRun(Failure, frozen=True, kw_only=True):
    """A run that has ended; without `error` it succeeded. All drains, however launched, have one `subject`."""

    subject: str
    ended_ms: int
    run_id: str = ""
    retry: Retry = Retry.NO
    link: str = ""


class RunAlerts(msgspec.Struct, kw_only=True):
    """The memory of the sensor on runs."""

    from_ms: int  # runs that ended before are ignored
    looked_ms: int
    state: AlertState = msgspec.field(default_factory=AlertState, name="board")
    seen: dict[str, int] = {}
    waiting: dict[str, EndedRun] = {}  # failed runs whose retry is awaited: no alert yet
    good_ms: dict[str, int] = {}  # the last success of each subject
    fail_owed: bool = False  # the heartbeat's /fail is still to be sent

    def is_new(self, run_id: str, ended_ms: int) -> bool:
        """Whether to observe an ended run: once, and again while its retry is awaited."""
        return run_id in self.waiting or (ended_ms >= self.from_ms and run_id not in self.seen)

    def observe(self, run: EndedRun, tick: Tick) -> None:
        """A run has ended. Observe runs in the order of their ends."""
        if run.retry is Retry.UNKNOWN and tick.now_ms - run.ended_ms < RETRY_KNOWN_WITHIN_MS:
            return  # the next tick sees it again
        if not run.error:
            self._succeeded(run, tick)
        elif run.retry is Retry.WILL:
            self.waiting.setdefault(run.run_id, run)
        else:
            self.waiting.pop(run.run_id, None)
            if run.retry is not Retry.LAUNCHED:
                self._failed(run, tick)
        self.seen[run.run_id] = run.ended_ms
        for run_id in sorted(self.seen, key=lambda one: self.seen[one])[:-SEEN]:
            del self.seen[run_id]

    def observe_missing_retries(self, tick: Tick) -> None:
        """Fires for failed runs whose retry did not come: Dagster's daemon can lose one."""
        for run_id, run in list(self.waiting.items()):
            if tick.now_ms - run.ended_ms >= tick.policy.retry_minutes * 60_000:
                del self.waiting[run_id]
                line = f"{run.line} — Dagster has not launched the retry that it promised"
                self._failed(msgspec.structs.replace(run, run_id=run_id, line=line, rerun_helps=None), tick)

    def _failed(self, run: EndedRun, tick: Tick) -> None:
        if run.ended_ms < self.good_ms.get(run.subject, 0):
            return  # a later run has succeeded
        self.fail_owed = self.fail_owed or (run.subject == tick.drain_job and not run.reported)
        self.state.fire(run_failed(run.subject, run), tick, cause=run.place, since_ms=run.ended_ms, run=run)

    def _succeeded(self, run: EndedRun, tick: Tick) -> None:
        self.good_ms[run.subject] = max(run.ended_ms, self.good_ms.get(run.subject, 0))
        self.waiting = {
            run_id: one
            for run_id, one in self.waiting.items()
            if one.subject != run.subject or one.ended_ms > run.ended_ms
        }
        if run.subject == tick.drain_job:
            self.fail_owed = False
        alert = self.state.active.get(run.subject)
        failed = f"; {counted(alert.times, 'run')} had failed" if alert is not None and alert.times > 1 else ""
        self.state.resolve(run.subject, f"a run of {run.subject} has succeeded{failed}", tick, run)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The backlog at one tick."""

    at_ms: int
    rows: int
    capped: bool  # there are more rows than were counted
    lag_s: float

    def is_below(self, other: Sample) -> bool:
        """Whether there are fewer rows. If both counts stopped early, the lag decides: it grows while the oldest row stays."""
        return self.lag_s < other.lag_s if self.capped and other.capped else self.rows < other.rows


class NumberAlerts(msgspec.Struct, kw_only=True):
    """The memory of the sensor on numbers."""

    state: AlertState = msgspec.field(default_factory=AlertState, name="board")
    lowest: Sample | None = None
    away_since_ms: int | None = None

    def observe(self, status: Status, targets: Targets, drains: Callable[[], Drains], tick: Tick) -> None:
        """MySQL has answered: fires what is wrong, and resolves the rest. `drains` is called for a stuck backlog only."""
        self.away_since_ms = None
        backlog = status.backlog
        wrong: set[str] = set()
        for one in advice(status, targets):  # the worst first
            if one.severity is not Severity.NOTE and one.about not in ("lag", *wrong):
                wrong.add(one.about)
                self.state.fire(one, tick)
        late = backlog.lag_s > targets.lag_s
        lowest = self.lowest = self._lowest(backlog, tick) if late else None
        if lowest is not None and tick.now_ms - lowest.at_ms >= tick.policy.not_shrinking_minutes * 60_000:
            wrong.add("lag")
            before = f"{lowest.rows:,}{'+' if lowest.capped else ''} {format_duration((tick.now_ms - lowest.at_ms) / 1000)} ago"
            one = not_shrinking(status, targets, drains(), before=before)
            self.state.fire(one, tick, cause="not shrinking", since_ms=tick.now_ms - int(backlog.lag_s * 1000))
        self.state.repeat(tick, wrong)
        for about in set(self.state.active) - wrong:
            if about != "lag" or not late:  # a backlog that shrinks and is still late is not over
                self.state.resolve(about, f"it is over: {backlog}", tick)

    def observe_error(self, error: str, tick: Tick, *, permanent: bool) -> None:
        """MySQL did not answer. The numbers are not known, so all active alerts stay active."""
        if self.away_since_ms is None:
            self.away_since_ms = tick.now_ms
        if permanent or tick.now_ms - self.away_since_ms >= tick.policy.unreachable_minutes * 60_000:
            cause = "refused" if permanent else "away"
            self.state.fire(unreachable(error, permanent=permanent), tick, cause=cause, since_ms=self.away_since_ms)
            self.state.repeat(tick, ("mysql",))

    def _lowest(self, backlog: Backlog, tick: Tick) -> Sample:
        """The last tick at which the backlog was below all earlier ticks since it was late: often this one."""
        now = Sample(at_ms=tick.now_ms, rows=backlog.rows, capped=backlog.rows_at_least, lag_s=round(backlog.lag_s, 1))
        lowest = self.lowest
        # A time in the future: the clock was set back since.
        return now if lowest is None or lowest.at_ms > now.at_ms or now.is_below(lowest) else lowest
