"""Where steps run: the executor that AUDITEXPORT_EXECUTOR names, put together from the environment.

What belongs here: the settings of each executor, what keeps a drain whole on it, and what of a drain it cannot carry out. What
does not: what a step does, and the processes themselves: Celery's workers load `celery_worker`, Kubernetes starts pods of our
image.

Every step may run again, anywhere and at any time: that is `core.export`'s doing. So a step that a worker took with it
into its death is simply given to another one, and these settings are about how soon. Broker URLs hold passwords; the
definitions hold the names of their variables only.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, ClassVar

import dagster as dg
from pydantic import Field, field_validator

from auditexport_pipeline import processes
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits, Settings
from auditexport_pipeline.defs.dagster_internals import PRELOADED
from auditexport_pipeline.outboxes import check_queue

EXECUTOR = "AUDITEXPORT_EXECUTOR"
BROKER_URL = "AUDITEXPORT_CELERY_BROKER_URL"
RESULT_URL = "AUDITEXPORT_CELERY_RESULT_URL"
VISIBILITY_TIMEOUT_S = "AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S"

# By what a broker's URL begins. Redis behind sentinels would want the name of its master, for which there is no setting.
REDIS = ("redis", "rediss")
RABBITMQ = ("amqp", "amqps", "pyamqp")
DEFAULT_QUEUE = "dagster"
# How often a worker looks for tasks whose time is over; with kombu's own settings it is every 100 s.
RESTORE_EVERY_S = 10
# RabbitMQ's consumer_timeout: it takes a delivery back that is not acknowledged after this long, and closes the channel.
RABBITMQ_DELIVERY_S = 1_800
# Celery's priorities are 0 to 9 and a task's is 5. With RabbitMQ the highest goes first, with Redis the lowest.
CELERY_PRIORITIES = 10
CELERY_PRIORITY = 5
# A finished Job and its pod's log stay for a day.
KEEP_JOBS_S = 86_400
# Names of Dagster's executors that have one process: the usual one, and that of `execute_in_process`.
_ONE_PROCESS = ("in_process", "execute_in_process_executor")
# Where the image has its DAGSTER_HOME (deploy/container/Containerfile).
STORAGE_PATH = "/var/lib/auditexport/storage"


class CelerySettings(Settings):
    """How steps come to Celery's workers."""

    a_setting: ClassVar[str] = "a setting of Celery"
    prefix: ClassVar[str] = "AUDITEXPORT_CELERY_"

    # Where Celery's own documentation and dagster-celery look for a broker.
    broker_url: str = Field(
        default="pyamqp://guest@localhost:5672//",
        repr=False,
        description="The broker's URL, or several with semicolons.",
    )
    result_url: str = Field(default="", repr=False, description="Where results are kept; empty: where the broker is.")
    queue: str = Field(default=DEFAULT_QUEUE, description="The queue that all outboxes share.")
    # Redis cannot see that a worker died; it gives a task to another one after this long. Longer than any step takes, or a
    # step runs twice at once, which is safe and a waste. Celery's own is an hour.
    visibility_timeout_s: int = Field(
        default=900,
        ge=1,
        le=9_999_999,
        description="After this long, in seconds, Redis gives a task to another worker.",
    )

    @field_validator("broker_url")
    @classmethod
    def _check_broker(cls, url: str) -> str:
        """Of these two it is known how they give a dead worker's task to another one, and which priority goes first."""
        # Without "://" there is no scheme, and what stands there may be a password.
        schemes = {part.partition("://")[0] if "://" in part else "" for part in url.split(";")}
        if not (schemes <= set(REDIS) or schemes <= set(RABBITMQ)):
            raise InvalidConfig(
                f"{BROKER_URL} must begin with {', '.join(REDIS)} (Redis) or {', '.join(RABBITMQ)} (RabbitMQ), and ://; "
                "several, with semicolons, are of one kind"
            )
        return url

    @field_validator("queue")
    @classmethod
    def _check_queue(cls, queue: str) -> str:
        return check_queue(queue, cls.variables()["queue"])

    @property
    def over_redis(self) -> bool:
        return self.broker_url.partition("://")[0] in REDIS

    @property
    def backend(self) -> str:
        """Redis is broker and keeper of results at once; RabbitMQ sends results as messages."""
        return self.result_url or (self.broker_url if self.over_redis else "rpc://")


class KubernetesSettings(Settings):
    """How steps become Jobs of Kubernetes. What is empty is as the run launcher has it."""

    a_setting: ClassVar[str] = "a setting of Kubernetes"
    prefix: ClassVar[str] = "AUDITEXPORT_KUBERNETES_"

    namespace: str = Field(default="", description="Namespace of the Jobs.")
    image: str = Field(default="", description="Image of the Jobs.")
    service_account: str = Field(default="", description="Service account of the Jobs.")
    env_secrets: str = Field(default="", description="Secrets whose keys are variables of the Jobs, with commas.")
    storage_claim: str = Field(default="", description="Claim of the volume with DAGSTER_HOME's storage.")
    # More than a handful of batches in flight only makes the databases wait for each other.
    max_concurrent: int = Field(default=4, ge=1, le=9_999_999, description="Steps of one run at once.")


def executor_of_environment() -> dg.ExecutorDefinition:
    """The executor for all our jobs, the implicit one included. Raises `InvalidConfig`, which names the variable."""
    name = os.environ.get(EXECUTOR) or "in_process"
    if name not in _EXECUTORS:
        *others, last = _EXECUTORS
        raise InvalidConfig(f"{EXECUTOR} is {name!r}; it must be {', '.join(others)} or {last}")
    return _EXECUTORS[name]()


def tags_of_step(level: int, queue: str) -> dict[str, str]:
    """Tags of an op whose steps go before those of a lower level, on every executor; on Celery through this queue, or, when it
    is empty, through the one that all share.
    """
    down = os.environ.get(EXECUTOR) == "celery" and CelerySettings.from_environment(os.environ).over_redis
    tags = {
        "dagster/priority": str(level),
        "dagster-celery/priority": str(CELERY_PRIORITY + (-level if down else level)),
    }
    return tags | {"dagster-celery/queue": queue} if queue else tags


def limits_here(settings: Mapping[str, Any]) -> Limits:
    """The limits with these settings. Raises `InvalidConfig`, naming the field, also for a run that would stay for longer than
    Celery's broker leaves a task with its worker: another one would be given it, again and again.
    """
    limits = Limits(**settings)
    if os.environ.get(EXECUTOR) != "celery" or not limits.linger_s:
        return limits
    celery = CelerySettings.from_environment(os.environ)
    if celery.over_redis:
        timeout_s = celery.visibility_timeout_s
        if limits.linger_s >= timeout_s:
            raise InvalidConfig(
                f"linger_s is {limits.linger_s} and {VISIBILITY_TIMEOUT_S} is {timeout_s}: Redis would give finish_export to a "
                f"second worker while the first one stays; set linger_s below {timeout_s}, or the variable above {limits.linger_s}"
            )
    elif limits.linger_s >= RABBITMQ_DELIVERY_S:
        raise InvalidConfig(
            f"linger_s is {limits.linger_s}: RabbitMQ takes a task back after {RABBITMQ_DELIVERY_S} s (its consumer_timeout), and "
            f"would give finish_export to one worker after the other; set linger_s below {RABBITMQ_DELIVERY_S}"
        )
    return limits


def in_one_process(context: dg.OpExecutionContext) -> bool:
    """Whether all steps of this run are done by this process; where that is not known, not."""
    if context.job_def.executor_def.name in _ONE_PROCESS:
        return True
    execution = context.run.run_config.get("execution")
    chosen = execution.get("config") if isinstance(execution, Mapping) else None
    return isinstance(chosen, Mapping) and "in_process" in chosen


def process_of(context: dg.OpExecutionContext) -> str:
    """The process that does all of this run, by whose death the next run sees that this one is over; empty where several do."""
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


# ── Celery ───────────────────────────────────────────────────────────────────────────────────────


def _celery() -> dg.ExecutorDefinition:
    """Steps as tasks of Celery. The configuration names variables, so no URL comes into Dagster's storage."""
    _extra("dagster_celery", "celery")
    executor = _extra("auditexport_pipeline.defs.celery_steps", "celery").celery_executor.configured(
        {
            "broker": {"env": BROKER_URL} if os.environ.get(BROKER_URL) else CelerySettings().broker_url,
            "backend": _backend(CelerySettings.from_environment(os.environ)),
            "config_source": celery_settings(),
        },
        name="celery",
    )
    assert isinstance(executor, dg.ExecutorDefinition)
    return executor


def _backend(celery: CelerySettings) -> str | dict[str, str]:
    """As `CelerySettings.backend`, by the name of the variable where it is a URL."""
    if celery.result_url:
        return {"env": RESULT_URL}
    return {"env": BROKER_URL} if celery.over_redis else celery.backend


def celery_app() -> Any:
    """Celery's app for the workers, with the settings that the executor has; `execute_plan` is registered on it."""
    executors = _extra("dagster_celery.executor", "celery")
    celery = CelerySettings.from_environment(os.environ)
    executor = executors.CeleryExecutor.for_cli(
        broker=celery.broker_url, backend=celery.backend, config_source=celery_settings()
    )
    app = importlib.import_module("dagster_celery.make_app").make_app(executor.app_args())
    importlib.import_module("dagster_celery.tasks").create_task(app)
    queue = celery.queue
    # dagster-celery declares its own only, and a worker without -q listens to those declared.
    if queue != DEFAULT_QUEUE:
        kombu = importlib.import_module("kombu")
        arguments = {"x-max-priority": CELERY_PRIORITIES}
        app.conf.task_queues = [kombu.Queue(queue, routing_key=f"{queue}.#", queue_arguments=arguments)]
    return app


def celery_settings() -> dict[str, Any]:
    """Celery's settings, the same for the run and for the workers."""
    celery = CelerySettings.from_environment(os.environ)
    timeout_s = celery.visibility_timeout_s
    # dagster-celery's, to which Redis's are added: without them a broker that is down would be asked for ever.
    transport: dict[str, Any] = {"max_retries": 3, "interval_start": 0, "interval_step": 0.2, "interval_max": 0.5}
    settings: dict[str, Any] = {
        "task_default_queue": celery.queue,
        # A task is done when its step is, not when a worker has it: otherwise a worker that dies takes the step with it,
        # and the run waits for it until run_monitoring ends the run.
        "task_acks_late": True,
        # A worker whose child was killed lives, and says that the task failed: a step that needs more memory than there is
        # must not go from one worker to the next without end.
        "task_reject_on_worker_lost": False,
        # One step at a time for each process: what waits behind a step waits in the queue, where others can take it.
        "worker_prefetch_multiplier": 1,
        # The broker gives the tasks of a worker that it lost to another: so the worker stops working on them.
        "worker_cancel_long_running_tasks_on_connection_loss": True,
        "broker_connection_retry_on_startup": True,
    }
    if celery.over_redis:
        redis = {"visibility_timeout": timeout_s}
        transport |= redis | {
            "unacked_restore_interval": min(RESTORE_EVERY_S, timeout_s),
            "unacked_restore_throttle": 1,
            "priority_steps": list(range(CELERY_PRIORITIES)),
        }
        settings |= {"result_backend_transport_options": redis, "visibility_timeout": timeout_s}
    return {**settings, "broker_transport_options": transport}


# ── Kubernetes ───────────────────────────────────────────────────────────────────────────────────


def _k8s() -> dg.ExecutorDefinition:
    """Each step as a Job of Kubernetes, beside what `K8sRunLauncher` in `dagster.yaml` gives every pod of a run."""
    executor = _extra("dagster_k8s", "k8s").k8s_job_executor.configured(kubernetes_settings(), name="k8s")
    assert isinstance(executor, dg.ExecutorDefinition)
    return executor


def kubernetes_settings() -> dict[str, Any]:
    """The configuration of `k8s_job_executor`. What is not set is as the run launcher has it."""
    kubernetes = KubernetesSettings.from_environment(os.environ)
    settings: dict[str, Any] = {
        "max_concurrent": kubernetes.max_concurrent,
        "step_k8s_config": {"job_spec_config": {"ttl_seconds_after_finished": KEEP_JOBS_S}},
    }
    given = {
        "job_namespace": kubernetes.namespace,
        "job_image": kubernetes.image,
        "service_account_name": kubernetes.service_account,
        "env_secrets": [name.strip() for name in kubernetes.env_secrets.split(",") if name.strip()],
    }
    settings |= {key: value for key, value in given.items() if value}
    if claim := kubernetes.storage_claim:
        settings["volumes"] = [{"name": "storage", "persistent_volume_claim": {"claim_name": claim}}]
        settings["volume_mounts"] = [{"name": "storage", "mount_path": STORAGE_PATH}]
    return settings


# ── for all ──────────────────────────────────────────────────────────────────────────────────────


def _extra(module: str, extra: str) -> ModuleType:
    """A module that an extra brings, imported only now. Raises `InvalidConfig` when the extra is not installed."""
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        raise InvalidConfig(
            f"{EXECUTOR} is {extra!r} and {error.name} is not installed: pip install 'auditexport-pipeline[{extra}]'"
        ) from None


_EXECUTORS: dict[str, Callable[[], dg.ExecutorDefinition]] = {
    "in_process": _in_process,
    "multiprocess": _multiprocess,
    "celery": _celery,
    "k8s": _k8s,
}
