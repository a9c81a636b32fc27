"""`auditexport`, the command: its group (`cli.group`) and every command, one module a theme.

A command hands the work to the one function that does it. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

# Each module adds its commands to the group when it is imported.
from auditexport_pipeline.cli import (  # noqa: F401
    batches,
    completion,
    dead_letters,
    doctor,
    drain,
    init,
    local,
    maintenance,
    metrics,
    status,
)
from auditexport_pipeline.cli.group import BAD_CALL, BAD_OUTCOME, main

__all__ = ["BAD_CALL", "BAD_OUTCOME", "main"]
