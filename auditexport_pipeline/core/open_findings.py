"""Findings of reconciliations that belong to no batch, and which of them are still open.

What does not belong here: finding anything (`core.reconcile`), and discrepant batches, whose state is in the ledger.

The record of a reconciliation is the selection of its action: names and integers, so that every release can read it. A finding
is open until later reconciliations have covered its window. Each record carries the findings that were still open before it, so
reading the last few records is enough.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import msgspec

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.ports import Discrepancy

# Reconciliations that are read: two that end at the same time do not know of each other.
RECORDS_READ = 50
# Open findings that a record carries; of more, the two oldest are merged.
CARRIED = 20
_KINDS = ("missing", "duplicated", "unexpected", "altered")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenFinding:
    """What a reconciliation found in [from_ms, to_ms) and no later one has checked again."""

    at_ms: int
    from_ms: int
    to_ms: int
    found: Discrepancy


def record_of(window: tuple[int, int], own: OpenFinding | None, still_open: Sequence[OpenFinding]) -> dict[str, int]:
    """What a record keeps: the reconciliation's own finding, and open findings that its window does not cover."""
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


def open_findings(actions: Sequence[Action]) -> list[OpenFinding]:
    """The open findings, oldest first, after these actions of reconciliations, newest first."""
    state: list[OpenFinding] = []
    for number, action in enumerate(reversed(actions)):
        record = record_in(action)
        if number == 0:
            state = [_finding(record, f"carried_{index}", action.at_ms) for index in range(record.get("carried", 0))]
        from_ms, to_ms = record.get("from_ms", 0), record.get("to_ms", 0)
        state = [rest for finding in state if (rest := _without(finding, from_ms, to_ms)) is not None]
        if "loose" in record:
            if record["loose"]:
                state.append(replace(_finding(record, "loose", action.at_ms), at_ms=action.at_ms))
        elif found := _discrepancy(record, ""):  # an earlier release says how much, and not where
            state.append(OpenFinding(at_ms=action.at_ms, from_ms=from_ms, to_ms=to_ms, found=found))
    return state


def record_in(action: Action) -> dict[str, int]:
    """The record of one reconciliation; empty when it cannot be read."""
    try:
        return msgspec.json.decode(action.selection, type=dict[str, int])
    except msgspec.DecodeError:
        return {}


def _without(finding: OpenFinding, from_ms: int, to_ms: int) -> OpenFinding | None:
    """The finding with the rest of its window, when [from_ms, to_ms) has been checked again; None without a rest."""
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


def _finding(record: dict[str, int], name: str, at_ms: int) -> OpenFinding:
    return OpenFinding(
        at_ms=record.get(f"{name}_at_ms", at_ms),
        from_ms=record.get(f"{name}_from_ms", 0),
        to_ms=record.get(f"{name}_to_ms", 0),
        found=_discrepancy(record, f"{name}_"),
    )


def _discrepancy(record: dict[str, int], prefix: str) -> Discrepancy:
    return Discrepancy(
        missing=record.get(f"{prefix}missing", 0),
        duplicated=record.get(f"{prefix}duplicated", 0),
        unexpected=record.get(f"{prefix}unexpected", 0),
        altered=record.get(f"{prefix}altered", 0),
    )
