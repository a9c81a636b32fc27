"""What reconciliations have found that belongs to no batch, and whether anybody has looked there again.

What belongs here: the record of one reconciliation, and which findings a series of them leaves open. What does not: finding
anything (`core.reconcile`), and discrepant batches, whose state in the ledger stands until they are compared again.

A record is the selection of an action: names and integers, so that every release can read it. A finding is open until later
reconciliations have covered its window; each record carries what was still open before it, so that the last few are enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.ports import Discrepancy

# Reconciliations that are read back: two that end at the same time do not know of each other.
LOOKS_READ = 50
# Open findings that a record carries; beyond, the two oldest become one.
CARRIED = 20
_KINDS = ("missing", "duplicated", "unexpected", "altered")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFinding:
    """What a reconciliation found in [from_ms, to_ms), and no later one has looked at again."""

    at_ms: int
    from_ms: int
    to_ms: int
    found: Discrepancy


def record_of(window: tuple[int, int], own: OpenFinding | None, still_open: Sequence[OpenFinding]) -> dict[str, int]:
    """What a record keeps of a reconciliation's own finding, and of those that its window does not cover."""
    from_ms, to_ms = window
    values = {"loose": 0, "carried": 0}
    if own is not None:
        values["loose"] = 1
        values |= _flat("loose", own)
    left = [rest for finding in still_open if (rest := _without(finding, from_ms, to_ms)) is not None]
    while len(left) > CARRIED:
        first, second, *others = left
        left = [
            OpenFinding(
                at_ms=min(first.at_ms, second.at_ms),
                from_ms=min(first.from_ms, second.from_ms),
                to_ms=max(first.to_ms, second.to_ms),
                found=first.found + second.found,
            ),
            *others,
        ]
    values["carried"] = len(left)
    for number, finding in enumerate(left):
        values |= _flat(f"carried_{number}", finding)
    return values


def open_findings(looks: Sequence[Action]) -> list[OpenFinding]:
    """What is open after these reconciliations, newest first as they are given; oldest first in the result."""
    state: list[OpenFinding] = []
    for number, look in enumerate(reversed(looks)):
        told = told_by(look)
        if number == 0:
            state = [_finding(told, f"carried_{index}", look.at_ms) for index in range(told.get("carried", 0))]
        from_ms, to_ms = told.get("from_ms", 0), told.get("to_ms", 0)
        state = [rest for finding in state if (rest := _without(finding, from_ms, to_ms)) is not None]
        if "loose" in told:
            if told["loose"]:
                state.append(replace(_finding(told, "loose", look.at_ms), at_ms=look.at_ms))
        elif found := _discrepancy(told, ""):  # an earlier release says how much, and not where
            state.append(OpenFinding(at_ms=look.at_ms, from_ms=from_ms, to_ms=to_ms, found=found))
    return state


def told_by(look: Action) -> dict[str, int]:
    """The record of one reconciliation; what it does not tell is not there."""
    try:
        return msgspec.json.decode(look.selection, type=dict[str, int])
    except msgspec.DecodeError:
        return {}


def _without(finding: OpenFinding, from_ms: int, to_ms: int) -> OpenFinding | None:
    """What is left of a finding's window when [from_ms, to_ms) has been looked at again."""
    if from_ms <= finding.from_ms and to_ms >= finding.to_ms:
        return None
    if from_ms <= finding.from_ms < to_ms:
        return replace(finding, from_ms=to_ms)
    if from_ms < finding.to_ms <= to_ms:
        return replace(finding, to_ms=from_ms)
    return finding


def _flat(name: str, finding: OpenFinding) -> dict[str, int]:
    values = {f"{name}_{kind}": int(getattr(finding.found, kind)) for kind in _KINDS}
    return {
        f"{name}_at_ms": finding.at_ms,
        f"{name}_from_ms": finding.from_ms,
        f"{name}_to_ms": finding.to_ms,
        **values,
    }


def _finding(told: dict[str, int], name: str, at_ms: int) -> OpenFinding:
    return OpenFinding(
        at_ms=told.get(f"{name}_at_ms", at_ms),
        from_ms=told.get(f"{name}_from_ms", 0),
        to_ms=told.get(f"{name}_to_ms", 0),
        found=_discrepancy(told, f"{name}_"),
    )


def _discrepancy(told: dict[str, int], prefix: str) -> Discrepancy:
    return Discrepancy(
        missing=told.get(f"{prefix}missing", 0),
        duplicated=told.get(f"{prefix}duplicated", 0),
        unexpected=told.get(f"{prefix}unexpected", 0),
        altered=told.get(f"{prefix}altered", 0),
    )
