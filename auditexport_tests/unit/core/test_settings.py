"""Settings: what is refused, and by which words; the launchpad, the CLI and the variables rely on both."""

from __future__ import annotations

import pytest

from auditexport_pipeline.core.alerts import Policy
from auditexport_pipeline.core.errors import InvalidConfig
from auditexport_pipeline.core.settings import Limits, Retention, Settings, Targets, Thresholds, bounds_of

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
    told = str(refused.value)
    assert told.startswith("lease_s is 1; it must be an integer from 10 to 86,400; versions is ['v9']; choose from ")
    assert "; mark_row is not a setting of a drain; choose from batch_bytes, " in told


def test_settings_are_not_changed_once_they_are_made() -> None:
    """A thread reads them while another one would change them."""
    limits = Limits()
    with pytest.raises(Exception, match="frozen"):
        limits.batch_rows = 5
    assert limits.with_values({"batch_rows": 5}) == Limits(batch_rows=5)
    with pytest.raises(InvalidConfig, match="batch_rows is 0"):
        limits.with_values({"batch_rows": 0})


def test_variables_are_read_by_their_prefix_and_refused_by_name() -> None:
    """A variable with a typing error in its name is a setting that does nothing."""
    given = {"AUDITEXPORT_SENSOR_ROWS": "5", "AUDITEXPORT_SENSOR_LAG_S": "", "PATH": "/bin"}
    assert Thresholds.from_environment(given) == Thresholds(rows=5)
    of_a_service = {"AUDITEXPORT_SENSOR_SERVICE_HOST": "10.0.0.1", "AUDITEXPORT_SENSOR_PORT_80_TCP_ADDR": "10.0.0.1"}
    assert Thresholds.from_environment(given | of_a_service) == Thresholds(rows=5)
    for name, text in (("ROWS", "5.5"), ("LAG_S", "nan"), ("LAG_S", "inf"), ("LAG_S", "soon"), ("LAG", "5")):
        with pytest.raises(InvalidConfig, match=f"^AUDITEXPORT_SENSOR_{name} is "):
            Thresholds.from_environment({f"AUDITEXPORT_SENSOR_{name}": text})
