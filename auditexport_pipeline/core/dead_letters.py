"""Dead letters for operators: their states, filters, and the results of a retry or a discard.

What does not belong here: why a row became a dead letter (`core.event`, `core.split`), and SQL (`mysql.dead_letters`).

    open ──retry──▶ retried ──its row fails again──▶ open
      │                 └──its row is exported──▶ stays retried: it is closed
      ├──discard──▶ discarded ──retry──▶ retried        an operator gave it up; a retry is still possible
      └──sweep──▶ gone                                  its row was deleted, or marked by another program

No batch takes the row of an open or discarded letter: it stays in the outbox, unmarked. A row that parses and
that the ClickHouse table refuses is no dead letter, but has the state `held` here: when the table's definition changes, it
becomes `retried`, and so pending (`mysql.dead_letters`).
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from enum import Enum

from auditexport_pipeline.core.actions import Action
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet

# Letters of one page of a list: more than a screen, few enough to answer at once.
PAGE_LETTERS = 50


class LetterState(str, Enum):
    """The state of a dead letter. Letters in a state of `KEEPS_ROW_OUT` keep their row out of batches."""

    OPEN = "open"
    DISCARDED = "discarded"
    RETRIED = "retried"
    GONE = "gone"
    HELD = "held"  # no dead letter: the table refuses the row, which goes out once the table's definition changes

    def __str__(self) -> str:
        return self.value


KEEPS_ROW_OUT = (LetterState.OPEN, LetterState.DISCARDED, LetterState.HELD)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeadLetterFilter:
    """A filter for dead letters: all given conditions must hold. Raises `InvalidConfig` for nonsense."""

    state: LetterState | None = LetterState.OPEN  # None: any state
    workspace_id: str | None = None
    reason: str | None = None
    version: str | None = None
    older_than_s: int | None = None  # since the row was set aside first, by MySQL's clock
    pks: PkSet | None = None

    def __post_init__(self) -> None:
        if self.older_than_s is not None and self.older_than_s < 0:
            raise InvalidConfig(f"older_than_s is {self.older_than_s}; it must not be negative")
        for name in ("workspace_id", "reason", "version"):
            if getattr(self, name) == "":
                raise InvalidConfig(f"{name} is empty; leave it out to select all")

    @property
    def everything(self) -> bool:
        """Whether only the state is given: an operator must confirm an action on so many letters."""
        return self == DeadLetterFilter(state=self.state)

    @property
    def selection(self) -> dict[str, str | int]:
        """The conditions that are given, for an action's record: ids and times."""
        given = {field.name: getattr(self, field.name) for field in fields(self)}
        return {
            name: value if isinstance(value, int) else str(value) for name, value in given.items() if value is not None
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Letter:
    """One dead letter: its ids, its state and its reason; never its payload."""

    pk: int
    state: LetterState
    version: str
    workspace_id: str
    event_id: str
    reason: str
    json_path: str
    detail: str
    batch_id: int  # the batch that claimed the row last
    created_at_ms: int
    updated_at_ms: int
    action_id: int | None  # the last action on it


class RowState(str, Enum):
    """What the outbox holds under a letter's pk."""

    PENDING = "pending"
    EXPORTED = "exported"
    DELETED = "deleted"

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterDetails:
    """One letter, its row and the last action on it; `payload` only on request, and while the row is there."""

    letter: Letter
    row: RowState
    exported_at_ms: int | None
    action: Action | None
    payload: bytes | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LetterCounts:
    """How many letters there are, most frequent first; `by_workspace` names the most frequent ones only."""

    letters: int
    by_reason: dict[str, int]
    by_workspace: dict[str, int]
    by_version: dict[str, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class Acted:
    """The result of an action: letters that were changed, and letters that became `gone` because their row is gone."""

    changed: int
    gone: int
    action_ids: tuple[int, ...]
