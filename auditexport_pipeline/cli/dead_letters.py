"""`auditexport dead-letters`: list and show rows that were set aside, retry or discard them.

`mysql.dead_letters` does the work. Only `show --payload` prints a payload.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import (
    Age,
    Command,
    by,
    dry_run_option,
    json_option,
    moment,
    print_fields,
    print_json,
    print_table,
    table,
    who_option,
)
from auditexport_pipeline.cli.stores import outbox
from auditexport_pipeline.core.dead_letters import HELD, PAGE_LETTERS, DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet

if TYPE_CHECKING:
    from auditexport_pipeline.core.dead_letters import Letter, LetterCounts, LetterDetails

_ANY = "any"


def _filters(*states: str) -> Callable[[Command], Command]:
    """The options that select dead letters; the first state is the default."""

    def added(command: Command) -> Command:
        for option in (
            click.option("--pk", "pks", type=click.IntRange(min=0), multiple=True, help="Of the row; may be repeated."),
            click.option("--older-than", "older_than_s", type=Age(), help="Set aside longer ago: 90s, 15m, 6h, 30d."),
            click.option("--version", help="The payload's version."),
            click.option("--reason", help="As `list` shows it, such as wrong_type."),
            click.option("--workspace", "workspace_id", help="Of one workspace."),
            click.option("--state", type=click.Choice(states), default=states[0], show_default=True),
        ):
            command = option(command)
        return command

    return added


def _acting(command: Command) -> Command:
    for option in (
        json_option,
        dry_run_option,
        click.option("--all", "everything", is_flag=True, help="Every letter in that state: needed without a filter."),
        click.option("--at-most", type=click.IntRange(min=1), help="Stop after this many, oldest row first."),
        who_option,
    ):
        command = option(command)
    return command


@main.group("dead-letters")
def dead_letters() -> None:
    """Rows that were set aside with a reason: list, show, retry after a fix, or discard."""


@dead_letters.command("list")
@_filters("open", "discarded", "held", "retried", "gone", _ANY)
@click.option("--limit", "letters", type=click.IntRange(1, 10_000), default=PAGE_LETTERS, show_default=True)
@click.option("--newest", is_flag=True, help="Newest row first; the oldest otherwise.")
@click.option("--beyond", "beyond_pk", type=int, help="Begin beyond this pk: the last one of the page before.")
@json_option
def list_letters(letters: int, newest: bool, beyond_pk: int | None, as_json: bool, **filters: Any) -> None:
    """List dead letters and count them by reason and workspace. Ids and reasons only, never a payload.

    Exit status: 0, or 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import dead_letters as store

    which = _which(**filters)
    mysql = outbox()
    counts = store.count(mysql, which)
    found = store.page(mysql, which, letters=letters, newest_first=newest, beyond_pk=beyond_pk)
    if as_json:
        print_json({"counts": asdict(counts), "letters": [asdict(letter) for letter in found]})
        return
    _print_letters(found, counts, which)
    if len(found) == letters and counts.letters > letters:
        click.echo(f"more: --beyond {found[-1].pk}{' --newest' if newest else ''}")


@dead_letters.command()
@click.argument("pk", type=click.IntRange(min=0))
@click.option("--payload", "with_payload", is_flag=True, help="Also print the payload, as the outbox holds it now.")
@json_option
def show(pk: int, with_payload: bool, as_json: bool) -> None:
    """Show the dead letter of one outbox row, the state of the row now, and the last action on it.

    Exit status: 0, 1 when the row has no dead letter, 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import dead_letters as store

    details = store.show(outbox(), pk, with_payload=with_payload)
    if details is None:
        click.echo(f"auditexport: row {pk} has no dead letter", err=True)
        sys.exit(BAD_OUTCOME)
    if as_json:
        payload = details.payload.decode(errors="replace") if details.payload is not None else None
        print_json({**asdict(details), "payload": payload})
        return
    _print_details(details)
    if with_payload and details.payload is None:
        click.echo("payload: none, the row is not in the outbox any more")
    elif details.payload is not None:
        click.echo("payload:")
        click.echo(details.payload.decode(errors="replace"))


@dead_letters.command()
@_filters(*(str(state) for state in HELD))
@_acting
@click.option("--why", default="retry", show_default=True, help="What was fixed.")
def retry(**options: Any) -> None:
    """Make the rows of dead letters pending again; the next drain tries them again.

    Exit status: 0 done, 2 the call or the setup is wrong.
    """
    _act("retry", "retried", **options)


@dead_letters.command()
@_filters(str(LetterState.OPEN))
@_acting
@click.option("--why", required=True, help="Why these events are given up; recorded.")
def discard(**options: Any) -> None:
    """Give up dead letters, with a reason. Their rows stay in the outbox, not marked, and are not exported.

    Exit status: 0 done, 2 the call or the setup is wrong.
    """
    _act("discard", "discarded", **options)


def _act(
    verb: str,
    done: str,
    *,
    who: str | None,
    why: str,
    everything: bool,
    dry_run: bool,
    at_most: int | None,
    as_json: bool,
    **filters: Any,
) -> None:
    from auditexport_pipeline.mysql import dead_letters as store

    which = _which(**filters)
    whose = by(who, why)
    if which.everything and not everything:
        raise InvalidConfig(
            f"no filter is given; name what to {verb}, or say --all for every {which.state} dead letter"
        )
    mysql = outbox()
    if dry_run:
        counts = store.count(mysql, which)
        if as_json:
            print_json({"dry_run": True, "counts": asdict(counts)})
        else:
            _print_counts(counts)
            would = min(counts.letters, at_most) if at_most else counts.letters
            click.echo(f"would be {done}: {would:,} dead letters; nothing was changed")
        return
    acted = (store.retry if verb == "retry" else store.discard)(mysql, which, whose, at_most=at_most)
    if as_json:
        print_json({"dry_run": False, **asdict(acted)})
        return
    gone = f"; {acted.gone:,} more are gone, their rows are no longer pending" if acted.gone else ""
    under = ", ".join(map(str, acted.action_ids[:3])) + (" …" if len(acted.action_ids) > 3 else "")
    click.echo(f"{done}: {acted.changed:,} dead letters{f' (action {under})' if under else ''}{gone}")


def _which(*, state: str, pks: tuple[int, ...], **filters: Any) -> DeadLetterFilter:
    return DeadLetterFilter(
        state=None if state == _ANY else LetterState(state), pks=PkSet.of(sorted(set(pks))) if pks else None, **filters
    )


# ── printing ─────────────────────────────────────────────────────────────────────────────────────


def _print_counts(counts: LetterCounts) -> None:
    shown = table("dead letters", "by", "", left=("by", ""))
    shown.columns[0].justify = "right"
    for what, numbers in (
        ("reason", counts.by_reason),
        ("workspace", counts.by_workspace),
        ("version", counts.by_version),
    ):
        for name, number in numbers.items():
            shown.add_row(f"{number:,}", what, name)
    if counts.letters:
        print_table(shown)


def _print_letters(letters: list[Letter], counts: LetterCounts, which: DeadLetterFilter) -> None:
    _print_counts(counts)
    state = f"{which.state} " if which.state is not None else ""
    click.echo(f"{counts.letters:,} {state}dead letters")
    if not letters:
        return
    columns = ("pk", "state", "set aside (UTC)", "workspace", "event", "reason", "where", "detail")
    shown = table(*columns, left=columns)
    for letter in letters:
        shown.add_row(
            str(letter.pk),
            str(letter.state),
            moment(letter.created_at_ms),
            letter.workspace_id,
            letter.event_id,
            letter.reason,
            letter.json_path,
            letter.detail,
        )
    print_table(shown)


def _print_details(details: LetterDetails) -> None:
    letter = details.letter
    exported = f" since {moment(details.exported_at_ms)} UTC" if details.exported_at_ms is not None else ""
    fields = {
        "row": f"{letter.pk}, {details.row}{exported}",
        "state": f"{letter.state}, set aside {moment(letter.created_at_ms)}, changed {moment(letter.updated_at_ms)} UTC",
        "event": f"{letter.event_id} of workspace {letter.workspace_id}, {letter.version}",
        "reason": f"{letter.reason} at {letter.json_path}{f': {letter.detail}' if letter.detail else ''}",
        "batch": f"{letter.batch_id}",
    }
    if details.action is not None:
        action = details.action
        fields["action"] = (
            f"{action.action_id}: {action.verb} by {action.by.who}, {moment(action.at_ms)} UTC: {action.by.why}"
        )
    print_fields(fields, width=8)
