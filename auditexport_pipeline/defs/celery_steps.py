"""Celery's executor, with an end for runs that lost a task.

What belongs here: what becomes of a task that failed outside of its step: its worker's child was killed, the worker has
other variables or other code than the run, or the broker does not answer. What does not: settings (`defs.executors`, which
alone imports this, because it needs the extra), and steps that fail by themselves, of which Dagster's own events tell.

dagster-celery's loop keeps such an error to itself and waits for the steps that can no longer come, at full speed and
without end (0.29.27, `core_celery_execution_loop`: `if stopping or step_errors: continue`). Here it is the step's failure:
what depends on it is skipped, the run fails, and the next run continues. So does Kubernetes' executor. The loop, the submission of a
task and the schema are imported from dagster-celery's modules, which do not call them public (0.29.27): the alternative is a copy.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from dagster_celery import celery_executor as their_executor
from dagster_celery.core_execution_loop import core_celery_execution_loop
from dagster_celery.executor import CELERY_CONFIG, _submit_task
from kombu.exceptions import OperationalError

from auditexport_pipeline.core.errors import BrokerUnavailable
from auditexport_pipeline.defs.dagster_internals import failure_of_step
from auditexport_pipeline.defs.executors import BROKER_URL, RESULT_URL

# Those who speak to a broker, and raise errors of their own in the place of a socket's.
CLIENTS = ("amqp", "redis")
# What Celery raises, as a RuntimeError, when Redis keeps its results and did not answer for some twenty seconds.
LOST_RESULTS = "trying to reconnect to the Celery result"


@contextmanager
def _told_of_the_broker() -> Iterator[None]:
    """Raises `BrokerUnavailable`, without a URL, for what a broker or a keeper of results that is away makes Celery raise."""
    try:
        yield
    except Exception as error:
        client = type(error).__module__.partition(".")[0] in CLIENTS
        if not (client or isinstance(error, (OSError, OperationalError)) or LOST_RESULTS in str(error)):
            raise
        kind = type(error.__cause__ or error).__name__
        raise BrokerUnavailable(
            f"Celery's broker, which {BROKER_URL} names, or where {RESULT_URL} has the results, is not reachable ({kind}). "
            "Nothing is lost: start it, or mend the variable, and run again"
        ) from None


class _Task:
    """A step's task, whose failure is the step's."""

    def __init__(self, result: AsyncResult, step_context: Any) -> None:
        self._result = result
        self._step_context = step_context

    def ready(self) -> bool:
        with _told_of_the_broker():
            return bool(self._result.ready())

    def revoke(self) -> None:
        self._result.revoke()

    def get(self) -> list[str]:
        """The step's events, serialized. Raises `TaskRevokedError`, which the loop understands."""
        try:
            events: list[str] = self._result.get()
        except TaskRevokedError:
            raise
        except Exception:
            return [dg.serialize_value(failure_of_step(self._step_context))]
        return events


def _submit(app: Any, plan_context: Any, step: Any, queue: str, priority: int, known_state: Any) -> _Task:
    with _told_of_the_broker():
        task = _submit_task(app, plan_context, step, queue, priority, known_state)
    return _Task(task, plan_context.for_step(step))


class _CeleryExecutor(dg.Executor):
    """dagster-celery's executor, with its loop over tasks of ours."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs

    @property
    def retries(self) -> Any:
        return self._theirs.retries

    def app_args(self) -> Any:
        """What the loop makes Celery's app of."""
        return self._theirs.app_args()

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        events: Iterator[dg.DagsterEvent] = core_celery_execution_loop(
            plan_context, execution_plan, step_execution_fn=_submit
        )
        return events


@dg.executor(name="celery", config_schema=CELERY_CONFIG, requirements=dg.multiple_process_executor_requirements())
def celery_executor(init_context: dg.InitExecutorContext) -> dg.Executor:
    """dagster-celery's executor, as it is configured there, with the end that is missing there."""
    create: Any = their_executor.executor_creation_fn
    return _CeleryExecutor(create(init_context))
