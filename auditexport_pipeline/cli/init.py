"""`auditexport init`: creates the tables that are missing (`schema`) and prints the findings of the rest (`preflight`)."""

from __future__ import annotations

import sys
from dataclasses import asdict

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import json_option, print_json
from auditexport_pipeline.cli.stores import audit_log, outbox
from auditexport_pipeline.core.errors import InvalidConfig


@main.command()
@click.option(
    "--with-outbox", is_flag=True, help="Also create clickhouse_outbox, which the application owns (trials only)."
)
@click.option(
    "--engine",
    type=click.Choice(["merge_tree", "replicated", "shared", "distributed"]),
    help="What audit_logs_raw_v1 stands on: one server, replicas, ClickHouse Cloud, or shards.  [default: that of "
    "audit_logs_raw_v1 where it is there and one server or the Cloud, or else merge_tree]",
)
@click.option("--replicated", is_flag=True, help="The same as --engine replicated.")
@click.option("--cluster", default="", metavar="NAME", help="Create everything in ClickHouse ON CLUSTER this one.")
@click.option(
    "--keeper-path",
    default=None,
    metavar="PATH",
    help="Where Keeper has the replicated table; empty leaves it to the server.  "
    "[default: /clickhouse/tables/{shard}/{database}/{table}]",
)
@click.option(
    "--replica", default="{replica}", show_default=True, metavar="NAME", help="This replica's name in Keeper."
)
@click.option("--print-ddl", is_flag=True, help="Print the statements and end; connects to nothing.")
@json_option
def init(
    with_outbox: bool,
    engine: str | None,
    replicated: bool,
    cluster: str,
    keeper_path: str | None,
    replica: str,
    print_ddl: bool,
    as_json: bool,
) -> None:
    """Create the ledger, the dead letters, audit_logs_raw_v1 and audit_logs where they do not exist.

    Changes nothing that exists; what is there and not as it should be is reported with the statement that
    fixes it. Exit status: 0 all is there, 1 something is not as it should be, 2 the call or a URL is wrong.
    """
    from auditexport_pipeline import preflight
    from auditexport_pipeline import schema as setup
    from auditexport_pipeline.clickhouse.connection import connection_arguments
    from auditexport_pipeline.clickhouse.engines import KEEPER_PATH, Engine, Layout
    from auditexport_pipeline.core.findings import all_findings
    from auditexport_pipeline.roles import Role

    if replicated and engine not in (None, "replicated"):
        raise click.UsageError(f"--replicated and --engine {engine} contradict each other")
    if print_ddl and with_outbox:
        raise click.UsageError("--with-outbox needs a server to ask for its collation; leave --print-ddl out")
    layout = Layout(
        engine=Engine(engine or ("replicated" if replicated else "merge_tree")),
        cluster=cluster,
        keeper_path=KEEPER_PATH if keeper_path is None else keeper_path,
        replica=replica,
    )
    if print_ddl:
        try:
            database = connection_arguments(audit_log().url)["database"]
        except InvalidConfig:  # no URL is needed to look at statements; the database is in that of a Distributed table
            database = "default"
        statements = setup.printed(layout, database)
        if as_json:
            print_json(statements)
        for server, texts in statements.items() if not as_json else ():
            click.echo(f"-- {server}")
            for statement in texts:
                click.echo(f"{statement};\n")
        return
    mysql, clickhouse = outbox(), audit_log()
    said = layout if engine or replicated else None  # a cluster alone does not say what stands on it
    created = setup.create(mysql, clickhouse, with_outbox=with_outbox, layout=said, cluster=cluster)
    if not as_json:
        click.echo(f"created {', '.join(created)}" if created else "nothing to create")
    results = preflight.examine(mysql, clickhouse, role=Role.OWNER)
    # The grants that creating takes were there, or it had failed; those of other users are for `doctor --role`.
    findings = all_findings(result for result in results if " grants of " not in result.about)
    if as_json:
        print_json({"created": created, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            click.echo(str(finding), err=True)
    if any(finding.fatal for finding in findings):
        sys.exit(BAD_OUTCOME)
