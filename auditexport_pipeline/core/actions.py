"""What an operator did: who, why, to which rows.

What belongs here: the value that every deliberate intervention carries (requeue, retry, discard, sweep,
erasure). What does not: how it is recorded (`stores.actions`).
"""

from __future__ import annotations

from dataclasses import dataclass

from auditexport_pipeline.core.errors import InvalidConfig

# As wide as the ledger's columns.
LONGEST_WHO = 128
LONGEST_WHY = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class By:
    """Who intervenes, and why; raises `InvalidConfig` when either is missing or too long."""

    who: str
    why: str

    def __post_init__(self) -> None:
        for name, text, longest in (("who", self.who, LONGEST_WHO), ("why", self.why, LONGEST_WHY)):
            if not text.strip() or len(text) > longest:
                raise InvalidConfig(
                    f"{name} is {'too long' if text.strip() else 'empty'}; say it in 1 to {longest} characters"
                )


@dataclass(frozen=True, slots=True, kw_only=True)
class Action:
    """One recorded intervention: a row of `clickhouse_outbox_action`. `selection` is JSON of ids and times."""

    action_id: int
    at_ms: int
    verb: str
    by: By
    selection: str
    rows: int
