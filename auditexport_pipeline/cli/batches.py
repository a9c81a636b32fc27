"""`auditexport batches`: the ledger as a list, and one batch in full.

`mysql.ledger` reads the ledger, which has ids, counts, digests and times, and no payloads.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import Age, Time, answer, is_age, json_option, print_fields, print_table, table
from auditexport_pipeline.cli.stores import maintenance, outbox
from auditexport_pipeline.core.batch import OPEN, State
from auditexport_pipeline.core.format import counted, format_duration, format_time
from auditexport_pipeline.core.ledger import PAGE_BATCHES, BatchDetails, BatchFilter, LedgerBatch

if TYPE_CHECKING:
    from auditexport_pipeline.core.batch import Block

# Characters of a block's pks that fit a line; `--json` has all pks.
SHOWN_PKS = 40
COLUMNS = ("batch", "state", ">rows", "owner", "claimed (UTC)", ">took", "error")


class _Since(click.ParamType):  # type: ignore[type-arg]
    """A moment or an age: a function from the present to the moment, both in epoch milliseconds."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Callable[[int], int]:
        if is_age(value):
            age_s = Age().convert(value, param, ctx)
            return lambda now_ms: now_ms - age_s * 1000
        at_ms = Time().convert(value, param, ctx)
        return lambda _: at_ms


@main.group()
def batches() -> None:
    """The ledger: list its batches and their owners, or show one in full. Asks MySQL only."""


@batches.command("list")
@click.option(
    "--state", "states", type=click.Choice([*map(str, State)]), multiple=True, help="In this state; may be repeated."
)
@click.option("--open", "are_open", is_flag=True, help="Not exported yet: claimed, sealed, written or stopped.")
@click.option("--owner", default="", help="Of this owner: a run's id or a process, or the beginning of either.")
@click.option("--since", type=_Since(), help="Claimed since: 15m, 6h, 7d, or 2026-11-23T04:00.")
@click.option("--limit", type=click.IntRange(1, 10_000), default=PAGE_BATCHES, show_default=True, help="At most.")
@click.option(
    "--before", "before_id", type=click.IntRange(min=1), help="Older than this batch: the last of the page before."
)
@json_option
def list_batches(
    states: tuple[str, ...],
    are_open: bool,
    owner: str,
    since: Callable[[int], int] | None,
    limit: int,
    before_id: int | None,
    as_json: bool,
) -> None:
    """List batches, newest first: state, rows, owner, when it was claimed and how long it took.

    Exit status: 0, or 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import ledger

    which = BatchFilter(
        states=tuple(dict.fromkeys([*map(State, states), *(OPEN if are_open else ())])),
        owner=owner,
        since_ms=since(maintenance().now_ms()) if since is not None else None,
        before_id=before_id,
    )
    found = ledger.list_batches(outbox(), which, limit)
    answer(
        as_json,
        lambda: {"batches": [_line_values(line) for line in found]},
        lambda: _print_list(found, full=len(found) == limit),
    )


def _print_list(found: list[LedgerBatch], *, full: bool) -> None:
    if not found:
        click.echo("no such batches")
        return
    made = table(COLUMNS, map(_cells, found))
    made.columns[3].overflow = "ellipsis"
    for column in made.columns[:5]:
        column.no_wrap = True
    print_table(made)
    if full:
        click.echo(f"older: --before {found[-1].batch_id}")


def _cells(line: LedgerBatch) -> tuple[object, ...]:
    generation = f" g{line.generation}" if line.generation else ""
    took = "" if line.state in OPEN else format_duration(line.seconds)
    claimed = format_time(line.claimed_at_ms)
    return f"{line.batch_id}{generation}", line.state, line.rows, line.owner, claimed, took, line.last_error


@batches.command("show")
@click.argument("batch_id", type=click.IntRange(min=1))
@json_option
def show_batch(batch_id: int, as_json: bool) -> None:
    """Show one batch in full: states with their times, blocks, digests, counts, last error.

    Exit status: 0, 1 when there is no such batch, 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import ledger

    details = ledger.show(outbox(), batch_id)
    if details is None:
        click.echo(f"auditexport: there is no batch {batch_id} in the ledger", err=True)
        sys.exit(BAD_OUTCOME)
    answer(as_json, lambda: _details_values(details), lambda: _print_details(details))


def _line_values(line: LedgerBatch) -> dict[str, Any]:
    """One row of the ledger as JSON."""
    return {**asdict(line), "seconds": line.seconds}


def _block_values(details: BatchDetails, block: Block) -> dict[str, Any]:
    observed = details.batch.observed.get(block.inserted_at_ms)
    return {
        "number": block.number,
        "inserted_at_ms": block.inserted_at_ms,
        "rows": block.rows,
        "bytes": block.bytes,
        "pks": str(block.pks),
        "digest": block.digest,
        "token": details.batch.token(block) if block.digest else "",
        "fingerprint": f"{block.fingerprint:016x}" if block.digest else "",
        "observed_entries": None if observed is None else observed.rows,
    }


def _details_values(details: BatchDetails) -> dict[str, Any]:
    batch = details.batch
    return {
        **_line_values(details.line),
        "steps": [{"state": name, "at_ms": at_ms} for name, at_ms in details.line.steps],
        "pks": str(batch.pks),
        "counts": asdict(batch.counts),
        "oldest_event_ms": batch.oldest_ms,
        "newest_event_ms": batch.newest_ms,
        "inserts_until_ms": batch.inserts_until_ms,
        "blocks": [_block_values(details, block) for block in batch.blocks],
        "given_back": [_block_values(details, block) for block in batch.given_back],
    }


def _print_details(details: BatchDetails) -> None:
    line, batch = details.line, details.batch
    lease = f", lease for another {format_duration(line.lease_left_s)}" if line.lease_left_s > 0 else ", lease ended"
    kind = f"generation {line.generation}, a requeue" if line.generation else "first export"
    pks = f"{line.first_pk} to {line.last_pk}" if line.first_pk is not None else "none left"
    counts = ", ".join(f"{count:,} {name}" for name, count in asdict(batch.counts).items() if count)
    entries = f"{line.entries:,} in {counted(len(batch.blocks), 'block')}"
    fields = {
        "batch": f"{line.batch_id}, {line.version}, {kind}",
        "state": f"{line.state}{lease if line.state in OPEN else ''}",
        "owner": f"{line.owner} (plan {line.epoch})",
        "rows": f"{line.rows:,} of {line.claimed_rows:,} claimed{f': {counts}' if counts else ''}",
        "entries": f"{entries}, {counted(line.bytes, 'byte')}, {counted(line.attempts, 'attempt')} to write",
        "pks": f"{pks}{' (compacted: the ledger has only the first and the last)' if line.state is State.COMPACTED else ''}",
        "digest": line.digest or "not sealed yet",
    }
    if line.exported_at_ms is not None:
        fields["stamp"] = f"deleted_at = {line.exported_at_ms} ({format_time(line.exported_at_ms)} UTC)"
    if line.swept_rows:
        fields["swept"] = counted(line.swept_rows, "row")
    if line.last_error:
        fields["error"] = line.last_error
    print_fields(fields, width=9)
    click.echo()
    before_ms = [line.claimed_at_ms, *(at_ms for _, at_ms in line.steps)]
    print_table(
        table(
            ("state", "since (UTC)", ">after"),
            (
                (name, format_time(at_ms), "" if name == "claimed" else f"{(at_ms - since_ms) / 1000:,.3f} s")
                for (name, at_ms), since_ms in zip(line.steps, before_ms, strict=False)
            ),
        )
    )
    for block in (*batch.blocks, *batch.given_back):
        values = _block_values(details, block)
        observed = values["observed_entries"]
        seen = "" if observed is None else f", {counted(observed, 'entry', 'entries')} seen in ClickHouse"
        click.echo()
        # Not a table: a token must stay on one line to be copied.
        fields = {
            "block": f"{block.number}{', given back' if block in batch.given_back else ''}",
            "at": f"inserted_at = {block.inserted_at_ms} ({format_time(block.inserted_at_ms)} UTC)",
            "rows": f"{block.rows:,}, {counted(block.bytes, 'byte')}{seen}",
            "pks": _shortened(values["pks"]),
            "digest": values["digest"] or "not sealed yet",
            "token": values["token"],
        }
        print_fields({name: text for name, text in fields.items() if text}, width=7, indent="  ")


def _shortened(pks: str) -> str:
    return pks if len(pks) <= SHOWN_PKS else f"{pks[:SHOWN_PKS]}…"
