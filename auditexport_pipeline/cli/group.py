"""The group `auditexport`, to which every command adds itself, and how an error of this project ends a command."""

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
    from auditexport_pipeline.outboxes import check_environment

    check_environment()
    # The driver's warnings repeat our one line in other words, without what to do.
    logging.getLogger("clickhouse_connect").addHandler(logging.NullHandler())
