"""Where steps run: the executor that AUDITEXPORT_EXECUTOR names, and what a drain needs on it.

A step may run again, anywhere and at any time (`core.export`). So these settings decide only how soon another worker takes
over a lost step. Broker URLs hold passwords: definitions hold the names of their variables.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import dagster as dg

from auditexport_pipeline import processes
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits, Variables
from auditexport_pipeline.defs.dagster_internals import PRELOADED

# Celery's own variables.
BROKER_URL = "CELERY_BROKER_URL"
RESULT_BACKEND = "CELERY_RESULT_BACKEND"
# Where Celery's own documentation and dagster-celery expect a broker.
DEFAULT_BROKER_URL = "pyamqp://guest@localhost:5672//"
# By what a broker's URL begins. Redis behind sentinels would need the name of its master, for which there is no setting.
REDIS = ("redis", "rediss")
RABBITMQ = ("amqp", "amqps", "pyamqp")
# RabbitMQ's consumer_timeout: it takes a delivery back that is not acknowledged after this long, and closes the channel.
RABBITMQ_DELIVERY_S = 1_800
# Celery's priorities are 0 to 9 and a task's is 5. With RabbitMQ the highest goes first, with Redis the lowest.
CELERY_PRIORITY = 5
# Names of Dagster's executors that have one process: the usual one, and that of `execute_in_process`.
_ONE_PROCESS = ("in_process", "execute_in_process_executor")
# Jobs of one run at once. With more batches in flight the databases only wait for each other.
KUBERNETES_JOBS = 4


def executor_of_environment() -> dg.ExecutorDefinition:
    """The executor for all our jobs, the implicit one included. Raises `InvalidConfig`, which names the variable."""
    name = Variables.from_environment(os.environ).executor
    if name not in _EXECUTORS:
        *others, last = _EXECUTORS
        raise InvalidConfig(f"AUDITEXPORT_EXECUTOR is {name!r}; it must be {', '.join(others)} or {last}")
    return _EXECUTORS[name]()


def in_one_process(context: dg.OpExecutionContext) -> bool:
    """Whether this process does all steps of this run; False where that is not known."""
    if context.job_def.executor_def.name in _ONE_PROCESS:
        return True
    execution = context.run.run_config.get("execution")
    chosen = execution.get("config") if isinstance(execution, Mapping) else None
    return isinstance(chosen, Mapping) and "in_process" in chosen


def process_of(context: dg.OpExecutionContext) -> str:
    """The process that does all of this run; empty where several do. If it is gone, the next run takes over at once."""
    return processes.this_process() if in_one_process(context) else ""


def limits_of(context: dg.OpExecutionContext, config: Limits) -> Limits:
    """The limits that a step was given, with a lease that outlasts the queue of this run's executor."""
    return Limits(**dict(config)).for_one_process(in_one_process(context))


def _in_process() -> dg.ExecutorDefinition:
    return dg.in_process_executor


def _multiprocess() -> dg.ExecutorDefinition:
    return dg.multiprocess_executor.configured(
        {"start_method": {"forkserver": {"preload_modules": ["auditexport_pipeline.definitions", *PRELOADED]}}},
        name="multiprocess",
    )


def _celery() -> dg.ExecutorDefinition:
    _extra("dagster_celery", "celery")
    executor: dg.ExecutorDefinition = _extra("auditexport_pipeline.defs.celery_steps", "celery").executor()
    return executor


def _k8s() -> dg.ExecutorDefinition:
    """Each step as a Job of Kubernetes, with what `K8sRunLauncher` in `dagster.yaml` gives the pods of runs."""
    field = dg.Field(int, default_value=KUBERNETES_JOBS, description="Jobs of one run at once.")
    executor: dg.ExecutorDefinition = _extra("dagster_k8s", "k8s").k8s_job_executor.configured(
        lambda settings: settings, config_schema={"max_concurrent": field}, name="k8s"
    )
    return executor


def _extra(module: str, extra: str) -> ModuleType:
    """A module that an extra brings. Raises `InvalidConfig` when the extra is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"AUDITEXPORT_EXECUTOR is {extra!r} and {error.name} is not installed: pip install 'auditexport-pipeline[{extra}]'"
        ) from None


_EXECUTORS: dict[str, Callable[[], dg.ExecutorDefinition]] = {
    "in_process": _in_process,
    "multiprocess": _multiprocess,
    "celery": _celery,
    "k8s": _k8s,
}


# ── what Celery's broker asks of definitions; the extra is not needed for it ─────────────────────


def broker_url() -> str:
    """The URL of Celery's broker. Raises `InvalidConfig`, without the URL, for a broker that is neither Redis nor RabbitMQ: it
    is not known how another one gives a dead worker's task away, and which priority goes first.
    """
    url = os.environ.get(BROKER_URL) or DEFAULT_BROKER_URL
    # Without "://" there is no scheme, and the text may be a password.
    schemes = {part.partition("://")[0] if "://" in part else "" for part in url.split(";")}
    if not (schemes <= set(REDIS) or schemes <= set(RABBITMQ)):
        raise InvalidConfig(
            f"{BROKER_URL} must begin with {', '.join(REDIS)} (Redis) or {', '.join(RABBITMQ)} (RabbitMQ), and ://; "
            "several, with semicolons, are of one kind"
        )
    return url


def over_redis() -> bool:
    """Whether Redis is Celery's broker; raises as `broker_url` does."""
    return broker_url().partition("://")[0] in REDIS


def visibility_timeout_s() -> int:
    """After how long Redis gives a task to another worker."""
    return Variables.from_environment(os.environ).celery_visibility_timeout_s


def tags_of_step(level: int, queue: str) -> dict[str, str]:
    """Tags of an op whose steps go before those of a lower level, on every executor. On Celery they go through this queue;
    an empty one is the queue that all share.
    """
    down = os.environ.get("AUDITEXPORT_EXECUTOR") == "celery" and over_redis()
    tags = {
        "dagster/priority": str(level),
        "dagster-celery/priority": str(CELERY_PRIORITY + (-level if down else level)),
    }
    return tags | {"dagster-celery/queue": queue} if queue else tags


def limits_here(settings: Mapping[str, Any]) -> Limits:
    """The limits with these settings. Raises `InvalidConfig`, naming the field. Refuses a run that stays for longer than
    Celery's broker leaves a task with its worker: the broker would give the task to one worker after the other.
    """
    limits = Limits(**settings)
    if os.environ.get("AUDITEXPORT_EXECUTOR") != "celery" or not limits.linger_s:
        return limits
    if over_redis():
        timeout_s = visibility_timeout_s()
        if limits.linger_s >= timeout_s:
            raise InvalidConfig(
                f"linger_s is {limits.linger_s} and AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S is {timeout_s}: Redis would give "
                "finish_export to a second worker while the first one stays; set linger_s below "
                f"{timeout_s}, or the variable above {limits.linger_s}"
            )
    elif limits.linger_s >= RABBITMQ_DELIVERY_S:
        raise InvalidConfig(
            f"linger_s is {limits.linger_s}: RabbitMQ takes a task back after {RABBITMQ_DELIVERY_S} s (its consumer_timeout), and "
            f"would give finish_export to one worker after the other; set linger_s below {RABBITMQ_DELIVERY_S}"
        )
    return limits
