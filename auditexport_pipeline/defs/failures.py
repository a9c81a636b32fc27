"""Translates our errors to Dagster's: which are retried, which fail the step, with which line. `core.errors` says what they mean."""

from __future__ import annotations

import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import dagster as dg

from auditexport_pipeline.core import retries
from auditexport_pipeline.core.errors import AuditExportError, BatchUnmarked, BatchWaits, LeaseLost, TransientError
from auditexport_pipeline.defs.resources import HeartbeatResource


@contextmanager
def dagster_errors(context: dg.OpExecutionContext, heartbeat: HeartbeatResource | None = None) -> Iterator[None]:
    """Retries a transient error with backoff and jitter; any other fails the step with one line.

    A lost lease is not retried: the batch has a new owner.

    Dagster stores an exception with all its causes, and a driver's message may quote a row. So the causes end here, and of an
    unforeseen exception Dagster stores only the type and the source lines.
    """
    try:
        yield
    except AuditExportError as error:
        error.__cause__ = None
        error.__context__ = None
        again = isinstance(error, TransientError) and not isinstance(error, LeaseLost)
        # The next run claims and marks what this run left unmarked; this step has no claim.
        if again and not isinstance(error, BatchUnmarked) and context.retry_number < retries.RETRIES:
            wait_s = retries.wait_s(context.retry_number)
            if isinstance(error, BatchWaits):
                wait_s = max(wait_s, error.wait_s)
            context.log.warning(f"{error} — trying again in {wait_s:.1f} s")
            raise dg.RetryRequested(max_retries=retries.RETRIES, seconds_to_wait=wait_s) from error
        if heartbeat is not None:
            heartbeat.fail()
        raise dg.Failure(
            description=str(error), metadata={"error": type(error).__name__, "rerun_helps": again}, allow_retries=False
        ) from error
    except Exception as error:
        if heartbeat is not None:
            heartbeat.fail()
        stack = traceback.extract_tb(error.__traceback__)
        raise dg.Failure(
            description=f"{type(error).__name__} at {Path(stack[-1].filename).name}:{stack[-1].lineno}, which is a defect "
            "of this program or of its surroundings. Its text is withheld, because it may quote an event; "
            "nothing is lost, the next run continues",
            metadata={"error": type(error).__name__, "stack": "".join(stack.format())},
            allow_retries=False,
        ) from None


@contextmanager
def in_one_line() -> Iterator[None]:
    """Fails a tick or a check with our error's own line, without its causes."""
    try:
        yield
    except AuditExportError as error:
        raise dg.Failure(description=str(error)) from None
