"""What one workspace's flood of bad rows costs the others: a drain of it, and every plan while its letters stand.

python -m auditexport_tests.benchmarks.floods [bad rows] [standing letters]

Sound events of a hundred workspaces lie among the flood, one to ten; the first line is the drain of sound rows only,
and seconds are said as multiples of it. In-process, without Dagster, so that what is asked of ClickHouse is counted.
"""

from __future__ import annotations

import json
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pandas as pd

from auditexport_pipeline.core import claiming, export
from auditexport_pipeline.core.settings import Limits
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench

SOUND_EVERY = 11
REFUSED = "refused by the table"
PAGE_ROWS = 25_000

# What a flood makes of a sound payload.
FLOODS: dict[str, Callable[[str], str]] = {
    "sound rows only": lambda payload: payload,
    "does not decode": lambda payload: payload.replace('"time": ', '"time": "x", "was": '),
    "a key twice, deep in a meta": lambda payload: payload[:-1] + ', "meta": {"a": 1, "a": 2}}',
    "refused by a constraint": lambda payload: payload.replace('"as usual"', f'"{REFUSED}"'),
}


def main(bad_rows: int = 50_000, letters: int = 1_000_000) -> None:
    with bench.benchmark_stack() as stack:
        bench.print_machine(stack)
        print(f"{bad_rows:,} rows of one workspace", flush=True)
        stack.log.client().command(f"ALTER TABLE audit_logs_raw_v1 ADD CONSTRAINT c CHECK description != '{REFUSED}'")
        bench.seed(stack, 0)
        table = [_drained(stack, name, bad_rows) for name in FLOODS]
        frame = pd.DataFrame(table).set_index("flood")
        frame.insert(1, "× sound", frame["seconds"] / frame["seconds"].iloc[0])
        print(frame.round({"seconds": 1, "× sound": 2}).to_string(), flush=True)
        print("\nOne plan's first page of candidates, and the sensor's probe, with letters standing:", flush=True)
        standing = [_planned(stack, count) for count in (0, letters // 10, letters)]
        print(pd.DataFrame(standing).set_index("letters").round(3).to_string(), flush=True)


def _drained(stack: LocalStack, name: str, bad_rows: int) -> dict[str, Any]:
    bench.restore(stack)
    _put(stack, _rows(FLOODS[name], bad_rows))
    asked: Counter[str] = Counter()
    limits = Limits()
    log = stack.log
    counted = {what: _counted(getattr(log, what), what, asked) for what in ("probe", "insert")}
    for what, count in counted.items():
        setattr(log, what, count)
    started = time.perf_counter()
    try:
        for claim in claiming.claim(stack.outbox, owner="benchmark", dead_owners=(), limits=limits):
            fetched = export.fetch(stack.outbox, stack.log, claim, limits)
            export.mark(stack.outbox, stack.log, export.write(stack.outbox, log, claim, fetched.bodies, limits), limits)
    finally:
        for what in counted:
            delattr(log, what)
    seconds = time.perf_counter() - started
    with stack.outbox.engine.connect() as connection:
        pending = connection.exec_driver_sql(
            "SELECT COUNT(*), SUM(workspace_id != 'ws_flood') FROM clickhouse_outbox WHERE deleted_at IS NULL"
        ).one()
        set_aside = connection.exec_driver_sql("SELECT COUNT(*) FROM clickhouse_outbox_dead_letter").scalar_one()
    return {
        "flood": name,
        "seconds": seconds,
        "INSERTs": asked["insert"],
        "probes": asked["probe"],
        "letters": set_aside,
        "left for the next drain": pending[0] - set_aside,
        "of the others": int(pending[1] or 0),
    }


def _counted(verb: Callable[..., Any], what: str, asked: Counter[str]) -> Callable[..., Any]:
    def count(*arguments: Any, **named: Any) -> Any:
        asked[what] += 1
        return verb(*arguments, **named)

    return count


def _rows(spoil: Callable[[str], str], bad_rows: int) -> Iterator[tuple[str, str, str]]:
    for number in range(bad_rows * SOUND_EVERY // (SOUND_EVERY - 1)):
        sound = number % SOUND_EVERY == 0
        workspace_id = f"ws_{number % 100}" if sound else "ws_flood"
        event = {
            "event_id": f"evt_{number}",
            "time": number,
            "workspace_id": workspace_id,
            "event": "key.create",
            "description": "as usual",
            "actor": {"type": "user", "id": "user_1", "meta": {"agent": "b" * 300}},
        }
        payload = json.dumps(event)
        yield workspace_id, str(event["event_id"]), payload if sound else spoil(payload)


def _put(stack: LocalStack, rows: Iterator[tuple[str, str, str]]) -> None:
    every = list(rows)
    for start in range(0, len(every), 5_000):
        with stack.outbox.engine.begin() as connection:
            connection.exec_driver_sql(
                "INSERT INTO clickhouse_outbox (version, workspace_id, event_id, payload, created_at) "
                "VALUES ('audit_log.v1', %s, %s, %s, 1)",
                every[start : start + 5_000],
            )


def _planned(stack: LocalStack, letters: int) -> dict[str, Any]:
    """Letters with the lowest pks, which every plan has to pass, and 900 pending rows above them."""
    bench.restore(stack)
    with stack.outbox.engine.begin() as connection:
        for first in range(0, letters, 100_000):
            last = min(first + 100_000, letters)
            connection.exec_driver_sql(
                "INSERT INTO clickhouse_outbox (pk, version, workspace_id, event_id, payload, created_at) "
                f"SELECT {first} + seq.n, 'audit_log.v1', 'ws_flood', CONCAT('evt_', {first} + seq.n), '{{}}', 1 "
                f"FROM ({_NUMBERS}) AS seq WHERE seq.n <= {last - first}"
            )
        connection.exec_driver_sql(
            "INSERT INTO clickhouse_outbox_dead_letter (pk, state, version, workspace_id, event_id, reason, json_path, "
            "detail, batch_id, created_at_ms, updated_at_ms) "
            "SELECT pk, 'open', version, workspace_id, event_id, 'missing_field', '$', '', 1, 1, 1 FROM clickhouse_outbox"
        )
    _put(stack, ((f"ws_{number % 100}", f"new_{number}", "{}") for number in range(900)))
    bench.settle(stack)
    times: list[tuple[float, float]] = []
    for _ in range(3):
        with stack.outbox.planning("benchmark", 60) as ledger:
            started = time.perf_counter()
            assert len(ledger.candidates("audit_log.v1", 0, PAGE_ROWS)) == 900
            page_s = time.perf_counter() - started
        started = time.perf_counter()
        stack.outbox.backlog(("audit_log.v1",), count_to=1_000_000)
        times.append((page_s, time.perf_counter() - started))
    page_s, probe_s = (sorted(column)[1] for column in zip(*times, strict=True))
    return {"letters": f"{letters:,}", "page, seconds": page_s, "probe, seconds": probe_s}


_DIGITS = "SELECT 0 AS d UNION SELECT 1 UNION SELECT 2 UNION SELECT 3 UNION SELECT 4 UNION SELECT 5 UNION SELECT 6 UNION SELECT 7 UNION SELECT 8 UNION SELECT 9"
_NUMBERS = "SELECT 1 + a.d + 10 * b.d + 100 * c.d + 1000 * e.d + 10000 * f.d AS n FROM " + ", ".join(
    f"({_DIGITS}) AS {name}" for name in "abcef"
)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:3]))
