"""The servers of the chaos suite, its own because it kills them, each behind a proxy.

What belongs here: starting, killing and restarting them, and a pair of fresh databases for each history. What
does not: when they die (`actions`). The exporter comes through the proxies, everybody else directly.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.mysql.outbox import MySQLOutbox
from auditexport_tests.chaos.proxy import Proxy
from auditexport_tests.support.engines import local_clickhouse

_numbers = itertools.count(1)

# ReplacingMergeTree takes copies away within moments, and a restarted server forgets SYSTEM STOP MERGES: no part
# is small enough to be merged.
NO_MERGES = "max_bytes_to_merge_at_max_space_in_pool = 1, max_bytes_to_merge_at_min_space_in_pool = 1"
# Valid for the decoder and for ClickHouse's parser, and refused by the table.
REFUSED_DESCRIPTION = "refused by the table"


@dataclass(frozen=True, slots=True, kw_only=True)
class Databases:
    """One history's two databases: URLs through the proxies, stores and an engine that go past them."""

    name: str
    mysql_url: str
    clickhouse_url: str
    outbox: MySQLOutbox
    log: ClickHouseAuditLog
    clock: Path

    def sql(self, statement: str, **values: object) -> list[sa.Row[tuple[object, ...]]]:
        """Runs a statement in MySQL, directly, in a transaction of its own."""
        with self.outbox.engine.begin() as connection:
            result = connection.execute(sa.text(statement), values)
            return list(result) if result.returns_rows else []

    def clickhouse(self, query: str) -> list[tuple[object, ...]]:
        result = self.log.client().query(query, settings={"json_type_escape_dots_in_keys": 1})
        return [tuple(row) for row in result.result_rows]


class Rig:
    """Both servers and both proxies, running; a context manager on an empty directory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.mysql = LocalMySQL(directory / "mysql")
        self.clickhouse = local_clickhouse(directory / "clickhouse")
        self._running = ExitStack()

    def __enter__(self) -> Rig:
        with ExitStack() as starting:
            starting.enter_context(self.mysql)
            starting.enter_context(self.clickhouse)
            clickhouse_port = int(self.clickhouse.url.rsplit(":", 1)[1].split("/")[0])
            self.to_mysql = starting.enter_context(Proxy(self.mysql.port, speaks="mysql"))
            self.to_clickhouse = starting.enter_context(Proxy(clickhouse_port, speaks="http"))
            self._running = starting.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._running.close()

    def restore(self) -> None:
        """Lifts every fault of the wire and starts what does not run."""
        self.to_mysql.lift()
        self.to_clickhouse.lift()
        self.mysql.start()
        self.clickhouse.start()

    @contextmanager
    def databases(self, *, window: int) -> Iterator[Databases]:
        """Fresh databases with all tables; ClickHouse remembers the tokens of `window` blocks."""
        name = f"chaos_{os.getpid()}_{next(_numbers)}"
        server = self.clickhouse.url.removesuffix("default")
        # Without a pool: what it would hold does not survive the server.
        admin = sa.create_engine(self.mysql.url, isolation_level="AUTOCOMMIT", poolclass=sa.NullPool)
        with admin.connect() as connection:
            connection.exec_driver_sql(f"CREATE DATABASE {name}")
        admin_log = ClickHouseAuditLog(server + "default")
        admin_log.client().command(f"CREATE DATABASE {name}")
        outbox, log = MySQLOutbox(self.mysql.url + name), ClickHouseAuditLog(server + name)
        setup.create(outbox, log, with_outbox=True)
        for change in (
            f"MODIFY SETTING {NO_MERGES}, non_replicated_deduplication_window = {window}",
            f"ADD CONSTRAINT not_refused CHECK description != '{REFUSED_DESCRIPTION}'",
        ):
            log.client().command(f"ALTER TABLE audit_logs_raw_v1 {change}")
        clock = self.directory / f"{name}.clock"
        clock.write_text("0")
        try:
            yield Databases(
                name=name,
                # In plain text, or MySQL would encrypt what the proxy has to recognise.
                mysql_url=f"mysql+pymysql://root@127.0.0.1:{self.to_mysql.port}/{name}?ssl_disabled=true",
                clickhouse_url=f"http://default@127.0.0.1:{self.to_clickhouse.port}/{name}",
                outbox=outbox,
                log=log,
                clock=clock,
            )
        finally:
            self.restore()
            outbox.disconnect()
            with admin.connect() as connection:
                connection.exec_driver_sql(f"DROP DATABASE {name}")
            admin_log.client().command(f"DROP DATABASE {name}")
            clock.unlink()
