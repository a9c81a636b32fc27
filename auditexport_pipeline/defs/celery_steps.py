"""Steps on Celery: the executor of the run, and the app of the workers, with the same settings.

This module needs the extra `celery`; `defs.executors` imports it when that executor is chosen.

dagster-celery's loop keeps an error of a task that failed outside of its step (the worker's child was killed, or has other
variables or other code than the run), and waits without end for steps that can no longer come (0.29.27,
`core_celery_execution_loop`: `if stopping or step_errors: continue`). Here such an error is the step's failure: the steps that
depend on it are skipped, the run fails, and the next run continues. Kubernetes' executor does the same. The loop, the submission of
a task and the schema are not public in dagster-celery (0.29.27): the alternative is a copy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import dagster as dg
from celery import Celery
from celery.exceptions import TaskRevokedError
from celery.result import AsyncResult
from dagster_celery import celery_executor as their_executor
from dagster_celery.core_execution_loop import core_celery_execution_loop
from dagster_celery.executor import CELERY_CONFIG, CeleryExecutor, _submit_task
from dagster_celery.make_app import make_app
from dagster_celery.tasks import create_task
from kombu.exceptions import OperationalError

from auditexport_pipeline.core.errors import BrokerUnavailable
from auditexport_pipeline.defs.dagster_internals import failure_of_step
from auditexport_pipeline.defs.executors import (
    BROKER_URL,
    DEFAULT_BROKER_URL,
    RESULT_BACKEND,
    broker_url,
    over_redis,
    visibility_timeout_s,
)

# Clients of brokers, which raise errors of their own in place of a socket's.
CLIENTS = ("amqp", "redis")
# What Celery raises, as a RuntimeError, when Redis has its results and did not answer for some twenty seconds.
LOST_RESULTS = "trying to reconnect to the Celery result"
# How often a worker looks for tasks whose time is over; with kombu's own settings it is every 100 s.
RESTORE_EVERY_S = 10


def settings() -> dict[str, Any]:
    """Celery's settings, the same for the run and for the workers."""
    # dagster-celery's, to which Redis's are added. Without them the client would retry without end while a broker is down.
    transport: dict[str, Any] = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}
    common: dict[str, Any] = {
        "task_default_queue": "dagster",
        # A task is done when its step is, not when a worker has it. Otherwise the step of a worker that dies is lost, and the run
        # waits for it until run_monitoring ends the run.
        "task_acks_late": True,
        # A worker whose child was killed lives, and reports the task as failed. A step that needs too much memory must not go from
        # one worker to the next without end.
        "task_reject_on_worker_lost": False,
        # One step at a time for each process: other steps wait in the queue, where other workers can take them.
        "worker_prefetch_multiplier": 1,
        # The broker gives the tasks of a worker that it lost to another. So the worker stops working on them.
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "broker_connection_retry_on_startup": True,
    }
    if over_redis():
        timeout_s = visibility_timeout_s()
        redis = {"visibility_timeout": timeout_s}
        transport |= redis | {
            "unacked_restore_interval": min(RESTORE_EVERY_S, timeout_s),
            "unacked_restore_throttle": 1,
            "priority_steps": list(range(10)),
        }
        common |= {"result_backend_transport_options": redis, "visibility_timeout": timeout_s}
    return {**common, "broker_transport_options": transport}


def _url(variable: str, default: str) -> str | dict[str, str]:
    """By its variable where that is set, so that no URL comes into Dagster's storage."""
    return {"env": variable} if os.environ.get(variable) else default


def executor() -> dg.ExecutorDefinition:
    """Steps as tasks of Celery. Redis also has the results; RabbitMQ sends them as messages."""
    results = _url(BROKER_URL, "") if over_redis() else "rpc://"
    return _celery_executor.configured(
        {
            "broker": _url(BROKER_URL, DEFAULT_BROKER_URL),
            "backend": {"env": RESULT_BACKEND} if os.environ.get(RESULT_BACKEND) else results,
            "config_source": settings(),
        },
        name="celery",
    )


def app() -> Celery:
    """Celery's app for the workers; `execute_plan` is registered on it."""
    url = broker_url()
    backend = os.environ.get(RESULT_BACKEND) or (url if over_redis() else "rpc://")
    made = make_app(CeleryExecutor.for_cli(broker=url, backend=backend, config_source=settings()).app_args())
    create_task(made)
    return made


@contextmanager
def _broker_errors() -> Iterator[None]:
    """Raises `BrokerUnavailable`, without a URL, for what Celery raises when the broker or the results' store is away."""
    try:
        yield
    except Exception as error:
        client = type(error).__module__.partition(".")[0] in CLIENTS
        if not (client or isinstance(error, (OSError, OperationalError)) or LOST_RESULTS in str(error)):
            raise
        kind = type(error.__cause__ or error).__name__
        raise BrokerUnavailable(
            f"Celery's broker ({BROKER_URL}), or the store of its results ({RESULT_BACKEND}), is not reachable ({kind}). "
            "Nothing is lost: start it, or correct the variable, and run again"
        ) from None


class _Task:
    """A step's task, whose failure is the step's."""

    def __init__(self, result: AsyncResult, step_context: Any) -> None:
        self._result = result
        self._step_context = step_context

    def ready(self) -> bool:
        with _broker_errors():
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
    with _broker_errors():
        task = _submit_task(app, plan_context, step, queue, priority, known_state)
    return _Task(task, plan_context.for_step(step))


class _CeleryExecutor(dg.Executor):
    """dagster-celery's executor, with its loop over tasks of ours."""

    def __init__(self, theirs: Any) -> None:
        self._theirs = theirs
        self.app_args = theirs.app_args  # for the loop

    @property
    def retries(self) -> Any:
        return self._theirs.retries

    def execute(self, plan_context: Any, execution_plan: Any) -> Iterator[dg.DagsterEvent]:
        events: Iterator[dg.DagsterEvent] = core_celery_execution_loop(
            plan_context, execution_plan, step_execution_fn=_submit
        )
        return events


@dg.executor(name="celery", config_schema=CELERY_CONFIG, requirements=dg.multiple_process_executor_requirements())
def _celery_executor(init_context: dg.InitExecutorContext) -> dg.Executor:
    create: Any = their_executor.executor_creation_fn
    return _CeleryExecutor(create(init_context))
