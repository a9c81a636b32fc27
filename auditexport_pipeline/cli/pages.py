"""`--report FILE`: the option that writes a page for people, for every command that has one.

What belongs here: the option, and how the page's footer says what was typed. What does not: the page (`report`).
"""

from __future__ import annotations

import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

Command = TypeVar("Command", bound=Callable[..., Any])

# What somebody says in his own words stays out of a page that is passed on.
_NOT_REPEATED = {"who", "why"}


def report_option(command: Command) -> Command:
    return click.option(
        "--report",
        "report_path",
        type=click.Path(dir_okay=False, path_type=Path),
        metavar="FILE.html",
        help="Write one self-contained HTML page with tables and pictures.",
    )(command)


def typed(context: click.Context) -> str:
    """The command with the options that were given, as one would type it."""
    words: list[str] = []
    above: click.Context | None = context
    while above is not None and above.parent is not None:
        words.insert(0, above.info_name or "")
        above = above.parent
    outbox_name = context.find_root().params.get("outbox_name")
    words[:0] = ["auditexport", *(("--outbox", outbox_name) if outbox_name else ())]
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if not given or name in _NOT_REPEATED or not isinstance(parameter, click.Option):
            continue
        option = max(parameter.opts, key=len)
        if parameter.is_flag:
            words.append(option)
            continue
        value = context.params[name]
        for one in value if parameter.multiple else [value]:
            words += [option, str(one)]
    return shlex.join(words)
