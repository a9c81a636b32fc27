"""`auditexport batches`: the ledger as a list, and one batch in full.

`mysql.ledger` reads the ledger, which holds ids, counts, digests and times, and no payloads.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

import click

from auditexport_pipeline.cli.group import BAD_OUTCOME, main
from auditexport_pipeline.cli.shared import Age, Time, json_option, moment, print_fields, print_json, print_table, table
from auditexport_pipeline.cli.stores import outbox, upkeep
from auditexport_pipeline.core.batch import OPEN, State
from auditexport_pipeline.core.ledger import PAGE_BATCHES, BatchDetails, BatchFilter, LedgerBatch
from auditexport_pipeline.core.status import format_duration

if TYPE_CHECKING:
    from auditexport_pipeline.core.batch import Block

# Characters of a block's pks that fit a line; `--json` has all pks.
SHOWN_PKS = 40


class _Since(click.ParamType):  # type: ignore[type-arg]
    """A moment or an age."""

    name = "since"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        if isinstance(value, tuple):
            return value
        if str(value)[-1:] in "smhd" and str(value)[:-1].isdecimal():
            return ("age_s", Age().convert(value, param, ctx))
        return ("at_ms", Time().convert(value, param, ctx))


@main.group()
def batches() -> None:
    """The ledger: list its batches and their owners, or show all about one. Asks MySQL only."""


@batches.command("list")
@click.option(
    "--state",
    "states",
    type=click.Choice([str(state) for state in State]),
    multiple=True,
    help="In this state; may be repeated.",
)
@click.option("--open", "are_open", is_flag=True, help="Not exported yet: claimed, sealed, written or stopped.")
@click.option("--owner", default="", help="Of this owner: a run's id or a process, or the beginning of either.")
@click.option("--since", type=_Since(), help="Claimed since: 15m, 6h, 7d, or 2026-11-23T04:00.")
@click.option(
    "--limit", type=click.IntRange(1, 10_000), default=PAGE_BATCHES, show_default=True, help="The newest so many."
)
@click.option(
    "--before", "before_id", type=click.IntRange(min=1), help="Older than this batch: the last of the page before."
)
@json_option
def list_batches(
    states: tuple[str, ...],
    are_open: bool,
    owner: str,
    since: tuple[str, int] | None,
    limit: int,
    before_id: int | None,
    as_json: bool,
) -> None:
    """List batches, newest first: state, rows, owner, when it was claimed and how long it took.

    Exit status: 0, or 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import ledger

    mysql = outbox()
    since_ms = None
    if since is not None:
        kind, value = since
        since_ms = value if kind == "at_ms" else upkeep().now_ms() - value * 1000
    wanted = dict.fromkeys([State(state) for state in states] + (list(OPEN) if are_open else []))
    which = BatchFilter(states=tuple(wanted), owner=owner, since_ms=since_ms, before_id=before_id)
    found = ledger.list_batches(mysql, which, limit)
    if as_json:
        print_json({"batches": [line_values(line) for line in found]})
        return
    if not found:
        click.echo("no such batches")
        return
    shown = table(
        "batch",
        "state",
        "rows",
        "owner",
        "claimed (UTC)",
        "took",
        "error",
        left=("state", "owner", "claimed (UTC)", "error"),
    )
    for line in found:
        generation = f" g{line.generation}" if line.generation else ""
        shown.add_row(
            f"{line.batch_id}{generation}",
            str(line.state),
            f"{line.rows:,}",
            line.owner,
            moment(line.claimed_at_ms),
            "" if line.state in OPEN else format_duration(line.seconds),
            line.last_error,
        )
    shown.columns[3].overflow = "ellipsis"
    for column in shown.columns[:5]:
        column.no_wrap = True
    print_table(shown)
    if len(found) == limit:
        click.echo(f"older: --before {found[-1].batch_id}")


@batches.command("show")
@click.argument("batch_id", type=click.IntRange(min=1))
@json_option
def show_batch(batch_id: int, as_json: bool) -> None:
    """Show all that the ledger holds about one batch: states with their times, blocks, digests, counts, last error.

    Exit status: 0, 1 when there is no such batch, 2 when the call or the setup is wrong.
    """
    from auditexport_pipeline.mysql import ledger

    details = ledger.show(outbox(), batch_id)
    if details is None:
        click.echo(f"auditexport: there is no batch {batch_id} in the ledger", err=True)
        sys.exit(BAD_OUTCOME)
    if as_json:
        print_json(_details_values(details))
    else:
        _print_details(details)


def line_values(line: LedgerBatch) -> dict[str, Any]:
    """One row of the ledger as JSON."""
    return {**asdict(line), "state": str(line.state), "seconds": line.seconds}


def _block_values(details: BatchDetails, block: Block) -> dict[str, Any]:
    seen = details.batch.observed.get(block.inserted_at_ms)
    return {
        "number": block.number,
        "inserted_at_ms": block.inserted_at_ms,
        "rows": block.rows,
        "bytes": block.bytes,
        "pks": str(block.pks),
        "digest": block.digest,
        "token": details.batch.token(block) if block.digest else "",
        "fingerprint": f"{block.fingerprint:016x}" if block.digest else "",
        "observed_entries": None if seen is None else seen.rows,
    }


def _details_values(details: BatchDetails) -> dict[str, Any]:
    batch = details.batch
    return {
        **line_values(details.line),
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
    fields = {
        "batch": f"{line.batch_id}, {line.version}, {kind}",
        "state": f"{line.state}{lease if line.state in OPEN else ''}",
        "owner": f"{line.owner} (plan {line.epoch})",
        "rows": f"{line.rows:,} of {line.claimed_rows:,} claimed{f': {counts}' if counts else ''}",
        "entries": f"{line.entries:,} in {len(batch.blocks)} blocks, {line.bytes:,} bytes, {line.attempts} attempts to write",
        "pks": f"{pks}{' (compacted: which ones is no longer kept)' if line.state is State.COMPACTED else ''}",
        "digest": line.digest or "not sealed yet",
    }
    if line.exported_at_ms is not None:
        fields["stamp"] = f"deleted_at = {line.exported_at_ms} ({moment(line.exported_at_ms)} UTC)"
    if line.swept_rows:
        fields["swept"] = f"{line.swept_rows:,} rows"
    if line.last_error:
        fields["error"] = line.last_error
    print_fields(fields, width=9)
    click.echo()
    steps = table("state", "since (UTC)", "after", left=("since (UTC)",))
    before_ms = line.claimed_at_ms
    for name, at_ms in line.steps:
        steps.add_row(name, moment(at_ms), "" if name == "claimed" else f"{(at_ms - before_ms) / 1000:,.3f} s")
        before_ms = at_ms
    print_table(steps)
    for block in (*batch.blocks, *batch.given_back):
        values = _block_values(details, block)
        seen = values["observed_entries"]
        click.echo()
        # Not a table, so that a token can be copied whole.
        fields = {
            "block": f"{block.number}{', given back' if block in batch.given_back else ''}",
            "at": f"inserted_at = {block.inserted_at_ms} ({moment(block.inserted_at_ms)} UTC)",
            "rows": f"{block.rows:,}, {block.bytes:,} bytes{'' if seen is None else f', {seen:,} entries seen in ClickHouse'}",
            "pks": _shortened(values["pks"]),
            "digest": values["digest"] or "not sealed yet",
            "token": values["token"],
        }
        print_fields({name: text for name, text in fields.items() if text}, width=7, indent="  ")


def _shortened(pks: str) -> str:
    return pks if len(pks) <= SHOWN_PKS else f"{pks[:SHOWN_PKS]}…"
