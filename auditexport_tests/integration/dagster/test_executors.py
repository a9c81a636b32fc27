"""The executors, put together from the environment: chosen, refused, configured, and without secrets.

What belongs here: what shows without workers or a cluster. What does not: steps on Celery (`e2e/test_celery.py`) and as Jobs
(`e2e/test_kubernetes.py`).
"""

from __future__ import annotations

import subprocess
import sys

import dagster as dg
import pytest

from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.definitions import build_defs
from auditexport_pipeline.defs import celery_steps
from auditexport_pipeline.defs.alerts import failure_of
from auditexport_pipeline.defs.build import build_audit_export_defs, defs_of
from auditexport_pipeline.outboxes import OutboxSettings
from auditexport_tests.conftest import Stack
from auditexport_tests.integration.dagster.conftest import ROOT, Exporter, events, everything_once, launchpad, ledger

EXECUTORS = ("in_process", "multiprocess", "celery", "k8s")
EXTRAS = {"celery": "dagster_celery", "k8s": "dagster_k8s"}
SECRET = "redis://:not_for_any_eye@127.0.0.1:1/0"


def _chosen(monkeypatch: pytest.MonkeyPatch, executor: str, **environment: str) -> dg.Definitions:
    monkeypatch.setenv("AUDITEXPORT_EXECUTOR", executor)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    return build_defs()


@pytest.mark.parametrize("executor", EXECUTORS)
def test_every_job_has_the_chosen_executor(monkeypatch: pytest.MonkeyPatch, executor: str) -> None:
    """Also Materialize, which runs the implicit asset job; and Dagster accepts the executor's configuration."""
    defs = _chosen(
        monkeypatch, executor, CELERY_BROKER_URL=SECRET, AUDITEXPORT_MYSQL_URL="x", AUDITEXPORT_CLICKHOUSE_URL="x"
    )
    assert {job.executor_def.name for job in defs.resolve_all_job_defs()} == {executor}
    for name in ("audit_log_export", "__ASSET_JOB"):
        job = defs.get_repository_def().get_job(name)
        assert job.executor_def.name == executor
        dg.validate_run_config(job, {})
        if executor == "k8s":  # without a limit, a run would start as many pods as it has batches
            dg.validate_run_config(job, {"execution": {"config": {"max_concurrent": 8}}})
            with pytest.raises(dg.DagsterInvalidConfigError, match="max_concurrent"):
                dg.validate_run_config(job, {"execution": {"config": {"max_concurrent": "a few"}}})


@pytest.mark.parametrize(("executor", "module"), EXTRAS.items())
def test_an_extra_that_is_not_installed_is_named_in_one_line(
    monkeypatch: pytest.MonkeyPatch, executor: str, module: str
) -> None:
    """The error says what to install."""
    monkeypatch.setitem(sys.modules, module, None)  # as Python has a module that is not there
    with pytest.raises(InvalidConfig) as refused:
        _chosen(monkeypatch, executor)
    assert str(refused.value) == (
        f"AUDITEXPORT_EXECUTOR is '{executor}' and {module} is not installed: "
        f"pip install 'auditexport-pipeline[{executor}]'"
    )


@pytest.mark.slow
def test_an_extra_is_imported_only_when_it_is_chosen() -> None:
    """Imports are part of every run's latency, and a missing extra must not stop the other executors."""
    program = (
        "import sys, auditexport_pipeline.definitions; print([m for m in sys.modules if m.split('.')[0] in "
        "('celery', 'dagster_celery', 'dagster_k8s', 'kombu', 'kubernetes', 'redis')])"
    )
    environment = {"AUDITEXPORT_EXECUTOR": "multiprocess", "PYTHONPATH": str(ROOT), "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("value", ["0", "an hour"])
def test_a_wrong_visibility_timeout_is_refused_by_its_variable(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    """An operator would notice a silent default only when a worker dies."""
    with pytest.raises(InvalidConfig, match="AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S"):
        _chosen(monkeypatch, "celery", AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S=value)


@pytest.mark.parametrize(
    "url",
    [
        "htp://:not_for_any_eye@127.0.0.1/",
        "redis+socket://:not_for_any_eye@/run/redis.sock",
        "sentinel://:not_for_any_eye@127.0.0.1:1",
        "not_for_any_eye@127.0.0.1",
        f"{SECRET};amqp://guest:not_for_any_eye@127.0.0.1:1//",
    ],
)
def test_another_broker_is_refused_without_its_url(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """Taken for RabbitMQ, it would have the wrong priorities, and a dead worker's task would never come back."""
    with pytest.raises(InvalidConfig, match=r"^CELERY_BROKER_URL must begin with redis, rediss") as refused:
        _chosen(monkeypatch, "celery", CELERY_BROKER_URL=url)
    assert "not_for_any_eye" not in str(refused.value)
    with pytest.raises(InvalidConfig):
        celery_steps.app()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("broker_url", "kind"),
    [(SECRET, "ConnectionError"), ("amqp://guest:not_for_any_eye@127.0.0.1:1//", "ConnectionRefusedError")],
)
def test_a_broker_that_is_down_fails_the_run_with_one_line(
    exporter: Exporter, stack: Stack, broker_url: str, kind: str
) -> None:
    """Kombu's own error would not say which broker, nor whether anything is lost; and its surroundings hold the password."""
    stack.put(*events(1))
    answer = exporter.command(
        *("job", "execute", "-m", "auditexport_pipeline.definitions", "-j", "audit_log_export"),
        AUDITEXPORT_EXECUTOR="celery",
        CELERY_BROKER_URL=broker_url,
    )
    assert answer.returncode != 0
    assert "not_for_any_eye" not in answer.stdout + answer.stderr
    (run,) = exporter.instance.get_runs()
    assert run.status is dg.DagsterRunStatus.FAILURE
    failure = failure_of(exporter.instance, run.run_id)
    assert failure.error == "BrokerUnavailable"
    assert failure.line == (
        "Celery's broker (CELERY_BROKER_URL), or the store of its results (CELERY_RESULT_BACKEND), is not reachable "
        f"({kind}). Nothing is lost: start it, or correct the variable, and run again"
    )
    assert not failure.reported  # so the run alerts send the heartbeat its /fail
    assert "not_for_any_eye" not in "".join(str(entry) for entry in exporter.instance.all_logs(run.run_id))
    assert ledger(stack) == []
    exporter.drain()
    everything_once(stack, 1)


def test_run_and_workers_agree_on_every_setting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker that acknowledges early, or listens elsewhere, breaks the promise however the run is configured."""
    monkeypatch.setenv("CELERY_BROKER_URL", SECRET)
    monkeypatch.setenv("AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S", "77")
    app = celery_steps.app()
    for name, value in celery_steps.settings().items():
        assert app.conf[name] == value, name
    assert app.conf.task_acks_late is True
    assert app.conf.broker_transport_options["visibility_timeout"] == 77
    assert app.conf.broker_url == app.conf.result_backend == SECRET
    assert [queue.name for queue in app.conf.task_queues] == ["dagster"]
    assert app.tasks["execute_plan"].acks_late is True


@pytest.mark.parametrize(
    ("broker_url", "backend"),
    [
        ("", "rpc://"),
        ("pyamqp://guest:guest@127.0.0.1:1//", "rpc://"),
        (SECRET, SECRET),
    ],
)
def test_results_go_where_the_broker_can_keep_them(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, backend: str
) -> None:
    """Results as messages are RabbitMQ's; Redis loses those whose reader was away for a moment."""
    monkeypatch.setenv("CELERY_BROKER_URL", broker_url)
    assert celery_steps.app().conf.result_backend == backend
    monkeypatch.setenv("CELERY_RESULT_BACKEND", "redis://127.0.0.1:2/3")
    assert celery_steps.app().conf.result_backend == "redis://127.0.0.1:2/3"


@pytest.mark.parametrize(("broker_url", "first"), [("", max), (SECRET, min)])
def test_steps_of_a_batch_go_before_later_batches(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, first: type
) -> None:
    """RabbitMQ serves the highest priority first, Redis the lowest; the wrong way round fetches every batch before one is marked."""
    defs = _chosen(monkeypatch, "celery", CELERY_BROKER_URL=broker_url)
    ops = {
        node.name: int(node.tags.get("dagster-celery/priority", "5"))
        for node in defs.resolve_job_def("audit_log_export").all_node_defs
        if isinstance(node, dg.OpDefinition)
    }
    order = ["plan_batches", "finish_export", "mark_exported", "write_clickhouse", "fetch_batch"]
    assert [first(ops[name] for name in order[n:]) for n in range(5)] == [ops[name] for name in order]
    assert len({ops[name] for name in order}) == 5
    assert all(0 <= value < 10 for value in ops.values())


def test_an_outbox_with_a_queue_sends_every_step_there(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """In the queue that all share, the sixty-four batches of one outbox go before the one row of another."""
    monkeypatch.setenv("AUDITEXPORT_EXECUTOR", "celery")
    entry = OutboxSettings(name="eu", celery_queue="exports.eu")
    for defs, queue in ((defs_of(entry), "exports.eu"), (build_audit_export_defs("us"), None)):
        (job,) = [job for job in defs.resolve_all_job_defs() if job.name.endswith("_audit_log_export")]
        ops = [node for node in job.all_node_defs if isinstance(node, dg.OpDefinition)]
        assert len(ops) == 5
        assert {op.tags.get("dagster-celery/queue") for op in ops} == {queue}
    with pytest.raises(InvalidConfig, match="celery_queue must be"):
        build_audit_export_defs("eu", celery_queue="a queue")


@pytest.mark.parametrize(
    ("broker_url", "most_s", "message"),
    [
        (
            SECRET,
            899,
            "linger_s is 900 and AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S is 900: .* set linger_s below 900, or",
        ),
        ("amqp://guest@127.0.0.1:1//", 1_799, r"linger_s is 1800: .*consumer_timeout.*; set linger_s below 1800"),
    ],
)
def test_a_run_that_stays_longer_than_the_broker_waits_is_refused(
    monkeypatch: pytest.MonkeyPatch, broker_url: str, most_s: int, message: str
) -> None:
    """The step that stays would be given to a second worker while the first is at it, and with RabbitMQ to a third."""
    urls = {"AUDITEXPORT_MYSQL_URL": "x", "AUDITEXPORT_CLICKHOUSE_URL": "x"}
    defs = _chosen(monkeypatch, "celery", CELERY_BROKER_URL=broker_url, **urls)
    for job in ("audit_log_export", "__ASSET_JOB"):
        launched = defs.get_repository_def().get_job(job)
        dg.validate_run_config(launched, launchpad({"linger_s": most_s}))
        with pytest.raises(dg.DagsterInvalidConfigError, match=message):
            dg.validate_run_config(launched, launchpad({"linger_s": most_s + 1}))
    with pytest.raises(InvalidConfig, match=message):
        build_audit_export_defs(drain={"linger_s": most_s + 1})
    monkeypatch.setenv("AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S", "901")
    if broker_url == SECRET:
        build_audit_export_defs(drain={"linger_s": most_s + 1})
    monkeypatch.setenv("AUDITEXPORT_EXECUTOR", "in_process")
    build_audit_export_defs(drain={"linger_s": most_s + 1})


def test_definitions_hold_the_names_of_secrets_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """Dagster stores a snapshot of every job that runs, and shows it on its page."""
    defs = _chosen(monkeypatch, "celery", CELERY_BROKER_URL=SECRET, CELERY_RESULT_BACKEND=SECRET)
    job = defs.resolve_job_def("audit_log_export")
    assert "not_for_any_eye" not in dg.serialize_value(job.get_job_snapshot())
    assert "not_for_any_eye" not in repr(vars(job.executor_def)) + repr(celery_steps.settings())
