"""The composition root: everything Dagster sees, put together once.

What belongs here: `build_defs`, and `defs` as the code location loads it. What does not: any definition.
"""

from __future__ import annotations

import os
from typing import Any

import dagster as dg

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.defs.assets import audit_logs_raw_v1, clickhouse_outbox
from auditexport_pipeline.defs.automation import export_job, export_schedule, outbox_backlog_sensor
from auditexport_pipeline.defs.checks import no_dead_letters_standing, recent_exports_reconcile
from auditexport_pipeline.defs.dead_letters import retry_dead_letters
from auditexport_pipeline.defs.io import outbox_io_manager
from auditexport_pipeline.defs.maintenance import (
    reconcile_audit_logs,
    reconcile_schedule,
    requeue_events,
    sweep_exported_rows,
    sweep_schedule,
)
from auditexport_pipeline.defs.resources import ClickHouseResource, HeartbeatResource, MySQLResource, ahead


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


def build_defs(**resources: Any) -> dg.Definitions:
    """The code location; `resources` replaces any of `mysql`, `clickhouse`, `heartbeat`, `outbox_io_manager`.

    The databases' URLs are read from AUDITEXPORT_MYSQL_URL and AUDITEXPORT_CLICKHOUSE_URL when a run
    starts. AUDITEXPORT_EXECUTOR is read here, because Dagster wants the executor with the definitions.
    """
    return dg.Definitions(
        assets=[clickhouse_outbox, audit_logs_raw_v1],
        asset_checks=[recent_exports_reconcile, no_dead_letters_standing],
        jobs=[export_job, requeue_events, sweep_exported_rows, reconcile_audit_logs, retry_dead_letters],
        sensors=[outbox_backlog_sensor],
        schedules=[export_schedule, sweep_schedule, reconcile_schedule],
        resources={
            "mysql": MySQLResource(url=dg.EnvVar("AUDITEXPORT_MYSQL_URL")),
            "clickhouse": ClickHouseResource(url=dg.EnvVar("AUDITEXPORT_CLICKHOUSE_URL")),
            "heartbeat": HeartbeatResource(),
            "outbox_io_manager": outbox_io_manager,
            "ahead": ahead,
            **resources,
        },
        executor=_executor(os.environ.get("AUDITEXPORT_EXECUTOR") or "in_process"),
    )


defs = build_defs()
