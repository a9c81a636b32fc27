"""`auditexport doctor`: what is right, what is wrong, what breaks and how to mend it, before anything moves.

What belongs here: the command and its table. What does not: what is looked at (`preflight`).
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import json_option, print_json
from auditexport_pipeline.cli.stores import audit_log, outbox
from auditexport_pipeline.core.limits import RETENTION_DAYS

if TYPE_CHECKING:
    from auditexport_pipeline.core.findings import Look

ROLES = ("exporter", "operator", "sweeper", "reader", "owner")


@main.command()
@click.option(
    "--role", type=click.Choice(ROLES), default=ROLES[0], show_default=True, help="Whose grants and tables to look at."
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
    """Look at both databases and say what would break, and the statement that mends it. Changes nothing.

    Exit status: 0 nothing fatal, 1 something is fatal and a run would claim nothing, 2 the call or a URL is wrong.
    """
    from auditexport_pipeline import preflight
    from auditexport_pipeline.core.findings import all_findings
    from auditexport_pipeline.roles import Role

    looks = preflight.examine(outbox(), audit_log(), role=Role(role), retention_days=retention_days)
    fatal = sum(finding.fatal for finding in all_findings(looks))
    if as_json:
        print_json({"role": role, "fatal": fatal, "looks": [asdict(look) for look in looks]})
    else:
        _show(looks, fatal)
    if fatal:
        sys.exit(BAD_OUTCOME)


def _show(looks: list[Look], fatal: int) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    styles = {"ok": "green", "warning": "yellow", "fatal": "bold red"}
    table = Table(box=None, pad_edge=False)
    table.add_column()
    table.add_column("looked at", no_wrap=True)
    table.add_column("seen")
    for look in looks:
        worst = "ok" if not look.findings else "fatal" if any(found.fatal for found in look.findings) else "warning"
        table.add_row(Text(worst, styles[worst]), Text(look.about), Text(look.seen))
    console = Console()
    console.print(table)
    for finding in (finding for look in looks for finding in look.findings):
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
