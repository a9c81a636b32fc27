"""Whether the numbers of a reconciliation are true: compared with the tables, at a time at which nothing else is at work.

Which events it calls missing, duplicated, unexpected or altered is compared in `history`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from auditexport_pipeline.core.batch import OPEN, blocks_from_text
from auditexport_pipeline.core.reconcile import Report
from auditexport_tests.simulation.application import KNOWN
from auditexport_tests.simulation.world import LEDGER, World

OPEN_STATES = tuple(map(str, OPEN))


def false_report(world: World, report: Report) -> Iterator[str]:
    """A sentence for each number that is not true."""
    for name, reported, true in _numbers(world, report):
        if reported != true:
            yield f"reconcile says {name} {reported}, and true is {true}"


def _numbers(world: World, report: Report) -> Iterator[tuple[str, int, int]]:
    stored = Counter(entry.inserted_at_ms for entry in world.clickhouse.entries())
    ledger = [row for batch_id, row in world.mysql.tables[LEDGER].rows.items() if batch_id and row["version"] == KNOWN]
    closed = [row for row in ledger if row["state"] not in OPEN_STATES]
    # A requeue's blocks are under the `inserted_at` of the first export, and count with it.
    blocks = [
        block
        for row in closed
        for block in blocks_from_text(row["manifest"])[0]
        if block.first or not row["generation"]
    ]
    counts = report.counts
    yield "entries of all places", sum(place.entries for place in report.places.values()), stored.total()
    yield "entries stored", counts["entries_stored"], sum(stored[block.inserted_at_ms] for block in blocks)
    yield "entries expected", counts["entries_expected"], sum(block.rows for block in blocks)
    yield "blocks", counts["blocks"], len(blocks)
    yield "open batches", counts["open_batches"], len(ledger) - len(closed)
