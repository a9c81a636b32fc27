"""Alerts: what is wrong now, when it was notified, and when it is over.

An alert fires when something is wrong, and again for each new cause. While it is active it is repeated after hours. When it
is over, one recovery is sent. A notice that cannot be sent waits, in order, for the next tick.

`RunAlerts` and `NumberAlerts` are the cursors of two sensors, as JSON; a field's `name=` is what stored cursors call it. The
sentences are in `core.advice`; reading runs and numbers, and sending, in `defs.alerts`.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, replace
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
from auditexport_pipeline.core.settings import Settings, Targets
from auditexport_pipeline.core.status import Status, format_duration

# Notices that wait for a webhook that does not answer; older ones are dropped and counted.
UNSENT = 20
# Causes of one alert that are notified one by one; further ones only repeat it.
CAUSES = 8
# Notices are read on telephones: longer lines are cut. Slack refuses 3,000 characters.
LINE = 600
# Ended runs that are remembered: more than two overlapping ticks see.
SEEN = 500
# Dagster stores the end of a run first, and a moment later whether it will retry the run.
RETRY_KNOWN_WITHIN_MS = 60_000


class Policy(Settings):
    """When alerts are sent. `Targets` say what is wrong."""

    a_setting: ClassVar[str] = "a setting of alert_policy"

    repeat_hours: float = Field(
        default=6.0, ge=0.1, le=8_760, description="What still fails is repeated after this long."
    )
    repeat_warning_hours: float = Field(
        default=24.0, ge=0.1, le=8_760, description="A warning that is still active is repeated after this long."
    )
    not_shrinking_minutes: float = Field(
        default=10.0, ge=1, le=1_440, description="The lag is above its target and rows have not fallen, this long."
    )
    unreachable_minutes: float = Field(
        default=3.0, ge=0, le=1_440, description="MySQL may be away this long, as in a failover."
    )
    retry_minutes: float = Field(
        default=5.0, ge=1, le=1_440, description="A run that Dagster said it would launch again is, within this long."
    )

    def repeat_ms(self, severity: Severity) -> float:
        return 3_600_000 * (self.repeat_hours if severity is Severity.ERROR else self.repeat_warning_hours)


@dataclass(frozen=True, slots=True, kw_only=True)
class Tick:
    """One evaluation of a sensor: of which outbox (and its drain job), by which policy, when."""

    policy: Policy
    now_ms: int
    outbox: str = ""
    drain_job: str = ""


# ── the state of alerts ──────────────────────────────────────────────────────────────────────────


class _Content(msgspec.Struct, kw_only=True):
    """What an alert says. Ids, counts and an error's own line; never a payload."""

    severity: Severity
    headline: str = ""
    what: str = ""
    todo: str = ""
    job: str = ""
    run_id: str = ""
    link: str = ""


def _content(alert: _Content) -> dict[str, Any]:
    return {name: getattr(alert, name) for name in _Content.__struct_fields__}


class Notice(_Content, kw_only=True):
    """One message."""

    kind: str  # alert, still, recovered
    about: str  # a job, or the `about` of an advice: stable, for whoever routes notices
    outbox: str  # the name of the outbox in its code location, or empty
    since_ms: int
    at_ms: int

    @property
    def title(self) -> str:
        mark = "RECOVERED" if self.kind == "recovered" else self.severity.value.upper()
        return f"[{mark}] auditexport{f' {self.outbox}' if self.outbox else ''}: {self.headline}"

    @property
    def text(self) -> str:
        """The message in lines, with what Slack would take for markup escaped."""
        lines = [
            f"*{_escape(self.title)}*",
            _escape(self.what),
            f"Run: {self.run_id} {self.link}".rstrip() if self.run_id else "",
            f"Since: {_format_time(self.since_ms)} ({format_duration((self.at_ms - self.since_ms) / 1000)})",
            f"Do: {_escape(self.todo)}" if self.todo else "",
        ]
        return "\n".join(line for line in lines if line)

    @property
    def body(self) -> dict[str, object]:
        """What incoming webhooks of Slack, Mattermost, Discord (/slack) and most others take: `text` says everything,
        `attachments` the same by fields, for colour and for programs.
        """
        fields = {
            "kind": self.kind,
            "severity": self.severity.value,
            "about": self.about,
            "outbox": self.outbox,
            "job": self.job,
            "run": self.run_id,
            "since": _format_time(self.since_ms),
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
    """As Slack asks: a name that an application chose could otherwise mention a whole channel."""
    cut = text if len(text) <= LINE else text[: LINE - 1] + "…"
    return cut.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")


def _format_time(at_ms: int) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(at_ms / 1000))


class ActiveAlert(_Content, kw_only=True):
    """An alert that was notified and is not over, with what was last known of it."""

    since_ms: int
    notified_ms: int = msgspec.field(name="told_ms")
    times: int = 0
    causes: list[str] = []


class AlertState(msgspec.Struct, kw_only=True):
    """Which alerts are active, and which notices have yet to be sent."""

    active: dict[str, ActiveAlert] = msgspec.field(default_factory=dict, name="standing")
    unsent: list[Notice] = []
    dropped: int = 0

    def fire(
        self, one: Advice, tick: Tick, *, cause: str = "", since_ms: int | None = None, run: EndedRun | None = None
    ) -> None:
        """It is wrong (again): notified when it is new, or when its cause is."""
        since_ms = tick.now_ms if since_ms is None else since_ms
        alert = self.active.setdefault(
            one.about, ActiveAlert(severity=one.severity, since_ms=since_ms, notified_ms=tick.now_ms)
        )
        alert.times += 1
        if one.severity is Severity.ERROR:
            alert.severity = one.severity
        alert.headline = one.headline or one.about.replace("_", " ")
        alert.what, alert.todo = one.what, replace(one, outbox=tick.outbox).todo
        if run is not None:
            alert.job, alert.run_id, alert.link = run.subject, run.run_id, run.link
        cause = cause or str(one.severity)
        if cause not in alert.causes and len(alert.causes) < CAUSES:
            alert.causes.append(cause)
            self._notify("alert", one.about, alert, tick)

    def repeat(self, tick: Tick, abouts: Collection[str] | None = None) -> None:
        """Notifies again of what is active for long: of all alerts, or of these."""
        for about, alert in self.active.items():
            due = tick.now_ms - alert.notified_ms >= tick.policy.repeat_ms(alert.severity)
            if due and (abouts is None or about in abouts):
                self._notify("still", about, alert, tick)

    def resolve(self, about: str, how: str, tick: Tick, run: EndedRun | None = None) -> None:
        """It is over: notified once, if it was active."""
        alert = self.active.pop(about, None)
        if alert is not None:
            alert.what, alert.todo = how, ""
            if run is not None:
                alert.run_id, alert.link = run.run_id, run.link
            self._notify("recovered", about, alert, tick)

    def _notify(self, kind: str, about: str, alert: ActiveAlert, tick: Tick) -> None:
        alert.notified_ms = tick.now_ms
        notice = Notice(
            kind=kind, about=about, outbox=tick.outbox, since_ms=alert.since_ms, at_ms=tick.now_ms, **_content(alert)
        )
        if kind == "still" and alert.job:
            notice.what = f"still failing, {alert.times} failed so far: {alert.what}"
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
    UNKNOWN = "unknown"  # not said yet, or never


class EndedRun(Failure, frozen=True, kw_only=True):
    """A run that has ended; without `error` it succeeded. `subject` is what failed: however launched, all drains are one."""

    subject: str
    ended_ms: int
    run_id: str = ""
    retry: Retry = Retry.NO
    link: str = ""


class RunAlerts(msgspec.Struct, kw_only=True):
    """What the sensor on runs remembers."""

    from_ms: int  # runs that ended before are ignored
    looked_ms: int
    state: AlertState = msgspec.field(default_factory=AlertState, name="board")
    seen: dict[str, int] = {}
    waiting: dict[str, EndedRun] = {}  # failed runs that Dagster said it would retry: muted
    good_ms: dict[str, int] = {}  # when a run of a subject last succeeded
    fail_owed: bool = False  # the heartbeat's /fail that could not be sent yet

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
        """Dagster's daemon can lose a retry: the muted failure then fires."""
        for run_id, run in list(self.waiting.items()):
            if tick.now_ms - run.ended_ms >= tick.policy.retry_minutes * 60_000:
                del self.waiting[run_id]
                line = f"{run.line} — Dagster said that it would launch it again, and has not"
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
        failed = f"; {alert.times} runs had failed" if alert is not None and alert.times > 1 else ""
        self.state.resolve(run.subject, f"a run of {run.subject} has succeeded{failed}", tick, run)


# ── numbers ──────────────────────────────────────────────────────────────────────────────────────


class Sample(msgspec.Struct, frozen=True, kw_only=True):
    """The backlog at one tick."""

    at_ms: int
    rows: int
    capped: bool  # counting had stopped
    lag_s: float

    def is_below(self, other: Sample) -> bool:
        """Whether there are fewer rows; where both counts had stopped, the lag decides: it grows while the oldest row stays."""
        return self.lag_s < other.lag_s if self.capped and other.capped else self.rows < other.rows


class NumberAlerts(msgspec.Struct, kw_only=True):
    """What the sensor on numbers remembers."""

    state: AlertState = msgspec.field(default_factory=AlertState, name="board")
    lowest: Sample | None = None
    away_since_ms: int | None = None

    def observe(self, status: Status, targets: Targets, drains: Callable[[], Drains], tick: Tick) -> None:
        """MySQL has answered: fires what is wrong, and resolves the rest. `drains` is only asked for a stuck backlog."""
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
                how = f"it is over: {backlog.shown_rows} rows pending, lag {format_duration(backlog.lag_s)}"
                self.state.resolve(about, how, tick)

    def observe_error(self, error: str, tick: Tick, *, permanent: bool) -> None:
        """MySQL could not be asked. Nothing is known of the rest: what is active stays active."""
        if self.away_since_ms is None:
            self.away_since_ms = tick.now_ms
        if permanent or tick.now_ms - self.away_since_ms >= tick.policy.unreachable_minutes * 60_000:
            cause = "refused" if permanent else "away"
            self.state.fire(unreachable(error, permanent=permanent), tick, cause=cause, since_ms=self.away_since_ms)
            self.state.repeat(tick, ("mysql",))

    def _lowest(self, backlog: Backlog, tick: Tick) -> Sample:
        """The last tick at which the backlog had fallen below all earlier ones since it was late: often this one."""
        now = Sample(at_ms=tick.now_ms, rows=backlog.rows, capped=backlog.rows_at_least, lag_s=round(backlog.lag_s, 1))
        lowest = self.lowest
        # A time to come is from before the clock was set back.
        return now if lowest is None or lowest.at_ms > now.at_ms or now.is_below(lowest) else lowest
