"""The settings of an outbox, and the file that lists outboxes.

The file, the component and the CLI share these attributes. URLs are given by the name of the environment variable that holds
them, so neither a file nor a definition holds a password. What does not belong here: definitions (`defs.build`) and stores
(`cli.stores`).
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, ValidationError, ValidationInfo, field_validator
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from auditexport_pipeline.core.alerts import Policy
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits, Targets, Thresholds, refuse_moved_variables, unknown_variables

OUTBOXES_VARIABLE = "AUDITEXPORT_OUTBOXES"
GROUP = "audit_logs"
# Settings of an outbox that name the environment variable of a URL; the first two are the databases.
URL_KEYS = ("mysql_url_env", "clickhouse_url_env", "heartbeat_url_env", "alert_webhook_url_env")
DATABASE_KEYS = URL_KEYS[:2]
# Dagster's own rule for names, without capitals: a name is part of a resource's key and of a pool's.
_NAME = re.compile(r"[a-z][a-z0-9_]{0,30}")
# Of ClickHouse by HTTP and by HTTPS, which are one server.
_USUAL_PORTS = (8123, 8443)
_QUEUE = re.compile(r"[A-Za-z0-9_.-]{1,200}")
_ENVIRONMENT_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


def check_name(name: str) -> str:
    """The name; raises `InvalidConfig` for one that Dagster would not take. Empty is the one outbox without a name."""
    if name and not _NAME.fullmatch(name):
        raise InvalidConfig(
            f"the outbox's name is {name!r}; it must begin with a letter and hold small letters, digits and _, "
            "31 at most"
        )
    return name


def check_queue(queue: str) -> str:
    """The name of a queue; raises `InvalidConfig` for one that Celery would not take. Empty is the queue that all share."""
    if queue and not _QUEUE.fullmatch(queue):
        raise InvalidConfig("celery_queue must be letters, digits, '_', '-' and '.', 200 at most")
    return queue


# The settings of an outbox that a model of `core.settings` or `core.alerts` checks.
_CHECKS: Mapping[str, Callable[[Any], object]] = {
    "drain": lambda given: Limits(**given),
    "targets": Targets().with_values,
    "alert_policy": Policy().with_values,
    "sensor_rows": lambda rows: Thresholds(rows=rows),
    "sensor_lag_s": lambda lag_s: Thresholds(lag_s=lag_s),
    "name": check_name,
    "celery_queue": check_queue,
}


class OutboxSettings(BaseModel):
    """The settings of one outbox: the keys of an entry in a file of outboxes, and the attributes of the component."""

    model_config = ConfigDict(extra="forbid")

    name: Annotated[
        str,
        Field(description="Begins every name but the contract's, such as eu_audit_log_export; empty for one outbox."),
    ] = ""
    mysql_url_env: Annotated[str, Field(description="Environment variable with the outbox's SQLAlchemy URL.")] = (
        "AUDITEXPORT_MYSQL_URL"
    )
    clickhouse_url_env: Annotated[str, Field(description="Environment variable with ClickHouse's URL.")] = (
        "AUDITEXPORT_CLICKHOUSE_URL"
    )
    heartbeat_url_env: Annotated[
        str,
        Field(
            description="Environment variable with the heartbeat's URL; empty: AUDITEXPORT_HEARTBEAT_URL, if it is set."
        ),
    ] = ""
    alert_webhook_url_env: Annotated[
        str,
        Field(
            description="Environment variable with the webhook for alerts; empty: AUDITEXPORT_ALERT_WEBHOOK_URL, if it is set."
        ),
    ] = ""
    drain: Annotated[
        Mapping[str, Any],
        Field(description="Settings of drains that the sensor and the schedule start, as in the launchpad."),
    ] = {}
    sensor_rows: Annotated[int, Field(description=str(Thresholds.model_fields["rows"].description))] = Thresholds().rows
    sensor_lag_s: Annotated[float, Field(description=str(Thresholds.model_fields["lag_s"].description))] = (
        Thresholds().lag_s
    )
    targets: Annotated[
        Mapping[str, float], Field(description="When asset checks, status and alerts report a problem, such as lag_s.")
    ] = {}
    alert_policy: Annotated[
        Mapping[str, float], Field(description="When alerts are sent and repeated, such as repeat_hours.")
    ] = {}
    page_url: Annotated[str, Field(description="Address of the Dagster UI, for links to runs in alerts.")] = ""
    celery_queue: Annotated[
        str,
        Field(
            description="Celery queue of the drain's steps with AUDITEXPORT_EXECUTOR celery; empty: dagster, which all share."
        ),
    ] = ""
    group_name: Annotated[str, Field(description="Group of both assets.")] = GROUP
    owners: Annotated[Sequence[str], Field(description="Owners of both assets: e-mail addresses or team:…")] = ()
    links: Annotated[
        Mapping[str, str], Field(description="Text to URL, shown with both assets: a runbook, a dashboard.")
    ] = {}
    tags: Annotated[Mapping[str, str], Field(description="Tags of both assets.")] = {}

    @field_validator(*_CHECKS)
    @classmethod
    def _check(cls, value: Any, info: ValidationInfo) -> Any:
        try:
            _CHECKS[str(info.field_name)](value)
        except InvalidConfig as error:
            raise ValueError(str(error)) from None  # pydantic adds the attribute's name to a ValueError only
        return value

    @field_validator(*URL_KEYS)
    @classmethod
    def _check_variable(cls, value: str) -> str:
        # The message leaves the value out: it may be a URL with a password.
        if value and not _ENVIRONMENT_NAME.fullmatch(value):
            raise ValueError("this is not the name of an environment variable; put the URL into the variable")
        return value

    @property
    def variables(self) -> dict[str, str]:
        """Key of this entry to the environment variable that it names."""
        return {key: getattr(self, key) for key in URL_KEYS if getattr(self, key)}


@dataclass(frozen=True, slots=True, kw_only=True)
class Outboxes:
    """Every outbox of a file, in its order."""

    path: Path
    entries: tuple[OutboxSettings, ...]

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(entry.name for entry in self.entries)

    def named(self, name: str) -> OutboxSettings:
        """The entry of this name; raises `InvalidConfig`, with the names that there are."""
        for entry in self.entries:
            if entry.name == name:
                return entry
        raise InvalidConfig(f"{self.path} has no outbox {name!r}; choose from {', '.join(self.names)}")

    def url(self, entry: OutboxSettings, key: str) -> str:
        """What the variable under this key holds; raises `InvalidConfig` naming file, entry, key and variable."""
        variable = getattr(entry, key)
        value = os.environ.get(variable, "")
        if not value:
            raise InvalidConfig(f"{self.path}: {_shown(entry)}: {key}: {variable} is not set")
        return value

    def check_variables(self) -> None:
        """Raises `InvalidConfig` for a variable that is not set, and for two outboxes with one database.

        Two ledgers on one outbox would each take its rows. Two outboxes in one ClickHouse database would stamp entries with
        the same `inserted_at`, by which each finds its own blocks.
        """
        for key in DATABASE_KEYS:
            owners: dict[tuple[str, ...], str] = {}
            for entry in self.entries:
                database = _database(self.url(entry, key))
                if database in owners:
                    raise InvalidConfig(
                        f"{self.path}: outbox {entry.name}: {key}: {getattr(entry, key)} names the database of outbox "
                        f"{owners[database]}; each outbox has its own"
                    )
                owners[database] = entry.name
        for entry in self.entries:
            for key in entry.variables:
                self.url(entry, key)


def _shown(entry: OutboxSettings) -> str:
    return f"outbox {entry.name}" if entry.name else "the outbox"


def _database(url: str) -> tuple[str, ...]:
    """Server and database of a URL, without user and protocol; of a text that is no URL, the text.

    Two names of one host count as two: no name is looked up.
    """
    try:
        if not url.startswith(("http://", "https://")):  # as MySQLOutbox reads it, which takes a # or / in a password
            mysql = make_url(url)
            port = str(mysql.port) if mysql.port not in (None, 3306) else ""
            return ((mysql.host or "").lower(), port, str(mysql.query.get("unix_socket", "")), mysql.database or "")
        parts = urlsplit(url)
        port = str(parts.port) if parts.port not in (None, *_USUAL_PORTS) else ""
    except (ValueError, ArgumentError):  # the store refuses it with its own message
        return (url,)
    return ((parts.hostname or "").lower(), port, "", parts.path.strip("/") or "default")


def check_environment() -> None:
    """Raises `InvalidConfig` for a variable AUDITEXPORT_… that nothing reads, with its successor or the nearest known one."""
    refuse_moved_variables(os.environ)
    if unknown_variables(os.environ):
        outboxes = read_outboxes()
        named = {name for entry in outboxes.entries for name in entry.variables.values()} if outboxes else set()
        if unknown := unknown_variables(os.environ, named):
            raise InvalidConfig(unknown)


def read_outboxes() -> Outboxes | None:
    """The file that AUDITEXPORT_OUTBOXES names; None when it is not set: then there is the one outbox of the environment.

    Raises `InvalidConfig`, naming file, entry and key, for what is wrong. It does not read the variables of URLs.
    """
    path = os.environ.get(OUTBOXES_VARIABLE)
    return parse(Path(path)) if path else None


def parse(path: Path) -> Outboxes:
    """The outboxes of this file; raises as `read_outboxes` does."""
    entries: list[OutboxSettings] = []
    listed = _entries(path)
    for number, given in enumerate(listed, 1):
        name = given.get("name") if isinstance(given, dict) else None
        which = f"{path}: outbox {name}" if isinstance(name, str) and name else f"{path}: entry {number}"
        if not isinstance(given, dict):
            raise InvalidConfig(f"{which} is not a mapping of keys to values")
        if not name and len(listed) > 1:
            raise InvalidConfig(f"{which}: name: each of several outboxes needs one")
        try:
            entry = OutboxSettings(**given)
        except (ValidationError, TypeError) as error:
            raise InvalidConfig(f"{which}: {_wrong(error)}") from None
        for other in entries:
            if entry.name == other.name:
                raise InvalidConfig(f"{which}: name: there are two outboxes of this name")
            for key in DATABASE_KEYS:
                if getattr(entry, key) == getattr(other, key):
                    raise InvalidConfig(
                        f"{which}: {key}: {getattr(entry, key)} is outbox {other.name}'s; each outbox has its own databases"
                    )
        entries.append(entry)
    return Outboxes(path=path, entries=tuple(entries))


def _wrong(error: ValidationError | TypeError) -> str:
    """Key and cause of each thing that is wrong; what was given is not repeated."""
    if isinstance(error, TypeError):
        return "a key is not a text"
    parts = []
    for one in error.errors(include_url=False, include_input=False, include_context=False):
        key = ".".join(str(part) for part in one["loc"])
        if one["type"] == "extra_forbidden":
            parts.append(f"{key}: no such key; there are {', '.join(OutboxSettings.model_fields)}")
        else:
            parts.append(f"{key}: {one['msg'].removeprefix('Value error, ')}")
    return "; ".join(parts)


def _entries(path: Path) -> list[Any]:
    import yaml  # type: ignore[import-untyped]

    class Loader(yaml.SafeLoader):  # type: ignore[misc]
        """Refuses a key that is given twice; YAML would take the last value."""

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            keys = [key.value for key, _ in node.value if key.tag != "tag:yaml.org,2002:merge"]
            for key in keys:
                if keys.count(key) > 1:
                    raise InvalidConfig(f"{path}, line {node.start_mark.line + 1}: the key {key} is given twice")
            return dict(super().construct_mapping(node, deep))

    try:
        with path.open(encoding="utf-8") as file:
            found = yaml.load(file, Loader)  # a SafeLoader
    except OSError as error:
        raise InvalidConfig(f"{path}, which {OUTBOXES_VARIABLE} names, cannot be read ({error.strerror})") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark is not None else ""
        raise InvalidConfig(f"{path}{where}: this is not YAML ({getattr(error, 'problem', 'not UTF-8')})") from None
    if not isinstance(found, dict) or set(found) != {"outboxes"}:
        raise InvalidConfig(f"{path} must hold one key, outboxes, with a list of them")
    entries = found["outboxes"]
    if not isinstance(entries, list) or not entries:
        raise InvalidConfig(f"{path}: outboxes: it must be a list of at least one outbox")
    return entries
