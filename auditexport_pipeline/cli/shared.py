"""What several commands need: options, the user's name, times, tables and JSON. The stores are in `cli.stores`."""

from __future__ import annotations

import getpass
import os
import select
import signal
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from typing import TYPE_CHECKING, Any, TypeVar

import click
import msgspec

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Settings, bounds_of

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

Command = TypeVar("Command", bound=Callable[..., Any])
# Lines of a table on the terminal; `--json` has all of them.
TABLE_ROWS = 40
_AGE_UNITS_S = {"s": 1, "m": 60, "h": 3_600, "d": 86_400}

json_option = click.option("--json", "as_json", is_flag=True, help="One JSON object, for programs.")
dry_run_option = click.option("--dry-run", is_flag=True, help="Say what would be done; change nothing.")
who_option = click.option("--who", default=None, help="Who wants this.  [default: the user at this prompt]")


def setting_options(settings: type[Settings], *, without: Collection[str] = ()) -> Callable[[Command], Command]:
    """An option for each of these settings, with its default, bounds and sentence, `without` those with an option of their own."""

    def with_options(command: Command) -> Command:
        for name, field in reversed(settings.model_fields.items()):
            if name not in without:
                low, high = bounds_of(field)
                kind = click.IntRange(low, high) if field.annotation is int else click.FloatRange(low, high)
                flag = f"--{name.replace('_', '-')}"
                command = click.option(
                    flag, type=kind, default=field.default, show_default=True, help=field.description
                )(command)
        return command

    return with_options


class Time(click.ParamType):  # type: ignore[type-arg]
    """A moment: epoch milliseconds, or ISO 8601 (UTC where it names no zone)."""

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
    """A number and its unit, in seconds."""

    name = "age"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        number, unit = str(value)[:-1], str(value)[-1:]
        if not number.isdecimal() or unit not in _AGE_UNITS_S:
            self.fail(f"{value!r} is no age; write a number and its unit: 90s, 15m, 6h, 30d", param, ctx)
        return int(number) * _AGE_UNITS_S[unit]


def user() -> str:
    """The name of this process's user; raises `InvalidConfig` if the user has none, as in many containers."""
    try:
        return getpass.getuser()
    except (KeyError, OSError) as error:
        raise InvalidConfig("this user has no name; say who decides with --who") from error


def by(who: str | None, why: str) -> Actor:
    """Who acts, and why."""
    return Actor(who=who or user(), why=why)


def print_fields(fields: Mapping[str, str], *, width: int, indent: str = "") -> None:
    """A line for each name and its text; the texts begin `width` characters after the indent."""
    for name, text in fields.items():
        click.echo(f"{indent}{name:<{width}}{text}")


def print_json(values: Mapping[str, Any]) -> None:
    """One JSON object on a line of its own."""
    click.echo(msgspec.json.encode(values).decode())


def table(*columns: str, left: tuple[str, ...] = ()) -> Table:
    """A table without lines; the first column and those in `left` hold words, the others numbers."""
    from rich.table import Table

    made = Table(box=None, header_style="bold", pad_edge=False)
    for index, column in enumerate(columns):
        words = index == 0 or column in left
        made.add_column(column, justify="left" if words else "right", overflow="fold")
    return made


def console(*, stderr: bool = False) -> Console:
    """The terminal. Applications choose the ids of events, so no text is read as markup."""
    from rich.console import Console

    return Console(markup=False, emoji=False, highlight=False, stderr=stderr)


def print_table(made: Table) -> None:
    """As wide as the terminal; in a pipe or a file as wide as the table needs, so that ids stay whole."""
    screen = console()
    if not screen.is_terminal and "COLUMNS" not in os.environ:
        screen.width = max(screen.width, screen.measure(made, options=screen.options.update(max_width=1_000)).maximum)
    screen.print(made)


def moment(at_ms: int) -> str:
    """A time in UTC, to the second."""
    return datetime.fromtimestamp(max(0, at_ms) / 1000, tz=timezone.utc).strftime("%Y-%m-%d %H:%M:%S")


def day(at_ms: int) -> str:
    return moment(at_ms)[:10]


def interactive() -> bool:
    """True if stdout is a terminal."""
    return sys.stdout.isatty()


@contextmanager
def until_stopped(*signals: signal.Signals) -> Iterator[Callable[[float | None], bool]]:
    """Yields a function that waits for some seconds, or for ever for None, and returns whether to go on.

    It returns False at once when one of these signals arrives, or arrived between two waits. A second signal has its usual
    effect.

    The handler only writes into a pipe, which the wait reads. An exception from a handler could be raised in a destructor
    or a callback, which would swallow it, or while a lock is held.
    """
    reader, writer = os.pipe()

    def ask(number: int, _: object) -> None:
        signal.signal(number, before[signal.Signals(number)])
        os.write(writer, b"!")

    before = {number: signal.signal(number, ask) for number in signals}
    try:
        yield lambda seconds: not select.select([reader], [], [], seconds)[0]
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        os.close(reader)
        os.close(writer)
