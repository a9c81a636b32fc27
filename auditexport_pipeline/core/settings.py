"""The settings of drains, sensor, targets and sweep: default, unit, bounds and one sentence each.

The launchpad (`defs.config`), the component and the file of outboxes (`outboxes`) and the CLI's options (`cli.shared`) are made
from these models. `Variables` are the environment variables; the environment itself is passed in.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ModelWrapValidatorHandler,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.fields import FieldInfo

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.versions import VERSIONS

if TYPE_CHECKING:
    from typing_extensions import Self

# How long exported rows stay in the outbox, and so how old an entry can be that is requeued: a month, in which a loss
# in ClickHouse is noticed. ClickHouse's TTL has to be longer.
RETENTION_DAYS = 30
# An INSERT must start within this time, by ClickHouse's clock: a process that was paused for longer sends nothing any more.
# Long enough to upload a batch over a slow line; until it and insert_timeout_s have passed, nothing that was sent is given up.
START_WITHIN_S = 120
# The shortest lease where the steps of a run are in several processes: between two steps no process renews it.
QUEUED_LEASE_S = 300


class Settings(BaseModel):
    """Frozen values that are checked when they are made, without any conversion of types.

    Raises `InvalidConfig`, naming each field that is wrong and its bounds, or each name that does not exist.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)

    a_setting: ClassVar[str] = "a setting"  # how a message calls one of them

    @model_validator(mode="wrap")
    @classmethod
    def _name_what_is_wrong(cls, data: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        try:
            return handler(data)
        except ValidationError as error:
            raise InvalidConfig(_message(cls, error)) from None

    @classmethod
    def given_as(cls, field: str) -> str:
        """The name under which a user gives this field."""
        return field

    def with_values(self, values: Mapping[str, Any]) -> Self:
        """These settings with some in their place; raises as the constructor does."""
        return type(self)(**{**dict(self), **values})


def bounds_of(field: FieldInfo) -> tuple[Any, Any]:
    """The lowest and the highest value that a field takes; None where there is no such bound."""
    low = [bound.ge for bound in field.metadata if hasattr(bound, "ge")]
    high = [bound.le for bound in field.metadata if hasattr(bound, "le")]
    return next(iter(low), None), next(iter(high), None)


def format_bounds(field: FieldInfo) -> str:
    """Such as "from 1 to 500,000"; empty for a field without bounds."""
    low, high = bounds_of(field)
    above = next((bound.gt for bound in field.metadata if hasattr(bound, "gt")), None)
    parts = [f"above {above:,}"] if above is not None else [f"from {low:,}"] if low is not None else []
    if high is not None:
        parts.append(f"to {high:,}" if low is not None else f"up to {high:,}")
    return " ".join(parts)


def _message(model: type[Settings], error: ValidationError) -> str:
    """One part for each thing that is wrong, under the name by which it was given."""
    parts = []
    for one in error.errors(include_url=False):
        name = str(one["loc"][0]) if one["loc"] else ""
        field = model.model_fields.get(name)
        if field is None:
            parts.append(f"{name} is not {model.a_setting}; choose from {', '.join(sorted(model.model_fields))}")
        elif one["type"] == "value_error":  # a check of ours, with a whole sentence
            parts.append(str(one["ctx"]["error"]))
        elif bounds := format_bounds(field):
            kind = "an integer" if field.annotation is int else "a number"
            parts.append(f"{model.given_as(name)} is {one['input']!r}; it must be {kind} {bounds}")
        else:
            parts.append(f"{model.given_as(name)}: {one['msg']}")
    return "; ".join(parts)


class Limits(Settings):
    """What bounds one drain."""

    a_setting: ClassVar[str] = "a setting of a drain"

    # benchmarks/sizes.py: 8,900 rows/s at 5,000, 10,500 at 10,000, and level within its noise from 25,000 on
    # (14,500; 13,800 at 50,000; 14,400 at 100,000), at 220 to 230 MB. Large, so that a run of 64 batches goes far.
    batch_rows: int = Field(
        default=100_000,
        ge=1,
        le=500_000,
        description="Rows claimed, sealed and marked together; memory grows with it, the cost per row falls.",
    )
    batch_bytes: int = Field(
        default=64 * 1024**2,
        ge=1024,
        le=1024**3,
        description="Payload bytes of one batch, by the sizes of a sample (one larger row still goes, alone).",
    )
    max_batches: int = Field(
        default=64, ge=1, le=1_000, description="Batches of one run at most; what is left over waits for the next run."
    )
    # One INSERT a batch makes the fewest parts and merges: ClickHouse took 6.8 CPU seconds for 300,000 rows, with two 9.6.
    blocks_per_batch: int = Field(
        default=1, ge=1, le=16, description="INSERTs that carry one batch, sent at the same time."
    )
    # Renewed while a verb is at work (`core.lease`): a run whose process is gone holds its batches for no longer.
    lease_s: int = Field(
        default=45,
        ge=10,
        le=86_400,
        description="How long a run may hold a batch between two signs of life, in seconds; at least 300 where an executor gives the "
        "steps to several processes, because they wait for each other in a queue.",
    )
    insert_timeout_s: int = Field(
        default=60,
        ge=1,
        le=3_600,
        description="max_execution_time of one INSERT in ClickHouse, in seconds; it may be longer than lease_s.",
    )
    # A marking chunk is one binlog event group; 5,000 rows of images are a few megabytes.
    mark_rows: int = Field(
        default=5_000,
        ge=1,
        le=50_000,
        description="Rows stamped by one UPDATE; bounds the binary log's event groups and locks.",
    )
    mark_connections: int = Field(
        default=2,
        ge=1,
        le=16,
        description="UPDATEs that mark one batch at the same time, each on a connection of its own.",
    )
    # For a MySQL that has no room to spare; benchmarks/latency.py shows what the application notices without them.
    max_rows_per_second: int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="Rows marked per second at most, and so exported; 0 is as fast as the databases allow.",
    )
    mark_pause_ms: int = Field(
        default=0,
        ge=0,
        le=60_000,
        description="Rest after each UPDATE that marks rows, on its connection, in milliseconds.",
    )
    linger_s: int = Field(
        default=0,
        ge=0,
        le=6_000,
        description="How long a run stays, counted from its start, and drains what arrives; it leaves early when another "
        "drain is waiting. 0 ends with the backlog. Below max_runtime_seconds of dagster.yaml.",
    )
    linger_poll_ms: int = Field(
        default=500,
        ge=20,
        le=60_000,
        description="How often a run that stays looks for new rows, in milliseconds: each look is one short query.",
    )
    versions: Sequence[str] = Field(
        default_factory=lambda: tuple(VERSIONS),
        description="Payload versions to export; any other stays untouched and is counted.",
    )

    @field_validator("versions")
    @classmethod
    def _check_versions(cls, versions: Sequence[str]) -> Sequence[str]:
        if not versions or not all(version in VERSIONS for version in versions):
            raise ValueError(f"versions is {list(versions)}; choose from {list(VERSIONS)}")
        return tuple(versions)

    @property
    def inserts_s(self) -> int:
        """How long an INSERT can be at work after its run was allowed to send it."""
        return START_WITHIN_S + self.insert_timeout_s

    def for_one_process(self, one_process: bool) -> Limits:
        """These limits, with a lease that outlasts a queue where the steps are in several processes."""
        return self if one_process else self.with_values({"lease_s": max(self.lease_s, QUEUED_LEASE_S)})


class Thresholds(Settings):
    """What makes a run worth starting: this many rows, or the oldest this old, whichever comes first."""

    a_setting: ClassVar[str] = "a threshold of the sensor"

    rows: int = Field(default=10_000, ge=1, description="The sensor starts a drain at this many pending rows.")
    lag_s: float = Field(
        default=60.0, gt=0, description="The sensor starts a drain when the oldest pending row is this old, in seconds."
    )


class Targets(Settings):
    """Beyond these, asset checks, status and alerts report a problem."""

    a_setting: ClassVar[str] = "a target"

    lag_s: float = Field(
        default=300.0, ge=1, le=604_800, description="The oldest pending row may be this old, in seconds."
    )
    batch_open_minutes: float = Field(
        default=15.0, ge=1, le=10_080, description="A batch may be open, or unverified, this long."
    )
    reconcile_hours: float = Field(
        default=36.0, ge=1, le=8_760, description="Both stores are compared at least this often."
    )
    retention_days: float = Field(
        default=float(RETENTION_DAYS), ge=1, le=3_650, description="Exported rows stay in the outbox this long."
    )
    sweep_late_days: float = Field(default=2.0, ge=0, le=365, description="Days by which a sweep may be late.")
    dead_letters: float = Field(
        default=0.0, ge=0, le=1_000_000_000, description="Up to this many open dead letters are accepted."
    )
    unknown_rows: float = Field(
        default=0.0, ge=0, le=1_000_000_000, description="Up to this many rows of unknown versions are accepted."
    )


class Retention(Settings):
    """How long exported rows stay in the outbox, and their batches in the ledger."""

    a_setting: ClassVar[str] = "a setting of the sweep"

    outbox_days: float = Field(
        default=float(RETENTION_DAYS), ge=0, le=3_650, description="Exported rows stay this many days."
    )
    ledger_days: float = Field(
        default=400.0,
        ge=1,
        le=36_500,
        description="Batches keep their pks this many days; longer than ClickHouse's TTL.",
    )
    # A chunk is one transaction: its binary log and its locks stay as small as a marking chunk's.
    chunk_rows: int = Field(default=5_000, ge=1, le=50_000, description="Rows deleted by one transaction.")
    pause_s: float = Field(default=0.0, ge=0, le=60, description="Pause between two transactions, in seconds.")
    max_rows: int = Field(
        default=10_000_000,
        ge=1,
        le=10_000_000_000,
        description="Rows of one sweep at most; the rest waits for the next.",
    )

    @model_validator(mode="after")
    def _check_order(self) -> Self:
        if self.ledger_days < self.outbox_days:
            raise InvalidConfig(
                f"ledger_days is {self.ledger_days} and outbox_days is {self.outbox_days}: the record of a batch must stay "
                "longer than its rows"
            )
        return self


# ── environment variables ────────────────────────────────────────────────────────────────────────

PREFIX = "AUDITEXPORT_"
# The tests' own, with which a user starts them on other servers.
_OF_TESTS = f"{PREFIX}TEST_"
# Kubernetes gives each pod such variables for each Service of its namespace, which may be called auditexport-celery.
_OF_A_SERVICE = re.compile(r"_(SERVICE_HOST|SERVICE_PORT|PORT)(_[A-Z0-9_]+)?$")
_KEY = "the key `{}` of the file that AUDITEXPORT_OUTBOXES names, or of the component"
_RUN_LAUNCHER = "`{}` of run_launcher in dagster.yaml"
# Variables that earlier versions read, without the prefix, and what takes their place. One that ends in _ begins a family.
_SUCCESSORS = {
    "DRAIN": _KEY.format("drain"),
    "SENSOR_ROWS": _KEY.format("sensor_rows"),
    "SENSOR_LAG_S": _KEY.format("sensor_lag_s"),
    "TARGET_": _KEY.format("targets: {{{}: …}}"),
    "ALERT_": _KEY.format("alert_policy: {{{}: …}}"),
    "PAGE_URL": _KEY.format("page_url"),
    "CELERY_QUEUE": _KEY.format("celery_queue"),
    "CELERY_BROKER_URL": "Celery's own variable CELERY_BROKER_URL",
    "CELERY_RESULT_URL": "Celery's own variable CELERY_RESULT_BACKEND",
    "KUBERNETES_NAMESPACE": _RUN_LAUNCHER.format("job_namespace"),
    "KUBERNETES_IMAGE": _RUN_LAUNCHER.format("job_image"),
    "KUBERNETES_SERVICE_ACCOUNT": _RUN_LAUNCHER.format("service_account_name"),
    "KUBERNETES_ENV_SECRETS": _RUN_LAUNCHER.format("env_secrets"),
    "KUBERNETES_STORAGE_CLAIM": _RUN_LAUNCHER.format("volumes"),
    "KUBERNETES_MAX_CONCURRENT": "`execution: {config: {max_concurrent: …}}` in a run's configuration",
}


class Variables(Settings):
    """The environment variables: secrets, what differs between machines, and what Dagster needs with the definitions.

    A field's variable is its name in capitals behind AUDITEXPORT_. An empty variable counts as not set.
    """

    a_setting: ClassVar[str] = "a variable"

    mysql_url: str = Field(
        default="",
        repr=False,
        title="`mysql+pymysql://user:password@host:port/database`",
        description="The outbox's database.",
    )
    clickhouse_url: str = Field(
        default="",
        repr=False,
        title="`http[s]://user:password@host:port/database`",
        description="ClickHouse's HTTP interface; may end in [settings for replicas](clickhouse.md#which-one).",
    )
    heartbeat_url: str = Field(
        default="", repr=False, title="URL", description="Gets `/start`, success and `/fail` of each drain."
    )
    alert_webhook_url: str = Field(default="", repr=False, title="URL", description="Gets [alerts](alerts.md).")
    executor: str = Field(default="in_process", title="name", description="Where steps run: [executors](#executors).")
    outboxes: str = Field(
        default="", title="path", description="The file of outboxes, for the code server and the CLI."
    )
    outbox: str = Field(default="", title="name", description="The outbox of CLI commands, as `--outbox`.")
    # Redis cannot see that a worker died. A step that takes longer runs twice at once, which is safe and a waste. The run and
    # the workers need the same value, so it is no setting of a run. Celery's own default is an hour.
    celery_visibility_timeout_s: int = Field(
        default=900,
        ge=1,
        le=9_999_999,
        title="seconds",
        description="Redis gives a task to another worker after this time.",
    )
    mysqld: str = Field(default="", title="path", description="MySQL or MariaDB server that demo, dev and tests start.")
    embedded_clickhouse_password: str = Field(
        default="", repr=False, title="password", description="Set by demo, dev and tests for their own ClickHouse."
    )

    @classmethod
    def given_as(cls, field: str) -> str:
        return f"{PREFIX}{field.upper()}"

    @classmethod
    def from_environment(cls, environment: Mapping[str, str]) -> Self:
        """The variables that are set. Raises `InvalidConfig`, naming the variable, for a value that is out of bounds."""
        given = {name: environment.get(cls.given_as(name)) for name in cls.model_fields}
        return cls.model_validate_strings({name: text for name, text in given.items() if text}, strict=False)


def refuse_moved_variables(environment: Mapping[str, str]) -> None:
    """Raises `InvalidConfig` for variables that earlier versions read, with what takes their place."""
    moved = [
        f"{variable} is not read any more; use {successor}"
        for variable in _others(environment)
        if (successor := _successor(variable.removeprefix(PREFIX)))
    ]
    if moved:
        raise InvalidConfig("; ".join(moved))


def unknown_variables(environment: Mapping[str, str], named: Collection[str] = ()) -> str:
    """What is wrong with variables AUDITEXPORT_… that nothing reads, or an empty text. `named` are those that the file of
    outboxes names.
    """
    known = [Variables.given_as(name) for name in Variables.model_fields]
    parts = []
    for variable in _others(environment):
        if variable not in named:
            nearest = difflib.get_close_matches(variable, [*known, *named], n=1, cutoff=0.0)[0]
            parts.append(f"{variable} is not a variable of auditexport; the nearest is {nearest}")
    return "; ".join(parts)


def _others(environment: Mapping[str, str]) -> list[str]:
    """Variables with our prefix that are set and are none of ours."""
    known = {Variables.given_as(name) for name in Variables.model_fields}
    return sorted(
        variable
        for variable, text in environment.items()
        if text
        and variable.startswith(PREFIX)
        and not variable.startswith(_OF_TESTS)
        and variable not in known
        and not _OF_A_SERVICE.search(variable)
    )


def _successor(name: str) -> str | None:
    family = next((prefix for prefix in _SUCCESSORS if prefix.endswith("_") and name.startswith(prefix)), "")
    return _SUCCESSORS[family].format(name.removeprefix(family).lower()) if family else _SUCCESSORS.get(name)
