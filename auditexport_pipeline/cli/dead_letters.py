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
    answer,
    by,
    dry_run_option,
    json_option,
    print_fields,
    print_table,
    table,
    who_option,
    with_options,
)
from auditexport_pipeline.cli.stores import outbox
from auditexport_pipeline.core.dead_letters import KEEPS_ROW_OUT, PAGE_LETTERS, DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.format import counted, format_time
from auditexport_pipeline.core.pks import PkSet

if TYPE_CHECKING:
    from auditexport_pipeline.core.dead_letters import Letter, LetterCounts, LetterDetails

_ANY = "any"


def _filters(*states: str) -> Callable[[Command], Command]:
    """The options that select dead letters; the first state is the default."""
    return with_options(
        click.option("--state", type=click.Choice(states), default=states[0], show_default=True),
        click.option("--workspace", "workspace_id", help="Of one workspace."),
        click.option("--reason", help="As `list` shows it, such as wrong_type."),
        click.option("--version", help="The payload's version."),
        click.option("--older-than", "older_than_s", type=Age(), help="Set aside longer ago: 90s, 15m, 6h, 30d."),
        click.option("--pk", "pks", type=click.IntRange(min=0), multiple=True, help="Of the row; may be repeated."),
    )


_acting = with_options(
    who_option,
    click.option("--at-most", type=click.IntRange(min=1), help="Stop after this many, oldest row first."),
    click.option("--all", "everything", is_flag=True, help="Every letter in that state: needed without a filter."),
    dry_run_option,
    json_option,
)


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

    def show_list() -> None:
        _print_counts(counts)
        click.echo(_letters(counts.letters, f"{which.state} " if which.state is not None else ""))
        if found:
            columns = ("pk", "state", "set aside (UTC)", "workspace", "event", "reason", "where", "detail")
            print_table(table(columns, map(_cells, found)))
        if len(found) == letters and counts.letters > letters:
            click.echo(f"more: --beyond {found[-1].pk}{' --newest' if newest else ''}")

    answer(as_json, lambda: {"counts": counts, "letters": found}, show_list)


@dead_letters.command()
@click.argument("pk", type=click.IntRange(min=0))
@click.option("--payload", "with_payload", is_flag=True, help="Also print the payload, as the outbox has it now.")
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
    payload = details.payload.decode(errors="replace") if details.payload is not None else None

    def show_letter() -> None:
        _print_details(details)
        if payload is not None:
            click.echo(f"payload:\n{payload}")
        elif with_payload:
            click.echo("payload: none, the row is not in the outbox any more")

    answer(as_json, lambda: {**asdict(details), "payload": payload}, show_letter)


@dead_letters.command()
@_filters(*map(str, KEEPS_ROW_OUT))
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
    actor = by(who, why)
    if which.everything and not everything:
        raise InvalidConfig(
            f"no filter is given; name what to {verb}, or give --all for every {which.state} dead letter"
        )
    mysql = outbox()
    if dry_run:
        counts = store.count(mysql, which)

        def show_plan() -> None:
            _print_counts(counts)
            would = min(counts.letters, at_most) if at_most else counts.letters
            click.echo(f"would be {done}: {_letters(would)}; nothing was changed")

        answer(as_json, lambda: {"dry_run": True, "counts": counts}, show_plan)
        return
    acted = (store.retry if verb == "retry" else store.discard)(mysql, which, actor, at_most=at_most)

    def show_done() -> None:
        gone = f"; {acted.gone:,} more {'is' if acted.gone == 1 else 'are'} gone with their rows" if acted.gone else ""
        ids = ", ".join(map(str, acted.action_ids[:3])) + (" …" if len(acted.action_ids) > 3 else "")
        click.echo(f"{done}: {_letters(acted.changed)}{f' (action {ids})' if ids else ''}{gone}")

    answer(as_json, lambda: {"dry_run": False, **asdict(acted)}, show_done)


def _which(*, state: str, pks: tuple[int, ...], **filters: Any) -> DeadLetterFilter:
    return DeadLetterFilter(
        state=None if state == _ANY else LetterState(state), pks=PkSet.of(sorted(set(pks))) if pks else None, **filters
    )


# ── printing ─────────────────────────────────────────────────────────────────────────────────────


def _letters(letters: int, state: str = "") -> str:
    return counted(letters, f"{state}dead letter")


def _print_counts(counts: LetterCounts) -> None:
    by_what = {"reason": counts.by_reason, "workspace": counts.by_workspace, "version": counts.by_version}
    rows = [(number, what, name) for what, numbers in by_what.items() for name, number in numbers.items()]
    if counts.letters:
        print_table(table((">dead letters", "by", ""), rows))


def _cells(letter: Letter) -> tuple[object, ...]:
    at = format_time(letter.created_at_ms)
    where = (letter.workspace_id, letter.event_id, letter.reason, letter.json_path, letter.detail)
    return str(letter.pk), letter.state, at, *where


def _print_details(details: LetterDetails) -> None:
    letter, action = details.letter, details.action
    exported = f" since {format_time(details.exported_at_ms)} UTC" if details.exported_at_ms is not None else ""
    created, updated = format_time(letter.created_at_ms), format_time(letter.updated_at_ms)
    fields = {
        "row": f"{letter.pk}, {details.row}{exported}",
        "state": f"{letter.state}, set aside {created}, changed {updated} UTC",
        "event": f"{letter.event_id} of workspace {letter.workspace_id}, {letter.version}",
        "reason": f"{letter.reason} at {letter.json_path}{f': {letter.detail}' if letter.detail else ''}",
        "batch": f"{letter.batch_id}",
    }
    if action is not None:
        at = format_time(action.at_ms)
        fields["action"] = f"{action.action_id}: {action.verb} by {action.by.who}, {at} UTC: {action.by.why}"
    print_fields(fields, width=8)
