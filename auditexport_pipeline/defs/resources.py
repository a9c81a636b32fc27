"""Resources: what a run needs from outside, as thin shells that hand out plain objects.

What belongs here: reading connection settings when a run starts, and constructing stores from them. What
does not: anything the stores or the core do. Nothing here reads the environment at import.
"""

import http.client
import os
import urllib.request
from collections.abc import Iterator

import dagster as dg
from pydantic import Field

from auditexport_pipeline.defs.ahead import Ahead
from auditexport_pipeline.stores.audit_log import ClickHouseAuditLog
from auditexport_pipeline.stores.outbox import MySQLOutbox
from auditexport_pipeline.stores.upkeep import MySQLUpkeep

# A heartbeat is a courtesy: it must not hold a run up for longer than a person would notice.
HEARTBEAT_TIMEOUT_S = 5.0


class MySQLResource(dg.ConfigurableResource):  # type: ignore[type-arg]
    """The database that holds the outbox and our ledger."""

    url: str = Field(description="SQLAlchemy URL, mysql+pymysql://user:password@host:port/database (TLS: ?ssl_ca=…).")

    def outbox(self) -> MySQLOutbox:
        """The store over this URL; raises `InvalidConfig`, which does not repeat the URL, for one of another kind."""
        return MySQLOutbox(self.url)

    def upkeep(self) -> MySQLUpkeep:
        """The same database, looked back at; raises as `outbox` does."""
        return MySQLUpkeep(self.outbox())


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

    def _ping(self, path: str) -> bool:
        url = self.url or os.environ.get("AUDITEXPORT_HEARTBEAT_URL", "")
        if not url:
            return False
        # The URL is a secret of its own: whoever knows it can silence the alarm. So nothing that logs it may
        # carry it: urllib logs nothing, and of an error only the type is told.
        try:
            if not url.startswith(("http://", "https://")):
                raise ValueError
            with urllib.request.urlopen(url.rstrip("/") + path, timeout=HEARTBEAT_TIMEOUT_S):
                return True
        except (OSError, ValueError, http.client.HTTPException) as error:
            dg.get_dagster_logger("auditexport").warning(
                f"the heartbeat{path} could not be sent ({type(error).__name__}); the export itself is not affected"
            )
            return False


@dg.resource(description="Fetches and writes the next batches while this one is marked; for one run in one process.")
def ahead() -> Iterator[Ahead]:
    pipeline = Ahead()
    try:
        yield pipeline
    finally:
        pipeline.close()
