"""Findings of reconciliations that belong to no batch, and which of them are still open.

What does not belong here: finding anything (`core.reconcile`), and discrepant batches, whose state is in the ledger.

The record of a reconciliation is the selection of its action: names and integers, so that every release can read it. A finding
is open until later reconciliations have covered its window. Each record carries the findings that were still open before it, so
reading the last few records is enough.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import msgspec

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.ports import KINDS, Discrepancy

# Reconciliations that are read: two that end at the same time do not know of each other.
RECORDS_READ = 50
# Open findings that a record carries; of more, the two oldest are merged.
CARRIED = 20
_TIMES = ("at_ms", "from_ms", "to_ms")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFinding:
    """What a reconciliation found in [from_ms, to_ms) and no later one has checked again."""

    at_ms: int
    from_ms: int
    to_ms: int
    found: Discrepancy

    def __add__(self, other: OpenFinding) -> OpenFinding:
        """Both findings as one, in a window that covers both."""
        return OpenFinding(
            at_ms=min(self.at_ms, other.at_ms),
            from_ms=min(self.from_ms, other.from_ms),
            to_ms=max(self.to_ms, other.to_ms),
            found=self.found + other.found,
        )


def record_of(from_ms: int, to_ms: int, own: OpenFinding | None, still_open: Iterable[OpenFinding]) -> dict[str, int]:
    """What a record keeps: the reconciliation's own finding, and open findings that its window does not cover."""
    left = _outside(still_open, from_ms, to_ms)
    while len(left) > CARRIED:
        left[:2] = [left[0] + left[1]]
    findings = {"loose": own} if own is not None else {}
    findings |= {f"carried_{number}": finding for number, finding in enumerate(left)}
    record = {"loose": int(own is not None), "carried": len(left)}
    for name, finding in findings.items():
        record |= {f"{name}_{time}": getattr(finding, time) for time in _TIMES}
        record |= {f"{name}_{kind}": count for kind, count in finding.found.counts.items()}
    return record


def open_findings(actions: Sequence[Action]) -> list[OpenFinding]:
    """The open findings, oldest first, after these actions of reconciliations, newest first."""
    findings: list[OpenFinding] = []
    for number, action in enumerate(reversed(actions)):
        record = record_in(action)
        if number == 0:
            findings = [
                _finding(record, f"carried_{index}_", action.at_ms) for index in range(record.get("carried", 0))
            ]
        findings = _outside(findings, record.get("from_ms", 0), record.get("to_ms", 0))
        # The record of an earlier release says how much it found, and not where.
        own = replace(_finding(record, "loose_" if "loose" in record else "", action.at_ms), at_ms=action.at_ms)
        if own.found:
            findings.append(own)
    return findings


def record_in(action: Action) -> dict[str, int]:
    """The record of one reconciliation; empty when it cannot be read."""
    try:
        return msgspec.json.decode(action.selection, type=dict[str, int])
    except msgspec.DecodeError:
        return {}


def _outside(findings: Iterable[OpenFinding], from_ms: int, to_ms: int) -> list[OpenFinding]:
    """The findings with what is left of their windows, when [from_ms, to_ms) has been checked again."""
    left = []
    for finding in findings:
        if from_ms <= finding.from_ms < to_ms:
            finding = replace(finding, from_ms=to_ms)
        elif from_ms < finding.to_ms <= to_ms:
            finding = replace(finding, to_ms=from_ms)
        if finding.from_ms < finding.to_ms:
            left.append(finding)
    return left


def _finding(record: dict[str, int], prefix: str, at_ms: int) -> OpenFinding:
    return OpenFinding(
        at_ms=record.get(f"{prefix}at_ms", at_ms),
        from_ms=record.get(f"{prefix}from_ms", 0),
        to_ms=record.get(f"{prefix}to_ms", 0),
        found=discrepancy_in(record, prefix),
    )


def discrepancy_in(record: dict[str, int], prefix: str = "") -> Discrepancy:
    """The entries of each kind, from the keys of an action's record that begin with the prefix."""
    return Discrepancy(**{kind: record.get(f"{prefix}{kind}", 0) for kind in KINDS}, event_ids=())
