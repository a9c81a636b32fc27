"""`auditexport` at the prompt.

What belongs here: the group of commands, and how one of this project's errors ends a command. What does not:
the commands (one module a theme beside this one), and the work, which each hands to the one function that does
it. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import logging
import sys

import click

from auditexport_pipeline.core.errors import AuditExportError

# Exit statuses: 0 done, 1 the outcome is bad, 2 the call or the setup is wrong.
BAD_OUTCOME = 1
BAD_CALL = 2


class _Group(click.Group):
    """Ends with one line instead of a traceback when one of this project's errors is the reason."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except AuditExportError as error:
            click.echo(f"auditexport: {error}", err=True)
            sys.exit(BAD_CALL)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="auditexport-pipeline")
@click.option(
    "--outbox",
    "outbox_name",
    envvar="AUDITEXPORT_OUTBOX",
    metavar="NAME",
    help="Which outbox of the file AUDITEXPORT_OUTBOXES a command is about; AUDITEXPORT_OUTBOX says the same.",
)
def main(outbox_name: str | None) -> None:
    """Every audit event of a MySQL outbox in ClickHouse, exactly once."""
    # The driver's warnings say in other words, and without what to do, what our one line says.
    logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())


# Each module adds its commands to the group when it is imported.
from auditexport_pipeline.cli import (  # noqa: E402, F401
    batches,
    completion,
    dead_letters,
    doctor,
    drain,
    init,
    local,
    metrics,
    status,
    upkeep,
)
