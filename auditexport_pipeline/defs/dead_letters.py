"""The job `retry_dead_letters`: what `auditexport dead-letters retry` does, from the launchpad.

What belongs here: its configuration and its log line. What does not: discarding, which is left to the prompt,
where the letters are seen before they are given up; and what a retry is (`mysql.dead_letters`).
"""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from auditexport_pipeline.core.actions import Actor
from auditexport_pipeline.core.dead_letters import DeadLetterFilter, LetterState
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.defs.config import checked
from auditexport_pipeline.defs.failures import in_one_line
from auditexport_pipeline.defs.names import Names
from auditexport_pipeline.mysql import dead_letters

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


def _which(settings: Mapping[str, Any]) -> DeadLetterFilter:
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


def _check(settings: Mapping[str, Any]) -> None:
    _which(settings)
    Actor(who=settings["who"] or "the run", why=settings["why"])


def retry_job(names: Names) -> dg.JobDefinition:
    """`retry_dead_letters`."""

    @dg.op(
        config_schema=RETRY,
        required_resource_keys={names.mysql},
        description="Lets the rows of dead letters go back to pending; the next drain tries them again.",
    )
    def retry_letters(context: dg.OpExecutionContext) -> None:
        settings = context.op_config
        with in_one_line():
            which = _which(settings)
            by = Actor(who=settings["who"] or f"Dagster run {context.run_id}", why=settings["why"])
            outbox = names.mysql_of(context).outbox()
            if settings["dry_run"]:
                letters, gone = dead_letters.count(outbox, which).letters, 0
                context.log.info(f"would be retried: {letters:,} dead letters; nothing was changed")
            else:
                acted = dead_letters.retry(outbox, which, by)
                letters, gone = acted.changed, acted.gone
                context.log.info(
                    f"retried: {letters:,} dead letters; {gone:,} are gone, their rows are no longer pending"
                )
        context.add_output_metadata({"dead_letters": letters, "gone": gone, "dry_run": settings["dry_run"]})

    form = checked(retry_letters, names.of("retry_letters"), RETRY, _check).alias("retry_letters")

    @dg.job(
        name=names.of("retry_dead_letters"),
        description="Lets the rows of dead letters go back to pending, after their cause was fixed. Dry run by default.",
    )
    def retry_dead_letters() -> None:
        form()

    return retry_dead_letters
