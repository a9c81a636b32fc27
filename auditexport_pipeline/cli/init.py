"""`auditexport init`: creating what is ours.

What belongs here: the command. What does not: what is created and checked (`stores.setup`, `stores.preflight`).
"""

from __future__ import annotations

import sys

import click

from auditexport_pipeline.cli import BAD_OUTCOME, main
from auditexport_pipeline.cli.stores import audit_log, outbox


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
    from auditexport_pipeline.stores import preflight, setup
    from auditexport_pipeline.stores.findings import all_findings
    from auditexport_pipeline.stores.roles import Role

    mysql, clickhouse = outbox(), audit_log()
    created = setup.create(mysql, clickhouse, with_outbox=with_outbox, replicated=replicated)
    click.echo(f"created {', '.join(created)}" if created else "nothing to create")
    looks = preflight.examine(mysql, clickhouse, role=Role.OWNER)
    # The grants that it took are there, or we were not here; those of others are for `doctor --role`.
    findings = all_findings([look for look in looks if " grants of " not in look.about])
    for finding in findings:
        click.echo(str(finding), err=True)
    if any(finding.fatal for finding in findings):
        sys.exit(BAD_OUTCOME)
