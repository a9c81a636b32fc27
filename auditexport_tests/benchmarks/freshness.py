"""How soon: from the application's commit until ClickHouse answers with the event, at a steady pace.

One writer, Dagster as `make dev` runs it, and a reader every 50 ms; once with a run for each tick of the sensor, once with a
run that stays (`linger_s`). It also prints where the time of a run goes.

    python -m auditexport_tests.benchmarks.freshness [seconds] [events/s …]
"""

from __future__ import annotations

import sys
import threading
import time
from collections import defaultdict

import dagster as dg
import pandas as pd
import sqlalchemy as sa

from auditexport_pipeline.local import dev
from auditexport_pipeline.local.generator import Generator
from auditexport_pipeline.local.processes import free_port
from auditexport_pipeline.local.stack import LocalStack
from auditexport_tests.benchmarks import bench
from auditexport_tests.support.builders import settings_file

READ_EVERY_S = 0.05
# By then the sensor and the first run have started.
WARM_UP_S = 40.0
# After the last commit: a tick and a run, with room.
DRAINED_WITHIN_S = 120.0
MODES = {
    "a run for each tick": {},
    "a run that stays": {"linger_s": 3600},
}
NEW_ENTRIES = """
SELECT inserted_at, groupArray(event_id) FROM audit_logs_raw_v1
WHERE inserted_at > {floor:Int64} AND inserted_at NOT IN {seen:Array(Int64)} GROUP BY inserted_at
"""


class Reader(threading.Thread):
    """Notes when it first sees each event."""

    def __init__(self, stack: LocalStack) -> None:
        super().__init__(daemon=True)
        self.seen: dict[str, float] = {}
        self.stop = threading.Event()
        self._stack = stack

    def run(self) -> None:
        groups: list[int] = []  # by inserted_at
        client = self._stack.log.client()
        while not self.stop.wait(READ_EVERY_S):
            recent = groups[-500:]
            found = client.query(NEW_ENTRIES, parameters={"floor": min(recent, default=0) - 1, "seen": recent or [0]})
            now = time.monotonic()
            for inserted_at, ids in sorted(found.result_rows):
                groups.append(inserted_at)
                for event_id in ids:
                    self.seen.setdefault(event_id, now)


def _write(stack: LocalStack, per_s: float, seconds: float) -> dict[str, float]:
    """Commits single events, or tens at a high pace; returns the moment of each event's commit."""
    generator = Generator(bench.SEED, stream=time.time_ns())
    together = max(1, round(per_s / 200))
    engine = sa.create_engine(stack.outbox.url, pool_size=1)
    committed: dict[str, float] = {}
    due = began = time.monotonic()
    while due < began + seconds:
        due += together / per_s
        time.sleep(max(0.0, due - time.monotonic()))
        events = [generator.event(time.time_ns() // 1_000_000) for _ in range(together)]
        with engine.begin() as connection:
            connection.execute(bench.INSERT, [bench.values_of(event) for event in events])
        committed.update(dict.fromkeys((event.event_id for event in events), time.monotonic()))
    engine.dispose()
    return committed


def measure(mode: str, per_s: float, seconds: float) -> tuple[pd.Series, dict[str, float]]:
    """Seconds from commit to answer, one an event; and the median seconds of each part of a run."""
    with bench.benchmark_stack() as stack:
        settings = settings_file(stack.directory, sensor_rows=1, sensor_lag_s=1, drain=MODES[mode])
        environment = {**stack.environment(), "AUDITEXPORT_OUTBOXES": settings}
        dagster = dev.start_dagster(stack, environment, free_port())
        reader = Reader(stack)
        try:
            time.sleep(WARM_UP_S / 2)
            dev.switch_on(environment)
            _write(stack, 1.0, WARM_UP_S / 2)
            reader.start()
            committed = _write(stack, per_s, seconds)
            until = time.monotonic() + DRAINED_WITHIN_S
            while not committed.keys() <= reader.seen.keys():
                if time.monotonic() > until:
                    raise RuntimeError(f"{len(committed.keys() - reader.seen.keys())} events never arrived")
                time.sleep(0.1)
        finally:
            reader.stop.set()
            dagster.stop()
        with dg.DagsterInstance.from_config(str(stack.dagster_home)) as instance:
            parts = _parts(instance)
    return pd.Series([reader.seen[event_id] - at for event_id, at in committed.items()]), parts


def _parts(instance: dg.DagsterInstance) -> dict[str, float]:
    """Where the time of finished runs went, by Dagster's own events; medians, in seconds."""
    spent: defaultdict[str, list[float]] = defaultdict(list)
    for run in instance.get_runs(dg.RunsFilter(job_name="audit_log_export", statuses=[dg.DagsterRunStatus.SUCCESS])):
        at: dict[str, float] = {}
        for entry in instance.all_logs(run.run_id):
            event = entry.dagster_event
            if event is None:
                continue
            step = (event.step_key or "").rsplit(".", 1)[-1].split("[")[0]
            at.setdefault(f"{event.event_type_value} {step}".strip(), entry.timestamp)
            if event.event_type_value == "STEP_SUCCESS":
                at[f"end {step}"] = entry.timestamp
        stats = instance.get_run_stats(run.run_id)
        times = {"enqueued": stats.enqueued_time, "launched": stats.launch_time, "started": stats.start_time}
        at |= {name: moment for name, moment in times.items() if moment}
        marks = [
            ("queue", "enqueued", "launched"),
            ("process and imports", "launched", "started"),
            ("to the first step", "started", "STEP_START plan_batches"),
            *((step, f"STEP_START {step}", f"end {step}") for step in STEPS),
        ]
        for name, first, last in marks:
            if first in at and last in at:
                spent[name].append(at[last] - at[first])
    return {name: float(pd.Series(values).median()) for name, values in spent.items()}


STEPS = ("plan_batches", "fetch_batch", "write_clickhouse", "mark_exported", "finish_export")


def main(seconds: float = 120.0, *rates: float) -> None:
    measured = []
    for per_s in rates or (1.0, 100.0, 2_000.0):
        for mode in MODES:
            taken, parts = measure(mode, per_s, seconds)
            measured.append((mode, per_s, len(taken), taken.median(), taken.quantile(0.99), taken.max()))
            print(
                f"{mode}, {per_s:g}/s:", ", ".join(f"{name} {value:.2f} s" for name, value in parts.items()), flush=True
            )
    columns = ["how", "events/s", "events", "median s", "p99 s", "max s"]
    print(pd.DataFrame(measured, columns=columns).round(2).to_string(index=False))


if __name__ == "__main__":
    main(*map(float, sys.argv[1:]))
