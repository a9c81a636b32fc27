"""Whether `auditexport status` is true: its numbers, compared with the tables at the moment at which it was read.

It is read in several statements. So it is compared only where nothing was committed and no clock was set meanwhile; ages may differ
by the time that the reading took.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator

from auditexport_pipeline.core.status import Status
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_pipeline.mysql.status import read_status
from auditexport_tests.simulation.application import KNOWN, OUTBOX
from auditexport_tests.simulation.mysql_server import Row
from auditexport_tests.simulation.world import HOLDING, LEDGER, LETTERS, World

RATE_WINDOW_MS, DAY_MS = 900_000, 86_400_000
FIRST_SOUND_MS, CLOCKS_DIFFER_MS = 1_262_304_000_000, 60_000
OLDEST_ROWS, RUNS = 100, 5
OPEN_STATES = ("claimed", "sealed", "written", "stopped")


def false_status(world: World, outbox: MySQLOutbox) -> Iterator[str]:
    """Reads the status; a sentence for each number that is not true."""
    mysql = world.mysql
    split = mysql.old is not None  # the reader may be with the old server
    before, began_ms = (len(mysql.commits), world.failovers, mysql.clock_offset_ms), mysql.now_ms()
    status = read_status(outbox)
    if not split and before == (len(mysql.commits), world.failovers, mysql.clock_offset_ms):
        world.happened["status compared"] += 1
        reading_s = (mysql.now_ms() - began_ms) / 1000 + 0.002
        for name, reported, true in _numbers(world, status, reading_s):
            if reported != true:
                yield f"status says {name} {reported}, and true is {true}"


def _numbers(world: World, status: Status, reading_s: float) -> Iterator[tuple[str, object, object]]:
    tables, now_ms = world.mysql.tables, status.at_ms
    letters = tables[LETTERS].rows
    pending = {pk: row for pk, row in sorted(tables[OUTBOX].rows.items()) if row["deleted_at"] is None}
    known = [row for pk, row in pending.items() if row["version"] == KNOWN and not _is_held(row, letters.get(pk))]
    backlog = status.backlog
    yield "backlog rows", backlog.rows, len(known)
    yield "unknown rows", backlog.unknown_rows, sum(row["version"] != KNOWN for row in pending.values())
    states = Counter(letter["state"] for letter in letters.values())
    yield "dead letters", backlog.dead_rows, states["open"]
    yield "held rows", backlog.held_rows, states["held"]
    sound = [
        row["created_at"]
        for row in known[:OLDEST_ROWS]
        if FIRST_SOUND_MS <= row["created_at"] <= now_ms + CLOCKS_DIFFER_MS
    ]
    if len(sound) == len(known[:OLDEST_ROWS]):
        lag_s = max(0, now_ms - min(sound, default=now_ms)) / 1000
        yield "a true lag", 0 <= backlog.lag_s - lag_s <= reading_s, True
    reasons = Counter(letter["reason"] for letter in letters.values() if letter["state"] == "open")
    yield "dead letters by reason", dict(status.dead_by_reason), dict(reasons)

    batches = {batch_id: row for batch_id, row in sorted(tables[LEDGER].rows.items()) if batch_id}
    opened = {batch_id: row for batch_id, row in batches.items() if row["state"] in OPEN_STATES}
    yield "open batches", backlog.open_batches, len(opened)
    yield "open batches in a list", [one.batch_id for one in status.open_batches], [*opened]
    yield (
        "rows of open batches",
        [one.rows for one in status.open_batches],
        [row["row_count"] for row in opened.values()],
    )
    closed = [row for row in batches.values() if row["state"] not in OPEN_STATES]
    recent = [row for row in closed if row["exported_at_ms"] and row["exported_at_ms"] >= now_ms - RATE_WINDOW_MS]
    yield "recent rows", status.recent_rows, sum(map(_marked, recent))
    unverified = [row for row in batches.values() if row["state"] == "exported" and row["swept_at_ms"] is None]
    yield "unverified batches", status.unverified_batches, len(unverified)
    wrong = {batch_id: row["last_error"] for batch_id, row in batches.items() if row["state"] == "discrepant"}
    yield "discrepant batches", dict(status.discrepant), wrong
    stamps = [row["exported_at_ms"] for row in batches.values() if row["exported_at_ms"]]
    yield "last export", status.last_exported_at_ms, max(stamps, default=None)
    yield "first claim", status.first_claimed_at_ms, next((row["claimed_at_ms"] for row in batches.values()), None)
    noted = {
        batch_id
        for batch_id, row in batches.items()
        if (row["exported_at_ms"] or 0) >= now_ms - DAY_MS and row["last_error"].startswith("view ")
    }
    yield "view failures", {*status.view_failures}, noted
    owners = {
        row["owner"]: [one for one in batches.values() if one["owner"] == row["owner"]] for row in batches.values()
    }
    newest = sorted(owners, key=lambda owner: -max(row["batch_id"] for row in owners[owner]))[:RUNS]
    yield "runs", [run.owner for run in status.runs], newest
    for run in status.runs:
        own = owners.get(run.owner, [])
        yield f"batches of {run.owner}", run.batches, len(own)
        exported = sum(_marked(row) for row in own if row["state"] not in OPEN_STATES)
        yield f"rows of {run.owner}", run.rows, exported


def _is_held(row: Row, letter: Row | None) -> bool:
    """Whether this letter holds this row, and not another one that had its pk."""
    same = ("version", "workspace_id", "event_id")
    return letter is not None and letter["state"] in HOLDING and all(row[name] == letter[name] for name in same)


def _marked(batch: Row) -> int:
    return int(batch["row_count"]) - int(json.loads(batch["counts"] or "{}").get("unmarked", 0))
