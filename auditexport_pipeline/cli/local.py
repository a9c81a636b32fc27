"""`auditexport demo` and `dev`: options and signals. `local` has the stack and prints."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import click

from auditexport_pipeline.cli.group import main
from auditexport_pipeline.cli.shared import json_option

_directory = click.option(
    "--directory",
    type=click.Path(path_type=Path, file_okay=False),
    default=Path(".auditexport"),
    show_default=True,
    help="Where the local stack keeps its data.",
)


@main.command()
@_directory
@click.option("--events", type=click.IntRange(1_000, 10_000_000), default=100_000, show_default=True)
@json_option
def demo(directory: Path, events: int, as_json: bool) -> None:
    """Watch events move from MySQL to ClickHouse on this machine.

    Exit status: 0 only if every number adds up, 1 if not, 2 when the call is wrong or a server cannot be started.
    """
    _stop_on_sigterm()
    from auditexport_pipeline.local import demo as local_demo

    sys.exit(local_demo.run(directory, events, as_json=as_json))


@main.command()
@_directory
@click.option(
    "--port",
    type=click.IntRange(1, 65_535),
    default=3000,
    show_default=True,
    help="Of the Dagster UI; a free one if taken.",
)
@click.option(
    "--events-per-s",
    type=click.FloatRange(0, 10_000),
    default=50.0,
    show_default=True,
    help="What the application commits; 0: nothing.",
)
@click.option(
    "--no-automation", is_flag=True, help="Leave the sensor and the schedule as they are: off, on a fresh stack."
)
def dev(directory: Path, port: int, events_per_s: float, no_automation: bool) -> None:
    """Run the local stack with the Dagster UI and a live trickle of events, until Ctrl-C.

    Exit status: 0 stopped, 2 when the call is wrong or a server cannot be started.
    """
    _stop_on_sigterm()
    from auditexport_pipeline.local import dev as local_dev

    try:
        sys.exit(local_dev.run(directory, port=port, events_per_s=events_per_s, automation=not no_automation))
    except KeyboardInterrupt:
        click.echo("stopped")


def _stop_on_sigterm() -> None:
    """`kill` stops a stack as cleanly as Ctrl-C does."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    signal.signal(signal.SIGTERM, interrupt)
    signal.signal(signal.SIGINT, interrupt)  # a shell's background job starts with it ignored
