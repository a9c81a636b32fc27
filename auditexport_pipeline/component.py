"""`type: auditexport_pipeline.AuditExport` in a `defs.yaml`: one outbox as a Dagster component, with `outboxes.OutboxSettings`."""

from __future__ import annotations

import dagster as dg

from auditexport_pipeline.defs.build import defs_of
from auditexport_pipeline.outboxes import OutboxSettings


class AuditExport(dg.Component, OutboxSettings, dg.Resolvable):
    """Every audit event of one MySQL outbox in ClickHouse, exactly once: assets, checks, jobs, sensors, schedules."""

    def build_defs(self, context: dg.ComponentLoadContext) -> dg.Definitions:
        return defs_of(self)
