"""The composition root: everything Dagster sees, put together once.

What belongs here: `defs` as our code location is loaded, and its executor. What does not: any definition, and how those
of one outbox are put together (`defs.build`).
"""

from __future__ import annotations

import os
from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.defs.build import build_audit_export_defs, defs_of
from auditexport_pipeline.outboxes import Outboxes, OutboxSettings, read_outboxes


def _executor(name: str) -> dg.ExecutorDefinition:
    if name == "in_process":
        return dg.in_process_executor
    if name == "multiprocess":
        return dg.multiprocess_executor.configured(
            {
                "start_method": {
                    "forkserver": {
                        "preload_modules": [
                            "auditexport_pipeline.definitions",
                            "dagster._core.storage.sqlite_storage",
                            "dagster._core.storage.fs_io_manager",
                        ]
                    }
                }
            },
            name="multiprocess",
        )
    raise InvalidConfig(f"AUDITEXPORT_EXECUTOR is {name!r}; it must be in_process or multiprocess")


# Whom the page names for the one outbox of the environment; a file of outboxes and a component say their own.
OWNERS = ("team:data-platform",)


def build_defs(**arguments: Any) -> dg.Definitions:
    """Our code location: `build_audit_export_defs` for every outbox of AUDITEXPORT_OUTBOXES, or for the one outbox of the
    environment, with an executor.

    AUDITEXPORT_EXECUTOR and AUDITEXPORT_OUTBOXES are read here, because Dagster wants executor and names with the
    definitions. `arguments` are for the one outbox. Raises `InvalidConfig`, naming file, entry and key.
    """
    executor = _executor(os.environ.get("AUDITEXPORT_EXECUTOR") or "in_process")
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
    except (dg.DagsterError, dg.DagsterInvariantViolationError) as error:  # an owner, a tag or a group of no such form
        raise InvalidConfig(f"{outboxes.path}: outbox {entry.name}: {error}") from None


defs = build_defs()
