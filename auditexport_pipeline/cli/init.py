"""`auditexport init`: creating what is ours.

What belongs here: the command. What does not: what is created and checked (`stores.setup`, `stores.preflight`).
"""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from auditexport_pipeline.cli import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import json_option, print_json
from auditexport_pipeline.cli.stores import audit_log, outbox


@main.command()
@click.option(
    "--with-outbox", is_flag=True, help="Also create clickhouse_outbox, which the application owns (trials only)."
)
@click.option("--replicated", is_flag=True, help="Create audit_logs_raw_v1 on ReplicatedReplacingMergeTree.")
@json_option
def init(with_outbox: bool, replicated: bool, as_json: bool) -> None:
    """Create the ledger, the dead letters, audit_logs_raw_v1 and audit_logs where they do not exist.

    Changes nothing that exists; what is there and not as it should be is reported with the statement that
    mends it. Exit status: 0 all is there, 1 something is not as it should be, 2 the call or a URL is wrong.
    """
    from auditexport_pipeline.stores import preflight, setup
    from auditexport_pipeline.stores.findings import all_findings
    from auditexport_pipeline.stores.roles import Role

    mysql, clickhouse = outbox(), audit_log()
    created = setup.create(mysql, clickhouse, with_outbox=with_outbox, replicated=replicated)
    if not as_json:
        click.echo(f"created {', '.join(created)}" if created else "nothing to create")
    looks = preflight.examine(mysql, clickhouse, role=Role.OWNER)
    # The grants that it took are there, or we were not here; those of others are for `doctor --role`.
    findings = all_findings([look for look in looks if " grants of " not in look.about])
    if as_json:
        print_json({"created": created, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(str(finding), err=True)
    if any(finding.fatal for finding in findings):
        sys.exit(BAD_OUTCOME)
