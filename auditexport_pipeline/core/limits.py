"""Every limit of a drain, once: its default, unit, bounds and one sentence for the launchpad.

What belongs here: the settings a run can be launched with and the checks between them, and the one retention that
sweep, requeue and preflight have to agree on. What does not: connections (resources) and the thresholds that start a
run (`core.backlog`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.versions import VERSIONS

# How long exported rows stay in the outbox, and so how old an entry can be that is requeued: a month, in which a loss
# in ClickHouse is noticed. ClickHouse's TTL has to be longer.
RETENTION_DAYS = 30
# An INSERT must start within this time, by ClickHouse's clock: a process that was paused for longer sends nothing any more.
# Long enough to upload a batch over a slow line; until it and insert_timeout_s have passed, nothing that was sent is given up.
START_WITHIN_S = 120
# The shortest lease where the steps of a run are in several processes: between two of them nobody renews it.
QUEUED_LEASE_S = 300


def _limit(default: int, low: int, high: int, meaning: str) -> int:
    return field(default=default, metadata={"low": low, "high": high, "meaning": meaning})


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """What bounds one drain. Raises `InvalidConfig`, naming the field, for a value out of bounds."""

    # benchmarks/batch_size.py: 8,900 rows/s at 5,000, 10,500 at 10,000, and level within its noise from 25,000 on
    # (14,500; 13,800 at 50,000; 14,400 at 100,000), at 220 to 230 MB. Large, so that a run of 64 batches goes far.
    batch_rows: int = _limit(
        100_000, 1, 500_000, "Rows claimed, sealed and marked together; memory grows with it, the cost per row falls."
    )
    batch_bytes: int = _limit(
        64 * 1024**2,
        1024,
        1024**3,
        "Payload bytes of one batch, by the sizes of a sample (one larger row still goes, alone).",
    )
    max_batches: int = _limit(64, 1, 1_000, "Batches of one run at most; what is left over waits for the next run.")
    # One INSERT a batch makes the fewest parts and merges: ClickHouse took 6.8 CPU seconds for 300,000 rows, with two 9.6.
    blocks_per_batch: int = _limit(1, 1, 16, "INSERTs that carry one batch, sent at the same time.")
    # Renewed while a verb is at work (`core.lease`): a run whose process is gone holds its batches for no longer.
    lease_s: int = _limit(
        45,
        10,
        86_400,
        "How long a run may hold a batch between two signs of life, in seconds; at least 300 where an executor gives the steps to "
        "several processes, because they wait for each other in a queue.",
    )
    insert_timeout_s: int = _limit(
        60, 1, 3_600, "max_execution_time of one INSERT in ClickHouse, in seconds; it may be longer than lease_s."
    )
    # A marking chunk is one binlog event group; 5,000 rows of images are a few megabytes.
    mark_rows: int = _limit(
        5_000, 1, 50_000, "Rows stamped by one UPDATE; bounds the binary log's event groups and locks."
    )
    mark_connections: int = _limit(
        2, 1, 16, "UPDATEs that mark one batch at the same time, each on a connection of its own."
    )
    # For a MySQL that has no room to spare; benchmarks/latency.py shows what the application notices without them.
    max_rows_per_second: int = _limit(
        0, 0, 1_000_000, "Rows marked per second at most, and so exported; 0 is as fast as the databases allow."
    )
    mark_pause_ms: int = _limit(
        0, 0, 60_000, "Rest after each UPDATE that marks rows, on its connection, in milliseconds."
    )
    linger_s: int = _limit(
        0,
        0,
        6_000,
        "How long a run stays, counted from its start, and drains what arrives; it leaves early when another "
        "drain is waiting. 0 ends with the backlog. Below max_runtime_seconds of dagster.yaml.",
    )
    linger_poll_ms: int = _limit(
        500, 20, 60_000, "How often a run that stays looks for new rows, in milliseconds: each look is one short query."
    )
    versions: tuple[str, ...] = field(
        default_factory=lambda: tuple(VERSIONS),
        metadata={"meaning": "Payload versions to export; any other stays untouched and is counted."},
    )

    def __post_init__(self) -> None:
        for limit in fields(self):
            value = getattr(self, limit.name)
            if limit.name == "versions":
                continue
            low, high = limit.metadata["low"], limit.metadata["high"]
            if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
                raise InvalidConfig(f"{limit.name} is {value!r}; it must be an integer from {low} to {high}")
        unknown = [version for version in self.versions if version not in VERSIONS]
        if unknown or not self.versions:
            raise InvalidConfig(f"versions is {list(self.versions)}; choose from {list(VERSIONS)}")

    @property
    def inserts_s(self) -> int:
        """How long an INSERT can be at work after its run was allowed to send it."""
        return START_WITHIN_S + self.insert_timeout_s

    def for_one_process(self, one_process: bool) -> Limits:
        """These limits, with a lease that outlasts a queue where the steps are in several processes."""
        return self if one_process else replace(self, lease_s=max(self.lease_s, QUEUED_LEASE_S))

    @classmethod
    def of(cls, settings: Mapping[str, object]) -> Limits:
        """The limits with these settings; raises `InvalidConfig` for a name that does not exist."""
        names = {limit.name for limit in fields(cls)}
        for name in settings:
            if name not in names:
                raise InvalidConfig(f"{name} is not a setting of a drain; choose from {sorted(names)}")
        values = dict(settings)
        if isinstance(values.get("versions"), list):
            values["versions"] = tuple(values["versions"])  # type: ignore[arg-type]
        return cls(**values)  # type: ignore[arg-type]
