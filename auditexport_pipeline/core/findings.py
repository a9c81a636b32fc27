"""What a look at the setup brings back: a line for everything that was looked at, a finding for all that is wrong.

What belongs here: the two values. What does not: looking (`preflight`), and printing (`cli.doctor`).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is missing or wrong: what breaks because of it, and how to mend it."""

    what: str
    breaks: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.breaks}. Fix: {self.fix}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """One thing that was looked at and what was seen; in order when it has no findings."""

    about: str
    seen: str
    findings: tuple[Finding, ...] = ()


def all_findings(looks: list[Look]) -> list[Finding]:
    """The findings of these looks, in their order."""
    return [finding for look in looks for finding in look.findings]
