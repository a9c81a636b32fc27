"""The outcome of a run, read from the ledger.

It is not read from a step's memory, because earlier attempts of the step exported and recorded batches too.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from auditexport_pipeline.core.batch import CLOSED, Batch, State
from auditexport_pipeline.core.ports import Discrepancy, Moment, Outbox


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """The batches that a run exported or left open; verifications and differences by batch id."""

    batches: tuple[Batch, ...]
    left: tuple[Batch, ...]
    verified: Mapping[int, Discrepancy]
    wrong: Mapping[int, str]

    def why(self) -> str:
        """All differences in one line, with some event ids if this attempt made the comparison."""
        lines = []
        for batch_id, text in self.wrong.items():
            events = ", ".join(self.verified[batch_id].event_ids) if batch_id in self.verified else ""
            lines.append(f"batch {batch_id}: {text}" + (f", events {events}" if events else ""))
        return "; ".join(lines)


def outcome_of(
    outbox: Outbox, owner: str, batch_ids: Iterable[int], since: Moment, seen: Mapping[int, Discrepancy]
) -> Outcome:
    """The outcome of these batches and of every batch that the owner has claimed since, in any attempt.

    `seen` are the comparisons of this attempt, also of batches of earlier runs. Those of earlier attempts are in the
    ledger.
    """
    ids = {*batch_ids, *(batch.batch_id for batch in outbox.claimed_since(owner, since))}
    own = [batch for batch in outbox.batches(sorted(ids)) if batch.owner == owner]
    batches = tuple(batch for batch in own if batch.state in CLOSED)
    verified = {batch.batch_id: Discrepancy() for batch in batches if batch.state is State.VERIFIED}
    wrong = {batch_id: str(found) for batch_id, found in seen.items() if found}
    for batch_id, text in outbox.discrepant_since(since).items():
        wrong.setdefault(batch_id, text)
    left = tuple(batch for batch in own if batch.state not in CLOSED)
    return Outcome(batches=batches, left=left, verified={**verified, **seen}, wrong=dict(sorted(wrong.items())))
