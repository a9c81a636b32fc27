"""`auditexport doctor`: prints the results of the checks in `preflight`."""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import json_option, print_json
from auditexport_pipeline.cli.stores import audit_log, outbox
from auditexport_pipeline.core.settings import RETENTION_DAYS

if TYPE_CHECKING:
    from auditexport_pipeline.core.findings import CheckResult

ROLES = ("exporter", "operator", "sweeper", "reader", "owner")


@main.command()
@click.option(
    "--role", type=click.Choice(ROLES), default=ROLES[0], show_default=True, help="Whose grants and tables to check."
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
    """Check both databases and say what would break, and the statement that fixes it. Changes nothing.

    Exit status: 0 nothing fatal, 1 something is fatal and a run would claim nothing, 2 the call or a URL is wrong.
    """
    from auditexport_pipeline import preflight
    from auditexport_pipeline.core.findings import all_findings
    from auditexport_pipeline.roles import Role

    results = preflight.examine(outbox(), audit_log(), role=Role(role), retention_days=retention_days)
    fatal = sum(finding.fatal for finding in all_findings(results))
    if as_json:
        print_json({"role": role, "fatal": fatal, "looks": [asdict(result) for result in results]})
    else:
        _show(results, fatal)
    if fatal:
        sys.exit(BAD_OUTCOME)


def _show(results: list[CheckResult], fatal: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from auditexport_pipeline.core.findings import all_findings

    styles = {"ok": "green", "warning": "yellow", "fatal": "bold red"}
    table = Table(box=None, pad_edge=False)
    table.add_column()
    table.add_column("check", no_wrap=True)
    table.add_column("seen")
    for result in results:
        worst = "ok" if not result.findings else "fatal" if any(one.fatal for one in result.findings) else "warning"
        table.add_row(Text(worst, styles[worst]), Text(result.about), Text(result.seen))
    console = Console()
    console.print(table)
    for finding in all_findings(results):
        kind = "fatal" if finding.fatal else "warning"
        console.print()
        console.print(Text.assemble((kind, styles[kind]), f"  {finding.what}"), soft_wrap=True)
        console.print(Text(f"  breaks: {finding.breaks}"), soft_wrap=True)
        # Not wrapped and not marked up: it is there to be copied.
        console.print(Text(f"  fix:    {finding.fix}"), soft_wrap=True)
    console.print()
    console.print(
        Text(f"{fatal} fatal: a run would claim nothing", styles["fatal"])
        if fatal
        else Text("nothing fatal: a run would claim", styles["ok"])
    )
