"""The job `retry_dead_letters`: what `auditexport dead-letters retry` does, from the launchpad.

What belongs here: its configuration and its log line. What does not: discarding, which is left to the prompt,
where the letters are seen before they are given up; and what a retry is (`stores.dead_letters`).
"""

import dagster as dg
from pydantic import Field

from auditexport_pipeline.core.actions import By
from auditexport_pipeline.core.dead_letters import LetterState, Which
from auditexport_pipeline.core.errors import AuditExportError, InvalidConfig
from auditexport_pipeline.core.pks import PkSet
from auditexport_pipeline.defs.resources import MySQLResource
from auditexport_pipeline.stores import dead_letters


class RetryConfig(dg.Config):
    """Which letters, and who wants it; an empty filter means any."""

    why: str = Field(description="What was fixed; recorded.")
    who: str = Field(default="", description="Who decides this; empty means this run.")
    workspace_id: str = Field(default="", description="Of one workspace.")
    reason: str = Field(default="", description="As `auditexport dead-letters list` shows it, such as wrong_type.")
    version: str = Field(default="", description="The payload's version.")
    older_than_s: int = Field(default=0, ge=0, description="Set aside at least this many seconds ago.")
    pks: list[int] = Field(default=[], description="Of these rows.")
    discarded: bool = Field(default=False, description="Discarded letters instead of open ones.")
    everything: bool = Field(default=False, description="Every letter in that state: needed without a filter.")
    dry_run: bool = Field(default=True, description="Only say how many.")

    def which(self) -> Which:
        """The letters that are meant; raises `InvalidConfig` when none of the filters is given and `everything` is not."""
        which = Which(
            state=LetterState.DISCARDED if self.discarded else LetterState.OPEN,
            workspace_id=self.workspace_id or None,
            reason=self.reason or None,
            version=self.version or None,
            older_than_s=self.older_than_s or None,
            pks=PkSet.of(sorted(set(self.pks))) if self.pks else None,
        )
        if which.everything and not self.everything:
            raise InvalidConfig(f"no filter is given; set one, or `everything` for every {which.state} dead letter")
        return which


@dg.op(description="Lets the rows of dead letters go back to pending; the next drain tries them again.")
def retry_letters(context: dg.OpExecutionContext, config: RetryConfig, mysql: MySQLResource) -> None:
    try:
        which = config.which()
        by = By(who=config.who or f"Dagster run {context.run_id}", why=config.why)
        if config.dry_run:
            letters, gone = dead_letters.count(mysql.outbox(), which).letters, 0
            context.log.info(f"would be retried: {letters:,} dead letters; nothing was changed")
        else:
            acted = dead_letters.retry(mysql.outbox(), which, by)
            letters, gone = acted.changed, acted.gone
            context.log.info(f"retried: {letters:,} dead letters; {gone:,} are gone, their rows are no longer pending")
    except AuditExportError as error:
        raise dg.Failure(description=str(error)) from None
    context.add_output_metadata({"dead_letters": letters, "gone": gone, "dry_run": config.dry_run})


@dg.job(
    description="Lets the rows of dead letters go back to pending, after their cause was fixed. Dry run by default."
)
def retry_dead_letters() -> None:
    retry_letters()
