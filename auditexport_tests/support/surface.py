"""The public surface as text: what other people's scripts, dashboards and code locations rely on by name.

`integration.docs.test_surface` compares it with `integration/docs/surface.txt`. What belongs here: names, types and keys.
What does not: values and sentences.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import click
import dagster as dg

import auditexport_pipeline
from auditexport_pipeline.cli import main
from auditexport_pipeline.component import AuditExport
from auditexport_pipeline.core.settings import Variables
from auditexport_pipeline.definitions import defs

SOURCE = Path(auditexport_pipeline.__file__).parent
_VARIABLE = re.compile(r"AUDITEXPORT_[A-Z][A-Z_]*[A-Z]")
_NUMBER = re.compile(r"(?<![a-z0-9])\d+")


def without_numbers(text: str) -> str:
    """Numbers are ids here: each is written N."""
    return _NUMBER.sub("N", text)


def section(title: str, lines: Iterable[str]) -> Iterator[str]:
    yield f"## {title}"
    yield from sorted(set(lines))
    yield ""


def exports() -> Iterator[str]:
    yield from auditexport_pipeline.__all__


def variables() -> Iterator[str]:
    """Environment variables that the source names, and those of the model."""
    for path in SOURCE.rglob("*.py"):
        yield from _VARIABLE.findall(path.read_text())
    yield from map(Variables.given_as, Variables.model_fields)


def commands(command: click.Command = main, path: str = "auditexport") -> Iterator[str]:
    for parameter in command.params:
        names = "/".join(sorted((*parameter.opts, *parameter.secondary_opts)))
        yield f"{path} {names}: {parameter.type.name}{'' if parameter.nargs == 1 else f' x{parameter.nargs}'}"
    if isinstance(command, click.Group):
        for name, child in command.commands.items():
            yield from commands(child, f"{path} {name}")
    else:
        yield path


def keys(value: object, path: str = "") -> Iterator[str]:
    """Where a JSON value has which kind of value; numbers in keys are written N, because they are ids."""
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from keys(inner, f"{path}.{without_numbers(str(name))}".lstrip("."))
    elif isinstance(value, list):
        yield f"{path}[]"
        for inner in value:
            yield from keys(inner, f"{path}[]")
    else:
        kind = {bool: "boolean", int: "number", float: "number", str: "text", type(None): "null"}[type(value)]
        yield f"{path}: {kind}"


def json_keys(printed: str) -> Iterator[str]:
    """Keys of what a command printed; every line of `--json` is one object."""
    yield from keys(json.loads(printed))


def definitions() -> Iterator[str]:
    repository = defs.get_repository_def()
    for job in repository.get_all_jobs():
        if job.name.startswith("__"):
            continue
        yield f"job {job.name}"
        yield from (f"job {job.name} step {node}" for node in _nodes(job.graph))
        yield from (f"job {job.name} config {line}" for line in _config(job.run_config_schema.run_config_schema_type))
        yield from (f"job {job.name} tag {name}={value}" for name, value in job.tags.items())
    for sensor in repository.sensor_defs:
        yield f"sensor {sensor.name}"
    for schedule in repository.schedule_defs:
        yield f"schedule {schedule.name}: {schedule.cron_schedule}"
    graph = repository.asset_graph
    yield from (f"asset {key.to_user_string()}" for key in graph.get_all_asset_keys())
    yield from (f"check {check.to_user_string()}" for check in graph.asset_check_keys)
    for name in repository.get_top_level_resources():
        yield f"resource {name}"


def _nodes(graph: dg.GraphDefinition, path: str = "") -> Iterator[str]:
    for node in graph.nodes:
        yield f"{path}{node.name}"
        if isinstance(node.definition, dg.GraphDefinition):
            yield from _nodes(node.definition, f"{path}{node.name}.")


def _config(kind: Any, path: str = "") -> Iterator[str]:
    """Fields of a run's configuration that are ours: below the ops and the resources."""
    for name, field in (getattr(kind, "fields", None) or {}).items():
        if not path and name not in ("ops", "resources"):
            continue
        here = f"{path}.{name}".lstrip(".")
        inner = field.config_type
        if getattr(inner, "fields", None):
            yield from _config(inner, here)
        else:
            yield f"{here}: {inner.kind.value}"


def component() -> Iterator[str]:
    schema = AuditExport.model().model_json_schema()
    for name, attribute in schema["properties"].items():
        kinds = attribute.get("anyOf", [attribute])
        yield f"{name}: {' | '.join(sorted(str(kind.get('type', kind.get('$ref', '?'))) for kind in kinds))}"


def metrics(exposition: str) -> Iterator[str]:
    """Families with their type, and the labels of each sample."""
    for line in exposition.splitlines():
        if line.startswith("# TYPE"):
            yield line.removeprefix("# TYPE ")
        elif line and not line.startswith("#"):
            name, _, rest = line.partition("{")
            labels = re.findall(r'(\w+)="', rest) if rest else []
            yield f"{name.split(' ')[0]} {{{', '.join(labels)}}}"


def metadata(events: Iterable[dg.DagsterEvent]) -> Iterator[str]:
    """Metadata keys of what a run reported, with the kind of each value."""
    for event in events:
        data = event.event_specific_data
        if event.is_step_materialization:
            what, entries = "materialization", event.step_materialization_data.materialization.metadata
        elif event.event_type_value == "ASSET_OBSERVATION":
            what, entries = "observation", event.asset_observation_data.asset_observation.metadata
        elif event.event_type_value == "ASSET_CHECK_EVALUATION":
            what, entries = f"check {data.check_name}", data.metadata  # type: ignore[union-attr]
        elif event.is_successful_output:
            what, entries = "output", event.step_output_data.metadata
        else:
            continue
        step = f" of {without_numbers(event.step_key.partition('[')[0])}" if event.step_key else ""
        for name, value in entries.items():
            yield f"{what}{step}: {without_numbers(name)}: {type(value).__name__}"
