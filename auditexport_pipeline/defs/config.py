"""The launchpad: `core.limits.Limits` as a flat Dagster configuration, and forms whose values are checked at the launch.

What belongs here: turning the one table of limits into a schema, spreading its values over the ops, the forms of the other
jobs, and refusing a wrong value before a run starts. What does not: names, defaults, bounds and descriptions of a drain's
limits; those stand in `core.limits`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import dagster as dg
import msgspec

from auditexport_pipeline.core.actions import Actor, RowFilter
from auditexport_pipeline.core.dead_letters import DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.limits import Limits
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.core.sweep import Retention
from auditexport_pipeline.core.versions import VERSIONS
from auditexport_pipeline.defs.executors import limits_here
from auditexport_pipeline.defs.names import Names


def _schema() -> dict[str, dg.Field]:
    schema: dict[str, dg.Field] = {}
    for limit in fields(Limits):
        meaning = limit.metadata["meaning"]
        if limit.name == "versions":
            schema[limit.name] = dg.Field([str], default_value=list(VERSIONS), description=meaning)
        else:
            assert limit.default is not MISSING
            bounds = f" From {limit.metadata['low']:,} to {limit.metadata['high']:,}."
            schema[limit.name] = dg.Field(int, default_value=limit.default, description=meaning + bounds)
    return schema


DRAIN_SCHEMA = _schema()


@dg.config_mapping(config_schema=DRAIN_SCHEMA)
def drain_config(settings: dict[str, Any]) -> dict[str, Any]:
    """One flat form for the whole graph; a value out of bounds is refused before anything runs, by name."""
    _refuse_unless(limits_here, settings)
    op = {"config": settings}
    return {
        "plan_batches": op,
        "export_batch": {"ops": {"fetch_batch": op, "write_clickhouse": op, "mark_exported": op}},
        "finish_export": op,
    }


def checked(
    op: dg.OpDefinition, name: str, schema: Mapping[str, dg.Field], check: Callable[[Mapping[str, Any]], object]
) -> dg.OpDefinition:
    """The op under this name, with a form that `check` looks at when a run is launched: what it raises refuses the run."""

    @dg.configured(op, config_schema=dict(schema), name=name)
    def form(settings: dict[str, Any]) -> dict[str, Any]:
        _refuse_unless(check, settings)
        return settings

    return form


def _refuse_unless(check: Callable[[Mapping[str, Any]], object], settings: dict[str, Any]) -> None:
    try:
        check(settings)
    except InvalidConfig as error:
        raise dg.DagsterInvalidConfigError(str(error), [], settings) from None


def drain_settings(names: Names, given: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The run configuration of drains that nobody launches by hand: what was given to the definitions, or else
    AUDITEXPORT_DRAIN, the launchpad's form as JSON.

    Read at every tick; raises `InvalidConfig`, naming the field, for what the launchpad would refuse.
    """
    settings = dict(given) if given is not None else _drain_of_environment()
    limits_here(settings)
    return {"ops": {names.node: {"config": settings}}} if settings else {}


def _drain_of_environment() -> dict[str, Any]:
    text = os.environ.get("AUDITEXPORT_DRAIN", "")
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as error:
        raise InvalidConfig(
            f"AUDITEXPORT_DRAIN is no JSON object of a drain's settings ({error}); write it as "
            '{"linger_s": 900, "max_rows_per_second": 5000}'
        ) from None


# ── the forms of the other jobs ───────────────────────────────────────────────────────────────────────

_WHO = dg.Field(str, default_value="", description="Who wants this; empty: the run itself.")
_DRY_RUN = dg.Field(bool, default_value=False, description="Say what would be done, and change nothing.")
# A window of reconciliation beyond this is a mistake of units.
LONGEST_WINDOW_DAYS = 3_650


def _optional(kind: Any, meaning: str) -> dg.Field:
    return dg.Field(dg.Noneable(kind), default_value=None, description=meaning)


# ── requeue ───────────────────────────────────────────────────────────────────────────────────────────

REQUEUE = {
    "event_ids": dg.Field([str], default_value=[], description="These events."),
    "workspace_id": _optional(str, "Of this workspace."),
    "from_event_ms": _optional(int, "Event time from, epoch milliseconds, inclusive."),
    "to_event_ms": _optional(int, "Event time to, exclusive."),
    "from_exported_ms": _optional(int, "Exported (`deleted_at`) from, epoch milliseconds, inclusive."),
    "to_exported_ms": _optional(int, "Exported to, exclusive."),
    "from_pk": _optional(int, "First pk of the outbox."),
    "to_pk": _optional(int, "Last pk of the outbox."),
    "batch_ids": dg.Field([int], default_value=[], description="Rows of these batches of the ledger."),
    "missing_only": dg.Field(bool, default_value=False, description="Only what ClickHouse lacks."),
    "dry_run": _DRY_RUN,
    "who": _WHO,
    "why": dg.Field(str, description="Why; it is kept with the action."),
}


def rows_of(settings: Mapping[str, Any]) -> RowFilter:
    values = {name: settings[name] for name in RowFilter.__dataclass_fields__}
    conditions: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    wanted = RowFilter(**conditions)
    wanted.refuse_everything()
    return wanted


def check_requeue(settings: Mapping[str, Any]) -> None:
    rows_of(settings)
    Actor(who=settings["who"] or "the run", why=settings["why"])


# ── sweep ─────────────────────────────────────────────────────────────────────────────────────────────

_DEFAULTS = Retention()
SWEEP = {
    "outbox_days": dg.Field(
        float,
        default_value=_DEFAULTS.outbox_days,
        description="Exported rows stay this many days. From 0 to 3,650.",
    ),
    "ledger_days": dg.Field(
        float,
        default_value=_DEFAULTS.ledger_days,
        description="Batches keep their pks this many days; longer than ClickHouse's TTL. From 1 to 36,500.",
    ),
    "chunk_rows": dg.Field(
        int, default_value=_DEFAULTS.chunk_rows, description="Rows deleted by one transaction. From 1 to 50,000."
    ),
    "pause_s": dg.Field(
        float, default_value=_DEFAULTS.pause_s, description="Seconds between two of them. From 0 to 60."
    ),
    "max_rows": dg.Field(
        int, default_value=_DEFAULTS.max_rows, description="Rows of one sweep at most; the rest waits for the next."
    ),
    "ttl_days": _optional(
        float,
        "Where ClickHouse cannot evaluate the table's TTL: it keeps an entry this many days after `inserted_at`. Recorded; "
        "counts until the TTL reads otherwise.",
    ),
    "dry_run": _DRY_RUN,
    "who": _WHO,
}


def retention_of(settings: Mapping[str, Any]) -> Retention:
    return Retention(**{name: settings[name] for name in Retention.__dataclass_fields__})


# ── reconcile ─────────────────────────────────────────────────────────────────────────────────────────

RECONCILE = {
    "days": dg.Field(float, default_value=7.0, description="Exports of this many days up to now. Up to 3,650."),
    "from_ms": _optional(int, "Instead of `days`: first export from, epoch milliseconds, inclusive."),
    "to_ms": _optional(int, "First export to, exclusive; empty: up to now."),
    "others_write": dg.Field(
        bool,
        default_value=False,
        description="Somebody else fills audit_logs_raw_v1 as well: count and do not accuse.",
    ),
    "repair": dg.Field(bool, default_value=False, description="Requeue exactly what is missing."),
    "dry_run": dg.Field(bool, default_value=False, description="Record nothing of what is seen, and requeue nothing."),
    "report_path": _optional(
        str,
        "Also write the page for people to this file (.html), on the machine that runs the job; one page, replaced by the "
        "next run.",
    ),
    "who": _WHO,
    "why": dg.Field(str, default_value="reconciliation", description="Kept with the repair."),
}


def check_window(settings: Mapping[str, Any]) -> None:
    first, last = settings["from_ms"], settings["to_ms"]
    if not 0 < settings["days"] <= LONGEST_WINDOW_DAYS:
        raise InvalidConfig(f"days is {settings['days']:g}; it must be above 0, and {LONGEST_WINDOW_DAYS:,} at most")
    if first is not None and last is not None and first >= last:
        raise InvalidConfig(f"from_ms is {first} and to_ms is {last}: the window is empty; swap them")
    if settings["report_path"]:
        from auditexport_pipeline.report import page  # only for who wants one: a run's start-up is part of its latency

        page.check_path(Path(settings["report_path"]))
    Actor(who=settings["who"] or "the run", why=settings["why"])


# ── retry dead letters ────────────────────────────────────────────────────────────────────────────────

RETRY = {
    "why": dg.Field(str, description="What was fixed; recorded."),
    "who": dg.Field(str, default_value="", description="Who decides this; empty means this run."),
    "workspace_id": dg.Field(str, default_value="", description="Of one workspace; empty means any."),
    "reason": dg.Field(
        str,
        default_value="",
        description="As `auditexport dead-letters list` shows it, such as wrong_type; empty: any.",
    ),
    "version": dg.Field(str, default_value="", description="The payload's version; empty means any."),
    "older_than_s": dg.Field(int, default_value=0, description="Set aside at least this many seconds ago. From 0."),
    "pks": dg.Field([int], default_value=[], description="Of these rows."),
    "discarded": dg.Field(bool, default_value=False, description="Discarded letters instead of open ones."),
    "everything": dg.Field(
        bool, default_value=False, description="Every letter in that state: needed without a filter."
    ),
    "dry_run": dg.Field(bool, default_value=True, description="Only say how many."),
}


def letters_of(settings: Mapping[str, Any]) -> DeadLetterFilter:
    """The letters that are meant; raises `InvalidConfig` when none of the filters is given and `everything` is not."""
    if settings["older_than_s"] < 0:
        raise InvalidConfig(f"older_than_s is {settings['older_than_s']}; it must be 0 or more")
    which = DeadLetterFilter(
        state=LetterState.DISCARDED if settings["discarded"] else LetterState.OPEN,
        workspace_id=settings["workspace_id"] or None,
        reason=settings["reason"] or None,
        version=settings["version"] or None,
        older_than_s=settings["older_than_s"] or None,
        pks=PkSet.of(sorted(set(settings["pks"]))) if settings["pks"] else None,
    )
    if which.everything and not settings["everything"]:
        raise InvalidConfig(f"no filter is given; set one, or `everything` for every {which.state} dead letter")
    return which


def check_retry(settings: Mapping[str, Any]) -> None:
    letters_of(settings)
    Actor(who=settings["who"] or "the run", why=settings["why"])


# ── purge ─────────────────────────────────────────────────────────────────────────────────────────────

RUN_DAYS = 30.0
# A run a minute for more than a day: one purge a day keeps up with the busiest sensor.
MAX_RUNS = 2_000
PURGE = {
    "run_days": dg.Field(
        float, default_value=RUN_DAYS, description="Finished runs stay this many days. From 1 to 3,650."
    ),
    "max_runs": dg.Field(
        int, default_value=MAX_RUNS, description="Runs of one purge at most, oldest first. From 1 to 100,000."
    ),
    "dry_run": dg.Field(bool, default_value=False, description="Say how many, and delete nothing."),
}


def check_purge(settings: Mapping[str, Any]) -> None:
    for name, low, high in (("run_days", 1, 3_650), ("max_runs", 1, 100_000)):
        if not low <= settings[name] <= high:
            raise InvalidConfig(f"{name} is {settings[name]:g}; it must be from {low:,} to {high:,}")
