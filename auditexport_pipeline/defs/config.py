"""The launchpad: `core.limits.Limits` as a flat Dagster configuration, and forms whose values are checked at the launch.

What belongs here: turning the one table of limits into a schema, spreading its values over the ops, and refusing a
wrong value before a run starts. What does not: names, defaults, bounds and descriptions; those stand in `core.limits`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.defs.executors import limits_here


def _schema() -> dict[str, dg.Field]:
    schema: dict[str, dg.Field] = {}
    for limit in fields(Limits):
        meaning = limit.metadata["meaning"]
        if limit.name == "versions":
            schema[limit.name] = dg.Field([str], default_value=list(VERSIONS), description=meaning)
        else:
            assert limit.default is not MISSING
            bounds = f" From {limit.metadata['low']:,} to {limit.metadata['high']:,}."
            schema[limit.name] = dg.Field(int, default_value=limit.default, description=meaning + bounds)
    return schema


DRAIN_SCHEMA = _schema()


@dg.config_mapping(config_schema=DRAIN_SCHEMA)
def drain_config(settings: dict[str, Any]) -> dict[str, Any]:
    """One flat form for the whole graph; a value out of bounds is refused before anything runs, by name."""
    _refuse_unless(limits_here, settings)
    op = {"config": settings}
    return {
        "plan_batches": op,
        "export_batch": {"ops": {"fetch_batch": op, "write_clickhouse": op, "mark_exported": op}},
        "finish_export": op,
    }


def checked(
    op: dg.OpDefinition, name: str, schema: Mapping[str, dg.Field], check: Callable[[Mapping[str, Any]], object]
) -> dg.OpDefinition:
    """The op under this name, with a form that `check` looks at when a run is launched: what it raises refuses the run."""

    @dg.configured(op, config_schema=dict(schema), name=name)
    def form(settings: dict[str, Any]) -> dict[str, Any]:
        _refuse_unless(check, settings)
        return settings

    return form


def _refuse_unless(check: Callable[[Mapping[str, Any]], object], settings: dict[str, Any]) -> None:
    try:
        check(settings)
    except InvalidConfig as error:
        raise dg.DagsterInvalidConfigError(str(error), [], settings) from None
