"""Resources: thin shells that make plain objects of connection settings, when a run starts."""

import concurrent.futures
import http.client
import os
import threading
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import dagster as dg
import msgspec
from pydantic import Field

from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.pipeline import Pipeline
from auditexport_pipeline.mysql.maintenance import MySQLMaintenance
from auditexport_pipeline.mysql.outbox import MySQLOutbox

# A heartbeat must not delay a run noticeably.
HEARTBEAT_TIMEOUT_S = 5.0
# A sensor sends notices, and Dagster ends its tick after a minute.
NOTICE_TIMEOUT_S = 5.0
T = TypeVar("T")


class MySQLResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds the outbox and our ledger."""

    url: str = Field(description="SQLAlchemy URL, mysql+pymysql://user:password@host:port/database (TLS: ?ssl_ca=…).")

    def outbox(self) -> MySQLOutbox:
        """The store over this URL; raises `InvalidConfig`, which does not repeat the URL, for one of another kind."""
        return MySQLOutbox(self.url)

    def maintenance(self) -> MySQLMaintenance:
        """The same database, for maintenance; raises as `outbox` does."""
        return MySQLMaintenance(self.outbox())


class ClickHouseResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds audit_logs_raw_v1."""

    url: str = Field(description="http[s]://user:password@host:port/database of ClickHouse's HTTP interface.")

    def audit_log(self) -> ClickHouseAuditLog:
        return ClickHouseAuditLog(self.url)


class HeartbeatResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """Pings as healthchecks.io defines them: `<url>/start`, `<url>` after success, `<url>/fail`.

    A ping that cannot be sent is only logged.
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
        """Whether a heartbeat is configured."""
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
    """Sends notices to a webhook, in Slack's JSON.

    Another resource with `is_set`, `link` and `send`, under the key `alerts`, sends them elsewhere.
    """

    url: str = Field(default="", description="The webhook; empty means AUDITEXPORT_ALERT_WEBHOOK_URL, or no alerts.")
    page_url: str = Field(default="", description="Address of the Dagster UI, for links to runs; empty means no links.")

    @property
    def is_set(self) -> bool:
        """Whether a webhook is configured."""
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


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises. After this time raises `TimeoutError`, and leaves `call` to its thread.

    A time-out of a socket's counts for each byte: a server that sends them one by one would never reach it.
    """
    future: concurrent.futures.Future[T] = concurrent.futures.Future()

    def run() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, name="auditexport-within", daemon=True).start()
    try:
        return future.result(seconds)
    except concurrent.futures.TimeoutError:
        raise TimeoutError from None


def _request(url: str, *, within_s: float, body: bytes | None = None) -> str:
    """Gets a URL, or posts JSON to it; returns an empty text, or what went wrong.

    The URL is a secret: with it anybody can silence the alarm, or raise one. So of an error only the type is logged.
    """

    def open_url() -> str:
        try:
            headers = {"Content-Type": "application/json"} if body else {}
            with urllib.request.urlopen(urllib.request.Request(url, data=body, headers=headers), timeout=within_s):
                return ""
        except urllib.error.HTTPError as error:
            error.close()
            return f"HTTP {error.code}"
        except (OSError, ValueError, http.client.HTTPException) as error:
            return type(error).__name__

    if not url.startswith(("http://", "https://")):
        return "ValueError"
    try:
        return within(2 * within_s, open_url)
    except TimeoutError:
        return "TimeoutError"


def bound(resource: Any) -> Any:
    """The resource without configuration of its own, so that a launch cannot change it.

    A connection that the launchpad shows can be overridden there: a green run then marks rows whose events are elsewhere, and
    Dagster stores the typed URL with its password. A literal URL would be a default in the job's stored snapshot. Variables are
    read when a run starts, as they are for the resource itself.
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
