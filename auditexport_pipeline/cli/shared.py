"""What commands share: options, times, tables, JSON, and waiting for a signal. The stores are in `cli.stores`."""

from __future__ import annotations

import getpass
import os
import select
import shlex
import signal
import sys
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from auditexport_pipeline.cli.group import BAD_OUTCOME
from auditexport_pipeline.cli.stores import outbox_name
from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.format import for_outbox
from auditexport_pipeline.core.settings import Settings, bounds_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Command = TypeVar("Command", bound=Callable[..., Any])
# Lines of a table on the terminal; `--json` has all of them.
TABLE_ROWS = 40
_AGE_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}
# Free text of an operator, which a report does not repeat: pages are passed on.
_NOT_REPEATED = {"who", "why"}


# ── options ──────────────────────────────────────────────────────────────────────────────────────

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
who_option = click.option("--who", default=None, help="Who does this.  [default: the user of this process]")
report_option = click.option(
    "--report",
    "report_path",
    type=click.Path(dir_okay=False, path_type=Path),
    metavar="FILE.html",
    help="Write one self-contained HTML page with tables and charts.",
)


def with_options(*options: Callable[[Command], Command]) -> Callable[[Command], Command]:
    """A decorator that adds these options, in this order."""

    def decorated(command: Command) -> Command:
        for option in reversed(options):
            command = option(command)
        return command

    return decorated


def setting_options(settings: type[Settings], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """An option for each setting, with its default, bounds and description; `without` those that have their own option."""
    options = []
    for name, field in settings.model_fields.items():
        if name not in without:
            low, high = bounds_of(field)
            kind = click.IntRange(low, high) if field.annotation is int else click.FloatRange(low, high)
            flag = f"--{name.replace('_', '-')}"
            options.append(
                click.option(flag, type=kind, default=field.default, show_default=True, help=field.description)
            )
    return with_options(*options)


class Time(click.ParamType):  # type: ignore[type-arg]
    """A moment in epoch milliseconds, from these or from ISO 8601 (UTC without a zone)."""

    name = "time"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if str(value).isdecimal():
            return int(value)
        try:
            moment = datetime.fromisoformat(str(value).replace("Z", "+00:00"))
        except ValueError:
            self.fail(f"{value!r} is no time; write 2026-11-23, 2026-11-23T04:00 or epoch milliseconds", param, ctx)
        return int((moment if moment.tzinfo else moment.replace(tzinfo=timezone.utc)).timestamp() * 1000)


class Age(click.ParamType):  # type: ignore[type-arg]
    """An age in seconds, from a number and its unit."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        if not is_age(str(value)):
            self.fail(f"{value!r} is no age; write a number and its unit: 90s, 15m, 6h, 30d", param, ctx)
        return int(value[:-1]) * _AGE_UNITS_S[value[-1]]


def is_age(text: str) -> bool:
    return text[:-1].isdecimal() and text[-1] in _AGE_UNITS_S


def by(who: str | None, why: str) -> Actor:
    """Who acts, and why; raises `InvalidConfig` if the process's user has no name, as in many containers."""
    try:
        return Actor(who=who or getpass.getuser(), why=why)
    except (KeyError, OSError) as error:
        raise InvalidConfig("this user has no name; name the person with --who") from error


def typed(context: click.Context) -> str:
    """The command with the given options, as it was typed, for the footer of a report."""
    words = ["auditexport"]
    if name := outbox_name():
        words += ["--outbox", name]
    words += context.command_path.removeprefix(context.find_root().command_path).split()
    for parameter in context.command.params:
        name = parameter.name or ""
        given = context.get_parameter_source(name) is click.core.ParameterSource.COMMANDLINE
        if given and name not in _NOT_REPEATED and isinstance(parameter, click.Option):
            value = context.params[name]
            option = max(parameter.opts, key=len)
            for one in value if parameter.multiple else [value]:
                words += [option] if parameter.is_flag else [option, str(one)]
    return shlex.join(words)


# ── output ───────────────────────────────────────────────────────────────────────────────────────


def say(text: str, *, err: bool = False) -> None:
    """A line for people. The commands in it, between backticks, name the outbox if it has a name."""
    click.echo(for_outbox(text, outbox_name()), err=err)


def answer(
    as_json: bool, values: Callable[[], Mapping[str, Any]], show: Callable[[], object], *, bad: bool = False
) -> None:
    """The result of a command, as JSON or for people; ends the command with status 1 when the outcome is bad."""
    if as_json:
        print_json(values())
    else:
        show()
    if bad:
        sys.exit(BAD_OUTCOME)


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on a line of its own. msgspec writes dataclasses and enums, and keys that are numbers as texts."""
    click.echo(msgspec.json.encode(values).decode())


def print_fields(fields: Mapping[str, str], *, width: int, indent: str = "") -> None:
    """A line for each name and its text; the texts begin `width` characters after the indent."""
    for name, text in fields.items():
        click.echo(f"{indent}{name:<{width}}{text}")


def table(columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Table:
    """A table without lines. A column whose name begins with `>` is aligned right; integers get thousands separators."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False)
    for column in columns:
        made.add_column(column.lstrip(">"), justify="right" if column.startswith(">") else "left", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def grid(*widths: int | None) -> Table:
    """Columns without a header; the last one folds."""
    from rich.table import Table

    made = Table.grid(padding=(0, 1))
    for width in widths:
        made.add_column(width=width)
    made.add_column(overflow="fold")
    return made


def console() -> Console:
    """The terminal. Applications choose the ids of events, so no text is read as markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False)


def print_table(made: Table) -> None:
    """As wide as the terminal. In a pipe or a file it is as wide as the table needs, so that ids stay whole."""
    screen = console()
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = max(screen.width, screen.measure(made, options=screen.options.update(max_width=1_000)).maximum)
    screen.print(made)


def interactive() -> bool:
    """True if stdout is a terminal."""
    return sys.stdout.isatty()


@contextmanager
def until_stopped(*signals: signal.Signals) -> Iterator[Callable[[float | None], bool]]:
    """Yields a function that waits for some seconds (None: without end) and returns whether to go on.

    It returns False at once when one of these signals arrives, or arrived between two waits. A second signal has its usual
    effect.

    The handler only writes into a pipe, which the wait reads. An exception from a handler could be raised in a destructor
    or a callback, which would swallow it, or while a lock is taken.
    """
    reader, writer = os.pipe()

    def stop(number: int, _: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        os.write(writer, b"!")

    before = {number: signal.signal(number, stop) for number in signals}
    try:
        yield lambda seconds: not select.select([reader], [], [], seconds)[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
