"""The servers of the chaos suite, each behind a proxy, and a pair of new databases for each history.

The suite has servers of its own because it kills them. The exporter goes through the proxies, everything else directly.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_tests.chaos.proxy import Proxy
from auditexport_tests.conftest import Stack, fresh_stack
from auditexport_tests.support.engines import local_clickhouse

# No part is small enough to be merged, so that copies stay. A restarted server would forget SYSTEM STOP MERGES.
NO_MERGES = "max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1"
# Valid for the decoder and for ClickHouse's parser, and refused by a constraint of the table.
REFUSED_DESCRIPTION = "refused by the table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """One history's two databases. `direct` bypasses the proxies, the two URLs do not."""

    direct: Stack
    name: str
    mysql_url: str
    clickhouse_url: str
    clock: Path


class Rig:
    """Both servers and both proxies, running; a context manager on an empty directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mysql = LocalMySQL(directory / "mysql")
        self.clickhouse = local_clickhouse(directory / "clickhouse")

    def __enter__(self) -> Rig:
        with ExitStack() as starting:
            starting.enter_context(self.mysql)
            starting.enter_context(self.clickhouse)
            self.to_mysql = starting.enter_context(Proxy(self.mysql.port, speaks="mysql"))
            self.to_clickhouse = starting.enter_context(Proxy(self.clickhouse.port, speaks="http"))
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._running.close()

    def restore(self) -> None:
        """Lifts every fault of the wire and starts each server that does not run."""
        self.to_mysql.lift()
        self.to_clickhouse.lift()
        self.mysql.start()
        self.clickhouse.start()

    @contextmanager
    def databases(self, *, window: int) -> Iterator[Databases]:
        """New databases with all tables; ClickHouse remembers the tokens of `window` blocks."""
        with fresh_stack(self.mysql.url, self.clickhouse.url.removesuffix("default")) as direct:
            for change in (
                f"MODIFY SETTING {NO_MERGES}, non_replicated_deduplication_window = {window}",
                f"ADD CONSTRAINT not_refused CHECK description != '{REFUSED_DESCRIPTION}'",
            ):
                direct.log.client().command(f"ALTER TABLE audit_logs_raw_v1 {change}")
            name = str(direct.outbox.engine.url.database)
            clock = self.directory / f"{name}.clock"
            clock.write_text("0")
            try:
                yield Databases(
                    direct=direct,
                    name=name,
                    # In plain text: the proxy has to recognise a COMMIT.
                    mysql_url=f"mysql+pymysql://root@127.0.0.1:{self.to_mysql.port}/{name}?ssl_disabled=true",
                    clickhouse_url=f"http://default@127.0.0.1:{self.to_clickhouse.port}/{name}",
                    clock=clock,
                )
            finally:
                self.restore()
                clock.unlink()
