"""`auditexport`, the command: its group (`cli.group`), and a module for each theme of commands.

A command is its options, one call into `core` or a store, and one table or JSON. Heavy imports wait until a command needs
them.
"""

from __future__ import annotations

# Each module adds its commands to the group when it is imported.
from auditexport_pipeline.cli import (  # noqa: F401
    batches,
    dead_letters,
    drain,
    local,
    maintenance,
    metrics,
    setup,
    status,
)
from auditexport_pipeline.cli.group import BAD_CALL, BAD_OUTCOME, main

__all__ = ["BAD_CALL", "BAD_OUTCOME", "main"]
