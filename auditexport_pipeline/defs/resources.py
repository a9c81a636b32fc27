"""Resources: what a run needs from outside, as thin shells that hand out plain objects.

What belongs here: reading connection settings when a run starts, and constructing stores from them. What
does not: anything the stores or the core do. Nothing here reads the environment at import.
"""

import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from typing import Any

import dagster as dg
import msgspec
from pydantic import Field

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox

# A heartbeat is a courtesy: it must not hold a run up for longer than a person would notice.
HEARTBEAT_TIMEOUT_S = 5.0
# A notice is sent by a sensor, whose tick Dagster gives up after a minute.
NOTICE_TIMEOUT_S = 5.0


class MySQLResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds the outbox and our ledger."""

    url: str = Field(description="SQLAlchemy URL, mysql+pymysql://user:password@host:port/database (TLS: ?ssl_ca=…).")

    def outbox(self) -> MySQLOutbox:
        """The store over this URL; raises `InvalidConfig`, which does not repeat the URL, for one of another kind."""
        return MySQLOutbox(self.url)

    def upkeep(self) -> MySQLMaintenance:
        """The same database, looked back at; raises as `outbox` does."""
        return MySQLMaintenance(self.outbox())


class ClickHouseResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds audit_logs_raw_v1."""

    url: str = Field(description="http[s]://user:password@host:port/database of ClickHouse's HTTP interface.")

    def audit_log(self) -> ClickHouseAuditLog:
        return ClickHouseAuditLog(self.url)


class HeartbeatResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Pings in the manner of healthchecks: `<url>/start`, `<url>` after success, `<url>/fail`.

    A ping that cannot be sent is logged and nothing more: an export that is done stays done.
    """

    url: str = Field(
        default="", description="Base URL of the check; empty means AUDITEXPORT_HEARTBEAT_URL, or no heartbeat."
    )

    def start(self) -> bool:
        return self._ping("/start")

    def success(self) -> bool:
        return self._ping("")

    def fail(self) -> bool:
        return self._ping("/fail")

    @property
    def is_set(self) -> bool:
        """Whether there is anybody to ping."""
        return bool(self._base)

    @property
    def _base(self) -> str:
        return self.url or os.environ.get("AUDITEXPORT_HEARTBEAT_URL", "")

    def _ping(self, path: str) -> bool:
        if not self._base:
            return False
        trouble = _request(self._base.rstrip("/") + path, within_s=HEARTBEAT_TIMEOUT_S)
        if trouble:
            dg.get_dagster_logger("auditexport").warning(
                f"the heartbeat{path} could not be sent ({trouble}); the export itself is not affected"
            )
        return not trouble


class AlertsResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Where notices go: a webhook that takes what Slack's take, in JSON.

    Put another object with these three in its place, under the key `alerts`, to send them elsewhere.
    """

    url: str = Field(default="", description="The webhook; empty means AUDITEXPORT_ALERT_WEBHOOK_URL, or no alerts.")
    page_url: str = Field(default="", description="Address of the Dagster UI, for links to runs; empty means no links.")

    @property
    def is_set(self) -> bool:
        """Whether there is anybody to tell."""
        return bool(self._webhook)

    def link(self, run_id: str) -> str:
        """The run in the Dagster UI; empty when its address is not known."""
        return f"{self.page_url.rstrip('/')}/runs/{run_id}" if self.page_url else ""

    def send(self, body: Mapping[str, object]) -> str:
        """Posts it; returns what went wrong, without the URL, or an empty text."""
        return _request(self._webhook, within_s=NOTICE_TIMEOUT_S, body=msgspec.json.encode(body))

    @property
    def _webhook(self) -> str:
        return self.url or os.environ.get("AUDITEXPORT_ALERT_WEBHOOK_URL", "")


def _request(url: str, *, within_s: float, body: bytes | None = None) -> str:
    """Asks for a URL, or posts JSON to it; returns an empty text, or what went wrong.

    The URL is a secret of its own: whoever knows it can silence the alarm, or raise one. So nothing that logs it may
    carry it: urllib logs nothing, and of an error only the type is told.

    A time-out of a socket's is one for each byte: a server that sends them one by one would hold us for ever. So the
    whole is left to a thread, which may end by itself.
    """
    trouble = ["TimeoutError"]

    def ask() -> None:
        try:
            if not url.startswith(("http://", "https://")):
                raise ValueError
            request = urllib.request.Request(
                url, data=body, headers={"Content-Type": "application/json"} if body else {}
            )
            with urllib.request.urlopen(request, timeout=within_s):
                trouble[0] = ""
        except urllib.error.HTTPError as error:
            error.close()
            trouble[0] = f"HTTP {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            trouble[0] = type(error).__name__

    thread = threading.Thread(target=ask, name="auditexport-request", daemon=True)
    thread.start()
    thread.join(2 * within_s)
    return trouble[0]


def bound(resource: Any) -> Any:
    """The resource as its definitions have it, whatever a launch says: it has no configuration of its own.

    A connection that the launchpad shows can be overridden there: a green run then marks rows whose events are somewhere
    else, and what was typed, its password included, stays in Dagster's storage. A literal URL would be a default in the job's
    stored snapshot. Variables are read when a run starts, as they are for the resource itself.
    """
    if not isinstance(resource, dg.ConfigurableResource):
        return resource

    @dg.resource(config_schema={}, description=type(resource).__doc__)
    def from_definitions(_: dg.InitResourceContext) -> Iterator[Any]:
        with resource.process_config_and_initialize_cm() as ready:
            yield ready

    return from_definitions


@dg.resource(
    config_schema={},
    description="Fetches and writes the next batches while this one is marked; for one run in one process.",
)
def pipeline() -> Iterator[Pipeline]:
    running = Pipeline()
    try:
        yield running
    finally:
        running.close()
