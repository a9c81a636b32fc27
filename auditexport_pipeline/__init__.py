"""auditexport: every audit event of a MySQL outbox in ClickHouse, exactly once.

    application ──INSERT──▶ clickhouse_outbox            audit_logs_raw_v1 ──▶ audit_logs (view)
                                 │  ▲                            ▲
                        claim,   │  │ mark                       │ one INSERT and one token a block
                        fetch    ▼  │                            │
                            clickhouse_outbox_batch: the ledger ─┘
                            clickhouse_outbox_dead_letter: rows no event can be made of
                            clickhouse_outbox_action, _erasure: what operators did, who and why

A batch is claimed in the ledger, fetched and sealed, written block by block, marked in the outbox, and
verified in ClickHouse. Every step can run again after any crash; `core/__init__.py` says what each crash leaves behind, and why
nothing is lost and nothing is there twice.

Where things are, and what each may import (a test reads it from the source):

    core        what exporting means: no Dagster, driver, wall clock or environment
    mysql, clickhouse   the two databases, each in its own SQL    may import core
    schema, preflight   tables of both are created, checked       may import core, mysql, clickhouse
    outboxes    which outboxes there are                          may import core
    report      pages for people                                  may import core, mysql, clickhouse
    defs        Dagster: ops, resources, sensor, schedule         may import all of these
    definitions, component   what Dagster loads                   may import all of these
    local       servers and events to try it with                 may import core, mysql, clickhouse, schema
    cli         commands                                          may import anything
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from auditexport_pipeline.component import AuditExport
    from auditexport_pipeline.core.event import Event, OutboxRow, Undecodable
    from auditexport_pipeline.core.versions import PayloadVersion, decoder, register_version
    from auditexport_pipeline.defs.build import build_audit_export_defs

_FROM = {
    "AuditExport": "auditexport_pipeline.component",
    "build_audit_export_defs": "auditexport_pipeline.defs.build",
    "Event": "auditexport_pipeline.core.event",
    "OutboxRow": "auditexport_pipeline.core.event",
    "Undecodable": "auditexport_pipeline.core.event",
    "PayloadVersion": "auditexport_pipeline.core.versions",
    "decoder": "auditexport_pipeline.core.versions",
    "register_version": "auditexport_pipeline.core.versions",
}
__all__ = [
    "AuditExport",
    "Event",
    "OutboxRow",
    "PayloadVersion",
    "Undecodable",
    "build_audit_export_defs",
    "decoder",
    "register_version",
]


def __getattr__(name: str) -> object:
    """The names that other packages use; Dagster is imported only for a name that needs it."""
    if name in _FROM:
        from importlib import import_module

        return getattr(import_module(_FROM[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
