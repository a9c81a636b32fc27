"""What the Dagster UI shows of the two assets: descriptions, columns, owners, kinds, freshness and links."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import timedelta
from typing import Any

import dagster as dg

from auditexport_pipeline.core.format import for_outbox
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.outboxes import GROUP as GROUP

# The schedule runs every fifteen minutes, backlog or not: two missed runs are a warning, four an outage.
FRESHNESS = dg.FreshnessPolicy.time_window(warn_window=timedelta(minutes=35), fail_window=timedelta(minutes=65))


def _columns(*columns: tuple[str, str, str]) -> dg.TableSchema:
    return dg.TableSchema(
        columns=[dg.TableColumn(name=name, type=kind, description=meaning) for name, kind, meaning in columns]
    )


OUTBOX_COLUMNS = _columns(
    ("pk", "bigint unsigned", "Auto-increment. A lower pk may be committed after a higher one."),
    ("version", "varchar(64)", "The producer's payload version, such as audit_log.v1. Unknown ones are never touched."),
    ("workspace_id", "varchar(48)", "The tenant; repeated in the payload, where it has to be the same."),
    ("event_id", "varchar(48)", "The event; repeated in the payload, where it has to be the same."),
    ("payload", "json", "The event. Never stored in Dagster, in logs or in metadata."),
    ("created_at", "bigint", "When the application wrote the row, epoch milliseconds. The lag is counted from it."),
    (
        "deleted_at",
        "bigint unsigned",
        "NULL while pending; when it was exported, epoch milliseconds. Clear it to requeue.",
    ),
)
ENTRY_COLUMNS = _columns(
    ("event_id", "String", "The event's id."),
    ("time", "Int64", "When it happened, epoch milliseconds, as the payload says."),
    ("inserted_at", "Int64", "Epoch milliseconds, unique per block and frozen in the ledger; the partition and the TTL go by it."),
    ("workspace_id", "String", "The tenant."),
    ("bucket", "LowCardinality(String)", "The stream within the tenant; empty when the payload has none."),
    ("source", "LowCardinality(String)", "Who wrote it; `platform` when the payload has none."),
    ("event", "LowCardinality(String)", "What happened, such as key.create."),
    ("description", "String", "For people."),
    ("actor_type", "LowCardinality(String)", "Who did it: user, key, system."),
    ("actor_id", "String", "Who did it."),
    ("actor_name", "String", "Who did it, for people."),
    ("actor_meta", "JSON", "What the producer knows of the actor; {} when absent."),
    ("remote_ip", "String", "The client's IP address."),
    ("user_agent", "String", "The client's user agent."),
    ("meta", "JSON", "What the producer adds; {} when absent."),
    ("meta_text", "String", "`meta` as text, for full-text search. Materialized."),
    ("targets.type", "Array(LowCardinality(String))", "What it was done to; the four `targets` arrays run in parallel."),
    ("targets.id", "Array(String)", "What it was done to."),
    ("targets.name", "Array(String)", "What it was done to, for people."),
    ("targets.meta", "Array(JSON)", "What the producer knows of each target."),
    ("targets_meta_text", "String", "All target metas as text. Materialized."),
    ("correlation_id", "String", "Binds events of one request together."),
)  # fmt: skip

_OUTBOX = (
    "The application's outbox in MySQL: one row per audit event, written in the transaction of the change it describes.\n\n"
    "`{sensor}` observes it. Exports only set `deleted_at` of its rows."
)
_AUDIT_LOG = (
    "Every audit event of the outbox, **exactly once**.\n\n"
    "**Materialize** drains the outbox: it adopts what an interrupted run left open, exports pending rows until none is left "
    "or `max_batches` is reached, marks them, and verifies them in ClickHouse. Running it again is always safe, and so is "
    "running it beside the sensor: one drain runs at a time, the next one waits in the queue.\n\n"
    "**No partitions, no backfill.** A run takes what is pending, whatever its age. To export again what was exported, "
    "requeue it (`{requeue}`, or `auditexport requeue`); it keeps its first `inserted_at`.\n\n"
    "Read `audit_logs` in ClickHouse, the view that shows each event once at all times. Each batch is an observation here "
    "and a row of the ledger: `auditexport batches show …`."
)


def outbox_spec(names: Names, links: Mapping[str, str], **about: Any) -> dg.AssetSpec:
    """The external asset: the outbox, which the application owns. `about` are group, owners and tags."""
    return dg.AssetSpec(
        names.outbox_asset,
        description=_OUTBOX.format(sensor=names.of("outbox_backlog_sensor")),
        kinds={"mysql"},
        metadata={"dagster/column_schema": OUTBOX_COLUMNS, "dagster/table_name": "clickhouse_outbox", **_links(links)},
        **about,
    )


def attributes(names: Names, links: Mapping[str, str]) -> dict[str, Any]:
    """Arguments of `graph_asset` for `audit_logs_raw_v1`."""
    return {
        "description": for_outbox(_AUDIT_LOG.format(requeue=names.of("requeue_events")), names.name),
        "kinds": {"clickhouse"},
        "metadata": {
            "dagster/column_schema": ENTRY_COLUMNS,
            "dagster/table_name": "audit_logs_raw_v1",
            "ledger": "clickhouse_outbox_batch, in the outbox's database",
            "read_side": "audit_logs, in the table's database",
            **_links(links),
        },
    }


def _links(links: Mapping[str, str]) -> dict[str, dg.MetadataValue]:
    return {name: dg.MetadataValue.url(url) for name, url in links.items()}
