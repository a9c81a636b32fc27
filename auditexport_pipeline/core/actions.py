"""An operator's intervention (requeue, retry, discard, sweep, erasure): who, why, and which rows.

What does not belong here: how actions are recorded (`mysql.actions`), and the interventions themselves.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.event import Key

# As wide as the ledger's columns.
LONGEST_WHO = 128
LONGEST_WHY = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Actor:
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
    by: Actor
    selection: str
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RowFilter:
    """A filter for exported rows: all given conditions must hold.

    Ranges are [from, to) in epoch milliseconds; a range of `pk`s includes both ends.
    """

    event_ids: tuple[str, ...] = ()
    workspace_id: str | None = None
    from_event_ms: int | None = None  # event time
    to_event_ms: int | None = None
    from_exported_ms: int | None = None  # the column `deleted_at`
    to_exported_ms: int | None = None
    from_pk: int | None = None
    to_pk: int | None = None
    batch_ids: tuple[int, ...] = ()

    @property
    def given(self) -> dict[str, object]:
        """The conditions that were given, by name."""
        values = {condition.name: getattr(self, condition.name) for condition in fields(self)}
        return {name: value for name, value in values.items() if value not in (None, ())}

    def __post_init__(self) -> None:
        for low, high in (
            ("from_event_ms", "to_event_ms"),
            ("from_exported_ms", "to_exported_ms"),
            ("from_pk", "to_pk"),
        ):
            first, last = getattr(self, low), getattr(self, high)
            if first is not None and last is not None and first > last:
                raise InvalidConfig(f"{low} is {first} and {high} is {last}: the range is empty; swap them")

    def require_a_condition(self) -> None:
        """Raises `InvalidConfig` when no condition is given: that would name every row."""
        if not self.given:
            raise InvalidConfig(
                "a requeue names its rows: give event ids, a workspace, a range of event time, export time or pks, or batches"
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class Erasure:
    """A recorded erasure: one event, or every event of a workspace in a range of event time [from, to)."""

    workspace_id: str
    event_id: str = ""
    from_ms: int | None = None
    to_ms: int | None = None

    def covers(self, key: Key) -> bool:
        workspace_id, _, at_ms, event_id = key
        return (
            workspace_id == self.workspace_id
            and self.event_id in ("", event_id)
            and (self.from_ms is None or at_ms >= self.from_ms)
            and (self.to_ms is None or at_ms < self.to_ms)
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class RecordedErasure:
    """An erasure as it was recorded. `newest_pk` was the outbox's highest pk at that time; 0 in records without it."""

    erasure: Erasure
    at_ms: int
    by: Actor
    newest_pk: int = 0
