"""The group `auditexport`, to which every command adds itself, and how an error of this project ends a command."""

from __future__ import annotations

import logging
import sys

import click

from auditexport_pipeline.cli.stores import outbox_name
from auditexport_pipeline.core.errors import AuditExportError
from auditexport_pipeline.core.format import for_outbox

# Exit statuses: 0 done, 1 the outcome is bad, 2 the call or the setup is wrong.
BAD_OUTCOME = 1
BAD_CALL = 2


class _Group(click.Group):
    """Ends with one line instead of a traceback for an error of this project."""

    def invoke(self, ctx: click.Context) -> object:
        try:
            return super().invoke(ctx)
        except AuditExportError as error:
            click.echo(f"auditexport: {for_outbox(str(error), outbox_name())}", err=True)
            sys.exit(BAD_CALL)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(package_name="auditexport-pipeline")
@click.option(
    "--outbox",
    "outbox_name",
    envvar="AUDITEXPORT_OUTBOX",
    metavar="NAME",
    help="The outbox of the file AUDITEXPORT_OUTBOXES that the command is about. AUDITEXPORT_OUTBOX does the same.",
)
def main(outbox_name: str | None) -> None:
    """Export every audit event of a MySQL outbox to ClickHouse, exactly once."""
    from auditexport_pipeline.outboxes import check_environment

    check_environment()
    # The driver's warnings repeat our error in other words.
    logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())
