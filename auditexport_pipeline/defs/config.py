"""Run configuration: one `dg.Config` class for each job, whose values are checked when a run is launched.

The settings that the CLI has too are in `core.settings`.
"""

from __future__ import annotations

import types
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Union, get_args, get_origin

import dagster as dg
from pydantic import Field, model_validator

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.dead_letters import DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.settings import Limits, Retention, Settings, format_bounds
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.defs.executors import limits_here

if TYPE_CHECKING:
    from typing_extensions import Self


class Form(Settings, dg.Config):
    """Settings that an op takes as its config."""


def schema_of(form: type[Settings]) -> dict[str, dg.Field]:
    """The form as the launchpad shows it: each field with its default, bounds and description.

    The schema that Dagster makes of a `dg.Config` leaves the bounds out, and takes the name of a variable for any value.
    """
    schema: dict[str, dg.Field] = {}
    for name, field in form.model_fields.items():
        bounds = format_bounds(field)
        described = f"{field.description} {bounds[0].upper()}{bounds[1:]}." if bounds else field.description
        kind, default = _kind(field.annotation), field.get_default(call_default_factory=True)
        if field.is_required():
            schema[name] = dg.Field(kind, description=described)
        else:
            default = list(default) if isinstance(default, tuple) else default
            schema[name] = dg.Field(kind, description=described, default_value=default)
    return schema


def _kind(annotation: Any) -> Any:
    """Dagster's type for a field: a scalar, a list of one, or one that may be None."""
    arguments = get_args(annotation)
    if get_origin(annotation) in (Union, types.UnionType):
        return dg.Noneable(_kind(arguments[0]))
    return [arguments[0]] if arguments else annotation


def checked(op: dg.OpDefinition, name: str, form: type[Form]) -> dg.OpDefinition:
    """The op under this name, with a form whose values are checked at the launch: a wrong one refuses the run."""

    @dg.configured(op, config_schema=schema_of(form), name=name)
    def at_launch(settings: dict[str, Any]) -> dict[str, Any]:
        _refuse_unless(lambda given: form(**given), settings)
        return settings

    return at_launch


def _refuse_unless(check: Callable[[dict[str, Any]], object], settings: dict[str, Any]) -> None:
    try:
        check(settings)
    except InvalidConfig as error:
        raise dg.DagsterInvalidConfigError(str(error), [], settings) from None


# ── drain ────────────────────────────────────────────────────────────────────────────────────────


class DrainConfig(Limits, Form):
    """The limits of a drain, as each of its ops takes them."""

    # Of the types that Limits allows for it, the one that Dagster knows.
    versions: list[str] = Field(
        default_factory=lambda: list(VERSIONS), description=Limits.model_fields["versions"].description
    )


@dg.config_mapping(config_schema=schema_of(DrainConfig))
def drain_config(settings: dict[str, Any]) -> dict[str, Any]:
    """One flat form for the whole graph: without it the launchpad would ask for the same settings five times."""
    _refuse_unless(limits_here, settings)
    op = {"config": settings}
    return {
        "plan_batches": op,
        "export_batch": {"ops": {"fetch_batch": op, "write_clickhouse": op, "mark_exported": op}},
        "finish_export": op,
    }


# ── the other jobs ───────────────────────────────────────────────────────────────────────────────


class RequeueConfig(Form):
    """Which rows `requeue_events` requeues, who asks for it and why."""

    event_ids: list[str] = Field(default=[], description="Requeue these event ids.")
    workspace_id: str | None = Field(default=None, description="Only rows of this workspace.")
    from_event_ms: int | None = Field(default=None, description="Event time from, epoch milliseconds, inclusive.")
    to_event_ms: int | None = Field(default=None, description="Event time to, exclusive.")
    from_exported_ms: int | None = Field(
        default=None, description="Exported (`deleted_at`) from, epoch milliseconds, inclusive."
    )
    to_exported_ms: int | None = Field(default=None, description="Exported to, exclusive.")
    from_pk: int | None = Field(default=None, description="First pk of the outbox.")
    to_pk: int | None = Field(default=None, description="Last pk of the outbox.")
    batch_ids: list[int] = Field(default=[], description="Rows of these batches of the ledger.")
    missing_only: bool = Field(default=False, description="Only what ClickHouse lacks.")
    dry_run: bool = Field(default=False, description="Say what would be done, and change nothing.")
    who: str = Field(default="", description="Who wants this; empty: the run itself.")
    why: str = Field(description="Why; recorded with the action.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        self.rows().require_a_condition()
        Actor(who=self.who or "the run", why=self.why)
        return self

    def rows(self) -> RowFilter:
        """Raises `InvalidConfig` for a range without rows."""
        values = {name: getattr(self, name) for name in RowFilter.__dataclass_fields__}
        conditions: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return RowFilter(**conditions)


class SweepConfig(Retention, Form):
    """What `sweep_exported_rows` deletes."""

    ttl_days: float | None = Field(
        default=None,
        description="Where ClickHouse cannot evaluate the table's TTL: it keeps an entry this many days after `inserted_at`. "
        "Recorded; counts until the TTL reads otherwise.",
    )
    dry_run: bool = Field(default=False, description="Say what would be done, and change nothing.")
    who: str = Field(default="", description="Who wants this; empty: the run itself.")


class ReconcileConfig(Form):
    """Which exports `reconcile_audit_logs` compares, and what follows."""

    # A window beyond ten years is a mistake of units.
    days: float = Field(default=7.0, gt=0, le=3_650, description="Exports of this many days up to now.")
    from_ms: int | None = Field(
        default=None, description="Instead of `days`: first export from, epoch milliseconds, inclusive."
    )
    to_ms: int | None = Field(default=None, description="First export to, exclusive; empty: up to now.")
    others_write: bool = Field(
        default=False,
        description="Other writers fill audit_logs_raw_v1 too: count unknown entries, do not report them.",
    )
    repair: bool = Field(default=False, description="Requeue exactly what is missing.")
    dry_run: bool = Field(default=False, description="Record nothing of what is seen, and requeue nothing.")
    report_path: str | None = Field(
        default=None,
        description="Also write a report to this file (.html), on the machine that runs the job; replaced by "
        "the next run.",
    )
    who: str = Field(default="", description="Who wants this; empty: the run itself.")
    why: str = Field(default="reconciliation", description="Recorded with the repair.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.from_ms is not None and self.to_ms is not None and self.from_ms >= self.to_ms:
            raise InvalidConfig(f"from_ms is {self.from_ms} and to_ms is {self.to_ms}: the window is empty; swap them")
        if self.report_path:
            from auditexport_pipeline.report import page  # only when needed: imports are part of a run's latency

            page.check_path(Path(self.report_path))
        Actor(who=self.who or "the run", why=self.why)
        return self


class RetryConfig(Form):
    """Which dead letters `retry_dead_letters` means, who decides and why."""

    why: str = Field(description="What was fixed; recorded.")
    who: str = Field(default="", description="Who decides this; empty means this run.")
    workspace_id: str = Field(default="", description="Of one workspace; empty means any.")
    reason: str = Field(
        default="", description="As `auditexport dead-letters list` shows it, such as wrong_type; empty means any."
    )
    version: str = Field(default="", description="The payload's version; empty means any.")
    older_than_s: int = Field(default=0, ge=0, description="Set aside at least this many seconds ago.")
    pks: list[int] = Field(default=[], description="Of these rows.")
    discarded: bool = Field(default=False, description="Discarded letters instead of open ones.")
    everything: bool = Field(default=False, description="Every letter in that state: needed without a filter.")
    dry_run: bool = Field(default=True, description="Only say how many.")

    @model_validator(mode="after")
    def _check(self) -> Self:
        letters = self.letters()
        if letters.everything and not self.everything:
            raise InvalidConfig(f"no filter is given; set one, or `everything` for every {letters.state} dead letter")
        Actor(who=self.who or "the run", why=self.why)
        return self

    def letters(self) -> DeadLetterFilter:
        return DeadLetterFilter(
            state=LetterState.DISCARDED if self.discarded else LetterState.OPEN,
            workspace_id=self.workspace_id or None,
            reason=self.reason or None,
            version=self.version or None,
            older_than_s=self.older_than_s or None,
            pks=PkSet.of(sorted(set(self.pks))) if self.pks else None,
        )


class PurgeConfig(Form):
    """Which runs `purge_old_runs` deletes."""

    run_days: float = Field(default=30.0, ge=1, le=3_650, description="Finished runs stay this many days.")
    # A run a minute for more than a day: one purge a day keeps up with the busiest sensor.
    max_runs: int = Field(default=2_000, ge=1, le=100_000, description="Runs of one purge at most, oldest first.")
    dry_run: bool = Field(default=False, description="Say how many, and delete nothing.")
