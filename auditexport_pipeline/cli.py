"""`auditexport` at the prompt.

What belongs here: arguments, and handing them to the one function that does the work. What does not: the
work. Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import click

from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig

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
def main() -> None:
    """Every audit event of a MySQL outbox in ClickHouse, exactly once."""


def _required(name: str) -> str:
    value = os.environ.get(name)
    if not value:
        raise InvalidConfig(f"{name} is not set; the README says what it looks like")
    return value


@main.command()
@click.option(
    "--with-outbox", is_flag=True, help="Also create clickhouse_outbox, which the application owns (trials only)."
)
@click.option("--replicated", is_flag=True, help="Create audit_logs_raw_v1 on ReplicatedReplacingMergeTree.")
def init(with_outbox: bool, replicated: bool) -> None:
    """Create the ledger, the dead letters, audit_logs_raw_v1 and audit_logs where they do not exist.

    Changes nothing that exists; what is there and not as it should be is reported with the statement that
    mends it, and the exit status is 1.
    """
    from auditexport_pipeline.stores import setup
    from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
    from auditexport_pipeline.stores.outbox import MySQLOutbox

    outbox = MySQLOutbox(_required("AUDITEXPORT_MYSQL_URL"))
    log = ClickHouseAuditLog(_required("AUDITEXPORT_CLICKHOUSE_URL"))
    created = setup.create(outbox, log, with_outbox=with_outbox, replicated=replicated)
    click.echo(f"created {', '.join(created)}" if created else "nothing to create")
    findings = setup.check(outbox, log)
    for finding in findings:
        click.echo(str(finding), err=True)
    if any(finding.fatal for finding in findings):
        sys.exit(BAD_OUTCOME)


_directory = click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".auditexport"),
    show_default=True,
    help="Where the local stack keeps its data.",
)


@main.command()
@_directory
@click.option("--events", type=click.IntRange(1_000, 10_000_000), default=100_000, show_default=True)
def demo(directory: Path, events: int) -> None:
    """Watch events move from MySQL to ClickHouse on this machine; exit status 0 only if the numbers add up."""
    _stop_on_sigterm()
    from auditexport_pipeline.local import demo as local_demo

    sys.exit(local_demo.run(directory, events))


@main.command()
@_directory
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=3000,
    show_default=True,
    help="Of Dagster's page; a free one if taken.",
)
@click.option("--events-per-s", type=click.FloatRange(0.1, 10_000), default=50.0, show_default=True)
def dev(directory: Path, port: int, events_per_s: float) -> None:
    """Run the local stack with Dagster's page and a live trickle of events, until Ctrl-C."""
    _stop_on_sigterm()
    from auditexport_pipeline.local import dev as local_dev

    try:
        sys.exit(local_dev.run(directory, port=port, events_per_s=events_per_s))
    except KeyboardInterrupt:
        click.echo("stopped")


def _stop_on_sigterm() -> None:
    """`kill` stops a stack as cleanly as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # a shell's background job starts with it ignored


if __name__ == "__main__":
    main()
