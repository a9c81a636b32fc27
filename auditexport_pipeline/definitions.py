"""Our code location: `defs`, as Dagster loads it. `defs.build` makes the definitions of one outbox."""

from __future__ import annotations

from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.defs.build import build_audit_export_defs, defs_of
from auditexport_pipeline.defs.executors import executor_of_environment
from auditexport_pipeline.outboxes import Outboxes, OutboxSettings, check_environment, read_outboxes

# Owners of the one outbox of the environment; a file of outboxes and a component name their own.
OWNERS = ("team:data-platform",)


def build_defs(**arguments: Any) -> dg.Definitions:
    """Our code location: `build_audit_export_defs` for every outbox of AUDITEXPORT_OUTBOXES, or for the one outbox of the
    environment, with an executor.

    `arguments` are for the one outbox. Raises `InvalidConfig`, naming the variable, or file, entry and key.
    """
    check_environment()
    executor = executor_of_environment()
    outboxes = read_outboxes()
    if outboxes is None:
        return build_audit_export_defs(executor=executor, **{"owners": OWNERS, **arguments})
    outboxes.check_variables()
    return dg.Definitions.merge(
        dg.Definitions(executor=executor), *(_defs_of(outboxes, entry) for entry in outboxes.entries)
    )


def _defs_of(outboxes: Outboxes, entry: OutboxSettings) -> dg.Definitions:
    try:
        return defs_of(entry)
    except dg.DagsterError as error:  # such as an owner, a tag or a group in a wrong form
        raise InvalidConfig(f"{outboxes.path}: outbox {entry.name or '(no name)'}: {error}") from None


defs = build_defs()
