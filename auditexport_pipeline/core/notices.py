"""Notices: what somebody is told, once, again after long, and when it is over.

What belongs here: when, what a notice says, and the memory of what stands that keeps it from being said twice. What does
not: which runs (`core.run_alerts`) and which numbers (`core.number_alerts`) are worth one, and sending (`defs.alerts`).

A condition stands from its first notice until it is settled. While it stands it is told again only when its cause is a new
one, or after `repeat_hours`. A notice that could not be sent waits in the memory, in order, and is tried at the next look.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from auditexport_pipeline.core.advice import Severity
from auditexport_pipeline.core.settings import from_environment, number, refuse_out_of_bounds
from auditexport_pipeline.core.status import shown_s

# The environment variable of a field of `Policy` is this and its name in capitals.
POLICY_VARIABLES = "AUDITEXPORT_ALERT_"
# Variables of the same beginning that say where notices go, and not when (`defs.resources`).
NO_POLICY = ("AUDITEXPORT_ALERT_WEBHOOK_URL",)
# Notices that wait for a webhook that does not answer; older ones are dropped and counted.
UNSENT = 20
# Causes of one standing condition that are told one by one; then it is one condition with many.
CAUSES = 8
# A notice is read on a telephone; an error's line is cut here, and Slack refuses 3,000 characters.
LINE = 600


# ── when ─────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """When somebody is told; what is wrong is said by `Targets`. Raises `InvalidConfig`, naming the field.

    By the environment: AUDITEXPORT_ALERT_REPEAT_HOURS, AUDITEXPORT_ALERT_REPEAT_WARNING_HOURS,
    AUDITEXPORT_ALERT_NOT_SHRINKING_MINUTES, AUDITEXPORT_ALERT_UNREACHABLE_MINUTES, AUDITEXPORT_ALERT_RETRY_MINUTES.
    """

    repeat_hours: float = number(6, 0.1, 8_760, "What still fails is told again after this long.")
    repeat_warning_hours: float = number(24, 0.1, 8_760, "A warning that still stands is told again after this long.")
    not_shrinking_minutes: float = number(
        10, 1, 1_440, "The lag is above its target and rows have not fallen, this long."
    )
    unreachable_minutes: float = number(3, 0, 1_440, "MySQL may be away this long, as in a failover.")
    retry_minutes: float = number(5, 1, 1_440, "A run that Dagster said it would launch again is, within this long.")

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Policy:
        """By the variables AUDITEXPORT_ALERT_…; raises `InvalidConfig`, naming the variable."""
        return cls(**from_environment(cls, POLICY_VARIABLES, environment, called="setting", besides=NO_POLICY))

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
