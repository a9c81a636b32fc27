"""Table engines, from one server to shards of replicas, and the statements that create our tables on them.

What belongs here: the choice, its arguments, and the text of the statements. What does not: running them (`schema`),
comparing a server with them (`clickhouse.table_checks`), and the reason for each setting (`docs/clickhouse.md`).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import Enum
from string import Template
from typing import NamedTuple

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.versions import VERSIONS, top_level_parts
from auditexport_pipeline.sql import load

_SQL = load("clickhouse/schema.sql")
TABLE = next(iter(VERSIONS.values())).table
# A shard's table has the version's table name and this; the Distributed table above it has the name itself.
LOCAL = "_local"
LOCAL_TABLE = f"{TABLE}{LOCAL}"
VIEW = "audit_logs"
# Blocks whose tokens ClickHouse remembers. At the largest of 64 × 16 blocks a run this covers ten runs (five on 26.3, where
# an INSERT takes two places), and it only has to cover an INSERT that is still running when its replay begins.
DEDUPLICATION_WINDOW = 10_000
# How long a replicated table remembers them: a week, the default before 25.10 made it an hour. A lease may last a day.
DEDUPLICATION_WINDOW_S = 604_800
# {shard} and {replica} are macros of each server's configuration. ClickHouse's own default path has {uuid}, which is
# refused outside ON CLUSTER and Replicated databases, and differs between replicas.
KEEPER_PATH = "/clickhouse/tables/{shard}/{database}/{table}"
REPLICA = "{replica}"
_NAME = re.compile(r"[\w.{}-]+", re.ASCII)
_KEEPER_PATH = re.compile(r"(?:\w+:)?/[\w./{}-]*[\w}]", re.ASCII)


class Engine(str, Enum):
    """What `auditexport init --engine` takes."""

    MERGE_TREE = "merge_tree"
    REPLICATED = "replicated"
    SHARED = "shared"
    DISTRIBUTED = "distributed"


def family_of(engine: str) -> Engine:
    """The `init --engine` of an engine of ClickHouse's; merge_tree for any other."""
    for family in (Engine.REPLICATED, Engine.SHARED, Engine.DISTRIBUTED):
        if engine.startswith(family.value.title()):
            return family
    return Engine.MERGE_TREE


class Under(NamedTuple):
    """What a Distributed table lies over: a cluster (empty for addresses) and a table there; and its sharding key."""

    cluster: str
    database: str
    table: str
    sharding_key: str


def under_of(engine_full: str, database: str) -> Under | None:
    """Under a Distributed table of `database`, from `system.tables.engine_full`; None for another engine.

    Engines Remote and RemoteSecure are Distributed ones that name addresses in the cluster's place.
    """
    found = re.match(r"(Distributed|Remote|RemoteSecure)\((.*?)\)(?: SETTINGS |$)", engine_full, re.DOTALL)
    if found is None:
        return None
    cluster, local_database, table, *more = (part.strip().strip("'") for part in top_level_parts(found[2]))
    over_cluster = found[1] == "Distributed"
    # Of addresses, user and password may stand before the key, each in quotes.
    keyed = more and (over_cluster or not found[2].rstrip().endswith("'"))
    key = more[0 if over_cluster else -1] if keyed else ""
    return Under(cluster if over_cluster else "", local_database or database, table, key)


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """One engine and its arguments. Raises `InvalidConfig` for those that do not go together."""

    engine: Engine = Engine.MERGE_TREE
    cluster: str = ""
    keeper_path: str = KEEPER_PATH
    replica: str = REPLICA

    def __post_init__(self) -> None:
        if self.cluster and not _NAME.fullmatch(self.cluster):
            raise InvalidConfig(f"--cluster {self.cluster!r} is no name of a cluster")
        if self.keeper_path and not _KEEPER_PATH.fullmatch(self.keeper_path):
            raise InvalidConfig(f"--keeper-path {self.keeper_path!r} is no path: write one such as {KEEPER_PATH}")
        if not _NAME.fullmatch(self.replica):
            raise InvalidConfig(f"--replica {self.replica!r} is no name of a replica")
        if self.engine is Engine.DISTRIBUTED and not self.cluster:
            raise InvalidConfig("--engine distributed needs --cluster, the cluster over whose shards it lies")
        if self.engine is Engine.DISTRIBUTED and self.keeper_path and "{shard}" not in self.keeper_path:
            raise InvalidConfig(
                f"--keeper-path {self.keeper_path!r} has no {{shard}}: all shards would be replicas of one table"
            )
        if self.engine is Engine.SHARED and self.cluster:
            raise InvalidConfig("--engine shared is ClickHouse Cloud's, which has no --cluster to name: it has one")

    def statements(self, database: str) -> dict[str, str]:
        """The statements that create the tables and the view in `database`, by what they create, in order."""
        if not _NAME.fullmatch(database):
            raise InvalidConfig(f"the database's name is {database!r}; one of letters, digits, _ and - is needed")
        on_cluster = f" ON CLUSTER '{self.cluster}'" if self.cluster else ""
        distributed = self.engine is Engine.DISTRIBUTED
        statements = {}
        for version in VERSIONS.values():
            local = f"{version.table}{LOCAL}" if distributed else version.table
            begin = f"CREATE TABLE IF NOT EXISTS {version.table}"  # of each version's statement
            declared = version.pieces["ddl"].replace(begin, f"CREATE TABLE IF NOT EXISTS {local}{on_cluster}", 1)
            statements[local] = Template(declared).substitute(engine=self._engine, table_settings=self._settings)
            if distributed:
                statements[version.table] = Template(_SQL["distributed"]).substitute(
                    table=version.table, local=local, cluster=self.cluster, on_cluster=on_cluster, database=database
                )
        statements[VIEW] = Template(_SQL["audit_logs"]).substitute(on_cluster=on_cluster)
        return statements

    @property
    def _engine(self) -> str:
        if self.engine is Engine.MERGE_TREE:
            return "ReplacingMergeTree"
        if self.engine is Engine.SHARED:
            return "SharedReplacingMergeTree"
        arguments = f"('{self.keeper_path}', '{self.replica}')" if self.keeper_path else ""
        return f"ReplicatedReplacingMergeTree{arguments}"

    @property
    def _settings(self) -> str:
        if self.engine is Engine.MERGE_TREE:
            return f"non_replicated_deduplication_window = {DEDUPLICATION_WINDOW}"
        return (
            f"replicated_deduplication_window = {DEDUPLICATION_WINDOW}, "
            f"replicated_deduplication_window_seconds = {DEDUPLICATION_WINDOW_S}"
        )
