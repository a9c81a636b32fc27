"""`--report FILE.html`, the option that writes a report, and how the report's footer shows the command."""

from __future__ import annotations

import shlex
from pathlib import Path

import click

# Free text of an operator stays out of a page that is passed on.
_NOT_REPEATED = {"who", "why"}

report_option = click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write one self-contained HTML page with tables and pictures.",
)


def typed(context: click.Context) -> str:
    """The command with the options that were given, as one would type it."""
    root = context.find_root()
    words = ["auditexport"]
    if root.params.get("outbox_name"):
        words += ["--outbox", root.params["outbox_name"]]
    words += context.command_path.removeprefix(root.command_path).split()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in _NOT_REPEATED and isinstance(parameter, click.Option):
            value = context.params[name]
            option = max(parameter.opts, key=len)
            for one in value if parameter.multiple else [value]:
                words += [option] if parameter.is_flag else [option, str(one)]
    return shlex.join(words)
