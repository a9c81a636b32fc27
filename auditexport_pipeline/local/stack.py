"""The local stack: one private MySQL, one embedded ClickHouse and a Dagster home, in one directory."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

import sqlalchemy as sa

from auditexport_pipeline import schema as setup
from auditexport_pipeline.clickhouse.audit_log import ClickHouseAuditLog
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.local.clickhouse import LocalClickHouse
from auditexport_pipeline.local.mysql import LocalMySQL
from auditexport_pipeline.local.processes import lock_directory
from auditexport_pipeline.mysql.outbox import MySQLOutbox

# The application's database in the private MySQL.
DATABASE = "app"
# The checkout; the demo and dev need its dagster.yaml and workspace.yaml.
PROJECT = Path(__file__).resolve().parents[2]


class LocalStack:
    """Both servers, started, with all tables; a context manager.

    `fresh` deletes the data of an earlier stack. `mysql_options` go to the MySQL server. Raises `LocalServerFailed` when
    another stack uses the directory, `LocalServerMissing` when there is no MySQL or MariaDB binary.
    """

    def __init__(self, directory: Path, *, fresh: bool = False, mysql_options: Sequence[str] = ()) -> None:
        self.directory = directory.resolve()
        self.dagster_home = self.directory / "dagster_home"
        self._fresh = fresh
        self._mysql_options = mysql_options
        self._running = contextlib.ExitStack()

    def __enter__(self) -> LocalStack:
        with contextlib.ExitStack() as starting:
            in_use = f"{self.directory.name} is in use by another demo or dev: stop that one first"
            starting.enter_context(lock_directory(self.directory, in_use))
            if self._fresh:
                for part in ("mysql", "clickhouse", "dagster_home"):
                    shutil.rmtree(self.directory / part, ignore_errors=True)
            self.mysql = starting.enter_context(LocalMySQL(self.directory / "mysql", options=self._mysql_options))
            self.clickhouse = starting.enter_context(LocalClickHouse(self.directory / "clickhouse"))
            engine = sa.create_engine(self.mysql.url, isolation_level="AUTOCOMMIT")
            with engine.connect() as connection:
                connection.exec_driver_sql(f"CREATE DATABASE IF NOT EXISTS {DATABASE}")
            engine.dispose()
            self.outbox = MySQLOutbox(self.mysql.url + DATABASE)
            self.log = ClickHouseAuditLog(self.clickhouse.url)
            setup.create(self.outbox, self.log, with_outbox=True)
            self._prepare_dagster_home()
            self._running = starting.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self.outbox.disconnect()
        self._running.close()

    def environment(self) -> dict[str, str]:
        """The environment for Dagster processes that use the stack."""
        return {
            **os.environ,
            "AUDITEXPORT_MYSQL_URL": self.outbox.url,
            "AUDITEXPORT_CLICKHOUSE_URL": self.log.url,
            "DAGSTER_HOME": str(self.dagster_home),
        }

    def last_drain(self) -> tuple[float, float]:
        """(rows per second, seconds) of the last drain in Dagster, as its materialization records them."""
        import dagster as dg

        with dg.DagsterInstance.from_config(str(self.dagster_home)) as instance:
            event = instance.get_latest_materialization_event(dg.AssetKey("audit_logs_raw_v1"))
            assert event is not None
            assert event.asset_materialization is not None
            metadata = event.asset_materialization.metadata
            return float(str(metadata["rows_per_s"].value)), float(str(metadata["seconds"].value))

    def _prepare_dagster_home(self) -> None:
        self.dagster_home.mkdir(parents=True, exist_ok=True)
        settings = PROJECT / "dagster.yaml"
        if not settings.exists():
            raise InvalidConfig(f"{settings} is missing: run the demo and dev from a checkout of the project")
        shutil.copyfile(settings, self.dagster_home / "dagster.yaml")
