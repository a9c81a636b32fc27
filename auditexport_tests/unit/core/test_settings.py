"""Settings: what is refused, and by which words; the launchpad, the CLI and the variables rely on both."""

from __future__ import annotations

from pathlib import Path

import pytest
from click.testing import CliRunner

from auditexport_pipeline.cli import main
from auditexport_pipeline.core.alerts import Policy
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits, Retention, Settings, Targets, Thresholds, Variables, bounds_of
from auditexport_pipeline.definitions import build_defs
from auditexport_pipeline.defs.build import build_audit_export_defs
from auditexport_pipeline.outboxes import check_environment
from auditexport_tests.support.builders import settings_file

MODELS = (Limits, Policy, Retention, Targets, Thresholds)


@pytest.mark.parametrize("model", MODELS)
def test_every_setting_has_a_sentence_bounds_and_a_default_within_them(model: type[Settings]) -> None:
    """A setting without bounds takes a typing error for a value."""
    model()
    for name, field in model.model_fields.items():
        assert field.description, name
        if name != "versions":
            assert any(hasattr(bound, "ge") or hasattr(bound, "gt") for bound in field.metadata), name


@pytest.mark.parametrize("value", [0, 500_001, True, 5.0, "5", None, float("nan")])
def test_a_wrong_value_is_named_with_its_bounds(value: object) -> None:
    """The message is all that the launchpad, a sensor's tick or the CLI shows."""
    with pytest.raises(InvalidConfig) as refused:
        Limits(batch_rows=value)  # type: ignore[arg-type]
    assert str(refused.value) == f"batch_rows is {value!r}; it must be an integer from 1 to 500,000"
    low, high = bounds_of(Limits.model_fields["batch_rows"])
    assert [Limits(batch_rows=bound).batch_rows for bound in (low, high)] == [low, high]


def test_everything_that_is_wrong_is_said_at_once() -> None:
    """One error a launch is three launches for three typing errors."""
    with pytest.raises(InvalidConfig) as refused:
        Limits(lease_s=1, mark_row=5, versions=["v9"])  # type: ignore[call-arg]
    message = str(refused.value)
    assert message.startswith("lease_s is 1; it must be an integer from 10 to 86,400; versions is ['v9']; choose from ")
    assert "; mark_row is not a setting of a drain; choose from batch_bytes, " in message


def test_settings_are_not_changed_once_they_are_made() -> None:
    """A thread reads them while another one would change them."""
    limits = Limits()
    with pytest.raises(Exception, match="frozen"):
        limits.batch_rows = 5
    assert limits.with_values({"batch_rows": 5}) == Limits(batch_rows=5)
    with pytest.raises(InvalidConfig, match="batch_rows is 0"):
        limits.with_values({"batch_rows": 0})


def test_an_empty_variable_counts_as_not_set() -> None:
    """An environment file keeps the line of a variable that has no value."""
    given = {"AUDITEXPORT_EXECUTOR": "", "AUDITEXPORT_CELERY_VISIBILITY_TIMEOUT_S": "77", "PATH": "/bin"}
    assert Variables.from_environment(given) == Variables(celery_visibility_timeout_s=77)


FILE = "of the file that AUDITEXPORT_OUTBOXES names, or of the component"


@pytest.mark.parametrize(
    ("variable", "successor"),
    [
        ("DRAIN", f"the key `drain` {FILE}"),
        ("SENSOR_ROWS", f"the key `sensor_rows` {FILE}"),
        ("SENSOR_LAG_S", f"the key `sensor_lag_s` {FILE}"),
        *((f"TARGET_{name.upper()}", f"the key `targets: {{{name}: …}}` {FILE}") for name in Targets.model_fields),
        *((f"ALERT_{name.upper()}", f"the key `alert_policy: {{{name}: …}}` {FILE}") for name in Policy.model_fields),
        ("PAGE_URL", f"the key `page_url` {FILE}"),
        ("CELERY_QUEUE", f"the key `celery_queue` {FILE}"),
        ("CELERY_BROKER_URL", "Celery's own variable CELERY_BROKER_URL"),
        ("CELERY_RESULT_URL", "Celery's own variable CELERY_RESULT_BACKEND"),
        ("KUBERNETES_NAMESPACE", "`job_namespace` of run_launcher in dagster.yaml"),
        ("KUBERNETES_IMAGE", "`job_image` of run_launcher in dagster.yaml"),
        ("KUBERNETES_SERVICE_ACCOUNT", "`service_account_name` of run_launcher in dagster.yaml"),
        ("KUBERNETES_ENV_SECRETS", "`env_secrets` of run_launcher in dagster.yaml"),
        ("KUBERNETES_STORAGE_CLAIM", "`volumes` of run_launcher in dagster.yaml"),
        ("KUBERNETES_MAX_CONCURRENT", "`execution: {config: {max_concurrent: …}}` in a run's configuration"),
    ],
)
def test_a_variable_that_went_is_refused_with_its_successor(
    monkeypatch: pytest.MonkeyPatch, variable: str, successor: str
) -> None:
    """A setting that silently does nothing is found on the wrong day. Dagster and the CLI refuse it when they start."""
    monkeypatch.setenv(f"AUDITEXPORT_{variable}", "s3cret")
    for start in (build_audit_export_defs, check_environment):
        with pytest.raises(InvalidConfig) as refused:
            start()
        assert str(refused.value) == f"AUDITEXPORT_{variable} is not read any more; use {successor}"


@pytest.mark.parametrize(
    ("variable", "nearest"),
    [
        ("AUDITEXPORT_MYSQL_ULR", "AUDITEXPORT_MYSQL_URL"),
        ("AUDITEXPORT_HEARTBEAT", "AUDITEXPORT_HEARTBEAT_URL"),
        ("AUDITEXPORT_EXECUTER", "AUDITEXPORT_EXECUTOR"),
    ],
)
def test_an_unknown_variable_is_refused_with_the_nearest_one(
    monkeypatch: pytest.MonkeyPatch, variable: str, nearest: str
) -> None:
    """A typing error in the name of a variable would be a setting that does nothing."""
    monkeypatch.setenv(variable, "s3cret")
    message = f"{variable} is not a variable of auditexport; the nearest is {nearest}"
    with pytest.raises(InvalidConfig, match=f"^{message}$"):
        build_defs()
    answer = CliRunner().invoke(main, ["status"])
    assert (answer.exit_code, answer.stderr) == (2, f"auditexport: {message}\n")


def test_variables_of_tests_services_and_the_file_are_no_mistakes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Kubernetes sets variables for each Service, and a file of outboxes may name variables of any name."""
    for name in ("TEST_MYSQL_URL", "CELERY_SERVICE_HOST", "PORT_80_TCP_ADDR", "EU_MYSQL_URL"):
        monkeypatch.setenv(f"AUDITEXPORT_{name}", "x")
    settings = settings_file(tmp_path, mysql_url_env="AUDITEXPORT_EU_MYSQL_URL")
    monkeypatch.setenv("AUDITEXPORT_OUTBOXES", settings)
    check_environment()
