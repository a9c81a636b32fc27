"""Numbers that an operator may set: default, bounds and meaning beside each, and reading them from the environment.

What belongs here: the mechanism. What does not: the numbers (`core.targets`, `core.alerts`), and a drain's limits, which
are integers of a launchpad (`core.limits`).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping
from dataclasses import field, fields
from typing import Any

from auditexport_pipeline.core.errors import InvalidConfig


def number(default: float, low: float, high: float, meaning: str) -> float:
    """A field of a frozen dataclass, with its bounds and one sentence."""
    return field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


def refuse_out_of_bounds(settings: Any) -> None:
    """Raises `InvalidConfig`, naming the field, for a value out of its bounds."""
    for setting in fields(settings):
        value = getattr(settings, setting.name)
        low, high = setting.metadata["low"], setting.metadata["high"]
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
            raise InvalidConfig(f"{setting.name} is {value!r}; it must be a number from {low:,} to {high:,}")


def from_environment(
    kind: Any, prefix: str, environment: Mapping[str, str], *, called: str, besides: Collection[str] = ()
) -> dict[str, float]:
    """Field to value, of the variables that begin with the prefix; `besides` are variables of the same beginning for others.

    Raises `InvalidConfig`, naming the variable, for one that no field has and for a value out of its bounds.
    """
    variables = {f"{prefix}{setting.name.upper()}": setting for setting in fields(kind)}
    values: dict[str, float] = {}
    for name, text in environment.items():
        if not name.startswith(prefix) or name in besides or not text:
            continue
        if name not in variables:
            raise InvalidConfig(f"{name} is no {called}; there are {', '.join(sorted((*variables, *besides)))}")
        low, high = variables[name].metadata["low"], variables[name].metadata["high"]
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not low <= value <= high:
            raise InvalidConfig(f"{name} is {text!r}; it must be a number from {low:,} to {high:,}")
        values[variables[name].name] = value
    return values
