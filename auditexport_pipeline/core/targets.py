"""Targets: how it should stand, and what an operator is called for when it does not.

What belongs here: the numbers, each with its bounds and meaning. What does not: how it does stand (`core.status`), and
what follows from both (`core.advice`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import RETENTION_DAYS
from auditexport_pipeline.core.settings import from_environment, number, refuse_out_of_bounds

# The environment variable of a target is this and the field's name in capitals.
TARGET_VARIABLES = "AUDITEXPORT_TARGET_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What an operator is called for. Raises `InvalidConfig`, naming the field, for a value out of bounds."""

    lag_s: float = number(300.0, 1, 604_800, "The oldest pending row may be this old, in seconds.")
    batch_open_minutes: float = number(15.0, 1, 10_080, "A batch may be open, or unverified, this long.")
    reconcile_hours: float = number(36.0, 1, 8_760, "Both stores are held against each other at least this often.")
    retention_days: float = number(RETENTION_DAYS, 1, 3_650, "Exported rows stay in the outbox this long.")
    sweep_late_days: float = number(2.0, 0, 365, "And at most this much longer: a sweep a day that failed once.")
    dead_letters: float = number(0, 0, 1_000_000_000, "Open dead letters that nobody needs to be called for.")
    unknown_rows: float = number(0, 0, 1_000_000_000, "Rows of unknown versions that nobody needs to be called for.")

    def __post_init__(self) -> None:
        refuse_out_of_bounds(self)

    def but(self, given: Mapping[str, float]) -> Targets:
        """These, with those that are given in their place; raises `InvalidConfig`, naming the target."""
        names = [target.name for target in fields(self)]
        for name in given:
            if name not in names:
                raise InvalidConfig(f"{name} is no target; there are {', '.join(names)}")
        return replace(self, **given)

    @classmethod
    def of(cls, environment: Mapping[str, str]) -> Targets:
        """The targets that the variables AUDITEXPORT_TARGET_… name; raises `InvalidConfig`, naming the variable."""
        return cls(**from_environment(cls, TARGET_VARIABLES, environment, called="target"))
