"""Metadata of runs and checks: names, types and tables. Ids, counts and times only, never payloads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import dagster as dg

from auditexport_pipeline.core.backlog import Backlog
from auditexport_pipeline.core.batch import Batch
from auditexport_pipeline.core.format import for_outbox, format_time, is_date
from auditexport_pipeline.core.pipeline import Timing, Verb
from auditexport_pipeline.core.ports import Discrepancy, Holder
from auditexport_pipeline.core.reconcile import Report
from auditexport_pipeline.core.requeue import Requeue
from auditexport_pipeline.core.sweep import Sweep

Metadata = dict[str, dg.MetadataValue | int | float | str]
# Rows of a table in the Dagster UI; a run has 64 batches at most unless it is configured otherwise.
TABLE_ROWS = 100


def backlog_metadata(backlog: Backlog) -> Metadata:
    """The outbox as the probe saw it; `backlog_rows` stops at the probe's limit."""
    return {name: value for name, value in backlog.numbers.items() if value or name != "held_rows"}


def run_metadata(
    batches: Sequence[Batch],
    verified: Mapping[int, Discrepancy],
    backlog: Backlog,
    dead_by_reason: Mapping[str, int],
    seconds: float,
    leased_by_others: Sequence[Holder] = (),
) -> Metadata:
    """A run's result. `rows` are outbox rows marked, `entries` rows of ClickHouse, `bytes` payload bytes sent."""
    rows = sum(batch.marked_rows for batch in batches)
    oldest = [batch.oldest_ms for batch in batches if batch.oldest_ms is not None]
    newest = [batch.newest_ms for batch in batches if batch.newest_ms is not None]
    metadata: Metadata = {
        "rows": rows,
        "entries": sum(batch.entries for batch in batches),
        "batches": len(batches),
        "dead_letters": sum(batch.counts.dead for batch in batches),
        "folded_rows": sum(batch.counts.folded for batch in batches),
        "deleted_by_others_rows": sum(batch.counts.vanished for batch in batches),
        "marked_by_others_rows": sum(batch.counts.elsewhere for batch in batches),
        "bytes": sum(batch.bytes for batch in batches),
        "seconds": round(seconds, 3),
        "rows_per_s": round(rows / seconds, 1) if seconds else 0.0,
        "verified_batches": sum(1 for found in verified.values() if not found),
        **backlog_metadata(backlog),
        "held_by_others_rows": sum(holder.rows for holder in leased_by_others),
        "held_by": "; ".join(map(str, leased_by_others)) or "nobody",
        "dead_letters_by_reason": dg.MetadataValue.md(counts_table("reason", dead_by_reason)),
        "per_batch": dg.MetadataValue.md(batch_table(batches, verified)),
    }
    if views := {batch.batch_id: batch.view_note for batch in batches if batch.view_note}:
        metadata["views_failed"] = "\n".join(f"batch {batch_id}: {note}" for batch_id, note in views.items())
    for name, at_ms in (("oldest_event", min(oldest, default=None)), ("newest_event", max(newest, default=None))):
        if at_ms is not None:
            metadata[name] = dg.MetadataValue.timestamp(at_ms / 1000) if is_date(at_ms) else str(at_ms)
    return metadata


def timing_metadata(timings: Mapping[Verb, Timing | None]) -> dict[str, float]:
    """How long each verb took, and how long before its step it started; nothing of a verb that ran in another process."""
    metadata: dict[str, float] = {}
    for verb, timing in timings.items():
        if timing is not None:
            metadata[f"{verb}_s"] = round(timing.seconds, 3)
            metadata[f"{verb}_ahead_s"] = round(timing.ahead_s, 3)
    return metadata


def format_prefetch(timing: Timing | None) -> str:
    """The end of a step's log line where the work started ahead of the step: how long, and what else ran. Otherwise empty."""
    if timing is None or not timing.ahead_s:
        return ""
    beside = f", while {' and '.join(timing.meanwhile)}" if timing.meanwhile else ""
    return f"; ahead: started {timing.ahead_s:.2f} s before this step{beside}"


def batch_metadata(
    batch: Batch, *, write_s: float, timings: Mapping[Verb, Timing | None], outbox: str = ""
) -> Metadata:
    """One exported batch, for its observation; `batch_id` is the key of its row in the ledger."""
    return {
        "batch_id": batch.batch_id,
        "generation": batch.generation,
        "rows": batch.marked_rows,
        "entries": batch.entries,
        "blocks": len(batch.blocks),
        "bytes": batch.bytes,
        "dead_letters": batch.counts.dead,
        "attempts": batch.attempts,
        "write_s": round(write_s, 3),
        **timing_metadata(timings),
        "digest": batch.digest,
        "in_the_ledger": for_outbox(f"`auditexport batches show {batch.batch_id}`", outbox).strip("`"),
        **({"view_failed": batch.view_note} if batch.view_note else {}),
    }


def counts_table(what: str, counts: Mapping[str, int]) -> str:
    """One line a name, as markdown; an application's name cannot break out of its cell."""
    if not counts:
        return "none"
    lines = [f"| {what} | dead letters |", "|---|---:|"]
    lines += [f"| {_in_cell(name)} | {count:,} |" for name, count in counts.items()]
    return "\n".join(lines)


def batch_table(batches: Sequence[Batch], verified: Mapping[int, Discrepancy]) -> str:
    """One line a batch, as markdown."""
    if not batches:
        return "nothing was pending"
    lines = [
        "| batch | generation | state | rows | entries | blocks | bytes | dead letters | folded | oldest event | newest event |",
        "|---:|---:|---|---:|---:|---:|---:|---:|---:|---|---|",
    ]
    for batch in batches[:TABLE_ROWS]:
        found = verified.get(batch.batch_id)
        state = f"**{found}**" if found else str(batch.state)
        lines.append(
            f"| {batch.batch_id} | {batch.generation} | {state} | {batch.marked_rows:,} | {batch.entries:,} | {len(batch.blocks)} "
            f"| {batch.bytes:,} | {batch.counts.dead:,} | {batch.counts.folded:,} | {_when(batch.oldest_ms)} | {_when(batch.newest_ms)} |"
        )
    if len(batches) > TABLE_ROWS:
        lines.append(f"\n…and {len(batches) - TABLE_ROWS} more")
    return "\n".join(lines)


def requeue_metadata(done: Requeue) -> Metadata:
    """In rows; `per_batch` counts them by the batch that had exported them last."""
    table = ["| batch | rows |", "|---:|---:|"]
    table += [f"| {batch_id} | {rows:,} |" for batch_id, rows in list(done.by_batch.items())[:TABLE_ROWS]]
    return {
        **done.counts,
        "per_batch": dg.MetadataValue.md("\n".join(table)),
    }


def sweep_metadata(done: Sweep) -> Metadata:
    """In rows and batches."""
    return {**done.counts}


def reconcile_metadata(report: Report) -> Metadata:
    """In entries; the report itself is a table of what differs, by batch and by workspace and day."""
    return {
        **report.counts,
        "batches": len(report.batches),
        "batches_of_unknown_versions": ", ".join(f"{version}: {n}" for version, n in report.left_alone.items())
        or "none",
        "report": dg.MetadataValue.md(reconcile_table(report)),
    }


def reconcile_table(report: Report) -> str:
    """The report as markdown: what differs, and what was explained."""
    lines = [
        f"**{_when(report.from_ms)}** to **{_when(report.to_ms)}** (UTC, first export): "
        f"{len(report.batches)} batches, {report.slots} blocks, **{report.found}**",
        "",
    ]
    if report.found.event_ids:
        lines += [f"Events: {', '.join(report.found.event_ids)}", ""]
    if report.explained:
        lines += ["Explained: " + ", ".join(f"{count:,} {what}" for what, count in report.explained.items()), ""]
    wrong = [line for line in report.batches if line.found or line.explained]
    if wrong:
        lines += [
            "| batch | first export | sent | in ClickHouse | differs | explained |",
            "|---:|---|---:|---:|---|---|",
        ]
        for line in wrong[:TABLE_ROWS]:
            explained = ", ".join(f"{count:,} {what}" for what, count in line.explained.items())
            lines.append(
                f"| {line.batch_id} | {_when(line.inserted_at_ms)} | {line.entries:,} | {line.stored:,} | {line.found} | {explained} |"
            )
        lines.append("")
    lines += ["| workspace | day | rows in the outbox | entries | missing | duplicated | unexpected | altered |"]
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    places = sorted(report.places.items(), key=lambda item: (not item[1].wrong, -item[1].entries))
    for (workspace_id, day_ms), place in places[:TABLE_ROWS]:
        lines.append(
            f"| {workspace_id or '(swept)'} | {_when(day_ms)[:10]} | {place.rows:,} | {place.entries:,} | {place.missing} "
            f"| {place.duplicated} | {place.unexpected} | {place.altered} |"
        )
    if len(places) > TABLE_ROWS:
        lines.append(f"\n…and {len(places) - TABLE_ROWS} more")
    return "\n".join(lines)


def _in_cell(name: str) -> str:
    return "".join(letter if letter.isprintable() and letter not in "|`<" else "?" for letter in name)


def _when(at_ms: int | None) -> str:
    return format_time(at_ms) if at_ms is not None else ""
