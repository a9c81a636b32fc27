"""Checks of the setup, as values: what a check saw, what is wrong, what breaks because of it, and the fix.

The checks themselves are in `preflight` and in the `checks` and `table_checks` of both databases; `cli.setup` prints them.
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that is missing or wrong: what breaks because of it, and the fix. A fatal finding stops every run before it claims."""

    what: str
    breaks: str
    fix: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.what}: {self.breaks}. Fix: {self.fix}"


def warning(*, what: str, breaks: str, fix: str) -> Finding:
    """A finding with which a run still claims."""
    return Finding(what=what, breaks=breaks, fix=fix, fatal=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class CheckResult:
    """What one check saw. Without findings, all is well."""

    about: str
    seen: str
    findings: tuple[Finding, ...] = ()


Checking = Generator[Finding, None, str]
"""A check at work: it yields what is wrong and returns what it saw. Nothing is read before the first step."""


@dataclass(frozen=True, slots=True)
class Check:
    """One row of a table of checks: what it is about, and how it is carried out, once."""

    about: str
    checking: Checking

    def carry_out(self) -> CheckResult:
        findings = []
        while True:
            try:
                findings.append(next(self.checking))
            except StopIteration as end:
                return CheckResult(about=self.about, seen=end.value, findings=tuple(findings))


def carry_out(checks: Iterable[Check]) -> list[CheckResult]:
    """The results of these checks, in their order."""
    return [check.carry_out() for check in checks]


def all_findings(results: Iterable[CheckResult]) -> list[Finding]:
    """The findings of these results, in their order."""
    return [finding for result in results for finding in result.findings]
