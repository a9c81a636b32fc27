"""`auditexport init`, `doctor` and `completion`: the setup. `schema` creates tables, `preflight` checks both databases."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from auditexport_pipeline.cli.group import main
from auditexport_pipeline.cli.shared import answer, console, json_option
from auditexport_pipeline.cli.stores import audit_log, outbox, outbox_name
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.findings import all_findings
from auditexport_pipeline.core.format import for_outbox
from auditexport_pipeline.core.settings import RETENTION_DAYS
from auditexport_pipeline.roles import Role

if TYPE_CHECKING:
    from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
    from auditexport_pipeline.core.findings import CheckResult
    from auditexport_pipeline.mysql.outbox import MySQLOutbox

_STYLES = {"ok": "green", "warning": "yellow", "fatal": "bold red"}


@main.command()
@click.option(
    "--with-outbox", is_flag=True, help="Also create clickhouse_outbox, which the application owns (trials only)."
)
@click.option(
    "--engine",
    type=click.Choice(["merge_tree", "replicated", "shared", "distributed"]),
    help="The engine of audit_logs_raw_v1: one server, replicas, ClickHouse Cloud, or shards.  [default: that of "
    "audit_logs_raw_v1 where it exists on one server or the Cloud, or else merge_tree]",
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

    Changes nothing that exists; what is wrong there is reported with the statement that fixes it.
    Exit status: 0 all is there, 1 something is wrong, 2 the call or a URL is wrong.
    """
    from auditexport_pipeline import schema as setup
    from auditexport_pipeline.clickhouse.connection import connection_arguments
    from auditexport_pipeline.clickhouse.engines import KEEPER_PATH, Engine, Layout

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
        except InvalidConfig:  # statements need no URL; only those of a Distributed table name the database
            database = "default"
        statements = setup.printed(layout, database)
        answer(as_json, lambda: statements, lambda: _print_ddl(statements))
        return
    mysql, clickhouse = outbox(), audit_log()
    given = layout if engine or replicated else None  # --cluster alone does not choose an engine
    created = setup.create(mysql, clickhouse, with_outbox=with_outbox, layout=given, cluster=cluster)
    results = _examined(mysql, clickhouse, Role.OWNER)
    # This user had the grants for creating; `doctor --role` checks those of other users.
    findings = all_findings(result for result in results if " grants of " not in result.about)

    def show() -> None:
        click.echo(f"created {', '.join(created)}" if created else "nothing to create")
        for finding in findings:
            click.echo(str(finding), err=True)

    answer(
        as_json,
        lambda: {"created": created, "findings": findings},
        show,
        bad=any(finding.fatal for finding in findings),
    )


def _print_ddl(statements: Mapping[str, Sequence[str]]) -> None:
    for server, texts in statements.items():
        click.echo(f"-- {server}")
        for statement in texts:
            click.echo(f"{statement};\n")


@main.command()
@click.option(
    "--role",
    type=click.Choice([str(role.value) for role in Role]),
    default="exporter",
    show_default=True,
    help="Whose grants and tables to check.",
)
@click.option(
    "--retention-days",
    type=click.IntRange(1, 3_650),
    default=RETENTION_DAYS,
    show_default=True,
    help="How long exported rows stay in the outbox; ClickHouse's TTL must be longer.",
)
@json_option
def doctor(role: str, retention_days: int, as_json: bool) -> None:
    """Check both databases; show what would break and the statement that fixes it. Changes nothing.

    Exit status: 0 nothing fatal, 1 something is fatal and a run would claim nothing, 2 the call or a URL is wrong.
    """
    results = _examined(outbox(), audit_log(), Role(role), retention_days)
    fatal = sum(finding.fatal for finding in all_findings(results))
    answer(
        as_json,
        lambda: {"role": role, "fatal": fatal, "looks": results},
        lambda: _print_checks(results, fatal),
        bad=bool(fatal),
    )


def _examined(
    mysql: MySQLOutbox, clickhouse: ClickHouseAuditLog, role: Role, retention_days: int = RETENTION_DAYS
) -> list[CheckResult]:
    """The checks of `preflight`; the commands in them name the outbox."""
    from auditexport_pipeline import preflight

    name = outbox_name()
    return [
        replace(
            result,
            seen=for_outbox(result.seen, name),
            findings=tuple(
                replace(finding, what=for_outbox(finding.what, name), fix=for_outbox(finding.fix, name))
                for finding in result.findings
            ),
        )
        for result in preflight.examine(mysql, clickhouse, role=role, retention_days=retention_days)
    ]


def _print_checks(results: Sequence[CheckResult], fatal: int) -> None:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False)
    table.add_column()
    table.add_column("check", no_wrap=True)
    table.add_column("seen")
    for result in results:
        worst = "ok" if not result.findings else "fatal" if any(one.fatal for one in result.findings) else "warning"
        table.add_row(Text(worst, _STYLES[worst]), Text(result.about), Text(result.seen))
    screen = console()
    screen.print(table)
    for finding in all_findings(results):
        kind = "fatal" if finding.fatal else "warning"
        text = f"  {finding.what}\n  breaks: {finding.breaks}\n  fix:    {finding.fix}"
        screen.print()
        # Not wrapped: a fix is there to be copied.
        screen.print(Text.assemble((kind, _STYLES[kind]), text), soft_wrap=True)
    screen.print()
    text, style = (
        (f"{fatal} fatal: a run would claim nothing", "fatal") if fatal else ("nothing fatal: a run would claim", "ok")
    )
    screen.print(Text(text, _STYLES[style]))


@main.command()
@click.argument("shell", type=click.Choice(["bash", "zsh", "fish"]))
def completion(shell: str) -> None:
    """Print the script that completes commands and options in this shell.

    \b
      bash   auditexport completion bash > ~/.local/share/bash-completion/completions/auditexport
      zsh    auditexport completion zsh > "${fpath[1]}/_auditexport"
      fish   auditexport completion fish > ~/.config/fish/completions/auditexport.fish

    Or for this shell only: eval "$(auditexport completion bash)". Exit status: 0, or 2 when the shell is none of these.
    """  # noqa: D301 - a raw \b is two characters to click, and it wraps the three lines
    from click.shell_completion import get_completion_class

    found = get_completion_class(shell)
    assert found is not None
    # Not `source()`, which in bash's case starts a bash to ask for its version.
    script = found(main, {}, "auditexport", "_AUDITEXPORT_COMPLETE")
    click.echo(script.source_template % script.source_vars())
